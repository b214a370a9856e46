"""The papers' tables: every command trains something, what has run is found, and what cannot count is named."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hetero_kt import cli, report, shipped, tables
from hetero_kt.config import Distill, Recipe, differences, to_yaml
from hetero_kt.folder import run_folder
from hetero_kt.report import runs as folders
from hetero_kt.report import text as forms
from hetero_kt.report.comparison import Cell
from hetero_kt.tables import runs, show, start

NAMES = tables.names()
resolved = cache(tables.resolved)
"""A tenth of a second each, so each command once."""


def commands(table: tables.Table) -> Iterator[tuple[str, tables.Command]]:
    """Each once, without those of controls, which differ from their row's in one word."""
    controls = {row.label for row in table.rows if not row.published and ": " in row.label}
    given = {
        f"{row.label} [{b}]": c for row in table.rows if row.label not in controls for b, c in row.commands.items()
    }
    yield from {str(command): (name, command) for name, command in {**table.before, **given}.items()}.values()


def test_every_published_table_is_there() -> None:
    mergenet = [*(f"mergenet-{i}" for i in range(1, 8)), "mergenet-fig3"]
    fbt = [*(f"fbt-{i}" for i in (1, 2, 4)), *(f"fbt-appendix-{i}" for i in range(2, 7))]
    assert sorted([*mergenet, *fbt, "positive-control"]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_a_recipe_that_passes_the_checks(name: str) -> None:
    table = tables.read(name)
    for where, command in commands(table):
        one = resolved(command)
        assert one.recipe.models, where
        if where in table.before:
            assert one.recipe.name == where, "a run that others name has that name"


@pytest.mark.parametrize("name", NAMES)
def test_every_row_reads_a_model_that_its_command_trains(name: str) -> None:
    table = tables.read(name)
    for row in table.rows:
        for budget, command in row.commands.items():
            if budget == "paper" or not row.published:
                continue
            assert row.models[budget] in resolved(command).recipe.models, f"{row.label} [{budget}]"


def test_rows_that_share_a_folder_train_the_same() -> None:
    """Of all tables: two recipes of one name and arm would be in each other's way."""
    seen: dict[Path, Recipe] = {}
    for name in NAMES:
        for where, command in commands(tables.read(name)):
            one = resolved(command)
            if not one.options.plan:
                first = seen.setdefault(one.folder(0), one.recipe)
                assert not differences(first, one.recipe), f"{name}: {where}"


@pytest.mark.parametrize("name", ["mergenet-1", "mergenet-5", "mergenet-7", "mergenet-fig3", "fbt-1", "fbt-appendix-4"])
@pytest.mark.parametrize("budget", tables.BUDGETS)
def test_a_row_and_its_baseline_train_the_same_model_alike(name: str, budget: tables.Budget) -> None:
    table = tables.read(name)
    for row in table.rows:
        if not row.baseline or not row.published or budget not in row.commands:
            continue
        base = table.row(row.baseline)
        ours, theirs = (training(one, budget) for one in (row, base))
        assert ours == theirs, f"{row.label} [{budget}]"


@pytest.mark.parametrize("name", ["fbt-1", "fbt-2", "fbt-4"])
def test_a_temperature_that_budgets_do_not_share_is_said(name: str) -> None:
    table = tables.read(name)
    given = {
        resolved(command).recipe.method.kd.temperature  # type: ignore[union-attr]
        for row in table.rows
        for command in row.commands.values()
        if "kd" in command.options and "--method" in command.options
    }
    assert len(given) < 2 or any("temperature" in note for note in table.notes)


def training(row: tables.Row, budget: tables.Budget) -> tuple[Any, ...]:
    recipe = resolved(row.commands[budget]).recipe
    model = recipe.models[row.models[budget]]
    data = recipe.data[model.data]
    return replace(model, data="", micro_batch=0), replace(data, workers=0), recipe.budget(row.models[budget])


@pytest.mark.parametrize("name", NAMES)
def test_what_a_command_starts_from_is_trained_before(name: str) -> None:
    table = tables.read(name)
    for where, command in commands(table):
        one = resolved(command)
        method = one.recipe.method
        inits = [model.init for model in one.recipe.models.values()]
        if isinstance(method, Distill) and method.taught:
            inits += [teacher.init for teacher in method.teachers.values()]
        made = {recipe.name for recipe in one.before}
        made |= {resolved(earlier).recipe.name for earlier in table.needed(command)}
        needed = {init.removeprefix("run:") for init in inits if init.startswith("run:")}
        assert needed <= made or one.options.plan, where


def test_numbers_as_published() -> None:
    """Spot checks against the papers, one per table."""
    for name, label, published in (
        ("mergenet-1", "MobileNetV2, R <-> M", {"top1": 66.51, "top5": 89.75}),
        ("mergenet-1", "ResNet50, NKD", {"top1": 69.27, "top5": 90.18}),
        ("mergenet-2", "VQA, V -> T", {"overall": 46.33, "other": 33.29, "number": 31.33}),
        ("mergenet-2", "Retrieval, T -> V", {"tr10": 44.58, "ir10": 38.93}),
        ("mergenet-3", "IMDb, DistilBERT with BERT", {"error": 7.5}),
        ("mergenet-4", "SQuAD v2, BERT with MobileNetV2", {"exact": 71.49, "f1": 74.85}),
        ("mergenet-5", "USKD", {"top1": 65.66, "top5": 86.61}),
        ("mergenet-6", "layer 12 -> layer 3", {"exact": 54.77, "f1": 58.5}),
        ("mergenet-7", "ResNet50, average attention", {"top1": 69.66}),
        ("mergenet-fig3", "cycle 2", {"top1": 65.61}),
        ("fbt-1", "ViT-S -> MobileNetV2, CRD", {"top1": 78.14}),
        ("fbt-2", "ConvNeXt-T -> DeiT-T, FBT", {"top1": 75.26}),
        ("fbt-4", "Swin-T -> ResNet18, C: teacher does not teach the fused model", {"top1": 25.57}),
        ("fbt-appendix-2", "ViT-S -> ResNet18, FCFD", {"top1": 53.58}),
        ("fbt-appendix-3", "E: both, fused", {"top1": 81.24}),
        ("fbt-appendix-4", "last stage, pooled", {"top1": 76.79}),
        ("fbt-appendix-5", "ConvNeXt-T -> Swin-P, ViT block", {"top1": 80.72}),
        ("fbt-appendix-6", "ResMLP-S12, FBT adds", {"parameters": 1.48, "flops": 0.29}),
    ):
        assert tables.read(name).row(label).published == published


ROW = """
title: t
metrics: [top1]
rows:
  - label: a
    model: student
    cpu: cifar_distill --variant digits --method kd
    gpu: {missing: too large}
    paper: {missing: too large}
"""


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("label: a", "label: a\n    publisht: {top1: 1}", "publisht is no field: use published"),
        ("label: a", "label: a\n    published: {top2: 1}", "top2 is no column: use top1"),
        ("label: a", "label: a\n    published: {top1: yes}", "published top1 is True, which is no number"),
        ("label: a", "label: a\n    baseline: b", "baseline 'b' is no row: use a"),
        ("cpu: cifar_distill --variant digits --method kd", "cpu: {missing: ''}", "use a command, or {missing: why}"),
        ("cpu: cifar_distill", "cpu: '{nothing}'\n    model: x #", "cannot be read"),
        ("cpu: cifar_distill", "cpu: --variant #", "begins with no launcher"),
        ("cpu: cifar_distill", "cpu: '{paper} --steps 5' #", "'{paper} --steps 5' cannot be read"),
        ("paper: {missing: too large}", "paper: '{nothing}'", "'{nothing}' cannot be read"),
        ("    model: student\n", "", "model is missing"),
        ("title: t", "title: [", "is not YAML"),
    ],
)
def test_a_table_that_is_wrong_is_refused_by_name(before: str, after: str, said: str) -> None:
    with pytest.raises(ValueError, match="table x") as error:
        tables.parse("x", ROW.replace(before, after))
    assert said in str(error.value)


