"""Tokenizers, the cache, SQuAD's files and windows, and the loader of texts."""

from __future__ import annotations

import importlib
import json
import lzma
import multiprocessing
import os
import shutil
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from texts import FOUND, RIVER, ROWS, asked, official, tokenizer, vocabulary, write_official, write_parquet

from hetero_kt.data import cache, text
from hetero_kt.data.squad import BETWEEN, LONG, OUTSIDE, Windows
from hetero_kt.data.text import TextLoader, load_tokenizer

squad = importlib.import_module("hetero_kt.data.squad")  # the package has a function of this name
SMALL = Windows(length=24, stride=5, question=8)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokens"))


def rows_of(folder: Path, tokens, rows=None, windows: Windows = SMALL, *, train=False, **options):
    """The windows of questions, written to Parquet first."""
    write_parquet(folder / "squad_v2" / "train.parquet", ROWS if rows is None else rows)
    write_parquet(folder / "squad_v2" / "validation.parquet", ROWS if rows is None else rows)
    return squad.squad(folder, tokens, windows, train=train, folder=folder / "cache", **options)


# --- tokenizer ---


def test_a_vocabulary_file_is_read_whole(tmp_path):
    file = vocabulary(tmp_path)
    assert load_tokenizer(file).size == len(file.read_text().splitlines()) > 90


def test_a_saved_folder_is_the_same_tokenizer(tmp_path, tokens):
    tokens.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.size == tokens.size
    (ours,), (theirs,) = tokens.encode([RIVER]), again.encode([RIVER])
    assert (ours.ids == theirs.ids).all()
    assert (ours.offsets == theirs.offsets).all()


def test_names_of_special_tokens_in_a_text_are_plain_characters(tokens):
    (found,) = tokens.encode(["a [SEP] river [MASK]"])
    assert not {tokens.sep, tokens.mask, tokens.cls} & set(found.ids.tolist())
    assert found.ids[1] == tokens.encode(["["]).__next__().ids[0]


def test_every_text_is_encoded_in_order(tokens):
    texts = [f"{n} river" for n in range(2500)]
    found = list(tokens.encode(texts))
    assert len(found) == 2500
    for n in (0, 1023, 1024, 2499):
        (alone,) = tokens.encode([texts[n]])
        assert (alone.ids == found[n].ids).all()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "holds no tokenizer"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", "holds special tokens only"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\n", "lacks \\[MASK\\]"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\na\n", "8 lines but 7 different"),
    ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(ValueError, match=says):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


# --- cache ---


def entry(values: list[int]):
    return lambda: ({"x": np.array(values), "none": np.zeros(0, np.int32)}, {"note": "ä"})


def test_an_entry_is_built_once_and_then_mapped(tmp_path):
    calls = []

    def build():
        calls.append(1)
        return {"x": np.arange(1000)}, {"n": [1, "b"]}

    for _ in range(3):
        arrays, notes = cache.cached("k", build, tmp_path)
        assert arrays["x"].tolist() == list(range(1000))
        assert notes == {"n": [1, "b"]}
        assert isinstance(arrays["x"], np.memmap)
        assert not arrays["x"].flags.writeable
    assert len(calls) == 1
    assert not list(tmp_path.glob("*.part*"))


def test_empty_arrays_come_back(tmp_path):
    arrays, _ = cache.cached("k", entry([1]), tmp_path)
    assert arrays["none"].shape == (0,)


def _flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


