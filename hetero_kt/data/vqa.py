"""Questions about pictures (VQA) and the loader that draws batches of them.

A set's folder holds one of these:

- VQA v2 as it is published: `v2_OpenEnded_mscoco_train2014_questions.json`, `v2_mscoco_train2014_annotations.json`
  and the same for val2014, with COCO's pictures in `train2014/` and `val2014/`, as files or as shards
- Parquet files `train*.parquet` and `test*.parquet` or `val*.parquet` with the columns `image`, `image_id`, and
  `vqa_v2` (question_id, question, answers and answer_type of each question) or `qa` (question and answer)

Which answers can be given at all is read from `answer_list.json`, a list of texts, or counted: the answers that most
annotators of the training questions gave, of those questions alone that the run trains on.

Shape suffixes: B rows of this rank, L tokens of a question, A answers of a batch's questions, T tokens of an answer,
K answers of the list.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hetero_kt.config import Data
from hetero_kt.data import GENERATED, cache, world
from hetero_kt.data.device import moved
from hetero_kt.data.gallery import (
    Folders,
    Gallery,
    Shown,
    Stamped,
    Tables,
    columns,
    counted,
    examples,
    kept,
    laid_out,
    read_json,
    schema,
    stamped,
    stripped,
    tables,
    without_missing,
)
from hetero_kt.data.order import Order
from hetero_kt.data.pictures import PictureLoader
from hetero_kt.data.question import Question
from hetero_kt.data.shards import local
from hetero_kt.data.text import Sentences, Tokenizer, joined

KINDS = ("yes/no", "number", "other")
ANSWER_LIST = "answer_list.json"
_OFFICIAL = ("v2_OpenEnded_mscoco_{}2014_questions.json", "v2_mscoco_{}2014_annotations.json")


@dataclass(frozen=True)
class AnswerList:
    """The answers that can be given, tokenised: [CLS] answer [SEP]."""

    texts: list[str]
    ids: np.ndarray
    """(K, T), int64, padded."""
    mask: np.ndarray
    """(K, T), int64."""
    counted: bool = False
    """The first one is the training questions' most frequent answer. Published lists are in any order."""


def answer_list(texts: Sequence[str], tokenizer: Tokenizer, length: int = 40, *, counted: bool = False) -> AnswerList:
    """The list of these answers; of an answer longer than `length` tokens the rest is cut off."""
    sentences = Sentences(texts, tokenizer, length, "answers")
    ids, mask = sentences.take(np.arange(len(texts)), int(sentences.lengths.max(initial=0)))
    return AnswerList(list(texts), ids, mask, counted)


class Asked(NamedTuple):
    """A batch of questions with the different answers that each was given."""

    pictures: Tensor
    """(B, 3, H, W)."""
    ids: Tensor
    """(B, L), int64: [CLS] question [SEP]."""
    mask: Tensor
    """(B, L), int64."""
    answer_ids: Tensor
    """(A, T), int64: [CLS] answer [SEP]."""
    answer_mask: Tensor
    """(A, T), int64."""
    weight: Tensor
    """(A,), share of the question's annotators who gave the answer."""
    owner: Tensor
    """(A,), int64, the row that the answer belongs to; ascending."""
    counts: tuple[int, ...]
    """Answers of each row."""

    def split(self, rows: int) -> list[Asked]:
        """The batch in pieces of `rows` questions each, without waiting for the device."""
        pieces, first = [], 0
        for row in range(0, len(self.counts), rows):
            own, counts = slice(row, row + rows), self.counts[row : row + rows]
            last = first + sum(counts)
            pieces.append(
                Asked(
                    self.pictures[own],
                    self.ids[own],
                    self.mask[own],
                    self.answer_ids[first:last],
                    self.answer_mask[first:last],
                    self.weight[first:last],
                    self.owner[first:last] - row,
                    counts,
                )
            )
            first = last
        return pieces


