"""Parts of an input that a volume leaves out: named on standard error, or refused.

Knows sentences and the numbers in file names. Independent of file formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from unet_ray.errors import InputError
from unet_ray.units import warn


class Omission(NamedTuple):
    """A part of a file or folder that a volume leaves out.

    Attributes:
        part: its description; continues a sentence that starts with the path.
        remedy: how to have it read.
    """

    part: str
    remedy: str


PALETTE = Omission(
    "colour numbers are read, not the colours of the palette", "convert it to greyscale or RGB"
)


def report_omissions(path: str, omissions: Iterable[Omission], strict: bool) -> None:
    """Prints one sentence for each omission to standard error.

    Args:
        path: the file or folder.
        omissions: the parts of it that are left out.
        strict: refuse the first omission instead.

    Raises:
        InputError: if `strict` and there is an omission.
    """
    omissions = list(omissions)
    if strict and omissions:
        part, remedy = omissions[0]
        raise InputError(f"{path}: {part}, which --strict refuses; {remedy}.")
    for sentence in sentences_of(path, omissions):
        warn(sentence)


def sentences_of(path: str, omissions: Iterable[Omission]) -> list[str]:
    """Returns one sentence for each omission of the file or folder at `path`."""
    return [f"{path}: {part}; {remedy}." for part, remedy in omissions]


def merge_omissions(by_slice: Iterable[tuple[str, Omission]]) -> tuple[Omission, ...]:
    """Returns the omissions of a folder, each with the slices that it concerns.

    Args:
        by_slice: the name of a slice with one of its omissions.
    """
    names: dict[Omission, list[str]] = {}
    for name, omission in by_slice:
        names.setdefault(omission, []).append(name)
    return tuple(
        Omission(f"{part} in {first}{f' and {len(others)} other slices' if others else ''}", remedy)
        for (part, remedy), (first, *others) in names.items()
    )


def gap_in(names: Sequence[str]) -> Omission | None:
    """Returns the gap in the numbers of some slices; None if there is no gap.

    The slices are numbered if their names differ in one number only. They may be numbered in steps,
    such as 10, 20, 30.

    Args:
        names: file names in the order of the slices.
    """
    numbers = _numbers(names)
    steps = np.diff(numbers)
    if not steps.size or (step := int(steps.min())) < 1 or (steps % step).any():
        return None
    missing = int((steps // step - 1).sum())
    if not missing:
        return None
    before = names[int(np.argmax(steps > step))]
    return Omission(
        f"slice numbers are missing, {missing} in all, the first after {before}",
        "add these slices or renumber the files",
    )


def _numbers(names: Sequence[str]) -> list[int]:
    """Returns the only number in which the names differ; empty if they differ otherwise."""
    parts = [re.split(r"([0-9]+)", name) for name in names]
    if len({tuple(part[::2]) for part in parts}) > 1:
        return []
    varying = [column for column in zip(*parts, strict=True) if len({*column}) > 1]
    return [int(number) for number in varying[0]] if len(varying) == 1 else []
