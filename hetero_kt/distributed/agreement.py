"""Errors that all ranks learn of together, so that none waits in a collective for one that has left."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from hetero_kt.messages import first_line


class UserError(ValueError):
    """Wrong input, said in one sentence; raised on all ranks."""


class Unwritable(ValueError):
    """A file of the run that the first rank alone writes; the others go on, until whoever started them ends them."""

    def __init__(self, path: object, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        super().__init__(
            f"{path} cannot be written ({reason}): make room, or mend the folder, and start the same command again, "
            "which goes on from the last complete checkpoint."
        )


@contextmanager
def agreed() -> Iterator[None]:
    """What goes wrong on any rank inside is raised on every rank. Collective; inside, nothing is collective that some
    rank may not reach.

    Raises:
        UserError: the sentence of the first rank that had something to say.
    """
    problem = ""
    try:
        yield
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or 'a file'} cannot be used ({error.strerror or error}): mend that and start again."
    except Exception as error:  # nobody's input: the sentence ends all ranks, the traceback says where to look
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    found = next((rank for rank, text in enumerate(problems) if text), None)
    if found is not None:
        raise UserError(f"rank {found}: {problems[found]}" if found else problems[0])
