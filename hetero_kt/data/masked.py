"""Plain texts for masked language modelling, the way BERT is pre-trained (Devlin et al. 2019, section 3.1).

Texts stand one behind the other with [SEP] between them, cut into rows of equal length, so that nothing is padded.
Each time a row is drawn, 15 % of its tokens are chosen anew; of these 80 % are replaced by [MASK], 10 % by a token
drawn from the whole vocabulary, and 10 % stay.

Shape suffixes: B rows, L tokens of a row, K tokens to predict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hetero_kt.data import cache, counter
from hetero_kt.data.imdb import read as read_reviews
from hetero_kt.data.squad import find
from hetero_kt.data.squad import read as read_questions
from hetero_kt.data.text import Tokenizer

_FORMAT = 1  # of the cache
CHOSEN = 0.15
MASKED, RANDOM = 0.8, 0.1
IGNORED = -100
"""Label of a place that fills up."""
_HELD_OUT = 50  # one row of so many is for evaluation


class MaskedRows:
    """Rows for a loader. A batch is ids, mask and token types (B, L), the chosen positions (B, K), and the tokens that
    stood there (B, K), IGNORED behind a row's last one. K is the same for all rows of a set."""

    def __init__(
        self,
        texts: list[str],
        tokenizer: Tokenizer,
        length: int = 128,
        *,
        train: bool,
        name: str = "pretraining",
        folder: str | Path = "",
    ) -> None:
        """One row of fifty is held out for evaluation (`train=False`). Raises ValueError where the texts fill no
        row."""
        if length < 8:
            raise ValueError(f"rows of {length} tokens are too short to predict from: use 128, for example")
        self._data = cache.key(texts)
        self.key = cache.key("masked", _FORMAT, self._data, tokenizer.digest, length)

        def build() -> cache.Entry:
            stream = [np.append(one.ids, tokenizer.sep) for one in tokenizer.encode(texts) if len(one.ids)]
            whole = np.concatenate(stream) if stream else np.zeros(0, np.int32)
            rows = len(whole) // (length - 2)
            table = np.empty((rows, length), np.int32)
            table[:, 1:-1] = whole[: rows * (length - 2)].reshape(rows, length - 2)
            table[:, 0], table[:, -1] = tokenizer.cls, tokenizer.sep
            return {"table": table}, {}

        arrays, _ = cache.cached(self.key, build, folder)
        table = arrays["table"]
        held_out = np.arange(len(table)) % _HELD_OUT == _HELD_OUT - 1
        self._table, self._rows = table, np.flatnonzero(~held_out if train else held_out)
        if not len(self._rows):
            raise ValueError(f"{name}: the texts fill only {len(table)} rows of {length} tokens: give more, or less")
        self.tokenizer, self.name, self.longest, self.classes = tokenizer, name, length, tokenizer.size
        self.lengths = np.full(len(self._rows), length)
        self.predicted = max(1, round(CHOSEN * (length - 2)))

    def take(self, samples_B: np.ndarray, width: int, random_B: np.ndarray) -> tuple[np.ndarray, ...]:
        """See `hetero_kt.data.text.Rows`."""
        width = self.longest
        ids_BL = np.asarray(self._table[self._rows[samples_B]], np.int64)
        random_BL = counter.bits(random_B[:, None], np.arange(width)[None])
        special = (self.tokenizer.cls, self.tokenizer.sep, self.tokenizer.pad)
        plain_BL = ~np.isin(ids_BL, special)
        # The tokens with the smallest random numbers are chosen.
        order_BL = np.argsort(np.where(plain_BL, random_BL >> np.uint64(1), ~np.uint64(0)), axis=1, kind="stable")
        positions_BK = np.ascontiguousarray(order_BL[:, : self.predicted])
        count_B = np.maximum(1, np.rint(CHOSEN * plain_BL.sum(1)).astype(np.int64))
        chosen_BK = np.arange(self.predicted) < count_B[:, None]
        chosen_BK &= np.take_along_axis(plain_BL, positions_BK, 1)
        before_BK = np.take_along_axis(ids_BL, positions_BK, 1)
        # The bits that chose a token are not uniform any more: what becomes of it takes fresh ones.
        fate_BK = counter.bits(random_B[:, None], positions_BK + width)
        kind_BK = counter.below(fate_BK, 1 << 16) / (1 << 16)
        drawn_BK = counter.below(fate_BK, self.tokenizer.size, first=16, width=32)
        after_BK = np.where(kind_BK < MASKED, self.tokenizer.mask, before_BK)
        after_BK = np.where((kind_BK >= MASKED) & (kind_BK < MASKED + RANDOM), drawn_BK, after_BK)
        np.put_along_axis(ids_BL, positions_BK, np.where(chosen_BK, after_BK, before_BK), 1)
        labels_BK = np.where(chosen_BK, before_BK, IGNORED)
        return ids_BL, np.ones_like(ids_BL), np.zeros_like(ids_BL), positions_BK, labels_BK

    def fingerprint(self) -> dict[str, Any]:
        """How many rows there are, and checksums of the texts and of how they were cut."""
        return {"samples": len(self._rows), "data": self._data, "tokens": self.key}

    def notices(self) -> list[str]:
        """Nothing is left out."""
        return []


def pretraining(
    data_dir: str | Path,
    tokenizer: Tokenizer,
    length: int = 128,
    *,
    train: bool,
    folder: str | Path = "",
) -> MaskedRows:
    """The paragraphs of SQuAD v2's training set and IMDb's training reviews. No text that is evaluated on is among
    them.

    Raises:
        ValueError: data that is missing, damaged or laid out differently.
    """
    texts = [*read_questions(find(data_dir, "train")).contexts, *read_reviews(data_dir, "train")[0]]
    return MaskedRows(texts, tokenizer, length, train=train, folder=folder)
