"""A picture of what models make of pictures: FBT's appendix, Fig. 2.

For each picture a row per model: the picture, the feature after each of the four stages, and the last feature in
three groups of channels. Convolutions keep to places, attention and MLPs spread out; the stages of a hierarchical
model differ more than those of a uniform one; channels of an attention model look at different places.

Shape suffixes: B pictures, C channels, H x W pixels.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt import files, models
from hetero_kt.data.pictures import MOST_BYTES, Damaged, upright
from hetero_kt.messages import first_line
from hetero_kt.models.teacher import weights_of
from hetero_kt.nn.stages import Layout, split, to_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = 3
MOST = 16
"""Pictures in one figure."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FRESH = "-"
"""In place of a weights file: the model as it is initialised."""
INK, FAINT = "#333333", "#8a8a8a"


@dataclass(frozen=True)
class Row:
    """One model's maps of all pictures."""

    label: str
    stages: tuple[Tensor, ...]
    """Of the four stages, (B, h, w) each: the mean over channels of the absolute feature."""
    groups: tuple[Tensor, ...]
    """The same of each third of the last stage's channels."""
    layouts: tuple[Layout, ...]


def features(
    names: Sequence[str],
    images: Sequence[str | Path],
    png: str | Path,
    *,
    inits: Sequence[str] = (),
    pretrained: bool = False,
    image_size: int = 224,
    classes: int = 1000,
) -> None:
    """Draw the features of the models called `names` (as in `hetero_kt.models.build`) on pictures, into a PNG.

    Args:
        images: picture files, or folders of some.
        inits: one for each model, or none at all: a safetensors file, the folder of a finished run that exported
            one model, or `-` for fresh weights.
        pretrained: the weights that timm publishes; for the models whose `init` is `-`, where there are inits.
        image_size: pictures are scaled to it by their shorter side and cut square around their middle.
        classes: outputs of the classifiers, as the weights have them.

    Raises:
        ValueError: for pictures that are missing or cannot be read, and where `build` or `split` do.
    """
    if inits and len(inits) != len(names):
        raise ValueError(
            f"--init names {len(inits)} weights for {len(names)} models: give one for each, with {FRESH} for fresh ones"
        )
    if image_size < 1:
        raise ValueError(f"--image-size {image_size}: a picture has at least 1 pixel")
    found = find_pictures(images)
    pictures_BCHW = torch.stack([read_picture(path, image_size) for path in found])
    rows = []
    for name, init in zip(names, inits or [FRESH] * len(names), strict=True):
        own = "" if init == FRESH else str(weights_of(init, "--init"))
        model = models.build(name, classes, pretrained=pretrained and not own, image_size=image_size, init=own)
        label = name.removeprefix("timm:")
        rows.append(look(f"{label}\n{'/'.join(Path(init).parts[-2:])}" if own else label, model, pictures_BCHW))
    save(figure_of(pictures_BCHW, rows), png)


def find_pictures(images: Sequence[str | Path]) -> list[Path]:
    """The picture files among files and folders, a folder's in the order of their names.

    Raises ValueError for a path that is missing, a folder without pictures and more pictures than a figure takes.
    """
    found: list[Path] = []
    for path in map(Path, images):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise ValueError(f"--images: {path} holds no pictures ({', '.join(SUFFIXES)}): name a folder that does")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"--images: {path} does not exist: name picture files, or folders of some")
    if not found:
        raise ValueError("--images is empty: name picture files, or folders of some")
    if len(found) > MOST:
        raise ValueError(f"--images: {len(found)} pictures are too many for one figure: name {MOST} at most")
    return found


def read_picture(path: Path, size: int) -> Tensor:
    """The middle of a picture, (3, size, size) in 0 .. 1.

    Raises ValueError for a file that is no picture, or a damaged one.
    """
    try:
        picture = upright(files.read_regular(path, MOST_BYTES), "it")
    except (OSError, Damaged) as error:
        raise ValueError(
            f"--images: {path} cannot be read as a picture ({first_line(error)}): leave it out, or name a JPEG, PNG or"
            " WebP file"
        ) from error
    picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    pixels_HWC = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return pixels_HWC.permute(2, 0, 1) / 255


