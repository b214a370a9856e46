"""A checkpoint of some ranks at some ZeRO stage is one of any other ranks at any other stage, to the bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from small import Convolutions, batch, loss, zero
from torch import Tensor, nn

from hetero_kt.config import Model, Optim, Schedule
from hetero_kt.distributed import layout
from hetero_kt.distributed.checkpoint import Checkpoints, load
from hetero_kt.distributed.learner import Learner, build_learner
from hetero_kt.evaluate import averaged_buffers, evaluating

OPTIMS = {"adamw": Optim("adamw", lr=1e-2, weight_decay=1e-2), "sgd": Optim("sgd", lr=0.05)}
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
STEPS = 2


class Tied(nn.Module):
    """Two layers with one weight, sizes that do not divide, a frozen weight, buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Convolutions()
        self.inner = nn.Linear(10, 10, bias=False)
        self.outer = nn.Linear(10, 10)
        self.outer.weight = self.inner.weight
        self.frozen = nn.Linear(10, 10)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf] * 5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.outer(self.inner(self.frozen(self.body(x))).relu() * self.mask.exp().to(x.dtype))


def learner_of(stage: int, precision: str, optim: str, seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    model: nn.Module = Tied()
    if precision == "bf16":
        model.body = Convolutions(batch_norm=False)
    recipe = Model("small", data="", optim=OPTIMS[optim], schedule=Schedule("cosine"), precision=precision, ema=0.9)
    return build_learner(model, recipe, zero(stage), rows=8 // dist.get_world_size(), steps=20)


def whole(learner: Learner, optim: str) -> dict[str, Any]:
    """Everything that is one for all ranks, gathered by DeepSpeed's own means."""
    engine, average = learner.engine, learner.average
    found: dict[str, Any] = {"rates": [group["lr"] for group in engine.optimizer.param_groups]}
    stage, base = engine.zero_optimization_stage(), getattr(engine.optimizer, "optimizer", engine.optimizer)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            if hasattr(parameter, "ds_id"):
                parts = [torch.empty_like(parameter.ds_tensor) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, parameter.ds_tensor.data)
                found[name] = torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape).clone()
            else:
                found[name] = parameter.detach().clone()
            continue
        if stage == 0:
            found[name] = parameter.detach().clone()
            for key in MOMENTS[optim]:
                found[f"{name} {key}"] = base.state[parameter][key].clone()
        else:
            found[name] = safe_get_full_fp32_param(parameter).clone()
            for key in MOMENTS[optim]:
                found[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).clone()
    found["counts"] = {float(state["step"]) for state in base.state.values() if "step" in state}
    assert average is not None
    found |= {f"{piece.name} average": value.clone() for piece, value in average._whole()}
    found["updates"] = average.updates
    found["steps"] = [engine.global_steps, engine.global_samples]
    with averaged_buffers(engine.module):
        found |= {f"{name} buffer": buffer.clone() for name, buffer in engine.module.named_buffers()}
        with evaluating(engine.module):
            x = batch(99)[0].to(next(engine.module.parameters()).dtype)
            found["logits"] = engine.module(x).clone()
    with average.applied(), averaged_buffers(engine.module):
        found |= {f"{name} averaged buffer": buffer.clone() for name, buffer in engine.module.named_buffers()}
    return found


def chapter(folder: str, stage: int, precision: str, optim: str) -> bytes:
    """Goes on from the newest checkpoint if there is one, trains, saves: (what was loaded, what was saved)."""
    place, rank, world = Path(folder), dist.get_rank(), dist.get_world_size()
    learner = learner_of(stage, precision, optim, seed=len(layout.complete(place)))
    learners = {"one": learner}
    loaded, step = None, 0
    if found := layout.complete(place):
        step = int(found[-1].name)
        shared, _ = load(found[-1], learners)
        assert shared == {"note": (step, {1: torch.tensor(2.5)})}
        loaded = whole(learner, optim)
    for _ in range(STEPS):
        learner.begin(step)
        learner.engine.backward(loss(learner.engine, batch(step, rank, world)))
        learner.step()
        step += 1
    if stage == 3:
        weights = [p for p in learner.engine.module.parameters() if p.ds_numel > 1]
        assert all(p.ds_tensor.numel() == -(-p.ds_numel // world) for p in weights)
    checkpoints = Checkpoints(place, keep=9, device=torch.device("cpu"))
    checkpoints.save(step, learners, {"note": (step, {1: torch.tensor(2.5)})})
    written = checkpoints.finish()
    assert written is not None
    assert written.step == step
    saved = whole(learner, optim)
    learner.engine.destroy()
    return pickle.dumps((loaded, saved))


def travel(ranks: Any, folder: Path, route: list[tuple[int, int]], precision: str, optim: str) -> None:
    """Chapter after chapter on (ranks, stage); what each begins with is what the one before ended with."""
    before: dict[str, Any] = {}
    for world, stage in route:
        ends = [pickle.loads(end) for end in ranks(world).run(chapter, str(folder), stage, precision, optim)]
        for loaded, saved in ends:
            assert (loaded is None) == (not before)
            for key in before:
                at = f"{key} on {world} at stage {stage}"
                if key == "logits" and precision == "autocast":  # ZeRO-3 gathers such weights in bf16
                    torch.testing.assert_close(loaded[key], before[key], rtol=1e-2, atol=1e-2)
                elif isinstance(before[key], Tensor):
                    assert torch.equal(loaded[key], before[key]), at
                else:
                    assert loaded[key] == before[key], at
            for key in ("logits", "body.conv.weight", "body.conv.weight average"):
                assert not before or not torch.equal(saved[key], before[key]), "it has trained on"
        before = ends[0][1]


@pytest.mark.parametrize(
    ("precision", "optim"),
    [("fp32", "adamw"), pytest.param("autocast", "sgd", marks=pytest.mark.slow), ("bf16", "adamw")],
)
def test_ranks_and_stages_change_and_nothing_else(ranks: Any, tmp_path: Path, precision: str, optim: str) -> None:
    first = (1, 1) if precision == "bf16" else (1, 0)
    travel(ranks, tmp_path, [first, (2, 3), (1, 2), (2, 1), (2, 3)], precision, optim)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_two_four_and_one_rank_at_every_stage(ranks: Any, tmp_path: Path, precision: str) -> None:
    travel(ranks, tmp_path, [(1, 1), (2, 2), (4, 3), (1, 1)], precision, "adamw")
    travel(ranks, tmp_path / "back", [(4, 1), (4, 3), (4, 2), (2, 3), (1, 3), (4, 1)], precision, "adamw")
