"""Answers from logits, and SQuAD v2's scores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_squad import PROBLEMS, rows_of
from texts import ROWS, tokenizer
from torch import nn

from hetero_kt.data.squad import Windows
from hetero_kt.data.text import TextLoader
from hetero_kt.tasks import question_answering as qa
from hetero_kt.tasks.question_answering import Answer, best_of, exact_match, f1, normalise, score

SMALL = Windows(length=24, stride=5, question=8)

# --- exact match and F1, by hand ---

CASES = [
    # answer, accepted answers, exact match, F1
    ("Normandy", ["Normandy"], 1, 1),
    ("normandy", ["NORMANDY"], 1, 1),
    ("the Normans", ["Normans"], 1, 1),
    ("Normans", ["the Normans"], 1, 1),
    ("a river", ["the river"], 1, 1),
    ("An apple", ["apple"], 1, 1),
    ("theatre", ["atre"], 0, 0),
    ("another", ["other"], 0, 0),
    ("vitamin A", ["vitamin"], 1, 1),
    ("vitamin A", ["vitamin a."], 1, 1),
    ("The The", ["the"], 1, 1),
    ("the the band", ["band"], 1, 1),
    ("the end of the line", ["end of line"], 1, 1),
    ("Paris.", ["Paris"], 1, 1),
    ("'Paris'", ['"Paris"'], 1, 1),
    ("(the) river", ["river"], 1, 1),
    ("U.S.", ["US"], 1, 1),
    ("U.S.A.", ["U S A"], 0, 0),
    ("1,000", ["1000"], 1, 1),
    ("3.5", ["35"], 1, 1),
    ("$12", ["12"], 1, 1),
    ("£12", ["12"], 0, 0),
    ("50%", ["50"], 1, 1),
    ("well-known", ["wellknown"], 1, 1),
    ("well-known", ["well known"], 0, 0),
    ("well–known", ["wellknown"], 0, 0),
    ("king's", ["kings"], 1, 1),
    ("king’s", ["kings"], 0, 0),
    ("  two   words ", ["two words"], 1, 1),
    ("two\twords\n", ["two words"], 1, 1),
    ("two\u00a0words", ["two words"], 1, 1),
    ("Zoë", ["zoë"], 1, 1),
    ("Zoe", ["Zoë"], 0, 0),
    ("ÉCOLE", ["école"], 1, 1),
    ("北京", ["北京"], 1, 1),
    ("北京 市", ["北京"], 0, 2 / 3),
    ("“Paris”", ["Paris"], 0, 0),
    ("", [], 1, 1),
    ("", ["Paris"], 0, 0),
    ("Paris", [], 0, 0),
    ("the", [], 1, 1),
    ("...", [], 1, 1),
    ("", ["the"], 1, 1),
    ("Paris", ["the"], 0, 0),
    ("Paris", ["...", "Paris"], 1, 1),
    ("King Otto", ["Otto"], 0, 2 / 3),
    ("Otto", ["King Otto the Great"], 0, 0.5),
    ("king king king", ["king"], 0, 0.5),
    ("king king otto", ["king otto otto"], 0, 2 / 3),
    ("Otto King", ["King Otto"], 0, 1),
    ("in 1966", ["1966", "in 1966", "year 1966"], 1, 1),
    ("year of 1966", ["in 1965", "1966"], 0, 0.5),
    ("London", ["Paris", "Rome"], 0, 0),
    ("a b c d", ["c d e f"], 0, 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),  # "a" is an article
]


@pytest.mark.parametrize(("answer", "golds", "exact", "overlap"), CASES)
def test_scores_of_one_question(answer, golds, exact, overlap):
    assert best_of(exact_match, answer, golds) == exact
    assert best_of(f1, answer, golds) == pytest.approx(overlap, abs=1e-12)


def test_there_are_enough_cases():
    assert len(CASES) >= 40


WORD = st.sampled_from(["king", "King", "otto", "the", "a", "1966", "Zoë", "x.", "-", "北京", ""])
SENTENCE = st.lists(WORD, max_size=6).map(" ".join)


@given(SENTENCE, SENTENCE)
def test_f1_is_symmetric(one, other):
    assert f1(one, other) == pytest.approx(f1(other, one), abs=1e-12)
    assert exact_match(one, other) == exact_match(other, one)


@given(SENTENCE, SENTENCE, st.randoms())
def test_f1_does_not_see_the_order_of_words(one, other, random):
    words = one.split(" ")
    random.shuffle(words)
    assert f1(" ".join(words), other) == pytest.approx(f1(one, other), abs=1e-12)


@given(SENTENCE, SENTENCE)
def test_exact_match_implies_full_f1_and_both_lie_in_range(one, other):
    assert 0 <= f1(one, other) <= 1
    if exact_match(one, other):
        assert f1(one, other) == 1


@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing_but_articles_that_punctuation_hid(text):
    once = normalise(text)
    assert once == once.strip()
    assert "  " not in once
    assume(not set(once.split()) & {"a", "an", "the"})
    # Lower case is final only for most of Unicode.
    assume(once.lower() == once)
    assert normalise(once) == once


# --- thresholds ---

ANSWERS = st.lists(
    st.tuples(
        st.sampled_from(["king", "king otto", "", "1966"]),
        st.floats(-5, 5).map(lambda x: round(x, 2)),
        st.sampled_from([(), ("king",), ("1966", "in 1966")]),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda answer: answer[1],
).map(lambda rows: [Answer(str(n), *row) for n, row in enumerate(rows)])


def at(answers: list[Answer], threshold: float) -> tuple[float, float]:
    """Exact match and F1 (percent) where "no answer" is said above the threshold, from scratch."""
    said = [("" if answer.odds > threshold else answer.text, answer.golds) for answer in answers]
    return tuple(
        100 * sum(best_of(metric, text, golds) for text, golds in said) / len(said) for metric in (exact_match, f1)
    )


@given(ANSWERS, st.floats(-6, 6))
def test_scores_at_a_threshold(answers, threshold):
    found = score(answers, threshold)
    exact, overlap = at(answers, threshold)
    assert found["exact"] == pytest.approx(exact)
    assert found["f1"] == pytest.approx(overlap)
    parts = [answer for answer in answers if answer.golds], [answer for answer in answers if not answer.golds]
    for prefix, part in zip(("HasAns", "NoAns"), parts, strict=True):
        assert (f"{prefix}_exact" in found) == bool(part)
        if part:
            assert (found[f"{prefix}_exact"], found[f"{prefix}_f1"]) == pytest.approx(at(part, threshold))
    assert found["no_answer"] == pytest.approx(at(answers, -np.inf)[0])


@given(ANSWERS)
def test_the_best_threshold_is_the_best_of_all(answers):
    found = score(answers)
    thresholds = [-np.inf, *(answer.odds for answer in answers)]
    exact, overlap = zip(*(at(answers, threshold) for threshold in thresholds), strict=True)
    assert found["best_exact"] == pytest.approx(max(exact))
    assert found["best_f1"] == pytest.approx(max(overlap))
    for name, values in (("best_exact", exact), ("best_f1", overlap)):
        if values[0] < max(values) - 1e-9:
            assert at(answers, found[f"{name}_thresh"])[name == "best_f1"] == pytest.approx(max(values))
        else:
            assert found[f"{name}_thresh"] == 0  # saying "no answer" to everything


@given(ANSWERS, st.floats(-6, 6), st.floats(0, 6))
def test_a_higher_threshold_never_helps_unanswerable_questions_nor_hurts_the_others(answers, threshold, more):
    low, high = score(answers, threshold), score(answers, threshold + more)
    for name in ("exact", "f1"):
        assert high.get(f"NoAns_{name}", 0) <= low.get(f"NoAns_{name}", 0) + 1e-9
        assert high.get(f"HasAns_{name}", 0) >= low.get(f"HasAns_{name}", 0) - 1e-9


def test_scores_by_hand():
    answers = [
        Answer("1", "king otto", -3.0, ("otto",)),  # F1 2/3
        Answer("2", "1966", -1.0, ("1966",)),
        Answer("3", "dresden", 0.5, ()),
        Answer("4", "elbe", 2.0, ("elbe",)),
    ]
    found = score(answers)
    assert found == pytest.approx(
        {
            "exact": 50,
            "f1": 100 * (2 / 3 + 1 + 1 + 0) / 4,
            "HasAns_exact": 100 / 3,
            "HasAns_f1": 100 * (5 / 3) / 3,
            "NoAns_exact": 100,
            "NoAns_f1": 100,
            "best_exact": 50,
            "best_exact_thresh": -1.0,
            "best_f1": 100 * (8 / 3) / 4,
            "best_f1_thresh": -1.0,
            "no_answer": 25,
        }
    )


# --- decoding ---


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokens"))


class Random(nn.Module):
    """Logits that are a function of the row's tokens; many of them are equal."""

    config = SimpleNamespace(model_type="distilbert")

    def __init__(self, spread: int = 9) -> None:
        super().__init__()
        self.dropout, self.spread, self.forwards = nn.Dropout(0.5), spread, 0

    def forward(self, input_ids, attention_mask):
        self.forwards += 1
        assert not self.training
        places = torch.arange(input_ids.shape[1])
        mixed = input_ids * 7919 + places * 104_729 + (input_ids * attention_mask).sum(1, keepdim=True) * 31
        start, end = (mixed * 48_271 % 65_537), (mixed * 69_621 % 65_537)
        return SimpleNamespace(
            start_logits=(start % self.spread).float() / 2, end_logits=(end % self.spread).float() / 2
        )


