"""Kills at random moments lose nothing but the steps since the last checkpoint; `make torture` is the long form."""

from __future__ import annotations

import random
from pathlib import Path

from torture import Torture, torture


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    settings = Torture(kills=4, stages=(1,), seed=random.randrange(10**6))
    tally = torture(settings, tmp_path, lambda line: None)
    assert not tally.problems, settings
    assert tally.survived == tally.kills == settings.kills
