"""SQuAD v2: questions about a paragraph, some of which it does not answer.

Below the data folder: `squad_v2/` (or the data folder itself) with Parquet files whose names begin with `train` and
`validation`, or the official `train-v2.0.json` and `dev-v2.0.json`, packed with xz or not.

A long paragraph is cut into overlapping windows, as BERT's authors do: the question and as many of the paragraph's
tokens as fit; the next window begins `stride` tokens later.

Shape suffixes: B rows, L tokens of a row, W windows.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import lzma
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hetero_kt.data import cache, counter, parquet
from hetero_kt.data.text import Encoded, Tokenizer, blank, joined
from hetero_kt.documents import parse_json
from hetero_kt.files import read_regular
from hetero_kt.messages import first_line

_FORMAT = 1  # of the cache
_MOST = 2**30  # bytes of a file; the official ones have 42 million
_HELD_OUT = counter.key(0, 0)
_OFFICIAL = {"train": ("train-v2.0.json",), "validation": ("dev-v2.0.json", "validation-v2.0.json")}
_NAMED = 5  # questions that a notice names

OUTSIDE = "its answer does not stand where it says"
BETWEEN = "its answer begins or ends within a token"
LONG = "its answer fits into no window"


@dataclass(frozen=True)
class Windows:
    """How questions and paragraphs become rows."""

    length: int = 384
    """Tokens of the longest row, special ones included."""
    stride: int = 128
    """Tokens between the beginnings of two windows."""
    question: int = 64
    """Tokens of a question that are kept."""

    def __post_init__(self) -> None:
        if self.question < 1 or self.stride < 1 or self.length < self.question + 4:
            raise ValueError(
                f"windows of {self.length} tokens, {self.question} of them for the question, {self.stride} apart,"
                f" hold no paragraph: use 384, 64 and 128, for example"
            )


@dataclass(frozen=True)
class Question:
    """One question about one paragraph."""

    id: str
    title: str
    """Of its article."""
    context: int
    """Which paragraph."""
    text: str
    answers: tuple[tuple[str, int], ...]
    """Each accepted answer and the character of the paragraph at which it begins; empty where there is none."""


@dataclass(frozen=True)
class Questions:
    """A part of SQuAD as it is written."""

    contexts: tuple[str, ...]
    questions: tuple[Question, ...]


# --- files ---


def read(files: tuple[Path, ...]) -> Questions:
    """The questions of all `files`, in order; a paragraph that several ask about is kept once.

    Raises:
        ValueError: a file that is missing or damaged or has another layout, or an empty paragraph.
    """
    contexts: dict[str, int] = {}
    questions = []
    for file in files:
        entries = _from_parquet(file) if file.suffix == ".parquet" else _from_json(file)
        try:
            for entry in entries:
                questions.append(_question(entry, contexts))
        except _Empty as error:
            raise ValueError(
                f"{file}: the context of question {error} is empty: remove the question, or mend it"
            ) from error
        except _Damaged:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
            raise ValueError(
                f"{file} is not laid out as SQuAD v2 ({reason}, behind {len(questions)} good questions): name a file"
                f" with data, paragraphs, context, qas, id, question and answers, or Parquet with such columns"
            ) from error
    return Questions(tuple(contexts), tuple(questions))


def find(data_dir: str | Path, part: str) -> tuple[Path, ...]:
    """The files of `train` or `validation` below the data folder.

    Raises:
        ValueError: there are none.
    """
    folder = Path(data_dir)
    for place in (folder / "squad_v2", folder):
        for pattern in (f"{part}*.parquet", f"squad_v2/{part}*.parquet"):  # the second as the hub lays it out
            if files := sorted(place.glob(pattern)):
                return tuple(files)
        for name in _OFFICIAL[part]:
            for file in (place / name, place / f"{name}.xz"):
                if file.is_file():
                    return (file,)
    raise ValueError(
        f"{folder} holds no SQuAD v2 {part} set: name the folder that holds squad_v2/{part}*.parquet or"
        f" squad_v2/{_OFFICIAL[part][0]} with --data-dir or HETERO_KT_DATA"
    )


class _Empty(ValueError):
    """A question whose paragraph holds nothing."""


class _Damaged(ValueError):
    """A file that cannot be read at all."""


def _question(entry: dict[str, Any], contexts: dict[str, int]) -> Question:
    name, context, text, title = entry["id"], entry["context"], entry["question"], entry["title"]
    for value in (name, context, text, title):
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is no text")
    if not context.strip():
        raise _Empty(name)
    answers = tuple((str(answer), int(start)) for answer, start in entry["answers"])
    return Question(name, title, contexts.setdefault(context, len(contexts)), text, answers)


def _from_parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = parquet.read_columns(file).to_pylist()
    except OSError as error:
        raise _damaged(file, error) from error
    for row in rows:
        answers = row["answers"]
        pairs = zip(answers["text"], answers["answer_start"], strict=True)
        yield {"title": "", **row, "answers": list(pairs)}


def _from_json(file: Path) -> Iterator[dict[str, Any]]:
    try:
        content = parse_json(_text(file))
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise _damaged(file, error) from error
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                pairs = [(answer["text"], answer["answer_start"]) for answer in asked["answers"]]
                shared = {"title": article.get("title", ""), "context": paragraph["context"]}
                yield {"id": asked["id"], "question": asked["question"], "answers": pairs, **shared}


def _text(file: Path) -> bytes:
    """The bytes of a JSON file, unpacked where it is packed.

    Raises:
        OSError, EOFError or lzma.LZMAError: it cannot be read, or unpacks to too much.
    """
    packed = read_regular(file, _MOST)
    if file.suffix != ".xz":
        return packed
    with lzma.open(io.BytesIO(packed)) as stream:
        found = stream.read(_MOST + 1)
    if len(found) > _MOST:
        raise OSError(errno.EFBIG, f"it unpacks to more than the {_MOST:,} bytes that are read")
    return found


def _damaged(file: Path, error: Exception) -> ValueError:
    return _Damaged(
        f"{file} cannot be read ({first_line(error)}): fetch it again, or name another folder with --data-dir"
    )


# --- windows ---

_COLUMNS = ("question", "context", "first", "count", "start", "end", "best_first", "best_count")
"""Of the table of windows: which question and context; the context's first token in the window, and how many; the
answer's first and last token, counted in the row (0, the class token, where the window holds no answer); and the run
of the window's context tokens that no other window shows with more context around them."""


