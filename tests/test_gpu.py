"""What a CUDA device could do otherwise: each test's body runs on one where there is one, and on the CPU everywhere."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import zero
from ranks import RankPool
from small import PLAIN, SITES, build_pair, loss
from small import batch as pictures
from small import zero as zero_block
from torch import Tensor, nn

from hetero_kt import compiler, config, data, models
from hetero_kt.config import Optim
from hetero_kt.distributed import params
from hetero_kt.distributed.engine import build_engine
from hetero_kt.methods.mergenet import Exchange, Site, Transfer
from hetero_kt.models.teacher import RANDOM, Frozen, build_teacher
from hetero_kt.optimizer import build_optimizer

ROOT = Path(__file__).resolve().parents[1]
ON = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def on(ranks: Any) -> Iterator[Callable[..., Any]]:
    """`on(device, body, *args)`: what `body(device, *args)` gives in a process that has DeepSpeed on that device."""
    on_gpu = RankPool(1, gpu=True)

    def run(device: str, body: Callable[..., Any], *args: Any) -> Any:
        (found,) = (ranks(1) if device == "cpu" else on_gpu).run(body, device, *args, timeout=900)
        return found

    yield run
    on_gpu.close()


# --- BatchNorm under autocast ---

STEPS = 6
SGD = Optim("sgd", lr=0.05, weight_decay=0.0)


def rows(device: str, step: int) -> tuple[Tensor, Tensor]:
    """A batch of 16 pictures of 32 pixels, with labels that can be learnt."""
    y = torch.arange(16) % 4
    noise = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    return (noise + y.view(-1, 1, 1, 1)).to(device), y.to(device)


def norms(model: nn.Module) -> dict[str, Tensor]:
    """Running statistics."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


def beside_plain_autocast(device: str, stage: int) -> dict[str, Any]:
    """Losses and statistics of an engine, of torch's own loop under autocast, and of that without autocast."""
    torch.manual_seed(0)
    module = models.build("cifar:mobilenetv2_tiny", 4).to(device)
    plain, full = copy.deepcopy(module), copy.deepcopy(module)
    engine = build_engine(module, optim=SGD, zero=zero_block(stage), precision="autocast", micro_batch=16)
    found: dict[str, Any] = {"losses": [], "plain": [], "full": [], "statistics": [], "plain statistics": []}
    optimizers = {id(model): build_optimizer(model, SGD) for model in (plain, full)}
    for step in range(STEPS):
        x, y = rows(device, step)
        answers = engine(x)
        value = nn.functional.cross_entropy(answers.float(), y)
        engine.backward(value)
        engine.step()
        found["losses"].append(value.item())
        for name, model in (("plain", plain), ("full", full)):
            with torch.autocast(device, torch.bfloat16, enabled=name == "plain"):
                logits = model(x)
            value = nn.functional.cross_entropy(logits.float(), y)
            optimizers[id(model)].zero_grad()
            value.backward()
            optimizers[id(model)].step()
            found[name].append(value.item())
        found["statistics"].append(norms(engine.module))
        found["plain statistics"].append(norms(plain))
    found["computed in"] = answers.dtype
    engine.destroy()
    return {key: _on_cpu(value) for key, value in found.items()}


