"""A model -> a DeepSpeed engine of its own, trained at any ZeRO stage."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from hetero_kt.config import Optim, Schedule

LARGEST_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once unless the ZeRO block says otherwise."""


def bucket_size(model: nn.Module) -> int:
    """Elements of the buffer in which gradients are reduced. DeepSpeed allocates all of it, 2 GB by default, for every
    engine, however small the model."""
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    return min(LARGEST_BUCKET, max(trained, 1))


def build_engine(
    model: nn.Module,
    *,
    optim: Optim,
    zero: dict[str, Any],
    precision: str = "fp32",
    micro_batch: int = 1,
    accumulation: int = 1,
) -> DeepSpeedEngine:
    """Wrap `model` in a DeepSpeed engine with a torch optimizer.

    Args:
        zero: DeepSpeed's `zero_optimization` block.
        precision: `fp32`; `autocast` (fp32 parameters, bf16 compute); `bf16` (bf16 parameters, fp32 master copy).
        micro_batch: rows per rank in one forward.
        accumulation: backward passes per optimizer step.

    Raises:
        ValueError: ZeRO-0 with bf16 parameters, whose master copy cannot be reached from outside.
    """
    import deepspeed

    if precision == "bf16" and zero.get("stage", 0) == 0:
        raise ValueError("ZeRO stage 0 with bf16 parameters has no master copy to write to: use stage 1 or autocast.")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip,
        "zero_optimization": {"reduce_bucket_size": bucket_size(model), **zero},
        "zero_allow_untested_optimizer": True,
        # Else optimizer states offloaded to the CPU would take DeepSpeed's own Adam, which has to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    elif precision == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    # A torch optimizer passed in: one that DeepSpeed makes from its config would compile a kernel first.
    engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, optim), config=config)
    return engine


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """timm's optimizer factory; SGD without Nesterov (timm calls that "momentum"). Fused: one pass over weights and
    moments in place of one for each operation, which a step's time is made of."""
    return create_optimizer_v2(
        model,
        opt="momentum" if optim.name == "sgd" else "adamw",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        filter_bias_and_bn=not optim.decay_all,
        fused=True,
    )


def build_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> Scheduler:
    """The learning rate as a function of the step alone (`step_update(step)`), so that a resume needs no state."""
    warmup: dict[str, Any] = {}
    if schedule.warmup:
        warmup = {"warmup_t": schedule.warmup, "warmup_lr_init": schedule.warmup_lr}
    if schedule.name == "cosine":
        return CosineLRScheduler(
            optimizer, t_initial=max(1, steps), lr_min=schedule.min_lr, t_in_epochs=False, **warmup
        )
    # One later than the step that it is for: timm looks a step ahead.
    milestones = [round(m * steps) + 1 for m in schedule.milestones] if schedule.name == "multistep" else []
    return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=schedule.gamma, t_in_epochs=False, **warmup)
