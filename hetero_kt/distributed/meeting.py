"""Before the process group: ranks meet at the first one, which finds what would make the job fail later, or train
something else than was asked for: a rank that does not come, two ranks on one GPU, another command or other versions.

Every rank ends with the same sentence, within a minute or so. Each talks to the first rank's store alone, so that a
thousand ranks cost a thousand small messages.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from importlib.metadata import version

import torch
import torch.distributed as dist

from hetero_kt.distributed.environment import seconds_to_meet

SECONDS = 60.0
"""How long ranks wait for each other, unless HETERO_KT_MEETING_SECONDS says otherwise: more where a cold file system
lets some import for minutes."""
_HEARD = 5.0
"""Seconds that the first rank, whose store it is, gives the others to read what has been decided."""


class NoMeeting(ValueError):
    """Ranks did not find each other: nothing is wrong with what was asked for, and another start may do better."""


def connect(host: str, port: int, *, serve: bool, seconds: float) -> dist.TCPStore:
    """The store at the meeting point. `serve` opens it, unless torchrun's agent has; where ranks meet on loopback it
    listens there alone, since whoever reaches a store can write to it."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    server = serve and not agent
    listening = _listening(host, port) if server and loopback(host) else None
    return dist.TCPStore(
        host,
        port,
        is_master=server,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,  # the process group opens it once more
        master_listen_fd=listening,
        use_libuv=listening is None,  # torch 2.6 cannot give libuv a socket that listens already
    )


def loopback(host: str) -> bool:
    """Whether `host` is an address of this machine that no other reaches."""
    return host == "localhost" or host.startswith("127.")


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _listening(host: str, port: int) -> int:
    try:
        with socket.socket() as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((host, port))
            opened.listen(512)
            return opened.detach()
    except OSError as error:
        raise RuntimeError(str(error)) from error


def meet(rank: int, world: int, gpu: str, same: Mapping[str, str], seconds: float = 0.0) -> dist.TCPStore:
    """Wait until all ranks are here and agree. Gives the store, which lives as long as the object on the first rank.

    Args:
        gpu: what names this rank's GPU all over the world; empty without one.
        same: what has to be equal on all ranks, by the name that a user knows it by.
        seconds: that ranks wait for each other; 0 takes the environment's, or `SECONDS`.

    Raises:
        NoMeeting: somebody has not come, or the first rank cannot be reached.
        ValueError: ranks do not fit together. Either is one sentence, the same on all ranks that are here.
    """
    seconds = seconds or seconds_to_meet(SECONDS)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        server = connect(host, port, serve=rank == 0, seconds=seconds)
    except RuntimeError as error:
        if rank == 0:
            reason = " ".join(str(error).split())[:200]
            raise NoMeeting(
                f"the first rank cannot open port {port} of {host} for the others ({reason}): choose another "
                "MASTER_PORT (deepspeed and torchrun: --master_port)."
            ) from error
        see = "see whether it has ended, and that the nodes reach each other there (MASTER_ADDR, MASTER_PORT)"
        if not _resolves(host):
            see = f"{host} is no name that this machine resolves, so set MASTER_ADDR to the first rank's address"
        raise NoMeeting(
            f"rank {rank} on {socket.gethostname()} has not reached the first rank at {host}:{port} within "
            f"{seconds:.0f} s: {see}."
        ) from error
    # torchrun's agent keeps its store when it starts the ranks again
    store = dist.PrefixStore(f"hetero_kt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
    same = {**same, **versions()}
    if rank == 0:
        store.set("first", json.dumps(same))
    with _absent(f"the first rank at {host}:{port} has not answered rank {rank} within {seconds:.0f} s: see its log."):
        theirs = json.loads(store.get("first"))
    here = {"host": socket.gethostname(), "gpu": gpu, "complaint": _compare(same, theirs)}
    store.set(f"rank{rank}", json.dumps(here))
    if rank == 0:
        verdict, present = _decide(store, world, seconds)
        store.set("present", str(present))
        store.set("verdict", verdict)
    with _absent(f"the first rank at {host}:{port} has said nothing to rank {rank}: see its log."):
        store.wait(["verdict"], timedelta(seconds=2 * seconds))
        verdict, present = store.get("verdict").decode(), int(store.get("present"))
    heard = store.add("heard", 1)
    if rank == 0:
        end = time.monotonic() + _HEARD
        while heard < present and time.monotonic() < end:
            time.sleep(0.02)
            heard = store.add("heard", 0)
    if verdict:
        raise (NoMeeting if present < world else ValueError)(verdict)
    return server


def versions() -> dict[str, str]:
    """Of what decides whether ranks compute the same."""
    names = ("torch", "deepspeed", "timm", "transformers", "hetero-kt")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def gpu_name(device: torch.device) -> str:
    """What no other GPU is called; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


@contextlib.contextmanager
def _absent(sentence: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise NoMeeting(sentence) from error


def _compare(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    for name in dict.fromkeys((*theirs, *ours)):
        if ours.get(name) != theirs.get(name):
            return f"{name} {ours.get(name, 'not at all')}, and the first rank {theirs.get(name, 'not at all')}"
    return ""


def _decide(store: dist.Store, world: int, seconds: float) -> tuple[str, int]:
    """On the first rank: what is wrong, empty where nothing is; and how many ranks have come."""
    keys = {rank: f"rank{rank}" for rank in range(world)}
    with contextlib.suppress(RuntimeError):
        store.wait(list(keys.values()), timedelta(seconds=seconds))
    found = {rank: json.loads(store.get(key)) for rank, key in keys.items() if store.check([key])}
    missing = [rank for rank in keys if rank not in found]
    if missing:
        named = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
        return (
            f"of {world} ranks {len(missing)} did not come within {seconds:.0f} s (rank {named}): see their logs, and "
            "give them more time with HETERO_KT_MEETING_SECONDS if they only start slowly."
        ), len(found)
    owners: dict[str, int] = {}
    for rank, here in found.items():
        other = owners.setdefault(here["gpu"], rank) if here["gpu"] else rank
        if other != rank:
            return (
                f"ranks {other} and {rank} both have GPU {here['gpu']} of {here['host']}: start one process per GPU, "
                "each of which sees all of its node's (srun --gpus-per-node, not --gpus-per-task)."
            ), world
    for rank, here in found.items():
        if here["complaint"]:
            return (
                f"rank {rank} on {here['host']} has {here['complaint']}: start all ranks with the same command and the "
                "same environment."
            ), world
    return "", world
