"""Checkpoints of a run, written while it goes on; resume on any number of ranks at any ZeRO stage.

At a save every rank copies what it holds to host memory, and a thread of its own writes the files (`layout` says
which) while training continues; ranks send each other nothing for that. Once all threads are done, which the ranks
find out at one of the next looks at signals, the first rank writes DONE. A kill at any moment leaves the last complete
checkpoint.

Saving changes no state: every rank's buffers and random state are kept as they are, so that a run resumed on the same
number of ranks is bit-equal to an uninterrupted one. On another number floating-point buffers become the mean over the
saved ranks, which is what an evaluation sees, and random state begins afresh; weights, moments and averages are the
same to the bit.

Nothing that is not finite is saved: the threads look at every weight, moment, average, buffer and adapter before they
write, and what any rank has found makes the checkpoint none. `raise_if_not_finite` looks at the same in one reduction
on the device.
"""

from __future__ import annotations

import contextlib
import random
import time
import traceback
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from hetero_kt import files
from hetero_kt.distributed import layout
from hetero_kt.distributed.agreement import Unwritable, UserError, agreed
from hetero_kt.distributed.background import Background
from hetero_kt.distributed.layout import REMOVE, Entry
from hetero_kt.distributed.learner import Learner
from hetero_kt.distributed.saved import DAMAGE, Saved, SavedModel
from hetero_kt.messages import first_line
from hetero_kt.nn.soundness import first_not_finite, look_finite
from hetero_kt.removal import CHECKPOINT, is_folder, remove_written


class NotFinite(RuntimeError):
    """Some weight, moment, average, buffer or adapter is NaN or infinite; raised on all ranks."""


@dataclass(frozen=True)
class Written:
    """A checkpoint that has become complete."""

    step: int
    stall: float
    """Seconds that training stood still for it on this rank."""
    writing: float
    """Seconds that the slowest rank wrote beside training."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: gets a folder for each step.
        keep: complete ones that stay.
        device: of this rank's tensors in collectives.
    """

    def __init__(self, folder: Path, keep: int, device: torch.device) -> None:
        self.folder, self.keep, self.device = folder, keep, device
        self.last = -1
        """Step of the newest checkpoint that this run has written or begun from."""
        self._host = _Host()
        self._writing: _Writing | None = None
        self._pruning: _Pruning | None = None

    def save(self, step: int, learners: Mapping[str, Learner], shared: Mapping[str, Any]) -> Written | None:
        """Begin a checkpoint of `step`, unless there is one of it already; returns the last one if it has become
        complete only now. Collective.

        Args:
            shared: plain state that is equal on all ranks and of no learner; the first rank's is written.

        Raises:
            NotFinite: a part of the last one's state; it is no checkpoint, and no older one was removed.
            UserError: this one's folder or the last one's files could not be written.
        """
        before = self._finish()
        if step == self.last:
            return before
        began = time.perf_counter()
        target, rank = self.folder / str(step), dist.get_rank()
        state = _State(learners, shared)
        with agreed():
            if rank == 0:
                self._pruned()  # it would take what is begun for something torn
                _make_room(target)
        entries, about = state.written(rank)
        with agreed():  # a rank without memory for it must not leave the others waiting
            self._writing = writing = _Writing(target, rank, self._host.copy(entries), about, state.exempt)
        writing.stall = time.perf_counter() - began
        return before

    def settle(self) -> Written | None:
        """Complete the checkpoint that is being written if all ranks have written their files. Collective.

        Raises:
            NotFinite: a part of its state; it is no checkpoint.
        """
        if self._writing is None:
            return None
        busy = torch.tensor(int(self._writing.is_alive()), device=self.device)
        dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        return None if busy.item() else self._finish()

    def finish(self) -> Written | None:
        """Wait for the checkpoint that is being written and complete it, and until old ones are gone. Collective.

        Raises:
            NotFinite: a part of its state; it is no checkpoint.
            UserError: some rank could not write; the last complete checkpoint is as it was.
        """
        written = self._finish()
        with agreed():
            self._pruned()
        return written

    def _finish(self) -> Written | None:
        if self._writing is None:
            return None
        began = time.perf_counter()
        writing, self._writing = self._writing, None
        writing.join()
        first, step = dist.get_rank() == 0, int(writing.target.name)
        try:
            with agreed():
                if writing.problem:
                    raise ValueError(writing.problem)
            found: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(found, (writing.files, writing.seconds, writing.not_finite))
            if bad := next(filter(None, (name for _, _, name in found)), ""):
                raise NotFinite(f"{bad} is not finite")
            with agreed():
                if first:
                    self._complete(writing.target, [written for written, _, _ in found])
        except (UserError, NotFinite):
            if first:
                with contextlib.suppress(OSError):
                    remove_written(writing.target, CHECKPOINT)  # a full disk has better use for it
            raise
        self.last = step
        stall = writing.stall + time.perf_counter() - began
        return Written(step, stall, max(seconds for _, seconds, _ in found))

    def _complete(self, target: Path, files: Sequence[Mapping[str, Any]]) -> None:
        try:
            layout.write_done(target, len(files), {name: about for one in files for name, about in one.items()})
        except OSError as error:
            raise Unwritable(f"the checkpoint {target}", error) from error
        self._pruning = _Pruning(self.folder, self.keep)

    def _pruned(self) -> None:
        pruning, self._pruning = self._pruning, None
        if pruning is not None:
            pruning.join()
            if pruning.problem is not None:
                raise pruning.problem


