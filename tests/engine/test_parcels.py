"""Tiles pass unchanged from one actor to the next."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from unet_ray.engine.parcels import packed, receipts, unpacked
from unet_ray.engine.stages import Receipt, TileState

DTYPES = st.sampled_from(["u1", "<u2", ">u2", "<i4", "<f4", "<f8", "?"])
ARRAYS = arrays.arrays(DTYPES, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
DATA = st.none() | ARRAYS | st.dictionaries(st.text(min_size=1), ARRAYS)
FAILED = Receipt(3, 0.25, "no voxel \U0001f52c", "Traceback", "alone", 1 << 40, 5)


def same(one, other):
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if one is None or other is None:
        return one is other
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@given(st.lists(DATA, min_size=1, max_size=4))
def test_arrays_arrive_unchanged(data):
    tiles = [TileState(Receipt(n, n / 3, memory=n), item) for n, item in enumerate(data)]
    table = packed(tiles)
    arrived = [*unpacked(table), *(unpacked(table.slice(n, 1))[0] for n in range(len(data)))]
    for sent, received in zip(tiles * 2, arrived, strict=True):
        assert received.receipt == sent.receipt and same(received.data, sent.data)


def test_non_contiguous_arrays_arrive_unchanged():
    array = np.arange(120, dtype="u2").reshape(4, 5, 6)
    for view in (array.T, array[:, ::2], array[..., ::-1]):
        (received,) = unpacked(packed([TileState(FAILED, view)]))
        assert np.array_equal(received.data, view)


def test_arrays_are_not_copied_when_they_arrive():
    (received,) = unpacked(packed([TileState(FAILED, np.zeros(9))]))
    assert received.receipt == FAILED
    with pytest.raises(ValueError, match="read-only"):
        received.data[0] = 1


def test_a_table_of_receipts_contains_no_data():
    assert receipts([TileState(FAILED, np.zeros(9))]).to_pylist() == [vars(FAILED)]