def test_a_command_may_build_on_its_row_s_own_of_paper() -> None:
    text = ROW.replace("paper: {missing: too large}", "paper: '{shared} --method kd --name a b'")
    text = text.replace("gpu: {missing: too large}", "gpu: '{paper} --steps 5 --name c'")
    row = tables.parse("x", text.replace("rows:", "common: {shared: cifar_distill --variant digits}\nrows:")).row("a")
    assert row.commands["paper"].options == ("--variant", "digits", "--method", "kd", "--name", "a", "b")
    assert row.commands["gpu"].options == (*row.commands["paper"].options, "--steps", "5", "--name", "c")


def test_two_rows_of_one_label() -> None:
    again = ROW + ROW[ROW.index("  - label") :]
    with pytest.raises(ValueError, match="two rows 'a'"):
        tables.parse("x", again)


def test_unknown_tables_launchers_and_options() -> None:
    with pytest.raises(ValueError, match="table mergenet-8 does not exist: use mergenet-"):
        tables.read("mergenet-8")
    with pytest.raises(ValueError, match="launcher cifar_mergenett does not exist: use cifar_mergenet"):
        tables.resolved(tables.Command("cifar_mergenett", ()))
    with pytest.raises(ValueError, match="is not understood"):
        tables.resolved(tables.Command("cifar_mergenet", ("--no-such-option",)))


