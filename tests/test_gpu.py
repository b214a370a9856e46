"""What only a CUDA device can show; skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
