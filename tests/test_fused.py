"""The connector between two models: its size as published, where it stands, and what goes through it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hetero_kt import config, models
from hetero_kt.cost import additions
from hetero_kt.methods.fbt import FBT, connect
from hetero_kt.models.teacher import Frozen
from hetero_kt.nn.fused import L2G, Route, macs, route
from hetero_kt.nn.stages import Layout, Stages, expose, resized, split, to_map

CLASSES = 10

TABLE_6 = {
    ("timm:deit_tiny_patch16_224", "timm:resnet18"): (0.39, 0.07, "student 1-3 -> L2G -> teacher 4"),
    ("timm:resnet50", "timm:deit_tiny_patch16_224"): (0.54, 0.10, "teacher 1-3 -> L2G -> student 4"),
    ("timm:convnext_tiny", "timm:resmlp_12_224"): (1.48, 0.29, "teacher 1-3 -> L2G -> student 4"),
}
"""(teacher, student): parameters in millions, multiply-accumulates in billions, whose stages."""


@pytest.mark.parametrize("pair", TABLE_6, ids=" -> ".join)
def test_parameters_and_macs_are_those_of_table_6(pair: tuple[str, str]) -> None:
    teacher, student = pair
    millions, billions, way = TABLE_6[pair]
    ours, theirs = (split(models.build(name, 100, image_size=224), 224) for name in (student, teacher))
    found = additions(ours, theirs, config.FBT(), 100)
    assert found.parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert round(found.macs / 1e9, 2) == billions
    assert found.way == way
    assert found.parameters < found.branches, "fewer than OFA's, which the appendix compares with"


# --- whose stages ---


def staged(name: str) -> Stages:
    return split(models.build(name, CLASSES), 32)


CNNS = ("cifar:resnet_tiny", "cifar:mobilenetv2_tiny", "cifar:convnext_tiny")
OTHERS = ("cifar:swin_tiny", "cifar:vit_tiny", "cifar:mixer_tiny", "cifar:resmlp_tiny")


@pytest.mark.parametrize(("student", "teacher"), itertools.product((*CNNS, *OTHERS), repeat=2))
def test_a_cnn_is_the_front_and_within_one_class_the_student(student: str, teacher: str) -> None:
    """Eq. 1 for one model of each class, whichever of them teaches; Eq. 2 for attention and MLP as one class."""
    turned = teacher in CNNS and student in OTHERS
    expected = Route("teacher", "student") if turned else Route("student", "teacher")
    assert route(staged(student), staged(teacher)) == expected


def frozen(module: nn.Module, size: int = 32) -> Frozen:
    one = (1.0, 1.0, 1.0)
    return Frozen(module, expose(module, size), mean=one, std=one, own_mean=one, own_std=one, image_size=size)


@pytest.mark.parametrize(("student", "teacher"), [(CNNS[0], OTHERS[0]), (OTHERS[1], CNNS[2]), (CNNS[0], CNNS[1])])
def test_borrowed_stages_belong_to_no_one_else(student: str, teacher: str) -> None:
    ours, theirs = (models.build(name, CLASSES) for name in (student, teacher))
    objective = FBT(config.FBT(), expose(ours, 32), {"teacher": frozen(theirs)})
    assert objective.aside is not None
    borrowed = {id(p) for model in (ours, theirs) for p in (*model.parameters(), *model.buffers(), *model.modules())}
    own = [*objective.aside.parameters(), *objective.aside.buffers(), *objective.aside.modules()]
    assert not [thing for thing in own if id(thing) in borrowed]
    names = {name.partition(".")[0] for name, _ in objective.aside.named_parameters()}
    assert names == {"connectors", "contrasts"}


# --- what goes through ---

FORMS = ("NCHW", "NHWC", "NLC")
GRIDS = {"shrinks": ((8, 8), (4, 4)), "grows": ((4, 4), (7, 7)), "stays": ((4, 4), (4, 4)), "odd": ((5, 5), (3, 3))}


def feature(layout: Layout, rows: int = 2) -> Tensor:
    torch.manual_seed(0)
    tokens = layout.grid[0] * layout.grid[1]
    shape = {
        "NCHW": (rows, layout.channels, *layout.grid),
        "NHWC": (rows, *layout.grid, layout.channels),
        "NLC": (rows, layout.prefix + tokens, layout.channels),
    }[layout.form]
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("block", ["swin", "vit", "none"])
@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize(("into", "out"), itertools.product(FORMS, FORMS))
def test_any_form_and_grid_comes_out_as_the_receiving_stage_wants_it(
    into: Any, out: Any, grids: str, block: str
) -> None:
    before, after = GRIDS[grids]
    source = Layout(into, 12, before, prefix=2 if into == "NLC" else 0)
    target = Layout(out, 32, after, prefix=1 if out == "NLC" else 0)
    connector = L2G(source, target, block)
    x = feature(source)
    y = connector(x)
    assert y.shape == feature(Layout(out, 32, after)).shape, "without class tokens"
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in connector.parameters())
    gradient = x.grad
    assert gradient is not None
    if into == "NLC":
        assert (gradient[:, :2] == 0).all(), "class tokens take no part"
        gradient = gradient[:, 2:]
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(("before", "after"), [((8, 6), (4, 3)), ((4, 4), (1, 4)), ((5, 5), (3, 3)), ((6, 4), (3, 3))])
def test_a_shrinking_grid_is_averaged_and_where_it_divides_evenly_deterministically(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    """CUDA has no deterministic backward of adaptive pooling."""
    x = torch.randn(2, 3, *before, requires_grad=True)
    y = resized(x, after)
    torch.testing.assert_close(y, F.adaptive_avg_pool2d(x, after))
    evenly = before[0] % after[0] == before[1] % after[1] == 0
    assert (y.grad_fn.name() == "AvgPool2DBackward0") == evenly  # type: ignore[union-attr]


@pytest.mark.parametrize("form", FORMS)
def test_every_place_stays_where_it_is(form: Any) -> None:
    """Without attention, an output place depends on the input places that it covers alone."""
    source, target = Layout("NCHW", 3, (8, 8)), Layout(form, 5, (4, 4))
    connector = L2G(source, target, "none").eval()
    x = torch.randn(1, 3, 8, 8)
    y = x.clone()
    y[..., 2:4, 6:8] += 1.0  # the place of row 1, column 3
    moved = (to_map(connector(x), target) - to_map(connector(y), target)).abs().amax((0, 1)) > 0
    assert moved.nonzero().tolist() == [[1, 3]]


def test_the_layers_are_the_embedding_and_one_block_of_attention() -> None:
    """By hand: a 1x1 convolution, LayerNorm, a block and a linear map, on tokens."""
    torch.manual_seed(0)
    source, target = Layout("NHWC", 6, (4, 4)), Layout("NLC", 8, (2, 2))
    connector = L2G(source, target, "vit").eval()
    x = torch.randn(3, 4, 4, 6)
    tokens = x.view(3, 2, 2, 2, 2, 6).mean((2, 4)).flatten(1, 2)
    tokens = connector.norm(tokens @ connector.embed.weight.flatten(1).T + connector.embed.bias)
    assert connector.block is not None
    assert connector.project is not None
    torch.testing.assert_close(connector(x), connector.project(connector.block(tokens)))


@pytest.mark.parametrize("block", ["swin", "vit", "none"])
@pytest.mark.parametrize(("channels", "width", "grid"), [(12, 64, 14), (8, 24, 7), (40, 32, 4)])
@pytest.mark.parametrize("ends_in", [0, 48])
def test_macs_are_a_count_of_linear_and_convolution_layers(
    block: str, channels: int, width: int, grid: int, ends_in: int
) -> None:
    side = (grid, grid)
    connector = L2G(Layout("NCHW", channels, side), Layout("NHWC", width, side), block, ends_in).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        connector(torch.zeros(1, channels, *side))
    kinds = counter.get_flop_counts()["Global"]
    layers = [torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm]
    assert macs(connector) == sum(kinds.get(kind, 0) for kind in layers) // 2


def test_the_published_count_is_c_d_and_9_d_squared() -> None:
    connector = L2G(Layout("NCHW", 12, (14, 14)), Layout("NLC", 64, (14, 14)))
    assert macs(connector) == 14 * 14 * (12 * 64 + 9 * 64**2)


# --- without the last stage ---


@pytest.mark.parametrize("receiving", ["cifar:swin_tiny", "cifar:mixer_tiny", "cifar:resnet_tiny"])
def test_without_the_last_stage_the_connector_ends_in_what_the_classifier_reads(receiving: str) -> None:
    model = models.build(receiving, CLASSES)
    front, tail = staged("cifar:resnet_tiny"), expose(model, 32)
    connector = connect(front, tail, config.FBT(last_stage=False))
    tokens = connector(feature(front.layouts[2]))
    answer = model(tail=tokens, after=4)
    assert answer["tail_logits"].shape == (2, CLASSES)
    assert answer["tail_pooled"].shape == (2, tail.width)


def test_without_the_last_stage_a_class_token_would_have_met_no_patch() -> None:
    with pytest.raises(
        ValueError, match=r"^--method.fbt.no-last-stage does not suit VisionTransformer, .*last stage.$"
    ):
        connect(staged("cifar:resnet_tiny"), staged("cifar:vit_tiny"), config.FBT(last_stage=False))


@pytest.mark.parametrize("ends", [("cifar:resnet_tiny", "cifar:vit_tiny"), ("cifar:mixer_tiny", "cifar:swin_tiny")])
def test_a_connected_feature_goes_through_the_last_stage(ends: tuple[str, str]) -> None:
    torch.manual_seed(0)
    front = staged(ends[0])
    model = models.build(ends[1], CLASSES).eval()
    tail = expose(model, 32)
    x = torch.randn(2, 3, 32, 32)
    for k in (1, 2, 3):
        x = front.stage(k, x)
    patches = connect(front, tail, config.FBT())(x)
    answer = model(tail=patches)
    pooled, logits = tail.head(tail.stage(4, tail.with_prefix(patches)))
    assert torch.equal(answer["tail_pooled"], pooled)
    assert torch.equal(answer["tail_logits"], logits)
