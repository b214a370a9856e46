"""What a recipe names, built: models, loaders, engines and the method that moves knowledge between them.

Everything that can be refused is refused on plain modules, before an engine starts: `prepare` first, then
`Prepared.start` makes the engines.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hetero_kt import data, models
from hetero_kt.checks import split_site, zero_block
from hetero_kt.compiler import as_written, check_compiler, compile_chosen, forget
from hetero_kt.config import Data, Distill, MergeNet, Model, Recipe
from hetero_kt.distributed import launch
from hetero_kt.distributed.launch import Ranks
from hetero_kt.distributed.learner import Learner, build_learner
from hetero_kt.methods import Method, distill, mergenet, objectives
from hetero_kt.methods.fbt import FBT
from hetero_kt.methods.sharing import Sharing
from hetero_kt.models.stored import Store, Stored
from hetero_kt.models.stored import fill as fill_store
from hetero_kt.models.teacher import RANDOM, Frozen, build_teacher, weights_of
from hetero_kt.nn import reencode
from hetero_kt.nn.adapter import AdapterConfig
from hetero_kt.nn.stages import Stages, expose, split
from hetero_kt.tasks import Task, classification, task_of
from hetero_kt.trainer import write_safetensors


@dataclass(frozen=True)
class Prepared:
    """A method whose models are built and checked, and whose engines are not yet started."""

    parameters: dict[str, int]
    """Of what the method adds to the models: adapters, connectors, branches."""
    teachers: dict[str, Frozen]
    start: Callable[[], Method]
    """Makes the engines. Collective."""
    fill: Callable[[], None] = lambda: None
    """Computes what has to be on disk before. Collective; raises ValueError on all ranks."""


def prepare(recipe: Recipe, modules: Mapping[str, nn.Module], train: Mapping[str, Any], ranks: Ranks) -> Prepared:
    """The recipe's method between `modules`, which lie on their device. Collective.

    Raises:
        ValueError: one sentence about what does not fit.
    """
    if recipe.compile:
        check_compiler(ranks.device)
        forget()
    if isinstance(recipe.method, MergeNet):
        return _prepare_mergenet(recipe, recipe.method, modules, ranks)
    return _prepare_distill(recipe, recipe.method, modules, train, ranks)


def build_models(recipe: Recipe) -> dict[str, nn.Module]:
    """Every trained model, from a random stream of its own (so that no control changes another model's start), with
    the layers that exchange a factor re-parametrised."""
    modules = {}
    for name, model in recipe.models.items():
        seed_by_name(recipe, name)
        modules[name] = build_model(
            model,
            recipe.data[model.data],
            recipe.data_dir,
            recipe.output_dir,
            zero_block(model.zero) if _in_pieces(recipe, name) else None,
            f"--models.{name}",
        )
        _check_precision(f"--models.{name}.precision", model.precision, modules[name])
    if isinstance(recipe.method, MergeNet):
        for label, transfer in recipe.method.transfers.items():
            if transfer.mode == "factor":
                for side, (site, rank) in zip(("source", "target"), transfer.sites(), strict=True):
                    _factorise(modules, site, rank, f"{label}.{side}")
    return modules


def _in_pieces(recipe: Recipe, name: str) -> bool:
    """Whether a model is never whole on a rank: texts' models under ZeRO-3, unless a layer has to be factorised."""
    model = recipe.models[name]
    transfers = recipe.method.transfers.values() if isinstance(recipe.method, MergeNet) else ()
    factored = {split_site(site)[0] for t in transfers if t.mode == "factor" for site in (t.source, t.target)}
    wanted = recipe.data[model.data].name in data.TEXTS and model.precision != "bf16" and name not in factored
    return wanted and zero_block(model.zero)["stage"] == 3


def build_model(
    model: Model,
    config: Data,
    data_dir: str,
    output_dir: str = "runs",
    zero: dict[str, Any] | None = None,
    option: str = "--models.NAME",
) -> nn.Module:
    """A recipe's model for its data, with its first weights; with a ZeRO-3 block, a BERT is built in pieces."""
    if config.name in data.PAIRS:
        return _build_xvlm(model, config, data_dir, output_dir, option)
    if config.name in data.TEXTS:
        from hetero_kt.models import bert

        tokens = data.tokenizer(config, data_dir)
        init = str(weights_of(model.init, f"{option}.init", output_dir)) if model.init else ""
        module, start = bert.build(model.name, bert.TASKS[config.name], vocabulary=tokens, init=init, zero=zero)
        if launch.place()[0] == 0 and (init or model.name.startswith("hf:")):
            print(f"{model.name}: {start}", flush=True)
        return module
    classes = data.classes(config, data_dir)
    return models.build(model.name, classes, pretrained=model.pretrained, image_size=config.image_size, init=model.init)


def _build_xvlm(model: Model, config: Data, data_dir: str, output_dir: str, option: str) -> nn.Module:
    from hetero_kt.models import xvlm

    def start(field: str, given: str) -> str:
        outside = given.startswith(("hf:", "timm:")) or not given
        return given if outside else str(weights_of(given, f"{option}.{field}", output_dir))

    module, begun = xvlm.build(
        model.name,
        xvlm.TASKS[config.name],
        vocabulary=data.tokenizer(config, data_dir),
        image_size=config.image_size,
        init=start("init", model.init),
        vision=start("xvlm.vision", model.xvlm.vision),
        text=start("xvlm.text", model.xvlm.text),
        dropout=model.xvlm.dropout,
        gathered=model.xvlm.negatives == "gathered",
    )
    module.checkpointing = model.checkpointing
    if launch.place()[0] == 0 and (model.init or model.xvlm.vision or model.xvlm.text):
        print(f"{model.name}: {begun}", flush=True)
    return module


def write_model(
    recipe: Recipe,
    loaders: Mapping[str, Any],
    name: str,
    module: nn.Module,
    state: dict[str, Tensor],
    path: Path,
) -> None:
    """The trained model called `name`, as whoever uses it reads it: `<path>.safetensors` for timm's `load_state_dict`,
    a folder `<path>/` for transformers' `from_pretrained` or, of an X-VLM, for `hetero-kt ask`."""
    config = recipe.data[recipe.models[name].data]
    if config.name in data.PAIRS:
        from hetero_kt import ask

        loader, tokens = loaders[recipe.models[name].data], data.tokenizer(config, recipe.data_dir)
        ask.save(recipe.models[name].name, config, loader, tokens, state, path)
        return
    if config.name not in data.TEXTS:
        write_safetensors(name, module, state, path)
        return
    from hetero_kt.models import bert

    bert.save(module, state, path, data.tokenizer(config, recipe.data_dir))


def task(recipe: Recipe, model: str) -> Task:
    """What the model called `model` is trained for."""
    return task_of(recipe.data[recipe.models[model].data].name)


def evaluate(recipe: Recipe, name: str, model: nn.Module, loader: Any, ranks: Ranks) -> dict[str, float]:
    """The metrics of the model called `name` over `loader`. Collective."""
    config = recipe.data[recipe.models[name].data]
    chosen = {"k": config.candidates} if config.candidates else {}
    with as_written():
        return task(recipe, name).evaluate(model, loader, ranks.device, **chosen)


def seed_by_name(recipe: Recipe, name: str) -> None:
    """The random stream that the part called `name` is initialised from."""
    launch.seed_everything(recipe.seed * 100_003 + zlib.crc32(name.encode()) % 100_003)


def build_loaders(recipe: Recipe, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Any]]:
    """Training and evaluation loaders, by the name of the data."""

    def opened(train: bool) -> dict[str, Any]:
        loaders = {}
        for name, config in recipe.data.items():
            try:
                loaders[name] = data.open_loader(
                    config,
                    recipe.data_dir,
                    train=train,
                    seed=recipe.seed,
                    rank=ranks.rank,
                    world=ranks.world,
                    device=ranks.device,
                )
            except ValueError as error:
                raise ValueError(str(error).replace("--data.NAME", f"--data.{name}")) from error
        return loaders

    return opened(train=True), opened(train=False)