def _on_cpu(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.cpu()
    if isinstance(tree, dict):
        return {key: _on_cpu(value) for key, value in tree.items()}
    return [_on_cpu(value) for value in tree] if isinstance(tree, list | tuple) else tree


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("device", ON)
def test_batch_norm_under_autocast_is_that_of_plain_autocast(on: Any, device: str, stage: int) -> None:
    found = on(device, beside_plain_autocast, stage)
    first, *_ = found["losses"]
    assert found["computed in"] == torch.bfloat16
    close = 1e-5 if device == "cpu" else 2e-3  # a GPU may choose another kernel for weights that lie elsewhere
    assert first == pytest.approx(found["plain"][0], rel=close), "the same weights, computed alike"
    if device == "cpu":
        assert abs(first - found["full"][0]) > 10 * close * first, "or two runs would be alike without autocast"
    assert found["losses"] == pytest.approx(found["plain"], rel=2e-2)  # DeepSpeed reduces gradients in bf16
    assert found["losses"][-1] < 0.8 * first, "it learns"
    for step, (ours, theirs) in enumerate(zip(found["statistics"], found["plain statistics"], strict=True)):
        assert ours.keys() == theirs.keys() != set()
        for name, statistic in ours.items():
            assert statistic.dtype == torch.float32, name
            bounds = {"rtol": close, "atol": close} if step == 0 else {"rtol": 5e-2, "atol": 2e-2}
            torch.testing.assert_close(statistic, theirs[name], **bounds)
            assert not torch.equal(statistic, statistic.bfloat16().float()), f"{name} is no more precise than bf16"


# --- parameters in bf16 ---


def exchange_of(owners: dict[str, Any], mode: Any = "full", **changes: Any) -> Exchange:
    """Transfers both ways at every step, into one weight of each model."""
    transfers = []
    for name, sites in SITES.items():
        source, target = (Site(owners[model], weight, mode, rank) for model, weight, rank in sites)
        transfers.append(Transfer(source, target, cycle=1, adapter=replace(PLAIN, gate=0.9), name=name, **changes))
    return Exchange(transfers)


def written_in_bf16(device: str, stage: int) -> list[dict[str, Any]]:
    """After each transfer, and after the step behind it: every target's proposal, its master and its copy."""
    engines = {
        name: build_engine(module.to(device), optim=SGD, zero=zero_block(stage), precision="bf16", micro_batch=8)
        for name, module in build_pair(batch_norm=False).items()
    }
    exchange = exchange_of(engines)
    found = []

    def look(path: Any) -> dict[str, Tensor]:
        parameter = path.target.weight.parameter
        (master,) = params.read([path.target.weight])
        with zero.GatheredParameters([parameter], enabled=stage == 3):
            return {"master": master.cpu(), "copy": parameter.detach().cpu().clone()}

    for step in range(3):
        exchange.propose()
        turn = {path.name: {"proposal": path.accepted.cpu(), "written": look(path)} for path in exchange._due}
        for engine in engines.values():
            x, y = pictures(step)
            engine.backward(loss(engine, (x.to(device), y.to(device))))
        exchange.observe()
        for engine in engines.values():
            engine.step()
        for path in exchange._due:
            turn[path.name]["stepped"] = look(path)
        log = exchange.learn()
        for name, one in turn.items():
            one["change"] = log[f"{name}/change"].item()
        found.append(turn)
    for engine in engines.values():
        engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("device", ON)
def test_master_and_bf16_copy_agree_after_a_transfer_and_after_the_step(on: Any, device: str, stage: int) -> None:
    turns = on(device, written_in_bf16, stage)
    for turn in turns:
        assert turn.keys() == SITES.keys()
        for one in turn.values():
            assert one["change"] > 1e-3
            written, stepped = one["written"], one["stepped"]
            assert torch.equal(written["master"], one["proposal"].reshape(written["master"].shape))
            assert written["master"].dtype == torch.float32
            assert not torch.equal(written["master"], written["master"].bfloat16().float()), (
                "or rounding would not show"
            )
            assert not torch.equal(stepped["master"], written["master"])
            for seen in (written, stepped):
                assert seen["copy"].dtype == torch.bfloat16
                assert torch.equal(seen["copy"], seen["master"].bfloat16())


# --- a teacher in channels_last ---


def seen_channels_last(device: str, name: str, autocast: bool) -> dict[str, Any]:
    """A teacher's features and logits before its weights are laid out channels_last and after, of pictures that lie
    either way; and the way that its features lie in."""
    torch.manual_seed(0)
    one = (1.0, 1.0, 1.0)
    teacher: Frozen = build_teacher(
        config.Teacher(name, init=RANDOM),
        "--teacher",
        classes=10,
        image_size=32,
        mean=one,
        std=one,
        device=device,
        autocast=autocast,
    )
    teacher.module.to(device)
    x, _ = rows(device, 0)
    plain = teacher(x)
    teacher.start()
    kernels = [p for p in teacher.module.parameters() if p.dim() == 4 and min(p.shape[1:3]) > 1]
    found: dict[str, Any] = {
        "laid out": [p.is_contiguous(memory_format=torch.channels_last) for p in kernels],
        "plain": [*plain["stages"], plain["logits"]],
    }
    for way in (torch.contiguous_format, torch.channels_last):
        answer = teacher(x.contiguous(memory_format=way))
        found[str(way)] = [*answer["stages"], answer["logits"], teacher.logits(x.contiguous(memory_format=way))]
    found["flows"] = all(f.is_contiguous(memory_format=torch.channels_last) for f in answer["stages"])
    return _on_cpu(found)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["cifar:resnet_tiny", "cifar:mobilenetv2_tiny"])
