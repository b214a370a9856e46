"""What tests share: ranks that start once, and the folder of real data where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    import torch

    for item in items:
        if item.get_closest_marker("data") and data_folder() is None:
            item.add_marker(pytest.mark.skip(reason="no data folder: set HETERO_KT_DATA"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets; only for tests marked `data`."""
    folder = data_folder()
    assert folder is not None
    return folder
