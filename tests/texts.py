"""A tiny vocabulary, and texts and files in the layouts of SQuAD v2 and IMDb, made on the spot."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hetero_kt.data.text import Tokenizer, load_tokenizer

WORDS = ("the", "a", "of", "in", "was", "river", "king", "born", "who", "where", "when", "north", "19", "##66", "good")


def vocabulary(folder: Path, words: tuple[str, ...] = WORDS) -> Path:
    """A vocab.txt of about a hundred tokens: some words, and every letter, digit and mark to spell the rest."""
    letters = string.ascii_lowercase + string.digits
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *(f"##{c}" for c in letters)]
    tokens += [mark for mark in string.punctuation if mark not in tokens]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vocab.txt"
    file.write_text("".join(f"{token}\n" for token in dict.fromkeys(tokens)))
    return file


def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(vocabulary(folder))


def asked(name: str, context: str, question: str, *answers: tuple[str, int], title: str = "Rivers") -> dict[str, Any]:
    """A row of SQuAD v2 in its Parquet layout; an answer at -2 is looked for in the context."""
    placed = [(text, context.index(text) if start == -2 else start) for text, start in answers]
    return {
        "id": name,
        "title": title,
        "context": context,
        "question": question,
        "answers": {"text": [text for text, _ in placed], "answer_start": [start for _, start in placed]},
    }


FOUND = -2
RIVER = "The Elbe was named in 1966 by King Otto (the 2nd), born north of Dresden."
ROWS = [
    asked("when", RIVER, "When was it named?", ("1966", FOUND), ("in 1966", FOUND)),
    asked("who", RIVER, "Who was it?", ("King Otto", FOUND)),
    asked("never", RIVER, "Where was the queen born?"),
    asked("mark", RIVER, "Which one?", ("(the 2nd)", FOUND)),
    asked("café", "Zoë's café, naïvely — 北京 — called “Ñandú”.", "Where?", ("café", FOUND), title="Cafés"),
    asked("accent", "Zoë's café, naïvely — 北京 — called “Ñandú”.", "What?", ("“Ñandú”", FOUND), title="Cafés"),
]


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pairs = pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int32()))])
    schema = pa.schema([*((n, pa.string()) for n in ("id", "title", "context", "question")), ("answers", pairs)])
    pq.write_table(pa.Table.from_pylist(rows, schema), file)
    return file


def official(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same questions in the official nested layout."""
    articles: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        answers = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)]
        qa = {"id": row["id"], "question": row["question"], "answers": answers, "is_impossible": not answers}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(qa)
    data = [
        {"title": title, "paragraphs": [{"context": c, "qas": qas} for c, qas in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]
    return {"version": "v2.0", "data": data}


def write_official(file: Path, rows: list[dict[str, Any]]) -> Path:
    import lzma

    file.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(official(rows)).encode()
    file.write_bytes(lzma.compress(content) if file.suffix == ".xz" else content)
    return file


def write_reviews(file: Path, texts: list[str], labels: list[int]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, "label": pa.array(labels, pa.int64())}), file)
    return file
