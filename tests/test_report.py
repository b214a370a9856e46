"""Comparisons over arms and seeds: arithmetic, forms, what cannot count, and what is kept apart."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from hetero_kt import cli, report
from hetero_kt.config import FBT, KD, Data, Distill, MergeNet, Model, Recipe, Teacher, to_yaml
from hetero_kt.report import figures, history, page, text
from hetero_kt.report import runs as folders
from hetero_kt.report.comparison import Cell, Line, compare, experiments

SAMPLES = {"pictures": [{"samples": 50}, {"samples": 359}]}


def recipe(control: str = "none", seed: int = 0, steps: int = 20, name: str = "toy", **changes: Any) -> Recipe:
    made = Recipe(
        name=name,
        models={"cnn": Model("cifar:resnet_tiny", data="pictures")},
        data={"pictures": Data("digits")},
        method=MergeNet({}, control),  # type: ignore[arg-type]
        steps=steps,
        seed=seed,
    )
    return replace(made, **changes)


def write(root: Path, one: Recipe, top1: float, seen: Mapping[str, Any] | None = None) -> Path:
    """A finished run with evaluations at a quarter, half, three quarters and the end."""
    folder = root / one.name / one.method.arm / f"seed{one.seed}"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(to_yaml(one))
    (folder / "data.json").write_text(json.dumps({"data": SAMPLES} if seen is None else seen))
    lines: list[dict[str, float]] = [{"step": s, "cnn/loss": 2.0 / s + one.seed} for s in range(1, one.steps + 1)]
    quarter = one.steps // 4
    lines += [{"step": s, "cnn/test_top1": top1 * s / one.steps} for s in range(quarter, one.steps + 1, quarter)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"cnn": {"loss": 2.0 - top1 / 100, "top1": top1}}
    result = {"recipe": one.name, "control": one.method.arm, "seed": one.seed, "steps": one.steps, "metrics": metrics}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_run(root: Path, control: str, seed: int, top1: float, steps: int = 20, name: str = "toy") -> Path:
    return write(root, recipe(control, seed, steps, name), top1)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """none: 50, 52, 54; transfer: 53, 53, 59; noise: two seeds only; and one run that has not finished."""
    for seed, (none, transfer) in enumerate([(50, 53), (52, 53), (54, 59)]):
        write_run(tmp_path, "none", seed, none)
        write_run(tmp_path, "transfer", seed, transfer)
    for seed, top1 in enumerate([49, 51]):
        write_run(tmp_path, "noise", seed, top1)
    unfinished = write_run(tmp_path, "shuffled", 0, 40)
    (unfinished / "result.json").unlink()
    return tmp_path


def lines_by_label(folder: Path) -> dict[str, Line]:
    return {line.label: line for sheet in report.gather([folder], tables=()).sheets for line in sheet.lines}


def top1(line: Line) -> Cell:
    cell = line.cells["top1"]
    assert cell.ours is not None
    return cell


# --- numbers ---


def test_mean_population_spread_and_count(runs: Path) -> None:
    cell = top1(lines_by_label(runs)["none"])
    assert cell.ours is not None
    assert (cell.ours.mean, cell.ours.n) == (52, 3)
    assert cell.ours.std == pytest.approx(np.sqrt(8 / 3))
    assert cell.difference is None


def test_differences_are_of_the_seeds_that_both_have(runs: Path) -> None:
    lines = lines_by_label(runs)
    transfer, noise = top1(lines["transfer"]).difference, top1(lines["noise"]).difference
    assert transfer is not None
    assert noise is not None
    assert (transfer.mean, transfer.seeds) == (3, (0, 1, 2))
    assert transfer.low == pytest.approx(3 - 4.30265 * 2 / 3**0.5, abs=1e-3)  # t at 2 degrees of freedom
    assert (noise.mean, noise.seeds) == (-1, (0, 1))


def test_controls_come_in_order_and_unfinished_runs_stay_out(runs: Path) -> None:
    gathered = report.gather([runs], tables=())
    assert [line.label for line in gathered.sheets[0].lines] == ["none", "transfer", "noise"]
    assert gathered.notes == (f"{runs / 'toy/shuffled/seed0'} is not finished: it does not count.",)


def test_without_a_baseline_there_is_no_difference(tmp_path: Path) -> None:
    write_run(tmp_path, "transfer", 0, 50)
    line = lines_by_label(tmp_path)["transfer"]
    assert top1(line).difference is None
    assert line.baseline == ""


def test_a_run_named_twice_counts_once(runs: Path) -> None:
    again = [runs, runs / "toy" / "none", runs / "toy" / "none" / "seed0" / "result.json"]
    assert len(folders.find(again, demand=True)) == 9


# --- what cannot count, and what is kept apart ---


def test_two_runs_of_one_seed_count_neither(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", "none", 0, 50), write_run(tmp_path / "b", "none", 0, 90)
    write_run(tmp_path, "none", 1, 52)
    gathered = report.gather([tmp_path], tables=())
    (line,) = gathered.sheets[0].lines
    assert line.seeds == (1,)
    assert top1(line).ours is not None
    assert top1(line).ours.mean == 52  # type: ignore[union-attr]
    assert gathered.notes == (f"{a} and {b} both have seed 0: neither counts, leave one of them.",)


def test_runs_of_two_recipes_under_one_name_are_two_tables(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path / "a", recipe(seed=seed), 50)
        write(tmp_path / "a", recipe("transfer", seed), 51)
    other = write(tmp_path / "b", recipe("transfer", 2, steps=40), 90)
    gathered = report.gather([tmp_path], tables=())
    assert [sheet.title for sheet in gathered.sheets] == ["toy: cnn", "toy (steps 40): cnn"]
    assert [line.seeds for line in gathered.sheets[0].lines] == [(0, 1), (0, 1)]
    assert [line.baseline for line in gathered.sheets[1].lines] == [""]
    assert gathered.notes == (f"Of another recipe called toy, with steps 40, and kept apart: {other}.",)


def test_a_run_that_was_cut_short_is_kept_apart(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, 50)
    short = write_run(tmp_path, "none", 1, 40)
    result = json.loads((short / "result.json").read_text()) | {"steps": 4}
    (short / "result.json").write_text(json.dumps(result))
    sheets = report.gather([tmp_path], tables=()).sheets
    assert [sheet.title for sheet in sheets] == ["toy: cnn", "toy (4 of 20 steps done): cnn"]


def test_where_all_runs_were_cut_short_a_note_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "none", 0, 90)
    assert report.gather([tmp_path], tables=()).notes == ()
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"steps": 4}))
    assert report.gather([tmp_path], tables=()).notes == ("toy was cut short by --max-steps, at 4 of 20 steps.",)


def test_runs_on_other_samples_do_not_count(tmp_path: Path) -> None:
    first = write_run(tmp_path, "none", 0, 50)
    other = write(tmp_path, recipe("none", 1), 90, {"data": {"pictures": [{"samples": 60}, {"samples": 359}]}})
    gathered = report.gather([tmp_path], tables=())
    assert gathered.sheets[0].lines[0].seeds == (0,)
    assert gathered.notes == (f"{other} saw other samples than {first}: it stays apart.",)


def test_runs_on_other_numbers_of_ranks_are_named(runs: Path) -> None:
    for seed, ranks in enumerate((2, 2, 1)):
        file = runs / "toy" / "transfer" / f"seed{seed}" / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"world_size": ranks}))
    gathered = report.gather([runs], tables=())
    assert lines_by_label(runs)["transfer"].seeds == (0, 1, 2)
    (note,) = [note for note in gathered.notes if "world size" in note]
    assert "seed2 ran with a world size of 1" in note
    assert "seed0 with 2" in note


def test_an_arm_on_other_ranks_than_its_baseline_is_named_once(runs: Path) -> None:
    for file in (runs / "toy").glob("*/seed*/result.json"):
        ranks = 1 if "transfer" in file.parts else 2
        file.write_text(json.dumps(json.loads(file.read_text()) | {"world_size": ranks}))
    (sheet,) = report.gather([runs], tables=()).sheets
    (note,) = sheet.notes
    assert note.startswith("transfer ran with a world size of 1 and none with 2: the difference counts, though")
    assert top1(lines_by_label(runs)["transfer"]).difference is not None


def test_arms_that_were_evaluated_on_other_samples_have_no_difference(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, 50)
    write(tmp_path, recipe("transfer"), 60, {"data": {"pictures": [{"samples": 50}, {"samples": 300}]}})
    (sheet,) = report.gather([tmp_path], tables=()).sheets
    assert top1(sheet.lines[1]).difference is None
    assert sheet.notes == ("transfer: no difference to none, which was evaluated on other samples.",)


def distilled(objective: str, seed: int, **settings: Any) -> Recipe:
    method = Distill({"teacher": Teacher("cifar:resnet_tiny")}, objective, **settings)  # type: ignore[arg-type]
    return recipe(seed=seed, method=method)


def test_settings_of_another_objective_set_nothing_apart(tmp_path: Path) -> None:
    """Of the student alone and of kd, a setting of kd matters to kd only: two kd rows, one baseline."""
    for seed in range(2):
        write(tmp_path / "a", distilled("none", seed), 50)
        write(tmp_path / "a", distilled("kd", seed), 53)
        write(tmp_path / "a", distilled("ofa", seed, kd=KD(temperature=9)), 54)
    write(tmp_path / "b", distilled("kd", 0, kd=KD(temperature=1)), 55)
    (sheet,) = report.gather([tmp_path], tables=()).sheets
    assert [(line.label, line.seeds) for line in sheet.lines] == [
        ("none", (0, 1)),
        ("kd", (0, 1)),
        ("kd (method.kd.temperature 1.0)", (0,)),
        ("ofa", (0, 1)),
    ]
    assert top1(sheet.lines[2]).difference.mean == 5  # type: ignore[union-attr]


def test_a_temperature_that_fbt_takes_from_kd_sets_it_apart(tmp_path: Path) -> None:
    """Of its pair `kd` alone; other pairs have no temperature."""
    for name, pair, labels in (
        ("a", "kd", ["fbt", "fbt (method.kd.temperature 1.0)"]),
        ("b", "infonce+ofa", ["fbt"]),
    ):
        write(tmp_path / name, distilled("fbt", 0, fbt=FBT(pair=pair)), 50)  # type: ignore[arg-type]
        write(tmp_path / name, distilled("fbt", 1, fbt=FBT(pair=pair), kd=KD(temperature=1)), 55)  # type: ignore[arg-type]
        (sheet,) = report.gather([tmp_path / name], tables=()).sheets
        assert [line.label for line in sheet.lines] == labels


def test_students_of_other_teachers_are_kept_apart(tmp_path: Path) -> None:
    write(tmp_path, distilled("kd", 0), 53, {"data": SAMPLES, "teachers": {"teacher": "a1"}})
    write(tmp_path, distilled("kd", 1), 90, {"data": SAMPLES, "teachers": {"teacher": "b2"}})
    (sheet,) = report.gather([tmp_path], tables=()).sheets
    assert [line.label for line in sheet.lines] == ["kd", "kd (other weights of its teacher)"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "result.json",
            '{"recipe": "toy", "cont',
            "has a result.json that cannot be read (it is not JSON (Unterminated string",
        ),
        ("result.json", "[]", "has a result.json that cannot be read (the file is [], no mapping)"),
        ("result.json", "{}", "has a result.json that cannot be read (recipe is None, no text)"),
        ("result.json", '{"recipe": "toy", "control": "none", "seed": "x"}', "has a result.json that cannot be read"),
        (
            "result.json",
            '{"metrics": {"cnn": {"loss": 1' + 400 * "0" + "}}}",
            "cannot be read (recipe is None, no text)",
        ),
        ("result.json", None, "is not finished"),
        ("data.json", "[1]", "has a data.json that cannot be read (the file is [1], no mapping)"),
        ("data.json", '{"data": 3}', "has a data.json that cannot be read ('data' is 3, no mapping)"),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_reported(
    runs: Path, name: str, content: str | None, said: str
) -> None:
    folder = runs / "toy" / "transfer" / "seed2"
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    gathered = report.gather([runs], tables=())
    lines = {line.label: line.seeds for line in gathered.sheets[0].lines}
    assert lines == {"none": (0, 1, 2), "transfer": (0, 1), "noise": (0, 1)}
    (note,) = [note for note in gathered.notes if str(folder) in note]
    assert said in note
    assert note.endswith("it does not count.")


def test_a_result_of_another_run_than_its_recipe(runs: Path) -> None:
    file = runs / "toy" / "transfer" / "seed2" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": 7}))
    gathered = report.gather([runs], tables=())
    assert any("has a result.json of another run than its recipe.yaml" in note for note in gathered.notes)
    assert gathered.sheets[0].lines[1].seeds == (0, 1)


def test_runs_without_a_recipe_are_compared_by_name_and_steps(runs: Path) -> None:
    for file in runs.rglob("recipe.yaml"):
        file.unlink()
    gathered = report.gather([runs], tables=())
    assert [line.seeds for line in gathered.sheets[0].lines] == [(0, 1, 2), (0, 1, 2), (0, 1)]
    assert any(note.startswith("Compared by name and steps alone, each has no recipe.yaml") for note in gathered.notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_averaged(runs: Path, value: float) -> None:
    file = runs / "toy" / "transfer" / "seed2" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": {"cnn": {"top1": value, "loss": 1.0}}}))
    (sheet,) = report.gather([runs], tables=()).sheets
    assert top1(sheet.lines[1]).ours.n == 2  # type: ignore[union-attr]
    assert sheet.lines[1].cells["loss"].ours.n == 3  # type: ignore[union-attr]
    assert sheet.notes == (f"{file.parent} has {value} as top1 of cnn: that does not count.",)


def test_bad_folders_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone does not exist: give run folders, or a folder that holds some"):
        report.gather([tmp_path / "gone"])
    with pytest.raises(ValueError, match=r"holds no run: give a folder with a recipe.yaml in it or below it\."):
        report.gather([tmp_path])


# --- the best evaluation ---


def worse_at_the_end(folder: Path) -> None:
    """One more evaluation, whose number is that of result.json."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "cnn/test_top1": 40.0}\n')
    result = json.loads((folder / "result.json").read_text())
    result["metrics"]["cnn"]["top1"] = 40.0
    (folder / "result.json").write_text(json.dumps(result))


