"""A generated world of pictures that can be learned: coloured shapes, with questions about them and captions.

For tests and `--debug`: no files and no vocabulary of others. A picture has one to three shapes on a grid of two by
two places, and shows as much at 32 x 32 pixels. It has a question of every kind with ten answers, most of which agree,
and two captions. No two pictures of the evaluation part show the same shapes, so that a caption that names them all
fits one alone; none of them is in the training part.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from hetero_kt.data import counter
from hetero_kt.data.question import Question
from hetero_kt.data.text import Tokenizer

SIDE = 64
"""Pixels of a picture's side."""

_T = TypeVar("_T")

_COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 50)}
_SHAPES = ("circle", "square", "cross")
_PLACES = ("top left", "top right", "bottom left", "bottom right")
_NUMBERS = ("no shapes", "one shape", "two shapes", "three shapes")
_WORDS = "a and are at color how in is many no of one other picture shape shapes the there three two what with yes"
_PICTURES = {True: 2000, False: 200}
_ANNOTATORS = 10
_COUNTS = (1, 2, 3)  # of shapes, equally often
_KEY = counter.key(5, 0)
_DRAWS = 32  # random numbers at hand for a picture


class Thing(NamedTuple):
    """One shape."""

    color: str
    shape: str
    place: int

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@cache
def vocabulary() -> Tokenizer:
    """A tokenizer that knows every word of this world, and letters and digits to spell others: about 120 tokens."""
    from transformers import BertTokenizer

    nouns = [*_COLORS, *_SHAPES, *(f"{shape}{_plural(shape)}" for shape in _SHAPES)]
    words = dict.fromkeys([*_WORDS.split(), *nouns, *" ".join(_PLACES).split()])
    signs = [c for c in string.ascii_lowercase + string.digits if c not in words]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *signs]
    tokens += [*(f"##{c}" for c in string.ascii_lowercase + string.digits), ".", "?", ",", ":"]
    return Tokenizer(BertTokenizer(vocab={token: n for n, token in enumerate(tokens)}), "generated")


@cache
def scenes(train: bool) -> dict[str, tuple[Thing, ...]]:
    """2,000 pictures to train on or 200 others to evaluate on, always the same ones: what each shows."""
    found: dict[str, tuple[Thing, ...]] = {}
    taken = {_sorted(things) for things in scenes(False).values()} if train else set()
    for number, draw in enumerate(_draws(0 if train else 1)):
        count = draw.one(_COUNTS)
        places = sorted(draw.several(range(len(_PLACES)), count))
        things = tuple(Thing(draw.one(list(_COLORS)), draw.one(_SHAPES), place) for place in places)
        shown = _sorted(things) if train else _sorted([thing._replace(place=0) for thing in things])
        if shown in taken:
            continue
        if not train:
            taken.add(shown)
        found[f"{'train' if train else 'evaluation'}-{number}"] = things
        if len(found) == _PICTURES[train]:
            break
    return found


def picture(things: Sequence[Thing]) -> Image.Image:
    """What the things look like: 64 x 64, RGB, on grey. Circles are rimmed in white and crosses in black, since a
    vision encoder of two layers takes far longer to tell outlines than colours."""
    image = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    for color, shape, place in things:
        bottom, right = divmod(place, 2)
        x, y = 32 * right + 2, 32 * bottom + 2
        fill = _COLORS[color]
        if shape == "circle":
            draw.ellipse((x, y, x + 27, y + 27), fill, (255, 255, 255), 5)
        elif shape == "square":
            draw.rectangle((x, y, x + 27, y + 27), fill)
        else:
            for rim, paint in ((0, (0, 0, 0)), (3, fill)):
                draw.rectangle((x + 7 + rim, y + rim, x + 20 - rim, y + 27 - rim), paint)
                draw.rectangle((x + rim, y + 7 + rim, x + 27 - rim, y + 20 - rim), paint)
    return image


class World:
    """The pictures of one part, as a `gallery.Gallery`."""

    def __init__(self, train: bool) -> None:
        self._scenes = scenes(train)

    def __contains__(self, key: str) -> bool:
        return key in self._scenes

    def picture(self, key: str) -> Image.Image:
        """One picture in RGB, drawn anew: that takes less time than a look at a cache would be worth."""
        return picture(self._scenes[key])

    def place(self, key: str) -> str:
        return "the generated world"

    def fingerprint(self) -> dict[str, Any]:
        return {"pictures": len(self._scenes), "generated": 1}

    def notices(self) -> list[str]:
        return []


