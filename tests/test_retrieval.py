"""Retrieval: recalls against the whole matrix of scores, shared by ranks, ties, damaged pictures, loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from hypothesis import given, settings
from hypothesis import strategies as st
from small import zero
from torch import Tensor, nn

from hetero_kt.config import Data, Optim, Text
from hetero_kt.data import captions as sets
from hetero_kt.data import world as generated
from hetero_kt.data.order import Order
from hetero_kt.distributed.engine import build_engine
from hetero_kt.models import xvlm
from hetero_kt.nn.losses import alignment
from hetero_kt.nn.losses.alignment import itc, itm
from hetero_kt.tasks import retrieval

WIDTH = 4


class Matcher(nn.Module):
    """Embeddings and scores that can be computed by hand, exactly in float64: a picture is its pixels, a text the mean
    of its tokens' rows of a table, and how well both fit depends on all their tokens, one by one."""

    def __init__(self, score: str = "matched") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(40, WIDTH, generator=generator, dtype=torch.float64))
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        self.drop = nn.Dropout(0.5)
        self.score = score
        self.forwards: list[tuple[str, int]] = []

    def forward(
        self, pictures=None, ids=None, mask=None, *, groups=None, negatives=None, tokens=None, states=None, owner=None
    ) -> dict[str, Tensor]:
        if tokens is not None:
            self.forwards.append(("pairs", len(states)))
            tokens = tokens if owner is None else tokens[owner]
            fit = torch.einsum("pnc,cd,pld,pl->p", tokens, self.mix, states, mask.to(states.dtype)) / 7
            offset = 3 * (3 * fit).cos()  # of both logits: no loss sees it
            match = torch.stack([offset, offset + self.drop(fit)], 1)
            if self.score == "same":
                match = torch.zeros_like(match)
            if self.score == "broken":
                match = match * math.nan
            if self.score == "broken here and there":
                match[(20 * fit).floor() % 3 == 0] = math.nan
            return {"match": match}
        if pictures is not None:
            self.forwards.append(("pictures", len(pictures)))
            tokens = self.drop(pictures.double().flatten(2).transpose(1, 2).repeat(1, 1, 2)[..., :WIDTH])
            return {"tokens": tokens, "image": nn.functional.normalize(tokens.mean(1), dim=1)}
        self.forwards.append(("captions", len(ids)))
        states = self.drop(self.table[ids]) * (1 - mask)[..., None].mul(1000).add(1)  # padding must not be seen
        mean = (self.table[ids] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"states": states, "text": nn.functional.normalize(mean, dim=1)}


class Described:
    """Pictures and captions in memory, shared by ranks as a loader shares them: captions short ones first, each batch
    as wide as its longest of any rank."""

    def __init__(self, owner: Sequence[int], images: int, rank: int = 0, world: int = 1, damaged=()) -> None:
        generator = torch.Generator().manual_seed(images + len(owner))
        self.images, self.captions, self.owner = images, len(owner), np.array(owner)
        self.pixels = torch.randn(images, 3, 2, 2, generator=generator)
        self.lengths = torch.randint(1, 7, (len(owner),), generator=generator).tolist()
        self.ids = torch.randint(1, 40, (len(owner), 6), generator=generator)
        self._share = [Order("set", size, world, 0, rank, world) for size in (images, len(owner))]
        self._damaged, self._others = damaged, world - 1 - rank

    def eval_pictures(self, rows: int) -> Iterator[Any]:
        for numbers, counts in self._share[0].in_turn(rows):
            sound = torch.from_numpy(counts & ~np.isin(numbers, self._damaged)).float()
            places = torch.from_numpy(numbers)
            # What cannot be read is black.
            yield self.pixels[places] * sound[:, None, None, None], places, sound

    def eval_captions(self, rows: int) -> Iterator[Any]:
        by_length = np.argsort(self.lengths, kind="stable")
        for places, counts in self._share[1].in_turn(rows):
            numbers = torch.from_numpy(by_length[places])
            mask = (torch.arange(6) < torch.tensor(self.lengths)[numbers][:, None]).long()
            last = min(int(places.max()) + self._others, len(by_length) - 1)
            width = self.lengths[by_length[last]] if counts.all() else max(self.lengths)
            yield (
                (self.ids[numbers, :width] * mask[:, :width], mask[:, :width]),
                numbers,
                torch.from_numpy(counts).float(),
            )


