"""The adapter against slow references, published numbers, and the promises of its docstrings."""

import itertools
import math
from dataclasses import replace

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hetero_kt.nn.adapter import UNFOLDINGS, AdapterConfig, CrossAttention, build_adapter

PUBLISHED = AdapterConfig(width="published", input="raw", output="layernorm")
TARGET, SOURCE = (5, 12), (7, 9)
"""Small shapes that share nothing."""


def matrices(target=TARGET, source=SOURCE, scale=0.02, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return tuple((torch.randn(s, generator=generator, dtype=torch.float64) * scale).to(dtype) for s in (target, source))


def built(target=TARGET, source=SOURCE, seed=0, **options):
    torch.manual_seed(seed)
    return build_adapter(AdapterConfig(**options), target, source)


# References: numbers one at a time, no torch layer but the parameters.


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def layer_norm(layer, x):
    rows = []
    for row in x:
        centred = row - row.mean()
        rows.append(centred / (centred.pow(2).mean() + 1e-12).sqrt() * layer.weight + layer.bias)
    return torch.stack(rows)


def slow_attention(attention, query, source):
    """One head and one query token at a time."""
    q, k, v = linear(attention.query, query), linear(attention.key, source), linear(attention.value, source)
    width = attention.head_width
    mixed = torch.zeros(len(query), attention.heads * width, dtype=query.dtype)
    for head in range(attention.heads):
        columns = slice(head * width, (head + 1) * width)
        for t in range(len(query)):
            scores = torch.stack([(q[t, columns] * key).sum() for key in k[:, columns]]) / math.sqrt(width)
            weights = scores.exp() / scores.exp().sum()
            mixed[t, columns] = sum(w * value for w, value in zip(weights, v[:, columns], strict=True))
    return layer_norm(attention.norm, query + linear(attention.out, mixed))


def slow_step(step, target, source):
    """Eq. 6 written out, then the feed-forward; spectral norms by a full SVD."""
    rr, rc, cr, cc = step.lpka.attentions
    omega = step.lpka.omega_logits.exp() / step.lpka.omega_logits.exp().sum()
    mixed = (
        omega[0] * slow_attention(rr, target, source)
        + omega[1] * slow_attention(rc, target, source.T)
        + omega[2] * slow_attention(cr, target.T, source).T
        + omega[3] * slow_attention(cc, target.T, source.T).T
    )
    hidden = linear(step.feed_forward[0], mixed)
    inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    return layer_norm(step.norm, mixed + linear(step.feed_forward[2], hidden / 2 * (1 + inner.tanh())))


def randomise(adapter):
    """Omega, norms and biases away from their starts, so that a mistake in their use shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_attention_equals_a_loop_over_heads(heads):
    torch.manual_seed(0)
    attention = CrossAttention(AdapterConfig(heads=heads), 12, 9).double().eval()
    query, source = matrices(scale=1.0, dtype=torch.float64)
    torch.testing.assert_close(attention(query, source), slow_attention(attention, query, source))


@pytest.mark.parametrize("joint", [False, True])
def test_layers_equal_the_written_out_equations(joint):
    adapter = built(heads=3, joint=joint, input="raw", output="layernorm").double().eval()
    randomise(adapter)
    target, source = matrices(scale=1.0, dtype=torch.float64)
    first, second = adapter.body.to_target
    between = slow_step(first, target, source)
    if joint:  # both streams from both old ones (Eq. 3)
        source_between = slow_step(adapter.body.to_source[0], source, target)
        expected = slow_step(second, between, source_between)
    else:
        expected = slow_step(second, between, source)
    torch.testing.assert_close(adapter(target, source), expected)


def test_joint_streams_leave_no_parameter_without_gradient():
    adapter = built(joint=True, layers=3)
    assert len(adapter.body.to_source) == 2
    adapter(*matrices()).square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_mlp_is_equation_2_and_ignores_the_target():
    adapter = built(kind="mlp", input="raw", output="layernorm").double()
    target, source = matrices(dtype=torch.float64)
    step = source.double()
    for layers in (adapter.body.xi1, adapter.body.xi2):
        hidden = linear(layers[0], step)
        step = linear(layers[2], torch.where(hidden > 0, hidden, 0.1 * hidden)).T
    torch.testing.assert_close(adapter(target, source), step)
    torch.testing.assert_close(adapter(target + 1, source), step)


@pytest.mark.parametrize("width", ["published", "compact"])
def test_mlp_hidden_width(width):
    hidden = {"published": 1024, "compact": 64}[width]
    assert built(kind="mlp", width=width).body.xi1[0].out_features == hidden


# Published sizes.


@pytest.mark.parametrize(("source", "millions"), [((100, 2048), 37.6), ((100, 1280), 24.0)])
def test_published_parameter_counts(source, millions):
    with torch.device("meta"):
        adapter = build_adapter(replace(PUBLISHED, weights="average"), (160, 960), source)
    assert round(adapter.num_parameters() / 1e6, 1) == millions


def test_published_head_widths():
    with torch.device("meta"):
        adapter = build_adapter(PUBLISHED, (160, 960), (100, 2048))
    for step in adapter.body.to_target:
        assert [attention.head_width for attention in step.lpka.attentions] == [188, 66, 138, 16]


@pytest.mark.parametrize("source", [(100, 2048), (100, 1280)])
def test_compact_is_below_15_percent_of_its_two_models(source):
    adapter = build_adapter(AdapterConfig(), (160, 960), source)
    assert adapter.num_parameters() < 0.15 * (23.7e6 + 2.4e6)
    assert all(attention.heads * attention.head_width == 64 for attention in adapter.body.to_target[0].lpka.attentions)


def test_published_feed_forward_has_unit_spectral_norm():
    adapter = build_adapter(PUBLISHED, TARGET, SOURCE).eval()
    for linear_ in (adapter.body.to_target[0].feed_forward[0], adapter.body.to_target[0].feed_forward[2]):
        assert torch.linalg.matrix_norm(linear_.weight, ord=2).item() == pytest.approx(1, abs=0.05)
    assert adapter.body.to_target[0].feed_forward[0].out_features == 2 * TARGET[1]


def test_published_output_has_rows_of_zero_mean_and_unit_variance():
    """Which is why `restore` is the default: the incoming weight's std is 0.02."""
    proposal = build_adapter(PUBLISHED, TARGET, SOURCE)(*matrices())
    torch.testing.assert_close(proposal.mean(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(proposal.std(1, correction=0), torch.ones(5))


# Ablations of Table 7.


def test_omega_starts_as_the_plain_mean_and_learns():
    adapter = built()
    for omega in adapter.omega():
        assert torch.equal(omega, torch.full((4,), 0.25))
    adapter(*matrices()).square().sum().backward()
    for step in adapter.body.to_target:
        assert step.lpka.omega_logits.grad.abs().max() > 0
    with torch.no_grad():
        adapter.body.to_target[0].lpka.omega_logits[2] += 1
    omega = adapter.omega()[0]
    assert omega.argmax() == 2
    assert omega.sum().item() == pytest.approx(1)
    assert not omega.requires_grad


def test_average_omega_is_no_parameter():
    learned, average = built(), built(weights="average")
    assert learned.num_parameters() - average.num_parameters() == 2 * 4
    learned.eval(), average.eval()
    assert torch.equal(learned(*matrices()), average(*matrices()))
    assert set(average.state_dict()) == set(learned.state_dict()) - {
        f"body.to_target.{i}.lpka.omega_logits" for i in range(2)
    }


def test_individual_is_row_row_alone():
    adapter = built(unfold="individual")
    assert [len(step.lpka.attentions) for step in adapter.body.to_target] == [1, 1]
    assert torch.equal(torch.stack(adapter.omega()), torch.tensor([[1.0, 0, 0, 0]] * 2))
    assert UNFOLDINGS[0] == ("row", "row")
    adapter(*matrices()).square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("unfolding", range(4))
def test_each_unfolding_mixes_along_its_own_axes(unfolding):
    """Permuting the source's tokens changes nothing, permuting within them does."""
    adapter = built(layers=1).eval()
    with torch.no_grad():
        adapter.body.to_target[0].lpka.omega_logits.fill_(-torch.inf)[unfolding] = 0
    target, source = matrices(scale=1.0)
    shuffled_rows, shuffled_columns = source[torch.randperm(7)], source[:, [1, 2, 3, 4, 5, 6, 7, 8, 0]]
    same, other = (
        (shuffled_rows, shuffled_columns) if UNFOLDINGS[unfolding][1] == "row" else (shuffled_columns, shuffled_rows)
    )
    torch.testing.assert_close(adapter(target, same), adapter(target, source))
    assert not torch.allclose(adapter(target, other), adapter(target, source), atol=1e-6)


# What goes in and what comes out.


@pytest.mark.parametrize("kind", ["lpka", "mlp", "aligned", "procrustes"])
def test_gate_zero_is_the_target_to_the_bit(kind):
    source = (5, 9) if kind in ("aligned", "procrustes") else SOURCE
    adapter = built(kind=kind, source=source, gate=0.0)
    assert adapter.training
    target, source = matrices(source=source)
    proposal = adapter(target, source)
    assert torch.equal(proposal, target)
    assert torch.equal(adapter(target.bfloat16(), source).bfloat16(), target.bfloat16())
    proposal.backward(torch.randn_like(target))
    assert adapter.gate.grad.abs() > 0, "a gate that gets no gradient stays closed"
    assert all(p.grad.abs().max() == 0 for p in adapter.body.parameters())


def test_aligned_never_pairs_the_rows_of_factors():
    with pytest.raises(ValueError, match="rows are those of factors"):
        build_adapter(AdapterConfig(kind="aligned"), (4, 24), (4, 7), rows_align=False)
    assert build_adapter(AdapterConfig(kind="aligned"), (4, 7), (4, 7)).shared_axis == 0
    assert build_adapter(AdapterConfig(kind="aligned"), (4, 7), (4, 7), rows_align=False).shared_axis == 1


def test_an_aligned_adapter_cannot_learn_a_shuffled_order_away_and_attention_can():
    """Least squares for the aligned map, and exact permutation invariance of attention over rows."""
    torch.manual_seed(0)
    source, order = torch.randn(20, 6), torch.randperm(20)
    target = source @ torch.randn(6, 4)
    for rows, fits in ((source, True), (source[order], False)):
        error = (rows @ torch.linalg.lstsq(rows, target).solution - target).norm() / target.norm()
        assert bool(error < 1e-4) is fits
    assert built((20, 4), (20, 6), kind="aligned").sees_order
    individual = built((20, 4), (20, 6), heads=2, unfold="individual").eval()
    assert not individual.sees_order
    torch.testing.assert_close(individual(target, source), individual(target, source[order]))


def test_the_gate_starts_at_twelve_hundredths_unless_told():
    assert built().gate_value().item() == pytest.approx(0.12, abs=1e-7)


@pytest.mark.parametrize("gate", [0.12, -0.5, 0.0, 0.9])
def test_gate_starts_where_asked(gate):
    adapter = built(gate=gate)
    assert adapter.gate_value().item() == pytest.approx(gate, abs=1e-7)
    assert not adapter.gate_value().requires_grad


def test_restore_mixes_in_the_stream_at_the_targets_scale():
    """proposal = T + g (G - T), G the published stream with T's row means and standard deviations."""
    restored, raw = built(gate=0.3).eval(), built(output="layernorm").eval()
    raw.load_state_dict({k: v for k, v in restored.state_dict().items() if k != "gate"})
    target, source = matrices()
    target[2] *= 10  # rows of different scales
    stream = raw(target, source)
    for i, row in enumerate(stream):
        z = (row - row.mean()) / row.std(correction=0)
        G = z * target[i].std(correction=0) + target[i].mean()
        torch.testing.assert_close(restored(target, source)[i], 0.7 * target[i] + 0.3 * G)


@pytest.mark.parametrize("kind", ["lpka", "mlp", "aligned", "procrustes"])
def test_an_open_gate_keeps_row_means_and_scales(kind):
    source = (5, 9) if kind in ("aligned", "procrustes") else SOURCE
    adapter = built(kind=kind, source=source, gate=0.999999)
    target, source = matrices(source=source)
    target = target * torch.tensor([[1.0], [10], [100], [0.1], [1]]) + 0.5
    proposal = adapter(target, source)
    assert not torch.allclose(proposal, target, rtol=1e-2)
    torch.testing.assert_close(proposal.mean(1), target.mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(proposal.std(1, correction=0), target.std(1, correction=0), rtol=1e-3, atol=1e-6)


def test_an_aligned_mix_of_equal_shapes_is_drawn_to_the_source_itself():
    """T + g (S - T), again and again: what is left of the target after k times is (1 - g)^k."""
    adapter = built(source=(5, 12), kind="aligned", input="raw", output="mix", gate=0.25)
    target, source = matrices(source=(5, 12))
    torch.testing.assert_close(adapter(target, source), 0.75 * target + 0.25 * source)
    drawn = target
    for _ in range(6):
        drawn = adapter(drawn, source)
    torch.testing.assert_close(drawn, source + 0.75**6 * (target - source))


def test_a_held_gate_learns_nothing_while_the_rest_learns():
    adapter = built(source=(5, 9), kind="aligned", hold=True)
    adapter(*matrices(source=(5, 9))).square().sum().backward()
    assert adapter.gate.grad is None
    assert adapter.body.map.weight.grad.norm() > 0


def test_a_mix_of_standardised_matrices_is_refused():
    with pytest.raises(ValueError, match=r"^adapter\.output mix .* choose both\.$"):
        built(output="mix")


def test_output_layernorm_overwrites_and_has_no_gate():
    adapter = built(output="layernorm")
    assert adapter.gate_value().item() == 1
    assert "gate" not in dict(adapter.named_parameters())


def test_standardised_input_ignores_offset_and_scale():
    adapter = built(output="layernorm").eval()
    target, source = matrices()
    torch.testing.assert_close(adapter(50 * target + 3, 7 * source - 1), adapter(target, source), atol=1e-4, rtol=0)
    raw = built(output="layernorm", input="raw").eval()
    assert not torch.allclose(raw(target, 7 * source), raw(target, source), atol=1e-5)


def test_standardised_input_makes_the_proposal_see_its_source():
    """Raw weights leave it blind: swapping the source for another hardly changes anything."""
    change = {}
    for how in ("raw", "standardise"):
        adapter = built(output="layernorm", input=how).eval()
        target, source = matrices(scale=0.001)
        change[how] = (adapter(target, source.flip(0, 1)) - adapter(target, source)).norm().item()
    assert change["standardise"] > 20 * change["raw"]


@pytest.mark.parametrize("constant", [0.0, 0.3])
def test_constant_matrices_stay_finite_in_both_directions(constant):
    for target, source in itertools.product([torch.full(TARGET, constant), matrices()[0]], [torch.zeros(SOURCE)]):
        adapter = built()
        proposal = adapter(target, source)
        proposal.backward(torch.ones_like(proposal))
        assert proposal.isfinite().all()
        assert all(p.grad.isfinite().all() for p in adapter.parameters())


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 6),
    m=st.integers(1, 6),
    N=st.integers(1, 6),
    M=st.integers(1, 6),
    kind=st.sampled_from(["lpka", "mlp"]),
    width=st.sampled_from(["compact", "published"]),
    output=st.sampled_from(["restore", "mix", "layernorm"]),
    joint=st.booleans(),
)
def test_any_source_shape_gives_the_targets_shape(n, m, N, M, kind, width, output, joint):
    scale = "raw" if output == "mix" else "standardise"
    adapter = built((n, m), (N, M), kind=kind, width=width, input=scale, output=output, joint=joint)
    proposal = adapter(*matrices((n, m), (N, M)))
    assert proposal.shape == (n, m)
    assert proposal.isfinite().all()
    proposal.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_comes_in_and_the_parameters_type_comes_out(dtype):
    adapter = built().eval()
    assert adapter(*matrices(dtype=dtype)).dtype == torch.float32
    assert adapter.double()(*matrices(dtype=dtype)).dtype == torch.float64


def test_autocast_does_not_reach_inside():
    adapter = built().eval()
    expected = adapter(*matrices())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter(*matrices()), expected)


# Aligned.


@pytest.mark.parametrize(("source", "axis"), [((5, 9), "row"), ((7, 12), "column"), ((5, 12), "row")])
def test_aligned_reads_token_by_token(source, axis):
    adapter = built(source=source, kind="aligned", input="raw", output="layernorm")
    target, source = matrices(source=source)
    matrix = adapter.body.map.weight
    torch.testing.assert_close(adapter(target, source), source @ matrix.T if axis == "row" else matrix @ source)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)


