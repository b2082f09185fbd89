"""Compares the weight map with a direct evaluation: one distance transform per cell."""

import math

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from unet_ray.compiled import compiled
from unet_ray.errors import InputError
from unet_ray.training.weights import border_term, class_weights, separate, weight_map


def brute_force(instances, w0=10.0, sigma=5.0):
    ids = np.unique(instances[instances != 0])
    if len(ids) < 2:
        return np.zeros(instances.shape)
    distances = np.stack([ndimage.distance_transform_edt(instances != i) for i in ids])
    d1, d2 = np.sort(distances, axis=0)[:2]
    return w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2))


def label_images(most=5, dtype=np.uint16):
    """Small images with few numbers: cells touch, are in pieces, are isolated or absent."""
    shapes = st.tuples(st.integers(1, 20), st.integers(1, 20))
    numbers = st.one_of(st.just(0), st.integers(0, most))
    return shapes.flatmap(lambda s: arrays(dtype, s, elements=numbers, fill=st.just(0)))


@settings(max_examples=150, deadline=None)
@given(label_images(), st.sampled_from([0.4, 1.0, 5.0, 1000.0]))
def test_border_term_matches_brute_force(instances, sigma):
    term = border_term(instances, sigma=sigma)
    assert term.dtype == np.float32 and term.shape == instances.shape
    np.testing.assert_allclose(term, brute_force(instances, sigma=sigma), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 40])
def test_border_term_matches_brute_force_where_most_cells_are_out_of_reach(count):
    rng = np.random.default_rng(count)
    instances = np.zeros((90, 140), np.int32)
    spots = rng.integers((0, 0), instances.shape, (count, 2))
    instances[tuple(spots.T)] = np.arange(1, count + 1)
    instances = ndimage.grey_dilation(instances, size=(3, 5))
    np.testing.assert_allclose(border_term(instances), brute_force(instances), rtol=0, atol=1e-6)


def test_border_term_treats_two_pieces_of_one_number_as_one_cell():
    one_cell = np.array([[3, 0, 0, 3]])
    assert not border_term(one_cell).any()
    with_another = np.array([[3, 0, 0, 3, 0, 7]])
    np.testing.assert_allclose(border_term(with_another), brute_force(with_another), atol=1e-6)


def test_border_term_of_one_row_by_hand():
    # cell 1 at 0 and 1, cell 2 at 5:      d1 + d2 =  5  4  1+3  2+2  3+1  0+4
    row = np.array([[1, 1, 0, 0, 0, 2]], np.uint8)
    expected = 10 * np.exp(-(np.array([[5, 4, 4, 4, 4, 4]]) ** 2) / 50)
    np.testing.assert_allclose(border_term(row), expected, rtol=1e-6)
    assert border_term(row)[0, 2] == pytest.approx(7.261490)


@settings(max_examples=60, deadline=None)
@given(label_images())
def test_border_term_commutes_with_flips_and_rotations(instances):
    term = border_term(instances)
    np.testing.assert_array_equal(border_term(instances.T), term.T)
    for turns in range(4):
        np.testing.assert_array_equal(
            border_term(np.rot90(instances, turns)), np.rot90(term, turns)
        )
    np.testing.assert_array_equal(border_term(instances[::-1]), term[::-1])


@settings(max_examples=40, deadline=None)
@given(label_images(), st.floats(0.1, 100))
def test_border_term_is_proportional_to_w0(instances, w0):
    expected = border_term(instances, w0=1.0) * w0
    np.testing.assert_allclose(border_term(instances, w0=w0), expected, rtol=1e-5, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(label_images(), st.integers(2, 4))
def test_border_term_scales_with_sigma_as_the_image_does(instances, factor):
    spaced = np.zeros(np.array(instances.shape) * factor, instances.dtype)
    spaced[::factor, ::factor] = instances  # the same voxels, `factor` times as far apart
    term = border_term(spaced, sigma=5.0 * factor)[::factor, ::factor]
    np.testing.assert_allclose(term, border_term(instances, sigma=5.0), rtol=1e-5, atol=1e-6)


def test_border_term_of_one_cell_is_zero_however_wide_it_is():
    assert not border_term(np.array([[0, 1, 0]]), sigma=1e12).any()


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.uint64])
def test_border_term_accepts_any_cell_numbers(dtype):
    largest = np.iinfo(dtype).max
    row = np.array([[largest, 0, 0, largest - 1]], dtype)
    np.testing.assert_allclose(border_term(row), brute_force(np.array([[1, 0, 0, 2]])), rtol=1e-6)


def test_border_term_does_not_change_its_argument():
    instances = np.array([[1, 0, 2]])
    border_term(instances)
    np.testing.assert_array_equal(instances, [[1, 0, 2]])


@pytest.mark.parametrize("wrong", [{"w0": -1.0}, {"w0": math.nan}, {"sigma": 0.0}, {"sigma": -5.0}])
def test_border_term_refuses_w0_and_sigma_out_of_range(wrong):
    with pytest.raises(InputError, match="|".join(f"{k}={v}" for k, v in wrong.items())):
        border_term(np.array([[1, 0, 2]]), **wrong)


@settings(max_examples=60, deadline=None)
@given(label_images(most=4, dtype=np.uint8))
def test_class_weights_give_every_class_the_same_share(targets):
    weights = class_weights(targets, classes=6)
    assert weights.dtype == np.float32 and weights.shape == (6,)
    occurs = np.unique(targets)
    assert not np.delete(weights, occurs).any()
    assert weights[targets].mean() == pytest.approx(1, rel=1e-5)
    shares = [weights[targets][targets == c].sum() for c in occurs]
    np.testing.assert_allclose(shares, targets.size / len(occurs), rtol=1e-5)


