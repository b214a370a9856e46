"""Generated questions, reviews and texts: whole, always the same, and learnable."""

from __future__ import annotations

import numpy as np
import torch

from hetero_kt.data import sayings
from hetero_kt.data.imdb import ReviewRows
from hetero_kt.data.masked import MaskedRows
from hetero_kt.data.squad import SquadRows, Windows
from hetero_kt.data.text import TextLoader
from hetero_kt.models import bert
from hetero_kt.tasks import sentiment

WINDOWS = Windows(96, 32, 24)


def test_questions_have_the_answers_that_the_paragraph_gives(tmp_path):
    for train, size in ((True, 256), (False, 64)):
        found = sayings.questions(train)
        assert len(found.questions) == size
        for question in found.questions:
            context = found.contexts[question.context]
            what = question.text.removeprefix("When was ").removeprefix("By who was ").removesuffix("?").rsplit(" ", 1)
            fact = f"{what[0].capitalize()} was {what[1]} in "
            assert (fact in context) == bool(question.answers)
            if question.answers:
                (text, start), *_ = question.answers
                assert context[start:].startswith(text)
                sentence = context[context.index(fact) :].split(".")[0]
                assert sentence.endswith(f"by {text}") or f" in {text} by" in sentence
                assert ("When" in question.text) == text.isdigit()
        rows = SquadRows(found, sayings.vocabulary(), WINDOWS, name="g", train=train, folder=tmp_path)
        assert not rows.problems
        assert sum(not question.answers for question in found.questions) == size / 4


def test_training_and_evaluation_share_no_text_and_every_word_is_known():
    texts = [set(sayings.plain(train)) for train in (True, False)]
    assert (
        not {text.lower() for text in texts[0]}
        & {text.lower() for text in texts[1]}
        & set(sayings.questions(False).contexts)
    )
    tokens = sayings.vocabulary()
    for encoded in tokens.encode(sayings.plain(True)):
        assert tokens.unknown not in encoded.ids
    rows = [len(sayings.reviews(train)[0]) for train in (True, False)]
    assert rows == [200, 60]
    assert sayings.reviews(True)[1].mean() == 0.5


def test_a_tiny_model_learns_the_reviews_in_a_second(tmp_path):
    tokens = sayings.vocabulary()
    train, test = (ReviewRows(*sayings.reviews(part), tokens, 64, folder=tmp_path) for part in (True, False))
    torch.manual_seed(0)
    model, _ = bert.build("bert:2x32", "classification", vocabulary=tokens)
    optimizer, loader = torch.optim.AdamW(model.parameters(), 1e-3), TextLoader(train, 16, 0)
    for step in range(60):
        optimizer.zero_grad()
        sentiment.loss(model, loader.batch(step)).backward()
        optimizer.step()
    assert sentiment.evaluate(model, TextLoader(test, 1, 0), "cpu")["error"] < 25


def test_there_is_enough_to_pretrain_on(tmp_path):
    rows = [
        MaskedRows(sayings.plain(True), sayings.vocabulary(), 64, train=train, folder=tmp_path)
        for train in (True, False)
    ]
    assert len(rows[0].lengths) > 100
    assert len(rows[1].lengths) > 0
    assert np.unique(rows[0]._table).size > 60
