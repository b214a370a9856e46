"""MergeNet between DeepSpeed engines equals MergeNet written down plainly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from rounding import Nudge, assert_close, movement, result_of
from small import PLAIN, SITES, batch, build_pair, loss, zero
from torch import Tensor, nn

from hetero_kt.config import AdapterConfig, Optim, Schedule
from hetero_kt.distributed import params
from hetero_kt.distributed.engine import build_engine
from hetero_kt.distributed.learner import Learner
from hetero_kt.methods.mergenet import Exchange, MergeNet, Site, Transfer
from hetero_kt.nn.reencode import factor_parameter
from hetero_kt.optimizer import Rates

STEPS = 10  # with cycle 4, transfers at 0, 4 and 8
OPTIMS = {
    "sgd": Optim(name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adamw": Optim(name="adamw", lr=1e-2, weight_decay=1e-2),
}
ADAPTER_OPTIMS = {  # SGD where adapters are compared: Adam amplifies the rounding of gradients that are truly zero
    "sgd": Optim(name="sgd", lr=0.5, momentum=0.9, weight_decay=1e-2, clip=50.0),
    "adamw": Optim(name="adamw", lr=1e-2, weight_decay=1e-2, clip=50.0),
}


def mutual(
    owners: dict[str, Any], adapter: AdapterConfig = PLAIN, optim: str = "adamw", **options: Any
) -> list[Transfer]:
    return [
        Transfer(
            Site(owners[source[0]], source[1]),
            Site(owners[target[0]], target[1]),
            adapter=adapter,
            optim=ADAPTER_OPTIMS[optim],
            name=name,
            **options,
        )
        for name, (source, target) in SITES.items()
    ]


# --- the reference: one process, plain PyTorch, nothing of the exchange but its adapters' first values ---


def reference(
    optim: str, world: int, update: str = "lookahead", rows: Callable[..., Any] = batch, *, nudge: Nudge
) -> dict[str, dict[str, Tensor]]:
    models = build_pair()
    adapters = copy.deepcopy(Exchange(mutual(models)).adapters())
    nudge.modules([*models.values(), *adapters.values()])
    start = {n: copy.deepcopy(adapter.state_dict()) for n, adapter in adapters.items()}
    optimizers = {name: _optimizer(model, OPTIMS[optim]) for name, model in models.items()}
    teachers = {name: _optimizer(adapter, ADAPTER_OPTIMS[optim]) for name, adapter in adapters.items()}
    buffers = [{n: copy.deepcopy(dict(m.named_buffers())) for n, m in models.items()} for _ in range(world)]
    sources = {name: factor_parameter(models[s[0]], s[1]) for name, (s, _) in SITES.items()}
    targets = {name: factor_parameter(models[t[0]], t[1]) for name, (_, t) in SITES.items()}
    for step in range(STEPS):
        proposals = {}
        if step % 4 == 0:
            read = {n: (targets[n].detach().clone(), sources[n].detach().clone()) for n in SITES}
            proposals = {n: adapters[n](*read[n]) for n in SITES}  # both sides are read before either is written
            for n, proposal in proposals.items():
                targets[n].data.copy_(proposal.detach())
        for name, model in models.items():
            optimizers[name].zero_grad()
            for rank in range(world):  # BatchNorm sees one rank's rows, so the ranks take turns
                _set_buffers(model, buffers[rank][name])
                x, y = rows(step, rank, world)
                (loss(model, (nudge(x), y)) / world).backward()
                buffers[rank][name] = copy.deepcopy(dict(model.named_buffers()))
        seen = {n: targets[n].grad.detach().clone() for n in proposals}
        for optimizer in optimizers.values():
            optimizer.step()
        for n, proposal in proposals.items():
            cotangent = seen[n] if update == "exact" else proposal.detach() - targets[n].detach()
            teachers[n].zero_grad()
            proposal.backward(cotangent)
            nn.utils.clip_grad_norm_(adapters[n].parameters(), 50.0)
            teachers[n].step()
    for n, adapter in adapters.items():
        assert any(float((v - start[n][k]).abs().max()) > 1e-4 for k, v in adapter.state_dict().items()), "learnt"
    states = {name: {k: p.detach() for k, p in model.named_parameters()} for name, model in models.items()}
    if optim == "adamw":
        del states["conv"]["conv.bias"]  # in front of a norm: no gradient but rounding
    return states | {n: dict(adapter.state_dict()) for n, adapter in adapters.items()} | {"logits": _logits(models)}


def _optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    if optim.name == "sgd":
        return torch.optim.SGD(model.parameters(), optim.lr, optim.momentum, weight_decay=optim.weight_decay)
    return torch.optim.AdamW(model.parameters(), optim.lr, weight_decay=optim.weight_decay)


def _set_buffers(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.data.copy_(values[name])


def _logits(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    x, _ = batch(99)
    for model in models.values():
        model.train()  # the batch's own statistics, so that no rank's running ones matter
    with torch.no_grad():
        return {n: model(x.to(next(model.parameters()).dtype)).float() for n, model in models.items()}


# --- the same on engines ---


def build_engines(
    stage: int, optim: Optim, precision: str = "fp32", batch_norm: bool = True, **options: Any
) -> dict[str, Any]:
    return {
        name: build_engine(model, optim=optim, zero=zero(stage), precision=precision, **options)
        for name, model in build_pair(batch_norm=batch_norm).items()
    }


def train(
    stage: int,
    optim: Optim,
    update: str = "lookahead",
    precision: str = "fp32",
    accumulation: int = 1,
    batch_norm: bool = True,
    adapter: AdapterConfig = PLAIN,
    control: Any = "transfer",
) -> dict[str, Any]:
    """Ten steps of the method; parameters, adapters and logits as one process would have them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    engines = build_engines(
        stage,
        optim,
        precision,
        batch_norm and precision != "bf16",
        micro_batch=8 // world // accumulation,
        accumulation=accumulation,
    )
    exchange = Exchange(mutual(engines, adapter, optim.name, update=update), control=control)
    learners = {
        name: Learner(engine, Rates(engine.optimizer, Schedule(name="constant"), STEPS))
        for name, engine in engines.items()
    }
    method = MergeNet(learners, exchange, dict.fromkeys(engines, loss))
    losses = []
    for step in range(STEPS):
        rows = batch(step, rank, world)
        log = method.step(step, dict.fromkeys(engines, rows))
        losses.append([float(log["conv/loss"]), float(log["perceptron/loss"])])
        if stage == 3:  # else the test would test nothing
            for engine in engines.values():
                for parameter in engine.module.parameters():
                    assert parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
    result: dict[str, Any] = {
        name: {k: v for k, v in params.state_dict(e).items() if k in dict(e.module.named_parameters())}
        for name, e in engines.items()
    }
    result |= {name: dict(adapter.state_dict()) for name, adapter in exchange.adapters().items()}
    result |= {"logits": _logits(engines), "losses": losses, "traffic": exchange.traffic}
    for engine in engines.values():
        engine.destroy()
    return result


