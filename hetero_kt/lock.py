"""One job at a time in a run folder.

The file `lock` says whose the folder is; a thread of filelock's touches it every few seconds. (`flock` is simpler, but
shared file systems often lack it.) A killed job leaves its lock behind, and the next one takes it over: at once where
the same host shows that the process is gone, after `SILENT` seconds without a touch where another host had it, or
where the killed process is still listed because its parent has not collected it. Silence is measured on the waiting
job's own monotonic clock, and a process is recognised by its kernel start time and the boot, so that no step of a wall
clock hands a folder to two jobs. A job that was frozen for so long that another took its folder ends when it wakes up.
"""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from pathlib import Path

from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from hetero_kt.signals import GIVEN_UP

EVERY = 3.0
"""Seconds between two touches."""
SILENT = 45.0
"""Seconds without a touch after which a lock of another host is that of a dead job."""
_POLL = 0.1
"""Seconds between two looks at a lock that another job has."""


class Lock:
    """The lock of a run folder, which it makes if need be; `take` and `release` belong together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "lock"
        self._made: list[Path] = []
        self._lease = SoftFileLease(
            self.file,
            lease_duration=SILENT,
            heartbeat_interval=EVERY,
            on_compromise=self._end,
            thread_local=False,
            poll_interval=_POLL,
        )

    def take(self) -> None:
        """Make the folder this job's; waits up to `SILENT` seconds to see whether the job that has it is alive.

        Raises:
            ValueError: another job is at work in it.
            OSError: the folder cannot be written.
        """
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._acquire()
            except Timeout:
                if not self._remove_empty():
                    raise
                self._acquire()
        except (Timeout, LeaseSettingsMismatch) as error:
            owner = self._owner()
            self._unmake()
            raise ValueError(
                f"{self.folder} belongs to a job that is at work ({owner}): let it end, or use another --output-dir."
            ) from error
        except BaseException:
            self._unmake()
            raise

    def release(self) -> None:
        """Leave the folder to others; one that was made for the lock alone goes again."""
        self._lease.release()
        self._unmake()

    def _acquire(self) -> None:
        """Take the lock, or raise Timeout as soon as it is seen that its owner is alive."""
        seen = self._touched()

        def alive() -> bool:
            nonlocal seen
            before, seen = seen, self._touched()
            return bool(before and seen and before[0] == seen[0] and before != seen)  # the same file, touched since

        self._lease.acquire(timeout=SILENT + EVERY, cancel_check=alive)

    def _touched(self) -> tuple[int, int] | None:
        """Which file the lock is, and its time; opened, since that asks a file server for what it knows now."""
        try:
            opened = os.open(self.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            found = os.fstat(opened)
            return found.st_ino, found.st_mtime_ns
        finally:
            os.close(opened)

    def _remove_empty(self) -> bool:
        """Remove a lock without text, which a machine leaves that stopped before its disk had written; filelock takes
        it for one of its first releases' and waits for ever."""
        aside = self.folder / f"lock.{uuid.uuid4().hex[:8]}"
        try:
            os.rename(self.file, aside)
            if aside.stat().st_size:  # another job has done so meanwhile, and this is its lock
                os.rename(aside, self.file)
                return False
            aside.unlink()
        except OSError:
            return False
        return True

    def _owner(self) -> str:
        owner = self._lease.owner
        if owner is None:
            return "of unknown host and process"
        return f"process {owner.pid} on {owner.hostname.partition('?')[0]}"  # without filelock's mark of a container

    def _end(self, lost: LeaseCompromise) -> None:
        """The folder may be another job's: nothing more of this one may reach it."""
        if lost.reason == "owner-changed":
            why = (
                f"was taken over by another job ({self._owner()}), which has heard nothing of this one for "
                f"{SILENT:.0f} s: this one ends, and that one goes on from the last checkpoint"
            )
        elif lost.reason == "marker-missing":
            why = (
                "has lost its file `lock`, so that another job could begin in it: this one ends, and goes on from its "
            )
            why += "last checkpoint when it is started again"
        else:
            why = (
                f"cannot be reached any more ({lost.error}), and another job may take it over after {SILENT:.0f} s: "
                "this one ends, and goes on from its last checkpoint when it is started again"
            )
        print(f"error: {self.folder} {why}.", file=sys.stderr, flush=True)
        os._exit(GIVEN_UP)

    def _unmake(self) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):  # it holds something now
                path.rmdir()
