"""The command line of every launcher: a recipe, its variants and the options of one run.

`parse` reads them strictly, so that a typo never trains the wrong thing for a day.
"""

from __future__ import annotations

import re
import sys
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from hetero_kt import requirements
from hetero_kt.checks import check, check_seed, zero_block
from hetero_kt.config import PAIRS, Data, Distill, MergeNet, Recipe, Teacher, nearest, read_recipe, root, to_yaml
from hetero_kt.distributed.environment import likely_rank, place
from hetero_kt.messages import printable
from hetero_kt.models import is_known, known

Variants = Mapping[str, Callable[[], Recipe]]

PATIENCE = 10.0
"""Seconds that other ranks stay behind the first when a start ends in error."""


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
    gpu_memory: float = 0.0
    """GiB that `--plan` compares with; 0 takes this machine's GPU, if there is one."""
    deterministic: bool = False
    """Only algorithms that give the same bits again; slower on a GPU, and an operation that has none ends the run."""
    profile: bool = False
    """Write a profile of a few steps into the run folder."""
    variant: str = "default"
    """Which of the launcher's recipes to start from."""
    control: Annotated[str, tyro.conf.arg(aliases=("--method",))] = ""
    """Run another arm of the experiment: a control instead of the transfer, or a baseline's objective."""
    teacher: tuple[str, ...] = ()
    """Who teaches a distillation's student, one or several, in place of the recipe's: a run (its folder or
    `run:RECIPE`), a safetensors file, or a model's name for its published weights."""
    patience: float = 180.0
    """Seconds without a step after which a job of several ranks ends, naming the one that hangs; 0 waits for ever."""
    resume: str = "auto"
    """`auto` goes on from the run folder's last checkpoint, `never` starts anew, PATH goes on from it."""
    zero_config: str = ""
    """File with DeepSpeed's `zero_optimization` block, for every trained model."""
    train_fraction: float = 0.0
    """Share of the training pictures that every set of pictures with texts keeps; 0 is as the recipe says."""
    compare: tuple[str, ...] = ()
    """Run these arms too (controls, baselines), in the same process group, and print the comparison."""
    seeds: tuple[int, ...] = ()
    """Run every one of these seeds; empty runs the recipe's own."""
    unfinished: tyro.conf.Suppress[bool] = False
    """`--unfinished`, which the batch files give: print the runs that have no result yet, and train nothing."""
    first: tuple[str, ...] = ()
    """Run these variants before, unless they are finished: the teachers that this one names as `run:RECIPE`."""


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
        for warning in requirements.check():
            if is_first_rank():
                print(warning, file=sys.stderr, flush=True)
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
        rank = likely_rank()
        said = printable(str(error))  # names in it may be a stranger's
        print(f"error: rank {rank}: {said}" if rank else f"error: {said}", file=sys.stderr, flush=True)
    else:
        _let_the_first_speak()
    raise SystemExit(status)


def _let_the_first_speak() -> None:
    """Starters end all ranks once one has left in error: the others wait, or the first might never get to say why."""
    time.sleep(PATIENCE)


def is_first_rank() -> bool:
    """True on the one process that may print, known before any process group exists."""
    return likely_rank() == 0


def resolve(variants: Variants | Callable[[], Recipe], argv: Sequence[str] | None = None) -> tuple[Recipe, Options]:
    """As `parse`, but bad values raise ValueError, and nothing is printed but tyro's own help and complaints.

    Precedence, from weak to strong: the variant's recipe, single fields (`--models.NAME.optim.lr`), then
    `--control` (or `--method`), `--zero-config` and `--teacher`, then `--debug`, which only ever makes things smaller.
    """
    if not isinstance(variants, Mapping):
        variants = {"default": variants}
    arguments = without_local_rank(sys.argv[1:] if argv is None else argv)
    unfinished = "--unfinished" in arguments
    arguments = [argument for argument in arguments if argument != "--unfinished"]
    variant = _value_of("--variant", arguments) or next(iter(variants))
    if variant not in variants:
        raise ValueError(f"--variant {variant} is unknown: use {nearest(variant, variants)}.")
    base = variants[variant]()
    _check_keys(base, arguments)
    _check_seeds(arguments)
    parsed = tyro.cli(
        _CommandLine,
        args=arguments,
        default=_CommandLine(base, Options(variant=variant, unfinished=unfinished)),
        description=_about(variants, base),
        config=(tyro.conf.AvoidSubcommands,),  # the recipe has chosen its method
        console_outputs=is_first_rank(),
    )
    recipe, options = parsed.recipe, parsed.options
    for option, arm in [("--control", options.control), *(("--compare", arm) for arm in options.compare)]:
        if arm and arm not in base.method.arms():
            raise ValueError(f"{option} {arm} is unknown: use {nearest(arm, base.method.arms())}.")
    if not options.control:
        options = replace(options, control=recipe.method.arm)
    elif recipe.method.arm not in (base.method.arm, options.control):
        field = "control" if isinstance(recipe.method, MergeNet) else "objective"
        raise ValueError(
            f"--control {options.control} and --method.{field} {recipe.method.arm} disagree: give --control only."
        )
    recipe = replace(recipe, method=recipe.method.with_arm(options.control))
    if options.zero_config:
        zero_block(options.zero_config)
        everywhere = {name: replace(model, zero=options.zero_config) for name, model in recipe.models.items()}
        recipe = replace(recipe, models=everywhere)
    if options.teacher:
        recipe = replace(recipe, method=_taught_by(recipe, options.teacher, variants))
    if options.train_fraction:
        recipe = replace(recipe, data=_fractions(recipe.data, options.train_fraction))
    _, world = place()
    check_options(options)
    if options.debug:
        from hetero_kt.debug import shrink

        recipe = shrink(recipe, world, [variants[name]().name for name in options.first if name in variants])
        # Four steps are not worth resuming: a second try would find the first one finished and do nothing.
        options = replace(options, resume="never") if options.resume == "auto" else options
    recipe = replace(recipe, data_dir=root(recipe.data_dir))
    check(recipe, world)
    return recipe, options


