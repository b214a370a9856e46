"""The command line of every launcher: a recipe, its variants and the options of one run.

`parse` reads them strictly, so that a typo never trains the wrong thing for a day, and `check` refuses what
can be refused before a model is built. A recipe goes to YAML and back without loss (`to_yaml`, `from_yaml`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
import yaml

from hetero_kt.config import Control, Data, Model, Recipe, Transfer
from hetero_kt.distributed.launch import place
from hetero_kt.models import build, known
from hetero_kt.nn.reencode import list_weights

Variants = Mapping[str, Callable[[], Recipe]]

CONTROLS: tuple[str, ...] = typing.get_args(Control)
SHIPPED_ZERO = "ds_configs/zero0.json to zero3.json"
PATIENCE = 10.0
"""Seconds that other ranks stay behind the first when a start ends in error."""
DEBUG_STEPS = 4
DEBUG_BATCH = 8
DEBUG_RANK = 4
BOOKKEEPING = frozenset({"data_dir", "output_dir", "log_every", "eval_every", "save_every", "keep"})
"""Recipe fields that change where a run is kept and how often it is looked at, but none of its numbers."""


@dataclass(frozen=True)
class Options:
    """What one start of a launcher does with its recipe."""

    max_steps: int = 0
    """Stop after this many steps, with a checkpoint; schedules stay the whole run's. 0 runs to the end."""
    debug: bool = False
    """Shrink everything: tiny models, generated data, four steps, anomaly checks on."""
    print: bool = False
    """Print the resolved recipe and stop."""
    plan: bool = False
    """Print memory per rank, bytes per step and parameters, and stop."""
    deterministic: bool = False
    """Only algorithms that give the same bits again; slower on a GPU, and an operation that has none ends the run."""
    profile: bool = False
    """Write a profile of a few steps into the run folder."""
    variant: str = "default"
    """Which of the launcher's recipes to start from."""
    control: Control = "transfer"
    """Run a control instead of the transfer."""
    resume: str = "auto"
    """`auto` goes on from the run folder's last checkpoint, `never` starts anew, PATH goes on from it."""
    zero_config: str = ""
    """File with DeepSpeed's `zero_optimization` block, for every trained model."""
    compare: tuple[Control, ...] = ()
    """Run these controls too, in the same process group, and print the comparison."""
    seeds: tuple[int, ...] = ()
    """Run every one of these seeds; empty runs the recipe's own."""


@dataclass(frozen=True)
class _CommandLine:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    options: Annotated[Options, tyro.conf.arg(name="")]


def parse(variants: Variants | Callable[[], Recipe], argv: Sequence[str] | None = None) -> tuple[Recipe, Options]:
    """Read the command line; print and leave where it asks for that or is wrong.

    Args:
        variants: the launcher's recipe functions by name, the default first; one function stands alone.
        argv: arguments without the program's name; None takes this process's own.

    Raises:
        SystemExit: 0 after `--help` and `--print`, 2 after bad input; only the first rank prints.
    """
    try:
        recipe, options = resolve(variants, argv)
    except ValueError as error:
        leave(error)
    except SystemExit as end:  # tyro's, after its help or its complaint
        if end.code and not is_first_rank():
            _let_the_first_speak()
        raise
    if options.print:
        if is_first_rank():
            print(to_yaml(recipe), end="", flush=True)
        raise SystemExit(0)
    return recipe, options


