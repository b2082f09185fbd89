"""Stacks: shapes, allowed probabilities, cells and labels, and reading in pieces."""

import re

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import shapes
from unet_ray.errors import InputError
from unet_ray.scores import stacks
from unet_ray.scores.stacks import Stack, paired
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.opening import open_volume

DTYPES = ["bool", "uint8", "int8", "uint16", "int32", "uint64", "float16", "float32", "float64"]


def noise(shape, dtype="uint8", seed=0):
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def probabilities(array, **options):
    return np.stack(list(Stack(array, **options).probabilities()))


def cells(array):
    return np.stack(list(Stack(array).cells()))


def labels(array):
    stack = Stack(array)
    return stack.labels(Box.of(stack.shape))


def stored(folder, array, chunk):
    """The array as a stored volume with the given chunks."""
    zarr.create_array(folder / "volume.zarr", data=array, chunks=chunk, overwrite=True)
    return open_volume(folder / "volume.zarr")


# Shapes


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (3, 5, 7), (1, 3, 5, 7)], ids=str)
def test_an_image_is_a_stack_of_one_slice_or_more(shape):
    array = noise(shape)
    stack = Stack(array)
    assert stack.shape == (1, 1, *shape)[-3:] and stack.dtype == np.uint8
    whole = array.reshape(stack.shape)
    np.testing.assert_array_equal(np.stack(list(stack.slices())), whole)
    box = Box((0, 1, 2), (1, 4, 7))
    np.testing.assert_array_equal(stack.read(box), whole[box.slices])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(4),
        np.zeros((1, 1, 2, 3, 3)),
        np.zeros((2, 2), complex),
        np.full((2, 2), "a"),
        np.zeros((0, 4)),
        np.zeros((4, 0)),
        np.zeros((0, 4, 4)),
    ],
    ids=lambda a: f"{a.dtype} {a.shape}",
)
def test_arrays_that_are_not_images_are_refused(array):
    message = rf"the array: {array.dtype} of shape {re.escape(str(array.shape))} is not an image"
    with pytest.raises(InputError, match=message):
        Stack(array)


def test_several_channels_are_refused_by_their_number(tmp_path):
    with pytest.raises(InputError, match="the array: has 3 channels; scores need one map"):
        Stack(np.zeros((3, 2, 4, 4)))
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((20, 20, 3), np.uint8), photometric="rgb")
    with pytest.raises(InputError, match=r"rgb\.tif: has 3 channels"):
        Stack(open_volume(tmp_path / "rgb.tif"))


def test_shapes_that_differ_are_both_named():
    one, other = Stack(np.zeros((2, 3, 4)), "one.tif"), Stack(np.zeros((2, 4, 3)), "other.tif")
    with pytest.raises(InputError, match=r"one\.tif and other\.tif: .* 2 x 3 x 4 and 2 x 4 x 3 "):
        paired(one, other)
    with pytest.raises(InputError, match="1 x 3 x 4 and 3 x 3 x 4"):
        paired(np.zeros((3, 4)), np.zeros((3, 3, 4)))


def test_a_stack_is_returned_as_it_is():
    stack = Stack(np.zeros((2, 3, 4)), "name", scale=255.0)
    assert Stack.of(stack) is stack
    with pytest.raises(TypeError):
        Stack(stack)


def test_errors_name_a_volume_by_its_path(tmp_path):
    volume = stored(tmp_path, noise((2, 3, 4)), (1, 3, 4))
    assert Stack(volume).name == str(tmp_path / "volume.zarr")
    assert Stack(volume, "other").name == "other"


# Reading


