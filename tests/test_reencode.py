"""Weights as matrices and as factors, against numpy, on small layers and on real architectures."""

import copy

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from hetero_kt.nn.reencode import (
    factor_parameter,
    factorise,
    find_weight,
    from_matrix,
    list_weights,
    plain_state_dict,
    split_svd,
    to_matrix,
)


class Attention(nn.Module):
    """A fused projection, as vision transformers have it."""

    def __init__(self, width=8):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


class Net(nn.Module):
    """Every kind of weight once."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.attn = Attention()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 6, (1, 3), groups=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(48, 5)

    def forward(self, tokens):
        x = self.attn(self.embed(tokens))
        x = x + self.mha(x, x, x, need_weights=False)[0]
        x = self.norm(self.grouped(self.conv(x[:, None])))
        return self.fc(x.flatten(1))


WEIGHTS = {
    "embed.weight": ("embedding", (10, 8)),
    "attn.qkv.weight": ("attention", (24, 8)),
    "attn.qkv.weight[q]": ("attention", (8, 8)),
    "attn.qkv.weight[k]": ("attention", (8, 8)),
    "attn.qkv.weight[v]": ("attention", (8, 8)),
    "mha.in_proj_weight": ("attention", (24, 8)),
    "mha.in_proj_weight[q]": ("attention", (8, 8)),
    "mha.in_proj_weight[k]": ("attention", (8, 8)),
    "mha.in_proj_weight[v]": ("attention", (8, 8)),
    "mha.out_proj.weight": ("linear", (8, 8)),
    "conv.weight": ("conv", (4, 9)),
    "grouped.weight": ("grouped conv", (6, 6)),
    "fc.weight": ("linear", (5, 48)),
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def tokens():
    return torch.arange(24).reshape(3, 8) % 10


def tensor_of(net, name):
    ref = find_weight(net, name)
    return getattr(ref.module, ref.parameter)


# Names and kinds.


def test_list_weights_shows_every_kind(net):
    listed = list_weights(net)
    assert {w.name: (w.kind, w.shape) for w in listed} == WEIGHTS
    assert all(w.parameters == w.shape[0] * w.shape[1] and not w.note for w in listed)


def test_list_weights_notes_frozen_tied_and_factorised(net):
    net.fc.weight.requires_grad_(False)
    net.head = nn.Linear(8, 10, bias=False)
    net.head.weight = net.embed.weight
    factorise(net, "conv.weight", 2)
    factorise(net, "attn.qkv.weight[v]", 3)
    notes = {w.name: w.note for w in list_weights(net)}
    assert notes["fc.weight"] == "frozen"
    assert notes["head.weight"] == "tied to embed.weight"
    assert notes["embed.weight"] == ""
    assert notes["conv.weight"] == "factorised at rank 2"
    assert notes["attn.qkv.weight"] == "factorised at rank 0/0/3"
    assert set(notes) == {*WEIGHTS, "head.weight"}


@pytest.mark.parametrize("name", WEIGHTS)
def test_find_weight_points_at_the_tensor(net, name):
    ref = find_weight(net, name)
    kind, shape = WEIGHTS[name]
    assert (ref.name, ref.kind, ref.shape) == (name, kind, shape)
    whole, _, part = name.partition("[")
    assert ref.part == (part[0] if part else None)
    assert getattr(ref.module, ref.parameter) is net.get_parameter(whole)
    assert ref.tensor_shape == net.get_parameter(whole).shape


def test_find_weight_reads_the_full_shape_of_a_partitioned_parameter(net):
    parameter = net.fc.weight
    parameter.ds_shape = torch.Size([5, 48])
    parameter.data = torch.empty(0)
    ref = find_weight(net, "fc.weight")
    assert (ref.tensor_shape, ref.shape) == ((5, 48), (5, 48))
    with pytest.raises(ValueError, match=r"before deepspeed\.initialize"):
        factorise(net, "fc.weight", 2)


def test_a_model_that_is_one_layer():
    layer = nn.Linear(6, 4)
    assert find_weight(layer, "weight").shape == (4, 6)
    factorise(layer, "weight", 2)
    plain = nn.Linear(6, 4)
    plain.load_state_dict(plain_state_dict(layer.state_dict()))
    assert torch.equal(plain.weight, layer.weight)


def test_recurrent_and_foreign_parametrised_weights_do_not_take_part():
    net = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "normed": spectral_norm(nn.Linear(4, 4)), "fc": nn.Linear(4, 4)})
    assert [w.name for w in list_weights(net)] == ["fc.weight"]


@pytest.mark.parametrize(("attribute", "fused"), [(None, True), ({"head_first": True}, False), ({"val_dim": 4}, False)])
def test_interleaved_projections_have_no_thirds(attribute, fused):
    block = Attention()
    for key, value in (attribute or {}).items():
        setattr(block, key, value)
    assert ("qkv.weight[v]" in {w.name for w in list_weights(block)}) == fused


def test_thirds_are_the_rows_that_timm_reads_as_q_k_and_v():
    """Doubling v doubles the attention's output, zeroing q makes it uniform."""
    attention = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0).blocks[0].attn.eval()
    attention.proj = nn.Identity()
    nn.init.zeros_(attention.qkv.bias)
    x = torch.randn(1, 4, 192)
    weight = attention.qkv.weight
    with torch.no_grad():
        before = attention(x)
        weight.copy_(from_matrix(2 * to_matrix(weight, "v"), weight, "v"))
        torch.testing.assert_close(attention(x), 2 * before)
        weight.copy_(from_matrix(0 * to_matrix(weight, "q"), weight, "q"))
        torch.testing.assert_close(attention(x).std(1), torch.zeros(1, 192), atol=1e-6, rtol=0)


