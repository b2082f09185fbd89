"""The ways a command can fail, each with its exit code; knows nothing about what failed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UnetRayError(Exception):
    """Anything that unet-ray tells a user in one sentence. Never raised itself."""

    exit_code = 1


class InputError(UnetRayError, ValueError):
    """Bad usage or bad input, found before any work is done: nothing was written."""

    exit_code = 2


class RunError(UnetRayError, RuntimeError):
    """A failure while running: what was committed before it stays and is used by the next run."""

    exit_code = 1


class LostError(RunError):
    """Another run has taken the output over, so this one writes nothing more."""


class VoxelError(RunError):
    """What a tile reads cannot be segmented, however often it is tried."""


class DamageError(RunError):
    """What is wrong with a stored file, in words that go on from its name."""


class QuarantinedError(RunError):
    """Some tiles failed too often; all others are done, and the next run tries only these."""

    exit_code = 3


def nearest(word: str, known: Iterable[str]) -> str:
    """Gives ``" (did you mean 'x'?)"`` for the known word nearest to `word`, or ``""``."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def refuse_below_file(path: Path) -> None:
    """Refuses an output path one of whose folders is a file.

    Raises:
        InputError: naming that file.
    """
    for folder in path.parents:
        if folder.is_file():
            raise InputError(f"{path}: cannot be written, since {folder} is a file, not a folder.")