def leave(error: Exception, status: int = 2, alone: bool = False) -> NoReturn:
    """End the process over a user's mistake: one sentence from the first rank, no traceback.

    With `alone`, from this one: the others may not have met the mistake.
    """
    if alone or is_first_rank():
        rank, _ = place()
        print(f"error: rank {rank}: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
    else:
        _let_the_first_speak()
    raise SystemExit(status)


def _let_the_first_speak() -> None:
    """Starters end all ranks once one has left in error: the others wait, or the first might never get to say why."""
    time.sleep(PATIENCE)


def is_first_rank() -> bool:
    """True on the one process that may print, known before any process group exists."""
    return place()[0] == 0


def resolve(variants: Variants | Callable[[], Recipe], argv: Sequence[str] | None = None) -> tuple[Recipe, Options]:
    """As `parse`, but bad values raise ValueError, and nothing is printed but tyro's own help and complaints.

    Precedence, from weak to strong: the variant's recipe, single fields (`--models.NAME.optim.lr`), then
    `--control` and `--zero-config`, then `--debug`, which only ever makes things smaller.
    """
    if not isinstance(variants, Mapping):
        variants = {"default": variants}
    arguments = without_local_rank(sys.argv[1:] if argv is None else argv)
    variant = _value_of("--variant", arguments) or next(iter(variants))
    if variant not in variants:
        raise ValueError(f"--variant {variant} is unknown: use {_nearest(variant, variants)}.")
    base = variants[variant]()
    _check_keys(base, arguments)
    parsed = tyro.cli(
        _CommandLine,
        args=arguments,
        default=_CommandLine(base, Options(variant=variant, control=base.method.control)),
        description=f"{base.name}; variants: {', '.join(variants)}.",
        console_outputs=is_first_rank(),
    )
    recipe, options = parsed.recipe, parsed.options
    if options.control == base.method.control:
        options = replace(options, control=recipe.method.control)
    elif recipe.method.control not in (base.method.control, options.control):
        raise ValueError(
            f"--control {options.control} and --method.control {recipe.method.control} disagree: give --control only."
        )
    recipe = replace(recipe, method=replace(recipe.method, control=options.control))
    if options.zero_config:
        zero_block(options.zero_config)
        everywhere = {name: replace(model, zero=options.zero_config) for name, model in recipe.models.items()}
        recipe = replace(recipe, models=everywhere)
    _, world = place()
    check_options(options)
    if options.debug:
        recipe = shrink(recipe, world)
        # Four steps are not worth resuming: a second try would find the first one finished and do nothing.
        options = replace(options, resume="never") if options.resume == "auto" else options
    recipe = replace(recipe, data_dir=recipe.data_dir or os.environ.get("HETERO_KT_DATA", "") or "data")
    check(recipe, world)
    return recipe, options


def runs(recipe: Recipe, options: Options) -> list[Recipe]:
    """The recipes that one start works through: its own control and those of `--compare`, for each seed."""
    controls = dict.fromkeys((recipe.method.control, *options.compare))
    return [
        replace(recipe, seed=seed, method=replace(recipe.method, control=control))
        for seed in options.seeds or (recipe.seed,)
        for control in controls
    ]


# --- checks: everything that can be said before a model is built ---


def check_options(options: Options) -> None:
    """Refuse options that cannot be meant.

    Raises:
        ValueError: one sentence with the option and the mend.
    """
    if options.max_steps < 0:
        raise ValueError(
            f"--max-steps {options.max_steps} is negative: give a number of steps, or 0 for the whole run."
        )
    repeated = [seed for seed in options.seeds if options.seeds.count(seed) > 1]
    if repeated:
        raise ValueError(f"--seeds names {repeated[0]} twice: give every seed once.")
    if options.resume not in ("auto", "never"):
        if not Path(options.resume).is_dir():
            raise ValueError(f"--resume {options.resume} is no folder: use auto, never or the path of a checkpoint.")
        if options.compare or len(options.seeds) > 1:
            raise ValueError("--resume PATH continues one run: leave out --compare and --seeds, or use --resume auto.")


def check(recipe: Recipe, world: int = 1) -> None:
    """Refuse a recipe that cannot run on `world` ranks, as far as that shows before a model is built.

    Raises:
        ValueError: one sentence with the option and the mend.
    """
    for option, number, least in (
        ("--steps", recipe.steps, 1),
        ("--seed", recipe.seed, 0),
        ("--eval-every", recipe.eval_every, 0),
        ("--save-every", recipe.save_every, 0),
        ("--log-every", recipe.log_every, 1),
        ("--keep", recipe.keep, 1),
    ):
        _at_least(option, number, least)
    if not recipe.models:
        raise ValueError(f"--models is empty: recipe {recipe.name} needs at least one model.")
    if recipe.method.control not in CONTROLS:
        raise ValueError(
            f"--control {recipe.method.control} is unknown: use {_nearest(recipe.method.control, CONTROLS)}."
        )
    for name, data in recipe.data.items():
        _check_data(name, data, world)
    for name, model in recipe.models.items():
        _check_model(name, model, recipe.data, world)
    for name, transfer in recipe.method.transfers.items():
        _check_transfer(f"--method.transfers.{name}", transfer, recipe.models)
    _check_sites(recipe.method.transfers)


def _check_data(name: str, data: Data, world: int) -> None:
    option = f"--data.{name}"
    _at_least(f"{option}.batch", data.batch, 1)
    _at_least(f"{option}.per-class", data.per_class, 0)
    _at_least(f"{option}.image-size", data.image_size, 1)
    if not 0 <= data.validation < 1:
        raise ValueError(f"{option}.validation {data.validation} is no fraction: use at least 0 and less than 1.")
    if data.batch % world:
        fits = max(world, data.batch - data.batch % world)
        raise ValueError(f"{option}.batch {data.batch} does not divide over {world} ranks: use {fits}, for example.")


def _check_model(name: str, model: Model, data: Mapping[str, Data], world: int) -> None:
    option = f"--models.{name}"
    if model.data not in data:
        raise ValueError(
            f"{option}.data {model.data} is no entry of the recipe's data: use {_nearest(model.data, data)}."
        )
    if model.name not in known():
        raise ValueError(f"{option}.name {model.name} is no model: use {_nearest(model.name, known())}.")
    _at_least(f"{option}.micro-batch", model.micro_batch, 0)
    share = data[model.data].batch // world
    if model.micro_batch and share % model.micro_batch:
        raise ValueError(
            f"{option}.micro-batch {model.micro_batch} does not divide a rank's {share} rows: "
            f"use {_largest_divisor(share, model.micro_batch)}."
        )
    if model.optim.lr < 0:
        raise ValueError(f"{option}.optim.lr {model.optim.lr} is negative: use 0 or more.")
    if any(not 0 <= m <= 1 for m in model.schedule.milestones):
        raise ValueError(
            f"{option}.schedule.milestones {_listed(model.schedule.milestones)} are fractions of the run: "
            "use numbers from 0 to 1."
        )
    if model.pretrained and model.init:
        raise ValueError(f"{option}.pretrained and {option}.init both say where to start: give one of them.")
    stage = zero_block(model.zero, f"{option}.zero")["stage"]
    if stage == 0 and model.precision == "bf16":
        raise ValueError(
            f"{option}.zero {model.zero} is stage 0, which keeps no master copy of bf16 parameters: "
            "use ds_configs/zero1.json, or autocast as precision."
        )


def _check_transfer(option: str, transfer: Transfer, models: Mapping[str, Model]) -> None:
    for side, site in (("source", transfer.source), ("target", transfer.target)):
        model, weight = split_site(site, f"{option}.{side}")
        if model not in models:
            raise ValueError(
                f"{option}.{side} {site} names no model of the recipe: use {_nearest(model, models)}, "
                f"as in {next(iter(models))}:{weight}."
            )
    if transfer.source == transfer.target:
        raise ValueError(f"{option} reads and writes the same weight {transfer.target}: name another source or target.")
    _at_least(f"{option}.cycle", transfer.cycle, 1)
    _at_least(f"{option}.rank", transfer.rank, 1)
    _at_least(f"{option}.source-rank", transfer.source_rank, 0)
    _at_least(f"{option}.adapter.layers", transfer.adapter.layers, 1)
    _at_least(f"{option}.adapter.heads", transfer.adapter.heads, 1)
    if not -1 < transfer.adapter.first_gate() < 1:
        raise ValueError(
            f"{option}.adapter.gate {transfer.adapter.gate} is outside what a tanh reaches: "
            "use more than -1 and less than 1."
        )


def _check_sites(transfers: Mapping[str, Transfer]) -> None:
    """One writer per weight, and one factorisation per layer."""
    writers: dict[str, str] = {}
    factorised: dict[str, tuple[str, int]] = {}
    for name, transfer in transfers.items():
        if transfer.target in writers:
            raise ValueError(
                f"--method.transfers.{name}.target {transfer.target} is already the target of "
                f"{writers[transfer.target]}: give each transfer a target of its own."
            )
        writers[transfer.target] = name
        for site, rank in (
            (transfer.source, transfer.source_rank or transfer.rank),
            (transfer.target, transfer.rank),
        ):
            # `full` and `svd` leave the layer as it is: rank 0 stands for that.
            rank = rank if transfer.mode == "factor" else 0
            other, known = factorised.setdefault(site, (name, rank))
            if known != rank:
                raise ValueError(
                    f"--method.transfers.{name} takes {site} {_form(rank)} and {other} takes it "
                    f"{_form(known)}: give both the same mode and rank."
                )


def _form(rank: int) -> str:
    return f"factorised at rank {rank}" if rank else "unfactorised"


def split_site(site: str, option: str = "site") -> tuple[str, str]:
    """`resnet50:fc.weight` -> (`resnet50`, `fc.weight`).

    Raises:
        ValueError: not of the form model:weight.
    """
    model, colon, weight = site.partition(":")
    if not (model and colon and weight):
        raise ValueError(f"{option} {site!r} is not of the form model:weight, as in resnet50:fc.weight.")
    return model, weight


BELONGS_ELSEWHERE = {
    "train_batch_size": "--data.NAME.batch",
    "train_micro_batch_size_per_gpu": "--models.NAME.micro-batch",
    "gradient_accumulation_steps": "--models.NAME.micro-batch",
    "gradient_clipping": "--models.NAME.optim.clip",
    "optimizer": "--models.NAME.optim",
    "scheduler": "--models.NAME.schedule",
    "fp16": "--models.NAME.precision",
    "bf16": "--models.NAME.precision",
    "bfloat16": "--models.NAME.precision",
    "torch_autocast": "--models.NAME.precision",
    "amp": "--models.NAME.precision",
}
"""Keys of a whole DeepSpeed configuration that a recipe decides, and the option that does."""


def zero_block(path: str, option: str = "--zero-config") -> dict[str, Any]:
    """DeepSpeed's `zero_optimization` block from a JSON file that holds it, bare or under that key.

    A relative path is looked up here first, then beside the package, so that launchers start from anywhere.

    Raises:
        ValueError: missing, not JSON, without a stage, or with keys that belong into the recipe.
    """
    places = (Path(path), Path(__file__).resolve().parents[1] / path)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"{option} {path} does not exist: use {SHIPPED_ZERO}, or a file of your own.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{option} {path} is not JSON ({reason}): mend it, or use {SHIPPED_ZERO}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{option} {path} holds no JSON object: write a zero_optimization block as {SHIPPED_ZERO} do.")
    block = content.get("zero_optimization", content)
    strangers = [key for key in content if key != "zero_optimization"] if block is not content else []
    strangers = [key for key in content if key in BELONGS_ELSEWHERE] or strangers
    if strangers:
        key = strangers[0]
        mend = f"set it with {BELONGS_ELSEWHERE[key]}" if key in BELONGS_ELSEWHERE else "take it out"
        raise ValueError(f"{option} {path} holds {key}, which is not part of the zero_optimization block: {mend}.")
    stage = block.get("stage") if isinstance(block, dict) else None
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ValueError(f"{option} {path} needs a stage from 0 to 3, as {SHIPPED_ZERO} have.")
    return block


