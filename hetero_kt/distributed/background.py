"""Work beside training, in a thread that is known to have begun."""

from __future__ import annotations

import _thread
import threading
from abc import ABC, abstractmethod

SECONDS = 30.0
"""Within which a thread begins, or is given up."""


class Background(ABC):
    """`run` in a thread of its own. Unlike `threading.Thread`, whose `start` waits for ever for a thread that had no
    memory left to begin, `start` raises then."""

    def __init__(self) -> None:
        self._begun, self._ended = threading.Event(), threading.Event()

    @abstractmethod
    def run(self) -> None:
        """The work."""

    def start(self) -> None:
        """Begin.

        Raises:
            ValueError: the machine has no memory or no thread left for it.
        """
        reason = f"it did not begin within {SECONDS:.0f} s"
        try:
            _thread.start_new_thread(self._work, ())
            if self._begun.wait(SECONDS):
                return
        except (RuntimeError, MemoryError) as error:
            reason = str(error) or "no memory"
        self._ended.set()
        raise ValueError(
            f"no thread can be started beside training ({reason}): give the job more memory or processes, or start "
            "fewer ranks on a host, and start the same command again."
        )

    def is_alive(self) -> bool:
        """Whether the work goes on."""
        return not self._ended.is_set()

    def join(self) -> None:
        """Wait for the work's end, for as long as it takes: the heartbeat bounds what a rank may wait for."""
        self._ended.wait()

    def _work(self) -> None:
        threading.current_thread().name = type(self).__name__.strip("_").lower()  # as a debugger shows it
        try:
            self._begun.set()
            self.run()
        finally:
            self._ended.set()
