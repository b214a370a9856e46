"""Comparisons over controls and seeds: arithmetic, tables, curves, and runs that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hetero_kt import report


def write_run(root: Path, control: str, seed: int, top1: float, steps: int = 20, recipe: str = "toy") -> Path:
    folder = root / recipe / control / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"name: {recipe}\n")
    lines: list[dict[str, float]] = [{"step": s, "cnn/loss": 2.0 / s + seed} for s in range(1, steps + 1)]
    lines += [{"step": s, "cnn/test_top1": top1 * s / steps} for s in range(5, steps + 1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"cnn": {"loss": 2.0 - top1 / 100, "top1": top1}}
    result = {"recipe": recipe, "control": control, "seed": seed, "steps": steps, "metrics": metrics}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


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


def rows_by_control(folder: Path) -> dict[str, report.Row]:
    return {row.control: row for row in report.compare(report.find_runs([folder])[0])}


def test_mean_population_spread_and_count(runs: Path) -> None:
    cell = rows_by_control(runs)["none"].cells["top1"]
    assert (cell.mean, cell.n) == (52, 3)
    assert cell.std == pytest.approx(np.sqrt(8 / 3))
    assert cell.difference is None


def test_difference_is_paired_where_seeds_agree(runs: Path) -> None:
    rows = rows_by_control(runs)
    transfer, noise = rows["transfer"].cells["top1"], rows["noise"].cells["top1"]
    assert transfer.difference == pytest.approx(3)
    assert transfer.difference_std == pytest.approx(np.std([3, 1, 5]))
    assert noise.difference == pytest.approx(-2)
    assert noise.difference_std is None


def test_controls_come_in_order_and_unfinished_runs_stay_out(runs: Path) -> None:
    finished, unfinished = report.find_runs([runs])
    assert list(rows_by_control(runs)) == ["none", "transfer", "noise"]
    assert [folder.relative_to(runs).as_posix() for folder in unfinished] == ["toy/shuffled/seed0"]
    assert report.remarks(finished, unfinished) == [f"Left out, not finished: {runs / 'toy/shuffled/seed0'}"]


def test_without_a_baseline_there_is_no_difference(tmp_path: Path) -> None:
    write_run(tmp_path, "transfer", 0, 50)
    assert rows_by_control(tmp_path)["transfer"].cells["top1"].difference is None


def test_a_run_named_twice_counts_once(runs: Path) -> None:
    again = [runs, runs / "toy" / "none", runs / "toy" / "none" / "seed0" / "result.json"]
    assert len(report.find_runs(again)[0]) == 8


def test_two_folders_with_one_seed_and_unequal_lengths_are_remarked(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", "none", 0, 50)
    b = write_run(tmp_path / "b", "none", 0, 51, steps=30)
    finished, _ = report.find_runs([tmp_path])
    assert report.remarks(finished) == [
        f"Counted twice, none with seed 0: {a} and {b}",
        "Runs of toy differ in length: 20, 30 steps",
    ]


def test_markdown(runs: Path) -> None:
    finished, unfinished = report.find_runs([runs])
    text = report.markdown(report.compare(finished), report.remarks(finished, unfinished))
    lines = text.splitlines()
    assert lines[0] == "**toy: cnn**"
    assert lines[2] == "| control | seeds | top-1 (%) | Δ | loss | Δ |"
    assert lines[4] == "| none | 3 | 52.00 ± 1.63 |  | 1.480 ± 0.016 |  |"
    assert lines[5] == "| transfer | 3 | 55.00 ± 2.83 | +3.00 ± 1.63 | 1.450 ± 0.028 | -0.030 ± 0.016 |"
    assert lines[6] == "| noise | 2 | 50.00 ± 1.00 | -2.00 | 1.500 ± 0.010 | +0.020 |"
    assert f"- Left out, not finished: {runs / 'toy/shuffled/seed0'}" in lines
    assert {line.count("|") for line in lines if line.startswith("|")} == {7}


@pytest.mark.parametrize("width", [80, 140])
def test_the_console_shows_everything(runs: Path, width: int) -> None:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    report.table(runs, console)
    text = console.export_text()
    for expected in ("toy: cnn", "transfer", "55.00 ± 2.83", "Δ +3.00 ± 1.63", "seed0", "population"):
        assert expected in text


def test_finish_writes_what_it_shows(runs: Path) -> None:
    report.finish(runs / "toy", Console(quiet=True))
    assert "| transfer | 3 |" in (runs / "toy" / "report.md").read_text()
    assert (runs / "toy" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_finish_with_nothing_finished_writes_nothing(tmp_path: Path) -> None:
    (write_run(tmp_path, "none", 0, 1) / "result.json").unlink()
    report.finish(tmp_path, Console(quiet=True))
    assert not (tmp_path / "report.md").exists()


def test_curves_name_what_they_leave_out(runs: Path, tmp_path: Path) -> None:
    png = tmp_path / "new" / "curves.png"
    assert report.curves([runs], png) == [runs / "toy" / "shuffled" / "seed0"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_curves_have_a_line_per_control_and_a_band_per_seeds(runs: Path) -> None:
    figure = report._figure(report.find_runs([runs])[0])
    top, bottom = figure.axes
    assert len(top.lines) == len(bottom.lines) == 3
    assert len(top.collections) == 3
    assert np.allclose(top.lines[0].get_ydata(), [13, 26, 39, 52])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "none (3)",
        "transfer (3)",
        "noise (2)",
    ]


def test_curves_of_several_recipes_say_which(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, 50, recipe="a")
    write_run(tmp_path, "none", 0, 51, recipe="b")
    figure = report._figure(report.find_runs([tmp_path])[0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a: none", "b: none"]


def test_curves_without_a_finished_run(tmp_path: Path) -> None:
    (write_run(tmp_path, "none", 0, 1) / "result.json").unlink()
    with pytest.raises(ValueError, match="has finished: there are no curves to draw yet"):
        report.curves([tmp_path], tmp_path / "x.png")


def test_band_takes_common_steps_and_averages_long_curves() -> None:
    steps, mean, std = report.band([{1: 1.0, 2: 2.0, 3: 9.0}, {1: 3.0, 2: 4.0}, {}])
    assert steps.tolist() == [1, 2]
    assert mean.tolist() == [2, 3]
    assert std.tolist() == [1, 1]
    long, level, spread = report.band([{step: float(step) for step in range(1000)}])
    assert len(long) == report.POINTS
    assert np.allclose(long, level)
    assert not spread.any()
    assert all(len(part) == 0 for part in report.band([]))


def test_metrics_of_a_killed_run(tmp_path: Path) -> None:
    whole = ['{"step": 1, "a/loss": 1}', '{"step": 2, "a/loss": 2}', '{"step": 2, "a/loss": 3, "note": "x"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*whole, '{"step": 3, "a']))
    assert report.read_metrics(tmp_path) == {"a/loss": {1: 1.0, 2: 3.0}}


def test_bad_folders_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone does not exist: give run folders, or a folder that holds some"):
        report.find_runs([tmp_path / "gone"])
    with pytest.raises(ValueError, match=r"holds no run: give a folder with a recipe.yaml in it or below it\."):
        report.find_runs([tmp_path])


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"recipe": "a", "control": "b", "seed": "x"}'])
def test_a_result_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "none", 0, 1)
    (folder / "result.json").write_text(content)
    with pytest.raises(ValueError, match=r"result.json cannot be read \(.*\): remove it and start the run again"):
        report.find_runs([tmp_path])


def test_a_difference_that_rounds_to_nothing_has_no_minus(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, 50)
    write_run(tmp_path, "transfer", 0, 49.999)
    text = report.markdown(report.compare(report.find_runs([tmp_path])[0]))
    assert "| transfer | 1 | 50.00 | +0.00 | 1.500 | +0.000 |" in text
