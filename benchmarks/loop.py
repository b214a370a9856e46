"""What our training loop costs over a bare one: learning rates, logs, metrics files, progress bar, heartbeat, signals.

    python benchmarks/loop.py

The trainer runs as in any run. Every `segment` steps it stands still while a bare DeepSpeed loop, the function `bare`
below, takes as many steps with a copy of the model on the same batches, drawn from memory by the same loader.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import tyro
from measure import Turns, report
from torch.nn import functional as F

from hetero_kt import config, data, models
from hetero_kt.config import Data, Model, Optim, Recipe, Schedule
from hetero_kt.distributed import launch
from hetero_kt.distributed.engine import bucket_size
from hetero_kt.distributed.heartbeat import Heartbeat
from hetero_kt.distributed.learner import build_learner
from hetero_kt.methods.mergenet import Exchange, MergeNet
from hetero_kt.options import Options, without_local_rank
from hetero_kt.tasks import classification
from hetero_kt.trainer import Trainer

AIM = 1.02


@dataclass(frozen=True)
class Bench:
    """Options of this benchmark."""

    model: str = ""
    """Empty takes cifar:resnet50 on a GPU and cifar:resnet_small on a CPU."""
    batch: int = 0
    """Rows per rank; 0 takes 128 on a GPU and 64 on a CPU."""
    segment: int = 20
    """Steps of one turn."""
    turns: int = 11
    json: str = ""
    """Also write the figures to this file."""


class Enough(Exception):
    """Everything is measured: no evaluation, no checkpoint."""


def main(bench: Bench) -> None:
    """Measure and print, on the first rank."""
    ranks = launch.start()
    gpu = ranks.device.type == "cuda"
    name = bench.model or ("cifar:resnet50" if gpu else "cifar:resnet_small")
    rows = bench.batch or (128 if gpu else 64)
    launch.seed_everything(0)
    model = Model(name, "pictures", optim=Optim(lr=1e-3), schedule=Schedule("constant"))
    pictures = Data("generated", batch=rows * ranks.world)
    loader: Any = data.open_loader(
        pictures, train=True, seed=0, rank=ranks.rank, world=ranks.world, device=ranks.device
    )
    module = models.build(name, loader.classes).to(ranks.device)
    other = bare(copy.deepcopy(module), loader.batch, model.optim)
    learners = {"model": build_learner(module, model, {"stage": 1}, rows=rows, steps=1_000_000)}
    method = MergeNet(learners, Exchange([]), {"model": classification.loss})
    recipe = Recipe("loop", {"model": model}, {"pictures": pictures}, config.MergeNet({}), steps=1_000_000)
    turns = Turns(ranks.device)

    def after_step() -> None:
        counted, rest = divmod(trainer.step, bench.segment)
        if rest:
            return
        turns.stop("trainer", counts=counted > 1)  # the first ones allocate
        turns.start()
        for _ in range(bench.segment):
            next(other)
        turns.stop("bare", counts=counted > 1)
        if counted > bench.turns:
            raise Enough
        turns.start()

    with tempfile.TemporaryDirectory() as folder, Heartbeat(ranks, Options().patience) as pulse:
        stop = launch.StopSignal()
        trainer = Trainer(
            recipe,
            method,
            lambda step: {"model": loader.batch(step)},
            lambda name, module: {},
            Path(folder),
            ranks,
            stop,
            last=recipe.steps,
        )
        trainer.pulse, trainer.after_step = pulse, after_step
        trainer.measured = loader.throughput
        turns.start()
        with contextlib.suppress(Enough):
            trainer.fit()
        pulse.long("leaving")
    what = f"training loop, {name.partition(':')[2]}, {rows} rows"
    figure = turns.ratio(what, "trainer", "bare", f"bare DeepSpeed loop, {bench.segment} steps", AIM)
    report(f"training loop, {ranks.world} rank(s)", [figure], bench.json, seconds=turns.raw())
    dist.destroy_process_group()


def bare(model: torch.nn.Module, batch: Callable[[int], Any], optim: Optim) -> Iterator[int]:
    """A loop over DeepSpeed as one writes it who wants nothing but the training, suspended after each step."""
    sgd = {"lr": optim.lr, "momentum": optim.momentum, "weight_decay": optim.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), **sgd, fused=True)  # as ours: the loop is what is compared
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": bucket_size(model)},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for step in range(1_000_000):
        pictures, labels = batch(step)
        loss = F.cross_entropy(engine(pictures), labels)
        engine.backward(loss)
        engine.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
        yield step


if __name__ == "__main__":
    import sys

    main(tyro.cli(Bench, args=without_local_rank(sys.argv[1:])))
