"""A recipe's models: built with their first weights, trained as it says, written for whoever uses them."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hetero_kt import data, files, models
from hetero_kt.checks import split_site, zero_block
from hetero_kt.config import Data, MergeNet, Model, Recipe
from hetero_kt.distributed import launch
from hetero_kt.distributed.launch import Ranks
from hetero_kt.distributed.learner import Learner, build_learner
from hetero_kt.messages import first_line
from hetero_kt.models.teacher import weights_of
from hetero_kt.nn import reencode
from hetero_kt.removal import EXPORT_FOLDER, strangers
from hetero_kt.tasks import Task, task_of
from hetero_kt.trainer import write_safetensors


def build_models(recipe: Recipe) -> dict[str, nn.Module]:
    """Every trained model, from a random stream of its own (so that no control changes another model's start), with
    the layers that exchange a factor re-parametrised."""
    modules = {}
    for name, model in recipe.models.items():
        seed_by_name(recipe, name)
        try:
            modules[name] = build_model(
                model,
                recipe.data[model.data],
                recipe.data_dir,
                recipe.output_dir,
                zero_block(model.zero) if _in_pieces(recipe, name) else None,
                f"--models.{name}",
            )
        except ValueError as error:
            raise ValueError(str(error).replace("--data.NAME", f"--data.{model.data}")) from error
        check_precision(f"--models.{name}.precision", model.precision, modules[name])
    if isinstance(recipe.method, MergeNet):
        for label, transfer in recipe.method.transfers.items():
            if transfer.mode == "factor":
                for side, (site, rank) in zip(("source", "target"), transfer.sites(), strict=True):
                    _factorise(modules, site, rank, f"{label}.{side}")
    return modules


def first_weights(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Checksums of the local files that each model's weights begin from, by option; models without such are left out.

    Raises:
        ValueError: a file that is missing or cannot be read.
    """
    found = {}
    for name, model in recipe.models.items():
        option = f"--models.{name}"
        named = {"init": model.init, "xvlm.vision": model.xvlm.vision, "xvlm.text": model.xvlm.text}
        if model.name.startswith("hf:"):
            named["name"] = model.name.removeprefix("hf:")
        checksums = {}
        for field, given in named.items():
            if not given or given.startswith(("hf:", "timm:")) or (field == "name" and not Path(given).is_dir()):
                continue  # fresh weights, or published ones
            place = Path(given) if field == "name" else weights_of(given, f"{option}.{field}", recipe.output_dir)
            try:
                for file in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
                    checksums[field if file == place else f"{field} {file.name}"] = files.checksum(file)
            except OSError as error:
                raise ValueError(f"{option}.{field}: {place} cannot be read ({first_line(error)}).") from error
        if checksums:
            found[name] = checksums
    return found


def _in_pieces(recipe: Recipe, name: str) -> bool:
    """Whether a model is never whole on a rank: texts' models under ZeRO-3, unless a layer has to be factorised."""
    model = recipe.models[name]
    transfers = recipe.method.transfers.values() if isinstance(recipe.method, MergeNet) else ()
    factored = {split_site(site)[0] for t in transfers if t.mode == "factor" for site in (t.source, t.target)}
    wanted = recipe.data[model.data].name in data.TEXTS and model.precision != "bf16" and name not in factored
    return wanted and zero_block(model.zero)["stage"] == 3


def _factorise(modules: Mapping[str, nn.Module], site: str, rank: int, option: str) -> None:
    model, weight = split_site(site)
    try:
        if reencode.factor_parameter(modules[model], weight) is None:  # two transfers may share a site
            reencode.factorise(modules[model], weight, rank)
    except ValueError as error:
        raise ValueError(f"--method.transfers.{option} {site}: {error}") from error


def build_model(
    model: Model,
    config: Data,
    data_dir: str,
    output_dir: str = "runs",
    zero: dict[str, Any] | None = None,
    option: str = "--models.NAME",
) -> nn.Module:
    """A recipe's model for its data, with its first weights; with a ZeRO-3 block, a BERT is built in pieces."""
    if config.name in data.PAIRS:
        return _build_xvlm(model, config, data_dir, output_dir, option)
    init = str(weights_of(model.init, f"{option}.init", output_dir)) if model.init else ""
    if config.name in data.TEXTS:
        from hetero_kt.models import bert

        tokens = data.tokenizer(config, data_dir)
        module, start = bert.build(model.name, bert.TASKS[config.name], vocabulary=tokens, init=init, zero=zero)
        if launch.place()[0] == 0 and (init or model.name.startswith("hf:")):
            print(f"{model.name}: {start}", flush=True)
        return module
    classes = data.classes(config, data_dir)
    return models.build(model.name, classes, pretrained=model.pretrained, image_size=config.image_size, init=init)


def _build_xvlm(model: Model, config: Data, data_dir: str, output_dir: str, option: str) -> nn.Module:
    from hetero_kt.models import xvlm

    def start(field: str, given: str) -> str:
        outside = given.startswith(("hf:", "timm:")) or not given
        return given if outside else str(weights_of(given, f"{option}.{field}", output_dir))

    module, begun = xvlm.build(
        model.name,
        xvlm.TASKS[config.name],
        vocabulary=data.tokenizer(config, data_dir),
        image_size=config.image_size,
        init=start("init", model.init),
        vision=start("xvlm.vision", model.xvlm.vision),
        text=start("xvlm.text", model.xvlm.text),
        dropout=model.xvlm.dropout,
        gathered=model.xvlm.negatives == "gathered",
    )
    module.checkpointing = model.checkpointing
    if launch.place()[0] == 0 and (model.init or model.xvlm.vision or model.xvlm.text):
        print(f"{model.name}: {begun}", flush=True)
    return module


def write_model(
    recipe: Recipe,
    loaders: Mapping[str, Any],
    name: str,
    module: nn.Module,
    state: dict[str, Tensor],
    path: Path,
) -> None:
    """The trained model called `name`, as whoever uses it reads it: `<path>.safetensors` for timm's `load_state_dict`,
    a folder `<path>/` for transformers' `from_pretrained` or, of an X-VLM, for `hetero-kt ask`."""
    config = recipe.data[recipe.models[name].data]
    if config.name in (*data.PAIRS, *data.TEXTS):
        for place in (path, path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.old")):
            if found := strangers(place, EXPORT_FOLDER):  # it would be removed with the folder that is replaced
                raise OSError(errno.ENOTEMPTY, f"no export has written {found[0]} in it", str(place))
    if config.name in data.PAIRS:
        from hetero_kt import ask

        loader, tokens = loaders[recipe.models[name].data], data.tokenizer(config, recipe.data_dir)
        ask.save(recipe.models[name].name, config, loader, tokens, state, path)
        return
    if config.name not in data.TEXTS:
        write_safetensors(name, module, state, path)
        return
    from hetero_kt.models import bert

    bert.save(module, state, path, data.tokenizer(config, recipe.data_dir))


def task(recipe: Recipe, model: str) -> Task:
    """What the model called `model` is trained for."""
    return task_of(recipe.data[recipe.models[model].data].name)


def learner_of(recipe: Recipe, name: str, module: nn.Module, ranks: Ranks, *, kept: bool = True) -> Learner:
    """`module`, trained as the recipe's model `name` is; what is dropped afterwards needs no average."""
    model = recipe.models[name] if kept else replace(recipe.models[name], ema=0.0)
    rows = recipe.data[model.data].batch // ranks.world
    return build_learner(module, model, zero_block(model.zero), rows=rows, steps=recipe.budget(name))


def seed_by_name(recipe: Recipe, name: str) -> None:
    """The random stream that the part called `name` is initialised from."""
    launch.seed_everything(recipe.seed * 100_003 + zlib.crc32(name.encode()) % 100_003)


def parameters(module: nn.Module | None) -> int:
    """Number of a module's parameters, also of one in pieces."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters()) if module is not None else 0


def check_precision(option: str, precision: str, module: nn.Module, whose: str = "this model") -> None:
    """BatchNorm's running statistics are sums of many small steps, which parameters stored in bf16 would round away."""
    if precision == "bf16" and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        raise ValueError(f"{option} bf16 does not suit the BatchNorm in {whose}: use autocast.")


def check_bf16(recipe: Recipe, device: torch.device) -> None:
    """Refuse precisions that compute in bf16 on a GPU that does not: DeepSpeed would when its engine starts.

    Raises:
        ValueError: one sentence with the option and the mend.
    """
    if device.type != "cuda" or torch.cuda.is_bf16_supported():
        return
    for name, model in recipe.models.items():
        if model.precision != "fp32":
            raise ValueError(
                f"--models.{name}.precision {model.precision} computes in bf16, which this GPU "
                f"({torch.cuda.get_device_name(device)}) does not: use fp32."
            )
