"""The only place that knows ranks, ZeRO and Slurm."""

import logging
import os

import torch

# Before the first import of deepspeed, which otherwise looks for hardware and tells stdout what it found.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


class _Unsurprising(logging.Filter):
    """Drops DeepSpeed's note that a torch optimizer was passed in, one per engine: that is our intention."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "untested optimizer" not in record.getMessage()


logging.getLogger("DeepSpeed").addFilter(_Unsurprising())
