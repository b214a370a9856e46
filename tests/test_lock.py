"""Two jobs never work in one run folder, and a dead one is in nobody's way."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny

from hetero_kt import lock as locks
from hetero_kt.distributed.heartbeat import STATUS
from hetero_kt.folder import run_folder
from hetero_kt.lock import Lock

HOLDS = "import sys, time; from pathlib import Path; from hetero_kt.lock import Lock\nLock(Path(sys.argv[1])).take()\n"


def test_a_second_job_ends_before_anything_is_built_and_names_the_option(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=1)
    held = Lock(run_folder(recipe))
    held.take()
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"UserError: .*seed0 belongs to a job that is at work \(process \d+ on .*\)"
    ) as end:
        tiny.train(ranks(2), recipe)
    assert "--output-dir" in str(end.value)
    assert time.monotonic() - start < 60
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
    monkeypatch.setattr(locks, "EVERY", 0.05)
    monkeypatch.setattr(locks, "SILENT", 1.0)


def test_the_lock_of_a_killed_process_of_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS + "import os; os._exit(9)", str(tmp_path)]
    subprocess.run(command, check=False)
    assert (tmp_path / "lock").exists()
    start = time.monotonic()
    after = Lock(tmp_path)
    after.take()
    assert time.monotonic() - start < 1
    after.release()


def test_a_killed_process_that_its_parent_has_not_waited_for_is_dead(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", HOLDS + "time.sleep(60)", str(tmp_path)])
    while not (tmp_path / "lock").exists():
        time.sleep(0.01)
    killed.kill()
    while psutil.Process(killed.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    after = Lock(tmp_path)
    after.take()
    after.release()
    killed.wait()


def test_a_process_that_has_a_dead_one_s_number_is_not_taken_for_it(tmp_path: Path) -> None:
    owner = locks._self()
    (tmp_path / "lock").write_text(json.dumps(owner | {"started": owner["started"] - 1000}))
    after = Lock(tmp_path)
    after.take()
    after.release()


@pytest.mark.parametrize("alive", [True, False])
def test_a_lock_of_another_host_counts_while_its_time_moves(tmp_path: Path, quick: None, alive: bool) -> None:
    file = tmp_path / "lock"
    file.write_text(json.dumps(locks._self() | {"host": "elsewhere"}))
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.1):
            file.touch()

    thread = threading.Thread(target=touch)
    after = Lock(tmp_path)
    if alive:
        thread.start()
        with pytest.raises(ValueError, match=r"process \d+ on elsewhere\): let it end, or use another --output-dir"):
            after.take()
        ended.set()
        thread.join()
    else:
        start = time.monotonic()
        after.take()
        assert time.monotonic() - start >= 1.0
        after.release()
        assert not file.exists()


def test_of_many_that_find_a_dead_lock_one_gets_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty times, with threads that change places all the time; a second winner would end the first, much later."""
    monkeypatch.setattr(locks, "SILENT", 1.0)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            (tmp_path / "lock").write_text(json.dumps(locks._self() | {"pid": 2**22 + 1}))
            many, outcome = [Lock(tmp_path) for _ in range(8)], []

            def take(one: Lock, outcome: list[Lock] = outcome) -> None:
                with contextlib.suppress(ValueError):
                    one.take()
                    outcome.append(one)

            threads = [threading.Thread(target=take, args=(one,)) for one in many]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for one in outcome:
                one._ended.set()  # else a loser's thread would end this process
            assert len(outcome) == 1
            assert [path.name for path in tmp_path.iterdir()] == ["lock"]
            outcome[0].release()
    finally:
        sys.setswitchinterval(usual)


def test_who_has_looked_at_a_dead_lock_for_long_leaves_the_next_one_alone(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow one has found the lock dead; before it removes anything, another job has the folder."""
    (tmp_path / "lock").write_text(json.dumps(locks._self() | {"pid": 2**22 + 1}))
    slow, fast = Lock(tmp_path), Lock(tmp_path)
    found_dead = slow._dead

    def found_dead_at_last(text: str, owner: dict[str, Any]) -> bool:
        dead = found_dead(text, owner)
        if fast._thread is None:
            fast.take()
        return dead

    monkeypatch.setattr(slow, "_dead", found_dead_at_last)
    with pytest.raises(ValueError, match="at work"):
        slow.take()
    assert (tmp_path / "lock").read_text() == fast._text
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    fast.release()


def test_a_takeover_that_was_killed_half_way_stops_nobody_for_long(tmp_path: Path, quick: None) -> None:
    text = json.dumps(locks._self() | {"pid": 2**22 + 1})
    (tmp_path / "lock").write_text(text)
    (tmp_path / f"lock.{zlib.crc32(text.encode()):08x}").touch()
    after = Lock(tmp_path)
    after.take()
    after.release()
    assert not list(tmp_path.iterdir())


def test_a_frozen_job_whose_folder_another_has_taken_ends_when_it_wakes_up(tmp_path: Path, quick: None) -> None:
    program = HOLDS.replace("Lock(Path", "from hetero_kt import lock; lock.EVERY = 0.05; Lock(Path") + "time.sleep(60)"
    frozen = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    file = tmp_path / "lock"
    while not file.exists():
        time.sleep(0.01)
    frozen.send_signal(signal.SIGSTOP)
    file.write_text(file.read_text().replace(socket.gethostname(), "elsewhere"))  # as if it were seen from another host
    other = Lock(tmp_path)
    other.take()
    ours = file.read_text()
    frozen.send_signal(signal.SIGCONT)
    said = frozen.communicate(timeout=30)[1]
    assert frozen.returncode == STATUS
    assert "was taken over by another job (process" in said
    assert file.read_text() == ours
    other.release()


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_lock_stops_nobody_for_long(tmp_path: Path, quick: None, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    after = Lock(tmp_path)
    after.take()
    after.release()
    assert not list(tmp_path.iterdir())


def test_the_holder_touches_its_lock(tmp_path: Path, quick: None) -> None:
    held = Lock(tmp_path)
    held.take()
    first = held._time()
    time.sleep(0.5)
    assert held._time() > first
    held.release()
