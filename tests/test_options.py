"""The command line: strict and typed, one sentence per mistake, and YAML without loss."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_kt import checks, config, debug, options
from hetero_kt.config import AdapterConfig, Data, Distill, MergeNet, Model, Optim, Recipe, Schedule, Teacher, Transfer
from hetero_kt.options import Options

ZERO = Path(__file__).parents[1] / "ds_configs"


def recipe() -> Recipe:
    models = {
        "resnet50": Model("cifar:resnet50", data="cifar100"),
        "mobilenetv2": Model("cifar:mobilenetv2", data="cifar100"),
    }
    transfers = {
        "to_mobilenetv2": Transfer("resnet50:fc.weight", "mobilenetv2:blocks.5.2.conv_pwl.weight"),
        "to_resnet50": Transfer("mobilenetv2:classifier.weight", "resnet50:layer4.0.conv1.weight", rank=4),
    }
    return Recipe("cifar", models, {"cifar100": Data()}, MergeNet(transfers), steps=400)


def short() -> Recipe:
    return replace(recipe(), name="short", steps=7, method=replace(recipe().method, control="none"))


VARIANTS = {"default": recipe, "short": short}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "HETERO_KT_DATA"):
        monkeypatch.delenv(name, raising=False)


def resolve(*arguments: str) -> tuple[Recipe, Options]:
    return options.resolve(VARIANTS, arguments)


def with_transfer(**changes: Any) -> Recipe:
    base = recipe()
    changed = replace(base.method.transfers["to_mobilenetv2"], **changes)
    transfers = {**base.method.transfers, "to_mobilenetv2": changed}
    return replace(base, method=replace(base.method, transfers=transfers))


def with_model(**changes: Any) -> Recipe:
    base = recipe()
    return replace(base, models={**base.models, "resnet50": replace(base.models["resnet50"], **changes)})


def with_data(**changes: Any) -> Recipe:
    return replace(recipe(), data={"cifar100": Data(**changes)})


def one_sentence(message: str) -> bool:
    return message.endswith(".") and ". " not in message and "\n" not in message


# --- parsing ---


def test_without_arguments_the_first_variant_runs_as_it_is() -> None:
    parsed, chosen = resolve()
    assert parsed == replace(recipe(), data_dir="data")
    assert chosen == Options(control="transfer")


def test_every_field_can_be_overridden_by_its_path() -> None:
    parsed, chosen = resolve(
        *("--models.resnet50.optim.lr", "1e-3", "--models.mobilenetv2.optim.no-decay-all"),
        *("--models.mobilenetv2.schedule.milestones", "0.5", "0.75", "--steps=100", "--seed", "3"),
        *(
            "--method.transfers.to-mobilenetv2.cycle",
            "2",
            "--method.transfers.to_resnet50.adapter.heads",
            "4",
        ),
        *("--data-dir", "/d", "--output_dir", "/o", "--max-steps", "5", "--compare", "none", "noise"),
        *("--seeds", "0", "1", "2"),
    )
    assert parsed.models["resnet50"].optim.lr == 1e-3
    assert not parsed.models["mobilenetv2"].optim.decay_all
    assert parsed.models["mobilenetv2"].schedule.milestones == (0.5, 0.75)
    assert (parsed.steps, parsed.seed, parsed.data_dir, parsed.output_dir) == (100, 3, "/d", "/o")
    assert parsed.method.transfers["to_mobilenetv2"].cycle == 2
    assert parsed.method.transfers["to_resnet50"].adapter.heads == 4
    assert chosen == Options(max_steps=5, control="transfer", compare=("none", "noise"), seeds=(0, 1, 2))


def test_a_variant_is_the_base_of_the_other_options() -> None:
    parsed, chosen = resolve("--variant=short", "--models.resnet50.optim.lr", "1")
    assert (parsed.name, parsed.steps, parsed.models["resnet50"].optim.lr) == ("short", 7, 1.0)
    assert chosen.variant == "short"
    assert chosen.control == parsed.method.control == "none"


@pytest.mark.parametrize("arguments", [["--control", "noise"], ["--method.control", "noise"]])
def test_control_is_the_methods(arguments: list[str]) -> None:
    parsed, chosen = resolve(*arguments)
    assert parsed.method.control == chosen.control == "noise"


def test_two_controls_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--control noise and --method.control frozen disagree: give --control"):
        resolve("--control", "noise", "--method.control", "frozen")


def test_a_zero_config_is_every_models() -> None:
    parsed, _ = resolve("--zero-config", "ds_configs/zero3.json")
    assert {model.zero for model in parsed.models.values()} == {"ds_configs/zero3.json"}


def test_the_data_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETERO_KT_DATA", "/sets")
    assert resolve()[0].data_dir == "/sets"
    assert resolve("--data-dir", "/own")[0].data_dir == "/own"


@pytest.mark.parametrize(
    "added", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"], ["--local-rank", "1"]]
)
def test_what_the_deepspeed_command_adds_is_dropped(added: list[str]) -> None:
    assert resolve(*added, "--steps", "9")[0].steps == 9
    assert resolve("--steps", "9", *added)[0].steps == 9


def test_one_function_is_a_variant_of_its_own() -> None:
    assert options.resolve(recipe, [])[0].name == "cifar"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stps", "3"], "--steps"),
        (["--models.resnet50.optim.lrr", "3"], "--models.resnet50.optim.lr"),
        (["--steps", "many"], "many"),
    ],
)
def test_what_tyro_refuses_is_shown_with_the_nearest(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        resolve(*arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "papr"], "--variant papr is unknown: use default or short."),
        (
            ["--control", "nois"],
            "--control nois is unknown: use noise, none, standardise, transfer, shuffled, frozen or sharing.",
        ),
        (
            ["--compare", "kd"],
            "--compare kd is unknown: use transfer, none, noise, shuffled, frozen, standardise or sharing.",
        ),
        (
            ["--models.resnet5.optim.lr", "1"],
            "--models.resnet5.optim.lr is about a model that recipe cifar does not have: use resnet50 or mobilenetv2.",
        ),
        (
            ["--data.cifar10.batch=3"],
            "--data.cifar10.batch is about a data entry that recipe cifar does not have: use cifar100.",
        ),
        (
            ["--method.transfers.to_resnet.rank", "2"],
            "--method.transfers.to_resnet.rank is about a transfer that recipe cifar does not have: "
            "use to_resnet50 or to_mobilenetv2.",
        ),
        (["--steps", "0"], "--steps 0 is too small: use 1 or more."),
        (
            ["--max-steps", "-1"],
            "--max-steps -1 is negative: give a number of steps, or 0 for the whole run.",
        ),
        (["--seeds", "1", "2", "1"], "--seeds names 1 twice: give every seed once."),
        (
            ["--resume", "nevr"],
            "--resume nevr is no folder: use auto, never or the path of a checkpoint.",
        ),
        (
            ["--resume", ".", "--seeds", "0", "1"],
            "--resume PATH continues one run: leave out --compare and --seeds, or use --resume auto.",
        ),
        (
            ["--zero-config", "ds_configs/zero4.json"],
            "--zero-config ds_configs/zero4.json does not exist: "
            "use ds_configs/zero0.json to zero3.json, or a file of your own.",
        ),
    ],
)
def test_bad_options_are_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve(*arguments)
    assert str(error.value) == message
    assert one_sentence(message)


# --- one rank speaks ---


def test_parse_prints_the_sentence_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        options.parse(VARIANTS, ["--steps", "0"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --steps 0 is too small: use 1 or more.\n"


def test_print_shows_the_recipe_that_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        options.parse(VARIANTS, ["--print", "--control", "noise", "--steps", "12"])
    assert stop.value.code == 0
    printed = config.from_yaml(capsys.readouterr().out)
    assert (printed.steps, printed.method.control) == (12, "noise")


@pytest.mark.parametrize("arguments", [["--help"], ["--print"], ["--steps", "0"], ["--stps", "1"], ["--variant", "x"]])
def test_other_ranks_end_alike_and_say_nothing(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as first:
        options.parse(VARIANTS, arguments)
    assert "".join(capsys.readouterr())
    waited: list[float] = []
    monkeypatch.setattr(options.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as other:
        options.parse(VARIANTS, arguments)
    assert other.value.code == first.value.code
    assert bool(waited) == bool(first.value.code)  # a starter ends all ranks at the first failure: the one that speaks
    assert "".join(capsys.readouterr()) == ""


def test_a_slurm_step_counts_as_ranks_and_a_batch_script_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    assert options.is_first_rank()
    resolve()
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert not options.is_first_rank()
    with pytest.raises(ValueError, match="divide over 3 ranks"):
        resolve()


def test_help_explains_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        options.parse(VARIANTS, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--max-steps" in text
    assert "--models.resnet50.optim.lr" in text
    assert "default, short" in text


def test_help_begins_with_the_launcher_s_own_text_an_entry_a_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = "What it trains, told\nin two lines.\n\nTable 1:  one \\\n  --two\nData:  a folder,\n       another\n"
    monkeypatch.setattr(sys.modules[__name__], "__doc__", about)
    for variants in (VARIANTS, {"partly": partial(recipe)}):
        with pytest.raises(SystemExit):
            options.parse(variants, ["--help"])
        lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
        start = lines.index("What it trains, told in two lines.")
        assert lines[start + 1 : start + 3] == ["Table 1: one --two", "Data: a folder, another"]
        assert lines[start + 3].startswith(f"cifar; variants: {next(iter(variants))}")


# --- checks ---


def both_write_one() -> Recipe:
    base = recipe()
    transfers = base.method.transfers
    same = replace(transfers["to_resnet50"], target=transfers["to_mobilenetv2"].target, rank=16)
    return replace(base, method=MergeNet({**transfers, "to_resnet50": same}))


def two_ranks_for_one() -> Recipe:
    base = recipe()
    back = Transfer("mobilenetv2:blocks.5.2.conv_pwl.weight", "resnet50:layer4.0.conv1.weight", rank=4)
    return replace(base, method=MergeNet({**base.method.transfers, "to_resnet50": back}))


def two_modes_for_one() -> Recipe:
    base = recipe()
    back = Transfer("mobilenetv2:blocks.5.2.conv_pwl.weight", "resnet50:layer4.0.conv1.weight", mode="full")
    return replace(base, method=MergeNet({**base.method.transfers, "to_resnet50": back}))


TO = "--method.transfers.to_mobilenetv2"


@pytest.mark.parametrize(
    ("wrong", "world", "message"),
    [
        (replace(recipe(), models={}), 1, "--models is empty: recipe cifar needs at least one model."),
        (
            replace(recipe(), method=replace(recipe().method, control="noises")),  # type: ignore[arg-type]
            1,
            "--control noises is unknown: use noise, none, standardise, transfer, shuffled, frozen or sharing.",
        ),
        (replace(recipe(), seed=-1), 1, "--seed -1 is too small: use 0 or more."),
        (replace(recipe(), log_every=0), 1, "--log-every 0 is too small: use 1 or more."),
        (replace(recipe(), keep=0), 1, "--keep 0 is too small: use 1 or more."),
        (with_data(batch=0), 1, "--data.cifar100.batch 0 is too small: use 1 or more."),
        (with_data(per_class=-1), 1, "--data.cifar100.per-class -1 is too small: use 0 or more."),
        (
            with_data(validation=1.0),
            1,
            "--data.cifar100.validation 1.0 is no fraction: use at least 0 and less than 1.",
        ),
        (
            with_data(batch=128),
            3,
            "--data.cifar100.batch 128 does not divide over 3 ranks: use 126, for example.",
        ),
        (with_data(batch=2), 4, "--data.cifar100.batch 2 does not divide over 4 ranks: use 4, for example."),
        (
            with_model(name="cifar:resnet5"),
            1,
            None,
        ),
        (
            with_model(data="cifar10"),
            1,
            "--models.resnet50.data cifar10 is no entry of the recipe's data: use cifar100.",
        ),
        (
            with_model(micro_batch=24),
            2,
            "--models.resnet50.micro-batch 24 does not divide a rank's 64 rows: use 16.",
        ),
        (
            with_model(micro_batch=200),
            2,
            "--models.resnet50.micro-batch 200 does not divide a rank's 64 rows: use 64.",
        ),
        (with_model(optim=Optim(lr=-1.0)), 1, "--models.resnet50.optim.lr -1.0 is negative: use 0 or more."),
        (
            with_model(optim=Optim(clip=float("inf"))),
            1,
            "--models.resnet50.optim.clip inf is not finite: use 0 or more.",
        ),
        (
            with_model(schedule=Schedule(milestones=(0.5, 60.0))),
            1,
            "--models.resnet50.schedule.milestones 0.5 60.0 are fractions of the run: use numbers from 0 to 1.",
        ),
        (
            with_model(pretrained=True, init="x.safetensors"),
            1,
            "--models.resnet50.pretrained and --models.resnet50.init both say where to start: give one of them.",
        ),
        (
            with_model(zero="ds_configs/zero0.json", precision="bf16"),
            1,
            "--models.resnet50.zero ds_configs/zero0.json is stage 0, which keeps no master copy of bf16 "
            "parameters: use ds_configs/zero1.json, or autocast as precision.",
        ),
        (
            with_transfer(source="resnet5:fc.weight"),
            1,
            f"{TO}.source resnet5:fc.weight names no model of the recipe: use resnet50 or mobilenetv2, "
            "as in resnet50:fc.weight.",
        ),
        (
            with_transfer(target="fc.weight"),
            1,
            f"{TO}.target 'fc.weight' is not of the form model:weight, as in resnet50:fc.weight.",
        ),
        (
            with_transfer(target="resnet50:fc.weight"),
            1,
            f"{TO} reads and writes the same weight resnet50:fc.weight: name another source or target.",
        ),
        (with_transfer(cycle=0), 1, f"{TO}.cycle 0 is too small: use 1 or more."),
        (with_transfer(rank=0), 1, f"{TO}.rank 0 is too small: use 1 or more."),
        (with_transfer(source_rank=-1), 1, f"{TO}.source-rank -1 is too small: use 0 or more."),
        (
            with_transfer(reads="change", mode="svd"),
            1,
            f"{TO}.reads change needs {TO}.mode factor or full: svd is another basis each time.",
        ),
        (
            with_transfer(adapter=AdapterConfig(layers=0)),
            1,
            f"{TO}.adapter.layers 0 is too small: use 1 or more.",
        ),
        (
            with_transfer(adapter=AdapterConfig(heads=0)),
            1,
            f"{TO}.adapter.heads 0 is too small: use 1 or more.",
        ),
        (
            with_transfer(adapter=AdapterConfig(gate=1.0)),
            1,
            f"{TO}.adapter.gate 1.0 is outside what a tanh reaches: use more than -1 and less than 1.",
        ),
        (
            both_write_one(),
            1,
            "--method.transfers.to_resnet50.target mobilenetv2:blocks.5.2.conv_pwl.weight is already the "
            "target of to_mobilenetv2: give each transfer a target of its own.",
        ),
        (
            two_ranks_for_one(),
            1,
            "--method.transfers.to_resnet50 takes mobilenetv2:blocks.5.2.conv_pwl.weight factorised at rank "
            "4 and to_mobilenetv2 takes it factorised at rank 16: give both the same mode and rank.",
        ),
        (
            two_modes_for_one(),
            1,
            "--method.transfers.to_resnet50 takes mobilenetv2:blocks.5.2.conv_pwl.weight unfactorised and "
            "to_mobilenetv2 takes it factorised at rank 16: give both the same mode and rank.",
        ),
    ],
)
def test_wrong_recipes_are_one_sentence(wrong: Recipe, world: int, message: str | None) -> None:
    with pytest.raises(ValueError) as error:
        checks.check(wrong, world)
    assert one_sentence(str(error.value))
    if message is None:
        assert str(error.value).startswith("--models.resnet50.name cifar:resnet5 is no model: use cifar:resnet")
    else:
        assert str(error.value) == message


def distilled(student: str = "student", teachers: tuple[str, ...] = ("teacher",), **method: Any) -> Recipe:
    models = {student: Model("cifar:resnet_tiny", "d")}
    known = {name: Teacher("cifar:vit_tiny") for name in teachers}
    return Recipe("pair", models, {"d": Data("generated")}, Distill(known, **method), steps=4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (with_model(optim=Optim("adam")), "--models.resnet50.optim.name adam is unknown: use one of sgd, adamw."),  # type: ignore[arg-type]
        (with_transfer(update="exakt"), f"{TO}.update exakt is unknown: use one of lookahead, exact, none."),
        (with_transfer(mode="facto"), f"{TO}.mode facto is unknown: use one of factor, full, svd."),
        (
            replace(recipe(), data={"cifar100": Data(augment=("crop", "blur"))}),  # type: ignore[arg-type]
            "--data.cifar100.augment blur is unknown: use one of crop, flip, rotate.",
        ),
    ],
)
def test_a_recipe_of_ones_own_cannot_misspell_a_choice(wrong: Recipe, said: str) -> None:
    """The command line compares with the annotations, Python does not: adam would train as adamw."""
    with pytest.raises(ValueError) as error:
        checks.check(wrong)
    assert str(error.value) == said


@pytest.mark.parametrize("value", [-1.0, float("nan")])
@pytest.mark.parametrize("field", ["lr", "momentum", "weight_decay", "clip", "gamma", "warmup_lr", "min_lr"])
def test_rates_are_neither_negative_nor_nan(field: str, value: float) -> None:
    kind: Any = Optim if hasattr(Optim(), field) else Schedule
    part = kind.__name__.lower()
    problem = "negative" if value < 0 else "no number"
    changes = {part: kind(**{field: value})}
    for option, wrong in (("--models.resnet50", with_model(**changes)), (TO, with_transfer(**changes))):
        with pytest.raises(ValueError) as error:
            checks.check(wrong)
        assert str(error.value) == f"{option}.{part}.{field.replace('_', '-')} {value} is {problem}: use 0 or more."


@pytest.mark.parametrize("value", [-1.0, float("nan")])
@pytest.mark.parametrize(
    ("option", "settings", "mend"),
    [
        ("kd.temperature", config.KD, "use 1, for example"),
        ("kd.weight", config.KD, "use 0 or more"),
        ("ofa.gamma", config.OFA, "use 1, for example"),
        ("ofa.weight", config.OFA, "use 0 or more"),
        ("fitnet.weight", config.FitNet, "use 0 or more"),
        ("fbt.gamma", config.FBT, "use 1, for example"),
    ],
)
def test_settings_of_objectives_are_neither_negative_nor_nan(
    option: str, settings: Any, mend: str, value: float
) -> None:
    part, field = option.split(".")
    with pytest.raises(ValueError) as error:
        checks.check(distilled(**{part: settings(**{field: value})}))
    assert str(error.value).startswith(f"--method.{option} {value} is ")
    assert str(error.value).endswith(f": {mend}.")
    assert one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (distilled("fused"), "--models.fused"),
        (distilled("branches", objective="ofa"), "--models.branches"),
        (distilled("projections", objective="fitnet"), "--models.projections"),
        (distilled("fused_x", ("x", "y")), "--models.fused_x"),
        (distilled(teachers=("x", "fused_x")), "--method.teachers.fused_x"),
        (distilled(teachers=("fused_x", "x")), "--method.teachers.fused_x"),
        (distilled(teachers=("fused",)), "--method.teachers.fused"),
    ],
)
def test_names_that_would_be_logged_twice_are_refused(wrong: Recipe, named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named}: .* another name") as error:
        checks.check(wrong)
    assert one_sentence(str(error.value))


def test_a_warm_up_fits_into_what_its_model_trains_for() -> None:
    schedule = Schedule("cosine", warmup=7)
    checks.check(replace(with_model(schedule=schedule), steps=7))
    for wrong, budget in (
        (replace(with_model(schedule=schedule), steps=6), 6),
        (with_model(schedule=schedule, steps=5), 5),
    ):
        with pytest.raises(ValueError) as error:
            checks.check(wrong)
        assert str(error.value) == (
            f"--models.resnet50.schedule.warmup 7 is longer than the {budget} steps that it trains for: "
            "use fewer, or 0."
        )
    with pytest.raises(ValueError, match=r"^--models.resnet50.schedule.warmup -1 is too small: use 0 or more\.$"):
        checks.check(with_model(schedule=Schedule(warmup=-1)))


def test_good_recipes_pass() -> None:
    checks.check(distilled(teachers=("x", "y")))
    checks.check(recipe(), world=4)
    checks.check(with_model(micro_batch=32), world=2)
    checks.check(with_model(zero="ds_configs/zero0.json", precision="autocast"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shipped_zero_files_hold_the_block_alone(stage: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # relative paths are found beside the package too
    assert checks.zero_block(f"ds_configs/zero{stage}.json")["stage"] == stage


def test_a_block_may_stand_under_its_name(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    assert checks.zero_block(str(file)) == {"stage": 3, "stage3_param_persistence_threshold": 0}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            '{"zero_optimization": {"stage": 1}, "train_batch_size": 8}',
            "holds train_batch_size, which is not part of the zero_optimization block: set it with --data.NAME.batch.",
        ),
        (
            '{"stage": 1, "bf16": {"enabled": true}}',
            "holds bf16, which is not part of the zero_optimization block: set it with --models.NAME.precision.",
        ),
        (
            '{"zero_optimization": {"stage": 1}, "flops_profiler": {}}',
            "holds flops_profiler, which is not part of the zero_optimization block: take it out.",
        ),
        ('{"overlap_comm": true}', "needs a stage from 0 to 3, as ds_configs/zero0.json to zero3.json have."),
        ('{"stage": 4}', "needs a stage from 0 to 3, as ds_configs/zero0.json to zero3.json have."),
        ('{"stage": true}', "needs a stage from 0 to 3, as ds_configs/zero0.json to zero3.json have."),
        (
            '{"zero_optimization": 2}',
            "needs a stage from 0 to 3, as ds_configs/zero0.json to zero3.json have.",
        ),
        (
            "[1]",
            "holds no JSON object: write a zero_optimization block as ds_configs/zero0.json to zero3.json do.",
        ),
    ],
)
def test_zero_files_that_hold_something_else(content: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(content)
    with pytest.raises(ValueError) as error:
        checks.zero_block(str(file))
    assert str(error.value) == f"--zero-config {file} {problem}"


def test_a_zero_file_that_is_not_json(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"stage": 1,}')
    with pytest.raises(ValueError, match=r"is not JSON \(.*\): mend it, or use ds_configs/zero0.json to zero3.json\.$"):
        checks.zero_block(str(file))


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (
            {"stage": 2, "reduce_bucket_sise": 1000, "stage3_prefetch_bucket_size": 15099494.4},
            "holds reduce_bucket_sise, which is no key of a zero_optimization block: use reduce_bucket_size; "
            "has stage3_prefetch_bucket_size 15099494.4, which is no whole number: use 15099494.",
        ),
        ({"stage": 1, "xyz": 1}, "holds xyz, which is no key of a zero_optimization block: take it out."),
        (
            {"stage": 1, "allgather_bucket_size": -5},
            "has allgather_bucket_size -5, which should be greater than or equal to 0: mend it.",
        ),
        ({"stage": 1, "reduce_bucket_size": "500"}, 'has reduce_bucket_size "500", which is no number: use 500.'),
        ({"stage": 1, "reduce_bucket_size": True}, "has reduce_bucket_size true, which is no number: use 1."),
        ({"stage": 1, "overlap_comm": "no"}, 'has overlap_comm "no", which is neither true nor false: use false.'),
        ({"stage": 1, "cpu_offload": True}, "holds cpu_offload, which is deprecated: use offload_optimizer."),
        (
            {"stage": 2, "offload_optimizer": {"device": "gpu"}},
            'has offload_optimizer.device "gpu", which no ZeRO knows: use none or cpu.',
        ),
        (
            {"stage": 3, "offload_param": {"device": "cpu", "pin_memry": True}},
            "holds offload_param.pin_memry, which is no key of offload_param: use pin_memory.",
        ),
        (
            {"stage": 3, "offload_param": {"device": "auto"}},
            'has offload_param.device "auto", which nothing resolves: write a value, or take it out.',
        ),
        ({"stage": 3, "offload_param": "cpu"}, "is refused by DeepSpeed (offload_param is no object): mend it."),
        (
            {"stage": 2, "offload_param": {"device": "cpu"}},
            "has offload_param, which stage 2 passes over: use stage 3 or higher, or take it out.",
        ),
        (
            {"stage": 0, "offload_optimizer": {"device": "cpu"}},
            "has offload_optimizer, which stage 0 passes over: use stage 1 or higher, or take it out.",
        ),
        (
            {"stage": 3, "compute_grad_norm": False},
            "is refused by DeepSpeed (compute_grad_norm=false is supported only with ZeRO Stage 1 or 2): mend it.",
        ),
        (
            {"stage": 1, "compute_grad_norm": False, "offload_optimizer": {"device": "cpu"}},
            "has compute_grad_norm false beside offload_optimizer, which DeepSpeed refuses: take one out.",
        ),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            "holds offload_optimizer.ratio, which replaces the optimizers by DeepSpeed's own: take it out.",
        ),
        ({"stage": 1, "legacy_stage1": True}, "holds legacy_stage1, which no DeepSpeed of today has: take it out."),
        (
            {"stage": 3, "zero_hpz_partition_size": 2},
            "holds zero_hpz_partition_size, which keeps further copies of weights, which no transfer and no checkpoint "
            "reaches: take it out.",
        ),
        (
            {"stage": 3, "prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2},
            "holds prefetch_bucket_size and stage3_prefetch_bucket_size, which are one key: take one out.",
        ),
    ],
)
def test_what_deepspeed_would_refuse_or_pass_over_is_said_before_the_start(
    block: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": block}))
    with pytest.raises(ValueError) as error:
        checks.zero_block(str(file))
    assert str(error.value) == f"--zero-config {file} {problem}"
    with pytest.raises(ValueError, match=r"^--models\.resnet50\.zero "):
        checks.check(with_model(zero=str(file)))


@pytest.mark.parametrize(
    ("block", "read"),
    [
        ({"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "overlap_comm": "auto"}, {}),
        ({"reduce_bucket_size": 5e8, "overlap_comm": None}, {"reduce_bucket_size": 500_000_000}),
        ({"offload_param": None, "offload_optimizer": {"device": "none"}}, {}),
        ({"offload_param": {}}, {}),
        ({"prefetch_bucket_size": 7}, {"stage3_prefetch_bucket_size": 7}),
        ({"offload_param": {"device": "cpu"}}, {"offload_param": {"device": "cpu"}}),
        ({"zero_hpz_partition_size": 1}, {"zero_hpz_partition_size": 1}),
    ],
)
def test_a_block_is_taken_as_deepspeed_reads_it(block: dict[str, Any], read: dict[str, Any], tmp_path: Path) -> None:
    """By a plan too: both take what `zero_block` gives."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"stage": 3, **block}))
    found = checks.zero_block(str(file))
    assert found == {"stage": 3, **read}
    ours, theirs = (DeepSpeedZeroConfig(**one).model_dump(mode="json") for one in (found, {"stage": 3, **block}))
    for one in (ours, theirs):  # "none" and nothing at all are the same to its engine
        for part in ("offload_param", "offload_optimizer"):
            one[part] = one[part] if (one[part] or {}).get("device", "none") != "none" else None
    assert ours == theirs


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"stage": 1, "stage": 3}', "stage is given twice"),
        ('{"stage": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}", "it is nested too deep"),
    ],
)
def test_a_zero_file_that_json_alone_would_take_or_break_at(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"is not JSON \({problem}\): mend it, or use"):
        checks.zero_block(str(file))


