"""The scalars of a run: metrics.jsonl, TensorBoard and the progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from hetero_kt.distributed.agreement import Unwritable
from hetero_kt.distributed.launch import Ranks

SHOWN = ("/loss", *(f"/test_{name}" for name in ("top1", "exact", "error", "accuracy", "overall", "r_mean")))
"""What stands beside the progress bar: losses, and the first figure of each task."""


class Log:
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

    def __enter__(self) -> Log:
        if self.ranks.first:
            path = self.folder / "metrics.jsonl"
            try:
                lines = path.read_text().splitlines() if path.exists() else []
                part = path.with_suffix(".part")
                part.write_text("".join(line + "\n" for line in lines if self._stays(line)))
                os.replace(part, path)  # in one go: a kill here must not cost the run its history
                self.file = path.open("a", buffering=1)
                self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.start + 1)
            except OSError as error:
                raise Unwritable(path, error) from error
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
        read = {}
        for device in {value.device for value in tensors}:
            read[device] = iter(torch.stack([value.float() for value in tensors if value.device == device]).tolist())
        numbers = (next(read[value.device]) for value in tensors)
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