@torch.no_grad()
def brute_force(
    owner: Sequence[int], images: int, k: int, damaged: Sequence[int] = (), score: str = "matched"
) -> dict[str, float]:
    """From the whole matrices of cosines and of scores, one pair at a time and one row at a time."""
    loader, model = Described(owner, images), Matcher(score).eval()
    sound = [i for i in range(images) if i not in damaged]
    texts = [t for t in range(len(owner)) if owner[t] in sound]
    cosine, odds = np.zeros((images, len(owner))), np.zeros((images, len(owner)))
    for i in sound:
        seen = model(pictures=loader.pixels[i : i + 1])
        for t in texts:
            ids = loader.ids[t : t + 1, : loader.lengths[t]]
            read = model(ids=ids, mask=torch.ones_like(ids))
            cosine[i, t] = float(seen["image"][0] @ read["text"][0])
            match = model(tokens=seen["tokens"], states=read["states"], mask=torch.ones_like(ids))["match"][0].softmax(
                0
            )
            odds[i, t] = -math.inf if match.isnan().any() else math.log(match[1] / match[0])

    def rank(cosines: dict[int, float], scores: dict[int, float], right: set[int]) -> float:
        kept = sorted(cosines, key=lambda j: (-round(cosines[j], 12), j))[:k]
        best = max((scores[j] for j in right if j in kept), default=math.inf)
        return sum(scores[j] >= best for j in kept if j not in right) if best < math.inf else math.inf

    texts_first = {
        i: rank({t: cosine[i, t] for t in texts}, {t: odds[i, t] for t in texts}, {t for t in texts if owner[t] == i})
        for i in sound
        if i in {owner[t] for t in texts}
    }
    images_first = {
        t: rank({i: cosine[i, t] for i in sound}, {i: odds[i, t] for i in sound}, {owner[t]}) for t in texts
    }
    found = {
        f"{name}{n}": 100 * sum(r < n for r in ranks.values()) / len(ranks)
        for name, ranks in (("tr", texts_first), ("ir", images_first))
        for n in (1, 5, 10)
    }
    return found | {"r_mean": sum(found.values()) / 6}


SETS = {
    "two captions each": ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6], 7),
    "in any order, and a picture without": ([5, 0, 1, 1, 1, 4, 6, 7, 3, 0, 3, 8, 9, 10, 11, 12], 13),
    "one of each": ([0], 1),
    "twenty": (sorted([*range(20), *range(0, 20, 3), *range(20)]), 20),
}


@pytest.mark.parametrize("k", [1, 3, 6, 256])
@pytest.mark.parametrize("name", SETS)
def test_recalls_are_those_of_the_whole_matrix_of_scores(name: str, k: int) -> None:
    owner, images = SETS[name]
    found = retrieval.evaluate(Matcher(), Described(owner, images), "cpu", rows=4, k=k, pairs=5)
    assert found == pytest.approx(brute_force(owner, images, k), abs=1e-9)
    assert list(found) == ["tr1", "tr5", "tr10", "ir1", "ir5", "ir10", "r_mean"]


@settings(max_examples=15, deadline=None)
@given(
    owner=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    k=st.integers(1, 13),
    rows=st.integers(1, 9),
    pairs=st.integers(1, 40),
    damaged=st.sets(st.integers(0, 5), max_size=3),
)
def test_recalls_of_any_small_set(owner: list[int], k: int, rows: int, pairs: int, damaged: set[int]) -> None:
    found = retrieval.evaluate(Matcher(), Described(owner, 6, damaged=list(damaged)), "cpu", rows, k, pairs)
    if set(owner) <= damaged:
        assert found == {}
    else:
        assert found == pytest.approx(brute_force(owner, 6, k, list(damaged)), abs=1e-9)


def test_damaged_pictures_are_left_out_with_their_captions() -> None:
    owner, images = SETS["two captions each"]
    found = retrieval.evaluate(Matcher(), Described(owner, images, damaged=[0, 4]), "cpu", 4, 3)
    assert found == pytest.approx(brute_force(owner, images, 3, [0, 4]), abs=1e-9)
    assert found != pytest.approx(brute_force(owner, images, 3), abs=1e-9)


