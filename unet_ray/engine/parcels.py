"""Tiles as tables of Arrow, in which they cross Ray's object store from one step to the next.

Knows receipts, and arrays as bytes, shape and dtype; does not know what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa

from unet_ray.engine.stages import Carried, Receipt

RECEIPT = tuple(field.name for field in fields(Receipt))


def packed(tiles: Sequence[Carried]) -> pa.Table:
    """A row for each tile.

    Args:
        tiles: whose data is an array, some by their names, or None.
    """
    forms, bytes_of = zip(*(_flat(tile.data) for tile in tiles), strict=True)
    table = receipts(tiles).append_column("form", pa.array(forms, pa.string()))
    return table.append_column("bytes", pa.array(bytes_of, pa.large_binary()))


def receipts(tiles: Sequence[Carried]) -> pa.Table:
    """A row for each tile, without its data."""
    return pa.table({name: [getattr(tile.receipt, name) for tile in tiles] for name in RECEIPT})


def unpacked(table: pa.Table) -> list[Carried]:
    """The tiles of a table; their arrays are views of it, and cannot be written to."""
    rows = zip(*(table[name].to_pylist() for name in RECEIPT), strict=True)
    data = map(_array, table["form"].to_pylist(), table["bytes"])
    return [Carried(Receipt(*row), one) for row, one in zip(rows, data, strict=True)]


def _flat(data: Any) -> tuple[str, bytes]:
    """How arrays are to be made of bytes, and these."""
    if data is None:
        return "null", b""
    named = data if isinstance(data, Mapping) else {"": data}
    form = {name: (array.dtype.str, array.shape) for name, array in named.items()}
    return json.dumps(form), b"".join(np.ascontiguousarray(a).data for a in named.values())


def _array(form: str, value: pa.LargeBinaryScalar) -> Any:
    if (told := json.loads(form)) is None:
        return None
    named, start, whole = {}, 0, value.as_buffer()
    for name, (dtype, shape) in told.items():
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        named[name] = np.frombuffer(whole[start : start + size], dtype).reshape(shape)
        start += size
    return named.get("", named)