def test_the_last_evaluation_counts_and_the_best_only_when_asked(runs: Path) -> None:
    worse_at_the_end(runs / "toy" / "none" / "seed0")
    last, best = (report.gather([runs], best=best, tables=()).sheets[0] for best in (False, True))
    assert [top1(sheet.lines[0]).ours.mean for sheet in (last, best)] == [  # type: ignore[union-attr]
        pytest.approx((40 + 52 + 54) / 3),
        pytest.approx((50 + 52 + 54) / 3),
    ]
    assert last.chosen == ""
    assert best.chosen == "best of 4 to 5 evaluations on the test set: optimistic"


def test_the_best_is_named_so_in_every_form(runs: Path) -> None:
    gathered = report.gather([runs], best=True, tables=())
    label = "best of 4 evaluations on the test set: optimistic"
    console = Console(width=140, record=True, file=io.StringIO())
    gathered.show(console)
    assert label in " ".join(console.export_text().split())
    assert f"**toy: cnn, {label}**" in gathered.markdown()
    assert {row["evaluation"] for row in csv.DictReader(io.StringIO(gathered.csv()))} == {label}
    figure = figures._intervals([(gathered.sheets[0], *figures.compared(gathered.sheets[0])[0])])
    assert label in page.html(gathered)
    assert label in figure.axes[0].get_title(loc="left").replace("\n", " ")
    last = report.gather([runs], tables=())
    assert {row["evaluation"] for row in csv.DictReader(io.StringIO(last.csv()))} == {"last"}
    assert "best of" not in last.markdown()