def evaluate_teachers(
    recipe: Recipe, prepared: Prepared, test: Mapping[str, Any], ranks: Ranks
) -> dict[str, dict[str, float]]:
    """Each teacher's own metrics on the student's evaluation data. Collective."""
    (model, *_) = recipe.models.values()
    loader = test[model.data]
    teachers = prepared.teachers.items()
    with as_written():
        return {name: classification.evaluate(teacher.logits, loader, ranks.device) for name, teacher in teachers}


def parameters(module: nn.Module | None) -> int:
    """Number of a module's parameters, also of one in pieces."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters()) if module is not None else 0


def _check_precision(option: str, precision: str, module: nn.Module, whose: str = "this model") -> None:
    """BatchNorm's running statistics are sums of many small steps, which parameters stored in bf16 would round away."""
    if precision == "bf16" and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        raise ValueError(f"{option} bf16 does not suit the BatchNorm in {whose}: use autocast.")


def _learner(recipe: Recipe, name: str, module: nn.Module, ranks: Ranks, *, kept: bool = True) -> Learner:
    """`module`, trained as the recipe's model `name` is; what is dropped afterwards needs no average."""
    model = recipe.models[name] if kept else replace(recipe.models[name], ema=0.0)
    rows = recipe.data[model.data].batch // ranks.world
    return build_learner(module, model, zero_block(model.zero), rows=rows, steps=recipe.budget(name))