HARMS = {
    "truncated": lambda array, notes: os.truncate(array, 500),
    "a flipped bit": lambda array, notes: _flip(array, -5),
    "a flipped bit in the header": lambda array, notes: _flip(array, 30),
    # What a machine that stopped leaves where the file's size was on the disk and its content was not.
    "zeros behind the header": lambda array, notes: array.write_bytes(array.read_bytes()[:128].ljust(8128, b"\0")),
    "no JSON": lambda array, notes: notes.write_text("{"),
    "deep JSON": lambda array, notes: notes.write_text("[" * 100_000),
    "other notes": lambda array, notes: notes.write_text(notes.read_text().replace('"of it"', '"other"')),
    "without checksums": lambda array, notes: notes.write_text('{"arrays": ["x"], "notes": {}}'),
    "missing": lambda array, notes: array.unlink(),
    "a FIFO": lambda array, notes: (array.unlink(), os.mkfifo(array)),
    "another entry": lambda array, notes: (
        cache.cached("other", entry([5]), array.parents[1]),
        shutil.rmtree(array.parent),
        shutil.copytree(array.parents[1] / "other", array.parent),
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_entry_is_never_read_and_its_rebuilding_is_said(tmp_path, harm, capsys):
    cache.cached("k", lambda: ({"x": np.arange(1000)}, {"note": "of it"}), tmp_path)
    HARMS[harm](tmp_path / "k" / "x.npy", tmp_path / "k" / "notes.json")
    assert capsys.readouterr().out == ""
    arrays, _ = cache.cached("k", entry([7, 8]), tmp_path)
    assert arrays["x"].tolist() == [7, 8]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{tmp_path / 'k'} is ")
    assert said.endswith(": it is built again.")


def test_an_entry_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    synchronised: list[str] = []
    rename = os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: synchronised.append(os.readlink(f"/proc/self/fd/{descriptor}")))

    def renamed(old, new):
        assert {Path(name).name for name in synchronised} >= {"x.npy", "none.npy", "notes.json", Path(old).name}
        synchronised.clear()
        rename(old, new)

    monkeypatch.setattr(os, "rename", renamed)
    cache.cached("k", entry([1]), tmp_path)
    assert synchronised == [str(tmp_path)]


def test_a_fifo_in_place_of_the_lock_is_not_waited_on(tmp_path):
    os.mkfifo(tmp_path / "k.lock")
    with pytest.raises(ValueError, match=r"cannot be used .* HETERO_KT_CACHE"):
        cache.cached("k", entry([1]), tmp_path)


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise ValueError("no such data")

    with pytest.raises(ValueError, match="no such data"):
        cache.cached("k", fail, tmp_path)
    assert cache.cached("k", entry([1]), tmp_path)[0]["x"].tolist() == [1]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be used .* HETERO_KT_CACHE"):
        cache.cached("k", entry([1]), tmp_path / "file" / "below")


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HETERO_KT_CACHE", str(tmp_path / "named"))
    cache.cached("k", entry([1]))
    assert (tmp_path / "named" / "k" / "x.npy").is_file()


def _slow_build(folder: Path, seconds: float):
    def build():
        with (folder / "calls").open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return {"x": np.arange(5)}, {}

    arrays, _ = cache.cached("k", build, folder)
    assert arrays["x"].tolist() == [0, 1, 2, 3, 4]


def test_processes_that_ask_at_once_build_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    asking = [fork.Process(target=_slow_build, args=(tmp_path, 0.3)) for _ in range(4)]
    for one in asking:
        one.start()
    for one in asking:
        one.join(30)
    assert [one.exitcode for one in asking] == [0] * 4
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_a_builder_that_is_killed_holds_up_nobody(tmp_path):
    fork = multiprocessing.get_context("fork")
    first = fork.Process(target=_slow_build, args=(tmp_path, 60))
    first.start()
    while not (tmp_path / "calls").exists():
        time.sleep(0.01)
    (tmp_path / "k.part1").mkdir()  # as if it had begun to write
    second = fork.Process(target=_slow_build, args=(tmp_path, 0))
    second.start()
    time.sleep(0.2)
    assert second.is_alive()  # it waits
    assert first.pid
    os.kill(first.pid, signal.SIGKILL)
    second.join(30)
    assert second.exitcode == 0
    assert not list(tmp_path.glob("*.part*"))
    first.join()


def test_keys_tell_contents_and_settings_apart():
    keys = {cache.key(*parts) for parts in [(b"ab", 1), (b"a", b"b", 1), (b"ab", 2), (b"ab", "1"), (b"ab",)]}
    assert len(keys) == 5
    assert cache.key({"a": 1, "b": 2}) == cache.key({"b": 2, "a": 1})


# --- files ---


def test_all_layouts_give_the_same_questions(tmp_path):
    files = [
        write_parquet(tmp_path / "train.parquet", ROWS),
        write_official(tmp_path / "train-v2.0.json", ROWS),
        write_official(tmp_path / "train-v2.0.json.xz", ROWS),
    ]
    first, *others = [squad.read((file,)) for file in files]
    assert [question.id for question in first.questions] == [row["id"] for row in ROWS]
    assert len(first.contexts) == 2
    assert first.questions[0].answers == (("1966", RIVER.index("1966")), ("in 1966", RIVER.index("in 1966")))
    assert first.questions[2].answers == ()
    assert others == [first, first]


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("train", "squad_v2/train-00000-of-00001.parquet"),
        ("train", "train-v2.0.json"),
        ("validation", "squad_v2/dev-v2.0.json.xz"),
        ("validation", "validation.parquet"),
    ],
)
def test_files_are_found_below_the_data_folder(tmp_path, part, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    assert squad.find(tmp_path, part) == (tmp_path / name,)


def test_a_folder_without_questions_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no SQuAD v2 train set: .* --data-dir"):
        squad.find(tmp_path, "train")


def broken(change):
    content = official(ROWS)
    change(content)
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "not laid out as SQuAD v2"),
        (b'{"version": "v2.0"}', "not laid out as SQuAD v2 \\(no 'data'"),
        (broken(lambda c: c["data"][0]["paragraphs"][0].pop("context")), "no 'context'"),
        (broken(lambda c: c["data"][0]["paragraphs"][0]["qas"][1].pop("answers")), "no 'answers'"),
        (broken(lambda c: c["data"][0]["paragraphs"][0]["qas"][0]["answers"][0].pop("text")), "no 'text'"),
        (broken(lambda c: c["data"][0]["paragraphs"][0].update(context=3)), "3 is no text"),
        (broken(lambda c: c["data"][1]["paragraphs"][0].update(context=" \n")), "context of question café is empty"),
    ],
)
def test_a_file_in_another_layout_is_refused_in_one_sentence(tmp_path, content, says):
    file = tmp_path / "train-v2.0.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        squad.read((file,))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_packed_files_and_parquet_are_refused(tmp_path):
    for name in ("dev-v2.0.json.xz", "train.parquet"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            squad.read((tmp_path / name,))


def test_parquet_with_other_columns_is_refused(tmp_path):
    table = pq.read_table(write_parquet(tmp_path / "train.parquet", ROWS)).drop_columns(["context"])
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no 'context'"):
        squad.read((tmp_path / "train.parquet",))


def test_a_context_without_tokens_is_refused(tmp_path, tokens):
    with pytest.raises(ValueError, match="the context of question q holds no tokens"):
        rows_of(tmp_path, tokens, [asked("q", "\u200b\ufeff", "Where?")])


# --- windows ---


def slow_windows(length: int, room: int, stride: int) -> tuple[list[list[int]], list[int]]:
    """Each window's tokens, and for each token the window that shows it with the most context."""
    windows, start = [], 0
    while True:
        windows.append([t for t in range(start, start + room) if t < length])
        if windows[-1][-1] == length - 1:
            break
        start += min(stride, len(windows[-1]))
    best = []
    for token in range(length):
        scores = []
        for window in windows:
            if token in window:
                at = window.index(token)
                scores.append(min(at, len(window) - 1 - at) + 0.01 * len(window))
            else:
                scores.append(-1.0)
        best.append(scores.index(max(scores)))
    return windows, best


@example(length=400, room=317, stride=290)  # a last window so short that its length decides
@given(length=st.integers(1, 90), room=st.integers(1, 40), stride=st.integers(1, 50))
@settings(max_examples=120, deadline=None)
def test_windows_and_their_best_tokens_equal_a_slow_reference(length, room, stride):
    windows, best = slow_windows(length, room, stride)
    found = squad.spans(length, room, stride)
    assert [list(range(first, first + count)) for first, count in found] == windows
    assert {token for window in windows for token in window} == set(range(length))
    runs = squad.most_context(found, length)
    owners = {token: n for n, (first, count) in enumerate(runs) for token in range(first, first + count)}
    assert [owners[token] for token in range(length)] == best
    assert sum(count for _, count in runs) == length


def test_windows_of_a_long_paragraph_take_memory_in_proportion_to_it():
    windows = squad.spans(100_000, 51, 16)
    tracemalloc.start()
    try:
        assert sum(count for _, count in squad.most_context(windows, 100_000)) == 100_000
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10_000_000, f"{most:,} bytes"


@pytest.mark.parametrize("name", ["train-v2.0.json", "train-v2.0.json.xz"])
@pytest.mark.parametrize("harm", ["deep", "bomb", "fifo"])
def test_deep_json_bombs_and_fifos_are_refused_in_one_sentence(tmp_path, monkeypatch, name, harm):
    file = tmp_path / name
    content = b"[" * 200_000 if harm == "deep" else bytes(5_000_000)
    if harm == "fifo":
        os.mkfifo(file)
    else:
        monkeypatch.setattr(squad, "_MOST", 1_000_000)
        file.write_bytes(lzma.compress(content) if file.suffix == ".xz" else content)
    with pytest.raises(ValueError, match=rf"^[^\n]*{name} cannot be read \([^\n]*fetch it again[^\n]*$"):
        squad.read((file,))


def test_rows_are_question_and_context_between_special_tokens(tmp_path, tokens):
    rows = rows_of(tmp_path, tokens, ROWS[:1])
    (context,), (question,) = tokens.encode([RIVER]), tokens.encode(["When was it named?"])
    asked_ids = question.ids[:8].tolist()
    room = 24 - 3 - len(asked_ids)
    samples = np.arange(len(rows.windows))
    ids, mask, types, _, _ = rows.take(samples, 24, samples)
    for n, (first, count) in enumerate(squad.spans(len(context.ids), room, 5)):
        shown = context.ids[first : first + count].tolist()
        row = [tokens.cls, *asked_ids, tokens.sep, *shown, tokens.sep]
        assert rows.lengths[n] == len(row)
        assert ids[n].tolist() == row + [tokens.pad] * (24 - len(row))
        assert mask[n].tolist() == [1] * len(row) + [0] * (24 - len(row))
        assert types[n].tolist() == [0] * (len(asked_ids) + 2) + [1] * (count + 1) + [0] * (24 - len(row))
    assert n == len(rows.windows) - 1 > 2


def check_labels(rows) -> int:
    """Every labelled span is the answer, character for character; returns how many windows have one."""
    labelled = 0
    before = rows.before_context()
    answered = set()
    for n, (question, context, first, count, start, end, *_) in enumerate(rows.windows.tolist()):
        asked_ = rows.source.questions[question]
        if (start, end) == (0, 0):
            continue
        answer, place = asked_.answers[0]
        characters = rows.characters(context)
        one, other = (characters[first + t - before[n]] for t in (start, end))
        assert before[n] <= start <= end < before[n] + count
        assert one[0] == place
        assert rows.source.contexts[context][one[0] : other[1]] == answer
        labelled += 1
        answered.add(question)
    wrong = {name for name, _ in rows.problems}
    for n in {question for question, *_ in rows.windows.tolist()}:
        asked_ = rows.source.questions[n]
        assert (n in answered) == (bool(asked_.answers) and asked_.id not in wrong)
    return labelled


def test_labels_rebuild_the_answer_and_unanswerable_windows_name_the_class_token(tmp_path, tokens):
    rows = rows_of(tmp_path, tokens, windows=Windows(length=40, stride=7, question=8))
    assert not rows.problems
    assert check_labels(rows) > 5
    never = rows.windows[rows.windows[:, 0] == 2]
    assert len(never)
    assert not never[:, 4:6].any()


def test_only_windows_that_hold_the_whole_answer_are_labelled(tmp_path, tokens):
    rows = rows_of(tmp_path, tokens, [asked("q", "x " * 30 + "1966 " + "y " * 30, "When?", ("1966", FOUND))])
    (question,) = tokens.encode(["When?"])
    for _, _, first, count, start, end, *_ in rows.windows.tolist():
        inside = first <= 30 and first + count > 31  # 1966 is two tokens
        expected = (len(question.ids) + 2 + 30 - first, len(question.ids) + 2 + 31 - first) if inside else (0, 0)
        assert (start, end) == expected


PROBLEMS = [
    asked("good", RIVER, "When?", ("1966", FOUND)),
    asked("elsewhere", RIVER, "When?", ("1966", 0)),
    asked("negative", RIVER, "When?", ("1966", -1)),
    asked("behind", RIVER, "When?", ("1966", 5000)),
    asked("nothing", RIVER, "When?", ("", 3)),
    asked("within", RIVER, "When?", ("966", FOUND)),
    asked("space", RIVER, "When?", ("1966 ", FOUND)),
    asked("too long", "x " * 60, "When?", ("x " * 40 + "x", FOUND)),
]


def test_answers_that_cannot_be_placed_are_named_and_not_trained_on(tmp_path, tokens):
    train = rows_of(tmp_path, tokens, PROBLEMS, train=True)
    expected = [(name, OUTSIDE) for name in ("elsewhere", "negative", "behind", "nothing")]
    expected += [("within", BETWEEN), ("space", BETWEEN), ("too long", LONG)]
    assert train.problems == expected
    assert set(train.windows[:, 0].tolist()) == {0}
    assert train.trainable.all()
    notices = "; ".join(train.notices())
    for name, why in expected:
        assert name in notices
        assert why in notices
    assert "4 questions left out" in notices
    test = rows_of(tmp_path, tokens, PROBLEMS)
    assert set(test.windows[:, 0].tolist()) == set(range(8))
    assert set(test.windows[test.trainable, 0].tolist()) == {0}


def test_a_notice_names_at_most_five(tmp_path, tokens):
    rows = rows_of(tmp_path, tokens, [asked(f"q{n}", RIVER, "When?", ("1966", 0)) for n in range(9)])
    assert rows.notices()[0].endswith("q0, q1, q2, q3, q4, ...")


@pytest.mark.parametrize("options", [{"length": 67}, {"stride": 0}, {"question": 0}])
def test_windows_without_room_are_refused(options):
    with pytest.raises(ValueError, match="hold no paragraph: use 384, 64 and 128"):
        Windows(**options)


def test_articles_are_held_out_whole(tmp_path, tokens):
    rows = [asked(f"{n}", f"{RIVER} {n}", "When?", ("1966", FOUND), title=f"T{n % 7}") for n in range(21)]
    train = rows_of(tmp_path, tokens, rows, train=True, validation=0.3)
    test = rows_of(tmp_path, tokens, rows, train=False, validation=0.3)

    def titles(part):
        return {part.source.questions[n].title for n in part.windows[:, 0].tolist()}

    assert titles(train) | titles(test) == {f"T{n}" for n in range(7)}
    assert not titles(train) & titles(test)
    assert len(set(test.windows[:, 0].tolist())) == 9  # the first articles that hold 30 % or more of 21


def test_a_validation_split_that_leaves_nothing_is_refused(tmp_path, tokens):
    with pytest.raises(ValueError, match=r"validation 0.99 leaves nothing"):
        rows_of(tmp_path, tokens, train=True, validation=0.99)


def builds(monkeypatch) -> list[int]:
    calls, original = [], squad._build

    def counted(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(squad, "_build", counted)
    return calls


def test_tokens_are_made_again_for_other_data_another_tokenizer_or_other_settings(tmp_path, tokens, monkeypatch):
    calls = builds(monkeypatch)
    first = rows_of(tmp_path, tokens)
    assert len(calls) == 1
    again = rows_of(tmp_path, tokens)
    assert len(calls) == 1
    assert (again.windows == first.windows).all()
    assert again.fingerprint() == first.fingerprint()
    other = load_tokenizer(vocabulary(tmp_path / "other", words=("elbe", "queen")))
    changes = [
        lambda: rows_of(tmp_path, tokens, ROWS[:-1]),
        lambda: rows_of(tmp_path, other),
        lambda: rows_of(tmp_path, tokens, windows=Windows(24, 4, 8)),
        lambda: rows_of(tmp_path, tokens, windows=Windows(24, 5, 7)),
        lambda: rows_of(tmp_path, tokens, windows=Windows(25, 5, 8)),
    ]
    for n, change in enumerate(changes):
        assert change().fingerprint() != first.fingerprint()
        assert len(calls) == n + 2


def test_training_does_not_parse_the_file_again(tmp_path, tokens, monkeypatch):
    rows_of(tmp_path, tokens, train=True)
    monkeypatch.setattr(squad, "read", lambda files: pytest.fail("parsed"))
    rows = rows_of(tmp_path, tokens, train=True)
    TextLoader(rows, 2, 0).batch(0)


# --- loader ---


class Numbered:
    """Rows whose tokens are their own number, of different lengths."""

    name, classes, longest = "numbered", 2, 50

    def __init__(self, size: int) -> None:
        self.lengths = np.array([1 + (7 * n) % 50 for n in range(size)])

    def take(self, samples_B, width, random_B):
        ids, mask, types = text.blank(len(samples_B), width, -1)
        for row, sample in enumerate(samples_B.tolist()):
            ids[row, : self.lengths[sample]] = sample
            mask[row, : self.lengths[sample]] = 1
        return ids, mask, types, random_B.view(np.int64)

    def fingerprint(self):
        return {}

    def notices(self):
        return []


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [5, 48, 61])
def test_ranks_together_see_the_batch_of_one_process_equally_wide(world, size):
    whole = TextLoader(Numbered(size), 12, 3)
    parts = [TextLoader(Numbered(size), 12, 3, rank, world) for rank in range(world)]
    for step in (0, 1, 7, 20):
        expected = whole.batch(step)
        for rank, part in enumerate(parts):
            for ours, theirs in zip(part.batch(step), expected, strict=True):
                assert torch.equal(ours, theirs[rank::world])
        longest = int(expected[1].sum(1).max())
        assert expected[0].shape[1] == min(-(-longest // 8) * 8, 50)
        assert all(len(tensor) == 12 for tensor in expected)
        assert all(tensor.dtype == torch.int64 for tensor in expected)


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own():
    loader = TextLoader(Numbered(48), 12, 3)
    assert loader.steps_per_epoch == 4
    epochs = [[int(i) for k in range(4) for i in loader.batch(4 * e + k)[0][:, 0]] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(48))
    assert epochs[0] != epochs[1]
    other = TextLoader(Numbered(48), 12, 4)
    assert [int(i) for k in range(4) for i in other.batch(k)[0][:, 0]] != epochs[0]


def test_a_loader_that_starts_in_the_middle_goes_on_alike():
    first = TextLoader(Numbered(61), 8, 1, 1, 2)
    seen = [first.batch(step) for step in range(12)]
    second = TextLoader(Numbered(61), 8, 1, 1, 2)
    for step in range(9, 12):
        for ours, theirs in zip(second.batch(step), seen[step], strict=True):
            assert torch.equal(ours, theirs)


def test_a_batch_size_changes_nothing_but_the_cut():
    small, large = TextLoader(Numbered(48), 4, 3), TextLoader(Numbered(48), 16, 3)
    ours = [int(i) for k in range(12) for i in small.batch(k)[0][:, 0]]
    theirs = [int(i) for k in range(3) for i in large.batch(k)[0][:, 0]]
    assert ours == theirs


@given(size=st.integers(1, 80), world=st.integers(1, 4), rows=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_evaluation_sees_every_sample_once_in_equal_batches(size, world, rows):
    seen, shapes = [], []
    for rank in range(world):
        loader = TextLoader(Numbered(size), world, 0, rank, world)
        found = []
        for (ids, mask, _, random), samples, weight in loader.eval_batches(rows):
            assert len(ids) <= rows
            found.append(tuple(ids.shape))
            assert ids.shape[1] >= mask.sum(1).max()
            assert torch.equal(ids[:, 0], samples)
            seen += [(int(s), int(r)) for s, r, w in zip(samples, random, weight, strict=True) if w > 0]
        shapes.append(found)
    assert sorted(sample for sample, _ in seen) == list(range(size))
    assert all(found == shapes[0] for found in shapes)
    single = TextLoader(Numbered(size), 1, 5)
    alone = [(ss, rs) for (*_, rs), ss, _ in single.eval_batches(9)]
    drawn = {int(s): int(r) for ss, rs in alone for s, r in zip(ss, rs, strict=True)}
    assert dict(seen) == drawn


def test_evaluation_hardly_pads():
    loader = TextLoader(Numbered(400), 8, 0)
    padded = sum(int((mask == 0).sum()) for (_, mask, *_), _, _ in loader.eval_batches(16))
    assert padded < 0.25 * Numbered(400).lengths.sum()


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch 7 does not divide over 2 ranks"):
        TextLoader(Numbered(20), 7, 0, 0, 2)
    with pytest.raises(ValueError, match="numbered has no samples"):
        TextLoader(Numbered(0), 2, 0)


def test_the_loader_has_the_face_of_the_others(tmp_path, tokens):
    rows = rows_of(tmp_path, tokens, PROBLEMS, train=True)
    loader = TextLoader(rows, 2, 0)
    assert (loader.samples, loader.classes, loader.global_batch) == (len(rows.windows), 2, 2)
    assert loader.fingerprint()["samples"] == len(rows.windows)
    assert loader.notices()
    assert loader.throughput() == {}
    loader.close()


# --- the real data ---


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    from conftest import data_folder

    folder = data_folder()
    assert folder is not None
    tokens = load_tokenizer(folder / "tokenizer" / "vocab.txt")
    assert tokens.size == 30522
    return folder, tokens, tmp_path_factory.mktemp("cache")


@pytest.mark.data
def test_every_real_answer_on_token_boundaries_is_rebuilt(real):
    folder, tokens, kept = real
    rows = squad.squad(folder, tokens, train=True, folder=kept)
    assert len(rows.source.questions) == 12293
    assert sum(bool(question.answers) for question in rows.source.questions) == 8509
    assert [why for _, why in rows.problems] == [BETWEEN] * 26
    assert check_labels(rows) >= 8509 - 26
    assert int(rows.lengths.max()) <= 384
    assert not rows.windows[~rows._arrays["answerable"][rows.windows[:, 0]], 4:6].any()


@pytest.mark.data
def test_the_official_layout_and_parquet_hold_the_same_real_questions(real):
    folder, tokens, kept = real
    packed = squad.read((folder / "squad_v2" / "validation-v2.0-layout.json.xz",))
    table = squad.read((folder / "squad_v2" / "validation.parquet",))
    assert {question.id: question.answers for question in packed.questions} == {
        question.id: question.answers for question in table.questions
    }
    assert set(packed.contexts) == set(table.contexts)
    rows = squad.squad(folder, tokens, train=False, folder=kept)
    assert len(rows.source.questions) == 2232
    assert check_labels(rows) > 1000


@pytest.mark.data
def test_short_windows_of_real_paragraphs_rebuild_every_answer_that_fits(real):
    folder, tokens, kept = real
    rows = squad.squad(folder / "mini", tokens, Windows(96, 16, 32), train=True, folder=kept)
    assert check_labels(rows) > 300
    whole = [rows.source.questions[n].id for n in set(rows.windows[:, 0].tolist())]
    assert len(whole) == 300 - len(rows.problems)