@pytest.mark.parametrize("device", ON)
def test_a_teacher_in_channels_last_says_what_the_contiguous_one_says(
    on: Any, device: str, name: str, autocast: bool
) -> None:
    found = on(device, seen_channels_last, name, autocast)
    assert all(found["laid out"])
    assert found["laid out"]
    assert found["flows"], "or every convolution turns its input"
    close = 1e-1 if autocast else 1e-2 if device == "cuda" else 1e-4  # a GPU's convolutions take TF32
    for way in ("torch.contiguous_format", "torch.channels_last"):
        for ours, theirs in zip(found[way], [*found["plain"], found["plain"][-1]], strict=True):
            assert (ours.float() - theirs.float()).abs().max() < close * theirs.float().abs().max()


# --- a compiled adapter ---


def learnt(device: str, chosen: tuple[str, ...], backend: str) -> dict[str, Any]:
    """Proposals and parameters of adapters whose targets plain optimizers train, and how many graphs were compiled."""
    from torch._dynamo.utils import counters

    compiler.forget()
    counters.clear()
    pair = {name: module.to(device) for name, module in build_pair(batch_norm=False).items()}
    # Not Adam, which makes whole steps of what is rounding alone, as the gradients of the keys' biases are.
    exchange = exchange_of(pair, optim=Optim("sgd", lr=0.1, weight_decay=0.0, clip=1.0))
    begun = {name: copy.deepcopy(_on_cpu(dict(one.state_dict()))) for name, one in exchange.adapters().items()}
    optimizers = [build_optimizer(module, SGD) for module in pair.values()]
    proposals = []
    with torch.compiler.set_stance("default", force_backend=None if backend == "inductor" else backend):
        compiler.compile_chosen(exchange.adapters(), chosen)
        for step in range(4):
            exchange.propose()
            proposals.append({path.name: path.accepted.cpu() for path in exchange._due})
            for module, optimizer in zip(pair.values(), optimizers, strict=True):
                x, y = pictures(step)
                optimizer.zero_grad()
                loss(module, (x.to(device), y.to(device))).backward()
                optimizer.step()
            exchange.learn()
    graphs = counters["stats"]["unique_graphs"]
    compiler.forget()
    adapters = {name: _on_cpu(dict(adapter.state_dict())) for name, adapter in exchange.adapters().items()}
    return {"proposals": proposals, "begun": begun, "adapters": adapters, "graphs": graphs}


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "aot_eager"),  # traced and differentiated ahead, without a C++ compiler
        pytest.param("cpu", "inductor", marks=pytest.mark.slow),
        pytest.param("cuda", "inductor", marks=pytest.mark.gpu),
    ],
)
def test_a_compiled_adapter_proposes_and_learns_what_the_plain_one_does(on: Any, device: str, backend: str) -> None:
    plain = on(device, learnt, (), backend)
    compiled = on(device, learnt, ("to_conv",), backend)
    assert plain["graphs"] == 0
    assert compiled["graphs"] == 1, "the adapter is one piece"
    close = 1e-2 if device == "cuda" else 1e-4
    for ours, theirs in zip(compiled["proposals"], plain["proposals"], strict=True):
        for name, proposal in theirs.items():
            assert (ours[name] - proposal).abs().max() < close * proposal.abs().max()
    for name, state in plain["adapters"].items():
        begun, ended = plain["begun"][name], compiled["adapters"][name]
        assert ended.keys() == state.keys()
        moved = max((value - begun[key]).abs().max() for key, value in state.items())
        assert moved > 0, "it learns, or two would be alike without"
        for key, value in state.items():
            # Two updates, each of which rounds the weight that it is added to: that is far larger than what moves it.
            rounded = 2 * torch.finfo(value.dtype).eps * value.abs().max()
            assert (ended[key] - value).abs().max() < close * moved + rounded, key


