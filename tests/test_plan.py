"""The plan's figures equal what is known, and what a run then measures."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small import zero
from test_launchers import LAUNCHERS, load

from hetero_kt import data, models, parts, plan
from hetero_kt import run as running
from hetero_kt.config import (
    CRD,
    FBT,
    AdapterConfig,
    Data,
    Distill,
    FitNet,
    MergeNet,
    Model,
    Optim,
    Recipe,
    Teacher,
    Transfer,
)
from hetero_kt.cost import additions, aside_cost, crd_bytes, model_cost, sent_bytes, teacher_stages, transfer_cost
from hetero_kt.distributed import launch
from hetero_kt.distributed.engine import build_engine
from hetero_kt.distributed.launch import Ranks
from hetero_kt.nn.losses.memory import Memory
from hetero_kt.nn.stages import Stages, split
from hetero_kt.options import without_local_rank
from hetero_kt.tasks import classification

PICTURES = Data("generated", image_size=224)


def test_parameters_and_macs_of_resnet18_are_the_published_ones() -> None:
    module = models.build("timm:resnet18", 1000, image_size=224)
    cost = model_cost(module, Model("timm:resnet18", "d"), PICTURES, world=1)
    assert cost.parameters == 11_689_512
    assert cost.macs / 1e9 == pytest.approx(1.814, abs=0.01)


@pytest.mark.parametrize(
    ("name", "billions"), [("vit_small_patch16_224", 4.24), ("swin_tiny_patch4_window7_224", 4.35)]
)
def test_macs_are_those_of_linear_and_convolution_layers(name: str, billions: float) -> None:
    """By hand: every linear layer at every token. The products of attention are not among them."""
    module = models.build(f"timm:{name}", 1000, image_size=224)
    cost = model_cost(module, Model(f"timm:{name}", "d"), PICTURES, world=1)
    if name.startswith("vit"):
        width = 384
        assert cost.macs == 196 * 3 * 16 * 16 * width + 12 * 197 * 12 * width**2 + width * 1000
    assert cost.macs / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "states", "sent"),
    [(0, 4, 4, 4, 6), (1, 4, 4, 2, 9), (2, 4, 1, 2, 9), (3, 1, 1, 2, 6)],
)
def test_zero_stages_divide_what_they_should(
    stage: int, weights: float, gradients: float, states: float, sent: float
) -> None:
    """Bytes per parameter on one of four ranks: SGD with momentum keeps a master copy and one moment."""
    module = models.build("cifar:resnet_tiny", 10)
    model = Model("cifar:resnet_tiny", "d", optim=Optim(name="sgd"), zero=f"ds_configs/zero{stage}.json")
    cost = model_cost(module, model, Data("generated"), world=4)
    assert cost.average_bytes == 0
    averaged = model_cost(module, replace(model, ema=0.9, precision="bf16"), Data("generated"), world=4)
    assert averaged.average_bytes == 4 * cost.parameters // (4 if stage else 1)
    count = cost.parameters
    got = [cost.weight_bytes, cost.gradient_bytes, cost.optimizer_bytes, cost.sent_bytes]
    assert [b / count for b in got] == pytest.approx([weights, gradients, states, sent], rel=1e-3)


SENDS: dict[str, Any] = {
    "1": {"stage": 1},
    "1, reduced": {"stage": 1, "use_multi_rank_bucket_allreduce": False},
    "2": {"stage": 2},
    "3": zero(3),
    "3, released": {**zero(3), "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0},
}


def sent_in_steps(names: list[str]) -> list[tuple[int, int]]:
    """Of each block, what this one of two ranks sent in two steps, and what is planned for them."""
    sys.path.insert(0, str(LAUNCHERS[0].parents[1] / "benchmarks"))
    from measure import Collectives

    found = []
    for name in names:
        torch.manual_seed(0)
        model = models.build("cifar:resnet_tiny", 10)
        count = sum(p.numel() for p in model.parameters())
        engine = build_engine(model, optim=Optim(), zero=SENDS[name], micro_batch=4)

        def step(engine: Any = engine) -> None:
            engine.backward(classification.loss(engine, (torch.randn(4, 3, 32, 32), torch.arange(4))))
            engine.step()

        step(), step()
        with Collectives() as sent:
            step(), step()
        found.append((sent.volume() // 2, 2 * sent_bytes(SENDS[name], count, count, 2)))
        engine.destroy()
    return found


def test_what_is_sent_is_what_was_planned(ranks: Any) -> None:
    """Of the paper's volumes DeepSpeed sends another one by default at every stage."""
    for found in ranks(2).run(sent_in_steps, list(SENDS)):
        for name, (sent, planned) in zip(SENDS, found, strict=True):
            assert sent == pytest.approx(planned, rel=2e-3), name


