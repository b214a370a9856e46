"""Where a process finds its rank, and that a start waits for no compiler and no lock."""

from __future__ import annotations

import contextlib
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
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankPool

from hetero_kt import run as running
from hetero_kt.data import workers
from hetero_kt.distributed import environment, hosts, launch, meeting
from hetero_kt.options import Options
from hetero_kt.start import agreed_on

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment without ranks, given back as it was."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name in VARIABLES or name.startswith(("SLURM_", "PMI", "OMPI_", "MV2_")):
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


def slurm_job() -> str:
    """The number of a job whose port is free."""
    for job in range(1, 500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port_of(SLURM_JOB_ID=str(job)))):
                return str(job)
    raise AssertionError("no free port")


STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "node[1-2]",
}


def filled(**variables: str) -> dict[str, str]:
    """What torch's process group is told in this environment, which is left as it was."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        environment.fill()
        return {name: os.environ[name] for name in VARIABLES if name in os.environ}
    finally:
        os.environ.clear()
        os.environ.update(before)


def port_of(**variables: str) -> int:
    return int(filled(**STEP | variables)["MASTER_PORT"])


def test_ranks_of_a_slurm_step_meet_at_its_first_host_without_scontrol(pair: RankPool, tmp_path: Path) -> None:
    step = STEP | {"SLURM_JOB_ID": slurm_job(), "SLURM_STEP_NODELIST": "local[host,other]", "PATH": str(tmp_path)}
    # two nodes, so that each rank is the first of its own
    found = pair.run(meet, [step | {"SLURM_PROCID": str(rank)} for rank in (0, 1)])
    assert found == [((rank, 2), (rank, 2, 0, "cpu"), 11) for rank in (0, 1)]


# --- this process's environment alone ---


def test_a_plain_process_is_a_group_of_one_at_a_port_of_its_own() -> None:
    environment.fill()
    assert launch.place() == (0, 1)
    assert {os.environ[name] for name in ("RANK", "LOCAL_RANK")} == {"0"}
    assert os.environ["WORLD_SIZE"] == "1"
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    first = os.environ["MASTER_PORT"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(first)))
        assert launch.free_port() != int(first)


STATED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_one_sentence(missing: str) -> None:
    os.environ |= STATED
    del os.environ[missing]
    with pytest.raises(ValueError, match=rf"^RANK is set but {missing} is not: .*\.$"):
        launch.start()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": ""}, "RANK is '' and no number: start with deepspeed, torchrun or srun, or unset RANK."),
        ({"RANK": "one", "MASTER_PORT": "x"}, "RANK is 'one' and no number; MASTER_PORT is 'x' and no number: "),
        ({"RANK": "-1"}, "RANK is '-1' and no number: "),
        ({"RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2: "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0: "),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0' and no number: "),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK 2 is not below WORLD_SIZE 2: "),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK 1 is not below LOCAL_WORLD_SIZE 1: "),
        ({"LOCAL_SIZE": "4"}, "LOCAL_SIZE 4 is more than WORLD_SIZE 2: "),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is empty: "),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT 70000 is no port (1 to 65535): "),
    ],
)
def test_all_that_is_wrong_with_a_starter_s_environment_is_one_sentence(variables: dict[str, str], said: str) -> None:
    os.environ |= STATED | variables
    with pytest.raises(ValueError) as error:
        launch.start()
    assert str(error.value).startswith(said)


def test_two_faults_are_said_at_once_and_before_the_meeting_point_is_needed() -> None:
    os.environ |= {"RANK": "3", "LOCAL_RANK": "x"}
    with pytest.raises(ValueError) as error:
        launch.place()
    assert str(error.value) == (
        "RANK is set but WORLD_SIZE and MASTER_ADDR and MASTER_PORT are not; LOCAL_RANK is 'x' and no number: "
        "start with deepspeed, torchrun or srun, or unset RANK."
    )


def test_ranks_of_a_plan_need_no_meeting_point() -> None:
    os.environ |= {"RANK": "1", "WORLD_SIZE": "8"}
    assert launch.place() == (1, 8)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_half_a_starter_s_environment_is_no_world_of_one(name: str) -> None:
    os.environ[name] = "1"
    with pytest.raises(ValueError, match=rf"^{name} is set but RANK is not: start with .*, or unset {name}\.$"):
        launch.place()


@pytest.mark.parametrize("name", ["HETERO_KT_MEETING_SECONDS", "DEEPSPEED_TIMEOUT"])
@pytest.mark.parametrize("value", ["", "soon", "-3", "nan", "0"])
def test_a_waiting_time_that_is_no_number_is_one_sentence(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    for ask in (launch.place, launch.start):
        with pytest.raises(ValueError, match=rf"^{name} '{value}' is no .*number of .*: use \d0, for example\.$"):
            ask()


# --- Slurm ---


def test_a_step_s_own_variables_come_before_the_job_s() -> None:
    job = {"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_NTASKS_PER_NODE": "2"}
    step = {"SLURM_STEP_NODELIST": "node[3-4]", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    found = filled(**STEP | job | step)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("1", "2", "node3")
    os.environ |= STEP | job | step
    assert launch.place() == (1, 2)
    assert launch.ranks_here() == 1


def test_ranks_of_one_host_meet_on_loopback_where_its_name_need_not_resolve() -> None:
    assert filled(**STEP | {"SLURM_STEP_NODELIST": "no.such.host"})["MASTER_ADDR"] == "127.0.0.1"
    assert filled(**STEP | {"MASTER_ADDR": "10.0.0.7"})["MASTER_ADDR"] == "10.0.0.7"


def test_ports_of_a_job_s_steps_and_restarts_differ_and_are_not_ephemeral() -> None:
    steps = [port_of(SLURM_STEP_ID=str(step)) for step in range(50)]
    restarts = [port_of(SLURM_RESTART_COUNT=str(count)) for count in range(1, 4)]
    others = [port_of(SLURM_JOB_ID=str(job)) for job in (1, 4712, 4_000_000_000)]
    ports = [*steps, *restarts, *others]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < 20000 for port in ports), "slurm/job.sh takes those from 20000"
    assert port_of(SLURM_PROCID="1") == steps[0]
    assert port_of(MASTER_PORT="29500") == 29500


@pytest.mark.parametrize("step", ["4294967290", "4294967291", "4294967292", "4294967293"])
def test_an_interactive_shell_is_a_process_alone(step: str) -> None:
    """And a batch script's step, and those that Slurm keeps for itself."""
    os.environ |= {**STEP, "SLURM_STEP_ID": step, "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "4"}
    assert launch.place() == (0, 1)
    assert launch.ranks_here() == 1
    found = filled()
    assert (found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("1", "127.0.0.1")


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_a_slurm_step_that_lacks_a_variable_is_one_sentence(missing: str) -> None:
    os.environ |= STEP
    del os.environ[missing]
    with pytest.raises(
        ValueError, match=rf"^SLURM_STEP_ID is set but {missing} is not: start with srun, or set RANK, "
    ):
        launch.start()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS is 'two' and no number: start with srun, "),
        ({"SLURM_PROCID": "2"}, "SLURM_PROCID 2 is not below SLURM_STEP_NUM_TASKS 2: "),
        ({"SLURM_STEP_NODELIST": "node[1-2"}, "SLURM_STEP_NODELIST 'node[1-2' is no list of hosts: "),
        ({"SLURM_STEP_NODELIST": "node[2-1]"}, "SLURM_STEP_NODELIST holds 2-1, a range that ends before it begins: "),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_ID is set but SLURM_STEP_NODELIST is not: "),
        ({"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID is 'x' and no number: "),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is '8' and SLURM_STEP_NUM_TASKS is '2': "),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is '1' and SLURM_LOCALID is '0': "),
    ],
)
def test_what_is_wrong_with_a_slurm_step_is_one_sentence(variables: dict[str, str], said: str) -> None:
    os.environ |= STEP | variables
    with pytest.raises(ValueError) as error:
        launch.start()
    assert str(error.value).startswith(said)


