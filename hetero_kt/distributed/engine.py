"""A model -> a DeepSpeed engine of its own, trained at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from hetero_kt.config import Optim
from hetero_kt.distributed import load_deepspeed
from hetero_kt.nn.reencode import dense
from hetero_kt.optimizer import build_optimizer

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

LARGEST_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once unless the ZeRO block says otherwise."""


def bucket_size(model: nn.Module, zero: Mapping[str, Any] | None = None) -> int:
    """Elements of the buffer in which gradients are reduced. DeepSpeed allocates all of it, 2 GB by default, for every
    engine, however small the model: so it is never larger than that."""
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    return min((zero or {}).get("reduce_bucket_size", LARGEST_BUCKET), max(trained, 1))


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
    if precision == "bf16" and zero.get("stage", 0) == 0:
        raise ValueError("ZeRO stage 0 with bf16 parameters has no master copy to write to: use stage 1 or autocast.")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip,
        "zero_optimization": {**zero, "reduce_bucket_size": bucket_size(model, zero)},
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
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):  # DeepSpeed's own pieces have no layout
            parameter.data = dense(parameter.data)
    engine, *_ = load_deepspeed().initialize(model=model, optimizer=build_optimizer(model, optim), config=config)
    return engine
