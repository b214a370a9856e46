"""Ranks for tests: processes that start once, join a group and then run one function after another."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from hetero_kt.distributed.launch import free_port


class RankPool:
    """`world` processes in one group; `run(f, *args)` calls `f(*args)` on all of them.

    They compute on the CPU, or with `gpu` each on a GPU of its own.

    A function and its arguments travel by pickle, so `f` is a module-level function of a test file. The pool starts
    again by itself after a call that failed or hung, since its ranks may have stopped at different collectives.
    """

    def __init__(self, world: int, gpu: bool = False) -> None:
        self.world, self.gpu = world, gpu
        self.processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
        """The results of all ranks, in their order; a rank's exception is raised here with its traceback."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        results: list[Any] = [None] * self.world
        failure, deadline = "", time.monotonic() + timeout
        waiting = set(range(self.world))
        while waiting and not failure:
            for rank in sorted(waiting):
                if self.pipes[rank].poll(0.02):
                    try:
                        good, value = self.pipes[rank].recv()
                    except EOFError:
                        good, value = False, f"process ended ({self.processes[rank].exitcode})"
                    waiting.discard(rank)
                    if good:
                        results[rank] = value
                    else:
                        failure = f"rank {rank}: {value}"
            if time.monotonic() > deadline:
                failure = f"ranks {sorted(waiting)} still running after {timeout:.0f} s"
        if failure:
            self.close()
            raise RuntimeError(failure)
        return results

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            args = (rank, self.world, port, theirs, sys.path, self.gpu)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes = []


def _serve(rank: int, world: int, port: int, pipe: Any, path: list[str], gpu: bool) -> None:
    sys.path[:] = path
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    os.environ |= {"DS_ACCELERATOR": "cuda"} if gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    import torch

    from hetero_kt.distributed import launch

    torch.set_num_threads(1)
    launch.start()
    linear = torch.nn.functional.linear
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        torch.nn.functional.linear = linear  # ZeRO-3 puts its own there for good, which rounds otherwise
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
