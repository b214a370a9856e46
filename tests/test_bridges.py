"""Bridges between the stages of two models: shapes, what they are made of, and paths that no step has drawn."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_options import one_sentence
from torch import nn

from hetero_kt import config, models
from hetero_kt.methods.objectives import FCFD
from hetero_kt.nn.bridges import CROSSINGS, Bridge, Bridges, Crossing
from hetero_kt.nn.stages import Layout, Stages, from_map, split


def staged(name: str) -> Stages:
    return split(models.build(f"cifar:{name}", 10), 32)


@pytest.mark.parametrize(
    ("into", "out", "convolution"),
    [
        ((8, 8), (8, 8), "Conv2d 3 1"),
        ((8, 8), (4, 4), "Conv2d 3 2"),
        ((7, 7), (4, 4), "Conv2d 3 2"),
        ((4, 4), (8, 8), "ConvTranspose2d 4 2"),
        ((12, 12), (4, 4), "Conv2d 3 1"),
        ((2, 2), (8, 8), "Conv2d 3 1"),
    ],
)
@pytest.mark.parametrize("rectified", [False, True])
def test_a_bridge_ends_in_the_other_stage_s_layout(into: Any, out: Any, convolution: str, rectified: bool) -> None:
    for form, prefix in (("NCHW", 0), ("NHWC", 0), ("NLC", 1)):
        bridge = Bridge(Layout("NCHW", 3, into), Layout(form, 5, out, prefix), rectified)  # type: ignore[arg-type]
        bridge.norm.bias.data.fill_(0.5)
        found = bridge(torch.randn(2, 3, *into))
        assert found.shape == from_map(torch.zeros(2, 5, *out), Layout(form, 5, out)).shape  # type: ignore[arg-type]
        cross: Any = bridge.cross
        assert f"{type(cross).__name__} {cross.kernel_size[0]} {cross.stride[0]}" == convolution
        values = found.detach().flatten()
        slope = 0.1 if rectified else 1.0
        plain = values.where(values > 0, values / slope)
        assert plain.mean() == pytest.approx(0.5, abs=1e-4), "normalised, then the bias, then the slope"


def test_which_stages_end_in_a_relu() -> None:
    assert staged("resnet_tiny").rectified == (True,) * 4
    assert staged("mobilenetv2_tiny").rectified == (False,) * 4
    bridges = Bridges(staged("mobilenetv2_tiny"), {"teacher": staged("resnet_tiny")})
    ends = {
        way: {type(bridge.rectify) for bridge in getattr(bridges, way)["teacher"]}
        for way in ("to_teacher", "to_student")
    }
    assert ends == {"to_teacher": {nn.LeakyReLU}, "to_student": {nn.Identity}}


def test_a_bridge_that_is_not_used_gets_gradients_of_zero() -> None:
    bridges = Bridges(staged("mobilenetv2_tiny"), {"teacher": staged("resnet_tiny")})
    unused = [Crossing("to_student", 2)]
    term = torch.ones((), requires_grad=True)
    terms = bridges(terms={"a": term, "b": 2 * term}, unused={"teacher": unused})
    assert {name: float(value.detach()) for name, value in terms.items()} == {"a": 1.0, "b": 2.0}
    sum(terms.values()).backward()
    for name, parameter in bridges.named_parameters():
        expected = name.startswith("to_student.teacher.1.")
        assert (parameter.grad is not None) == expected, name
        assert parameter.grad is None or not parameter.grad.any()


def fcfd(student: str, *teachers: str, seed: int = 0, **settings: Any) -> FCFD:
    known: Any = {f"teacher{i}": SimpleNamespace(stages=staged(name)) for i, name in enumerate(teachers)}
    return FCFD(config.FCFD(**settings), staged(student), known, 100, seed)


def test_paths_are_drawn_alike_on_all_ranks_and_all_are_drawn() -> None:
    one, other = (fcfd("resnet_tiny", "resnet_tiny", "resnet_tiny") for _ in range(2))
    seen, differs = Counter[Crossing](), 0
    for step in range(300):
        one.begin(step)
        torch.rand(1)  # the global stream has no say
        other.begin(step)
        assert one.drawn == other.drawn
        first, second = one.drawn.values()
        differs += first != second
        assert len(set(first)) == 2
        seen.update(first)
    assert seen.keys() == set(CROSSINGS)
    assert all(abs(count - 100) < 40 for count in seen.values())
    assert differs > 200, "teachers draw apart"
    moved = fcfd("resnet_tiny", "resnet_tiny", seed=1)
    drawn = []
    for objective in (one, moved):
        drawn.append([])
        for step in range(5):
            objective.begin(step)
            drawn[-1].append(objective.drawn["teacher0"])
    assert drawn[0] != drawn[1]


def test_the_weight_rises_over_the_warm_up() -> None:
    objective = fcfd("resnet_tiny", "resnet_tiny", warmup=0.1)
    risen = []
    for step in (0, 4, 9, 50):
        objective.begin(step)
        risen.append(objective.risen)
    assert risen == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert fcfd("resnet_tiny", "resnet_tiny", warmup=0.0).risen == 1.0


@pytest.mark.parametrize("pair", [("resnet_tiny", "vit_tiny"), ("mixer_tiny", "resnet_tiny")])
def test_tokens_are_refused_unless_asked_for(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"--control fcfd is defined between CNNs.*--method.fcfd.tokens") as error:
        fcfd(*pair)
    assert one_sentence(str(error.value))
    assert fcfd(*pair, tokens=True).aside is not None
