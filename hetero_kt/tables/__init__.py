"""The published tables of both papers, as data: per row its numbers and the command that runs it.

One YAML file per table, beside this one:

    title: what it shows
    metrics: [top1, top5]                      columns, named as in result.json
    notes: [...]                               what a reader has to know
    common: {NAME: LAUNCHER OPTIONS}           written as {NAME} in a command
    before: {RECIPE: COMMAND}                  teachers and pretraining: runs that commands name as run:RECIPE
    rows:
      - label: ...
        published: {top1: 63.87}               may be empty: a row of ours
        unverified: [top1]                     of these numbers the source was not at hand
        baseline: LABEL                        the row it is compared with
        model: mobilenetv2                     of the run, whose metrics count; or {cpu: ..., gpu: ..., paper: ...}
        controls: [noise, ...]                 further rows, of the same command with that --control
        cpu: COMMAND, or {missing: why}        likewise gpu and paper; {paper} in the others is this row's own of paper,
                                               so that the schedule and the name behind it are all that differs
"""

from __future__ import annotations

import importlib.util
import shlex
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from hetero_kt.config import Recipe, nearest
from hetero_kt.folder import run_folder
from hetero_kt.options import Options, Variants, resolve, runs_before
from hetero_kt.shipped import launcher_file

Budget = Literal["cpu", "gpu", "paper"]
BUDGETS: tuple[Budget, ...] = typing.get_args(Budget)

NOTHING_MOVES = "factors, nothing moves"
"""How the control `none` of a factorised pair is called: a layer in factors is another model."""


@dataclass(frozen=True)
class Command:
    """What starts one run."""

    launcher: str
    options: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join([f"launchers/{self.launcher}.py", *self.options])


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    label: str
    published: Mapping[str, float]
    unverified: tuple[str, ...]
    """Metrics whose published number was never seen at its source."""
    baseline: str
    """Label of the row that this one is compared with; empty for a baseline."""
    models: Mapping[Budget, str]
    """Whose metrics count, of those in a run."""
    commands: Mapping[Budget, Command]
    missing: Mapping[Budget, str]
    """Why there is no command."""


@dataclass(frozen=True)
class Table:
    """One published table."""

    name: str
    title: str
    metrics: tuple[str, ...]
    notes: tuple[str, ...]
    before: Mapping[str, Command]
    """Runs that others start from, by the recipe's name."""
    rows: tuple[Row, ...]
    plans: bool = False
    """Its commands plan and train nothing: they print what a model costs, and leave no run."""

    def row(self, label: str) -> Row:
        """The row called `label`."""
        return next(row for row in self.rows if row.label == label)

    def needed(self, command: Command) -> list[Command]:
        """What has to run before `command`, in order."""
        found: dict[str, Command] = {}
        for recipe, earlier in self.before.items():
            if any(option == f"run:{recipe}" for option in command.options):
                found |= {str(one): one for one in (*self.needed(earlier), earlier)}
        return list(found.values())


def names() -> list[str]:
    """Of all tables."""
    found = [entry.name.removesuffix(".yaml") for entry in files(__package__).iterdir() if entry.name.endswith(".yaml")]
    return sorted(found)


def read(name: str) -> Table:
    """The table called `name`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in names():
        raise ValueError(f"table {name} does not exist: use {nearest(name, names())}.")
    return parse(name, files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))


FIELDS = {"title", "metrics", "notes", "common", "before", "rows", "plans"}
ROW_FIELDS = {"label", "published", "unverified", "baseline", "model", "controls", *BUDGETS}


def parse(name: str, text: str) -> Table:
    """A table from its YAML.

    Raises:
        ValueError: a field that tables do not have, a missing or a wrong one; names the table and the row.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"table {name} is not YAML: {' '.join(str(error).split())}.") from error
    _check_fields(f"table {name}", content, FIELDS, {"title", "metrics", "rows"})
    common = content.get("common", {})
    before = {recipe: _command(name, recipe, line, common) for recipe, line in content.get("before", {}).items()}
    metrics = tuple(content["metrics"])
    rows = [row for entry in content["rows"] for row in _rows(name, entry, metrics, common)]
    labels = [row.label for row in rows]
    for row in rows:
        if labels.count(row.label) > 1:
            raise ValueError(f"table {name} has two rows {row.label!r}: tell them apart by their labels.")
        if row.baseline and row.baseline not in labels:
            raise ValueError(
                f"table {name}, {row.label}: baseline {row.baseline!r} is no row: use {nearest(row.baseline, labels)}."
            )
    notes = tuple(content.get("notes", ()))
    return Table(name, content["title"], metrics, notes, before, tuple(rows), bool(content.get("plans", False)))