def look(label: str, model: nn.Module, pictures_BCHW: Tensor) -> Row:
    """What a model makes of pictures with values in 0 .. 1, normalised as its published weights expect them.

    A model without published weights gets ImageNet's statistics.

    Raises ValueError where the model cannot be split into stages.
    """
    published: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    mean = torch.tensor(published.get("mean") or IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    std = torch.tensor(published.get("std") or IMAGENET_DEFAULT_STD).view(3, 1, 1)
    stages = split(model, pictures_BCHW.shape[-1])
    model.eval()
    strengths = []
    with torch.no_grad():
        x = (pictures_BCHW - mean) / std
        for k, layout in enumerate(stages.layouts, start=1):
            x = stages.stage(k, x)
            strengths.append(to_map(x, layout).abs())
    thirds = strengths[-1].tensor_split(GROUPS, dim=1)
    return Row(label, _means(strengths), _means(thirds), stages.layouts)


def _means(strengths: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(strength_BCHW.mean(1) for strength_BCHW in strengths)


def spread(map_hw: Tensor, size: int) -> Tensor:
    """A map drawn large, (size, size) in 0 .. 1; a constant one is 0.

    The lowest and highest hundredth are cut off: single outlying tokens would leave the rest black.
    """
    low, high = torch.quantile(map_hw.flatten().float(), torch.tensor([0.01, 0.99]))
    scaled_hw = ((map_hw - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
    return F.interpolate(scaled_hw[None, None], (size, size), mode="bilinear", align_corners=False)[0, 0]


def figure_of(pictures_BCHW: Tensor, rows: Sequence[Row]) -> Figure:
    """Per picture a block of rows, one per model: picture, four stages, three groups of channels."""
    from matplotlib.figure import Figure

    pictures, size = len(pictures_BCHW), pictures_BCHW.shape[-1]
    panel, gap, top, left = 1.25, 0.22, 0.62, 0.42  # inches
    columns = [left + panel * k + 0.08 * k + gap * ((k > 0) + (k > 4)) for k in range(8)]
    step, between = panel + 0.24, 0.2
    height = top + step * len(rows) * pictures + between * (pictures - 1) + 0.05
    width = columns[-1] + panel + 0.1
    figure = Figure(figsize=(width, height))

    def panel_at(row: int, column: int, block: int) -> Axes:
        up = height - top - step * row - between * block - panel
        ax = figure.add_axes((columns[column] / width, up / height, panel / width, panel / height))
        ax.set_axis_off()
        return ax

    for block, picture_CHW in enumerate(pictures_BCHW):
        for index, row in enumerate(rows):
            line = block * len(rows) + index
            ax = panel_at(line, 0, block)
            ax.imshow(picture_CHW.permute(1, 2, 0).numpy(), interpolation="bilinear")
            label = "\n".join(_wrapped(part) for part in row.label.splitlines())
            ax.text(
                -0.06, 0.5, label, transform=ax.transAxes, rotation=90, ha="right", va="center", fontsize=7.5, color=INK
            )
            maps = [*row.stages, *row.groups]
            for column, maps_Bhw in enumerate(maps, start=1):
                ax = panel_at(line, column, block)
                ax.imshow(spread(maps_Bhw[block], size).numpy(), cmap="viridis", vmin=0, vmax=1)
                note = _note(row, column)
                ax.text(0.5, -0.03, note, transform=ax.transAxes, ha="center", va="top", fontsize=6, color=FAINT)
    _headings(figure, columns, panel, width, height, top)
    return figure


def _wrapped(name: str) -> str:
    """A long name on several lines, broken behind its underscores and slashes."""
    pieces = re.sub(r"([_/])", r"\1 ", name)
    return "\n".join(line.replace(" ", "") for line in textwrap.wrap(pieces, 24))


def _note(row: Row, column: int) -> str:
    if column <= 4:
        layout = row.layouts[column - 1]
        return f"{layout.grid[0]}×{layout.grid[1]}, {layout.channels} channels"
    ends = [0]
    for group in torch.empty(row.layouts[-1].channels).tensor_split(GROUPS):
        ends.append(ends[-1] + len(group))
    return f"channels {ends[column - 5] + 1}-{ends[column - 4]}"


def _headings(figure: Figure, columns: Sequence[float], panel: float, width: float, height: float, top: float) -> None:
    from matplotlib.lines import Line2D

    def write(x: float, down: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - down / height, text, ha="center", va="center", color=INK, **style)

    for first, last, text in ((1, 4, "mean of |feature| over channels"), (5, 7, "last feature, channels in thirds")):
        start, end = columns[first], columns[last] + panel
        write((start + end) / 2, 0.17, text, fontsize=9, fontweight="bold")
        y = 1 - 0.31 / height
        figure.add_artist(Line2D([start / width, end / width], [y, y], color=FAINT, linewidth=0.7))
    labels = ["picture", *(f"stage {k}" for k in (1, 2, 3, 4)), *(f"third {k}" for k in (1, 2, 3))]
    for column, text in zip(columns, labels, strict=True):
        write(column + panel / 2, top - 0.13, text, fontsize=8)


def save(figure: Figure, png: str | Path) -> None:
    """Write the figure, and the folder it lies in."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    png = Path(png)
    png.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(png, format="png", dpi=160, facecolor="white")
