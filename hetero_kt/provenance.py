"""Where a run's numbers come from: the versions and commits that `result.json` names."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from hetero_kt import __version__

PACKAGE = Path(__file__).resolve().parent

LIBRARIES = ("torch", "deepspeed", "timm", "transformers")


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the libraries that compute."""
    return {"hetero_kt": __version__, "python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def own_commit() -> str:
    """This package's commit, with a + when tracked files were changed; empty where it does not run from its own
    checkout."""
    top = _toplevel(PACKAGE)
    own = top is not None and top / "hetero_kt" == PACKAGE and _git(PACKAGE, "ls-files", "--error-unmatch", __file__)
    return _commit(PACKAGE) if own else ""


def user_commit() -> str:
    """The commit of the repository that holds the file which was started, with a + when tracked files were changed;
    empty where there is none, and for this package's own checkout."""
    started = Path(sys.argv[0]).resolve().parent
    if not started.is_dir():
        return ""
    top = _toplevel(started)
    installed = top is not None and (top / "hetero_kt" == PACKAGE or started.is_relative_to(PACKAGE))
    return "" if top is None or installed else _commit(started)


def _commit(folder: Path) -> str:
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    return head + ("+" if head and _git(folder, "status", "--porcelain", "-uno") else "")


def _toplevel(folder: Path) -> Path | None:
    top = _git(folder, "rev-parse", "--show-toplevel")
    return Path(top) if top else None


def _git(folder: Path, *words: str) -> str:
    """What git prints; empty where git, or a repository, is missing."""
    try:
        ended = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return ended.stdout.strip()
