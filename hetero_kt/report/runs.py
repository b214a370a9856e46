"""Run folders: what each is of, what it measured, why one cannot count; and which runs count together.

A finished run has a `result.json`. What cannot be read is said of its folder and stops no other's report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetero_kt.config import Recipe, from_yaml

MARKS = ("result.json", "recipe.yaml", "metrics.jsonl")


@dataclass(frozen=True)
class Run:
    """One run folder, as far as it can be read."""

    folder: Path
    recipe: Recipe | None
    name: str
    """Of its recipe."""
    arm: str
    seed: int
    steps: int
    metrics: Mapping[str, Mapping[str, float]]
    """model -> metric -> value, percentages in 0..100."""
    seen: Mapping[str, Any]
    """What its data.json says of its samples and teachers; empty where there is none."""
    result: Mapping[str, Any]
    """The whole result.json."""
    unknown: str = ""
    """Why nothing says which recipe it is of."""
    problem: str = ""
    """Why it cannot count, whatever it is compared with."""
    evaluations: int = 0
    """So many were there to choose the metrics from; 0: they are the last one's."""

    @property
    def finished(self) -> bool:
        """Whether it has measured something."""
        return not self.problem

    def tested(self, model: str) -> Any:
        """The samples that it evaluated `model` on; None where that is not known."""
        samples = self.seen.get("data", {}).get(self._data(model))
        return samples[1] if isinstance(samples, list) and len(samples) == 2 else None

    def held_out(self, model: str) -> bool:
        """Whether it evaluated `model` on a part of the training set."""
        return self.recipe is not None and bool(name := self._data(model)) and self.recipe.data[name].validation > 0

    def _data(self, model: str) -> str:
        """Which of the recipe's data sets `model`, or the average of its weights, is of; empty where that is not
        known."""
        models = self.recipe.models if self.recipe else {}
        name = model if model in models else model.removesuffix("_ema")
        return models[name].data if name in models else ""