# --- what has run ---

TABLE = """
title: made up
metrics: [top1]
before: {digits_distill_teacher: cifar_distill --variant digits_teacher}
rows:
  - label: alone
    published: {top1: 50}
    model: student
    cpu: cifar_distill --variant digits --method none --teacher run:digits_distill_teacher
    gpu: {missing: too large}
    paper: {missing: too large}
  - label: KD
    published: {top1: 53}
    baseline: alone
    model: student
    cpu: cifar_distill --variant digits --method kd --teacher run:digits_distill_teacher
    gpu: {missing: too large}
    paper: {missing: too large}
"""
DATA = {"data": {"pictures": [{"samples": 50, "labels": 1}, {"samples": 359, "labels": 2}]}}


@pytest.fixture
def made() -> tables.Table:
    return tables.parse("made", TABLE)


def write(root: Path, label: str, seed: int, top1: float, data: Any = DATA, **changes: Any) -> Path:
    command = tables.parse("made", TABLE).row(label).commands["cpu"]
    return write_run(root, command, "student", seed, top1, data, **changes)


def write_run(
    root: Path, command: tables.Command, model: str, seed: int, top1: float, data: Any = DATA, **changes: Any
) -> Path:
    recipe = replace(resolved(command).recipe, output_dir=str(root), seed=seed, **changes)
    folder = run_folder(recipe)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / "data.json").write_text(json.dumps(data))
    result = {"recipe": recipe.name, "control": recipe.method.arm, "seed": seed, "steps": recipe.steps}
    (folder / "result.json").write_text(json.dumps({**result, "metrics": {model: {"top1": top1}}}))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """alone: 50, 52, 54; KD: 53, 53, 59."""
    for seed, (alone, kd) in enumerate([(50, 53), (52, 53), (54, 59)]):
        write(tmp_path, "alone", seed, alone)
        write(tmp_path, "KD", seed, kd)
    return tmp_path


def filled(table: tables.Table, *roots: Path, seeds: int = 3) -> tuple[dict[str, runs.Line], list[str]]:
    lines, notes = runs.fill(table, "cpu", range(seeds), folders.find(roots), "--output-dir", str(roots[0]))
    return {line.row.label: line for line in lines}, notes


def test_runs_of_a_row_and_its_difference(made: tables.Table, root: Path) -> None:
    lines, notes = filled(made, root)
    alone, kd = lines["alone"].cells["top1"], lines["KD"].cells["top1"]
    assert notes == []
    assert alone.ours is not None
    assert kd.ours is not None
    assert kd.difference is not None
    assert (alone.ours.mean, alone.ours.n, alone.difference) == (52, 3, None)
    assert kd.difference.mean == pytest.approx(3)
    assert kd.difference.low == pytest.approx(3 - 4.30265 * 2 / 3**0.5, abs=1e-3)  # t at 2 degrees of freedom
    assert lines["KD"].missing(range(5)) == [3, 4]


def test_other_seeds_are_left_alone(made: tables.Table, root: Path) -> None:
    lines, notes = filled(made, root, seeds=2)
    assert list(lines["KD"].runs) == [0, 1]
    assert notes == []


