"""A start: the process group that the environment describes, the device of this rank; seeds; signals."""

from __future__ import annotations

import atexit
import os
import random
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from hetero_kt import signals
from hetero_kt.distributed import load_deepspeed, meeting
from hetero_kt.distributed.environment import fill, free_port, place, ranks_here

__all__ = [
    "Ranks",
    "StopSignal",
    "free_port",
    "fresh_seed",
    "make_deterministic",
    "place",
    "ranks_here",
    "seed_everything",
    "start",
]

_meeting_point: list[dist.TCPStore] = []
"""Lives as long as the process: other ranks' stores are clients of the first one's."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def start(same: Mapping[str, str] | None = None) -> Ranks:
    """Join the process group and return this process's place in it.

    `environment` says where RANK comes from; a plain process is a group of one. Nothing is compiled:
    DeepSpeed would build its shared-memory op on CPU at the first start, minutes behind a file lock that a killed
    start leaves behind for ever, so that op is switched off before anything can wait for it.

    Args:
        same: what has to be equal on all ranks, by the name that a user knows it by (`meeting.meet`).

    Raises:
        ValueError: one sentence about an environment that names no meeting point, too few GPUs, or ranks that do not
            come or do not fit together.
    """
    fill()
    cuda = torch.cuda.is_available()
    _check_accelerator("cuda" if cuda else "cpu")
    deepspeed = load_deepspeed()
    from deepspeed.utils.logging import logger

    logger.setLevel("WARNING")
    if not cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _leave_muon_uncompiled()
    local_rank = int(os.environ["LOCAL_RANK"])
    wanted = ranks_here(otherwise=local_rank + 1)
    if cuda and wanted > torch.cuda.device_count():
        raise ValueError(
            f"{wanted} ranks on a machine with {torch.cuda.device_count()} visible GPU(s): start one process per GPU, "
            "each of which sees all of them (srun --gpus-per-node, not --gpus-per-task)."
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        here = ranks_here(otherwise=int(os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    if not dist.is_initialized():
        if meeting.loopback(os.environ["MASTER_ADDR"]) and Path("/sys/class/net/lo").exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one machine listen for no other
        rank, world = place()
        _meeting_point.append(meeting.meet(rank, world, meeting.gpu_name(device), same or {}))
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _check_accelerator(found: str) -> None:
    """Refuse a DS_ACCELERATOR that is not what torch computes on: engines would lie elsewhere than their batches."""
    chosen = os.environ.get("DS_ACCELERATOR", found)
    if chosen != found:
        sees = f"torch sees {torch.cuda.device_count()} GPU(s)" if found == "cuda" else "torch sees no GPU"
        hide = ", or hide them with CUDA_VISIBLE_DEVICES=" if (chosen, found) == ("cpu", "cuda") else ""
        raise ValueError(f"DS_ACCELERATOR is {chosen!r} and {sees}: unset it{hide}.")


def _leave_muon_uncompiled() -> None:
    """DeepSpeed asks of every optimizer whether it is Muon, and loads torch's compiler to know: a second of each start.
    Muon is no optimizer of ours, so that its kernels may stay as they are written."""
    from deepspeed.runtime import compiler

    decorator = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = decorator


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike; models start equal on all ranks when all use the same seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def fresh_seed(*numbers: int) -> int:
    """A seed below 2^32 that depends on all of `numbers`, which are not negative."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def make_deterministic() -> None:
    """Only algorithms that give the same bits again. To be called before CUDA starts: cuBLAS reads its setting then."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class StopSignal:
    """Remembers USR1, TERM, INT and HUP; ranks agree before they act, so that all of them stop after the same step. A
    second INT ends the process at once."""

    def __init__(self) -> None:
        self.received = 0
        signals.listen(self._remember)
        # Python gives signals their default back while it ends, and USR1's would end a finished run in error.
        atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)

    def _remember(self, number: int) -> None:
        self.received = max(self.received, number)

    def agreed(self, device: torch.device) -> int:
        """The signal that any rank has received, 0 for none. Collective."""
        flag = torch.tensor([self.received], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag.item())
