"""Extractive question answering with questions that have no answer (SQuAD v2): loss, decoding, official scores.

The scores are those of SQuAD v2's evaluation (Rajpurkar, Jia and Liang 2018, section 5), decoding that of BERT's
authors (Devlin et al. 2019, section 4.3).

Shape suffixes: B rows, L tokens, W windows, N candidates on each side.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hetero_kt.data.squad import SquadRows
from hetero_kt.data.text import TextLoader
from hetero_kt.evaluate import evaluating, gather_rows, sum_over_ranks, world
from hetero_kt.models import bert

N_BEST = 20
"""Candidates for an answer's first token, and for its last, in each window."""
LONGEST = 30
"""Tokens of the longest answer."""
_ROWS = 32  # per rank and forward
_CHUNK = 4096  # windows decoded at once
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def logits(model: Any, ids_BL: Tensor, mask_BL: Tensor, types_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The model's scores for the first and the last token of the answer, (B, L) each, in float32."""
    found = bert.outputs(model, ids_BL, mask_BL, types_BL)
    return found.start_logits.float(), found.end_logits.float()


def loss(model: Any, batch: tuple[Tensor, ...], label_smoothing: float = 0.0) -> Tensor:
    """Mean of the two cross-entropies over the rows of `batch`, a scalar in nats: ids, mask, token types (B, L), first
    and last token (B,). Padding takes part in neither, so that a batch's width does not matter."""
    ids_BL, mask_BL, types_BL, start_B, end_B = batch
    scores = logits(model, ids_BL, mask_BL, types_BL)
    return _entropies(*scores, mask_BL, start_B, end_B, label_smoothing).mean()


def evaluate(model: Any, loader: TextLoader, device: torch.device | str, rows: int = _ROWS) -> dict[str, float]:
    """The scores of `score`, and `loss` over the windows that can be trained on. Collective.

    Every rank runs the same number of forwards, of at most `rows` rows, and gets the same result; the first rank
    decodes.

    Args:
        loader: of `SquadRows`.
    """
    candidates, entropy = _candidates(model, loader, device, rows)
    found: list[Any] = [None]
    if world() == 1 or dist.get_rank() == 0:
        assert isinstance(loader.rows, SquadRows)
        found = [score(decode(loader.rows, candidates)) | {"loss": entropy}]
    if world() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def _entropies(
    start_BL: Tensor, end_BL: Tensor, mask_BL: Tensor, first_B: Tensor, last_B: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Of each row, (B,)."""
    return (_entropy(start_BL, mask_BL, first_B, smoothing) + _entropy(end_BL, mask_BL, last_B, smoothing)) / 2


def _entropy(scores_BL: Tensor, mask_BL: Tensor, label_B: Tensor, smoothing: float) -> Tensor:
    padding_BL = mask_BL == 0
    surprise_BL = -scores_BL.masked_fill(padding_BL, -torch.inf).log_softmax(1)
    entropy_B = surprise_BL.gather(1, label_B.unsqueeze(1)).squeeze(1)
    if not smoothing:
        return entropy_B
    mean_B = surprise_BL.masked_fill(padding_BL, 0.0).sum(1) / mask_BL.sum(1)
    return (1 - smoothing) * entropy_B + smoothing * mean_B


# --- from logits to answers ---


@dataclass(frozen=True)
class Candidates:
    """What decoding needs to know of each window's logits."""

    starts: np.ndarray
    """Tokens with the highest scores for the first one, best first, (W, N), counted in the row."""
    start_scores: np.ndarray
    ends: np.ndarray
    end_scores: np.ndarray
    null: np.ndarray
    """Score of "there is no answer", (W,): the class token as first and last."""


@dataclass(frozen=True)
class Answer:
    """What a model says to one question."""

    id: str
    text: str
    """Its best answer, should there be one."""
    odds: float
    """Score of "there is no answer" less that of `text`: above a threshold, the answer is that there is none."""
    golds: tuple[str, ...]
    """The accepted answers; empty where there is none."""


def best_tokens(logits_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The N tokens with the highest scores, best first, the earlier of equals, and their scores: (B, N) each.

    Rows of fewer tokens are filled up with token 0, scored -inf.
    """
    scores_BL = logits_BL.masked_fill(mask_BL == 0, -torch.inf)
    scores_BL, places_BL = scores_BL.sort(dim=1, descending=True, stable=True)
    lacking = max(0, N_BEST - scores_BL.shape[1])
    scores_BN = F.pad(scores_BL[:, :N_BEST], (0, lacking), value=-torch.inf)
    return F.pad(places_BL[:, :N_BEST], (0, lacking)), scores_BN


def _candidates(model: Any, loader: TextLoader, device: torch.device | str, rows: int) -> tuple[Candidates, float]:
    """Of all windows over all ranks, in the order of the set, and the loss. Collective."""
    assert isinstance(loader.rows, SquadRows)
    trainable = torch.from_numpy(loader.rows.trainable).to(device)
    kept = []
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(model):
        for (ids_BL, mask_BL, types_BL, first_B, last_B), samples_B, weight_B in loader.eval_batches(rows):
            start_BL, end_BL = logits(model, ids_BL, mask_BL, types_BL)
            starts, start_scores = best_tokens(start_BL, mask_BL)
            ends, end_scores = best_tokens(end_BL, mask_BL)
            null_B1 = (start_BL[:, :1].double() + end_BL[:, :1].double()).float()
            numbers = torch.cat([starts, ends, samples_B[:, None], (weight_B > 0).long()[:, None]], 1)
            scores = torch.cat([start_scores, end_scores, null_B1], 1)
            kept.append((numbers, scores))
            entropy_B = _entropies(start_BL, end_BL, mask_BL, first_B, last_B).double()
            counts_B = (weight_B > 0) & trainable[samples_B]
            sums += torch.stack([torch.where(counts_B, entropy_B, 0.0).sum(), counts_B.sum()])
    table = gather_rows(torch.cat([numbers for numbers, _ in kept])).cpu().numpy()
    values = gather_rows(torch.cat([scores for _, scores in kept])).double().cpu().numpy()
    entropy, count = sum_over_ranks(sums).tolist()
    real = table[:, -1] > 0
    table, values = table[real], values[real]
    order = np.argsort(table[:, -2])
    table, values, n = table[order], values[order], N_BEST
    found = Candidates(table[:, :n], values[:, :n], table[:, n : 2 * n], values[:, n : 2 * n], values[:, -1])
    return found, entropy / max(count, 1)


def decode(rows: SquadRows, found: Candidates) -> list[Answer]:
    """One answer for each question of `rows`, from the candidates of all its windows.

    A pair of candidates is an answer where both lie in the paragraph, the last not in front of the first, at most
    LONGEST tokens apart, and the window shows the first with more context than any other does. "No answer" counts
    by its lowest score in any window.
    """
    best_W, first_W, last_W = _best_pairs(rows, found)
    lows: dict[int, float] = {}
    highs: dict[int, tuple[float, int]] = {}
    for window, (question, null) in enumerate(zip(rows.windows[:, 0].tolist(), found.null.tolist(), strict=True)):
        lows[question] = min(null, lows.get(question, np.inf))
        if question not in highs or best_W[window] > highs[question][0]:
            highs[question] = (float(best_W[window]), window)
    answers = []
    for question, (high, window) in highs.items():
        asked = rows.source.questions[question]
        text = ""
        if np.isfinite(high):
            characters = rows.characters(asked.context)
            text = rows.source.contexts[asked.context][characters[first_W[window], 0] : characters[last_W[window], 1]]
        odds = lows[question] - (high if np.isfinite(high) else 0.0)
        answers.append(Answer(asked.id, text, odds, tuple(gold for gold, _ in asked.answers)))
    return answers


def _best_pairs(rows: SquadRows, found: Candidates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best pair's score in each window (W,), -inf where there is none, and its tokens, counted in the paragraph."""
    best, firsts, lasts = [], [], []
    before_W = rows.before_context()
    for at in range(0, len(rows.windows), _CHUNK):
        part = slice(at, at + _CHUNK)
        first, count, _, _, best_first, best_count = rows.windows[part, 2:].T[..., None].astype(np.int64)
        shift = first - before_W[part, None]
        starts, ends = found.starts[part] + shift, found.ends[part] + shift
        good_starts = (starts >= best_first) & (starts < best_first + best_count)
        good_ends = (ends >= first) & (ends < first + count)
        apart = ends[:, None, :] - starts[:, :, None]
        good = good_starts[:, :, None] & good_ends[:, None, :] & (apart >= 0) & (apart < LONGEST)
        scores = found.start_scores[part][:, :, None] + found.end_scores[part][:, None, :]
        flat = np.where(good, scores, -np.inf).reshape(len(starts), -1)
        place = flat.argmax(1)
        row = np.arange(len(flat))
        best.append(flat[row, place])
        firsts.append(starts[row, place // N_BEST])
        lasts.append(ends[row, place % N_BEST])
    return np.concatenate(best), np.concatenate(firsts), np.concatenate(lasts)


# --- scores ---


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and the articles a, an and the, words apart by one space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """1 where both are the same, normalised; else 0."""
    return float(normalise(answer) == normalise(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, normalised. Where one has no words: 1 if both have none."""
    ours, theirs = normalise(answer).split(), normalise(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def best_of(metric: Any, answer: str, golds: Sequence[str]) -> float:
    """`metric` for the accepted answer that suits best; with none (or only such as normalise to nothing), for ""."""
    return max(metric(answer, gold) for gold in [gold for gold in golds if normalise(gold)] or [""])


def score(answers: Sequence[Answer], threshold: float = 0.0) -> dict[str, float]:
    """SQuAD v2's scores, in percent of the questions.

    `exact` and `f1` take "no answer" where the odds are above `threshold`; `HasAns_` and `NoAns_` are the parts of
    the questions with and without an answer (absent where there are none). `best_exact` and `best_f1` are the
    scores at the threshold that suits them best, `best_exact_thresh` and `best_f1_thresh` (0 where "no answer" to
    everything is best, as in the official evaluation). `no_answer` is what "no answer" to everything scores.
    """
    found: dict[str, float] = {}
    raw = {
        name: [best_of(metric, answer.text, answer.golds) for answer in answers]
        for name, metric in (("exact", exact_match), ("f1", f1))
    }
    has = [bool(answer.golds) for answer in answers]
    cut = {
        name: [
            float(not answer.golds) if answer.odds > threshold else value
            for value, answer in zip(values, answers, strict=True)
        ]
        for name, values in raw.items()
    }
    for prefix, wanted in (("", None), ("HasAns_", True), ("NoAns_", False)):
        chosen = [row for row, answerable in enumerate(has) if wanted is None or answerable == wanted]
        for name, values in cut.items():
            if chosen:
                found[f"{prefix}{name}"] = 100 * sum(values[row] for row in chosen) / len(chosen)
    for name, values in raw.items():
        found[f"best_{name}"], found[f"best_{name}_thresh"] = _best_threshold(answers, values)
    found["no_answer"] = 100 * has.count(False) / len(answers)
    return found


def _best_threshold(answers: Sequence[Answer], values: Sequence[float]) -> tuple[float, float]:
    """The highest score (percent) over all thresholds, and the lowest threshold that gives it."""
    current = best = float(sum(not answer.golds for answer in answers))
    threshold = 0.0
    for row in sorted(range(len(answers)), key=lambda row: answers[row].odds):
        # From here on this question is answered.
        if answers[row].golds:
            current += values[row]
        elif answers[row].text:
            current -= 1
        if current > best:
            best, threshold = current, answers[row].odds
    return 100 * best / len(answers), threshold
