"""Differences between arms: intervals that hold the truth as often as they say, on made-up runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hetero_kt.statistics import paired, spread

VALUES = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=12)


@given(VALUES, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_interval_is_that_of_the_paired_t_test(pairs: list[tuple[float, float]], confidence: float) -> None:
    ours, theirs = (dict(enumerate(values)) for values in zip(*pairs, strict=True))
    found = paired(ours, theirs, confidence)
    assert found is not None
    differences = np.array(list(ours.values())) - np.array(list(theirs.values()))
    assert found.mean == pytest.approx(differences.mean(), abs=1e-9)
    half = stats.t.ppf((1 + confidence) / 2, len(pairs) - 1) * stats.sem(differences)
    assert found.low == pytest.approx(found.mean - half, abs=1e-9)
    assert found.high == pytest.approx(found.mean + half, abs=1e-9)


def test_against_scipy_on_numbers_written_down() -> None:
    ours, theirs = [53.0, 53.0, 59.0], [50.0, 52.0, 54.0]
    reference = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert found.mean == 3
    assert not found.clear


@pytest.mark.parametrize("true", [0.0, 0.7])
@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_holds_the_truth_95_times_in_100(true: float, n: int) -> None:
    """Runs of one seed share a part of their luck, which pairing takes out."""
    rng = np.random.default_rng(n)
    shared, own = rng.normal(60, 2, (4000, n)), rng.normal(0, 0.4, (2, 4000, n))
    held = 0
    for ours, theirs in zip(shared + true + own[0], shared + own[1], strict=True):
        found = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= true <= found.high
    # Four standard errors of a count of 4000 at 95 %.
    assert held / 4000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_a_gain_is_seen_when_it_is_larger_than_the_luck() -> None:
    rng = np.random.default_rng(0)
    shared, own = rng.normal(60, 2, 5), rng.normal(0, 0.1, (2, 5))
    found = paired(dict(enumerate(shared + own[0] + 1)), dict(enumerate(shared + own[1])))
    assert found is not None
    assert found.clear


def test_arms_that_are_the_same_are_not_apart() -> None:
    same, other = paired({0: 0.1 + 0.2, 1: 1.0}, {0: 0.3, 1: 1.0}), paired({0: 1.0, 1: 2.0}, {0: 2.0, 1: 1.0})
    assert same is not None
    assert other is not None
    assert (same.apart, other.apart) == (False, True)


def test_only_shared_seeds_count() -> None:
    found = paired({0: 1.0, 1: 3.0, 7: 90.0}, {1: 2.0, 0: 1.5, 9: 5.0})
    assert found is not None
    assert found.seeds == (0, 1)
    assert found.mean == 0.25
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_one_pair_has_a_difference_and_no_interval() -> None:
    found = paired({3: 5.0}, {3: 4.0})
    assert found is not None
    assert (found.mean, found.low, found.high, found.clear) == (1.0, None, None, False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_refused_instead_of_averaged(value: float) -> None:
    with pytest.raises(ValueError, match="leave that run out"):
        paired({0: value, 1: 1.0}, {0: 1.0, 1: 1.0})
    with pytest.raises(ValueError, match="leave that run out"):
        spread([1.0, value])


def test_spread_divides_by_n() -> None:
    found = spread([50.0, 52.0, 54.0])
    assert (found.mean, found.n) == (52, 3)
    assert found.std == pytest.approx(math.sqrt(8 / 3))
    with pytest.raises(ValueError, match="no values"):
        spread([])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_is_a_probability(confidence: float) -> None:
    with pytest.raises(ValueError, match="no probability"):
        paired({0: 1.0}, {0: 1.0}, confidence)
