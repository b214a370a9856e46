"""What a start was asked for, noted in the run's folder until it has been done.

`--resume never` and `--resume PATH` say where one start begins. If that start dies early, the next one is called with
`--resume auto` (a batch system's restart is), and would go on from the checkpoint that the first was to leave. So the
first thing that a start does in its folder is to write `start.json`, in one go; `auto` does what it says. It goes when
the folder has been made ready, or when the start was refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hetero_kt.documents import mapping, read_json, text
from hetero_kt.files import sync, write_whole

NAME = "start.json"


@dataclass(frozen=True)
class Intent:
    """Where a start was to begin."""

    resume: str
    """`never`, or the absolute path of a checkpoint."""
    opened: bool = False
    """The folder is ready, and has no checkpoint of its own yet: this one's is another run's."""


def read(folder: Path) -> Intent | None:
    """What the last start in `folder` was asked for, if that has not been done.

    Raises:
        ValueError: the note is damaged.
    """
    file = folder / NAME
    try:
        note = mapping(read_json(file), "the file")
        return Intent(text(note.get("resume"), "resume"), note.get("opened") is True)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): begin again with --resume never.") from error


def write(folder: Path, intent: Intent) -> None:
    """Note it, for any later start.

    Raises:
        OSError: the folder cannot be written.
    """
    write_whole(folder / NAME, json.dumps({"resume": intent.resume, "opened": intent.opened}) + "\n")


def clear(folder: Path) -> None:
    """It has been done, or withdrawn.

    Raises:
        OSError: the folder cannot be written.
    """
    (folder / NAME).unlink(missing_ok=True)
    sync(folder)
