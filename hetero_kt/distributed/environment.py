"""This process's place among the ranks, read from the environment that deepspeed, torchrun, srun or a shell has set.

Standard library only: a start reads its environment before it imports anything that takes seconds.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from hetero_kt.distributed.hosts import expand

SPECIAL_STEPS = 0xFFFFFFF0
"""Slurm numbers from here on what is no step of `srun`: the batch script, the interactive shell of `salloc`, ..."""

MPI = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",  # Open MPI
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",  # MVAPICH
    "PMI_SIZE": "PMI_RANK",  # MPICH, Intel, and srun --mpi=pmi2
    "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",  # jsrun
}
"""Variables of the processes that MPI's launchers start: how many there are, and which one this is."""

FIRST_PORT, PORTS = 10_000, 10_000
"""Ports at which the ranks of a Slurm step meet: below the ephemeral ones, which any connection may hold, and beside
those of slurm/job.sh, which begin at 20000."""

SECONDS = "HETERO_KT_MEETING_SECONDS"

ALL_SET = "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"


@dataclass(frozen=True)
class Place:
    """One rank, and the port at which all of them meet."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    """0 for a process alone, which takes any."""


def place() -> tuple[int, int]:
    """(rank, world size), before any process group exists.

    Raises:
        ValueError: one sentence with everything that is wrong with the environment.
    """
    check_waits()
    found = _read(os.environ, meets=False)
    return found.rank, found.world


def fill() -> None:
    """Complete the environment that torch's process group reads.

    Raises:
        ValueError: one sentence with everything that is wrong with the environment.
    """
    check_waits()
    found = _read(os.environ, meets=True)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    numbers = (found.rank, found.world, found.local_rank, found.address, found.port or free_port())
    os.environ.update({name: str(number) for name, number in zip(names, numbers, strict=True)})


def likely_rank() -> int:
    """This process's rank as far as any variable says it, also where the environment is wrong: of all that find it
    wrong, the first one speaks."""
    env = os.environ
    names = ["RANK", *MPI.values(), "PMIX_RANK", *(["SLURM_PROCID"] if _in_step(env) else [])]
    return next((int(env[name]) for name in names if _is_number(env.get(name))), 0)


def check_waits() -> None:
    """Refuse waiting times that are no numbers, in our own variable and in the one that DeepSpeed reads when it is
    imported.

    Raises:
        ValueError: one sentence with the variable and the mend.
    """
    seconds_to_meet()
    minutes = os.environ.get("DEEPSPEED_TIMEOUT", "30")
    if not _is_number(minutes) or not int(minutes):
        raise ValueError(f"DEEPSPEED_TIMEOUT {minutes!r} is no whole number of minutes: use 30, for example.")


def seconds_to_meet(otherwise: float = 60.0) -> float:
    """How long ranks wait for each other at their start, as HETERO_KT_MEETING_SECONDS says.

    Raises:
        ValueError: no positive number.
    """
    text = os.environ.get(SECONDS)
    if text is None:
        return otherwise
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", text) is None or not float(text):
        raise ValueError(f"{SECONDS} {text!r} is no number of seconds: use 60, for example.")
    return float(text)


def ranks_here(otherwise: int = 1) -> int:
    """Ranks on this machine, as torchrun, deepspeed or srun says; `otherwise` where none of them does.

    Where the machines of a Slurm step have different numbers of tasks, the largest.
    """
    env = os.environ
    stated = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE")  # torchrun's name, deepspeed's
    if not stated and _in_step(env):
        # As in 4(x2),3. SLURM_NTASKS_PER_NODE is the job's, and only there if it was asked for.
        names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
        stated = next((env[name] for name in names if env.get(name)), "")
        tasks, nodes = env.get(_tasks_variable(env), ""), env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES")
        if not stated and _is_number(tasks):
            stated = str(-(-int(tasks) // max(1, int(nodes) if nodes and _is_number(nodes) else 1)))
    counts = re.findall(r"([0-9]+)(?:\(x[0-9]+\))?", stated or "")
    return max(map(int, counts), default=0) or otherwise


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_number(text: str | None) -> bool:
    return text is not None and re.fullmatch("[0-9]{1,10}", text) is not None


@dataclass
class _Reader:
    """Reads variables, and remembers all that is wrong with them."""

    env: Mapping[str, str]
    faults: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def number(self, name: str, otherwise: int | None = None) -> int:
        """The number called `name`. A missing one without another to take is a fault; so is what is no number."""
        text = self.env.get(name)
        if text is None and otherwise is not None:
            return otherwise
        if text is None:
            self.missing.append(name)
        elif not _is_number(text):
            self.faults.append(f"{name} is {text!r} and no number")
        else:
            return int(text)
        return -1

    def text(self, name: str) -> str:
        text = self.env.get(name)
        if text is None:
            self.missing.append(name)
        elif not text:
            self.faults.append(f"{name} is empty")
        return text or ""

    def within(self, name: str, number: int, below: int, what: str) -> None:
        if number >= 0 and 0 <= below <= number:
            self.faults.append(f"{name} {number} is not below {what} {below}")

    def port(self) -> int:
        port = self.number("MASTER_PORT")
        if port == 0 or port > 65535:
            self.faults.append(f"MASTER_PORT {port} is no port (1 to 65535)")
        return port

    def refuse(self, set_name: str, mend: str) -> None:
        """Raises ValueError if anything was wrong."""
        if self.missing:
            are = "is not" if len(self.missing) == 1 else "are not"
            self.faults.insert(0, f"{set_name} is set but {' and '.join(self.missing)} {are}")
        if self.faults:
            raise ValueError(f"{'; '.join(self.faults)}: {mend}.")


def _read(env: Mapping[str, str], meets: bool) -> Place:
    """The place of this process; `meets` where it is about to meet the others, and needs to know where."""
    if "RANK" in env:
        return _stated(env, meets)
    _refuse_mpi(env)
    if _in_step(env):
        return _slurm(env, meets)
    half = [name for name in ("WORLD_SIZE", "LOCAL_RANK") if name in env]
    if half:
        raise ValueError(
            f"{' and '.join(half)} {'is' if len(half) == 1 else 'are'} set but RANK is not: start with deepspeed, "
            f"torchrun or srun, or unset {' and '.join(half)}."
        )
    return Place()


def _stated(env: Mapping[str, str], meets: bool) -> Place:
    """As deepspeed and torchrun say it."""
    reader = _Reader(env)
    rank, world = reader.number("RANK"), reader.number("WORLD_SIZE")
    if world == 0:
        reader.faults.append("WORLD_SIZE is 0")
    reader.within("RANK", rank, world or -1, "WORLD_SIZE")
    size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), "")
    here = reader.number(size) if size else 0
    if here > world > 0:
        reader.faults.append(f"{size} {here} is more than WORLD_SIZE {world}")
    local_rank = reader.number("LOCAL_RANK", otherwise=_local_rank(env, rank, here))
    reader.within("LOCAL_RANK", local_rank, here or world or -1, size or "WORLD_SIZE")
    if meets or reader.faults:
        address, port = reader.text("MASTER_ADDR"), reader.port()
        reader.refuse("RANK", "start with deepspeed, torchrun or srun, or unset RANK")
        return Place(rank, world, local_rank, address, port)
    return Place(rank, max(world, rank + 1), local_rank)  # a plan needs no meeting point


def _local_rank(env: Mapping[str, str], rank: int, here: int) -> int:
    """Where LOCAL_RANK is not set: Slurm's, where it numbers the ranks so, or what follows from equal machines; the
    first of its machine where nobody says how many ranks share one."""
    if _in_step(env) and env.get("SLURM_PROCID") == str(rank) and _is_number(env.get("SLURM_LOCALID")):
        return int(env["SLURM_LOCALID"])
    return max(rank, 0) % here if here > 0 else 0


def _refuse_mpi(env: Mapping[str, str]) -> None:
    """Raises ValueError for processes that an MPI launcher has started: each would train alone.

    srun sets some of its variables too; they then say the same as Slurm's.
    """
    for size, rank in MPI.items():
        count = env.get(size, "")
        if not _is_number(count) or int(count) < 2:
            continue
        if _in_step(env) and (count, env.get(rank)) == (env.get(_tasks_variable(env)), env.get("SLURM_PROCID")):
            continue
        raise ValueError(f"MPI has started {count} processes ({size}), {_NO_MPI}")
    alone = env.get("PMIX_RANK", "0")
    if _is_number(alone) and int(alone) and not (_in_step(env) and alone == env.get("SLURM_PROCID")):
        raise ValueError(f"MPI has started several processes (PMIX_RANK is {alone}), {_NO_MPI}")


_NO_MPI = f"and its ranks are not read here: start with deepspeed, torchrun or srun, or set {ALL_SET} for each of them."


def _in_step(env: Mapping[str, str]) -> bool:
    """Whether `srun` has started this process as one of a step's tasks. A batch script, and the shell that `salloc`
    opens, have the job's variables and are no ranks."""
    step = env.get("SLURM_STEP_ID")
    return step is not None and not (_is_number(step) and int(step) >= SPECIAL_STEPS)


