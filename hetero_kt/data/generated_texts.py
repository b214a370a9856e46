"""Generated texts that can be learned, in the layouts of SQuAD v2 and IMDb, and a vocabulary for them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from hetero_kt.data import counter

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PLACES = ("garden", "harbour", "kitchen", "library", "station", "theatre")
THINGS = ("apple", "basket", "candle", "drum", "engine", "feather", "guitar", "hammer")
WORDS = ("the", "is", "in", "where", "?", ".", "a", "film", "good", "fine", "bad", "dull", "very", "was")
_SENTENCES, _QUESTIONS = 6, 3
_PARAGRAPHS = {"train": 24, "validation": 8}
_REVIEWS = {"train": 120, "test": 16}


def write(folder: Path) -> Path:
    """`folder` with `squad_v2/`, `imdb/` and `tokenizer/` in it, always the same; made where it is not there."""
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    (part / "tokenizer").mkdir(parents=True)
    (part / "tokenizer" / "vocab.txt").write_text("\n".join((*SPECIAL, *WORDS, *PLACES, *THINGS)) + "\n")
    (part / "squad_v2").mkdir()
    for name, official in (("train", "train-v2.0.json"), ("validation", "dev-v2.0.json")):
        (part / "squad_v2" / official).write_text(json.dumps(_squad(name)))
    for name, count in _REVIEWS.items():
        for number in range(count):
            good = number % 2
            place = part / "aclImdb" / name / ("pos" if good else "neg") / f"{number}_{8 if good else 2}.txt"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(_review(name, number, bool(good)))
    try:
        os.replace(part, folder)
    except OSError:  # another process was first
        shutil.rmtree(part)
    return folder


def _squad(name: str) -> dict[str, object]:
    """Each sentence puts a thing into a place; questions ask where, a third of them about a thing that is nowhere."""
    paragraphs = []
    for number in range(_PARAGRAPHS[name]):
        order = counter.permutation(counter.key(3, len(name), number), len(THINGS)).tolist()
        places = counter.permutation(counter.key(4, len(name), number), len(PLACES)).tolist()
        sentences = [f"the {THINGS[order[i]]} is in the {PLACES[places[i]]} ." for i in range(_SENTENCES)]
        context = " ".join(sentences)
        asked = []
        for i in range(_QUESTIONS):
            answer = PLACES[places[i]]
            starts = context.index(f"the {THINGS[order[i]]} ") + len(f"the {THINGS[order[i]]} is in the ")
            known = i < _QUESTIONS - 1
            thing = THINGS[order[i]] if known else THINGS[order[-1]]
            answers = [{"text": answer, "answer_start": starts}] if known else []
            asked.append(
                {
                    "id": f"{name}{number}.{i}",
                    "question": f"where is the {thing} ?",
                    "is_impossible": not known,
                    "answers": answers,
                }
            )
        paragraphs.append({"context": context, "qas": asked})
    return {"version": "v2.0", "data": [{"title": "things", "paragraphs": paragraphs}]}


def _review(name: str, number: int, good: bool) -> str:
    bits = int(counter.key(5, len(name), number))
    word = ("good", "fine")[bits & 1] if good else ("bad", "dull")[bits & 1]
    return f"a {'very ' * (1 + bits % 3)}{word} film . the {THINGS[bits % len(THINGS)]} was {word} ."
