"""Losses between student and teacher: each against its formula in float64, at its limits, and over ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from hypothesis import given, settings
from hypothesis import strategies as st
from small import zero
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt.config import Optim
from hetero_kt.distributed.engine import build_engine
from hetero_kt.distributed.params import Weight, read
from hetero_kt.nn.losses import FitNet, InfoNCE, kd, ofa
from hetero_kt.nn.losses.contrast import LARGEST_SCALE
from hetero_kt.nn.losses.precision import Projection
from hetero_kt.nn.stages import Layout

SHAPES = {"rows": st.integers(1, 6), "classes": st.integers(1, 12), "seed": st.integers(0, 1000)}


def logits(rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A student's, a teacher's and the labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


# --- logits ---


@settings(max_examples=30, deadline=None)
@given(**SHAPES, temperature=st.floats(0.5, 20))
def test_kd_is_t_squared_times_the_divergence_from_the_student(
    rows: int, classes: int, seed: int, temperature: float
) -> None:
    student, teacher, _ = logits(rows, classes, seed)
    p_s, p_t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    expected = temperature**2 * sum(
        p_t[i, c] * math.log(p_t[i, c] / p_s[i, c]) for i in range(rows) for c in range(classes)
    )
    torch.testing.assert_close(kd(student, teacher, temperature=temperature), torch.as_tensor(expected / rows))


@settings(max_examples=30, deadline=None)
@given(**SHAPES, gamma=st.floats(0.5, 3))
def test_ofa_is_the_formula_of_its_public_code(rows: int, classes: int, seed: int, gamma: float) -> None:
    student, teacher, labels = logits(rows, classes, seed)
    p_s, p_t = student.softmax(-1), teacher.softmax(-1)
    expected = 0.0
    for i in range(rows):
        for c in range(classes):
            right = float(labels[i] == c)
            expected -= ((float(p_t[i, c]) + right) ** gamma - right) * math.log(p_s[i, c])
    torch.testing.assert_close(
        ofa(student, teacher, labels, gamma=gamma), torch.tensor(expected / rows, dtype=torch.float64)
    )


def test_ofa_at_gamma_1_is_the_cross_entropy_to_the_teacher_s_probabilities() -> None:
    student, teacher, labels = logits(5, 7, 0)
    torch.testing.assert_close(ofa(student, teacher, labels, gamma=1.0), F.cross_entropy(student, teacher.softmax(-1)))


def test_ofa_counts_the_largest_of_soft_labels() -> None:
    student, teacher, labels = logits(5, 7, 0)
    soft = 0.6 * F.one_hot(labels, 7) + 0.4 / 7
    assert torch.equal(ofa(student, teacher, soft, gamma=1.5), ofa(student, teacher, labels, gamma=1.5))
    assert not torch.equal(ofa(student, teacher, labels.roll(1), gamma=1.5), ofa(student, teacher, soft, gamma=1.5))


LOGIT_LOSSES = {
    "kd": lambda s, t: kd(s, t, temperature=1.0),
    "kd at 4": lambda s, t: kd(s, t, temperature=4.0),
    "ofa at 0.5": lambda s, t: ofa(s, t, torch.arange(4) % 3, gamma=0.5),
    "ofa at 1": lambda s, t: ofa(s, t, torch.arange(4) % 3, gamma=1.0),
    "ofa at 1.5": lambda s, t: ofa(s, t, torch.arange(4) % 3, gamma=1.5),
}


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extreme_logits_give_finite_losses_and_gradients_on_both_sides(name: str, dtype: torch.dtype) -> None:
    rows = [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0], [1e4, 1e4, 1e4]]
    student = torch.tensor(rows, dtype=dtype, requires_grad=True)
    teacher = torch.tensor(rows[::-1], dtype=dtype, requires_grad=True)
    loss = LOGIT_LOSSES[name](student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    for side in (student, teacher):
        assert side.grad is not None
        assert side.grad.isfinite().all()


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_gradients_are_those_of_the_formula_for_a_teacher_that_learns_too(name: str) -> None:
    student, teacher, _ = logits(4, 3, 1)
    assert torch.autograd.gradcheck(LOGIT_LOSSES[name], (student.requires_grad_(), teacher.requires_grad_()))


# --- InfoNCE ---


def infonce(module: InfoNCE, student: Tensor, teacher: Tensor) -> Tensor:
    """The formula with plain probabilities, in float64."""
    f_s, f_t = student.double(), teacher.double()
    if isinstance(module.student, Projection):
        f_s, f_t = f_s @ module.student.weight.double().T, f_t @ module.teacher.weight.double().T  # type: ignore
    f_s, f_t = f_s / f_s.square().sum(1, keepdim=True).sqrt(), f_t / f_t.square().sum(1, keepdim=True).sqrt()
    similar = (module.log_scale.double().exp() * f_s @ f_t.T).exp()
    return -(similar.diag() / similar.sum(1)).log().mean()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), widths=st.tuples(*[st.integers(1, 9)] * 3), seed=st.integers(0, 1000))
def test_infonce_is_its_formula(rows: int, widths: tuple[int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    module = InfoNCE(*widths)
    student, teacher = torch.randn(rows, widths[0]), torch.randn(rows, widths[1])
    torch.testing.assert_close(module(student, teacher), infonce(module, student, teacher).float())


def test_infonce_maps_both_sides_where_widths_differ_and_neither_where_they_do_not() -> None:
    def shapes(*widths: int) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in InfoNCE(*widths).named_parameters()}

    assert shapes(4, 4) == {"log_scale": (1,)}
    assert shapes(4, 6) == {"log_scale": (1,), "student.weight": (6, 4), "teacher.weight": (6, 6)}
    assert shapes(4, 6, 3) == {"log_scale": (1,), "student.weight": (3, 4), "teacher.weight": (3, 6)}


def test_infonce_s_scale_starts_at_one_over_0_07_and_stops_at_100_but_comes_back() -> None:
    module = InfoNCE(3, 3)
    assert module.log_scale.exp().item() == pytest.approx(1 / 0.07)
    own, other = 1 + torch.eye(3) / 4, 1 + torch.eye(3).roll(1, 0) / 4
    for start, teacher, moves in [(5.0, own, False), (5.0, other, True), (4.0, own, True), (4.0, other, True)]:
        module.log_scale.data.fill_(start)
        module.zero_grad()
        loss = module(own, teacher)
        scale = min(math.exp(start), LARGEST_SCALE)
        cosines = F.normalize(own) @ F.normalize(teacher).T
        torch.testing.assert_close(loss, F.cross_entropy(scale * cosines, torch.arange(3)))
        loss.backward()
        assert module.log_scale.grad is not None
        assert bool(module.log_scale.grad != 0) == moves, (start, teacher)


@pytest.mark.parametrize("size", [0.0, 1e-4, 1e4])
def test_infonce_of_extreme_bf16_features_is_finite(size: float) -> None:
    torch.manual_seed(0)
    module = InfoNCE(5, 4).bfloat16()
    student = (size * torch.randn(3, 5)).bfloat16().requires_grad_()
    teacher = (size * torch.randn(3, 4)).bfloat16().requires_grad_()
    loss = module(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    for tensor in (student, teacher, *module.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_infonce_computes_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    module = InfoNCE(64, 32)
    student, teacher = torch.randn(16, 64), torch.randn(16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(student, teacher)
    assert torch.equal(inside, module(student, teacher))


ROWS, WIDTHS = 8, (6, 5, 4)


def features(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, WIDTHS[0], generator=generator), torch.randn(ROWS, WIDTHS[1], generator=generator)


def contrast(gather: bool) -> InfoNCE:
    torch.manual_seed(3)
    return InfoNCE(*WIDTHS, gather=gather)


def gathered_step() -> dict[str, Tensor]:
    """Loss and gradients of this rank's rows, averaged over ranks as DeepSpeed does it."""
    module, (rank, world) = contrast(gather=True), (dist.get_rank(), dist.get_world_size())
    student, teacher = (x.chunk(world)[rank].clone().requires_grad_() for x in features())
    loss = module(student, teacher)
    loss.backward()
    result = {"loss": loss.detach()} | {name: p.grad for name, p in module.named_parameters()}
    for value in result.values():
        dist.all_reduce(value)
        value /= world
    # What leads further back, into models whose gradients will be averaged in the same way.
    return result | {"student": student.grad / world, "teacher": teacher.grad / world}


