"""`--debug`: any recipe in seconds on one core, with the same methods and code paths."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from hetero_kt.checks import BERTS, largest_divisor, split_site
from hetero_kt.config import GENERATED, PAIRS, TEXTS, Data, Distill, MergeNet, Model, Recipe, Text, Transfer

DEBUG_STEPS = 4
DEBUG_BATCH = 8
DEBUG_RANK = 4
DEBUG_CANDIDATES = 4

TINY_TEXT = Text(GENERATED, length=64, stride=16, question=16)

TINY_WORLD = 32
"""Pixels of the generated pictures that texts speak of."""

TINY = {
    "resnet": "cifar:resnet_tiny",
    "mobilenetv2": "cifar:mobilenetv2_tiny",
    "vit": "cifar:vit_tiny",
    "deit": "cifar:vit_tiny",
    "mixer": "cifar:mixer_tiny",
    "resmlp": "cifar:resmlp_tiny",
    "swin": "cifar:swin_tiny",
    "convnext": "cifar:convnext_tiny",
}
"""The tiny model that stands for a family under `--debug`, by how the family's models are called."""


def shrink(recipe: Recipe, world: int = 1, before: Collection[str] = ()) -> Recipe:
    """`--debug`: the same models' families, methods and code paths, in seconds on one core.

    Tiny models on generated pictures and texts, at most four steps of about eight rows (a multiple of `world`, so that
    any number of ranks works), ranks of at most four. A weight that the tiny model lacks is replaced by its
    last one of the same kind, for example the last projection for `blocks.5.2.conv_pwl.weight`. Teachers are fresh, but
    for those that are trained `before` in the same start: recipes by name.
    """
    share = -(-DEBUG_BATCH // world)
    if any(entry.name == "captions" for entry in recipe.data.values()):
        share = max(share, 4)  # a rank draws negatives among its own, also in halves
    if isinstance(recipe.method, Distill):
        share = max(share, 2 * recipe.method.least_rows(world))
    micro_batch = largest_divisor(share, share // 2) if share > 1 else 0
    data = {name: _tiny_data(entry, share * world) for name, entry in recipe.data.items()}
    models = {
        name: replace(
            model,
            name=_tiny(model.name),
            init="",
            pretrained=False,
            xvlm=replace(model.xvlm, vision="", text=""),
            steps=min(model.steps, DEBUG_STEPS - 1),
            schedule=replace(model.schedule, warmup=0),
            micro_batch=micro_batch if model.micro_batch else 0,
        )
        for name, model in recipe.models.items()
    }
    return replace(
        recipe,
        name=debugged(recipe.name),
        models=models,
        data=data,
        method=_tiny_method(recipe, models, before),
        steps=min(recipe.steps, DEBUG_STEPS),
        log_every=1,
        eval_every=min(recipe.eval_every, DEBUG_STEPS),
        save_every=min(recipe.save_every, DEBUG_STEPS),
    )


def _tiny_data(entry: Data, batch: int) -> Data:
    small = replace(entry, batch=batch, per_class=0, validation=0.0, fraction=1.0, folder="", workers=0)
    if entry.name in PAIRS:
        return replace(small, text=TINY_TEXT, image_size=TINY_WORLD, candidates=DEBUG_CANDIDATES)
    if entry.name in TEXTS:
        return replace(small, text=TINY_TEXT)
    plain = Data()
    return replace(
        small,
        name="generated",
        image_size=32,
        test=plain.test,
        label=plain.label,
        classes=plain.classes,
        shuffle=plain.shuffle,
    )


def _tiny(name: str) -> str:
    family, _, bare = name.partition(":")
    if family == "xvlm":
        return "xvlm:tiny"
    if family in BERTS:
        return "distilbert:2x32" if "distilbert" in name else "bert:2x32"
    return next((tiny for family, tiny in TINY.items() if bare.startswith(family)), name)


def debugged(name: str) -> str:
    """What a recipe is called under `--debug`."""
    return f"{name}_debug"


def _tiny_method(recipe: Recipe, models: Mapping[str, Model], before: Collection[str]) -> MergeNet | Distill:
    if isinstance(recipe.method, MergeNet):
        return replace(recipe.method, transfers=_tiny_transfers(recipe, recipe.method, models))
    from hetero_kt.models.teacher import RANDOM, RUN

    teachers = {}
    for name, teacher in recipe.method.teachers.items():
        init = debugged(teacher.init) if teacher.init.removeprefix(RUN) in before else RANDOM
        teachers[name] = replace(teacher, name=_tiny(teacher.name), init=init, pretrained=False, image_size=0)
    return replace(recipe.method, teachers=teachers)


def _tiny_transfers(recipe: Recipe, method: MergeNet, models: Mapping[str, Model]) -> dict[str, Transfer]:
    sites: dict[str, str] = {}
    for transfer in method.transfers.values():
        for option, site in (("source", transfer.source), ("target", transfer.target)):
            if site not in sites:
                model, weight = split_site(site, f"--method.transfers: {option}")
                if model in models and models[model].name != recipe.models[model].name:
                    taken = {other for known, other in sites.items() if known.startswith(f"{model}:")}
                    tiny = replace(models[model], data=recipe.data[models[model].data].name)
                    sites[site] = f"{model}:{_tiny_weight(tiny, weight, taken, model)}"
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
        for name, transfer in method.transfers.items()
    }


def _tiny_weight(tiny: Model, weight: str, taken: set[str], model: str) -> str:
    """The tiny model's weight that stands for `weight`; `tiny.data` is the name of a data set."""
    from hetero_kt.nn.reencode import list_weights

    names = [info.name for info in list_weights(_built(tiny))]
    if weight in names:
        return weight
    free = [name for name in names if f"{model}:{name}" not in taken]
    same_place = [name for name in free if _unnumbered(name) == _unnumbered(weight)]
    alike = same_place or [name for name in free if name.split(".")[-2:] == weight.split(".")[-2:]]
    # Without one of its kind the name stays, and the search for the weight complains with the nearest names.
    return alike[-1] if alike else weight


def _unnumbered(weight: str) -> list[str]:
    """A weight's name without the numbers of its layers."""
    return [part for part in weight.split(".") if not part.isdecimal()]


def _built(tiny: Model) -> Any:
    if tiny.data in PAIRS:
        from hetero_kt.models import xvlm

        return xvlm.build(tiny.name, xvlm.TASKS[tiny.data], vocabulary=64, image_size=TINY_WORLD)[0]
    if tiny.data not in TEXTS:
        from hetero_kt.models import build

        return build(tiny.name, 10)
    from hetero_kt.models import bert

    return bert.build(tiny.name, bert.TASKS[tiny.data], vocabulary=64)[0]
