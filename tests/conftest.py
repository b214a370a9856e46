"""What tests share: ranks that start once, and the folder of real data where there is one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
_cache = tempfile.TemporaryDirectory()
os.environ.setdefault("HETERO_KT_CACHE", _cache.name)  # not the user's


@pytest.fixture(scope="session")
def ranks() -> Iterator[object]:
    """`ranks(world)`: a pool of that many processes, started at its first use and kept."""
    from ranks import RankPool

    pools: dict[int, RankPool] = {}

    def pool(world: int) -> RankPool:
        return pools.setdefault(world, RankPool(world))

    yield pool
    for started in pools.values():
        started.close()


def data_folder() -> Path | None:
    """The real data sets: HETERO_KT_DATA, or a folder shared/data beside the checkout."""
    named = os.environ.get("HETERO_KT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


def chromium() -> str:
    """The path of a Chromium; empty where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    import torch

    for item in items:
        if item.get_closest_marker("data") and data_folder() is None:
            item.add_marker(pytest.mark.skip(reason="no data folder: set HETERO_KT_DATA"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("browser") and not chromium():
            item.add_marker(pytest.mark.skip(reason="no Chromium: apt-get install chromium"))


_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Under CI, remember what was skipped without a reason that lies in the machine."""
    excused = "gpu" in report.keywords or ("data" in report.keywords and data_folder() is None)
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail") and not excused:
        _skipped.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """The same for files that skip themselves whole."""
    if os.environ.get("CI") and report.skipped:
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A test that CI does not run does not pass."""
    if _skipped and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name them."""
    for name in _skipped:
        terminalreporter.write_line(f"SKIPPED under CI, which counts as failed: {name}", red=True)


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets; only for tests marked `data`."""
    folder = data_folder()
    assert folder is not None
    return folder