@settings(max_examples=150)
@given(shapes((9, 30, 30)), shapes((4, 12, 12)), st.integers(1, 4000))
def test_pieces_partition_the_stack(shape, chunk, voxels):
    stack = Stack(np.zeros(shape, np.uint8))
    painted = np.zeros(shape, int)
    chunk = tuple(min(pair) for pair in zip(chunk, shape, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "PIECE_VOXELS", voxels)
        patch.setattr(stack, "_source", Chunked(shape, chunk))
        patch.setattr(stacks, "Volume", Chunked)
        pieces = list(stack.pieces())
    for piece in pieces:
        painted[piece.slices] += 1
        # a piece is small, unless one storage chunk is larger
        assert piece.size <= max(voxels, np.prod(chunk))
        # no chunk is read for two pieces
        assert all(a % n == 0 for a, n in zip(piece.start, chunk, strict=True))
        ends = zip(piece.stop, chunk, shape, strict=True)
        assert all(b % n == 0 or b == whole for b, n, whole in ends)
    assert (painted == 1).all()


class Chunked:
    """A volume as far as pieces depend on it."""

    def __init__(self, shape, chunk):
        self.shape, self.chunk = shape, chunk


def test_pieces_are_as_large_as_allowed(monkeypatch):
    monkeypatch.setattr(stacks, "PIECE_VOXELS", 600)
    assert [piece.shape for piece in Stack(np.zeros((7, 20, 10))).pieces()] == [(3, 20, 10)] * 2 + [
        (1, 20, 10)
    ]
    assert [piece.shape for piece in Stack(np.zeros((2, 90, 10))).pieces()] == [
        (1, 60, 10),
        (1, 30, 10),
    ] * 2


@settings(max_examples=30)
@given(shapes((6, 9, 9)), shapes((3, 5, 5)), st.integers(1, 500))
def test_a_volume_reads_as_the_array(tmp_path_factory, shape, chunk, voxels):
    array = noise(shape, "uint16")
    chunk = tuple(min(pair) for pair in zip(chunk, shape, strict=True))
    stack = Stack(stored(tmp_path_factory.mktemp("stack"), array, chunk))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "PIECE_VOXELS", voxels)
        np.testing.assert_array_equal(np.stack(list(stack.slices())), array)
        painted = np.zeros(shape, np.uint16)
        for piece in stack.pieces():
            painted[piece.slices] = stack.read(piece)
        np.testing.assert_array_equal(painted, array)


def test_pieces_are_small():
    stack = Stack(np.broadcast_to(np.uint8(1), (40, 1000, 1000)))
    sizes = [piece.size for piece in stack.pieces()]
    assert sum(sizes) == 40e6 and max(sizes) <= stacks.PIECE_VOXELS < 5e6


def test_slices_are_read_a_storage_chunk_at_a_time(tmp_path, monkeypatch):
    stack = Stack(stored(tmp_path, noise((7, 4, 4)), (3, 4, 4)))
    boxes, read = [], Stack.read
    monkeypatch.setattr(Stack, "read", lambda self, box: (boxes.append(box), read(self, box))[1])
    list(stack.slices())
    assert [(box.start[0], box.stop[0]) for box in boxes] == [(0, 3), (3, 6), (6, 7)]
    boxes.clear()
    # a chunk of very many slices is read in parts, to bound the memory
    monkeypatch.setattr(stacks, "SLAB_BYTES", 33 * stack.dtype.itemsize)
    list(stack.slices())
    assert [(box.start[0], box.stop[0]) for box in boxes] == [(0, 2), (2, 4), (4, 6), (6, 7)]


def test_slices_are_selected_in_the_given_order():
    array = noise((6, 4, 5))
    stack = Stack(array, planes=[4, 1, 5])
    assert stack.shape == (3, 4, 5)
    chosen = array[[4, 1, 5]]
    np.testing.assert_array_equal(np.stack(list(stack.slices())), chosen)
    box = Box((1, 2, 0), (3, 4, 5))
    np.testing.assert_array_equal(stack.read(box), chosen[box.slices])


# Probabilities


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_0_and_1_are_probabilities_as_they_are(dtype):
    values = probabilities(np.array([[0, 1], [1, 0]], dtype))
    assert values.dtype == np.float64
    assert values.tolist() == [[[0, 1], [1, 0]]]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int64"])
