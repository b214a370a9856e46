"""Pictures are JPEG, PNG or WebP, of a bounded size, wherever they are opened; no other program is ever started."""

from __future__ import annotations

import io
import re
import subprocess
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hetero_kt.ask import Trained
from hetero_kt.data.cifar import cifar100
from hetero_kt.data.gallery import Folders, Tables
from hetero_kt.data.pictures import MOST_PIXELS, Damaged, decoded
from hetero_kt.features import read_picture

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"


def saved(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, kind)
    return stream.getvalue()


def blank_png(side: int) -> bytes:
    """A white square in a few kilobytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * side
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes((8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture(autouse=True)
def no_process(monkeypatch):
    def started(*arguments, **_):
        raise SystemExit(f"{arguments} was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", started)


def readers(tmp_path: Path, content: bytes):
    """Whatever opens a picture, and what it raises."""
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    row = pa.array([{"bytes": content}])
    pq.write_table(pa.table({"img": row, "fine_label": [0]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": row}), tmp_path / "pictures.parquet")
    trained = Trained.__new__(Trained)  # its model is not asked
    yield Damaged, lambda: decoded(content, "a.jpg")
    yield Damaged, lambda: Folders(tmp_path, ["a.jpg"]).picture("a.jpg")
    yield Damaged, lambda: Tables([tmp_path / "pictures.parquet"], ["a"]).picture("a")
    yield ValueError, lambda: cifar100(str(tmp_path), train=True)
    yield ValueError, lambda: read_picture(file, 16)
    yield ValueError, lambda: trained._picture(file)


@pytest.mark.parametrize("kind", ["EPS", "GIF", "BMP", "TIFF", "PPM", "ICNS"])
def test_no_other_format_is_tried_wherever_a_picture_is_opened(kind, tmp_path):
    content = EPS if kind == "EPS" else saved(kind)
    for raised, read in readers(tmp_path, content):
        with pytest.raises(raised, match=r"^[^\n]+UnidentifiedImageError[^\n]*$"):
            read()


@pytest.mark.parametrize("side", [8_200, 13_000, 20_000])
def test_a_small_file_of_too_many_pixels_is_damaged_and_not_decoded(side, tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    content = blank_png(side)
    assert len(content) < 500_000
    for raised, read in readers(tmp_path, content):
        with pytest.raises(raised, match=rf"^[^\n]+more than {MOST_PIXELS:,}[^\n]+$"):
            read()


def test_only_one_place_opens_pictures():
    package = Path(__file__).parents[1] / "hetero_kt"
    opening = re.compile(r"Image\.open\(|default_loader|\.decode\(\"(pil|rgb|torch)")
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if opening.search(file.read_text())}
    assert found == {"data/pictures.py"}
