"""Learning rates as functions of the step."""

from __future__ import annotations

import math

import pytest
import torch

from hetero_kt.config import Schedule
from hetero_kt.distributed.engine import build_schedule

STEPS, LR = 100, 0.5


def rates(schedule: Schedule) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    made = build_schedule(optimizer, schedule, STEPS)
    found = []
    for step in range(STEPS):
        made.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_warm_up_starts_where_it_is_told_and_rises_evenly() -> None:
    found = rates(Schedule("constant", warmup=10, warmup_lr=0.1))
    assert found[:10] == pytest.approx([0.1 + 0.04 * step for step in range(10)])
    assert found[10:] == pytest.approx([LR] * 90)


def test_multistep_drops_at_fractions_of_the_run() -> None:
    found = rates(Schedule("multistep", milestones=(0.3, 0.6, 0.9), gamma=0.1))
    assert found == pytest.approx([LR * 0.1 ** sum(step >= m for m in (30, 60, 90)) for step in range(STEPS)])


def test_cosine_ends_at_its_least() -> None:
    found = rates(Schedule("cosine", min_lr=0.01))
    assert found == pytest.approx(
        [0.01 + 0.5 * (LR - 0.01) * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]
    )
