"""A complete checkpoint, read piece by piece; the reader may have other ranks, another ZeRO stage, or no engine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hetero_kt import files
from hetero_kt.distributed.layout import REMOVE, check
from hetero_kt.messages import first_line, printable

MOST_INDEX = 2**30
"""Bytes of a rank's index; a weight's entry has about 200."""
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError, OSError, SafetensorError)
"""What reading an index or tensors that say absurd things may raise."""
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
"""torch's names of what a checkpoint holds -> those of safetensors."""


@dataclass(frozen=True)
class _Part:
    start: int
    stop: int
    rank: int
    key: str


@dataclass
class _Whole:
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[_Part]


class Saved:
    """A complete checkpoint, read piece by piece. To be closed, or used in a `with`.

    Raises:
        ValueError: as `check`, or files that do not belong together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ranks = int(check(path)["ranks"])
        self.step = int(path.name)
        self._opened: dict[int, Any] = {}
        self._stack = ExitStack()
        self.wholes: dict[tuple[str, str, str], _Whole] = {}
        """(model, kind, name) -> where its parts are."""
        self.about: list[dict[str, Any]] = []
        """Each rank's index."""
        try:
            for rank in range(self.ranks):
                self._read_index(rank)
            self._check_ranges()
            self._check_files()
        except BaseException:
            self._stack.close()
            raise

    def _read_index(self, rank: int) -> None:
        file = self.path / f"rank{rank}.json"
        try:
            index = json.loads(files.read_regular(file, MOST_INDEX))
            for key, entry in index["tensors"].items():
                self._add(rank, key, entry)
        except DAMAGE as error:
            if isinstance(error, ValueError) and str(self.path) in str(error):
                raise
            raise ValueError(f"{file} cannot be read ({first_line(error)}): {REMOVE}.") from error
        self.about.append(index)

    def _check_ranges(self) -> None:
        for (model, kind, name), whole in self.wholes.items():
            whole.parts.sort(key=lambda part: (part.start, part.stop))
            ends = [0, *(part.stop for part in whole.parts)]
            if ends[:-1] != [part.start for part in whole.parts] or ends[-1] != math.prod(whole.shape):
                what = printable(f"{model}'s {name} ({kind})")
                raise ValueError(f"{self.path} does not hold all of {what}: {REMOVE}.")

    def _check_files(self) -> None:
        """Compare the files with what their index says, before anything of that size is allocated."""
        for whole in self.wholes.values():
            wanted = _DTYPES[str(whole.dtype).removeprefix("torch.")]
            for part in whole.parts:
                try:
                    kept = self._open(part.rank).get_slice(part.key)
                    if kept.get_shape() != [part.stop - part.start]:
                        raise ValueError(f"{part.key} has another size than its index says")
                    if kept.get_dtype() != wanted:
                        raise ValueError(f"{part.key} has another dtype than its index says")
                except DAMAGE as error:
                    raise self._unreadable(part.rank, error) from error

    def _add(self, rank: int, key: str, entry: Mapping[str, Any]) -> None:
        if not entry["model"]:
            return  # of a tree, which knows its tensors
        shape, (start, stop) = tuple(map(int, entry["shape"])), map(int, entry["range"])
        dtype = str(entry["dtype"])
        if dtype not in _DTYPES or min(shape, default=0) < 0:
            raise ValueError(f"{key} is of {dtype} and shape {shape}")
        if not all(isinstance(entry[one], str) for one in ("model", "kind", "name")):
            raise ValueError(f"{key} is of a model, a kind or a name that is no text")
        kind = getattr(torch, dtype)
        whole = self.wholes.setdefault((entry["model"], entry["kind"], entry["name"]), _Whole(shape, kind, []))
        if (whole.shape, whole.dtype) != (shape, kind):
            raise ValueError(f"{key} is of another shape or dtype than other ranks say")
        whole.parts.append(_Part(start, stop, rank, key))

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, model: str, kind: str, name: str, start: int = 0, stop: int = -1) -> Tensor:
        """Elements [start, stop) of a flattened weight, moment or average; all of them without a range."""
        whole = self.wholes[model, kind, name]
        stop = math.prod(whole.shape) if stop < 0 else stop
        out = torch.empty(stop - start, dtype=whole.dtype)
        for part in whole.parts:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                try:
                    kept = self._open(part.rank).get_slice(part.key)
                    out[first - start : last - start] = kept[first - part.start : last - part.start]
                except DAMAGE as error:
                    raise self._unreadable(part.rank, error) from error
        return out

    @property
    def models(self) -> set[str]:
        """Names of the models that it holds."""
        return {model for model, _, _ in self.wholes}

    def tree(self, kind: str, rank: int = 0) -> Any:
        """`own` of a rank, or `shared` of all."""
        try:
            return _rebuilt(self.about[rank][kind], self._open(rank))
        except DAMAGE as error:
            raise self._unreadable(rank, error) from error

    def buffers(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Every model's buffers as one for all ranks: model -> kind -> name -> buffer."""
        trees = [self.tree("own", rank) for rank in range(self.ranks)]
        try:
            return {
                model: {kind: mean_over_ranks([tree["models"][model][kind] for tree in trees]) for kind in kinds}
                for model, kinds in trees[0]["models"].items()
            }
        except DAMAGE as error:
            raise ValueError(
                f"{self.path} does not hold every rank's buffers ({first_line(error)}): {REMOVE}."
            ) from error

    def _open(self, rank: int) -> Any:
        if rank not in self._opened:
            try:
                self._opened[rank] = self._stack.enter_context(safe_open(self._file(rank), "pt"))
            except DAMAGE as error:
                raise self._unreadable(rank, error) from error
        return self._opened[rank]

    def _file(self, rank: int) -> Path:
        return self.path / f"rank{rank}.safetensors"

    def _unreadable(self, rank: int, error: Exception) -> ValueError:
        if isinstance(error, ValueError) and str(self.path) in str(error):
            return error
        return ValueError(f"{self._file(rank)} cannot be read as safetensors ({first_line(error)}): {REMOVE}.")


class SavedModel:
    """What a checkpoint holds of one model."""

    def __init__(self, saved: Saved, model: str) -> None:
        self.saved, self.model = saved, model
        here = {(kind, name): whole for (m, kind, name), whole in saved.wholes.items() if m == model}
        self.shapes = {name: whole.shape for (kind, name), whole in here.items() if kind == "weight"}
        self.averages = {name: whole.shape for (kind, name), whole in here.items() if kind == "average"}
        self._kinds: dict[str, list[str]] = {}
        for kind, name in here:
            if kind not in ("weight", "average"):
                self._kinds.setdefault(name, []).append(kind)
        try:
            parts = [index["models"][model] for index in saved.about]
            self.about: dict[str, Any] = parts[0]
            self._numbers = {name: dict(numbers) for part in parts for name, numbers in part["numbers"].items()}
        except DAMAGE as error:
            raise ValueError(f"{saved.path} does not say all about {model}: {REMOVE}.") from error

    def kinds(self, name: str) -> Sequence[str]:
        return self._kinds.get(name, ())

    def numbers(self, name: str) -> Mapping[str, float]:
        return self._numbers.get(name, {})

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        return self.saved.read(self.model, kind, name, start, stop)

    def whole(self, kind: str, name: str) -> Tensor:
        """A weight, moment or average in its shape."""
        return self.saved.read(self.model, kind, name).view(self.saved.wholes[self.model, kind, name].shape)


def mean_over_ranks(trees: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Buffers of several ranks as one: the mean of floating-point ones, as an evaluation takes it, the first's of
    others."""
    merged = {}
    for name, first in trees[0].items():
        if len(trees) > 1 and first.is_floating_point():
            total = torch.stack([tree[name].double() for tree in trees]).sum(0)
            merged[name] = (total / len(trees)).to(first.dtype)
        else:
            merged[name] = first
    return merged


def _rebuilt(description: Any, tensors: Any) -> Any:
    if isinstance(description, list):
        return [_rebuilt(value, tensors) for value in description]
    if not isinstance(description, dict):
        return description
    ((form, content),) = description.items()
    if form == "tensor":
        return tensors.get_tensor(content)
    if form == "tuple":
        return tuple(_rebuilt(value, tensors) for value in content)
    if form != "dict":
        raise ValueError(f"a tree of {form}")
    return {key: _rebuilt(value, tensors) for key, value in content}
