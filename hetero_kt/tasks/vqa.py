"""Questions about pictures, answered from a list: loss, ranking of the answers, official accuracy.

X-VLM (Zeng et al. 2022, arXiv 2111.08276, section 4.3) after ALBEF (Li et al. 2021, arXiv 2107.07651, section 5); the
accuracy is that of VQA v2's public evaluation (Antol et al. 2015, arXiv 1505.00468; Goyal et al. 2017, arXiv
1612.00837).

Shape suffixes: B questions, L tokens of a question, A answers of a batch, K answers of the list, T tokens of an answer
with [CLS] and [SEP], C candidates for each question, V words of the vocabulary, D width of the states.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hetero_kt.data.vqa import AnswerList, Asked, Question, QuestionLoader
from hetero_kt.evaluate import evaluating, gather_rows, sum_over_ranks, world
from hetero_kt.nn.losses.precision import wide

CANDIDATES = 128
"""Answers of the list that are scored in full for each question."""
_ROWS = 32  # per rank and forward
_TOKENS = 2048  # of answers per forward of the decoder: 250 MB of logits with BERT's vocabulary
_UNCOUNTED = -100


def loss(model: Any, batch: Asked, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the questions of `batch`, a scalar in nats: the sum over a question's answers of the answer's weight
    times the sum of its tokens' cross-entropies, [SEP] among them."""
    ids_AT, mask_AT = batch.answer_ids, batch.answer_mask
    # No token depends on those behind it, and nothing is expected behind the last.
    logits_ATV = model(
        batch.pictures,
        batch.ids,
        batch.mask,
        answer_ids=ids_AT[:, :-1],
        answer_mask=mask_AT[:, :-1],
        owner=batch.owner,
    )
    wanted_AT = ids_AT[:, 1:].masked_fill(mask_AT[:, 1:] == 0, _UNCOUNTED)
    entropy_AT = F.cross_entropy(
        wide(logits_ATV).flatten(0, 1),
        wanted_AT.flatten(),
        ignore_index=_UNCOUNTED,
        reduction="none",
        label_smoothing=label_smoothing,
    ).view_as(wanted_AT)
    return (batch.weight * entropy_AT.sum(1)).sum() / len(batch.ids)


