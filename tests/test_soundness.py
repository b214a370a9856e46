"""Nothing that is not finite is saved, pruned for, exported or learnt from."""

from __future__ import annotations

import contextlib
import io
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from tiny import Plan
from torch import Tensor, nn

from hetero_kt import models
from hetero_kt.config import Optim, Recipe, Teacher
from hetero_kt.distributed import layout
from hetero_kt.folder import run_folder
from hetero_kt.methods.mergenet import Exchange, Site, Transfer
from hetero_kt.models.teacher import build_teacher
from hetero_kt.nn.losses.memory import Memory, Sides
from hetero_kt.nn.reencode import dense, factorise
from hetero_kt.nn.soundness import first_not_finite, look_finite
from hetero_kt.options import Options
from hetero_kt.trainer import Trainer

# --- runs ---

PLACES = ("weight", "buffer", "average", "moment", "adapter")


def spoilt(base: Recipe, options: Options, place: str, step: int) -> tuple[dict[str, Any], str]:
    """A run in which one number becomes NaN before the batch of `step`; how it ended, and what it printed."""

    class Spoilt(Trainer):
        def fit(self) -> bool:
            batches = self.batches

            def disturbed(at: int) -> Any:
                if at == step:
                    self._spoil()
                return batches(at)

            self.batches = disturbed
            return super().fit()

        def _spoil(self) -> None:
            learner = self.method.learners["resnet"]
            piece = next(piece for piece in learner.pieces if piece.numel)
            with torch.no_grad():
                if place == "weight":
                    piece.master().view(-1)[0] = torch.nan
                elif place == "buffer":
                    next(b for b in learner.engine.module.buffers() if b.is_floating_point()).view(-1)[0] = torch.nan
                elif place == "average":
                    learner.average.pieces()[0][1].view(-1)[0] = torch.nan
                elif place == "moment":
                    next(iter(piece.moments().values())).view(-1)[0] = torch.nan
                else:
                    adapter = self.method.exchange.adapters()["there"]
                    next(adapter.parameters()).view(-1)[0] = torch.nan

    kept = tiny.Trainer
    tiny.Trainer = Spoilt  # type: ignore[misc]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            end = pickle.loads(tiny._train(base, options, Plan()))
    finally:
        tiny.Trainer = kept  # type: ignore[misc]
    return {key: end.get(key) for key in ("done", "diverged", "first_step")}, out.getvalue()


@pytest.mark.parametrize("place", PLACES)
def test_a_number_that_is_not_finite_ends_the_run_and_leaves_the_last_sound_checkpoint(
    ranks: Any, tmp_path: Path, place: str
) -> None:
    world = 2 if place == "buffer" else 1
    recipe = tiny.with_average(tiny.recipe(tmp_path, steps=8, save_every=1, keep=1))
    ends = ranks(world).run(spoilt, recipe, Options(), place, 3)
    folder = run_folder(recipe)
    for end, _ in ends:
        assert end["done"] is None
        assert f"--resume auto to go on from {folder / 'checkpoints' / '3'}" in end["diverged"]
    assert [path.name for path in layout.complete(folder / "checkpoints")] == ["3"]
    assert not (folder / "result.json").exists()
    assert not (folder / "export").exists()
    if place == "weight":  # and the command of the message goes on from there, to the end
        (again,) = ranks(1).run(spoilt, recipe, Options(), place, -1)
        assert (again[0]["first_step"], again[0]["done"]) == (3, True)


def test_a_run_that_ends_within_a_bad_interval_is_no_finished_run(ranks: Any, tmp_path: Path) -> None:
    """Fewer than three bad intervals, and no checkpoint before: the last one counts."""
    base = tiny.recipe(tmp_path, steps=4, log_every=100, control="none")
    base = replace(base, models={name: replace(m, optim=Optim("sgd", lr=1e30)) for name, m in base.models.items()})
    (end,) = tiny.train(ranks(1), base)
    assert "done" not in end
    assert "not finite" in end["diverged"]
    assert "begin again with --resume never" in end["diverged"]
    left = {path.name for path in run_folder(base).iterdir()}
    assert left.isdisjoint({"result.json", "export"})
    assert layout.complete(run_folder(base) / "checkpoints") == []


