"""Everything about a recipe that can be refused before a model is built, each in one sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hetero_kt import zero
from hetero_kt.compiler import compilable
from hetero_kt.config import (
    GENERATED,
    PAIRS,
    TEXTS,
    Data,
    Distill,
    Model,
    Optim,
    Recipe,
    Schedule,
    Teacher,
    Transfer,
    check_names,
    nearest,
)
from hetero_kt.documents import read_bytes
from hetero_kt.messages import check_choices
from hetero_kt.models import XVLMS, is_known, known
from hetero_kt.shipped import zero_file

SHIPPED_ZERO = "ds_configs/zero0.json to zero3.json"

BERTS = ("bert", "distilbert", "hf")
"""Families of models that read texts."""

ASIDE = {
    "fbt": "fused",
    "ofa": "branches",
    "fitnet": "projections",
    "fcfd": "bridges",
    "crd": "embeddings",
    "uskd": "head",
}
"""What objectives of distillation train beside the student, as it is logged."""

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
    check_names(recipe)
    check_seed("--seed", recipe.seed)
    for option, number, least in (
        ("--steps", recipe.steps, 1),
        ("--eval-every", recipe.eval_every, 0),
        ("--save-every", recipe.save_every, 0),
        ("--log-every", recipe.log_every, 1),
        ("--keep", recipe.keep, 1),
    ):
        _at_least(option, number, least)
    if not recipe.models:
        raise ValueError(f"--models is empty: recipe {recipe.name} needs at least one model.")
    if recipe.method.arm not in recipe.method.arms():
        raise ValueError(
            f"--control {recipe.method.arm} is unknown: use {nearest(recipe.method.arm, recipe.method.arms())}."
        )
    for option, parts in (("--data", recipe.data), ("--models", recipe.models)):
        for name, part in parts.items():
            check_choices(part, f"{option}.{name}")
    check_choices(recipe.method, "--method")
    for name, data in recipe.data.items():
        _check_data(name, data, world)
    for name, model in recipe.models.items():
        _check_model(name, model, recipe.data, world)
        if model.steps > recipe.steps:
            raise ValueError(
                f"--models.{name}.steps {model.steps} is more than the run's --steps {recipe.steps}: raise those."
            )
        if model.schedule.warmup > (budget := recipe.budget(name)):
            raise ValueError(
                f"--models.{name}.schedule.warmup {model.schedule.warmup} is longer than the {budget} steps that it "
                "trains for: use fewer, or 0."
            )
    _check_compiled(recipe)
    if all(0 < model.steps < recipe.steps for model in recipe.models.values()):
        raise ValueError(f"--steps {recipe.steps} is more than any model trains for: lower it to the longest.")
    if isinstance(recipe.method, Distill):
        _check_distill(recipe, recipe.method, world)
        return
    for name, transfer in recipe.method.transfers.items():
        _check_transfer(f"--method.transfers.{name}", transfer, recipe.models)
    _check_sites(recipe.method.transfers)
    if recipe.method.control == "sharing":
        averaged = next((name for name, model in recipe.models.items() if model.ema), None)
        if averaged is not None:
            raise ValueError(
                f"--models.{averaged}.ema {recipe.models[averaged].ema} would average a shared weight before the other "
                "model has moved it: leave it out under --control sharing."
            )
    for name, model in recipe.models.items():
        if model.checkpointing and model.name not in XVLMS:
            raise ValueError(f"--models.{name}.checkpointing is for distillation and X-VLM only: leave it out.")


MOST_SEED = 2**32 - 1
"""NumPy takes no larger seed, and what is derived from this one fits torch's 64 bits."""


