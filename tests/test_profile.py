"""The table of `--profile`: what counts where, and that it costs nothing unasked."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from hetero_kt.profile import part, profiled, table, times


def one_step() -> None:
    with part("forward"):
        time.sleep(0.02)
        with part("teacher"):
            time.sleep(0.03)
            torch.ones(3).exp()
    with part("gather"):
        time.sleep(0.01)
    time.sleep(0.005)


def test_a_part_counts_for_itself_and_what_is_in_none_is_other(tmp_path: Path) -> None:
    with profiled(tmp_path, True) as after_step:
        for _ in range(7):
            one_step()
            after_step()
    rows = {}
    for line in (tmp_path / "profile.txt").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) > 4:
            rows[cells[1]] = float(cells[2])
    assert list(rows) == ["teacher", "forward", "gather", "other", "step"], "parts that took no time are left out"
    for name, milliseconds in {"teacher": 30, "forward": 20, "gather": 10, "other": 5}.items():
        assert milliseconds <= rows[name] < milliseconds + 15, name
    assert rows["step"] == pytest.approx(sum(v for name, v in rows.items() if name != "step"), abs=0.1)
    assert (tmp_path / "profile.json").exists()


def test_a_run_of_fewer_steps_has_a_table_too(tmp_path: Path) -> None:
    with profiled(tmp_path, True) as after_step:
        for _ in range(3):
            one_step()
            after_step()
    assert "mean of 1 steps" in (tmp_path / "profile.txt").read_text()


def test_without_events_there_is_an_empty_table() -> None:
    found, steps = times([])
    assert steps == 0
    assert found["step"] == (0, 0)
    assert "step" in table([])


def test_nothing_is_recorded_while_nobody_takes_a_profile(tmp_path: Path) -> None:
    assert isinstance(part("forward"), nullcontext)
    with profiled(tmp_path, False) as after_step:
        one_step()
        after_step()
    assert not list(tmp_path.iterdir())
