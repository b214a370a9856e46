"""Retrieval between pictures and captions: contrastive and matching loss, recall after two rounds of scoring.

X-VLM (Zeng et al. 2022, arXiv 2111.08276, section 4.2) after ALBEF (Li et al. 2021, arXiv 2107.07651, section 5).

Shape suffixes: B rows, L tokens, N tokens of a picture, C width of the states, D width of the common space, I pictures
and T captions of the set, K candidates, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hetero_kt.data.captions import CaptionLoader
from hetero_kt.evaluate import evaluating, gather_rows, sum_over_ranks, world
from hetero_kt.nn.losses.alignment import itc, itm
from hetero_kt.nn.losses.precision import wide

CANDIDATES = 256
"""Of each picture and of each caption, that the second round scores."""
RECALLS = (1, 5, 10)
_ROWS = 64  # pictures or captions per rank and forward
_PAIRS = 128  # per rank and forward
_CHUNK = 512  # rows of similarities at once


def loss(model: Any, batch: tuple[Tensor, ...], label_smoothing: float = 0.0) -> Tensor:
    """ITC plus ITM of the rows of `batch`, a scalar in nats: pictures (B, 3, H, W), ids and mask (B, L), groups (B,).

    ITC's candidates are those of all ranks. ITM leaves out the pairs of rows for which no negative was in reach.

    Raises:
        ValueError: a label smoothing, which goes with neither.
    """
    if label_smoothing:
        raise ValueError("label smoothing goes with neither of retrieval's losses: leave --models.NAME.label-smoothing")
    pictures, ids_BL, mask_BL, groups_B = batch
    found = model(pictures, ids_BL, mask_BL, groups=groups_B)
    contrastive = itc(found["image"], found["text"], groups_B, found["temperature"])
    return contrastive + itm(found["match"], found["counted"])


def evaluate(
    model: Any,
    loader: CaptionLoader,
    device: torch.device | str,
    rows: int = _ROWS,
    k: int = CANDIDATES,
    pairs: int = _PAIRS,
) -> dict[str, float]:
    """Recalls in percent, and their mean: of captions by pictures, `tr1`, `tr5`, `tr10`, and of pictures by captions,
    `ir1`, `ir5`, `ir10`; `r_mean`. Collective.

    First all pictures and captions are embedded and compared by the cosine. Then the `k` best captions of each picture
    and the `k` best pictures of each caption are scored again by the matching head; what is not among them counts as
    not found. The score is the log-odds of "fits". (X-VLM's public code takes the logit of "fits" by itself, which the
    loss ties down only together with the other one.)

    Of a picture's captions the one that comes first counts. Ties count against the model: what does not fit comes in
    front of what fits and scores the same. A score that is not a number is the lowest. Of equal cosines that of the
    smaller number is the better.

    Pictures that are damaged are left out with their captions; the loader counts them. A picture without captions is
    one that captions have to be told from, and no more.

    The work is shared by the ranks: a pair is scored by the rank that has the picture. Every rank runs the same number
    of forwards, of at most `rows` pictures or captions, or `pairs` pairs, and gets the same result.
    """
    with evaluating(model):
        pictures = _pictures(model, loader, rows)
        captions = _captions(model, loader, rows, pictures.numbers)
        if not len(captions.owner_T):
            return {}
        # The same on all ranks, whoever embedded what.
        texts_IK, images_TK = (
            _nearest(pictures.image_ID, captions.text_TD, k),
            _nearest(captions.text_TD, pictures.image_ID, k),
        )
        own_I1, own_T1 = (torch.arange(len(table), device=table.device)[:, None] for table in (texts_IK, images_TK))
        tables = (own_I1.expand_as(texts_IK), texts_IK), (images_TK, own_T1.expand_as(images_TK))
        scores_IK, scores_TK = _scores(model, pictures, captions, tables, pairs, device)
    owner_T = torch.from_numpy(captions.owner_T).to(texts_IK.device)
    described_I = torch.isin(own_I1[:, 0], owner_T)
    found = _recalls("tr", scores_IK[described_I], (owner_T[texts_IK] == own_I1)[described_I])
    found |= _recalls("ir", scores_TK, images_TK == owner_T[:, None])
    return found | {"r_mean": sum(found.values()) / len(found)}


def match(model: Any, pictures: Tensor, ids_TL: Tensor, mask_TL: Tensor, pairs: int = _PAIRS) -> Tensor:
    """The probability that each caption fits each picture (I, 3, H, W), by the matching head: (I, T), in float64, which
    tells what is nearly certain from what is more so."""
    with evaluating(model):
        tokens_INC, states_TLC = model(pictures=pictures)["tokens"], model(ids=ids_TL, mask=mask_TL)["states"]
        odds = [
            _log_odds(model, tokens_1NC, states, mask, mask.new_zeros(len(mask), dtype=torch.int64))
            for tokens_1NC in tokens_INC.split(1)
            for states, mask in zip(states_TLC.split(pairs), mask_TL.split(pairs), strict=True)
        ]
    return torch.cat(odds).double().sigmoid().view(len(pictures), len(ids_TL))


# --- first round ---


@dataclass(frozen=True)
class _Pictures:
    """Those of the set that are sound, in the order of their numbers."""

    numbers: np.ndarray
    """(I,)"""
    image_ID: Tensor
    """Embedded, of all ranks, on the device."""
    row_I: np.ndarray
    """Which of `tokens` are a picture's, -1 where another rank has them."""
    tokens: Tensor
    """Of the pictures that this rank has seen, (rows, N, C), in the host's memory."""


