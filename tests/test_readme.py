"""Python blocks of the README and of docs/ run as they stand, and their commands name options that exist."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from test_launchers import LAUNCHERS, load
from torch import nn

from hetero_kt import cli, options
from hetero_kt.distributed import launch
from hetero_kt.models import build
from hetero_kt.run import run

ROOT = Path(__file__).parents[1]
PAGES = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


RECIPE, TAUGHT, PLAIN = blocks(PAGES[ROOT / "README.md"], "python")
ENGINES, PLAIN_FBT, ENGINES_FBT = blocks(PAGES[ROOT / "docs" / "own_loop.md"], "python")
LINES = [line for block in blocks(TEXT, "bash") for line in block.replace("\\\n", " ").splitlines()]
STAGE_3 = '{"stage": 3, "stage3_param_persistence_threshold": 0}'


def test_the_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("plain.py")
    assert names["log"] == {} or "transfer_seconds" in names["log"]
    assert names["exchange"].step == 40
    ordinary = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    ordinary.load_state_dict(torch.load("narrow.pt"))
    torch.testing.assert_close(ordinary(names["x"]), names["narrow"](names["x"]))


def test_the_plain_loop_of_fbt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student is an ordinary model, knows more than chance, and the teacher kept what it knew."""
    frozen = "teacher.requires_grad_(False).eval()\n"
    assert frozen in PLAIN_FBT
    before = "before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}\n"
    (tmp_path / "plain.py").write_text(PLAIN_FBT.replace(frozen, frozen + before))
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("plain.py")
    for name, tensor in names["teacher"].state_dict().items():
        assert torch.equal(tensor, names["before"][name]), name
    assert all(p.grad is not None for p in [*names["connector"].parameters(), *names["contrasts"].parameters()])
    ordinary = build("cifar:resnet_tiny", 10)
    ordinary.load_state_dict(torch.load("student.pt"))
    ordinary.eval()
    with torch.no_grad():
        right = ordinary(names["x"][1000:]).argmax(1) == names["y"][1000:]
    assert right.float().mean() > 0.3


