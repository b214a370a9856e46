"""Where an X-VLM's tensors begin: its own files, published checkpoints, and separate vision and text weights.

Inside the project the vision encoder has timm's names. Published checkpoints differ from that so:

    Swin            the merging of patches stands at the end of a stage, timm has it at the beginning of the next
    CLIP's ViT      q, k and v are separate, `vision_encoder.encoder.layers.{i}.self_attn.q_proj`, and other names
    pre-training    the text encoder's names have `bert.` in front, and its language model's head stands beside it
    `temp`          has no dimension, ours one: DeepSpeed cannot broadcast a scalar

Buffers that follow from the sizes (`position_ids`, `relative_position_index`, `attn_mask`) are left out. Reading a file
executes nothing of it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt.messages import first_line
from hetero_kt.nn.soundness import check_finite
from hetero_kt.weights import check

__all__ = ["Start", "fill", "from_official", "read", "to_official"]

VISION, TEXT, DECODER = "vision_encoder.", "text_encoder.", "text_decoder."
_PREDICTIONS = "cls.predictions."
_TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
"""Second names of tensors, with their first."""
_WORDS = f"{TEXT}embeddings.word_embeddings.weight"
_LAYER = re.compile(rf"({VISION}(blocks|layers)|{TEXT}encoder\.layer)\.")
_BUFFERS = ("position_ids", "relative_position_index", "attn_mask")
_HEADS = ("vision_proj.", "text_proj.", "temp", "itm_head.")


@dataclass(frozen=True)
class Start:
    """Where a model's tensors began, by their names."""

    sources: tuple[str, ...]
    """What they were taken from; empty where all are fresh."""
    taken: tuple[str, ...]
    interpolated: tuple[str, ...]
    """Of those taken, position tables that were made for pictures of another size."""
    fresh: tuple[str, ...]
    left: tuple[str, ...]
    """In the sources, and not in the model."""

    def __str__(self) -> str:
        if not self.sources:
            return f"{len(self.fresh)} tensors are fresh"
        text = f"{len(self.taken)} tensors are from {' and '.join(self.sources)}"
        if self.interpolated:
            text += f", {len(self.interpolated)} of them interpolated ({_short(self.interpolated)})"
        text += f", {len(self.fresh)} are fresh ({_short(self.fresh)})" if self.fresh else ""
        return text + (f", {len(self.left)} of it are left out ({_short(self.left)})" if self.left else "")


# --- filling a model ---


def fill(model: nn.Module, *, init: str = "", vision: str = "", text: str = "") -> Start:
    """Copy weights into a fresh model; `hetero_kt.models.xvlm.build` says from where.

    The vision encoder and the text encoder are taken whole from `init`, and each head where all of it is there and
    fits. The decoder starts from its own weights or else from the text encoder's embeddings and cross layers, also
    where these are fresh; its keys and values of the cross-attention are fresh where pictures have another width.

    Raises:
        ValueError: one sentence about a file that is missing, damaged or another model's.
    """
    filling = _Filling(model)
    sources = tuple(source for source in (init, vision, text) if source)
    if init:
        filling.take_model(init)
    if vision:
        filling.take_vision(vision)
    if text:
        filling.take_text(text)
    filling.copy_decoder()
    names = [name for name in filling.own if name not in _TIED]
    fresh = tuple(name for name in names if name not in filling.taken)
    return Start(sources, tuple(filling.taken), tuple(filling.interpolated), fresh, tuple(filling.left))


