"""The scaling study's arithmetic: exponents, and where one cost falls below another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import scaling
from scaling import Bench, cheaper, exponent, layers


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
    from hetero_kt.distributed.launch import Ranks

    found = scaling.measure(scaling.transfer_of(Bench(), 64, 4), Bench(turns=1), Ranks(0, 1, 0, torch.device("cpu")))
    assert 0 < found["seconds"] < 60
    assert found["bytes"] >= 0
