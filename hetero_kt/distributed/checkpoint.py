"""All engines of a run under one tag, made valid by a marker written last; resume from the newest complete one.

    checkpoints/<step>/<engine>/...   DeepSpeed's own files: weights, fp32 masters, moments
    checkpoints/<step>/rank<k>.pt     what only rank k knows: its buffers and random state
    checkpoints/<step>/method.pt      what is equal on all ranks and no engine's: adapters, their optimizers, averages
    checkpoints/<step>/DONE           written last: every other file's size; without it the folder does not count

Saving changes no state: every rank's buffers are kept as they are, so a resumed run is bit-equal to an uninterrupted
one. DeepSpeed loads its own files with pickle; ours are read as plain tensors, which runs no code.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import nn

REMOVE = "remove this checkpoint to go on from an older one"


def save(
    folder: Path,
    step: int,
    engines: Mapping[str, DeepSpeedEngine],
    shared: Mapping[str, Any],
    local: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write `folder/<step>`; collective. Older complete checkpoints beyond `keep` go, and so do torn ones.

    Args:
        shared: plain state that is equal on all ranks and in no engine; the first rank's is written.
        local: each rank's own.
    """
    target = folder / str(step)
    if (target / "DONE").exists():
        return target
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    dist.barrier()
    for name, engine in engines.items():
        # A change in what other engines wait for would hang: every rank saves every engine, in the same order.
        engine.save_checkpoint(str(target), tag=name, save_latest=False)
    mine = {
        "buffers": {name: dict(engine.module.named_buffers()) for name, engine in engines.items()},
        "random": random_state(),
        "local": dict(local),
    }
    torch.save(mine, target / f"rank{rank}.pt")
    if rank == 0:
        torch.save(dict(shared), target / "method.pt")
    dist.barrier()
    if rank == 0:
        sizes = {str(file.relative_to(target)): file.stat().st_size for file in target.rglob("*.pt")}
        (target / "DONE.part").write_text(json.dumps({"step": step, "ranks": dist.get_world_size(), "files": sizes}))
        os.replace(target / "DONE.part", target / "DONE")
        for old in complete(folder)[:-keep]:
            (old / "DONE").unlink()  # first the marker: a kill in between must not leave half of a valid one
        for path in folder.glob("*"):
            if path.name.isdigit() and not (path / "DONE").exists():
                shutil.rmtree(path)
    dist.barrier()
    return target


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob("*") if p.name.isdigit() and (p / "DONE").exists()]
    return sorted(found, key=lambda p: int(p.name))


def check(path: Path, world: int) -> None:
    """Refuse, before any engine starts, what `load` cannot restore on `world` ranks.

    Raises:
        ValueError: not a complete checkpoint, a renamed or damaged one, or one of another number of ranks.
    """
    if not (path / "DONE").exists():
        raise ValueError(f"--resume {path} is not a complete checkpoint (no DONE in it): name a complete one.")
    if not path.name.isdigit():
        raise ValueError(f"--resume {path} is not named by its step: give the checkpoint its number back.")
    try:
        done = json.loads((path / "DONE").read_text())
        saved, sizes = int(done["ranks"]), dict(done["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: {path / 'DONE'} cannot be read: {REMOVE}.") from error
    if saved != world:
        raise ValueError(
            f"--resume: {path} was written by {saved} rank(s) and there are {world} now: "
            f"start {saved}, or begin again with --resume never."
        )
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"--resume: {file} is missing: {REMOVE}.")
        if file.stat().st_size != size:
            raise ValueError(f"--resume: {file} has {file.stat().st_size} bytes and was saved with {size}: {REMOVE}.")


def load(path: Path, engines: Mapping[str, DeepSpeedEngine]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore every engine, this rank's buffers and its random state; returns what was saved as (`shared`, this rank's
    `local`). Collective.

    Raises:
        ValueError: as `check`.
        RuntimeError: DeepSpeed found nothing to load.
    """
    check(path, dist.get_world_size())
    for name, engine in engines.items():
        found, _ = engine.load_checkpoint(str(path), tag=name)
        if found is None:
            raise RuntimeError(f"{path} holds nothing that DeepSpeed can load for {name}.")
    mine = torch.load(path / f"rank{dist.get_rank()}.pt", weights_only=True, map_location="cpu")
    for name, engine in engines.items():
        restore_buffers(engine.module, mine["buffers"][name])
    restore_random_state(mine["random"])
    # Onto the CPU: `load_state_dict` moves what belongs elsewhere, and Adam's step counts belong nowhere else.
    return torch.load(path / "method.pt", weights_only=True, map_location="cpu"), mine["local"]


def restore_buffers(module: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Put `buffers` back in place, to the bit."""
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])


def random_state() -> dict[str, Any]:
    """Python's, NumPy's and torch's generators, as tensors and numbers."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
        ],
        "numpy_cached": float(cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Continue every generator from `random_state()`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, state["numpy_cached"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