def _about(variants: Variants, base: Recipe) -> str:
    """What `--help` begins with: the launcher's own text, then what can be chosen of this variant."""
    first = next(iter(variants.values()))
    module = sys.modules.get(getattr(first, "func", first).__module__)  # `func` of a partial
    text = (module and module.__doc__) or ""
    # tyro fills lines anew: an entry ("Data: ...") becomes a paragraph, or all of them would be one.
    parts = re.split(r"\n\n|\n(?=[A-Z][^\n:]*: )", text)
    paragraphs = [" ".join(part.replace("\\\n", " ").split()) for part in parts]
    chosen = f"{base.name}; variants: {', '.join(variants)}; for --control: {', '.join(base.method.arms())}."
    return "\n\n".join([*filter(None, paragraphs), chosen])


def _taught_by(recipe: Recipe, given: Sequence[str], variants: Variants) -> Distill:
    """The recipe's method with these teachers. A run that is there says which model it is, of one to come its variant
    does; a mere file is of the model of the recipe's own first teacher.

    Raises:
        ValueError: no distillation, or a model that does not exist.
    """
    method = recipe.method
    if not isinstance(method, Distill):
        raise ValueError(f"--teacher {given[0]} is for distillation, and recipe {recipe.name} has no teachers.")
    first, like = next(iter(method.teachers.items()), ("teacher", Teacher("cifar:resnet50")))
    to_come = {}
    for make in variants.values():
        if len((one := make()).models) == 1:
            to_come[f"run:{one.name}"] = next(iter(one.models.values())).name
    teachers = {}
    for i, init in enumerate(given):
        if is_known(init):
            chosen = replace(like, name=init, init="", pretrained=True)
        elif init.startswith(("timm:", "cifar:")):
            raise ValueError(f"--teacher {init} is no model: use {nearest(init, known())}.")
        else:
            name = _model_of(init, recipe.output_dir) or to_come.get(init, like.name)
            chosen = replace(like, name=name, init=init, pretrained=False)
        teachers[f"{first}{i + 1}" if i else first] = chosen
    return replace(method, teachers=teachers)


def _model_of(init: str, output_dir: str) -> str:
    """The name of the model whose weights a finished run has left; empty where nothing says."""
    from hetero_kt.models.teacher import weights_of

    try:
        file = weights_of(init, "--teacher", output_dir)
    except ValueError:  # said again, with its option, once it is clear what trains before
        return ""
    try:
        models = read_recipe(file.parents[1] / "recipe.yaml").models
    except FileNotFoundError:
        return ""
    name = file.stem if file.stem in models else file.stem.removesuffix("_ema")
    return models[name].name if name in models else ""


def _fractions(data: Mapping[str, Data], fraction: float) -> dict[str, Data]:
    if not any(entry.name in PAIRS for entry in data.values()):
        raise ValueError(f"--train-fraction {fraction} is for sets of pictures with texts, and the recipe has none.")
    if not 0 < fraction <= 1:
        raise ValueError(f"--train-fraction {fraction} is no share of the pictures: use more than 0, at most 1.")
    return {name: replace(one, fraction=fraction) if one.name in PAIRS else one for name, one in data.items()}


