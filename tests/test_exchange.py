"""The exchange: what is read, proposed, written and learnt, in anybody's loop."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small import CLASSES, PLAIN, SITES, Convolutions, Perceptron, batch, build_pair, loss, zero
from test_mergenet import OPTIMS, STEPS, assert_equal, mutual, train
from torch import Tensor, nn

from hetero_kt.config import AdapterConfig, Optim, Schedule
from hetero_kt.distributed import params
from hetero_kt.distributed.engine import build_engine
from hetero_kt.methods.mergenet import Exchange, Site, Transfer, TransferDiverged
from hetero_kt.nn.reencode import factor_parameter, factorise, split_svd

ALIGNED = AdapterConfig(kind="aligned")
DROPOUT = AdapterConfig(heads=2, dropout=0.3, ff_dropout=0.3)


def step_plain(model: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
    optimizer.zero_grad()
    loss(model, batch(at)).backward()


def loop_plain(exchange: Exchange, models: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
    """A user's own loop, of plain PyTorch."""
    for step in range(STEPS):
        exchange.propose()
        for model, optimizer in zip(models.values(), optimizers, strict=True):
            step_plain(model, optimizer, step)
        exchange.observe()
        for optimizer in optimizers:
            optimizer.step()
        exchange.learn()


# --- as a library ---


def test_a_bare_pytorch_loop_equals_the_reference() -> None:
    models = build_pair()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, 0.9, weight_decay=5e-4) for m in models.values()]
    exchange = Exchange(mutual(models, optim="sgd"))
    loop_plain(exchange, models, optimizers)
    ours: dict[str, Any] = {n: {k: p.detach() for k, p in m.named_parameters()} for n, m in models.items()}
    ours |= {n: dict(adapter.state_dict()) for n, adapter in exchange.adapters().items()}
    assert_equal(ours, [*models, *SITES], "sgd", 1)


