"""ITC, ITM and hard negatives: formulas in float64, the same over ranks, negatives never of the same picture."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from hetero_kt.nn.losses.alignment import hard_negatives, itc, itm
from hetero_kt.nn.losses.contrast import gathered

ROWS, WIDTH = 8, 5
GROUPS = torch.tensor([3, 1, 4, 1, 5, 3, 3, 6])
"""Captions of one picture on the first rank (1, 1), on the second (3, 3), and on both (3)."""


def embedded(rows: int = ROWS, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def plain_itc(image: Tensor, text: Tensor, groups: Tensor, temperature: float) -> float:
    """The formula, term by term."""
    rows, total = len(image), 0.0
    for one, other in ((image, text), (text, image)):
        for i in range(rows):
            similar = [math.exp(float(one[i] @ other[j]) / temperature) for j in range(rows)]
            same = [j for j in range(rows) if groups[j] == groups[i]]
            total -= sum(math.log(similar[j] / sum(similar)) for j in same) / len(same)
    return total / (2 * rows)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.lists(st.integers(0, 4), min_size=1, max_size=7),
    temperature=st.floats(0.05, 2),
    seed=st.integers(0, 1000),
)
def test_itc_is_its_formula(groups: list[int], temperature: float, seed: int) -> None:
    image, text = embedded(len(groups), seed)
    found = itc(image, text, torch.tensor(groups), temperature)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(plain_itc(image, text, torch.tensor(groups), temperature), rel=1e-9)


def test_gradients_of_both_losses_are_those_of_the_formulas() -> None:
    image, text = (x.requires_grad_() for x in embedded(5))
    temperature = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    groups = GROUPS[:5]
    assert torch.autograd.gradcheck(lambda i, t, s: itc(i, t, groups, s), (image, text, temperature))
    match = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(itm, match)


def test_itm_takes_the_first_third_for_fitting() -> None:
    match = torch.randn(9, 2, dtype=torch.float64)
    p = match.softmax(1)
    expected = -(p[:3, 1].log().sum() + p[3:, 0].log().sum()) / 9
    torch.testing.assert_close(itm(match), expected)


def test_itm_is_the_mean_over_the_pairs_that_count() -> None:
    """Of those alone, whatever the others are; and without one of them, of the pairs that fit."""
    match = torch.randn(9, 2, dtype=torch.float64).requires_grad_()
    counted = torch.tensor([True, True, True, False, True, False, True, False, False])
    p = match.softmax(1)
    loss = itm(match, counted)
    torch.testing.assert_close(loss, -(p[:3, 1].log().sum() + p[[4, 6], 0].log().sum()) / 5)
    (gradient,) = torch.autograd.grad(loss, match)
    assert ((gradient == 0).all(1) == ~counted).all()
    torch.testing.assert_close(itm(match, torch.arange(9) < 3), -p[:3, 1].log().mean())
    torch.testing.assert_close(itm(match, torch.ones(9, dtype=torch.bool)), itm(match))


@pytest.mark.parametrize("temperature", [0.001, 0.07, 0.5])
def test_losses_are_finite_and_in_float32_for_bf16_and_under_autocast(temperature: float) -> None:
    image, text = (x.bfloat16().requires_grad_() for x in embedded())
    match = (100 * torch.randn(9, 2)).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = itc(image, text, GROUPS, torch.tensor([temperature])), itm(match)
    assert inside == (itc(image, text, GROUPS, temperature), itm(match))
    for loss, leaves in zip(inside, ((image, text), (match,)), strict=True):
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        loss.backward()
        for leaf in leaves:
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()


# --- over ranks ---


def itc_step(gather: bool) -> dict[str, Tensor]:
    """Loss and gradients of this rank's rows; those of the temperature and of the loss averaged over ranks, as
    DeepSpeed averages parameters'."""
    rank, world = dist.get_rank(), dist.get_world_size()
    image, text = (x.chunk(world)[rank].clone().requires_grad_() for x in embedded())
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss = itc(image, text, GROUPS.chunk(world)[rank], temperature, gather=gather)
    loss.backward()
    averaged = torch.stack([loss.detach(), temperature.grad])
    dist.all_reduce(averaged)
    return {"averaged": averaged / world, "image": image.grad / world, "text": text.grad / world}  # type: ignore


@pytest.mark.parametrize("gather", [True, False])
def test_itc_on_two_ranks_is_that_of_one_with_all_rows(ranks, gather: bool) -> None:
    image, text = (x.requires_grad_() for x in embedded())
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss = itc(image, text, GROUPS, temperature)
    loss.backward()
    found = ranks(2).run(itc_step, gather)
    joint = torch.stack([loss.detach(), temperature.grad])  # type: ignore
    for rank in found:
        assert torch.allclose(rank["averaged"], joint, rtol=1e-12) == gather
    for name, leaf in (("image", image), ("text", text)):
        assert torch.allclose(torch.cat([rank[name] for rank in found]), leaf.grad, rtol=1e-10) == gather  # type: ignore