class _Filling:
    """A model's tensors by name, and what has become of them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.own: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.alone: int = model.text_encoder.alone
        self.layers: int = len(model.text_encoder.layers)
        self.taken: list[str] = []
        self.interpolated: list[str] = []
        self.left: list[str] = []
        self.decoder_given = False

    def take_model(self, path: str) -> None:
        option = f"{self.model.name}: init names {path}"
        found = from_official(read(path, option))
        body = [name for name in self.own if name.startswith((VISION, TEXT))]
        self._copy(option, body, found)
        used = set(body)
        decoder = [name for name in self.own if name.startswith(DECODER) and name not in _TIED]
        if decoder and any(key.startswith(DECODER) for key in found):
            self._copy(option, decoder, found)
            self.decoder_given = True
            used |= set(decoder)
        elif decoder:
            used |= self._take_predictions({k.removeprefix(TEXT): v for k, v in found.items()}, TEXT)
        for head in _HEADS:
            names = [name for name in self.own if name.startswith(head)]
            if names and not self._misfits(names, found):
                self._copy(option, names, found)
                used |= set(names)
        self.left += [key for key in found if key not in used and key not in _TIED]

    def take_vision(self, source: str) -> None:
        option = f"{self.model.name}: vision names {source}"
        whole = _published(source, option) if source.startswith("timm:") else read(source, option)
        tower = _tower(whole)
        names = [name.removeprefix(VISION) for name in self.own if name.startswith(VISION)]
        keys = _every_second(option, list(tower), "blocks", _count(names, "blocks"))
        if "norm_pre.weight" not in keys:  # only CLIP's tower has it
            names = [name for name in names if not name.startswith("norm_pre.")]
        self._copy(option, [VISION + name for name in names], {VISION + new: tower[old] for new, old in keys.items()})
        used = {keys[name] for name in names}
        self.left += [key for key in tower if key not in used]

    def take_text(self, source: str) -> None:
        option = f"{self.model.name}: text names {source}"
        whole = read(_bert_folder(source) if source.startswith("hf:") else source, option)
        plain = {_modern(key).removeprefix("bert."): tensor for key, tensor in whole.items()}
        plain = {key: tensor for key, tensor in plain.items() if not key.endswith(_BUFFERS)}
        keys = _every_second(option, list(plain), "encoder.layer", self.layers)
        wanted = [name for name in self.own if name.startswith(TEXT) and ".crossattention." not in name]
        self._copy(option, wanted, {TEXT + new: plain[old] for new, old in keys.items()})
        used = {keys[name.removeprefix(TEXT)] for name in wanted}
        if any(name.startswith(DECODER) for name in self.own):
            used |= self._take_predictions(plain, "")
        self.left += [key for key in plain if key not in used]

    def copy_decoder(self) -> None:
        """The decoder's layers from the encoder's cross layers, and its embeddings, unless it has its own."""
        if self.decoder_given:
            return
        wider = self.model.vision_width != self.own[_WORDS].shape[1]
        for name, tensor in self.own.items():
            body = name.removeprefix(f"{DECODER}bert.")
            if body == name or (wider and re.search(r"\.crossattention\.self\.(key|value)\.", name)):
                continue
            origin = TEXT + re.sub(r"layer\.(\d+)", lambda found: f"layer.{int(found[1]) + self.alone}", body)
            tensor.copy_(self.own[origin])
            if origin in self.taken:
                self.taken.append(name)

    def _take_predictions(self, found: Mapping[str, Tensor], prefix: str) -> set[str]:
        """The language model's head of a BERT, where all of it is there; the names that were used, with `prefix`."""
        names = [name for name in self.own if name.startswith(DECODER + _PREDICTIONS) and name not in _TIED]
        given = {DECODER + key: tensor for key, tensor in found.items() if key.startswith(_PREDICTIONS)}
        if self._misfits(names, given):
            return set()
        self._copy("", names, given)
        second = {name for name in _TIED if name in given}
        return {prefix + name.removeprefix(DECODER) for name in {*names, *second}}

    def _copy(self, option: str, names: Sequence[str], found: Mapping[str, Tensor]) -> None:
        """Copy the tensors called `names`, all of which have to be there and fit, with no layers besides."""
        if _WORDS in names and _WORDS in found:
            has, needs = found[_WORDS].shape, self.own[_WORDS].shape
            if has[1:] == needs[1:] and has != needs:
                raise ValueError(
                    f"{option}, which knows {has[0]} tokens and the tokenizer has {needs[0]}: name the model's own"
                    f" vocab.txt or folder as tokenizer"
                )
        wrong = self._misfits(names, found)
        wrong += [f"{key} is unknown" for key in found if _LAYER.match(key) and key not in self.own]
        if wrong:
            raise ValueError(f"{option}, which is another model's ({_more(wrong)}): give its own file")
        for name in names:
            tensor = found[name]
            if tensor.shape != self.own[name].shape:
                tensor = _resized(name, tensor, self.own[name].shape)
                self.interpolated.append(name)
            self.own[name].copy_(tensor)
            self.taken.append(name)

    def _misfits(self, names: Sequence[str], found: Mapping[str, Tensor]) -> list[str]:
        wrong = [f"{name} is missing" for name in names if name not in found]
        for name in names:
            if name in found and not _fits(name, found[name].shape, self.own[name].shape):
                wrong.append(f"{name} is {_times(found[name].shape)}, not {_times(self.own[name].shape)}")
        return wrong


# --- position tables ---


def _fits(name: str, given: torch.Size, needed: torch.Size) -> bool:
    """Whether a tensor can be taken, position tables after interpolation."""
    if given == needed:
        return True
    if name.endswith(".pos_embed") and len(given) == 3:
        patches = given[1] - 1
        alike = (given[0], given[2]) == (needed[0], needed[2])
        return alike and patches > 0 and isqrt(patches) ** 2 == patches
    if name.endswith(".relative_position_bias_table") and len(given) == 2:
        return given[1] == needed[1] and given[0] > 0 and isqrt(given[0]) ** 2 == given[0]
    return False


