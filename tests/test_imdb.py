"""IMDb's files and rows, masked rows for pre-training, and what is scored on them."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from texts import ROWS, tokenizer, write_parquet, write_reviews
from torch import nn

from hetero_kt import data
from hetero_kt.config import Data
from hetero_kt.data import masked
from hetero_kt.data.masked import IGNORED, MaskedRows
from hetero_kt.data.text import TextLoader, load_tokenizer
from hetero_kt.tasks import masked_lm, sentiment

imdb = importlib.import_module("hetero_kt.data.imdb")  # the package has a function of this name
TEXTS = ["Good<br /><br />river!", "the king was in the north", "a", "", "Zoë: naïve — 北京", "x " * 50]
LABELS = [1, 0, 1, 0, 1, 0]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokens"))


def reviews(folder: Path, tokens, texts=None, labels=None, length=20, *, train=True, **options):
    texts, labels = (TEXTS, LABELS) if texts is None else (texts, labels)
    for part in ("train", "test"):
        write_reviews(folder / "imdb" / f"{part}.parquet", texts, labels)
    return imdb.imdb(folder, tokens, length, train=train, folder=folder / "cache", **options)


def acl(folder: Path) -> Path:
    for part in ("train", "test"):
        for name in ("neg", "pos"):
            (folder / "aclImdb" / part / name).mkdir(parents=True)
    for n, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True)):
        for part in ("train", "test"):
            file = folder / "aclImdb" / part / ("neg", "pos")[label] / f"{n}_{1 + 8 * label}.txt"
            file.write_text(text, encoding="utf-8")
    return folder


# --- files ---


def test_both_layouts_hold_the_same_reviews(tmp_path):
    write_reviews(tmp_path / "imdb" / "train.parquet", TEXTS, LABELS)
    texts, labels = imdb.read(tmp_path, "train")
    assert texts[0] == "Good  river!"
    assert texts[1:] == TEXTS[1:]
    assert labels.tolist() == LABELS
    folder = acl(tmp_path / "official")
    theirs, their_labels = imdb.read(folder, "train")
    assert their_labels.tolist() == sorted(LABELS)
    pairs = set(zip(texts, labels.tolist(), strict=True))
    assert set(zip(theirs, their_labels.tolist(), strict=True)) == pairs


def test_several_parquet_files_are_one_set(tmp_path):
    write_reviews(tmp_path / "train-0.parquet", TEXTS[:2], LABELS[:2])
    write_reviews(tmp_path / "train-1.parquet", TEXTS[2:], LABELS[2:])
    assert imdb.read(tmp_path, "train")[1].tolist() == LABELS


def test_what_is_no_imdb_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"holds no IMDb test set: .* --data-dir"):
        imdb.read(tmp_path, "test")
    file = tmp_path / "train.parquet"
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"train.parquet cannot be read"):
        imdb.read(tmp_path, "train")
    pq.write_table(pa.table({"review": ["good"], "label": [1]}), file)
    with pytest.raises(ValueError, match=r"has no column text \(it has review, label\)"):
        imdb.read(tmp_path, "train")
    write_reviews(file, ["good", "unlabelled"], [1, -1])
    with pytest.raises(ValueError, match="row 1, is no review with label 0 or 1"):
        imdb.read(tmp_path, "train")
    folder = acl(tmp_path / "acl")
    (folder / "aclImdb" / "train" / "pos" / "7_9.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"7_9.txt cannot be read"):
        imdb.read(folder, "train")


# --- rows ---


def test_rows_are_the_review_between_special_tokens_cut_behind_the_longest(tmp_path, tokens):
    rows = reviews(tmp_path, tokens)
    samples = np.arange(6)
    ids, mask, types, labels = rows.take(samples, 20, samples)
    texts = [text.replace("<br />", " ") for text in TEXTS]
    for n, encoded in enumerate(tokens.encode(texts)):
        row = [tokens.cls, *encoded.ids.tolist()[:18], tokens.sep]
        assert rows.lengths[n] == len(row)
        assert ids[n].tolist() == row + [tokens.pad] * (20 - len(row))
        assert mask[n].sum() == len(row)
    assert not types.any()
    assert labels.tolist() == LABELS
    assert rows.lengths[-1] == 20


def test_batches_carry_each_reviews_own_label(tmp_path, tokens):
    texts = [f"{n} river" for n in range(40)]
    rows = reviews(tmp_path, tokens, texts, [n % 2 for n in range(40)])
    by_ids = {tuple(one.ids.tolist()): n % 2 for n, one in enumerate(tokens.encode(texts))}
    for ids, mask, _, label in zip(*TextLoader(rows, 40, 0).batch(0), strict=True):
        assert by_ids[tuple(ids[1 : int(mask.sum()) - 1].tolist())] == label


def test_subsets_and_validation_are_drawn_per_class_and_never_overlap(tmp_path, tokens):
    texts, labels = [f"{n} good" for n in range(60)], [n % 2 for n in range(60)]
    write_reviews(tmp_path / "imdb" / "test.parquet", ["other"], [0])

    def seen(**options):
        rows = reviews(tmp_path, tokens, texts, labels, **options)
        ids, mask, _, found = rows.take(np.arange(len(rows.labels)), 20, np.arange(len(rows.labels)))
        assert found.tolist() == rows.labels.tolist()
        return {tuple(row[m > 0].tolist()): int(label) for row, m, label in zip(ids, mask, found, strict=True)}

    train, test = seen(validation=0.2), seen(validation=0.2, train=False)
    assert (len(train), len(test)) == (48, 12)
    assert not train.keys() & test.keys()
    assert sum(test.values()) == 6
    few, fewer = seen(validation=0.2, per_class=5), seen(validation=0.2, per_class=3)
    assert (len(few), sum(few.values())) == (10, 5)
    assert fewer.keys() < few.keys() < train.keys()


def test_a_missing_vocabulary_is_told_with_its_options(tmp_path):
    with pytest.raises(ValueError, match=r"^--data.NAME.text.tokenizer tokenizer \(or --data-dir\): .* no tokenizer"):
        data.tokenizer(Data("imdb"), str(tmp_path))


def test_settings_that_do_not_fit_are_refused(tmp_path, tokens):
    with pytest.raises(ValueError, match="rows of 2 tokens hold no text"):
        reviews(tmp_path, tokens, length=2)
    with pytest.raises(ValueError, match=r"--data.NAME.per-class 4: a class of imdb has only 3 samples: use at most 3"):
        reviews(tmp_path, tokens, per_class=4)
    with pytest.raises(ValueError, match="leaves nothing"):
        reviews(tmp_path, tokens, validation=0.01)
    with pytest.raises(ValueError, match="has no reviews"):
        reviews(tmp_path, tokens, [], [])


def test_tokens_are_kept_and_made_again_for_other_settings(tmp_path, tokens, monkeypatch):
    first = reviews(tmp_path, tokens)
    encode = type(tokens).encode
    calls = []
    monkeypatch.setattr(type(tokens), "encode", lambda self, texts: calls.append(1) or encode(self, texts))
    assert reviews(tmp_path, tokens).fingerprint() == first.fingerprint()
    assert not calls
    assert reviews(tmp_path, tokens, length=21).fingerprint() != first.fingerprint()
    assert reviews(tmp_path, tokens, TEXTS[:-1], LABELS[:-1]).fingerprint() != first.fingerprint()
    assert len(calls) == 2


# --- masked rows ---


def masked_rows(tmp_path, tokens, words=6000, length=66, train=True):
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(["river", "king", "north", "xyz"], 40)) for _ in range(words // 40)]
    return MaskedRows(texts, tokens, length, train=train, folder=tmp_path / "cache"), texts


def test_rows_hold_the_texts_one_behind_the_other(tmp_path, tokens):
    train, texts = masked_rows(tmp_path, tokens)
    test, _ = masked_rows(tmp_path, tokens, train=False)
    stream = [token for one in tokens.encode(texts) for token in [*one.ids.tolist(), tokens.sep]]
    table = np.asarray(train._table)
    assert table[:, 1:-1].ravel().tolist() == stream[: table[:, 1:-1].size]
    assert len(stream) - table[:, 1:-1].size < 64
    assert (table[:, 0] == tokens.cls).all()
    assert (table[:, -1] == tokens.sep).all()
    assert len(test.lengths) == len(table) // 50
    assert sorted([*train._rows, *test._rows]) == list(range(len(table)))


def test_what_is_predicted_is_what_stood_there_and_the_rest_stays(tmp_path, tokens):
    rows, _ = masked_rows(tmp_path, tokens)
    loader = TextLoader(rows, 16, 0)
    _, samples = loader.order.rows(3)
    ids, mask, types, positions, labels = (tensor.numpy() for tensor in loader.batch(3))
    original = np.asarray(rows._table[rows._rows[samples]])
    restored = ids.copy()
    for row in range(16):
        chosen = labels[row] != IGNORED
        plain = ~np.isin(original[row], (tokens.cls, tokens.sep))
        assert chosen.sum() == round(0.15 * plain.sum())
        assert len(set(positions[row].tolist())) == positions.shape[1]
        assert plain[positions[row][chosen]].all()
        restored[row, positions[row][chosen]] = labels[row][chosen]
    assert (restored == original).all()
    assert mask.all()
    assert not types.any()


def test_of_the_chosen_80_percent_are_masked_10_random_and_10_left(tmp_path, tokens):
    rows, _ = masked_rows(tmp_path, tokens, words=40_000)
    samples = np.arange(len(rows.lengths))
    fates = np.zeros(4)
    drawn = []
    where = np.zeros(66)
    for step in range(6):
        random = np.random.default_rng(step).integers(0, 2**63, len(samples), np.uint64)
        ids, _, _, positions, labels = rows.take(samples, 66, random)
        now = np.take_along_axis(ids, positions, 1)
        chosen = labels != IGNORED
        replaced = chosen & (now != tokens.mask) & (now != labels)
        fates += [
            chosen.sum(),
            (chosen & (now == tokens.mask)).sum(),
            replaced.sum(),
            (chosen & (now == labels)).sum(),
        ]
        drawn += now[replaced].tolist()
        np.add.at(where, positions[chosen], 1)
    # Among n draws the deviation is below 1 / sqrt(n) in all but one of twenty; here four of them.
    slack = 4 * 0.5 / np.sqrt(fates[0])
    assert fates[0] > 20_000
    assert fates[1] / fates[0] == pytest.approx(0.8, abs=slack)
    assert fates[2] / fates[0] == pytest.approx(0.1, abs=slack)
    assert fates[3] / fates[0] == pytest.approx(0.1, abs=slack)
    assert len(set(drawn)) > 0.9 * tokens.size  # from the whole vocabulary
    inner = where[1:-1]
    assert inner.min() > 0.6 * inner.mean()  # no place is spared
    assert where[0] == where[-1] == 0


def test_masks_are_decided_by_seed_step_and_row_alone(tmp_path, tokens):
    rows, _ = masked_rows(tmp_path, tokens)
    whole = TextLoader(rows, 8, 0)
    for step in (0, 5, 40):
        for rank in range(2):
            part = TextLoader(rows, 8, 0, rank, 2)
            for ours, theirs in zip(part.batch(step), whole.batch(step), strict=True):
                assert torch.equal(ours, theirs[rank::2])
    assert not torch.equal(whole.batch(0)[3], TextLoader(rows, 8, 1).batch(0)[3])


def test_the_same_row_is_masked_anew_in_every_epoch_and_alike_in_every_evaluation(tmp_path, tokens):
    rows, _ = masked_rows(tmp_path, tokens)
    loader = TextLoader(rows, len(rows.lengths), 0)
    by_sample = []
    for step in (0, 1):
        _, samples = loader.order.rows(step)
        by_sample.append(loader.batch(step)[3][np.argsort(samples)])
    assert not torch.equal(*by_sample)
    one, other = (list(loader.eval_batches(7)) for _ in range(2))
    for (ours, *_), (theirs, *_) in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_texts_that_fill_no_row_are_refused(tmp_path, tokens):
    with pytest.raises(ValueError, match="the texts fill only 0 rows of 66 tokens"):
        MaskedRows(["river"], tokens, 66, train=True, folder=tmp_path)
    with pytest.raises(ValueError, match="rows of 7 tokens are too short"):
        MaskedRows(["river"], tokens, 7, train=True, folder=tmp_path)


def test_pretraining_takes_training_texts_only(tmp_path, tokens):
    write_parquet(tmp_path / "squad_v2" / "train.parquet", ROWS)
    write_reviews(tmp_path / "imdb" / "train.parquet", ["king " * 30], [1])
    write_reviews(tmp_path / "imdb" / "test.parquet", ["river " * 300], [1])
    rows = masked.pretraining(tmp_path, tokens, 16, train=True, folder=tmp_path / "cache")
    vocabulary = tokens.whole.get_vocab()
    table = np.asarray(rows._table)
    assert (table == vocabulary["king"]).sum() > 16  # the last tokens fill no row
    assert (table == vocabulary["river"]).sum() == 0


@pytest.mark.data
def test_real_texts_become_rows(real_data, tmp_path):
    tokens = load_tokenizer(real_data / "tokenizer" / "vocab.txt")
    rows = masked.pretraining(real_data / "mini", tokens, 128, train=True, folder=tmp_path)
    assert 500 < len(rows.lengths) < 2000
    assert (np.asarray(rows._table) == tokens.unknown).mean() < 0.001
    ours = imdb.imdb(real_data / "mini", tokens, 256, train=True, folder=tmp_path)
    assert np.bincount(ours.labels).min() > 100
    assert len(ours.labels) == 300


# --- scores ---


class Guess(nn.Module):
    """Logits from the first token behind [CLS] alone."""

    config = SimpleNamespace(model_type="distilbert")

    def forward(self, input_ids, attention_mask):
        assert not self.training
        first = input_ids[:, 1]
        return SimpleNamespace(logits=torch.stack([first % 5, first % 3], 1).double())


def graded(folder: Path, rank: int = 0, world: int = 1):
    random = np.random.default_rng(1)
    words = ["river", "king", "x", "north", "7", "good"]
    texts = [f"{random.choice(words)} " * (1 + n % 9) for n in range(43)]
    rows = reviews(folder / f"{world}-{rank}", tokenizer(folder / f"t{rank}"), texts, [n % 2 for n in range(43)])
    return rows, sentiment.evaluate(Guess(), TextLoader(rows, world, 0, rank, world), "cpu", 4)


def on_rank(folder: str):
    import torch.distributed as dist

    return graded(Path(folder), dist.get_rank(), dist.get_world_size())[1]


def test_error_rate_equals_the_definition_on_one_rank_and_two(ranks, tmp_path):
    rows, found = graded(tmp_path)
    ids, mask, _, labels = rows.take(np.arange(43), 20, np.arange(43))
    logits = Guess().eval()(torch.from_numpy(ids), mask).logits
    wrong = (logits.argmax(1).numpy() != labels).mean()
    assert found["error"] == pytest.approx(100 * wrong)
    assert 0 < wrong < 1
    entropy = nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item()
    assert found["loss"] == pytest.approx(entropy)
    assert ranks(2).run(on_rank, str(tmp_path)) == [pytest.approx(found)] * 2


def test_sentiments_loss_is_the_mean_over_rows(tmp_path, tokens):
    rows = reviews(tmp_path, tokens)
    batch = TextLoader(rows, 6, 0).batch(0)
    expected = nn.functional.cross_entropy(Guess().eval()(batch[0], batch[1]).logits, batch[3])
    assert float(sentiment.loss(Guess().eval(), batch)) == pytest.approx(float(expected))
    assert float(sentiment.loss(Guess().eval(), batch, label_smoothing=0.5)) != pytest.approx(float(expected))


class Always(nn.Module):
    """Says `token` everywhere."""

    config = SimpleNamespace(model_type="distilbert")

    def __init__(self, token: int, size: int) -> None:
        super().__init__()
        self.token, self.size = token, size

    def forward(self, input_ids, attention_mask, positions):
        scores = torch.zeros(*positions.shape, self.size)
        scores[..., self.token] = 3.0
        return scores


def test_masked_scores_count_chosen_tokens_only(tmp_path, tokens):
    rows, _ = masked_rows(tmp_path, tokens, words=24_000, train=False)
    token = tokens.whole.get_vocab()["king"]
    found = masked_lm.evaluate(Always(token, tokens.size), TextLoader(rows, 4, 0), "cpu", 3)
    labels = torch.cat([labels for (*_, labels), _, _ in TextLoader(rows, 1, 0).eval_batches(100)])
    said = labels[labels != IGNORED]
    share = float((said == token).double().mean())
    assert found["accuracy"] == pytest.approx(100 * share)
    total = np.log(np.exp(3) + tokens.size - 1)
    assert found["loss"] == pytest.approx(total - 3 * share, rel=1e-5)
    assert len(said) > 50
