"""Questions about pictures: what is read of each layout, who sees which, and what is said of bad input."""

import json
from collections import Counter
from dataclasses import replace

import albums
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_kt.config import Text
from hetero_kt.data import open_loader
from hetero_kt.data.gallery import Folders
from hetero_kt.data.pictures import Unreadable
from hetero_kt.data.text import load_tokenizer
from hetero_kt.data.vqa import Asked, Question, answer_list, vqa
from hetero_kt.data.world import vocabulary


def loader(data_dir, rank=0, world=1, *, train=True, seed=3, **changes):
    settings = albums.config("vqa", **changes)
    return vqa(settings, data_dir, vocabulary(), train=train, seed=seed, rank=rank, world=world)


def decoded(ids, mask) -> list[str]:
    """Texts of rows, without spaces; the tokenizer spells what it does not know."""
    tokenizer = vocabulary().whole
    rows = []
    for row, length in zip(ids, mask.sum(1).tolist(), strict=True):
        assert row[0] == vocabulary().cls
        assert row[length - 1] == vocabulary().sep
        assert (row[length:] == vocabulary().pad).all()
        rows.append(tokenizer.decode(row[1 : length - 1]).replace(" ", ""))
    return rows


def bare(text: str) -> str:
    return text.replace(" ", "")


@pytest.fixture
def official(tmp_path):
    return albums.set_of_vqa_v2(tmp_path / "set")


# ---- what is read


def test_official_files_give_questions_with_their_pictures_and_answers(official):
    ours = loader(official)
    assert ours.samples == 20
    assert ours.questions[5] == Question(
        id="2005",
        image="train2014/COCO_train2014_000000000002.jpg",
        text="what is 2 and so so 1?",
        answers=("a2",) * 6 + ("b1",) * 3 + ("yes",),
        kind="number",
    )
    by_text = {bare(question.text): question for question in ours.questions}
    for step in range(7):
        batch = ours.batch(step)
        asked = [by_text[text] for text in decoded(batch.ids, batch.mask)]
        assert [f"train2014/{albums.coco_name('train', n)}" for n in albums.shown(batch.pictures)] == [
            question.image for question in asked
        ]
        assert batch.owner.tolist() == [row for row, count in enumerate(batch.counts) for _ in range(count)]
        given = decoded(batch.answer_ids, batch.answer_mask)
        found = [Counter() for _ in asked]
        for text, weight, row in zip(given, batch.weight.tolist(), batch.owner.tolist(), strict=True):
            found[row][text] = round(weight * 10)
        assert found == [Counter(question.answers) for question in asked]
        assert batch.ids.shape[1] % 8 == 0
        assert batch.weight.dtype == torch.float32
        assert batch.ids.dtype == batch.owner.dtype == batch.answer_ids.dtype == torch.int64
    assert loader(official, train=False).samples == 8


def test_pictures_may_lie_in_a_folder_of_their_own_or_in_shards(official):
    from hetero_kt.data import sharding

    expected = loader(official).batch(1)
    (official / "images").mkdir()
    for part in ("train2014", "val2014"):
        (official / part).rename(official / "images" / part)
    assert torch.equal(loader(official).batch(1).pictures, expected.pictures)
    (official / "images").rename(official / "files")
    for part in ("train2014", "val2014"):
        sharding.write_plain(str(official / "files" / part), str(official / part), shard_size="4", quiet=True)
    assert torch.equal(loader(official).batch(1).pictures, expected.pictures)
    assert loader(official, train=False).notices() == loader(official, train=False).notices()


def test_parquet_of_coco(tmp_path):
    asked = [
        [
            {
                "question_id": 10 * number + k,
                "question": f"what is {number} {k} ?",
                "answers": [f"a{number}"] * 10,
                "answer_type": "yes/no",
            }
            for k in range(2)
        ]
        for number in range(5)
    ]
    albums.parquet(tmp_path / "train-0.parquet", range(5), image_id=list(range(5)), vqa_v2=[*asked[:4], None])
    albums.parquet(tmp_path / "validation.parquet", range(1), image_id=[4], vqa_v2=asked[4:])
    ours = loader(tmp_path)
    assert [question.id for question in ours.questions] == ["0", "1", "10", "11", "20", "21", "30", "31"]
    assert ours.questions[7] == Question("31", "3", "what is 3 1 ?", ("a3",) * 10, "yes/no")
    assert [question.image for question in loader(tmp_path, train=False).questions] == ["4", "4"]


