"""Rules of objects: which voxels belong together, and which objects are kept.

Knows the flags of objects as values. Does not know tiles, files or how objects are labelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from unet_ray.errors import InputError, refuse_unknown

Connect = Literal["volume", "slice"]
Ids = Literal["dense", "first-voxel"]


@dataclass(frozen=True)
class Rules:
    """The rules of the objects of a store.

    Attributes:
        connect: objects extend over the ``volume``, or each ``slice`` is an image of its own.
        connectivity: neighbours of a voxel in a volume: 6, 18 or 26. In a slice, 6 stands for the
            4 nearest pixels, and 18 and 26 for all 8.
        split: separate touching objects by a watershed.
        min_size: smaller objects are removed, in voxels.
        fill_holes: add enclosed background to the objects around it.
        exclude_border: remove objects that touch the border of the volume.
        ids: ``dense``: 1, 2, 3, … in the order of the first voxels (z, y, x); ``first-voxel``:
            1 + the linear index of the first voxel in the volume.

    Raises:
        InputError: if a value is not allowed; names it.
    """

    connect: Connect = "volume"
    connectivity: Literal[6, 18, 26] = 6
    split: bool = False
    min_size: int = 0
    fill_holes: bool = False
    exclude_border: bool = False
    ids: Ids = "dense"

    def __post_init__(self) -> None:
        refuse_unknown("connect", self.connect, ("volume", "slice"))
        refuse_unknown("ids", self.ids, ("dense", "first-voxel"))
        if self.connectivity not in (6, 18, 26):
            raise InputError(
                f"connectivity={self.connectivity!r} must be 6, 18 or 26: neighbours over faces, "
                "also over edges, or also over corners."
            )
        if type(self.min_size) is not int or self.min_size < 0:
            raise InputError(f"min_size={self.min_size!r} must be a whole number of voxels.")

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the rules whose `to_json` is `fields`."""
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """Returns the rules for the provenance."""
        return asdict(self)
