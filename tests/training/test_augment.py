"""Deformed patches: the identity is exact, and image and labels move together."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from unet_ray.errors import InputError
from unet_ray.tiling.boxes import Box
from unet_ray.training.augment import (
    change_grey,
    deform,
    degrade,
    draw_deformation,
    warp_image,
    warp_labels,
)

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))
IDENTITY = np.eye(2)
NO_NODES = np.zeros((2, 3, 3))


def middle(shape):
    return ((shape[0] - 1) / 2, (shape[1] - 1) / 2)


def window_of(deformation, centre, rng, channels=2):
    """Random voxels of exactly the box of `reach`, and the centre relative to them."""
    box = deformation.reach(centre)
    voxels = rng.standard_normal((channels, *box.shape)).astype(np.float32)
    return voxels, tuple(c - a for c, a in zip(centre, box.start, strict=True))


def smooth(rng, shape):
    return ndimage.gaussian_filter(rng.standard_normal(shape), 3).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_the_identity_reproduces_the_patch(shape, seed):
    rng = np.random.default_rng(seed)
    identity = draw_deformation(shape, rng, elastic=0, angle=0, flips=(False, False))
    start = rng.integers(0, 9, 2)
    image = rng.standard_normal((2, *(start + shape + 5))).astype(np.float32)
    patch = (slice(start[0], start[0] + shape[0]), slice(start[1], start[1] + shape[1]))
    centre = tuple(start + middle(shape))
    assert identity.reach(centre) == Box(tuple(start), tuple(start + shape))
    np.testing.assert_array_equal(warp_image(image, centre, identity), image[:, *patch])
    np.testing.assert_array_equal(warp_labels(image[0], centre, identity), image[0][patch])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(0, 3), st.booleans())
def test_flips_and_quarter_rotations_are_exact(size, turns, flip):
    rng = np.random.default_rng(size)
    image = rng.standard_normal((2, size, size)).astype(np.float32)
    matrix = np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), turns) * [1, -1 if flip else 1]
    deformation = deform((size, size), matrix, NO_NODES)
    expected = np.rot90(image, turns, axes=(1, 2))
    expected = expected[:, :, ::-1] if flip else expected
    np.testing.assert_array_equal(warp_image(image, middle((size, size)), deformation), expected)
    labels = (image[0] > 0).astype(np.uint8)
    expected = np.rot90(labels, turns)[:, ::-1] if flip else np.rot90(labels, turns)
    np.testing.assert_array_equal(warp_labels(labels, middle((size, size)), deformation), expected)


def test_all_four_flips_are_drawn_equally_often():
    rng = np.random.default_rng(0)
    image = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    counts = {}
    for _ in range(200):
        deformation = draw_deformation((2, 3), rng, elastic=0, angle=0)
        patch = warp_image(image, middle((2, 3)), deformation)
        counts[patch.tobytes()] = counts.get(patch.tobytes(), 0) + 1
    flips = [image[:, ::i, ::j] for i in (1, -1) for j in (1, -1)]
    assert set(counts) == {flip.tobytes() for flip in flips}
    assert min(counts.values()) > 25


def test_rotations_preserve_lengths_and_cover_all_angles():
    rng = np.random.default_rng(0)
    corners = [
        draw_deformation((9, 9), rng, elastic=0, flips=(False, False)).offsets[:, 0, 0]
        for _ in range(200)
    ]
    np.testing.assert_allclose(np.linalg.norm(corners, axis=1), math.hypot(4, 4), rtol=1e-5)
    angles = np.arctan2(*np.transpose(corners))
    assert np.histogram(angles, bins=8, range=(-math.pi, math.pi))[0].min() > 8


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 999), st.sampled_from([0.0, 3.0, 30.0]))
def test_reach_is_the_smallest_sufficient_box(shape, seed, elastic):
    rng = np.random.default_rng(seed)
    deformation = draw_deformation(shape, rng, elastic)
    centre = tuple(rng.integers(-50, 50, 2) + np.add(middle(shape), rng.choice([0, 0.5, 0.3])))
    image, relative = window_of(deformation, centre, rng)
    positions = deformation.offsets.astype(float) + np.array(relative)[:, None, None]
    last = np.array(image.shape[1:])[:, None, None] - 1
    assert (positions >= 0).all() and (positions <= last).all()
    assert (positions.min(axis=(1, 2)) < 1).all()
    assert (positions.max(axis=(1, 2)) > last[:, 0, 0] - 1).all()
    assert warp_image(image, relative, deformation).shape == (2, *shape)
    assert warp_labels(image[0], relative, deformation).shape == shape


@pytest.mark.parametrize("side", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_a_window_that_lacks_one_row_or_column_is_refused(side):
    top, bottom, left, right = side
    image = np.zeros((1, 8 - top - bottom, 8 - left - right), np.float32)
    identity = deform((8, 8), IDENTITY, NO_NODES)
    centre = (3.5 - top, 3.5 - left)
    with pytest.raises(ValueError, match="reaches"):
        warp_image(image, centre, identity)
    with pytest.raises(ValueError, match="reaches"):
        warp_labels(image[0], centre, identity)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999))
def test_image_agrees_with_scipy(seed):
    rng = np.random.default_rng(seed)
    deformation = draw_deformation((37, 52), rng, elastic=4)
    image, centre = window_of(deformation, middle((37, 52)), rng)
    positions = deformation.offsets.astype(float) + np.array(centre)[:, None, None]
    expected = [ndimage.map_coordinates(channel, positions, order=1) for channel in image]
    np.testing.assert_allclose(warp_image(image, centre, deformation), expected, atol=1e-4)
    labels = rng.integers(0, 1000, image.shape[1:])
    expected = ndimage.map_coordinates(labels, positions, order=0)
    # Halfway between two voxels, float32 and float64 may round differently.
    clear = (np.abs(positions % 1 - 0.5) > 1e-4).all(axis=0)
    np.testing.assert_array_equal(warp_labels(labels, centre, deformation)[clear], expected[clear])
    assert clear.mean() > 0.99


def test_image_and_labels_move_together():
    rng = np.random.default_rng(5)
    deformation = draw_deformation((120, 90), rng)
    box = deformation.reach(middle((120, 90)))
    labels = np.digitize(smooth(rng, box.shape), [-0.05, 0, 0.05]).astype(np.uint8)
    centre = tuple(c - a for c, a in zip(middle((120, 90)), box.start, strict=True))
    flat = ndimage.maximum_filter(labels, 3) == ndimage.minimum_filter(labels, 3)
    uniform = warp_labels(flat, centre, deformation)
    image = warp_image(labels[None].astype(np.float32), centre, deformation)[0]
    assert 0.3 < uniform.mean() < 1
    np.testing.assert_allclose(
        image[uniform], warp_labels(labels, centre, deformation)[uniform], atol=1e-5
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, np.float32])
def test_labels_and_weights_get_no_new_values(dtype):
    rng = np.random.default_rng(1)
    deformation = draw_deformation((40, 40), rng)
    window, centre = window_of(deformation, middle((40, 40)), rng)
    labels = rng.choice(np.array([0, 3, 200], dtype), window.shape[1:])
    patch = warp_labels(labels, centre, deformation)
    assert patch.dtype == dtype
    assert set(np.unique(patch)) == {0, 3, 200}


def test_a_crop_of_the_offsets_gives_that_crop_of_the_patch():
    rng = np.random.default_rng(2)
    deformation = draw_deformation((30, 30), rng, elastic=3)
    image, centre = window_of(deformation, middle((30, 30)), rng)
    inner = type(deformation)(deformation.offsets[:, 5:20, 7:23])
    cropped = warp_image(image, centre, deformation)[:, 5:20, 7:23]
    np.testing.assert_array_equal(warp_image(image, centre, inner), cropped)
    box = inner.reach(centre)
    labels = warp_labels(image[0], centre, deformation)[5:20, 7:23]
    relative = tuple(c - a for c, a in zip(centre, box.start, strict=True))
    np.testing.assert_array_equal(warp_labels(image[0][box.slices], relative, inner), labels)


def test_windows_in_fortran_order_are_read_correctly():
    rng = np.random.default_rng(3)
    deformation = draw_deformation((20, 20), rng, elastic=2)
    image, centre = window_of(deformation, middle((20, 20)), rng)
    view = np.asfortranarray(image)
    np.testing.assert_array_equal(
        warp_image(view, centre, deformation), warp_image(image, centre, deformation)
    )
    expected = warp_labels(image[0], centre, deformation)
    np.testing.assert_array_equal(warp_labels(view[0], centre, deformation), expected)


def test_the_seed_determines_the_deformation():
    first, again, other = (draw_deformation((50, 50), np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.offsets, again.offsets)
    assert (first.offsets != other.offsets).mean() > 0.9


@pytest.mark.parametrize("elastic", [10.0, 2.5])
def test_displacements_at_the_nodes_have_the_requested_standard_deviation(elastic):
    rng = np.random.default_rng(0)
    identity = deform((41, 61), IDENTITY, NO_NODES).offsets
    draws = [
        draw_deformation((41, 61), rng, elastic, 0, (False, False)).offsets for _ in range(400)
    ]
    nodes = (np.array(draws) - identity)[:, :, ::20, ::30].reshape(400, 18)
    np.testing.assert_allclose(nodes.std(axis=0), elastic, rtol=0.15)
    np.testing.assert_allclose(nodes.mean(axis=0), 0, atol=0.2 * elastic)
    correlation = np.corrcoef(nodes.T) - np.eye(18)
    assert abs(correlation).max() < 0.25  # nodes and directions are independent


def test_displacement_interpolates_the_nodes_by_a_natural_spline():
    nodes = np.random.default_rng(0).standard_normal((2, 3, 3))
    bent = deform((41, 61), IDENTITY, nodes).offsets - deform((41, 61), IDENTITY, NO_NODES).offsets
    np.testing.assert_allclose(bent[:, ::20, ::30], nodes, atol=1e-5)
    # For a middle node of 1, each axis has 1 - 3/2 t^2 + 1/2 t^3 at distance t; here t = 0.5.
    nodes = np.zeros((2, 3, 3))
    nodes[:, 1, 1] = 1
    bent = deform((41, 61), IDENTITY, nodes).offsets - deform((41, 61), IDENTITY, NO_NODES).offsets
    half = 1 - 3 / 8 + 1 / 16
    np.testing.assert_allclose(bent[:, 10, 30], half, atol=1e-5)
    np.testing.assert_allclose(bent[:, 10, 45], half**2, atol=1e-5)


@pytest.mark.parametrize("elastic", [-1.0, math.nan, math.inf])
def test_elastic_must_be_finite_and_not_negative(elastic):
    with pytest.raises(InputError, match=f"elastic={elastic}"):
        draw_deformation((8, 8), np.random.default_rng(0), elastic)


def test_grey_values_change_by_one_gain_and_offset_per_channel():
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, 30, 40)).astype(np.float32)
    before = image.copy()
    drawn = []
    for _ in range(200):
        changed = change_grey(image, rng, strength=0.2)
        assert changed.dtype == np.float32 and changed.shape == image.shape
        for old, new in zip(image, changed, strict=True):
            gain, offset = np.polyfit(old.ravel(), new.ravel(), 1)
            np.testing.assert_allclose(new, old * gain + offset, atol=1e-4)
            drawn.append((math.log(gain), offset))
    np.testing.assert_array_equal(image, before)
    assert abs(np.array(drawn)).max() < 0.2 + 1e-5
    np.testing.assert_allclose(np.std(drawn, axis=0), 0.2 / math.sqrt(3), rtol=0.1)
    pairs = np.reshape(drawn, (200, 4))  # gain and offset of both channels are independent
    assert abs(np.corrcoef(pairs.T) - np.eye(4)).max() < 0.3


def test_grey_values_depend_on_the_seed_and_stay_at_strength_zero():
    image = np.random.default_rng(0).standard_normal((1, 5, 5)).astype(np.float32)
    first, again, other = (change_grey(image, np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    np.testing.assert_array_equal(change_grey(image, np.random.default_rng(1), 0), image)


def test_a_patch_is_blurred_or_gets_noise_in_half_of_the_cases():
    image = np.random.default_rng(0).normal(0, 1, (2, 64, 64)).astype(np.float32)
    before = image.copy()
    blurred = noisy = 0
    for seed in range(400):
        degraded = degrade(image, np.random.default_rng(seed))
        assert (degraded.dtype, degraded.shape) == (np.float32, image.shape)
        again = degrade(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(degraded, again)
        draws = np.random.default_rng(seed)
        (blurs, adds), (blur, noise) = draws.random(2) < 0.5, draws.uniform(0, (1.5, 0.3))
        expected = ndimage.gaussian_filter(image, (0, blur, blur)) if blurs else image
        difference = degraded - expected
        assert difference.std() == pytest.approx(noise if adds else 0, rel=0.1, abs=1e-6)
        blurred, noisy = blurred + blurs, noisy + adds
    np.testing.assert_array_equal(image, before)
    assert 160 < blurred < 240 and 160 < noisy < 240


def test_no_strength_leaves_a_patch_unchanged():
    image = np.random.default_rng(0).normal(0, 1, (2, 9, 8)).astype(np.float32)
    for seed in range(20):
        np.testing.assert_array_equal(degrade(image, np.random.default_rng(seed), 0.0), image)
