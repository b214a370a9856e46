"""What a file may say of ZeRO: DeepSpeed's own model of a `zero_optimization` block is asked before anything starts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from hetero_kt.distributed import load_deepspeed
from hetero_kt.messages import first_line

OFFLOADS = {"offload_param": 3, "offload_optimizer": 1}
"""Parts that move to the CPU, and the lowest stage under which DeepSpeed moves them; below it says nothing."""

KERNELS = "has DeepSpeed compile kernels, and keeps weights in a form that is not read here"
REFUSED = {
    "zenflow": "replaces the optimizers by DeepSpeed's own",
    "legacy_stage1": "no DeepSpeed of today has",
    "zero_quantized_weights": KERNELS,
    "zero_quantized_nontrainable_weights": KERNELS,
    "zero_quantized_gradients": KERNELS,
    "zero_hpz_partition_size": "keeps further copies of weights, which no transfer and no checkpoint reaches",
    "super_offload": "replaces the optimizers by DeepSpeed's own",
    "ratio": "replaces the optimizers by DeepSpeed's own",
}
"""What DeepSpeed takes, and fails over when the engine starts or trains otherwise than promised here."""


def load(text: str) -> Any:
    """JSON as DeepSpeed reads it.

    Raises:
        ValueError: no JSON, nested without end, or a key that is given twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice")
    return dict(pairs)


