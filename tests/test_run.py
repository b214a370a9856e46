"""What a run leaves behind: its folder, its exported models, and its place in a comparison."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_launchers import LAUNCHERS, load
from tiny import Plan

from hetero_kt import config, data, models
from hetero_kt import run as running
from hetero_kt.data import Loader
from hetero_kt.distributed import launch
from hetero_kt.distributed.launch import Ranks
from hetero_kt.folder import run_folder
from hetero_kt.options import Options
from hetero_kt.parts import Prepared
from hetero_kt.report.history import history as read_metrics
from hetero_kt.tasks.classification import evaluate

STEPS = 4


def test_the_run_folder_holds_what_it_promises(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=STEPS, eval_every=2, log_every=2)
    tiny.train(ranks(2), recipe)
    folder = run_folder(recipe)
    assert folder == tmp_path / "tiny" / "transfer" / "seed0"
    names = {"recipe.yaml", "data.json", "metrics.jsonl", "tensorboard", "checkpoints", "export", "result.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert config.from_yaml((folder / "recipe.yaml").read_text()) == recipe

    lines = tiny.lines(folder)
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4], "transfers, losses, metrics"
    assert {"there/gate", "there/change", "back/cosine"} <= lines[0].keys()
    assert lines[1].keys() == {"step", "resnet/loss", "mobilenetv2/loss"}
    tests = {f"{name}/test_{metric}" for name in recipe.models for metric in ("loss", "top1", "top5")}
    assert lines[2].keys() == {"step", *tests}

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    for tag in ("resnet/loss", "mobilenetv2/test_top1"):
        in_log = [(line["step"], line[tag]) for line in lines if tag in line]
        assert [(event.step, event.value) for event in board.Scalars(tag)] == [
            (step, pytest.approx(value)) for step, value in in_log
        ]

    result = json.loads((folder / "result.json").read_text())
    assert {name: result[name] for name in ("recipe", "control", "seed", "steps", "world_size", "device")} == {
        **{"recipe": "tiny", "control": "transfer", "seed": 0},
        **{"steps": STEPS, "world_size": 2, "device": "cpu"},
    }
    assert result["zero_stage"] == {"resnet": 1, "mobilenetv2": 1}
    assert result["versions"].keys() == {"hetero_kt", "python", "torch", "deepspeed", "timm", "transformers"}
    assert result["wall_seconds"] > 0
    assert isinstance(result["commit"], str)
    assert isinstance(result["command"], str)
    for name, metrics in result["metrics"].items():
        assert metrics.keys() == {"loss", "top1", "top5"}
        assert {f"{name}/test_{k}": v for k, v in metrics.items()}.items() <= lines[-1].items()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_states_may_lie_on_the_cpu_without_a_compiler(ranks: Any, tmp_path: Path, stage: int) -> None:
    plain, offloaded = (tiny.recipe(tmp_path / name, stage, steps=3) for name in ("plain", "offloaded"))
    block = {"stage": stage, "offload_optimizer": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}
    Path(offloaded.models["resnet"].zero).write_text(json.dumps(block))
    for recipe in (plain, offloaded):
        tiny.train(ranks(2), recipe)
    for one, other in zip(*(tiny.lines(run_folder(recipe)) for recipe in (plain, offloaded)), strict=True):
        losses = {name: value for name, value in one.items() if name.endswith("/loss")}
        assert {name: other[name] for name in losses} == pytest.approx(losses, rel=1e-4)


def test_every_transfer_is_logged_at_its_own_step_however_seldom_the_log_is_written(ranks: Any, tmp_path: Path) -> None:
    seldom, often = (tiny.recipe(tmp_path / str(every), log_every=every) for every in (6, 1))
    for recipe in (seldom, often):
        tiny.train(ranks(1), recipe)
    logs = [read_metrics(run_folder(recipe)) for recipe in (seldom, often)]
    assert list(logs[0]["there/change"]) == [1, 3, 5]
    assert list(logs[0]["back/gate"]) == list(logs[0]["back/omega1.3"]) == [1, 4]
    for name in logs[0]:
        if name.partition("/")[0] in ("there", "back"):
            assert logs[0][name] == logs[1][name]
    assert list(logs[0]["resnet/loss"]) == [6]
    assert logs[0]["resnet/loss"][6] == pytest.approx(sum(logs[1]["resnet/loss"].values()) / 6)
    steps = [line["step"] for line in tiny.lines(run_folder(seldom))]
    assert steps == sorted(steps)


@pytest.mark.parametrize(("batch", "dropped"), [(8, 0), (7, 4), (2000, 0)])
def test_samples_that_no_batch_takes_are_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], batch: int, dropped: int
) -> None:
    recipe = tiny.recipe(tmp_path)
    images = data.load(recipe.data["all"], train=True)
    nothing = Prepared({}, {}, lambda: None)  # type: ignore[arg-type, return-value]
    running._announce(recipe, {}, nothing, {"all": Loader(images, batch, 0, ())}, None)
    _, *others = capsys.readouterr().out.splitlines()
    assert others == ([f"all: {dropped} samples an epoch are dropped: batch {batch}"] if dropped else [])


@pytest.mark.parametrize("mode", ["factor", "full"])
@pytest.mark.parametrize("stage", [1, 3])
def test_an_export_is_the_plain_model_with_the_trained_engines_logits(
    ranks: Any, tmp_path: Path, stage: int, mode: str
) -> None:
    recipe = tiny.recipe(tmp_path, stage, steps=STEPS)
    recipe = tiny.with_transfer(recipe, mode=mode)
    ends = tiny.train(ranks(2), recipe, Options(), Plan(logits=True))
    folder = run_folder(recipe)
    measured = json.loads((folder / "result.json").read_text())["metrics"]
    for name, chosen in recipe.models.items():
        file = folder / "export" / f"{name}.safetensors"
        exported = load_file(file)
        fresh = models.build(chosen.name, data.classes(recipe.data[chosen.data]))
        assert exported.keys() == fresh.state_dict().keys(), "no adapter and no factors"
        model = models.build(chosen.name, data.classes(recipe.data[chosen.data]), init=str(file)).eval()
        with torch.no_grad():
            logits = model(tiny.pictures())
        for end in ends:
            torch.testing.assert_close(logits, end["logits"][name], rtol=1e-5, atol=1e-6)
            # the export was made from averages, and each rank has its own statistics still
            tiny.assert_equal(end["after_export"]["buffers"], end["buffers"])
        buffers = [end["buffers"][name] for end in ends]
        norm = next(key for key in buffers[0] if key.endswith("running_mean"))
        assert not torch.equal(buffers[0][norm], buffers[1][norm])
        torch.testing.assert_close(exported[norm], (buffers[0][norm] + buffers[1][norm]) / 2)
        # and one process finds what two ranks have measured
        config = recipe.data[chosen.data]
        loader = Loader(data.load(config, train=False), config.batch, 0, (), 0, 1, torch.device("cpu"))
        assert evaluate(model, loader, "cpu") == pytest.approx(measured[name], rel=1e-5)


def test_controls_and_seeds_start_from_the_same_models_and_batches(ranks: Any, tmp_path: Path) -> None:
    """One step with rates of zero: what is left are the first weights."""
    base = tiny.recipe(tmp_path, steps=1)
    still = {name: replace(model, optim=replace(model.optim, lr=0.0)) for name, model in base.models.items()}
    ends = {}
    for control, seed in (("none", 0), ("none", 1), ("frozen", 0)):
        recipe = replace(base, models=still, seed=seed, method=replace(base.method, control=control))
        ends[control, seed] = tiny.train(ranks(1), recipe)[0]
    names = [name for name in ends["none", 0]["resnet"] if "conv1" not in name and "fc." not in name]
    for name in names:
        assert torch.equal(ends["none", 0]["resnet"][name], ends["frozen", 0]["resnet"][name])
    assert any(not torch.equal(ends["none", 0]["resnet"][n], ends["none", 1]["resnet"][n]) for n in names)


# --- from a launcher's command line ---


def command(arguments: list[str], launcher: str = "cifar_mergenet") -> tuple[list[list[Any]], str]:
    """A launcher's `main` on this rank: (what each run was, stdout)."""
    file = next(path for path in LAUNCHERS if path.stem == launcher)
    trained: list[list[Any]] = []

    class Watched(running.Trainer):
        def fit(self) -> bool:
            trained.append([self.recipe.method.control, self.recipe.seed, self.step])
            return super().fit()

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, tiny.handlers_kept(), contextlib.redirect_stdout(out):
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"))
        patch.setattr(running, "Trainer", Watched)
        patch.setattr(launch, "start", lambda *_: ranks)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        patch.setattr(sys, "argv", [file.name, *arguments])
        running.main(load(file).VARIANTS)
    return trained, out.getvalue()


