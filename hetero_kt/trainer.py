"""The loop: step, log, evaluate, save, stop on a signal. It knows of a method what `hetero_kt.methods` says."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from hetero_kt.config import Recipe
from hetero_kt.distributed import checkpoint, params
from hetero_kt.distributed.agreement import Unwritable, UserError, agreed
from hetero_kt.distributed.checkpoint import Checkpoints, NotFinite, Written
from hetero_kt.distributed.heartbeat import Heartbeat
from hetero_kt.distributed.launch import Ranks, StopSignal, fresh_seed, seed_everything
from hetero_kt.distributed.layout import REMOVE
from hetero_kt.distributed.saved import DAMAGE
from hetero_kt.evaluate import averaged_buffers
from hetero_kt.files import write_whole
from hetero_kt.log import Log
from hetero_kt.messages import first_line
from hetero_kt.methods import Diverged, Method
from hetero_kt.nn.reencode import plain_state_dict
from hetero_kt.profile import part
from hetero_kt.weights import save_tensors

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

NOT_FINITE = 3
"""Intervals of the log in a row with a loss that is NaN or infinite after which a run is given up. In none of them a
checkpoint is written."""
SIGNAL_EVERY = 10
"""Steps between two looks at signals, at most: ranks have to agree, which costs an all-reduce."""


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
        self.begun_from: Path | None = None
        self.metrics: dict[str, dict[str, float]] = {}

    @property
    def engines(self) -> dict[str, DeepSpeedEngine]:
        """The engine of everything that trains."""
        return {name: learner.engine for name, learner in self.method.learners.items()}

    def resume(self, path: Path) -> None:
        """Continue from the checkpoint `path`, of any number of ranks at any ZeRO stage. Collective.

        Raises:
            UserError: a damaged checkpoint, one of other models, or one of a run that had diverged already.
        """
        shared, saved_by = checkpoint.load(path, self.method.learners)
        with agreed():
            try:
                self.method.load_state_dict(shared["method"])
            except DAMAGE as error:
                if isinstance(error, ValueError):
                    raise
                raise ValueError(f"{path} is not one of this method ({first_line(error)}): {REMOVE}.") from error
        try:
            self._raise_if_not_finite()
        except NotFinite as error:
            raise UserError(f"{path} is of a run that had diverged: {error}: {REMOVE}.") from error
        self.step, self.begun_from = int(path.name), path
        if path.resolve().parent == self.checkpoints.folder.resolve():
            self.checkpoints.last = self.step
        if saved_by != self.ranks.world:
            seed_everything(fresh_seed(self.recipe.seed, self.step, self.ranks.rank))
            if self.ranks.first:
                print(
                    f"{path} was saved on {saved_by} rank(s), and {self.ranks.world} go on: random numbers are drawn "
                    "afresh for (seed, step, rank), and BatchNorm's averages begin as their mean over the saved ranks",
                    flush=True,
                )

    def fit(self) -> bool:
        """Train to the end; True when it was reached, False when a signal stopped the run (a checkpoint is written).

        Raises:
            Diverged: proposals, losses or the state were not finite; the last sound checkpoint is as it was.
        """
        recipe = self.recipe
        # A checkpoint may be older than its step's evaluation (a signal came first): a resumed run makes sure of it.
        again = self.step > 0 and self._due(recipe.eval_every)
        self.log = Log(self.folder, self.step, self.last, recipe.name, self.ranks, evaluated_again=again)
        self.log.measured = self.measured
        with self.log:
            try:
                return self._fit(again)
            except NotFinite as error:
                self._give_up(f"the run has diverged: {error}", error)
            except Diverged as error:
                self.log.write(self.step)
                self._give_up(str(error), error)

    def _fit(self, again: bool) -> bool:
        recipe = self.recipe
        if again:
            self.evaluate_all()
        while self.step < self.last:
            self._one_step()
            looks = self._due(min(recipe.log_every, SIGNAL_EVERY))
            with part("logging"):
                stops = looks and self.stop.agreed(self.ranks.device)
            if looks:
                self._note(self.checkpoints.settle())
            saves = self._due(recipe.save_every)
            if stops or saves or self._due(recipe.log_every):
                with part("logging"):
                    self.log.write(self.step)  # a checkpoint's losses are in the log, so that none is told twice
                self._check_losses(ends=bool(stops) or self.step >= self.last)
            if stops:
                self.save()
                self._finish_saving()
                return False
            if self._due(recipe.eval_every):
                self._raise_if_not_finite()
                self.evaluate_all()
            if saves and not self.log.not_finite:
                self.save()
        self._finish_saving()
        return True

    def _due(self, every: int) -> bool:
        """True after each `every` steps (0: never) and at the end; a checkpoint may lie behind that."""
        return self.step >= self.last or (every > 0 and self.step % every == 0)

    def _one_step(self) -> None:
        with part("data"):
            batches = self.batches(self.step)
        scalars = self.method.step(self.step, batches)
        self.step += 1
        self.pulse.beat()
        with part("logging"):
            self.log.add(self.step, scalars)
        self.after_step()

    def _check_losses(self, ends: bool) -> None:
        """Raise Diverged after too many bad intervals, and after one where the run ends or stops with it."""
        if self.log.not_finite >= NOT_FINITE:
            raise NotFinite(f"losses were not finite in {NOT_FINITE} intervals of the log in a row")
        if ends and self.log.not_finite:
            raise NotFinite("losses were not finite in the last interval of the log")

    def _raise_if_not_finite(self) -> None:
        """Look at the whole state, on the device. Collective."""
        checkpoint.raise_if_not_finite(self.method.learners, {"method": self.method.state_dict()}, self.ranks.device)

    def _give_up(self, why: str, error: Exception) -> NoReturn:
        """End the run over numbers that are not finite, with the command that goes on. Collective.

        Raises:
            Diverged: always, on all ranks.
        """
        with contextlib.suppress(NotFinite):  # of a checkpoint that was begun when it had happened already
            self._finish_saving()
        sound = self.checkpoints.folder / str(self.checkpoints.last) if self.checkpoints.last >= 0 else self.begun_from
        anew = "lower a learning rate and begin again with --resume never"
        mend = f"start it with --resume auto to go on from {sound}, which is sound, or {anew}" if sound else anew
        raise Diverged(f"{why.rstrip('.')}: nothing of that was saved; {mend}.") from error

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
                    export_folder(self.folder / "export")
                    self.write_model(name, engine.module, plain, self.folder / "export" / view)
                except (OSError, SafetensorError) as error:
                    raise Unwritable(self.folder / "export" / view, error) from error
        dist.barrier()


def export_folder(folder: Path) -> None:
    """Make the folder of exports, unless it is there.

    Raises:
        OSError: it is a file or a link, through which another place would be written to.
    """
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(folder))
    folder.mkdir(exist_ok=True)


def write_safetensors(name: str, module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """`<path>.safetensors`, in one go."""
    write_whole(path.with_name(f"{path.name}.safetensors"), lambda part: save_tensors(state, part))