def bare_deepspeed_loop(stage: int) -> dict[str, Any]:
    """What a user writes: own engines, own optimizers, three calls."""
    rank, world = dist.get_rank(), dist.get_world_size()
    engines = {
        name: build_engine(model, optim=OPTIMS["sgd"], zero=zero(stage), micro_batch=8 // world)
        for name, model in build_pair().items()
    }
    exchange = Exchange(mutual(engines, optim="sgd"))
    for step in range(STEPS):
        exchange.propose()
        for engine in engines.values():
            engine.backward(loss(engine, batch(step, rank, world)))
        exchange.observe()
        for engine in engines.values():
            engine.step()
        exchange.learn()
    result: dict[str, Any] = {name: params.state_dict(engine) for name, engine in engines.items()}
    result |= {name: dict(adapter.state_dict()) for name, adapter in exchange.adapters().items()}
    for engine in engines.values():
        engine.destroy()
    return result


@pytest.mark.parametrize("stage", [1, 3])
def test_a_bare_deepspeed_loop_equals_the_method_to_the_bit(ranks: Any, stage: int) -> None:
    bare = ranks(2).run(bare_deepspeed_loop, stage)[0]
    method = ranks(2).run(train, stage, OPTIMS["sgd"])[0]
    for part in ("conv", "perceptron", *SITES):
        for key, value in method[part].items():
            assert torch.equal(bare[part][key], value), key


@pytest.mark.parametrize(("stage", "gathers", "elements"), [(1, 0, 0), (2, 0, 0), (3, 2, 1166 + 1042)])
def test_a_transfer_gathers_its_factors_once_before_and_the_target_s_once_after_the_step(
    ranks: Any, stage: int, gathers: int, elements: int
) -> None:
    """A of 4x7, 5x192, 4x24 and 3x27 (padded by 1) before, the targets 5x192 and 3x27 after; three times."""
    for result in ranks(2).run(train, stage, OPTIMS["sgd"]):
        assert (result["traffic"].gathers, result["traffic"].bytes) == (3 * gathers, 3 * 4 * elements)


# --- what adapters learn from ---


def double_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    return Convolutions(batch_norm=False).double(), Perceptron().double()


@pytest.mark.parametrize("mode", ["full", "svd"])
def test_exact_equals_finite_differences_of_the_loss(mode: Any) -> None:
    source, target = double_pair()
    rate = 1e-3
    site = Site(target, "inner.weight", mode, 3)
    plain_sgd = Optim(name="sgd", lr=rate, momentum=0.0, weight_decay=0.0)
    transfer = Transfer(Site(source, "fc.weight"), site, adapter=PLAIN, optim=plain_sgd, update="exact", name="t")
    exchange = Exchange([transfer])
    adapter = exchange.adapters()["t"].double()
    start = copy.deepcopy(adapter.state_dict())
    before = target.inner.weight.detach().clone()
    optimizer = torch.optim.SGD(target.parameters(), 0.1)

    exchange.propose()
    step_plain(target, optimizer, 0)
    exchange.observe()
    optimizer.step()
    exchange.learn()
    gradient = {k: (start[k] - p.detach()) / rate for k, p in adapter.named_parameters()}

    def loss_with(direction: dict[str, Tensor], size: float) -> float:
        probe, _ = double_pair()
        _, fresh = double_pair()
        moved = copy.deepcopy(adapter)
        moved.load_state_dict({k: v + size * direction.get(k, torch.zeros_like(v)) for k, v in start.items()})
        b, a, rest = split_svd(before, 3) if mode == "svd" else (None, before, None)
        with torch.no_grad():
            proposal = moved(a, probe.fc.weight)
            fresh.inner.weight.copy_(proposal if b is None else b @ proposal + rest)
            return float(loss(fresh, batch(0)))

    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        direction = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in gradient.items()}
        slope = (loss_with(direction, 1e-5) - loss_with(direction, -1e-5)) / 2e-5
        expected = sum(float((gradient[k] * direction[k]).sum()) for k in gradient)
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_lookahead_equals_its_closed_form() -> None:
    """With G = S M^T the update is M <- M - lr c^T S, c = proposal minus where the optimizer took it."""
    source, target = double_pair()
    rate = 0.05
    raw = AdapterConfig(kind="aligned", input="raw", output="layernorm")
    optim = Optim(name="sgd", lr=rate, momentum=0.0, weight_decay=0.0)
    exchange = Exchange([Transfer(Site(source, "fc.weight"), Site(target, "head.weight"), 1, raw, optim, name="t")])
    adapter = exchange.adapters()["t"].double()
    m_before = adapter.body.map.weight.detach().clone()
    s = source.fc.weight.detach().clone()
    optimizer = torch.optim.SGD(target.parameters(), 0.3)

    exchange.propose()
    proposal = target.head.weight.detach().clone()
    torch.testing.assert_close(proposal, s @ m_before.T)
    step_plain(target, optimizer, 0)
    optimizer.step()
    exchange.learn()
    cotangent = proposal - target.head.weight.detach()
    torch.testing.assert_close(adapter.body.map.weight.detach(), m_before - rate * cotangent.T @ s)


# --- what is read and written ---


