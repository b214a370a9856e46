"""How a checkpoint lies on disk. No process group, no engine and no GPU is needed to read one, and nothing in it runs.

    <step>/rank<k>.safetensors   every tensor that rank k has written
    <step>/rank<k>.json          the index of that file, and what is no tensor
    <step>/DONE                  written last: size and checksum of the others; a folder without it does not count

The index names each tensor with the model it belongs to, its kind (`weight`, a moment by its optimizer's name,
`average`), the whole weight's shape, its dtype, the range [start, stop) of the flattened weight that lies here, its
rank and file. The ranges of all ranks together cover each weight exactly once, whatever number of ranks and ZeRO stage
has written them.

What is no piece of a weight is a tree of dicts, lists, numbers and tensors: `own` of each rank (buffers, random state),
and `shared`, which the first rank writes for all. Both formats hold data alone: a pickle in a file's place is refused.
Checksums are CRC-32, which finds what a disk or an editor has done and no forger; it reads several GB/s.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hetero_kt import files
from hetero_kt.messages import first_line
from hetero_kt.removal import CHECKPOINT, is_folder, remove_written

LAYOUT = 2
"""Of the files; 1 was DeepSpeed's own."""
REMOVE = "remove this checkpoint to go on from an older one"


@dataclass(frozen=True)
class Entry:
    """One tensor that a rank writes."""

    tensor: Tensor
    """(stop - start,), or of any shape where it is no piece."""
    model: str
    kind: str
    name: str
    shape: tuple[int, ...]
    """Of the whole."""
    start: int
    stop: int

    @property
    def key(self) -> str:
        """In the safetensors file."""
        return "/".join(filter(None, (self.model, self.kind, self.name)))


