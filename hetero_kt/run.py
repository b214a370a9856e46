"""One run: recipe -> models -> engines -> method -> trainer. Start reading here.

run(recipe, ...)       one run in its folder <output_dir>/<name>/<control>/seed<k>

`hetero_kt.start.main` is what a launcher calls: it reads the command line, then calls `run` once, or for each run of a
comparison.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hetero_kt import parts
from hetero_kt.checks import check
from hetero_kt.compiler import on_compiling
from hetero_kt.config import Recipe
from hetero_kt.data import Loader
from hetero_kt.distributed import layout
from hetero_kt.distributed.agreement import agreed
from hetero_kt.distributed.heartbeat import Heartbeat
from hetero_kt.distributed.launch import Ranks, StopSignal
from hetero_kt.folder import (
    check_same_data,
    check_same_everywhere,
    fingerprint,
    look,
    noted,
    open_folder,
    owned,
    run_folder,
    write_result,
)
from hetero_kt.options import Options
from hetero_kt.profile import profiled
from hetero_kt.start import main
from hetero_kt.trainer import Trainer

__all__ = ["main", "run"]


def run(recipe: Recipe, options: Options, ranks: Ranks, stop: StopSignal, pulse: Heartbeat | None = None) -> bool:
    """One run, from its newest checkpoint on if there is one; False when a signal stopped it. Collective.

    Raises:
        UserError: the recipe, its data or the run folder does not fit; raised on all ranks before any engine starts.
        Diverged: proposals, losses or the state were not finite; the last sound checkpoint is as it was.
    """
    pulse = pulse or Heartbeat(ranks, patience=0)
    pulse.long("preparing the run")
    folder = run_folder(recipe)
    with agreed():
        check(recipe, ranks.world)
        seen: list[Any] = [look(recipe, options, folder) if ranks.first else None]
    dist.broadcast_object_list(seen)  # a shared file system may show others less for a while: the first decides
    start_from, finished, resume = seen[0]
    if finished >= min(recipe.steps, options.max_steps or recipe.steps):
        if ranks.first:
            print(f"{folder} is finished: nothing to do (use --resume never to start over)", flush=True)
        return True
    with owned(recipe, folder, ranks), noted(folder, options.resume, start_from, ranks):
        return _run(recipe, replace(options, resume=resume), ranks, stop, pulse, folder, start_from)


def _run(
    recipe: Recipe,
    options: Options,
    ranks: Ranks,
    stop: StopSignal,
    pulse: Heartbeat,
    folder: Path,
    start_from: Path | None,
) -> bool:
    """The run in a folder that is ours."""
    last = min(recipe.steps, options.max_steps or recipe.steps)
    started = time.perf_counter()
    gc.collect()  # engines are full of cycles, and a comparison needs the last run's memory back
    with agreed():
        if start_from is not None:
            layout.verify(start_from, ranks.rank, ranks.world)
    with agreed():
        modules = {name: module.to(ranks.device) for name, module in parts.build_models(recipe).items()}
        train, test = parts.build_loaders(recipe, ranks)
    with agreed():  # by itself: what a method adds is made equal on all ranks, which all have to reach
        prepared = parts.prepare(recipe, modules, train, ranks)
    with agreed():
        seen_data = fingerprint(recipe, train, test, prepared.teachers)
        if start_from is not None:
            check_same_data(recipe, seen_data, start_from.parents[1], options.resume)
    with agreed():
        check_same_everywhere(seen_data)
        if ranks.first:
            open_folder(recipe, options.resume, start_from, folder, seen_data)
    parameters = {name: parts.parameters(module) for name, module in modules.items()}
    if ranks.first:
        _announce(recipe, parameters, prepared, train, start_from)
    told = _left_out(ranks, train, test)  # hours of training before such news would be unkind

    with agreed():
        prepared.fill()
    torch.manual_seed(recipe.seed * 100_003 + 1 + ranks.rank)  # dropout differs between ranks, weights do not
    method = prepared.start()
    if recipe.compile:
        on_compiling(lambda: pulse.long("compiling"))
    trainer = Trainer(
        recipe,
        method,
        lambda step: _batches(recipe, train, step),
        lambda name, model: parts.evaluate(recipe, name, model, test[recipe.models[name].data], ranks),
        folder,
        ranks,
        stop,
        last=last,
    )
    trainer.pulse = pulse
    trainer.write_model = partial(parts.write_model, recipe, train)
    trainer.measured = lambda: {k: v for loader in train.values() for k, v in loader.throughput().items()}
    try:
        if start_from is not None:
            trainer.resume(start_from)
        with profiled(folder, options.profile and ranks.first) as trainer.after_step:
            done = trainer.fit()
        if not done:
            _left_out(ranks, train, test, told)
            if ranks.first:
                at = f"at step {trainer.step}, checkpoint written: the same command goes on"
                print(f"stopped by a signal {at}", flush=True)
        if done:
            trainer.export()
            measured = {
                "parameters": parameters,
                "added_parameters": prepared.parameters,
                "teachers": parts.evaluate_teachers(recipe, prepared, test, ranks),
                **method.measured(),
                "left_out": _left_out(ranks, train, test, told),
                "wall_seconds": round(time.perf_counter() - started, 1),
            }
            if ranks.first:
                write_result(recipe, folder, trainer, measured)
        dist.barrier()
    finally:
        for learner in method.learners.values():
            learner.engine.destroy()
        for teacher in prepared.teachers.values():
            teacher.stop()
        for loader in (*train.values(), *test.values()):
            loader.close()
    return done


def _batches(recipe: Recipe, loaders: Mapping[str, Loader], step: int) -> dict[str, Any]:
    """The batch of each model that still trains; models that name the same data share one."""
    training = {name: model.data for name, model in recipe.models.items() if step < recipe.budget(name)}
    drawn = {name: loaders[name].batch(step) for name in dict.fromkeys(training.values())}
    return {name: drawn[data] for name, data in training.items()}


def _announce(
    recipe: Recipe,
    parameters: Mapping[str, int],
    prepared: parts.Prepared,
    train: Mapping[str, Loader],
    at: Path | None,
) -> None:
    counts = {**parameters, **prepared.parameters}
    for name, teacher in prepared.teachers.items():
        counts[name if name == "teacher" else f"teacher {name}"] = parts.parameters(teacher.module)
    text = ", ".join(f"{name} {n / 1e6:.2f}M" for name, n in counts.items())
    resumed = f", from step {at.name}" if at else ""
    print(f"{recipe.name}: {recipe.method.arm}, seed {recipe.seed}{resumed} ({text} parameters)", flush=True)
    for name, loader in train.items():
        dropped = loader.samples % loader.global_batch if loader.global_batch < loader.samples else 0
        if dropped:
            print(f"{name}: {dropped} samples an epoch are dropped: batch {loader.global_batch}", flush=True)
        if promise := getattr(loader, "promise", ""):
            print(f"{name}: {promise}", flush=True)


def _left_out(
    ranks: Ranks, train: Mapping[str, Loader], test: Mapping[str, Loader], told: Sequence[str] = ()
) -> list[str]:
    """What the loaders of all ranks have left out since the start; the first rank says what it has not told before.
    Collective."""
    everybody: list[list[str]] = [[]] * ranks.world
    dist.all_gather_object(everybody, [n for loader in (*train.values(), *test.values()) for n in loader.notices()])
    notices = list(dict.fromkeys(notice for one in everybody for notice in one))
    for notice in notices if ranks.first else ():
        if notice not in told:
            print(notice, flush=True)
    return notices