def test_a_comparison_runs_what_is_missing_and_nothing_else(ranks: Any, tmp_path: Path) -> None:
    arguments = [
        *("--variant", "digits", "--data.many.name", "generated", "--data.few.name", "generated"),
        *("--data.many.batch", "4", "--data.few.batch", "4", "--steps", "2", "--output-dir", str(tmp_path)),
        *("--compare", "none", "noise", "--seeds", "3", "4"),
    ]
    everything = [["transfer", 3], ["none", 3], ["noise", 3], ["transfer", 4], ["none", 4], ["noise", 4]]
    trained, printed = ranks(1).run(command, arguments)[0]
    assert trained == [[*one, 0] for one in everything]
    for control in ("transfer", "none", "noise"):
        assert control in printed
    assert list(tmp_path.rglob("*.png")), "the comparison's curves"

    assert ranks(1).run(command, arguments)[0][0] == []

    folder = tmp_path / "digits_mergenet"
    (folder / "none" / "seed4" / "result.json").unlink()
    (folder / "noise" / "seed3" / "result.json").unlink()
    for checkpoint in (folder / "noise" / "seed3" / "checkpoints").iterdir():
        (checkpoint / "DONE").unlink()
    trained, _ = ranks(1).run(command, arguments)[0]
    assert trained == [["noise", 3, 0], ["none", 4, 2]]
    assert len(list(folder.rglob("result.json"))) == 6