def run_block(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(source, names)
    shapes = {name: tuple(value.shape) for name, value in names["weights"].items()}
    for engine in names["engines"]:
        engine.destroy()
    return {"shapes": shapes, "updates": [path.updates for path in names["exchange"].paths]}


@pytest.mark.parametrize("stage", ['{"stage": 2}', STAGE_3])
def test_the_loop_of_engines(ranks: Any, stage: str) -> None:
    assert '{"stage": 2}' in ENGINES
    for result in ranks(2).run(run_block, ENGINES.replace('{"stage": 2}', stage)):
        assert result["shapes"] == {"0.weight": (32, 64), "0.bias": (32,), "2.weight": (10, 32), "2.bias": (10,)}
        assert result["updates"] == [2, 2]


def run_fbt_block(source: str) -> dict[str, Any]:
    """Terms, the average's weights (loaded by a model of the same name), and those without it."""
    names: dict[str, Any] = {}
    exec(source, names)
    build("cifar:mixer_tiny", 10).load_state_dict(names["weights"])
    own = names["params"].state_dict(names["engines"][0])
    for engine in names["engines"]:
        engine.destroy()
    classifier = "head.weight"
    return {
        "terms": sorted(names["terms"]),
        "average": names["weights"][classifier].numpy(),
        "own": own[classifier].numpy(),
    }


@pytest.mark.parametrize("stage", ['{"stage": 2}', STAGE_3])
def test_the_loop_of_engines_of_fbt(ranks: Any, stage: str) -> None:
    assert '{"stage": 2}' in ENGINES_FBT
    first, second = ranks(2).run(run_fbt_block, ENGINES_FBT.replace('{"stage": 2}', stage))
    pairs = ("fused_to_student", "teacher_to_fused", "teacher_to_student")
    assert first["terms"] == [f"{pair}/{loss}_loss" for pair in pairs for loss in ("infonce", "ofa")]
    assert (first["average"] == second["average"]).all()
    assert (first["average"] != first["own"]).any()


def run_recipe(source: str, variant: str, folder: str) -> bool:
    names: dict[str, Any] = {"__name__": "mine"}
    exec(source, names)
    variants = {name: value for name, value in names.items() if name in ("default", "teacher")}
    arguments = ["--variant", variant, "--debug", "--output-dir", folder]
    return run(*options.resolve(variants, arguments), launch.start(), launch.StopSignal())


@pytest.mark.parametrize(
    ("source", "variant", "exported"),
    [
        (RECIPE, "default", {"resnet", "mobilenetv2"}),
        (TAUGHT, "default", {"student", "student_ema"}),
        (TAUGHT, "teacher", {"resnet"}),
    ],
    ids=["mutual", "taught", "teacher"],
)
def test_the_recipes(ranks: Any, tmp_path: Path, source: str, variant: str, exported: set[str]) -> None:
    assert ranks(2).run(run_recipe, source, variant, str(tmp_path)) == [True, True]
    assert {file.stem for file in tmp_path.glob("*/*/seed0/export/*.safetensors")} == exported


def test_the_taught_recipe_finds_the_teacher_that_it_trains_before() -> None:
    names: dict[str, Any] = {"__name__": "mine"}
    exec(TAUGHT, names)
    variants = {name: names[name] for name in ("default", "teacher")}
    recipe, chosen = options.resolve(variants, ["--first", "teacher", "--compare", "none", "kd"])
    (before,) = options.runs_before(recipe, chosen, variants)
    ((_, teacher),) = recipe.method.teachers.items()  # type: ignore[union-attr]
    ((_, trained),) = before.models.items()
    assert teacher.init == f"run:{before.name}"
    assert teacher.name == trained.name


def test_every_launcher_command_has_options_that_exist() -> None:
    commands = [line for line in LINES if "launchers/" in line]
    assert len(commands) > 12
    for command in commands:
        words = shlex.split(command.partition("&&")[0])
        at = next(i for i, word in enumerate(words) if word.startswith("launchers/"))
        arguments = [word for word in words[at + 1 :] if word != "--help"]
        variants = load(ROOT / words[at]).VARIANTS
        options.runs_before(*options.resolve(variants, arguments), variants)


def test_options_in_tables_exist() -> None:
    """Those of distillation, as a row of a table gives them."""
    variants = load(ROOT / "launchers" / "cifar_fbt.py").VARIANTS
    rows = "\n".join(line for line in TEXT.splitlines() if line.startswith("|"))
    found = [text for text in re.findall(r"`(--(?:method|models|data)\.[^`]*)`", rows) if "NAME" not in text]
    found += [f"--method.{text}" for text in re.findall(r"`((?:kd|ofa|fitnet|fbt)\.[a-z]+ [^`]+)`", rows)]
    assert len(found) > 20
    for text in found:
        options.resolve(variants, shlex.split(text))


def test_every_command_of_hetero_kt_has_options_that_exist() -> None:
    commands = [line for line in LINES if line.startswith("hetero-kt ")]
    commands += re.findall(r"^\$ (hetero-kt .*)$", TEXT.replace("\\\n", " "), re.MULTILINE)
    known = {"recipes", "plan", "sites", "report", "table", "export", "shards", "features", "ask"}
    assert {command.split()[1] for command in commands} == known
    for command in commands:
        cli._parser().parse_args(shlex.split(command)[1:])


def test_no_python_block_is_left_untried() -> None:
    assert len(blocks(TEXT, "python")) == 6


def anchors(page: Path) -> set[str]:
    """What a link into the page may name, as GitHub makes it of a heading."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", PAGES[page]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        place, _, anchor = link.partition("#")
        if place.startswith("https:"):
            continue
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_every_page_is_linked_from_the_readme() -> None:
    for page in PAGES:
        assert page.name == "README.md" or f"](docs/{page.name})" in PAGES[ROOT / "README.md"]


def test_every_launcher_is_listed() -> None:
    for launcher in LAUNCHERS:
        assert f"`{launcher.name}`" in PAGES[ROOT / "README.md"]


def test_what_is_recommended_listens_to_no_other_machine() -> None:
    """TensorBoard listens on localhost unless it is told otherwise."""
    texts = [file.read_text() for file in (*ROOT.glob("*.md"), *ROOT.glob("slurm/*"), *ROOT.glob("launchers/*.py"))]
    commands = [line for text in texts for line in text.splitlines() if "tensorboard --" in line]
    assert commands
    for words in ("--bind_all", "--host", "0.0.0.0"):
        assert not any(words in line for line in commands)
    sources = "".join(file.read_text() for file in (ROOT / "hetero_kt").rglob("*.py"))
    assert not re.search(r"http\.server|socketserver|\.serve_forever|uvicorn|flask", sources), "and nothing here serves"