def resolve(block: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The block as DeepSpeed reads it, by the keys of its documentation: "auto" is left out, which is its default,
    and so is what offloads to nowhere. A plan and an engine take the same one.

    Args:
        name: of the option and the file, for a complaint.

    Raises:
        ValueError: one sentence with everything that is wrong.
    """
    if set(block) == {"stage"}:  # most blocks: nothing to ask, and DeepSpeed takes seconds to import
        return dict(block)
    load_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    fields = DeepSpeedZeroConfig.model_fields
    keys = {key: field.alias or key for key, field in fields.items()}  # the names in Python are taken too
    current = [key for field, key in keys.items() if not _replacement(fields[field], keys)]
    given, faults = _split(block, keys, current, fields)
    resolved: dict[str, Any] = {}
    try:
        model = DeepSpeedZeroConfig(**given)
    except ValidationError as error:
        faults += [_fault(one, fields) for one in error.errors()]
    except (AssertionError, TypeError, ValueError) as error:
        faults.append(f"is refused by DeepSpeed ({first_line(error)}): mend it")
    else:
        whole = model.model_dump(mode="json", by_alias=True)
        resolved = {key: _like(value, whole[key]) for key, value in given.items() if value is not None}
        for path, value in _scalars(given):
            faults += _another_kind(path, value, resolved)
    faults += _unsuitable(given, resolved)
    if faults:
        raise ValueError(f"{name} {'; '.join(dict.fromkeys(faults))}.")
    return {key: value for key, value in resolved.items() if key not in OFFLOADS or value.get("device") == "cpu"}


def _split(
    block: Mapping[str, Any], keys: Mapping[str, str], current: list[str], fields: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What DeepSpeed knows, by its documented keys, and a complaint about each of the others."""
    given: dict[str, Any] = {}
    faults = []
    for key, value in block.items():
        field = next((name for name, documented in keys.items() if key in (name, documented)), None)
        if field is None:
            faults.append(_unknown(key, "a zero_optimization block", _nearest(key, current)))
        elif new := _replacement(fields[field], keys):
            faults.append(f"holds {key}, which is deprecated: use {new}")
        elif keys[field] in given:
            faults.append(f"holds {field} and {keys[field]}, which are one key: take one out")
        elif value != "auto":
            given[keys[field]] = value
        elif key in OFFLOADS:
            faults.append(f'has {key} "auto", which nothing resolves: write {{"device": "cpu"}}, or take it out')
    return given, faults


def _replacement(field: Any, keys: Mapping[str, str]) -> str:
    """The key that has taken a deprecated field's place; empty for one that is not deprecated."""
    about = field.json_schema_extra or {}
    if not about.get("deprecated"):
        return ""
    new = about.get("new_param", "")
    return keys.get(new, new) or "what has replaced it"


def _fault(error: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """One of pydantic's complaints."""
    path, value, kind = ".".join(map(str, error["loc"])), error["input"], error["type"]
    if kind == "extra_forbidden":
        part, key = map(str, error["loc"][:2])
        return _unknown(path, part, _nearest(key, _keys_of(fields.get(part))))
    if kind == "int_from_float":
        return f"has {path} {value}, which is no whole number: use {round(value)}"
    if kind == "enum":
        return f"has {path} {_short(value)}, which no ZeRO knows: use none or cpu"
    if kind.startswith(("model_", "dict_")) or not path:
        reason = f"{path} is no object" if path else str(error["msg"]).partition(", ")[2].rstrip(".")
        return f"is refused by DeepSpeed ({reason}): mend it"
    reason = str(error["msg"]).removeprefix("Input ").removeprefix("Value error, ").partition(",")[0]
    return f"has {path} {_short(value)}, which {reason}: mend it"


def _unknown(key: str, part: str, near: str) -> str:
    return f"holds {key or _short(key)}, which is no key of {part}: {f'use {near}' if near else 'take it out'}"


def _nearest(key: str, known: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(key, list(known), n=1, cutoff=0.4)), "")


def _keys_of(field: Any) -> list[str]:
    """The keys of a part of the block."""
    inner = (getattr(kind, "model_fields", {}) for kind in get_args(getattr(field, "annotation", None)))
    return [key for keys in inner for key in keys]


def _like(given: Any, resolved: Any) -> Any:
    """As DeepSpeed reads it, without the keys that were not given."""
    if isinstance(given, dict) and isinstance(resolved, dict):
        return {key: resolved.get(key) for key in given if given[key] != "auto"}
    return resolved


def _scalars(block: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in block.items():
        if isinstance(value, dict):
            for inner, one in value.items():
                yield (key, inner), one
        else:
            yield (key,), value


def _another_kind(path: tuple[str, ...], value: Any, resolved: Mapping[str, Any]) -> Iterator[str]:
    """A complaint about a value that pydantic has made into another kind: true into 1, "no" into false."""
    read: Any = resolved
    for key in path:
        read = read.get(key) if isinstance(read, Mapping) else None
    if value is None:
        return
    if value == "auto":  # DeepSpeed leaves it out, here as above
        yield f'has {".".join(path)} "auto", which nothing resolves: write a value, or take it out'
    elif isinstance(read, bool) and not isinstance(value, bool):
        yield f"has {'.'.join(path)} {_short(value)}, which is neither true nor false: use {_short(read)}"
    elif isinstance(read, int | float) and isinstance(value, bool | str) and not isinstance(read, bool):
        yield f"has {'.'.join(path)} {_short(value)}, which is no number: use {_short(read)}"


def _unsuitable(given: Mapping[str, Any], resolved: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed's model takes, and its engine would not, or would silently pass over."""
    stage = given["stage"]
    for key, reason in REFUSED.items():
        inside = key in ("super_offload", "ratio")
        value = (resolved.get("offload_optimizer") or {}).get(key) if inside else resolved.get(key)
        harmless: tuple[Any, ...] = (1, None) if key in ("ratio", "zero_hpz_partition_size") else (False, None)
        if value not in harmless and not (key == "zero_hpz_partition_size" and value == 0):
            yield f"holds {'offload_optimizer.' if inside else ''}{key}, which {reason}: take it out"
    for key, least in OFFLOADS.items():
        device = (resolved.get(key) or {}).get("device", "none")
        if device == "nvme":
            yield f"has {key} on nvme, where no checkpoint reaches it: use cpu"
        elif device != "none" and stage < least:
            yield f"has {key}, which stage {stage} passes over: use stage {least} or higher, or take it out"
    if resolved.get("compute_grad_norm") is False and (resolved.get("offload_optimizer") or {}).get("device") == "cpu":
        yield "has compute_grad_norm false beside offload_optimizer, which DeepSpeed refuses: take one out"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
