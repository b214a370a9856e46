"""A hung rank ends the whole job, by name.

A collective that one rank never enters keeps all others waiting, and the time limit of a process group reaches neither
the groups that ZeRO makes nor a rank that sleeps in a file system. So each rank has a thread beside its loop that tells
the first rank's store how far the loop is; the first rank's thread reads them all, and says in the store who has
stopped; every rank's thread ends its process over that. Nothing is sent between ranks by the loop itself.

    silent    a rank's thread was not heard of for `patience` seconds: stopped, killed, or its node is gone
    stuck     no rank's loop has moved for `patience` seconds, or in a `long` part for that part's own time; named are
              the ranks that do not wait for others

Ranks that were all suspended for a while (a stopped job step, a paused machine) hang over nothing: a thread that has
slept for much longer than it asked for was suspended itself, and begins to wait anew.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from hetero_kt.distributed.launch import Ranks
from hetero_kt.distributed.meeting import connect
from hetero_kt.signals import GIVEN_UP

LONG = 1800.0
"""Seconds that a declared long part may take: preparing data, compiling, evaluating, saving."""
_ENDS = "the job ends, and goes on from its last checkpoint when it is started again"
_GRACE = 10.0
"""Seconds for a rank's own error, which says more than that its connection to the first rank is gone."""
_WAITING = ("torch/distributed/", "deepspeed/comm/")
"""Who is in here waits for other ranks."""


@dataclass
class _Rank:
    """What the first rank knows of one."""

    heard: float
    beats: int = -1
    moves: int = -1
    moved: float = 0.0