@dataclass(frozen=True)
class _Captions:
    """Those of sound pictures, in the order of their numbers, the same on all ranks."""

    owner_T: np.ndarray
    """Which picture each belongs to, counted among the sound ones."""
    text_TD: Tensor
    """Embedded, on the device."""
    states: Tensor
    """Of all their tokens, one caption behind the other, (tokens, C), in the host's memory."""
    start_T: np.ndarray
    """Where each caption's begin."""
    length_T: np.ndarray


def _pictures(model: Any, loader: CaptionLoader, rows: int) -> _Pictures:
    tokens, embedded, numbers = [], [], []
    for batch, numbers_B, weight_B in loader.eval_pictures(rows):
        seen = model(pictures=batch)
        tokens.append(seen["tokens"].cpu())
        embedded.append(wide(seen["image"]))
        numbers.append(torch.where(weight_B > 0, numbers_B, -1))
    own = torch.cat(numbers)
    all_of_them = gather_rows(own)
    places = _in_order(all_of_them)
    found = all_of_them.cpu().numpy()[places]
    rank = dist.get_rank() if world() > 1 else 0
    row_I = places - rank * len(own)
    row_I[(row_I < 0) | (row_I >= len(own))] = -1
    image_ID = gather_rows(torch.cat(embedded))
    return _Pictures(found, image_ID[torch.from_numpy(places).to(image_ID.device)], row_I, torch.cat(tokens))


def _captions(model: Any, loader: CaptionLoader, rows: int, sound: np.ndarray) -> _Captions:
    states, embedded, numbers, lengths = [], [], [], []
    for (ids_BL, mask_BL), numbers_B, weight_B in loader.eval_captions(rows):
        read = model(ids=ids_BL, mask=mask_BL)
        mask_RL = gather_rows(mask_BL) > 0
        # Piece by piece, and without padding: all states at once may be more than the device holds.
        states.append(gather_rows(read["states"])[mask_RL].cpu())
        lengths.append(mask_RL.sum(1))
        embedded.append(gather_rows(wide(read["text"])))
        numbers.append(gather_rows(torch.where(weight_B > 0, numbers_B, -1)))
    all_of_them = torch.cat(numbers)
    places = _in_order(all_of_them)
    owner = np.asarray(loader.owner)[all_of_them.cpu().numpy()[places]]
    counts = np.isin(owner, sound)
    places, owner = places[counts], owner[counts]
    length = torch.cat(lengths).cpu().numpy()
    start = np.cumsum(length) - length
    text = torch.cat(embedded)
    return _Captions(
        owner_T=np.searchsorted(sound, owner),
        text_TD=text[torch.from_numpy(places).to(text.device)],
        states=torch.cat(states),
        start_T=start[places],
        length_T=length[places],
    )


def _in_order(numbers: Tensor) -> np.ndarray:
    """Where each number stands that is not -1, in the order of the numbers."""
    array = numbers.cpu().numpy()
    order = np.argsort(array, kind="stable")
    return order[array[order] >= 0]