def test_a_block_without_a_norm_does_not_go_with_clipping(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"stage": 1, "compute_grad_norm": False}))
    checks.check(with_model(zero=str(file)))
    with pytest.raises(
        ValueError, match=r"has compute_grad_norm false, and --models\.resnet50\.optim\.clip 1\.0 needs"
    ):
        checks.check(with_model(zero=str(file), optim=Optim(clip=1.0)))


# --- runs of one start ---


def test_runs_are_controls_times_seeds() -> None:
    chosen = Options(compare=("none", "noise", "transfer"), seeds=(0, 5))
    made = [(one.seed, one.method.control) for one in options.runs(recipe(), chosen)]
    each = ["transfer", "none", "noise"]
    assert made == [(seed, control) for seed in (0, 5) for control in each]
    assert options.runs(recipe(), Options()) == [recipe()]


# --- debug ---


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shrunk_recipes_are_valid_on_any_number_of_ranks(world: int) -> None:
    small = debug.shrink(with_model(micro_batch=32), world)
    checks.check(small, world)
    assert small.steps == 4
    assert small.name == "cifar_debug"
    assert {model.name for model in small.models.values()} == {"cifar:resnet_tiny", "cifar:mobilenetv2_tiny"}
    assert {data.name for data in small.data.values()} == {"generated"}
    assert 8 <= small.data["cifar100"].batch < 8 + world
    assert max(t.rank for t in small.method.transfers.values()) <= 4