def spans(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """First token and count of the windows over `length` tokens, of at most `room` tokens each."""
    found = []
    first = 0
    while True:
        count = min(length - first, room)
        found.append((first, count))
        if first + count == length:
            return found
        first += min(count, stride)


def most_context(windows: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """For each window the run of tokens (first, count) that it shows with the most context: the smaller of what is
    left and right of the token, with 0.01 for each of the window's tokens, as BERT's authors weigh it. Each token
    belongs to one window, the first of equals."""
    scores, best = np.full(length, -1.0), np.zeros(length, np.int32)
    for window, (first, count) in enumerate(windows):
        inside = np.arange(count)
        score = np.minimum(inside, count - 1 - inside) + 0.01 * count
        own = slice(first, first + count)
        better = score > scores[own]
        scores[own][better], best[own][better] = score[better], window
    counts = np.bincount(best, minlength=len(windows))
    firsts = np.cumsum(counts) - counts  # later windows begin later, so that what belongs to one is one run
    assert (np.diff(best) >= 0).all()
    return [(int(first), int(count)) if count else (0, 0) for first, count in zip(firsts, counts, strict=True)]


def _build(source: Questions, tokenizer: Tokenizer, settings: Windows) -> cache.Entry:
    contexts = list(tokenizer.encode(source.contexts))
    questions = [one.ids[: settings.question] for one in tokenizer.encode([q.text for q in source.questions])]
    for number, context in enumerate(contexts):
        if not len(context.ids):
            asked = next(q.id for q in source.questions if q.context == number)
            raise ValueError(f"the context of question {asked} holds no tokens: remove the question, or mend it")
    rows, problems = [], []
    for number, (question, ids) in enumerate(zip(source.questions, questions, strict=True)):
        context = contexts[question.context]
        windows = spans(len(context.ids), settings.length - len(ids) - 3, settings.stride)
        best = most_context(windows, len(context.ids))
        place, problem = _place(question, source.contexts[question.context], context, windows)
        if problem:
            problems.append((number, problem))
        for (first, count), run in zip(windows, best, strict=True):
            start = end = 0
            if place and first <= place[0] and place[1] < first + count:
                start, end = (len(ids) + 2 + token - first for token in place)
            rows.append((number, question.context, first, count, start, end, *run))
    question_ids, question_bounds = joined(questions)
    context_ids, context_bounds = joined([context.ids for context in contexts])
    arrays = {
        "question_ids": question_ids,
        "question_bounds": question_bounds,
        "context_ids": context_ids,
        "context_bounds": context_bounds,
        "offsets": np.concatenate([context.offsets for context in contexts]),
        "windows": np.array(rows, np.int32).reshape(-1, len(_COLUMNS)),
        "answerable": np.array([bool(question.answers) for question in source.questions]),
    }
    return arrays, {"problems": [[number, source.questions[number].id, text] for number, text in problems]}


def _place(
    question: Question, context: str, encoded: Encoded, windows: list[tuple[int, int]]
) -> tuple[tuple[int, int] | None, str]:
    """First and last token of the (first) answer, or what keeps it from being trained on."""
    if not question.answers:
        return None, ""
    text, start = question.answers[0]
    if start < 0 or not text or context[start : start + len(text)] != text:
        return None, OUTSIDE
    (firsts,) = np.nonzero(encoded.offsets[:, 0] == start)
    (lasts,) = np.nonzero(encoded.offsets[:, 1] == start + len(text))
    if not len(firsts) or not len(lasts):
        return None, BETWEEN
    place = int(firsts[0]), int(lasts[-1])
    if not any(first <= place[0] and place[1] < first + count for first, count in windows):
        return None, LONG
    return place, ""


# --- rows ---


class SquadRows:
    """Windows as rows for a loader: [CLS] question [SEP] context [SEP].

    A batch is ids, mask and token types (B, L), and the answer's first and last token (B,), both 0 where the window
    does not hold it. For training, questions whose answer cannot be placed on tokens are left out.

    Attributes:
        problems: (id, what is wrong) of every question whose answer cannot be placed.
        windows: (W, 8), int32, of the rows here; see `_COLUMNS`.
    """

    classes = 2  # logits for each token: first, last

    def __init__(
        self,
        source: tuple[Path, ...] | Questions,
        tokenizer: Tokenizer,
        settings: Windows,
        *,
        name: str,
        train: bool,
        held_out: bool | None = None,
        validation: float = 0.0,
        folder: str | Path = "",
    ) -> None:
        """Args:
        source: the questions, or the files that hold them.
        train: leave out what cannot be trained on.
        held_out: with `validation`, the articles that are held out (True) or the others (False); None takes all.
        folder: of the cache.
        """
        self.tokenizer, self.name, self.train = tokenizer, name, train
        self._from = source
        if isinstance(source, Questions):
            self._data = cache.key(dataclasses.asdict(source))
        else:
            self._data = cache.key(*(_bytes(file) for file in source))
        parts = (_FORMAT, self._data, tokenizer.digest, dataclasses.asdict(settings))
        self.key = cache.key("squad", *parts)
        self._arrays, notes = cache.cached(self.key, lambda: _build(self.source, tokenizer, settings), folder)
        wrong = {number: (asked, text) for number, asked, text in notes["problems"]}
        windows = self._arrays["windows"]
        kept = np.ones(len(windows), bool)
        self.articles: frozenset[str] = frozenset()
        if held_out is not None:
            self.articles = _held_out(self.source, validation)
            inside = np.array([question.title in self.articles for question in self.source.questions])
            kept &= inside[windows[:, 0]] == held_out
            wrong = {number: problem for number, problem in wrong.items() if inside[number] == held_out}
        self.problems = list(wrong.values())
        trainable = ~np.isin(windows[:, 0], list(wrong))
        if train:
            kept &= trainable
        self.windows = np.asarray(windows[kept])
        self.trainable = trainable[kept]
        """Rows whose labels say where the answer is (or that there is none): (W,), bool."""
        asked = np.diff(self._arrays["question_bounds"])
        self.lengths = asked[self.windows[:, 0]] + self.windows[:, 3] + 3
        self.longest = settings.length

    @cached_property
    def source(self) -> Questions:
        """The questions and paragraphs as they are written; read when they are first needed."""
        return self._from if isinstance(self._from, Questions) else read(self._from)

    def take(self, samples_B: np.ndarray, width: int, random_B: np.ndarray) -> tuple[np.ndarray, ...]:
        """See `hetero_kt.data.text.Rows`."""
        ids_BL, mask_BL, types_BL = blank(len(samples_B), width, self.tokenizer.pad)
        table = self.windows[samples_B]
        for row, (question, context, first, count) in enumerate(table[:, :4].tolist()):
            asked = _piece(self._arrays, "question", question)
            shown = _piece(self._arrays, "context", context)[first : first + count]
            middle = len(asked) + 2
            ids_BL[row, 0] = self.tokenizer.cls
            ids_BL[row, 1 : middle - 1] = asked
            ids_BL[row, middle - 1] = ids_BL[row, middle + count] = self.tokenizer.sep
            ids_BL[row, middle : middle + count] = shown
            mask_BL[row, : middle + count + 1] = 1
            types_BL[row, middle : middle + count + 1] = 1
        return ids_BL, mask_BL, types_BL, table[:, 4].astype(np.int64), table[:, 5].astype(np.int64)

    def before_context(self) -> np.ndarray:
        """Tokens of each row in front of its context, (W,)."""
        return np.diff(self._arrays["question_bounds"])[self.windows[:, 0]] + 2

    def characters(self, context: int) -> np.ndarray:
        """First and one behind the last character of each of a paragraph's tokens, (T, 2)."""
        bounds = self._arrays["context_bounds"]
        return self._arrays["offsets"][bounds[context] : bounds[context + 1]]

    def fingerprint(self) -> dict[str, Any]:
        """How many windows there are, and checksums of the files and of how they were cut."""
        return {"samples": len(self.windows), "data": self._data, "tokens": self.key}

    def notices(self) -> list[str]:
        """Which questions cannot be trained on."""
        found = []
        for text, times in Counter(text for _, text in self.problems).items():
            names = [asked for asked, why in self.problems if why == text]
            more = ", ..." if times > _NAMED else ""
            what = "left out of training" if self.train else "not in the loss"
            found.append(f"{self.name}: {times} questions {what}, {text}: {', '.join(names[:_NAMED])}{more}")
        return found


def squad(
    data_dir: str | Path,
    tokenizer: Tokenizer,
    settings: Windows | None = None,
    *,
    train: bool,
    validation: float = 0.0,
    folder: str | Path = "",
) -> SquadRows:
    """The windows to train on, or those to evaluate on.

    Args:
        validation: this fraction of the training questions, whole articles of them, is evaluated on instead of the
            validation set.
        folder: of the cache; empty takes the default one.

    Raises:
        ValueError: data that is missing, damaged or laid out differently, or settings that do not fit it.
    """
    part = "train" if train or validation > 0 else "validation"
    rows = SquadRows(
        find(data_dir, part),
        tokenizer,
        settings or Windows(),
        name="squad_v2",
        train=train,
        held_out=(not train) if validation > 0 else None,
        validation=validation,
        folder=folder,
    )
    if not len(rows.windows):
        raise ValueError(f"squad_v2: validation {validation} leaves nothing to train or to evaluate on: use 0.1")
    return rows


def _held_out(source: Questions, fraction: float) -> frozenset[str]:
    """Articles, drawn by their number, until they have the fraction of all questions."""
    sizes = Counter(question.title for question in source.questions)
    titles = sorted(sizes)
    chosen: list[str] = []
    for number in counter.permutation(_HELD_OUT, len(titles)).tolist():
        if sum(sizes[title] for title in chosen) >= fraction * len(source.questions):
            break
        chosen.append(titles[number])
    return frozenset(chosen)


def _piece(arrays: dict[str, np.ndarray], what: str, number: int) -> np.ndarray:
    bounds = arrays[f"{what}_bounds"]
    return arrays[f"{what}_ids"][bounds[number] : bounds[number + 1]]


def _bytes(file: Path) -> bytes:
    try:
        return read_regular(file, _MOST)
    except OSError as error:
        raise _damaged(file, error) from error
