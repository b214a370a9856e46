"""Runs of strangers: whatever lies in a run's folder, its report is a report, and the other runs are in it.

`HETERO_KT_FUZZ=10` tries ten times as much.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import damage
import pytest
import yaml
from rich.console import Console
from test_page import Outline
from test_report import recipe, write

from hetero_kt import cli, report
from hetero_kt.config import read_recipe
from hetero_kt.distributed.launch import Ranks
from hetero_kt.folder import check_same_data, finished_steps
from hetero_kt.report import figures, history, page, text
from hetero_kt.report import runs as folders

FILES = ("recipe.yaml", "result.json", "metrics.jsonl", "data.json")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound run, and the one to be damaged."""
    place = tmp_path_factory.mktemp("fuzz") / "runs"
    write(place, recipe("none", 0), 50)
    write(place, recipe("transfer", 0), 53)
    return place


@pytest.fixture(scope="module")
def valid(root: Path) -> dict[str, bytes]:
    """The files of the run."""
    return {name: (_run(root) / name).read_bytes() for name in FILES}


def _run(root: Path) -> Path:
    return root / "toy" / "transfer" / "seed0"


def _valid() -> dict[str, bytes]:
    """The same, for strategies, which know no fixtures."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        folder = write(Path(place), recipe("transfer", 0), 53)
        return {name: (folder / name).read_bytes() for name in FILES}


VALID = _valid()
LINES = [json.loads(line) for line in VALID["metrics.jsonl"].splitlines()]
TREES = {
    "recipe.yaml": yaml.safe_load(VALID["recipe.yaml"]),
    "result.json": json.loads(VALID["result.json"])
    | {"world_size": 2, "zero_stage": {"cnn": 1}, "versions": {"torch": "2.15.0"}, "wall_seconds": 1.5, "device": "cpu"}
    | {"command": "python a.py", "commit": "0123"},
    "data.json": json.loads(VALID["data.json"]),
}


def every_form(root: Path, *, pictures: bool = False) -> Any:
    """All forms of a report, and what they must not hold; the sound run is in it."""
    gathered = report.gather([root], tables=())
    assert any(line.label.startswith("none") and 0 in line.seeds for sheet in gathered.sheets for line in sheet.lines)
    shown = io.StringIO()
    gathered.show(Console(file=shown, width=100))
    markdown, table, html = gathered.markdown(), gathered.csv(), page.html(gathered)
    for form in (shown.getvalue(), markdown, table, html):
        assert all(line.isprintable() for line in form.split("\n"))
        assert len(form.encode()) < 5_000_000
    assert not re.search(r"\]\(|<[a-z!/]|\w://", markdown)
    for row in csv.reader(io.StringIO(table)):
        assert not [cell for cell in row if cell[:1] in "=+@\t\r" and cell[:1]]
        assert not [cell for cell in row if cell.startswith("-") and not re.fullmatch(r"-[\d.e+-]+", cell)]
    assert not {name for name, _ in Outline(html).found} & {"script", "img", "iframe", "object", "link", "base"}
    if pictures:
        assert figures.curves_png(gathered.experiments).startswith(b"\x89PNG")
    return gathered


def judge(root: Path, name: str, content: bytes) -> None:
    """With `content` in place of a file of the run: a report, and readers that say a sentence."""
    folder = _run(root)
    for other, sound in VALID.items():
        (folder / other).write_bytes(sound)
    (folder / name).write_bytes(content)
    with damage.untouched(root):
        damage.only_a_sentence(lambda: every_form(root), errors=())
        damage.only_a_sentence(lambda: read_recipe(folder / "recipe.yaml"))
        damage.only_a_sentence(lambda: finished_steps(folder))
        damage.only_a_sentence(lambda: check_same_data(SAME, OURS, folder, "auto"))
        damage.only_a_sentence(lambda: history.best(folders.read(folder)))


SAME: Any = SimpleNamespace(data_dir="data", data={"pictures": SimpleNamespace(name="digits")})
OURS = {"data": {"pictures": [{"samples": 50}, {"samples": 359}]}, "teachers": {}}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_a_run_stop_no_report(root, name):
    @damage.fuzz(5, content=damage.damaged(VALID[name], VALID["data.json"], VALID["recipe.yaml"]))
    def tried(content: bytes) -> None:
        judge(root, name, content)

    tried()


@pytest.mark.parametrize("name", TREES)
def test_hostile_files_of_a_run_stop_no_report(root, name):
    raw, written = (damage.RAW_YAML, damage.as_yaml) if name == "recipe.yaml" else (damage.RAW_JSON, damage.as_json)

    @damage.fuzz(7, tree=damage.hostile(TREES[name], raw))
    def tried(tree: Any) -> None:
        judge(root, name, written(tree))

    tried()


def test_a_hostile_log_stops_no_report(root):
    @damage.fuzz(7, tree=damage.hostile(LINES, damage.RAW_JSON))
    def tried(tree: Any) -> None:
        lines = tree if isinstance(tree, list) else [tree]
        judge(root, "metrics.jsonl", b"\n".join(map(damage.as_json, lines)))

    tried()


@pytest.mark.parametrize("kind", damage.SPECIAL)
@pytest.mark.parametrize("name", FILES)
def test_special_files_in_a_run_stop_no_report(tmp_path, name, kind):
    write(tmp_path, recipe("none", 0), 50)
    folder = write(tmp_path, recipe("transfer", 0), 53)
    damage.make_special(kind, folder / name)
    gathered = damage.only_a_sentence(lambda: every_form(tmp_path), errors=())
    if kind not in ("dangling", "empty", "zeros") and name != "metrics.jsonl":
        said = [note for note in gathered.notes if f"has a {name} that cannot be read" in note]
        assert [note for note in said if str(folder) in note]
    if kind == "huge" and name == "metrics.jsonl":
        assert any("5,000,000,000 bytes, more than the" in note for note in gathered.notes)


# --- names ---

EVIL = [name for name in damage.NAMES if name]


def test_hostile_names_reach_no_terminal_page_or_spreadsheet(tmp_path):
    write(tmp_path, recipe("none", 0), 50)
    folder = write(tmp_path, recipe("transfer", 0), 53)
    result = json.loads((folder / "result.json").read_text())
    evil = {f"{name}": 1.0 for name in EVIL}
    result |= {
        "command": " ".join(EVIL),
        "device": EVIL[7],
        "commit": EVIL[-5],
        "versions": dict.fromkeys(EVIL, EVIL[3]),
    }
    result["metrics"]["cnn"] |= evil
    result["metrics"] |= {name: {"top1": 1.0, **evil} for name in EVIL[:3]}
    (folder / "result.json").write_text(json.dumps(result))
    with (folder / "metrics.jsonl").open("a") as log:
        for step in (1, 2, 3):
            log.write(json.dumps({"step": step, **{f"{name}/gate": step / 3 for name in EVIL}}) + "\n")
    every_form(tmp_path, pictures=True)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("![a](http://x.invalid/a.png)", r"![a]\(http:\//x.invalid/a.png)"),
        ("[a]: http://x.invalid", r"[a]\: http:\//x.invalid"),
        ("[a][b]", r"[a]\[b]"),
        ("www.x.invalid", r"www\.x.invalid"),
        ("<img src=x>", "&lt;img src=x>"),
        ("a < b [1, 2]", "a < b [1, 2]"),
    ],
)
def test_markdown_fetches_nothing(name, shown):
    assert text._plain(name) == shown


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "＝1"])
def test_a_spreadsheet_takes_no_name_for_a_formula(tmp_path, name):
    folder = write(tmp_path, recipe("none", 0), 50)
    result = json.loads((folder / "result.json").read_text())
    result["metrics"]["cnn"] = {name: -1.5}
    (folder / "result.json").write_text(json.dumps(result))
    (row,) = csv.DictReader(io.StringIO(report.gather([tmp_path], tables=()).csv()))
    assert row["metric"] == f"'{name}"
    assert row["mean"] == "-1.5"  # a number stays one


def test_folders_that_are_not_utf_8_are_reported(tmp_path):
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xffns\x1b[2J"))
    place.mkdir()
    write(place, recipe("none", 0), 50)
    write(place, recipe("transfer", 0), 53)
    every_form(place, pictures=True)


# --- sizes ---


def _logged(folder: Path, names: list[str], steps: int) -> None:
    with (folder / "metrics.jsonl").open("w") as log:
        for step in range(1, steps + 1):
            log.write(json.dumps({"step": step, **dict.fromkeys(names, 0.5 + step / 100)}) + "\n")


def test_a_log_of_three_thousand_transfers_is_cut_and_said(tmp_path):
    write(tmp_path, recipe("none", 0), 50)
    parts = ("gate", "sensitivity", "change", "omega0.0", "omega0.1")
    for seed in range(2):
        folder = write(tmp_path, recipe("transfer", seed), 53)
        _logged(folder, [f"t{i}/{part}" for i in range(3_000) for part in parts], 12)
    found: dict[str, Any] = {}

    def forms() -> None:
        gathered = report.gather([tmp_path], tables=())
        found["html"] = page.html(gathered)
        figures.curves_png(gathered.experiments)

    damage.only_a_sentence(forms, errors=())
    assert len(found["html"]) < 5_000_000
    assert "transfers were logged: the first 20 are drawn." in found["html"]
    assert "more than 1,000 names: the others are left out." in found["html"]


def test_twenty_thousand_metrics_are_cut_and_said(tmp_path):
    write(tmp_path, recipe("none", 0), 50)
    folder = write(tmp_path, recipe("transfer", 0), 53)
    _logged(folder, ["cnn/loss", *(f"m{i}" for i in range(20_000))], 20)
    result = json.loads((folder / "result.json").read_text())
    result["metrics"]["cnn"] |= {f"m{i}": 1.0 for i in range(20_000)}
    result["metrics"] |= {f"model{i}": {"top1": 1.0} for i in range(3_000)}
    (folder / "result.json").write_text(json.dumps(result))
    gathered = damage.only_a_sentence(lambda: every_form(tmp_path), errors=())
    (note,) = [note for note in gathered.notes if str(folder) in note]
    assert "3,001 models, of which the first 50 are shown" in note
    assert "20,002 metrics of a model, of which the first 100 are shown" in note


def test_a_log_without_an_end_is_read_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "VALUES", 100)
    _logged(tmp_path, ["cnn/loss"], 200)
    series, said = history.read(tmp_path)
    assert 40 < len(series["cnn/loss"]) <= 50
    assert said.endswith("has a metrics.jsonl of more than 100 numbers: the rest is left out.")


# --- what a finished run's report may not do ---


def test_a_report_that_cannot_be_written_is_a_sentence_and_raises_nothing(tmp_path, monkeypatch):
    write(tmp_path, recipe("none", 0), 50)
    for name in ("report.md", "report.html", "curves.png"):
        (tmp_path / name).mkdir()
    shown = io.StringIO()
    report.finish(tmp_path, Console(file=shown, width=200))
    for name in ("report.md", "report.html", "curves.png"):
        assert f"{name} cannot be written (Is a directory): the runs have finished, and" in shown.getvalue()
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "report.html", "report.md", "toy"]


def test_no_mistake_of_ours_in_a_report_ends_a_finished_run(tmp_path, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such font\nand a second line")

    write(tmp_path, recipe("none", 0), 50)
    shown = io.StringIO()
    monkeypatch.setattr(figures, "curves_png", fails)
    report.finish(tmp_path, Console(file=shown, width=200))
    assert "curves.png cannot be written (RuntimeError: no such font): the runs have finished" in shown.getvalue()
    assert (tmp_path / "report.md").is_file()
    monkeypatch.setattr(report, "gather", fails)
    report.finish(tmp_path, Console(file=shown, width=200))
    assert "cannot be reported (RuntimeError: no such font)" in shown.getvalue()


def test_a_report_is_nothing_to_a_terminal_that_has_gone(tmp_path):
    write(tmp_path, recipe("none", 0), 50)

    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    report.finish(tmp_path, Console(file=Gone()))
    assert (tmp_path / "report.md").is_file()


def test_an_old_report_stays_where_a_new_one_fails(tmp_path, monkeypatch, capsys):
    write(tmp_path, recipe("none", 0), 50)
    old = tmp_path / "report.html"
    old.write_text("old")

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path), "--table", "none", "--html", str(old)])
    assert f"error: {old} cannot be written (No space left on device)" in capsys.readouterr().err
    assert old.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["report.html", "toy"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_modes_of_a_report_follow_the_umask(tmp_path, umask):
    write(tmp_path, recipe("none", 0), 50)
    before = os.umask(umask)
    try:
        report.finish(tmp_path, Console(quiet=True))
    finally:
        os.umask(before)
    for name in ("report.md", "report.html", "curves.png"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_a_target_may_be_a_device_a_link_or_a_pipe_without_a_reader(tmp_path, capsys):
    write(tmp_path, recipe("none", 0), 50)
    cli.main(["report", str(tmp_path), "--table", "none", "--csv", "/dev/null"])
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    (tmp_path / "real.csv").touch()
    (tmp_path / "link.csv").symlink_to("real.csv")
    cli.main(["report", str(tmp_path), "--table", "none", "--csv", str(tmp_path / "link.csv")])
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text().startswith("table,row")
    for kind in ("fifo", "loop", "folder"):
        place = damage.make_special(kind, tmp_path / kind)
        with pytest.raises(SystemExit):
            damage.only_a_sentence(lambda place=place: cli.main(["report", str(tmp_path), "--csv", str(place)]))
        assert f"error: {place} cannot be written" in capsys.readouterr().err


# --- the log of a run that goes on ---


@pytest.fixture
def opened(tmp_path: Path, ranks: Any) -> Any:
    """What a run from step 5 on keeps of the log in `tmp_path`, or what it says."""
    return lambda: ranks(1).run(keeps, str(tmp_path))[0]


def keeps(folder: str) -> str:
    import torch

    from hetero_kt.log import Log

    log = Log(Path(folder), 5, 10, "toy", Ranks(0, 1, 0, torch.device("cpu")), evaluated_again=False)
    try:
        with log:
            pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return (Path(folder) / "metrics.jsonl").read_text()


SOUND = '{"step": 1, "a/loss": 1.0}\n{"step": 5, "a/loss": 2.0}\n'


def test_a_line_that_a_kill_cut_short_goes_without_a_word(tmp_path, opened):
    (tmp_path / "metrics.jsonl").write_text(SOUND + '{"step": 6}\n{"step": 7, "a/l')
    assert opened() == SOUND
    assert not list(tmp_path.glob("*damaged*"))


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b"\xff\xfe", b'{"a": 1}', b'{"step": "x"}', b"[" * 100_000, b"\0" * 4096]
)
def test_a_log_with_damaged_lines_is_set_aside_and_the_run_goes_on(tmp_path, opened, line):
    first, second = SOUND.encode().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(first + line + b"\n" + second)
    assert opened() == SOUND
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == first + line + b"\n" + second
    (tmp_path / "metrics.jsonl").write_bytes(line + b"\n" + second)
    opened()
    assert (tmp_path / "metrics.jsonl.damaged2").read_bytes() == line + b"\n" + second


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop"])
def test_what_is_no_log_is_one_sentence_of_all_ranks(tmp_path, opened, kind):
    path = damage.make_special(kind, tmp_path / "metrics.jsonl")
    start = time.monotonic()
    said = opened()
    assert said.startswith(f"UserError: {path} cannot be read (")
    assert said.endswith("): move it away and start again.")
    assert time.monotonic() - start < 10


def test_a_file_in_place_of_tensorboard_is_told_as_that(tmp_path, opened):
    (tmp_path / "tensorboard").write_text("precious")
    said = opened()
    assert said.startswith(f"UserError: {tmp_path / 'tensorboard'} is no folder")
    assert (tmp_path / "tensorboard").read_text() == "precious"