def test_parquet_of_daquar(tmp_path):
    albums.parquet(
        tmp_path / "train.parquet",
        [3, 4],
        image_id=["image3", "image4"],
        qa=[
            [{"question": "how many", "answer": "12"}, {"question": "what", "answer": "lamp, waste_bin"}],
            [{"question": "which", "answer": "2 lamps"}],
        ],
    )
    albums.parquet(tmp_path / "test.parquet", [5], image_id=["image5"], qa=[[{"question": "what", "answer": "3"}]])
    albums.parquet(tmp_path / "validation.parquet", [6], image_id=["image6"], qa=[[]])
    ours = loader(tmp_path, batch=3)
    assert [(q.id, q.answers, q.kind) for q in ours.questions] == [
        ("image3-0", ("12",), "number"),
        ("image3-1", ("lamp, waste_bin",), "other"),
        ("image4-0", ("2 lamps",), "other"),
    ]
    batch = ours.batch(0)
    assert batch.weight.tolist() == [1, 1, 1], "one annotator"
    assert [q.id for q in loader(tmp_path, train=False).questions] == ["image5-0"]


@pytest.mark.data
def test_real_sets_have_the_stated_sizes(real_data):
    for folder, counts in (("daquar", ((795, 6795), (400, 3449))), ("coco_vqa_captions", ((46, 74), (12, 19)))):
        for train, (images, questions) in zip((True, False), counts, strict=True):
            settings = albums.config("vqa", folder=folder, text=Text("tokenizer", length=40))
            tokenizer = load_tokenizer(real_data / "tokenizer")
            ours = vqa(settings, real_data, tokenizer, train=train, seed=0)
            # One training picture of DAQUAR has no question.
            assert len({q.image for q in ours.questions}) == images - (images == 795)
            assert ours.samples == questions
            assert ours.batch(0).pictures.isfinite().all()
            if folder == "daquar":
                assert ours.classes == 968
                assert {q.kind for q in ours.questions} == {"number", "other"}
            else:
                assert all(len(q.answers) == 10 for q in ours.questions)
    assert len(ours.questions) == 19


# ---- who sees which


def test_two_ranks_with_workers_see_what_one_sees_alone(official):
    alone = loader(official, batch=6)
    readers = [loader(official, rank, 2, batch=6, workers=1 + rank) for rank in range(2)]
    try:
        for step in (0, 1, 2, 3, 9, 4):  # any order: the step alone decides
            whole = alone.batch(step)
            for rank, reader in enumerate(readers):
                part = reader.batch(step)
                for ours, theirs in ((part.pictures, whole.pictures), (part.ids, whole.ids), (part.mask, whole.mask)):
                    assert torch.equal(ours, theirs[rank::2]), "widths, too, are those of all ranks"
                assert part.counts == whole.counts[rank::2]
                mine = torch.isin(whole.owner, torch.arange(rank, 6, 2))
                assert torch.equal(part.weight, whole.weight[mine])
                width = part.answer_ids.shape[1]
                assert torch.equal(part.answer_ids, whole.answer_ids[mine][:, :width])
    finally:
        for reader in readers:
            reader.close()


def test_a_seed_decides_the_order_and_the_view(official):
    assert torch.equal(loader(official).batch(7).ids, loader(official).batch(7).ids)
    assert not torch.equal(loader(official, seed=4).batch(7).pictures, loader(official).batch(7).pictures)


