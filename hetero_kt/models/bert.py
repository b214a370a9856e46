"""BERT and DistilBERT for three tasks, as transformers has them: nothing is wrapped, no weight has another name.

`bert:LAYERSxWIDTH` and `distilbert:LAYERSxWIDTH` are fresh models of any size (`bert:12x768` is BERT-base,
`distilbert:6x768` DistilBERT); `hf:PATH` is a folder written by `save_pretrained`, `hf:NAME` one on the hub.

Weights are read and written tensor by tensor, from and to safetensors files only.

Shape suffixes: B rows, L tokens, K positions, V tokens of the vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import shutil
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from hetero_kt.data.text import Tokenizer
from hetero_kt.distributed import load_deepspeed
from hetero_kt.documents import mapping, read_json
from hetero_kt.files import publish_folder
from hetero_kt.messages import first_line
from hetero_kt.nn.soundness import ODD, check_finite
from hetero_kt.weights import check, save_tensors

Task = Literal["question_answering", "classification", "masked_lm"]

TASKS: dict[str, Task] = {"squad": "question_answering", "imdb": "classification", "pretraining": "masked_lm"}
"""What a model is built for, by the data that it trains on."""

_MODELS: dict[tuple[str, str], Any] = {
    ("bert", "question_answering"): BertForQuestionAnswering,
    ("bert", "classification"): BertForSequenceClassification,
    ("bert", "masked_lm"): BertForMaskedLM,
    ("distilbert", "question_answering"): DistilBertForQuestionAnswering,
    ("distilbert", "classification"): DistilBertForSequenceClassification,
    ("distilbert", "masked_lm"): DistilBertForMaskedLM,
}
_SIZED = re.compile(r"(bert|distilbert):([1-9]\d*)x([1-9]\d*)")
_FORMS = "bert:LAYERSxWIDTH, distilbert:LAYERSxWIDTH, hf:FOLDER or hf:NAME"
_FROM_HUB = ("config.json", "model*.safetensors*", "vocab.txt", "tokenizer*.json")
_POOLER = ".pooler."
_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@dataclass(frozen=True)
class Start:
    """Where a model's tensors began, by their names."""

    source: str
    """What they were taken from; empty where all are fresh."""
    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    left: tuple[str, ...]
    """In the source, and not in the model."""

    def __str__(self) -> str:
        if not self.source:
            return f"{len(self.fresh)} tensors are fresh"
        text = f"{len(self.taken)} tensors are from {self.source}"
        text += f", {len(self.fresh)} are fresh ({_short(self.fresh)})" if self.fresh else ""
        return text + (f", {len(self.left)} of it are left out ({_short(self.left)})" if self.left else "")


def build(
    name: str,
    task: Task,
    *,
    vocabulary: int | Tokenizer,
    classes: int = 2,
    init: str = "",
    zero: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, Start]:
    """A model for a task, and where its tensors began. What is fresh is drawn from torch's global generator.

    Args:
        vocabulary: the data's tokenizer, or how many tokens it has.
        classes: of a classifier.
        init: a safetensors file, or a folder with them, to start from: of the same model for any task. The body is
            taken, and the head where it is of the same shape.
        zero: DeepSpeed's `zero_optimization` block of stage 3, to build the model in pieces over the ranks; no rank
            ever holds more than one whole tensor. Collective, and all ranks need the same seed.

    Raises:
        ValueError: an unknown name, a hub that cannot be reached, weights that are missing or another model's, or a
            tokenizer that does not fit.
    """
    if task not in get_args(Task):
        raise ValueError(f"task {task!r} is unknown: use any of {', '.join(get_args(Task))}")
    size = vocabulary if isinstance(vocabulary, int) else vocabulary.size
    family, _, rest = name.partition(":")
    source = init
    if family == "hf":
        if init:
            raise ValueError(f"{name}: the name and init both say where to start: set one of them")
        source = str(found_folder(name, rest))
        kind, config = _config(name, Path(source))
        if config.vocab_size != size:
            raise ValueError(
                f"{name}: the model knows {config.vocab_size} tokens and the tokenizer has {size}: name the model's own"
                f" vocab.txt or folder as tokenizer"
            )
    else:
        kind, config = _sized(name, size)
    if task != "masked_lm":
        config.num_labels = 2 if task == "question_answering" else classes
    with _places(zero), no_init_weights():
        model = _MODELS[kind, task](config)
    _initialise(model)
    model.tie_weights()
    if task == "masked_lm":
        model.forward = types.MethodType(_predict, model)
    return model, (_take(model, name, source) if source else Start("", (), tuple(_shapes(model)), ()))