def test_shrunk_transfers_name_weights_that_exist() -> None:
    from hetero_kt.models import build
    from hetero_kt.nn.reencode import find_weight

    small = debug.shrink(recipe())
    for transfer in small.method.transfers.values():
        for site in (transfer.source, transfer.target):
            model, weight = checks.split_site(site)
            ref = find_weight(build(small.models[model].name, 10), weight)
            assert min(ref.shape) >= transfer.rank
    to = small.method.transfers
    assert to["to_mobilenetv2"].source == "resnet50:fc.weight"
    assert to["to_mobilenetv2"].target.endswith("conv_pwl.weight")
    assert to["to_resnet50"].target == "resnet50:layer4.0.conv1.weight"


def test_two_targets_stay_two_when_shrunk() -> None:
    base = recipe()
    self_transfers = {
        f"to_{block}": Transfer("mobilenetv2:classifier.weight", f"mobilenetv2:blocks.{block}.conv_pwl.weight")
        for block in ("5.2", "5.1", "1.1")
    }
    small = debug.shrink(replace(base, method=MergeNet(self_transfers)))
    assert len({transfer.target for transfer in small.method.transfers.values()}) == 3
    checks.check(small)


def test_debug_only_makes_smaller_and_never_resumes() -> None:
    parsed, chosen = resolve("--debug", "--steps", "2", "--models.resnet50.pretrained")
    assert parsed.steps == 2
    assert not parsed.models["resnet50"].pretrained
    assert chosen.resume == "never"
    assert resolve("--debug", "--steps", "1000")[0].steps == 4


