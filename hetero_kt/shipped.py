"""The files that are installed beside the modules: launchers, ZeRO blocks and batch files.

A checkout has them in folders at its top, where users look for them; a wheel installs the same folders as packages
below `hetero_kt`. Both are read through importlib.resources, so that nothing depends on where the package lies.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from hetero_kt.config import nearest

SUFFIXES = {"launchers": ".py", "ds_configs": ".json", "slurm": ".sbatch"}
"""Folders of shipped files, each with the suffix of those that a user names."""

BATCH_PARTS = ("job.sh",)
"""Files that every batch file reads from its own folder."""


def folder(kind: str) -> Path:
    """The installed folder of one of `SUFFIXES`."""
    return Path(str(files(f"hetero_kt.{kind}")))


def names(kind: str) -> list[str]:
    """The names in a folder, without the suffix."""
    suffix = SUFFIXES[kind]
    return sorted(p.name.removesuffix(suffix) for p in folder(kind).glob(f"*{suffix}") if not p.name.startswith("_"))


def zero_file(path: str) -> Path | None:
    """The file that a recipe's `zero` names: as the path stands, else the shipped block `ds_configs/NAME.json`."""
    here = Path(path)
    if here.is_file():
        return here
    if here.parent == Path("ds_configs"):
        shipped = folder("ds_configs") / here.name
        return shipped if shipped.is_file() else None
    return None


def launcher_file(name: str) -> Path:
    """The file of the launcher called `name`: that of ./launchers/, else the installed one.

    Raises:
        ValueError: no launcher has this name; the nearest names are given.
    """
    for place in (Path("launchers"), folder("launchers")):
        file = place / f"{name}.py"
        if file.is_file() and name.isidentifier():
            return file
    raise ValueError(f"launcher {name} does not exist: use {nearest(name, names('launchers'))}.")


def launcher_words(name: str) -> list[str]:
    """What follows `python` to start the launcher called `name`: its path in a checkout, else `-m` and its module.

    Raises:
        ValueError: as `launcher_file`.
    """
    launcher_file(name)
    local = Path("launchers") / f"{name}.py"
    return [str(local)] if local.is_file() else ["-m", f"hetero_kt.launchers.{name}"]


def find_launcher(text: str) -> list[str]:
    """What follows `python` to start what a user calls `text`: a file of their own, or a shipped launcher by its name.

    Raises:
        ValueError: there is neither; the nearest names are given.
    """
    if Path(text).is_file():
        return [text]
    name = text.removeprefix("launchers/").removeprefix("hetero_kt.launchers.").removesuffix(".py")
    if name in names("launchers"):
        return launcher_words(name)
    raise ValueError(
        f"launcher {text} does not exist: give a file, or one of those installed: {nearest(name, names('launchers'))}."
    )


def deepspeed_words(words: Sequence[str]) -> list[str]:
    """The same start for the `deepspeed` command, which calls `-m` `--module`."""
    return ["--module" if i == 0 and word == "-m" else word for i, word in enumerate(words)]


def about(kind: str, name: str) -> str:
    """One line on a shipped file: the first sentence of a launcher, the content of a block, the purpose of a batch
    file."""
    text = (folder(kind) / f"{name}{SUFFIXES[kind]}").read_text(encoding="utf-8")
    if kind == "launchers":
        paragraph = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        return " ".join(paragraph.split())
    if kind == "ds_configs":
        return " ".join(text.split())
    comments = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    return re.split(r"(?<=[.;:])\s", comments)[0].rstrip(":;")


def copy(name: str, to: Path) -> list[Path]:
    """Copy a shipped file beside the user.

    A launcher and a block go into `to`, a batch file into `to/slurm`, together with the file that it reads there.

    Args:
        name: as `hetero-kt recipes` lists it, with or without folder and suffix.
        to: an existing folder, or one to make.

    Returns:
        The new files, the one asked for first.

    Raises:
        ValueError: no file has this name, another file lies there already, or the folder cannot be written.
    """
    kind, bare = _identify(name)
    target = to / "slurm" if kind == "slurm" else to
    wanted = [f"{bare}{SUFFIXES[kind]}", *(BATCH_PARTS if kind == "slurm" else ())]
    pairs = [(folder(kind) / one, target / one) for one in wanted]
    for source, new in pairs:
        if new.exists() and (not new.is_file() or new.read_bytes() != source.read_bytes()):
            raise ValueError(f"{new} exists already and differs: move it away, or copy into another folder with --to.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for source, new in pairs:
            shutil.copyfile(source, new)
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be written ({error.strerror}): name a folder with --to.") from error
    return [new for _, new in pairs]


def _identify(name: str) -> tuple[str, str]:
    """(folder, bare name) of a shipped file."""
    for kind, suffix in SUFFIXES.items():
        bare = name.removeprefix(f"{kind}/").removesuffix(suffix)
        if bare in names(kind):
            return kind, bare
    known = [one for kind in SUFFIXES for one in names(kind)]
    raise ValueError(f"no recipe, block or batch file is called {name}: use {nearest(name, known)}.")
