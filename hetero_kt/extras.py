"""Libraries that only a part of the package needs, and that `pip install 'hetero-kt[EXTRA]'` brings."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load(module: str, extra: str, what: str) -> Any:
    """Import `module`, which the extra called `extra` installs.

    Args:
        what: the option or command that needs it, for the message.

    Raises:
        ValueError: it is not installed; the message has the command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != library:
            raise  # the library is there and lacks one of its own
        raise ValueError(f"{what} needs {library}: install it with pip install 'hetero-kt[{extra}]'.") from error
