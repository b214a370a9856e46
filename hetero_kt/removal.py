"""Removal of files that this package has written, and of nothing else.

A run folder may be a stranger's, or hold what its owner has put there. So a link is never followed, a folder is never
removed with what lies in it, and a file goes only if its name is one that is written there.
"""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

CHECKPOINT = ("DONE", "DONE.part", "rank*.json", "rank*.safetensors", "rank*.part")
"""Names of a checkpoint's files."""
TENSORBOARD = ("events.out.tfevents.*",)
EXPORT = ("*.safetensors", "*.safetensors.part", "*.part")
"""Names beside the folders of an export."""
EXPORT_FOLDER = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "answers.json",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.part",
)
"""Names in an exported model's folder."""


def is_folder(path: Path) -> bool:
    """Whether there is a folder, itself and not behind a link."""
    return path.is_dir() and not path.is_symlink()


def remove_written(folder: Path, names: tuple[str, ...]) -> bool:
    """Remove the files in `folder` whose names match, and the folder if nothing else lies in it; True if it is gone.

    Raises:
        OSError: something cannot be removed.
    """
    if not is_folder(folder):
        return not (folder.exists() or folder.is_symlink())
    others = strangers(folder, names)
    if not others:
        shutil.rmtree(folder)
        return True
    for path in folder.iterdir():
        if path.name not in others:
            path.unlink(missing_ok=True)
    return False


def strangers(folder: Path, names: tuple[str, ...]) -> list[str]:
    """What lies in `folder` and was not written there by this package; the folder's own name where it is none."""
    if not is_folder(folder):
        return [folder.name] if folder.exists() or folder.is_symlink() else []
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_symlink() or not path.is_file() or not any(fnmatchcase(path.name, name) for name in names)
    )
