"""No process, semaphore or folder outlives the trainer that decoding workers have worked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

TRAINER = """
import sys
import test_workers
from hetero_kt.data import workers
workers._PRELOADED[1:] = []  # torch alone, which is faster
stream = workers.Stream(test_workers.Zeros(), int, 0, None, 2, False)
next(stream), next(stream)
print("ready", flush=True)
sys.stdin.read()
"""


class Zeros(Dataset[torch.Tensor]):
    def __getitem__(self, task: int) -> torch.Tensor:
        return torch.zeros(100, 100)


def session(leader: int) -> list[int]:
    """Living processes that `leader` has started, by themselves or by others of them."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            state, _, _, number = (place / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if place.name.isdigit() and int(number) == leader and state != "Z":
            found.append(int(place.name))
    return found


def semaphores() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("sem.mp-*")}


def test_a_trainer_that_is_killed_leaves_no_worker_no_semaphore_and_no_folder(tmp_path: Path) -> None:
    before = semaphores()
    where = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": str(tmp_path)}
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        env={**os.environ, **where},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert trainer.stdout is not None
    try:
        assert trainer.stdout.readline() == "ready\n"
        ours = semaphores() - before
        assert len(session(trainer.pid)) >= 4, "the trainer, the server and two workers"
        assert ours
        assert list(tmp_path.glob("pymp-*"))
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        deadline = time.monotonic() + 20
        while session(trainer.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not session(trainer.pid)
        assert not ours & semaphores()
        assert not list(tmp_path.glob("pymp-*"))
    finally:
        for process in session(trainer.pid):
            os.kill(process, signal.SIGKILL)