class _State:
    """What a rank holds at a step, before anything is copied."""

    def __init__(self, learners: Mapping[str, Learner], shared: Mapping[str, Any]) -> None:
        self.learners, self.shared = learners, shared
        self.own = {"models": {name: learner.own() for name, learner in learners.items()}}
        self.pieces = [entry for name, learner in learners.items() for entry in learner.entries(name)]
        self.exempt = {
            f"own/models/{name}/{kind}/{buffer}"
            for name, learner in learners.items()
            for kind in ("buffers", "unsaved", "averages")
            for buffer in learner.infinite
        }
        """Keys of entries that need not be finite."""

    def raise_if_not_finite(self, device: torch.device) -> None:
        """Collective.

        Raises:
            NotFinite: with the name of the first tensor of the first rank that has one.
        """
        held = [*self.pieces, *layout.leaves(self.own, "own"), *layout.leaves(dict(self.shared), "shared")]
        held = [entry for entry in held if entry.key not in self.exempt]
        tensors = [entry.tensor for entry in held]
        sound = look_finite(tensors, device).to(torch.int32)
        dist.all_reduce(sound, op=dist.ReduceOp.MIN)
        if sound.item():
            return
        bad = first_not_finite(tensors)
        named: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(named, "" if bad is None else _called(held[bad]))
        if any(named):
            raise NotFinite(f"{next(filter(None, named))} is not finite")

    def written(self, rank: int) -> tuple[list[Entry], dict[str, Any]]:
        """The tensors that this rank writes, and what stands in their index besides."""
        trees: dict[str, Any] = {
            "own": {**self.own, "random": random_state()},
            **({"shared": dict(self.shared)} if rank == 0 else {}),
        }
        entries = [*self.pieces, *(entry for kind, tree in trees.items() for entry in layout.leaves(tree, kind))]
        about = {
            "models": {name: learner.about() for name, learner in self.learners.items()},
            **{kind: layout.described(tree, kind) for kind, tree in trees.items()},
        }
        return entries, about


def _called(entry: Entry) -> str:
    """What an entry is, for a sentence: `resnet's weight fc.bias`, `method/paths/there/adapter/body.0.weight`."""
    if entry.model:
        return f"{entry.model}'s {entry.kind} {entry.name}"
    return entry.name


def raise_if_not_finite(learners: Mapping[str, Learner], shared: Mapping[str, Any], device: torch.device) -> None:
    """Look at all that a checkpoint would hold. Collective.

    Raises:
        NotFinite: with the name of a tensor that is NaN or infinite somewhere.
    """
    _State(learners, shared).raise_if_not_finite(device)