def slow_answers(model: nn.Module, rows, n_best: int, longest: int) -> list[tuple[str, str, float]]:
    """(id, text, odds), window by window and pair by pair in plain Python, after BERT's description."""
    by_question: dict[int, list[int]] = {}
    for n, question in enumerate(rows.windows[:, 0].tolist()):
        by_question.setdefault(question, []).append(n)
    found = []
    for question, windows in by_question.items():
        asked = rows.source.questions[question]
        text = rows.source.contexts[asked.context]
        offsets = rows.characters(asked.context).tolist()
        null, best, said = float("inf"), None, ""
        for n in windows:
            _, _, first, count, *_ = rows.windows[n].tolist()
            length = int(rows.lengths[n])
            ids, mask, _, _, _ = (torch.from_numpy(x) for x in rows.take(np.array([n]), length, np.zeros(1, np.uint64)))
            out = model(input_ids=ids, attention_mask=mask)
            starts, ends = out.start_logits[0].tolist(), out.end_logits[0].tolist()
            null = min(null, starts[0] + ends[0])
            before = length - 1 - count
            ranked = [sorted(range(length), key=lambda i, s=s: s[i], reverse=True)[:n_best] for s in (starts, ends)]
            for i in ranked[0]:
                for j in ranked[1]:
                    if not (before <= i < before + count and before <= j < before + count) or j < i:
                        continue
                    if j - i + 1 > longest:
                        continue
                    token = first + i - before
                    around = []
                    for other in windows:
                        _, _, a, c, *_ = rows.windows[other].tolist()
                        inside = a <= token < a + c
                        around.append(min(token - a, a + c - 1 - token) + 0.01 * c if inside else -1)
                    if windows[around.index(max(around))] != n:
                        continue
                    if best is None or starts[i] + ends[j] > best:
                        best = starts[i] + ends[j]
                        said = text[offsets[token][0] : offsets[first + j - before][1]]
        found.append((asked.id, said, null - (best or 0.0)))
    return found


