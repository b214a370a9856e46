"""A model in training: its engine, its learning rate's schedule and, where wanted, the average of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed import DeepSpeedEngine
from timm.scheduler.scheduler import Scheduler
from torch import nn

from hetero_kt.config import Model
from hetero_kt.distributed.ema import EMA
from hetero_kt.distributed.engine import build_engine, build_schedule


class Learner:
    """One trained model and all that follows its optimizer's steps.

    Args:
        schedule: a timm scheduler of the engine's optimizer, as `build_schedule` makes it.
        average: the engine's weight average; None keeps none.
    """

    def __init__(self, engine: DeepSpeedEngine, schedule: Scheduler, average: EMA | None = None) -> None:
        self.engine, self.schedule, self.average = engine, schedule, average

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

    def state_dict(self) -> dict[str, Any]:
        """What all ranks share and no engine's own checkpoint holds; whole on the first, for its file. Collective."""
        return {} if self.average is None else {"average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def local_state(self) -> dict[str, Any]:
        """What only this rank has."""
        return {} if self.average is None else {"average": self.average.local_state()}

    def load_local_state(self, state: dict[str, Any]) -> None:
        if self.average is not None:
            self.average.load_local_state(state["average"])


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
    return Learner(engine, build_schedule(engine.optimizer, model.schedule, steps), average)