def test_other_integers_are_divided_by_the_largest_of_their_type(dtype):
    largest = np.iinfo(dtype).max
    values = probabilities(np.array([[0, 1, 2, largest // 2, largest]], dtype))
    assert values.dtype == np.float64
    assert values.ravel().tolist() == [n / largest for n in (0, 1, 2, largest // 2, largest)]


def test_one_large_value_in_the_last_slice_sets_the_scale_of_all():
    array = np.zeros((5, 3, 3), np.uint8)
    array[0] = 1
    assert probabilities(array).max() == 1
    array[4, 2, 2] = 2
    assert probabilities(array).max() == 2 / 255


def test_a_given_scale_takes_precedence():
    assert probabilities(np.ones((1, 1), np.uint8), scale=255.0).tolist() == [[[1 / 255]]]


def test_every_stored_probability_is_k_over_255_in_double_precision():
    values = probabilities(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert values.ravel().tolist() == [k / 255 for k in range(256)]


def test_single_precision_is_promoted_before_it_is_compared():
    # As in Java: float 0.1 is slightly larger than double 0.1, so it is above the threshold.
    values = probabilities(np.array([[0.1, 0.7]], np.float32))
    assert values.dtype == np.float64
    assert values.ravel().tolist() == [float(np.float32(0.1)), float(np.float32(0.7))]
    assert (values.ravel() > [0.1, 0.7]).tolist() == [True, False]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.1, 1.1, 255])
def test_a_value_that_is_not_a_probability_is_named_with_its_voxel(dtype, value):
    array = np.full((3, 4, 5), 0.5, dtype)
    array[1, 2, 3] = array[2, 0, 0] = value
    message = (
        rf"the array: voxel \(z, y, x\) = \(1, 2, 3\) is {array[1, 2, 3]}; a probability is a "
    )
    with pytest.raises(InputError, match=message + "finite number from 0 to 1"):
        probabilities(array)


@pytest.mark.parametrize("dtype", ["int8", "int32"])
def test_a_negative_integer_is_not_a_probability(dtype):
    with pytest.raises(InputError, match=r"\(0, 0, 1\) is -1; .* from 0 to 1\."):
        probabilities(np.array([[0, -1]], dtype))
    largest = np.iinfo(dtype).max
    with pytest.raises(InputError, match=rf"is -1; .* from 0 to {re.escape(f'{largest:g}')}\."):
        probabilities(np.array([[2, -1]], dtype))


def test_the_smallest_and_largest_probabilities_are_allowed():
    tiny = np.nextafter(0, 1)
    assert probabilities(np.array([[0.0, -0.0, tiny, 1.0]])).max() == 1
    with pytest.raises(InputError):
        probabilities(np.array([[np.nextafter(1, 2)]]))


# Cells of a truth


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_truth_is_0_and_1(dtype):
    slices = cells(np.array([[0, 1], [1, 0]], dtype))
    assert slices.dtype == bool and slices.tolist() == [[[False, True], [True, False]]]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "uint64"])
def test_a_truth_is_also_0_and_the_largest_value_of_its_type(dtype):
    largest = np.iinfo(dtype).max
    assert cells(np.array([[0, largest]], dtype)).tolist() == [[[False, True]]]


@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_truth_of_one_value_is_allowed(value):
    assert (cells(np.full((2, 3, 3), value, np.uint8)) == bool(value)).all()


@pytest.mark.parametrize(
    "values, dtype, strange",
    [
        ([0, 1, 255], "uint8", 255),
        ([0, 128, 255], "uint8", 128),
        ([0, 255], "uint16", 255),
        ([0, 2], "uint8", 2),
        ([0, -1], "int8", -1),
        ([0, 255], "float32", 255.0),
        ([0, 0.5, 1], "float64", 0.5),
        ([0, np.nan], "float32", np.nan),
        ([0, np.inf], "float32", np.inf),
    ],
    ids=str,
)
def test_a_truth_of_other_values_is_refused(values, dtype, strange):
    array = np.zeros((3, 3, 3), dtype)
    array[2, 0, : len(values)] = values
    message = rf"the array: slice 2 holds {strange}\b.*0 \(membrane\) and one other value, 1"
    with pytest.raises(InputError, match=message):
        cells(array)


def test_two_cell_values_in_different_slices_are_refused():
    array = np.zeros((2, 2, 2), np.uint8)
    array[0], array[1] = 1, 255
    with pytest.raises(InputError, match="slice 1 holds 255"):
        cells(array)


# Labels


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint32", "int64", "uint64"])
def test_labels_are_whole_numbers_of_any_type(dtype):
    values = labels(np.array([[0, 1]], dtype))
    assert values.dtype == np.uint64 and values.tolist() == [[[0, 1]]]


def test_labels_keep_64_bits():
    values = [2**32, 2**63, 2**64 - 1]
    assert labels(np.array([values], np.uint64)).tolist() == [[values]]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floating_point_labels_are_refused(dtype):
    with pytest.raises(InputError, match=f"the array: labels must be integers .* not {dtype}"):
        labels(np.zeros((2, 2), dtype))


def test_negative_labels_are_refused():
    with pytest.raises(InputError, match="integers of at least 0, not int16 with -3"):
        labels(np.array([[0, -3], [-1, 5]], np.int16))
