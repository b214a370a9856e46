"""Whether a difference between two arms is more than the luck of their seeds.

Seeds pair the runs: those of one seed see the same batches, and what they share cancels in their difference. The
interval is that of the paired t test. It takes the differences as normal, which a handful of seeds can neither show nor
refute; of the metrics of one table, one in twenty misses its truth by design.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Values over seeds: their mean, and the population standard deviation (divided by n)."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of the seed-by-seed differences, and the interval that holds the true one with a given confidence."""

    mean: float
    low: float | None
    high: float | None
    """None where there are fewer than two pairs: one difference says nothing about how much such differences vary."""
    seeds: tuple[int, ...]
    """Those that both arms have; others do not count."""

    @property
    def apart(self) -> bool:
        """Whether the arms differ at all, rounding aside: a model that nothing reaches is the same in both."""
        return any(abs(x) > 1e-9 for x in (self.mean, self.low or 0.0, self.high or 0.0))

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def spread(values: Iterable[float]) -> Spread:
    """Mean and spread.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    values = list(values)
    if not values:
        raise ValueError("there are no values to average")
    _check_finite(values)
    mean = math.fsum(values) / len(values)
    return Spread(mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values)), len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float = CONFIDENCE) -> Difference | None:
    """Ours minus theirs (seed -> value), over the seeds that both have; None where they share none.

    The interval is mean ± t * s / sqrt(n): s is the sample standard deviation of the n differences (divided by n - 1),
    t the quantile of Student's distribution with n - 1 degrees of freedom.

    Raises:
        ValueError: a confidence outside of (0, 1), or a value that is not finite.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} is no probability: use more than 0 and less than 1")
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    _check_finite(differences)
    n, mean = len(seeds), math.fsum(differences) / len(seeds)
    if n < 2:
        return Difference(mean, None, None, seeds)
    from scipy.special import stdtrit

    std = math.sqrt(math.fsum((x - mean) ** 2 for x in differences) / (n - 1))
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * std / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, seeds)


def _check_finite(values: Iterable[float]) -> None:
    wrong = [x for x in values if not math.isfinite(x)]
    if wrong:
        raise ValueError(f"{wrong[0]} is no number to average: leave that run out")
