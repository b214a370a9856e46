"""A hung rank ends the whole job in time, and is named; a slow one that says so does not."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool

from hetero_kt.distributed import heartbeat
from hetero_kt.distributed.heartbeat import Heartbeat
from hetero_kt.distributed.launch import Ranks

PATIENCE = 2.0


@pytest.fixture
def pair() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def here() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))


def train(sleeper: int, event: str) -> float:
    """Three steps; at the last `event` happens to rank `sleeper`."""
    heartbeat._GRACE = 1.0
    with Heartbeat(here(), PATIENCE) as pulse:
        for step in range(4):
            if dist.get_rank() == sleeper and step == 3:
                if event == "sleep":
                    time.sleep(60)
                elif event == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif event == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(1))
            pulse.beat()
    return 0.0


def ended(pool: RankPool, sleeper: int, event: str, capfd: pytest.CaptureFixture[str]) -> str:
    """What a rank says when it ends."""
    pool.run(abs, -1)  # the ranks have started
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"process ended|Connection closed"):
        pool.run(train, sleeper, event, timeout=40)
    assert time.monotonic() - begun < 20
    text = capfd.readouterr().err
    found = re.search(r"^error: rank \d: .*$", text, re.MULTILINE)
    assert found, text
    return found[0]


def test_a_rank_whose_loop_hangs_ends_the_job_and_is_named(pair: RankPool, capfd: pytest.CaptureFixture[str]) -> None:
    said = ended(pair, sleeper=1, event="sleep", capfd=capfd)
    assert re.match(r"error: rank \d: rank 1 \(\S+\) has made no step for 2 s, at .*; the job ends, and goes on", said)


def test_a_stopped_process_ends_the_job_and_is_named(pair: RankPool, capfd: pytest.CaptureFixture[str]) -> None:
    said = ended(pair, sleeper=1, event="stop", capfd=capfd)
    assert re.match(r"error: rank 0: rank 1 \(\S+\) has not been heard of for 2 s: stopped, killed", said)


def test_a_stopped_first_rank_is_named_by_the_others(pair: RankPool, capfd: pytest.CaptureFixture[str]) -> None:
    said = ended(pair, sleeper=0, event="stop", capfd=capfd)
    assert re.match(r"error: rank 1: rank 0 has not been heard of for 3 s: stopped", said)


class Suspended:
    """A clock of a machine that is paused for `seconds`, once, `after` so long."""

    def __init__(self, after: float, seconds: float) -> None:
        self.begun, self.after, self.seconds = time.monotonic(), after, seconds

    def __call__(self) -> float:
        now = time.monotonic()
        return now + (self.seconds if now - self.begun > self.after else 0.0)


def paused(hangs: int) -> int:
    """All ranks are suspended for an hour after a second; later rank `hangs` stops, if it is one."""
    heartbeat._GRACE = 1.0
    with Heartbeat(here(), PATIENCE, Suspended(1.0, 3600.0)) as pulse:
        for step in range(15):
            time.sleep(PATIENCE / 10)
            if step == 12 and dist.get_rank() == hangs:
                time.sleep(60)
            dist.all_reduce(torch.ones(1))
            pulse.beat()
    return threading.active_count()


def test_a_pause_of_all_ranks_is_no_hang_and_a_hang_after_it_is_one(
    pair: RankPool, capfd: pytest.CaptureFixture[str]
) -> None:
    before = pair.run(threading.active_count)
    assert pair.run(paused, -1, timeout=40) == before
    assert "error" not in capfd.readouterr().err
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"process ended|Connection closed"):
        pair.run(paused, 1, timeout=40)
    assert time.monotonic() - begun < 20
    assert re.search(r"^error: rank \d: rank 1 \(\S+\) has made no step for 2 s", capfd.readouterr().err, re.MULTILINE)


def test_ranks_that_were_really_stopped_together_go_on(pair: RankPool, capfd: pytest.CaptureFixture[str]) -> None:
    pair.run(abs, -1)
    helper = threading.Thread(target=stop_for, args=([process.pid for process in pair.processes], 2 * PATIENCE))
    helper.start()
    pair.run(steady, timeout=60)
    helper.join()
    assert "error" not in capfd.readouterr().err


def stop_for(processes: list[int], seconds: float) -> None:
    time.sleep(PATIENCE / 2)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            os.kill(process, number)
        time.sleep(seconds)


def slow() -> int:
    """Twice the patience without a step."""
    with Heartbeat(here(), PATIENCE) as pulse:
        pulse.beat()
        pulse.long("evaluating", seconds=60)
        time.sleep(2.5 * PATIENCE)
        dist.barrier()
    return threading.active_count()


def steady() -> int:
    with Heartbeat(here(), PATIENCE) as pulse:
        for _ in range(25):
            time.sleep(PATIENCE / 10)
            pulse.beat()
        dist.barrier()
    return threading.active_count()


def test_steps_and_declared_long_parts_end_no_job_and_no_thread_stays(pair: RankPool) -> None:
    before = pair.run(threading.active_count)
    assert pair.run(steady) == before
    assert pair.run(slow) == before


def test_one_process_has_nobody_to_wait_for() -> None:
    with Heartbeat(Ranks(0, 1, 0, torch.device("cpu")), PATIENCE) as pulse:
        assert not any(thread.is_alive() for thread in pulse.threads)
