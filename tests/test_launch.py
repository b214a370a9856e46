"""Where a process finds its rank, and that a start waits for no compiler and no lock."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool

from hetero_kt.data import workers
from hetero_kt.distributed import launch

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment without ranks, given back as it was."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name in VARIABLES or name.startswith("SLURM_"):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


# --- real groups of two ranks ---


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    """Two processes that leave and enter groups; the other tests' ranks stay in theirs."""
    pool = RankPool(2)
    yield pool
    pool.close()


def meet(environments: list[dict[str, str]]) -> tuple[Any, ...]:
    """Enter a group in this environment, and add the ranks up there."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    mine = environments[int(os.environ["RANK"])]
    dist.destroy_process_group()
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(mine)
    placed = launch.place()
    ranks = launch.start()
    total = torch.tensor([10**ranks.rank])
    dist.all_reduce(total)
    for name, value in before.items():
        if value is not None:
            os.environ[name] = value
    for name in mine:
        if name not in before:
            del os.environ[name]
    return placed, (ranks.rank, ranks.world, ranks.local_rank, ranks.device.type), int(total)


def test_ranks_started_by_deepspeed_meet(pair: RankPool) -> None:
    port = str(launch.free_port())
    found = pair.run(
        meet,
        [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            for rank in (0, 1)
        ],
    )
    assert found == [((rank, 2), (rank, 2, rank, "cpu"), 11) for rank in (0, 1)]


def test_ranks_started_by_torchrun_meet_also_without_local_rank(pair: RankPool) -> None:
    port = str(launch.free_port())
    found = pair.run(
        meet,
        [
            {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            for rank in (0, 1)
        ],
    )
    assert found == [((rank, 2), (rank, 2, rank, "cpu"), 11) for rank in (0, 1)]


def slurm_port() -> int:
    """A free port among those that a job's number can mean."""
    for port in range(20000, 40000, 7):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


def test_ranks_of_a_slurm_step_meet_at_its_first_host(pair: RankPool, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames local[host,other]" ] && printf "localhost\\nother\\n"\n')
    scontrol.chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(slurm_port() - 20000),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "local[host,other]",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    # two nodes, so that each rank is the first of its own
    found = pair.run(meet, [job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"} for rank in (0, 1)])
    assert found == [((rank, 2), (rank, 2, 0, "cpu"), 11) for rank in (0, 1)]


# --- this process's environment alone ---


def test_a_plain_process_is_a_group_of_one_at_a_port_of_its_own() -> None:
    launch._fill_environment()
    assert launch.place() == (0, 1)
    assert {os.environ[name] for name in ("RANK", "LOCAL_RANK")} == {"0"}
    assert os.environ["WORLD_SIZE"] == "1"
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    first = os.environ["MASTER_PORT"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(first)))
        assert launch.free_port() != int(first)


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_one_sentence(missing: str) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    del os.environ[missing]
    with pytest.raises(ValueError, match=rf"^RANK is set but {missing} is not: .*\.$"):
        launch.start()


@pytest.mark.parametrize("script", [None, "exit 1", "true"])
def test_a_slurm_step_without_hosts_is_one_sentence(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))
    os.environ |= {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    with pytest.raises(ValueError, match=r"^scontrol .* set MASTER_ADDR .*\.$"):
        launch.start()


def test_a_batch_script_is_no_rank_of_its_job() -> None:
    os.environ |= {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    assert launch.place() == (0, 1)


@pytest.mark.parametrize(
    ("environment", "here"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_SIZE": "3"}, 3),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x12),3", "SLURM_NTASKS_PER_NODE": "8"}, 4),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 1),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "1", "LOCAL_SIZE": "2"}, 2),
    ],
)
def test_every_starter_says_how_many_ranks_share_a_machine(
    environment: dict[str, str], here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ |= environment
    assert launch.ranks_here() == here
    # room for 12 workers' results, shared by the ranks of this machine
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: SimpleNamespace(free=72_000))
    monkeypatch.setattr(workers, "_SHARED_MEMORY", ROOT)
    assert workers.usable(99, 1000) == 12 // here


def test_more_ranks_than_gpus_is_one_sentence_on_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        for rank in ("0", "1"):
            os.environ |= {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": "2",
                name: "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
            }
            with pytest.raises(ValueError, match=r"^2 ranks on a machine with 1 visible GPU\(s\): .*\.$"):
                launch.start()
        del os.environ[name]


def test_deterministic_is_said_to_torch_and_to_cublas() -> None:
    was = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        launch.make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = was


# --- nothing is compiled ---


def test_two_ranks_debug_beside_a_stale_lock_and_without_a_compiler(tmp_path: Path) -> None:
    extensions, path = tmp_path / "extensions", tmp_path / "bin"
    version = f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
    lock = extensions / version / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (extensions / "deepspeed_shm_comm").mkdir()
    (extensions / "deepspeed_shm_comm" / "lock").touch()
    before = sorted(extensions.rglob("*"))
    path.mkdir()
    for tool in ("cat", "env", "hostname", "sh", "uname"):
        where = Path("/usr/bin") / tool
        if where.exists():
            (path / tool).symlink_to(where)
    environment = os.environ | {
        "PATH": str(path),
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "CUDA_VISIBLE_DEVICES": "",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        [
            *(sys.executable, str(Path(sys.executable).with_name("deepspeed"))),
            *("--num_accelerators", "2", "--master_port", str(launch.free_port())),
            *(str(ROOT / "launchers" / "cifar_mergenet.py"), "--debug", "--output-dir", str(tmp_path / "runs")),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert list((tmp_path / "runs").rglob("result.json"))
    assert sorted(extensions.rglob("*")) == before
    assert "step 4/4" in ended.stdout