def test_a_model_without_a_tiny_form_keeps_its_name() -> None:
    base = with_model(name="timm:regnety_004")
    assert debug.shrink(base).models["resnet50"].name == "timm:regnety_004"


# --- YAML ---

names = st.text(min_size=1, max_size=8)
numbers = st.floats(allow_nan=False, width=64)
optims = st.builds(
    Optim,
    name=st.sampled_from(["sgd", "adamw"]),
    lr=numbers,
    momentum=numbers,
    weight_decay=numbers,
    decay_all=st.booleans(),
    clip=numbers,
)
schedules = st.builds(Schedule, milestones=st.lists(numbers, max_size=3).map(tuple), warmup=st.integers())
made_models = st.builds(Model, name=names, data=names, init=st.text(), optim=optims, schedule=schedules)
made_data = st.builds(Data, batch=st.integers(), augment=st.lists(st.sampled_from(["crop", "flip"])).map(tuple))
made_transfers = st.builds(
    Transfer,
    source=names,
    target=names,
    mode=st.sampled_from(["factor", "full", "svd"]),
    adapter=st.builds(
        AdapterConfig, kind=st.sampled_from(["lpka", "mlp"]), joint=st.booleans(), gate=numbers | st.just("auto")
    ),
    optim=optims,
)
made_recipes = st.builds(
    Recipe,
    name=st.text(),
    models=st.dictionaries(names, made_models, max_size=2),
    data=st.dictionaries(names, made_data, max_size=2),
    method=st.builds(MergeNet, transfers=st.dictionaries(names, made_transfers, max_size=2)),
    steps=st.integers(),
    data_dir=st.text(),
)


