"""The hetero-kt command, as a user types it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from hetero_kt import cli


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "toy" / "none" / "seed0"
    (folder / "export").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: toy\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "cnn/loss": 1.0, "cnn/test_top1": 40.0}\n')
    metrics = {"cnn": {"top1": 40.0, "loss": 1.0}}
    result = {"recipe": "toy", "control": "none", "seed": 0, "steps": 1, "metrics": metrics}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "export" / "cnn.safetensors").write_bytes(b"")
    return folder


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_sites_lists_names_kinds_matrices_and_parameters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    cli.main(["sites", "cifar:mobilenetv2_tiny", "--classes", "7"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["classifier.weight", "linear", "7", "x", "256", "1,792"] in lines
    assert ["blocks.2.1.conv_pwl.weight", "conv", "48", "x", "144", "6,912"] in lines


def test_sites_keeps_the_brackets_of_a_third(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    cli.main(["sites", "timm:vit_tiny_patch16_224"])
    assert "blocks.11.attn.qkv.weight[v]" in capsys.readouterr().out


def test_sites_of_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cifar:resnet50" in fails(capsys, "sites", "cifar:resnet5O")


def test_report_prints_and_writes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    forms = ("markdown", "csv", "html", "curves")
    cli.main(["report", str(run), *(word for form in forms for word in (f"--{form}", str(out / form)))])
    assert "40.00" in capsys.readouterr().out
    assert "| none | 1 | 40.00 |" in (out / "markdown").read_text()
    assert "toy: cnn,none,,top1,,40.0,0.0,1,,,,,last" in (out / "csv").read_text()
    assert "40.00" in (out / "html").read_text()
    assert (out / "curves").read_bytes().startswith(b"\x89PNG")
    assert "there is nothing to draw" in fails(capsys, "report", str(run), "--png", str(out / "png"))


def test_report_of_a_table_that_does_not_exist(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "table mergenet-9 does not exist: use mergenet-" in fails(
        capsys, "report", str(run), "--table", "mergenet-9"
    )


def test_report_of_a_missing_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "report", "/no/such").startswith("error: /no/such does not exist")


def test_export_says_where(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["export", str(run)])
    assert capsys.readouterr().out == f"{run / 'export' / 'cnn.safetensors'}\n"


def test_export_of_an_unfinished_run_says_what_to_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "result.json").unlink()
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(run)])
    assert stop.value.code == 1
    assert "start its launcher again with the same options" in capsys.readouterr().err


def test_export_that_was_deleted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "export" / "cnn.safetensors").unlink()
    assert "has lost its export: start its launcher again with --resume never." in fails(capsys, "export", str(run))


def test_plan_runs_the_launcher_with_its_options(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launcher = tmp_path / "launcher.py"
    launcher.write_text("import sys; print(sys.argv[1:]); sys.exit(len(sys.argv) == 2)")
    cli.main(["plan", str(launcher), "--variant", "cpu", "--steps", "3"])
    assert capfd.readouterr().out == "['--variant', 'cpu', '--steps', '3', '--plan']\n"
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(launcher)])
    assert stop.value.code == 1


def test_plan_of_a_missing_launcher_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, "plan", "launchers/cifar_fbd.py")
    assert said.startswith("error: launcher launchers/cifar_fbd.py does not exist: give a file, or one of those ")
    assert "installed: cifar_fbt" in said


def test_plan_finds_an_installed_launcher_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[list[str]] = []

    def note(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(cli.subprocess, "run", note)
    cli.main(["plan", "xvlm_vqa", "--variant", "world"])
    assert started[0][1:] == ["-m", "hetero_kt.launchers.xvlm_vqa", "--variant", "world", "--plan"]


def test_help_lists_the_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if line.startswith("    ")] == [
        "recipes",
        "sites",
        "plan",
        "table",
        "report",
        "shards",
        "export",
        "ask",
        "features",
    ]


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "sites" in fails(capsys, "site")


def test_a_folder_of_pictures_becomes_shards_without_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from hetero_kt.data.gallery import Folders

    source, out = tmp_path / "plain", tmp_path / "train2014"
    source.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), (200, 0, 0)).save(source / f"{name}.png")
    cli.main(["shards", str(source), str(out), "--workers", "1"])
    assert f"{out}: 2 pictures in 1 shards, " in capsys.readouterr().out
    gallery = Folders(tmp_path, ["train2014/a.png", "train2014/b.png"], "stop")
    assert gallery.picture("train2014/b.png").getpixel((0, 0)) == (200, 0, 0)
    assert "--validation goes with classes" in fails(
        capsys, "shards", str(source), str(tmp_path / "more"), "--validation", str(source)
    )


def test_export_lists_folders_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "export" / "bert"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    cli.main(["export", str(run)])
    assert str(folder / "model.safetensors") in capsys.readouterr().out.splitlines()


def test_sites_of_an_xvlm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["sites", "xvlm:tiny", "--image-size", "64"])
    printed = capsys.readouterr().out
    for name in ("vision_encoder.blocks.1.attn.qkv.weight[v]", "crossattention.self.value.weight", "64 x 64"):
        assert name in printed
