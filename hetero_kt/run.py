"""Recipe -> models -> engines -> method -> trainer. Start reading here.

main(VARIANTS)         what a launcher calls: parse the command line, then one run, or a comparison of runs
run(recipe, ...)       one run in its folder <output_dir>/<name>/<control>/seed<k>
"""

from __future__ import annotations

import gc
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from hetero_kt import data, models, plan, report
from hetero_kt.checks import check, split_site, zero_block
from hetero_kt.config import Model, Recipe
from hetero_kt.distributed import launch
from hetero_kt.distributed.engine import build_engine, build_schedule
from hetero_kt.distributed.launch import Ranks, StopSignal
from hetero_kt.evaluate import evaluate
from hetero_kt.folder import check_same_data, fingerprint, look, open_folder, run_folder, write_result
from hetero_kt.methods import Diverged, mergenet
from hetero_kt.nn import reencode
from hetero_kt.nn.adapter import AdapterConfig
from hetero_kt.options import Options, leave, parse, runs
from hetero_kt.tasks import classification
from hetero_kt.trainer import Trainer


def main(variants: Mapping[str, Callable[[], Recipe]]) -> None:
    """A launcher's one call. Wrong input ends it with one sentence, on the first rank, before any engine starts."""
    recipe, options = parse(variants)
    try:
        if options.plan:
            rank, world = launch.place()
            if rank == 0:
                plan.show(recipe, world)
            return
        if options.deterministic:
            launch.make_deterministic()
        ranks, stop = launch.start(), StopSignal()
        torch.autograd.set_detect_anomaly(options.debug)
    except ValueError as error:
        leave(error, alone=True)
    try:
        finished = all(run(one, options, ranks, stop) for one in runs(recipe, options))
    except (UserError, Diverged) as error:
        # All ranks are here. After an error of one rank only, leaving the group would wait for the others.
        dist.destroy_process_group()
        leave(error, status=1 if isinstance(error, Diverged) else 2)
    dist.destroy_process_group()
    if finished and ranks.first:
        report.finish(Path(recipe.output_dir) / recipe.name)


class UserError(ValueError):
    """Wrong input, said in one sentence."""


def run(recipe: Recipe, options: Options, ranks: Ranks, stop: StopSignal) -> bool:
    """One run, from its newest checkpoint on if there is one; False when a signal stopped it. Collective.

    Raises:
        UserError: the recipe, its data or the run folder does not fit; raised on all ranks before any engine starts.
        Diverged: proposals were not finite five times in a row; a checkpoint has been written.
    """
    folder = run_folder(recipe)
    last = min(recipe.steps, options.max_steps or recipe.steps)
    started = time.perf_counter()
    gc.collect()  # engines are full of cycles, and a comparison needs the last run's memory back
    with _agreed(ranks):
        check(recipe, ranks.world)
        seen: list[Any] = [look(recipe, options, folder, ranks.world) if ranks.first else None]
    dist.broadcast_object_list(seen)  # a shared file system may show others less for a while: the first decides
    start_from, finished = seen[0]
    if finished >= last:
        if ranks.first:
            print(f"{folder} is finished: nothing to do (use --resume never to start over)", flush=True)
        return True
    with _agreed(ranks):
        modules = {name: module.to(ranks.device) for name, module in build_models(recipe).items()}
        train, test = _loaders(recipe, ranks)
        seen_data = fingerprint(recipe, train, test)
        if start_from is not None:
            check_same_data(recipe, seen_data, start_from.parents[1], options.resume)
    with _agreed(ranks):  # by itself: an exchange makes its adapters equal on all ranks, which all have to reach
        adapters = _check_transfers(recipe, modules)
    with _agreed(ranks):
        if ranks.first:
            open_folder(recipe, options, folder, seen_data)
    parameters = {name: _parameters(module) for name, module in modules.items()}
    if ranks.first:
        _announce(recipe, parameters, adapters, train, start_from)

    torch.manual_seed(recipe.seed * 100_003 + 1 + ranks.rank)  # dropout differs between ranks, weights do not
    method = _method(recipe, modules, ranks)
    trainer = Trainer(
        recipe,
        method,
        lambda step: _batches(recipe, train, step),
        lambda name: evaluate(method.engines[name], test[recipe.models[name].data], ranks.device),
        folder,
        ranks,
        stop,
        last=last,
    )
    try:
        if start_from is not None:
            trainer.resume(start_from)
        with _profiled(folder, options.profile and ranks.first) as trainer.after_step:
            done = trainer.fit()
        if not done and ranks.first:
            print(
                f"stopped by a signal at step {trainer.step}, checkpoint written: the same command goes on", flush=True
            )
        if done:
            trainer.export()
            if ranks.first:
                measured = {
                    "parameters": parameters,
                    "adapter_parameters": adapters,
                    "bytes_gathered": method.exchange.traffic.bytes,
                    "wall_seconds": round(time.perf_counter() - started, 1),
                }
                write_result(recipe, folder, trainer, measured)
        dist.barrier()
    finally:
        for engine in method.engines.values():
            engine.destroy()
    return done