# --- MergeNet ---


def _prepare_mergenet(recipe: Recipe, method: MergeNet, modules: Mapping[str, nn.Module], ranks: Ranks) -> Prepared:
    """Every transfer is tried alone, so that a complaint has its option, and then all of them together."""
    transfers = _transfers(recipe, method, modules)
    for name, transfer in transfers.items():
        try:
            _exchange(recipe, [transfer])
        except ValueError as error:
            raise ValueError(f"--method.transfers.{name}: {error}") from error
    try:
        adapters = _exchange(recipe, list(transfers.values())).adapters()
    except ValueError as error:
        raise ValueError(f"--method.transfers: {error}") from error

    def start() -> Method:
        learners = {name: _learner(recipe, name, module, ranks) for name, module in modules.items()}
        engines = {name: learner.engine for name, learner in learners.items()}
        losses = {
            name: partial(task(recipe, name).loss, label_smoothing=model.label_smoothing)
            for name, model in recipe.models.items()
        }
        exchange = _exchange(recipe, list(_transfers(recipe, method, engines).values()))
        compile_chosen(modules, recipe.compile)
        if isinstance(exchange, mergenet.Exchange):
            compile_chosen(exchange.adapters(), recipe.compile)
        return mergenet.MergeNet(learners, exchange, losses, {name: recipe.budget(name) for name in learners})

    return Prepared({f"adapter {name}": parameters(adapter) for name, adapter in adapters.items()}, {}, start)


def _factorise(modules: Mapping[str, nn.Module], site: str, rank: int, option: str) -> None:
    model, weight = split_site(site)
    try:
        if reencode.factor_parameter(modules[model], weight) is None:  # two transfers may share a site
            reencode.factorise(modules[model], weight, rank)
    except ValueError as error:
        raise ValueError(f"--method.transfers.{option} {site}: {error}") from error


def _exchange(recipe: Recipe, transfers: Sequence[mergenet.Transfer]) -> mergenet.Exchange | Sharing:
    assert isinstance(recipe.method, MergeNet)
    if recipe.method.control == "sharing":
        return Sharing(transfers)
    return mergenet.Exchange(transfers, control=recipe.method.control, seed=recipe.seed, steps=recipe.steps)


def _transfers(recipe: Recipe, method: MergeNet, owners: Mapping[str, Any]) -> dict[str, mergenet.Transfer]:
    """The recipe's transfers between `owners`, which are engines or plain modules."""
    transfers = {}
    for name, t in method.transfers.items():
        mode: Literal["svd", "full"] = "svd" if t.mode == "svd" else "full"
        source, target = (
            mergenet.Site(owners[model], weight, mode, rank)
            for (model, weight), rank in ((split_site(site), rank) for site, rank in t.sites())
        )
        transfers[name] = mergenet.Transfer(
            source,
            target,
            cycle=t.cycle,
            reads=t.reads,
            adapter=_with_gate(t.adapter, recipe.models[split_site(t.target)[0]], split_site(t.target)[1]),
            optim=t.optim,
            schedule=t.schedule,
            update=t.update,
            moments=t.moments,
            name=name,
            until=min(recipe.budget(split_site(site)[0]) for site in (t.source, t.target)),
        )
    return transfers


