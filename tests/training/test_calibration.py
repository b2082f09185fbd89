"""The threshold of the class map: its choice, its place in the model, and its effect."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.helper import write_stack
from unet_ray import load
from unet_ray.network.checkpoints import read_model
from unet_ray.segmentation.preparation import stored_at
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.stores import Store
from unet_ray.training.calibration import best_threshold, between, numbered
from unet_ray.training.data import HeldOut
from unet_ray.training.recipes import Recipe
from unet_ray.training.train import train
from unet_ray.training.truths import IGNORED
from unet_ray.volumes.intensity import Intensity

TINY = {"base_channels": 2, "depth": 1, "patch": (44, 48), "learning_rate": 0.02, "steps": 30}
SHAPE = (2, 6, 5)


def slices(targets, cells=None):
    image = np.zeros((1, *targets.shape), np.uint8)
    return HeldOut(image, targets.astype(np.uint8), cells, Intensity((0.0,), (1.0,)))


def test_a_threshold_separates_every_stored_probability():
    stored = np.arange(256)
    for level in range(255):
        np.testing.assert_array_equal(stored > 255 * between(level), stored > level)
        assert 0 < between(level) < 1


@pytest.mark.parametrize("truth", [0, 1])
def test_one_class_alone_gives_no_other_threshold_than_one_half(truth):
    stored = np.full((1, *SHAPE), 200, np.uint8)
    assert best_threshold([stored], [slices(np.full(SHAPE, truth))]) == 0.5


@given(arrays(np.uint8, SHAPE), arrays(np.uint8, SHAPE, elements=st.sampled_from([0, 1, IGNORED])))
def test_the_threshold_has_the_fewest_wrong_voxels(stored, targets):
    annotated = targets != IGNORED

    def errors(threshold):
        return ((stored > 255 * threshold) != targets)[annotated].sum()

    assume({0, 1} <= {*targets.ravel().tolist()})
    threshold = best_threshold([stored[None]], [slices(targets)])
    assert errors(threshold) == min(errors(between(level)) for level in range(255))


def test_volumes_count_together():
    small, large = np.full((1, 2, 2), 1), np.zeros((1, 8, 8))
    large[0, 0, 0] = 1
    predictions = [np.full((1, 1, 2, 2), 100, np.uint8), np.full((1, 1, 8, 8), 100, np.uint8)]
    assert best_threshold(predictions, [slices(small), slices(large)]) > 100 / 255


def test_the_threshold_of_objects_cuts_a_bridge_between_them():
    cells = np.zeros((1, 9, 20), np.int64)
    cells[0, 1:8, 1:8], cells[0, 1:8, 10:17] = 1, 2
    stored = np.where(cells, 210, 0).astype(np.uint8)
    stored[0, 4, 8:10] = 160  # a bridge with fewer voxels than the parts of cells below 160
    stored[0, 1:8, 7] = stored[0, 1:8, 16] = 150
    truth = slices(cells != 0, cells)
    assert best_threshold([stored[None]], [slices(cells != 0)]) < 150 / 255
    threshold = best_threshold([stored[None]], [truth])
    assert 160 / 255 < threshold < 210 / 255
    assert numbered(stored > 255 * threshold).max() == 2


def test_more_than_two_classes_have_no_threshold():
    stored = np.zeros((2, 1, 4, 4), np.uint8)
    assert best_threshold([stored], [slices(np.zeros((1, 4, 4)))]) is None


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Paths of an image of two grey levels with noise, and of its labels, most of them 0."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = 255 * (rng.random((4, 8, 8)) < 0.2).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    image = (labels // 8 + rng.integers(60, 110, labels.shape)).astype(np.uint8)
    write_stack(folder / "image.tif", image)
    write_stack(folder / "labels.tif", labels)
    return folder


@pytest.mark.parametrize("val", [None, "3:4"])
def test_a_model_decides_its_class_map_by_its_threshold(task, tmp_path, val):
    files = [str(task / "image.tif")], [str(task / "labels.tif")]
    model = train(*files, tmp_path / "run", Recipe.of("default", **TINY, val=val))
    threshold = read_model(model)[1].threshold
    assert 0 < threshold < 1
    out = segment(task / "image.tif", model, tmp_path / "out.zarr", Settings(precision="float32"))
    store = Store(out, ("probabilities", "classes"))
    probabilities = store.read("probabilities")[0]
    np.testing.assert_array_equal(store.read("classes")[:], probabilities > 255 * threshold)
    assert stored_at(out, overwrite=False).threshold == threshold
    prediction = load(model).predict(task / "image.tif", dtype="uint8", precision="float32")
    np.testing.assert_array_equal(prediction.classes, store.read("classes")[:])


def test_a_flag_replaces_the_threshold_of_the_model(task, tmp_path):
    files = [str(task / "image.tif")], [str(task / "labels.tif")]
    model = train(*files, tmp_path / "run", Recipe.of("default", **TINY))
    settings = Settings(precision="float32", threshold=0.75)
    out = segment(task / "image.tif", model, tmp_path / "out.zarr", settings)
    store = Store(out, ("probabilities", "classes"))
    probabilities = store.read("probabilities")[0]
    np.testing.assert_array_equal(store.read("classes")[:], probabilities > 255 * 0.75)
