"""Compiles loops that NumPy cannot express, with numba. Independent of what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compiles `function` at its first call. The compiled code releases the GIL.

    The compiled code is cached on disk. Without a writable folder (a read-only installation and
    no home folder), each process compiles again, which takes about a second.
    """
    try:
        return cast(Function, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # raised at decoration if no folder for the cache is writable
        return cast(Function, numba.njit(nogil=True)(function))
