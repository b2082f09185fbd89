"""What crosses from one actor to the next arrives as it was."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from unet_ray.engine.parcels import packed, receipts, unpacked
from unet_ray.engine.stages import Carried, Receipt

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
def test_arrays_arrive_as_they_were(data):
    tiles = [Carried(Receipt(n, n / 3, memory=n), one) for n, one in enumerate(data)]
    table = packed(tiles)
    there = [*unpacked(table), *(unpacked(table.slice(n, 1))[0] for n in range(len(data)))]
    for sent, came in zip(tiles * 2, there, strict=True):
        assert came.receipt == sent.receipt and same(came.data, sent.data)


def test_turned_and_sparse_arrays_do_too():
    array = np.arange(120, dtype="u2").reshape(4, 5, 6)
    for one in (array.T, array[:, ::2], array[..., ::-1]):
        (came,) = unpacked(packed([Carried(FAILED, one)]))
        assert np.array_equal(came.data, one)


def test_arrays_are_not_copied_when_they_arrive():
    (came,) = unpacked(packed([Carried(FAILED, np.zeros(9))]))
    assert came.receipt == FAILED
    with pytest.raises(ValueError, match="read-only"):
        came.data[0] = 1


def test_receipts_alone_take_no_data_along():
    assert receipts([Carried(FAILED, np.zeros(9))]).to_pylist() == [vars(FAILED)]