class _Pruning(Background):
    """Removes old checkpoints, on the first rank, beside training. Starts at once."""

    def __init__(self, folder: Path, keep: int) -> None:
        super().__init__()
        self.folder, self.keep = folder, keep
        self.problem: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            layout.prune(self.folder, self.keep)
        except OSError as error:
            self.problem = error


class _Writing(Background):
    """Writes one rank's files; joined before its results are looked at. Starts at once."""

    def __init__(
        self, target: Path, rank: int, entries: Sequence[Entry], about: Mapping[str, Any], exempt: Set[str]
    ) -> None:
        super().__init__()
        self.looked_at = [entry for entry in entries if entry.key not in exempt]
        self.target, self.rank, self.entries, self.about = target, rank, entries, about
        self.files: dict[str, Any] = {}
        self.not_finite = ""
        """The first tensor that is not."""
        self.problem, self.seconds, self.stall = f"{target} was not written to its end.", 0.0, 0.0
        self.start()

    def run(self) -> None:
        began = time.perf_counter()
        try:
            bad = first_not_finite([entry.tensor for entry in self.looked_at])
            if bad is None:
                self.files = layout.write_rank(self.target, self.rank, self.entries, self.about)
            else:
                self.not_finite = _called(self.looked_at[bad])
            self.problem = ""
        except (OSError, SafetensorError) as error:
            self.problem = str(Unwritable(f"the checkpoint {self.target}", error))
        except Exception as error:  # nobody's input
            traceback.print_exc()
            self.problem = f"{type(error).__name__}: {error}"
        self.seconds = time.perf_counter() - began


class _Host:
    """Copies in host memory, pinned for a GPU; kept between saves, since making them costs more than filling them."""

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}

    def copy(self, entries: Sequence[Entry]) -> list[Entry]:
        """The same entries as they are now, whatever training does to them afterwards."""
        kept, self.buffers = self.buffers, {}
        for entry in entries:
            tensor, buffer = entry.tensor.detach(), kept.get(entry.key)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.buffers[entry.key] = buffer.copy_(tensor, non_blocking=True)
        if any(entry.tensor.is_cuda for entry in entries):
            torch.cuda.current_stream().synchronize()
        return [replace(entry, tensor=self.buffers[entry.key]) for entry in entries]


def _make_room(target: Path) -> None:
    """An empty folder `target`; what an earlier kill has left there goes."""
    try:
        if is_folder(target):
            (target / "DONE").unlink(missing_ok=True)
            remove_written(target, CHECKPOINT)
        target.mkdir(parents=True, exist_ok=True)
        files.sync(target.parent)
    except OSError as error:
        raise Unwritable(f"the checkpoint {target}", error) from error


# --- reading ---


def load(path: Path, learners: Mapping[str, Learner]) -> tuple[dict[str, Any], int]:
    """Restore every learner and, on the same number of ranks, this rank's random state; returns what was saved as
    `shared`, and the number of ranks that saved. Collective.

    Raises:
        UserError: a damaged checkpoint, or one of other models.
    """
    rank = dist.get_rank()
    with agreed(), Saved(path) as saved:
        try:
            same = saved.ranks == dist.get_world_size()
            own = saved.tree("own", rank) if same else {"models": saved.buffers()}
            for name, learner in learners.items():
                learner.restore(SavedModel(saved, name), own["models"][name])
            shared = saved.tree("shared")
        except DAMAGE as error:
            if isinstance(error, ValueError):
                raise
            raise ValueError(
                f"{path} is not one of this run's ({type(error).__name__}: {first_line(error)}): {REMOVE}."
            ) from error
    for learner in learners.values():
        learner.refresh()
    with agreed():
        try:
            if same:
                restore_random_state(own["random"])
        except DAMAGE as error:
            raise ValueError(f"{path} holds no random state ({first_line(error)}): {REMOVE}.") from error
    return shared, saved.ranks


def random_state() -> dict[str, Any]:
    """Python's, NumPy's and torch's generators, as tensors and numbers."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
        ],
        "numpy_cached": float(cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Continue every generator from `random_state()`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, state["numpy_cached"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