def test_class_weights_by_hand_without_the_ignored_voxels():
    targets = np.array([0, 1, 1, 1, 255, 255], np.uint8)
    np.testing.assert_allclose(class_weights(targets, 2), [2, 2 / 3], rtol=1e-6)
    assert not class_weights(np.full(3, 255, np.uint8), 2).any()


def test_weight_map_is_class_weight_plus_border_on_the_background():
    targets = np.array([[[1, 1, 0, 1]], [[1, 0, 0, 0]]], np.uint8)
    w_c = class_weights(targets, 2)
    expected = w_c[targets].astype(float)
    expected[0, 0, 2] += 10 * math.exp(-(2**2) / 50)  # the second slice has one cell only
    weights = weight_map(targets, classes=2)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_weight_map_treats_components_of_each_class_as_cells():
    # First map: adjacent cells of classes 1 and 2. Second map: two cells that touch at a corner.
    targets = np.array([[[1, 2, 0], [0, 0, 0], [0, 0, 0]]], np.uint8)
    diagonal = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 0]]], np.uint8)
    none = np.zeros(3, np.float32)
    instances = np.array([[1, 2, 0], [0, 0, 0], [0, 0, 0]])
    for target, cells in ((targets, instances), (diagonal, np.diag([1, 2, 0]))):
        expected = np.where(target == 0, brute_force(cells), 0)
        np.testing.assert_allclose(weight_map(target, 3, balance=none)[0], expected[0], atol=1e-6)


def test_weight_map_of_ignored_voxels_is_zero_and_they_are_no_cells():
    targets = np.array([[[1, 0, 0, 255, 1]]], np.uint8)
    weights = weight_map(targets, 2, balance=np.ones(2, np.float32))
    border = brute_force(np.array([[1, 0, 0, 0, 2]]))
    expected = [[1, 1 + border[0, 1], 1 + border[0, 2], 0, 1]]
    np.testing.assert_allclose(weights[0], expected, rtol=1e-6)


def test_weight_map_of_the_isbi_membranes_matches_brute_force(shared_data):
    labels = shared_data / "isbi2012" / "train-labels.tif"
    cells = tifffile.imread(labels, key=7)[100:228, 200:328] == 255
    instances, count = ndimage.label(cells)
    assert count > 5
    balance = np.array([2, 0.5], np.float32)
    expected = np.where(cells, 0.5, 2 + brute_force(instances))
    weights = weight_map(cells[None].astype(np.uint8), 2, balance=balance)
    np.testing.assert_allclose(weights[0], expected, rtol=0, atol=1e-6)
    assert weights.max() > 9  # the thinnest membrane here: d1 + d2 = 4


def test_compiled_works_without_a_cache():
    namespace = {}
    exec("def twice(number): return 2 * number", namespace)  # no source file for numba's cache
    assert compiled(namespace["twice"])(21) == 42


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.uint16, (4, 7, 9), elements=st.integers(0, 4), fill=st.just(0)),
    st.tuples(st.floats(0.3, 5), st.floats(0.3, 5), st.floats(0.3, 5)),
    st.sampled_from([1.0, 5.0]),
)
def test_border_term_in_three_dimensions_uses_the_size_of_a_voxel(instances, spacing, sigma):
    ids = np.unique(instances[instances != 0])
    expected = np.zeros(instances.shape)
    if len(ids) > 1:
        distances = [ndimage.distance_transform_edt(instances != i, sampling=spacing) for i in ids]
        d1, d2 = np.sort(distances, axis=0)[:2]
        expected = 10 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2))
    term = border_term(instances, sigma=sigma, spacing=spacing)
    np.testing.assert_allclose(term, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 0.0), (1.0, -2.0), (1.0, math.inf)])
def test_border_term_refuses_invalid_voxel_sizes(spacing):
    with pytest.raises(InputError, match="spacing"):
        border_term(np.array([[1, 0, 2]]), spacing=spacing)


@settings(max_examples=60, deadline=None)
@given(arrays(np.uint8, (2, 9, 11), elements=st.integers(0, 3)))
def test_separated_cells_do_not_touch_and_lose_only_border_voxels(instances):
    separated = separate(instances)
    assert not separated[instances == 0].any()
    for plane, mask in zip(instances, separated, strict=True):
        for axis in (0, 1):
            a, b = np.delete(plane, 0, axis), np.delete(plane, -1, axis)
            mask_a, mask_b = np.delete(mask, 0, axis), np.delete(mask, -1, axis)
            assert not (mask_a & mask_b & (a != b)).any()
        # Every removed voxel had a neighbour in another cell.
        for y, x in np.argwhere((plane != 0) & ~mask):
            neighbours = [
                plane[v, u]
                for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                if 0 <= v < plane.shape[0] and 0 <= u < plane.shape[1]
            ]
            assert any(n not in (0, plane[y, x]) for n in neighbours)
    np.testing.assert_array_equal(separate(instances[:, ::-1]), separated[:, ::-1])
    np.testing.assert_array_equal(
        separate(np.rot90(instances, axes=(1, 2))), np.rot90(separated, axes=(1, 2))
    )


def test_weight_map_uses_instances_instead_of_components():
    cells = np.array([[[1, 1, 0, 0, 1, 1]]])
    targets = (cells != 0).astype(np.uint8)
    balance = np.zeros(2, np.float32)
    assert not weight_map(targets, 2, balance=balance, instances=cells).any()
    assert weight_map(targets, 2, balance=balance)[0, 0, 2] > 5
