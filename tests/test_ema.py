"""The average of weights that ZeRO keeps in pieces, against timm's average of one whole model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from rounding import Nudge, assert_close, movement, result_of
from small import Convolutions, batch, loss, zero
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from hetero_kt.config import Optim
from hetero_kt.distributed import ema, params
from hetero_kt.distributed.ema import EMA
from hetero_kt.distributed.engine import build_engine
from hetero_kt.distributed.params import Weight, read

STEPS, DECAY = 5, 0.6  # warm-up reaches 0.6 at the fourth update
SGD = Optim("sgd", lr=0.1, momentum=0.9, weight_decay=0.0)
EVERYWHERE = [(stage, world) for stage in (0, 1, 2, 3) for world in (1, 2)]


def model_of(precision: str = "fp32") -> nn.Module:
    """Sizes that do not divide by 2 ranks, a frozen weight and a buffer that no state dict holds."""
    torch.manual_seed(0)
    model = Convolutions(batch_norm=precision == "fp32")
    model.fc.bias.requires_grad_(False)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)
    return model


def engine_of(stage: int, precision: str = "fp32", **block: Any) -> Any:
    world = dist.get_world_size()
    settings = zero(stage) | block
    return build_engine(model_of(precision), optim=SGD, zero=settings, precision=precision, micro_batch=8 // world)


def train(engine: Any, average: EMA, steps: range) -> None:
    for step in steps:
        engine.backward(loss(engine, batch(step, dist.get_rank(), dist.get_world_size())))
        engine.step()
        average.update()


def state_of(engine: Any) -> dict[str, Tensor]:
    """All that an evaluation may not change: masters, what forward uses, buffers."""
    state = {f"buffer {name}": buffer.clone() for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        shown = parameter.detach()
        if hasattr(parameter, "ds_tensor"):  # behind its part of the weight lies padding, of any value
            start = dist.get_rank() * parameter.ds_tensor.ds_numel
            shown = parameter.ds_tensor.detach()[: max(0, parameter.ds_numel - start)]
        state[f"shown {name}"] = shown.clone()
        state[f"read {name}"] = read([Weight(engine, parameter)])[0]
    return state


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def whole(average: EMA) -> dict[str, Tensor]:
    """The averaged weights on every rank."""
    return {piece.name: value.clone() for piece, value in average._whole()}


def buffers(average: EMA) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in average.buffers().items()}


def reference(world: int, nudge: Nudge) -> dict[str, list[list[dict[str, Tensor]]]]:
    """After each step, timm's averages of a plain model that each rank would have: own buffers, common weights."""
    models = [model_of() for _ in range(world)]
    nudge.modules(models[:1])
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    found = []
    averages = [ModelEmaV3(model, decay=DECAY, use_warmup=True) for model in models]
    trained = [p for p in models[0].parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank, model in enumerate(models):
            model.zero_grad()
            x, y = batch(step, rank, world)
            loss(model, (nudge(x), y)).backward()
        for of_ranks in zip(*(model.parameters() for model in models), strict=True):
            if of_ranks[0].requires_grad:
                of_ranks[0].grad = torch.stack([p.grad for p in of_ranks]).mean(0)
        optimizer.step()
        for model in models[1:]:
            model.load_state_dict(dict(models[0].named_parameters()), strict=False)
        for model, of_rank in zip(models, averages, strict=True):
            of_rank.update(model, step=step + 1)
        found.append([averages_of(one.module.state_dict()) for one in averages])
    return {f"rank {rank}": [of_ranks[rank] for of_ranks in found] for rank in range(world)}


def averages_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items() if name != "fc.bias"}  # which is frozen


def on_engine(stage: int) -> list[dict[str, Tensor]]:
    engine = engine_of(stage)
    average = EMA(engine, DECAY)
    found = []
    for step in range(STEPS):
        train(engine, average, range(step, step + 1))
        found.append(whole(average) | buffers(average))
    if stage == 3:
        assert engine.module.conv.weight.ds_status == ZeroParamStatus.NOT_AVAILABLE
    assert not torch.allclose(whole(average)["conv.weight"], params.state_dict(engine)["conv.weight"])
    engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "world"), EVERYWHERE)
def test_the_average_is_timm_s_of_one_whole_model(ranks: Any, stage: int, world: int) -> None:
    found = {f"rank {rank}": averages for rank, averages in enumerate(ranks(world).run(on_engine, stage))}
    assert_close(found, result_of(reference, world), movement(reference, world))


def against_masters(stage: int, precision: str, block: dict[str, Any]) -> tuple[bool, bool]:
    """timm's average over the masters as they are after each step."""
    engine = engine_of(stage, precision, **block)
    average = EMA(engine, DECAY)
    shadow = model_of(precision)
    expected = ModelEmaV3(shadow, decay=DECAY, use_warmup=True)
    for step in range(STEPS):
        train(engine, average, range(step, step + 1))
        shadow.load_state_dict(params.state_dict(engine))
        expected.update(shadow, step=step + 1)
    found = whole(average)
    names = found.keys()
    fine = any(not torch.equal(value, value.bfloat16().float()) for value in found.values())
    equal = all(torch.equal(found[name], expected.module.state_dict()[name]) for name in names)
    engine.destroy()
    return equal, fine