MODELS = ["conv", "perceptron"]
EVERYTHING = [*MODELS, *SITES, "logits"]


def assert_equal(ours: dict[str, Any], names: list[str], *reference_of: Any) -> None:
    """Parts of a run are the reference's, but for rounding."""
    theirs = result_of(reference, *reference_of)
    assert_close(ours, {name: theirs[name] for name in names}, movement(reference, reference_of[0], 2))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ten_steps_with_three_mutual_transfers_equal_the_plain_reference(ranks: Any, world: int, stage: int) -> None:
    result = ranks(world).run(train, stage, OPTIMS["sgd"])
    for one in result:
        assert_equal(one, EVERYTHING, "sgd", world)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_same_with_adamw(ranks: Any, world: int, stage: int) -> None:
    result = ranks(world).run(train, stage, OPTIMS["adamw"])[0]
    del result["conv"]["conv.bias"]
    assert_equal(result, [*MODELS, "logits"], "adamw", world)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_exact_learns_from_the_gradient_averaged_over_ranks(ranks: Any, world: int, stage: int) -> None:
    result = ranks(world).run(train, stage, OPTIMS["sgd"], "exact")[0]
    assert_equal(result, EVERYTHING, "sgd", world, "exact")


def halves(step: int, turn: int, turns: int) -> tuple[Tensor, Tensor]:
    """The micro-batches of one rank, as the ranks' turns of the reference."""
    x, y = batch(step)
    return x.chunk(turns)[turn], y.chunk(turns)[turn]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulated_micro_batches_equal_averaged_gradients(ranks: Any, stage: int) -> None:
    result = ranks(1).run(train, stage, OPTIMS["sgd"], "exact", "fp32", 2)[0]
    assert_equal(result, EVERYTHING, "sgd", 2, "exact", halves)


