"""Arrow tables that carry tiles through Ray's object store from one step to the next.

Knows receipts, and arrays as bytes, shape and dtype. Does not know what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa

from unet_ray.engine.stages import Receipt, TileState

RECEIPT = tuple(field.name for field in fields(Receipt))


def packed(tiles: Sequence[TileState]) -> pa.Table:
    """Returns a table with one row per tile.

    Args:
        tiles: with data that is an array, a mapping of names to arrays, or None.
    """
    forms, contents = zip(*(_flat(tile.data) for tile in tiles), strict=True)
    table = receipts(tiles).append_column("form", pa.array(forms, pa.string()))
    return table.append_column("bytes", pa.array(contents, pa.large_binary()))


def receipts(tiles: Sequence[TileState]) -> pa.Table:
    """Returns a table with one row per tile, without its data."""
    return pa.table({name: [getattr(tile.receipt, name) for tile in tiles] for name in RECEIPT})


def unpacked(table: pa.Table) -> list[TileState]:
    """Returns the tiles of a table. Their arrays are read-only views of the table's memory."""
    rows = zip(*(table[name].to_pylist() for name in RECEIPT), strict=True)
    data = map(_array, table["form"].to_pylist(), table["bytes"])
    return [TileState(Receipt(*row), array) for row, array in zip(rows, data, strict=True)]


def _flat(data: Any) -> tuple[str, bytes]:
    """Returns dtypes and shapes as JSON, and the bytes of all arrays."""
    if data is None:
        return "null", b""
    named = data if isinstance(data, Mapping) else {"": data}
    form = {name: (array.dtype.str, array.shape) for name, array in named.items()}
    return json.dumps(form), b"".join(np.ascontiguousarray(a).data for a in named.values())


def _array(form: str, value: pa.LargeBinaryScalar) -> Any:
    """Reverses `_flat`."""
    if (types := json.loads(form)) is None:
        return None
    named, start, content = {}, 0, value.as_buffer()
    for name, (dtype, shape) in types.items():
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        named[name] = np.frombuffer(content[start : start + size], dtype).reshape(shape)
        start += size
    return named.get("", named)
