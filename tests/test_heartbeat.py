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