@settings(max_examples=8, deadline=None)
@given(world=st.integers(1, 3), rows=st.integers(1, 9))
def test_evaluation_sees_every_question_once_and_all_ranks_run_alike(tmp_path_factory, world, rows):
    folder = tmp_path_factory.getbasetemp() / "questions"
    if not folder.exists():  # pictures with 1, 2, 3, 1, 2, 3 and 7 questions, not beside each other
        counts = (1, 2, 3, 1, 2, 3, 7)
        asked = [one for k, one in enumerate(albums.some_questions(7, 7)) if k % 7 < counts[one["image"]]]
        some = sorted(asked, key=lambda one: one["text"][-2])
        albums.set_of_vqa_v2(folder, 2, 7)
        albums.vqa_v2(folder, "val", some)
    parts = [list(loader(folder, rank, world, train=False, batch=6).eval_batches(rows)) for rank in range(world)]
    assert len({len(batches) for batches in parts}) == 1
    questions = loader(folder, train=False).questions
    seen = []
    for together in zip(*parts, strict=True):
        assert len({(ids.shape, pictures.shape) for (pictures, ids, _, _), _, _ in together}) == 1
        for (pictures, ids, mask, owner), samples, weight in together:
            assert len(samples) <= rows
            assert decoded(ids, mask) == [bare(questions[sample].text) for sample in samples.tolist()]
            own = weight > 0
            of_samples = [int(questions[sample].image[-16:-4]) for sample in samples[own].tolist()]
            assert albums.shown(pictures[owner[own]]) == of_samples, "a question with another one's picture"
            seen += samples[own].tolist()
    assert sorted(seen) == list(range(19))


def test_evaluation_decodes_a_picture_once_for_all_its_questions(official, monkeypatch):
    seen = []
    picture = Folders.picture
    monkeypatch.setattr(Folders, "picture", lambda self, key: seen.append(key) or picture(self, key))
    ours = loader(official, train=False)
    assert sum(len(samples) for _, samples, _ in ours.eval_batches(4)) == 8
    assert sorted(seen) == sorted({question.image for question in ours.questions})


def test_fraction_and_validation_go_by_pictures_and_are_the_same_in_every_run(official):
    def images(**changes):
        return {question.image for question in loader(official, **changes).questions}

    some = images(fraction=0.3)
    assert len(some) == 3
    assert loader(official, fraction=0.3).samples == 6, "all questions of a kept picture"
    assert images(fraction=0.3, seed=9) == some
    held = images(validation=0.2, train=False)
    assert len(held) == 2
    assert all(key.startswith("train2014/") for key in held)
    assert images(validation=0.2) == images() - held
    assert images(validation=0.2, train=False, fraction=0.5) == held
    assert len(images(validation=0.2, fraction=0.5)) == 4
    assert not images(validation=0.2, fraction=0.5) & held


def test_split_is_the_batch_in_pieces(official):
    batch = loader(official, batch=8).batch(2)
    for rows in (1, 3, 4, 8, 20):
        pieces = batch.split(rows)
        assert [len(piece.ids) for piece in pieces] == [min(rows, 8 - first) for first in range(0, 8, rows)]
        for name in ("pictures", "ids", "mask", "answer_ids", "answer_mask", "weight"):
            assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
        assert torch.equal(torch.cat([p.owner + k * rows for k, p in enumerate(pieces)]), batch.owner)
        assert sum((piece.counts for piece in pieces), ()) == batch.counts
        for piece in pieces:
            assert torch.equal(torch.bincount(piece.owner), torch.tensor(piece.counts))


def test_split_asks_the_device_nothing(official):
    """A tensor without contents cannot be waited for."""
    batch = loader(official, batch=8).batch(0)
    nowhere = Asked(*(tensor.to("meta") for tensor in batch[:7]), batch.counts)
    assert [piece.answer_ids.shape for piece in nowhere.split(3)] == [p.answer_ids.shape for p in batch.split(3)]


# ---- answers that can be given


