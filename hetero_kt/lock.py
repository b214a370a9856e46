"""One job at a time in a run folder.

The file `lock` says whose the folder is: host and process, and by its time, which a thread touches every few seconds,
that the process is alive. (`flock` would be simpler, and is not to be relied on where folders are shared over a
network.) A job that was killed leaves its lock behind and the next one takes it over: at once where the same host shows
that the process is gone, after `SILENT` seconds without a touch where another host had it. So a job that is put back
into the queue goes on wherever it starts. A job that was frozen for so long that another took its folder ends as soon
as it wakes up.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
import zlib
from pathlib import Path
from typing import Any

import psutil

from hetero_kt.distributed.heartbeat import STATUS

EVERY = 5.0
"""Seconds between two touches."""
SILENT = 45.0
"""Seconds without a touch after which a lock of another host is that of a dead job."""


class Lock:
    """The lock of a run folder, which it makes if need be; `take` and `release` belong together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "lock"
        self._made: list[Path] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._text = json.dumps({**_self(), "token": uuid.uuid4().hex})

    def take(self) -> None:
        """Make the folder this job's; waits up to `SILENT` seconds to see whether a job on another host is alive.

        Raises:
            ValueError: another job is at work in it.
            OSError: the folder cannot be written.
        """
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._created():
                self._take_over()
        except BaseException:
            self._unmake()
            raise
        self._thread = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Leave the folder to others; one that was made for the lock alone goes again."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._read(self.file) == self._text:
            self.file.unlink(missing_ok=True)
        self._unmake()

    def _created(self) -> bool:
        """True where there was no lock, and there is ours now."""
        own = self.folder / f"lock.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        try:
            own.write_text(self._text)
            with contextlib.suppress(FileExistsError):
                try:
                    os.link(own, self.file)  # with all that is in it, and only if there is none
                except FileExistsError:
                    raise
                except OSError:  # a file system without links
                    with self.file.open("x") as opened:
                        opened.write(self._text)
                return True
            return False
        finally:
            own.unlink(missing_ok=True)

    def _take_over(self) -> None:
        """Remove the lock of a dead job, or raise."""
        text = self._read(self.file)
        if not text and not self.file.exists():
            return  # released meanwhile
        owner = _owner(text)
        if not self._dead(text, owner):
            host, pid = owner.get("host", "a host unknown"), owner.get("pid", "?")
            raise ValueError(
                f"{self.folder} belongs to a job that is at work (process {pid} on {host}): let it end, or use another "
                "--output-dir."
            )
        # Of many that see the same dead lock one removes it, and only that very one: the next is a living job's.
        right = self.folder / f"lock.{zlib.crc32(text.encode()):08x}"
        try:
            right.touch(exist_ok=False)
        except FileExistsError:
            deadline = time.monotonic() + SILENT
            while right.exists() and time.monotonic() < deadline:
                time.sleep(min(EVERY, 0.1))
            if time.monotonic() >= deadline:  # who had it was killed
                right.unlink(missing_ok=True)
            return
        try:
            if self._read(self.file) == text:
                self.file.unlink(missing_ok=True)
        finally:
            right.unlink(missing_ok=True)

    def _dead(self, text: str, owner: dict[str, Any]) -> bool:
        here = _self()
        if owner.get("host") == here["host"] and owner.get("processes") == here["processes"]:
            try:
                process = psutil.Process(int(owner["pid"]))
                other = abs(process.create_time() - float(owner["started"])) > 10
                return other or process.status() == psutil.STATUS_ZOMBIE  # killed, and its parent has not looked yet
            except (psutil.Error, KeyError, TypeError, ValueError):
                return True
        # Its clock is not ours: what counts is whether the time moves while we look.
        touched, deadline = self._time(), time.monotonic() + SILENT
        while time.monotonic() < deadline:
            time.sleep(min(EVERY, SILENT) / 2)
            if self._read(self.file) != text:
                return True  # released, or another's by now: look again
            if self._time() != touched:
                return False
        return True

    def _time(self) -> float:
        try:
            with self.file.open() as opened:  # opening asks the server for what it knows
                return os.fstat(opened.fileno()).st_mtime
        except OSError:
            return 0.0

    @staticmethod
    def _read(file: Path) -> str:
        try:
            return file.read_text()
        except OSError:
            return ""

    def _touch(self) -> None:
        while not self._ended.wait(EVERY):
            with contextlib.suppress(OSError):  # a file system that hesitates; the next one may succeed
                text = self._read(self.file)
                if text == self._text:
                    os.utime(self.file)
                elif text and not self._ended.is_set():
                    self._end(_owner(text))

    def _end(self, owner: dict[str, Any]) -> None:
        """The folder is another job's: nothing more of this one may reach it."""
        host, pid = owner.get("host", "a host unknown"), owner.get("pid", "?")
        print(
            f"error: {self.folder} was taken over by another job (process {pid} on {host}), which has heard nothing of "
            f"this one for {SILENT:.0f} s: this one ends, and that one goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(STATUS)

    def _unmake(self) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):  # it holds something now
                path.rmdir()


def _self() -> dict[str, Any]:
    """This process, so that no other on any host or in any container is taken for it."""
    try:
        processes = os.readlink("/proc/self/ns/pid")  # a container counts processes of its own
    except OSError:
        processes = ""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "processes": processes,
        "pid": process.pid,
        "started": process.create_time(),
    }


def _owner(text: str) -> dict[str, Any]:
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}