class Heartbeat:
    """The thread and what it tells; a context manager, entered by all ranks after the process group exists.

    Args:
        ranks: this process's place.
        patience: seconds without a step, or without a word of a rank's thread, before the job is given up; 0 never
            gives up.
        clock: seconds, never back. It may stand still while the machine sleeps, since others are not waited for then.
    """

    def __init__(self, ranks: Ranks, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.ranks, self.patience, self.clock = ranks, patience, clock
        self.every = min(10.0, max(patience / 10, 0.2))
        self.moves, self.allowed, self.part = 0, LONG, "starting"
        self.main = threading.get_ident()
        self.ended = threading.Event()
        self.heard = self.clock()
        work = (self._talk,) if ranks.first else (self._talk, self._watch_first)
        self.threads = [threading.Thread(target=one, name="heartbeat", daemon=True) for one in work]

    def __enter__(self) -> Heartbeat:
        if self.patience and self.ranks.world > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.server = connect(address, port, serve=False, seconds=max(self.patience, 1.0))
            self.store = dist.PrefixStore(f"heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", self.server)
            self.store.set(str(self.ranks.rank), json.dumps(self._told(0)))
            for thread in self.threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave together where all is well: who has left is not watched any more."""
        self.ended.set()
        for thread in self.threads:
            if thread.is_alive():
                thread.join(self.every + 1)

    def beat(self) -> None:
        """The loop has moved on: after each step. Costs nothing."""
        self.moves += 1
        self.allowed, self.part = self.patience, ""

    def long(self, part: str, seconds: float = LONG) -> None:
        """Until the next beat all ranks may take `seconds`, which are for `part` (as in "while evaluating")."""
        self.moves += 1
        self.allowed, self.part = max(seconds, self.patience), part

    def _talk(self) -> None:
        known = {rank: _Rank(self.clock()) for rank in range(self.ranks.world)}
        beats = first = 0
        while True:
            asleep = self.clock()
            if self.ended.wait(self.every):
                return
            if self._suspended(asleep):
                for state in known.values():
                    state.heard = state.moved = self.clock()
            beats += 1
            try:
                self.store.set(str(self.ranks.rank), json.dumps(self._told(beats)))
                if self.ranks.first:
                    verdict = self._judge(known)
                    if verdict:
                        self.store.set("verdict", verdict)
                        time.sleep(2 * self.every)  # the store ends with this process, and the others have to read it
                else:
                    verdict = self.store.get("verdict").decode() if self.store.check(["verdict"]) else ""
                    was, first = first, json.loads(self.store.get("0"))["beats"]
                    self.heard = self.heard if first == was else self.clock()
            except RuntimeError:
                if self.ended.wait(_GRACE):
                    return
                verdict = f"the first rank has ended, or the network to it is gone (see its log); {_ENDS}."
            if verdict and not self.ended.is_set():
                self._end(verdict)

    def _watch_first(self) -> None:
        """On the others: whether the first rank, which judges, has stopped itself. By itself, since a store whose
        process is stopped never answers."""
        limit = 1.5 * self.patience  # the first rank is the first to say so of others
        while True:
            asleep = self.clock()
            if self.ended.wait(self.every):
                return
            if self._suspended(asleep):
                self.heard = self.clock()
            if self.clock() - self.heard > limit:
                self._end(f"rank 0 has not been heard of for {limit:.0f} s: stopped, or its node is gone; {_ENDS}.")

    def _suspended(self, asleep: float) -> bool:
        """Whether this thread, asleep since then for `every` seconds, was itself suspended and not only waiting."""
        return self.clock() - asleep > self.every + self.patience / 4

    def _told(self, beats: int) -> dict[str, Any]:
        loop = {"moves": self.moves, "allowed": self.allowed, "part": self.part, **self._where()}
        return {"beats": beats, "host": socket.gethostname(), **loop}

    def _judge(self, known: dict[int, _Rank]) -> str:
        """On the first rank: who has stopped; empty while all is well."""
        now = self.clock()
        keys = [str(rank) for rank in known]
        told: dict[int, dict[str, Any]] = {}
        for rank, key in zip(known, keys, strict=True):
            if self.store.check([key]):
                told[rank] = json.loads(self.store.get(key))
        for rank, state in known.items():
            if rank in told and told[rank]["beats"] != state.beats:
                state.heard, state.beats = now, told[rank]["beats"]
            if rank in told and told[rank]["moves"] != state.moves:
                state.moved, state.moves = now, told[rank]["moves"]
        silent = [rank for rank, state in known.items() if now - state.heard > self.patience]
        if silent:
            host = told.get(silent[0], {}).get("host", "a host unknown")
            return (
                f"{_named(silent, host)} not been heard of for {self.patience:.0f} s: stopped, killed, or "
                f"its node is gone; {_ENDS}."
            )
        allowed = max(one["allowed"] for one in told.values())
        if len(told) < len(known) or now - max(state.moved for state in known.values()) <= allowed:
            return ""
        behind = min(state.moves for state in known.values())
        busy = [rank for rank, one in told.items() if not one["waits"]]
        named = busy if len(busy) < len(known) else []  # a GPU's queue hides who waits
        named = named or [rank for rank, state in known.items() if state.moves == behind]
        at, part = told[named[0]]["at"], told[named[0]]["part"]
        return (
            f"{_named(named, told[named[0]]['host'])} made no step for {allowed:.0f} s"
            f"{f' while {part}' if part else ''}, at {at}, and the others wait; {_ENDS}."
        )

    def _where(self) -> dict[str, Any]:
        """Where the loop's thread is: its innermost frame that is ours, and whether it waits for other ranks."""
        frame: FrameType | None = sys._current_frames().get(self.main)
        at, waits = "", False
        while frame is not None:
            file = Path(frame.f_code.co_filename).as_posix()
            waits = waits or (not at and any(one in file for one in _WAITING))
            if not at and "hetero_kt/" in file:
                at = f"{file[file.rindex('hetero_kt/') :]}:{frame.f_lineno}"
            frame = frame.f_back
        return {"at": at or "code of others", "waits": waits}

    def _end(self, verdict: str) -> None:
        print(f"error: rank {self.ranks.rank}: {verdict}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        os._exit(GIVEN_UP)  # the loop's thread may never come back


def _named(ranks: list[int], host: str) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} ({host}) has"
    return f"ranks {', '.join(map(str, ranks[:8]))}{' and others' if len(ranks) > 8 else ''} ({host} first) have"
