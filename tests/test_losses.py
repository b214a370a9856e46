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
from rounding import Nudge, assert_close, movement, result_of
from small import zero
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt.config import Distill, Optim
from hetero_kt.distributed.engine import build_engine
from hetero_kt.distributed.params import Weight, read
from hetero_kt.nn.losses import FitNet, InfoNCE, dkd, fcfd, kd, nkd, ofa, rkd_angle, rkd_distance, tf_kd, uskd
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


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5])
def test_ofa_as_the_paper_writes_it(gamma: float) -> None:
    torch.manual_seed(5)
    student, teacher = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    labels = torch.tensor([0, 3, 5, 3])
    expected = 0.0
    for s, t, y in zip(student, teacher, labels.tolist(), strict=True):
        for c in range(6):
            p, q = math.exp(t[c]) / sum(map(math.exp, t)), math.exp(s[c]) / sum(map(math.exp, s))
            expected -= ((1 + p) ** gamma if c == y else p) * math.log(q) / 4
    assert float(ofa(student, teacher, labels, gamma=gamma, public=False)) == pytest.approx(expected)
    together = F.cross_entropy(student, labels) + ofa(student, teacher, labels, gamma=1.0)
    torch.testing.assert_close(ofa(student, teacher, labels, gamma=1.0, public=False), together)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ofa(s, teacher, labels, gamma=gamma, public=False), (student,))


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
    "dkd": lambda s, t: dkd(s, t, torch.arange(4) % 3, alpha=1.0, beta=8.0, temperature=4.0),
    "nkd": lambda s, t: nkd(s, t, torch.arange(4) % 3, gamma=1.5, temperature=3.0),
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


# --- logits, one class apart from the others ---

MANY = SHAPES | {"classes": st.integers(2, 12)}


def each(student: Tensor, teacher: Tensor, labels: Tensor) -> Any:
    """Of each row: the right class, and both sides' logits as plain numbers."""
    return zip(labels.tolist(), student.tolist(), teacher.tolist(), strict=True)


def soft(row: list[float], temperature: float = 1.0) -> list[float]:
    top = max(row)
    powers = [math.exp((z - top) / temperature) for z in row]
    return [power / sum(powers) for power in powers]


@settings(max_examples=30, deadline=None)
@given(**MANY, alpha=st.floats(0, 3), beta=st.floats(0, 10), temperature=st.floats(0.5, 20))
def test_dkd_is_the_divergence_of_the_right_class_and_of_the_others_apart(
    rows: int, classes: int, seed: int, alpha: float, beta: float, temperature: float
) -> None:
    student, teacher, labels = logits(rows, classes, seed)
    expected = 0.0
    for y, z_s, z_t in each(student, teacher, labels):
        p_s, p_t = soft(z_s, temperature), soft(z_t, temperature)
        rest_s, rest_t = (sum(p[c] for c in range(classes) if c != y) for p in (p_s, p_t))
        tckd = p_t[y] * math.log(p_t[y] / p_s[y]) + rest_t * math.log(rest_t / rest_s)
        others = [(p_t[c] / rest_t, p_s[c] / rest_s) for c in range(classes) if c != y]
        expected += alpha * tckd + beta * sum(q_t * math.log(q_t / q_s) for q_t, q_s in others)
    found = dkd(student, teacher, labels, alpha=alpha, beta=beta, temperature=temperature)
    torch.testing.assert_close(found, torch.tensor(temperature**2 * expected / rows, dtype=torch.float64))


def test_dkd_s_parts_add_up_to_kd_where_the_others_weigh_what_the_teacher_leaves_them() -> None:
    student, teacher, labels = logits(6, 9, 3)
    rows = []
    for i in range(6):
        row = (student[i : i + 1], teacher[i : i + 1], labels[i : i + 1])
        left = 1 - float((row[1] / 4).softmax(-1)[0, labels[i]])
        rows.append(dkd(*row, alpha=1.0, beta=left, temperature=4.0))
    torch.testing.assert_close(torch.stack(rows).mean(), kd(student, teacher, temperature=4.0))