def test_the_best_of_less_is_better(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "none", 0, 50)
    lines = [{"step": s, "cnn/test_error": e, "cnn/test_loss": 1.0} for s, e in ((1, 9.0), (2, 4.0), (3, 6.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = json.loads((folder / "result.json").read_text()) | {"metrics": {"cnn": {"error": 6.0, "loss": 1.0}}}
    (folder / "result.json").write_text(json.dumps(result))
    best = history.best(folders.read(folder))
    assert best.metrics == {"cnn": {"error": 4.0, "loss": 1.0}}
    assert best.evaluations == 3


def test_the_best_on_held_out_samples_is_said_to_be_that(tmp_path: Path) -> None:
    held_out = {"pictures": Data("digits", validation=0.1)}
    write(tmp_path, recipe(data=held_out), 50)
    (sheet,) = report.gather([tmp_path], best=True, tables=()).sheets
    assert sheet.chosen == "best of 4 evaluations on samples held out of the training set"


def test_the_best_is_said_of_each_model_by_its_own_samples(tmp_path: Path) -> None:
    """Of one model samples are held out, of the other the test set chooses."""
    models = {"cnn": Model("cifar:resnet_tiny", "held"), "other": Model("cifar:resnet_tiny", "whole")}
    data = {"held": Data("digits", validation=0.1), "whole": Data("digits")}
    folder = write(tmp_path, recipe(models=models, data=data), 50)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "other/test_top1": 40.0}) + "\n")
    result = json.loads((folder / "result.json").read_text())
    result["metrics"]["other"] = {"top1": 40.0}
    (folder / "result.json").write_text(json.dumps(result))
    sheets = report.gather([tmp_path], best=True, tables=()).sheets
    assert [sheet.chosen.partition(" on ")[2] for sheet in sheets] == [
        "samples held out of the training set",
        "the test set: optimistic",
    ]