def negatives_from_all() -> tuple[Tensor, Tensor, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    image, text = (x.chunk(world)[rank].repeat(500, 1) for x in embedded())
    own = GROUPS.chunk(world)[rank]
    candidates = (gathered(image[: len(own)]), gathered(text[: len(own)]), gathered(own))
    assert torch.equal(candidates[2], GROUPS)
    assert torch.equal(candidates[0], embedded()[0])
    return hard_negatives(image, text, own.repeat(500), 0.5, candidates)


def test_negatives_from_all_ranks_are_rows_of_all_ranks_and_none_of_the_same_picture(ranks) -> None:
    for rank, found in enumerate(ranks(2).run(negatives_from_all)):
        own = GROUPS.chunk(2)[rank].repeat(500)
        for places in found[:2]:
            assert not (GROUPS[places] == own).any()
            assert set(places.tolist()) == set(range(ROWS))


# --- negatives ---


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(lambda g: len(set(g)) > 1),
    temperature=st.sampled_from([0.001, 0.07, 0.5]),
    seed=st.integers(0, 1000),
)
def test_negatives_are_never_of_the_same_picture(groups: list[int], temperature: float, seed: int) -> None:
    torch.manual_seed(seed)
    image, text = embedded(len(groups), seed)
    shown = torch.tensor(groups)
    *negatives, have = hard_negatives(image.float(), text.float(), shown, torch.tensor(temperature))
    assert have.tolist() == [True] * len(groups)
    for places in negatives:
        assert places.dtype == torch.int64
        assert places.shape == shown.shape
        assert not (shown[places] == shown).any()


def test_negatives_follow_the_softmax_of_the_similarities() -> None:
    torch.manual_seed(0)
    image, text = embedded(4)
    shown, temperature, draws = torch.tensor([0, 1, 2, 1]), 0.6, 4000
    candidates = (image, text, shown)
    many = [x.repeat_interleave(draws, 0) for x in (image, text, shown)]
    found = hard_negatives(*many, temperature, candidates)[:2]
    for places, similar in zip(found, (text @ image.T, image @ text.T), strict=True):
        for row in range(4):
            others = [j for j in range(4) if shown[j] != shown[row]]
            weight = [math.exp(float(similar[row, j]) / temperature) for j in others]
            counts = torch.bincount(places[row * draws : (row + 1) * draws], minlength=4)
            assert chisquare(counts[others].numpy(), [draws * w / sum(weight) for w in weight]).pvalue > 1e-3


def test_negatives_are_drawn_from_the_global_generator_and_again_after_it_is_restored() -> None:
    image, text = embedded(64)
    groups = torch.arange(64)
    state = torch.get_rng_state()
    first, second = (hard_negatives(image, text, groups, 0.5) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    torch.set_rng_state(state)
    for before, after in zip(first, hard_negatives(image, text, groups, 0.5), strict=True):
        assert torch.equal(before, after)


def test_nothing_waits_for_the_device() -> None:
    """A fake tensor has no values that the host could look at."""
    with FakeTensorMode():
        image, text, groups = torch.empty(4, 3), torch.empty(4, 3), torch.empty(4, dtype=torch.int64)
        *found, have = hard_negatives(image, text, groups, torch.empty(1))
        assert [tuple(places.shape) for places in (*found, have)] == [(4,)] * 3
        counted = torch.cat([torch.ones_like(have), have, have])
        assert (itc(image, text, groups, torch.empty(())) + itm(torch.empty(12, 2), counted)).shape == ()
        with pytest.raises(DataDependentOutputException):
            groups[0].item()


def test_negatives_leave_no_gradient() -> None:
    image, text = (x.requires_grad_() for x in embedded())
    assert not any(places.requires_grad for places in hard_negatives(image, text, GROUPS, 0.5))


def test_a_batch_of_one_picture_has_no_negatives() -> None:
    image, text = embedded(3)
    *negatives, have = hard_negatives(image, text, torch.tensor([5, 5, 5]), 0.5)
    assert have.tolist() == [False] * 3
    for places in negatives:
        assert places.tolist() == [0, 0, 0]  # in range at least
    others = (image, text, torch.tensor([5, 5, 5]))
    assert hard_negatives(image, text, torch.tensor([5, 4, 5]), 0.5, others)[2].tolist() == [False, True, False]
    with pytest.raises(ValueError, match="two pictures in a rank's batch"):
        hard_negatives(image[:1], text[:1], torch.tensor([5]), 0.5)
    found = hard_negatives(image[:1], text[:1], torch.tensor([5]), 0.5, (image, text, torch.tensor([5, 6, 5])))
    assert [places.item() for places in found] == [1, 1, True]