@settings(max_examples=30, deadline=None)
@given(**MANY, gamma=st.floats(0, 4), temperature=st.floats(0.5, 10))
def test_nkd_is_its_formula(rows: int, classes: int, seed: int, gamma: float, temperature: float) -> None:
    student, teacher, labels = logits(rows, classes, seed)
    expected = 0.0
    for y, z_s, z_t in each(student, teacher, labels):
        expected -= soft(z_t)[y] * math.log(soft(z_s)[y])
        q_s, q_t = (soft([z for c, z in enumerate(row) if c != y], temperature) for row in (z_s, z_t))
        expected -= gamma * temperature**2 * sum(t * math.log(s) for s, t in zip(q_s, q_t, strict=True))
    found = nkd(student, teacher, labels, gamma=gamma, temperature=temperature)
    torch.testing.assert_close(found, torch.tensor(expected / rows, dtype=torch.float64))


def test_nkd_s_others_are_normalised_without_the_right_class() -> None:
    """Both sides' logit of the right class moves the target's part alone."""
    student, teacher, labels = logits(5, 7, 0)
    own = F.one_hot(labels, 7).double()

    def others(student: Tensor, teacher: Tensor) -> Tensor:
        options = {"temperature": 2.0}
        return nkd(student, teacher, labels, gamma=1.0, **options) - nkd(student, teacher, labels, gamma=0.0, **options)

    torch.testing.assert_close(others(student + 5 * own, teacher - 3 * own), others(student, teacher))
    assert not torch.isclose(others(student + 5 * (1 - own) * torch.arange(7), teacher), others(student, teacher))


@settings(max_examples=30, deadline=None)
@given(**MANY, temperature=st.floats(0.5, 40))
def test_tf_kd_is_a_virtual_teacher_in_both_forms(rows: int, classes: int, seed: int, temperature: float) -> None:
    student, _, labels = logits(rows, classes, seed)
    paper = public = 0.0
    for y, z_s, _ in each(student, student, labels):
        u = soft([0.99 if c == y else 0.01 / (classes - 1) for c in range(classes)], temperature)
        paper += temperature**2 * sum(p * math.log(p / s) for p, s in zip(u, soft(z_s, temperature), strict=True))
        public += sum(p * math.log(p / s) for p, s in zip(u, soft(z_s), strict=True)) / classes
    for form, expected in ((False, paper), (True, public)):
        found = tf_kd(student, labels, temperature=temperature, public=form)
        torch.testing.assert_close(found, torch.tensor(expected / rows, dtype=torch.float64))


@pytest.mark.parametrize("public", [False, True])
def test_uskd_is_its_formula(public: bool) -> None:
    student, weak, labels = logits(6, 8, 1)
    squares = [soft(z)[y] ** 2 for y, z, _ in each(student, weak, labels)]
    target = others = weakly = 0.0
    for (y, z_s, z_w), square in zip(each(student, weak, labels), squares, strict=True):
        p, w = soft(z_s), soft(z_w)
        target -= (square + 1 - sum(squares) / 6) * math.log(p[y])
        if public:
            scores = {c: w[c] / (1 - w[y] + 1e-6) + math.log(p[c]) / (1 - math.log(p[y]) + 1e-6) for c in range(8)}
        else:
            scores = {c: w[c] / (1 - w[y]) + p[c] / (1 - p[y]) for c in range(8) if c != y}
        ranked = sorted(scores, key=lambda c: -scores[c])
        zipf = {c: 1 / rank for rank, c in enumerate(ranked, start=1) if c != y}
        others -= sum(z / sum(zipf.values()) * math.log(p[c] / (1 - p[y])) for c, z in zipf.items())
        weakly -= sum((0.9 * (c == y) + 0.1 / 8) * math.log(w[c]) for c in range(8))
    found = uskd(student, weak, labels, public=public)
    torch.testing.assert_close(torch.stack(found), torch.tensor([target, others, weakly], dtype=torch.float64) / 6)


def test_nothing_flows_through_uskd_s_factor_and_ranks() -> None:
    student, weak, labels = (x.requires_grad_() if x.is_floating_point() else x for x in logits(6, 8, 1))
    terms = uskd(student, weak, labels)
    (slope,) = torch.autograd.grad(terms.target, student, retain_graph=True)
    p = student.detach().softmax(-1)
    square = p.gather(1, labels[:, None]).square()
    factor = square + 1 - square.mean()
    torch.testing.assert_close(slope, factor * (p - F.one_hot(labels, 8)) / 6)
    others = torch.autograd.grad(terms.others, (student, weak), allow_unused=True)
    assert others[1] is None
    assert torch.autograd.grad(terms.weak, (student, weak), allow_unused=True)[0] is None


