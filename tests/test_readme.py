"""The README's Python blocks run as they stand, and its commands name options that exist."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from test_launchers import load
from torch import nn

from hetero_kt import options
from hetero_kt.distributed import launch
from hetero_kt.run import run

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPE, PLAIN, ENGINES = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if "launchers/" in line
]


def test_the_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("plain.py")
    assert names["log"] == {} or "transfer_seconds" in names["log"]
    assert names["exchange"].step == 40
    ordinary = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    ordinary.load_state_dict(torch.load("narrow.pt"))
    torch.testing.assert_close(ordinary(names["x"]), names["narrow"](names["x"]))


def run_block(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(source, names)
    shapes = {name: tuple(value.shape) for name, value in names["weights"].items()}
    for engine in names["engines"]:
        engine.destroy()
    return {"shapes": shapes, "updates": [path.updates for path in names["exchange"].paths]}


@pytest.mark.parametrize("stage", ['{"stage": 2}', '{"stage": 3, "stage3_param_persistence_threshold": 0}'])
def test_the_loop_of_engines(ranks: Any, stage: str) -> None:
    assert '{"stage": 2}' in ENGINES
    for result in ranks(2).run(run_block, ENGINES.replace('{"stage": 2}', stage)):
        assert result["shapes"] == {"0.weight": (32, 64), "0.bias": (32,), "2.weight": (10, 32), "2.bias": (10,)}
        assert result["updates"] == [2, 2]


def run_recipe(source: str, variant: str, folder: str) -> bool:
    names: dict[str, Any] = {"__name__": "mine"}
    exec(source, names)
    variants = {name: names[name] for name in ("default", "often")}
    arguments = ["--variant", variant, "--debug", "--output-dir", folder]
    return run(*options.resolve(variants, arguments), launch.start(), launch.StopSignal())


@pytest.mark.parametrize("variant", ["default", "often"])
def test_the_recipe(ranks: Any, tmp_path: Path, variant: str) -> None:
    assert ranks(2).run(run_recipe, RECIPE, variant, str(tmp_path)) == [True, True]
    assert len(list(tmp_path.glob("*/transfer/seed0/export/*.safetensors"))) == 2


def test_every_launcher_command_has_options_that_exist() -> None:
    assert len(COMMANDS) > 8
    for command in COMMANDS:
        words = shlex.split(command.partition("&&")[0])
        at = next(i for i, word in enumerate(words) if word.startswith("launchers/"))
        arguments = [word for word in words[at + 1 :] if word != "--help"]
        options.resolve(load(ROOT / words[at]).VARIANTS, arguments)