@pytest.mark.parametrize(
    ("stage", "precision", "block"),
    [
        (0, "autocast", {}),
        (1, "autocast", {}),
        (3, "autocast", {}),
        (1, "bf16", {}),
        (2, "bf16", {}),
        (3, "bf16", {}),
        (2, "fp32", {"offload_optimizer": {"device": "cpu"}}),
        (3, "fp32", {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
        (3, "fp32", {"stage3_param_persistence_threshold": 10_000}),
    ],
)
def test_masters_are_averaged_in_fp32_to_the_bit(ranks: Any, stage: int, precision: str, block: dict[str, Any]) -> None:
    for equal, fine in ranks(2).run(against_masters, stage, precision, block):
        assert equal
        assert fine, "no weight has more digits than bf16"


def applying(stage: int, precision: str, block: dict[str, Any]) -> dict[str, bool]:
    engine = engine_of(stage, precision, **block)
    average = EMA(engine, DECAY)
    x = batch(99)[0]
    model = engine.module

    def logits(of: nn.Module) -> Tensor:
        of.eval()
        with torch.no_grad():
            result = of(x.to(next(of.parameters()).dtype)).clone()
        of.train()
        return result

    train(engine, average, range(3))
    logits(model)  # leaves weights of a ZeRO-3 model gathered, for a backward that does not come
    before = state_of(engine)
    saved, local = whole(average), buffers(average)
    plain = model_of(precision)
    plain.load_state_dict(saved | local, strict=False)
    plain.to(next(model.parameters()).dtype)
    result = {}
    with average.applied():
        result["computes"] = torch.allclose(logits(model), logits(plain), rtol=0, atol=1e-6)
        result["again"] = torch.allclose(logits(engine), logits(plain), rtol=0, atol=1e-6)
        inside = params.state_dict(engine)
        result["reads"] = all(torch.equal(inside[name], saved[name]) for name in saved)
        result["buffers"] = all(torch.equal(inside[name], local[name]) for name in local)
    result["restored"] = same(state_of(engine), before)
    result["average kept"] = same(whole(average), saved) and same(buffers(average), local)
    try:
        with average.applied():
            logits(model)
            raise KeyError("an evaluation that fails")
    except KeyError:
        result["restored after an error"] = same(state_of(engine), before)
    # What is restored is also what training goes on with.
    other = engine_of(stage, precision, **block)
    train(other, EMA(other, DECAY), range(5))
    train(engine, average, range(3, 5))
    result["goes on"] = same(state_of(engine), state_of(other))
    result["differs"] = not torch.equal(before["read conv.weight"], saved["conv.weight"])
    engine.destroy()
    other.destroy()
    return result


@pytest.mark.parametrize(
    ("stage", "precision", "block"),
    [
        *[(stage, "fp32", {}) for stage in (0, 1, 2, 3)],
        *[(stage, "bf16", {}) for stage in (1, 2, 3)],
        (3, "fp32", {"stage3_param_persistence_threshold": 10_000}),
        (3, "bf16", {"stage3_param_persistence_threshold": 10_000}),
        (3, "fp32", {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    ],
)
def test_the_applied_average_computes_and_leaves_no_trace(
    ranks: Any, stage: int, precision: str, block: dict[str, Any]
) -> None:
    for result in ranks(2).run(applying, stage, precision, block):
        assert all(result.values()), result


class Elsewhere:
    """An engine that says where its pieces are, and no more."""

    def __init__(self, stage: int = 3, dtype: torch.dtype = torch.float32, parts: str = "", hpz: int = 1) -> None:
        self.stage, self.hpz = stage, hpz
        self.module = nn.Linear(2, 2, dtype=dtype)
        self.offload = SimpleNamespace(device=parts) if parts else None

    def zero_optimization_stage(self) -> int:
        return self.stage

    def zero_offload_param(self) -> Any:
        return None

    def zero_offload_optimizer(self) -> Any:
        return self.offload

    def zero_hpz_partition_size(self) -> int:
        return self.hpz


@pytest.mark.parametrize(
    ("engine", "mend"),
    [
        (Elsewhere(stage=0, dtype=torch.bfloat16), "use ZeRO stage 1, or autocast"),
        (Elsewhere(parts="nvme"), "offload them to cpu"),
        (Elsewhere(hpz=2), "leave it at 1"),
    ],
)
def test_masters_that_cannot_be_reached_are_refused_with_the_mend(engine: Any, mend: str) -> None:
    with pytest.raises(ValueError, match=mend):
        EMA(engine, DECAY)


def many_gathers() -> bool:
    """With a bound below a weight's size, so that each one travels alone."""
    engine = engine_of(1)
    average = EMA(engine, DECAY)
    train(engine, average, range(2))
    together = whole(average)
    bound, ema._TOGETHER = ema._TOGETHER, 8
    try:
        alone = whole(average)
    finally:
        ema._TOGETHER = bound
    engine.destroy()
    return same(together, alone)


def test_weights_come_together_in_bounded_runs(ranks: Any) -> None:
    assert all(ranks(2).run(many_gathers))
    assert list(ema._bounded([ema._TOGETHER, 1, 2, ema._TOGETHER - 2, 2 * ema._TOGETHER])) == [[0], [1, 2], [3], [4]]