@pytest.mark.parametrize(("n_best", "longest"), [(20, 30), (20, 2), (3, 4), (1, 30)])
@pytest.mark.parametrize("spread", [5, 60_000])
def test_answers_equal_a_search_in_plain_python(tmp_path, tokens, monkeypatch, n_best, longest, spread):
    monkeypatch.setattr(qa, "N_BEST", n_best)
    monkeypatch.setattr(qa, "LONGEST", longest)
    monkeypatch.setattr(qa, "_CHUNK", 7)
    rows = rows_of(tmp_path, tokens, [*ROWS, *PROBLEMS])
    model = Random(spread).eval()
    candidates, _ = qa._candidates(model, TextLoader(rows, 1, 0), "cpu", 5)
    found = [(answer.id, answer.text, answer.odds) for answer in qa.decode(rows, candidates)]
    expected = slow_answers(model, rows, n_best, longest)
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    assert [one[2] for one in found] == pytest.approx([one[2] for one in expected])
    assert len({text for _, text, _ in found}) > (3 if n_best > 1 else 1)


def test_a_window_without_any_pair_has_no_answer(tmp_path, tokens, monkeypatch):
    monkeypatch.setattr(qa, "N_BEST", 1)
    rows = rows_of(tmp_path, tokens, ROWS[:1])
    nothing = np.zeros((len(rows.windows), 1))
    found = qa.Candidates(nothing.astype(int), nothing, nothing.astype(int), nothing, nothing[:, 0] + 3)
    (answer,) = qa.decode(rows, found)
    assert (answer.text, answer.odds) == ("", 3.0)


