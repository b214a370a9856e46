"""A model in training: its engine, its learning rate's schedule and, where wanted, the average of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hetero_kt.config import Model
from hetero_kt.distributed.ema import EMA
from hetero_kt.distributed.engine import build_engine
from hetero_kt.distributed.layout import Entry
from hetero_kt.distributed.pieces import Piece, fill, pieces, rates, refresh, set_rates
from hetero_kt.distributed.saved import SavedModel
from hetero_kt.nn.soundness import infinite
from hetero_kt.optimizer import Rates

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Learner:
    """One trained model and all that follows its optimizer's steps.

    Args:
        schedule: the learning rates of the engine's optimizer.
        average: the engine's weight average; None keeps none.
    """

    def __init__(self, engine: DeepSpeedEngine, schedule: Rates, average: EMA | None = None) -> None:
        self.engine, self.schedule, self.average = engine, schedule, average
        self.pieces = pieces(engine)
        self.infinite = infinite(dict(engine.module.named_buffers()))
        """Buffers that are not finite from the beginning, and may be so in a checkpoint."""

    def begin(self, step: int) -> None:
        """Set the learning rate of optimizer step `step`."""
        self.schedule.step_update(step)

    def step(self) -> None:
        """The optimizer's step, at the end of an accumulation, and what depends on the new weights."""
        self.engine.step()
        if self.average is not None:
            self.average.update()

    def views(self, name: str) -> tuple[str, ...]:
        """Names under which the model is evaluated and exported: its own, and `<name>_ema` for its average."""
        return (name,) if self.average is None else (name, f"{name}_ema")

    @contextmanager
    def seen_as(self, name: str, view: str) -> Iterator[DeepSpeedEngine]:
        """The engine with the weights that the view `view` of `views(name)` stands for. Collective."""
        if view == name or self.average is None:
            yield self.engine
        else:
            with self.average.applied():
                yield self.engine

    # --- what a checkpoint holds of it ---

    def entries(self, name: str) -> list[Entry]:
        """What this rank writes of what there is for each element: masters, frozen weights, moments, averages. What all
        ranks have is shared out among them."""
        averages = {piece.name: tensor for piece, tensor in self.average.pieces()} if self.average is not None else {}
        rank, world = dist.get_rank(), dist.get_world_size()
        found = []
        for i, piece in enumerate(self.pieces):
            if not piece.numel or (piece.group is None and i % world != rank):
                continue
            held = {"weight": piece.master(), **piece.moments()}
            if piece.name in averages:
                held["average"] = averages[piece.name]
            found += [
                Entry(tensor, name, kind, piece.name, tuple(piece.shape), piece.start, piece.stop)
                for kind, tensor in held.items()
            ]
        return found

    def about(self) -> dict[str, Any]:
        """Its numbers; those of weights from this rank's pieces."""
        counted = {piece.name: numbers for piece in self.pieces if (numbers := piece.numbers())}
        return {
            "steps": self.engine.global_steps,
            "samples": self.engine.global_samples,
            "skipped": self.engine.skipped_steps,
            "rates": rates(self.engine),
            "updates": 0 if self.average is None else self.average.updates,
            "numbers": counted,
        }

    def own(self) -> dict[str, dict[str, Tensor]]:
        """What only this rank has: its buffers, those that a state dict leaves out, and its averages of the first."""
        module = self.engine.module
        kept = module.state_dict().keys()
        buffers = dict(module.named_buffers())
        return {
            "buffers": {name: buffer for name, buffer in buffers.items() if name in kept},
            "unsaved": {name: buffer for name, buffer in buffers.items() if name not in kept},
            "averages": {} if self.average is None else self.average.buffers(),
        }

    @torch.no_grad()
    def restore(self, saved: SavedModel, own: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take its state over, this rank's part of it; `refresh` has to follow.

        Raises:
            ValueError: it is that of another model.
        """
        average = [] if self.average is None else self.average.pieces()
        self._check_same(saved.shapes, self.pieces, saved)
        self._check_same(saved.averages, [piece for piece, _ in average], saved)
        fill(self.engine, self.pieces, saved)
        set_rates(self.engine, saved.about["rates"])
        self.engine.global_steps = int(saved.about["steps"])
        self.engine.global_samples = int(saved.about["samples"])
        self.engine.skipped_steps = int(saved.about["skipped"])
        buffers = dict(self.engine.module.named_buffers())
        for name, values in {**own["buffers"], **own["unsaved"]}.items():
            buffers[name].copy_(values)
        if self.average is not None:
            self.average.updates = int(saved.about["updates"])
            for piece, tensor in average:
                if piece.numel:
                    tensor.copy_(saved.read("average", piece.name, piece.start, piece.stop))
            for name, tensor in self.average.buffers().items():
                tensor.copy_(own["averages"][name])

    def _check_same(self, theirs: Mapping[str, tuple[int, ...]], pieces: Sequence[Piece], saved: SavedModel) -> None:
        ours = {piece.name: tuple(piece.shape) for piece in pieces}
        for name in dict.fromkeys((*ours, *theirs)):
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"{saved.saved.path} holds {saved.model}'s {name} as {theirs.get(name)} and the model has it as "
                    f"{ours.get(name)}: resume with the model that was saved, or begin again with --resume never."
                )

    def refresh(self) -> None:
        """Make what forward uses from what `restore` has read. Collective."""
        refresh(self.engine, self.pieces)


def build_learner(module: nn.Module, model: Model, zero: dict[str, Any], *, rows: int, steps: int) -> Learner:
    """Wrap `module` as its recipe says.

    Args:
        zero: DeepSpeed's `zero_optimization` block.
        rows: of this rank in one optimizer step.
        steps: of the whole run, over which the schedule is laid out.
    """
    micro = model.micro_batch or rows
    engine = build_engine(
        module,
        optim=model.optim,
        zero=zero,
        precision=model.precision,
        micro_batch=micro,
        accumulation=rows // micro,
    )
    average = EMA(engine, model.ema) if model.ema else None
    return Learner(engine, Rates(engine.optimizer, model.schedule, steps), average)
