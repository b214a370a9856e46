"""Rows of the papers' tables run under --debug: one for each method and launcher here, all in CI."""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import torch.distributed as dist

from hetero_kt import config, plan, tables
from hetero_kt import run as running
from hetero_kt.config import to_yaml
from hetero_kt.distributed.launch import Ranks, StopSignal


class Job(NamedTuple):
    """One command of a table."""

    table: str
    row: str
    command: tables.Command


@cache
def jobs(name: str) -> dict[str, Job]:
    """Of one table, teachers included: by what each trains under --debug, so that equal ones run once."""
    table = tables.read(name)
    rows = [(recipe, command) for recipe, command in table.before.items()]
    rows += [(f"{row.label} [{budget}]", command) for row in table.rows for budget, command in row.commands.items()]
    found: dict[str, Job] = {}
    for row, command in rows:
        one = tables.resolved(command, "--debug")
        key = str(command) if one.options.plan else to_yaml(replace(one.recipe, name=""))
        found.setdefault(key, Job(name, row, command))
    return found


def one_of_each() -> list[Job]:
    """The fewest commands, in order, that have every launcher and every arm in them."""
    found, seen = [], set()
    for name in tables.names():
        for row in tables.read(name).rows:
            for command in row.commands.values():
                words = command.options
                arm = next((words[i + 1] for i, word in enumerate(words) if word in ("--control", "--method")), "")
                if "--plan" not in words and not {command.launcher, arm} <= seen:
                    seen |= {command.launcher, arm}
                    found.append(Job(name, row.label, command))
    return found


def run(todo: list[Job], folder: str) -> list[tuple[str, float]]:
    """Every command on this pool's ranks, as its launcher would; seconds by row."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    seconds: list[tuple[str, float]] = []
    made: set[str] = set()
    for job in todo:
        started = time.perf_counter()
        try:
            one = tables.resolved(job.command, "--debug", "--output-dir", folder)
            with (
                tiny.handlers_kept(),
                torch.autograd.set_detect_anomaly(True),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                if one.options.plan:
                    plan.show(one.recipe, ranks.world)
                else:
                    first = [recipe for recipe in one.before if recipe.name not in made]
                    made |= {recipe.name for recipe in first}
                    assert all(running.run(recipe, one.options, ranks, StopSignal()) for recipe in (*first, one.recipe))
        except Exception as error:
            raise AssertionError(f"{job.table}, {job.row}: {job.command}: {error}") from error
        seconds.append((f"{job.table}, {job.row}", time.perf_counter() - started))
    return seconds


def slowest_first(seconds: list[tuple[str, float]]) -> str:
    return "\n".join(f"{s:6.2f} s  {row}" for row, s in sorted(seconds, key=lambda entry: -entry[1]))


def test_one_row_of_each_method_and_launcher_runs(ranks: Any, tmp_path: Path) -> None:
    todo = one_of_each()
    arms = {*config.MergeNet({}).arms(), *config.Distill({}).arms()} - {"transfer"}  # which no command has to name
    assert arms <= {word for job in todo for word in job.command.options}
    rows = [row for name in tables.names() for row in tables.read(name).rows]
    assert {job.command.launcher for job in todo} == {c.launcher for row in rows for c in row.commands.values()}
    print(slowest_first(ranks(2).run(run, todo, str(tmp_path), timeout=600)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", tables.names())
def test_every_row_runs(ranks: Any, tmp_path: Path, name: str) -> None:
    """What an earlier table has run already is not run again."""
    before = [key for other in tables.names()[: tables.names().index(name)] for key in jobs(other)]
    todo = [job for key, job in jobs(name).items() if key not in before]
    for start in range(0, len(todo), 20):
        seconds = ranks(2).run(run, todo[start : start + 20], str(tmp_path / str(start)), timeout=600)[0]
        print(slowest_first(seconds))