def _nearest(of_RD: Tensor, among_SD: Tensor, k: int) -> Tensor:
    """The `k` rows of the other side that are most similar to each of one, best first, the smaller number of equals:
    (R, K)."""
    found = [
        (chunk @ among_SD.T).sort(dim=1, descending=True, stable=True).indices[:, :k] for chunk in of_RD.split(_CHUNK)
    ]
    return torch.cat(found)


# --- second round ---


def _scores(
    model: Any,
    pictures: _Pictures,
    captions: _Captions,
    tables: Sequence[tuple[Tensor, Tensor]],
    pairs: int,
    device: torch.device | str,
) -> list[Tensor]:
    """The log-odds of each table's pairs, which are picture and caption of each entry. Each pair is scored once, by the
    rank that has the picture. Collective, with the same number of forwards on each rank."""
    total = len(captions.owner_T)
    numbers = [images.cpu().numpy() * total + texts.cpu().numpy() for images, texts in tables]
    mine = [pictures.row_I[table // total] >= 0 for table in numbers]
    wanted_P = np.unique(np.concatenate([table[own] for table, own in zip(numbers, mine, strict=True)]))
    odds_P = _odds(model, pictures, captions, wanted_P // total, wanted_P % total, pairs, device)
    found = []
    for table, own in zip(numbers, mine, strict=True):
        scores = np.zeros(table.shape, odds_P.dtype)
        scores[own] = odds_P[np.searchsorted(wanted_P, table[own])]
        found.append(sum_over_ranks(torch.from_numpy(scores).to(device)))  # of one rank each, so nothing is rounded
    return found


def _odds(
    model: Any,
    pictures: _Pictures,
    captions: _Captions,
    images_P: np.ndarray,
    texts_P: np.ndarray,
    pairs: int,
    device: torch.device | str,
) -> np.ndarray:
    """Of pairs whose pictures this rank has, sorted by picture, (P,)."""
    odds = [np.zeros(0, np.float32)]
    for first in range(0, _most(math.ceil(len(images_P) / pairs), device) * pairs, pairs):
        images, texts = images_P[first : first + pairs], texts_P[first : first + pairs]
        # A rank that has no more pairs runs along with its first row of tokens and the first caption.
        rows = pictures.row_I[images] if len(images) else np.zeros(1, np.int64)
        states_PLC, mask_PL = _padded(captions, texts if len(texts) else np.zeros(1, np.int64))
        rows, place_P = np.unique(rows, return_inverse=True)
        tokens_BNC, owner_P = pictures.tokens[torch.from_numpy(rows)], torch.from_numpy(place_P)
        found_P = _log_odds(model, *(x.to(device) for x in (tokens_BNC, states_PLC, mask_PL, owner_P)))
        odds.append(found_P[: len(images)].cpu().numpy())
    return np.concatenate(odds)


def _padded(captions: _Captions, texts_P: np.ndarray) -> tuple[Tensor, Tensor]:
    """The captions' states (P, L, C) and their mask (P, L), int64."""
    length_P1 = captions.length_T[texts_P][:, None]
    within_L = np.arange(length_P1.max())
    places_PL = captions.start_T[texts_P][:, None] + np.minimum(within_L, length_P1 - 1)
    return captions.states[torch.from_numpy(places_PL)], torch.from_numpy((within_L < length_P1).astype(np.int64))


def _log_odds(model: Any, tokens_BNC: Tensor, states_PLC: Tensor, mask_PL: Tensor, owner_P: Tensor) -> Tensor:
    """Of "fits", (P,), in nats, float32 at least: of each text and the picture `owner_P` among those of the tokens."""
    match_P2 = wide(model(tokens=tokens_BNC, states=states_PLC, mask=mask_PL, owner=owner_P)["match"])
    return match_P2[:, 1] - match_P2[:, 0]


def _most(count: int, device: torch.device | str) -> int:
    """The largest count of any rank. Collective."""
    if world() == 1:
        return count
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def _recalls(name: str, scores_RK: Tensor, fits_RK: Tensor) -> dict[str, float]:
    """Percent of rows of which fewer than 1, 5, 10 candidates that do not fit score at least as high as the best that
    fits."""
    scores_RK = scores_RK.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best_R1 = scores_RK.masked_fill(~fits_RK, -torch.inf).amax(1, keepdim=True)
    ahead_R = ((scores_RK >= best_R1) & ~fits_RK).sum(1)
    return {f"{name}{n}": 100 * (fits_RK.any(1) & (ahead_R < n)).double().mean().item() for n in RECALLS}
