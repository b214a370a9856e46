"""Bad input is one sentence before anything starts; bad proposals and killed ranks cost nothing but time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import refusal
import tiny
import torch
import torch.distributed as dist
from refusal import Ended, assert_refused
from safetensors.torch import load_file
from test_launchers import load
from tiny import Plan

from hetero_kt import config, models, options
from hetero_kt import folder as folders
from hetero_kt import run as running
from hetero_kt.distributed import launch, layout
from hetero_kt.distributed.agreement import UserError
from hetero_kt.distributed.launch import Ranks
from hetero_kt.folder import run_folder
from hetero_kt.methods import Diverged
from hetero_kt.options import Options

LAUNCHER = Path(__file__).resolve().parents[1] / "launchers" / "cifar_mergenet.py"

# --- bad input ---


def start(arguments: list[str], frozen: str = "") -> Ended:
    """The launcher up to its first engine, with one parameter of its models frozen."""
    build = models.build

    def with_frozen(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name != frozen)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", with_frozen)
        return refusal.start(LAUNCHER, arguments)


DIGITS = ("--variant", "digits")
TRANSFER = "--method.transfers.to-mobilenetv2"
TARGET = "blocks.2.1.conv_pwl.weight"
BAD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "model": (
        (*DIGITS, "--models.resnet.name", "cifar:resnet_tin"),
        ("--models.resnet.name cifar:resnet_tin", "cifar:resnet_tiny"),
    ),
    "weight": (
        (*DIGITS, f"{TRANSFER}.target", "mobilenetv2:blocks.2.1.conv_pwl.wait"),
        ("transfers.to_mobilenetv2.target", "blocks.2.1.conv_pwl.wait", f"'{TARGET}' (48x144)", "hetero-kt sites"),
    ),
    "weight, unfactorised": (
        (*DIGITS, f"{TRANSFER}.mode", "full", f"{TRANSFER}.source", "resnet:fd.weight"),
        ("transfers.to_mobilenetv2", "fd.weight", "'fc.weight' (10x96)"),
    ),
    "one dimension": (
        (*DIGITS, f"{TRANSFER}.target", "mobilenetv2:bn1.weight"),
        ("transfers.to_mobilenetv2.target", "bn1.weight"),
    ),
    "unknown model of a site": (
        (*DIGITS, f"{TRANSFER}.source", "resnt:fc.weight"),
        ("transfers.to_mobilenetv2.source", "resnt:fc.weight", "resnet:fc.weight"),
    ),
    "two into one": (
        ("--method.transfers.to-resnet50.target", "mobilenetv2:blocks.5.2.conv_pwl.weight"),
        ("to_resnet50.target", "to_mobilenetv2", "a target of its own"),
    ),
    "rank": ((*DIGITS, f"{TRANSFER}.rank", "49"), ("rank 49", "to_mobilenetv2", "1 to 10")),
    "rank of the target": (
        (*DIGITS, f"{TRANSFER}.rank", "49", f"{TRANSFER}.source-rank", "2"),
        ("rank 49", "to_mobilenetv2.target", "1 to 48"),
    ),
    "rank, svd": (
        (*DIGITS, f"{TRANSFER}.mode", "svd", f"{TRANSFER}.rank", "49", f"{TRANSFER}.source-rank", "2"),
        ("rank 49", "to_mobilenetv2", "1 to 48"),
    ),
    "heads": ((*DIGITS, f"{TRANSFER}.adapter.heads", "65"), ("to_mobilenetv2", "adapter.heads 65", "1 to 64")),
    "aligned": (
        (*DIGITS, f"{TRANSFER}.adapter.kind", "aligned", f"{TRANSFER}.source-rank", "4"),
        ("to_mobilenetv2", "adapter.kind", "8x144 <- 4x96", "lpka"),
    ),
    "cycle": ((*DIGITS, f"{TRANSFER}.cycle", "0"), ("to_mobilenetv2.cycle 0", "1 or more")),
    "data missing": (("--variant", "cpu", "--data-dir", "{folder}/nowhere"), ("{folder}/nowhere", "--data-dir")),
    "data corrupt": (("--variant", "cpu", "--data-dir", "{folder}/data"), ("train.parquet", "--data-dir")),
    "init": (
        (*DIGITS, "--models.resnet.init", "{folder}/none.safetensors"),
        ("--models.resnet.init", "{folder}/none.safetensors", "does not exist"),
    ),
    "zero": ((*DIGITS, "--zero-config", "{folder}/zero9.json"), ("--zero-config", "ds_configs/zero0.json")),
    "bf16": (
        (*DIGITS, "--models.mobilenetv2.precision", "bf16"),
        ("--models.mobilenetv2.precision bf16", "BatchNorm", "use autocast"),
    ),
    "ranks": ((*DIGITS, "--data.many.batch", "7"), ("--data.many.batch 7", "2 ranks", "use 6")),
    "resume, no folder": ((*DIGITS, "--resume", "{folder}/x"), ("--resume {folder}/x", "auto, never or the path")),
    "resume, no checkpoint": ((*DIGITS, "--resume", "{folder}/data"), ("--resume {folder}/data", "no complete")),
    "resume, torn": ((*DIGITS, "--resume", "{folder}/2"), ("--resume {folder}/2", "no complete")),
    "resume, renamed": ((*DIGITS, "--resume", "{folder}/best"), ("{folder}/best", "step")),
    "resume, another layout": ((*DIGITS, "--resume", "{folder}/4"), ("{folder}/4", "layout", "--resume never")),
    "resume, damaged marker": ((*DIGITS, "--resume", "{folder}/5"), ("{folder}/5/DONE cannot be read", "remove")),
    "resume, lost": ((*DIGITS, "--resume", "{folder}/6"), ("{folder}/6/rank1.safetensors is missing", "remove")),
    "resume, cut": ((*DIGITS, "--resume", "{folder}/7"), ("{folder}/7/rank1.json has 0 bytes", "with 4", "remove")),
    "resume, edited": ((*DIGITS, "--resume", "{folder}/8"), ("{folder}/8/rank1.json is not as it was saved", "remove")),
    "resume, another recipe": (
        (*DIGITS, "--seed", "7", "--steps", "60", "--models.resnet.optim.lr", "0.2"),
        ("--resume auto", "another recipe", "models.resnet.optim.lr", "steps", "--output-dir", "--resume never"),
    ),
    "resume, another recipe's checkpoint": (
        (*DIGITS, "--steps", "60", "--resume", "{folder}/runs/digits_mergenet/transfer/seed7"),
        ("seed7", "another recipe", "steps", "seed"),
    ),
    "result, damaged": (
        (*DIGITS, "--output-dir", "{folder}/damaged"),
        ("damaged/digits_mergenet/transfer/seed0/result.json", "cannot be read", "remove it"),
    ),
    "output, a file": (
        (*DIGITS, "--output-dir", "{folder}/zero.txt"),
        ("--output-dir {folder}/zero.txt", "cannot be written", "name another"),
    ),
}


def marker(step: str) -> str:
    """What stands in the DONE of a step's checkpoint of 2 ranks, whose files are empty."""
    names = [f"rank{rank}.{end}" for rank in range(2) for end in ("json", "safetensors")]
    files = {name: {"bytes": 0, "crc32": "00000000"} for name in names}
    if step == "4":  # DeepSpeed's files
        return json.dumps({"step": 4, "ranks": 2, "files": {"rank0.pt": 0}})
    if step == "5":
        del files["rank0.json"]
    if step == "7":
        files["rank1.json"]["bytes"] = 4
    if step == "8":
        files["rank1.json"]["crc32"] = "00000001"
    return json.dumps({"layout": 2, "ranks": 2, "files": files})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that can be wrong with files."""
    made: Path = tmp_path_factory.mktemp("bad")
    (made / "data" / "cifar100").mkdir(parents=True)
    for part in ("train", "test"):
        (made / "data" / "cifar100" / f"{part}.parquet").write_bytes(b"PAR1 and no more")
    recipe, _ = options.resolve(load(LAUNCHER).VARIANTS, [*DIGITS, "--output-dir", str(made / "runs"), "--seed", "7"])
    run = run_folder(recipe)
    for saved in (*(made / step for step in "245678"), made / "best", run / "checkpoints" / "5"):
        saved.mkdir(parents=True)
        for rank in range(2):
            (saved / f"rank{rank}.json").touch()
            (saved / f"rank{rank}.safetensors").touch()
        if saved.name != "2":
            (saved / "DONE").write_text(marker(saved.name if saved.parent == made else "0"))
    (made / "6" / "rank1.safetensors").unlink()
    (run / "recipe.yaml").write_text(config.to_yaml(recipe))
    damaged = made / "damaged" / "digits_mergenet" / "transfer" / "seed0"
    damaged.mkdir(parents=True)
    (damaged / "result.json").write_text('{"steps"')
    (made / "zero.txt").touch()
    return made


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_of_the_first_rank_before_an_engine_starts(
    ranks: Any, folder: Path, case: str
) -> None:
    arguments, words = (tuple(text.replace("{folder}", str(folder)) for text in texts) for texts in BAD[case])
    found = ranks(2).run(start, ["--output-dir", str(folder / "runs"), *arguments])
    assert_refused(found, words)
    assert sorted(p.name for p in (folder / "runs").rglob("seed*")) == ["seed7"], "and no run folder is made"


@pytest.mark.parametrize("mode", ["factor", "full", "svd"])
def test_a_frozen_target_is_refused_alike(ranks: Any, tmp_path: Path, mode: str) -> None:
    arguments = ["--output-dir", str(tmp_path), *DIGITS, f"{TRANSFER}.mode", mode]
    assert_refused(ranks(2).run(start, arguments, TARGET), ("to_mobilenetv2", TARGET, "frozen"))


def test_the_same_input_without_a_mistake_reaches_the_first_engine(ranks: Any, tmp_path: Path) -> None:
    found = ranks(2).run(start, ["--output-dir", str(tmp_path), *DIGITS])
    assert [status for status, _, _ in found] == ["an engine was started"] * 2


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("nowhere holds no data: name another --data-dir."), ("nowhere", "--data-dir")),
        (OSError(5, "Input/output error", "/d/train"), ("/d/train cannot be used (Input/output error)",)),
        (KeyError("img"), ("KeyError: 'img'",)),
    ],
)
def test_what_one_rank_finds_wrong_ends_all(
    ranks: Any, tmp_path: Path, error: Exception, words: tuple[str, ...]
) -> None:
    """Another machine lacks its data: the first rank says whose."""
    found = ranks(2).run(uneven, str(tmp_path), error, timeout=60)
    *_, (status, out, traceback) = found
    if isinstance(error, KeyError):  # nobody's input: where it happened is said too
        assert "Traceback" in traceback
        found[1] = (status, out, "")
    assert_refused(found, ("rank 1: ", *words))


def uneven(folder: str, error: Exception) -> tuple[Any, str, str]:
    load_data = running.parts.data.load

    def missing_here(config: Any, data_dir: str, *, train: bool) -> Any:
        if dist.get_rank() == 1:
            raise error
        return load_data(config, data_dir, train=train)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.parts.data, "load", missing_here)
        return start(["--output-dir", folder, *DIGITS])


def test_all_ranks_go_the_way_of_the_first_where_a_file_system_lags(ranks: Any, tmp_path: Path) -> None:
    found = ranks(2).run(lagging, str(tmp_path), timeout=60)
    assert [status for status, _, _ in found] == ["an engine was started"] * 2


def lagging(folder: str) -> tuple[Any, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(folders, "finished_steps", lambda _: 10**6)
        return start(["--output-dir", folder, *DIGITS])


def test_two_transfers_into_one_weight_under_two_names_are_refused(ranks: Any, tmp_path: Path) -> None:
    base = tiny.recipe(tmp_path)
    there = replace(base.method.transfers["there"], source="mobilenetv2:classifier.weight", mode="full")
    both = {"one": replace(there, target="resnet:fc.weight"), "two": replace(there, target="resnet:twin.weight")}
    recipe = replace(base, method=replace(base.method, transfers=both))
    for said in ranks(2).run(tied, recipe):
        assert said.startswith("--method.transfers: ")
        assert "the same weight" in said


def tied(recipe: Any) -> str:
    build = models.build

    def with_twin(*args: Any, **kwargs: Any) -> Any:
        model: Any = build(*args, **kwargs)
        if hasattr(model, "fc"):
            model.twin = torch.nn.Linear(model.fc.in_features, model.fc.out_features)
            model.twin.weight = model.fc.weight
        return model

    ranks = Ranks(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch, tiny.handlers_kept():
        patch.setattr(models, "build", with_twin)
        patch.setattr(running.parts.models, "build_learner", None)
        with pytest.raises(UserError) as error:
            running.run(recipe, Options(), ranks, launch.StopSignal())
    return str(error.value)


def deterministic(arguments: list[str]) -> list[str]:
    """In which order a start sets up."""
    order: list[str] = []

    def begin(*_: object) -> Ranks:
        order.append("start")
        raise ValueError("no further.")

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(launch, "make_deterministic", lambda: order.append("deterministic"))
        patch.setattr(launch, "start", begin)
        patch.setattr(sys, "argv", ["cifar_mergenet.py", *arguments])
        with contextlib.suppress(SystemExit):
            running.main(load(LAUNCHER).VARIANTS)
    return order


def test_deterministic_is_set_before_cuda_starts(ranks: Any) -> None:
    assert ranks(1).run(deterministic, [*DIGITS, "--deterministic"]) == [["deterministic", "start"]]
    assert ranks(1).run(deterministic, [*DIGITS]) == [["start"]]


def wrong_environment(arguments: list[str]) -> tuple[Any, str, str]:
    def half(*_: object) -> None:
        raise ValueError("RANK is set but MASTER_ADDR is not: start with deepspeed.")

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(launch, "start", half)
        patch.setattr(options, "PATIENCE", 0.0)
        patch.setattr(sys, "argv", ["cifar_mergenet.py", *arguments])
        try:
            running.main(load(LAUNCHER).VARIANTS)
            status: Any = 0
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def test_a_wrong_environment_is_one_sentence_of_each_rank_that_has_it(ranks: Any) -> None:
    """Before there is a group no rank knows of the others."""
    one, other = ranks(2).run(wrong_environment, list(DIGITS))
    said = "RANK is set but MASTER_ADDR is not: start with deepspeed.\n"
    assert one == (2, "", f"error: {said}")
    assert other == (2, "", f"error: rank 1: {said}")


def test_a_plan_of_what_does_not_exist_is_one_sentence(ranks: Any) -> None:
    found = ranks(1).run(start, [*DIGITS, "--plan", f"{TRANSFER}.target", "mobilenetv2:nothing.weight"])
    status, _, err = found[0]
    assert status == 2
    assert err.startswith("error: --method.transfers.to_mobilenetv2: 'nothing.weight' is no weight")


# --- proposals that are not finite ---


def test_proposals_that_are_not_finite_are_never_written_and_training_goes_on(ranks: Any, tmp_path: Path) -> None:
    poisoned = tiny.recipe(tmp_path / "poisoned", steps=7)
    ends = tiny.train(ranks(2), poisoned, Options(), Plan(poison=0))
    without = tiny.train(ranks(2), tiny.recipe(tmp_path / "without", steps=7, control="none"))
    for end, other in zip(ends, without, strict=True):
        for key in ("resnet", "mobilenetv2", "buffers", "resnet optimizer", "mobilenetv2 optimizer", "random"):
            tiny.assert_equal(end[key], other[key], key)
    said = ends[0]["warnings"]
    for step in (0, 2, 4):
        assert any("there" in text and f"step {step} " in text for text in said), said
    assert not any("not finite" in text for text in ends[1]["warnings"]), "the first rank says it for all"
    skipped = {line["step"]: line["there/skipped"] for line in tiny.lines(run_folder(poisoned)) if "there/gate" in line}
    assert skipped == {1: 1.0, 3: 1.0, 5: 1.0, 7: 1.0}


def test_five_in_a_row_stop_the_run_and_no_checkpoint_holds_such_an_adapter(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.with_transfer(tiny.recipe(tmp_path, steps=20), cycle=2)
    ends = tiny.train(ranks(2), recipe, Options(), Plan(poison=2))
    assert all("5 proposals in a row" in end["diverged"] for end in ends)
    folder = run_folder(recipe)
    assert layout.complete(folder / "checkpoints") == []
    assert tiny.lines(folder)[-1]["step"] == 12  # 2, 4, 6, 8 and 10 were bad
    assert not (folder / "result.json").exists()
    assert all("done" not in end for end in ends)


def test_five_interrupted_by_a_good_one_do_not_stop_the_run(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.with_transfer(tiny.recipe(tmp_path, steps=9), cycle=1)
    ends = tiny.train(ranks(2), recipe, Options(), Plan(poison=1, heal=5))
    assert all(end["done"] for end in ends)


def diverge(recipe: Any) -> tuple[Any, str, str]:
    def diverged(*_: Any) -> bool:
        raise Diverged("transfer there: 5 proposals in a row were not finite.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "run", diverged)
        return start(recipe)


def test_a_diverged_run_ends_in_one_sentence_and_an_error_status(ranks: Any) -> None:
    found = ranks(2).run(diverge, list(DIGITS))
    assert [status for status, _, _ in found] == [1, 1]
    assert [err for _, _, err in found] == ["error: transfer there: 5 proposals in a row were not finite.\n", ""]


def fail(error: Exception) -> tuple[list[str], Any]:
    """What a start does when its run raises `error`."""
    done: list[str] = []

    def failing(*_: Any) -> bool:
        raise error

    with pytest.MonkeyPatch.context() as patch, tiny.handlers_kept(), contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(running, "run", failing)
        patch.setattr(launch, "start", lambda *_: Ranks(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu")))
        patch.setattr(dist, "destroy_process_group", lambda: done.append("left the group"))
        patch.setattr(options, "PATIENCE", 0.0)
        patch.setattr(sys, "argv", ["cifar_mergenet.py", *DIGITS])
        try:
            running.main(load(LAUNCHER).VARIANTS)
        except (SystemExit, ZeroDivisionError) as end:
            return done, repr(end)
    return done, None


def test_the_group_is_left_only_where_all_ranks_leave_it(ranks: Any) -> None:
    """After one rank's own error the others still wait in a collective, and leaving could wait for them."""
    assert ranks(1).run(fail, UserError("no.")) == [(["left the group"], "SystemExit(2)")]
    assert ranks(1).run(fail, Diverged("no.")) == [(["left the group"], "SystemExit(1)")]
    assert ranks(1).run(fail, ZeroDivisionError("no")) == [([], "ZeroDivisionError('no')")]