def test_gathered_infonce_is_one_process_with_all_rows(ranks: Any) -> None:
    module = contrast(gather=False)
    student, teacher = (x.clone().requires_grad_() for x in features())
    loss = module(student, teacher)
    loss.backward()
    expected = {"loss": loss.detach()} | {name: p.grad for name, p in module.named_parameters()}
    results = ranks(2).run(gathered_step)
    for name, value in expected.items():
        for result in results:
            torch.testing.assert_close(result[name], value, msg=name)
    for name, value in {"student": student.grad, "teacher": teacher.grad}.items():
        torch.testing.assert_close(torch.cat([result[name] for result in results]), value, msg=name)


class Learner(nn.Module):
    """Owns the loss and, in front of each side, something that learns."""

    def __init__(self, gather: bool) -> None:
        super().__init__()
        self.loss = contrast(gather)
        self.ours, self.theirs = nn.Linear(WIDTHS[0], WIDTHS[0]), nn.Linear(WIDTHS[1], WIDTHS[1])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(self.ours(student), self.theirs(teacher))


def gathered_training(stage: int) -> dict[str, Tensor]:
    engine = build_engine(
        Learner(gather=True), optim=Optim("sgd", lr=0.1), zero=zero(stage), micro_batch=ROWS // dist.get_world_size()
    )
    for step in range(3):
        student, teacher = (x.chunk(dist.get_world_size())[dist.get_rank()] for x in features(step))
        engine.backward(engine(student, teacher))
        engine.step()
    if stage == 3:
        assert engine.module.loss.student.weight.ds_status == ZeroParamStatus.NOT_AVAILABLE
    names = [name for name, _ in engine.module.named_parameters()]
    values = read([Weight(engine, p) for p in engine.module.parameters()])
    engine.destroy()
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gathered_infonce_trains_in_an_engine_as_one_process_does(ranks: Any, stage: int) -> None:
    model = Learner(gather=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(3):
        optimizer.zero_grad()
        model(*features(step)).backward()
        optimizer.step()
    for trained in ranks(2).run(gathered_training, stage):
        for name, expected in model.named_parameters():
            torch.testing.assert_close(trained[name], expected.detach(), atol=1e-6, rtol=1e-5, msg=name)


# --- FitNet ---

MAPS = Layout("NCHW", 6, (4, 4))
COARSE = Layout("NHWC", 10, (2, 2))
TOKENS = Layout("NLC", 8, (3, 3), prefix=2)


def given_features(layouts: list[Layout], width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(width)
    shapes = {
        "NCHW": lambda c, h, w, _: (3, c, h, w),
        "NHWC": lambda c, h, w, _: (3, h, w, c),
        "NLC": lambda c, h, w, prefix: (3, prefix + h * w, c),
    }
    stages = [
        torch.randn(*shapes[layout.form](layout.channels, *layout.grid, layout.prefix), generator=generator)
        for layout in layouts
    ]
    return {"stages": stages, "pooled": torch.randn(3, width, generator=generator)}


def as_map(feature: Tensor, layout: Layout) -> Tensor:
    if layout.form == "NLC":
        feature = feature[:, layout.prefix :].reshape(3, *layout.grid, layout.channels)
    return feature if layout.form == "NCHW" else feature.permute(0, 3, 1, 2)


def pair_error(projection: Projection, ours: Tensor, theirs: Tensor) -> Tensor:
    """A 1x1 convolution at the student's own grid, then the teacher's grid, in float64."""
    x = F.conv2d(ours.double(), projection.weight.double()[:, :, None, None], projection.bias.double())
    if ours.shape[-1] > theirs.shape[-1]:
        x = F.adaptive_avg_pool2d(x, theirs.shape[-2:])
    elif ours.shape[-1] < theirs.shape[-1]:
        x = F.interpolate(x, theirs.shape[-2:], mode="bilinear")
    return (x - theirs.double()).square().mean()


@pytest.mark.parametrize(
    ("students", "teachers"),
    [
        ([MAPS, MAPS, MAPS, COARSE], [TOKENS] * 4),
        ([TOKENS] * 4, [MAPS, MAPS, COARSE, COARSE]),
        ([MAPS] * 4, [MAPS] * 4),
        ([MAPS] * 4, [COARSE] * 4),
    ],
)
def test_fitnet_compares_maps_in_the_teacher_s_width_and_grid(students: list[Layout], teachers: list[Layout]) -> None:
    torch.manual_seed(0)
    ours, theirs = given_features(students, 5), given_features(teachers, 7)
    for form, stages in {"stages": [0, 1, 2, 3], "final": [3]}.items():
        module = FitNet(form, students, teachers, 5, 7)  # type: ignore[arg-type]
        errors = [
            pair_error(p, as_map(ours["stages"][k], students[k]), as_map(theirs["stages"][k], teachers[k]))  # type: ignore
            for k, p in zip(stages, module.maps, strict=True)
        ]
        torch.testing.assert_close(module(ours, theirs), torch.stack(errors).sum().float())


def test_fitnet_of_pooled_features() -> None:
    torch.manual_seed(0)
    ours, theirs = given_features([MAPS] * 4, 5), given_features([TOKENS] * 4, 7)
    module = FitNet("pooled", [MAPS] * 4, [TOKENS] * 4, 5, 7)
    projected = ours["pooled"].double() @ module.pooled.weight.double().T + module.pooled.bias.double()
    torch.testing.assert_close(module(ours, theirs), (projected - theirs["pooled"].double()).square().mean().float())
    module = FitNet("infonce", [MAPS] * 4, [TOKENS] * 4, 5, 7)
    torch.testing.assert_close(module(ours, theirs), infonce(module.contrast, ours["pooled"], theirs["pooled"]).float())


@pytest.mark.parametrize("form", ["stages", "final", "pooled", "infonce"])
def test_every_parameter_of_a_fitnet_learns_and_no_other_is_there(form: Any) -> None:
    ours, theirs = given_features([MAPS] * 4, 5), given_features([TOKENS] * 4, 7)
    module = FitNet(form, [MAPS] * 4, [TOKENS] * 4, 5, 7).bfloat16()
    bf16 = [{"stages": [x.bfloat16() for x in f["stages"]], "pooled": f["pooled"].bfloat16()} for f in (ours, theirs)]
    loss = module(*bf16)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