def test_aligned_sees_which_row_is_which_and_lpka_does_not():
    target, source = matrices(source=(5, 9))
    shuffled = source[[1, 2, 3, 4, 0]]
    aligned = built(source=(5, 9), kind="aligned")
    assert not torch.allclose(aligned(target, shuffled), aligned(target, source), atol=1e-4)
    rows_only = built(source=(5, 9), unfold="individual").eval()
    torch.testing.assert_close(rows_only(target, shuffled), rows_only(target, source))


def test_kinds_without_attention_have_no_omega():
    assert built(kind="mlp").omega() == []
    assert built(source=(5, 9), kind="aligned").omega() == []


# Procrustes.


def stream(target, source):
    return built(target.shape, source.shape, kind="procrustes", input="raw", output="layernorm")(target, source)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_procrustes_is_the_nearest_rotation_of_scipy(axis):
    target, source = matrices((9, 4), (9, 4))
    wanted_t, wanted_s = (x - x.mean(0) for x in (target, source))
    rotation, _ = scipy.linalg.orthogonal_procrustes(wanted_s.numpy(), wanted_t.numpy())
    wanted = wanted_s @ torch.from_numpy(rotation)
    if axis == "row":
        found = stream(target, source)
    else:
        adapter = build_adapter(
            AdapterConfig("procrustes", input="raw", output="layernorm"), (4, 9), (4, 9), rows_align=False
        )
        found = adapter(target.T, source.T).T
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [4, 7])
def test_no_other_partial_isometry_brings_the_source_nearer(width):
    target, source = matrices((12, 5), (12, width), dtype=torch.float64)
    centred = target - target.mean(0)
    adapter = built((12, 5), (12, width), kind="procrustes", input="raw", output="layernorm").double()
    best = (adapter(target, source) * centred).sum()
    torch.manual_seed(1)
    for _ in range(200):
        other, _ = torch.linalg.qr(torch.randn(max(width, 5), min(width, 5), dtype=torch.float64))
        other = other if width >= 5 else other.T
        assert ((source - source.mean(0)) @ other * centred).sum() <= best + 1e-9