def test_max_steps_stops_early_with_a_checkpoint_and_a_result_of_that_many(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=20)
    ends = tiny.train(ranks(1), recipe, Options(max_steps=1))
    folder = run_folder(recipe)
    assert ends[0]["done"]
    assert json.loads((folder / "result.json").read_text())["steps"] == 1
    assert (folder / "checkpoints" / "1" / "DONE").exists()
    assert "first_step" not in tiny.train(ranks(1), recipe, Options(max_steps=1))[0]


def test_max_steps_behind_a_checkpoint_evaluates_what_that_holds(ranks: Any, tmp_path: Path) -> None:
    """A run that was killed between its last checkpoint and its result, started again for fewer steps."""
    recipe = tiny.recipe(tmp_path, steps=20)
    metrics = tiny.train(ranks(1), recipe, Options(max_steps=2))[0]["metrics"]
    result = run_folder(recipe) / "result.json"
    result.unlink()
    (end,) = tiny.train(ranks(1), recipe, Options(max_steps=1))
    assert (end["first_step"], end["metrics"]) == (2, metrics)
    found = json.loads(result.read_text())
    assert (found["steps"], found["metrics"]) == (2, metrics)


@pytest.mark.parametrize("launcher", ["cifar_mergenet", "self_transfer"])
@pytest.mark.parametrize("world", [1, 2])
def test_debug_runs_through_and_does_so_again(ranks: Any, tmp_path: Path, launcher: str, world: int) -> None:
    for _ in range(2):
        found = ranks(world).run(command, ["--debug", "--output-dir", str(tmp_path)], launcher)
        assert [trained for trained, _ in found] == [[["transfer", 0, 0]]] * world
    (result,) = (json.loads(path.read_text()) for path in tmp_path.rglob("result.json"))
    assert (result["steps"], result["world_size"]) == (4, world)


