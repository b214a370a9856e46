"""What is imported is declared, and an environment that does not fit is told so in one sentence."""

from __future__ import annotations

import ast
import sys
import time
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hetero_kt import cli, options, requirements
from hetero_kt.config import Recipe

TOP = Path(__file__).parents[1]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
USERS = [one for name, group in OPTIONAL.items() if name not in ("test", "dev", "bench") for one in group]
DECLARED = {
    canonicalize_name(one.name): one
    for one in map(Requirement, [*PROJECT["dependencies"], *USERS])
    if one.name != PROJECT["name"]  # an extra that brings another
}


@cache
def imported() -> list[tuple[Path, str]]:
    """(file, dotted name) of every import of ours from somebody else, also of those within functions."""
    found: list[tuple[Path, str]] = []
    for folder in ("hetero_kt", "launchers"):
        for file in (TOP / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [name.name for name in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
                if isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{name}" for name in names]
                for name in names:
                    if name.partition(".")[0] not in {*sys.stdlib_module_names, "hetero_kt"}:
                        found.append((file, name))
    return found


def test_every_import_is_declared() -> None:
    distributions = metadata.packages_distributions()
    for file, name in imported():
        module = name.partition(".")[0]
        owners = {canonicalize_name(one) for one in distributions.get(module, [module])}
        assert owners & DECLARED.keys(), (
            f"{file.relative_to(TOP)} imports {name}, which pyproject.toml does not declare"
        )


def test_every_dependency_has_a_floor_and_a_private_interface_has_a_ceiling() -> None:
    for requirement in DECLARED.values():
        if requirement.name == "hetero-kt":  # an extra that includes another
            continue
        assert ">=" in {one.operator for one in requirement.specifier}, requirement
    private = {name.partition(".")[0] for _, name in imported() if "._" in name}
    assert private >= {"timm", "torch"}, "the two that are known are found"
    for module in private | {"deepspeed", "transformers"}:
        assert "<" in {one.operator for one in DECLARED[module].specifier}, module


def test_the_list_of_make_floors_names_tests_that_exist() -> None:
    for line in (TOP / "tests" / "floors.txt").read_text().splitlines():
        file, _, test = line.partition("::")
        text = (TOP / file).read_text()
        assert not test or f"def {test.partition('[')[0]}(" in text, line


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that are said to be installed, by name; the rest is as it is. An empty one is missing."""
    faked: dict[str, str] = {}
    truth = requirements.installed
    monkeypatch.setattr(requirements, "installed", lambda name: faked[name] if name in faked else truth(name))
    stated = [*PROJECT["dependencies"], 'pytest>=99; extra == "test"', 'nowhere>=1; python_version < "3"']
    monkeypatch.setattr(metadata, "requires", lambda name: stated)
    return faked


def test_this_environment_fits(installed: dict[str, str]) -> None:
    assert requirements.check() == []


def test_what_is_too_old_or_missing_is_one_sentence(installed: dict[str, str]) -> None:
    installed.update({"tyro": "0.9.20", "timm": ""})
    with pytest.raises(
        ValueError, match=r"^hetero-kt needs timm\S+ \(nothing is installed\), tyro>=0.9.32 \(0.9.20 is"
    ) as e:
        requirements.check()
    assert str(e.value).endswith(" 'tyro>=0.9.32'.")
    assert "pip install 'timm<1.1,>=1.0.31'" in str(e.value)


def test_what_is_newer_than_tried_is_a_warning(installed: dict[str, str]) -> None:
    installed["timm"] = "2.0.1.dev0"
    (warning,) = requirements.check()
    assert warning.startswith("warning: hetero-kt was tried with timm<1.1,>=1.0.31, and 2.0.1.dev0 is installed: ")


def test_a_build_s_local_version_counts_as_its_release(installed: dict[str, str]) -> None:
    installed["torch"] = "2.6.0+cu124"
    assert requirements.check() == []
    installed["torch"] = "2.5.1+cu124"
    with pytest.raises(ValueError, match=r"torch.* \(2.5.1\+cu124 is installed\)"):
        requirements.check()


def test_sources_that_nobody_installed_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert requirements.check() == []


def test_a_launcher_says_it_before_it_reads_its_options(
    installed: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(*_: object) -> None:
        raise AssertionError("from inside a library")

    monkeypatch.setattr(options, "resolve", resolve)
    installed["tyro"] = "0.9.20"
    with pytest.raises(SystemExit) as end:
        options.parse({"default": lambda: Recipe("none")}, ["--help"])  # type: ignore[call-arg]
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: hetero-kt needs tyro>=0.9.32 (0.9.20 is installed): pip install")


def test_the_command_says_it(installed: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    installed["torch"] = "2.1.0"
    with pytest.raises(SystemExit) as end:
        cli.main(["table", "--list"])
    assert end.value.code == 2
    assert "(2.1.0 is installed): pip install 'torch" in capsys.readouterr().err


def test_it_costs_less_than_30_ms() -> None:
    def seconds() -> float:
        before = time.process_time()
        requirements.check()
        return time.process_time() - before

    assert min(seconds() for _ in range(5)) < 0.03


def test_a_version_is_the_one_that_the_library_states() -> None:
    for name in ("torch", "timm", "pyyaml"):
        assert requirements.installed(name) == metadata.version(name)
    assert requirements.installed("no-such-package") == ""