def recipe(mode: Any) -> Recipe:
    names = {"resnet": "cifar:resnet_tiny", "mobilenetv2": "cifar:mobilenetv2_tiny"}
    return Recipe(
        "planned",
        {name: Model(path, "d", zero="ds_configs/zero3.json") for name, path in names.items()},
        {"d": Data("generated", batch=8, augment=())},
        MergeNet({"t": Transfer("resnet:fc.weight", "mobilenetv2:blocks.2.1.conv_pwl.weight", 1, mode, rank=4)}),
        steps=1,
    )


def measured_bytes(mode: Any) -> tuple[int, int]:
    one = recipe(mode)
    modules = parts.build_models(one)
    engines = {
        name: build_engine(m, optim=Optim(), zero=zero(3), micro_batch=8 // dist.get_world_size())
        for name, m in modules.items()
    }
    assert isinstance(one.method, MergeNet)
    exchange = parts.mergenet.build_exchange(
        one, list(parts.mergenet.build_transfers(one, one.method, engines).values())
    )
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), 0, engines["resnet"].device)
    loader = parts.build_loaders(one, ranks)[0]["d"]
    exchange.propose()
    before = exchange.traffic.bytes
    for engine in engines.values():
        engine.backward(classification.loss(engine, loader.batch(0)))
        engine.step()
    exchange.learn()
    for engine in engines.values():
        engine.destroy()
    return before, exchange.traffic.bytes - before


@pytest.mark.parametrize("mode", ["factor", "full", "svd"])
def test_a_transfer_gathers_the_planned_bytes(ranks: Any, mode: Any) -> None:
    one = recipe(mode)
    plain = {name: models.build(m.name, 100) for name, m in one.models.items()}
    cost = transfer_cost(one, "t", plain)
    before, after = ranks(2).run(measured_bytes, mode)[0]
    assert (before, after) == (cost.gathered_before, cost.gathered_after)


def test_the_plan_prints_every_model_and_transfer(capsys: Any) -> None:
    plan.show(recipe("factor"), 4)
    printed = capsys.readouterr().out
    for word in ("resnet", "mobilenetv2", "on 4 rank(s)", "4x96", "ZeRO"):
        assert word in printed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"target": "mobilenetv2:fc.wieght"}, "'fc.wieght' is no weight"),
        ({"rank": 500}, "choose a rank from 1 to"),
        ({"mode": "factor", "adapter": AdapterConfig("aligned")}, "the rows are those of factors"),
    ],
)
def test_a_plan_refuses_a_transfer_that_a_run_would_refuse(changed: dict[str, Any], said: str) -> None:
    """Two factors of one rank have equally many rows, which are no reason to read one by the other."""
    one = recipe("svd")
    assert isinstance(one.method, MergeNet)
    ((name, transfer),) = one.method.transfers.items()
    one = replace(one, method=MergeNet({name: replace(transfer, **changed)}))
    with pytest.raises(ValueError, match=rf"^--method.transfers.{name}: .*{said}"):
        plan.show(one, 2)


def test_the_plan_of_a_distillation_prints_teachers_and_what_training_adds(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the launcher, which starts nothing: Table 6's first pair."""
    launcher = next(path for path in LAUNCHERS if path.stem == "cifar_fbt")
    arguments = [
        *("--plan", "--models.student.name", "timm:resnet18", "--data.pictures.name", "generated"),
        *("--method.teachers.teacher.name", "timm:deit_tiny_patch16_224", "--models.student.ema", "0.9"),
    ]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["cifar_fbt.py", *arguments])
    monkeypatch.setattr(launch, "start", None)
    running.main(load(launcher).VARIANTS)
    printed = capsys.readouterr().out
    for word in (
        "frozen teachers",
        "Table 6",
        "student 1-3 -> L2G -> teacher 4",
        "0.38M",
        "0.075G",
        "OFA",
        "5.54M",
        "fused (aside)",
        "average",
    ):
        assert word in printed, printed


def pair(objective: Any, **settings: Any) -> Recipe:
    student = Model("cifar:resnet_tiny", "d", optim=Optim(name="adamw"), zero="ds_configs/zero2.json", ema=0.9)
    method = Distill({"t": Teacher("cifar:vit_tiny"), "u": Teacher("cifar:mixer_tiny")}, objective, **settings)
    return Recipe("planned", {"student": student}, {"d": Data("generated", batch=8)}, method, steps=1)


def staged(name: str) -> Stages:
    return split(models.build(name, GENERATED), 32)


GENERATED = data.classes(Data("generated"))


