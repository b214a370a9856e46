"""How long a run takes until its first step is done, beside the imports that nothing here can avoid.

    python benchmarks/startup.py

Each turn starts processes: a launcher with its variant for handwritten digits, which ends after its first step, and one
that only imports torch and deepspeed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from measure import Turns, report

LAUNCHERS = Path(__file__).resolve().parents[1] / "launchers"
FIRST_STEP = """
import os, runpy, sys
from hetero_kt.trainer import Trainer
step = Trainer._one_step
def first(trainer):
    step(trainer)
    os._exit(0)
Trainer._one_step = first
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Bench:
    """Options of this benchmark."""

    launcher: str = "cifar_mergenet.py"
    variant: str = "digits"
    turns: int = 5
    json: str = ""
    """Also write the figures to this file."""


def main(bench: Bench) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:

        def launcher() -> None:
            options = ("--variant", bench.variant, "--output-dir", folder, "--resume", "never")
            _run("-c", FIRST_STEP, str(LAUNCHERS / bench.launcher), *options)

        sides = {"launcher": launcher, "imports": lambda: _run("-c", "import torch, deepspeed")}
        turns = Turns(torch.device("cpu"), elsewhere=True).take(sides, bench.turns)
    note = f"{turns.median('launcher'):.1f} s; the variant {bench.variant}, two small models and a transfer"
    what = f"start-up until the first step, {bench.launcher.removesuffix('.py')}"
    figures = [turns.ratio(what, "launcher", "imports", "import torch, deepspeed", note=note)]
    report("start-up", figures, bench.json, seconds=turns.raw())


def _run(*arguments: str) -> None:
    ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    if ended.returncode:
        raise RuntimeError(ended.stderr[-2000:])


if __name__ == "__main__":
    main(tyro.cli(Bench))
