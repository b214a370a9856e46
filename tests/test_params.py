"""Reading and writing one weight of a model that ZeRO keeps in pieces: both copies, every stage, odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig
from deepspeed.utils import safe_get_full_fp32_param
from small import zero
from torch import Tensor, nn

from hetero_kt.config import Optim
from hetero_kt.distributed import params
from hetero_kt.distributed.engine import build_engine
from hetero_kt.distributed.params import Traffic, Weight

STILL = {
    "sgd": Optim(name="sgd", lr=0.0, weight_decay=0.0),
    "adamw": Optim(name="adamw", lr=0.0, weight_decay=0.0),
}
STAGES_AND_PRECISIONS = [
    (stage, precision)
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "autocast", "bf16")
    if (stage, precision) != (0, "bf16")
]


class Odd(nn.Module):
    """Weights whose sizes divide by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.second = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def engine_of(stage: int, precision: str = "fp32", optim: str = "adamw", **block: Any) -> Any:
    torch.manual_seed(1)
    return build_engine(Odd(), optim=STILL[optim], zero=zero(stage) | block, precision=precision, micro_batch=4)


def one_step(engine: Any) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.backward(engine(x.to(next(engine.module.parameters()).dtype)).float().square().mean())
    engine.step()


def shown(engine: Any) -> Tensor:
    """The first layer's weight as forward uses it: its outputs on unit vectors."""
    weight = engine.module.first
    with torch.no_grad():
        dtype = weight.bias.dtype
        bias = weight(torch.zeros(1, 3, dtype=dtype))
        return (weight(torch.eye(3, dtype=dtype)) - bias).T.float()


def write_then_step(stage: int, precision: str, moments: str) -> dict[str, Any]:
    engine = engine_of(stage, precision)
    one_step(engine)
    weight = Weight(engine, engine.module.first.weight)
    value = (torch.arange(21.0).reshape(7, 3) - 10) / 16  # exact in bf16 too
    params.write([weight], [value.to(weight.parameter.dtype)], moments)
    at_once = shown(engine)
    one_step(engine)
    result = {"value": value, "at once": at_once, "after a step": shown(engine)}
    master = safe_get_full_fp32_param(weight.parameter)
    result["master"] = value if master is None else master.detach()  # stage 0 keeps one copy only
    result["read"] = params.read([weight])[0]
    result["other"] = params.read([Weight(engine, engine.module.second.weight)])[0]
    torch.manual_seed(1)
    result["other's start"] = Odd().second.weight.detach().to(weight.parameter.dtype).float()
    engine.destroy()
    return result


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("moments", ["keep", "reset"])
@pytest.mark.parametrize(("stage", "precision"), STAGES_AND_PRECISIONS)
def test_a_write_is_seen_by_the_next_forward_and_survives_the_next_step(
    ranks: Any, stage: int, precision: str, world: int, moments: str
) -> None:
    for result in ranks(world).run(write_then_step, stage, precision, moments):
        for place in ("master", "read"):
            assert torch.equal(result[place], result["value"]), place
        for place in ("at once", "after a step"):  # shown through a bf16 product: rounded
            torch.testing.assert_close(result[place], result["value"], atol=0.02, rtol=0.0)
        assert torch.equal(result["other"], result["other's start"]), "a neighbour was written"


def persisted_write() -> bool:
    """Small ZeRO-3 weights that stay whole on every rank have a third copy."""
    engine = engine_of(3, stage3_param_persistence_threshold=10_000)
    one_step(engine)
    weight = Weight(engine, engine.module.first.weight)
    assert weight.parameter.numel() == 21, "persisted"
    value = torch.arange(21.0).reshape(7, 3)
    params.write([weight], [value])
    seen = torch.equal(weight.parameter.data, value)
    one_step(engine)
    kept = torch.equal(params.read([weight])[0], value)
    engine.destroy()
    return seen and kept


def test_a_zero3_weight_that_persists_is_written_too(ranks: Any) -> None:
    assert all(ranks(2).run(persisted_write))


def moments_after_write(stage: int, optim: str, moments: str) -> list[float]:
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = engine_of(stage, optim=optim)
    for _ in range(2):
        one_step(engine)
    weight = Weight(engine, engine.module.first.weight)
    params.write([weight], [torch.zeros(7, 3)], moments)
    sums = []
    for parameter in (engine.module.first.weight, engine.module.second.weight):
        for key in ("exp_avg", "exp_avg_sq") if optim == "adamw" else ("momentum_buffer",):
            if stage == 0:
                state = engine.optimizer.state[parameter][key]
            else:
                state = safe_get_full_optimizer_state(parameter, key)
            sums.append(float(state.abs().sum()))
    engine.destroy()
    return sums


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_moments_are_kept_or_reset_and_only_those_of_the_written_weight(ranks: Any, stage: int, optim: str) -> None:
    kept = ranks(2).run(moments_after_write, stage, optim, "keep")[0]
    reset = ranks(2).run(moments_after_write, stage, optim, "reset")[0]
    half = len(kept) // 2
    assert all(value > 0 for value in kept)
    assert all(value == 0 for value in reset[:half])
    assert reset[half:] == kept[half:]