def test_a_step_may_have_been_given_what_it_says_itself() -> None:
    """As scripts export it, of which one sets RANK too and not LOCAL_RANK."""
    assert filled(**STEP, WORLD_SIZE="2")["RANK"] == "0"
    third = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "RANK": "3", "WORLD_SIZE": "4"}
    assert filled(**STEP | third, MASTER_ADDR="a", MASTER_PORT="1")["LOCAL_RANK"] == "1"


# --- lists of hosts ---


def slow(expression: str) -> list[str]:
    """The names of a list, by writing out its first brackets until there are none."""
    left, done = re.split(r",(?![^\[]*\])", expression), []
    while left:
        one = left.pop(0)
        found = re.search(r"\[([^\]]*)\]", one)
        if found is None:
            done.append(one)
            continue
        items = []
        for item in found[1].split(","):
            low, dash, high = item.partition("-")
            items += [str(n).zfill(len(low)) for n in range(int(low), int(high if dash else low) + 1)]
        left = [one[: found.start()] + item + one[found.end() :] for item in items] + left
    return done


PLAIN = st.text("abc.x-", min_size=1, max_size=4).filter(lambda text: not text.startswith("-"))
RANGES = st.builds(
    lambda low, more, width: f"{low:0{width}d}" + (f"-{low + more:0{width}d}" if more else ""),
    st.integers(0, 120),
    st.integers(0, 12),
    st.integers(1, 4),
)
BRACKETS = st.lists(RANGES, min_size=1, max_size=3).map(lambda ranges: f"[{','.join(ranges)}]")
HOSTS = st.lists(
    st.lists(st.one_of(PLAIN, BRACKETS), min_size=1, max_size=3).map(lambda parts: "n" + "".join(parts)),
    min_size=1,
    max_size=3,
).map(",".join)


