"""The ZeRO blocks that ship, each in every precision, against a plain process; a run under them resumes and crosses."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from rounding import Nudge, assert_close, movement, result_of
from small import Convolutions, batch, loss
from torch import Tensor
from torch.nn import functional as F

from hetero_kt.checks import zero_block
from hetero_kt.config import Distill, Model, Optim, Recipe, Schedule
from hetero_kt.distributed import params
from hetero_kt.distributed.learner import build_learner
from hetero_kt.folder import run_folder
from hetero_kt.models import build
from hetero_kt.models.teacher import Frozen
from hetero_kt.nn.stages import expose
from hetero_kt.options import Options

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
TRAINED = ("zero1", "zero2", "zero3", "zero3_offload")
STEPS, ROWS = 6, 8
SGD = Optim("sgd", lr=0.2, weight_decay=1e-3)


def block(name: str) -> dict[str, Any]:
    """A file that ships, and small weights in pieces too."""
    shipped = zero_block(f"ds_configs/{name}.json")
    return {**shipped, "stage3_param_persistence_threshold": 0} if shipped["stage"] == 3 else shipped


def model_of(precision: str) -> Convolutions:
    torch.manual_seed(0)
    return Convolutions(batch_norm=precision != "bf16")


def train(name: str, precision: str) -> tuple[list[float], dict[str, Tensor], list[str]]:
    """Losses of this rank's rows, the weights after them, and where the pieces lie."""
    rank, world = dist.get_rank(), dist.get_world_size()
    recipe = Model("small", data="", optim=SGD, schedule=Schedule("constant"), precision=precision)
    learner = build_learner(model_of(precision), recipe, block(name), rows=ROWS // world, steps=STEPS)
    engine, losses = learner.engine, []
    for step in range(STEPS):
        learner.begin(step)
        value = loss(engine, batch(0, rank, world, ROWS))
        engine.backward(value)
        learner.step()
        losses.append(value.item())
    config, parameters = engine._config.zero_config, list(engine.module.parameters())
    if config.stage == 3:
        engine.empty_partition_cache()
        assert all(p.ds_tensor.numel() == -(-p.ds_numel // world) for p in parameters)
    placed = [str(part.device) for part in (config.offload_param, config.offload_optimizer) if part is not None]
    weights = {n: params.read([params.Weight(engine, p)])[0] for n, p in engine.module.named_parameters()}
    engine.destroy()
    return losses, weights, placed


def plain(precision: str, world: int, nudge: Nudge) -> dict[str, Any]:
    """The same in one process: each rank's rows in turn, gradients averaged, masters in fp32."""
    model = model_of(precision)
    nudge.modules([model])
    masters = [p.detach().clone() for p in model.parameters()]
    if precision == "bf16":
        model.to(torch.bfloat16)
    optimizer = torch.optim.SGD(masters, SGD.lr, SGD.momentum, weight_decay=SGD.weight_decay)
    losses: list[list[float]] = []
    for _ in range(STEPS):
        rows = [(nudge(x), y) for x, y in (batch(0, rank, world, ROWS) for rank in range(world))]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            values = [loss(model, one) for one in rows]
        gradients = [torch.autograd.grad(value, list(model.parameters())) for value in values]
        for master, *parts in zip(masters, *gradients, strict=True):
            master.grad = sum(part.float() for part in parts) / world
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), masters, strict=True):
                parameter.copy_(master)
        losses.append([value.item() for value in values])
    return {"losses": losses, "weights": dict(zip(dict(model.named_parameters()), masters, strict=True))}


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_shipped_config_trains_like_a_plain_process(ranks: Any, name: str, precision: str) -> None:
    theirs = result_of(plain, precision, 2)
    first, *_, last = theirs["losses"]
    assert last[0] < 0.8 * first[0], "it learns, or two runs would be alike without a step"
    of_ranks = ranks(2).run(train, name, precision)
    losses = [list(of_step) for of_step in zip(*(losses for losses, _, _ in of_ranks), strict=True)]
    for _, weights, placed in of_ranks:
        assert placed == (["cpu", "cpu"] if name == "zero3_offload" else [])
        if precision == "fp32":
            assert_close({"losses": losses, "weights": weights}, theirs, movement(plain, precision, 2))
        else:
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(theirs["losses"]), rtol=2e-2, atol=0)
            torch.testing.assert_close(weights, theirs["weights"], rtol=5e-2, atol=2e-2)


def test_what_ships_is_what_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == {"zero0", "zero3_frozen", *TRAINED}
    for path in CONFIGS.glob("*.json"):
        assert zero_block(f"ds_configs/{path.name}") == json.loads(path.read_text()), "blocks only"


# --- a frozen teacher in pieces ---


