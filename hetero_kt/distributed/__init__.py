"""The only place that knows ranks, ZeRO and Slurm.

DeepSpeed takes seconds to import, and much of this package also serves plain PyTorch models: `load_deepspeed` imports
it where an engine is made, and `is_engine` recognises engines without it.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class _DropUntestedOptimizer(logging.Filter):
    """Drops DeepSpeed's note that a torch optimizer was passed in, one per engine: that is our intention."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "untested optimizer" not in record.getMessage()


def load_deepspeed() -> Any:
    """Import DeepSpeed and return it.

    Its first import looks for hardware and prints what it finds, unless DS_ACCELERATOR names the accelerator.
    """
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    logger = logging.getLogger("DeepSpeed")
    if not any(isinstance(one, _DropUntestedOptimizer) for one in logger.filters):
        logger.addFilter(_DropUntestedOptimizer())
    return deepspeed


def is_engine(model: object) -> TypeGuard[DeepSpeedEngine]:
    """Whether `model` is a DeepSpeed engine: where DeepSpeed has not been imported, nothing is."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)