@settings(max_examples=200, deadline=None)
@given(HOSTS)
def test_a_list_of_hosts_is_expanded_as_by_hand(expression: str) -> None:
    assert list(hosts.expand(expression)) == slow(expression)


@settings(max_examples=300, deadline=None)
@given(st.text("n01-9[],", max_size=12))
def test_any_text_is_a_list_of_hosts_or_a_sentence(expression: str) -> None:
    with contextlib.suppress(ValueError):
        first = next(hosts.expand(expression))
        assert first
        assert not set(first) & set("[],")


def test_lists_as_slurm_writes_them() -> None:
    expand = {
        "n[01-03,07],gpu5": ["n01", "n02", "n03", "n07", "gpu5"],
        "rack[1-2]n[08-10]": ["rack1n08", "rack1n09", "rack1n10", "rack2n08", "rack2n09", "rack2n10"],
        "127.0.0.[1-2]": ["127.0.0.1", "127.0.0.2"],
        "a[1,b[3-4]]": ["a1", "ab3", "ab4"],
        "one": ["one"],
    }
    for expression, names in expand.items():
        assert list(hosts.expand(expression)) == names
    assert next(hosts.expand("n[0-99999999999]")) == "n0", "one after the other"
    for nothing in ("", "n1,", "n[1", "n]1[", "n1 n2", "[]", "[" * 3000 + "1" + "]" * 3000):
        with pytest.raises(ValueError, match="is no list of hosts"):
            list(hosts.expand(nothing))


# --- MPI ---


MPI = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
}


@pytest.mark.parametrize("size", MPI)
def test_ranks_of_mpi_are_no_worlds_of_one(size: str) -> None:
    for rank in ("0", "1"):
        os.environ |= {size: "2", MPI[size]: rank}
        with pytest.raises(ValueError) as error:
            launch.place()
        assert str(error.value) == (
            f"MPI has started 2 processes ({size}), and its ranks are not read here: start with deepspeed, torchrun or "
            "srun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each of them."
        )
        assert environment.likely_rank() == int(rank), "the first one says so"
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2"}
    assert launch.place() == (1, 2), "as the sentence says"


def test_one_process_of_mpi_is_alone() -> None:
    os.environ |= {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}
    assert launch.place() == (0, 1)


def test_mpirun_within_a_slurm_job_is_mpi_and_srun_with_pmi_is_slurm() -> None:
    os.environ |= STEP | {"SLURM_PROCID": "1", "PMI_SIZE": "2", "PMI_RANK": "1", "PMIX_RANK": "1"}
    assert launch.place() == (1, 2)
    os.environ |= {"PMI_SIZE": "8", "PMI_RANK": "5"}
    with pytest.raises(ValueError, match=r"^MPI has started 8 processes \(PMI_SIZE\)"):
        launch.place()
    del os.environ["PMI_SIZE"]
    os.environ["PMIX_RANK"] = "3"
    with pytest.raises(ValueError, match=r"^MPI has started several processes \(PMIX_RANK is 3\)"):
        launch.place()


# --- batch scripts, and ranks of one machine ---


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
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, 4),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NUM_NODES": "2"}, 3),
        ({"SLURM_STEP_ID": "0", "SLURM_TASKS_PER_NODE": "2(x3)"}, 2),
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
    os.environ["DS_ACCELERATOR"] = "cuda"
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


@pytest.mark.parametrize(
    ("chosen", "gpus", "said"),
    [
        ("cuda", 0, "DS_ACCELERATOR is 'cuda' and torch sees no GPU: unset it."),
        (
            "cpu",
            2,
            "DS_ACCELERATOR is 'cpu' and torch sees 2 GPU(s): unset it, or hide them with CUDA_VISIBLE_DEVICES=.",
        ),
        ("gpu", 2, "DS_ACCELERATOR is 'gpu' and torch sees 2 GPU(s): unset it."),
    ],
)
def test_another_accelerator_than_torch_s_is_one_sentence(
    chosen: str, gpus: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ["DS_ACCELERATOR"] = chosen
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError) as error:
        launch.start()
    assert str(error.value) == said


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
    ours = agreed_on(recipe, Options())
    changed = {
        name
        for name, value in agreed_on(replace(recipe, data_dir="/node/local", seed=9), Options(debug=True)).items()
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