def forgets_masters(patch: pytest.MonkeyPatch) -> None:
    for name in ("safe_set_full_fp32_param", "safe_set_local_fp32_param"):
        patch.setattr(deepspeed.utils, name, lambda parameter, value: None)


def writes_masters_alone(patch: pytest.MonkeyPatch) -> None:
    def write(weights: Any, *args: Any) -> None:
        shown = [weight.parameter.data.clone() for weight in weights]
        whole(weights, *args)
        for weight, value in zip(weights, shown, strict=True):
            weight.parameter.data.copy_(value)

    whole = params.write
    patch.setattr(params, "write", write)


def loses_gradients(patch: pytest.MonkeyPatch) -> None:
    """One of two micro-batches', or one of two ranks'."""

    def backward(engine: DeepSpeedEngine, value: Tensor, **options: Any) -> Any:
        turn = engine.micro_steps % 2 if dist.get_world_size() == 1 else dist.get_rank()
        return whole(engine, value * turn, **options)

    whole = DeepSpeedEngine.backward
    patch.setattr(DeepSpeedEngine, "backward", backward)


def counts_a_row_twice(patch: pytest.MonkeyPatch) -> None:
    """In place of another, on one of two ranks."""

    def rows(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        x, y = whole(step, rank, world)
        if world == 2 and rank == 1:
            x[1], y[1] = x[0], y[0]
        return x, y

    whole = batch
    patch.setitem(globals(), "batch", rows)


def train_with(fault: Callable[[pytest.MonkeyPatch], None], stage: int, accumulation: int) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        return train(stage, OPTIMS["sgd"], "exact", "fp32", accumulation)


@pytest.mark.parametrize(
    ("fault", "world", "stage"),
    [
        (forgets_masters, 2, 1),
        (forgets_masters, 2, 3),
        (writes_masters_alone, 2, 2),
        (loses_gradients, 1, 1),
        (loses_gradients, 2, 2),
        (counts_a_row_twice, 2, 3),
    ],
)
def test_a_fault_lies_beyond_what_rounding_moves(ranks: Any, fault: Any, world: int, stage: int) -> None:
    """Else the comparisons above would hold whatever happens."""
    turns = (2, "exact", halves) if world == 1 else (2, "exact")
    result = ranks(world).run(train_with, fault, stage, 3 - world)[0]
    for part in ("conv", "perceptron"):
        with pytest.raises(AssertionError, match=f"^{part}.* off, and rounding moves {part} by"):
            assert_equal(result, [part], "sgd", *turns)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("precision", "update"), [("autocast", "lookahead"), ("bf16", "lookahead"), ("bf16", "exact")])
def test_bf16_losses_stay_within_two_per_cent_and_a_lost_write_would_show(
    ranks: Any, stage: int, precision: str, update: str
) -> None:
    run, batch_norm = ranks(2).run, precision != "bf16"
    wide_open = AdapterConfig(heads=2, dropout=0.0, ff_dropout=0.0, gate=0.9)
    low = run(train, stage, OPTIMS["sgd"], update, precision, 1, batch_norm, wide_open)[0]["losses"]
    full = run(train, 1, OPTIMS["sgd"], update, "fp32", 1, batch_norm, wide_open)[0]["losses"]
    lost = run(train, 1, OPTIMS["sgd"], update, "fp32", 1, batch_norm, wide_open, "none")[0]["losses"]
    low, full, lost = (torch.tensor(values) for values in (low, full, lost))
    torch.testing.assert_close(low, full, rtol=0.02, atol=0.0)
    assert ((full - lost).abs() / full).max() > 0.1
