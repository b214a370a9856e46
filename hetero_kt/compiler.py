"""`--compile`: the forward and backward of chosen models, teachers and adapters as fused kernels, by torch.compile.

Only what trains is compiled: evaluation runs as it is written, so that neither its mode nor its last, smaller batch is
compiled for. Weights keep their names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from hetero_kt.config import Distill, MergeNet, Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMS = 64
"""Compiled forms that torch keeps of one piece of code before it gives up; all modules share the code of their call."""


def compilable(recipe: Recipe) -> dict[str, str]:
    """What `--compile` may name: each with its option."""
    names = {name: f"--models.{name}" for name in recipe.models}
    if isinstance(recipe.method, MergeNet):
        return names | {name: f"--method.transfers.{name}" for name in recipe.method.transfers}
    assert isinstance(recipe.method, Distill)
    return names | {name: f"--method.teachers.{name}" for name in recipe.method.teachers}


def compile_chosen(modules: Mapping[str, nn.Module], chosen: Collection[str]) -> None:
    """Compile those of `modules` whose names are `chosen`, at their first call."""
    import torch

    for name, module in modules.items():
        if name in chosen:
            # The name that torch 2.6 knows; to later ones it is another for recompile_limit.
            torch._dynamo.config.cache_size_limit = max(FORMS, torch._dynamo.config.cache_size_limit)
            module.compile()


def forget() -> None:
    """Drop what earlier runs of this process have compiled: it belongs to modules that are gone."""
    import torch

    torch._dynamo.reset()


def on_compiling(told: Callable[[], None]) -> None:
    """Call `told` whenever something begins to be compiled, until `forget`."""
    import torch._dynamo.callback

    torch._dynamo.callback.on_compile_start(lambda *_: told())  # torch 2.6 passes nothing


def as_written() -> AbstractContextManager[Any]:
    """A context in which nothing is compiled, and nothing compiled runs."""
    import torch

    return torch.compiler.set_stance("force_eager")


def check_compiler(device: torch.device | str) -> None:
    """Raise ValueError if this machine has nothing that torch.compile could make kernels with."""
    import torch

    if torch.device(device).type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError("--compile needs Triton for this GPU, which is not installed: leave it out.")
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            raise ValueError("--compile needs a C compiler (gcc) for Triton: install one, or leave it out.")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise ValueError(
            "--compile needs a C++ compiler (g++) on this machine: install one, or leave it out."
        ) from error