def evaluate(
    model: Any, loader: QuestionLoader, device: torch.device | str, rows: int = _ROWS, k: int = CANDIDATES
) -> dict[str, float]:
    """The scores of `score` over the loader's set; `majority`, what the most frequent training answer alone would reach
    `overall` (absent where the list does not tell which that is); and `loss` (nats), as `loss` counts it, over the
    questions that have an answer in the list, and those answers. Collective.

    Every rank runs the same number of forwards, of at most `rows` questions, and gets the same result. Questions whose
    picture is damaged are left out; the loader names them.

    Args:
        k: as `rank_answers`'.
    """
    tokens = _Tokens.of(loader.answers, device)
    golds_SG, shares_SG = (table.to(device) for table in _golds(loader.questions, loader.answers.texts))
    kept = []
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(model):
        for (pictures, ids_BL, mask_BL, about_B), samples_B, weight_B in loader.eval_batches(rows):
            states_BLD = model(pictures, ids_BL, mask_BL, about=about_B)
            candidates_BC = _likely(model, states_BLD, mask_BL, tokens, k)
            golds_BG, shares_BG = golds_SG[samples_B], shares_SG[samples_B]
            # Of a short list golds are candidates, as all are. Of a long one they are scored besides, likely ones once
            # more: how many are not likely differs between ranks, whose forwards have to be alike.
            scores_all = k >= len(tokens.ids_KT)
            extra_BG = golds_BG[:, :0] if scores_all else golds_BG
            scores = _log_probabilities(model, states_BLD, mask_BL, tokens, torch.cat([candidates_BC, extra_BG], 1))
            scores_BC, scores_BG = scores.split([candidates_BC.shape[1], extra_BG.shape[1]], 1)
            gold_scores_BG = scores_BC.gather(1, golds_BG) if scores_all else scores_BG
            best_B = candidates_BC.gather(1, scores_BC.argmax(1, keepdim=True)).squeeze(1)
            kept.append(torch.stack([samples_B, best_B, (weight_B > 0).long()], 1))
            counts_B = (weight_B > 0) & (shares_BG.sum(1) > 0)
            entropy_B = -(shares_BG * gold_scores_BG).sum(1).double()
            sums += torch.stack([torch.where(counts_B, entropy_B, 0.0).sum(), counts_B.sum()])
    table = gather_rows(torch.cat(kept)).cpu().numpy()
    entropy, count = sum_over_ranks(sums).tolist()
    found: list[Any] = [None]
    if world() == 1 or dist.get_rank() == 0:
        said = {sample: loader.answers.texts[best] for sample, best, counts in table.tolist() if counts}
        samples = sorted(said)
        asked = [loader.questions[s] for s in samples]
        found = [score(asked, [said[s] for s in samples])]
        if asked and loader.answers.counted:
            found[0]["majority"] = score(asked, loader.answers.texts[:1] * len(asked))["overall"]
        if count:
            found[0]["loss"] = entropy / count
    if world() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def _golds(questions: Sequence[Question], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The annotators' answers that are in the list, and the share of the annotators that gave each: (S, G) each.

    Rows of fewer answers are filled up with answer 0, which nobody gave.
    """
    place = {text: k for k, text in enumerate(texts)}
    given = [Counter(place[text] for text in question.answers if text in place) for question in questions]
    most = max(map(len, given), default=0)
    places, shares = np.zeros((len(given), most), np.int64), np.zeros((len(given), most), np.float32)
    for sample, (counts, question) in enumerate(zip(given, questions, strict=True)):
        places[sample, : len(counts)] = list(counts)
        shares[sample, : len(counts)] = [count / len(question.answers) for count in counts.values()]
    return torch.from_numpy(places), torch.from_numpy(shares)


# --- ranking ---


class _Tokens(NamedTuple):
    """The list of answers on a device."""

    ids_KT: Tensor
    mask_KT: Tensor

    @staticmethod
    def of(answers: AnswerList, device: torch.device | str) -> _Tokens:
        return _Tokens(*(torch.as_tensor(array, device=device).long() for array in (answers.ids, answers.mask)))


@torch.no_grad()
def rank_answers(
    model: Any,
    states_BLD: Tensor,
    mask_BL: Tensor,
    answers: AnswerList,
    k: int = CANDIDATES,
    most: int = _TOKENS,
) -> tuple[Tensor, Tensor]:
    """The `k` answers of the list that are most probable by their first token, the most probable as a whole first:
    their places in the list (B, k), int64, and their log-probabilities (B, k) in nats, float32 at least.

    An answer's log-probability is the sum of its tokens', [SEP] among them, each given those in front of it. X-VLM's
    public code adds the first token's once more to that sum, which favours answers that begin with a frequent word;
    here it counts once.

    Of answers with the same first token, and wherever else two are equal, the one that stands first in the list is
    kept, and is placed first: lists are sorted by how frequent an answer is. `k` of the list's length or above scores
    all answers in full.

    Args:
        states_BLD: what the model gives for pictures and questions.
        mask_BL: of the questions' tokens.
        most: tokens of answers in one forward of the decoder, which changes nothing but memory and speed.
    """
    tokens = _Tokens.of(answers, states_BLD.device)
    candidates_BC = _likely(model, states_BLD, mask_BL, tokens, k)
    scores_BC = _log_probabilities(model, states_BLD, mask_BL, tokens, candidates_BC, most)
    scores_BC, order_BC = scores_BC.sort(dim=1, descending=True, stable=True)
    return candidates_BC.gather(1, order_BC), scores_BC


def answer(
    model: Any, pictures: Tensor, ids_BL: Tensor, mask_BL: Tensor, answers: AnswerList, k: int = CANDIDATES
) -> tuple[Tensor, Tensor]:
    """The best answers to questions about pictures (B, 3, H, W), with their log-probabilities, as `rank_answers`
    gives them."""
    with evaluating(model):
        return rank_answers(model, model(pictures, ids_BL, mask_BL), mask_BL, answers, k)


def _likely(model: Any, states_BLD: Tensor, mask_BL: Tensor, tokens: _Tokens, k: int) -> Tensor:
    """The `k` answers whose first tokens are most probable, in the list's order: (B, k)."""
    rows, size = len(states_BLD), len(tokens.ids_KT)
    if k >= size:
        return torch.arange(size, device=states_BLD.device).expand(rows, -1)
    start_B1 = tokens.ids_KT[:1, :1].expand(rows, -1)
    owner_B = torch.arange(rows, device=states_BLD.device)
    logits_B1V = model(
        states=states_BLD, mask=mask_BL, answer_ids=start_B1, answer_mask=torch.ones_like(start_B1), owner=owner_B
    )
    first_BK = wide(logits_B1V[:, 0])[:, tokens.ids_KT[:, 1]]
    return first_BK.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def _log_probabilities(
    model: Any, states_BLD: Tensor, mask_BL: Tensor, tokens: _Tokens, chosen_BC: Tensor, most: int = _TOKENS
) -> Tensor:
    """Of the chosen answers, each as a whole, (B, C).

    In pieces of at most `most` tokens, short answers first, so that hardly any padding is decoded. How many pieces
    there are depends on shapes only, so it is the same on all ranks.
    """
    answers_R = chosen_BC.flatten()
    owner_R = torch.arange(len(chosen_BC), device=chosen_BC.device).repeat_interleave(chosen_BC.shape[1])
    lengths_R, order_R = tokens.mask_KT.sum(1)[answers_R].sort(stable=True)
    pieces = order_R.split(max(1, most // tokens.ids_KT.shape[1]))
    widths = torch.stack([lengths[-1] for lengths in lengths_R.split(len(pieces[0]))]).tolist()
    scores = []
    for piece, width in zip(pieces, widths, strict=True):
        ids_AT, mask_AT = tokens.ids_KT[answers_R[piece], :width], tokens.mask_KT[answers_R[piece], :width]
        logits_ATV = model(
            states=states_BLD,
            mask=mask_BL,
            answer_ids=ids_AT[:, :-1],
            answer_mask=mask_AT[:, :-1],
            owner=owner_R[piece],
        )
        logits_ATV = wide(logits_ATV)
        token_AT = logits_ATV.gather(2, ids_AT[:, 1:, None]).squeeze(2) - logits_ATV.logsumexp(2)
        scores.append(token_AT.masked_fill(mask_AT[:, 1:] == 0, 0.0).sum(1))
    found_R = torch.cat(scores)
    return torch.empty_like(found_R).index_copy_(0, order_R, found_R).view_as(chosen_BC)


# --- scores ---

_KINDS = {"yes/no": "yes_no", "number": "number", "other": "other"}
_TO_TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_TO_TEN)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_WITH_APOSTROPHES = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't
    shan't shouldn't wasn't weren't won't wouldn't
    he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd
    how'll it'll somebody'll someone'll something'll they'll what'll who'll why'll you'll
    there're they're what're why're you're
    he's how's somebody's someone's that's there's what's when's where's who's why's
    could've might've must've not've should've they've we've what've where've who've would've you've
    couldn't've hadn't've mightn't've shouldn't've wouldn't've
    he'd've it'd've she'd've somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've you'd've
    y'all y'all'll y'all'd've ma'am o'clock 'twas 'ow's'at
"""
_CONTRACTIONS = {
    whole[:at] + whole[at + 1 :]: whole
    for whole in _WITH_APOSTROPHES.split()
    for at, character in enumerate(whole)
    if character == "'"
}
"""A contraction that lacks one of its apostrophes -> the contraction."""
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the public evaluation's, this way round


def without_punctuation(text: str) -> str:
    """As VQA v2's evaluation does it, mark by mark. A mark that has a space beside it anywhere in the text goes; any
    other becomes a space. Where a comma stands between two digits, all marks go. Full stops go, but for those in front
    of a digit; apostrophes and colons stay."""
    all_go = _NUMBER_COMMA.search(text) is not None
    goes = {ord(mark): all_go or f"{mark} " in text or f" {mark}" in text for mark in _PUNCTUATION}
    return _FULL_STOP.sub("", text.translate({mark: "" if gone else " " for mark, gone in goes.items()}))


def normalise(text: str) -> str:
    """An answer as VQA v2's evaluation compares it: without punctuation, in lower case, words apart by one space, "two"
    as 2 (to ten; "none" is 0), without a, an and the, contractions with their apostrophes."""
    words = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    numbered = (_NUMBERS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


def exact_match(answer: str, gold: str) -> float:
    """1 where both are the same but for case and spaces; else 0."""
    return float(answer.lower().split() == gold.lower().split())


def vqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """VQA v2's: the mean, over leaving out each annotator once, of

        min(1, others who gave the answer / 3)

    This follows the code that was published with the data set (GT-Vision-Lab/VQA): the model's answer is normalised in
    full; the annotators' lose their punctuation alone, and only where they are not all the same. An annotator's "two"
    or "a dog" can so be matched by nothing. With one annotator, leaving one out leaves nobody, and it is the exact
    match.

    Args:
        annotators: at least one answer; VQA v2 has ten.
    """
    if len(annotators) == 1:
        return exact_match(answer, annotators[0])
    said = normalise(answer)
    agreed = len(set(annotators)) == 1
    gave = [said == (other if agreed else without_punctuation(other)) for other in annotators]
    return sum(min(1.0, (sum(gave) - own) / 3) for own in gave) / len(gave)


def score(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
    """Of one text for each question, in percent: `overall`, the mean `vqa_accuracy`; `yes_no`, `number` and `other`,
    the same for the questions of one kind (absent where there are none); `exact`, how many texts are the annotators'
    most frequent answer (the first of equals), which is the accuracy where there is one annotator. Empty without a
    question."""
    values: dict[str, list[float]] = {name: [] for name in ("overall", *_KINDS.values(), "exact")}
    for question, text in zip(questions, texts, strict=True):
        accuracy = vqa_accuracy(text, question.answers)
        values["overall"].append(accuracy)
        values[_KINDS[question.kind]].append(accuracy)
        ((most, _),) = Counter(question.answers).most_common(1)
        values["exact"].append(exact_match(text, most))
    return {name: 100 * sum(those) / len(those) for name, those in values.items() if those}
