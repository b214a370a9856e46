"""The picture of features: what is drawn is what the stages give, where they give it; bad input is one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from hetero_kt import cli, models
from hetero_kt.features import features, figure_of, find_pictures, look, read_picture, spread


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    for name, pixels in zip(("b.png", "a.jpg", "c.PNG"), noise, strict=True):
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def bright_corner(size: int) -> Tensor:
    """A textured square in the upper right corner of a grey picture."""
    picture_BCHW = torch.full((1, 3, size, size), 0.5)
    picture_BCHW[:, :, : size // 2, size // 2 :] = torch.rand(3, size // 2, size // 2)
    return picture_BCHW


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 9)}),
        ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "window_size": 4}),
    ],
)
def test_maps_are_means_of_absolute_features_and_lie_where_the_picture_differs(name: str, options: dict) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2, **options).train()
    x = bright_corner(64)
    row = look(name, model, x)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = model.eval().forward_intermediates((x - mean) / std, indices=4, intermediates_only=True)
    for drawn, feature in zip(row.stages, expected, strict=True):
        torch.testing.assert_close(drawn, feature.abs().mean(1))
    for drawn, channels in zip(row.groups, expected[-1].tensor_split(3, 1), strict=True):
        torch.testing.assert_close(drawn, channels.abs().mean(1))
    # Other than the rest: the upper right quarter, and no other.
    first = row.stages[0][0]
    half = len(first) // 2
    quarters = [part.std() for rows in first.split(half) for part in rows.split(half, dim=1)]
    assert max(range(4), key=lambda k: quarters[k]) == 1


def test_a_drawn_map_fills_0_to_1_and_one_outlier_does_not_blacken_the_rest() -> None:
    torch.manual_seed(0)
    map_hw = torch.rand(14, 14)
    drawn = spread(map_hw, 56)
    assert drawn.shape == (56, 56)
    assert drawn.min() < 0.05
    assert drawn.max() > 0.95
    map_hw[3, 4] = 1e4
    assert (spread(map_hw, 56) - drawn).abs().median() < 0.02
    assert spread(torch.full((7, 7), 3.0), 14).abs().max() == 0


def test_the_figure_has_a_block_per_picture_and_a_row_per_model() -> None:
    x = torch.rand(2, 3, 32, 32)
    names = ["cifar:resnet_tiny", "cifar:mobilenetv2_tiny"]
    rows = [look(name, models.build(name, 2), x) for name in names]
    figure = figure_of(x, rows)
    panels = figure.axes
    assert len(panels) == 2 * 2 * 8
    shown = [ax.images[0].get_array() for ax in panels]
    for line, (picture, row) in enumerate((picture, row) for picture in range(2) for row in rows):
        image, *maps = shown[8 * line : 8 * line + 8]
        np.testing.assert_array_equal(image, x[picture].permute(1, 2, 0))
        for drawn, expected in zip(maps, [*row.stages, *row.groups], strict=True):
            np.testing.assert_allclose(drawn, spread(expected[picture], 32))
        assert panels[8 * line].texts[0].get_text() == row.label
    notes = [ax.texts[0].get_text() for ax in panels[1:8]]
    assert notes[0] == "16×16, 16 channels"
    assert notes[3] == "2×2, 96 channels"
    assert notes[4:] == ["channels 1-32", "channels 33-64", "channels 65-96"]
    boxes = [ax.get_position() for ax in panels]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_picture_is_turned_upright_and_cut_square_around_its_middle(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert read_picture(tmp_path / "wide.png", 20).min() == 1
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255  # the upper half is white in the file, the right half when turned
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turned)
    picture = read_picture(tmp_path / "turned.png", 16)
    assert picture[:, :, 8:].min() == 1
    assert picture[:, :, :8].max() == 0
    Image.new("L", (5, 7), 51).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png", 4).unique().tolist() == pytest.approx([0.2])


def test_folders_give_their_pictures_by_name(pictures: Path) -> None:
    found = find_pictures([pictures / "c.PNG", pictures])
    assert [path.name for path in found] == ["c.PNG", "a.jpg", "b.png", "c.PNG"]


def test_the_command_draws_trained_weights_from_a_file_and_a_runs_folder(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    trained = models.build("cifar:resnet_tiny", 3)
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    save_file(trained.state_dict(), export / "student.safetensors")
    drawn = []
    for k, init in enumerate([tmp_path / "run", export / "student.safetensors"]):
        png = tmp_path / "out" / f"{k}.png"
        command = ["features", "cifar:resnet_tiny", "cifar:resnet_tiny", "--images", str(pictures), "--png", str(png)]
        cli.main([*command, "--classes", "3", "--image-size", "32", "--init", str(init), "-"])
        assert capsys.readouterr().out == f"{png}\n"
        with Image.open(png) as opened:
            assert opened.format == "PNG"
            drawn.append(np.asarray(opened.convert("L")).astype(int))
    # Three pictures, two models, 160 dots an inch.
    assert drawn[0].shape[0] > 6 * 1.25 * 160
    # The first model's row is the same, up to its label; the second one is fresh each time.
    row = slice(int(0.62 * 160), int((0.62 + 1.25) * 160))
    assert (drawn[0][row, 120:] == drawn[1][row, 120:]).all()
    assert (drawn[0] != drawn[1]).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cifar:resnet_tiny", "--images", "nowhere"], "--images: nowhere does not exist"),
        (["cifar:resnet_tiny", "--images", "empty"], "holds no pictures"),
        (["cifar:resnet_tiny", "--images", "broken.png"], "cannot be read as a picture"),
        (["cifar:resnet_tiny", "--images", *["good.png"] * 17], "17 pictures are too many"),
        (["cifar:resnet_tiny", "--images", "good.png", "--image-size", "0"], "--image-size 0"),
        (["cifar:resnet_tinny", "--images", "good.png"], "no model is called"),
        (["timm:vgg11", "--images", "good.png"], "VGG cannot be split"),
        (["cifar:resnet_tiny", "--images", "good.png", "--init", "a", "b"], "2 weights for 1 models"),
        (
            ["cifar:resnet_tiny", "--images", "good.png", "--init", "nowhere"],
            "--init nowhere names nowhere, which does not exist",
        ),
        (["cifar:resnet_tiny", "--images", "good.png", "--init", "empty"], "no run in empty has finished"),
        (["cifar:resnet_tiny", "--images", "good.png", "--init", "two"], "two holds 2 models: name one"),
        (["cifar:resnet_tiny", "--images", "good.png", "--pretrained"], "no published weights"),
    ],
)
def test_bad_input_is_one_sentence_and_draws_nothing(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("two/export").mkdir(parents=True)
    for name in "ab":
        Path(f"two/export/{name}.safetensors").touch()
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    Image.new("RGB", (8, 8)).save("good.png")
    with pytest.raises(SystemExit) as stop:
        cli.main(["features", *arguments, "--png", "out.png"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error
    assert error.count("\n") == 1
    assert not Path("out.png").exists()


def test_no_pictures_at_all_is_said() -> None:
    with pytest.raises(ValueError, match="images is empty"):
        features(["cifar:resnet_tiny"], [], "out.png")