def runs(recipe: Recipe, options: Options) -> list[Recipe]:
    """The recipes that one start works through: its own control and those of `--compare`, for each seed."""
    arms = dict.fromkeys((recipe.method.arm, *options.compare))
    return [
        replace(recipe, seed=seed, method=recipe.method.with_arm(arm))
        for seed in options.seeds or (recipe.seed,)
        for arm in arms
    ]


def runs_before(recipe: Recipe, options: Options, variants: Variants | Callable[[], Recipe]) -> list[Recipe]:
    """The recipes of `--first`, in the folders, with the ZeRO file and (for a teacher of `recipe`) the model of
    `recipe`; with `--debug`, as small as it is.

    Raises:
        ValueError: a variant that does not exist, or a recipe that cannot run.
    """
    variants = variants if isinstance(variants, Mapping) else {"default": variants}
    for name in options.first:
        if name not in variants:
            raise ValueError(f"--first {name} is unknown: use {nearest(name, variants)}.")
    makes = [variants[name]() for name in options.first]
    before: list[Recipe] = []
    for i, one in reversed(list(enumerate(makes))):
        if options.debug:
            from hetero_kt.debug import shrink

            one = shrink(one, place()[1], [earlier.name for earlier in makes[:i]])
        models = dict(one.models)
        for student in (*before, recipe):  # a teacher's teacher sees the student's pictures too
            for teacher in getattr(student.method, "teachers", {}).values():
                if teacher.init == f"run:{one.name}" and len(models) == 1:
                    models = {key: replace(model, name=teacher.name) for key, model in models.items()}
                    (taught,) = student.models.values()
                    data = _same_pictures(one.data, student.data[taught.data], teacher.image_size)
                    one = replace(one, data=data)
        if options.zero_config:
            models = {key: replace(model, zero=options.zero_config) for key, model in models.items()}
        one = replace(one, models=models, data_dir=recipe.data_dir, output_dir=recipe.output_dir)
        check(one, place()[1])
        before.insert(0, one)
    return before


def _same_pictures(data: Mapping[str, Data], student: Data, image_size: int) -> dict[str, Data]:
    """A teacher's data: how much of it, in which batches and how augmented is the teacher's own matter; which pictures
    there are, how large, and which are held out, is the student's."""
    same = {name: getattr(student, name) for name in ("name", "folder", "pipeline", "validation", "workers", "corrupt")}
    size = image_size or student.image_size
    return {key: replace(one, **same, image_size=size) for key, one in data.items()}


def check_options(options: Options) -> None:
    """Refuse options that cannot be meant.

    Raises:
        ValueError: one sentence with the option and the mend.
    """
    if options.max_steps < 0:
        raise ValueError(
            f"--max-steps {options.max_steps} is negative: give a number of steps, or 0 for the whole run."
        )
    for seed in options.seeds:
        check_seed("--seeds", seed)
    repeated = [seed for seed in options.seeds if options.seeds.count(seed) > 1]
    if repeated:
        raise ValueError(f"--seeds names {repeated[0]} twice: give every seed once.")
    if options.resume not in ("auto", "never"):
        if not Path(options.resume).is_dir():
            raise ValueError(f"--resume {options.resume} is no folder: use auto, never or the path of a checkpoint.")
        if options.compare or len(options.seeds) > 1:
            raise ValueError("--resume PATH continues one run: leave out --compare and --seeds, or use --resume auto.")


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


def _check_seeds(arguments: Sequence[str]) -> None:
    """Refuse seeds that are no whole numbers, in one sentence where the parser would print a box."""
    option = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            option = name if name in ("--seed", "--seeds") else ""
            if not (option and equals):
                continue
        else:
            value = argument
        if option:
            try:
                seed: object = int(value)
            except ValueError:
                seed = value
            check_seed(option, seed)


def _check_keys(recipe: Recipe, arguments: Sequence[str]) -> None:
    """Name the recipe's own entries when an option is about one that it does not have."""
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        path = argument[2:].partition("=")[0].split(".")
        for prefix, kind, entries in (
            (["models"], "model", recipe.models),
            (["data"], "data entry", recipe.data),
            (["method", "transfers"], "transfer", getattr(recipe.method, "transfers", None)),
            (["method", "teachers"], "teacher", getattr(recipe.method, "teachers", None)),
        ):
            depth = len(prefix)
            if entries is None or path[:depth] != prefix or len(path) <= depth:
                continue
            known = {_dashed(name) for name in typing.cast(Mapping[str, object], entries)}
            if _dashed(path[depth]) not in known:
                raise ValueError(
                    f"--{'.'.join(path)} is about a {kind} that recipe {recipe.name} does not have: "
                    f"use {nearest(path[depth], typing.cast(Mapping[str, object], entries))}."
                )


def _dashed(name: str) -> str:
    return name.replace("_", "-")