def leaves(tree: Any, kind: str, at: str = "") -> Iterator[Entry]:
    """The tensors of a tree, for its rank's file."""
    if isinstance(tree, Tensor):
        yield Entry(tree, "", kind, at, tuple(tree.shape), 0, tree.numel())
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, kind, f"{at}/{key}" if at else str(key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from leaves(value, kind, f"{at}/{i}" if at else str(i))


def described(tree: Any, kind: str, at: str = "") -> Any:
    """A tree as JSON: tensors are named as `leaves` names them, keys keep their type, tuples are told from lists."""
    if isinstance(tree, Tensor):
        return {"tensor": f"{kind}/{at}"}
    if isinstance(tree, Mapping):
        return {"dict": [[k, described(v, kind, f"{at}/{k}" if at else str(k))] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        rows = [described(value, kind, f"{at}/{i}" if at else str(i)) for i, value in enumerate(tree)]
        return {"tuple": rows} if isinstance(tree, tuple) else rows
    assert tree is None or isinstance(tree, bool | int | float | str), f"{at}: {type(tree).__name__} is not saved"
    return tree


# --- writing ---


def write_rank(folder: Path, rank: int, entries: Sequence[Entry], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write a rank's two files; what `write_done` has to know of them. `about` is what stands in the index besides."""
    data, index = folder / f"rank{rank}.safetensors", folder / f"rank{rank}.json"
    for path in (data, index):
        path.unlink(missing_ok=True)  # a link left there must not be followed
    save_file({entry.key: entry.tensor for entry in entries}, data)
    tensors = {
        entry.key: {
            "model": entry.model,
            "kind": entry.kind,
            "name": entry.name,
            "shape": list(entry.shape),
            "dtype": str(entry.tensor.dtype).removeprefix("torch."),
            "range": [entry.start, entry.stop],
            "rank": rank,
            "file": data.name,
        }
        for entry in entries
    }
    index.write_text(json.dumps({"layout": LAYOUT, "rank": rank, "tensors": tensors, **about}))
    data.chmod(stat.S_IMODE(index.stat().st_mode))  # as the umask says; safetensors' own mode is for the owner alone
    about = {file.name: {"bytes": file.stat().st_size, "crc32": checksum(file, sync=True)} for file in (data, index)}
    files.sync(folder)
    return about


def write_done(folder: Path, ranks: int, written: Mapping[str, Any]) -> None:
    """Make `folder` a complete checkpoint."""
    content = {"layout": LAYOUT, "step": int(folder.name), "ranks": ranks, "files": dict(written)}
    files.write_whole(folder / "DONE", json.dumps(content, indent=1))
    files.sync(folder.parent)


def prune(folder: Path, keep: int) -> None:
    """Remove what is torn, and complete checkpoints but for the newest `keep`."""
    for old in complete(folder)[:-keep]:
        (old / "DONE").unlink()  # first the marker: a kill in between must not leave half of a valid one
    for path in steps(folder):
        if not (path / "DONE").exists():
            remove_written(path, CHECKPOINT)


def checksum(file: Path, *, sync: bool = False) -> str:
    """CRC-32 of a file; with `sync` it is on the disk afterwards, so that even a machine that stops leaves it whole."""
    value = 0
    with file.open("rb") as opened:
        while block := opened.read(2**24):
            value = zlib.crc32(block, value)
        if sync:
            os.fsync(opened.fileno())
    return f"{value:08x}"


# --- reading ---


_STEP = re.compile(r"0|[1-9][0-9]{0,14}")


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's folder is called by; None for another name."""
    return int(path.name) if _STEP.fullmatch(path.name) else None


def steps(folder: Path) -> list[Path]:
    """Folders of checkpoints, complete or not, oldest first."""
    found = [(step, path) for path in folder.glob("*") if (step := step_of(path)) is not None and is_folder(path)]
    return [path for _, path in sorted(found)]


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; one that has got another step's name is passed over."""
    return [path for path in steps(folder) if _said_step(path) == step_of(path)]


def _said_step(path: Path) -> int | None:
    """The step that a checkpoint's DONE says; that of its name where it says none, and None without a DONE."""
    marker = path / "DONE"
    if marker.is_symlink() or not marker.is_file():
        return None
    try:
        said = json.loads(files.read_regular(marker, MOST_DONE)).get("step")
    except (OSError, ValueError, AttributeError, RecursionError):
        return step_of(path)  # `check` says what is wrong with it
    return said if type(said) is int else step_of(path)


def check_folder(folder: Path, renamed: bool = True) -> None:
    """Refuse a folder of checkpoints in which a run would fail at its next save, or go on from another step.

    Args:
        renamed: refuse a checkpoint that has got another step's name.

    Raises:
        ValueError: a file or a link where a checkpoint's folder belongs, or a checkpoint of another step than its name.
    """
    if not (folder.exists() or folder.is_symlink()):
        return
    if not is_folder(folder):
        raise ValueError(f"{folder} is a {_kind(folder)} where a folder of checkpoints belongs: move it away.")
    for path in sorted(folder.iterdir()):
        if (step := step_of(path)) is None:
            continue
        if not is_folder(path):
            raise ValueError(f"{path} is a {_kind(path)} where a checkpoint's folder belongs: move it away.")
        if renamed and (said := _said_step(path)) not in (None, step):
            raise ValueError(_renamed(path, said))


def _kind(path: Path) -> str:
    return "link" if path.is_symlink() else "file"


def _renamed(path: Path, step: object) -> str:
    return f"{path} was saved as step {step}: give it that name back, or remove it."


MOST_DONE = 2**26
"""Bytes of a DONE that is read; a rank has about 200 in it."""


def check(path: Path) -> dict[str, Any]:
    """Refuse what is not whole, as far as sizes tell; what stands in DONE.

    Raises:
        ValueError: not a complete checkpoint, a renamed or damaged one, or one of another layout.
    """
    if not (path / "DONE").exists():
        raise ValueError(f"{path} is not a complete checkpoint (no DONE in it): name a complete one.")
    if step_of(path) is None:
        raise ValueError(f"{path} is not named by its step: give the checkpoint its number back.")
    try:
        done = json.loads(files.read_regular(path / "DONE", MOST_DONE))
        layout, step, sizes = done.get("layout", 1), done.get("step"), {}
        if layout == LAYOUT:
            sizes = {name: (int(about["bytes"]), str(about["crc32"])) for name, about in done["files"].items()}
            ranks = done["ranks"]
            if type(ranks) is not int or 2 * ranks != len(sizes):
                raise ValueError("not the files of its ranks")
            if set(sizes) != {f"rank{rank}.{end}" for rank in range(ranks) for end in ("json", "safetensors")}:
                raise ValueError("not the files of its ranks")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path / 'DONE'} cannot be read: {REMOVE}.") from error
    if layout != LAYOUT:
        raise ValueError(
            f"{path} was written by another version, in a layout that this one does not read: finish it with that "
            "version, or begin again with --resume never."
        )
    if step is not None and (type(step) is not int or step != step_of(path)):
        raise ValueError(_renamed(path, step if type(step) is int and -1 < step < 10**15 else "another"))
    for name, (size, _) in sizes.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: {REMOVE}.")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes and was saved with {size}: {REMOVE}.")
    return dict(done)


def verify(path: Path, rank: int = 0, world: int = 1) -> None:
    """Compare checksums, of every `world`-th file from the `rank`-th on.

    Raises:
        ValueError: as `check`, or a file that is another than was saved.
    """
    saved = check(path)["files"]
    for name in sorted(saved)[rank::world]:
        try:
            found = checksum(path / name)
        except OSError as error:
            raise ValueError(f"{path / name} cannot be read ({first_line(error)}): {REMOVE}.") from error
        if found != str(saved[name]["crc32"]):
            raise ValueError(f"{path / name} is not as it was saved (its checksum differs): {REMOVE}.")
