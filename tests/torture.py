"""A small run, killed again and again at random moments, ends with what it would have ended with.

    python tests/torture.py --kills 100     or: make torture

Ranks are forked from a process that has imported everything already, so that a kill and the start after it cost a few
seconds. Each start is a launcher's own `main`: ranks meet, take the folder's lock, resume, train, save every other
step, evaluate, export. A kill is SIGKILL to both ranks or to one, at a random time after the start or an instant after
a checkpoint has been begun. After it each complete checkpoint has to be whole, and equal, by the checksums of all
its files, to that of the same step of a run that nobody has touched; none may have gone without a newer one. A run that
comes to its end has to have the untouched run's last checkpoint (weights, moments, averages, every rank's buffers and
random state), exports, metrics and lines in the log, to the bit. Then the next run begins, at another ZeRO stage.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import tiny
import tyro

from hetero_kt import report
from hetero_kt import run as running
from hetero_kt.config import Recipe
from hetero_kt.distributed import layout, meeting
from hetero_kt.distributed.launch import free_port
from hetero_kt.folder import run_folder

RANKS = 2
STEPS = 16
SAVE_EVERY = 2
PATIENCE = 8.0
"""Seconds without a word of another rank, and at the start those that ranks wait for each other: one whose peer is gone
has to end by itself, in this time and a little more."""
MODULES = ["torture", "deepspeed.runtime.zero.muon.original_muon", "tensorboard.compat.tensorflow_stub"]
"""What the process that ranks are forked from has imported: what takes a start longest."""


@dataclass(frozen=True)
class Torture:
    """How much of it."""

    kills: int = 100
    stages: tuple[int, ...] = (1, 3, 2, 0)
    """ZeRO stages of the runs, in turns."""
    seed: int = 0
    """Of the moments; what a machine makes of them differs each time."""
    folder: str = ""
    """Keeps the runs; empty takes one that goes afterwards."""
    json: str = ""
    """Also write the figures to this file."""


@dataclass
class Tally:
    """What has happened."""

    kills: int = 0
    """That hit a living rank."""
    single: int = 0
    """To one rank of the two."""
    torn: int = 0
    """That left a checkpoint half-written, which the next start passes over."""
    unsaved: int = 0
    """Before the first checkpoint was complete: the run began again."""
    survived: int = 0
    """After which the run came to the end that it would have come to."""
    runs: int = 0
    steps_lost: list[int] = field(default_factory=list)
    """Logged steps since the last complete checkpoint, per kill."""
    ended: list[float] = field(default_factory=list)
    """Seconds from the kill of one rank to the end of the other."""
    problems: list[str] = field(default_factory=list)


def recipe(folder: Path, stage: int, **changes: Any) -> Recipe:
    """Two models with BatchNorm and dropout that teach each other and keep averages of their weights."""
    settings = {"steps": STEPS, "save_every": SAVE_EVERY, "eval_every": 8, "log_every": 1, **changes}
    return tiny.with_average(tiny.recipe(folder, stage, **settings))


def torture(settings: Torture, folder: Path, say: Callable[[str], None] = print) -> Tally:
    """Kill and start again until enough kills have hit, and the last run has ended."""
    moments, tally, stages = random.Random(settings.seed), Tally(), settings.stages
    warm()
    references: dict[int, Recipe] = {}
    seconds: dict[int, float] = {}
    while tally.kills < settings.kills and not tally.problems:
        stage = stages[tally.runs % len(stages)]
        if stage not in references:
            references[stage] = recipe(folder / f"untouched{stage}", stage, keep=STEPS)
            began = time.monotonic()
            with Job(references[stage]) as job:
                job.wait(120)
                assert job.codes() == [0] * RANKS, job.said()
            seconds[stage] = time.monotonic() - began
            say(f"untouched, ZeRO-{stage}: {seconds[stage]:.1f} s")
        one = recipe(folder / f"run{tally.runs}", stage)
        kills = 0
        while not (run_folder(one) / "result.json").exists() and not tally.problems:
            if tally.kills == settings.kills:
                with Job(one) as job:
                    job.wait(120)
                    if job.codes() != [0] * RANKS:
                        tally.problems.append(f"the last start ended with {job.codes()}: {job.said()}")
            else:
                kills += _kill_once(one, references[stage], seconds[stage], moments, tally)
        if not tally.problems:
            _compare_ends(one, references[stage], tally)
        if not tally.problems:
            tally.survived += kills
            say(f"run {tally.runs}, ZeRO-{stage}: {kills} kills survived; {tally.survived} of {tally.kills} so far")
        tally.runs += 1
    return tally


def _kill_once(one: Recipe, untouched: Recipe, seconds: float, moments: random.Random, tally: Tally) -> int:
    """One start and one kill, unless the run is faster; how many kills hit."""
    saved = run_folder(one) / "checkpoints"
    before, torn = _newest(saved), _torn(saved)
    while_saving, alone = moments.random() < 0.5, moments.random() < 0.5
    victims = [moments.randrange(RANKS)] if alone else list(range(RANKS))
    with Job(one) as job:
        if while_saving:
            job.until_saving(saved, moments.randint(1, 3))
            time.sleep(moments.uniform(0, 0.03))
        else:
            job.wait(moments.uniform(0, seconds * (1 - 0.5 * max(before, 0) / STEPS)))  # half of it is the start
        began = time.monotonic()
        hit = job.kill(victims)
        job.wait(PATIENCE + 30)
        if -1 in job.codes():
            rank = job.codes().index(-1)
            os.kill(job.processes[rank].pid or 0, signal.SIGABRT)  # it says where it is
            job.processes[rank].join(5)
            tally.problems.append(f"rank {rank} goes on without the other: {job.said()}")
        if 0 in job.codes() and not _finished(one):
            tally.problems.append(f"a rank ended with status 0 before the run had: {job.said()}")
        elif not hit and not _finished(one):
            tally.problems.append(f"the start ended with {job.codes()} before it was killed: {job.said()}")
    if not hit:
        return 0
    tally.kills += 1
    if alone:
        tally.single += 1
        tally.ended.append(time.monotonic() - began)
    after = _newest(saved)
    tally.torn += bool(_torn(saved) - torn)
    tally.unsaved += after < 0
    if after < before:
        tally.problems.append(f"checkpoint {before} was complete before the kill, and {after} is the newest after it")
    for path in layout.complete(saved):
        try:
            layout.verify(path)
        except ValueError as error:
            tally.problems.append(f"after a kill: {error}")
        if _done(path) != _done(run_folder(untouched) / "checkpoints" / path.name):
            tally.problems.append(f"{path} is not what the untouched run has saved at that step")
    logged = max((line["step"] for line in lines(run_folder(one))), default=0)
    lost = max(0, logged - max(after, 0))
    tally.steps_lost.append(lost)
    if lost >= 2 * SAVE_EVERY:  # while one is written, the one before is complete
        tally.problems.append(f"{lost} steps were lost, with a checkpoint every {SAVE_EVERY}")
    return 1


def _compare_ends(one: Recipe, untouched: Recipe, tally: Tally) -> None:
    ours, theirs = run_folder(one), run_folder(untouched)
    last = f"checkpoints/{STEPS}"
    if _done(ours / last) != _done(theirs / last):
        tally.problems.append(f"{ours / last} is not the untouched run's")
    layout.verify(ours / last)
    names = sorted(path.name for path in (theirs / "export").iterdir())
    if names != sorted(path.name for path in (ours / "export").iterdir()) or any(
        (ours / "export" / name).read_bytes() != (theirs / "export" / name).read_bytes() for name in names
    ):
        tally.problems.append(f"{ours / 'export'} is not the untouched run's")
    if tiny.lines(ours) != tiny.lines(theirs):
        tally.problems.append(f"{ours / 'metrics.jsonl'} differs from the untouched run's")
    results = [json.loads((folder / "result.json").read_text()) for folder in (ours, theirs)]
    if results[0]["metrics"] != results[1]["metrics"]:
        tally.problems.append(f"{ours / 'result.json'} has other metrics than the untouched run")


def _newest(saved: Path) -> int:
    return max((int(path.name) for path in layout.complete(saved)), default=-1)


def _torn(saved: Path) -> set[tuple[str, int]]:
    """Half-written checkpoints, and since when."""
    return {(path.name, path.stat().st_mtime_ns) for path in saved.glob("*") if not (path / "DONE").exists()}


def _done(checkpoint: Path) -> dict[str, Any]:
    """Names, sizes and checksums of all files."""
    return dict(json.loads((checkpoint / "DONE").read_text()))


def _finished(one: Recipe) -> bool:
    return (run_folder(one) / "result.json").exists()


def lines(folder: Path) -> list[dict[str, Any]]:
    """Of the log, without what a kill has cut short."""
    file, found = folder / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [line for line in found if any("seconds" not in key and key != "step" for key in line)]


def warm() -> Any:
    """The process that ranks are forked from, started at the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # it does not take over ours
    try:
        forkserver.ensure_running()
        first = context.Process(target=int)
        first.start()  # waits for the imports
        first.join()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


