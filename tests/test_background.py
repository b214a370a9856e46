"""A thread that cannot begin ends the job with a sentence, on all ranks, and at once."""

from __future__ import annotations

import _thread
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hetero_kt.distributed import background
from hetero_kt.distributed.agreement import UserError
from hetero_kt.distributed.background import Background
from hetero_kt.distributed.checkpoint import Checkpoints


class Work(Background):
    done = False

    def run(self) -> None:
        time.sleep(0.05)
        self.done = True


def refused(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def lost(*_: object) -> None:
    """The thread is made, and has no memory for its first instruction."""


def test_work_is_done_and_waited_for() -> None:
    work = Work()
    work.start()
    assert work.is_alive()
    work.join()
    assert work.done
    assert not work.is_alive()


@pytest.mark.parametrize(("start", "reason"), [(refused, "can't start new thread"), (lost, "did not begin within")])
def test_a_thread_that_does_not_begin_is_given_up(monkeypatch: pytest.MonkeyPatch, start: Any, reason: str) -> None:
    monkeypatch.setattr(_thread, "start_new_thread", start)
    monkeypatch.setattr(background, "SECONDS", 0.2)
    work = Work()
    with pytest.raises(ValueError, match=f"no thread can be started beside training .*{reason}"):
        work.start()
    assert not work.is_alive()
    work.join()


def save(folder: str, broken: int) -> tuple[str, float]:
    begun = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background, "SECONDS", 0.5)
        if dist.get_rank() == broken:
            patch.setattr(background._thread, "start_new_thread", lost)
        checkpoints = Checkpoints(Path(folder), 2, torch.device("cpu"))
        try:
            checkpoints.save(1, {}, {})
            checkpoints.finish()
        except UserError as error:
            return str(error), time.monotonic() - begun
    return "", time.monotonic() - begun


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_without_memory_for_a_checkpoint_s_thread_ends_all_with_a_sentence(
    ranks: Any, tmp_path: Path, broken: int
) -> None:
    found = ranks(2).run(save, str(tmp_path), broken, timeout=60)
    assert all("no thread can be started beside training" in said for said, _ in found)
    assert all(said.startswith("rank 1: ") == (broken == 1) for said, _ in found)
    assert all(seconds < 20 for _, seconds in found)
    assert [said for said, _ in ranks(2).run(save, str(tmp_path), -1, timeout=60)] == ["", ""]
