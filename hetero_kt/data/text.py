"""Texts as token numbers, and the loader that draws batches of them.

Shape suffixes: B rows of this rank, S samples of the set, L tokens of a batch's longest row, padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hetero_kt.data import cache, counter
from hetero_kt.data.device import moved
from hetero_kt.data.order import Order
from hetero_kt.messages import first_line

PAD_TO = 8  # batches are as wide as a multiple of this
_DRAW = 3  # random stream of what a batch draws for its rows
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


# --- tokens ---


@dataclass(frozen=True)
class Encoded:
    """A text's tokens, without special ones."""

    ids: np.ndarray
    """(T,), int32."""
    offsets: np.ndarray
    """(T, 2), int32: each token is text[first:second]."""


class Tokenizer:
    """BERT's WordPiece tokenizer with what the data sets need of it. `load_tokenizer` makes one."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        """`tokenizer` is one of transformers' that is backed by the tokenizers library; `name` is for messages."""
        import tokenizers

        self.name, self.whole = name, tokenizer
        # A copy: ours neither cuts nor pads, and takes "[SEP]" in a text for what it is there, plain characters.
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.size = len(tokenizer)
        """Tokens of the vocabulary."""
        vocabulary = self._backend.get_vocab()
        numbers = [vocabulary[token] for token in _SPECIAL]
        self.pad, self.unknown, self.cls, self.sep, self.mask = numbers
        self.digest = cache.key(self._backend.to_str(), tokenizers.__version__)

    def encode(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Each text's tokens, in order."""
        for first in range(0, len(texts), 1024):
            for one in self._backend.encode_batch(list(texts[first : first + 1024]), add_special_tokens=False):
                offsets = np.array(one.offsets, np.int32).reshape(-1, 2)
                yield Encoded(np.array(one.ids, np.int32), offsets)

    def save(self, folder: str | Path) -> None:
        """Put its files into a folder, as `save_pretrained` does."""
        self.whole.save_pretrained(str(folder))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a `vocab.txt`, or of a folder with that file or a `tokenizer.json` in it (the folder of a
    `save_pretrained`, for example).

    Raises:
        ValueError: there is none, or it is not BERT's WordPiece vocabulary.
    """
    from transformers import BertTokenizer

    path = Path(path)
    files = [path] if path.is_file() else [path / name for name in ("tokenizer.json", "vocab.txt")]
    file = next((one for one in files if one.is_file()), None)
    if file is None:
        raise ValueError(f"{path} holds no tokenizer: name a vocab.txt, or a folder with one or with tokenizer.json")
    try:
        # By its keyword `vocab_file` a path would be ignored, and the vocabulary be the five special tokens.
        if file.name == "tokenizer.json":
            whole = BertTokenizer.from_pretrained(str(path if path.is_dir() else path.parent), local_files_only=True)
        else:
            whole = BertTokenizer(vocab=str(file))
        # Of a vocab.txt as it is written: what it lacks is silently added behind its end.
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n") if file.suffix == ".txt" else []
        missing = [token for token in _SPECIAL if token not in (lines or whole.get_vocab())]
    except Exception as error:  # a damaged file can raise anything, Rust's panics included
        raise ValueError(f"{file} cannot be read as a tokenizer ({first_line(error)}): fetch it again") from error
    if missing or len(whole) <= len(_SPECIAL):
        lacking = f"lacks {missing[0]}" if missing else "holds special tokens only"
        raise ValueError(f"{file} is not the vocabulary of a BERT: it {lacking}: name another one")
    if lines and len(whole) != len(lines):
        raise ValueError(f"{file} has {len(lines)} lines but {len(whole)} different tokens: remove the repeated ones")
    return Tokenizer(whole, str(path))


# --- rows and batches ---


class Rows(Protocol):
    """Tokenised samples that a loader draws from."""

    name: str
    classes: int
    """What the model's answers choose between."""
    longest: int
    """No row has more tokens."""
    lengths: np.ndarray
    """Tokens of each sample, (S,)."""

    def take(self, samples_B: np.ndarray, width: int, random_B: np.ndarray) -> tuple[np.ndarray, ...]:
        """The samples, padded to `width` tokens: ids (B, L), mask (B, L), token types (B, L), then labels (B, ...).
        `random_B` are 64 random bits for each row, for what is drawn anew every time."""
        ...

    def fingerprint(self) -> dict[str, Any]: ...

    def notices(self) -> list[str]: ...


class TextLoader:
    """One rank's share of the global batches of tokenised rows, in the order of `Order`.

    Batches are as wide as the longest row of any rank, rounded up to a multiple of 8. A batch is a function of its
    step; what is drawn for a row (masks of masked language modelling) is decided by (seed, step, row), whichever
    rank it falls to.
    """

    def __init__(
        self,
        rows: Rows,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """`batch` counts the rows of all ranks together.

        Raises:
            ValueError: an empty set, or a batch that does not divide over the ranks.
        """
        samples = len(rows.lengths)
        Order(rows.name, samples, batch, seed, rank, world)  # refuses what does not divide
        self.order = Order(rows.name, samples, batch, seed)
        self._turns = Order(rows.name, samples, world, seed, rank, world)
        self.rows, self.name, self.classes, self.samples = rows, rows.name, rows.classes, samples
        self.global_batch, self.steps_per_epoch = batch, self.order.steps_per_epoch
        self.seed, self.rank, self.world, self.device = seed, rank, world, torch.device(device)
        # Evaluation goes from short to long, so that hardly anything is padded.
        self._by_length = np.argsort(rows.lengths, kind="stable")

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """This rank's rows of the global batch of `step`: ids, mask and token types (B, L), then labels; int64."""
        _, samples = self.order.rows(step)
        random = counter.bits(counter.key(self.seed, _DRAW, step), np.arange(len(samples)))
        mine = slice(self.rank, None, self.world)
        return self._tensors(self.rows.take(samples[mine], self._width(samples), random[mine]))

    def eval_batches(self, batch: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor]]:
        """This rank's share of every sample exactly once: a batch as `batch` gives it, which samples its rows are
        (B,), and their weights (B,).

        Every rank yields equally many batches of equal size, at most `batch` rows each; rows that fill up have
        weight 0, all others 1. What is drawn for a sample is the same every time.
        """
        for places_B, counts_B in self._turns.in_turn(batch):
            samples_B = self._by_length[places_B]
            # The rank with the longest rows is the one whose turn comes last.
            longest = int(self._by_length[min(int(places_B.max()) + self.world - 1 - self.rank, self.samples - 1)])
            if not counts_B.all():
                longest = int(self._by_length[-1])
            random_B = counter.bits(counter.key(0, _DRAW), samples_B)
            tensors = self._tensors(self.rows.take(samples_B, self._width(np.array([longest])), random_B))
            weight_B = torch.from_numpy(counts_B).float().to(self.device)
            yield tensors, torch.from_numpy(samples_B).to(self.device), weight_B

    def fingerprint(self) -> dict[str, Any]:
        """What tells this set from another."""
        return self.rows.fingerprint()

    def notices(self) -> list[str]:
        """What was left out."""
        return self.rows.notices()

    def throughput(self) -> dict[str, float]:
        """Nothing: rows are put together in the step itself."""
        return {}

    def close(self) -> None:
        """Nothing to end."""

    def _width(self, samples: np.ndarray) -> int:
        return padded_width(int(self.rows.lengths[samples].max()), self.rows.longest)

    def _tensors(self, arrays: tuple[np.ndarray, ...]) -> tuple[Tensor, ...]:
        return tuple(moved(array, self.device) for array in arrays)


class Sentences:
    """Short texts as rows for a loader, [CLS] text [SEP], cut behind `length` tokens: ids and mask (B, L)."""

    classes = 0

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, length: int, name: str) -> None:
        """
        Raises:
            ValueError: rows without room for text.
        """
        if length < 3:
            raise ValueError(f"rows of {length} tokens hold no text: use 40, for example")
        ids, bounds = joined([one.ids[: length - 2] for one in tokenizer.encode(texts)])
        # Special tokens are put in once for all: a row is then one slice.
        starts = bounds[:-1] + 2 * np.arange(len(texts))
        self._bounds = bounds + 2 * np.arange(len(texts) + 1)
        self._ids = np.full(self._bounds[-1], tokenizer.cls, np.int32)
        self._ids[self._bounds[1:] - 1] = tokenizer.sep
        inside = np.ones(len(self._ids), bool)
        inside[starts] = inside[self._bounds[1:] - 1] = False
        self._ids[inside] = ids
        self.name, self.longest, self.lengths = name, length, np.diff(self._bounds)
        self._pad, self._digest = tokenizer.pad, tokenizer.digest

    def take(
        self, samples_B: np.ndarray, width: int, random_B: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The texts' ids and mask (B, width), int64; what is behind `width` tokens is cut off."""
        places_BL = self._bounds[samples_B, None] + np.arange(width)
        mask_BL = np.arange(width) < self.lengths[samples_B, None]
        ids_BL = self._ids[np.where(mask_BL, places_BL, 0)]
        return np.where(mask_BL, ids_BL, self._pad).astype(np.int64), mask_BL.astype(np.int64)

    def width(self, samples: np.ndarray) -> int:
        """Tokens of a batch that holds these texts: a multiple of 8, unless that is more than any row has."""
        return padded_width(int(self.lengths[samples].max()), self.longest)

    def fingerprint(self) -> dict[str, Any]:
        """How many texts there are, and a checksum of their tokens."""
        return {"samples": len(self.lengths), "tokens": cache.key(self._digest, self._ids.tobytes(), self.longest)}

    def notices(self) -> list[str]:
        """Nothing is left out."""
        return []


def padded_width(longest: int, most: int) -> int:
    """Tokens of a batch whose longest row has `longest` of them: a multiple of 8, but at most `most`."""
    return min(math.ceil(longest / PAD_TO) * PAD_TO, most)


def blank(rows: int, width: int, pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of padding, an empty mask and token types 0, each (rows, width), int64, to be written into."""
    ids = np.full((rows, width), pad, np.int64)
    return ids, np.zeros_like(ids), np.zeros_like(ids)


def joined(pieces: Sequence[np.ndarray], dtype: Any = np.int32) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of different lengths end to end, and where each begins (and the last ends), int64."""
    bounds = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([len(piece) for piece in pieces], out=bounds[1:])
    whole = np.concatenate(pieces).astype(dtype, copy=False) if pieces else np.zeros(0, dtype)
    return whole, bounds
