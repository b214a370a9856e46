"""Random numbers as a function of a counter: no generator, no state, the same numbers on any machine.

What is drawn for a sample depends on the key and the sample alone, so it does not matter which rank draws it,
when, or what was drawn before. The mixing function is SplitMix64's (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def key(*parts: int) -> int:
    """One 64-bit key from several integers; the order of the parts matters."""
    state = 0
    for part in parts:
        state = (state + _GOLDEN + part) & _MASK
        state = ((state ^ (state >> 30)) * _MIX[0]) & _MASK
        state = ((state ^ (state >> 27)) * _MIX[1]) & _MASK
        state ^= state >> 31
    return state


def bits(keys: int | NDArray[np.uint64], counters: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each counter; distinct counters under one key give distinct values."""
    state = np.asarray(keys, np.uint64) + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX[0])
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX[1])
    return state ^ (state >> np.uint64(31))


def below(random: NDArray[np.uint64], limit: int, *, first: int = 0, width: int = 16) -> NDArray[np.int64]:
    """Integers in [0, limit) from `width` (at most 32) of the random bits, those from bit `first` on.

    Each value's probability is off by less than 2**-width.
    """
    part = (random >> np.uint64(first)) & np.uint64((1 << width) - 1)
    return ((part * np.uint64(limit)) >> np.uint64(width)).astype(np.int64)


def permutation(key: int, size: int) -> NDArray[np.int64]:
    """A permutation of range(size), decided by the key."""
    return np.argsort(bits(key, np.arange(size)), kind="stable")