def test_what_has_not_run_is_empty(made: tables.Table, tmp_path: Path) -> None:
    lines, notes = filled(made, tmp_path / "nothing")
    assert notes == []
    assert all((cell.ours, cell.difference) == (None, None) for line in lines.values() for cell in line.cells.values())
    assert lines["KD"].cells["top1"] == Cell(published=53, published_difference=3)
    assert "| KD | top-1 (%) | 53.00 (+3.00) |  |  |  |" in forms.markdown(
        [show.sheet(made, "cpu", list(lines.values()))]
    )


def test_a_run_of_another_recipe_stays_apart(made: tables.Table, root: Path) -> None:
    other = write(root, "KD", 3, 99, steps=320)
    lines, notes = filled(made, root, seeds=5)
    assert list(lines["KD"].runs) == [0, 1, 2]
    assert notes == [f"{other} is of another recipe, which differs in steps: it stays apart."]


def test_a_row_on_other_ranks_than_its_baseline_is_named_once(made: tables.Table, root: Path) -> None:
    for folder in root.glob("*/kd/seed*"):
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(result | {"world_size": 2}))
    assert filled(made, root)[1] == []  # of the baseline nothing is known
    for file in root.glob("*/none/seed*/result.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"world_size": 1}))
    lines, (note,) = filled(made, root)
    assert note.startswith("KD ran with a world size of 2 and alone with 1: the difference counts")
    assert lines["KD"].cells["top1"].difference is not None


def test_two_runs_of_one_seed_count_neither(made: tables.Table, root: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "elsewhere", "KD", 1, 99)
    lines, notes = filled(made, root)
    assert list(lines["KD"].runs) == [0, 2]
    assert len(notes) == 1
    assert str(again) in notes[0]
    assert "both have seed 1: neither counts" in notes[0]


def test_a_folder_named_twice_counts_once(made: tables.Table, root: Path) -> None:
    lines, notes = filled(made, root, root / "digits_distill")
    assert list(lines["KD"].runs) == [0, 1, 2]
    assert notes == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("result.json", '{"recipe": "digits_distill", "cont', "has a result.json that cannot be read"),
        ("result.json", '{"recipe": "digits_distill"}', "has a result.json that cannot be read"),
        ("result.json", None, "is not finished"),
        ("data.json", "{", "has a data.json that cannot be read"),
        ("recipe.yaml", None, "has no recipe.yaml"),
        ("recipe.yaml", "name: [", "has a recipe.yaml that cannot be read"),
    ],
)
def test_a_damaged_run_is_named_and_left_out(
    made: tables.Table, root: Path, name: str, text: str | None, said: str
) -> None:
    folder = root / "digits_distill" / "kd" / "seed1"
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    lines, notes = filled(made, root)
    assert list(lines["KD"].runs) == [0, 2]
    assert len(notes) == 1
    assert str(folder) in notes[0]
    assert said in notes[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 4}, "was cut short, at 4 of 160 steps"),
        ({"seed": 7}, "has a result.json of another run than its recipe.yaml"),
        ({"metrics": {"student": {"top1": float("nan")}}}, "has nan as top1 of student"),
    ],
)
def test_a_result_that_says_something_else_is_left_out(
    made: tables.Table, root: Path, change: dict[str, Any], said: str
) -> None:
    path = root / "digits_distill" / "kd" / "seed1" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    lines, notes = filled(made, root)
    cell = lines["KD"].cells["top1"]
    assert cell.ours is not None
    assert (cell.ours.n, cell.ours.mean) == (2, 56)
    assert len(notes) == 1
    assert said in notes[0]


def test_runs_on_other_samples_stay_apart(made: tables.Table, root: Path) -> None:
    other = {"data": {"pictures": [{"samples": 60}, {"samples": 359, "labels": 2}]}}
    write(root, "KD", 3, 99, data=other)
    lines, notes = filled(made, root, seeds=4)
    assert list(lines["KD"].runs) == [0, 1, 2]
    assert "saw other samples than" in notes[0]


def test_runs_taught_by_other_weights_stay_apart(made: tables.Table, tmp_path: Path) -> None:
    """Their recipes name the same teacher, which was trained again between them."""
    for seed, (top1, weights) in enumerate([(53, 1), (55, 1), (90, 2)]):
        write(tmp_path, "KD", seed, top1, data=DATA | {"teachers": {"teacher": weights}})
    lines, notes = filled(made, tmp_path)
    assert list(lines["KD"].runs) == [0, 1]
    assert len(notes) == 1
    assert "seed2 has other weights of its teacher than" in notes[0]