def read_both(stage: int, precision: str) -> tuple[bool, Traffic, int]:
    engine, other = engine_of(stage, precision), engine_of(stage, precision)
    weights = [Weight(engine, engine.module.first.weight), Weight(other, other.module.second.weight)]
    traffic = Traffic()
    first, second = params.read(weights, traffic)
    torch.manual_seed(1)
    model = Odd()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    right = torch.equal(first, model.first.weight.to(dtype).float()) and torch.equal(
        second, model.second.weight.to(dtype).float()
    )
    for each in (engine, other):
        each.destroy()
    return right, traffic, 4 * (22 + 36)  # 21 and 35 elements, each padded to two ranks


@pytest.mark.parametrize(("stage", "precision"), STAGES_AND_PRECISIONS)
def test_a_read_of_two_engines_is_one_gather_of_no_more_than_was_asked_for(
    ranks: Any, stage: int, precision: str
) -> None:
    for right, traffic, padded in ranks(2).run(read_both, stage, precision):
        assert right
        if stage == 3:
            assert (traffic.gathers, traffic.bytes) == (1, padded)
        elif precision == "bf16":  # the fp32 masters of bf16 weights are in pieces
            assert traffic.gathers == 1
        else:
            assert (traffic.gathers, traffic.bytes) == (0, 0)


def rows_of(rank: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))


def gradients_of_both(stage: int, precision: str) -> tuple[list[Tensor], list[Tensor], Traffic]:
    """As the engines have them, and as the mean of the ranks' by plain PyTorch."""
    engines = [engine_of(stage, precision), engine_of(stage, precision)]
    for engine in engines:
        rows = rows_of(dist.get_rank()).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(rows).float().square().mean())
    traffic = Traffic()
    weights = [Weight(engines[0], engines[0].module.first.weight), Weight(engines[1], engines[1].module.second.weight)]
    found = params.gradients(weights, traffic)
    torch.manual_seed(1)
    model = Odd()
    losses = [model(rows_of(rank)).square().mean() for rank in range(dist.get_world_size())]
    expected = torch.autograd.grad(torch.stack(losses).mean(), (model.first.weight, model.second.weight))
    for engine in engines:
        engine.destroy()
    return found, list(expected), traffic


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_gradients_of_two_engines_are_one_gather(ranks: Any, stage: int, precision: str) -> None:
    for found, expected, traffic in ranks(2).run(gradients_of_both, stage, precision):
        for gradient, right in zip(found, expected, strict=True):
            assert gradient.dtype == torch.float32
            tolerance = {"rtol": 0.05, "atol": 0.02} if precision == "bf16" else {}
            torch.testing.assert_close(gradient, right, **tolerance)
        assert traffic.gathers == (1 if stage else 0)


def asked_too_early(stage: int) -> str:
    engine = engine_of(stage, "fp32")
    try:
        params.gradients([Weight(engine, engine.module.first.weight)])
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_asked_for_before_a_backward_are_refused_and_nobody_waits(ranks: Any, stage: int) -> None:
    """A weight this small lies whole on one of two ranks, so only that one can say that its gradient is not there."""
    said = ranks(2).run(asked_too_early, stage)
    assert any("call observe() after backward" in text for text in said), said


def refusals() -> list[str]:
    said = []
    try:
        engine_of(0, "bf16")
    except ValueError as error:
        said.append(str(error))
    import deepspeed

    model = Odd().bfloat16()  # the same by a user's own engine
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 0},
        },
    )
    try:
        params.check_writable(Weight(engine, engine.module.first.weight), "first.weight")
    except ValueError as error:
        said.append(str(error))
    engine.module.first.weight.requires_grad_(False)
    try:
        params.check_writable(Weight(engine.module, engine.module.first.weight), "first.weight")
    except ValueError as error:
        said.append(str(error))
    engine.destroy()
    return said


def test_what_cannot_be_written_is_refused_with_the_mend(ranks: Any) -> None:
    own, users, frozen = ranks(1).run(refusals)[0]
    assert "stage 1" in own
    assert "stage 1" in users
    assert "first.weight" in users
    assert "frozen" in frozen


class Elsewhere(DeepSpeedEngine):
    """An engine as far as `check_writable` looks, with settings that this machine cannot have."""

    def __init__(self, device: str = "cpu", hpz: int = 1) -> None:
        nn.Module.__init__(self)
        self.device_name, self.hpz = device, hpz

    def zero_optimization_stage(self) -> int:
        return 3

    def zero_offload_param(self) -> Any:
        return DeepSpeedZeroOffloadParamConfig(device=self.device_name)

    def zero_hpz_partition_size(self) -> int:
        return self.hpz


def test_copies_that_a_write_cannot_reach_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    params.check_writable(Weight(Elsewhere(), parameter), "w")
    with pytest.raises(ValueError, match="NVMe"):
        params.check_writable(Weight(Elsewhere("nvme"), parameter), "w")
    with pytest.raises(ValueError, match="zero_hpz_partition_size"):
        params.check_writable(Weight(Elsewhere(hpz=2), parameter), "w")


def whole_state(stage: int, precision: str) -> bool:
    engine = engine_of(stage, precision)
    state = params.state_dict(engine)
    torch.manual_seed(1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = {k: v.to(dtype).float() for k, v in Odd().state_dict().items()}
    engine.destroy()
    return state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in expected)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_the_gathered_state_dict_is_the_model_s_own(ranks: Any, stage: int, precision: str) -> None:
    assert all(ranks(2).run(whole_state, stage, precision))
