import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from unet_ray.errors import InputError
from unet_ray.volumes.phantom import make_phantom

PROFILE = np.array([[[0] * 3] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0] * 3] * 3])

phantoms = st.builds(
    make_phantom,
    shape=st.one_of(
        st.sampled_from([(1, 1, 1), (1, 16, 16), (3, 40, 70), (6, 1, 90)]),
        st.tuples(st.integers(1, 8), st.integers(1, 100), st.integers(1, 100)),
    ),
    seed=st.integers(0, 2**32),
    cell_diameter=st.sampled_from([12.0, 20.0, 42.0]),
)


def best_threshold_iou(image, membrane):
    """IoU of membrane and of cell at the threshold with the best mean of the two."""
    dark = np.cumsum(np.bincount(image[membrane], minlength=256))
    wrong = np.cumsum(np.bincount(image[~membrane], minlength=256))
    n_membrane, n_cell = np.count_nonzero(membrane), np.count_nonzero(~membrane)
    iou = np.stack([dark / (n_membrane + wrong), (n_cell - wrong) / (n_cell + n_membrane - dark)])
    return iou[:, iou.mean(axis=0).argmax()]


@settings(max_examples=20, deadline=None)
@given(phantoms)
def test_instances_are_the_connected_parts_of_the_cells(phantom):
    """So no two cells touch along any axis, ids are dense and in order of the first voxel."""
    expected, _ = ndimage.label(phantom.instances > 0)
    np.testing.assert_array_equal(phantom.instances, expected)


@settings(max_examples=20, deadline=None)
@given(phantoms)
def test_a_cell_has_one_connected_profile_in_a_slice(phantom):
    instances = phantom.instances
    _, profiles = ndimage.label(instances, structure=PROFILE)
    assert profiles == sum(np.unique(s[s > 0]).size for s in instances)


@settings(max_examples=20, deadline=None)
@given(phantoms)
def test_membrane_separates_cells_across_corners_too(phantom):
    instances = phantom.instances
    for y, x in ((1, 0), (0, 1), (1, 1), (1, -1)):
        a = instances[:, : instances.shape[1] - y, max(-x, 0) : instances.shape[2] - max(x, 0)]
        b = instances[:, y:, max(x, 0) : instances.shape[2] + min(x, 0)]
        assert not ((a != b) & (a > 0) & (b > 0)).any()


@settings(max_examples=10, deadline=None)
@given(phantoms)
def test_arrays_have_the_stated_shapes_dtypes_and_values(phantom):
    assert phantom.image.dtype == phantom.classes.dtype == np.uint8
    assert phantom.instances.dtype == np.uint32
    assert phantom.image.shape == phantom.instances.shape == phantom.classes.shape
    np.testing.assert_array_equal(phantom.classes == 255, phantom.instances > 0)
    assert set(np.unique(phantom.classes)) <= {0, 255}


def test_the_image_has_the_requested_shape():
    assert make_phantom((3, 40, 70)).image.shape == (3, 40, 70)


def test_a_slice_smaller_than_a_cell_still_shows_one():
    assert all(make_phantom((1, 16, 16), seed).instances.any() for seed in range(10))


def test_same_arguments_give_the_same_bytes():
    a, b = make_phantom((3, 70, 90), 5, 30.0), make_phantom((3, 70, 90), 5, np.float64(30))
    assert a.image.tobytes() == b.image.tobytes()
    assert a.instances.tobytes() == b.instances.tobytes()


def test_another_seed_is_other_tissue():
    a, b = make_phantom((2, 64, 64), 0), make_phantom((2, 64, 64), 1)
    assert (a.classes != b.classes).mean() > 0.1
    assert (a.image != b.image).mean() > 0.9


@pytest.mark.parametrize("diameter", [12.0, 24.0, 42.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_membrane_share_and_sizes_are_like_those_of_tissue(seed, diameter):
    side = round(9 * diameter)
    instances = make_phantom((4, side, side), seed, diameter).instances
    assert 0.15 <= (instances == 0).mean() <= 0.26
    areas = np.bincount(instances[0].ravel())[1:]
    areas = areas[areas > 0]
    assert 0.5 < areas.size * diameter**2 / side**2 < 1.6
    assert np.percentile(areas, 90) > 6 * np.percentile(areas, 25)


def test_cells_continue_from_slice_to_slice():
    instances = make_phantom((6, 256, 256)).instances
    both = (instances[1:] > 0) & (instances[:-1] > 0)
    assert both.mean() > 0.65


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_threshold_detects_some_of_the_membrane_but_not_enough(seed):
    """ISBI 2012 has 0.36 and 0.80; the light, the noise and the organelles must not be lost."""
    phantom = make_phantom((4, 384, 384), seed)
    membrane, cell = best_threshold_iou(phantom.image, phantom.instances == 0)
    assert 0.2 < membrane < 0.5
    assert 0.7 < cell < 0.9


def test_slices_differ_in_brightness_and_light_is_uneven_within():
    image = make_phantom((8, 512, 512)).image.astype(np.float32)
    assert image.mean(axis=(1, 2)).std() > 3
    corners = image[0].reshape(4, 128, 4, 128).mean(axis=(1, 3))
    assert corners.std() > 3


def test_making_a_phantom_is_fast():
    start = time.process_time()
    make_phantom((2, 512, 512))
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((0, 16, 16),), "shape (0, 16, 16)"),
        (((16, 16),), "shape (16, 16)"),
        (((1, 16, 16), -1), "seed=-1"),
        (((1, 16, 16), 0, 5.0), "cell_diameter=5"),
        (((1, 16, 16), 0, float("nan")), "cell_diameter=nan"),
        (((1, 16, 16), 0, float("inf")), "cell_diameter=inf"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, words):
    with pytest.raises(InputError) as error:
        make_phantom(*arguments)
    assert words in str(error.value)
