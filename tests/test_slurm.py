"""The batch files: what they decide, with stand-ins for Slurm's commands; and what happens, under a real Slurm.

The real one is thrown away after its tests: a controller and two nodes, each node with its own network and host name,
in namespaces that the kernel clears when the last test is through. It needs root and `apt-get install slurm-wlm munge`.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hetero_kt import shipped, start

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NIGHTLY = pytest.mark.nightly
BATCH_FILES = ("train", "deepspeed_train", "array")

# --- stand-ins ---

STEP = """#!/bin/bash
# srun: what the job's first, second, ... start does lies in the files srun.1, srun.2, ...
echo "srun $*" >> calls
source ./srun.$((${SLURM_RESTART_COUNT:-0} + 1))
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf "node1\\nnode2\\n" ;;
    requeue) echo "requeue $2" >> calls; kill -TERM $PPID ;;
esac
"""
SCANCEL = '#!/bin/bash\necho "scancel $*" >> calls\n'
LAUNCHER_THAT_ANSWERS = """import pathlib, sys
assert sys.argv[-1] == "--unfinished"
print("a line that the user's own module prints")
lines = pathlib.Path("left").read_text().splitlines()
for line in lines:
    print("unfinished:", line)
print("unfinished runs:", len(lines))
sys.exit(pathlib.Path("bad").exists())
"""


@pytest.fixture
def submit(tmp_path: Path) -> Callable[..., tuple[int, str, list[str]]]:
    """`submit(batch file, arguments, srun=..., **environment)`: one start of a job in a checkout where one run is left.

    Gives (exit status, what it printed, calls of Slurm's commands).
    """
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "launchers").mkdir()
    (tmp_path / "launchers" / "x.py").write_text(LAUNCHER_THAT_ANSWERS)
    (tmp_path / "left").write_text("runs/a/none/seed0 5\n")
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (("srun", STEP), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (commands / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')  # a link would leave its venv
    (commands / "python").chmod(0o755)

    def start(
        batch_file: str, *arguments: str, srun: str = "true", restart: int = 0, **environment: str
    ) -> tuple[int, str, list[str]]:
        (tmp_path / f"srun.{restart + 1}").write_text(srun)
        (tmp_path / "calls").write_text("")
        job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        job |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        job |= {"PATH": f"{commands}:/usr/bin:/bin", "STOP_AGAIN": "0.2"}
        ended = subprocess.run(
            ["bash", f"slurm/{batch_file}.sbatch", *arguments],
            cwd=tmp_path,
            env=job | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return ended.returncode, ended.stdout, (tmp_path / "calls").read_text().splitlines()

    return start


def test_the_batch_files_are_bash() -> None:
    for name in (*(f"{name}.sbatch" for name in BATCH_FILES), "job.sh"):
        subprocess.run(["bash", "-n", ROOT / "slurm" / name], check=True)


FINISH = ": > left"
SAVE = "echo runs/a/none/seed0 10 > left"


@pytest.mark.parametrize("batch_file", ["train", "deepspeed_train"])
@pytest.mark.parametrize(
    ("srun", "restart", "requeued", "status"),
    [
        (FINISH, 0, False, 0),
        (SAVE, 0, True, -15),  # a signal stopped it
        (SAVE, 9, True, -15),  # preemption is not counted
        ("true", 0, True, -15),  # srun ends with 0 when its tasks could not be started
        ("true", 3, False, 1),  # so that is not tried for ever
        ("exit 137", 0, True, -15),
        ("exit 137", 2, True, -15),
        ("exit 137", 3, False, 137),
        (f"{SAVE}; exit 137", 3, False, 137),
        ("exit 2", 0, False, 2),  # the launcher's complaint
        (f"{FINISH}; exit 1", 0, False, 1),
    ],
)
def test_a_job_goes_back_into_the_queue_until_its_runs_have_results(
    submit: Callable[..., tuple[int, str, list[str]]],
    batch_file: str,
    srun: str,
    restart: int,
    requeued: bool,
    status: int,
) -> None:
    ended, said, calls = submit(batch_file, "launchers/x.py", srun=srun, restart=restart)
    assert ("requeue 41" in calls) == requeued, said
    assert ended == status, said


def test_usr1_is_passed_on_until_heard_and_requeues(submit: Callable[..., tuple[int, str, list[str]]]) -> None:
    _, said, calls = submit("train", "launchers/x.py", srun=f"kill -USR1 $PPID; sleep 1; {SAVE}", restart=7)
    assert calls.count("scancel --quiet --signal=USR1 41") > 1, said
    assert calls[-1] == "requeue 41"


def test_term_is_passed_on_and_does_not_requeue(submit: Callable[..., tuple[int, str, list[str]]]) -> None:
    ended, said, calls = submit("train", "launchers/x.py", srun=f"kill -TERM $PPID; sleep 0.5; {SAVE}; exit 143")
    assert calls[1:] == ["scancel --quiet --signal=TERM 41"], said
    assert ended == 143


def test_a_job_whose_runs_are_finished_or_misspelt_starts_no_rank(
    submit: Callable[..., tuple[int, str, list[str]]], tmp_path: Path
) -> None:
    (tmp_path / "left").write_text("")
    assert submit("train", "launchers/x.py")[::2] == (0, [])
    (tmp_path / "bad").touch()
    assert submit("train", "launchers/x.py")[::2] == (2, [])
    assert submit("train")[::2] == (2, [])


def test_a_step_has_a_task_per_gpu(submit: Callable[..., tuple[int, str, list[str]]]) -> None:
    _, said, calls = submit("train", "launchers/x.py", "--seed", "1", srun=FINISH, SLURM_GPUS_ON_NODE="4")
    assert "--nodes 2 --ntasks 8 --ntasks-per-node 4 --kill-on-bad-exit=1" in calls[0]
    assert calls[0].endswith("python -u launchers/x.py --seed 1")
    assert "8 ranks on node1 node2, meeting at node1:20041" in said


@pytest.mark.parametrize("batch_file", ["train", "deepspeed_train"])
@pytest.mark.parametrize(
    ("job", "ranks"),
    [
        ({"SLURM_NTASKS": "4"}, 4),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2"}, 4),
        ({"SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "4"}, 8),  # one task a node is what Slurm gives unasked
        ({}, 2),
    ],
)
def test_tasks_that_were_asked_for_are_ranks(
    submit: Callable[..., tuple[int, str, list[str]]], batch_file: str, job: dict[str, str], ranks: int
) -> None:
    _, said, _ = submit(batch_file, "launchers/x.py", srun=FINISH, **job)
    assert f"{ranks} ranks on node1 node2" in said


def test_tasks_that_do_not_divide_over_the_nodes_are_refused(
    submit: Callable[..., tuple[int, str, list[str]]],
) -> None:
    ended, said, calls = submit("train", "launchers/x.py", SLURM_NTASKS="5")
    assert (ended, calls) == (2, [])
    assert "error: 5 tasks do not divide over 2 nodes: give --ntasks-per-node." in said


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST"])
def test_a_batch_file_outside_of_slurm_says_so(submit: Callable[..., tuple[int, str, list[str]]], name: str) -> None:
    ended, said, calls = submit("train", "launchers/x.py", **{name: ""})
    assert (ended, calls) == (2, [])
    assert "error: this is no Slurm job (" in said


def test_a_restart_does_not_begin_anew(submit: Callable[..., tuple[int, str, list[str]]]) -> None:
    _, said, calls = submit("train", "launchers/x.py", "--resume", "never", srun="exit 2", restart=1)
    assert calls[0].endswith("launchers/x.py --resume never --resume auto")
    assert "meeting at node1:20042" in said, "the last start may still hold its port"


def test_deepspeed_gets_every_host_with_its_slots(
    submit: Callable[..., tuple[int, str, list[str]]], tmp_path: Path
) -> None:
    look = f"cp slurm-41.hosts seen; {FINISH}"
    _, said, calls = submit("deepspeed_train", "launchers/x.py", srun=look, SLOTS="2", SLURM_NTASKS_PER_NODE="1")
    assert (tmp_path / "seen").read_text() == "node1 slots=2\nnode2 slots=2\n", said
    assert not (tmp_path / "slurm-41.hosts").exists()
    assert "--nodes 2 --ntasks 2 --ntasks-per-node 1 " in calls[0]
    assert "--no_ssh --node_rank NODE_RANK --master_addr node1 --master_port 20041 launchers/x.py" in calls[0]


def test_an_array_runs_every_seed_with_every_arm(submit: Callable[..., tuple[int, str, list[str]]]) -> None:
    ran = set()
    for task in range(4):
        array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": str(task)}
        _, said, calls = submit("array", "0 7", "none transfer", "launchers/x.py", srun=SAVE, **array)
        assert calls[-1] == f"requeue 40_{task}", said  # 40 alone would be the whole array
        ran.add(calls[0].rpartition("launchers/x.py ")[2])
    assert ran == {f"--seed {seed} --control {arm}" for seed in (0, 7) for arm in ("none", "transfer")}
    outside = submit("array", "0 7", "none", "launchers/x.py", SLURM_ARRAY_TASK_ID="2")
    assert outside[0] == 2
    assert "--array=0-1" in outside[1]


def test_unfinished_runs_are_those_that_the_launcher_would_still_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = runpy.run_path(str(ROOT / LAUNCHER))["VARIANTS"]
    command = ("--variant", "digits", "--steps", "8", "--output-dir", str(tmp_path))
    command += ("--compare", "none", "--seeds", "3", "5", "--unfinished")

    def left(*more: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["launcher.py", *command, *more])
        start.main(variants)
        *lines, count = capsys.readouterr().out.splitlines()
        assert count == f"unfinished runs: {len(lines)}"
        return [line.removeprefix("unfinished: ") for line in lines]

    runs = [tmp_path / "digits_mergenet" / arm / f"seed{seed}" for seed in (3, 5) for arm in ("transfer", "none")]
    assert left() == [f"{run} 0" for run in runs]
    for run in runs[:3]:
        run.mkdir(parents=True)
        (run / "result.json").write_text('{"steps": 4}')
    (runs[3] / "checkpoints" / "6").mkdir(parents=True)
    assert left("--max-steps", "4") == [f"{runs[3]} 0"], "not a complete checkpoint"
    (runs[3] / "checkpoints" / "6" / "DONE").touch()
    assert left("--max-steps", "4") == [f"{runs[3]} 6"]
    assert left() == [*(f"{run} 0" for run in runs[:3]), f"{runs[3]} 6"], "these ended early"
    for run in runs:
        (run / "result.json").write_text('{"steps": 8}')
    assert left("--resume", "never", "--resume", "auto") == []  # what a restart adds wins


OWN_LAUNCHER = """
import beside
from hetero_kt import main

print("loaded")
main(beside.VARIANTS)
"""


def test_a_users_own_launcher_with_a_module_beside_it_answers(
    submit: Callable[..., tuple[int, str, list[str]]], tmp_path: Path
) -> None:
    """The README's form: no VARIANTS in the file itself, and an import of a neighbour."""
    recipe = re.search(r"^def default.*?return Recipe[^\n]*\n", README, re.MULTILINE | re.DOTALL)
    assert recipe is not None
    imports = "from hetero_kt import Data, MergeNet, Model, Optim, Recipe, Transfer\n"
    (tmp_path / "beside.py").write_text(f"{imports}\n\n{recipe.group()}\n\nVARIANTS = {{'default': default}}\n")
    (tmp_path / "mine.py").write_text(OWN_LAUNCHER)
    _, said, calls = submit("train", "mine.py", srun="exit 2")
    assert "digits_mutual/transfer/seed0" not in said, "refused by status 2, which says nothing of runs"
    assert calls
    assert calls[0].endswith("python -u mine.py")
    (tmp_path / "runs" / "digits_mutual" / "transfer" / "seed0").mkdir(parents=True)
    (tmp_path / "runs" / "digits_mutual" / "transfer" / "seed0" / "result.json").write_text('{"steps": 40}')
    ended, said, calls = submit("train", "mine.py", srun="exit 2")
    assert ended == 0
    assert "every run is finished" in said
    assert not calls


def test_a_file_that_does_not_call_main_is_refused_and_not_taken_for_finished(
    submit: Callable[..., tuple[int, str, list[str]]], tmp_path: Path
) -> None:
    (tmp_path / "other.py").write_text("print('hello')\n")
    ended, said, calls = submit("train", "other.py")
    assert ended == 2
    assert not calls
    assert "other.py does not say which of its runs are unfinished: it has to call hetero_kt's main()." in said


def test_an_installed_launcher_starts_by_its_module(submit: Callable[..., tuple[int, str, list[str]]]) -> None:
    module = ("-m", "hetero_kt.launchers.cifar_mergenet", "--debug")
    _, said, calls = submit("train", *module, srun="exit 2")
    assert calls, said
    assert calls[0].endswith("python -u -m hetero_kt.launchers.cifar_mergenet --debug")
    _, _, calls = submit("deepspeed_train", *module, srun="exit 2", SLOTS="1")
    assert calls[0].endswith("--module hetero_kt.launchers.cifar_mergenet --debug")


def test_a_folder_without_the_batch_files_says_where_to_call_sbatch(
    submit: Callable[..., tuple[int, str, list[str]]], tmp_path: Path
) -> None:
    (tmp_path / "slurm" / "job.sh").unlink()
    ended, said, _ = submit("train", "launchers/x.py")
    assert ended == 2
    assert "has no slurm/job.sh: call sbatch in the folder that has it, or with --chdir." in said


# --- a real Slurm ---

CLUSTER = r"""
# Two nodes, one network. Ends with its standard input; the kernel then ends all of it, for this is the first process of
# its own process namespace.
set -eu
d=$1
hostname control
printf "127.0.0.1 localhost\n10.98.0.1 control\n10.98.0.11 node1\n10.98.0.12 node2\n" > "$d/hosts"
mount --bind "$d/hosts" /etc/hosts
ip link set lo up
ip link add bridge type bridge
ip addr add 10.98.0.1/24 dev bridge
ip link set bridge up
head -c 64 /dev/urandom > "$d/munge.key"
chmod 400 "$d/munge.key"
munged -F -S "$d/munge.sock" --key-file="$d/munge.key" --pid-file="$d/munged.pid" --log-file="$d/munged.log" \
    --seed-file="$d/munged.seed" &
until [ -S "$d/munge.sock" ]; do sleep 0.05; done
slurmctld -D -c > "$d/slurmctld.out" 2>&1 &
for i in 1 2; do
    unshare --net --uts bash -c 'hostname "node$1"; until ip link set "eth$1" up 2>/dev/null; do sleep 0.05; done
        ip link set lo up; ip addr add "10.98.0.1$1/24" dev "eth$1"; exec slurmd -D' - $i > "$d/slurmd$i.out" 2>&1 &
    until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
    ip link add port$i type veth peer name eth$i
    ip link set port$i master bridge up
    ip link set eth$i netns $!
done
until [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ]; do sleep 0.1; done
echo $$ up
exec cat
"""

CONFIGURATION = """ClusterName=test
SlurmctldHost=control(10.98.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={d}/munge.sock,cred_expire=5
StateSaveLocation={d}/state
SlurmctldPidFile={d}/slurmctld.pid
SlurmdSpoolDir={d}/spool.%n
SlurmdPidFile={d}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
NodeName=node[1-2] CPUs=8 RealMemory=4000
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire: a requeued job waits so long before it starts. linuxproc, task/none, ...: no cgroups, no data base.

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


class Cluster:
    """A Slurm that runs, and how to use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(d=folder))
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self.environment = ours | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        namespaces = ("--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
        self.process = subprocess.Popen(
            ["unshare", *namespaces, "bash", "-c", CLUSTER, "-", str(folder)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 60
        while not self._is_up():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "Slurm does not come up"
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.first = children[0]

    def _is_up(self) -> bool:
        assert self.process.stdout is not None
        return self.process.stdout.readline().endswith(" up\n")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def run(self, *command: str, where: Path = ROOT) -> str:
        enter = ["nsenter", "--target", self.first, "--mount", "--net", "--uts", "--ipc", "--pid", f"--wd={where}"]
        return subprocess.run(
            [*enter, *command], env=self.environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def submit(self, batch_file: str, out: Path, *arguments: str, options: tuple[str, ...] = ("--nodes", "2")) -> str:
        """The new job's number."""
        file = f"slurm/{batch_file}.sbatch"
        return self.run("sbatch", "--parsable", "--output", str(out), *options, file, *arguments).strip()

    def job(self, number: str) -> dict[str, str]:
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(entry.split("=", 1) for entry in shown.split() if "=" in entry)

    def wait(self, number: str, seconds: float = 240) -> str:
        """The state that the job has ended in."""
        deadline = time.monotonic() + seconds
        while (state := self.job(number)["JobState"]) not in ENDED:
            assert time.monotonic() < deadline, f"job {number} is still {state}"
            time.sleep(0.3)
        return state


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge iproute2")
    if os.geteuid() or subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"]).returncode:
        pytest.skip("no network namespaces here: root makes them")
    folder = Path(tempfile.mkdtemp(prefix="slurm.", dir="/tmp"))  # short: there are sockets in it
    folder.chmod(0o711)  # munged asks that its socket can be reached
    cluster = Cluster(folder)
    yield cluster
    cluster.close()
    shutil.rmtree(folder, ignore_errors=True)


LAUNCHER = "launchers/cifar_mergenet.py"
RUN = "digits_mergenet/transfer/seed0"
LONG = (
    *(LAUNCHER, "--variant", "digits", "--steps", "60", "--save-every", "5", "--log-every", "1", "--eval-every", "20"),
    *("--data.many.name", "generated", "--data.few.name", "generated", "--data.few.per-class", "3"),
    *("--data.many.batch", "8", "--data.few.batch", "8"),
)


def wait_for_steps(log: Path, steps: int) -> None:
    """Until the run has logged that many lines."""
    deadline = time.monotonic() + 180
    while not log.exists() or log.read_text().count("\n") < steps:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    for name in ("resnet", "mobilenetv2"):
        mine, other = (load_file(folder / "export" / f"{name}.safetensors") for folder in (ours, theirs))
        assert mine.keys() == other.keys()
        for key, weight in mine.items():
            assert torch.equal(weight, other[key]), key


def assert_no_step_missing_or_twice(folder: Path) -> None:
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 61)), steps


@pytest.fixture(scope="module")
def uninterrupted(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went through."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    job = slurm.submit("train", folder / "out", *LONG, "--output-dir", str(folder))
    assert slurm.wait(job) == "COMPLETED", (folder / "out").read_text()
    assert_no_step_missing_or_twice(folder / RUN)
    return folder / RUN


def real(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that starts jobs."""
    return pytest.mark.slurm(pytest.mark.slow(test))


@real
@pytest.mark.parametrize(
    ("batch_file", "launcher", "run"),
    [
        ("train", LAUNCHER, "cifar_mergenet_debug/transfer"),
        pytest.param("deepspeed_train", LAUNCHER, "cifar_mergenet_debug/transfer", marks=NIGHTLY),
        pytest.param("train", "launchers/cifar_fbt.py", "cifar_fbt_debug/fbt", marks=NIGHTLY),
        ("deepspeed_train", "launchers/xvlm_vqa.py", "xvlm_vqa_debug/transfer"),
    ],
)
def test_two_nodes_run_a_launcher(slurm: Cluster, tmp_path: Path, batch_file: str, launcher: str, run: str) -> None:
    out = tmp_path / "out"
    job = slurm.submit(batch_file, out, launcher, "--debug", "--output-dir", str(tmp_path))
    assert slurm.wait(job) == "COMPLETED", out.read_text()
    result = json.loads((tmp_path / run / "seed0" / "result.json").read_text())
    assert result["world_size"] == 2
    assert "2 ranks on node1 node2" in out.read_text()
    assert slurm.job(job)["Restarts"] == "0"


@real
def test_an_installed_launcher_runs_from_a_folder_that_holds_the_copied_batch_file_alone(
    slurm: Cluster, tmp_path: Path
) -> None:
    shipped.copy("train.sbatch", tmp_path)
    options = ("--parsable", "--output", "out", "--nodes", "2")
    launcher = ("-m", "hetero_kt.launchers.cifar_mergenet", "--debug")
    job = slurm.run("sbatch", *options, "slurm/train.sbatch", *launcher, where=tmp_path).strip()
    assert slurm.wait(job) == "COMPLETED", (tmp_path / "out").read_text()
    result = json.loads((tmp_path / "runs/cifar_mergenet_debug/transfer/seed0/result.json").read_text())
    assert result["world_size"] == 2


@real
@pytest.mark.parametrize(
    ("batch_file", "command"),
    [
        ("train", "scancel --signal=USR1 --batch"),
        ("train", "scancel --signal=USR1"),
        ("train", "scontrol requeue"),
        ("deepspeed_train", "scancel --signal=USR1 --batch"),
        pytest.param("deepspeed_train", "scancel --signal=USR1", marks=NIGHTLY),
        pytest.param("deepspeed_train", "scontrol requeue", marks=NIGHTLY),
    ],
)
def test_a_stopped_job_ends_like_an_uninterrupted_one(
    slurm: Cluster, uninterrupted: Path, tmp_path: Path, batch_file: str, command: str
) -> None:
    out = tmp_path / "out"
    job = slurm.submit(batch_file, out, *LONG, "--output-dir", str(tmp_path))
    wait_for_steps(tmp_path / RUN / "metrics.jsonl", 12)
    slurm.run(*command.split(), job)
    assert slurm.wait(job) == "COMPLETED", out.read_text()
    assert slurm.job(job)["Restarts"] == "1", out.read_text()
    assert "start 2" in out.read_text()
    assert_no_step_missing_or_twice(tmp_path / RUN)
    assert_same_weights(tmp_path / RUN, uninterrupted)


@real
@pytest.mark.parametrize("batch_file", ["train", pytest.param("deepspeed_train", marks=NIGHTLY)])
def test_a_killed_rank_ends_the_job_and_requeues_it(
    slurm: Cluster, uninterrupted: Path, tmp_path: Path, batch_file: str
) -> None:
    out = tmp_path / "out"
    job = slurm.submit(batch_file, out, *LONG, "--output-dir", str(tmp_path))
    wait_for_steps(tmp_path / RUN / "metrics.jsonl", 12)
    ranks = slurm.run("pgrep", "--full", f"^[^ ]*python[^ ]* -u {LAUNCHER} .*--output-dir {tmp_path}").split()
    slurm.run("kill", "-KILL", ranks[-1])
    assert slurm.wait(job) == "COMPLETED", out.read_text()
    assert slurm.job(job)["Restarts"] == "1", out.read_text()
    assert_same_weights(tmp_path / RUN, uninterrupted)


@real
@pytest.mark.parametrize("batch_file", ["train", pytest.param("deepspeed_train", marks=NIGHTLY)])
def test_a_hung_rank_is_named_and_its_job_requeued(
    slurm: Cluster, uninterrupted: Path, tmp_path: Path, batch_file: str
) -> None:
    out = tmp_path / "out"
    job = slurm.submit(batch_file, out, *LONG, "--patience", "10", "--output-dir", str(tmp_path))
    wait_for_steps(tmp_path / RUN / "metrics.jsonl", 12)
    ranks = slurm.run("pgrep", "--full", f"^[^ ]*python[^ ]* -u {LAUNCHER} .*--output-dir {tmp_path}").split()
    slurm.run("kill", "-STOP", ranks[-1])
    assert slurm.wait(job) == "COMPLETED", out.read_text()
    assert slurm.job(job)["Restarts"] == "1", out.read_text()
    assert re.search(r"error: rank \d: rank \d.* has not been heard of for 1\d s", out.read_text()), out.read_text()
    assert_same_weights(tmp_path / RUN, uninterrupted)


@real
def test_a_cancelled_job_stays_cancelled(slurm: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = slurm.submit("train", out, *LONG, "--output-dir", str(tmp_path))
    wait_for_steps(tmp_path / RUN / "metrics.jsonl", 3)
    slurm.run("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    time.sleep(8)  # a requeue would have started it again
    assert slurm.job(job)["Restarts"] == "0"
    assert slurm.job(job)["JobState"] == "CANCELLED"


@real
def test_an_array_is_a_job_for_every_seed_and_arm(slurm: Cluster, tmp_path: Path) -> None:
    options = ("--array", "0-1", "--nodes", "1")
    arguments = ("0 3", "none", LAUNCHER, "--debug", "--output-dir", str(tmp_path))
    job = slurm.submit("array", tmp_path / "out.%a", *arguments, options=options)
    for task in ("0", "1"):
        assert slurm.wait(f"{job}_{task}") == "COMPLETED", (tmp_path / f"out.{task}").read_text()
    for seed in (0, 3):
        assert (tmp_path / f"cifar_mergenet_debug/none/seed{seed}/result.json").exists()


# --- two hosts, without Slurm ---


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: 10.97.0.1 and 10.97.0.2."""
    if os.geteuid() or not shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        pytest.skip("no network namespaces here: root makes them, with iproute2")
    names = (f"hk{os.getpid()}a", f"hk{os.getpid()}b")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.97.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})


@real
def test_two_hosts_whose_cable_is_cut_both_end_in_time_and_say_so(hosts: tuple[str, str], tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "10.97.0.1"}
    shared |= {
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "cable",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-u", *LONG, "--steps", "5000", "--patience", "8", "--output-dir", str(tmp_path)]
    logs = [tmp_path / f"rank{rank}.log" for rank in (0, 1)]
    ranks = []
    for rank, (host, log) in enumerate(zip(hosts, logs, strict=True)):
        with log.open("w") as file:
            environment = os.environ | shared | {"RANK": str(rank)}
            enter = ["/sbin/ip", "netns", "exec", host]
            ranks.append(subprocess.Popen([*enter, *command], cwd=ROOT, env=environment, stdout=file, stderr=file))
    try:
        wait_for_steps(tmp_path / RUN / "metrics.jsonl", 12)
        subprocess.run(["/sbin/ip", "-n", hosts[1], "link", "set", "cable", "down"], check=True)
        cut = time.monotonic()
        for process in ranks:
            assert process.wait(60), "a run that was cut off ends in error"
        assert time.monotonic() - cut < 45
    finally:
        for process in ranks:
            process.kill()
    first, second = (log.read_text() for log in logs)
    assert re.search(r"^error: rank 0: rank 1 \(\S+\) has not been heard of for 8 s", first, re.MULTILINE), first
    assert re.search(r"^error: rank 1: (rank 0 has not been|the first rank has ended)", second, re.MULTILINE), second
