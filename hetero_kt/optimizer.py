"""Optimizers and learning rates, on plain PyTorch: models and adapters take theirs from here."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from hetero_kt.config import Optim, Schedule


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """torch's SGD or AdamW over the trained parameters of `model`.

    Weight decay spares what the model's own `no_weight_decay()` names (patterns with * too) and, unless
    `optim.decay_all`, tensors of one dimension and biases, as timm's parameter groups do. Fused: one pass over weights
    and moments in place of one for each operation.
    """
    spared: Collection[str] = getattr(model, "no_weight_decay", set)()
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            small = not optim.decay_all and (parameter.ndim <= 1 or name.endswith(".bias"))
            left_out = not optim.weight_decay or small or any(fnmatch.fnmatch(name, pattern) for pattern in spared)
            (plain if left_out else decayed).append(parameter)
    groups: list[dict[str, Any]] = []
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    if decayed:
        groups.append({"params": decayed, "weight_decay": optim.weight_decay})
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=optim.lr, fused=True)


class Rates:
    """The learning rates of an optimizer as a function of the step alone, so that a resume needs no state.

    Args:
        optimizer: its groups' rates at this moment are the highest ones.
        steps: length of the run, in which `multistep` and `cosine` are laid out.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> None:
        self.optimizer, self.schedule, self.steps = optimizer, schedule, max(1, steps)
        self.highest = [group["lr"] for group in optimizer.param_groups]
        if schedule.warmup:
            self.step_update(0)

    def step_update(self, step: int) -> None:
        """Set the rates of `step`, which counts from 0."""
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = self.rate(step, highest)

    def rate(self, step: int, highest: float) -> float:
        """The rate of one step, for a group whose highest rate is `highest`.

        The warm-up is linear. `multistep` counts its milestones from the end of the warm-up, `cosine` from the start of
        the run.
        """
        schedule = self.schedule
        if step < schedule.warmup:
            return schedule.warmup_lr + step * ((highest - schedule.warmup_lr) / schedule.warmup)
        if schedule.name == "cosine":
            if step >= self.steps:
                return schedule.min_lr
            return schedule.min_lr + 0.5 * (highest - schedule.min_lr) * (1 + math.cos(math.pi * step / self.steps))
        milestones = schedule.milestones if schedule.name == "multistep" else ()
        passed = sum(step - schedule.warmup >= round(milestone * self.steps) for milestone in milestones)
        return highest * schedule.gamma**passed