@pytest.mark.parametrize(
    ("objective", "settings"),
    [("fbt", {"fbt": FBT(pair="ofa")}), ("ofa", {}), ("fitnet", {"fitnet": FitNet("pooled")}), ("kd", {})],
)
def test_what_is_trained_aside_costs_gradients_and_moments_and_has_no_average(objective: Any, settings: Any) -> None:
    one = pair(objective, **settings)
    assert isinstance(one.method, Distill)
    ours = staged("cifar:resnet_tiny")
    teachers = {name: staged(teacher.name) for name, teacher in one.method.teachers.items()}
    found = aside_cost(one, ours, teachers, world=4)
    if objective == "kd":
        assert found is None
        return
    assert found is not None
    each = [additions(ours, theirs, one.method.fbt, GENERATED) for theirs in teachers.values()]
    count = {
        "fbt": sum(connection.parameters for connection in each),
        "ofa": max(connection.branches for connection in each),
        "fitnet": sum((ours.width + 1) * theirs.width for theirs in teachers.values()),
    }[objective]
    name, cost = found
    assert name == {"fbt": "fused", "ofa": "branches", "fitnet": "projections"}[objective]
    assert (cost.parameters, cost.weight_bytes, cost.gradient_bytes) == (count, 4 * count, count)
    assert cost.optimizer_bytes == pytest.approx(3 * count, rel=1e-3), "a master copy and two moments, over four ranks"
    assert cost.average_bytes == 0


@pytest.mark.parametrize(
    ("objective", "shown"), [("none", []), ("kd", ["frozen"]), ("fbt", ["frozen", "Table 6", "fused (aside)"])]
)
def test_a_plan_prints_no_table_of_what_is_not_there(objective: Any, shown: list[str], capsys: Any) -> None:
    plan.show(pair(objective), 2)
    printed = capsys.readouterr().out
    assert [word for word in ("frozen", "Table 6", "fused (aside)", "transfers") if word in printed] == shown
    plan.show(replace(recipe("full"), method=MergeNet({})), 2)
    assert "transfers" not in capsys.readouterr().out


def test_crd_s_memory_is_what_it_holds(capsys: Any) -> None:
    one = pair("crd")
    (entry,) = one.data.values()
    held = Memory(data.samples(entry), CRD().width, 0.5, 0)
    assert crd_bytes(one) == sum(side.numel() * side.element_size() for side in held.sides)
    plan.show(one, 2)
    shown = capsys.readouterr().out
    assert "CRD's memory" in shown
    assert "1.6 MiB" in shown  # 1,600 samples, 128 numbers, two sides


@pytest.mark.parametrize(
    "entry",
    [
        Data("digits"),
        Data("generated"),
        Data("generated", per_class=3),
        Data("generated", validation=0.25),
        Data("generated", validation=0.25, per_class=20),
    ],
)
def test_samples_are_known_before_a_set_is_read(entry: Data) -> None:
    found = data.samples(entry)
    if not (entry.validation and entry.per_class):
        assert found == len(data.load(entry, train=True))
    else:
        assert found == 1200, "fewer than asked for: reading it refuses that"


def test_a_plan_of_a_pair_that_cannot_be_fused_names_the_option() -> None:
    one = Recipe(
        "planned",
        {"student": Model("cifar:resnet_tiny", "d")},
        {"d": Data("generated", batch=8)},
        method := Distill({"t": Teacher("timm:vgg11")}),
        steps=1,
    )
    with pytest.raises(ValueError, match=r"^--method.teachers.t.name: VGG cannot be split into stages"):
        teacher_stages(one, method, "t")


def test_local_rank_of_the_deepspeed_command_is_dropped() -> None:
    assert without_local_rank(["--local_rank=1", "--seed", "3", "--local-rank", "0"]) == ["--seed", "3"]


@pytest.mark.parametrize(
    "named", [{"name": "shards", "folder": "imagenet"}, {"name": "tars", "folder": "t-{0..9}.tar", "test": "v.tar"}]
)
def test_pictures_that_nobody_has_written_yet_are_planned_as_imagenets(named: Any, tmp_path: Any, capsys: Any) -> None:
    pictures = Data(**named, batch=8, pipeline="timm", image_size=32, workers=0)
    method = Distill({"teacher": Teacher("cifar:resnet_tiny", init="random")}, "crd")
    student = Model("cifar:mobilenetv2_tiny", "d", zero="ds_configs/zero1.json")
    recipe = Recipe("planned", {"student": student}, {"d": pictures}, method, steps=1, data_dir=str(tmp_path))
    plan.show(recipe, 2)
    said = capsys.readouterr().out
    assert "The pictures of d are not there: planned for ImageNet-1K's 1,000 classes and 1,281,167 pictures." in said
    counted = sum(p.numel() for p in models.build("cifar:mobilenetv2_tiny", 1000).parameters())
    assert f"{counted / 1e6:.2f}M" in said
    memory = Memory.bytes(1_281_167, method.crd.width) / 2**30
    assert f"{memory:.2f} GiB" in said
    assert not list(tmp_path.iterdir())
