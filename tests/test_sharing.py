"""Two models that share a block of their weights, against one parameter in one plain process."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from rounding import Nudge, assert_close, movement, result_of
from small import batch, build_pair, loss, zero
from test_options import one_sentence
from torch import Tensor, nn

from hetero_kt import checks
from hetero_kt.config import Optim, Schedule
from hetero_kt.distributed import params
from hetero_kt.distributed.engine import build_engine
from hetero_kt.distributed.learner import Learner
from hetero_kt.methods.mergenet import Exchange, MergeNet, Site, Transfer
from hetero_kt.methods.sharing import Sharing
from hetero_kt.optimizer import Rates
from hetero_kt.options import Options

STEPS = 6
SGD = Optim("sgd", lr=0.1, momentum=0.9, weight_decay=1e-2)
ADAMW = Optim("adamw", lr=1e-2, weight_decay=1e-2)
PAIRS = {
    "one": (("conv", "fc.weight"), ("perceptron", "inner.weight")),  # 10x7 and 24x192: all of the first
    "other": (("perceptron", "head.weight"), ("conv", "conv.weight")),  # 10x24 and 7x27: neither whole
}


def shared(owners: dict[str, Any], until: int = 0) -> Sharing:
    return Sharing(
        [
            Transfer(Site(owners[s[0]], s[1]), Site(owners[t[0]], t[1]), cycle=4, name=name, until=until)
            for name, (s, t) in PAIRS.items()
        ]
    )


# --- the reference ---


class Tied(nn.Module):
    """Both models with one parameter for each shared block; the rest of each weight is its model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleDict(build_pair(factor=False))
        self.blocks = nn.ParameterDict()
        for name, (source, target) in PAIRS.items():
            first, second = (self.matrix(site) for site in (source, target))
            rows, columns = (min(sizes) for sizes in zip(first.shape, second.shape, strict=True))
            self.blocks[name] = nn.Parameter(first[:rows, :columns].detach().clone())

    def matrix(self, site: tuple[str, str]) -> Tensor:
        weight = self.models[site[0]].get_parameter(site[1])
        return weight.flatten(1)

    def weights(self, model: str) -> dict[str, Tensor]:
        found = dict(self.models[model].named_parameters())
        for name, sites in PAIRS.items():
            for owner, weight in sites:
                if owner == model:
                    rows, columns = self.blocks[name].shape
                    matrix = found[weight].flatten(1).clone()
                    matrix[:rows, :columns] = self.blocks[name]
                    found[weight] = matrix.view_as(found[weight])
        return found


def reference(world: int, nudge: Nudge) -> dict[str, dict[str, Tensor]]:
    """SGD with momentum on the sum of both losses; a block decays for both of its models."""
    tied = Tied()
    nudge.modules([tied])
    momenta = {name: torch.zeros_like(p) for name, p in tied.named_parameters()}
    buffers = [copy.deepcopy(dict(tied.named_buffers())) for _ in range(world)]
    for step in range(STEPS):
        tied.zero_grad()
        for rank in range(world):
            for name, buffer in tied.named_buffers():
                buffer.data.copy_(buffers[rank][name])
            for model, module in tied.models.items():

                class Whole(nn.Module):
                    def __init__(self, model: str = model, module: nn.Module = module) -> None:
                        super().__init__()
                        self.inner, self.model = module, model

                    def forward(self, x: Tensor) -> Tensor:
                        return torch.func.functional_call(self.inner, tied.weights(self.model), (x,))

                x, y = batch(step, rank, world)
                (loss(Whole(), (nudge(x), y)) / world).backward()
            buffers[rank] = copy.deepcopy(dict(tied.named_buffers()))
        for name, parameter in tied.named_parameters():
            decay = SGD.weight_decay * (2 if name.startswith("blocks") else 1)
            gradient = parameter.grad + decay * parameter.detach()
            momenta[name] = SGD.momentum * momenta[name] + gradient
            parameter.data.add_(momenta[name], alpha=-SGD.lr)
    return {model: {k: v.detach() for k, v in tied.weights(model).items()} for model in tied.models}


# --- the same on engines ---


def train(stage: int, optim: Optim, precision: str = "fp32", until: int = 0) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    engines = {
        name: build_engine(model, optim=optim, zero=zero(stage), micro_batch=8 // world, precision=precision)
        for name, model in build_pair(factor=False, batch_norm=precision == "fp32").items()
    }
    constant = Schedule(name="constant")
    learners = {n: Learner(e, Rates(e.optimizer, constant, STEPS)) for n, e in engines.items()}
    sharing = shared(engines, until)
    method = MergeNet(learners, sharing, dict.fromkeys(engines, loss))
    logs = []
    for step in range(STEPS):
        log = method.step(step, dict.fromkeys(engines, batch(step, rank, world)))
        logs.append({name: float(value) for name, value in log.items()})
    found: dict[str, Any] = {"logs": logs, "measured": method.measured()}
    for name, engine in engines.items():
        named = dict(engine.module.named_parameters())
        if stage == 3:
            assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in named.values())
        found[name] = {k: v.clone() for k, v in params.state_dict(engine).items() if k in named}
        engine.destroy()
    return found