def _rows(table: str, entry: Any, metrics: tuple[str, ...], common: Mapping[str, str]) -> list[Row]:
    """The row itself, then its controls."""
    _check_fields(f"table {table}, a row", entry, ROW_FIELDS, {"label", "model", *BUDGETS})
    label, where = entry["label"], f"table {table}, {entry['label']}"
    published = entry.get("published") or {}
    for metric, value in published.items():
        if metric not in metrics:
            raise ValueError(f"{where}: {metric} is no column: use {nearest(metric, metrics)}.")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{where}: published {metric} is {value!r}, which is no number.")
    unverified = tuple(entry.get("unverified", ()))
    if not set(unverified) <= set(published):
        raise ValueError(f"{where}: unverified names {', '.join(unverified)}, which are not all published.")
    model = entry["model"]
    models = {budget: model if isinstance(model, str) else model.get(budget, "") for budget in BUDGETS}
    commands: dict[Budget, Command] = {}
    missing: dict[Budget, str] = {}
    paper = _command(table, label, entry["paper"], common) if isinstance(entry["paper"], str) else None
    for budget in BUDGETS:
        given = entry[budget]
        if budget == "paper" and paper is not None:
            commands[budget] = paper
        elif isinstance(given, str):
            own = {"paper": shlex.join([paper.launcher, *paper.options])} if paper is not None else {}
            commands[budget] = _command(table, label, given, {**common, **own})
        elif isinstance(given, dict) and set(given) == {"missing"} and given["missing"]:
            missing[budget] = str(given["missing"])
        else:
            raise ValueError(f"{where}: {budget} is {given!r}: use a command, or {{missing: why}}.")
        if budget in commands and not models[budget]:
            raise ValueError(f"{where}: no model is named for {budget}: add it.")
    row = Row(label, published, unverified, entry.get("baseline", ""), models, commands, missing)
    return [row, *(_control(row, control) for control in entry.get("controls", ()))]


def _control(row: Row, control: str) -> Row:
    commands = {
        budget: replace(command, options=(*command.options, "--control", control))
        for budget, command in row.commands.items()
    }
    label = f"{row.label}: {NOTHING_MOVES if control == 'none' else control}"
    return replace(row, label=label, published={}, unverified=(), commands=commands)


def _command(table: str, row: str, line: str, common: Mapping[str, str]) -> Command:
    try:
        words = shlex.split(line.format(**common))
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"table {table}, {row}: {line!r} cannot be read ({error}).") from error
    if not words or words[0].startswith("-"):
        raise ValueError(f"table {table}, {row}: {line!r} begins with no launcher.")
    return Command(words[0], tuple(words[1:]))


def _check_fields(where: str, content: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {type(content).__name__}, not a mapping of fields.")
    for key in content:
        if key not in known:
            raise ValueError(f"{where}: {key} is no field: use {nearest(str(key), sorted(known))}.")
    for key in sorted(needed):
        if key not in content:
            raise ValueError(f"{where} ({content.get('label', '')}): {key} is missing: add it.")


# --- commands as recipes ---


@dataclass(frozen=True)
class Resolved:
    """What a command trains."""

    recipe: Recipe
    options: Options
    before: tuple[Recipe, ...]
    """Those of its own --first."""

    def folder(self, seed: int) -> Path:
        """Of the run with that seed."""
        return run_folder(replace(self.recipe, seed=seed))


@cache
def variants(launcher: Path) -> Variants:
    """The recipes of a launcher's file."""
    spec = importlib.util.spec_from_file_location(f"launcher_{launcher.stem}", launcher)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return typing.cast(Variants, module.VARIANTS)


def runs_called(command: Command) -> str:
    """The name of the recipe that `command` trains, at little cost; empty where it cannot be told."""
    given = dict(zip(command.options, command.options[1:], strict=False))
    try:
        known = variants(launcher_file(command.launcher).resolve())
        return given.get("--name") or known[given.get("--variant", next(iter(known)))]().name
    except (ValueError, KeyError):
        return ""


def resolved(command: Command, *more: str) -> Resolved:
    """The recipe that `command` trains, with `more` options behind its own.

    Raises:
        ValueError: as `options.resolve`, or a launcher that does not exist.
    """
    known = variants(launcher_file(command.launcher).resolve())
    try:
        recipe, options = resolve(known, [*command.options, *more])
    except SystemExit as end:  # the parser's own complaint, which it has printed
        raise ValueError(f"{command} is not understood: mend it in the table.") from end
    return Resolved(recipe, options, tuple(runs_before(recipe, options, known)))