def test_procrustes_keeps_what_lies_between_the_source_s_tokens():
    """Angles and lengths, where the target is at least as wide."""
    target, source = matrices((8, 6), (8, 4))
    moved, centred = stream(target, source), source - source.mean(0)
    torch.testing.assert_close(moved @ moved.T, centred @ centred.T, atol=1e-5, rtol=1e-5)


def test_procrustes_brings_back_a_source_that_is_the_target_turned():
    target, _ = matrices((8, 6), (8, 6))
    turn, _ = torch.linalg.qr(torch.randn(6, 6))
    torch.testing.assert_close(stream(target, target @ turn), target - target.mean(0), atol=1e-5, rtol=1e-5)


def test_procrustes_cannot_undo_another_order_of_rows_and_says_so():
    target, source = matrices((8, 6), (8, 6))
    assert not torch.allclose(stream(target, source[torch.randperm(8)]), stream(target, source), atol=1e-3)
    assert built((8, 6), (8, 6), kind="procrustes").sees_order


def test_procrustes_gives_nan_for_what_is_not_finite_and_does_not_raise():
    target, source = matrices((8, 6), (8, 4))
    source[3, 1] = torch.inf
    assert stream(target, source).isnan().all()


def test_procrustes_has_nothing_to_learn_but_its_gate():
    adapter = built((8, 6), (8, 4), kind="procrustes")
    assert [name for name, _ in adapter.named_parameters()] == ["gate"]
    assert adapter.omega() == []