def test_the_list_has_the_most_frequent_training_answers(official):
    ours = loader(official, answers=3)
    # "yes" is said once of each question, "b0" and "b1" three times of every second, "a0" six times of two.
    assert ours.answers.texts == ["b0", "b1", "yes"], "30, 30 and 20 annotators; equals by their text"
    whole = loader(official).answers
    assert whole.texts == ["b0", "b1", "yes", *(f"a{k}" for k in range(10))]
    assert decoded(torch.from_numpy(whole.ids), torch.from_numpy(whole.mask)) == whole.texts
    assert whole.ids.dtype == whole.mask.dtype == np.int64
    assert ours.classes == 3
    assert ours.answers.counted
    assert loader(official, train=False).answers.counted
    assert ours.batch(0).answer_ids.shape[0] == sum(len(set(q.answers)) for q in ours.questions[:4]), "none is dropped"


def test_only_what_is_trained_on_is_counted_and_evaluation_has_the_same_list(official):
    part = {"fraction": 0.5, "validation": 0.2}
    ours = loader(official, **part)
    pictures = {int(question.image[-16:-4]) for question in ours.questions}
    assert set(ours.answers.texts) == {"b0", "b1", "yes", *(f"a{k}" for k in pictures)}
    assert loader(official, train=False, **part).answers.texts == ours.answers.texts
    assert loader(official, train=False, fraction=0.5).answers.texts == loader(official, fraction=0.5).answers.texts


def test_a_list_beside_the_questions_counts_instead(official):
    (official / "answer_list.json").write_text(json.dumps(["yes", "a1", "no"]))
    assert loader(official).answers.texts == ["yes", "a1", "no"]
    assert loader(official, train=False).answers.texts == ["yes", "a1", "no"]
    assert not loader(official, train=False).answers.counted, "nobody says how it is sorted"
    (official / "answer_list.json").write_text(json.dumps(["a1", "no"]))
    (notice,) = loader(official, train=False).notices()
    assert notice == (
        f"{official}: 6 questions of 8 cannot be answered rightly, since no answer is in the list of 2 (0, 1, 2004,"
        " 2005, 3006, ...)."
    )
    assert loader(official).notices() == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"yes": 0}', "is no list of answers"),
        ("[]", "is no list of answers"),
        ('["yes", ""]', "is no list of answers"),
        ('["yes", 3]', "is no list of answers"),
        ('["yes", "no", "yes"]', "has 'yes' twice"),
        ("[", "cannot be read"),
    ],
)
def test_a_bad_list_is_refused(official, content, said):
    (official / "answer_list.json").write_text(content)
    with pytest.raises(ValueError, match=rf"answer_list\.json {said}"):
        loader(official)


def test_long_questions_and_answers_are_cut(official):
    ours = loader(official, text=Text("tokenizer", length=8))
    batch = ours.batch(0)
    assert batch.ids.shape == (4, 8)
    assert (batch.ids[:, 7] == vocabulary().sep).all()
    assert answer_list(["yes", "abcdefgh"], vocabulary(), 5).ids.shape == (2, 5)
    with pytest.raises(ValueError, match="rows of 2 tokens hold no text"):
        loader(official, text=Text("tokenizer", length=2))


# ---- bad input


def test_a_truncated_picture_is_replaced_with_its_question_counted_and_named(official):
    lost = official / "train2014" / albums.coco_name("train", 4)
    lost.write_bytes(lost.read_bytes()[:-40])
    ours = loader(official)
    by_text = {bare(question.text): question for question in ours.questions}
    for step in range(5):
        batch = ours.batch(step)
        numbers = albums.shown(batch.pictures)
        asked = [by_text[text] for text in decoded(batch.ids, batch.mask)]
        assert [int(question.image[-16:-4]) for question in asked] == numbers
        assert 4 not in numbers
    (notice,) = ours.notices()
    assert notice.startswith(f"{official / 'train2014'}: 1 damaged picture left out (COCO_train2014_000000000004.jpg")
    strict = loader(official, corrupt="stop")
    with pytest.raises(Unreadable, match=r"COCO_train2014_000000000004\.jpg cannot be decoded"):
        [strict.batch(step) for step in range(5)]


