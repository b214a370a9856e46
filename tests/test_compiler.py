"""--compile: what it may name, where it cannot be, and that it changes no more than rounding."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from refusal import assert_refused, start
from torch import Tensor, nn

from hetero_kt import compiler
from hetero_kt.config import Recipe
from hetero_kt.distributed.heartbeat import Heartbeat
from hetero_kt.options import Options

LAUNCHERS = Path(__file__).parents[1] / "launchers"
MERGENET = LAUNCHERS / "cifar_mergenet.py"
DISTILL = LAUNCHERS / "cifar_distill.py"
DIGITS = ("--variant", "digits")


@pytest.mark.parametrize(
    ("launcher", "arguments", "words"),
    [
        (MERGENET, ("--compile", "resnet50"), ("--compile resnet50", "use resnet,")),
        (
            MERGENET,
            ("--compile", "resnet", "--models.resnet.zero", "ds_configs/zero3.json"),
            ("under ZeRO-3", "ZeRO-2"),
        ),
        (DISTILL, ("--compile", "student", "--models.student.checkpointing"), ("checkpointing", "use one of both")),
        (
            DISTILL,
            ("--compile", "teacher", "--method.teachers.teacher.zero", "ds_configs/zero3.json"),
            ("under ZeRO-3", "--method.teachers.teacher.zero"),
        ),
        (
            DISTILL,
            ("--compile", "teacher", "--method.teachers.teacher.logits", "stored"),
            ("--method.teachers.teacher.logits stored", "use one of both"),
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_its_option(
    ranks: Any, tmp_path: Path, launcher: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    given = (*DIGITS, *arguments, "--output-dir", str(tmp_path))
    assert_refused(ranks(1).run(start, launcher, given), words)


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def nothing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    with pytest.raises(ValueError, match="C\\+\\+ compiler"):
        compiler.check_compiler("cpu")


def test_a_gpu_without_a_c_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import _triton

    monkeypatch.setattr(_triton, "has_triton", lambda: True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ValueError, match="C compiler \\(gcc\\)"):
        compiler.check_compiler("cuda")
    monkeypatch.setenv("CC", "cc")
    compiler.check_compiler("cuda")
    monkeypatch.setattr(_triton, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="Triton"):
        compiler.check_compiler("cuda")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compiles by tracing alone (no C++), and says the rows of every batch that a compiled graph was called with."""
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def called(*given: Any) -> Any:
            calls.extend(len(t) for t in given if not isinstance(t, nn.Parameter))
            return graph(*given)

        return called

    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: plain(module, backend=backend))
    compiler.forget()
    yield calls
    compiler.forget()


def test_only_the_chosen_are_compiled_and_evaluation_runs_as_written(traced: list[int]) -> None:
    modules = {"one": nn.Linear(3, 2), "other": nn.Linear(3, 2)}
    expected = {name: module(torch.ones(4, 3)) for name, module in modules.items()}
    names = {name: list(module.state_dict()) for name, module in modules.items()}
    compiler.compile_chosen(modules, ("one",))
    for name, module in modules.items():
        assert torch.equal(module(torch.ones(4, 3)), expected[name])
        assert list(module.state_dict()) == names[name]
    assert traced == [4]
    with compiler.as_written():
        modules["one"](torch.ones(5, 3))
    assert traced == [4]


def traced_run(base: Recipe) -> tuple[bytes, set[int], list[str]]:
    """How a run ends whose graphs are traced and run as they are, under `--debug`'s watch for NaN; how many pictures
    the traced ones were given; and what its rank has told others of."""
    rows: set[int] = set()
    told: list[str] = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        def called(*given: Any) -> Any:
            tensors = [t for t in given if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]
            rows.update(len(t) for t in tensors if t.dim() == 4)
            return graph(*given)

        return called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Heartbeat, "long", lambda _, part: told.append(part))
        with torch.autograd.set_detect_anomaly(True), torch.compiler.set_stance("default", force_backend=backend):
            end = tiny._train(base, Options(), tiny.Plan())
    compiler.forget()
    return end, rows, told


def test_a_run_is_compiled_in_its_steps_alone_and_ends_to_the_bit_as_written(ranks: Any, tmp_path: Path) -> None:
    """Without kernels that round otherwise: a student with BatchNorm and an average, a teacher and its last stage."""
    base = tiny.with_average(tiny.distillation(tmp_path, objective="fbt", steps=2, eval_every=1))
    chosen = replace(base, name="compiled", compile=("student", "teacher"))
    ((written, none, quiet),) = ranks(1).run(traced_run, base)
    ((compiled, rows, told),) = ranks(1).run(traced_run, chosen)
    assert (none, rows) == (set(), {base.data["all"].batch})
    assert "compiling" in told
    assert told.index("compiling") > told.index("preparing the run")
    assert "compiling" not in quiet
    tiny.assert_same_end([pickle.loads(compiled)], [pickle.loads(written)])


def losses(folder: Path, name: str, *more: str) -> list[float]:
    """Of five steps of the demo's pair, one run in a process of its own."""
    options = (*DIGITS, "--control", "none", "--steps", "5", "--log-every", "1", "--output-dir", str(folder))
    command = [sys.executable, str(MERGENET), *options, "--name", name, *more]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr
    (log,) = folder.glob(f"{name}/*/seed0/metrics.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line[f"{model}/loss"] for line in lines for model in ("resnet", "mobilenetv2") if f"{model}/loss" in line]


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_the_run_as_written(tmp_path: Path) -> None:
    """With the C++ compiler, models with BatchNorm and a factored layer, through DeepSpeed engines."""
    run = partial(losses, tmp_path)
    written, compiled = run("as_written"), run("compiled", "--compile", "resnet", "mobilenetv2")
    assert len(written) == 10
    assert compiled == pytest.approx(written, rel=1e-3)
    assert compiled != written  # else nothing was compiled: fused kernels round otherwise