# --- killed ranks ---

LONG = 40
ARGUMENTS = (
    *("--variant", "digits", "--steps", str(LONG), "--save-every", "5", "--log-every", "1", "--eval-every", "10"),
    *("--data.many.name", "generated", "--data.few.name", "generated", "--data.few.per-class", "3"),
    *("--data.many.batch", "8", "--data.few.batch", "8"),
)


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **ours, **extra}


def wait_for_lines(log: Path, count: int, processes: list[Any]) -> None:
    """Until the run has logged `count` lines."""
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < count:
        assert time.monotonic() < deadline, "the run does not get on"
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.slow
def test_real_ranks_stopped_by_usr1_and_then_killed_end_like_uninterrupted_ones(ranks: Any, tmp_path: Path) -> None:
    arguments = [*ARGUMENTS, "--output-dir", str(tmp_path / "killed")]
    recipe, _ = options.resolve(load(LAUNCHER).VARIANTS, arguments)
    folder = run_folder(recipe)
    command = [sys.executable, str(LAUNCHER), *arguments]

    # USR1 to one of two plain processes
    port = str(launch.free_port())
    pair = []
    for rank in ("0", "1"):
        mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port}
        pair.append(
            subprocess.Popen(
                command,
                env=environment(mine | {"MASTER_ADDR": "127.0.0.1"}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    try:
        wait_for_lines(folder / "metrics.jsonl", 3, pair)
        pair[1].send_signal(signal.SIGUSR1)
        said = [process.communicate(timeout=60)[0] for process in pair]
    finally:
        for process in pair:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in pair] == [0, 0], said
    assert not (folder / "result.json").exists()
    saved = layout.complete(folder / "checkpoints")
    assert 3 <= int(saved[-1].name) < LONG

    # SIGKILL to everything that `deepspeed` has started, wherever it is
    count = (folder / "metrics.jsonl").read_text().count("\n") + random.randrange(1, 20)
    with_deepspeed = [
        *(sys.executable, str(Path(sys.executable).with_name("deepspeed"))),
        *("--num_accelerators", "2", "--master_port", str(launch.free_port())),
        *command[1:],
    ]
    running_now = subprocess.Popen(
        with_deepspeed, env=environment({}), stdout=subprocess.DEVNULL, start_new_session=True
    )
    started: list[psutil.Process] = []
    try:
        wait_for_lines(folder / "metrics.jsonl", count, [running_now])
    finally:
        if running_now.poll() is None:
            started = psutil.Process(running_now.pid).children(recursive=True)
            os.killpg(running_now.pid, signal.SIGKILL)
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        running_now.wait()
    assert started
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
    assert not (folder / "result.json").exists()

    ended = subprocess.run(with_deepspeed, env=environment({}), capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "from step " in ended.stdout

    whole = replace(recipe, output_dir=str(tmp_path / "whole"))
    tiny.train(ranks(2), whole)
    assert tiny.lines(folder) == tiny.lines(run_folder(whole)), f"killed after line {count}"
    for name in recipe.models:
        ours, theirs = (load_file(f / "export" / f"{name}.safetensors") for f in (folder, run_folder(whole)))
        tiny.assert_equal(ours, theirs, f"killed after line {count}: {name}")