@pytest.mark.parametrize(
    ("stage", "world"),
    [
        (1, 2),
        (2, 2),
        (3, 2),
        *(pytest.param(stage, world, marks=pytest.mark.slow) for stage, world in ((0, 2), (1, 1))),
    ],
)
def test_shared_blocks_equal_one_parameter_of_a_plain_process(ranks: Any, stage: int, world: int) -> None:
    for found in ranks(world).run(train, stage, SGD):
        assert_close(found, result_of(reference, world), movement(reference, world))
        for log in found["logs"]:
            assert -1.001 <= log["one/agreement"] <= 1.001
    assert (found["measured"]["bytes_gathered"] > 0) == (stage == 3)


def block_of(weights: dict[str, Any], site: tuple[str, str], shape: tuple[int, int]) -> Tensor:
    return weights[site[0]][site[1]].flatten(1)[: shape[0], : shape[1]]


@pytest.mark.parametrize(("optim", "precision", "stage"), [(ADAMW, "fp32", 2), (ADAMW, "bf16", 3)])
def test_both_copies_of_a_block_stay_equal_to_the_bit(ranks: Any, optim: Optim, precision: str, stage: int) -> None:
    for found in ranks(2).run(train, stage, optim, precision):
        for (source, target), shape in zip(PAIRS.values(), ((10, 7), (7, 24)), strict=True):
            assert torch.equal(block_of(found, source, shape), block_of(found, target, shape))


def test_adamw_s_two_moves_are_added() -> None:
    """On plain modules: each optimizer sees the block before either has moved it."""
    models, alone = build_pair(factor=False), build_pair(factor=False)
    optimizers = {n: torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=1e-2) for n, m in models.items()}
    sharing = shared(models)
    sharing.propose()
    for name, model in models.items():
        alone[name].load_state_dict(model.state_dict())
    plain = {n: torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=1e-2) for n, m in alone.items()}
    for found, steps in ((models, optimizers), (alone, plain)):
        for name, model in found.items():
            loss(model, batch(0)).backward()
            steps[name].step()
    moved = {}
    for name, ((a, wa), (b, wb)) in PAIRS.items():
        one, other = alone[a].get_parameter(wa).flatten(1), alone[b].get_parameter(wb).flatten(1)
        rows, columns = min(one.shape[0], other.shape[0]), min(one.shape[1], other.shape[1])
        start = sharing.pairs[list(PAIRS).index(name)].block
        assert start is not None
        moved[name] = one[:rows, :columns] + other[:rows, :columns] - start
    sharing.learn()
    for name, (source, target) in PAIRS.items():
        for model, weight in (source, target):
            rows, columns = moved[name].shape
            found = models[model].get_parameter(weight).flatten(1)
            torch.testing.assert_close(found[:rows, :columns], moved[name], atol=1e-6, rtol=1e-6)
            outside = alone[model].get_parameter(weight).flatten(1)
            assert torch.equal(found[rows:], outside[rows:]), "the rest is its model's own"
            assert torch.equal(found[:, columns:], outside[:, columns:])


def test_sharing_ends_with_the_first_model_s_budget(ranks: Any) -> None:
    (found,) = ranks(1).run(train, 1, SGD, "fp32", 3)
    assert ["one/agreement" in log for log in found["logs"]] == [True] * 3 + [False] * 3
    (source, target), shape = PAIRS["one"], (10, 7)
    assert not torch.equal(block_of(found, source, shape), block_of(found, target, shape))


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_resumed_run_ends_like_an_uninterrupted_one(ranks: Any, tmp_path: Path, stage: int) -> None:
    whole, broken = (tiny.recipe(tmp_path / name, stage, "sharing", steps=4) for name in ("whole", "parts"))
    uninterrupted = tiny.train(ranks(2), whole)
    tiny.train(ranks(2), broken, Options(max_steps=2))
    resumed = tiny.train(ranks(2), broken)
    assert [end["first_step"] for end in resumed] == [2, 2]
    tiny.assert_same_end(resumed, uninterrupted)


def test_an_average_is_refused(tmp_path: Path) -> None:
    base = tiny.recipe(tmp_path, control="sharing")
    checks.check(base)
    averaged = {name: replace(model, ema=0.9) for name, model in base.models.items()}
    with pytest.raises(ValueError, match=r"--models.resnet.ema 0.9 .*--control sharing") as error:
        checks.check(replace(base, models=averaged))
    assert one_sentence(str(error.value))


def test_what_cannot_be_shared_is_refused() -> None:
    models = build_pair(factor=False)
    fc = Site(models["conv"], "fc.weight")
    inner, head = (Site(models["perceptron"], name) for name in ("inner.weight", "head.weight"))
    with pytest.raises(ValueError, match="shares a weight that one shares already") as twice:
        Sharing([Transfer(fc, inner, name="one"), Transfer(head, fc, name="other")])
    with pytest.raises(ValueError, match="use mode full") as svd:
        Sharing([Transfer(Site(models["conv"], "fc.weight", "svd", 4), inner, name="one")])
    with pytest.raises(ValueError, match="use Sharing") as adapters:
        Exchange([Transfer(fc, inner)], control="sharing")
    for error in (twice, svd, adapters):
        assert one_sentence(str(error.value))
