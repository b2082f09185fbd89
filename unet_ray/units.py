"""Text for people: memory sizes, durations, extents, and lines on a terminal.

Knows units. Does not know what the numbers measure.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unet_ray.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1 << 10 * n for n, unit in enumerate("kmgt", start=1)}


def parse_bytes(text: str) -> int:
    """Returns the bytes of a size such as ``8GiB``, ``500 MB`` or ``1048576``.

    Raises:
        InputError: if `text` is not a size of at least 1 byte.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    size = float(match[1]) * _UNITS.get(match[2], 0) if match else 0.0
    if not 1 <= size < 2**63:
        raise InputError(f"memory={text!r} is not a size: write a number and a unit, as in 4GiB.")
    return int(size)


def format_bytes(count: float) -> str:
    """Formats a size in powers of 1024: ``900 MiB``, ``1.50 GiB``."""
    for unit, digits in (("B", 0), ("KiB", 0), ("MiB", 0), ("GiB", 2), ("TiB", 2)):
        if round(count, digits) < 1024:
            return f"{count:.{digits}f} {unit}"
        count /= 1024
    return f"{count:.2f} PiB"


def format_seconds(seconds: float) -> str:
    """Formats a duration: ``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if math.isinf(seconds):
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def commas(numbers: Sequence[int]) -> str:
    """Formats whole numbers as command line flags take them: ``16,384,384``."""
    return ",".join(map(str, numbers))


def printable(text: str) -> str:
    r"""Returns `text` with every control character and invalid byte as an escape, such as ``\x1b``.

    Names of files may hold any character, and some change a terminal. Newlines and tabs stay.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def warn(line: str) -> None:
    """Prints a line to standard error, after ``unet-ray:``."""
    print(printable(f"unet-ray: {line}"), file=sys.stderr, flush=True)


def text_of(table: Table, width: int = 400) -> str:
    """Draws a table as plain text, at most `width` characters wide, without trailing spaces."""
    from rich.console import Console

    # In a notebook rich would add an output of its own.
    console = Console(width=width, color_system=None, highlight=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(table, markup=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def parse_workers(text: str | None) -> int | tuple[int, int] | None:
    """Workers from ``4`` or ``2:8``; None stays None.

    Raises:
        InputError: if the text is neither, or a number is below 1.
    """
    if text is None:
        return None
    numbers = _integers(text.split(":"))
    if numbers is None or len(numbers) > 2 or numbers[0] < 1 or numbers[-1] < numbers[0]:
        raise InputError(f"workers={text!r} must be a number above zero or a range, as in 2:8.")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def parse_tile(text: str, flag: str = "tile") -> tuple[int, int, int]:
    """A core ``(z, y, x)`` from ``16,384,384``.

    Args:
        text: the value of a flag.
        flag: its name, for the message.

    Raises:
        InputError: if the text is not three numbers above zero.
    """
    numbers = _integers(text.split(","))
    if numbers is None or len(numbers) != 3 or min(numbers) < 1:
        raise InputError(f"{flag}={text!r} must be three numbers above zero, as in 16,512,512.")
    return numbers[0], numbers[1], numbers[2]


def parse_patch(text: str | int | None) -> tuple[int, ...] | None:
    """A patch ``(y, x)`` from ``572`` or ``1,572,572``, or ``(z, y, x)``; None stays None.

    Raises:
        InputError: if the text is neither.
    """
    if text is None:
        return None
    numbers = _integers(str(text).split(","))
    if numbers and len(numbers) == 1:
        numbers = [1, *numbers, *numbers]
    if numbers is None or len(numbers) != 3 or min(numbers) < 1:
        raise InputError(
            f"patch={text!r} must be one number, as in 380, or Z,Y,X, as in 1,380,572; in 2-D, Z "
            "is 1."
        )
    return tuple(numbers) if numbers[0] > 1 else (numbers[1], numbers[2])


def parse_voxel_size(text: str | None) -> tuple[float, float, float] | None:
    """A voxel size ``(z, y, x)`` from ``0.05,0.004,0.004``; None stays None.

    Raises:
        InputError: if the text is not three numbers above 0.
    """
    if text is None:
        return None
    try:
        z, y, x = (float(number) for number in text.split(","))
    except ValueError:
        z = y = x = 0.0
    if not all(0 < size < math.inf for size in (z, y, x)):
        raise InputError(
            f"voxel_size={text!r} must be three sizes above 0, as in 0.05,0.004,0.004."
        )
    return z, y, x


def parse_region(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and stop of a box, both ``(z, y, x)``, from ``z0:z1,y0:y1,x0:x1``.

    Raises:
        InputError: if the text is not three ascending ranges.
    """
    axes = [_integers(part.split(":")) for part in text.split(",")]
    form = f"region={text!r} must be three ranges of voxels, as in 0:16,0:512,128:640"
    if len(axes) != 3 or any(axis is None or len(axis) != 2 for axis in axes):
        raise InputError(f"{form}.")
    start, stop = zip(*(axis for axis in axes if axis), strict=True)
    if any(a < 0 or b <= a for a, b in zip(start, stop, strict=True)):
        raise InputError(f"{form}: each from 0 or more up to a larger number.")
    return start, stop


def _integers(parts: Sequence[str]) -> list[int] | None:
    try:
        return [int(part) for part in parts]
    except ValueError:
        return None
