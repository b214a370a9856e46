"""The loop: step, log, evaluate, save, stop on a signal. It knows of a method what `hetero_kt.methods` says."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from hetero_kt.config import Recipe
from hetero_kt.distributed import checkpoint, params
from hetero_kt.distributed.agreement import Unwritable
from hetero_kt.distributed.checkpoint import Checkpoints, Written
from hetero_kt.distributed.heartbeat import Heartbeat
from hetero_kt.distributed.launch import Ranks, StopSignal, fresh_seed, seed_everything
from hetero_kt.evaluate import averaged_buffers
from hetero_kt.methods import Diverged, Method
from hetero_kt.nn.reencode import plain_state_dict

NOT_FINITE = 3
"""Intervals of the log with a loss that is NaN or infinite after which a run is given up, without a checkpoint."""
SIGNAL_EVERY = 10
"""Steps between two looks at signals, at most: ranks have to agree, which costs an all-reduce."""


SHOWN = ("/loss", *(f"/test_{name}" for name in ("top1", "exact", "error", "accuracy", "overall", "r_mean")))
"""What stands beside the progress bar: losses, and the first figure of each task."""


class Trainer:
    """Runs `method` for `recipe.steps` optimizer steps in the run folder `folder`.

    Args:
        batches: step -> {model: batch}; a pure function, so that a resume needs no more than the step.
        evaluate: (model's name, the model) -> its metrics; collective.
        last: stop after this many steps; the schedules still belong to the whole run.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        batches: Callable[[int], Mapping[str, Any]],
        evaluate: Callable[[str, nn.Module], dict[str, float]],
        folder: Path,
        ranks: Ranks,
        stop: StopSignal,
        *,
        last: int,
    ) -> None:
        self.recipe, self.method, self.batches, self.evaluate = recipe, method, batches, evaluate
        self.folder, self.ranks, self.stop, self.last = folder, ranks, stop, last
        self.after_step: Callable[[], None] = lambda: None
        self.measured: Callable[[], Mapping[str, float]] = dict
        self.write_model = write_safetensors
        self.pulse = Heartbeat(ranks, patience=0)
        self.checkpoints = Checkpoints(folder / "checkpoints", recipe.keep, ranks.device)
        self.step = 0
        self.metrics: dict[str, dict[str, float]] = {}

    @property
    def engines(self) -> dict[str, DeepSpeedEngine]:
        """The engine of everything that trains."""
        return {name: learner.engine for name, learner in self.method.learners.items()}

    def resume(self, path: Path) -> None:
        """Continue from the checkpoint `path`, of any number of ranks at any ZeRO stage. Collective."""
        shared, saved_by = checkpoint.load(path, self.method.learners)
        self.method.load_state_dict(shared["method"])
        self.step = int(path.name)
        if path.resolve().parent == self.checkpoints.folder.resolve():
            self.checkpoints.last = self.step
        if saved_by != self.ranks.world:
            seed_everything(fresh_seed(self.recipe.seed, self.step, self.ranks.rank))
            if self.ranks.first:
                print(
                    f"{path} was saved by {saved_by} ranks and {self.ranks.world} go on: random numbers are drawn "
                    "afresh for (seed, step, rank), and BatchNorm's averages begin as their mean over the saved ranks",
                    flush=True,
                )

    def fit(self) -> bool:
        """Train to the end; True when it was reached, False when a signal stopped the run (a checkpoint is written).

        Raises:
            Diverged: proposals were not finite (a checkpoint is written), or losses (none is).
        """
        recipe = self.recipe
        # A checkpoint may be older than its step's evaluation (a signal came first): a resumed run makes sure of it.
        again = self.step > 0 and self._due(recipe.eval_every)
        self.log = _Log(self.folder, self.step, self.last, recipe.name, self.ranks, evaluated_again=again)
        self.log.measured = self.measured
        with self.log:
            if again:
                self.evaluate_all()
            while self.step < self.last:
                try:
                    self._one_step()
                except Diverged:
                    self.log.write(self.step)
                    self.save()
                    self._finish_saving()
                    raise
                looks = self._due(min(recipe.log_every, SIGNAL_EVERY))
                stops = looks and self.stop.agreed(self.ranks.device)
                if looks:
                    self._note(self.checkpoints.settle())
                saves = self._due(recipe.save_every)
                if stops or saves or self._due(recipe.log_every):
                    self.log.write(self.step)  # a checkpoint's losses are in the log, so that none is told twice
                    self._check_losses()
                if stops:
                    self.save()
                    self._finish_saving()
                    return False
                if self._due(recipe.eval_every):
                    self.evaluate_all()
                if saves:
                    self.save()
            self._finish_saving()
        return True

    def _due(self, every: int) -> bool:
        """True after each `every` steps (0: never) and at the end."""
        return self.step == self.last or (every > 0 and self.step % every == 0)

    def _one_step(self) -> None:
        scalars = self.method.step(self.step, self.batches(self.step))
        self.step += 1
        self.pulse.beat()
        self.log.add(self.step, scalars)
        self.after_step()

    def _check_losses(self) -> None:
        if self.log.not_finite >= NOT_FINITE:
            self._finish_saving()
            raise Diverged(
                f"losses were not finite in {NOT_FINITE} intervals of the log in a row: lower a learning rate, and go "
                "on from the last checkpoint, which was written before."
            )

    def evaluate_all(self) -> None:
        """Every model's metrics, with BatchNorm statistics averaged over ranks for the while."""
        self.pulse.long("evaluating")
        self.metrics = {}
        for name, view, engine in self._views():
            self.metrics[view] = self.evaluate(name, engine)
        self.log.scalars(
            self.step,
            {f"{name}/test_{k}": v for name, values in self.metrics.items() for k, v in values.items()},
        )

    def _views(self) -> Iterator[tuple[str, str, DeepSpeedEngine]]:
        """Every model as itself and, where it keeps one, as the average of its weights: (name, view, engine)."""
        for name in self.method.models:
            learner = self.method.learners[name]
            for view in learner.views(name):
                with learner.seen_as(name, view) as engine, averaged_buffers(engine.module):
                    yield name, view, engine

    def save(self) -> None:
        """Begin a checkpoint of this step, which becomes complete while training goes on. Collective."""
        self.pulse.long("saving")
        method = {"method": self.method.state_dict()}
        self._note(self.checkpoints.save(self.step, self.method.learners, method))

    def _finish_saving(self) -> None:
        self.pulse.long("saving")
        self._note(self.checkpoints.finish())

    def _note(self, written: Written | None) -> None:
        if written is not None:
            seconds = {"checkpoint_stall_seconds": written.stall, "checkpoint_write_seconds": written.writing}
            self.log.record(written.step, seconds)

    def export(self) -> None:
        """Every model alone, as plain safetensors: teachers, adapters and connectors gone, factors multiplied out.
        Collective."""
        self.pulse.long("exporting")
        for name, view, engine in self._views():
            state = params.state_dict(engine)
            if self.ranks.first:
                plain = {key: value.contiguous() for key, value in plain_state_dict(state).items()}
                try:
                    (self.folder / "export").mkdir(exist_ok=True)
                    self.write_model(name, engine.module, plain, self.folder / "export" / view)
                except (OSError, SafetensorError) as error:
                    raise Unwritable(self.folder / "export" / view, error) from error
        dist.barrier()


