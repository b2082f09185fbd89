"""Numbers as people write and read them: sizes of memory, durations, extents.

Knows units. Does not know what is measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from unet_ray.errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1 << 10 * n for n, unit in enumerate("kmgt", start=1)}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500 MB`` or ``1048576``.

    Raises:
        InputError: if it is no size or not above zero.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    size = float(found[1]) * _UNITS.get(found[2], 0) if found else 0.0
    if not 1 <= size < 2**63:
        raise InputError(f"memory={text!r} is not a size: write a number and a unit, as in 4GiB.")
    return int(size)


def format_bytes(count: float) -> str:
    """A size for people, in powers of 1024: ``900 MiB``, ``1.50 GiB``."""
    for unit, digits in (("B", 0), ("KiB", 0), ("MiB", 0), ("GiB", 2), ("TiB", 2)):
        if round(count, digits) < 1024:
            return f"{count:.{digits}f} {unit}"
        count /= 1024
    return f"{count:.2f} PiB"


def format_seconds(seconds: float) -> str:
    """A duration for people: ``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if math.isinf(seconds):
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def commas(numbers: Sequence[int]) -> str:
    """Whole numbers as a flag takes them: ``16,384,384``."""
    return ",".join(map(str, numbers))
