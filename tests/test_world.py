"""The generated world: always the same, told rightly, its answers balanced, its parts apart."""

import pickle
from collections import Counter

import numpy as np
import pytest

from hetero_kt.data import world


@pytest.fixture(params=[True, False], ids=["train", "evaluation"])
def train(request):
    return request.param


def seen(picture) -> dict[int, tuple[str, str]]:
    """Colour and shape by place, read off the pixels."""
    pixels = np.asarray(picture).astype(int)
    found = {}
    for place in range(4):
        bottom, right = divmod(place, 2)
        cell = pixels[32 * bottom : 32 * bottom + 32, 32 * right : 32 * right + 32]
        covered = np.abs(cell - 128).sum(2) > 0
        if covered.any():
            color = min(world._COLORS, key=lambda name: np.abs(cell[16, 16] - world._COLORS[name]).sum())
            white, black = (np.abs(cell - shade).max(2).min() == 0 for shade in (255, 0))
            found[place] = (color, "circle" if white else "cross" if black else "square")
            assert covered.sum() / 28**2 == pytest.approx(
                {"circle": 0.785, "cross": 0.75, "square": 1}[found[place][1]], abs=0.03
            )
    return found


def test_pictures_show_what_their_scenes_say(train):
    pictures = world.World(train)
    for key, things in list(world.scenes(train).items())[:100]:
        picture = pictures.picture(key)
        assert picture.size == (64, 64)
        assert picture.mode == "RGB"
        assert seen(picture) == {thing.place: (thing.color, thing.shape) for thing in things}


def right_answer(text: str, things: dict[int, tuple[str, str]]) -> str:
    """Worked out from the pixels and the question's words."""
    words = text.rstrip("?").split()
    colors, shapes = [c for c, _ in things.values()], [s for _, s in things.values()]
    if words[:2] == ["is", "there"]:
        color = next((word for word in words if word in world._COLORS), None)
        shape = next((word for word in words if word in world._SHAPES), None)
        return "yes" if any(color in (None, c) and shape in (None, s) for c, s in things.values()) else "no"
    if words[:2] == ["how", "many"]:
        what = words[2]
        single = next((s for s in world._SHAPES if what in (f"{s}s", f"{s}es")), None)
        return str(len(things) if what == "shapes" else colors.count(what) if single is None else shapes.count(single))
    if words[:2] == ["what", "color"]:
        return next(color for color, shape in things.values() if shape == words[-1])
    if words[:2] == ["what", "shape"]:
        return next(shape for color, shape in things.values() if color == words[-1])
    assert words[:4] == ["what", "is", "at", "the"]
    return " ".join(things[world._PLACES.index(" ".join(words[4:]))])


def test_most_annotators_are_right(train):
    pictures = world.World(train)
    templates = Counter()
    for question in world.questions(train)[:600]:
        right = right_answer(question.text, seen(pictures.picture(question.image)))
        assert len(question.answers) == 10
        assert question.answers.count(right) >= 8
        templates[" ".join(question.text.split()[:2]), question.kind] += 1
    assert {kind for _, kind in templates} == {"yes/no", "number", "other"}
    assert min(templates.values()) > 20


def test_every_picture_has_a_question_of_each_kind_and_two_captions(train):
    questions, scenes = world.questions(train), world.scenes(train)
    assert len(scenes) == (2000 if train else 200)
    kinds = {(question.image, question.kind) for question in questions}
    assert kinds == {(key, kind) for key in scenes for kind in ("yes/no", "number", "other")}
    assert len({question.id for question in questions}) == len(questions) == len(kinds)
    for key, (first, second) in world.captions(train).items():
        for thing in scenes[key]:
            assert str(thing) in first
            assert f"{thing} at the {world._PLACES[thing.place]}" in second
        assert first.count(" and ") == second.count(",") == len(scenes[key]) - 1


def test_the_most_frequent_answer_of_a_kind_is_far_from_enough(train):
    for kind, most in (("yes/no", 0.6), ("number", 0.5), ("other", 0.2)):
        answers = [Counter(q.answers).most_common(1)[0][0] for q in world.questions(train) if q.kind == kind]
        assert Counter(answers).most_common(1)[0][1] / len(answers) < most


def test_a_question_alone_does_not_give_its_answer(train):
    """The best that can be said without a picture."""
    right, by_text = 0, {}
    for question in world.questions(train):
        answer = Counter(question.answers).most_common(1)[0][0]
        by_text.setdefault((question.kind, question.text), Counter())[answer] += 1
    for counts in by_text.values():
        right += counts.most_common(1)[0][1]
    assert right / len(world.questions(train)) < 0.65


def test_evaluation_shows_other_pictures_and_captions_tell_them_apart():
    assert not {tuple(sorted(things)) for things in world.scenes(True).values()} & {
        tuple(sorted(things)) for things in world.scenes(False).values()
    }
    shapes = [tuple(sorted(map(str, things))) for things in world.scenes(False).values()]
    assert len(set(shapes)) == 200


def test_evaluation_asks_for_what_training_knows():
    def answers(train):
        return {answer for question in world.questions(train) for answer in question.answers}

    assert answers(False) <= answers(True)


def test_the_vocabulary_has_every_word_and_spells_others():
    tokenizer = world.vocabulary()
    texts = [q.text for part in (True, False) for q in world.questions(part)]
    texts += [answer for q in world.questions(True) for answer in q.answers]
    texts += [caption for said in world.captions(True).values() for caption in said]
    words = {word for text in texts for word in text.replace("?", " ?").replace(".", " .").split()}
    for word in sorted(words):
        for part in word.replace(",", " , ").replace(":", " : ").split():
            (encoded,) = tokenizer.encode([part])
            assert len(encoded.ids) == 1, f"{part} is spelled"
    (encoded,) = tokenizer.encode(["purple?"])
    assert tokenizer.unknown not in encoded.ids
    assert tokenizer.size < 200


def test_the_world_is_the_same_in_every_process():
    """Numbers that were written down once: runs of different days are compared."""
    import zlib

    told = "\n".join(
        [f"{q.text} {q.answers}" for part in (True, False) for q in world.questions(part)]
        + [str(said) for part in (True, False) for said in world.captions(part).values()]
    )
    assert zlib.crc32(told.encode()) == CHECKSUM
    pictures = world.World(False)
    again = pickle.loads(pickle.dumps(pictures))
    key = next(iter(world.scenes(False)))
    assert key in again
    assert np.array_equal(again.picture(key), pictures.picture(key))
    assert "evaluation-9999" not in again


CHECKSUM = 1460588446
