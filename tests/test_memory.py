"""What a step keeps in memory: counted on the meta device, and what a process then takes."""

from __future__ import annotations

import gc
import itertools
import json
from pathlib import Path

import pytest
import torch
from small import zero
from torch import nn
from torch.nn import functional as F

from hetero_kt import memory, models
from hetero_kt.config import Data, Model, Optim
from hetero_kt.cost import model_cost
from hetero_kt.distributed.engine import LARGEST_BUCKET, bucket_size, build_engine
from hetero_kt.nn.stages import expose


def pictures(size: int):
    return lambda rows: ((torch.zeros(rows, 3, size, size),), {})


def test_activations_are_what_the_backward_reads() -> None:
    """By hand, of a layer, a ReLU and a layer: the input, the ReLU's output, and no result of a linear layer."""
    body = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    assert memory.activation_bytes(body, lambda rows: ((torch.zeros(rows, 10),), {})) == 4 * (10 + 20)


def test_counting_leaves_a_model_as_it_was() -> None:
    model = models.build("cifar:resnet_tiny", 10).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert memory.activation_bytes(model, pictures(32)) > 0
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_forward_that_looks_at_its_values_is_counted_too() -> None:
    class Looks(nn.Module):
        def forward(self, x):
            return (x * 2).exp() if float(x.detach().sum()) == 0 else x

    assert memory.activation_bytes(Looks(), lambda rows: ((torch.zeros(rows, 7, requires_grad=True),), {})) == 4 * 7


def test_checkpointed_stages_keep_less() -> None:
    model = models.build("cifar:resnet_small", 10)
    stages = expose(model, 32)
    whole = memory.activation_bytes(model, pictures(32))
    stages.checkpointing = True
    assert memory.activation_bytes(model, pictures(32)) < whole / 3


@pytest.mark.parametrize(
    ("block", "elements"),
    [
        ({"stage": 0}, 0),
        ({"stage": 1}, 30),
        ({"stage": 2, "overlap_comm": True}, 60),
        ({"stage": 2, "reduce_bucket_size": 7}, 7),
        ({"stage": 2, "reduce_bucket_size": 10**14}, 30),
        ({"stage": 3}, 30 + 30),  # all of it stays from forward to backward
        ({"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}, 30 + 20),
        ({"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 5}, 30 + 25),
    ],
)
def test_buffers_are_a_bucket_and_what_zero_3_keeps_whole(block: dict, elements: int) -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 1), nn.Linear(1, 19, bias=False))
    assert memory.buffer_bytes(model, block, width=4) == 4 * (elements if "stage3" not in str(block) else elements - 1)


def test_an_engine_reserves_no_more_than_its_model_needs(ranks) -> None:
    assert bucket_size(nn.Linear(LARGEST_BUCKET, 2, device="meta")) == LARGEST_BUCKET
    assert ranks(2).run(buckets) == [[170, 170, 170, 9, 170]] * 2


def buckets() -> list[int]:
    found = []
    for stage, more in (
        (1, {}),
        (2, {}),
        (3, {}),
        (2, {"reduce_bucket_size": 9}),
        (1, {"reduce_bucket_size": 10**14}),  # no machine has so much memory
    ):
        engine = build_engine(nn.Linear(16, 10), optim=Optim(), zero={**zero(stage), **more})
        found.append(engine.optimizer.reduce_bucket_size)
        engine.destroy()
    return found


def peak(stage: int, rows: int) -> int:
    """Bytes that torch has allocated at most in two steps of a ResNet, from its building on."""
    gc.collect()  # what is freed below would count against it
    images, labels = torch.randn(rows, 3, 32, 32), torch.zeros(rows, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine = build_engine(
            models.build("cifar:resnet18", 100), optim=Optim("adamw"), zero=zero(stage), micro_batch=rows
        )
        for _ in range(2):
            engine.backward(F.cross_entropy(engine(images), labels))
            engine.step()
    engine.destroy()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize(("stage", "rows"), [(1, 32), (2, 8), (3, 32)])
def test_the_planned_memory_is_what_steps_then_take(ranks, stage: int, rows: int, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(zero(stage)))
    model = Model("cifar:resnet18", "d", optim=Optim("adamw"), zero=str(file))
    cost = model_cost(models.build("cifar:resnet18", 100), model, Data("generated", batch=rows), world=1)
    assert ranks(1).run(peak, stage, rows) == [pytest.approx(cost.state_bytes + cost.activation_bytes, rel=0.15)]