# --- tensors ---


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_place_of_a_tensor_is_looked_at(dtype: torch.dtype, bad: float) -> None:
    for size in (1, 7, 1000):
        for place in {0, size // 2, size - 1}:
            tensor = torch.ones(size, dtype=dtype)
            whole = [torch.ones(3), torch.ones(4, 4)[:, ::2], torch.arange(3), torch.zeros(0, dtype=dtype), tensor]
            assert bool(look_finite(whole))
            tensor[place] = bad
            assert not bool(look_finite(whole))
            assert first_not_finite(whole) == 4


def test_large_values_are_finite() -> None:
    assert first_not_finite([torch.full((9,), 3e38), torch.full((9,), 6e4, dtype=torch.float16)]) is None


# --- what learns ---


@pytest.mark.parametrize("optim", [Optim("adamw", lr=0.1, weight_decay=0.1), Optim("sgd", lr=0.1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_teaches_an_adapter_nothing(optim: Optim, bad: float) -> None:
    torch.manual_seed(0)
    one, other = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
    transfer = Transfer(Site(one, "0.weight"), Site(other, "0.weight"), cycle=1, update="exact", optim=optim, name="t")
    exchange = Exchange([transfer])
    (path,) = exchange.paths

    def turn(gradient: float) -> dict[str, Tensor]:
        exchange.propose()
        other.zero_grad()
        other(torch.ones(2, 8)).sum().backward()
        other[0].weight.grad.fill_(gradient)
        exchange.observe()
        return exchange.learn()

    def held() -> list[Tensor]:
        states = [value for state in path.optimizer.state.values() for value in state.values()]
        return [t.detach().clone() for t in (*path.adapter.parameters(), *filter(torch.is_tensor, states))]

    first = held()
    assert float(turn(bad)["t/skipped"]) == 1
    assert all(bool(t.isfinite().all()) for t in held())
    assert all(torch.equal(ours, before) for ours, before in zip(held(), first, strict=False))
    assert float(turn(1.0)["t/skipped"]) == 0
    learnt = held()
    assert not all(torch.equal(ours, before) for ours, before in zip(learnt, first, strict=False))
    assert float(turn(bad)["t/skipped"]) == 1
    assert all(torch.equal(ours, before) for ours, before in zip(held(), learnt, strict=True))


def test_a_mask_of_minus_infinity_is_sound(ranks: Any, tmp_path: Path) -> None:
    assert ranks(1).run(masked, tiny.with_average(tiny.recipe(tmp_path, steps=2, save_every=1))) == [True]


def masked(base: Recipe) -> bool:
    build = models.build

    def with_mask(*args: Any, **options: Any) -> nn.Module:
        model = build(*args, **options)
        model.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", with_mask)
        return bool(pickle.loads(tiny._train(base, Options(), Plan())).get("done"))


def test_an_embedding_that_is_not_finite_leaves_its_sample_in_memory_as_it_was() -> None:
    memory = Memory(5, 3, momentum=0.5, seed=0)
    before = [side.clone() for side in memory.sides]
    new = torch.nn.functional.normalize(torch.ones(2, 3), dim=-1)
    new[1, 2] = math.nan
    memory.write(torch.tensor([1, 4]), Sides(new, new))
    for side, old in zip(memory.sides, before, strict=True):
        assert torch.equal(side[[0, 2, 3, 4]], old[[0, 2, 3, 4]])
        assert not torch.equal(side[1], old[1])


def test_weights_that_are_not_finite_are_refused_as_init_and_as_a_teacher(tmp_path: Path) -> None:
    state = models.build("cifar:resnet_tiny", 4).state_dict()
    state["fc.bias"] = state["fc.bias"].clone()
    state["fc.bias"][1] = math.nan
    file = tmp_path / "lost.safetensors"
    save_file(state, file)
    with pytest.raises(ValueError, match=r"lost.safetensors, whose fc.bias is not finite: use"):
        models.build("cifar:resnet_tiny", 4, init=str(file))
    how: Any = {"classes": 4, "image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match=r"--method.teachers.t: .*fc.bias is not finite"):
        build_teacher(Teacher("cifar:resnet_tiny", init=str(file)), "--method.teachers.t", **how)


# --- rank 1 ---


def test_a_factor_of_rank_one_has_the_strides_of_a_new_tensor() -> None:
    model = nn.Sequential(nn.Linear(10, 12))
    factorise(model, "0.weight", 1)
    for parameter in model.parameters():
        assert parameter.stride() == torch.empty(parameter.shape).stride()
    column = torch.empty_strided((12, 1), (1, 12))
    assert column.contiguous().stride() == (1, 12)
    assert dense(column).stride() == (1, 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_factors_of_rank_one_train_at_every_stage(ranks: Any, tmp_path: Path, stage: int) -> None:
    recipe = tiny.with_transfer(tiny.recipe(tmp_path, stage, steps=2), rank=1)
    assert all(end["done"] for end in tiny.train(ranks(2), recipe))
