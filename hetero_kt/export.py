"""Plain weights from a checkpoint, as the run itself would export them: no engine, no process group, no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hetero_kt import data, parts
from hetero_kt.config import Recipe, read_recipe
from hetero_kt.distributed.layout import verify
from hetero_kt.distributed.saved import Saved, SavedModel
from hetero_kt.nn.losses.precision import wide
from hetero_kt.nn.reencode import plain_state_dict
from hetero_kt.nn.soundness import check_finite
from hetero_kt.trainer import export_folder


def write(checkpoint: Path, to: Path | None = None) -> list[Path]:
    """Write every model of a run as it was when `checkpoint` was saved, and its average where it has one.

    Args:
        to: the folder that gets the exports; left out, `export-<step>` beside the run's checkpoints.

    Returns:
        The weights' files.

    Raises:
        ValueError: a damaged checkpoint, one outside a run's folder, or a folder that cannot be written.
    """
    checkpoint = checkpoint.resolve()
    try:
        verify(checkpoint)
    except OSError as error:
        raise ValueError(f"{error.filename or checkpoint} cannot be read ({error.strerror}): mend that.") from error
    folder = checkpoint.parents[1]
    to = folder / f"export-{checkpoint.name}" if to is None else to
    try:
        recipe = read_recipe(folder / "recipe.yaml")
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint} lies in no run's folder: {folder} has no recipe.yaml.") from error
    files = []
    try:
        export_folder(to)
        with Saved(checkpoint) as saved:
            for name in recipe.models:
                module, loaders = _whatever_it_takes(recipe, name)
                for view, state in _views(saved, name):
                    # A buffer may be infinite by its nature; a weight may not.
                    weights = SavedModel(saved, name).shapes
                    asked = {key: value for key, value in state.items() if key in weights or bool(value.isnan().any())}
                    check_finite(asked, f"{checkpoint} is of a run that had diverged")
                    plain = {key: value.contiguous() for key, value in plain_state_dict(state).items()}
                    parts.write_model(recipe, loaders, name, module, plain, to / view)
                    one, in_folder = to / f"{view}.safetensors", to / view / "model.safetensors"
                    files.append(in_folder if in_folder.is_file() else one)
    except OSError as error:
        raise ValueError(f"{error.filename or to} cannot be written ({error.strerror}): mend the folder.") from error
    return files


def _views(saved: Saved, name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(view, whole state dict) of a model and of its average, in fp32 where it trains in bf16; buffers are means over
    the ranks."""
    if name not in saved.models:
        raise ValueError(f"{saved.path} holds no model {name}: it is of another recipe than its folder's.")
    model, buffers = SavedModel(saved, name), saved.buffers()[name]
    weights = {key: wide(model.whole("weight", key)) for key in model.shapes}
    yield name, weights | buffers["buffers"]
    if model.averages:
        averages = {key: model.whole("average", key) for key in model.averages}
        yield f"{name}_ema", weights | averages | buffers["averages"]


def _whatever_it_takes(recipe: Recipe, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The module, and the loaders, that the export of a model asks about; of pictures' models it asks nothing."""
    model = recipe.models[name]
    config = recipe.data[model.data]
    if config.name in data.TEXTS:
        return parts.build_model(
            replace(model, init=""), config, recipe.data_dir, recipe.output_dir, option=f"--models.{name}"
        ), {}
    if config.name in data.PAIRS:
        how: dict[str, Any] = {"train": True, "seed": recipe.seed, "rank": 0, "world": 1, "device": torch.device("cpu")}
        return nn.Module(), {model.data: data.open_loader(config, recipe.data_dir, **how)}
    return nn.Module(), {}