CLASS_LOSSES = {
    "dkd": lambda s, t, y: dkd(s, t, y, alpha=1.0, beta=8.0, temperature=4.0),
    "nkd": lambda s, t, y: nkd(s, t, y, gamma=1.5, temperature=3.0),
    "uskd": lambda s, t, y: torch.stack(uskd(s, t, y)[:2]),
}


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_the_largest_of_mixed_labels_is_the_right_class(name: str) -> None:
    student, teacher, labels = logits(5, 7, 0)
    mixed = 0.6 * F.one_hot(labels, 7) + 0.4 * F.one_hot(labels.roll(1), 7)
    loss = CLASS_LOSSES[name]
    assert torch.equal(loss(student, teacher, mixed), loss(student, teacher, labels))
    assert not torch.equal(loss(student, teacher, labels.roll(1)), loss(student, teacher, labels))


def test_mixed_labels_mix_the_virtual_teachers_and_the_weak_logits_labels() -> None:
    student, weak, labels = logits(5, 7, 0)
    assert torch.equal(
        tf_kd(student, F.one_hot(labels, 7).double(), temperature=20.0), tf_kd(student, labels, temperature=20.0)
    )
    mixed = 0.6 * F.one_hot(labels, 7).double() + 0.4 * F.one_hot(labels.roll(1), 7)
    one, other = uskd(student, weak, labels).weak, uskd(student, weak, labels.roll(1)).weak
    torch.testing.assert_close(uskd(student, weak, mixed).weak, 0.6 * one + 0.4 * other)
    u = (0.01 / 6 + (0.99 - 0.01 / 6) * mixed).div(20).softmax(-1)
    log_p = student.div(20).log_softmax(-1)
    torch.testing.assert_close(tf_kd(student, mixed, temperature=20.0), 400 * (u * (u.log() - log_p)).sum(-1).mean())


@pytest.mark.parametrize("public", [False, True])
def test_the_losses_without_a_teacher_take_extreme_logits_and_have_the_formula_s_gradients(public: bool) -> None:
    labels = torch.arange(4) % 3
    rows = [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0], [1e4, 1e4, 1e4]]
    student, weak = (torch.tensor(rows, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    loss = tf_kd(student, labels, temperature=20.0, public=public) + sum(uskd(student, weak, labels, public=public))
    loss.backward()
    for x in (loss, student.grad, weak.grad):
        assert x is not None
        assert x.isfinite().all()
    assert loss.dtype == torch.float32
    wide, other, _ = logits(4, 3, 1)
    assert torch.autograd.gradcheck(lambda s: tf_kd(s, labels, temperature=20.0, public=public), wide.requires_grad_())
    # The factor is detached, so that finite differences hold for the other two alone.
    assert torch.autograd.gradcheck(lambda s, w: uskd(s, w, labels, public=public)[1:], (wide, other.requires_grad_()))


# --- relations ---


def rows_of_features(seed: int, *widths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, width, generator=generator, dtype=torch.float64) for width in widths]


def huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def length(x: Tensor) -> float:
    return math.sqrt(float((x * x).sum()))


def test_rkd_distance_is_its_formula() -> None:
    student, teacher = rows_of_features(0, 6, 4)
    relative = []
    for f in (student, teacher):
        d = [[length(f[i] - f[j]) for j in range(5)] for i in range(5)]
        mean = sum(map(sum, d)) / 20
        relative.append([[x / mean for x in row] for row in d])
    expected = sum(huber(relative[0][i][j], relative[1][i][j]) for i in range(5) for j in range(5)) / 25
    assert float(rkd_distance(student, teacher)) == pytest.approx(expected)


def test_rkd_angle_is_its_formula() -> None:
    student, teacher = rows_of_features(1, 6, 4)

    def cosine(f: Tensor, i: int, j: int, k: int) -> float:
        if i in (j, k):
            return 0.0
        a, b = f[j] - f[i], f[k] - f[i]
        return float((a * b).sum()) / length(a) / length(b)

    triplets = [(i, j, k) for i in range(5) for j in range(5) for k in range(5)]
    expected = sum(huber(cosine(student, *t), cosine(teacher, *t)) for t in triplets) / 125
    assert float(rkd_angle(student, teacher)) == pytest.approx(expected)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_rkd_knows_no_rotation_shift_or_scale(loss: Any) -> None:
    student, teacher = rows_of_features(2, 6, 6)
    turn, _ = torch.linalg.qr(rows_of_features(3, 6)[0].T @ rows_of_features(3, 6)[0] + torch.eye(6))
    moved = 3 * student @ turn + 7
    torch.testing.assert_close(loss(moved, teacher), loss(student, teacher))
    assert float(loss(moved, student)) == pytest.approx(0, abs=1e-12)
    assert loss(student * torch.arange(1, 7), teacher) != pytest.approx(float(loss(student, teacher)), rel=1e-3)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_rkd_s_gradients_are_the_formula_s_and_the_student_s_alone(loss: Any) -> None:
    student, teacher = (x.requires_grad_() for x in rows_of_features(4, 3, 4))
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)
    loss(student, teacher).backward()
    assert teacher.grad is None


