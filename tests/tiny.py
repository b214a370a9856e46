"""Whole runs in a second or two: tiny models on generated pictures, and all that decides what they do next."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from ranks import RankPool
from safetensors.torch import save_file
from torch import Tensor, nn

from hetero_kt import models
from hetero_kt import run as running
from hetero_kt.config import (
    AdapterConfig,
    Control,
    Data,
    Distill,
    MergeNet,
    Model,
    Objective,
    Optim,
    Recipe,
    Schedule,
    Teacher,
    Transfer,
)
from hetero_kt.distributed import checkpoint, params
from hetero_kt.distributed.launch import Ranks, StopSignal
from hetero_kt.evaluate import averaged_buffers
from hetero_kt.methods import Diverged
from hetero_kt.options import Options
from hetero_kt.trainer import Trainer

STEPS = 6
ADAPTER = AdapterConfig(heads=2)  # with dropout


def recipe(folder: Path, stage: int = 1, control: Control = "transfer", **changes: Any) -> Recipe:
    """Two tiny models that teach each other every 2 and 3 steps, in `folder`."""
    zero = folder / f"zero{stage}.json"
    folder.mkdir(parents=True, exist_ok=True)
    zero.write_text(json.dumps({"stage": stage, "stage3_param_persistence_threshold": 0}))
    schedule = Schedule("cosine", warmup=min(2, changes.get("steps", STEPS)))
    sgd = Optim("sgd", lr=0.05)
    adamw = Optim("adamw", lr=1e-2, weight_decay=1e-2, clip=1.0)
    made = {
        "resnet": Model("cifar:resnet_tiny", data="all", optim=sgd, schedule=schedule, zero=str(zero)),
        "mobilenetv2": Model("cifar:mobilenetv2_tiny", data="all", optim=adamw, schedule=schedule, zero=str(zero)),
    }
    there = Transfer("resnet:fc.weight", "mobilenetv2:blocks.2.1.conv_pwl.weight", cycle=2, rank=4, adapter=ADAPTER)
    back = Transfer(
        "mobilenetv2:classifier.weight",
        "resnet:layer4.0.conv1.weight",
        cycle=3,
        rank=4,
        adapter=ADAPTER,
        schedule=Schedule("cosine"),
    )
    method = MergeNet({"there": there, "back": back}, control)
    base = Recipe("tiny", made, {"all": Data("generated", batch=8)}, method, STEPS, log_every=1)
    return replace(base, output_dir=str(folder), **changes)


def distillation(folder: Path, stage: int = 1, objective: Objective = "fbt", **changes: Any) -> Recipe:
    """A tiny CNN that learns from a transformer, whose weights lie in `folder`."""
    base = recipe(folder, stage)
    weights = folder / "teacher.safetensors"
    if not weights.exists():
        torch.manual_seed(11)
        save_file(models.build("cifar:swin_tiny", 100).state_dict(), weights)
    student = replace(base.models["resnet"], optim=Optim("sgd", lr=0.02))
    method = Distill({"teacher": Teacher("cifar:swin_tiny", init=str(weights))}, objective)
    made = replace(base, name="tiny_distilled", models={"student": student}, method=method)
    return replace(made, **changes)


def with_average(base: Recipe) -> Recipe:
    """`base` with an average of every model's weights."""
    return replace(base, models={name: replace(model, ema=0.5) for name, model in base.models.items()})


def with_student(base: Recipe, **changes: Any) -> Recipe:
    """`base` with its one model changed."""
    ((name, model),) = base.models.items()
    return replace(base, models={name: replace(model, **changes)})


def with_transfer(base: Recipe, name: str = "there", **changes: Any) -> Recipe:
    """`base` with its transfer `name` alone, changed."""
    one = replace(base.method.transfers[name], **changes)
    return replace(base, method=replace(base.method, transfers={name: one}))


@dataclass(frozen=True)
class Plan:
    """What happens to a run besides training."""

    dropout: float = 0.0
    """In front of both models' classifiers."""
    signals: tuple[tuple[int, int, int], ...] = ()
    """(rank, step, signal number) that this rank receives while it trains the step."""
    poison: int = -1
    """The step before whose batch the adapters' parameters turn to NaN."""
    heal: int = -1
    """The step before whose batch they are as before the poison again."""
    logits: bool = False
    """Take the trained engines' logits too."""


def train(pool: RankPool, base: Recipe, options: Options | None = None, plan: Plan | None = None) -> list[Any]:
    """One run on the ranks of a pool; of each rank, its state at the end, equal to the bit in two runs that would go
    on alike, and

        done: what `run` returned,
        first_step: where it began; absent when nothing was left to do,
        moved: whether any buffer changed,
        teachers moved: whether a frozen teacher is another than before, or trains; where there are any,
        warnings: texts.
    """
    return [pickle.loads(end) for end in pool.run(_train, base, options or Options(), plan or Plan())]


