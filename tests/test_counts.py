"""What a step costs, counted: a change that adds a collective, a read by the host, an operator call or an autograd node
fails here, with the figure. Times belong to the benchmarks; counts are the same on every machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from counting import Counter, Counts, counting, versions

from hetero_kt import run as running
from hetero_kt.config import Recipe
from hetero_kt.distributed.launch import Ranks, StopSignal
from hetero_kt.options import Options
from hetero_kt.trainer import Trainer

ONE, INTERVAL, QUIET, MUTUAL = 2, 3, 5, 6
"""Steps of a run of 8: with one transfer; with the other, and the end of an interval of the log; with none; with both.
The first two are left out: ZeRO-3 learns its order in them, and a sensitivity is measured in the first."""
COUNTED_WITH = "torch 2.15.0, deepspeed 0.19.8, timm 1.0.31"
OURS_ALONE = ("collectives", "bytes", "reads")
"""What is compared with other versions too."""


def counted(recipe: Recipe) -> list[dict[str, Any]]:
    """What every step costs this rank, from the trainer's loop down."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    found: list[Counts] = []

    class Counted(Trainer):
        def _one_step(self) -> None:
            self.counter.counts = Counts()
            found.append(self.counter.counts)
            super()._one_step()

        def fit(self) -> bool:
            with counting() as self.counter:
                watch(self.method, self.counter)
                return super().fit()

    running.Trainer = Counted  # type: ignore[misc]
    try:
        with tiny.handlers_kept():
            running.run(recipe, Options(), ranks, StopSignal())
    finally:
        running.Trainer = Trainer  # type: ignore[misc]
    return [dataclasses.asdict(one) for one in found]


def watch(method: Any, counter: Counter) -> None:
    """A transfer, or an objective's forward: the operators of DeepSpeed's backward and step are its own."""
    exchange = getattr(method, "exchange", None)
    if exchange is None:
        method.terms = counter.watched(method.terms, lambda terms: list(terms.values()))
    else:
        exchange.propose = counter.watched(exchange.propose, lambda _: [path.proposal for path in exchange._due])
        exchange.learn = counter.watched(exchange.learn, lambda _: [])


def of_method(ranks: Any, folder: Path, method: str, stage: int) -> list[list[dict[str, Any]]]:
    """By rank and step."""
    quiet = {"steps": 8, "log_every": 4, "eval_every": 0}
    if method == "mergenet":
        made = tiny.recipe(folder, stage, **quiet)
    else:
        made = tiny.distillation(folder, stage, method, **quiet)  # type: ignore[arg-type]
    return ranks(2).run(counted, made)


FIGURES = tuple(one.name for one in dataclasses.fields(Counts) if one.name != "places")
"""The last ones known follow, of the rank that has more."""
KNOWN: dict[tuple[str, int], dict[int, Counts]] = {
    ("mergenet", 1): {
        ONE: Counts(collectives=1, bytes=2308, reads=1, operators=583, nodes=308, deepspeed=6),
        INTERVAL: Counts(collectives=3, bytes=6932, reads=4, operators=697, nodes=308, deepspeed=6),
        QUIET: Counts(collectives=0, bytes=0, reads=0, operators=0, nodes=0, deepspeed=6),
        MUTUAL: Counts(collectives=1, bytes=9224, reads=2, operators=1278, nodes=616, deepspeed=6),
    },
    ("mergenet", 2): {
        ONE: Counts(collectives=1, bytes=2308, reads=1, operators=583, nodes=308, deepspeed=6),
        INTERVAL: Counts(collectives=3, bytes=6932, reads=4, operators=697, nodes=308, deepspeed=6),
        QUIET: Counts(collectives=0, bytes=0, reads=0, operators=0, nodes=0, deepspeed=6),
        MUTUAL: Counts(collectives=1, bytes=9224, reads=2, operators=1278, nodes=616, deepspeed=6),
    },
    ("mergenet", 3): {
        ONE: Counts(collectives=3, bytes=8452, reads=1, operators=588, nodes=272, deepspeed=6),
        INTERVAL: Counts(collectives=5, bytes=24852, reads=4, operators=702, nodes=272, deepspeed=6),
        QUIET: Counts(collectives=0, bytes=0, reads=0, operators=0, nodes=0, deepspeed=6),
        MUTUAL: Counts(collectives=3, bytes=33288, reads=2, operators=1285, nodes=544, deepspeed=6),
    },
    ("fbt", 1): {
        INTERVAL: Counts(collectives=2, bytes=40, reads=2, operators=382, nodes=310, deepspeed=8),
        QUIET: Counts(collectives=0, bytes=0, reads=0, operators=382, nodes=310, deepspeed=8),
    },
    ("fbt", 2): {
        INTERVAL: Counts(collectives=2, bytes=40, reads=2, operators=382, nodes=310, deepspeed=8),
        QUIET: Counts(collectives=0, bytes=0, reads=0, operators=382, nodes=310, deepspeed=8),
    },
    ("fbt", 3): {
        INTERVAL: Counts(collectives=2, bytes=40, reads=2, operators=531, nodes=460, deepspeed=17),
        QUIET: Counts(collectives=0, bytes=0, reads=0, operators=531, nodes=460, deepspeed=17),
    },
    ("kd", 1): {
        INTERVAL: Counts(collectives=2, bytes=20, reads=2, operators=213, nodes=91, deepspeed=3),
        QUIET: Counts(collectives=0, bytes=0, reads=0, operators=213, nodes=91, deepspeed=3),
    },
    ("kd", 3): {
        INTERVAL: Counts(collectives=2, bytes=20, reads=2, operators=269, nodes=204, deepspeed=3),
        QUIET: Counts(collectives=0, bytes=0, reads=0, operators=269, nodes=204, deepspeed=3),
    },
    ("none", 1): {
        INTERVAL: Counts(collectives=2, bytes=16, reads=2, operators=67, nodes=83, deepspeed=3),
        QUIET: Counts(collectives=0, bytes=0, reads=0, operators=67, nodes=83, deepspeed=3),
    },
    ("none", 3): {
        INTERVAL: Counts(collectives=2, bytes=16, reads=2, operators=107, nodes=196, deepspeed=3),
        QUIET: Counts(collectives=0, bytes=0, reads=0, operators=107, nodes=196, deepspeed=3),
    },
}


@pytest.mark.parametrize(("method", "stage"), KNOWN)
def test_a_step_costs_what_was_known(ranks: Any, tmp_path: Path, method: str, stage: int) -> None:
    found = of_method(ranks, tmp_path, method, stage)
    told = []
    for step, known in KNOWN[method, stage].items():
        now = {count: max(of_rank[step][count] for of_rank in found) for count in FIGURES}
        compared = FIGURES if versions() == COUNTED_WITH else OURS_ALONE
        changed = {count: getattr(known, count) for count in compared if now[count] != getattr(known, count)}
        if changed:
            figures = ", ".join(f"{now[c]} {c}, last known {was} ({now[c] - was:+d})" for c, was in changed.items())
            places = "; ".join(sorted(set(found[0][step]["places"]))) or "nowhere"
            told.append(f"step {step}: {figures}. Ours are asked for in {places}. Now: {Counts(**now)}")
    about = f"{method}, ZeRO-{stage}; counted with {COUNTED_WITH}, and here are {versions()}"
    assert not told, "\n".join([about, *told])
