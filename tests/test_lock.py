"""Two jobs never work in one run folder, and a dead one is in nobody's way."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from hetero_kt import lock as locks
from hetero_kt.folder import run_folder
from hetero_kt.lock import Lock
from hetero_kt.signals import GIVEN_UP

HOLDS = """
import os, sys, time
from pathlib import Path
from hetero_kt import lock
lock.EVERY, lock.SILENT = float(sys.argv[2]), float(sys.argv[3])
held = lock.Lock(Path(sys.argv[1]))
held.take()
"""


def test_a_second_job_ends_before_anything_is_built_and_names_the_option(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=1)
    held = Lock(run_folder(recipe))
    held.take()
    with pytest.raises(
        RuntimeError, match=r"UserError: .*seed0 belongs to a job that is at work \(process \d+ on .*\)"
    ) as end:
        tiny.train(ranks(2), recipe)
    assert "--output-dir" in str(end.value)
    assert {path.name for path in run_folder(recipe).iterdir()} == {"lock"}, "nothing was begun"
    held.release()
    assert not run_folder(recipe).exists()
    assert tiny.train(ranks(2), recipe)[0]["done"]
    assert not (run_folder(recipe) / "lock").exists()


def test_a_finished_run_may_be_looked_at_while_another_job_holds_it(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=1)
    tiny.train(ranks(1), recipe)
    held = Lock(run_folder(recipe))
    held.take()
    assert tiny.train(ranks(1), recipe)[0]["done"]
    held.release()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "EVERY", 0.1)
    monkeypatch.setattr(locks, "SILENT", 1.5)


@contextlib.contextmanager
def holder(folder: Path, then: str = "time.sleep(60)") -> Iterator[subprocess.Popen[str]]:
    """A process that has the lock of `folder`, with the times of this process."""
    command = [sys.executable, "-c", HOLDS + then, str(folder), str(locks.EVERY), str(locks.SILENT)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not ((folder / "lock").exists() and (folder / "lock").read_text().endswith("\n")):
            assert process.poll() in (None, 9), process.communicate()
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def elsewhere(file: Path) -> None:
    """As if the lock were seen from another host; the same file, since a holder knows its own."""
    text = file.read_text()
    with file.open("r+") as opened:
        opened.write(text.replace(f"host={socket.gethostname()}", "host=elsewhere"))
        opened.truncate()


def test_the_lock_of_a_killed_process_of_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    with holder(tmp_path, "os._exit(9)") as killed:
        killed.wait()
    assert (tmp_path / "lock").exists()
    start = time.monotonic()
    after = Lock(tmp_path)
    after.take()
    assert time.monotonic() - start < 1
    after.release()
    assert not list(tmp_path.iterdir())


def test_a_killed_process_that_its_parent_has_not_waited_for_is_dead_once_it_is_silent(
    tmp_path: Path, quick: None
) -> None:
    with holder(tmp_path) as killed:
        os.kill(killed.pid, signal.SIGKILL)
        after = Lock(tmp_path)
        after.take()
        after.release()


def test_a_process_that_has_a_dead_one_s_number_is_not_taken_for_it(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        text = (tmp_path / "lock").read_text()
    number = next(line for line in text.splitlines() if line.startswith("start="))
    assert other.pid != os.getpid()
    (tmp_path / "lock").write_text(text.replace(f"pid={other.pid}", f"pid={os.getpid()}"))
    after = Lock(tmp_path)
    after.take()
    assert number not in (tmp_path / "lock").read_text()
    after.release()


def test_a_step_of_the_clock_gives_a_living_job_s_folder_to_nobody(tmp_path: Path, quick: None) -> None:
    """The file's time and the clock disagree by an hour, in either direction: the holder's touches alone count."""
    with holder(tmp_path) as first:
        for hour in (3600, -3600):
            with pytest.MonkeyPatch.context() as patch:
                now = time.time
                patch.setattr(time, "time", lambda hour=hour, now=now: now() + hour)
                with pytest.raises(ValueError, match=rf"at work \(process {first.pid} on "):
                    Lock(tmp_path).take()


def test_no_time_of_creation_by_the_clock_is_part_of_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who compared one would take a living job's lock for a dead one's after a step of the clock."""
    held = Lock(tmp_path)
    held.take()
    before = (tmp_path / "lock").read_text().splitlines()
    held.release()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 10_000)
    held = Lock(tmp_path)
    held.take()
    after = (tmp_path / "lock").read_text().splitlines()
    held.release()
    changed = [was for was, line in zip(before, after, strict=True) if was != line]
    assert [line.partition("=")[0] for line in changed] == ["token"]