def adapter_inputs(exchange: Exchange) -> dict[str, tuple[Tensor, Tensor]]:
    """(target, source) as each adapter saw them first."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, adapter in exchange.adapters().items():
        adapter.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, tuple(x.detach().clone() for x in inputs))
        )
    return seen


def test_a_ring_of_three_reads_every_weight_before_any_is_written() -> None:
    torch.manual_seed(0)
    models = [Perceptron() for _ in range(3)]
    transfers = [
        Transfer(
            Site(models[i], "head.weight"),
            Site(models[(i + 1) % 3], "head.weight"),
            1,
            AdapterConfig(gate=0.9),
            name=f"{i}",
        )
        for i in range(3)
    ]
    exchange = Exchange(transfers)
    seen = adapter_inputs(exchange)
    before = [m.head.weight.detach().clone() for m in models]
    exchange.propose()
    for i in range(3):
        target, source = seen[str(i)]
        assert torch.equal(source, before[i])
        assert torch.equal(target, before[(i + 1) % 3])
        assert not torch.equal(models[i].head.weight, before[i]), "written"


def test_an_adapter_that_reads_changes_sees_what_the_source_s_optimizer_has_done_since_the_last_transfer() -> None:
    torch.manual_seed(0)
    source, target = Convolutions(batch_norm=False), Perceptron()
    optimizer = torch.optim.SGD(source.parameters(), 0.1)
    site = Site(target, "inner.weight")
    exchange = Exchange([Transfer(Site(source, "fc.weight"), site, 2, reads="change", name="t")])
    seen: list[Tensor] = []
    exchange.adapters()["t"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].detach().clone()))
    weights = []
    for step in range(6):
        weights.append(source.fc.weight.detach().clone())
        exchange.propose()
        step_plain(source, optimizer, step)
        optimizer.step()
        step_plain(target, torch.optim.SGD(target.parameters(), 0.1), step)
        exchange.learn()
    changes = [torch.zeros_like(weights[0]), weights[2] - weights[0], weights[4] - weights[2]]
    proposals = [seen[0], *seen[3:]]  # the first transfer also measures sensitivity: two more forwards
    assert len(proposals) == 3
    assert all(torch.equal(one, other) for one, other in zip(proposals, changes, strict=True))
    assert proposals[1].abs().max() > 0


def test_an_adapter_that_never_learns_writes_what_the_control_frozen_writes() -> None:
    ends = []
    for options in ({"update": "none"}, {"control": "frozen"}):
        models = build_pair()
        exchange = Exchange(
            mutual(models, update=options.get("update", "lookahead")), control=options.get("control", "transfer")
        )
        start = copy.deepcopy({name: adapter.state_dict() for name, adapter in exchange.adapters().items()})
        optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models.values()]
        loop_plain(exchange, models, optimizers)
        for name, adapter in exchange.adapters().items():
            assert all(torch.equal(value, start[name][key]) for key, value in adapter.state_dict().items()), name
        ends.append([value for model in models.values() for value in model.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("hold", [False, True])
def test_an_adapter_with_nothing_to_learn_takes_part_and_comes_back_from_its_state(hold: bool) -> None:
    """One process without any parameter of an adapter: the rotation that scipy finds, a part of the way, every time."""
    torch.manual_seed(0)
    target, source = nn.Linear(6, 5), nn.Linear(8, 5)
    config = AdapterConfig("procrustes", input="raw", gate=0.5, hold=hold)

    def made() -> Exchange:
        return Exchange([Transfer(Site(source, "weight"), Site(target, "weight"), 1, config, name="t")])

    exchange, before = made(), target.weight.detach().clone()
    exchange.propose()
    expected = exchange.adapters()["t"](before, source.weight.detach())
    torch.testing.assert_close(target.weight.detach(), expected.detach())
    assert not torch.allclose(expected, before, atol=1e-2)
    log = exchange.learn()
    assert log["t/gate"] == pytest.approx(0.5)
    again = made()
    again.load_state_dict(copy.deepcopy(exchange.state_dict()))
    gates = [one.adapters()["t"].gate for one in (exchange, again)]
    assert torch.equal(gates[0], gates[1])
    assert bool(torch.equal(gates[0], made().adapters()["t"].gate)) is hold


def test_the_change_of_a_fresh_decomposition_is_refused() -> None:
    source, target = Site(Convolutions(), "fc.weight", "svd", 3), Site(Perceptron(), "inner.weight")
    with pytest.raises(ValueError, match="transfer t reads the change of a fresh decomposition"):
        Exchange([Transfer(source, target, reads="change", name="t")])


def test_self_transfer_reads_and_writes_one_model_and_leaves_the_source_alone() -> None:
    torch.manual_seed(0)
    model = Perceptron()
    exchange = Exchange([Transfer(Site(model, "head.weight"), Site(model, "inner.weight"), 1, PLAIN)])
    before = copy.deepcopy(model.state_dict())
    exchange.propose()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"inner.weight"}


def test_each_transfer_keeps_its_own_cycle_counted_from_the_first_step() -> None:
    models = build_pair()
    first, second = mutual(models)
    exchange = Exchange(
        [
            Transfer(first.source, first.target, 2, PLAIN, name="a"),
            Transfer(second.source, second.target, 3, PLAIN, name="b"),
        ]
    )
    happened = []
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in models.values()]
    for step in range(7):
        exchange.propose()
        for model, optimizer in zip(models.values(), optimizers, strict=True):
            step_plain(model, optimizer, step)
            optimizer.step()
        log = exchange.learn()
        happened.append("".join(n for n in "ab" if f"{n}/change" in log))
    assert happened == ["ab", "", "a", "b", "a", "", "ab"]


def test_svd_writes_the_proposed_factor_and_keeps_the_residual() -> None:
    torch.manual_seed(0)
    source, target = Convolutions(), Perceptron()
    exchange = Exchange(
        [Transfer(Site(source, "fc.weight"), Site(target, "inner.weight", "svd", 4), 1, PLAIN, name="t")]
    )
    whole = target.inner.weight.detach().clone()
    b, a, rest = split_svd(whole, 4)
    seen = adapter_inputs(exchange)
    exchange.propose()
    assert torch.equal(seen["t"][0], a)
    proposal = exchange.paths[0].accepted
    torch.testing.assert_close(target.inner.weight.detach(), b @ proposal + rest)
    assert not torch.allclose(target.inner.weight, whole)


class Fused(nn.Module):
    """A fused query, key, value projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)