def test_a_replacement_with_a_longer_question_keeps_the_ranks_alike(tmp_path):
    """What takes a row is known to its rank alone, so the width is not its own."""
    asked = [{"image": k, "text": "a" if k < 16 else "what " * 15, "answers": ["yes"]} for k in range(20)]
    albums.vqa_v2(tmp_path, "train", asked)
    albums.coco_pictures(tmp_path, "train", range(20))
    for number in range(16):
        (tmp_path / "train2014" / albums.coco_name("train", number)).write_bytes(b"")
    pair = [loader(tmp_path, rank, 2) for rank in range(2)]
    cut = 0
    for step in range(9):
        ours, theirs = (reader.batch(step) for reader in pair)
        assert ours.ids.shape == theirs.ids.shape
        assert min(albums.shown(torch.cat([ours.pictures, theirs.pictures]))) >= 16
        cut += sum(
            (batch.mask.all(1) & (batch.ids[:, -1] != vocabulary().sep)).sum().item() for batch in (ours, theirs)
        )
    assert cut, "no step in which that mattered"


@pytest.mark.parametrize("train", [True, False])
def test_black_pictures_leave_the_questions_as_they_are(official, train):
    seen, black = (loader(official, train=train, blank=blank) for blank in (False, True))
    dark = -torch.tensor(black.mean) / torch.tensor(black.std)
    if train:
        ours, theirs = black.batch(1), seen.batch(1)
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.answer_ids, theirs.answer_ids)
        pictures = ours.pictures
    else:
        ((pictures, _, _, _), _, _), *_ = black.eval_batches(8)
    assert torch.allclose(pictures, dark[:, None, None].expand_as(pictures), atol=1e-6)
    assert black.fingerprint() != seen.fingerprint()


def test_a_damaged_picture_does_not_count_in_evaluation(official):
    (official / "val2014" / albums.coco_name("val", 2)).write_bytes(b"no picture")
    ours = loader(official, train=False)
    counted = {}
    for _, samples, weight in ours.eval_batches(3):
        counted |= {s: w for s, w in zip(samples.tolist(), weight.tolist(), strict=True) if w or s not in counted}
    assert counted == {s: float(s not in (4, 5)) for s in range(8)}
    assert "1 damaged picture left out" in ours.notices()[0]


def test_missing_pictures(official):
    (official / "train2014" / albums.coco_name("train", 4)).unlink()
    ours = loader(official)
    assert ours.samples == 18
    assert "lacks 1 picture that its annotations name (train2014/COCO_train2014_000000000004.jpg)" in ours.notices()[0]
    assert "a4" in ours.answers.texts, "the list does not depend on what a machine lacks"
    with pytest.raises(ValueError, match=r"lacks 1 picture .*000000000004"):
        loader(official, corrupt="stop")
    for file in (official / "train2014").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="lacks 10 pictures"):
        loader(official)


