"""Loops that NumPy cannot express, compiled by numba; knows nothing of what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compiles `function` at its first call; it runs without the GIL.

    The machine code is kept on disk. Where no folder can be written (an install that is
    read-only, and no home) each process compiles for itself, which takes it about a second.
    """
    try:
        return cast(Function, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # numba finds no place for its cache, and says so while decorating
        return cast(Function, numba.njit(nogil=True)(function))