def _at_least(option: str, number: int, least: int) -> None:
    if number < least:
        raise ValueError(f"{option} {number} is too small: use {least} or more.")


def _largest_divisor(number: int, limit: int) -> int:
    return next(candidate for candidate in range(limit, 0, -1) if number % candidate == 0)


def _listed(values: Iterable[object]) -> str:
    return " ".join(str(value) for value in values)


def _nearest(name: str, names: Iterable[str]) -> str:
    """Names to choose from, likeliest first: all of a short list, the closest of a long one."""
    close = difflib.get_close_matches(name, names := list(names), n=4, cutoff=0.4)
    shown = close + [other for other in names if other not in close]
    if len(names) > 8:
        shown = close or shown[:4]
    if not shown:
        return "one that exists (there is none yet)"
    return " or ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


# --- the arguments before tyro sees them ---


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Drop what the `deepspeed` command adds: --local_rank=N or --local_rank N, also with a dash."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip:
            skip = False
        elif name in ("--local_rank", "--local-rank"):
            skip = not equals
        else:
            kept.append(argument)
    return kept


def _value_of(option: str, arguments: Sequence[str]) -> str:
    """The last value given to `option`, before the rest can be parsed; empty if it is not there."""
    value = ""
    for position, argument in enumerate(arguments):
        name, equals, text = argument.partition("=")
        if name == option:
            value = text if equals else "".join(arguments[position + 1 : position + 2])
    return value