class Job:
    """One start of a run on all ranks. A context manager: outside of it no process is left."""

    def __init__(self, one: Recipe) -> None:
        self.log = Path(one.output_dir) / "log.txt"
        context = warm()
        port = free_port()
        self.processes = [context.Process(target=_rank, args=(one, rank, port, str(self.log))) for rank in range(RANKS)]

    def __enter__(self) -> Job:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(range(RANKS))
        for process in self.processes:
            process.join()

    def wait(self, seconds: float) -> None:
        """Until all ranks have ended, at most so long."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def until_saving(self, saved: Path, times: int) -> None:
        """Until as many checkpoints have been begun, or the ranks have ended."""
        there = set(saved.glob("*"))
        while times and any(process.is_alive() for process in self.processes):
            now = set(saved.glob("*"))
            times -= len(now - there) > 0
            there |= now
            time.sleep(0.0005)

    def kill(self, ranks: Any) -> bool:
        """SIGKILL; whether any of them was alive."""
        alive = [self.processes[rank] for rank in ranks if self.processes[rank].is_alive()]
        for process in alive:
            process.kill()
        for process in alive:
            process.join()
        return any(process.exitcode == -9 for process in alive)

    def codes(self) -> list[int]:
        """How the ranks have ended; -1 for one that has not."""
        return [-1 if process.exitcode is None else process.exitcode for process in self.processes]

    def said(self) -> str:
        """The end of what the ranks have printed."""
        return self.log.read_text()[-3000:]


def _rank(one: Recipe, rank: int, port: int, log: str) -> None:
    """In a process of its own."""
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""},
    }
    faulthandler.enable()
    meeting.SECONDS = PATIENCE
    report.finish = lambda _: None  # pictures of a run that has ended
    sys.argv = ["torture", "--patience", str(PATIENCE)]
    with tiny.patched(dropout=0.4):  # so that random state counts
        running.main({"default": lambda: one})


def main(settings: Torture) -> None:
    """Print kills survived of kills tried; status 1 where that is not all of them."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    place = Path(settings.folder or tempfile.mkdtemp(prefix="torture"))
    began = time.monotonic()
    try:
        tally = torture(settings, place, lambda line: print(line, flush=True))
    finally:
        if not settings.folder:
            shutil.rmtree(place, ignore_errors=True)
    figures = {
        "kills_tried": tally.kills,
        "kills_survived": tally.survived,
        "of_one_rank_alone": tally.single,
        "that_left_a_half_written_checkpoint": tally.torn,
        "before_the_first_checkpoint": tally.unsaved,
        "runs": tally.runs,
        "steps_of_a_run": STEPS,
        "save_every": SAVE_EVERY,
        "most_steps_lost": max(tally.steps_lost, default=0),
        "longest_seconds_until_the_other_rank_ended": round(max(tally.ended, default=0.0), 1),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    for problem in tally.problems:
        print(f"error: {problem}", flush=True)
    print(json.dumps(figures, indent=1))
    if settings.json:
        Path(settings.json).write_text(json.dumps(figures, indent=1) + "\n")
    raise SystemExit(1 if tally.problems or tally.survived < tally.kills else 0)


if __name__ == "__main__":
    import torture as itself  # ranks unpickle what is pickled here, and __main__ is another module to them

    itself.main(tyro.cli(itself.Torture))