@pytest.mark.parametrize("score", ["same", "broken"])
def test_ties_and_what_is_no_number_count_against_the_model(score: str) -> None:
    """A head that says the same of all pairs finds nothing, but where there is too little that does not fit."""
    owner, images = SETS["twenty"]
    found = retrieval.evaluate(Matcher(score), Described(owner, images), "cpu")
    assert set(found.values()) == {0.0}
    few = retrieval.evaluate(Matcher(score), Described([0, 1, 1, 2], 3), "cpu")
    assert few["tr1"] == few["ir1"] == 0
    assert few["tr5"] == few["ir5"] == 100


def test_a_score_that_is_no_number_is_the_lowest() -> None:
    owner, images = SETS["twenty"]
    score = "broken here and there"
    found = retrieval.evaluate(Matcher(score), Described(owner, images), "cpu")
    assert found == pytest.approx(brute_force(owner, images, 256, score=score), abs=1e-9)
    assert found != pytest.approx(brute_force(owner, images, 256), abs=1e-9)


def test_of_equal_cosines_the_smaller_number_is_a_candidate() -> None:
    class Twins(Matcher):
        def forward(self, *args: Any, **given: Any) -> dict[str, Tensor]:
            found = super().forward(*args, **given)
            return {name: torch.ones_like(x) if name in ("image", "text") else x for name, x in found.items()}

    found = retrieval.evaluate(Twins(), Described([0, 1, 2, 3], 4), "cpu", k=1)
    assert found["tr1"] == found["ir1"] == 25  # picture 0 and caption 0 alone


def test_every_pair_is_scored_once_and_no_forward_is_larger_than_asked() -> None:
    owner, images = SETS["twenty"]
    model = Matcher()
    retrieval.evaluate(model, Described(owner, images), "cpu", rows=6, k=256, pairs=64)
    sizes = {
        kind: [size for what, size in model.forwards if what == kind] for kind in ("pictures", "captions", "pairs")
    }
    assert sum(sizes["pairs"]) == images * len(owner)
    assert max(sizes["pairs"]) == 64
    assert max(sizes["pictures"] + sizes["captions"]) <= 6


def test_evaluation_drops_nothing_out_restores_each_module_s_mode_and_is_the_same_every_time() -> None:
    model = Matcher()
    first, second = (retrieval.evaluate(model, Described(*SETS["twenty"]), "cpu") for _ in range(2))
    assert first == second
    assert all(module.training for module in model.modules())


def on_a_rank(
    owner: Sequence[int], images: int, k: int, damaged: Sequence[int]
) -> tuple[dict[str, float], list[str], int]:
    model = Matcher()
    loader = Described(owner, images, dist.get_rank(), dist.get_world_size(), damaged)
    found = retrieval.evaluate(model, loader, "cpu", rows=4, k=k, pairs=3)
    return found, [kind for kind, _ in model.forwards], sum(size for kind, size in model.forwards if kind == "pairs")


@pytest.mark.parametrize("damaged", [[], [1, 3]])
@pytest.mark.parametrize("k", [2, 256])
@pytest.mark.parametrize("name", SETS)
def test_two_ranks_give_exactly_one_rank_s_result_after_equally_many_forwards(ranks, name, k, damaged) -> None:
    owner, images = SETS[name]
    model = Matcher()
    alone = retrieval.evaluate(model, Described(owner, images, damaged=damaged), "cpu", rows=4, k=k, pairs=3)
    pairs = sum(size for kind, size in model.forwards if kind == "pairs")
    (first, forwards, some), (second, others, more) = ranks(2).run(on_a_rank, owner, images, k, damaged)
    assert first == second == alone
    assert forwards == others
    assert pairs <= some + more < pairs + len(forwards)  # shared, but for those that only keep step


# --- loss and match ---


def test_loss_is_itc_plus_itm() -> None:
    torch.manual_seed(0)
    image, text = (nn.functional.normalize(torch.randn(4, 5), dim=1) for _ in range(2))
    match, groups, temperature = torch.randn(12, 2), torch.tensor([0, 1, 1, 2]), torch.tensor(0.1)
    counted = torch.arange(12) != 7
    seen = []

    def model(*args: Tensor, **given: Tensor) -> dict[str, Tensor]:
        seen.append((args, given))
        return {"image": image, "text": text, "temperature": temperature, "match": match, "counted": counted}

    batch = (torch.rand(4, 3, 2, 2), torch.ones(4, 3), torch.ones(4, 3), groups)
    found = retrieval.loss(model, batch)
    torch.testing.assert_close(found, itc(image, text, groups, temperature) + itm(match, counted))
    assert seen == [(batch[:3], {"groups": groups})]
    with pytest.raises(ValueError, match="label smoothing"):
        retrieval.loss(model, batch, label_smoothing=0.1)