# --- whole runs ---


def losses(
    folder: Path, on_gpu: bool, *options: str, launcher: str = "cifar_mergenet.py", name: str = "mobilenetv2/loss"
) -> tuple[str, list[float]]:
    """Device and training losses `name` of one debug run in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    if not on_gpu:
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(ROOT / "launchers" / launcher), "--debug", "--output-dir", str(folder)]
    subprocess.run([*command, *options], env=env, check=True, capture_output=True, text=True, timeout=300)
    run = next(folder.glob("*/*/seed0"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    device = json.loads((run / "result.json").read_text())["device"]
    return device, [line[name] for line in lines if name in line]


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["0", "1", "2", "3", "3_offload"])
def test_a_debug_run_on_a_gpu_equals_the_one_on_the_cpu(tmp_path: Path, stage: str) -> None:
    option = ("--zero-config", f"ds_configs/zero{stage}.json")
    on, gpu = losses(tmp_path / "gpu", True, *option)
    off, cpu = losses(tmp_path / "cpu", False, *option)
    assert on != "cpu"
    assert off == "cpu"
    assert gpu == pytest.approx(cpu, rel=2e-3)  # dropout of the adapters draws other numbers on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["default", "tokens", "paradigm_e"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fbt_on_a_gpu_equals_the_one_on_the_cpu(tmp_path: Path, stage: int, variant: str) -> None:
    """In fp32, also where gradients are reduced while the backward goes on."""
    zero = tmp_path / "zero.json"
    block = {"stage": stage, "overlap_comm": True, "stage3_param_persistence_threshold": 0}
    zero.write_text(json.dumps(block))
    options = ("--variant", variant, "--zero-config", str(zero), "--models.student.precision", "fp32")
    same = {"launcher": "cifar_fbt.py", "name": "total_loss"}
    on, gpu = losses(tmp_path / "gpu", True, *options, **same)
    off, cpu = losses(tmp_path / "cpu", False, *options, **same)
    assert (on != "cpu", off) == (True, "cpu")
    assert gpu == pytest.approx(cpu, rel=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("launcher", "name", "chosen", "options"),
    [
        ("cifar_mergenet.py", "mobilenetv2/loss", ("resnet50", "mobilenetv2"), ()),
        ("cifar_fbt.py", "total_loss", ("student", "teacher"), ("--models.student.precision", "fp32")),
    ],
)
def test_a_compiled_run_on_a_gpu_has_the_losses_of_the_run_as_written(
    tmp_path: Path, launcher: str, name: str, chosen: tuple[str, ...], options: tuple[str, ...]
) -> None:
    """Models alone, since a compiled adapter draws other dropout."""
    same = {"launcher": launcher, "name": name}
    _, written = losses(tmp_path / "written", True, *options, **same)
    _, compiled = losses(tmp_path / "compiled", True, *options, "--compile", *chosen, **same)
    assert len(written) == 4
    assert compiled == pytest.approx(written, rel=1e-2)


# --- batches of a set in memory ---


def drawn_without_waiting(device: str) -> list[tuple[Tensor, Tensor]]:
    """Two batches, augmented in every way; where the host waits for a GPU, torch raises."""
    images = data.load(config.Data("generated"), train=True)
    loader = data.Loader(images, 8, 0, ("crop", "flip", "rotate"), device=device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = [loader.batch(step) for step in (0, 1)]
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return [(pictures.cpu(), labels.cpu()) for pictures, labels in found]


@pytest.mark.parametrize("device", ON)
def test_a_set_in_memory_gives_batches_while_the_gpu_is_at_work(on: Any, device: str) -> None:
    images = data.load(config.Data("generated"), train=True)
    loader = data.Loader(images, 8, 0, ("crop", "flip", "rotate"))
    for step, (found, labels) in enumerate(on(device, drawn_without_waiting)):
        expected, classes = loader.batch(step)
        torch.testing.assert_close(found, expected)
        assert torch.equal(labels, classes)