def test_without_a_log_the_best_is_not_known(runs: Path) -> None:
    (runs / "toy" / "transfer" / "seed1" / "metrics.jsonl").unlink()
    gathered = report.gather([runs], best=True, tables=())
    assert gathered.sheets[0].lines[1].seeds == (0, 2)
    assert any("which was the best is not known: it does not count." in note for note in gathered.notes)


# --- forms ---


def test_markdown(runs: Path) -> None:
    lines = report.gather([runs], tables=()).markdown().splitlines()
    assert lines[0] == "**toy: cnn**"
    assert lines[2] == "| control | seeds | top-1 (%) | Δ | loss | Δ |"
    assert lines[4] == "| none | 3 | 52.00 ± 1.63 |  | 1.480 ± 0.016 |  |"
    assert lines[5].startswith("| transfer | 3 | 55.00 ± 2.83 | +3.00 [-1.97, +7.97] | 1.450 ± 0.028 | -0.030 [")
    assert lines[6].startswith("| noise | 2 | 50.00 ± 1.00 | -1.00 [-1.00, -1.00] | 1.500 ± 0.010 | +0.010 [")
    assert f"- {runs / 'toy/shuffled/seed0'} is not finished: it does not count." in lines
    assert {line.count("|") for line in lines if line.startswith("|")} == {7}


