"""The scaling study's arithmetic: exponents, and where one cost falls below another; what is counted as more is
transferred."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import growth
import scaling
from scaling import Bench, cheaper, exponent, layers

from hetero_kt.distributed.launch import Ranks

FEW = growth.Bench(sites=(1, 2, 4), models=(3,), ranks=(2,), usual=2, depth=4, width=32, rank=4, rows=4, turns=1)


def points(cost: Any, widths: tuple[int, ...] = (64, 128, 256, 512, 1024)) -> list[dict[str, float]]:
    return [{"width": width, "seconds": cost(width), "bytes": 8.0 * width} for width in widths]


def test_an_exponent_is_that_of_the_power_behind_it_and_small_widths_do_not_count() -> None:
    found = points(lambda w: 1e-7 * w**1.7 + (5.0 if w < 256 else 0.0))
    assert exponent(found, "seconds", 256) == pytest.approx(1.7)
    assert exponent(found, "bytes", 256) == pytest.approx(1)
    assert exponent(found, "seconds", 512) is None, "two points lie on any line"


def test_a_crossover_is_where_the_lead_begins_that_lasts() -> None:
    full = points(lambda w: w**2)
    assert cheaper(points(lambda w: 130.0 * w), full) == 256
    assert cheaper(points(lambda w: w**2 + 1), full) is None
    assert cheaper(points(lambda w: 1.0 if w != 512 else 1e9), full) == 1024


def test_layers_are_those_whose_steps_make_a_transfer_the_stated_share() -> None:
    of = {"step": points(lambda w: 0.5), "factor 4": points(lambda w: 1.0)}
    found = layers(of, "factor 4", Bench(cycle=4, share=0.05))
    assert set(found.values()) == {10}, "1 s is 5 % of 4 steps of 10 layers of 0.5 s"


def test_a_transfer_is_measured_with_time_and_memory() -> None:
    found = scaling.measure(scaling.transfer_of(Bench(), 64, 4), Bench(turns=1), Ranks(0, 1, 0, torch.device("cpu")))
    assert 0 < found["seconds"] < 60
    assert found["bytes"] >= 0


# --- as more is transferred ---


def grown() -> list[dict[str, Any]]:
    return growth.measure(FEW, Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu")))


@pytest.fixture(scope="module")
def points_of_two(ranks: Any) -> list[list[dict[str, Any]]]:
    """What either of two ranks has measured."""
    return ranks(2).run(grown)


def test_however_many_sites_and_models_a_transfer_is_two_gathers_and_a_broadcast(points_of_two: Any) -> None:
    """A factor of 4 x 32 has 512 bytes, a matrix of 32 x 32 has 4,096. One way, sources and targets are read before the
    step and targets after it; in a ring of three every weight is both. A proposal goes with its verdict, 4 bytes."""
    factor = [(1, 3 * 512, 516), (2, 6 * 512, 2 * 516), (4, 12 * 512, 4 * 516), (2, 2 * 3 * 2 * 512, 3 * 2 * 516)]
    full = [(1, 3 * 4096, 4100), (2, 6 * 4096, 2 * 4100), (4, 12 * 4096, 4 * 4100)]
    known = [
        *((1, "factor", sites, {}, {}, sent) for sites, _, sent in factor),
        *((3, "factor", sites, {"allgather": 2}, {"allgather": held}, sent) for sites, held, sent in factor),
        *((3, "full", sites, {"allgather": 2}, {"allgather": held}, sent) for sites, held, sent in full),
    ]
    for points in points_of_two:
        for point, (stage, mode, sites, gathers, held, sent) in zip(points, known, strict=True):
            assert (point["stage"], point["mode"], point["sites"]) == (stage, mode, sites)
            assert point["calls"] == {**gathers, "broadcast": 1}, point
            assert point["held"] == {**held, "broadcast": sent}, point
            assert point["sent"] == sum(point["held"].values()) / 2, "of two ranks, half passes through each"


def test_a_transfer_is_timed_in_its_parts_beside_the_step(points_of_two: Any) -> None:
    for point in points_of_two[0]:
        assert point["transfer"] == point["gather"] + point["adapter"]
        assert point["gather"] > 0
        assert point["adapter"] > 0
        assert 0 < point["step"] < 60
        assert point["engines send"] > 0


def test_counts_that_are_not_the_formulas_are_a_missed_aim_with_the_point_named(points_of_two: Any) -> None:
    points = copy.deepcopy(points_of_two[0])
    counted, *_ = growth.summed_up(points, FEW)
    assert (counted.value, counted.met) == (0, True)
    (one,) = (p for p in points if p["stage"] == 3 and p["mode"] == "full" and p["sites"] == 4)
    one["calls"]["allgather"] += 1
    counted, *_ = growth.summed_up(points, FEW)
    assert (counted.value, counted.met) == (1, False)
    assert "ZeRO-3 full, 4 sites" in counted.note


def test_growth_s_exponents_crossovers_and_picture_come_from_its_points(points_of_two: Any, tmp_path: Path) -> None:
    points = copy.deepcopy(points_of_two[0])
    for p in points:
        p |= {"gather": 0.9 * p["sites"] ** 0.5, "adapter": 0.5 * p["sites"], "step": 16.0}
        p["transfer"] = p["gather"] + p["adapter"]
    rows = {figure.what: figure for figure in growth.summed_up(points, FEW)}
    row = rows["p of a transfer's time ~ sites^p, ZeRO-3 full"]
    assert 0.5 < row.value < 1
    assert "gathers 0.50, adapters 1.00, 1 to 4" in row.beside
    assert rows["adapters take longer than gathers from, ZeRO-1 factor"].value == 4
    # 3.8 s for 4 sites; a step of two models of 4 layers takes 2 s a layer, of 4 steps 5 % are 0.4 s.
    assert rows["layers to a site, 4 sites, ZeRO-1 factor"].value == 3
    assert set(growth.curves(points, "models", FEW)) == {"ZeRO-1 factor", "ZeRO-3 factor"}
    file = tmp_path / "growth.png"
    growth.draw(points, growth.Bench(png=str(file), usual=2))
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(growth.Bench(sites=(32,)), "32 sites do not fit into 16 layers"), (growth.Bench(ranks=(1, 4)), "--among 2")],
)
def test_growth_s_options_that_do_not_fit_are_one_sentence(options: growth.Bench, sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        growth.main(options, [])


@pytest.mark.slow
def test_growth_starts_its_ranks_and_writes_its_files(tmp_path: Path) -> None:
    file, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    command = [sys.executable, growth.__file__, "--quick", "--json", str(file), "--png", str(picture)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    content = json.loads(file.read_text())
    counted = content["figures"][0]
    assert (counted["value"], counted["aim"]) == (0, 0), counted["note"]
    assert {p["ranks"] for p in content["points"]} == {1, 2}
    assert "one transfer as ranks grow" in ended.stdout
    assert picture.stat().st_size > 10_000
