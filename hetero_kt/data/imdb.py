"""The Large Movie Review Dataset (IMDb): is a review against the film (0) or for it (1)?

Below the data folder: `imdb/` (or the data folder itself) with Parquet files whose names begin with `train` and
`test`; or the authors' `aclImdb/` with `train/` and `test/`, each with a text file per review in `neg/` and `pos/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hetero_kt.data import cache
from hetero_kt.data.images import chosen
from hetero_kt.data.text import Tokenizer, blank, joined
from hetero_kt.messages import first_line

CLASSES = 2
_FORMAT = 1  # of the cache


def read(data_dir: str | Path, part: str) -> tuple[list[str], np.ndarray]:
    """The reviews of `train` or `test` and their labels (S,), int64; line breaks of the web page are spaces.

    Raises:
        ValueError: the folder does not hold them, or a file is damaged or has other columns or labels.
    """
    folder = Path(data_dir)
    for place, pattern in (
        (folder / "imdb", f"{part}*.parquet"),
        (folder / "imdb", f"plain_text/{part}*.parquet"),  # as the hub lays it out
        (folder, f"{part}*.parquet"),
        (folder, f"plain_text/{part}*.parquet"),
    ):
        if files := sorted(place.glob(pattern)):
            pairs = [_from_parquet(file) for file in files]
            return [t for texts, _ in pairs for t in texts], np.concatenate([labels for _, labels in pairs])
    for place in (folder / "imdb" / "aclImdb", folder / "aclImdb", folder):
        if (place / part / "neg").is_dir() and (place / part / "pos").is_dir():
            return _from_folder(place / part)
    raise ValueError(
        f"{folder} holds no IMDb {part} set: name the folder that holds imdb/{part}*.parquet or aclImdb/ with"
        f" --data-dir or HETERO_KT_DATA"
    )


def _from_parquet(file: Path) -> tuple[list[str], np.ndarray]:
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} cannot be read ({first_line(error)}): fetch it again, or name another folder with --data-dir"
        ) from error
    for column in ("text", "label"):
        if column not in table.column_names:
            raise ValueError(
                f"{file} has no column {column} (it has {', '.join(table.column_names)}): name the folder of IMDb"
                f" with --data-dir"
            )
    texts, labels = table["text"].to_pylist(), table["label"].to_pylist()
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str) or label not in (0, 1):
            raise ValueError(f"{file}, row {row}, is no review with label 0 or 1: leave out what is not labelled")
    return [_plain(text) for text in texts], np.array(labels, np.int64)


def _from_folder(folder: Path) -> tuple[list[str], np.ndarray]:
    texts, labels = [], []
    for label, name in enumerate(("neg", "pos")):
        for file in sorted((folder / name).glob("*.txt")):
            try:
                texts.append(_plain(file.read_text(encoding="utf-8")))
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{file} cannot be read ({first_line(error)}): fetch it again") from error
            labels.append(label)
    return texts, np.array(labels, np.int64)


def _plain(text: str) -> str:
    return text.replace("<br />", " ")


class ReviewRows:
    """Reviews as rows for a loader: [CLS] review [SEP], cut behind `length` tokens.

    A batch is ids, mask and token types (B, L), and labels (B,).
    """

    classes = CLASSES

    def __init__(
        self,
        texts: list[str],
        labels: np.ndarray,
        tokenizer: Tokenizer,
        length: int = 512,
        *,
        name: str = "imdb",
        folder: str | Path = "",
    ) -> None:
        """`folder` is the cache's; empty takes the default one. Raises ValueError for rows without room for text."""
        if length < 3:
            raise ValueError(f"rows of {length} tokens hold no text: use 256, for example")
        self._data = cache.key(texts, labels.tolist())
        self.key = cache.key("imdb", _FORMAT, self._data, tokenizer.digest, length)

        def build() -> cache.Entry:
            ids, bounds = joined([one.ids[: length - 2].copy() for one in tokenizer.encode(texts)])
            return {"ids": ids, "bounds": bounds}, {}

        self._arrays, _ = cache.cached(self.key, build, folder)
        self.tokenizer, self.name, self.longest, self.labels = tokenizer, name, length, labels
        self._rows = np.arange(len(labels))
        self.lengths = np.diff(self._arrays["bounds"]) + 2

    def choose(self, rows: np.ndarray) -> None:
        """Keep these of the rows only, by number."""
        self._rows, self.labels, self.lengths = self._rows[rows], self.labels[rows], self.lengths[rows]

    def take(self, samples_B: np.ndarray, width: int, random_B: np.ndarray) -> tuple[np.ndarray, ...]:
        """See `hetero_kt.data.text.Rows`."""
        ids_BL, mask_BL, types_BL = blank(len(samples_B), width, self.tokenizer.pad)
        ids, bounds = self._arrays["ids"], self._arrays["bounds"]
        for row, sample in enumerate(self._rows[samples_B].tolist()):
            text = ids[bounds[sample] : bounds[sample + 1]]
            ids_BL[row, 0], ids_BL[row, len(text) + 1] = self.tokenizer.cls, self.tokenizer.sep
            ids_BL[row, 1 : len(text) + 1] = text
            mask_BL[row, : len(text) + 2] = 1
        return ids_BL, mask_BL, types_BL, self.labels[samples_B]

    def fingerprint(self) -> dict[str, Any]:
        """How many reviews there are, and checksums of them and of how they were cut."""
        return {"samples": len(self.labels), "data": self._data, "tokens": self.key}

    def notices(self) -> list[str]:
        """Nothing is left out."""
        return []


def imdb(
    data_dir: str | Path,
    tokenizer: Tokenizer,
    length: int = 512,
    *,
    train: bool,
    validation: float = 0.0,
    per_class: int = 0,
    folder: str | Path = "",
) -> ReviewRows:
    """The reviews to train on, or those to evaluate on.

    Args:
        length: tokens of the longest row; what is behind is cut off.
        validation: this fraction of the training set is evaluated on instead of the test set.
        per_class: labelled training reviews kept per class; 0 keeps all.
        folder: of the cache; empty takes the default one.

    Raises:
        ValueError: data that is missing, damaged or laid out differently, or settings that do not fit it.
    """
    texts, labels = read(data_dir, "train" if train or validation > 0 else "test")
    if not texts:
        raise ValueError(f"IMDb's set in {data_dir} has no reviews: name another folder with --data-dir")
    rows = ReviewRows(texts, labels, tokenizer, length, folder=folder)
    left = chosen(torch.from_numpy(labels), CLASSES, rows.name, validation=validation, per_class=per_class, train=train)
    rows.choose(left.numpy())
    return rows