@pytest.mark.parametrize("mode", ["full", "svd"])
def test_two_thirds_of_one_fused_projection_may_both_be_targets(mode: Any) -> None:
    torch.manual_seed(0)
    source, target = Perceptron(), Fused()
    transfers = [
        Transfer(Site(source, "head.weight"), Site(target, f"qkv.weight[{part}]", mode, 2), 1, PLAIN, name=part)
        for part in "qv"
    ]
    before = target.qkv.weight.detach().clone()
    Exchange(transfers).propose()
    q, k, v = (target.qkv.weight.detach() - before).chunk(3)
    assert float(q.abs().max()) > 1e-4
    assert torch.equal(k, torch.zeros(6, 6))
    assert float(v.abs().max()) > 1e-4


def test_moments_reset_on_a_plain_module_needs_its_optimizer_and_uses_it() -> None:
    models = build_pair()
    optimizer = torch.optim.SGD(models["perceptron"].parameters(), 0.1, momentum=0.9)
    for step in range(2):
        step_plain(models["perceptron"], optimizer, step)
        optimizer.step()
    factor = factor_parameter(models["perceptron"], "inner.weight")
    source = Site(models["conv"], "fc.weight")
    with pytest.raises(ValueError, match="optimizer"):
        Exchange([Transfer(source, Site(models["perceptron"], "inner.weight"), moments="reset")]).propose()
    site = Site(models["perceptron"], "inner.weight", optimizer=optimizer)
    assert float(optimizer.state[factor]["momentum_buffer"].abs().sum()) > 0
    Exchange([Transfer(source, site, moments="reset")]).propose()
    assert float(optimizer.state[factor]["momentum_buffer"].abs().sum()) == 0


@pytest.mark.parametrize(
    ("transfer", "control", "said"),
    [
        ({}, "shufled", "the control shufled is unknown: use shuffled"),
        ({"update": "exakt"}, "transfer", "transfer t.update exakt is unknown: use one of lookahead, exact, none"),
        ({"adapter": AdapterConfig(kind="linear")}, "transfer", "transfer t.adapter.kind linear is unknown"),  # type: ignore[arg-type]
    ],
)
def test_a_misspelt_name_is_not_taken_for_another(transfer: Any, control: Any, said: str) -> None:
    models = build_pair()
    sites = Site(models["conv"], "fc.weight"), Site(models["perceptron"], "inner.weight")
    with pytest.raises(ValueError, match=said):
        Exchange([Transfer(*sites, name="t", **transfer)], control=control)
    with pytest.raises(ValueError, match=r"transfer t.target.mode factor is unknown: use one of full, svd"):
        Exchange([Transfer(sites[0], Site(models["perceptron"], "inner.weight", "factor"), name="t")])  # type: ignore[arg-type]