# Gradients, randomness, state.


@pytest.mark.parametrize("kind", ["lpka", "mlp", "aligned", "procrustes"])
def test_gradients_equal_finite_differences(kind):
    source = (3, 5) if kind in ("aligned", "procrustes") else (4, 5)
    adapter = built((3, 4), source, kind=kind, heads=2, gate=0.3).double().eval()
    target, source = matrices((3, 4), source, dtype=torch.float64)
    names = [name for name, _ in adapter.named_parameters()]

    def run(*values):
        return torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (target, source))

    values = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
    assert torch.autograd.gradcheck(run, values, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("width", ["compact", "published"])
def test_a_seed_fixes_parameters_and_dropout(width):
    def run(seed, draw):
        adapter = built(seed=seed, width=width)
        torch.manual_seed(draw)
        return adapter(*matrices())

    assert torch.equal(run(0, 5), run(0, 5))
    assert not torch.equal(run(0, 5), run(0, 6)), "dropout is on in train mode"
    assert not torch.equal(run(1, 5), run(0, 5))
    adapter = built(width=width).eval()
    assert torch.equal(adapter(*matrices()), adapter(*matrices()))


def test_dropout_is_where_it_is_said_to_be():
    for options in ({"dropout": 0.5, "ff_dropout": 0.0}, {"dropout": 0.0, "ff_dropout": 0.5}):
        adapter = built(**options)
        assert not torch.equal(adapter(*matrices()), adapter(*matrices()))
    adapter = built(dropout=0.0, ff_dropout=0.0)
    assert torch.equal(adapter(*matrices()), adapter(*matrices()))


@pytest.mark.parametrize("options", [{}, {"width": "published"}, {"joint": True}, {"kind": "mlp"}])
def test_state_dict_restores_the_adapter(options):
    adapter, other = built(**options), built(seed=9, **options)
    for _ in range(2):
        adapter(*matrices())  # moves the spectral norms' vectors
    other.load_state_dict(adapter.state_dict())
    results = []
    for one in (adapter, other):
        torch.manual_seed(4)
        results.append(one(*matrices()))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["lpka", "mlp", "aligned"])