def outputs(model: Any, ids_BL: Tensor, mask_BL: Tensor, types_BL: Tensor, **more: Any) -> Any:
    """What transformers returns for a batch, of a model or its engine; DistilBERT has no token types and gets none."""
    module = getattr(model, "module", model)
    if module.config.model_type == "bert":
        more["token_type_ids"] = types_BL
    return model(input_ids=ids_BL, attention_mask=mask_BL, **more)


def save(model: nn.Module, state: Mapping[str, Tensor], folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a folder that transformers' `from_pretrained` loads, in place of one that is there.

    Args:
        model: says the configuration; its own weights do not matter (ZeRO may keep them in pieces).
        state: whole tensors by the model's names, factors multiplied out.
        tokenizer: goes into the folder too.

    Raises:
        ValueError: tensors that do not make up the model.
    """
    assert isinstance(model, PreTrainedModel)
    folder = Path(folder)
    shapes = _shapes(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name in shapes}
    tied = model.all_tied_weights_keys
    spare = set(state) - set(shapes) - set(tied)
    wrong = [f"{key} is unknown" for key in sorted(spare)] + _misfits(shapes, {k: v.shape for k, v in tensors.items()})
    if wrong:
        raise ValueError(f"{folder}: the tensors are not those of {type(model).__name__} ({_more(wrong)})")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    config.save_pretrained(str(part))
    save_tensors(tensors, part / "model.safetensors", {"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(part)
    publish_folder(part, folder)


# --- configurations ---


def _sized(name: str, vocabulary: int) -> tuple[str, Any]:
    found = _SIZED.fullmatch(name)
    if found is None:
        raise ValueError(f"no model is called {name!r}: use {_FORMS}, bert:4x256 for example")
    kind, layers, width = found[1], int(found[2]), int(found[3])
    heads, spread = _heads(width), deviation(width)
    if kind == "bert":
        return kind, BertConfig(
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            initializer_range=spread,
        )
    return kind, DistilBertConfig(
        vocab_size=vocabulary,
        n_layers=layers,
        dim=width,
        n_heads=heads,
        hidden_dim=4 * width,
        initializer_range=spread,
    )


def deviation(width: int) -> float:
    """Of fresh weights. BERT's 0.02 is for 768 features; where there are fewer, sums over them would be so small that
    attention begins next to uniform and stays so for thousands of steps, so they keep the size that they have there."""
    return 0.02 * math.sqrt(768 / width)


def _heads(width: int) -> int:
    """As many heads as make them 64 wide, or the nearest number that divides the width; of two, the smaller."""
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(d - width / 64))


def found_folder(name: str, rest: str) -> Path:
    """Where the files of `hf:` lie; fetched from the hub where no folder is called so."""
    path = Path(rest)
    if rest and path.is_dir():
        return path
    if not rest or path.is_absolute() or rest.startswith(".") or len(path.parts) > 2:
        raise ValueError(f"{name}: there is no folder {rest!r}: name one that save_pretrained has written")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(rest, allow_patterns=list(_FROM_HUB)))
    except Exception as error:  # whatever the hub's client or the network raise
        # Never random weights instead: the run would look right and be wrong.
        raise ValueError(
            f"{name} is no folder here and could not be fetched from the hub ({first_line(error)}): put it into the"
            f" hub's cache, name a local folder, or ask for a fresh model, bert:12x768 for example"
        ) from error


def _config(name: str, folder: Path) -> tuple[str, Any]:
    try:
        kind = mapping(read_json(folder / "config.json"), "the file")["model_type"]
        configs: dict[str, Any] = {"bert": BertConfig, "distilbert": DistilBertConfig}
        return kind, configs[kind].from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"{name}: {folder / 'config.json'} is not that of a BERT or DistilBERT ({type(error).__name__}:"
            f" {first_line(error)}): name a folder that save_pretrained has written"
        ) from error


# --- weights ---


@contextlib.contextmanager
def _places(zero: Mapping[str, Any] | None) -> Iterator[None]:
    """Inside, parameters are made in pieces over the ranks."""
    if zero is None:
        yield
        return
    if zero.get("stage") != 3:
        raise ValueError(f"a model is built in pieces under ZeRO-3 only, not stage {zero.get('stage')}")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": dict(zero)}
    with load_deepspeed().zero.Init(config_dict_or_path=config):
        yield


@contextlib.contextmanager
def _whole(parameters: Sequence[Any]) -> Iterator[None]:
    """Inside, parameters that ZeRO keeps in pieces are whole and to be written: to the same values on all ranks, each
    of which then keeps its piece. Nothing is sent."""
    pieces = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    placeholders = [parameter.data for parameter in pieces]
    for parameter in pieces:
        kept = parameter.ds_tensor
        parameter.data = torch.full(tuple(parameter.ds_shape), torch.nan, dtype=kept.dtype, device=kept.device)
    yield
    for parameter, placeholder in zip(pieces, placeholders, strict=True):
        size = parameter.ds_tensor.numel()
        first = dist.get_rank(parameter.ds_process_group) * size
        mine = parameter.data.flatten()[first : first + size]  # the last piece may reach beyond the end
        parameter.ds_tensor.data[: mine.numel()].copy_(mine)
        parameter.data = placeholder


@torch.no_grad()
def _initialise(model: PreTrainedModel) -> None:
    """transformers' own initialisation, module by module, inner ones first."""
    for module in reversed(list(model.modules())):
        with _whole(list(module.parameters(recurse=False))):
            model._init_weights(module)


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Shapes of the tensors that make up the model as it was built, by name; of tied ones the first name only."""
    with torch.device("meta"), no_init_weights():
        bare = type(model)(model.config)
    return {name: tensor.shape for name, tensor in bare.state_dict().items() if name not in bare.all_tied_weights_keys}


def _take(model: PreTrainedModel, name: str, path: str) -> Start:
    """Copy a file's tensors into the model: its body, and its head where all of it is there."""
    shapes = _shapes(model)
    prefix = f"{model.base_model_prefix}."
    found = _stored(name, path)
    body = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
    pooler = [key for key in body if _POOLER in key]
    if not any(key in found for key in pooler):  # a body from another task may have none
        body = {key: shape for key, shape in body.items() if key not in pooler}
    given = {key: tensor.shape for key, tensor in found.items()}
    wrong = _misfits(body, given)
    wrong += [f"{k} is unknown" for k in given if k.startswith(prefix) and k not in shapes and _POOLER not in k]
    if wrong:
        raise ValueError(f"{name}: init names {path}, which is another model's ({_more(wrong)}): give its own file")
    head = {key: shape for key, shape in shapes.items() if not key.startswith(prefix)}
    taken = [*body, *(head if not _misfits(head, given) else ())]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for key in taken:
            tensor = found[key].read(name)
            check_finite({key: tensor}, f"{name}: init names {path}")
            with _whole([parameters[key]]):
                parameters[key].copy_(tensor)
    left = tuple(key for key in given if key not in taken and key not in model.all_tied_weights_keys)
    return Start(path, tuple(taken), tuple(key for key in shapes if key not in taken), left)


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file."""

    file: Path
    key: str
    shape: torch.Size

    def read(self, name: str) -> Tensor:
        # The file is mapped anew for each tensor, so that what has been read does not stay in memory.
        try:
            with safe_open(self.file, "pt") as opened:
                return opened.get_tensor(self.key)
        except (SafetensorError, OSError, *ODD) as error:
            raise ValueError(
                f"{name}: init names {self.file}, which cannot be read as safetensors ({first_line(error)}): export it "
                "again"
            ) from error


def _stored(name: str, path: str) -> dict[str, _Stored]:
    """The tensors of a safetensors file, or of all in a folder, by the names that the model gives them."""
    place = Path(path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise ValueError(f"{name}: init names {path}, which holds no weights: give a .safetensors file or its folder")
    found = {}
    for file in files:
        try:
            check(file)
            with safe_open(file, "pt") as opened:
                shapes = {key: torch.Size(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, *ODD) as error:
            raise ValueError(
                f"{name}: init names {file}, which cannot be read as safetensors ({first_line(error)}): export it again"
            ) from error
        for key, shape in shapes.items():
            plain = key
            for old, new in _OLD_NAMES:
                plain = plain.replace(old, new)
            if not plain.endswith("position_ids"):  # a constant that old files keep
                found[plain] = _Stored(file, key, shape)
    return found


def _misfits(shapes: Mapping[str, torch.Size], given: Mapping[str, torch.Size]) -> list[str]:
    wrong = [f"{key} is missing" for key in shapes if key not in given]
    for key, needs in shapes.items():
        if key in given and given[key] != needs:
            wrong.append(f"{key} is {'x'.join(map(str, given[key]))}, not {'x'.join(map(str, needs))}")
    return wrong


def _more(wrong: Sequence[str]) -> str:
    return wrong[0] + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


# --- masked language modelling ---


def _predict(model: Any, *args: Any, positions: Tensor | None = None, **more: Any) -> Any:
    """The forward of a model for masked language modelling: with `positions` (B, K), logits (B, K, V) of these alone.

    The vocabulary's projection is most of a small model's work, and only one token in seven is asked for. It runs
    inside the model's own forward, where ZeRO-3 gathers what it needs.
    """
    if positions is None:
        return type(model).forward(model, *args, **more)
    hidden_BLC = model.base_model(*args, **more)[0]
    chosen_BKC = hidden_BLC.gather(1, positions.unsqueeze(2).expand(-1, -1, hidden_BLC.shape[2]))
    if isinstance(model, BertForMaskedLM):
        return model.cls(chosen_BKC)
    return model.vocab_projector(model.vocab_layer_norm(model.activation(model.vocab_transform(chosen_BKC))))