def rkd_both(student: Tensor, teacher: Tensor) -> Tensor:
    return rkd_distance(student, teacher) + rkd_angle(student, teacher)


def infonce(student: Tensor, teacher: Tensor) -> Tensor:
    torch.manual_seed(0)
    return InfoNCE(student.shape[1], teacher.shape[1]).double()(student, teacher)


@pytest.mark.parametrize(
    ("loss", "method"),
    [
        (rkd_both, Distill({}, "rkd")),
        (infonce, Distill({}, "fbt")),
        (infonce, Distill({}, "fitnet")),
    ],
    ids=["rkd", "fbt", "fitnet"],
)
def test_fewer_rows_than_a_method_s_least_teach_nothing_and_as_many_do(loss: Any, method: Distill) -> None:
    torch.manual_seed(3)
    moved = []
    for rows in (method.least_rows() - 1, method.least_rows()):
        student = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
        loss(student, torch.randn(rows, 5, dtype=torch.float64)).backward()
        moved.append(float(student.grad.norm()))
    assert moved[0] < 1e-12 < 1e-4 < moved[1]


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_rkd_of_rows_that_coincide_is_finite(loss: Any) -> None:
    apart = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for rows in (torch.zeros(4, 3), torch.ones(4, 3).bfloat16() * 1e4, apart[[0, 0, 1, 2]], apart[:1]):
        student = rows.clone().requires_grad_()
        value = loss(student, apart[: len(rows)])
        value.backward()
        assert value.isfinite()
        assert value.dtype == torch.float32
        assert student.grad is not None
        assert student.grad.isfinite().all()


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
    for trained in ranks(2).run(gathered_training, stage):
        assert_close({"weights": trained}, result_of(trained_plainly), movement(trained_plainly))


def trained_plainly(nudge: Nudge) -> dict[str, Any]:
    model = Learner(gather=False)
    nudge.modules([model])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(3):
        optimizer.zero_grad()
        model(*(nudge(one) for one in features(step))).backward()
        optimizer.step()
    return {"weights": {name: p.detach() for name, p in model.named_parameters()}}


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


@settings(max_examples=20, deadline=None)
@given(stages=st.integers(1, 3), rows=st.integers(1, 3), seed=st.integers(0, 1000))
def test_fcfd_is_its_formula(stages: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, 2 + k, 4 - k, 4 - k) for k in range(stages)]
    ours, theirs = ([torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(2))
    expected = 0.0
    for f, g in zip(ours, theirs, strict=True):
        expected += (
            sum((a - b) ** 2 for a, b in zip(f.flatten().tolist(), g.flatten().tolist(), strict=True)) / f.numel()
        )
    last = ours[-1].shape[1]
    for row in range(rows):
        for channel in range(last):
            means = []
            for maps in (ours, theirs):
                values = maps[-1][row, channel].flatten().tolist()
                means.append(sum(max(value, 0.0) for value in values) / len(values))
            expected += (means[0] - means[1]) ** 2 / (rows * last)
    torch.testing.assert_close(fcfd(ours, theirs), torch.tensor(expected, dtype=torch.float64))
    for f in (*ours, *theirs):
        f.requires_grad_()
    assert torch.autograd.gradcheck(lambda *maps: fcfd(maps, theirs), ours)
    fcfd(ours, theirs).backward()
    assert all(g.grad is None for g in theirs), "the teacher's features are given"
