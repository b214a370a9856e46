"""What a model and its rows or its precision cannot do is found before an engine starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hetero_kt import models, parts, plan
from hetero_kt.config import Data, Distill, MergeNet, Model, Recipe, Teacher
from hetero_kt.nn.stages import split
from hetero_kt.parts.models import check_bf16


def recipe(name: str = "timm:resnet18", batch: int = 8, micro_batch: int = 0, size: int = 32) -> Recipe:
    data = Data("generated", batch=batch, image_size=size)
    return Recipe("r", {"m": Model(name, "d", micro_batch=micro_batch)}, {"d": data}, MergeNet({}, "none"), steps=2)


def check(one: Recipe, world: int = 1) -> None:
    ((name, model),) = one.models.items()
    size = one.data[model.data].image_size
    parts.check_rows(one, {name: models.build(model.name, 10, image_size=size)}, world)


@pytest.mark.parametrize(
    ("changes", "world", "said"),
    [
        (
            {"micro_batch": 1},
            1,
            "--models.m.micro-batch 1 leaves 1 row in a rank's forward, where m normalises one value",
        ),
        ({"micro_batch": 1}, 1, "per channel: use 2, or a larger --data.d.image-size."),
        ({"micro_batch": 1, "batch": 9}, 1, "per channel: use 3, or a larger --data.d.image-size."),
        ({"batch": 1}, 1, "--data.d.batch 1 leaves 1 row in a rank's forward, where m normalises one value"),
        ({"batch": 4}, 4, "per channel: use 8, or a larger --data.d.image-size."),
        ({"batch": 4, "micro_batch": 1}, 4, "--data.d.batch 4 leaves 1 row in a rank's forward"),
    ],
)
def test_a_batch_norm_of_one_value_is_one_sentence(changes: dict[str, int], world: int, said: str) -> None:
    with pytest.raises(ValueError) as error:
        check(recipe(**changes), world)
    assert said in str(error.value)


def test_what_torch_refuses_is_what_is_refused() -> None:
    """By its first step: the sizes at which a ResNet ends in one place and in four, and models without BatchNorm."""
    for name, size, fails in (
        ("timm:resnet18", 32, True),
        ("timm:resnet18", 64, False),
        ("timm:convnext_atto", 32, False),
        ("cifar:mobilenetv2", 32, False),
    ):
        one = recipe(name, micro_batch=1, size=size)
        model = models.build(name, 10, image_size=size).train()
        picture = torch.zeros(1, 3, size, size)
        if fails:
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                model(picture)
            with pytest.raises(ValueError, match=r"^--models\.m\.micro-batch 1 "):
                check(one)
        else:
            model(picture)
            check(one)
    check(recipe(micro_batch=2))


class Instances(nn.Module):
    """InstanceNorm over one place, whatever the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 4, 32), nn.InstanceNorm2d(4, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(x))


def test_an_instance_norm_of_one_place_is_refused_with_any_number_of_rows() -> None:
    with pytest.raises(ValueError, match=r"^--data\.d\.image-size 32 leaves m one place to normalise: use more"):
        parts.check_rows(recipe(), {"m": Instances()}, 1)


def test_looking_leaves_the_model_and_the_random_state_as_they_are() -> None:
    module = models.build("timm:resnet18", 10, image_size=64).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.random.get_rng_state()
    parts.check_rows(recipe(micro_batch=1, size=64), {"m": module}, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not module.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def distilled(objective: Any, student: str, teacher: str) -> tuple[Recipe, Any]:
    """A recipe with one row in a forward, and what is trained beside its student."""
    method = Distill({"teacher": Teacher(teacher, init="random")}, objective)
    one = replace(recipe(student, micro_batch=1), method=method)
    ours, theirs = (split(models.build(name, 10, image_size=32), 32) for name in (student, teacher))
    known: Any = {"teacher": SimpleNamespace(stages=theirs)}
    return one, parts.build_objective(method, ours, known, 10).aside


@pytest.mark.parametrize(
    ("objective", "student", "teacher"),
    [("ofa", "timm:convnext_atto", "timm:resnet18"), ("fcfd", "timm:convnext_atto", "timm:resnet18")],
)
def test_a_batch_norm_of_one_value_beside_the_student_is_one_sentence(
    objective: str, student: str, teacher: str
) -> None:
    one, aside = distilled(objective, student, teacher)
    with pytest.raises(ValueError) as error:
        parts.check_rows(one, {}, 1, aside)
    assert str(error.value) == (
        f"--models.m.micro-batch 1 leaves 1 row in a rank's forward, where {objective}'s auxiliary module normalises "
        "one value per channel: use 2, or a larger --data.d.image-size."
    )
    check(one)  # the student has none
    two = {"m": replace(one.models["m"], micro_batch=2)}
    parts.check_rows(replace(one, models=two), {}, 1, aside)


def test_a_plan_and_the_check_before_any_training_refuse_it_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="normalises one value per channel"):
        plan.show(recipe(micro_batch=1), 1)
    method = Distill({"teacher": Teacher("timm:resnet18", init="random")}, "kd")
    with pytest.raises(ValueError, match="normalises one value per channel"):
        parts.check_pairs(replace(recipe(micro_batch=1), method=method), set())
    with pytest.raises(ValueError, match=r"^--data\.d\.batch 4 "):
        parts.check_pairs(replace(recipe(batch=4), method=method), set(), 4)


def test_bf16_on_a_gpu_without_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")
    base = recipe()
    for precision in ("autocast", "bf16"):
        one = replace(base, models={"m": replace(base.models["m"], precision=precision)})
        check_bf16(one, torch.device("cpu"))
        with pytest.raises(ValueError) as error:
            check_bf16(one, torch.device("cuda", 0))
        assert str(error.value) == (
            f"--models.m.precision {precision} computes in bf16, which this GPU (Tesla P100) does not: use fp32."
        )
    check_bf16(base, torch.device("cuda", 0))