def write_safetensors(name: str, module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """`<path>.safetensors`, in one go."""
    target = path.with_suffix(".safetensors")
    save_file(state, target.with_suffix(".part"))
    os.replace(target.with_suffix(".part"), target)


class _Log:
    """Scalars of a run: kept on the device, read once per interval, written by the first rank to metrics.jsonl and
    TensorBoard, the latest beside the progress bar. Losses are averaged over the interval; every transfer of it has
    its measurements written at its own step."""

    def __init__(self, folder: Path, start: int, last: int, name: str, ranks: Ranks, *, evaluated_again: bool) -> None:
        self.folder, self.start, self.last, self.ranks = folder, start, last, ranks
        self.evaluated_again = evaluated_again
        self.measured: Callable[[], Mapping[str, float]] = dict
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self.transfers: list[tuple[int, dict[str, Tensor]]] = []
        self.count = 0
        self.not_finite = 0  # intervals in a row
        self.said = start  # the step of the last line where there is no terminal for a bar
        self.clock = time.perf_counter()
        self.name = name

    def __enter__(self) -> _Log:
        if self.ranks.first:
            path = self.folder / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            part = path.with_suffix(".part")
            part.write_text("".join(line + "\n" for line in lines if self._stays(line)))
            os.replace(part, path)  # in one go: a kill here must not cost the run its history
            self.file = path.open("a", buffering=1)
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.start + 1)
            self.console = Console()
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True)
            self.task = self.progress.add_task(self.name, total=self.last, completed=self.start, note="")
            self.progress.start()
        return self

    def _stays(self, line: str) -> bool:
        """False for what a stopped run wrote after its last checkpoint, and for a line that a kill cut short."""
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            return False
        told_again = self.evaluated_again and any("/test_" in name for name in values)
        return values["step"] < self.start or (values["step"] == self.start and not told_again)

    def __exit__(self, *_: object) -> None:
        if self.ranks.first:
            self.progress.stop()
            with contextlib.suppress(OSError):  # has been said where it was written
                self.file.close()
                self.board.close()

    def add(self, step: int, scalars: Mapping[str, Tensor]) -> None:
        """One step's scalars, left where they are."""
        measured = dict(scalars)
        for name in [name for name in scalars if name.endswith("loss")]:
            value = measured.pop(name)
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)  # a model may rest before the interval ends
        if measured:
            self.transfers.append((step, measured))
        self.count += 1

    def write(self, step: int) -> None:
        """Mean losses since the last call, over ranks too, and every transfer's measurements. Collective."""
        if not self.count:
            return
        names = sorted(self.sums)
        losses = torch.stack([total.float() / count for total, count in (self.sums[name] for name in names)])
        dist.all_reduce(losses)
        seconds = time.perf_counter() - self.clock
        values = dict(zip(names, (losses / self.ranks.world).tolist(), strict=True))
        self.not_finite = 0 if all(map(math.isfinite, values.values())) else self.not_finite + 1
        for at, measured in self._measurements():
            if at < step:
                self.record(at, measured)
            else:
                values |= measured
        values |= {"seconds_per_step": seconds / self.count, **self.measured()}
        self.sums, self.transfers, self.count, self.clock = {}, [], 0, time.perf_counter()
        self.scalars(step, values)

    def _measurements(self) -> list[tuple[int, dict[str, float]]]:
        """The transfers as numbers; the device is waited for once."""
        tensors = [value for _, measured in self.transfers for value in measured.values()]
        on_device = [value.float() for value in tensors if value.device.type != "cpu"]
        read = iter(torch.stack(on_device).tolist() if on_device else [])
        numbers = iter([float(value) if value.device.type == "cpu" else next(read) for value in tensors])
        return [(step, {name: next(numbers) for name in measured}) for step, measured in self.transfers]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write `values` of this step, on the first rank."""
        if not self.ranks.first:
            return
        self.record(step, values)
        note = "  ".join(f"{k} {v:.3g}" for k, v in values.items() if k.endswith(SHOWN))
        self.progress.update(self.task, completed=step, note=note)
        evaluated = any("/test_" in name for name in values)
        if evaluated or (not self.console.is_terminal and step - self.said >= self.last // 5):
            self.console.print(f"{self.name}  step {step}/{self.last}  {note}", highlight=False)
            self.said = step

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """A line of its own, on the first rank; the progress bar stays where it is."""
        if not self.ranks.first:
            return
        # JSON has no NaN and no infinity
        written = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self.file.write(json.dumps({"step": step, **written}) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            raise Unwritable(self.folder / "metrics.jsonl", error) from error