@contextmanager
def _agreed(ranks: Ranks) -> Iterator[None]:
    """What goes wrong on any rank inside is raised on every rank, so that none waits for one that has left."""
    problem = ""
    try:
        yield
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or 'a file'} cannot be used ({error.strerror or error}): mend that and start again."
    except Exception as error:  # nobody's input: the sentence ends all ranks, the traceback says where to look
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
    problems: list[str] = [""] * ranks.world
    dist.all_gather_object(problems, problem)
    found = next((rank for rank, text in enumerate(problems) if text), None)
    if found is not None:
        raise UserError(f"rank {found}: {problems[found]}" if found else problems[0])


def build_models(recipe: Recipe) -> dict[str, nn.Module]:
    """Every model, from a random stream of its own (so that no control changes another model's start), with the
    layers that exchange a factor re-parametrised."""
    modules = {}
    for name, model in recipe.models.items():
        launch.seed_everything(recipe.seed * 100_003 + zlib.crc32(name.encode()) % 100_003)
        modules[name] = models.build(
            model.name,
            data.classes(recipe.data[model.data]),
            pretrained=model.pretrained,
            image_size=recipe.data[model.data].image_size,
            init=model.init,
        )
        _check_precision(f"--models.{name}.precision", model.precision, modules[name])
    for label, transfer in recipe.method.transfers.items():
        if transfer.mode == "factor":
            for side, (site, rank) in zip(("source", "target"), transfer.sites(), strict=True):
                _factorise(modules, site, rank, f"{label}.{side}")
    return modules


def _check_precision(option: str, precision: str, module: nn.Module) -> None:
    """BatchNorm's running statistics are sums of many small steps, which parameters stored in bf16 would round away."""
    if precision == "bf16" and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        raise ValueError(f"{option} bf16 does not suit the BatchNorm in this model: use autocast.")


def _factorise(modules: Mapping[str, nn.Module], site: str, rank: int, option: str) -> None:
    model, weight = split_site(site)
    try:
        if reencode.factor_parameter(modules[model], weight) is None:  # two transfers may share a site
            reencode.factorise(modules[model], weight, rank)
    except ValueError as error:
        raise ValueError(f"--method.transfers.{option} {site}: {error}") from error


