"""Signals and lost starters: a run saves and ends, nothing goes on alone, and no traceback is printed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LISTENS = """
import os, sys, time
from hetero_kt import signals
heard = []
signals.listen(heard.append)
print("ready", flush=True)
while not heard:
    time.sleep(0.01)
print(*heard, flush=True)
"""
HANGS = """
import ctypes
while True:
    ctypes.CDLL(None).usleep(900_000)  # what a library's call that does not return is to Python
"""
STARTED = """
from hetero_kt import signals
signals._LOOK = 0.05
signals.end_with_starter()
"""


@contextlib.contextmanager
def program(text: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process, which has printed its first line."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", text], **{**pipes, **options})  # type: ignore[call-overload]
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_heard_and_ends_nothing_by_itself(number: int) -> None:
    with program(LISTENS) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, f"{int(number)}\n", "")


def test_a_second_interrupt_ends_a_process_at_once_wherever_it_hangs() -> None:
    with program(LISTENS.partition("while")[0] + HANGS) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "", "")


def test_an_interrupt_that_a_starter_passes_on_is_no_second_one() -> None:
    with program(LISTENS.partition("while")[0] + "time.sleep(1)\nprint('saved', *heard)") as process:
        for _ in range(3):  # the terminal's, the starter's, and one more
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("saved 2")


def test_nohup_stays_nohup(tmp_path: Path) -> None:
    ignores = (
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    )
    with program(ignores + LISTENS) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20)[0] == f"{int(signal.SIGTERM)}\n"


def test_an_interrupt_during_the_start_is_quiet() -> None:
    text = (
        "from hetero_kt import signals\nsignals.end_quietly()\nprint('ready', flush=True)\nimport time; time.sleep(60)"
    )
    with program(text) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


def test_output_that_nobody_reads_any_more_costs_nothing() -> None:
    text = "from hetero_kt import signals\nsignals.outlive_terminal()\nprint('ready', flush=True)\nimport sys\n"
    with program(
        text + "sys.stdin.read()\nfor _ in range(9): print('x' * 99, flush=True)", stdin=subprocess.PIPE
    ) as one:
        assert one.stdin is not None
        assert one.stdout is not None
        one.stdout.close()  # as when an interrupt ends `tee` first
        one.stdin.close()
        assert one.wait(timeout=20) == 0
        assert one.stderr is not None
        assert one.stderr.read() == ""


def starter(folder: Path, name: str, rank: str) -> list[str]:
    """A command called `name` which starts `rank`, tells its number, and waits."""
    place = folder / name
    place.write_text(
        "import subprocess, sys\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=subprocess.DEVNULL)\n"
        "print(rank.pid, flush=True)\nrank.wait()\n"
    )
    return [sys.executable, str(place)]


def gone(process: int, within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("name", ["deepspeed", "torchrun", "hetero-kt", "wrapper"])
def test_a_rank_ends_with_the_command_that_has_started_it_and_with_no_other(tmp_path: Path, name: str) -> None:
    """A shell that starts plain processes may leave them."""
    ready = tmp_path / "ready"
    rank = STARTED + f"import time, pathlib; pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    process = subprocess.Popen(starter(tmp_path, name, rank), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    number = int(process.stdout.readline())
    try:
        wait_for(ready.exists)
        process.kill()
        process.wait()
        assert gone(number, within=10 if name != "wrapper" else 1) == (name != "wrapper")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def test_a_rank_ends_with_the_starter_of_its_starter(tmp_path: Path) -> None:
    """`deepspeed` dies of a signal, and the process that it has started ranks with does not hear of it."""
    ready = tmp_path / "ready"
    rank = STARTED + f"import time, pathlib; pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    inner = starter(tmp_path, "launch.py", rank)[1]
    outer = tmp_path / "deepspeed"
    outer.write_text(f"import subprocess, sys\nsubprocess.call([sys.executable, {inner!r}])\n")
    process = subprocess.Popen([sys.executable, str(outer)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    number = int(process.stdout.readline())
    try:
        wait_for(ready.exists)
        process.terminate()
        process.wait()
        assert gone(number, within=10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)