@pytest.mark.parametrize("steps", [3, 8])
def test_profile_writes_a_trace_and_changes_no_number(ranks: Any, tmp_path: Path, steps: int) -> None:
    profiled, plain = (tiny.recipe(tmp_path / name, steps=steps) for name in ("profiled", "plain"))
    ends = tiny.train(ranks(1), profiled, Options(profile=True))
    trace = json.loads((run_folder(profiled) / "profile.json").read_text())
    assert any("conv" in str(event.get("name")) for event in trace["traceEvents"])
    told = (run_folder(profiled) / "profile.txt").read_text()
    parts = {"data", "forward", "backward", "optimizer", "logging"} | ({"gather", "adapter"} if steps == 8 else set())
    assert all(f"│ {name} " in told for name in parts), told
    tiny.assert_same_end(ends, tiny.train(ranks(1), plain))


@pytest.mark.data
def test_a_launcher_trains_on_real_cifar100(real_data: Path, tmp_path: Path) -> None:
    launcher = Path(__file__).parents[1] / "launchers" / "cifar_mergenet.py"
    command = [sys.executable, str(launcher), "--variant", "cpu", "--output-dir", str(tmp_path)]
    small = ["--data-dir", str(real_data / "mini"), "--data.cifar100.batch", "20", "--steps", "5", "--eval-every", "5"]
    small += [f"--models.{name}.schedule.warmup=0" for name in ("resnet", "mobilenetv2")]
    subprocess.run([*command, *small], check=True, capture_output=True, text=True, timeout=200)
    result = json.loads((tmp_path / "cifar_mergenet_cpu" / "transfer" / "seed0" / "result.json").read_text())
    assert result["steps"] == 5
    for metrics in result["metrics"].values():
        assert 0 <= metrics["top1"] <= metrics["top5"] <= 100
        assert 3 < metrics["loss"] < 8, "near the log of a hundred classes"


@pytest.mark.parametrize("stage", [1, 3])
def test_a_model_rests_after_its_own_steps_and_its_transfers_with_it(ranks: Any, tmp_path: Path, stage: int) -> None:
    """The other one goes on, losses are means over the steps that a model trained, and a resume changes nothing."""
    long = tiny.recipe(tmp_path / "long", stage, eval_every=2, log_every=4)
    resting = replace(long, models={**long.models, "resnet": replace(long.models["resnet"], steps=3)})
    whole = tiny.train(ranks(2), resting)
    lines = tiny.lines(run_folder(resting))
    assert {line["step"] for line in lines if "there/gate" in line} == {1, 3}
    assert {line["step"] for line in lines if "back/gate" in line} == {1}
    assert [line["step"] for line in lines if "mobilenetv2/loss" in line] == [4, 6]
    assert [line["step"] for line in lines if "resnet/loss" in line] == [4]

    tested = {line["step"]: line for line in lines if "resnet/test_loss" in line}
    assert tested[4]["resnet/test_loss"] == tested[6]["resnet/test_loss"] != tested[2]["resnet/test_loss"]
    assert tested[4]["mobilenetv2/test_loss"] != tested[6]["mobilenetv2/test_loss"]

    again = replace(resting, output_dir=str(tmp_path / "again"), save_every=4)
    tiny.train(ranks(2), again, Options(max_steps=4))
    tiny.assert_same_end(tiny.train(ranks(2), again), whole)
