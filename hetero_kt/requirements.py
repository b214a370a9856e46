"""The versions that this package was tried with, as its own metadata states them, against those that are installed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

PACKAGE = "hetero-kt"


def check() -> list[str]:
    """Warnings, a sentence each, about what is newer than anything that was tried.

    Raises:
        ValueError: packages are missing or older than the lowest version that works; one sentence names all of them.
    """
    warnings: list[str] = []
    refused: list[tuple[Requirement, str]] = []
    for requirement, found in _unmet():
        if found and not _too_old(requirement, found):
            warnings.append(
                f"warning: {PACKAGE} was tried with {requirement.name}{requirement.specifier}, and {found} is "
                f"installed: if it fails inside {requirement.name}, {_install([requirement])}."
            )
        else:
            refused.append((requirement, found))
    if refused:
        needed = ", ".join(
            f"{requirement.name}{requirement.specifier} ({found or 'nothing'} is installed)"
            for requirement, found in refused
        )
        raise ValueError(f"{PACKAGE} needs {needed}: {_install([requirement for requirement, _ in refused])}.")
    return warnings


def _unmet() -> Iterator[tuple[Requirement, str]]:
    """What is required and is not installed so, with the version that is; empty where there is none."""
    try:
        stated = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:  # sources that nobody has installed: nothing states what they need
        return
    for requirement in map(Requirement, stated):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue  # an extra's: what needs it says so
        found = installed(requirement.name)
        if not found or not requirement.specifier.contains(found, prereleases=True):
            yield requirement, found


def installed(name: str) -> str:
    """The version of `name` that is installed; empty where it is not."""
    try:
        # `metadata.version` parses the whole file, most of which is a long description: five times slower.
        text = metadata.distribution(name).read_text("METADATA") or ""
        stated = next((line for line in text.splitlines() if line.startswith("Version: ")), "")
        return stated.removeprefix("Version: ").strip() or metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _too_old(requirement: Requirement, found: str) -> bool:
    floors = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
    return any(Version(found) < floor for floor in floors)


def _install(requirements: Sequence[Requirement]) -> str:
    return "pip install " + " ".join(shlex.quote(f"{one.name}{one.specifier}") for one in requirements)