@cache
def questions(train: bool) -> tuple[Question, ...]:
    """Three questions about each picture: yes/no, number, other."""
    asked = []
    for (key, things), draw in zip(scenes(train).items(), _draws(2 if train else 3), strict=False):
        for kind, make in (("yes/no", _whether), ("number", _how_many), ("other", _what)):
            text, answer, wrong = make(things, draw)
            answers = [answer] * _ANNOTATORS
            for annotator in draw.several(range(_ANNOTATORS), draw.below(3)):
                answers[annotator] = draw.one(wrong)
            asked.append(Question(f"{key}-{kind}", key, text, tuple(answers), kind))
    return tuple(asked)


@cache
def captions(train: bool) -> dict[str, tuple[str, ...]]:
    """Two captions of each picture, which name all that it shows; the second says where."""
    found: dict[str, tuple[str, ...]] = {}
    for (key, things), draw in zip(scenes(train).items(), _draws(4 if train else 5), strict=False):
        first = " and ".join(f"a {thing}" for thing in draw.several(things))
        placed = ", ".join(f"a {thing} at the {_PLACES[thing.place]}" for thing in draw.several(things))
        found[key] = (f"{first}.", f"a picture with {_NUMBERS[len(things)]}: {placed}.")
    return found


# --- questions: their text, the answer, and wrong answers of the same kind ---

_Asked = tuple[str, str, list[str]]


def _whether(things: Sequence[Thing], draw: _Draw) -> _Asked:
    """A colour or a shape."""
    there = {f"{thing.color} shape" for thing in things} | {thing.shape for thing in things}
    yes = bool(draw.below(2))
    others = [what for what in (*(f"{color} shape" for color in _COLORS), *_SHAPES) if what not in there]
    return f"is there a {draw.one(sorted(there) if yes else others)}?", "yes" if yes else "no", ["no" if yes else "yes"]


def _how_many(things: Sequence[Thing], draw: _Draw) -> _Asked:
    counts: dict[int, list[str]] = {len(things): ["shapes"]}
    for color in _COLORS:
        counts.setdefault(sum(thing.color == color for thing in things), []).append(f"{color} shapes")
    for shape in _SHAPES:
        counts.setdefault(sum(thing.shape == shape for thing in things), []).append(f"{shape}{_plural(shape)}")
    count = draw.one(sorted(counts))
    return (
        f"how many {draw.one(counts[count])} are there?",
        str(count),
        [str(number) for number in range(4) if number != count],
    )


def _what(things: Sequence[Thing], draw: _Draw) -> _Asked:
    """Of a thing that is the only one of its shape or of its colour; or what is at a place."""
    thing = draw.one(things)
    others = [f"{color} {thing.shape}" for color in _COLORS if color != thing.color]
    placed = (f"what is at the {_PLACES[thing.place]}?", str(thing), others)
    asked: list[_Asked] = []
    if sum(other.shape == thing.shape for other in things) == 1:
        colors = [color for color in _COLORS if color != thing.color]
        asked.append((f"what color is the {thing.shape}?", thing.color, colors))
    if sum(other.color == thing.color for other in things) == 1:
        shapes = [shape for shape in _SHAPES if shape != thing.shape]
        asked.append((f"what shape is {thing.color}?", thing.shape, shapes))
    return draw.one(asked) if asked and draw.below(4) else placed


def _plural(shape: str) -> str:
    return "es" if shape.endswith("s") else "s"


def _sorted(things: Sequence[Thing]) -> tuple[Thing, ...]:
    return tuple(sorted(things))


class _Draw:
    """Random choices for one picture."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self._numbers = numbers

    def below(self, limit: int) -> int:
        return (next(self._numbers) * limit) >> 32

    def one(self, choices: Sequence[_T]) -> _T:
        return choices[self.below(len(choices))]

    def several(self, choices: Sequence[_T], count: int | None = None) -> list[_T]:
        """`count` different ones (all, if None), in a random order."""
        left = list(choices)
        return [left.pop(self.below(len(left))) for _ in range(len(left) if count is None else count)]


def _draws(stream: int) -> Iterator[_Draw]:
    """Choices for picture 0, 1, 2 and so on."""
    for first in range(0, 2**31, 256):
        numbers = counter.bits(counter.key(_KEY, stream), np.arange(first * _DRAWS, (first + 256) * _DRAWS))
        for row in (numbers >> np.uint64(32)).reshape(256, _DRAWS).tolist():
            yield _Draw(iter(row))
