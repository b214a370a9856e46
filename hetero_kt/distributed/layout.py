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
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

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
    return {file.name: {"bytes": file.stat().st_size, "crc32": checksum(file, sync=True)} for file in (data, index)}


def write_done(folder: Path, ranks: int, files: Mapping[str, Any]) -> None:
    """Make `folder` a complete checkpoint."""
    content = {"layout": LAYOUT, "step": int(folder.name), "ranks": ranks, "files": dict(files)}
    part = folder / "DONE.part"
    part.write_text(json.dumps(content, indent=1))
    checksum(part, sync=True)
    os.replace(part, folder / "DONE")


def prune(folder: Path, keep: int) -> None:
    """Remove what is torn, and complete checkpoints but for the newest `keep`."""
    for old in complete(folder)[:-keep]:
        (old / "DONE").unlink()  # first the marker: a kill in between must not leave half of a valid one
    for path in folder.glob("*"):
        if path.name.isdigit() and not (path / "DONE").exists():
            shutil.rmtree(path)


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


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob("*") if p.name.isdigit() and (p / "DONE").exists()]
    return sorted(found, key=lambda p: int(p.name))


def check(path: Path) -> dict[str, Any]:
    """Refuse what is not whole, as far as sizes tell; what stands in DONE.

    Raises:
        ValueError: not a complete checkpoint, a renamed or damaged one, or one of another layout.
    """
    if not (path / "DONE").exists():
        raise ValueError(f"{path} is not a complete checkpoint (no DONE in it): name a complete one.")
    if not path.name.isdigit():
        raise ValueError(f"{path} is not named by its step: give the checkpoint its number back.")
    try:
        done = json.loads((path / "DONE").read_text())
        layout, files = done.get("layout", 1), dict(done["files"])
        if layout == LAYOUT:
            sizes = {name: (int(about["bytes"]), str(about["crc32"])) for name, about in files.items()}
            expected = {f"rank{rank}.{end}" for rank in range(int(done["ranks"])) for end in ("json", "safetensors")}
            if set(sizes) != expected:
                raise ValueError("not the files of its ranks")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / 'DONE'} cannot be read: {REMOVE}.") from error
    if layout != LAYOUT:
        raise ValueError(
            f"{path} was written by another version, in a layout that this one does not read: finish it with that "
            "version, or begin again with --resume never."
        )
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
    files = check(path)["files"]
    for name in sorted(files)[rank::world]:
        if checksum(path / name) != files[name]["crc32"]:
            raise ValueError(f"{path / name} is not as it was saved (its checksum differs): {REMOVE}.")
