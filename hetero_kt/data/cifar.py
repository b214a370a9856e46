"""CIFAR-100 from a local folder, in any of the layouts in which it is handed out.

Below the data folder: `cifar100/` (or the data folder itself) with Parquet files whose names begin with
`train` and `test`; or the authors' `cifar-100-python/` (pickles) or `cifar-100-binary/`, both from
https://www.cs.toronto.edu/~kriz/cifar.html. A data folder written `hf:NAME` reads the data set NAME through
the `datasets` library instead.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hetero_kt.data.images import ImageSet
from hetero_kt.data.pictures import Damaged, decoded
from hetero_kt.messages import first_line

CLASSES = 100
_SIZE = 32
_MEAN = (0.5070751592371323, 0.48654887331495095, 0.4409178433670343)
_STD = (0.2673342858792401, 0.2564384629170883, 0.27615047132568404)
_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("fine_label", "label")


def cifar100(data_dir: str, train: bool) -> ImageSet:
    """The training or the test set.

    Raises ValueError where the folder does not hold it, and for a file that is damaged or has other columns.
    """
    part = "train" if train else "test"
    if data_dir.startswith("hf:"):
        pixels, labels = _from_hub(data_dir.removeprefix("hf:"), part)
    else:
        files = _find(Path(data_dir), part)
        pixels, labels = _read(tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files))
    if labels.size == 0:
        raise ValueError(f"CIFAR-100's {part} set in {data_dir} has no rows: name another folder with --data-dir")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"CIFAR-100's labels in {data_dir} are not 0 to 99: name another folder with --data-dir")
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels), CLASSES, _MEAN, _STD, "cifar100")


def _find(folder: Path, part: str) -> list[Path]:
    own = folder / "cifar100"
    for place, pattern in (
        (own, f"{part}*.parquet"),
        (own, f"*/{part}*.parquet"),
        (folder, f"{part}*.parquet"),
    ):
        files = sorted(place.glob(pattern))
        if files:
            return files
    for file in (folder / "cifar-100-python" / part, folder / "cifar-100-binary" / f"{part}.bin"):
        if file.is_file():
            return [file]
    raise ValueError(
        f"{folder} holds no CIFAR-100 {part} set: name the folder that holds cifar100/{part}*.parquet,"
        f" cifar-100-python/ or cifar-100-binary/ with --data-dir or HETERO_KT_DATA"
    )


# Several runs in one process, and a validation split, read the same files: keep both parts decoded.
@lru_cache(maxsize=2)
def _read(files: Sequence[tuple[str, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    readers = {".parquet": _from_parquet, ".bin": _from_binary, "": _from_pickle}
    parts = [readers[Path(name).suffix](Path(name)) for name, *_ in files]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts])


def _from_parquet(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        names = pq.read_schema(file).names
        image, label = _column(file, names, _IMAGE_COLUMNS), _column(file, names, _LABEL_COLUMNS)
        table = pq.read_table(file, columns=[image, label])
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error
    encoded = table[image].to_pylist()
    if encoded and not (isinstance(encoded[0], dict) and isinstance(encoded[0].get("bytes"), bytes)):
        raise ValueError(f"{file}: column {image} holds no encoded pictures: name another folder with --data-dir")
    labels = table[label].to_numpy().astype(np.int64)
    return _decode(file, (row["bytes"] for row in encoded), len(encoded)), labels


def _decode(file: Path, encoded: Iterable[bytes], count: int) -> np.ndarray:
    pixels = np.empty((count, _SIZE, _SIZE, 3), np.uint8)
    for row, content in enumerate(encoded):
        try:
            picture = np.asarray(decoded(content, "its picture"))
        except Damaged as error:
            raise _damaged(f"{file}, row {row},", error) from error
        if picture.shape != pixels.shape[1:]:
            raise ValueError(
                f"{file}, row {row}, is {picture.shape[1]}x{picture.shape[0]} pixels, not {_SIZE}x{_SIZE}:"
                f" name the folder of CIFAR-100 with --data-dir"
            )
        pixels[row] = picture
    return pixels


def _from_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    content = np.fromfile(file, np.uint8)
    row = 2 + 3 * _SIZE * _SIZE  # coarse label, fine label, then the planes red, green, blue
    if content.size % row:
        raise _damaged(file, f"{content.size} bytes are not whole rows of {row}")
    rows = content.reshape(-1, row)
    return _planes(rows[:, 2:]), rows[:, 1].astype(np.int64)


def _from_pickle(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with file.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="bytes").load()
        pixels, labels = np.asarray(content[b"data"], np.uint8), np.asarray(content[b"fine_labels"], np.int64)
        if len(pixels) != len(labels):
            raise ValueError(f"{len(pixels)} pictures and {len(labels)} labels")
        return _planes(pixels), labels
    except Exception as error:  # a damaged pickle can raise anything
        raise _damaged(file, error) from error


class _ArraysOnly(pickle.Unpickler):
    """Reads plain containers and numpy arrays; a pickle that names more could run code, and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which CIFAR-100 does not need")


def _planes(flat: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(flat.reshape(-1, 3, _SIZE, _SIZE).transpose(0, 2, 3, 1))


def _from_hub(name: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    import datasets

    try:
        table = datasets.load_dataset(name, split=part)
    except Exception as error:  # whatever the library, its file systems or the network raise
        raise ValueError(
            f"--data-dir hf:{name} cannot be loaded ({first_line(error)}): name a local folder or a cached data set"
        ) from error
    image = _column(f"hf:{name}", table.column_names, _IMAGE_COLUMNS)
    label = _column(f"hf:{name}", table.column_names, _LABEL_COLUMNS)
    encoded = (row["bytes"] for row in table.cast_column(image, datasets.Image(decode=False))[image])
    return _decode(Path(f"hf:{name}"), encoded, len(table)), np.asarray(table[label], np.int64)


def _column(file: Path | str, names: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise ValueError(
        f"{file} has no column {' or '.join(wanted)} (it has {', '.join(names)}):"
        f" name the folder of CIFAR-100 with --data-dir"
    )


def _damaged(file: Path | str, error: Exception | str) -> ValueError:
    reason = error if isinstance(error, str) else first_line(error)
    return ValueError(f"{file} cannot be read ({reason}): fetch it again, or name another folder with --data-dir")
