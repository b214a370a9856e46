"""Run folders: what each is of, what it measured, why one cannot count; and which runs count together.

A finished run has a `result.json`. What cannot be read is said of its folder and stops no other's report.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetero_kt.config import Recipe, read_recipe
from hetero_kt.documents import EXACT, mapping, read_json, text, whole
from hetero_kt.messages import printable, shown

MARKS = ("result.json", "recipe.yaml", "metrics.jsonl")
MOST = 16 * 2**20
"""Bytes of a result.json or data.json that are read."""
MODELS, METRICS = 50, 100
"""So many models of a run, and metrics of each, are reported."""
LENGTH = 100
"""Characters of a name that are shown."""
LARGEST = 1e100
"""Numbers beyond it are no measurements, and their squares no numbers."""


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
    left_out: str = ""
    """What of its metrics is not reported, since there is too much of it."""

    @property
    def finished(self) -> bool:
        """Whether it has measured something."""
        return not self.problem

    def tested(self, model: str) -> Any:
        """The samples that it evaluated `model` on; None where that is not known."""
        samples = self.seen.get("data", {}).get(self._data(model))
        return samples[1] if isinstance(samples, list) and len(samples) == 2 else None

    def samples(self, model: str) -> int | None:
        """How many samples it evaluated `model` on; None where that is not known."""
        tested = self.tested(model)
        number = tested.get("samples") if isinstance(tested, dict) else None
        return number if type(number) is int and 0 <= number <= EXACT else None

    @property
    def ranks(self) -> int | None:
        """On how many it ran; None where that is not known."""
        number = self.result.get("world_size")
        return number if type(number) is int and 0 < number <= EXACT else None

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
        folders = sorted(_marked(root))
        if demand and not folders:
            raise ValueError(f"{path} holds no run: give a folder with a recipe.yaml in it or below it.")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return [read(folder) for folder in found.values()]


def _marked(root: Path) -> Iterable[Path]:
    """Folders at or below `root` with a file of a run; links to folders are not followed, what cannot be looked into is
    passed over."""
    waiting = [root]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except OSError:
            continue
        waiting += [place / name for name, folder in found if folder and name not in MARKS]
        if any(name in MARKS for name, _ in found):
            yield place


def read(folder: Path) -> Run:
    """The run in `folder`; what is wrong with it stands in `unknown` and `problem`."""
    recipe, unknown = _read_recipe(folder)
    # Where nothing in the folder says it, its place does: <recipe>/<arm>/seed<k>
    place = (*("", "", "", *folder.absolute().parts)[-3:-1],)
    name, arm = (recipe.name, recipe.method.arm) if recipe else map(_short, place)
    run = Run(folder, recipe, _short(name), arm, recipe.seed if recipe else -1, 0, {}, {}, {}, unknown)
    try:
        result = mapping(read_json(folder / "result.json", MOST), "the file")
        told = (_short(text(result.get("recipe"), "recipe")), _short(text(result.get("control"), "control")))
        seed, steps = whole(result.get("seed"), "seed"), whole(result.get("steps"), "steps")
        measured, left_out = _measured(mapping(result.get("metrics"), "metrics"))
    except FileNotFoundError:
        return replace(run, problem="is not finished")
    except ValueError as error:
        return replace(run, problem=f"has a result.json that cannot be read ({error})")
    if recipe is not None and (*told, seed) != (run.name, run.arm, run.seed):
        return replace(run, problem="has a result.json of another run than its recipe.yaml")
    try:
        seen = mapping(read_json(folder / "data.json", MOST), "the file")
        for entry in seen:
            mapping(seen[entry], shown(entry))
    except FileNotFoundError:
        seen = {}
    except ValueError as error:
        return replace(run, problem=f"has a data.json that cannot be read ({error})")
    name, arm = told
    run = replace(run, name=name, arm=arm, seed=seed, steps=steps)
    return replace(run, metrics=measured, seen=seen, result=result, left_out=left_out)


def _measured(found: Mapping[str, Any]) -> tuple[dict[str, dict[str, float]], str]:
    """The metrics of each model, as many as are reported; and a remark on the others."""
    measured: dict[str, dict[str, float]] = {}
    most = 0
    for model, values in itertools.islice(found.items(), MODELS):
        own = mapping(values, f"metrics of {_short(model)}")
        most = max(most, len(own))
        measured[_short(model)] = {
            _short(name): _number(value, f"{_short(name)} of {_short(model)}")
            for name, value in itertools.islice(own.items(), METRICS)
        }
    parts = [f"{len(found):,} models, of which the first {MODELS} are shown"] if len(found) > MODELS else []
    parts += [f"{most:,} metrics of a model, of which the first {METRICS} are shown"] if most > METRICS else []
    return measured, " and ".join(parts)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is {shown(value)}, no number")
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


def _short(name: str) -> str:
    return printable(name[: LENGTH + 1])[:LENGTH]


def _read_recipe(folder: Path) -> tuple[Recipe | None, str]:
    """The recipe, or why there is none."""
    try:
        recipe = read_recipe(folder / "recipe.yaml")
        whole(recipe.seed, "seed")
        whole(recipe.steps, "steps")
        return recipe, ""
    except FileNotFoundError:
        return None, "has no recipe.yaml that says what it is of"
    except ValueError as error:
        return None, f"has a recipe.yaml that cannot be read ({error})"


# --- what counts together ---

TOGETHER = "though what compares the rows of one rank (BatchNorm, relations, InfoNCE) saw others together"
"""Why the number of ranks may matter."""


def other_ranks(run: Run, like: Run, called: str) -> str:
    """On how many ranks `run` ran, and `like`, which is `called` so; empty for equal or unknown numbers."""
    ours, theirs = run.ranks, like.ranks
    if ours == theirs or None in (ours, theirs):
        return ""
    return f"ran with a world size of {ours} and {called} with {theirs}"


def one_per_seed(runs: Sequence[Run]) -> tuple[dict[int, Run], list[str]]:
    """The runs of one recipe and arm by seed, and a sentence on each that does not count.

    Two runs with one seed: neither counts, since nothing says which is meant. Runs that saw other samples than the run
    of the lowest seed, began from other files, or learned from a teacher with other weights, do not count either. Runs
    on other numbers of ranks count, and are named.
    """
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    counted, notes = {}, []
    for seed, ones in sorted(by_seed.items()):
        if len(ones) == 1:
            counted[seed] = ones[0]
        else:
            more = f" and {len(ones) - 3} more" if len(ones) > 4 else ""
            places = " and ".join(str(one.folder) for one in (ones[:3] if more else ones)) + more
            verdict = "both have seed {}: neither counts" if len(ones) == 2 else "all have seed {}: none counts"
            notes.append(f"{places} {verdict.format(seed)}, leave one of them.")
    first = next(iter(counted.values()), None)
    for seed, run in list(counted.items()):
        assert first is not None
        if run.seen.get("data") != first.seen.get("data"):
            unlike = "saw other samples than" if run.seen.get("data") else "does not say which samples it saw, unlike"
        elif (run.seen.get("teachers") or {}) != (first.seen.get("teachers") or {}):
            unlike = "has other weights of its teacher than"
        elif (run.seen.get("init") or {}) != (first.seen.get("init") or {}):
            unlike = "began from other weights than"
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
        if abs(value) <= LARGEST:  # false for NaN
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