class QuestionLoader:
    """One rank's share of the global batches of questions, each with its picture, in the order of `Order`.

    A batch is a function of its step. Questions are padded to the longest of the global batch, so that all ranks'
    rows are of one width; where a damaged picture made another question take a row, what is longer is cut off.

    Attributes:
        answers: those that can be given; answers of training questions need not be among them.
        questions: by sample number.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        gallery: Gallery,
        answers: AnswerList,
        tokenizer: Tokenizer,
        config: Data,
        *,
        name: str,
        train: bool,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        notices: Sequence[str] = (),
    ) -> None:
        """`notices` tell what was left out before.

        Raises:
            ValueError: no questions, a batch that does not divide over the ranks, or settings that timm refuses.
        """
        self.questions, self.answers = questions, answers
        keys, black = [question.image for question in questions], config.image_size if config.blank else 0
        self._shown = Shown(name, gallery, keys, len(answers.texts), black)

        def loader(shown: Shown) -> PictureLoader:
            settings = (config.transform, config.image_size, rank, world, device)
            return PictureLoader(shown, config.batch, seed, *settings, workers=config.workers, corrupt=config.corrupt)

        self._pictures = loader(self._shown)
        # Evaluation goes picture by picture, from few questions to many, so that ranks have equally many.
        about: dict[str, list[int]] = {}
        for sample, key in enumerate(keys):
            about.setdefault(key, []).append(sample)
        by_count = sorted(about, key=lambda key: len(about[key]))
        self._each = loader(Shown(name, gallery, by_count, black=black))
        self._about, self._bounds = joined([np.array(about[key]) for key in by_count], np.int64)
        self.name, self.samples, self.classes = name, len(questions), len(answers.texts)
        self.global_batch, self.steps_per_epoch = config.batch, self._pictures.steps_per_epoch
        self.mean, self.std, self.device = self._shown.mean, self._shown.std, self._pictures.device
        self._whole = Order(name, self.samples, config.batch, seed)  # of all ranks
        self._sentences = Sentences([question.text for question in questions], tokenizer, config.text.length, name)
        self._tokenizer, self._length = tokenizer, config.text.length
        self._notices = list(notices)
        if not train:
            self._notices += self._unanswerable()
        self._rank, self._world, self._seed = rank, world, seed

    def batch(self, step: int) -> Asked:
        """This rank's rows of the global batch of `step`.

        Raises:
            ValueError: a damaged picture, where those are to end the run, or no sound one to replace it.
        """
        pictures, drawn = self._pictures.draw(step)
        samples_B = drawn.numpy()
        ids, mask = self._sentences.take(samples_B, self._sentences.width(self._whole.rows(step)[1]))
        given = self._given
        counts_B = given.bounds[samples_B + 1] - given.bounds[samples_B]
        places_A = np.concatenate([np.arange(given.bounds[s], given.bounds[s + 1]) for s in samples_B])
        answers_A = given.answers[places_A]
        answer_ids, answer_mask = given.sentences.take(answers_A, int(given.sentences.lengths[answers_A].max()))
        owner_A = np.repeat(np.arange(len(samples_B)), counts_B)
        return Asked(
            pictures,
            moved(ids, self.device),
            moved(mask, self.device),
            moved(answer_ids, self.device),
            moved(answer_mask, self.device),
            moved(given.shares[places_A], self.device),
            moved(owner_A, self.device),
            tuple(counts_B.tolist()),
        )

    def eval_batches(self, rows: int) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]]:
        """This rank's share of every question exactly once: pictures (P, 3, H, W), ids and mask (B, L), and which of
        the pictures each question is about (B,), int64; which samples the rows are (B,), int64; and their weights (B,).

        All questions about a picture come one after the other, so that it is decoded once. Every rank yields equally
        many batches of equal shape, at most `rows` questions each; rows that fill up, and those whose picture cannot
        be read, have weight 0, all others 1.

        Raises:
            ValueError: a damaged picture, where those are to end the run.
        """
        images = len(self._bounds) - 1
        at_once = max(1, rows * images // self.samples)
        orders = [Order(self.name, images, self._world, self._seed, r, self._world) for r in range(self._world)]
        turns = zip(*(order.in_turn(at_once) for order in orders), strict=True)
        for of_ranks, (pictures, _, sound_P) in zip(turns, self._each.eval_batches(at_once), strict=True):
            asked = [self._questions_about(*turn) for turn in of_ranks]
            width = self._sentences.width(np.concatenate([samples for samples, _ in asked]))
            own, most = asked[self._rank], max(len(samples) for samples, _ in asked)
            counts_B = np.arange(most) < len(own[0])
            samples_B, owner_B = (np.pad(array, (0, most - len(array))) for array in own)
            piece = math.ceil(most / math.ceil(most / rows))
            for first in range(0, most, piece):
                some = slice(first, first + piece)
                ids, mask = self._sentences.take(samples_B[some], width)
                host = (ids, mask, owner_B[some], samples_B[some], counts_B[some])
                ids_BL, mask_BL, owner, samples, counts = (moved(array, self.device) for array in host)
                yield (pictures, ids_BL, mask_BL, owner), samples, sound_P[owner] * counts

    def _questions_about(self, images_P: np.ndarray, counts_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The questions about those of the pictures that count, and which of them each is about."""
        places = [np.arange(*self._bounds[image : image + 2]) for image in images_P[counts_P]]
        samples = [self._about[place] for place in places]
        owner = np.repeat(np.flatnonzero(counts_P), [len(some) for some in samples])
        return np.concatenate([np.zeros(0, np.int64), *samples]), owner

    def fingerprint(self) -> dict[str, Any]:
        """How many questions there are, and checksums of pictures, questions, answers and tokens."""
        texts = [f"{q.id}\t{q.text}\t{q.kind}\t{'|'.join(q.answers)}" for q in self.questions]
        return {
            **self._shown.fingerprint(),
            "samples": self.samples,
            "questions": cache.key("\n".join(texts)),
            "answers": cache.key(self.answers.texts),
            "tokens": self._sentences.fingerprint()["tokens"],
        }

    def notices(self) -> list[str]:
        """What was left out on this rank since the start, and what cannot be answered; a sentence each."""
        return list(dict.fromkeys([*self._notices, *self._pictures.notices(), *self._each.notices()]))

    def throughput(self) -> dict[str, float]:
        """See `PictureLoader.throughput`."""
        return self._pictures.throughput()

    def close(self) -> None:
        """End the workers; a later batch starts others."""
        self._pictures.close()

    @cached_property
    def _given(self) -> _Given:
        texts = sorted({answer for question in self.questions for answer in question.answers})
        numbers = {text: number for number, text in enumerate(texts)}
        votes = [Counter(filter(None, question.answers)) for question in self.questions]
        answers, bounds = joined([np.array([numbers[text] for text in vote]) for vote in votes])
        annotators = [len(question.answers) for question in self.questions]
        shares = [np.array([*vote.values()]) / count for vote, count in zip(votes, annotators, strict=True)]
        sentences = Sentences(texts, self._tokenizer, self._length, self.name)
        return _Given(sentences, answers, joined(shares, np.float32)[0], bounds)

    def _unanswerable(self) -> list[str]:
        known = set(self.answers.texts)
        lost = [question.id for question in self.questions if known.isdisjoint(question.answers)]
        if not lost:
            return []
        what = f"{counted(len(lost), 'question')} of {self.samples:,} cannot be answered rightly"
        return [f"{self.name}: {what}, since no answer is in the list of {self.classes:,} ({examples(lost)})."]