def teach(name: str, autocast: bool) -> dict[str, Any]:
    """What a teacher in pieces says, the gradient that it passes on, and how much of it is whole at once at most."""
    torch.manual_seed(3)
    module = build("cifar:swin_tiny", 10)
    pictures = torch.randn(4, 3, 32, 32)
    same = (0.5, 0.5, 0.5)
    given: dict[str, Any] = {"mean": same, "std": same, "own_mean": same, "own_std": same, "image_size": 32}
    twin = copy.deepcopy(module)
    whole = Frozen(twin, expose(twin, 32), **given, autocast=autocast)
    pieces = Frozen(
        module, expose(module, 32), **given, autocast=autocast, zero=block(name) | {"stage3_prefetch_bucket_size": 0}
    )
    whole.start(), pieces.start()
    most = left = 0

    def look(*_: Any) -> None:
        nonlocal most, left
        left = sum(p.ds_numel for p in module.parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
        most = max(most, left)

    for part in module.modules():
        part.register_forward_pre_hook(look)
    said: dict[str, Any] = {}
    for key, teacher in (("whole", whole), ("pieces", pieces)):
        for _ in range(3):  # DeepSpeed learns the order of a step's modules
            answers = teacher(pictures)
            feature = answers["stages"][2].detach().float().requires_grad_()
            F.cross_entropy(teacher.finish(feature)["tail_logits"].float(), torch.arange(4)).backward()
        said[key] = [answers["logits"].float(), feature.grad]
    look()
    pieces.stop()
    return {**said, "left": left, "most": most, "all": sum(p.numel() for p in twin.parameters())}


@pytest.mark.parametrize("autocast", [False, True])
def test_the_frozen_config_keeps_nothing_whole_and_teaches_the_same(ranks: Any, autocast: bool) -> None:
    for found in ranks(2).run(teach, "zero3_frozen", autocast):
        tolerance = 2e-2 if autocast else 1e-5  # ZeRO-3 gathers in bf16 there
        for ours, theirs in zip(found["pieces"], found["whole"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert found["left"] == 0
        assert found["most"] < found["all"] / 4, "a layer at a time, where nothing is fetched ahead"


# --- runs ---


def under(base: Recipe, folder: Path, name: str) -> Recipe:
    """`base` with its trained models under a file that ships, and a teacher under that for frozen ones."""
    file, frozen = folder / f"{name}.json", folder / "zero3_frozen.json"
    file.write_text(json.dumps(block(name)))
    frozen.write_text(json.dumps(block("zero3_frozen")))
    base = replace(base, models={key: replace(model, zero=str(file)) for key, model in base.models.items()})
    if isinstance(base.method, Distill):
        teachers = {key: replace(teacher, zero=str(frozen)) for key, teacher in base.method.teachers.items()}
        base = replace(base, method=replace(base.method, teachers=teachers))
    return base


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mergenet", "fbt"])
def test_an_offloaded_run_resumes_to_the_bit_and_equals_one_that_is_not(ranks: Any, tmp_path: Path, kind: str) -> None:
    """FBT's teacher is in pieces by the frozen config."""
    made = tiny.recipe if kind == "mergenet" else tiny.distillation

    def at(place: str, name: str, **changes: Any) -> Recipe:
        return under(tiny.with_average(made(tmp_path / place, **changes)), tmp_path / place, name)

    whole = tiny.train(ranks(2), at("whole", "zero3_offload"))
    parts = at("parts", "zero3_offload", save_every=1)
    tiny.train(ranks(2), parts, Options(max_steps=3))
    resumed = tiny.train(ranks(2), parts)
    assert [end["first_step"] for end in resumed] == [3, 3]
    tiny.assert_same_end(resumed, whole)
    plain = at("plain", "zero1")
    tiny.train(ranks(2), plain)
    ours, theirs = ([losses(line) for line in tiny.lines(run_folder(one))] for one in (parts, plain))
    for one, other in zip(filter(None, ours), filter(None, theirs), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def losses(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key.endswith("/loss")}


@pytest.mark.slow
def test_a_checkpoint_goes_into_an_offloaded_run_and_out_of_it(ranks: Any, tmp_path: Path) -> None:
    before: Any = None
    for i, (name, world) in enumerate((("zero2", 2), ("zero3_offload", 1), ("zero1", 2))):
        recipe = under(tiny.with_average(tiny.recipe(tmp_path, save_every=1)), tmp_path, name)
        ends = tiny.train(ranks(world), recipe, Options(max_steps=i + 1))
        for end in ends:
            assert end["first_step"] == i
            if before is not None:
                tiny.assert_equal(end["began"], before, f"{name} on {world}")
        before = ends[0]["whole"]