@pytest.mark.parametrize("alive", [True, False])
def test_a_lock_of_another_host_counts_while_its_time_moves(tmp_path: Path, quick: None, alive: bool) -> None:
    file = tmp_path / "lock"
    with holder(tmp_path):
        elsewhere(file)
        if alive:
            with pytest.raises(
                ValueError, match=r"process \d+ on elsewhere\): let it end, or use another --output-dir"
            ):
                Lock(tmp_path).take()
    if not alive:
        start = time.monotonic()
        after = Lock(tmp_path)
        after.take()
        assert time.monotonic() - start >= 1.5
        after.release()
        assert not file.exists()


def test_of_many_jobs_that_find_a_dead_lock_one_gets_the_folder(tmp_path: Path) -> None:
    with holder(tmp_path, "os._exit(9)") as killed:
        killed.wait()
    command = [sys.executable, "-c", HOLDS + "print('mine', flush=True)\nsys.stdin.read()", str(tmp_path), "0.2", "45"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    many = [subprocess.Popen(command, **pipes) for _ in range(5)]  # type: ignore[call-overload]
    try:
        deadline = time.monotonic() + 40  # well before anybody could call the winner silent
        while sum(one.poll() is None for one in many) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (winner,) = [one for one in many if one.poll() is None]
        assert [one.stdout.readline() for one in many if one is winner] == ["mine\n"]
        assert [one.stdout.read() for one in many if one is not winner] == [""] * 4
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    finally:
        for one in many:
            one.kill()
            one.communicate()


def test_a_frozen_job_whose_folder_another_has_taken_ends_when_it_wakes_up(tmp_path: Path, quick: None) -> None:
    file = tmp_path / "lock"
    with holder(tmp_path) as frozen:
        frozen.send_signal(signal.SIGSTOP)
        elsewhere(file)
        other = Lock(tmp_path)
        other.take()
        ours = file.read_text()
        frozen.send_signal(signal.SIGCONT)
        said = frozen.communicate(timeout=30)[1]
        assert frozen.returncode == GIVEN_UP
        assert f"was taken over by another job (process {os.getpid()} on {socket.gethostname()})" in said
        assert file.read_text() == ours
        other.release()


def test_a_job_whose_lock_somebody_has_removed_ends(tmp_path: Path, quick: None) -> None:
    with holder(tmp_path) as job:
        (tmp_path / "lock").unlink()
        said = job.communicate(timeout=30)[1]
        assert job.returncode == GIVEN_UP
        assert "has lost its file `lock`" in said


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_lock_stops_nobody_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(locks, "EVERY", 0.1)
    monkeypatch.setattr(locks, "SILENT", 2.5)  # filelock leaves a writer two seconds
    (tmp_path / "lock").write_text(text)
    after = Lock(tmp_path)
    after.take()
    after.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_another_has_taken_while_an_empty_one_was_removed_stays_its_own(tmp_path: Path) -> None:
    held = Lock(tmp_path)
    held.take()
    ours = (tmp_path / "lock").read_text()
    assert not Lock(tmp_path)._remove_empty()
    assert (tmp_path / "lock").read_text() == ours
    held.release()


def test_the_holder_touches_its_lock(tmp_path: Path, quick: None) -> None:
    held = Lock(tmp_path)
    held.take()
    first = held._touched()
    time.sleep(0.5)
    assert held._touched() != first
    held.release()