def test_the_best_tokens_are_the_earlier_of_equals_and_never_padding():
    logits = torch.tensor([[1.0, 3, 3, 2, 9], [5, 5, 5, 5, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    places, scores = qa.best_tokens(logits, mask)
    assert places.shape == scores.shape == (2, 20)
    assert places[0, :4].tolist() == [1, 2, 3, 0]
    assert places[1, :5].tolist() == [0, 1, 2, 3, 4]
    assert scores[0, 4:].isinf().all()


class Knowing(nn.Module):
    """Says exactly what the labels say."""

    config = SimpleNamespace(model_type="distilbert")

    def __init__(self, rows) -> None:
        super().__init__()
        table = rows.take(np.arange(len(rows.windows)), 40, np.zeros(len(rows.windows), np.uint64))
        self.known = {tuple(ids[ids > 0]): (int(s), int(e)) for ids, _, _, s, e in zip(*table, strict=True)}

    def forward(self, input_ids, attention_mask):
        start, end = torch.zeros(input_ids.shape), torch.zeros(input_ids.shape)
        for row, ids in enumerate(input_ids.numpy()):
            first, last = self.known[tuple(ids[ids > 0])]
            start[row, first] = end[row, last] = 8
        return SimpleNamespace(start_logits=start, end_logits=end)


def test_a_model_that_knows_everything_scores_a_hundred(tmp_path, tokens):
    rows = rows_of(tmp_path, tokens, windows=Windows(length=40, stride=7, question=8))
    found = qa.evaluate(Knowing(rows), TextLoader(rows, 1, 0), "cpu")
    for name in ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1", "best_exact", "best_f1"):
        assert found[name] == 100
    assert found["no_answer"] == pytest.approx(100 / 6)
    assert 0 < found["loss"] < 0.1


# --- loss and evaluation ---


def test_the_loss_is_transformers_own_and_does_not_see_padding(tmp_path, tokens):
    from hetero_kt.models import bert

    rows = rows_of(tmp_path, tokens, train=True)
    torch.manual_seed(0)
    model, _ = bert.build("bert:1x32", "question_answering", vocabulary=tokens)
    model.eval()
    table = rows.take(np.array([0]), int(rows.lengths[0]), np.zeros(1, np.uint64))
    ids, mask, types, start, end = (torch.from_numpy(x) for x in table)
    expected = model(
        input_ids=ids, attention_mask=mask, token_type_ids=types, start_positions=start, end_positions=end
    ).loss
    assert torch.allclose(qa.loss(model, (ids, mask, types, start, end)), expected, atol=1e-6)
    wide = tuple(torch.from_numpy(x) for x in rows.take(np.array([0]), 24, np.zeros(1, np.uint64)))
    assert wide[0].shape[1] > ids.shape[1] or rows.lengths[0] == 24
    assert torch.allclose(qa.loss(model, wide), expected, atol=1e-5)
    scores = qa.logits(model, ids, mask, types)
    smooth = [
        nn.functional.cross_entropy(one, label, label_smoothing=0.3)
        for one, label in zip(scores, (start, end), strict=True)
    ]
    assert torch.allclose(qa.loss(model, wide, label_smoothing=0.3), sum(smooth) / 2, atol=1e-5)
    qa.loss(model, wide, label_smoothing=0.3).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_short_row_between_long_ones_has_the_loss_it_has_alone(tmp_path, tokens):
    from hetero_kt.models import bert

    rows = rows_of(tmp_path, tokens, train=True, windows=Windows(length=60, stride=20, question=8))
    torch.manual_seed(0)
    model, _ = bert.build("distilbert:1x32", "question_answering", vocabulary=tokens)
    model.eval()
    shortest, longest = int(rows.lengths.argmin()), int(rows.lengths.argmax())

    def loss(*samples):
        width = int(rows.lengths[list(samples)].max())
        batch = rows.take(np.array(samples), width, np.zeros(len(samples), np.uint64))
        return qa.loss(model, tuple(torch.from_numpy(x) for x in batch)).item()

    assert rows.lengths[shortest] < rows.lengths[longest]
    assert loss(shortest, longest) == pytest.approx((loss(shortest) + loss(longest)) / 2, rel=1e-5)


def evaluated(folder: Path, rank: int = 0, world: int = 1, rows_each: int = 3):
    rows = rows_of(folder / f"{world}", tokenizer(folder / f"{world}-{rank}"), [*ROWS, *PROBLEMS])
    model = Random()
    assert model.training
    found = qa.evaluate(model, TextLoader(rows, world, 0, rank, world), "cpu", rows_each)
    assert model.training
    assert model.dropout.training
    return found, model.forwards


def on_rank(folder: str):
    import torch.distributed as dist

    return evaluated(Path(folder), dist.get_rank(), dist.get_world_size())


def test_two_ranks_find_what_one_finds(ranks, tmp_path):
    alone, _ = evaluated(tmp_path)
    (first, forwards), (second, others) = ranks(2).run(on_rank, str(tmp_path))
    assert first == second
    assert forwards == others > 2
    assert first == pytest.approx(alone)
    assert set(alone) == {
        *("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1", "loss", "no_answer"),
        *("best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"),
    }


def test_questions_that_cannot_be_trained_on_count_in_the_scores_and_not_in_the_loss(tmp_path, tokens):
    few = rows_of(tmp_path / "a", tokens, PROBLEMS[:1])
    all_ = rows_of(tmp_path / "b", tokens, PROBLEMS)
    ours, theirs = (qa.evaluate(Random(), TextLoader(rows, 1, 0), "cpu") for rows in (few, all_))
    assert ours["loss"] == pytest.approx(theirs["loss"])
    candidates, _ = qa._candidates(Random().eval(), TextLoader(all_, 1, 0), "cpu", 4)
    assert len(qa.decode(all_, candidates)) == len(PROBLEMS)