def _check_keys(recipe: Recipe, arguments: Sequence[str]) -> None:
    """Name the recipe's own entries when an option is about one that it does not have."""
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        path = argument[2:].partition("=")[0].split(".")
        for prefix, kind, entries in (
            (["models"], "model", recipe.models),
            (["data"], "data entry", recipe.data),
            (["method", "transfers"], "transfer", recipe.method.transfers),
        ):
            depth = len(prefix)
            if path[:depth] != prefix or len(path) <= depth:
                continue
            known = {_dashed(name) for name in typing.cast(Mapping[str, object], entries)}
            if _dashed(path[depth]) not in known:
                raise ValueError(
                    f"--{'.'.join(path)} is about a {kind} that recipe {recipe.name} does not have: "
                    f"use {_nearest(path[depth], typing.cast(Mapping[str, object], entries))}."
                )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


# --- debug ---

TINY = {"resnet": "cifar:resnet_tiny", "mobilenetv2": "cifar:mobilenetv2_tiny"}
"""The tiny model that stands for a family under `--debug`."""


def shrink(recipe: Recipe, world: int = 1) -> Recipe:
    """`--debug`: the same models' families, methods and code paths, in seconds on one core.

    Tiny models on generated pictures, at most four steps of about eight rows (a multiple of `world`, so that
    any number of ranks works), ranks of at most four. A weight that the tiny model lacks is replaced by its
    last one of the same kind, for example the last projection for `blocks.5.2.conv_pwl.weight`.
    """
    share = -(-DEBUG_BATCH // world)
    micro_batch = _largest_divisor(share, share // 2) if share > 1 else 0
    data = {
        name: replace(entry, name="generated", batch=share * world, per_class=0, validation=0.0, image_size=32)
        for name, entry in recipe.data.items()
    }
    models = {
        name: replace(
            model,
            name=_tiny(model.name),
            init="",
            pretrained=False,
            micro_batch=micro_batch if model.micro_batch else 0,
        )
        for name, model in recipe.models.items()
    }
    return replace(
        recipe,
        name=f"{recipe.name}_debug",
        models=models,
        data=data,
        method=replace(recipe.method, transfers=_tiny_transfers(recipe, models)),
        steps=min(recipe.steps, DEBUG_STEPS),
        log_every=1,
        eval_every=min(recipe.eval_every, DEBUG_STEPS),
        save_every=min(recipe.save_every, DEBUG_STEPS),
    )


def _tiny(name: str) -> str:
    return next((tiny for family, tiny in TINY.items() if family in name), name)


def _tiny_transfers(recipe: Recipe, models: Mapping[str, Model]) -> dict[str, Transfer]:
    sites: dict[str, str] = {}
    for transfer in recipe.method.transfers.values():
        for option, site in (("source", transfer.source), ("target", transfer.target)):
            if site not in sites:
                model, weight = split_site(site, f"--method.transfers: {option}")
                if model in models and models[model].name != recipe.models[model].name:
                    taken = {other for known, other in sites.items() if known.startswith(f"{model}:")}
                    sites[site] = f"{model}:{_tiny_weight(models[model].name, weight, taken, model)}"
                else:
                    sites[site] = site
    return {
        name: replace(
            transfer,
            source=sites[transfer.source],
            target=sites[transfer.target],
            cycle=min(transfer.cycle, DEBUG_STEPS // 2),
            rank=min(transfer.rank, DEBUG_RANK),
            source_rank=min(transfer.source_rank, DEBUG_RANK),
        )
        for name, transfer in recipe.method.transfers.items()
    }


def _tiny_weight(model_name: str, weight: str, taken: set[str], model: str) -> str:
    names = [info.name for info in list_weights(build(model_name, 10))]
    if weight in names:
        return weight
    kind = weight.split(".")[-2:]
    alike = [name for name in names if name.split(".")[-2:] == kind and f"{model}:{name}" not in taken]
    # Without one of its kind the name stays, and the search for the weight complains with the nearest names.
    return alike[-1] if alike else weight


# --- recipes as text ---


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML; `from_yaml` gives back an equal one."""
    # ASCII only: written as it is, U+0085 (a line break to YAML) would come back as a space.
    return yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False, allow_unicode=False, width=110)


def from_yaml(text: str) -> Recipe:
    """The recipe of a `recipe.yaml`.

    Raises:
        ValueError: a field that recipes do not have, a missing one, or a value of the wrong type.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"recipe.yaml is not YAML ({' '.join(str(error).split())}): print one with --print."
        ) from error
    return typing.cast(Recipe, _typed(Recipe, content, ""))


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Paths of the fields that differ between two recipes, as on the command line without the dashes.

    Fields that decide no number of a run (folders, and how often it logs, evaluates or saves) do not count.
    """
    ours, theirs = _flat(dataclasses.asdict(a)), _flat(dataclasses.asdict(b))
    missing = object()
    return [
        path
        for path in dict.fromkeys((*ours, *theirs))
        if path not in BOOKKEEPING and ours.get(path, missing) != theirs.get(path, missing)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def _typed(kind: Any, value: Any, path: str) -> Any:
    """`value`, as YAML reads it, as the annotation `kind` wants it."""
    if dataclasses.is_dataclass(kind):
        return _typed_dataclass(typing.cast(type, kind), value, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for one in arguments[:-1]:
            with contextlib.suppress(ValueError):
                return _typed(one, value, path)
        return _typed(arguments[-1], value, path)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], entry, f"{path}.{key}") for key, entry in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(arguments[0], entry, path) for entry in value)
    if origin is Literal and value in arguments:
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as a string.
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(kind, type) and type(value) is kind:
        return value
    wanted = f"one of {', '.join(map(str, arguments))}" if origin is Literal else _name(kind)
    raise ValueError(f"recipe.yaml: {path.lstrip('.') or 'the file'} is {value!r}, not {wanted}.")


def _typed_dataclass(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(
            f"recipe.yaml: {path.lstrip('.') or 'the file'} is {value!r}, not a mapping of {_name(kind)}'s fields."
        )
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise ValueError(
                f"recipe.yaml: {f'{path}.{key}'.lstrip('.')} is no field: use {_nearest(str(key), hints)}."
            )
    fields = dataclasses.fields(kind)
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            raise ValueError(f"recipe.yaml: {f'{path}.{field.name}'.lstrip('.')} is missing: add it.")
    return kind(**{key: _typed(hints[key], entry, f"{path}.{key}") for key, entry in value.items()})


def _name(kind: Any) -> str:
    return str(kind) if isinstance(kind, types.GenericAlias) else getattr(kind, "__name__", str(kind))