def _check_transfers(recipe: Recipe, modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Parameters of each transfer's adapter. On the plain modules, before an engine starts, every transfer is tried
    alone, so that a complaint has its option, and then all of them together."""
    transfers = _transfers(recipe, modules)
    for name, transfer in transfers.items():
        try:
            _exchange(recipe, [transfer])
        except ValueError as error:
            raise ValueError(f"--method.transfers.{name}: {error}") from error
    try:
        adapters = _exchange(recipe, list(transfers.values())).adapters()
    except ValueError as error:
        raise ValueError(f"--method.transfers: {error}") from error
    return {name: _parameters(adapter) for name, adapter in adapters.items()}


def _exchange(recipe: Recipe, transfers: Sequence[mergenet.Transfer]) -> mergenet.Exchange:
    return mergenet.Exchange(transfers, control=recipe.method.control, seed=recipe.seed, steps=recipe.steps)


def _transfers(recipe: Recipe, owners: Mapping[str, Any]) -> dict[str, mergenet.Transfer]:
    """The recipe's transfers between `owners`, which are engines or plain modules."""
    transfers = {}
    for name, t in recipe.method.transfers.items():
        mode: Literal["svd", "full"] = "svd" if t.mode == "svd" else "full"
        source, target = (
            mergenet.Site(owners[model], weight, mode, rank)
            for (model, weight), rank in ((split_site(site), rank) for site, rank in t.sites())
        )
        transfers[name] = mergenet.Transfer(
            source,
            target,
            cycle=t.cycle,
            adapter=_with_gate(t.adapter, recipe.models[split_site(t.target)[0]]),
            optim=t.optim,
            schedule=t.schedule,
            update=t.update,
            moments=t.moments,
            name=name,
        )
    return transfers


def _with_gate(adapter: AdapterConfig, target: Model) -> AdapterConfig:
    """A pretrained target starts from a closed gate, so that the first proposals do not destroy it."""
    return replace(adapter, gate=0.0) if adapter.gate == "auto" and (target.pretrained or target.init) else adapter


def _method(recipe: Recipe, modules: Mapping[str, nn.Module], ranks: Ranks) -> mergenet.MergeNet:
    engines, schedules = {}, {}
    for name, model in recipe.models.items():
        rows = recipe.data[model.data].batch // ranks.world
        micro = model.micro_batch or rows
        engines[name] = build_engine(
            modules[name],
            optim=model.optim,
            zero=zero_block(model.zero),
            precision=model.precision,
            micro_batch=micro,
            accumulation=rows // micro,
        )
        schedules[name] = build_schedule(engines[name].optimizer, model.schedule, recipe.steps)
    exchange = _exchange(recipe, list(_transfers(recipe, engines).values()))
    return mergenet.MergeNet(engines, exchange, classification.loss, schedules)


def _loaders(recipe: Recipe, ranks: Ranks) -> tuple[dict[str, data.Loader], dict[str, data.Loader]]:
    """Training and evaluation loaders, by the name of the data."""
    train: dict[str, data.Loader] = {}
    test: dict[str, data.Loader] = {}
    for name, d in recipe.data.items():
        place = (ranks.rank, ranks.world, ranks.device)
        images = data.load(d, recipe.data_dir, train=True)
        train[name] = data.Loader(images, d.batch, recipe.seed, d.augment, *place)
        test[name] = data.Loader(data.load(d, recipe.data_dir, train=False), d.batch, recipe.seed, (), *place)
    return train, test


def _batches(recipe: Recipe, loaders: Mapping[str, data.Loader], step: int) -> dict[str, Any]:
    """Each model's batch; models that name the same data share one."""
    drawn = {name: loader.batch(step) for name, loader in loaders.items()}
    return {name: drawn[model.data] for name, model in recipe.models.items()}


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _announce(
    recipe: Recipe,
    parameters: Mapping[str, int],
    adapters: Mapping[str, int],
    train: Mapping[str, data.Loader],
    at: Path | None,
) -> None:
    text = ", ".join(f"{name} {n / 1e6:.2f}M" for name, n in parameters.items())
    text += "".join(f", adapter {name} {n / 1e6:.2f}M" for name, n in adapters.items())
    resumed = f", from step {at.name}" if at else ""
    print(f"{recipe.name}: {recipe.method.control}, seed {recipe.seed}{resumed} ({text} parameters)", flush=True)
    for name, loader in train.items():
        dropped = len(loader.images) % loader.global_batch if loader.global_batch < len(loader.images) else 0
        if dropped:
            print(f"{name}: {dropped} samples an epoch are dropped: batch {loader.global_batch}", flush=True)


@contextmanager
def _profiled(folder: Path, wanted: bool) -> Iterator[Callable[[], None]]:
    """With --profile, a trace of the third to sixth step for TensorBoard or a browser's trace viewer.

    Gives what has to be called after each step.
    """
    if not wanted:
        yield lambda: None
        return

    def write(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(folder / "profile.json"))
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))

    steps = torch.profiler.schedule(wait=1, warmup=1, active=4, repeat=1)
    with torch.profiler.profile(schedule=steps, on_trace_ready=write) as profile:
        yield profile.step