def _tasks_variable(env: Mapping[str, str]) -> str:
    """The step's own number of tasks, where it is there; the other is the job's until srun replaces it."""
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"


def _slurm(env: Mapping[str, str], meets: bool) -> Place:
    reader = _Reader(env)
    tasks = _tasks_variable(env)
    rank, world = reader.number("SLURM_PROCID"), reader.number(tasks)
    if world == 0:
        reader.faults.append(f"{tasks} is 0")
    reader.within("SLURM_PROCID", rank, world or -1, tasks)
    for name, theirs in (("WORLD_SIZE", tasks), ("LOCAL_RANK", "SLURM_LOCALID")):
        if env.get(name, env.get(theirs)) != env.get(theirs):
            reader.faults.append(f"{name} is {env[name]!r} and {theirs} is {env.get(theirs)!r}")
    if meets or reader.faults or reader.missing:
        local_rank = reader.number("SLURM_LOCALID")
        address, port = _first_host(reader), _port(reader)
        reader.refuse("SLURM_STEP_ID", f"start with srun, or set {ALL_SET}")
        return Place(rank, world, local_rank, address, port)
    return Place(rank, world)


def _first_host(reader: _Reader) -> str:
    """MASTER_ADDR, or the first host of the step. Ranks of one host meet on loopback: in a container its name may not
    resolve, and no other machine has to reach them."""
    if "MASTER_ADDR" in reader.env:
        return reader.text("MASTER_ADDR")
    lists = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    name = next((name for name in lists if reader.env.get(name)), "")
    if not name:
        reader.missing.append("SLURM_STEP_NODELIST")
        return ""
    try:
        hosts = expand(reader.env[name])
        first = next(hosts)
        return first if any(host != first for host in hosts) else "127.0.0.1"
    except ValueError as error:
        reader.faults.append(f"{name} {error}")
        return ""


def _port(reader: _Reader) -> int:
    """MASTER_PORT, or one that two steps of a job do not share, nor a job and its restart, whose predecessor may hold
    its port for a minute."""
    if "MASTER_PORT" in reader.env:
        return reader.port()
    job, step = reader.number("SLURM_JOB_ID"), reader.number("SLURM_STEP_ID")
    restart = reader.number("SLURM_RESTART_COUNT", otherwise=0)
    return FIRST_PORT + (101 * job + step + 7919 * restart) % PORTS
