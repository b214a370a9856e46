"""Attention in blocks against the written-out form, whatever the sizes and the cuts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hetero_kt.nn import attention as blocks
from hetero_kt.nn.attention import attention


def matrices(heads: int, queries: int, sources: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    sizes = [(heads, tokens, width) for tokens in (queries, sources, sources)]
    return [torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]


def written_out(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | float = 1.0) -> Tensor:
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) * kept) @ v


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, inputs, weights)]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 7, 20, 64, 2**16])
)
def test_any_cut_equals_the_written_out_form(heads: int, queries: int, sources: int, width: int, block: int) -> None:
    inputs = matrices(heads, queries, sources, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        ours = with_gradients(attention(*inputs), inputs)
    for one, other in zip(ours, with_gradients(written_out(*inputs), inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_in_fp32_it_is_as_near_to_fp64_as_the_written_out_form() -> None:
    """At a size of the paper's: a thousand column tokens each way."""
    exact = matrices(2, 960, 1100, 8)
    inputs = [x.detach().float().requires_grad_() for x in exact]
    expected = with_gradients(written_out(*exact), exact)
    plain, ours = (with_gradients(form(*inputs), inputs) for form in (written_out, attention))
    for right, one, other in zip(expected, plain, ours, strict=True):
        assert (other - right).abs().max() <= 2 * (one - right).abs().max() + 1e-7 * right.abs().max()


@pytest.mark.parametrize("kept", [0, 2**24])
@pytest.mark.parametrize("block", [5, 37, 2**16])
def test_dropout_has_the_gradient_of_what_it_gives(monkeypatch: pytest.MonkeyPatch, block: int, kept: int) -> None:
    """Whether its bits are kept or drawn again."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "KEPT", kept)

    def drawn(*inputs: Tensor) -> Tensor:
        torch.manual_seed(1)
        return attention(*inputs, dropout=0.4)

    assert torch.autograd.gradcheck(drawn, matrices(2, 5, 6, 3))


def dropped(rate: float, sources: int = 40_000, dtype: torch.dtype = torch.float64) -> Tensor:
    """What stays of each of many equal scores, times their number: 0, or 1 / (1 - rate)."""
    q, k = torch.zeros(1, 1, 4, dtype=dtype), torch.zeros(1, sources, 4, dtype=dtype)
    v = torch.zeros(1, sources, 4, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(q, k, v, dropout=rate)[0, 0, 0], v)
    return gradient[0, :, 0] * sources


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_scales_the_rest(rate: float) -> None:
    torch.manual_seed(0)
    stays = dropped(rate)
    torch.testing.assert_close(stays.unique(), torch.tensor([0, 1 / (1 - rate)], dtype=stays.dtype), rtol=1e-3, atol=0)
    assert (stays == 0).double().mean() == pytest.approx(rate, abs=0.01)
    assert stays.mean() == pytest.approx(1, abs=0.05 if rate == 0.9 else 0.02), "nothing is gained or lost on average"
    assert not torch.equal(stays, dropped(rate)), "every call draws afresh"


def test_the_four_decisions_of_one_word_are_independent() -> None:
    torch.manual_seed(0)
    gone = (dropped(0.5) == 0).double().view(-1, 4)
    assert (torch.corrcoef(gone.T) - torch.eye(4)).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_type_and_rate(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (x.detach().to(dtype) for x in matrices(2, 30, 50, 8))
    out = attention(q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), written_out(q.float(), k.float(), v.float()), atol=0.03, rtol=0.03)
    assert (dropped(0.1, 20_000, dtype) == 0).float().mean() == pytest.approx(0.1, abs=0.01)


def test_a_seed_fixes_what_is_dropped_and_no_dropout_draws_nothing() -> None:
    inputs = matrices(2, 9, 11, 3)

    def run(seed: int, rate: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return attention(*inputs, dropout=rate), torch.get_rng_state()

    assert torch.equal(run(5, 0.3)[0], run(5, 0.3)[0])
    assert not torch.equal(run(5, 0.3)[0], run(6, 0.3)[0])
    torch.manual_seed(5)
    assert torch.equal(run(5, 0.0)[1], torch.get_rng_state())


def test_bits_that_are_drawn_again_are_those_that_would_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, found = matrices(3, 20, 30, 4), []
    monkeypatch.setattr(blocks, "BLOCK", 100)
    for kept in (0, 2**24):
        monkeypatch.setattr(blocks, "KEPT", kept)
        torch.manual_seed(3)
        out = attention(*inputs, dropout=0.2)
        torch.rand(5)  # the stream goes on before the backward
        found.append([*with_gradients(out, inputs), torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_compiler_sees_one_graph_of_torch_s_own(dropout: float) -> None:
    """In which nothing is cut into blocks, and which draws its own dropout."""
    inputs = matrices(3, 6, 11, 2)
    traced = torch.compile(attention, backend="eager", fullgraph=True)
    torch.manual_seed(1)
    ours = with_gradients(traced(*inputs, dropout), inputs)
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(*(x[None] for x in inputs), dropout_p=dropout)[0]
    for one, other in zip(ours, with_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)
    if not dropout:
        torch.testing.assert_close(ours[0], attention(*inputs))


def test_the_scores_are_never_there_at_once() -> None:
    inputs = matrices(8, 600, 700, 8, torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        attention(*inputs, dropout=0.1).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events() or ())
    assert largest < 4 * 600 * 700, "one head's scores in fp32 would be 1.7 MB, all eight 13 MB"