def _with_gate(adapter: AdapterConfig, target: Model, weight: str) -> AdapterConfig:
    """A pretrained target starts from a closed gate, so that the first proposals do not destroy it."""
    part = target.xvlm.vision if weight.startswith("vision_encoder.") else target.xvlm.text
    trained = target.pretrained or target.init or target.name.startswith("hf:") or part
    return replace(adapter, gate=0.0) if adapter.gate == "auto" and trained else adapter


# --- distillation ---


def _prepare_distill(
    recipe: Recipe, method: Distill, modules: Mapping[str, nn.Module], train: Mapping[str, Any], ranks: Ranks
) -> Prepared:
    ((name, module),) = modules.items()
    model = recipe.models[name]
    pictures = recipe.data[model.data]
    try:
        stages = expose(module, pictures.image_size)
    except ValueError as error:
        raise ValueError(f"--models.{name}.name {model.name}: {error}.") from error
    stages.checkpointing = model.checkpointing
    teachers = {}
    loader = train[model.data]
    if method.taught:
        for teacher, config in method.teachers.items():
            teachers[teacher] = build_teacher(
                config,
                f"--method.teachers.{teacher}",
                classes=loader.classes,
                image_size=pictures.image_size,
                mean=loader.mean,
                std=loader.std,
                output_dir=recipe.output_dir,
                zero=zero_block(config.zero) if config.zero else None,
                device=ranks.device,
                autocast=model.precision != "fp32",
            )
    stored = {
        key: Stored(teacher, _store(recipe, key, teacher, loader), loader)
        for key, teacher in teachers.items()
        if method.teachers[key].logits == "stored"
    }
    for one in stored.values():
        one.store.check(ranks.rank, ranks.world)
    seed_by_name(recipe, method.objective)
    objective = build_objective(
        method,
        stages,
        teachers | stored,
        loader.classes,
        steps=recipe.budget(name),
        seed=recipe.seed,
        drawn=objectives.Drawn(loader.order, loader.labels, recipe.seed),
        device=ranks.device,
    )
    aside = objective.aside.to(ranks.device) if objective.aside is not None else None
    if aside is not None:
        _check_precision(f"--models.{name}.precision", model.precision, aside, f"{method.objective}'s {objective.name}")

    def fill() -> None:
        rows = model.micro_batch or pictures.batch // ranks.world
        dtype = next(module.parameters()).dtype if model.precision != "bf16" else torch.bfloat16
        for key, one in stored.items():
            one.live.start()
            started = time.perf_counter()
            shards = fill_store(one.store, one.live, loader, ranks, rows, dtype)
            if ranks.first and shards:
                took = time.perf_counter() - started
                print(f"{key}: {shards} shards of logits computed in {took:.0f} s", flush=True)

    def start() -> Method:
        learners = {name: _learner(recipe, name, module, ranks)}
        if aside is not None:
            learners[objective.name] = _learner(recipe, name, aside, ranks, kept=False)
        for teacher in teachers.values():
            teacher.start()
        compile_chosen({**modules, **{name: teacher.module for name, teacher in teachers.items()}}, recipe.compile)
        return distill.Distillation(
            learners,
            objective,
            label_smoothing=model.label_smoothing,
            label_weight=method.label_weight,
            stored=list(stored.values()),
        )

    added = {objective.name: parameters(aside)} if aside is not None else {}
    return Prepared(added, teachers, start, fill)


