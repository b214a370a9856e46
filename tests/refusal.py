"""A launcher's `main` on this rank up to where engines start, and what a refusal has to look like."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from test_launchers import load

from hetero_kt import options
from hetero_kt import run as running
from hetero_kt.distributed import launch
from hetero_kt.distributed.launch import Ranks
from hetero_kt.models.teacher import Frozen

Ended = tuple[Any, str, str]
"""Status, stdout, stderr."""


def start(launcher: Path, arguments: Sequence[str]) -> Ended:
    """Its `main` with these arguments; where it would start an engine, the status says so instead."""

    def no_engine(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, tiny.handlers_kept():
        patch.setattr(running.parts.models, "build_learner", no_engine)
        patch.setattr(Frozen, "start", no_engine)
        patch.setattr(launch, "start", lambda *_: Ranks(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu")))
        patch.setattr(dist, "destroy_process_group", lambda: None)
        patch.setattr(options, "PATIENCE", 0.0)
        patch.setattr(sys, "argv", [launcher.name, *arguments])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                running.main(load(launcher).VARIANTS)
                status: Any = 0
            except SystemExit as end:
                status = end.code
            except AssertionError as error:
                status = str(error)
    return status, out.getvalue(), err.getvalue()


def assert_refused(found: Sequence[Ended], words: Sequence[str]) -> None:
    """Every rank ended with 2, and the first alone said why, in one line with all of `words`."""
    assert [status for status, _, _ in found] == [2] * len(found), found
    assert [out for _, out, _ in found] == [""] * len(found)
    first, *others = (err for _, _, err in found)
    assert others == [""] * len(others)
    assert first.count("\n") == 1, first
    assert first.startswith("error: ")
    for word in words:
        assert word in first, first