def test_questions_without_an_answer_are_left_out_and_named(official):
    asked = albums.some_questions(10)
    asked[3]["answers"], asked[5]["answers"], asked[7]["answers"] = [], ["", " "], ["", "red", "red", "red"]
    albums.vqa_v2(official, "train", asked)
    ours = loader(official)
    assert ours.samples == 18
    assert ours.notices() == [f"{official}: 2 questions without an answer left out (1003, 2005)."]
    assert "" not in ours.answers.texts
    steps = [ours.batch(step) for step in range(5)]
    weights = [weight for batch in steps for weight in batch.weight.tolist()]
    assert 0.75 in weights, "an annotator without an answer is one of four"
    albums.vqa_v2(official, "train", [one | {"answers": []} for one in asked])
    with pytest.raises(ValueError, match="holds no question with an answer"):
        loader(official)


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (ANNOTATIONS, lambda c: c["annotations"][2].update(question_id=77), "1 question there are not here, 77"),
        (ANNOTATIONS, lambda c: c["annotations"][2].update(image_id=7), "question 1002 is about picture 1 here and"),
        (QUESTIONS, lambda c: c["questions"].pop(), "do not belong together"),
        (QUESTIONS, lambda c: c.pop("questions"), "VQA v2's questions (no 'questions')"),
        (QUESTIONS, lambda c: c["questions"][1].pop("image_id"), "(no 'image_id')"),
        (QUESTIONS, lambda c: c["questions"][1].update(image_id="x"), "not laid out as VQA v2's questions"),
        (QUESTIONS, lambda c: c["questions"][1].update(question=None), "not laid out as VQA v2's questions"),
        (ANNOTATIONS, lambda c: c["annotations"][1].update(answer_type="colour"), "'colour' is no answer_type"),
        (ANNOTATIONS, lambda c: c["annotations"][1].update(answers=["yes"]), "not laid out as VQA v2's annotations"),
        (ANNOTATIONS, lambda c: c["annotations"][1]["answers"][0].update(answer=3), "not laid out as VQA v2's annot"),
    ],
)
def test_other_layouts_and_annotations_of_other_questions(official, name, change, said):
    edit(official / name, change)
    with pytest.raises(ValueError) as error:
        loader(official)
    assert said in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_missing_or_no_json(official):
    (official / QUESTIONS).write_text('{"questions": [')
    with pytest.raises(ValueError, match=r"questions\.json cannot be read"):
        loader(official)
    (official / QUESTIONS).unlink()
    with pytest.raises(ValueError, match=r"questions\.json cannot be read \(No such file.*beside the others"):
        loader(official)


@pytest.mark.parametrize("folder", ["", "set"])
def test_an_empty_folder(tmp_path, folder):
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match="holds no questions about pictures: name one with v2_OpenEnded"):
        loader(tmp_path, folder=folder)


@pytest.mark.parametrize("folder", ["pipe:curl x", "https://example.org/set", "s3://bucket/set"])
def test_nothing_is_fetched(tmp_path, folder):
    with pytest.raises(ValueError, match="folders of this machine"):
        loader(tmp_path, folder=folder)


def test_parquet_of_another_layout(tmp_path):
    file = tmp_path / "train.parquet"
    albums.parquet(file, [0], label=[1])
    with pytest.raises(ValueError, match=r"train\.parquet has no column image_id"):
        loader(tmp_path)
    albums.parquet(file, [0], image_id=[1], caption=["x"])
    with pytest.raises(ValueError, match=r"no column vqa_v2 \(it has image, image_id, caption\)"):
        loader(tmp_path)
    albums.parquet(file, [0], image_id=[1], vqa_v2=[[{"question": "x", "question_id": 1}]])
    with pytest.raises(ValueError, match="not laid out as questions about pictures"):
        loader(tmp_path)
    albums.parquet(file, [0], image_id=[1], qa=[[{"question": None, "answer": "x"}]])
    with pytest.raises(ValueError, match="not laid out as questions about pictures"):
        loader(tmp_path)
    file.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read"):
        loader(tmp_path)


# ---- as a run sees it


def test_fingerprints_tell_sets_apart(official):
    first = loader(official).fingerprint()
    assert loader(official, seed=8, batch=2).fingerprint() == first
    assert loader(official, fraction=0.5).fingerprint() != first
    assert loader(official, answers=2).fingerprint()["answers"] != first["answers"]
    asked = albums.some_questions(10)
    asked[0]["text"] += " really"
    albums.vqa_v2(official, "train", asked)
    assert loader(official).fingerprint()["questions"] != first["questions"]


def test_files_are_read_again_where_they_have_changed(official):
    assert loader(official).questions[0].text == "what is 0 and 0?"
    edit(official / QUESTIONS, lambda c: c["questions"][0].update(question="something else?"))
    assert loader(official).questions[0].text == "something else?"


def test_runs_open_it_by_name(tmp_path):
    settings = replace(albums.config("vqa"), text=Text("generated", length=24), image_size=64)
    ours = open_loader(settings, str(tmp_path), train=True, seed=0)
    assert (ours.name, ours.samples, ours.global_batch, ours.steps_per_epoch) == ("generated", 6000, 4, 1500)
    ours.batch(0)
    assert ours.throughput()["decoded"] > 0
    ours.close()