def test_a_loop_that_never_lets_the_adapters_learn_is_warned() -> None:
    exchange = Exchange([Transfer(*(Site(nn.Linear(5, 4), "weight") for _ in range(2)), cycle=1, name="a")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exchange.propose()
        exchange.learn()
        exchange.propose()
    with pytest.warns(UserWarning, match=r"call learn\(\) after the steps"):
        exchange.propose()


def test_the_state_of_other_transfers_is_refused() -> None:
    models = build_pair()
    sites = Site(models["conv"], "fc.weight"), Site(models["perceptron"], "inner.weight")
    saved = Exchange([Transfer(*sites, name="there")]).state_dict()
    with pytest.raises(ValueError, match="the saved exchange has the transfers there, and this one back"):
        Exchange([Transfer(*sites, name="back")]).load_state_dict(saved)


# --- controls ---


def proposal_under(control: Any, scale: float = 1.0, adapter: AdapterConfig = PLAIN, seed: int = 0) -> Tensor:
    """The written weight when the source's rows are multiplied by 1, 2, ... times `scale`."""
    models = build_pair(factor=False)
    with torch.no_grad():
        models["conv"].fc.weight.mul_(torch.arange(1.0, CLASSES + 1)[:, None] * scale)
    transfer = Transfer(
        Site(models["conv"], "fc.weight"), Site(models["perceptron"], "head.weight"), 1, adapter, name="t"
    )
    Exchange([transfer], control=control, seed=seed).propose()
    return models["perceptron"].head.weight.detach()


def test_noise_control_shows_nothing_of_the_source() -> None:
    shape = AdapterConfig(kind="aligned", gate=0.9)
    assert torch.allclose(proposal_under("noise", 1.0, shape), proposal_under("noise", 3.0, shape), atol=1e-6)
    assert not torch.allclose(proposal_under("transfer", 1.0, shape), proposal_under("noise", 1.0, shape), atol=1e-3)


def test_shuffled_control_shows_the_same_rows_in_another_fixed_order() -> None:
    seen = []
    for _ in range(2):
        models = build_pair(factor=False)
        source, target = Site(models["conv"], "fc.weight"), Site(models["perceptron"], "head.weight")
        exchange = Exchange([Transfer(source, target, 1, ALIGNED, name="t")], control="shuffled", seed=4)
        inputs = adapter_inputs(exchange)
        exchange.propose()
        seen.append(inputs["t"][1])
    rows = models["conv"].fc.weight.detach()
    assert torch.equal(seen[0], seen[1]), "fixed by the seed"
    assert not torch.equal(seen[0], rows)
    assert {tuple(row) for row in seen[0].tolist()} == {tuple(row) for row in rows.tolist()}
    assert not any(torch.equal(a, b) for a, b in zip(seen[0], rows, strict=True)), "no row keeps its place"


def test_shuffled_control_says_where_it_says_little() -> None:
    models = build_pair()
    with pytest.warns(UserWarning, match="can learn to undo"):
        Exchange(mutual(models), control="shuffled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source, target = Site(Convolutions(), "fc.weight"), Site(Perceptron(), "head.weight")
        Exchange([Transfer(source, target, 1, ALIGNED)], control="shuffled")


def test_frozen_control_never_changes_the_adapter_and_transfer_does() -> None:
    for control, learns in (("frozen", False), ("transfer", True)):
        models = build_pair()
        exchange = Exchange(mutual(models), control=control)
        start = copy.deepcopy({n: a.state_dict() for n, a in exchange.adapters().items()})
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models.values()]
        exchange.propose()
        for model, optimizer in zip(models.values(), optimizers, strict=True):
            step_plain(model, optimizer, 0)
            optimizer.step()
        exchange.learn()
        same = all(
            torch.equal(v, start[n][k]) for n, a in exchange.adapters().items() for k, v in a.state_dict().items()
        )
        assert same is not learns


def test_standardise_control_writes_standardised_rows_without_an_adapter() -> None:
    before = build_pair(factor=False)["perceptron"].head.weight.detach()
    rows = (before - before.mean(1, keepdim=True)) / before.std(1, keepdim=True, correction=0)
    published = AdapterConfig(output="layernorm")
    torch.testing.assert_close(proposal_under("standardise", 1.0, published), rows)
    whole = rows * before.std(correction=0) + before.mean()
    torch.testing.assert_close(proposal_under("standardise"), before + 0.12 * (whole - before))


def test_none_control_touches_nothing_and_has_no_adapter() -> None:
    models = build_pair()
    before = copy.deepcopy({n: m.state_dict() for n, m in models.items()})
    exchange = Exchange(mutual(models), control="none")
    exchange.propose()
    exchange.observe()
    assert exchange.learn() == {}
    assert exchange.adapters() == {}
    for name, model in models.items():
        assert all(torch.equal(v, before[name][k]) for k, v in model.state_dict().items())


# --- ranks ---


def adapters_with_dropout(stage: int) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)  # the models' own dropout would differ between ranks
    engines = {
        name: build_engine(model, optim=OPTIMS["adamw"], zero=zero(stage), micro_batch=4)
        for name, model in build_pair().items()
    }
    exchange = Exchange(mutual(engines, DROPOUT))
    torch.manual_seed(100 + rank)
    undisturbed = True
    for step in range(9):
        stream = torch.get_rng_state()
        exchange.propose()
        undisturbed &= torch.equal(stream, torch.get_rng_state())
        for engine in engines.values():
            engine.backward(loss(engine, batch(step, rank, world)))
            engine.step()
        exchange.learn()
        undisturbed &= torch.equal(stream, torch.get_rng_state())
    state = {f"{n}.{k}": v for n, a in exchange.adapters().items() for k, v in a.state_dict().items()}
    for engine in engines.values():
        engine.destroy()
    return {"state": state, "undisturbed": undisturbed}


@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_are_equal_on_all_ranks_with_dropout_on_and_leave_the_models_randomness_alone(
    ranks: Any, stage: int
) -> None:
    first, second = ranks(2).run(adapters_with_dropout, stage)
    assert first["undisturbed"]
    assert second["undisturbed"]
    assert first["state"].keys() == second["state"].keys()
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key


def untouched_by_a_closed_gate(stage: int, precision: str, mode: Any, adapter: AdapterConfig) -> tuple[bool, bool]:
    """Three steps of training, then a proposal: whether the loss, and the masters, stayed equal to the bit."""
    pair = build_pair(factor=mode == "factor", batch_norm=False)
    engine = build_engine(pair["perceptron"], optim=OPTIMS["sgd"], zero=zero(stage), precision=precision, micro_batch=4)
    rows = batch(0, dist.get_rank(), dist.get_world_size())
    for _ in range(3):  # away from values that bf16 holds exactly
        engine.backward(loss(engine, rows))
        engine.step()
    exchanged = "full" if mode == "factor" else mode
    target = Site(engine, "inner.weight", exchanged, 3)
    exchange = Exchange([Transfer(Site(pair["conv"], "fc.weight"), target, 1, adapter)])
    weight = exchange.paths[0].target.weight
    with torch.no_grad():
        before, master = float(loss(engine, rows)), params.read([weight])[0]
        exchange.propose()
        after, written = float(loss(engine, rows)), params.read([weight])[0]
    engine.destroy()
    return before == after, torch.equal(master, written)


@pytest.mark.parametrize("mode", ["factor", "full", "svd"])
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_with_the_gate_at_zero_a_target_and_its_loss_are_unchanged_to_the_bit(
    ranks: Any, stage: int, precision: str, mode: str
) -> None:
    closed, published = AdapterConfig(heads=2, gate=0.0), AdapterConfig(heads=2, output="layernorm")
    assert ranks(2).run(untouched_by_a_closed_gate, stage, precision, mode, closed) == [(True, True)] * 2
    assert ranks(2).run(untouched_by_a_closed_gate, stage, precision, mode, published) == [(False, False)] * 2


def test_a_proposal_reaches_the_fp32_master_of_a_bf16_weight_unrounded(ranks: Any) -> None:
    assert all(ranks(2).run(bf16_master_holds_the_proposal))


def bf16_master_holds_the_proposal() -> bool:
    pair = build_pair(batch_norm=False)
    engine = build_engine(pair["perceptron"], optim=OPTIMS["sgd"], zero=zero(1), precision="bf16", micro_batch=4)
    exchange = Exchange([Transfer(Site(pair["conv"], "fc.weight"), Site(engine, "inner.weight"), 1, PLAIN)])
    exchange.propose()
    path = exchange.paths[0]
    master = params.read([path.target.weight])[0]
    rounded = path.accepted.bfloat16().float()
    engine.destroy()
    return torch.equal(master, path.accepted) and not torch.equal(master, rounded)


# --- faults ---


def poisoned() -> tuple[dict[str, nn.Module], Exchange]:
    models = build_pair()
    exchange = Exchange(mutual(models))
    with torch.no_grad():
        next(exchange.adapters()["to_conv"].body.parameters()).fill_(float("nan"))
    return models, exchange


def test_a_proposal_that_is_not_finite_is_not_written_and_the_other_transfer_still_is() -> None:
    models, exchange = poisoned()
    hit, other = factor_parameter(models["conv"], "conv.weight"), factor_parameter(models["perceptron"], "inner.weight")
    before_hit, before_other = hit.detach().clone(), other.detach().clone()
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in models.values()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(5):
            exchange.propose()
            if step == 0:
                assert torch.equal(hit, before_hit)
                assert not torch.equal(other, before_other)
            for model, optimizer in zip(models.values(), optimizers, strict=True):
                step_plain(model, optimizer, step)
                optimizer.step()
            log = exchange.learn()
            if step == 0:
                assert log["to_conv/skipped"] == 1
                assert log["to_perceptron/skipped"] == 0
    assert [str(w.message) for w in said] == [
        "transfer to_conv: the proposal at step 0 was not finite, nothing was written."
    ]
    assert all(p.isfinite().all() for m in models.values() for p in m.parameters())


def test_the_last_proposal_of_a_run_is_warned_about_once_when_it_is_saved() -> None:
    _, exchange = poisoned()
    exchange.propose()
    with pytest.warns(UserWarning, match="step 0 was not finite"):
        exchange.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exchange.state_dict()


def test_a_rejected_proposal_resets_no_moments() -> None:
    models = build_pair()
    optimizer = torch.optim.SGD(models["perceptron"].parameters(), 0.1, momentum=0.9)
    for step in range(2):
        step_plain(models["perceptron"], optimizer, step)
        optimizer.step()
    buffer = optimizer.state[factor_parameter(models["perceptron"], "inner.weight")]["momentum_buffer"]
    site = Site(models["perceptron"], "inner.weight", optimizer=optimizer)
    exchange = Exchange([Transfer(Site(models["conv"], "fc.weight"), site, moments="reset", name="t")])
    with torch.no_grad():
        next(exchange.adapters()["t"].body.parameters()).fill_(float("nan"))
    exchange.propose()
    assert float(buffer.abs().sum()) > 0


def test_exact_without_observe_says_so() -> None:
    models = build_pair()
    exchange = Exchange(mutual(models, update="exact"))
    exchange.propose()
    with pytest.raises(RuntimeError, match="observe"):
        exchange.learn()


def test_a_schedule_without_the_run_s_length_is_refused() -> None:
    models = build_pair()
    with pytest.raises(ValueError, match=r"Exchange\(steps="):
        Exchange(mutual(models, schedule=Schedule(name="cosine")))


def test_a_weight_that_is_a_product_of_factors_is_no_site() -> None:
    model = Fused()
    factorise(model, "qkv.weight[v]", 2)
    with pytest.raises(ValueError, match="factorised"):
        Exchange([Transfer(Site(Perceptron(), "head.weight"), Site(model, "qkv.weight[q]"))])


def test_a_whole_projection_and_its_third_are_not_both_targets() -> None:
    source, model = Perceptron(), Fused()
    whole = Transfer(Site(source, "head.weight"), Site(model, "qkv.weight"), name="whole")
    third = Transfer(Site(source, "head.weight"), Site(model, "qkv.weight[v]"), name="third")
    with pytest.raises(ValueError, match="whole and third write the same weight"):
        Exchange([whole, third])


def drifted_adapters() -> dict[str, Tensor]:
    """What is left of a difference between ranks: adapters that differ propose the first rank's value all the same."""
    models = build_pair()
    exchange = Exchange(mutual(models))
    with torch.no_grad():
        for adapter in exchange.adapters().values():
            for parameter in adapter.parameters():
                parameter.add_(1e-3 * dist.get_rank())
    exchange.propose()
    return {name: p.detach().clone() for model in models.values() for name, p in model.named_parameters()}


def test_every_rank_writes_the_first_rank_s_proposal(ranks: Any) -> None:
    first, second = ranks(2).run(drifted_adapters)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_five_proposals_in_a_row_that_are_not_finite_end_the_run() -> None:
    _, exchange = poisoned()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4 * 5):
            exchange.propose()
        with pytest.raises(TransferDiverged, match="to_conv: 5 proposals in a row"):
            exchange.propose()