# Matrices and back.


def layers():
    size = st.integers(1, 5)
    return st.one_of(
        st.builds(lambda i, o: (nn.Linear(i, o), "weight", None), size, size),
        st.builds(lambda i, o: (nn.Conv2d(i, o, 1), "weight", None), size, size),
        st.builds(lambda i, o, h, w: (nn.Conv2d(i, o, (h, w)), "weight", None), size, size, size, size),
        st.builds(lambda i, o, k: (nn.Conv1d(i, o, k), "weight", None), size, size, size),
        st.builds(lambda i, o, g: (nn.Conv2d(i * g, o * g, 3, groups=g), "weight", None), size, size, size),
        st.builds(lambda v, d: (nn.Embedding(v, d), "weight", None), size, size),
        st.builds(
            lambda d, part: (nn.MultiheadAttention(d, 1), "in_proj_weight", part),
            size,
            st.sampled_from("qkv"),
        ),
        st.builds(lambda d, part: (Attention(d), "qkv.weight", part), size, st.sampled_from("qkv")),
    )


@settings(max_examples=80, deadline=None)
@given(layer=layers(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_matrix_round_trip(layer, dtype):
    module, key, part = layer
    weight = module.get_parameter(key).detach().to(dtype)
    matrix = to_matrix(weight, part)
    assert tuple(matrix.shape) == find_weight(module, f"{key}[{part}]" if part else key).shape
    assert matrix.shape[0] * (3 if part else 1) == weight.shape[0]

    back = from_matrix(matrix, weight, part)
    assert torch.equal(back, weight)
    assert back.data_ptr() != weight.data_ptr()

    changed = from_matrix(matrix + 1, weight, part)
    assert changed.dtype == dtype
    assert changed.shape == weight.shape
    assert torch.equal(to_matrix(changed, part), matrix + 1)
    for other in set("qkv") - {part} if part else ():
        assert torch.equal(to_matrix(changed, other), to_matrix(weight, other))


def test_to_matrix_is_a_view_with_one_row_per_output(net):
    weight = net.conv.weight.detach()
    matrix = to_matrix(weight)
    assert matrix.data_ptr() == weight.data_ptr()
    assert torch.equal(matrix[2], weight[2].flatten())
    channels_last = weight.repeat(1, 2, 1, 1).to(memory_format=torch.channels_last)
    assert torch.equal(to_matrix(channels_last), to_matrix(channels_last.contiguous()))


def test_from_matrix_takes_another_type(net):
    weight = net.attn.qkv.weight.detach().bfloat16()
    assert from_matrix(torch.ones(8, 8), weight, "k").dtype == torch.bfloat16


def test_from_matrix_refuses_another_shape(net):
    with pytest.raises(ValueError, match=r"a matrix of \(24, 8\) does not fit here: give one of \(8, 8\)\."):
        from_matrix(torch.zeros(24, 8), net.attn.qkv.weight, "v")


# SVD.


@settings(max_examples=30, deadline=None)
@given(N=st.integers(1, 7), M=st.integers(1, 7), data=st.data())
def test_split_svd_is_the_best_approximation_and_keeps_the_rest(N, M, data):
    rank = data.draw(st.integers(1, min(N, M)))
    matrix = torch.randn(N, M, generator=torch.Generator().manual_seed(N * 10 + M), dtype=torch.float64)
    B, A, R = split_svd(matrix, rank)
    assert (B.shape, A.shape, R.shape) == ((N, rank), (rank, M), (N, M))
    torch.testing.assert_close(B @ A + R, matrix)
    U, sigma, V = np.linalg.svd(matrix.numpy(), full_matrices=False)
    best = (U[:, :rank] * sigma[:rank]) @ V[:rank]
    np.testing.assert_allclose((B @ A).numpy(), best, atol=1e-10)
    root = np.sqrt(sigma[:rank])
    np.testing.assert_allclose(B.norm(dim=0).numpy(), root, atol=1e-10)
    np.testing.assert_allclose(A.norm(dim=1).numpy(), root, atol=1e-10)


def test_split_svd_moves_continuously():
    """A small change, or another solver's signs, must not flip a row of A."""
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    _, A, _ = split_svd(matrix, 6)
    _, moved, _ = split_svd(matrix + 1e-5 * torch.randn(20, 30, generator=torch.Generator().manual_seed(1)), 6)
    assert (moved - A).abs().max() < 1e-2
    _, transposed, _ = split_svd(matrix.flip(0), 6)
    torch.testing.assert_close(transposed, A, atol=1e-4, rtol=0)
    assert torch.equal(split_svd(matrix, 6)[1], A)


def test_split_svd_types_and_gradients():
    parameter = nn.Parameter(torch.randn(6, 5).bfloat16())
    B, A, R = split_svd(parameter, 2)
    assert {t.dtype for t in (B, A, R)} == {torch.bfloat16}
    assert not any(t.requires_grad for t in (B, A, R))
    torch.testing.assert_close(B @ A + R, parameter.detach(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_split_svd_of_a_broken_matrix_is_nan_throughout(bad):
    matrix = torch.randn(4, 5)
    matrix[1, 2] = bad
    assert all(t.isnan().all() for t in split_svd(matrix, 2))


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_split_svd_refuses_impossible_ranks(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} does not fit the matrix \(4x9\): choose a rank from 1 to 4"):
        split_svd(torch.zeros(4, 9), rank)


# Factors.


@pytest.mark.parametrize("name", WEIGHTS)
def test_full_rank_keeps_the_function(net, tokens, name):
    before, weight = net(tokens), tensor_of(net, name).detach().clone()
    factorise(net, name, min(WEIGHTS[name][1]))
    torch.testing.assert_close(net(tokens), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tensor_of(net, name), weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_is_the_best_approximation(net, name, rank):
    part = find_weight(net, name).part
    weight = tensor_of(net, name).detach().clone()
    factorise(net, name, rank)
    U, sigma, V = np.linalg.svd(to_matrix(weight, part).double().numpy(), full_matrices=False)
    best = torch.from_numpy((U[:, :rank] * sigma[:rank]) @ V[:rank])
    expected = from_matrix(best, weight, part)
    torch.testing.assert_close(tensor_of(net, name).detach(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", WEIGHTS)
def test_factors_are_the_trainable_parameters(net, tokens, name):
    ref, (_, (N, M)) = find_weight(net, name), WEIGHTS[name]
    whole = name.partition("[")[0]
    factorise(net, name, 2)
    factor = factor_parameter(net, name)
    assert isinstance(factor, nn.Parameter)
    assert factor.shape == (2, M)
    assert factor.is_contiguous()

    path = whole.rpartition(".")[0]
    prefix = f"{path}.parametrizations.{ref.parameter}.original"
    shapes = {k.removeprefix(prefix): tuple(p.shape) for k, p in net.named_parameters() if k.startswith(prefix)}
    others = {"2": (2 * N, M)} if ref.part else {}
    assert shapes == {"0": (N, 2), "1": (2, M), **others}
    assert whole not in dict(net.named_parameters())

    net(tokens).square().sum().backward()
    assert factor.grad.abs().max() > 0
    assert net.get_parameter(prefix + "0").grad.abs().max() > 0


def test_gradients_are_those_of_the_product(net, tokens):
    """dL/dA = B^T dL/dW and dL/dB = dL/dW A^T."""
    plain = copy.deepcopy(net)
    factorise(net, "conv.weight", 2)
    originals = net.conv.parametrizations.weight
    B, A = originals.original0, originals.original1
    with torch.no_grad():
        plain.conv.weight.copy_(net.conv.weight)
    for model in (plain, net):
        model(tokens).square().sum().backward()
    G = to_matrix(plain.conv.weight.grad)
    torch.testing.assert_close(A.grad, B.detach().T @ G)
    torch.testing.assert_close(B.grad, G @ A.detach().T)


@pytest.mark.parametrize("order", ["qv", "vq", "qkv", "vkq", "k"])
@pytest.mark.parametrize("name", ["attn.qkv.weight", "mha.in_proj_weight"])
def test_thirds_are_factorised_one_by_one(net, tokens, name, order):
    ranks = {"q": 2, "k": 1, "v": 3}
    weight = tensor_of(net, name).detach().clone()
    expected = weight
    for part in order:
        factorise(net, f"{name}[{part}]", ranks[part])
        B, A, _ = split_svd(to_matrix(weight, part), ranks[part])
        expected = from_matrix(B @ A, expected, part)
    torch.testing.assert_close(tensor_of(net, name).detach(), expected, atol=1e-6, rtol=1e-5)
    for part in "qkv":
        factor = factor_parameter(net, f"{name}[{part}]")
        assert (factor is not None) == (part in order)
        if factor is not None:
            B, A, _ = split_svd(to_matrix(weight, part), ranks[part])
            torch.testing.assert_close(factor.detach(), A, atol=1e-5, rtol=1e-4)
    net(tokens).sum().backward()
    assert all(p.requires_grad for p in net.parameters())

    fresh = Net()
    fresh.load_state_dict(plain_state_dict(net.state_dict()))
    torch.testing.assert_close(fresh(tokens), net(tokens), rtol=0, atol=0)


def test_factor_parameter_is_none_for_plain_weights_and_other_parts(net):
    assert factor_parameter(net, "fc.weight") is None
    factorise(net, "attn.qkv.weight", 2)
    assert factor_parameter(net, "attn.qkv.weight").shape == (2, 8)
    assert factor_parameter(net, "attn.qkv.weight[v]") is None
    factorise(net, "mha.in_proj_weight[v]", 2)
    assert factor_parameter(net, "mha.in_proj_weight") is None


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_factorised_weight_keeps_its_name(net, name):
    before = find_weight(net, name)
    factorise(net, name, 2)
    after = find_weight(net, name)
    assert (after.kind, after.shape, after.tensor_shape, after.part) == (
        before.kind,
        before.shape,
        before.tensor_shape,
        before.part,
    )
    assert {w.name for w in list_weights(net)} == set(WEIGHTS)


def test_factors_train_also_where_gradients_were_off_when_they_were_made(net):
    with torch.no_grad():
        for part in "qkv":
            factorise(net, f"attn.qkv.weight[{part}]", 2)
    assert all(p.requires_grad for p in net.parameters())


def test_an_optimizer_moves_the_factorised_weight_but_never_above_its_rank(net, tokens):
    factorise(net, "fc.weight", 2)
    before = net.fc.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(tokens).square().sum().backward()
        optimizer.step()
    assert (net.fc.weight - before).abs().max() > 1e-3
    assert torch.linalg.matrix_rank(net.fc.weight, tol=1e-4) == 2


def test_a_weight_that_starts_at_zero_can_still_learn(net, tokens):
    nn.init.zeros_(net.fc.weight)
    factorise(net, "fc.weight", 3)
    assert torch.equal(net.fc.weight, torch.zeros(5, 48))
    optimizer = torch.optim.SGD(net.fc.parameters(), lr=0.1)
    nn.functional.cross_entropy(net(tokens), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    assert torch.linalg.matrix_rank(net.fc.weight, tol=1e-6) >= 2


def test_the_weight_is_not_rounded_by_autocast(net):
    factorise(net, "fc.weight", 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = net.fc.weight
    assert torch.equal(inside, net.fc.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factors_take_the_weights_type(net, tokens, dtype):
    net = net.to(dtype)
    factorise(net, "conv.weight", 2)
    factorise(net, "attn.qkv.weight[k]", 2)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert net(tokens).dtype == dtype


# Export.


def test_plain_state_dict_loads_strictly_with_the_same_outputs(net, tokens):
    for name, rank in [
        ("embed.weight", 3),
        ("attn.qkv.weight[v]", 2),
        ("mha.in_proj_weight[q]", 3),
        ("mha.out_proj.weight", 4),
        ("conv.weight", 2),
        ("grouped.weight", 2),
        ("fc.weight", 3),
    ]:
        factorise(net, name, rank)
    net(tokens).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    fresh = Net()
    shapes = {key: value.shape for key, value in fresh.state_dict().items()}
    folded = plain_state_dict(net.state_dict())
    assert {key: value.shape for key, value in folded.items()} == shapes
    assert not any(value.requires_grad for value in folded.values())
    fresh.load_state_dict(folded, strict=True)
    assert torch.equal(fresh.eval()(tokens), net.eval()(tokens))


def test_plain_state_dict_carries_no_graph(net):
    factorise(net, "fc.weight", 2)
    assert not plain_state_dict(net.state_dict(keep_vars=True))["fc.weight"].requires_grad


def test_plain_state_dict_leaves_other_entries_alone(net):
    net.fc = spectral_norm(net.fc)
    state = net.state_dict()
    folded = plain_state_dict(state)
    assert folded.keys() == state.keys()
    assert all(folded[key] is state[key] for key in state)


def test_a_factorised_models_own_state_dict_round_trips(net, tokens):
    other = Net()
    for model in (net, other):
        factorise(model, "fc.weight", 2)
        factorise(model, "attn.qkv.weight[v]", 2)
    other.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(other(tokens), net(tokens))
    assert torch.equal(copy.deepcopy(net)(tokens), net(tokens))


@pytest.mark.parametrize(
    ("model_name", "weight", "rank"),
    [
        ("resnet18", "layer4.0.conv1.weight", 16),
        ("resnet18", "layer4.0.downsample.0.weight", 16),
        ("vit_tiny_patch16_224", "blocks.11.attn.qkv.weight[v]", 16),
    ],
)
def test_factorised_timm_layers(model_name, weight, rank):
    def build():
        torch.manual_seed(0)
        # A last norm at zero would hide its branch.
        options = {"img_size": 32} if "vit" in model_name else {"zero_init_last": False}
        return timm.create_model(model_name, num_classes=10, **options).eval()

    model, x = build(), torch.randn(2, 3, 32, 32)
    factorise(model, weight, rank)
    M = find_weight(model, weight).shape[1]
    assert factor_parameter(model, weight).shape == (rank, M)
    model(x).square().sum().backward()
    assert factor_parameter(model, weight).grad.abs().max() > 0
    plain = build()
    assert not torch.equal(plain(x), model(x)), "rank 16 changes the function"
    plain.load_state_dict(plain_state_dict(model.state_dict()), strict=True)
    assert torch.equal(plain(x), model(x))


# Bad input.


def test_unknown_weight_lists_the_nearest_and_their_shapes(net):
    with pytest.raises(ValueError) as error:
        find_weight(net, "fc.wieght")
    assert str(error.value).startswith(
        "'fc.wieght' is no weight of this Net: choose one that `hetero-kt sites` lists; the nearest: "
        "'fc.weight' (5x48), "
    )
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fc.bias", "'fc.bias' has shape (5,) and is no weight matrix"),
        ("norm.weight", "'norm.weight' has shape (6,) and is no weight matrix"),
        ("fc", "'fc' is no weight"),
        ("fc.weight[v]", "'fc.weight[v]' asks for a part, which only a fused q, k, v projection has"),
        ("attn.qkv.weight[x]", "asks for a part"),
        ("attn.qkv.bias[v]", "'attn.qkv.bias' has shape (24,)"),
        ("", "'' is no weight"),
    ],
)
def test_names_that_are_no_weight(net, name, words):
    with pytest.raises(ValueError) as error:
        find_weight(net, name)
    assert words in str(error.value)


def test_a_model_without_weights():
    with pytest.raises(ValueError, match="the nearest: none"):
        find_weight(nn.BatchNorm2d(3), "fc.weight")


@pytest.mark.parametrize(("name", "limit"), [("fc.weight", 5), ("attn.qkv.weight[v]", 8), ("conv.weight", 4)])
def test_ranks_that_do_not_fit(net, name, limit):
    for rank in (0, -2, limit + 1):
        with pytest.raises(ValueError) as error:
            factorise(net, name, rank)
        assert f"rank {rank} does not fit '{name}'" in str(error.value)
        assert f"choose a rank from 1 to {limit}." in str(error.value)
    assert factor_parameter(net, name) is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fc.weight", "fc.weight"),
        ("attn.qkv.weight[v]", "attn.qkv.weight[v]"),
        ("attn.qkv.weight[v]", "attn.qkv.weight"),
        ("attn.qkv.weight", "attn.qkv.weight[v]"),
    ],
)
def test_factorising_twice(net, first, second):
    factorise(net, first, 2)
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError) as error:
        factorise(net, second, 2)
    assert f"'{second}' is factorised already" in str(error.value)
    assert all(torch.equal(net.state_dict()[key], state[key]) for key in state)


def test_frozen_and_tied_weights(net):
    net.fc.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'fc\.weight' is frozen, .*: unfreeze it, or use mode 'svd'\."):
        factorise(net, "fc.weight", 2)
    net.head = nn.Linear(8, 10)
    net.head.weight = net.embed.weight
    for name in ("embed.weight", "head.weight"):
        with pytest.raises(ValueError, match=rf"'{name}' is tied to another layer .*: use mode 'svd'\."):
            factorise(net, name, 2)
    assert net.head.weight is net.embed.weight


def test_a_layer_used_under_two_names_is_not_tied(net, tokens):
    net.alias = net.fc
    factorise(net, "alias.weight", 2)
    assert factor_parameter(net, "fc.weight") is factor_parameter(net, "alias.weight")
    fresh = Net()
    fresh.alias = fresh.fc
    fresh.load_state_dict(plain_state_dict(net.state_dict()))
    assert torch.equal(fresh(tokens), net(tokens))
