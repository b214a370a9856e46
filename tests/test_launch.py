"""Where a process finds its rank, and that a start waits for no compiler and no lock."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import RankPool

from hetero_kt import run as running
from hetero_kt.data import workers
from hetero_kt.distributed import launch, meeting
from hetero_kt.options import Options

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


def muon() -> tuple[bool, bool]:
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5

    return zeropower_via_newtonschulz5.__code__.co_name == "zeropower_via_newtonschulz5", (
        compiler.compile() is torch.compile
    )


def test_deepspeed_does_not_load_a_compiler_to_ask_whose_optimizer_it_is(pair: RankPool) -> None:
    """As it would by compiling what it asks for; what else it compiles stays its own."""
    for plain, restored in pair.run(muon):
        assert plain
        assert restored


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


# --- ranks that do not fit together ---


def refused(environments: list[dict[str, str]], same: list[dict[str, str]], gpus: list[str], seconds: float) -> str:
    """What this rank is told at a meeting; empty where all is well."""
    rank = int(os.environ["RANK"])
    before = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update(environments[rank])
    try:
        meeting.meet(rank, len(same), gpus[rank], same[rank], seconds)
    except meeting.NoMeeting as error:
        return f"no meeting: {error}"
    except ValueError as error:
        return str(error)
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})
    return ""


def addresses(port: int | None = None) -> list[dict[str, str]]:
    return [{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or launch.free_port())}] * 2


def test_ranks_that_agree_meet(pair: RankPool) -> None:
    assert pair.run(refused, addresses(), [{"--seed": "1"}] * 2, ["GPU-1", "GPU-2"], 60.0) == ["", ""]
    assert pair.run(refused, addresses(), [{}] * 2, ["", ""], 60.0) == ["", ""]


def test_another_command_on_one_rank_is_named_on_all(pair: RankPool) -> None:
    told = pair.run(refused, addresses(), [{"--seed": "1", "--debug": "True"}, {"--seed": "2"}], ["", ""], 60.0)
    here = socket.gethostname()
    assert (
        told
        == [
            f"rank 1 on {here} has --seed 2, and the first rank 1: start all ranks with the same command and the same "
            "environment."
        ]
        * 2
    )


def test_another_version_on_one_rank_is_named_on_all(pair: RankPool) -> None:
    told = pair.run(with_another_torch, addresses())
    assert told[0] == told[1]
    assert re.match(r"rank 1 on \S+ has torch 1\.0, and the first rank \S+: start all ranks with the same", told[0])


def with_another_torch(environments: list[dict[str, str]]) -> str:
    rank = int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(meeting, "versions", lambda: {**VERSIONS, "torch": "1.0"})
        return refused(environments, [{}, {}], ["", ""], 60.0)


VERSIONS = meeting.versions()


def test_two_ranks_on_one_gpu_are_named_on_both(pair: RankPool) -> None:
    told = pair.run(refused, addresses(), [{}, {}], ["GPU-7", "GPU-7"], 60.0)
    assert told[0] == told[1]
    assert re.match(r"ranks 0 and 1 both have GPU GPU-7 of \S+: start one process per GPU, .*\.$", told[0])


def test_a_rank_that_does_not_come_is_named_by_those_that_came(pair: RankPool) -> None:
    begun = time.monotonic()
    told = pair.run(refused_of_three, addresses())
    assert told[0] == told[1]
    assert re.match(r"no meeting: of 3 ranks 1 did not come within 3 s \(rank 2\): see their logs, .*\.$", told[0])
    assert time.monotonic() - begun < 30


def refused_of_three(environments: list[dict[str, str]]) -> str:
    return refused(environments, [{}] * 3, [""] * 3, 3.0)


def test_a_missing_first_rank_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    port = launch.free_port()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.raises(
        meeting.NoMeeting, match=rf"^rank 1 on \S+ has not reached the first rank at 127.0.0.1:{port} within 2 s: "
    ):
        meeting.meet(1, 2, "", {}, 2.0)


def test_ranks_that_did_not_find_each_other_leave_with_another_status_than_wrong_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch file puts a job back into the queue after the one and not after the other."""
    for error, status in ((meeting.NoMeeting("nobody is here."), 1), (ValueError("no such thing."), 2)):

        def start(*_: Any, error: ValueError = error) -> None:
            raise error

        monkeypatch.setattr(launch, "start", start)
        monkeypatch.setattr(sys, "argv", ["demo.py"])
        with pytest.raises(SystemExit) as end:
            running.main({"default": lambda: tiny.recipe(Path("runs"))})
        assert end.value.code == status
        assert capsys.readouterr().err == f"error: {error}\n"


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with pytest.raises(
            meeting.NoMeeting, match=rf"^the first rank cannot open port {port} of 127.0.0.1 .*MASTER_PORT"
        ):
            meeting.meet(0, 2, "", {}, 2.0)


def test_what_ranks_agree_on_is_the_command_but_not_where_data_lie() -> None:
    recipe = tiny.recipe(Path("runs"))
    ours = running.agreed_on(recipe, Options())
    changed = {
        name
        for name, value in running.agreed_on(
            replace(recipe, data_dir="/node/local", seed=9), Options(debug=True)
        ).items()
        if ours[name] != value
    }
    assert changed == {"--seed", "--debug"}


def listening() -> set[str]:
    """The addresses on which this rank's sockets wait for others."""
    found = psutil.Process().net_connections(kind="tcp")
    return {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}


def test_ranks_of_one_machine_listen_for_no_other(ranks: Any) -> None:
    first, other = ranks(2).run(listening)
    assert first, "the store, at least"
    assert first | other <= {"127.0.0.1", "::1"}
