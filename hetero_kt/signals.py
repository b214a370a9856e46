"""How a process ends: by signals, with its starter; and what becomes of what it prints when nobody reads it any more.

Imports nothing heavy, so that a command is ready for a signal before it loads torch.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GIVEN_UP = 3
"""Exit status of a process that ends itself: over a hung rank, or because another job has its folder."""
AGAIN = 1.0
"""Seconds after the first INT from which another one ends a process at once. Starters pass on an INT that the terminal
has already sent to everybody, and that one follows within milliseconds."""
_STARTERS = frozenset({"deepspeed", "ds", "torchrun", "accelerate", "hetero-kt"})
_STARTING_MODULES = frozenset(
    {
        *(
            "deepspeed.launcher.launch",
            "deepspeed.launcher.runner",
            "torch.distributed.run",
            "torch.distributed.launch",
        ),
        *("hetero_kt", "hetero_kt.cli"),
    }
)
_LOOK = 1.0
"""Seconds between two looks at the starter."""
_LAST = 1800.0
"""Seconds that a process without its starter has to save and end: as long as a declared long part may take."""

_interrupted: list[float] = []
"""When the first INT came, since somebody has listened."""
_watched = False


def end_quietly() -> None:
    """From now on INT ends this process without a traceback, with the status that shells expect (130), also inside a
    call of a library that never returns. What ignores INT goes on ignoring it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def listen(remember: Callable[[int], None]) -> None:
    """Call `remember` with each USR1, TERM, INT and HUP; a second INT ends the process at once.

    An ignored HUP or INT stays ignored, as `nohup` and shells' background jobs want it. USR1 does not: the batch files
    ignore it only until the trainer listens.
    """
    global _watched

    def heard(number: int, frame: object) -> None:
        remember(number)

    _interrupted.clear()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, heard)
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, heard)
    if not _watched:
        _watched = True
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()


def _watch(reader: int) -> None:
    """In a thread: the main thread runs a handler between two of its instructions, which a hung collective never
    reaches. Waits for as long as the process lives."""
    while numbers := os.read(reader, 64):
        if signal.SIGINT in numbers and callable(signal.getsignal(signal.SIGINT)):
            _interrupted.append(time.monotonic())
            if _interrupted[-1] - _interrupted[0] >= AGAIN:
                os._exit(128 + signal.SIGINT)


def end_with_starter() -> None:
    """Send this process TERM, in a thread, once the command that has started it is gone: ranks save and end.

    A shell, `nohup`, `setsid` or a batch system are no starters: who has started plain processes may leave them. Where
    there is no /proc, nothing is watched.
    """
    chain = starters(os.getpid())
    if chain:
        threading.Thread(target=_end_after, args=(chain,), name="starter", daemon=True).start()


def _end_after(chain: Sequence[tuple[int, int]]) -> None:
    while all(_parent(process) == parent for process, parent in chain):
        time.sleep(_LOOK)
    rank = os.environ.get("RANK", "0")
    print(f"rank {rank}: the command that started it has ended: this rank saves and ends", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LAST)
    os._exit(GIVEN_UP)


def starters(process: int) -> list[tuple[int, int]]:
    """(process, parent) from `process` up to the outermost command that starts ranks; empty where there is none.

    `deepspeed` starts a second process that starts the ranks, and goes on without the first: so all of them are listed.
    """
    chain: list[tuple[int, int]] = []
    outermost = 0
    while process > 1 and (parent := _parent(process)):
        chain.append((process, parent))
        if _starts_ranks(parent):
            outermost = len(chain)
        process = parent
    return chain[:outermost]


def _parent(process: int) -> int:
    """0 where it cannot be known."""
    try:
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _starts_ranks(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    script = next((word for word in words[1:] if word and not word.startswith("-")), "")
    return bool({Path(words[0]).name, Path(script).name} & _STARTERS) or script in _STARTING_MODULES


class _Lasting(io.FileIO):
    """A stream whose reader may go: what is written afterwards is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(memoryview(data).cast("B"))


def outlive_terminal() -> None:
    """A closed terminal, or a `tee` that an interrupt ends first, costs a run its output and not its checkpoint."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # somebody else's
        stream.flush()
        lasting = io.TextIOWrapper(
            io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False)),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, lasting)