def test_match_is_the_probability_of_every_pair() -> None:
    loader, model = Described(*SETS["twenty"]), Matcher()
    ids, mask = loader.ids[:7], (torch.arange(6) < torch.tensor(loader.lengths[:7])[:, None]).long()
    found = retrieval.match(model, loader.pixels[:3], ids, mask, pairs=4)
    assert model.training
    model.eval()
    for i in range(3):
        for t in range(7):
            seen, read = model(pictures=loader.pixels[i : i + 1]), model(ids=ids[t : t + 1], mask=mask[t : t + 1])
            match = model(tokens=seen["tokens"], states=read["states"], mask=mask[t : t + 1])["match"]
            assert found[i, t].item() == pytest.approx(match.softmax(1)[0, 1].item(), rel=1e-9)


# --- the model and the data of the project ---


def world_captions(rank: int = 0, world: int = 1, train: bool = False) -> sets.CaptionLoader:
    """Of the generated world; 21 of its pictures to evaluate on."""
    config = Data("captions", batch=8, text=Text("generated", length=40), image_size=32, workers=0)
    described = dict(list(generated.captions(train).items())[: None if train else 21])
    place = generated.World(train)
    return sets.CaptionLoader(
        described, place, generated.vocabulary(), config, name="world", seed=0, rank=rank, world=world
    )


def tiny(scale: float = 1.0) -> nn.Module:
    """With weights scaled, what it says depends more on what it sees."""
    torch.manual_seed(0)
    model, _ = xvlm.build("xvlm:tiny", "retrieval", vocabulary=generated.vocabulary(), image_size=32)
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    return model


def xvlm_on_a_rank(k: int) -> dict[str, float]:
    """Under ZeRO-3, where ranks that ran different numbers of forwards would wait for each other for ever."""
    engine = build_engine(tiny(3), optim=Optim(), zero=zero(3), precision="fp32", micro_batch=4, accumulation=1)
    found = retrieval.evaluate(engine, world_captions(dist.get_rank(), dist.get_world_size()), "cpu", 8, k, 32)
    assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in engine.module.parameters())
    assert engine.training
    engine.destroy()
    return found


@pytest.mark.parametrize("k", [5, 256])
def test_xvlm_evaluates_the_same_on_one_rank_and_under_zero_3_on_two(ranks, k: int) -> None:
    alone = retrieval.evaluate(tiny(3), world_captions(), "cpu", 8, k, 32)
    first, second = ranks(2).run(xvlm_on_a_rank, k)
    assert first == second == alone
    assert 0 < alone["r_mean"] < 100


def test_xvlm_s_pairs_are_those_that_match_gives() -> None:
    loader, model = world_captions(), tiny(3)
    pictures, ids, mask = loader.batch(0)[:3]
    found = retrieval.match(model, pictures, ids, mask)
    model.eval()
    with torch.no_grad():
        alone = [
            model(
                tokens=model(pictures=pictures[i : i + 1])["tokens"],
                states=model(ids=ids[t : t + 1], mask=mask[t : t + 1])["states"],
                mask=mask[t : t + 1],
            )["match"].softmax(1)[0, 1]
            for i in range(8)
            for t in range(8)
        ]
    torch.testing.assert_close(found.flatten(), torch.stack(alone).double(), rtol=1e-4, atol=1e-5)
    assert found.std() > 1e-3


def hardest(logits_BM: Tensor, barred_BM: Tensor) -> Tensor:
    return logits_BM.masked_fill(barred_BM, -math.inf).argmax(1)


def test_xvlm_learns_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With negatives that are not drawn, each step's loss is of the same kind of pairs."""
    monkeypatch.setattr(alignment, "_drawn", hardest)
    loader, model = world_captions(train=True), tiny().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch, losses = loader.batch(0), []
    for _ in range(40):
        loss = retrieval.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