def test_a_difference_of_fewer_seeds_says_so(runs: Path) -> None:
    write_run(runs, "noise", 7, 50)
    assert "| noise | 3 | 50.00 ± 0.82 | -1.00 [-1.00, -1.00] (2 of 3 seeds) |" in (
        report.gather([runs], tables=()).markdown()
    )


def test_a_difference_that_rounds_to_nothing_has_no_minus(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, 50)
    write_run(tmp_path, "transfer", 0, 49.999)
    assert "| transfer | 1 | 50.00 | +0.00 | 1.500 | +0.000 |" in report.gather([tmp_path], tables=()).markdown()


def test_names_break_no_table(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, 50, name="a|b <script>")
    markdown = report.gather([tmp_path], tables=()).markdown()
    assert "**a|b &lt;script>: cnn**" in markdown
    console = Console(width=100, record=True, file=io.StringIO())
    write_run(tmp_path, "none", 1, 50, name="[red]x[/red]")
    report.gather([tmp_path], tables=()).show(console)
    assert "[red]x[/red]: cnn" in console.export_text()


def test_csv_has_all_numbers_in_full(runs: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(report.gather([runs], tables=()).csv())))
    (transfer,) = [row for row in rows if (row["row"], row["metric"]) == ("transfer", "top1")]
    assert (transfer["table"], transfer["baseline"], transfer["seeds"], transfer["pairs"]) == (
        "toy: cnn",
        "none",
        "3",
        "3",
    )
    assert float(transfer["std"]) == pytest.approx(np.std([53, 53, 59]))
    assert float(transfer["high"]) == pytest.approx(7.968, abs=1e-3)