def test_rows_evaluated_on_other_samples_have_no_difference(made: tables.Table, tmp_path: Path) -> None:
    other = {"data": {"pictures": [{"samples": 50}, {"samples": 300}]}}
    for seed in range(3):
        write(tmp_path, "alone", seed, 50)
        write(tmp_path, "KD", seed, 60, data=other)
    lines, notes = filled(made, tmp_path)
    assert lines["KD"].cells["top1"].ours is not None
    assert lines["KD"].cells["top1"].difference is None
    assert notes == ["KD: no difference to alone, which was evaluated on other samples"]


# --- the command ---


def test_list_names_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["table", "--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == NAMES


@pytest.fixture
def as_mergenet_1(made: tables.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up table in place of a real one."""
    monkeypatch.setattr(tables, "read", lambda name: made)
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.usefixtures("as_mergenet_1")
def test_the_table_is_shown_and_written(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    markdown, numbers = tmp_path / "out" / "t.md", tmp_path / "out" / "t.csv"
    options = ["--seeds", "3", "--output-dir", str(root), "--markdown", str(markdown), "--csv", str(numbers)]
    cli.main(["table", "mergenet-1", *options])
    shown = capsys.readouterr().out
    for part in ("53.00", "(+3.00)", "55.00 ± 2.83", "[-1.97, +7.97]", "Ours on digits: 359 samples."):
        assert part in shown
    assert "| KD | top-1 (%) | 53.00 (+3.00) | 55.00 ± 2.83 | 3 | +3.00 [-1.97, +7.97] |" in markdown.read_text()
    kd = list(csv.DictReader(numbers.open()))[1]
    assert (kd["row"], float(kd["mean"]), float(kd["difference"]), kd["pairs"]) == ("KD", 55, 3, "3")


@pytest.mark.usefixtures("as_mergenet_1")
def test_only_what_is_missing_is_started_teachers_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["table", "mergenet-1", "--seeds", "4", "--output-dir", str(root), "--commands"])
    lines = capsys.readouterr().out.splitlines()
    assert ["--variant digits_teacher" in line for line in lines] == [True, False, False]
    assert [line.partition("--seeds ")[2] for line in lines] == ["", "3", "3"]
    cli.main(["table", "mergenet-1", "--seeds", "3", "--output-dir", str(root), "--commands"])
    assert capsys.readouterr().out == ""


def test_rows_that_share_a_run_start_it_once(made: tables.Table, tmp_path: Path) -> None:
    kd = made.row("KD")
    table = replace(made, rows=(*made.rows, replace(kd, label="KD again")))
    lines, _ = runs.fill(table, "cpu", range(2), [], "--output-dir", str(tmp_path))
    started = start.starts(table, "cpu", lines, range(2), str(tmp_path))
    assert [one.seeds for one in started] == [(), (0, 1), (0, 1)]


@pytest.mark.usefixtures("as_mergenet_1")
def test_a_budget_without_commands_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["table", "mergenet-1", "--budget", "gpu", "--output-dir", str(tmp_path)])
    assert "No command for gpu, too large: alone; KD." in capsys.readouterr().out


def test_students_of_a_teacher_that_failed_are_left_out(
    made: tables.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, _ = runs.fill(made, "cpu", range(1), [], "--output-dir", str(tmp_path))
    todo = start.starts(made, "cpu", lines, range(1), str(tmp_path))
    monkeypatch.setattr(sys, "executable", "false")
    said = start.run(todo, str(tmp_path), 1)
    assert [text.partition(":")[0] for text in said] == ["Failed with status 1", "Left out", "Left out"]


# --- what is missing, to Slurm ---

SBATCH = """#!/bin/bash
printf '%s\\n' "$PWD" "$@" >> "$CALLS"; echo "--" >> "$CALLS"
[[ -z ${REFUSE:-} || $(grep -cx -- -- "$CALLS") -lt 2 ]] || { echo "Invalid qos" >&2; exit 1; }
echo "$((100 + $(grep -cx -- -- "$CALLS")));cluster"
"""
ARRAY = str(shipped.folder("slurm") / "array.sbatch")
SQUEUE = '#!/bin/bash\ncat "$QUEUE"\n'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for `sbatch` and `squeue` on the path; the calls lie in the file that is given."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, script in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    (tmp_path / "queue").write_text("")
    return tmp_path / "calls"


def called(file: Path) -> list[list[str]]:
    """The folder and the arguments of each call."""
    return [call.split("\n") for call in file.read_text().split("\n--\n")[:-1]] if file.exists() else []


@pytest.mark.usefixtures("as_mergenet_1")
def test_arrays_are_submitted_and_students_wait_for_their_teacher(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write(out, "KD", 1, 53)
    options = ["--seeds", "3", "--output-dir", str(out), "--slurm=--gpus-per-node 1 --time 2:00:00"]
    cli.main(["table", "mergenet-1", *options])
    said = capsys.readouterr().out.splitlines()
    teacher, alone, kd = called(slurm)
    assert said == [
        "digits_distill_teacher/none: job 101, seed 0",
        "digits_distill/none: job 102, seeds 0 1 2, after 101",
        "digits_distill/kd: job 103, seeds 0 2, after 101",
    ]
    here = str(Path.cwd())
    assert teacher[:4] == [here, "--parsable", "--job-name=digits_distill_teacher/none", "--array=0-0"]
    assert not any("dependency" in word for word in teacher)
    assert kd == [
        *(here, "--parsable", "--job-name=digits_distill/kd", "--array=0-1"),
        *("--dependency=afterok:101", "--kill-on-invalid-dep=yes", "--gpus-per-node", "1", "--time", "2:00:00"),
        *(ARRAY, "0 2", "kd", "launchers/cifar_distill.py", "--variant", "digits", "--method", "kd"),
        *("--teacher", "run:digits_distill_teacher", "--output-dir", str(out)),
    ]
    assert alone[3] == "--array=0-2"


@pytest.mark.usefixtures("as_mergenet_1")
def test_what_an_array_starts_is_the_run_that_is_missing(slurm: Path, tmp_path: Path) -> None:
    """The words behind the batch file mean the same recipe to it as the row means to the table."""
    cli.main(["table", "mergenet-1", "--seeds", "2", "--output-dir", str(tmp_path / "out"), "--slurm"])
    *_, kd = called(slurm)
    at = kd.index(ARRAY)
    seeds, arms, launcher, *options = kd[at + 1 :]
    # As array.sbatch puts them together.
    command = tables.Command(Path(launcher).stem, (*options, "--seed", seeds.split()[1], "--control", arms.split()[0]))
    wanted = resolved(tables.parse("made", TABLE).row("KD").commands["cpu"]).recipe
    assert not differences(tables.resolved(command).recipe, replace(wanted, seed=1))


@pytest.mark.usefixtures("as_mergenet_1")
def test_what_is_in_the_queue_is_not_submitted_again(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "queue").write_text("77 digits_distill_teacher/none\n78 digits_distill/none\n")
    cli.main(["table", "mergenet-1", "--seeds", "1", "--output-dir", str(tmp_path / "out"), "--slurm"])
    assert capsys.readouterr().out.splitlines() == [
        "digits_distill_teacher/none: job 77 is in the queue already, nothing submitted",
        "digits_distill/none: job 78 is in the queue already, nothing submitted",
        "digits_distill/kd: job 101, seed 0, after 77",
    ]


@pytest.mark.usefixtures("as_mergenet_1")
def test_nothing_missing_submits_nothing(root: Path, slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["table", "mergenet-1", "--seeds", "3", "--output-dir", str(root), "--slurm"])
    assert capsys.readouterr().out == "Nothing is missing: nothing submitted.\n"
    assert not called(slurm)


@pytest.mark.usefixtures("as_mergenet_1")
def test_a_refusal_of_slurm_says_what_is_in_the_queue_by_then(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSE", "1")
    options = ["--seeds", "1", "--output-dir", str(tmp_path / "out"), "--slurm"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["table", "mergenet-1", *options])
    assert stop.value.code == 2
    assert "sbatch refused digits_distill/none (submitted before it: 101): Invalid qos" in capsys.readouterr().err


@pytest.mark.usefixtures("as_mergenet_1")
def test_without_slurm_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for more, said in (
        ([], "this machine has no sbatch: use --slurm where Slurm is, or --run here."),
        (["--ranks", "2"], "with --slurm ranks are tasks: --slurm='--ntasks-per-node 2' instead of --ranks."),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["table", "mergenet-1", "--output-dir", str(tmp_path / "out"), "--slurm", *more])
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"error: table: {said}\n"


# --- in a report ---


@pytest.fixture
def known(made: tables.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up table as the only one."""
    monkeypatch.setattr(show, "names", lambda: ["made"])
    monkeypatch.setattr(show, "read", lambda name: made)


@pytest.mark.usefixtures("known")
def test_a_report_shows_the_table_that_its_runs_belong_to(root: Path) -> None:
    *_, sheet = report.gather([root]).sheets
    assert (sheet.title, sheet.published) == ("made up (cpu)", True)
    kd = sheet.lines[1]
    assert kd.seeds == (0, 1, 2)
    assert kd.cells["top1"].published_difference == 3
    assert kd.cells["top1"].difference is not None
    assert kd.cells["top1"].difference.mean == pytest.approx(3)
    assert "Ours is each run's last evaluation." in sheet.notes


@pytest.mark.usefixtures("known")
def test_a_table_without_a_row_and_its_baseline_is_shown_by_name_only(root: Path) -> None:
    alone = [root / "digits_distill" / "none"]
    assert not [sheet for sheet in report.gather(alone).sheets if sheet.published]
    (sheet,) = [sheet for sheet in report.gather(alone, tables=["made"]).sheets if sheet.published]
    assert [line.seeds for line in sheet.lines] == [(0, 1, 2), ()]


@pytest.mark.usefixtures("known")
def test_a_table_that_nothing_has_run_of_is_empty(root: Path) -> None:
    sheets = report.gather([root], tables=["made"], budget="gpu").sheets
    (sheet,) = [sheet for sheet in sheets if sheet.published]
    assert sheet.title == "made up (gpu)"
    assert all(cell.ours is None for line in sheet.lines for cell in line.cells.values())


def test_a_report_on_mergenet_has_the_positive_control_or_says_how_to_run_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, first = tables.read(show.POSITIVE_CONTROL), "positive control has not run: hetero-kt table positive-control"
    write_run(tmp_path, tables.read("mergenet-fig3").row("cycle 4").commands["cpu"], "mobilenetv2", 0, 30)
    for argv in (["table", "mergenet-fig3", "--output-dir", str(tmp_path)], ["report", str(tmp_path)]):
        cli.main(argv)
        shown = " ".join(capsys.readouterr().out.split())
        assert first in shown, argv
        assert table.title not in shown, argv

    for label, top1 in (("resnet_tiny alone", 19), ("every matrix drawn to the source's", 31)):
        write_run(tmp_path, table.row(label).commands["cpu"], "target", 0, top1)
    for argv in (["table", "mergenet-fig3", "--output-dir", str(tmp_path)], ["report", str(tmp_path)]):
        cli.main(argv)
        shown = " ".join(capsys.readouterr().out.split())
        assert first not in shown, argv
        assert shown.count(table.title[:30]) == 1, argv
        assert "31.00" in shown, argv


def test_a_report_without_mergenet_does_not_speak_of_its_control(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["report", str(root)])
    assert "positive" not in capsys.readouterr().out.lower()


def test_names_of_recipes_are_known_at_little_cost() -> None:
    """Those of a whole table, as resolving its commands gives them."""
    for _, command in commands(tables.read("mergenet-1")):
        assert tables.runs_called(command) == resolved(command).recipe.name


@pytest.mark.usefixtures("as_mergenet_1")
def test_the_best_evaluation_is_asked_for_and_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in root.rglob("seed*"):
        last = json.loads((folder / "result.json").read_text())["metrics"]["student"]["top1"]
        lines = [{"step": step, "student/test_top1": top1} for step, top1 in ((80, last + 1), (160, last))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cli.main(["table", "mergenet-1", "--seeds", "3", "--output-dir", str(root), "--best"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "best of 2 evaluations on the test set: optimistic" in shown
    assert "56.00 ± 2.83" in shown


@pytest.mark.parametrize("options", [[], ["mergenet-1", "--seeds", "0"], ["mergenet-9"]])
def test_bad_input(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["table", *options])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: table")
