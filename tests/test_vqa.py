"""Questions about pictures: VQA v2's accuracy, ranking of answers against scoring all in full, loss, evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small import zero
from torch import Tensor, nn

from hetero_kt.config import Data, Optim, Text
from hetero_kt.data import vqa as sets
from hetero_kt.data import world as generated
from hetero_kt.data.order import Order
from hetero_kt.data.vqa import AnswerList, Asked, Question
from hetero_kt.distributed.engine import build_engine
from hetero_kt.models import xvlm
from hetero_kt.tasks import vqa
from hetero_kt.tasks.vqa import exact_match, normalise, rank_answers, score, vqa_accuracy, without_punctuation

# --- accuracy ---


def ten(first: dict[str, int], rest: str = "something else") -> tuple[str, ...]:
    """Ten annotators' answers: those given, and `rest` for the others."""
    given = [text for text, count in first.items() for _ in range(count)]
    return tuple(given + [rest] * (10 - len(given)))


CASES: dict[str, tuple[str, tuple[str, ...], float]] = {
    # how many agree: 0.3 for each of the first three, since a third of an annotator is left out now and then
    "nobody": ("yes", ten({"no": 10}), 0.0),
    "one": ("yes", ten({"yes": 1}, "no"), 0.3),
    "two": ("yes", ten({"yes": 2}, "no"), 0.6),
    "three": ("yes", ten({"yes": 3}, "no"), 0.9),
    "four": ("yes", ten({"yes": 4}, "no"), 1.0),
    "all": ("yes", ten({"yes": 10}), 1.0),
    "three annotators, two agree": ("yes", ("yes", "yes", "no"), 4 / 9),
    "two annotators, both agree": ("yes", ("yes", "yes"), 1 / 3),
    "two annotators, one agrees": ("yes", ("yes", "no"), 1 / 6),
    "one annotator who agrees": ("night_stand", ("night_stand",), 1.0),
    "one annotator who does not": ("lamp", ("a lamp",), 0.0),
    "one annotator, letters and spaces aside": ("Red  Lamp ", ("red lamp",), 1.0),
    # case and spaces
    "answer in capitals": ("YES", ten({"yes": 3}, "no"), 0.9),
    "annotators in capitals stay so": ("yes", ten({"Yes": 3}, "no"), 0.0),
    "spaces around": ("  hot   dog ", ten({"hot dog": 4}), 1.0),
    "new line and tab are spaces": ("\thot\ndog", ten({"hot dog": 4}), 1.0),
    # articles
    "a": ("a dog", ten({"dog": 4}), 1.0),
    "an": ("an apple", ten({"apple": 3}), 0.9),
    "The": ("The dog", ten({"dog": 4}), 1.0),
    "an article within": ("man on the moon", ten({"man on moon": 4}), 1.0),
    "an article inside of a word stays": ("another", ten({"another": 4}), 1.0),
    "nothing but articles": ("the", ten({"the": 4}, "a"), 0.0),
    "annotators keep their articles": ("dog", ten({"a dog": 4}), 0.0),
    # numbers
    "two is 2": ("two", ten({"2": 4}), 1.0),
    "Ten is 10": ("Ten", ten({"10": 2}), 0.6),
    "zero is 0": ("zero", ten({"0": 4}), 1.0),
    "none is 0": ("none", ten({"0": 1}), 0.3),
    "eleven stays": ("eleven", ten({"eleven": 4}, "11"), 1.0),
    "a number within": ("two dogs", ten({"2 dogs": 4}), 1.0),
    "annotators' number words stay": ("2", ten({"two": 4}), 0.0),
    # contractions
    "an apostrophe is added": ("dont know", ten({"don't know": 4}), 1.0),
    "an apostrophe stays": ("don't know", ten({"don't know": 4}), 1.0),
    "one of two apostrophes is missing": ("couldnt've", ten({"couldn't've": 3}), 0.9),
    "the other one is": ("couldn'tve", ten({"couldn't've": 3}), 0.9),
    "at the beginning": ("twas", ten({"'twas": 4}), 1.0),
    "o'clock": ("9 oclock", ten({"9 o'clock": 4}), 1.0),
    "the one that loses its apostrophe": ("somebody'd", ten({"somebodyd": 4}), 1.0),
    "no contraction without a word for it": ("im", ten({"im": 4}, "i'm"), 1.0),
    "a possessive stays": ("dog's", ten({"dog's": 4}, "dogs"), 1.0),
    # punctuation
    "comma and space": ("red, white", ten({"red white": 4}), 1.0),
    "comma alone is a space": ("red,white", ten({"red white": 4}, "redwhite"), 1.0),
    "comma in a number": ("1,000", ten({"1000": 4}, "1 000"), 1.0),
    "annotators' comma in a number": ("1000", ten({"1,000": 4}), 1.0),
    "annotators who all agree are not touched": ("1,000", ten({"1,000": 10}), 0.0),
    "a number's comma takes all other marks along": ("t-shirt 2,000", ten({"tshirt 2000": 4}), 1.0),
    "hyphen alone is a space": ("t-shirt", ten({"t shirt": 3}, "tshirt"), 0.9),
    "slash": ("black/white", ten({"black white": 4}), 1.0),
    "slash between spaces": ("black / white", ten({"black white": 4}), 1.0),
    "annotators' two spaces stay two": ("black white", ten({"black / white": 4}), 0.0),
    "underscore": ("night_stand", ten({"night stand": 4}), 1.0),
    "marks at the end": ("what?!", ten({"what": 4}), 1.0),
    "brackets and quotes": ('"(yes)"', ten({"yes": 4}), 1.0),
    "full stop": ("yes.", ten({"yes": 4}), 1.0),
    "abbreviation": ("U.S.", ten({"us": 4}), 1.0),
    "decimal number": ("3.5", ten({"3.5": 4}, "35"), 1.0),
    "full stop behind a number": ("3.", ten({"3": 4}), 1.0),
    "number that begins with one": (".5", ten({".5": 4}, "5"), 1.0),
    "time of day keeps its colon": ("6:30", ten({"6:30": 4}, "6 30"), 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_accuracy_of_written_cases(name: str) -> None:
    answer, annotators, expected = CASES[name]
    assert vqa_accuracy(answer, annotators) == pytest.approx(expected, abs=1e-12)


CONTRACTIONS = {
    "aint": "ain't",
    "hes": "he's",
    "hed've": "he'd've",
    "he'dve": "he'd've",
    "wheres": "where's",
    "thats": "that's",
    "youve": "you've",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "ow's'at": "'ow's'at",
    "maam": "ma'am",
    "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've",
}
"""Some of the public evaluation's, as they stand there."""
MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
DIGITS = "0123456789"


def pairs(text: str) -> list[str]:
    """Characters that stand side by side."""
    return [text[i : i + 2] for i in range(len(text) - 1)]


def slow_marks(text: str) -> str:
    """Punctuation, character by character."""
    comma_in_number = any(
        text[i] in DIGITS and text[i + 1] == "," and text[i + 2] in DIGITS for i in range(len(text) - 2)
    )
    out = []
    for c in text:
        if c not in MARKS:
            out.append(c)
        elif not comma_in_number and not any(pair in (f"{c} ", f" {c}") for pair in pairs(text)):
            out.append(" ")
    return "".join(c for i, c in enumerate(out) if c != "." or (i + 1 < len(out) and out[i + 1] in DIGITS))


def slow_words(text: str) -> str:
    """Numbers, articles and contractions, word by word."""
    out = []
    for word in slow_marks(text.replace("\n", " ").replace("\t", " ").strip()).lower().split():
        names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        if word == "none":
            word = "0"
        if word in names:
            word = str(names.index(word))
        if word in ("a", "an", "the"):
            continue
        out.append(CONTRACTIONS.get(word, word))
    return " ".join(out)


def slow_accuracy(answer: str, annotators: Sequence[str]) -> Fraction:
    """Over every subset that lacks one annotator."""
    said = slow_words(answer)
    others = [a if all(b == a for b in annotators) else slow_marks(a) for a in annotators]
    subsets = list(combinations(others, len(others) - 1))
    return sum((min(Fraction(1), Fraction(list(s).count(said), 3)) for s in subsets), Fraction(0)) / len(subsets)


PIECES = st.sampled_from([*MARKS, *CONTRACTIONS, *" .:'12", "a", "The", "ten", "none", "dog", "\n", "10", "1,0"])
TEXTS = st.lists(PIECES, max_size=7).map("".join)


@settings(max_examples=400, deadline=None)
@given(TEXTS)
@example("1,0-2")
@example("a .- b-c")
def test_normalisation_is_that_of_a_slow_one(text: str) -> None:
    assert without_punctuation(text) == slow_marks(text)
    assert normalise(text) == slow_words(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=3), st.lists(st.integers(0, 3), min_size=2, max_size=10), st.integers(0, 3))
def test_accuracy_is_that_of_every_subset(texts: list[str], said: list[int], own: int) -> None:
    texts = [*texts, *[normalise(text) for text in texts]]
    annotators = [texts[number % len(texts)] for number in said]
    answer = texts[own % len(texts)]
    assert vqa_accuracy(answer, annotators) == pytest.approx(float(slow_accuracy(answer, annotators)), abs=1e-12)


def question(answers: Sequence[str], kind: str = "other", number: int = 0) -> Question:
    return Question(str(number), f"picture {number}", "what is it?", tuple(answers), kind)


def test_scores_are_given_overall_and_for_each_kind_that_there_is() -> None:
    asked = [
        question(ten({"yes": 3}, "no"), "yes/no"),
        question(ten({"yes": 10}), "yes/no"),
        question(ten({"2": 4}), "number"),
        question(ten({"cat": 1}), "other"),
    ]
    found = score(asked, ["yes", "yes", "two", "cat"])
    expected = {"overall": 80.0, "yes_no": 95.0, "number": 100.0, "other": 30.0, "exact": 25.0}
    assert found == pytest.approx(expected)
    assert list(score(asked[3:], ["cat"])) == ["overall", "other", "exact"]
    assert score([], []) == {}


def test_exact_match_is_with_the_most_frequent_answer_the_first_of_equals() -> None:
    asked = [question(("cat", "dog", "dog")), question(("cat", "dog")), question(("lamp",))]
    assert score(asked, ["dog", "cat", "lamp"])["exact"] == 100
    assert score(asked, ["cat", "dog", "lamps"])["exact"] == 0
    assert exact_match("a lamp", "lamp") == 0  # nothing is normalised here


# --- a model whose answers can be computed by hand ---

PAD, CLS, SEP, WORDS = 0, 1, 2, 9
WIDTH = 6


class Writer(nn.Module):
    """Logits that depend on the question's tokens, the picture and all tokens of the answer so far, their order too."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.read = nn.Parameter(torch.randn(50, WIDTH, generator=generator, dtype=dtype))
        self.write = nn.Parameter(torch.randn(WORDS, WIDTH, generator=generator, dtype=dtype))
        self.out = nn.Parameter(torch.randn(WIDTH, WORDS, generator=generator, dtype=dtype))
        self.drop = nn.Dropout(0.5)
        self.forwards: list[int] = []
        """Tokens of each forward of the decoder; 0 for one of the encoder."""

    def forward(
        self,
        pictures=None,
        ids=None,
        mask=None,
        *,
        states=None,
        answer_ids=None,
        answer_mask=None,
        owner=None,
        about=None,
    ):
        if states is None:
            pictures = pictures if about is None else pictures[about]
            states = self.read[ids] + pictures.flatten(1)[:, None, :1].to(self.read.dtype)
        if answer_ids is None:
            self.forwards.append(0)
            return self.drop(states)
        self.forwards.append(answer_ids.numel())
        weight = mask.to(states.dtype)[..., None]
        asked = ((states * weight).sum(1) / weight.sum(1))[owner]
        place = torch.arange(1, answer_ids.shape[1] + 1)[:, None]
        said = (self.write[answer_ids] * answer_mask[..., None] * place).cumsum(1)
        return self.drop(torch.tanh(asked[:, None] + said) @ self.out)


def listed(*answers: Sequence[int]) -> AnswerList:
    """A list of answers with these tokens between [CLS] and [SEP]."""
    longest = max(map(len, answers)) + 2
    ids = np.full((len(answers), longest), PAD, np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(answers):
        ids[row, : len(tokens) + 2], mask[row, : len(tokens) + 2] = [CLS, *tokens, SEP], 1
    return AnswerList([" ".join(map(str, tokens)) for tokens in answers], ids, mask)


def log_probability(model: Writer, state: Tensor, mask: Tensor, tokens: Sequence[int]) -> float:
    """Of one answer to one question by itself: no padding, the product of its tokens' probabilities."""
    total = 0.0
    for at in range(1, len(tokens)):
        so_far = torch.tensor([tokens[:at]])
        owner = torch.zeros(1, dtype=torch.int64)
        logits = model(
            states=state[None], mask=mask[None], answer_ids=so_far, answer_mask=torch.ones_like(so_far), owner=owner
        )
        total += logits[0, -1].log_softmax(0)[tokens[at]].item()
    return total


def every(model: Writer, states: Tensor, mask: Tensor, answers: AnswerList) -> Tensor:
    """The log-probability of every answer, (B, K)."""
    tokens = [[int(i) for i, m in zip(*row, strict=True) if m] for row in zip(answers.ids, answers.mask, strict=True)]
    return torch.tensor([[log_probability(model, s, m, t) for t in tokens] for s, m in zip(states, mask, strict=True)])


def asked(rows: int, seed: int = 0) -> tuple[Writer, Tensor, Tensor]:
    """A model, states and mask of questions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    model = Writer().eval()
    ids = torch.randint(3, 50, (rows, 5), generator=generator)
    lengths = torch.randint(1, 6, (rows, 1), generator=generator)
    return model, model(torch.zeros(rows, 3, 1, 1), ids, torch.ones_like(ids)), (torch.arange(5) < lengths).long()


ANSWERS = listed([3], [4, 5], [3, 3, 6], [5], [4], [4, 8, 7], [6, 3], [3, 5], [8], [4, 5, 5, 5])


@pytest.mark.parametrize("k", [10, 11, 1000])
def test_ranking_of_as_many_candidates_as_answers_is_scoring_every_answer_in_full(k: int) -> None:
    model, states, mask = asked(6)
    places, scores = rank_answers(model, states, mask, ANSWERS, k)
    expected, order = every(model, states, mask, ANSWERS).sort(dim=1, descending=True)
    assert torch.equal(places, order)
    torch.testing.assert_close(scores, expected.double(), rtol=1e-6, atol=1e-6)
    assert len({tuple(row) for row in places.tolist()}) > 1  # questions differ


@pytest.mark.parametrize("k", range(1, 10))
def test_fewer_candidates_are_those_with_the_most_probable_first_tokens_in_the_list_s_order(k: int) -> None:
    model, states, mask = asked(6)
    places, scores = rank_answers(model, states, mask, ANSWERS, k)
    whole = every(model, states, mask, ANSWERS)
    for b in range(6):
        first = [log_probability(model, states[b], mask[b], [CLS, int(ids[1])]) for ids in ANSWERS.ids]
        kept = sorted(range(10), key=lambda a: (-first[a], a))[:k]  # answers with one first token: the earlier stays
        assert sorted(places[b].tolist()) == sorted(kept)
        assert places[b].tolist() == sorted(kept, key=lambda a: -whole[b, a].item())
        torch.testing.assert_close(scores[b], whole[b, places[b]].double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("most", [1, 6, 7, 40, 10_000])
@pytest.mark.parametrize("k", [3, 10])
def test_how_many_answers_are_scored_at_once_changes_nothing(most: int, k: int) -> None:
    model, states, mask = asked(5)
    places, scores = rank_answers(model, states, mask, ANSWERS, k)
    model.forwards.clear()
    found = rank_answers(model, states, mask, ANSWERS, k, most)
    assert torch.equal(found[0], places)
    torch.testing.assert_close(found[1], scores, rtol=1e-12, atol=1e-12)
    assert max(model.forwards) <= max(most, 6)


def test_how_many_forwards_there_are_depends_on_shapes_alone() -> None:
    """Under ZeRO-3 a rank that ran another number of them would wait for ever."""
    counts = set()
    for seed in range(8):
        model, states, mask = asked(5, seed)
        model.forwards.clear()
        rank_answers(model, states, mask, ANSWERS, 4, 24)
        counts.add(len(model.forwards))
    assert len(counts) == 1


def test_the_first_token_counts_once() -> None:
    """Counted twice, the frequent first token would win over the answer that is more probable as a whole."""

    class Fixed(nn.Module):
        def forward(self, *_: Any, answer_ids: Tensor, **__: Any) -> Tensor:
            table = torch.full((WORDS, WORDS), 1e-9, dtype=torch.float64)
            table[CLS, 3], table[CLS, 4] = 0.6, 0.4
            table[3, SEP], table[3, 5], table[4, SEP] = 0.6, 0.4, 1.0
            return (table / table.sum(1, keepdim=True)).log()[answer_ids]

    states, mask = torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.int64)
    places, scores = rank_answers(Fixed(), states, mask, listed([3], [4], [3, 5]))
    assert places.tolist() == [[1, 0, 2]]
    assert scores[0, :2].exp().tolist() == pytest.approx([0.4, 0.36], rel=1e-6)
    assert 0.6 * 0.36 > 0.4 * 0.4  # so counted twice it would be the other way round


def test_of_equals_the_answer_that_is_first_in_the_list_wins() -> None:
    class Same(nn.Module):
        def forward(self, *_: Any, answer_ids: Tensor, **__: Any) -> Tensor:
            return torch.zeros(*answer_ids.shape, WORDS)

    states, mask = torch.zeros(2, 1, 2), torch.ones(2, 1, dtype=torch.int64)
    for k in (3, 5):
        places, _ = rank_answers(Same(), states, mask, listed([7], [6], [5], [4], [3]), k)
        assert places.tolist() == [list(range(k))] * 2


def test_of_equals_as_a_whole_the_first_in_the_list_wins_also_with_the_less_probable_first_token() -> None:
    class Swapped(nn.Module):
        def forward(self, *_: Any, answer_ids: Tensor, **__: Any) -> Tensor:
            table = torch.zeros(WORDS, WORDS)
            table[CLS, [3, 4]], table[3, [SEP, 5]], table[4, [SEP, 5]] = torch.tensor([[1.0, 2], [2, 1], [1, 2]])
            return table[answer_ids]

    states, mask = torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.int64)
    for k in (2, 3):
        places, scores = rank_answers(Swapped(), states, mask, listed([3], [4], [6]), k)
        assert scores[0, 0] == scores[0, 1]
        assert places[0, :2].tolist() == [0, 1]


def test_answer_gives_the_ranking_in_eval_mode_and_restores_the_mode() -> None:
    model = Writer()
    pictures, ids = torch.rand(3, 3, 1, 1), torch.randint(3, 50, (3, 4))
    mask = torch.ones_like(ids)
    places, scores = vqa.answer(model, pictures, ids, mask, ANSWERS, k=6)
    assert model.training
    assert not scores.requires_grad
    model.eval()
    expected = rank_answers(model, model(pictures, ids, mask), mask, ANSWERS, 6)
    assert torch.equal(places, expected[0])
    assert torch.equal(scores, expected[1])


# --- loss ---


def batch(rows: int = 4, dtype: torch.dtype = torch.float64) -> Asked:
    """Questions with 1, 2, 3, ... answers of different lengths."""
    generator = torch.Generator().manual_seed(1)
    counts = tuple(1 + row % 3 for row in range(rows))
    ids = torch.randint(3, 50, (rows, 5), generator=generator)
    mask = (torch.arange(5) < torch.randint(1, 6, (rows, 1), generator=generator)).long()
    chosen = torch.randint(10, (sum(counts),), generator=generator)
    answer_ids, answer_mask = (torch.from_numpy(array)[chosen] for array in (ANSWERS.ids, ANSWERS.mask))
    weight = torch.rand(sum(counts), generator=generator, dtype=dtype)
    owner = torch.arange(rows).repeat_interleave(torch.tensor(counts))
    return Asked(
        torch.rand(rows, 3, 1, 1, generator=generator), ids, mask, answer_ids, answer_mask, weight, owner, counts
    )


def test_loss_is_the_weighted_sum_of_the_answers_entropies_per_question() -> None:
    model, drawn = Writer().eval(), batch()
    states = model(drawn.pictures, drawn.ids, drawn.mask)
    total = 0.0
    for a, row in enumerate(drawn.owner.tolist()):
        tokens = drawn.answer_ids[a][drawn.answer_mask[a] > 0].tolist()
        total -= drawn.weight[a].item() * log_probability(model, states[row], drawn.mask[row], tokens)
    assert vqa.loss(model, drawn).item() == pytest.approx(total / 4, rel=1e-9)


def test_label_smoothing_mixes_in_all_words_at_every_token() -> None:
    model, drawn = Writer().eval(), batch()
    plain, smooth, all_words = (vqa.loss(model, drawn, epsilon).item() for epsilon in (0.0, 0.1, 1.0))
    assert smooth == pytest.approx(0.9 * plain + 0.1 * all_words)
    assert all_words != pytest.approx(plain)


def test_pieces_of_a_batch_have_its_mean_loss_and_gradient() -> None:
    model, drawn = Writer().eval(), batch(6)
    whole = vqa.loss(model, drawn)
    whole.backward()
    gradient = model.out.grad.clone()  # type: ignore
    model.zero_grad()
    parts = [vqa.loss(model, piece) / 3 for piece in drawn.split(2)]
    sum(parts).backward()  # type: ignore
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(model.out.grad, gradient)


def test_padding_of_answers_changes_nothing() -> None:
    model, drawn = Writer().eval(), batch()
    wider = drawn._replace(
        answer_ids=nn.functional.pad(drawn.answer_ids, (0, 3), value=PAD),
        answer_mask=nn.functional.pad(drawn.answer_mask, (0, 3)),
    )
    torch.testing.assert_close(vqa.loss(model, wider), vqa.loss(model, drawn))


def test_loss_of_bf16_logits_is_in_float32() -> None:
    drawn = batch(dtype=torch.float32)
    loss = vqa.loss(Writer(torch.bfloat16).eval(), drawn)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(vqa.loss(Writer().eval(), drawn).item(), rel=0.05)


# --- evaluation ---


class Questions:
    """Questions in memory, shared by ranks as a loader shares them; each has its number for a picture."""

    def __init__(self, size: int, rank: int = 0, world: int = 1, damaged: Sequence[int] = ()) -> None:
        generator = torch.Generator().manual_seed(size)
        self.ids = torch.randint(3, 50, (size, 5), generator=generator)
        self.mask = (torch.arange(5) < torch.randint(1, 6, (size, 1), generator=generator)).long()
        self.answers = ANSWERS
        kinds = ("yes/no", "number", "other")
        self.questions = []
        for number in range(size):
            first, second = torch.randint(10, (2,), generator=generator).tolist()
            given = ten({ANSWERS.texts[first]: 1 + number % 7, ANSWERS.texts[second]: 1}, rest="in no list")
            self.questions.append(question(given if number % 5 else ("in no list",), kinds[number % 3], number))
        self._order, self._damaged = Order("questions", size, world, 0, rank, world), set(damaged)

    def eval_batches(self, rows: int) -> Iterator[Any]:
        for samples, counts in self._order.in_turn(rows):
            sound = [
                count and sample not in self._damaged for sample, count in zip(samples.tolist(), counts, strict=True)
            ]
            places = torch.from_numpy(samples)
            shown, owner = places.unique(return_inverse=True)
            pictures = (shown / 10).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
            yield (pictures, self.ids[places], self.mask[places], owner), places, torch.tensor(sound).float()


def expected_scores(size: int, damaged: Sequence[int] = ()) -> dict[str, float]:
    """By hand: every answer of every question scored in full."""
    loader, model = Questions(size), Writer().eval()
    states = model((torch.arange(size) / 10).view(-1, 1, 1, 1).expand(-1, 3, 1, 1), loader.ids, loader.mask)
    whole = every(model, states, loader.mask, ANSWERS)
    values: dict[str, list[float]] = {name: [] for name in ("overall", "yes_no", "number", "other", "exact", "loss")}
    for number, one in enumerate(loader.questions):
        if number in damaged:
            continue
        said = ANSWERS.texts[whole[number].argmax()]
        if len(one.answers) == 1:
            accuracy = float(said == one.answers[0])
        else:
            accuracy = float(slow_accuracy(said, one.answers))
        values["overall"].append(accuracy)
        values[one.kind.replace("/", "_")].append(accuracy)
        values["exact"].append(float(said == Counter(one.answers).most_common(1)[0][0]))
        shares = {a: one.answers.count(text) / len(one.answers) for a, text in enumerate(ANSWERS.texts)}
        if any(shares.values()):
            values["loss"].append(-sum(share * whole[number, a].item() for a, share in shares.items()) / 100)
    return {name: 100 * sum(those) / len(those) for name, those in values.items() if those}


@pytest.mark.parametrize(("size", "rows"), [(1, 4), (11, 4), (30, 32)])
def test_evaluation_is_that_of_scoring_every_answer_of_every_question(size: int, rows: int) -> None:
    assert vqa.evaluate(Writer(), Questions(size), "cpu", rows) == pytest.approx(expected_scores(size), rel=1e-6)


def test_evaluation_tells_what_the_most_frequent_training_answer_alone_reaches() -> None:
    loader = Questions(30, damaged=[2])
    assert "majority" not in vqa.evaluate(Writer(), loader, "cpu")
    loader.answers = replace(ANSWERS, counted=True)
    found = vqa.evaluate(Writer(), loader, "cpu")
    asked = [one for number, one in enumerate(loader.questions) if number != 2]
    first = [
        float(ANSWERS.texts[0] in one.answers)
        if len(one.answers) == 1
        else float(slow_accuracy(ANSWERS.texts[0], one.answers))
        for one in asked
    ]
    assert found["majority"] == pytest.approx(100 * sum(first) / 29)
    assert 0 < found["majority"] != found["overall"]
    assert vqa.evaluate(Writer(), Questions(2, damaged=[0, 1]), "cpu") == {}


def test_evaluation_leaves_out_questions_whose_picture_is_damaged() -> None:
    found = vqa.evaluate(Writer(), Questions(11, damaged=[2, 5]), "cpu", 4)
    assert found == pytest.approx(expected_scores(11, [2, 5]), rel=1e-6)
    assert found != pytest.approx(expected_scores(11), rel=1e-3)
    assert vqa.evaluate(Writer(), Questions(2, damaged=[0, 1]), "cpu", 4) == {}


def test_evaluation_drops_nothing_out_restores_each_module_s_mode_and_is_the_same_every_time() -> None:
    model = Writer()
    modes = [module.training for module in model.modules()]
    first, second = (vqa.evaluate(model, Questions(7), "cpu", 4) for _ in range(2))
    assert first == second
    assert [module.training for module in model.modules()] == modes == [True, True]


def test_few_candidates_can_miss_the_best_answer_but_never_the_most_probable_first_token() -> None:
    one = vqa.evaluate(Writer(), Questions(30), "cpu", 8, k=1)
    assert set(one) == set(expected_scores(30))
    assert one["loss"] == pytest.approx(expected_scores(30)["loss"], rel=1e-6)  # annotators' answers are all scored
    assert one["overall"] != pytest.approx(expected_scores(30)["overall"])


def test_where_all_answers_are_candidates_each_is_scored_once() -> None:
    model, (answers, longest) = Writer(), ANSWERS.ids.shape
    vqa.evaluate(model, Questions(8), "cpu", 4)
    assert [tokens for tokens in model.forwards if tokens] == 2 * [4 * answers * (longest - 1)]


def evaluated_on_a_rank(size: int, rows: int, k: int, damaged: Sequence[int]) -> tuple[dict[str, float], int]:
    model = Writer()
    found = vqa.evaluate(model, Questions(size, dist.get_rank(), dist.get_world_size(), damaged), "cpu", rows, k)
    return found, len(model.forwards)


@pytest.mark.parametrize(("size", "k"), [(1, 10), (11, 4), (12, 10)])
def test_two_ranks_give_one_rank_s_result_after_equally_many_forwards(ranks, size: int, k: int) -> None:
    alone = vqa.evaluate(Writer(), Questions(size, damaged=[3]), "cpu", 4, k)
    (first, forwards), (second, others) = ranks(2).run(evaluated_on_a_rank, size, 4, k, [3])
    assert first == second
    assert first.pop("loss", 0) == pytest.approx(alone.pop("loss", 0), rel=1e-9)  # summed in another order
    assert first == alone
    assert forwards == others


# --- the model and the data of the project ---


def world_questions(rank: int = 0, world: int = 1, train: bool = False) -> sets.QuestionLoader:
    """Of the generated world; 47 of its 600 questions to evaluate on."""
    config = Data("vqa", batch=8, text=Text("generated", length=24), image_size=32, workers=0)
    loader = sets.vqa(config, "", generated.vocabulary(), train=train, seed=0, rank=rank, world=world, device="cpu")
    if not train:
        fewer = sets.QuestionLoader(
            loader.questions[:47],
            generated.World(False),
            loader.answers,
            generated.vocabulary(),
            config,
            name="world",
            train=False,
            seed=0,
            rank=rank,
            world=world,
        )
        return fewer
    return loader


def tiny() -> nn.Module:
    torch.manual_seed(0)
    model, _ = xvlm.build("xvlm:tiny", "vqa", vocabulary=generated.vocabulary(), image_size=32)
    for parameter in model.parameters():  # so that what it says depends on what it sees
        parameter.data.mul_(3)
    return model


def test_xvlm_s_ranking_is_scoring_every_answer_in_full() -> None:
    loader, model = world_questions(), tiny().eval()
    (pictures, ids, mask, owner), _, _ = next(iter(loader.eval_batches(4)))
    pictures = pictures[owner]
    places, scores = vqa.answer(model, pictures, ids, mask, loader.answers, k=len(loader.answers.texts))
    with torch.no_grad():
        states = model(pictures, ids, mask)
        whole = every(model, states, mask, loader.answers)  # type: ignore[arg-type]
    torch.testing.assert_close(scores, whole.gather(1, places), rtol=1e-4, atol=1e-4)
    assert (scores.diff(dim=1) <= 0).all()
    few, _ = vqa.answer(model, pictures, ids, mask, loader.answers, k=5)
    assert few.shape == (len(ids), 5)


def test_xvlm_s_loss_in_training_comes_down() -> None:
    loader, model = world_questions(train=True), tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(12):
        loss = vqa.loss(model, loader.batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def xvlm_on_a_rank() -> dict[str, float]:
    """Under ZeRO-3, where ranks that ran different numbers of forwards would wait for each other for ever."""
    engine = build_engine(tiny(), optim=Optim(), zero=zero(3), precision="fp32", micro_batch=4, accumulation=1)
    found = vqa.evaluate(engine, world_questions(dist.get_rank(), dist.get_world_size()), "cpu", 8, k=10)
    assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in engine.module.parameters())
    assert engine.training
    engine.destroy()
    return found


def test_xvlm_evaluates_the_same_on_one_rank_and_under_zero_3_on_two(ranks) -> None:
    alone = vqa.evaluate(tiny(), world_questions(), "cpu", 8, k=10)
    assert set(alone) == {"overall", "yes_no", "number", "other", "exact", "majority", "loss"}
    first, second = ranks(2).run(xvlm_on_a_rank)
    assert first == second == pytest.approx(alone, rel=1e-4)