@pytest.mark.parametrize("width", [80, 140])
def test_the_console_shows_everything(runs: Path, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    report.gather([runs], tables=()).show(console)
    shown = console.export_text()
    for expected in ("toy: cnn", "transfer", "55.00 ± 2.83", "Δ +3.00", "[-1.97, +7.97]", "seed0", "population"):
        assert expected in shown


@pytest.mark.parametrize(("width", "tables"), [(50, 9), (80, 3), (101, 3), (400, 1)])
def test_metrics_that_a_terminal_has_no_room_for_go_into_further_tables(runs: Path, width: int, tables: int) -> None:
    names = [f"measure{i}" for i in range(9)]
    for file in (runs / "toy").glob("*/seed*/result.json"):
        result = json.loads(file.read_text())
        values = {name: -1000.0 * i + result["seed"] for i, name in enumerate(names)}
        file.write_text(json.dumps(result | {"metrics": {"cnn": values}}))
    console = Console(width=width, record=True, file=io.StringIO())
    report.gather([runs], tables=()).show(console)
    shown = console.export_text()
    lines = shown.splitlines()
    heads = [line.split() for line in lines if line.split()[:1] == ["control"]]
    assert all(head[:2] == ["control", "seeds"] for head in heads)
    assert [name for head in heads for name in head[2:]] == names
    assert len(heads) == sum(line.split()[:1] == ["transfer"] for line in lines) == tables
    assert "-7999.00 ± 0.82" in shown
    assert "…" not in shown
    assert all(len(line.rstrip()) <= width for line in lines[: shown.count("\n", 0, shown.index("Mean ±"))])


def test_finish_writes_what_it_shows(runs: Path) -> None:
    report.finish(runs / "toy", Console(quiet=True))
    assert "| transfer | 3 |" in (runs / "toy" / "report.md").read_text()
    assert "+3.00" in (runs / "toy" / "report.html").read_text()
    assert (runs / "toy" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_finish_with_nothing_finished_writes_nothing(tmp_path: Path) -> None:
    (write_run(tmp_path, "none", 0, 1) / "result.json").unlink()
    report.finish(tmp_path, Console(quiet=True))
    assert not (tmp_path / "report.md").exists()


# --- pictures ---


def test_curves_have_a_line_per_control_and_a_band_per_seeds(runs: Path, tmp_path: Path) -> None:
    found = report.gather([runs], tables=()).experiments
    figure = figures._curves(found)
    top, bottom = figure.axes
    assert len(top.lines) == len(bottom.lines) == 3
    assert len(top.collections) == 3
    assert np.allclose(top.lines[0].get_ydata(), [13, 26, 39, 52])
    assert [label.get_text() for label in figure.legends[0].get_texts()] == ["none (3)", "transfer (3)", "noise (2)"]
    figures.curves(found, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_several_recipes_say_which(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, 50, name="a")
    write_run(tmp_path, "none", 0, 51, name="b")
    figure = figures._curves(report.gather([tmp_path], tables=()).experiments)
    assert [label.get_text() for label in figure.legends[0].get_texts()] == ["a: none", "b: none"]


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has finished: there are no curves to draw yet"):
        figures.curves([], tmp_path / "x.png")
    write_run(tmp_path, "none", 0, 1)
    with pytest.raises(ValueError, match="there is nothing to draw"):
        figures.intervals(report.gather([tmp_path], tables=()).sheets, tmp_path / "x.png")


def test_intervals_are_drawn_where_the_table_has_them(runs: Path) -> None:
    (sheet,) = report.gather([runs], tables=()).sheets
    ((metric, rows),) = figures.compared(sheet)
    assert (metric, [line.label for line in rows]) == ("top1", ["transfer", "noise"])
    (ax,) = figures._intervals([(sheet, metric, rows)]).axes
    spans = [tuple(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2]
    assert spans[1] == pytest.approx((3 - 4.968, 3 + 4.968), abs=1e-2)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["transfer", "noise"]


def test_a_model_that_nothing_reaches_is_not_drawn(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, "none", seed, 50)
        write_run(tmp_path, "transfer", seed, 50)
    assert figures.compared(report.gather([tmp_path], tables=()).sheets[0]) == []


def test_band_takes_common_steps_and_averages_long_curves() -> None:
    steps, mean, std = history.band([{1: 1.0, 2: 2.0, 3: 9.0}, {1: 3.0, 2: 4.0}, {}])
    assert steps.tolist() == [1, 2]
    assert mean.tolist() == [2, 3]
    assert std.tolist() == [1, 1]
    long, level, spread = history.band([{step: float(step) for step in range(1000)}])
    assert len(long) == history.POINTS
    assert np.allclose(long, level)
    assert not spread.any()
    assert all(len(part) == 0 for part in history.band([]))


def test_metrics_of_a_killed_run(tmp_path: Path) -> None:
    whole = ['{"step": 1, "a/loss": 1}', '{"step": 2, "a/loss": 2}', '{"step": 2, "a/loss": 3, "note": "x"}']
    endless = ['{"step": Infinity, "a/loss": 1}', '{"step": 1, "a/loss": 1' + 400 * "0" + "}"]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*whole, *endless, '{"step": 3, "a']))
    assert history.history(tmp_path) == {"a/loss": {1: 1.0, 2: 3.0}}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_number_leaves_the_curves_their_scale(runs: Path, value: float) -> None:
    """Of one arm alone, and the others keep theirs."""
    file = runs / "toy" / "transfer" / "seed0" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    assert json.loads(lines[2])["step"] == 3
    lines[2] = json.dumps({"step": 3, "cnn/loss": value})
    file.write_text("\n".join(lines))
    assert "nan" not in page.html(report.gather([runs], tables=()))


@pytest.mark.parametrize("form", ["--markdown", "--csv", "--html", "--png", "--curves"])
def test_a_form_that_cannot_be_written_is_one_sentence(
    runs: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(runs), form, str(runs)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {runs} cannot be written (Is a directory)")


def test_arms_that_do_not_differ_have_an_interval_with_zero_95_times_in_100(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way from run folders to the table, on made-up runs without any difference: 400 models of one run."""
    monkeypatch.setattr(folders, "MODELS", 400)
    rng = np.random.default_rng(0)
    shared, own = rng.normal(60, 2, (4, 400)), rng.normal(0, 0.4, (2, 4, 400))
    for arm, control in enumerate(("none", "transfer")):
        for seed in range(4):
            folder = write_run(tmp_path, control, seed, 50)
            values = shared[seed] + own[arm, seed]
            metrics = {f"m{i}": {"top1": value} for i, value in enumerate(values)}
            result = json.loads((folder / "result.json").read_text()) | {"metrics": metrics}
            (folder / "result.json").write_text(json.dumps(result))
    found, _ = experiments(folders.find([tmp_path]))
    held = [not top1(sheet.lines[1]).difference.clear for sheet in compare(found[0])]  # type: ignore[union-attr]
    assert len(held) == 400
    # Four standard errors of a count of 400 at 95 %.
    assert np.mean(held) == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 400))


def test_footnotes_say_what_brackets_are() -> None:
    assert "paired t test" in text.FOOTNOTE
    assert "paired t test" in text.PUBLISHED_FOOTNOTE