def _store(recipe: Recipe, name: str, teacher: Frozen, loader: Any) -> Store:
    """Where the logits of the teacher `name` are kept, and what they depend on."""
    assert isinstance(recipe.method, Distill)
    ((_, model),) = recipe.models.items()
    pictures, config = recipe.data[model.data], recipe.method.teachers[name]
    transform: Any = list(pictures.augment) if pictures.pipeline == "fast" else dataclasses.asdict(pictures.transform)
    about = {
        "teacher": config.name,
        "weights": teacher.checksum,
        "teacher sees": [teacher.image_size, teacher.scale.flatten().tolist(), teacher.shift.flatten().tolist()],
        "data": pictures.name,
        "set": loader.fingerprint(),
        "pictures": [pictures.pipeline, pictures.image_size, list(loader.mean), list(loader.std), transform],
        "seed": recipe.seed if transform else 0,
        "precision": model.precision,
    }
    root = Path(recipe.output_dir) / "teacher_logits"
    return Store(root, about, loader.samples, pictures.augmentations or 1, loader.classes)


def check_pairs(recipe: Recipe, made_before: set[str]) -> None:
    """Refuse, before anything trains, models without stages, pairs that an objective does not suit, and teachers whose
    weights will not be there.

    Args:
        made_before: recipes that will have run by then.

    Raises:
        ValueError: one sentence about the model or its weights.
    """
    method = recipe.method
    if not isinstance(method, Distill) or method.objective == "none":
        return
    ((name, model),) = recipe.models.items()
    pictures = recipe.data[model.data]
    staged = [_split(f"--models.{name}.name", model.name, pictures, recipe.data_dir, pictures.image_size)]
    for teacher, config in method.teachers.items() if method.taught else ():
        option = f"--method.teachers.{teacher}"
        size = config.image_size or pictures.image_size
        staged.append(_split(f"{option}.name", config.name, pictures, recipe.data_dir, size))
        if config.init not in ("", RANDOM) and config.init.removeprefix("run:") not in made_before:
            weights_of(config.init, f"{option}.init", recipe.output_dir)
    if method.objective == "fcfd":
        objectives.check_cnns(method.fcfd, *staged)


def _split(option: str, name: str, pictures: Data, data_dir: str, size: int) -> Stages:
    try:
        return split(models.build(name, data.classes(pictures, data_dir), image_size=size), size)
    except ValueError as error:
        raise ValueError(f"{option} {name}: {str(error).rstrip('.')}.") from error


class _Around(NamedTuple):
    """What an objective is built between."""

    student: Stages
    teachers: objectives.Teachers
    classes: int
    steps: int
    seed: int
    drawn: objectives.Drawn | None
    device: torch.device | str


OBJECTIVES: dict[str, Callable[[Distill, _Around], objectives.Objective]] = {
    "none": lambda method, around: objectives.Alone(),
    "kd": lambda method, around: objectives.KD(method.kd, around.teachers),
    "rkd": lambda method, around: objectives.RKD(method.rkd, around.teachers),
    "dkd": lambda method, around: objectives.DKD(method.dkd, around.teachers, around.steps),
    "nkd": lambda method, around: objectives.NKD(method.nkd, around.teachers),
    "tfkd": lambda method, around: objectives.TfKD(method.tfkd, around.teachers),
    "uskd": lambda method, around: objectives.USKD(method.uskd, around.student, around.classes),
    "crd": lambda method, around: objectives.CRD(
        method.crd, around.student, around.teachers, around.drawn, around.device
    ),
    "ofa": lambda method, around: objectives.OFA(method.ofa, around.student, around.teachers, around.classes),
    "fitnet": lambda method, around: objectives.FitNet(method.fitnet, around.student, around.teachers),
    "fcfd": lambda method, around: objectives.FCFD(
        method.fcfd, around.student, around.teachers, around.steps, around.seed
    ),
    "fbt": lambda method, around: FBT(method.fbt, around.student, around.teachers, method.kd.temperature),
}
"""Of the recipe's `objective`: its settings, and what it stands between -> itself."""


def build_objective(
    method: Distill,
    student: Stages,
    teachers: objectives.Teachers,
    classes: int,
    *,
    steps: int = 0,
    seed: int = 0,
    drawn: objectives.Drawn | None = None,
    device: torch.device | str = "cpu",
) -> objectives.Objective:
    """The recipe's objective; without `steps` and `drawn`, one to look at only."""
    return OBJECTIVES[method.objective](method, _Around(student, teachers, classes, steps, seed, drawn, device))
