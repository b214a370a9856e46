"""The public face: what `hetero_kt` exports, how little it imports, and how soon the command line answers."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import hetero_kt
from hetero_kt import cli, extras, models, provenance, report
from hetero_kt.models import cifar, names, swin, xvlm

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = {
    *("AdapterConfig", "CRD", "DKD", "Data", "Distill", "Exchange", "FBT", "FCFD", "FitNet", "KD", "MergeNet", "Mix"),
    *("Model", "NKD", "OFA", "Optim", "RKD", "Recipe", "Schedule", "Site", "Teacher", "Text", "TfKD", "Transfer"),
    *("Transform", "USKD", "XVLM", "__version__", "factorise", "list_weights", "main", "plain_state_dict"),
}
"""A name leaves this list only as CONTRIBUTING.md says."""

HEAVY = ("torch", "numpy", "deepspeed", "timm", "transformers", "datasets", "torchvision", "matplotlib", "sklearn")


def imported(code: str) -> tuple[set[str], float]:
    """The heavy libraries that `code` imports in a new process, and the CPU seconds that it takes."""
    told = f"import sys\n{code}\nprint('heavy', *(name for name in {HEAVY} if name in sys.modules))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    line = next(line for line in ended.stdout.splitlines() if line.startswith("heavy"))
    return set(line.split()[1:]), seconds


def test_the_public_names_are_these_and_each_can_be_imported() -> None:
    assert set(hetero_kt.__all__) == PUBLIC
    for name in hetero_kt.__all__:
        assert getattr(hetero_kt, name) is not None
        assert name in dir(hetero_kt)
    with pytest.raises(AttributeError, match="no attribute 'Exchnge'"):
        _ = hetero_kt.Exchnge


def test_type_checkers_see_every_public_name() -> None:
    source = ast.parse((ROOT / "hetero_kt" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in source.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    found = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    found |= {node.target.id for node in block.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    assert found == PUBLIC


def test_importing_the_package_costs_nothing() -> None:
    empty, base = imported("pass")
    heavy, seconds = imported("import hetero_kt")
    assert heavy == empty == set()
    assert seconds - base < 0.05


def test_a_recipe_is_written_without_torch() -> None:
    heavy, _ = imported("from hetero_kt import Data, Distill, MergeNet, Model, Recipe, Transfer, main")
    assert heavy == set()


def test_an_own_loop_needs_neither_deepspeed_nor_timm_nor_transformers() -> None:
    heavy, _ = imported("from hetero_kt import Exchange, Site, factorise, plain_state_dict\nimport hetero_kt.nn.losses")
    assert heavy == {"torch", "numpy"}


def answer(*words: str) -> tuple[int, str, float]:
    """Status, words and CPU seconds of a launcher."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "launchers/cifar_mergenet.py", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        ended.returncode,
        ended.stdout + ended.stderr,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "--models.resnet50.name"),
        (["--stesp", "3"], 2, "--steps"),
        (["--models.resnet50.name", "timm:resnet5"], 2, "use timm:resnet50"),
        (["--variant", "papr"], 2, "use paper"),
        (["--zero-config", "ds_configs/zero9.json"], 2, "does not exist"),
    ],
)
def test_the_command_line_answers_within_two_cpu_seconds(words: list[str], status: int, said: str) -> None:
    ended, text, seconds = answer(*words)
    assert ended == status, text
    assert said in text
    assert seconds < 2


def test_names_read_from_timms_source_are_those_of_its_registry() -> None:
    swin.register()
    registered = {*timm.list_models(), *timm.list_pretrained()}
    bare = {name for name in names._source() if "." not in name}
    assert bare == set(timm.list_models())
    assert all(models.is_known(f"timm:{name}") for name in registered)
    assert not models.is_known("timm:resnet50.nobodys")
    assert set(names.CIFAR) == set(cifar.MODELS)
    assert set(names.XVLMS) == set(xvlm.known())


def test_a_missing_extra_is_one_sentence_with_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(ValueError, match=r"^digits needs sklearn: install it with pip install 'hetero-kt\[demo\]'\.$"):
        extras.load("sklearn.datasets", "demo", "digits")


def test_a_report_without_matplotlib_is_tables_and_a_page_and_says_what_draws_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "r" / "none" / "seed0"
    run.mkdir(parents=True)
    result = {"recipe": "r", "control": "none", "seed": 0, "steps": 4, "metrics": {"m": {"top1": 50.0}}}
    (run / "result.json").write_text(json.dumps(result))
    (run / "metrics.jsonl").write_text('{"step": 4, "m/test_top1": 50.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.finish(tmp_path / "r")
    said = " ".join(capsys.readouterr().out.split())
    assert "needs matplotlib: install it with pip install 'hetero-kt[report]'" in said
    assert (tmp_path / "r" / "report.html").is_file()
    assert not (tmp_path / "r" / "curves.png").exists()
    with pytest.raises(SystemExit) as stop:
        cli.main(["features", "cifar:resnet_tiny", "--images", "x.png", "--png", "out.png"])
    assert stop.value.code == 2
    assert "features needs matplotlib" in capsys.readouterr().err


def git(folder: Path, *words: str) -> None:
    settings = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *settings, *words], check=True, capture_output=True)


def test_provenance_tells_the_packages_commit_from_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout, user = tmp_path / "checkout", tmp_path / "user"
    for folder in (checkout / "hetero_kt", user / "venv" / "site-packages" / "hetero_kt"):
        folder.mkdir(parents=True)
        (folder / "provenance.py").touch()
    (user / ".gitignore").write_text("venv/\n")
    (user / "train.py").touch()
    for folder in (checkout, user):
        git(folder, "init", "-q")
        git(folder, "add", ".")
        git(folder, "commit", "-qm", "one")

    def seen(package: Path, started: Path) -> tuple[bool, bool]:
        monkeypatch.setattr(provenance, "PACKAGE", package)
        monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
        monkeypatch.setattr(sys, "argv", [str(started)])
        return bool(provenance.own_commit()), bool(provenance.user_commit())

    installed = user / "venv" / "site-packages" / "hetero_kt"
    assert seen(installed, user / "train.py") == (False, True), "the user's commit is not the package's"
    assert seen(checkout / "hetero_kt", checkout / "launchers" / "x.py") == (True, False)
    assert seen(checkout / "hetero_kt", user / "train.py") == (True, True)
    (user / "train.py").write_text("changed")
    assert provenance.user_commit().endswith("+")
    assert seen(tmp_path / "nowhere" / "hetero_kt", tmp_path / "x.py") == (False, False)
