"""Worker processes that prepare batches ahead of the trainer.

Workers are forked from a server process of their own (`forkserver`). A fork of the trainer itself would copy locks
that its OpenMP, gloo and CUDA threads hold at that moment, and hang or crash sooner or later; fresh interpreters
(`spawn`) would each import torch and timm again, three seconds of a core. The server imports them once per trainer,
has one thread and no CUDA, and then forks a worker in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hetero_kt.messages import first_line

_PRELOADED = ["torch", "timm.data", "hetero_kt.data.pictures"]
_AHEAD = 2  # batches that each worker prepares ahead
_DEATHS = 3  # in a row; a worker that dies so often dies of its work
_SHARED_MEMORY = Path("/dev/shm")


class Lost(RuntimeError):
    """Worker processes that die again and again, or cannot start."""


class Stream:
    """Results of `work` for tasks first, first + 1, ..., in this order, computed by worker processes ahead of time.

    Which worker computes what does not matter to the results. Workers that were killed (for want of memory, or by a
    signal to the whole process group) are started again at the task that is due.
    """

    def __init__(
        self, work: Dataset[Any], tasks: Callable[[int], Any], first: int, last: int | None, workers: int, pin: bool
    ) -> None:
        """`tasks(k)` is what `work[...]` is asked for as result k, up to `last` (excluded). Without `workers` it is
        computed here, when it is due. `pin` puts the tensors of results into page-locked memory."""
        self.position, self.restarts, self.workers = first, 0, workers
        self._last = last
        self._options: dict[str, Any] = {
            "dataset": work,
            "batch_size": None,  # a task is a whole batch
            "collate_fn": _as_it_is,
            "pin_memory": pin,
        }
        if workers:
            self._options |= {
                "num_workers": workers,
                "prefetch_factor": _AHEAD,
                "multiprocessing_context": context,
            }
        self._tasks = tasks
        self._results: Any = None

    def __next__(self) -> Any:
        """The next result; StopIteration behind the last. What `work` raises is raised here, and Lost where its
        processes die of it."""
        for deaths in range(_DEATHS):
            try:
                if self._results is None:
                    self._results = self._start()
                result = next(self._results)
                self.position += 1
                return result
            except (RuntimeError, OSError, EOFError) as error:
                # A dead worker shows as either: of its queue, or of the socket behind a tensor that it has sent.
                self.close()
                lost = isinstance(error, OSError | EOFError) or "exited unexpectedly" in str(error)
                if not lost:
                    raise
                if deaths == _DEATHS - 1:
                    raise Lost(first_line(error)) from error
                self.restarts += 1
        raise AssertionError

    def close(self) -> None:
        """End the workers."""
        if self._results is not None and self.workers:
            # Its finaliser would do so too, but not at once, and not well where the garbage collector runs it: the
            # queues may then be closed first, and a worker that hears nothing is waited for 5 s.
            self._results._shutdown_workers()
        self._results = None

    def _start(self) -> Iterator[Any]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: as was asked
            # A generator of its own: without one, the loader would draw from the trainer's.
            return iter(DataLoader(sampler=_Tasks(self), generator=torch.Generator(), **self._options))

    def pending(self) -> Iterator[Any]:
        """Tasks that have not been delivered."""
        position = self.position
        while self._last is None or position < self._last:
            yield self._tasks(position)
            position += 1


class _Tasks:
    """The stream's tasks as a sampler; the trainer's process runs it."""

    def __init__(self, stream: Stream) -> None:
        self._pending = stream.pending()

    def __iter__(self) -> Iterator[Any]:
        return self._pending


def preload(*modules: str) -> None:
    """Let a server that starts from now on import these too, so that no worker has to by itself."""
    _PRELOADED.extend(module for module in modules if module not in _PRELOADED)


def usable(workers: int, result_bytes: int) -> int:
    """How many of the `workers` can be started here, each with its results ahead in shared memory.

    0 in a daemonic process, which may start none, and where not even one worker's results fit: containers often
    have no more than 64 MB of shared memory, and a process that writes beyond it is killed.
    """
    # Not at the top: the server imports this module and is to know nothing of GPUs, which that package asks for.
    from hetero_kt.distributed.launch import ranks_here

    if multiprocessing.current_process().daemon:
        return 0
    if workers and _SHARED_MEMORY.is_dir():
        share = shutil.disk_usage(_SHARED_MEMORY).free // ranks_here()
        workers = min(workers, share // (2 * (_AHEAD + 1) * result_bytes))
    return workers


class _Worker(ForkServerProcess):
    def run(self) -> None:
        """In the worker."""
        threading.Thread(target=_end_with_trainer, name="trainer", daemon=True).start()
        super().run()

    @staticmethod
    def _Popen(process_obj: Any) -> Popen:
        multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
        with _main_hidden(), _sheltered():
            return Popen(process_obj)


class _Context(ForkServerContext):
    Process = _Worker  # type: ignore[assignment]


context = _Context()
"""Like `multiprocessing.get_context('forkserver')`, as described above."""


def _end_with_trainer() -> None:
    """End this worker once the trainer is gone, however it ended. The server is every worker's parent, and ends after
    the last of them; with it goes the process that removes their semaphores. What else a killed trainer leaves is the
    folder of its sockets. Waits for as long as the worker lives."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    multiprocessing.connection.wait([trainer.sentinel])
    folder = multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


@contextmanager
def _main_hidden() -> Iterator[None]:
    """A child would import the trainer's script again: all of DeepSpeed, or a second run if the script does not
    guard its main call. Workers need nothing from it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _sheltered() -> Iterator[None]:
    """The server and its workers do not hear of signals to the whole group that mean the trainer: USR1 (save, the time
    is up), INT and HUP. They inherit the mask. TERM still ends them, and they end with the trainer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _as_it_is(result: Any) -> Any:
    return result
