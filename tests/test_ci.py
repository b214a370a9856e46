"""Under CI nothing is skipped in silence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SKIPS = """
import pytest

@pytest.mark.{mark}
def test_one():
    pytest.skip("not here")

def test_two():
    pass
"""


@pytest.mark.parametrize(
    ("ci", "mark", "folder", "status"),
    [
        ("true", "slow", "", 1),
        ("true", "gpu", "", 0),
        ("true", "data", "nowhere", 0),
        ("true", "data", ".", 1),
        ("", "slow", "", 0),
    ],
)
def test_a_skip_fails_unless_the_machine_lacks_what_it_needs(
    tmp_path: Path, ci: str, mark: str, folder: str, status: int
) -> None:
    here = Path(__file__).parent
    for file in (here / "conftest.py", here.parent / "pyproject.toml"):
        shutil.copy(file, tmp_path)
    (tmp_path / "test_skips.py").write_text(SKIPS.format(mark=mark))
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_skips.py"],
        cwd=tmp_path,
        env=os.environ | {"CI": ci, "CUDA_VISIBLE_DEVICES": "", "HETERO_KT_DATA": folder},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert ("counts as failed: test_skips.py::test_one" in ended.stdout) == bool(status)