@pytest.mark.parametrize("reads", ["weight", "change"])
def test_an_exchange_continues_from_its_state(reads: Any) -> None:
    def run(steps: range, models: dict[str, nn.Module], exchange: Exchange, optimizers: list[Any]) -> None:
        for step in steps:
            exchange.propose()
            for model, optimizer in zip(models.values(), optimizers, strict=True):
                step_plain(model, optimizer, step)
                optimizer.step()
            exchange.learn()

    def fresh() -> tuple[dict[str, nn.Module], Exchange, list[Any]]:
        models = build_pair()
        return (
            models,
            Exchange(mutual(models, DROPOUT, reads=reads)),
            [torch.optim.SGD(m.parameters(), 0.1) for m in models.values()],
        )

    models, exchange, optimizers = fresh()
    run(range(6), models, exchange, optimizers)
    saved = copy.deepcopy(({n: m.state_dict() for n, m in models.items()}, exchange.state_dict()))
    run(range(6, 12), models, exchange, optimizers)

    again, resumed, fresh_optimizers = fresh()
    for name, model in again.items():
        model.load_state_dict(saved[0][name])
    resumed.load_state_dict(saved[1])
    run(range(6, 12), again, resumed, fresh_optimizers)
    for name, adapter in exchange.adapters().items():
        for key, value in adapter.state_dict().items():
            assert torch.equal(value, resumed.adapters()[name].state_dict()[key]), key
    for name, model in models.items():
        assert all(torch.equal(v, again[name].state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: {"target": Site(p, "norm.weight")}, "norm.weight"),
        (lambda p: {"target": Site(p, "iner.weight")}, "inner.weight"),
        (lambda p: {"target": Site(p, "inner.weight", "svd", 99)}, "rank 99"),
        (lambda p: {"cycle": 0}, "cycle 0"),
        (lambda p: {"adapter": AdapterConfig(heads=65)}, "heads"),
        (lambda p: {"target": Site(p.requires_grad_(False), "inner.weight")}, "frozen"),
    ],
)
def test_what_cannot_take_part_is_refused_in_one_sentence(change: Any, words: str) -> None:
    source, target = Convolutions(), Perceptron()
    options = {"source": Site(source, "fc.weight"), "target": Site(target, "inner.weight")} | change(target)
    with pytest.raises(ValueError, match=words) as refusal:
        Exchange([Transfer(**options)])
    assert str(refusal.value).endswith(".")


def test_transfers_without_a_name_get_different_ones() -> None:
    models = [Perceptron() for _ in range(3)]
    transfers = [Transfer(Site(models[0], "head.weight"), Site(m, "inner.weight")) for m in models[1:]]
    exchange = Exchange(transfers)
    assert list(exchange.adapters()) == ["head.weight->inner.weight", "head.weight->inner.weight #2"]
    assert set(exchange.state_dict()["paths"]) == set(exchange.adapters())


def test_two_transfers_into_one_weight_are_refused() -> None:
    source, target = Convolutions(), Perceptron()
    one = Transfer(Site(source, "fc.weight"), Site(target, "inner.weight"), name="one")
    two = Transfer(Site(source, "conv.weight"), Site(target, "inner.weight"), name="two")
    with pytest.raises(ValueError, match=r"one and two write the same weight inner\.weight"):
        Exchange([one, two])