@settings(max_examples=40, deadline=None)
@given(made_recipes)
def test_yaml_loses_nothing(made: Recipe) -> None:
    again = config.from_yaml(config.to_yaml(made))
    assert again == made
    assert config.differences(again, made) == []


def test_yaml_written_by_hand_may_leave_out_defaults_and_write_1e_3() -> None:
    text = """
name: mine
models: {a: {name: 'cifar:resnet_tiny', data: d, optim: {lr: 1e-3}}}
data: {d: {batch: 8}}
method: {transfers: {}}
steps: 3
"""
    made = config.from_yaml(text)
    assert made.models["a"].optim == Optim(lr=1e-3)
    assert made.data == {"d": Data(batch=8)}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 400", "stepz: 400", "recipe.yaml: stepz is no field: use steps"),
        ("steps: 400", "", "recipe.yaml: steps is missing: add it."),
        ("steps: 400", "steps: many", "recipe.yaml: steps is 'many', not int."),
        ("steps: 400", "steps: true", "recipe.yaml: steps is True, not int."),
        ("lr: 0.1", "lr: fast", "recipe.yaml: models.resnet50.optim.lr is 'fast', not float."),
        ("control: transfer", "control: x", "recipe.yaml: method.control is 'x', not one of transfer, none"),
        ("steps: 400", "steps: [", "recipe.yaml cannot be read (it is not YAML"),
    ],
)
def test_yaml_that_is_no_recipe(old: str, new: str, message: str) -> None:
    text = config.to_yaml(recipe())
    assert old in text
    with pytest.raises(ValueError) as error:
        config.from_yaml(text.replace(old, new, 1))
    assert str(error.value).startswith(message)


def test_empty_yaml() -> None:
    with pytest.raises(ValueError, match="the file is None, not a mapping of Recipe's fields"):
        config.from_yaml("")


def test_differences_name_fields_that_decide_numbers() -> None:
    other = replace(with_model(optim=Optim(lr=0.2)), output_dir="x", keep=9, eval_every=5, data_dir="y", log_every=3)
    assert config.differences(recipe(), other) == ["models.resnet50.optim.lr"]
    fewer = replace(recipe(), method=MergeNet({}), steps=1)
    assert "method.transfers.to_resnet50.rank" in config.differences(recipe(), fewer)
    assert "steps" in config.differences(fewer, recipe())


@pytest.mark.parametrize("part", ["offload_param", "offload_optimizer"])
def test_what_no_checkpoint_reaches_is_refused(tmp_path: Path, part: str) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"stage": 3, part: {"device": "nvme", "nvme_path": "/local"}}))
    made = recipe()
    away = replace(made, models={name: replace(model, zero=str(file)) for name, model in made.models.items()})
    with pytest.raises(ValueError, match=rf"--models\.resnet50\.zero .* has {part} on nvme.*: use cpu"):
        checks.check(away, 1)
