"""OFA's branches: as many parameters as the public code's, logits for every stage of every kind of student."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import Tensor, nn

from hetero_kt.nn.branches import Branches, _Merge
from hetero_kt.nn.stages import Stages, split

CLASSES = 7
SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 2, 2)}
DEIT = {"depth": 4, "embed_dim": 36, "num_heads": 3}
MLP: dict[str, int] = {"num_blocks": 4, "embed_dim": 24}
STUDENTS: dict[str, Callable[[int], nn.Module]] = {
    "resnet": lambda size: timm.create_model("resnet10t"),
    "mobilenetv2": lambda size: timm.create_model("mobilenetv2_035"),
    "convnext": lambda size: timm.create_model("convnext_atto"),
    "deit": lambda size: timm.create_model("deit_tiny_patch16_224", img_size=size, **DEIT),
    "swin": lambda size: timm.create_model("swin_tiny_patch4_window7_224", img_size=size, **SWIN),
    "resmlp": lambda size: MlpMixer(img_size=size, block_layer=ResBlock, norm_layer=Affine, mlp_ratio=4, **MLP),
    "mixer": lambda size: MlpMixer(img_size=size, **MLP),
}


def features_of(name: str, size: int = 224) -> tuple[Stages, list[Tensor]]:
    torch.manual_seed(0)
    stages = split(STUDENTS[name](size).eval(), size)
    with torch.no_grad():
        return stages, stages.forward(torch.randn(2, 3, size, size), features=True)["stages"]


@pytest.mark.parametrize(
    ("student", "teacher_width", "millions"),
    [("resnet18", 192, 3.04), ("deit_tiny_patch16_224", 2048, 4.48), ("resmlp_12_224", 768, 16.33)],
)
def test_as_many_parameters_as_the_public_code(student: str, teacher_width: int, millions: float) -> None:
    stages = split(timm.create_model(student), 224)
    count = sum(parameter.numel() for parameter in Branches(stages, 1000, teacher_width).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("size", [224, 64])
@pytest.mark.parametrize("name", STUDENTS)
def test_every_stage_comes_to_logits_and_all_of_its_branch_learns(name: str, size: int) -> None:
    stages, features = features_of(name, size)
    branches = Branches(stages, CLASSES)
    features = [feature.requires_grad_() for feature in features]
    logits = branches(features)
    assert [tuple(x.shape) for x in logits] == [(2, CLASSES)] * 4
    weights = torch.randn(4, 2, CLASSES)
    for k in range(4):
        others = [p for j, branch in enumerate(branches.branches) if j != k for p in branch.parameters()]
        own = list(branches.branches[k].parameters())
        gradients = torch.autograd.grad(
            (logits[k] * weights[k]).sum(), [features[k], *own, *others], allow_unused=True, retain_graph=True
        )
        assert all(g is not None and g.any() for g in gradients[: 1 + len(own)])
        assert all(g is None for g in gradients[1 + len(own) :])


def test_a_cnn_s_branches_come_down_to_the_last_stage_s_grid_and_the_larger_width() -> None:
    stages, features = features_of("resnet")
    for width, expected in [(0, 512), (100, 512), (700, 700)]:
        for branch, feature in zip(Branches(stages, CLASSES, width).branches, features, strict=True):
            assert branch.down(feature).shape == (2, expected, 7, 7)


@pytest.mark.parametrize(
    ("name", "size", "lengths"),
    [
        ("deit", 224, [50, 50, 50, 50]),
        ("resmlp", 224, [49, 49, 49, 49]),
        ("swin", 224, [49, 49, 49, 49]),
        ("deit", 64, [17, 17, 17, 17]),
    ],
)
def test_tokens_are_merged_to_7_by_7_before_max_4_minus_k_and_1_blocks(
    name: str, size: int, lengths: list[int]
) -> None:
    stages, features = features_of(name, size)
    branches = Branches(stages, CLASSES)
    seen: list[int] = []
    for branch in branches.branches:
        branch.blocks.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    branches(features)
    assert seen == lengths
    assert [len(branch.blocks) for branch in branches.branches] == [3, 2, 1, 1]


def test_the_class_token_is_read_where_there_is_one_and_the_mean_elsewhere() -> None:
    for name, class_token in [("deit", True), ("resmlp", False)]:
        stages, features = features_of(name)
        branch = Branches(stages, CLASSES).branches[3]
        branch.blocks = nn.Identity()  # type: ignore[assignment]
        if class_token:
            expected = branch.classifier(features[3][:, 0])
        else:
            expected = branch.classifier(branch.merge(features[3].unflatten(1, (14, 14))).mean((1, 2)))
        torch.testing.assert_close(branch(features[3]), expected)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_a_merged_token_sees_its_own_neighbourhood(grid: tuple[int, int]) -> None:
    x = torch.randn(1, *grid, 3, requires_grad=True)
    merged = _Merge(3, 5)(x)
    assert merged.shape == (1, (grid[0] + 1) // 2, (grid[1] + 1) // 2, 5)
    (gradient,) = torch.autograd.grad(merged[0, 1, 1].sum(), x)
    seen = gradient[0].abs().sum(-1) > 0
    expected = torch.zeros(grid, dtype=torch.bool)
    expected[2:4, 2:4] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("name", ["resnet", "deit"])
def test_features_of_a_bf16_student_are_taken_in_the_branches_precision(name: str) -> None:
    stages, features = features_of(name)
    branches = Branches(stages, CLASSES).eval()
    assert all(logits.dtype == torch.float32 for logits in branches([feature.bfloat16() for feature in features]))
