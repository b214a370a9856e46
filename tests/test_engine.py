"""Learning rates as functions of the step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from hetero_kt.config import Optim, Schedule
from hetero_kt.optimizer import Rates, build_optimizer

STEPS, LR = 100, 0.5


def rates(schedule: Schedule) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    made = Rates(optimizer, schedule, STEPS)
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


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule("constant", warmup=7, warmup_lr=0.03),
        Schedule("multistep", warmup=9),
        Schedule("multistep", milestones=(0.0, 0.115, 0.5, 1.0), gamma=0.3),
        Schedule("cosine", warmup=11, warmup_lr=0.01, min_lr=0.002),
        Schedule("cosine"),
    ],
)
def test_rates_are_those_of_timms_schedulers_bitwise(schedule: Schedule) -> None:
    """Published recipes name timm's schedules."""
    from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    warmup: dict[str, Any] = {"t_in_epochs": False, "warmup_t": schedule.warmup, "warmup_lr_init": schedule.warmup_lr}
    theirs: Any
    if schedule.name == "cosine":
        theirs = CosineLRScheduler(optimizer, t_initial=STEPS, lr_min=schedule.min_lr, **warmup)
    else:
        # timm compares its milestones with the step after the one that a rate is for.
        at = [round(m * STEPS) + 1 for m in schedule.milestones] if schedule.name == "multistep" else []
        theirs = MultiStepLRScheduler(optimizer, decay_t=at, decay_rate=schedule.gamma, **warmup)
    expected = []
    for step in range(STEPS):
        theirs.step_update(step)
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(schedule) == expected


class Spared(torch.nn.Sequential):
    def no_weight_decay(self) -> set[str]:
        return {"0.*"}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("kind", [torch.nn.Sequential, Spared])
def test_optimizers_group_and_step_as_timms_factory(name: Any, decay_all: bool, decay: float, kind: type) -> None:
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    model = kind(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))
    model[1].bias.requires_grad_(False)
    other = copy.deepcopy(model)
    ours = build_optimizer(model, Optim(name, lr=0.1, weight_decay=decay, decay_all=decay_all))
    theirs = create_optimizer_v2(
        other,
        opt="momentum" if name == "sgd" else "adamw",
        lr=0.1,
        weight_decay=decay,
        momentum=0.9,
        filter_bias_and_bn=not decay_all,
        fused=True,
    )
    assert type(ours) is type(theirs)
    for own, published in zip(ours.param_groups, theirs.param_groups, strict=True):
        settings = published.keys() - {"params"}
        assert {key: own[key] for key in settings} == {key: published[key] for key in settings}
        assert [tuple(p.shape) for p in own["params"]] == [tuple(p.shape) for p in published["params"]]
    x = torch.randn(6, 4)
    for net, optimizer in ((model, ours), (other, theirs)):
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for parameter, published in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, published)
