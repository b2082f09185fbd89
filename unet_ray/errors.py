"""Exceptions of unet-ray, each with the exit code of a command that it ends.

Independent of every other module.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UnetRayError(Exception):
    """Base class of the errors whose message is shown to users. Never raised itself."""

    exit_code = 1


class InputError(UnetRayError, ValueError):
    """Invalid usage or input, detected before any work starts. Nothing was written."""

    exit_code = 2


class RunError(UnetRayError, RuntimeError):
    """A failure during a run. Committed results stay, and the next run uses them."""

    exit_code = 1


class LostError(RunError):
    """Another run has taken over the output, so this run writes nothing more."""


class ChangedError(RunError):
    """The input or the model has changed since the run began, so this run stops."""


class VoxelError(RunError):
    """The input of a tile cannot be segmented, and a retry would fail again."""


class DamageError(RunError):
    """A stored file is damaged. The message names the file, or continues from its name."""


class QuarantinedError(RunError):
    """Some tiles failed too often. All others are done, and the next run retries only these."""

    exit_code = 3


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the candidate most like `word`, or ``""``."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def refuse_unknown(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuses a value that is not one of the choices.

    Raises:
        InputError: naming the choices and the nearest.
    """
    choices = list(choices)
    if value not in choices:
        hint = nearest(value, choices) if isinstance(value, str) else ""
        raise InputError(f"{name}={value!r} must be one of {', '.join(choices)}{hint}.")


def refuse_empty(out: object) -> None:
    """Refuses an empty name of an output, which would mean the current folder.

    Raises:
        InputError: if `out` is ``""``.
    """
    if out == "":
        raise InputError("out='' names no folder; name one, such as --out result.")


def refuse_below_file(path: Path) -> None:
    """Refuses an output path if one of its parent folders is a file.

    Raises:
        InputError: with the name of that file.
    """
    for folder in path.parents:
        if folder.is_file():
            raise InputError(f"{path}: cannot be written, since {folder} is a file, not a folder.")


def reason(error: BaseException) -> str:
    """Returns the start of an error's message: one line, at most 300 characters, no full stop."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = repr(error) if isinstance(error, LookupError) else text  # str() is only the key
    return (text.splitlines() or [type(error).__name__])[0][:300].rstrip(". ")


@contextmanager
def refusing(path: object, content: str) -> Iterator[None]:
    """Turns any error inside into a refusal of a file, since parsers of arbitrary bytes may fail.

    Errors of unet-ray pass unchanged.

    Args:
        path: name of the file.
        content: the expected content, such as ``a PNG image``.

    Raises:
        InputError: if the file cannot be read or parsed; names the file and the cause.
    """
    try:
        yield
    except UnetRayError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}.") from error
    except Exception as error:
        raise InputError(f"{path} cannot be read as {content}: {reason(error)}.") from error