def check_seed(option: str, seed: object) -> None:
    """Refuse what is no seed.

    Raises:
        ValueError: no whole number from 0 to 2^32 - 1.
    """
    if isinstance(seed, int) and -MOST_SEED <= seed < 0:
        _at_least(option, seed, 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MOST_SEED:
        shown = ascii(seed)
        shown = shown if len(shown) <= 40 else f"{shown[:36]}..."
        raise ValueError(f"{option} {shown} is no seed: use a whole number from 0 to {MOST_SEED}.")


def _check_compiled(recipe: Recipe) -> None:
    known = compilable(recipe)
    for name in recipe.compile:
        if name not in known:
            raise ValueError(f"--compile {name} is no model, teacher or transfer: use {nearest(name, tuple(known))}.")
        model, teacher = recipe.models.get(name), getattr(recipe.method, "teachers", {}).get(name)
        zero = model.zero if model else getattr(teacher, "zero", "")
        if zero and zero_block(zero, f"{known[name]}.zero")["stage"] == 3:
            raise ValueError(
                f"--compile {name}: under ZeRO-3 (its {known[name]}.zero {zero}) every layer's weights come and go, "
                "which leaves nothing to fuse: use ZeRO-2, or leave it out."
            )
        if model and model.checkpointing:
            raise ValueError(
                f"--compile {name}: {known[name]}.checkpointing computes its layers again one by one: use one of both."
            )
        if teacher and teacher.logits == "stored":
            raise ValueError(
                f"--compile {name}: with {known[name]}.logits stored it runs before training alone: use one of both."
            )


def _check_data(name: str, data: Data, world: int) -> None:
    option = f"--data.{name}"
    _at_least(f"{option}.batch", data.batch, 1)
    _at_least(f"{option}.per-class", data.per_class, 0)
    _at_least(f"{option}.image-size", data.image_size, 1)
    _at_least(f"{option}.workers", data.workers, 0)
    _at_least(f"{option}.augmentations", data.augmentations, 0)
    if data.name in ("shards", "tars") and data.pipeline == "fast":
        raise ValueError(f"{option}.pipeline fast augments sets in memory: use timm for {data.name}.")
    if data.name == "tars":
        _check_tars(option, data)
    if data.name == "shards" and not data.folder:
        raise ValueError(f"{option}.folder is empty: name what hetero-kt shards has written.")
    if data.name in PAIRS and not data.folder and data.text.tokenizer != GENERATED:
        raise ValueError(f"{option}.folder is empty: name the set's, vqa_v2, coco, daquar or flickr8k for example.")
    if not 0 < data.fraction <= 1:
        raise ValueError(f"{option}.fraction {data.fraction} is no share of the pictures: use more than 0, at most 1.")
    _at_least(f"{option}.answers", data.answers, 1)
    _check_meant(option, data)
    _at_least(f"{option}.candidates", data.candidates, 0)
    for field, value in (("mixup", data.mix.mixup), ("cutmix", data.mix.cutmix)):
        _not_negative(f"{option}.mix.{field}", value)
    for field, value in (
        ("mix.probability", data.mix.probability),
        ("transform.erasing", data.transform.erasing),
        ("transform.flip", data.transform.flip),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"{option}.{field} {value} is no probability: use 0 to 1.")
    if not 0 <= data.validation < 1:
        raise ValueError(f"{option}.validation {data.validation} is no fraction: use at least 0 and less than 1.")
    if data.batch % world:
        fits = max(world, data.batch - data.batch % world)
        raise ValueError(f"{option}.batch {data.batch} does not divide over {world} ranks: use {fits}, for example.")


def _check_tars(option: str, data: Data) -> None:
    """Refuse settings of `tars` that show a mistake before a tar is looked at."""
    if not data.folder:
        raise ValueError(f"{option}.folder names no tars: write them like train-{{0000..1023}}.tar.")
    if data.label and not re.fullmatch(r"cls|txt|json:.+", data.label):
        raise ValueError(f"{option}.label {data.label} is no entry with labels: use cls, txt, or json:FIELD.")
    if data.shuffle < 0:
        raise ValueError(f"{option}.shuffle {data.shuffle} is no number of pictures: use 0 or more.")
    if not data.test and not data.validation:
        raise ValueError(
            f"{option}.test names no tars to evaluate on: name some, or hold out a part with {option}.validation 0.05."
        )
    if data.test and data.validation:
        raise ValueError(f"{option}.test and {option}.validation both say what is evaluated on: give one of them.")


def _check_meant(option: str, data: Data) -> None:
    """Refuse a field that the set does not have: it would be in the recipe and change nothing."""
    plain = Data()
    others = {
        **dict.fromkeys(("fraction", "blank", "candidates"), PAIRS),
        "answers": ("vqa",),
        **dict.fromkeys(("test", "label", "classes", "shuffle"), ("tars",)),
    }
    for field, sets in others.items():
        if data.name not in sets and getattr(data, field) != getattr(plain, field):
            raise ValueError(f"{option}.{field} is for {' and '.join(sets)} only: leave it out.")
    of_pictures = ["pipeline", "mix", "augment", "augmentations", *(() if data.name == "imdb" else ("per_class",))]
    for field in of_pictures if data.name in (*PAIRS, *TEXTS) else ():
        if getattr(data, field) != getattr(plain, field):
            raise ValueError(f"{option}.{field.replace('_', '-')} is not for {data.name}: leave it out.")


def _check_model(name: str, model: Model, data: Mapping[str, Data], world: int) -> None:
    option = f"--models.{name}"
    if model.data not in data:
        raise ValueError(
            f"{option}.data {model.data} is no entry of the recipe's data: use {nearest(model.data, data)}."
        )
    _check_name(option, model, data[model.data].name)
    _at_least(f"{option}.micro-batch", model.micro_batch, 0)
    _at_least(f"{option}.steps", model.steps, 0)
    share = data[model.data].batch // world
    if model.micro_batch and share % model.micro_batch:
        raise ValueError(
            f"{option}.micro-batch {model.micro_batch} does not divide a rank's {share} rows: "
            f"use {largest_divisor(share, model.micro_batch)}."
        )
    if data[model.data].name == "captions":
        _check_pairs(option, model, share, world)
    _check_rates(option, model.optim, model.schedule)
    for field, value in (("label-smoothing", model.label_smoothing), ("ema", model.ema)):
        if not 0 <= value < 1:
            raise ValueError(f"{option}.{field} {value} is out of range: use at least 0 and less than 1.")
    if model.pretrained and model.init:
        raise ValueError(f"{option}.pretrained and {option}.init both say where to start: give one of them.")
    block = zero_block(model.zero, f"{option}.zero")
    stage = block["stage"]
    if block.get("compute_grad_norm") is False and model.optim.clip:
        raise ValueError(
            f"{option}.zero {model.zero} has compute_grad_norm false, and {option}.optim.clip {model.optim.clip} needs "
            "that norm: take it out, or do not clip."
        )
    if stage == 0 and model.precision == "bf16":
        raise ValueError(
            f"{option}.zero {model.zero} is stage 0, which keeps no master copy of bf16 parameters: "
            "use ds_configs/zero1.json, or autocast as precision."
        )


def _check_pairs(option: str, model: Model, share: int, world: int) -> None:
    """Refuse what retrieval's losses cannot take; `share` are a rank's rows."""
    if model.label_smoothing:
        raise ValueError(f"{option}.label-smoothing goes with neither of retrieval's losses: leave it out.")
    candidates = (model.micro_batch or share) * (world if model.xvlm.negatives == "gathered" else 1)
    if candidates < 2:
        smaller = f"{option}.micro-batch" if model.micro_batch else f"--data.{model.data}.batch"
        raise ValueError(f"{smaller} leaves no second picture to draw a hard negative from: raise it.")


def _check_name(option: str, model: Model, data: str) -> None:
    """Refuse an unknown model, and one that is not for such data."""
    family = model.name.partition(":")[0]
    bert, xvlm = family in BERTS, family == "xvlm"
    if data in TEXTS and not bert:
        raise ValueError(
            f"{option}.name {model.name} reads no texts: use bert:LAYERSxWIDTH, distilbert:LAYERSxWIDTH or hf:NAME."
        )
    if data in PAIRS and not xvlm:
        raise ValueError(f"{option}.name {model.name} does not read about pictures: use {', '.join(XVLMS)}.")
    if bert and data not in TEXTS:
        raise ValueError(f"{option}.name {model.name} sees no pictures: give it {', '.join(TEXTS)} as data.")
    if xvlm and data not in PAIRS:
        raise ValueError(f"{option}.name {model.name} needs pictures with texts: give it {' or '.join(PAIRS)} as data.")
    if bert and model.pretrained:
        raise ValueError(f"{option}.pretrained is for timm's models: name hf:bert-base-uncased, for example.")
    if xvlm and model.pretrained:
        raise ValueError(f"{option}.pretrained is for timm's models: use {option}.xvlm.vision timm:NAME.")
    if not (bert or (model.name in XVLMS if xvlm else is_known(model.name))):
        near = nearest(model.name, list(XVLMS) if xvlm else known())
        raise ValueError(f"{option}.name {model.name} is no model: use {near}.")
    for field in ("vision", "text"):
        if getattr(model.xvlm, field) and not xvlm:
            raise ValueError(f"{option}.xvlm.{field} is for X-VLM only: leave it out.")
        if getattr(model.xvlm, field) and model.init:
            raise ValueError(f"{option}.xvlm.{field} and {option}.init both say where to start: give one of them.")


def _check_rates(option: str, optim: Optim, schedule: Schedule) -> None:
    for field, value in (
        ("optim.lr", optim.lr),
        ("optim.momentum", optim.momentum),
        ("optim.weight-decay", optim.weight_decay),
        ("optim.clip", optim.clip),
        ("schedule.gamma", schedule.gamma),
        ("schedule.warmup-lr", schedule.warmup_lr),
        ("schedule.min-lr", schedule.min_lr),
    ):
        _not_negative(f"{option}.{field}", value)
    _at_least(f"{option}.schedule.warmup", schedule.warmup, 0)
    if any(not 0 <= m <= 1 for m in schedule.milestones):
        raise ValueError(
            f"{option}.schedule.milestones {_listed(schedule.milestones)} are fractions of the run: "
            "use numbers from 0 to 1."
        )


def _check_distill(recipe: Recipe, method: Distill, world: int) -> None:
    if len(recipe.models) != 1:
        raise ValueError(f"--models has {len(recipe.models)} entries: distillation trains one student.")
    ((name, student),) = recipe.models.items()
    if name in ASIDE.values():
        raise ValueError(f"--models.{name}: what is trained aside is called so: give the student another name.")
    if recipe.data[student.data].name in (*TEXTS, *PAIRS):
        raise ValueError(f"--models.{name}.data {student.data} holds texts: distillation is for pictures alone.")
    if method.objective == "none":
        return
    if method.taught and not method.teachers:
        raise ValueError(f"--method.teachers is empty: objective {method.objective} needs a teacher.")
    for teacher, config in method.teachers.items() if method.taught else ():
        _check_teacher(f"--method.teachers.{teacher}", teacher, config, name)
        if config.logits == "stored":
            _check_stored(f"--method.teachers.{teacher}.logits stored", method, student, recipe.data[student.data])
        # How one of several teachers' fused model is logged.
        if (fused := f"fused_{teacher}") == name:
            raise ValueError(f"--models.{name}: teacher {teacher}'s fused model is called so: give another name.")
        if fused in method.teachers:
            raise ValueError(
                f"--method.teachers.{fused}: teacher {teacher}'s fused model is called so: give another name."
            )
    rows = student.micro_batch or recipe.data[student.data].batch // world
    if rows < method.least_rows(world):
        smaller = f"--models.{name}.micro-batch" if student.micro_batch else f"--data.{student.data}.batch"
        raise ValueError(
            f"{smaller} leaves {rows} rows in a rank's forward, where {method.objective} has nothing to compare: use "
            f"{method.least_rows(world)} a rank or more."
        )
    if method.objective in ASIDE and zero_block(student.zero, f"--models.{name}.zero")["stage"] == 0:
        raise ValueError(
            f"--models.{name}.zero {student.zero} is stage 0, under which DeepSpeed takes no backward through several "
            "engines: use ds_configs/zero1.json."
        )
    for option, value in (
        ("kd.temperature", method.kd.temperature),
        ("dkd.temperature", method.dkd.temperature),
        ("nkd.temperature", method.nkd.temperature),
        ("tfkd.temperature", method.tfkd.temperature),
        ("crd.temperature", method.crd.temperature),
        ("fcfd.temperature", method.fcfd.temperature),
        ("ofa.gamma", method.ofa.gamma),
        ("fbt.gamma", method.fbt.gamma),
    ):
        if not value > 0:  # NaN neither
            raise ValueError(f"--method.{option} {value} is not positive: use 1, for example.")
    for option, value in (
        ("kd.weight", method.kd.weight),
        ("kd.labels", method.kd.labels),
        ("rkd.distance", method.rkd.distance),
        ("rkd.angle", method.rkd.angle),
        ("dkd.alpha", method.dkd.alpha),
        ("dkd.beta", method.dkd.beta),
        ("nkd.gamma", method.nkd.gamma),
        ("nkd.labels", method.nkd.labels),
        ("tfkd.multiplier", method.tfkd.multiplier),
        ("uskd.alpha", method.uskd.alpha),
        ("uskd.beta", method.uskd.beta),
        ("uskd.mu", method.uskd.mu),
        ("crd.weight", method.crd.weight),
        ("ofa.weight", method.ofa.weight),
        ("fitnet.weight", method.fitnet.weight),
        ("fcfd.weight", method.fcfd.weight),
    ):
        _not_negative(f"--method.{option}", value)
    for option, value in (
        ("dkd.warmup", method.dkd.warmup),
        ("fcfd.warmup", method.fcfd.warmup),
        ("tfkd.weight", method.tfkd.weight),
        ("tfkd.correct", method.tfkd.correct),
        ("crd.momentum", method.crd.momentum),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"--method.{option} {value} is no share: use 0 to 1.")
    _at_least("--method.crd.width", method.crd.width, 1)
    _at_least("--method.crd.negatives", method.crd.negatives, 1)
    if not 0 <= method.fcfd.paths <= 6:
        raise ValueError(f"--method.fcfd.paths {method.fcfd.paths} are not 0 to 6, as many as there are: use 2.")
    if method.objective == "rkd" and not (method.rkd.distance or method.rkd.angle):
        raise ValueError("--method.rkd.distance and --method.rkd.angle are both 0: raise one, or use --control none.")
    if method.objective == "tfkd" and method.taught:
        for teacher, config in method.teachers.items():
            if config.name != student.name:
                raise ValueError(
                    f"--method.teachers.{teacher}.name {config.name} is not the student's {student.name}, whose own "
                    "earlier run teaches under --method.tfkd.form self: name that, or use --control kd."
                )
    if not method.fbt.terms:
        raise ValueError("--method.fbt.terms is empty: name at least one, or use --control none.")


LOGITS_ALONE = ("kd", "dkd", "nkd", "tfkd", "ofa")
"""Objectives that ask a teacher for its logits and for nothing else."""


def _check_stored(option: str, method: Distill, student: Model, pictures: Data) -> None:
    if method.objective not in LOGITS_ALONE:
        raise ValueError(
            f"{option}: objective {method.objective} needs the teacher's features too: leave it out, or use "
            f"{', '.join(LOGITS_ALONE)}."
        )
    if pictures.mix.mixup or pictures.mix.cutmix:
        raise ValueError(f"{option}: no two batches mix the same pictures: leave out --data.{student.data}.mix.")
    augmented = pictures.augment if pictures.pipeline == "fast" else ("timm's transform",)
    if augmented and not pictures.augmentations:
        raise ValueError(
            f"{option}: no picture comes twice with {', '.join(augmented)} drawn anew in each epoch: give "
            f"--data.{student.data}.augmentations 8, for example."
        )


def _check_teacher(option: str, name: str, teacher: Teacher, student: str) -> None:
    if "." in name or name in ("student", "fused", student):
        raise ValueError(f"{option}: a teacher cannot be called {name}: give it another name without a dot.")
    if not is_known(teacher.name):
        raise ValueError(f"{option}.name {teacher.name} is no model: use {nearest(teacher.name, known())}.")
    if teacher.pretrained and teacher.init:
        raise ValueError(f"{option}.pretrained and {option}.init both say where its weights are: give one of them.")
    _at_least(f"{option}.image-size", teacher.image_size, 0)
    for field, values in (("mean", teacher.mean), ("std", teacher.std)):
        if len(values) not in (0, 3) or (field == "std" and not all(value > 0 for value in values)):
            raise ValueError(f"{option}.{field} {_listed(values)} are not three channels' values: give three.")
    if teacher.zero and zero_block(teacher.zero, f"{option}.zero")["stage"] != 3:
        raise ValueError(f"{option}.zero {teacher.zero} is not stage 3: only that keeps a frozen model in pieces.")


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
    if transfer.reads == "change" and transfer.mode == "svd":
        raise ValueError(f"{option}.reads change needs {option}.mode factor or full: svd is another basis each time.")
    _check_rates(option, transfer.optim, transfer.schedule)
    _at_least(f"{option}.adapter.layers", transfer.adapter.layers, 1)
    _at_least(f"{option}.adapter.heads", transfer.adapter.heads, 1)
    if transfer.adapter.output == "mix" and transfer.adapter.input != "raw":
        raise ValueError(
            f"{option}.adapter.output mix keeps the source's own scale: use {option}.adapter.input raw with it."
        )
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

    A relative path is looked up in the working directory first; `ds_configs/NAME.json` is found where it
    is installed, too.

    Raises:
        ValueError: missing, not JSON, without a stage, with keys that belong into the recipe, or one that DeepSpeed
            refuses.
    """
    file = zero_file(path)
    if file is None:
        raise ValueError(f"{option} {path} does not exist: use {SHIPPED_ZERO}, or a file of your own.")
    try:
        content = zero.load(read_bytes(file).decode("utf-8"))
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
    return zero.resolve(block, f"{option} {path}")


def _at_least(option: str, number: int, least: int) -> None:
    if number < least:
        raise ValueError(f"{option} {number} is too small: use {least} or more.")


def _not_negative(option: str, value: float) -> None:
    if not 0 <= value < math.inf:
        wrong = "no number" if math.isnan(value) else "negative" if value < 0 else "not finite"
        raise ValueError(f"{option} {value} is {wrong}: use 0 or more.")


def largest_divisor(number: int, limit: int) -> int:
    """Largest divisor of `number` that is at most `limit`."""
    return next(candidate for candidate in range(limit, 0, -1) if number % candidate == 0)


def _listed(values: Iterable[object]) -> str:
    return " ".join(str(value) for value in values)