def find(paths: Iterable[str | Path], *, demand: bool = False) -> list[Run]:
    """All run folders at or below `paths`, each once.

    Args:
        paths: folders, or files in run folders.
        demand: refuse a path without any run.

    Raises:
        ValueError: with `demand`, a path that does not exist or holds no run at all.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if demand and not path.exists():
            raise ValueError(f"{path} does not exist: give run folders, or a folder that holds some (such as runs).")
        root = path.parent if path.is_file() else path
        folders = sorted({mark.parent for name in MARKS for mark in root.rglob(name)})
        if demand and not folders:
            raise ValueError(f"{path} holds no run: give a folder with a recipe.yaml in it or below it.")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return [read(folder) for folder in found.values()]


def read(folder: Path) -> Run:
    """The run in `folder`; what is wrong with it stands in `unknown` and `problem`."""
    recipe, unknown = _read_recipe(folder)
    # Where nothing in the folder says it, its place does: <recipe>/<arm>/seed<k>
    name, arm = (recipe.name, recipe.method.arm) if recipe else (*("", "", "", *folder.absolute().parts)[-3:-1],)
    run = Run(folder, recipe, name, arm, recipe.seed if recipe else -1, 0, {}, {}, {}, unknown)
    if not (folder / "result.json").is_file():
        return replace(run, problem="is not finished")
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        measured = {
            str(model): {str(name): float(value) for name, value in values.items()}
            for model, values in result["metrics"].items()
        }
        told = (str(result["recipe"]), str(result["control"]), int(result["seed"]))
        steps = int(result["steps"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
        return replace(run, problem=f"has a result.json that cannot be read ({type(error).__name__})")
    if recipe is not None and told != (run.name, run.arm, run.seed):
        return replace(run, problem="has a result.json of another run than its recipe.yaml")
    try:
        seen = json.loads(text) if (text := _text(folder / "data.json")) else {}
        if not isinstance(seen, dict) or not all(isinstance(entry, dict) for entry in seen.values()):
            raise TypeError("not a mapping of mappings")
    except (ValueError, TypeError, OSError) as error:
        return replace(run, problem=f"has a data.json that cannot be read ({type(error).__name__})")
    name, arm, seed = told
    return replace(run, name=name, arm=arm, seed=seed, steps=steps, metrics=measured, seen=seen, result=result)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _read_recipe(folder: Path) -> tuple[Recipe | None, str]:
    """The recipe, or why there is none."""
    if not (folder / "recipe.yaml").is_file():
        return None, "has no recipe.yaml that says what it is of"
    try:
        return from_yaml(_text(folder / "recipe.yaml")), ""
    except (ValueError, OSError) as error:
        return None, f"has a recipe.yaml that cannot be read ({error})"


# --- what counts together ---

TOGETHER = "though what compares the rows of one rank (BatchNorm, relations, InfoNCE) saw others together"
"""Why the number of ranks may matter."""


def other_ranks(run: Run, like: Run, called: str) -> str:
    """On how many ranks `run` ran, and `like`, which is `called` so; empty for equal or unknown numbers."""
    ours, theirs = run.result.get("world_size"), like.result.get("world_size")
    if ours == theirs or None in (ours, theirs):
        return ""
    return f"ran with a world size of {ours} and {called} with {theirs}"


def one_per_seed(runs: Sequence[Run]) -> tuple[dict[int, Run], list[str]]:
    """The runs of one recipe and arm by seed, and a sentence on each that does not count.

    Two runs with one seed: neither counts, since nothing says which is meant. Runs that saw other samples than the run
    of the lowest seed, or learned from a teacher with other weights, do not count either. Runs on
    other numbers of ranks count, and are named.
    """
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    counted, notes = {}, []
    for seed, ones in sorted(by_seed.items()):
        if len(ones) == 1:
            counted[seed] = ones[0]
        else:
            places = " and ".join(str(one.folder) for one in ones)
            verdict = "both have seed {}: neither counts" if len(ones) == 2 else "all have seed {}: none counts"
            notes.append(f"{places} {verdict.format(seed)}, leave one of them.")
    first = next(iter(counted.values()), None)
    for seed, run in list(counted.items()):
        assert first is not None
        if run.seen.get("data") != first.seen.get("data"):
            unlike = "saw other samples than" if run.seen.get("data") else "does not say which samples it saw, unlike"
        elif (run.seen.get("teachers") or {}) != (first.seen.get("teachers") or {}):
            unlike = "has other weights of its teacher than"
        else:
            continue
        notes.append(f"{run.folder} {unlike} {first.folder}: it stays apart.")
        del counted[seed]
    notes += [
        f"{run.folder} {unlike}: both count, {TOGETHER}."
        for run in counted.values()
        if first is not None and (unlike := other_ranks(run, first, str(first.folder)))
    ]
    return counted, notes


def values(runs: Mapping[int, Run], model: str, metric: str) -> tuple[dict[int, float], list[str]]:
    """A metric by seed; one that is no number does not count, and is named."""
    found, notes = {}, []
    for seed, run in runs.items():
        value = run.metrics.get(model, {}).get(metric)
        if value is None:
            continue
        if math.isfinite(value):
            found[seed] = value
        else:
            notes.append(f"{run.folder} has {value} as {metric} of {model}: that does not count.")
    return found, notes


def trained_on_other_ranks(label: str, ours: Mapping[int, Run], baseline: str, theirs: Mapping[int, Run]) -> list[str]:
    """A sentence where a row and the baseline that it is compared with ran on other numbers of ranks."""
    for run in ours.values():
        for like in theirs.values():
            if unlike := other_ranks(run, like, baseline):
                return [f"{label} {unlike}: the difference counts, {TOGETHER}."]
    return []


def tested_apart(ours: Mapping[int, Run], model: str, theirs: Mapping[int, Run], other: str) -> bool:
    """Whether two groups of runs were evaluated on other samples, as far as that is known."""
    if not ours or not theirs:
        return False
    tested = [next(iter(runs.values())).tested(name) for runs, name in ((ours, model), (theirs, other))]
    return None not in tested and tested[0] != tested[1]
