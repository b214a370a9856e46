"""The scalars of a run: metrics.jsonl, TensorBoard and the progress bar."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from hetero_kt.distributed.agreement import Unwritable, agreed
from hetero_kt.distributed.launch import Ranks
from hetero_kt.documents import json_lines
from hetero_kt.files import open_regular, write_whole

LOG, BOARD = "metrics.jsonl", "tensorboard"
"""In a run's folder."""
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
        with agreed():
            if self.ranks.first:
                self._open()
        if self.ranks.first:
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

    def _open(self) -> None:
        """Open the log behind what an earlier start has left in it.

        Raises:
            ValueError: what lies in its place is no log, or it cannot be written.
        """
        path, board = self.folder / LOG, self.folder / BOARD
        if board.exists() and not board.is_dir():
            raise ValueError(f"{board} is no folder, and TensorBoard's files go there: move it away and start again.")
        try:
            earlier: contextlib.AbstractContextManager[BinaryIO] = open_regular(path)
        except FileNotFoundError:
            earlier = contextlib.nullcontext(io.BytesIO())
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): move it away and start again.") from error
        try:
            with earlier as lines:
                write_whole(path, lambda part: self._keep(lines, part))  # a kill must not cost the run its history
            self.file = path.open("a", buffering=1)
        except OSError as error:
            raise Unwritable(path, error) from error
        try:
            self.board = SummaryWriter(str(board), purge_step=self.start + 1)
        except OSError as error:
            raise Unwritable(board, error) from error

    def _keep(self, lines: BinaryIO, part: Path) -> None:
        """Copy what stays. A line that a kill cut short goes; where others are damaged, the file is set aside as it is,
        and the run goes on."""
        damaged, cut = 0, False
        with part.open("wb") as kept:
            for line, values in json_lines(lines):
                damaged += cut
                step = values.get("step") if values else None
                cut = values is None or type(step) is not int or step < 0
                if values is not None and not cut and self._stays(values):
                    kept.write(line.rstrip(b"\n") + b"\n")
        if not damaged:
            return
        path = self.folder / LOG
        numbers = itertools.chain(("",), itertools.count(2))
        aside = next(to for n in numbers if not os.path.lexists(to := path.with_name(f"{LOG}.damaged{n}")))
        shutil.copyfile(path, aside)
        print(f"{path} has damaged lines, which are left out: {aside} has them all", flush=True)

    def _stays(self, values: Mapping[str, Any]) -> bool:
        """False for what a stopped run wrote after its last checkpoint."""
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
        except OSError as error:
            raise Unwritable(self.folder / LOG, error) from error
        try:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            raise Unwritable(self.folder / BOARD, error) from error