def _resized(name: str, table: Tensor, needed: torch.Size) -> Tensor:
    """A position table for another size of pictures, bicubic; the class token's own position stays."""
    if name.endswith(".pos_embed"):
        first, rest = table[:, :1], table[0, 1:]
        return torch.cat([first, _stretched(rest, isqrt(needed[1] - 1))[None]], 1)
    return _stretched(table, isqrt(needed[0]))


def _stretched(table_NC: Tensor, side: int) -> Tensor:
    old = isqrt(len(table_NC))
    map_CHW = table_NC.float().T.reshape(1, -1, old, old)
    return F.interpolate(map_CHW, (side, side), mode="bicubic", align_corners=False)[0].flatten(1).T.to(table_NC.dtype)


# --- published layouts ---

_CLIP_NAMES = (
    ("patch_embed.proj.", "patch_embed."),
    ("norm_pre.", "pre_layrnorm."),
    ("norm.", "post_layernorm."),
)
"""timm's, and the published ones (spelt so there)."""
_CLIP_BLOCK = (("attn.proj.", "self_attn.out_proj."), ("norm1.", "layer_norm1."), ("norm2.", "layer_norm2."))
_QKV = ("q_proj", "k_proj", "v_proj")


def to_official(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A whole model's tensors by the names and in the shapes of the published fine-tuned checkpoints.

    Args:
        name: of the model, for messages.

    Raises:
        ValueError: the tensors are not those of an X-VLM.
    """
    vision = {key.removeprefix(VISION): tensor for key, tensor in state.items() if key.startswith(VISION)}
    rest = {key: tensor for key, tensor in state.items() if not key.startswith(VISION)}
    if "patch_embed.proj.weight" not in vision or _WORDS not in rest:
        raise ValueError(f"{name}: the tensors are not those of an X-VLM: give the state of a whole model")
    tower = _shifted(vision, -1) if any(key.startswith("layers.") for key in vision) else _to_clip(vision)
    official = {VISION + key: tensor for key, tensor in tower.items()} | rest
    if "temp" in rest:
        official["temp"] = rest["temp"].reshape(())
    for second, first in _TIED.items():
        if first in rest:
            official.setdefault(second, rest[first])
    return official


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way, from fine-tuned and pre-training layouts; what has our names and shapes already stays."""
    own = {}
    for key, tensor in state.items():
        if not key.startswith(VISION) and not key.endswith(_BUFFERS):
            own[re.sub(r"^text_encoder\.bert\.", TEXT, key)] = tensor
    if "temp" in own and own["temp"].numel() == 1:
        own["temp"] = own["temp"].reshape(1)
    vision = {key.removeprefix(VISION): tensor for key, tensor in state.items() if key.startswith(VISION)}
    return {VISION + key: tensor for key, tensor in _tower(vision).items()} | own


def _tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vision encoder's tensors by timm's names: from timm's own, Swin's original, X-VLM's CLIP, or transformers'
    CLIP (whole, or its vision tower)."""
    tower = {key: tensor for key, tensor in state.items() if not key.endswith(_BUFFERS)}
    for prefix in (VISION, "vision_model."):
        if any(key.startswith(prefix) for key in tower):
            tower = {key.removeprefix(prefix): tensor for key, tensor in tower.items()}
    if any(key.startswith("encoder.layers.") for key in tower):
        return _from_clip(tower)
    if any(key.startswith("layers.0.downsample.") for key in tower):
        return _shifted(tower, 1)
    return tower


def _shifted(tower: Mapping[str, Tensor], by: int) -> dict[str, Tensor]:
    def moved(key: str) -> str:
        return re.sub(r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + by}.downsample.", key)

    return {moved(key): tensor for key, tensor in tower.items()}


def _to_clip(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    clip: dict[str, Tensor] = {}
    for key, tensor in tower.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if key == "cls_token":
            clip["class_embedding"] = tensor.reshape(-1)
        elif key == "pos_embed":
            clip["pos_embed.weight"] = tensor[0]
            clip["position_ids"] = torch.arange(tensor.shape[1])[None]  # the published loader expects it
        elif block is None:
            clip[_renamed(key, _CLIP_NAMES)] = tensor
        elif block[2].startswith("attn.qkv."):
            for part, third in zip(_QKV, tensor.chunk(3), strict=True):
                clip[f"encoder.layers.{block[1]}.self_attn.{part}.{block[2].split('.')[-1]}"] = third.clone()
        else:
            clip[f"encoder.layers.{block[1]}.{_renamed(block[2], _CLIP_BLOCK)}"] = tensor
    return clip


def _from_clip(clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [(theirs, ours) for ours, theirs in _CLIP_NAMES]
    parts = [(theirs, ours) for ours, theirs in _CLIP_BLOCK]
    tower: dict[str, Tensor] = {}
    for key, tensor in clip.items():
        plain = key.removeprefix("embeddings.")
        plain = plain.replace("patch_embedding.", "patch_embed.").replace("position_embedding.", "pos_embed.")
        block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", plain)
        if plain == "class_embedding":
            tower["cls_token"] = tensor.reshape(1, 1, -1)
        elif plain == "pos_embed.weight":
            tower["pos_embed"] = tensor[None]
        elif block is None:
            tower[_renamed(plain, names)] = tensor
        elif block[2].startswith("self_attn.q_proj."):
            thirds = [clip[third] for part in _QKV if (third := key.replace("q_proj", part)) in clip]
            if all(third.shape == tensor.shape for third in thirds):
                tower[f"blocks.{block[1]}.attn.qkv.{block[2].split('.')[-1]}"] = torch.cat(thirds)
        elif not block[2].startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            tower[f"blocks.{block[1]}.{_renamed(block[2], parts)}"] = tensor
    return tower


def _renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    for old, new in names:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


# --- layers ---


def _count(keys: Sequence[str], stem: str) -> int:
    """How many layers there are by the names `<stem>.0.` and so on."""
    numbers = [int(found[1]) for key in keys if (found := re.match(rf"{re.escape(stem)}\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _every_second(option: str, keys: Sequence[str], stem: str, layers: int) -> dict[str, str]:
    """Names in a model of `layers` layers -> `keys` in the file: the same or, where there are twice as many layers, of
    the 2nd, 4th, ... one."""
    there = _count(keys, stem)
    if there == layers or not (there and layers):  # none at all: a model of another kind, which its names will tell
        return {key: key for key in keys}
    if there != 2 * layers:
        raise ValueError(f"{option}, which has {there} layers: give weights of {layers} or {2 * layers}")
    chosen = {}
    for key in keys:
        found = re.match(rf"{re.escape(stem)}\.(\d+)\.", key)
        if found is None:
            chosen[key] = key
        elif int(found[1]) % 2:
            chosen[f"{stem}.{int(found[1]) // 2}.{key[found.end() :]}"] = key
    return chosen


# --- files ---


def read(path: str | Path, option: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of all such files in a folder, or of a file of torch's (`.th`, `.pth`, `.pt`,
    `.bin`), there bare or under `model`. Of the latter only tensors and plain values are read and nothing is executed.

    Args:
        option: who asks, for messages: "xvlm:tiny: init names weights.th".

    Raises:
        ValueError: one sentence about a file that is missing, damaged or holds something else.
    """
    place = Path(path)
    files = [place]
    if place.is_dir():
        files = sorted(place.glob("*.safetensors")) or sorted(place.glob("pytorch_model*.bin"))
    if not files or not files[0].is_file():
        raise ValueError(f"{option}, which holds no weights: give a file of them or its folder")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            check(file)
            found |= load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{option}, which holds more than tensors, or is damaged: nothing of it was executed; save its tensors"
                f" alone, as safetensors"
            ) from error
        except Exception as error:  # flipped bits make readers raise anything
            raise ValueError(
                f"{option}, which cannot be read ({first_line(error)}): fetch or export it again"
            ) from error
    if not found:
        raise ValueError(f"{option}, which holds no tensors: give a model's weights")
    check_finite(found, option)
    return found


def _unpickled(file: Path) -> dict[str, Tensor]:
    content = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        return {}
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _published(source: str, option: str) -> dict[str, Tensor]:
    name = source.removeprefix("timm:")
    if not timm.is_model_pretrained(name):
        raise ValueError(f"{option}, for which timm has no published weights: name others, or give a file")
    try:
        return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except Exception as error:  # whatever the hub's client or the network raise
        # Never random weights instead: the run would look right and be wrong.
        raise ValueError(
            f"{option}, whose weights could not be fetched ({first_line(error)}): put them into the hub's cache, or"
            f" give a safetensors file"
        ) from error


def _bert_folder(source: str) -> Path:
    from hetero_kt.models import bert

    return bert.found_folder(source, source.removeprefix("hf:"))


def _modern(key: str) -> str:
    """A name of BERT's old files by its present spelling."""
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


# --- words ---


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _more(wrong: Sequence[str]) -> str:
    return wrong[0] + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
