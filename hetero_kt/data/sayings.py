"""Generated texts that can be learned: paragraphs of plain facts with questions about them, and reviews.

For tests and `--debug`: no files and no vocabulary of others. The parts for training and for evaluation speak of other
subjects in the same words.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import numpy as np

from hetero_kt.data import counter
from hetero_kt.data.squad import Question, Questions
from hetero_kt.data.text import Tokenizer

_T = TypeVar("_T")

_NOUNS = ("river", "city", "bridge", "tower", "school", "ship", "garden", "road")
_VERBS = ("named", "found", "built", "sold", "painted", "closed")
_NAMES = ("anka", "boro", "celia", "dorn", "elbe", "fenn", "gara", "hult", "ister", "jona", "kolm", "lira")
_PEOPLE = ("otto", "maria", "ivan", "sara", "pedro", "lena", "karl", "nora")
_GOOD = ("good", "fine", "great", "lovely", "clever", "warm")
_BAD = ("bad", "dull", "weak", "empty", "silly", "cold")
_PARTS = ("story", "cast", "music", "end", "picture", "idea")
_REST = ("the", "was", "in", "by", "when", "who", "and", "but")
_KEY = counter.key(4, 0)
_PARAGRAPHS = {True: 64, False: 16}
_REVIEWS = {True: 200, False: 60}
_FACTS = 4  # of a paragraph; the subject of one more is asked for in vain


@cache
def vocabulary() -> Tokenizer:
    """A tokenizer that knows every word of these texts, and letters and digits to spell others: about 140 tokens."""
    from transformers import BertTokenizer

    words = (*_REST, *_NOUNS, *_VERBS, *_NAMES, *_PEOPLE, *_GOOD, *_BAD, *_PARTS)
    signs = string.ascii_lowercase + string.digits
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *signs, *(f"##{c}" for c in signs), ".", "?", ","]
    return Tokenizer(BertTokenizer(vocab={token: n for n, token in enumerate(tokens)}), "generated")


@cache
def questions(train: bool) -> Questions:
    """256 questions to train on or 64 others to evaluate on, always the same ones; every fourth has no answer."""
    contexts, asked = [], []
    for number in range(_PARAGRAPHS[train]):
        draw = _Draw(counter.key(_KEY, 0, int(train), number))
        nouns, names = draw.several(_NOUNS, _FACTS + 1), draw.several(_NAMES, _FACTS + 1)
        facts = []
        for noun, name in zip(nouns, names, strict=True):
            facts.append((f"the {noun} {name}", draw.one(_VERBS), str(1000 + draw.below(1000)), draw.one(_PEOPLE)))
        sentences = [f"The {who[4:]} was {verb} in {year} by {person}." for who, verb, year, person in facts[:_FACTS]]
        context = f"{' '.join(sentences)} Number {number}{'' if train else ', again'}."
        contexts.append(context)
        for kind in range(_FACTS):
            # The last subject is not in the paragraph.
            what, verb, year, person = facts[_FACTS if kind == _FACTS - 1 else draw.below(_FACTS)]
            when = bool(draw.below(2))
            text = f"When was {what} {verb}?" if when else f"By who was {what} {verb}?"
            answer = year if when else person
            place = context.find(f"The {what[4:]} was")
            start = context.find(f" {answer}", place) + 1
            answers = ((answer, start),) if place >= 0 else ()
            asked.append(Question(f"{number}-{kind}", f"title {number % 8}", number, text, answers))
    return Questions(tuple(contexts), tuple(asked))


@cache
def reviews(train: bool) -> tuple[list[str], np.ndarray]:
    """200 reviews to train on or 60 others to evaluate on, and their labels, always the same ones: good (1) where most
    of what is said is good."""
    texts, labels = [], []
    for number in range(_REVIEWS[train]):
        draw = _Draw(counter.key(_KEY, 1, int(train), number))
        label = number % 2
        votes = [label, label, label, 1 - label, draw.below(2)][: 3 + draw.below(3)]
        said = [f"the {draw.one(_PARTS)} was {draw.one(_GOOD if vote else _BAD)}" for vote in draw.several(votes)]
        texts.append(", and ".join(said).capitalize() + ".")
        labels.append(label)
    return texts, np.array(labels, np.int64)


def plain(train: bool) -> list[str]:
    """Texts for masked language modelling: the paragraphs and reviews."""
    return [*questions(train).contexts, *reviews(train)[0]]


class _Draw:
    """Random choices, decided by a key."""

    def __init__(self, key: int) -> None:
        self._key, self._count = key, 0

    def below(self, limit: int) -> int:
        self._count += 1
        return int(counter.below(counter.bits(self._key, np.array([self._count])), limit, width=32)[0])

    def one(self, choices: Sequence[_T]) -> _T:
        return choices[self.below(len(choices))]

    def several(self, choices: Sequence[_T], count: int | None = None) -> list[_T]:
        """`count` different ones (all, if None), in a random order."""
        left = list(choices)
        return [left.pop(self.below(len(left))) for _ in range(len(left) if count is None else count)]