@dataclass(frozen=True)
class _Given:
    """The different answers of each question, one question's behind the other's."""

    sentences: Sentences
    answers: np.ndarray
    """Numbers of sentences, int32."""
    shares: np.ndarray
    """Of the question's annotators who gave them, float32."""
    bounds: np.ndarray
    """Where each question's answers begin, and the last one's end."""


# --- the parts of a set ---


def vqa(
    config: Data,
    data_dir: str | Path,
    tokenizer: Tokenizer,
    *,
    train: bool,
    seed: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> QuestionLoader:
    """The questions to train on, or those to evaluate on, of the set in `config.folder` below `data_dir`.

    Evaluation takes the validation set of VQA v2, of Parquet files the test set (or where there is none, the validation
    set), and with `config.validation` that fraction of the training pictures. Questions without an answer are
    left out; so are those whose picture is missing, unless that is to end the run.

    Raises:
        ValueError: data that is missing, damaged or laid out differently, or settings that do not fit it.
    """
    of_training = train or config.validation > 0
    part = _part(config, data_dir, train=of_training)
    asked = _answered(part.questions)
    if not asked:
        raise ValueError(f"{part.name} holds no question with an answer: name another folder with --data.NAME.folder")
    notices = []
    if lost := [question.id for question in part.questions if not any(question.answers)]:
        notices.append(f"{part.name}: {counted(len(lost), 'question')} without an answer left out ({examples(lost)}).")
    if of_training:
        asked = _chosen(asked, config, train=train)
    keys = list(dict.fromkeys(question.image for question in asked))
    gallery = part.open(keys)
    there, missing = without_missing(keys, gallery, part.name, config.corrupt)
    answers = part.listed or _most_frequent(asked if train else _trained_on(config, data_dir), config.answers)
    return QuestionLoader(
        [question for question in asked if question.image in there],
        gallery,
        answer_list(answers, tokenizer, config.text.length, counted=not part.listed),
        tokenizer,
        config,
        name=part.name,
        train=train,
        seed=seed,
        rank=rank,
        world=world,
        device=device,
        notices=notices + missing,
    )


@dataclass(frozen=True)
class _Part:
    """One part of a set as it is written."""

    name: str
    questions: Sequence[Question]
    open: Callable[[Sequence[str]], Gallery]
    """Its pictures, given the keys that are wanted."""
    listed: list[str]
    """The answers of answer_list.json; empty without one."""


def _part(config: Data, data_dir: str | Path, *, train: bool) -> _Part:
    if config.text.tokenizer == GENERATED:
        return _Part(GENERATED, world.questions(train), lambda keys: world.World(train), [])
    folder = local(data_dir, "--data-dir") / local(config.folder, "--data.NAME.folder")
    listed = _listed(folder / ANSWER_LIST)
    official = "train" if train else "val"
    json_files = [folder / name.format(official) for name in _OFFICIAL]
    if any(file.is_file() for file in json_files):
        questions = _official(official, *map(stamped, json_files))
        root = folder / "images" if (folder / "images").is_dir() else folder
        return _Part(str(folder), questions, lambda keys: Folders(root, keys, config.corrupt), listed)
    if files := tables(folder, train=train):
        of_files = [_from_parquet(stamped(file)) for file in files]
        every = [key for _, keys in of_files for key in keys]
        asked = [question for questions, _ in of_files for question in questions]
        return _Part(str(folder), asked, lambda keys: Tables(files, every), listed)
    raise ValueError(
        f"{folder} holds no questions about pictures: name one with {' and '.join(f.name for f in json_files)}, or with"
        f" {'train' if train else 'test or validation'}*.parquet, with --data-dir and --data.NAME.folder"
    )


def _trained_on(config: Data, data_dir: str | Path) -> list[Question]:
    return _chosen(_answered(_part(config, data_dir, train=True).questions), config, train=True)


def _answered(questions: Sequence[Question]) -> list[Question]:
    return [question for question in questions if any(question.answers)]


def _chosen(questions: Sequence[Question], config: Data, *, train: bool) -> list[Question]:
    images = kept((q.image for q in questions), config.validation, config.fraction, train=train)
    return [question for question in questions if question.image in images]


def _most_frequent(questions: Sequence[Question], most: int) -> list[str]:
    """Answers by how many annotators gave them; of equals, the first in the alphabet."""
    votes = Counter(answer for question in questions for answer in question.answers if answer)
    return [answer for answer, _ in sorted(votes.items(), key=lambda item: (-item[1], item[0]))[:most]]


def _listed(file: Path) -> list[str]:
    if not file.is_file():
        return []
    texts = read_json(file)
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(f"{file} is no list of answers: write one, or remove the file to have them counted")
    if len(set(texts)) < len(texts):
        twice = next(text for text, count in Counter(texts).items() if count > 1)
        raise ValueError(f"{file} has {twice!r} twice: remove one of them")
    return texts


# --- files ---


@lru_cache(maxsize=2)
def _official(part: str, questions: Stamped, annotations: Stamped) -> list[Question]:
    """The questions of VQA v2's `train` or `val`, in the order of their file."""
    known: dict[str, str] = {}  # texts that many say are kept once
    answers: dict[int, tuple[int, str, tuple[str, ...]]] = {}
    with laid_out(annotations[0], "VQA v2's annotations"):
        for entry in read_json(annotations[0])["annotations"]:
            texts = [stripped(one["answer"]) for one in entry["answers"]]
            given = tuple(known.setdefault(text, text) for text in texts)
            answers[entry["question_id"]] = entry["image_id"], _kind(entry["answer_type"]), given
    found, foreign = [], ""
    with laid_out(questions[0], "VQA v2's questions"):
        for entry in read_json(questions[0])["questions"]:
            number, image, text = entry["question_id"], entry["image_id"], stripped(entry["question"])
            about, kind, given = answers.pop(number, (image, "other", ()))
            if about != image:
                foreign = f"question {number} is about picture {image} here and about {about} there"
            key = f"{part}2014/COCO_{part}2014_{image:012d}.jpg"
            found.append(Question(str(number), known.setdefault(key, key), text, given, kind))
    if answers:
        foreign = f"{counted(len(answers), 'question')} there are not here, {next(iter(answers))} for example"
    if foreign:
        raise ValueError(
            f"{questions[0]} and the annotations of {annotations[0].name} do not belong together ({foreign}): fetch"
            f" both again"
        )
    return found


@lru_cache(maxsize=64)
def _from_parquet(file: Stamped) -> tuple[list[Question], list[str]]:
    """The questions of a file, and the keys of all its rows."""
    path = file[0]
    of_daquar = "qa" in schema(path)
    rows = columns(path, ["image_id", "qa" if of_daquar else "vqa_v2"]).to_pylist()
    with laid_out(path, "questions about pictures"):
        return [q for row in rows for q in (_of_daquar if of_daquar else _of_coco)(row)], [
            str(row["image_id"]) for row in rows
        ]


def _of_coco(row: dict[str, Any]) -> Iterator[Question]:
    for one in row["vqa_v2"] or ():
        kind, answers = _kind(one["answer_type"]), tuple(stripped(answer) for answer in one["answers"] or ())
        yield Question(str(one["question_id"]), str(row["image_id"]), stripped(one["question"]), answers, kind)


def _of_daquar(row: dict[str, Any]) -> Iterator[Question]:
    """One annotator answered; several things are one answer."""
    for number, one in enumerate(row["qa"] or ()):
        answer = stripped(one["answer"] or "")
        kind = "number" if answer.isdecimal() else "other"
        yield Question(f"{row['image_id']}-{number}", str(row["image_id"]), stripped(one["question"]), (answer,), kind)


def _kind(name: str) -> str:
    if name not in KINDS:
        raise ValueError(f"{name!r} is no answer_type")
    return name