def test_it_can_learn_to_carry_the_source_over(kind):
    """Least squares towards a linear image of the source: the path from source to proposal is open."""
    shape = (4, 6)
    adapter = built(shape, shape, kind=kind, dropout=0.0, ff_dropout=0.0, heads=2, output="layernorm")
    target, source = matrices(shape, shape)
    wanted = nn.functional.normalize(source.flip(1), dim=1)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = (adapter(target, source) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


# Bad input.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 0}, "adapter.layers is 0: choose 1 or more"),
        ({"heads": 0}, "adapter.heads is 0: choose 1 or more"),
        ({"heads": 65}, "adapter.heads 65 is above the inner width 64: choose 1 to 64 heads"),
        ({"heads": 129, "width": "published"}, "above the inner width 128"),
        ({"gate": 1.0}, "adapter.gate 1.0 is a tanh: choose a value above -1 and below 1"),
        ({"gate": -1.5}, "adapter.gate"),
        ({"gate": math.nan}, "adapter.gate"),
        ({"dropout": 1.0}, "adapter.dropout 1.0"),
        ({"ff_dropout": -0.1}, "adapter.ff_dropout -0.1"),
        ({"kind": "aligned"}, "needs equal rows or equal columns, and 5x12 <- 7x9 share neither"),
        ({"kind": "procrustes"}, "'procrustes' needs equal rows or equal columns, and 5x12 <- 7x9 share neither"),
    ],
)
def test_bad_options_are_named_in_one_sentence(options, words):
    with pytest.raises(ValueError) as error:
        built(**options)
    message = str(error.value)
    assert words in message
    assert message.endswith(".")
    assert "\n" not in message
