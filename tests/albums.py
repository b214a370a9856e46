"""Tiny sets of pictures with texts in the layouts of VQA v2, COCO, DAQUAR and Flickr8k, made on the spot.

Picture k is of one colour that tells k, whatever is cut out of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from hetero_kt.config import Data, Text, Transform

PLAIN = Transform(scale=(0.5, 1.0), flip=0.0, squash=True)


def encoded(number: int) -> bytes:
    """Picture `number` below 24 as a JPEG file."""
    stream = io.BytesIO()
    Image.new("RGB", (40, 24), (10 + 10 * number, 250 - 10 * number, 90)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def shown(pictures: Tensor) -> list[int]:
    """Which pictures (B, 3, H, W) these are."""
    reds = pictures[:, 0].mean((1, 2)) * OPENAI_CLIP_STD[0] + OPENAI_CLIP_MEAN[0]
    return [round((red * 255 - 10) / 10) for red in reds.tolist()]


def coco_name(part: str, number: int) -> str:
    return f"COCO_{part}2014_{number:012d}.jpg"


def coco_pictures(folder: Path, part: str, numbers: Iterable[int]) -> None:
    place = folder / f"{part}2014"
    place.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (place / coco_name(part, number)).write_bytes(encoded(number))


def vqa_v2(folder: Path, part: str, asked: Sequence[dict[str, Any]]) -> None:
    """The two official files; `asked` has image, text, answers (one for each annotator) and kind."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [
        {"image_id": one["image"], "question": one["text"], "question_id": number_of(k, one)}
        for k, one in enumerate(asked)
    ]
    annotations = [
        {
            "question_type": "what",
            "multiple_choice_answer": one["answers"][0] if one["answers"] else "",
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": k}
                for k, answer in enumerate(one["answers"])
            ],
            "image_id": one["image"],
            "answer_type": one.get("kind", "other"),
            "question_id": number_of(k, one),
        }
        for k, one in enumerate(asked)
    ]
    write_json(folder / f"v2_OpenEnded_mscoco_{part}2014_questions.json", {"questions": questions})
    write_json(folder / f"v2_mscoco_{part}2014_annotations.json", {"annotations": annotations})


def number_of(place: int, asked: dict[str, Any]) -> int:
    return asked["image"] * 1000 + place


def some_questions(pictures: int, each: int = 2) -> list[dict[str, Any]]:
    """`each` questions about each picture; the text tells which."""
    return [
        {
            "image": number,
            "text": f"what is {number} and {'so ' * (number % 3)}{k}?",
            "answers": [f"a{number}"] * 6 + [f"b{k}"] * 3 + ["yes"],
            "kind": ("other", "number", "yes/no")[k % 3],
        }
        for number in range(pictures)
        for k in range(each)
    ]


def set_of_vqa_v2(folder: Path, train: int = 10, val: int = 4) -> Path:
    for part, count in (("train", train), ("val", val)):
        vqa_v2(folder, part, some_questions(count))
        coco_pictures(folder, part, range(count))
    return folder


def karpathy(folder: Path, name: str, images: Sequence[dict[str, Any]]) -> None:
    """`images` have split, filename, sentences (texts) and perhaps filepath."""
    entries = [
        {
            **{key: value for key, value in image.items() if key != "sentences"},
            "imgid": k,
            "sentences": [
                {"raw": text, "tokens": text.split(), "imgid": k, "sentid": k * 5 + i}
                for i, text in enumerate(image["sentences"])
            ],
        }
        for k, image in enumerate(images)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / name, {"images": entries, "dataset": "coco"})


def said_of(number: int, captions: int = 2) -> list[str]:
    """Captions that tell the picture."""
    return [f"this is {number}{' indeed' * k * (number % 3)} said {k}" for k in range(captions)]


def set_of_coco(folder: Path) -> Path:
    """Pictures 0 to 9 to train on (two of them of `restval`, in val2014), 10 and 11 of `val`, 12 to 15 of `test`."""
    splits = ["train"] * 8 + ["restval"] * 2 + ["val"] * 2 + ["test"] * 4
    images = []
    for number, split in enumerate(splits):
        part = "train" if split == "train" else "val"
        coco_pictures(folder, part, [number])
        images.append(
            {
                "filepath": f"{part}2014",
                "filename": coco_name(part, number),
                "split": split,
                "sentences": said_of(number),
            }
        )
    karpathy(folder, "dataset_coco.json", images)
    return folder


def parquet(file: Path, numbers: Sequence[int], **columns: Any) -> None:
    """Pictures and other columns; a file has several row groups."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(number), "path": f"{number}.jpg"} for number in numbers]
    pq.write_table(pa.table({"image": images, **columns}), file, row_group_size=3)


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def config(name: str, batch: int = 4, **changes: Any) -> Data:
    settings: dict[str, Any] = {
        "batch": batch,
        "image_size": 16,
        "workers": 0,
        "transform": PLAIN,
        "text": Text("tokenizer", length=24),
    }
    return Data(name=name, **(settings | changes))  # type: ignore[arg-type]
