"""Ranks: found in the environment of deepspeed, torchrun or srun, or made up for one plain process; seeds; signals."""

from __future__ import annotations

import atexit
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from hetero_kt.distributed import meeting

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

    Looks for RANK (deepspeed, torchrun), then for a Slurm step, else starts a group of one. Nothing is compiled:
    DeepSpeed would build its shared-memory op on CPU at the first start, minutes behind a file lock that a killed
    start leaves behind for ever, so that op is switched off before anything can wait for it.

    Args:
        same: what has to be equal on all ranks, by the name that a user knows it by (`meeting.meet`).

    Raises:
        ValueError: one sentence about an environment that names no meeting point, too few GPUs, or ranks that do not
            come or do not fit together.
    """
    _fill_environment()
    cuda = torch.cuda.is_available()
    import deepspeed
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


def place() -> tuple[int, int]:
    """(rank, world size) as the environment says, before any process group exists."""
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]), int(env.get("WORLD_SIZE", "1"))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
    return 0, 1


def ranks_here(otherwise: int = 1) -> int:
    """Ranks on this machine, as torchrun, deepspeed or srun says; `otherwise` where none of them does.

    Of a Slurm step whose machines have different numbers of tasks it is the largest.
    """
    env = os.environ
    stated = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE")  # torchrun's name, deepspeed's
    if not stated and "SLURM_STEP_ID" in env:  # a batch script has the job's numbers, and is no rank
        # As in 4(x2),3; the second is the job's and only there if it was asked for.
        stated = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_NTASKS_PER_NODE")
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", stated or "")
    return max(map(int, counts), default=otherwise)


def _fill_environment() -> None:
    env = os.environ
    if "RANK" in env:
        env.setdefault("LOCAL_RANK", env["RANK"] if env.get("WORLD_SIZE") == env.get("LOCAL_WORLD_SIZE") else "0")
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _first_slurm_host()
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    else:
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = "0", "1", "0"
        env["MASTER_ADDR"], env["MASTER_PORT"] = "127.0.0.1", str(free_port())
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in env:
            raise ValueError(f"RANK is set but {name} is not: start with deepspeed, torchrun or srun, or unset RANK.")


def _first_slurm_host() -> str:
    command = ["scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ValueError("scontrol does not tell this Slurm job's hosts: set MASTER_ADDR to the first.") from error


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    """Remembers USR1 and TERM; ranks agree before they act, so that all of them stop after the same step."""

    def __init__(self) -> None:
        self.received = 0
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._remember)
        # Python gives signals their default back while it ends, and USR1's would end a finished run in error.
        atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)

    def _remember(self, number: int, frame: object) -> None:
        self.received = max(self.received, number)

    def agreed(self, device: torch.device) -> int:
        """The signal that any rank has received, 0 for none. Collective."""
        flag = torch.tensor([self.received], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag.item())
