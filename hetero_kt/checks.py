"""Everything about a recipe that can be refused before a model is built, each in one sentence."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hetero_kt.config import Control, Data, Model, Recipe, Transfer, nearest
from hetero_kt.models import known

CONTROLS: tuple[str, ...] = typing.get_args(Control)
SHIPPED_ZERO = "ds_configs/zero0.json to zero3.json"

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
            f"--control {recipe.method.control} is unknown: use {nearest(recipe.method.control, CONTROLS)}."
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
            f"{option}.data {model.data} is no entry of the recipe's data: use {nearest(model.data, data)}."
        )
    if model.name not in known():
        raise ValueError(f"{option}.name {model.name} is no model: use {nearest(model.name, known())}.")
    _at_least(f"{option}.micro-batch", model.micro_batch, 0)
    share = data[model.data].batch // world
    if model.micro_batch and share % model.micro_batch:
        raise ValueError(
            f"{option}.micro-batch {model.micro_batch} does not divide a rank's {share} rows: "
            f"use {largest_divisor(share, model.micro_batch)}."
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
                f"{option}.{side} {site} names no model of the recipe: use {nearest(model, models)}, "
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
        for site, rank in transfer.sites():
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


def largest_divisor(number: int, limit: int) -> int:
    """Largest divisor of `number` that is at most `limit`."""
    return next(candidate for candidate in range(limit, 0, -1) if number % candidate == 0)


def _listed(values: Iterable[object]) -> str:
    return " ".join(str(value) for value in values)