def _train(base: Recipe, options: Options, plan: Plan) -> bytes:
    """As bytes: a pool would send hundreds of tensors through a file descriptor each."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    end: dict[str, Any] = {}

    class Watched(Trainer):
        def fit(self) -> bool:
            end["first_step"] = self.step
            end["began"] = whole(self)
            start, batches = copy.deepcopy(_buffers(self)), self.batches
            known = getattr(getattr(self.method, "objective", None), "teachers", {}).values()
            teachers = [getattr(teacher, "live", teacher).module for teacher in known]
            known = copy.deepcopy([teacher.state_dict() for teacher in teachers])
            healthy: dict[str, Any] = {}

            def disturbed(step: int) -> Any:
                for rank, at, number in plan.signals:
                    if (rank, at) == (ranks.rank, step):
                        signal.raise_signal(number)
                exchange = getattr(self.method, "exchange", None)
                adapters = exchange.adapters() if exchange is not None else {}
                if step == plan.poison:
                    healthy.update({name: copy.deepcopy(adapter.state_dict()) for name, adapter in adapters.items()})
                    for parameter in (p for adapter in adapters.values() for p in adapter.parameters()):
                        parameter.data.fill_(torch.nan)
                if step == plan.heal:
                    for name, adapter in adapters.items():
                        adapter.load_state_dict(healthy[name])
                return batches(step)

            self.batches = disturbed
            try:
                return super().fit()
            finally:
                end.update(state(self))
                end["whole"] = whole(self)
                pairs = zip(leaves(start), leaves(end["buffers"]), strict=True)
                end["moved"] = any(not torch.equal(one, other) for one, other in pairs)
                if teachers:
                    pairs = zip(leaves(known), leaves([teacher.state_dict() for teacher in teachers]), strict=True)
                    moved = any(not torch.equal(one, other) for one, other in pairs)
                    end["teachers moved"] = moved or any(m.training for t in teachers for m in t.modules())

        def export(self) -> None:
            super().export()
            end["after_export"] = state(self)
            if plan.logits:
                end["logits"] = {name: _logits(self.engines[name]) for name in self.method.models}

    with patched(plan.dropout), handlers_kept(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        running.Trainer = Watched  # type: ignore[misc]
        try:
            end["done"] = running.run(base, options, ranks, StopSignal())
        except Diverged as error:
            end["diverged"] = str(error)
        finally:
            running.Trainer = Trainer  # type: ignore[misc]
    end["warnings"] = [str(warning.message) for warning in caught]
    return pickle.dumps(end)


def state(trainer: Trainer) -> dict[str, Any]:
    """Weights, each rank's buffers, optimizers' states, adapters and random states."""
    found: dict[str, Any] = {"buffers": _buffers(trainer)}
    for name, engine in trainer.engines.items():
        module = engine.module
        if engine.zero_optimization_stage() == 3:  # else the test would test nothing
            engine.empty_partition_cache()  # an evaluation leaves some gathered
            assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in module.parameters())
        found[name] = {k: params.read([params.Weight(engine, p)])[0] for k, p in module.named_parameters()}
        optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        found[f"{name} optimizer"] = {"state": list(optimizer.state.values()), "groups": groups}
    found["method"] = trainer.method.state_dict()
    learners = trainer.method.learners.items()
    found["averages"] = {
        name: [average.updates, {piece.name: own for piece, own in average.pieces()}, average.buffers()]
        for name, learner in learners
        if (average := learner.average) is not None
    }
    found["random"] = checkpoint.random_state()
    found["metrics"] = trainer.metrics
    return copy.deepcopy(found)


def whole(trainer: Trainer) -> dict[str, Any]:
    """What is one for all ranks, whatever their number and stage: weights, averages, mean buffers, adapters."""
    found: dict[str, Any] = {"method": copy.deepcopy(trainer.method.state_dict())}
    for name, learner in trainer.method.learners.items():
        for view in learner.views(name):
            with learner.seen_as(name, view) as engine, averaged_buffers(engine.module):
                found[view] = params.state_dict(engine)
    return found


def _buffers(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    return {name: dict(engine.module.named_buffers()) for name, engine in trainer.engines.items()}


def _logits(engine: Any) -> Tensor:
    module = engine.module
    module.eval()
    with torch.no_grad(), averaged_buffers(module):
        found = engine(pictures())
    module.train()
    return found.clone()


def pictures() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@contextlib.contextmanager
def patched(dropout: float) -> Iterator[None]:
    build = models.build

    def with_dropout(*args: Any, **options: Any) -> nn.Module:
        model: Any = build(*args, **options)
        assert hasattr(model, "drop_rate")
        model.drop_rate = dropout
        return model

    models.build = with_dropout
    try:
        yield
    finally:
        models.build = build


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def leaves(tree: Any) -> list[Tensor]:
    """All tensors of nested dicts and lists."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [leaf for part in parts for leaf in leaves(part)]


def assert_equal(ours: Any, theirs: Any, at: str = "") -> None:
    """Nested dicts, lists, tensors and numbers, to the bit."""
    assert type(ours) is type(theirs), at
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), at
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{at}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), at
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(one, other, f"{at}[{i}]")
    elif isinstance(ours, Tensor):
        assert torch.equal(ours, theirs), at
    else:
        assert ours == theirs, at


def assert_same_end(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Two runs ended in the same state on every rank."""
    for rank, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert "random" in one, f"rank {rank} has not trained"
        keys = [key for key in other if key not in ASIDE]
        assert keys == [key for key in one if key not in ASIDE]
        for key in keys:
            assert_equal(one[key], other[key], f"rank {rank}: {key}")


ASIDE = ("done", "diverged", "first_step", "began", "moved", "warnings", "after_export", "logits")
"""What two runs that end in the same state may differ in."""


def lines(folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl`, without what a clock has measured."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line, parse_constant=_refuse)
        assert isinstance(values, dict)
        found.append({k: v for k, v in values.items() if "seconds" not in k and k not in ("decoded", "waiting")})
    return [line for line in found if line.keys() != {"step"}]  # what a checkpoint has cost


def _refuse(constant: str) -> Callable[[], None]:
    raise AssertionError(f"{constant} is no JSON")
