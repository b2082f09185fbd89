"""Decodes Zarr arrays on a disk with tensorstore, which needs less CPU time than zarr.

Knows the optional package tensorstore. Does not know axes, or how a read is split. Arrays that
tensorstore cannot decode are left to zarr, which returns the same voxels.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.storage.places import Place

# Of Zarr v2: tensorstore decodes chunks of these without the checksum at their end.
_UNCHECKED = ("bz2", "gzip", "zlib")

Decode = Callable[[Sequence[slice]], NDArray[Any]]
"""Returns the voxels of a window, one slice per axis of the array."""


def fast_decoder(place: Place, array: Any) -> Decode | None:
    """Returns a function that decodes windows of an array; None if only zarr can.

    All chunks of a window may be in memory at once, as stored and as decoded.

    Args:
        place: of the array.
        array: the same array, opened by zarr. Its metadata are used, not those in the file, which
            may have changed since.
    """
    tensorstore = library()
    if tensorstore is None or not isinstance(place, Path):
        return None
    spec = _spec(place, array)
    if (spec["metadata"].get("compressor") or {}).get("id") in _UNCHECKED:
        return None
    try:
        opened = tensorstore.open(spec, read=True, open=True).result()
    except (ValueError, NotImplementedError):  # an unknown codec or data type
        return None

    def decode(window: Sequence[slice]) -> NDArray[Any]:
        return np.asarray(opened[tuple(window)].read().result())

    return decode


def library() -> Any:
    """Returns the module `tensorstore`, or None if it is not installed."""
    try:
        return importlib.import_module("tensorstore")
    except ImportError:
        return None


def _spec(place: Path, array: Any) -> dict[str, Any]:
    """The description of an array for tensorstore, without a cache of decoded chunks."""
    from zarr.core.buffer import default_buffer_prototype

    driver, file = {2: ("zarr", ".zarray"), 3: ("zarr3", "zarr.json")}[array.metadata.zarr_format]
    stored = array.metadata.to_buffer_dict(default_buffer_prototype())[file]
    return {
        "driver": driver,
        "kvstore": {"driver": "file", "path": f"{place}/"},
        "metadata": json.loads(stored.to_bytes()),
        "assume_metadata": True,
        "context": {"cache_pool": {"total_bytes_limit": 0}},
    }
