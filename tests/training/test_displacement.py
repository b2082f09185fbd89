"""Displacement of labels from images: measured on shifted phantoms, and its effect on patches."""

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from tests.helper import in_memory_labels, write_stack
from unet_ray.network.checkpoints import read_model
from unet_ray.training.displacement import displacement
from unet_ray.training.recipes import DISPLACED, Recipe
from unet_ray.training.train import train
from unet_ray.volumes.phantom import make_phantom


@pytest.fixture(scope="module")
def phantom():
    return make_phantom((4, 256, 256), seed=1)


def measured(image, classes, **chosen):
    return displacement(in_memory_labels(image, classes, **chosen).parts)


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, -1), (-1, 1), (3, -5)])
def test_shifted_labels_are_displaced_by_as_much(phantom, shift):
    found = measured(phantom.image, np.roll(phantom.classes, shift, (1, 2)))
    np.testing.assert_allclose(found, shift, atol=0.15)


@pytest.mark.parametrize("radius", [20, 90])
def test_shading_inside_objects_is_no_displacement(radius):
    y, x = np.mgrid[:256, :256] - 127.5
    disc = np.hypot(y, x) < radius
    grey = ndimage.gaussian_filter(disc * (1 + 0.6 * y / radius) * 100, 1.5)
    images = grey + np.random.default_rng(0).normal(0, 3, (4, 256, 256))
    found = measured(images, np.stack([disc] * 4).astype(np.uint8))
    assert found is not None and np.abs(found).max() < DISPLACED


def test_the_clearest_channel_counts(phantom):
    before = measured(phantom.image, phantom.classes)
    noise = np.random.default_rng(0).integers(0, 60000, phantom.image.shape)
    both = np.stack([noise, phantom.image]).astype(np.uint16)
    assert measured(both, phantom.classes) == before
    assert measured(255 - phantom.image, phantom.classes) == pytest.approx(before)


def test_the_slices_with_labels_everywhere_count():
    phantom = make_phantom((40, 128, 128), seed=3)
    classes = np.roll(phantom.classes, 1, 1)
    classes[[n for n in range(40) if n % 13], 0, 0] = 9
    found = measured(phantom.image, classes, ignore_label=9)
    np.testing.assert_allclose(found, (1, 0), atol=0.15)


def test_few_slices_are_read_to_choose_those_with_labels_everywhere():
    phantom = make_phantom((1, 128, 128), seed=4)
    image, classes = (np.repeat(a, 140, axis=0) for a in (phantom.image, phantom.classes))
    classes[0, 0, 0] = 9
    assert measured(image, classes, ignore_label=9) is not None
    classes[[n for n in range(140) if n % 9 != 7], 0, 0] = 9
    assert measured(image, classes, ignore_label=9) is None


def test_half_a_voxel_is_measured():
    fine = make_phantom((3, 512, 512), seed=2, cell_diameter=84.0)
    image = fine.image.reshape(3, 256, 2, 256, 2).mean((2, 4))
    # Labels of every other voxel, from the even or the odd ones, differ by half a voxel.
    even, odd = (measured(image, fine.classes[:, n::2, ::2]) for n in (0, 1))
    assert even[0] - odd[0] == pytest.approx(0.5, abs=0.1)
    assert even[1] - odd[1] == pytest.approx(0, abs=0.1)


def test_real_labels_are_displaced_or_not(shared_data):
    stack, other = shared_data / "isbi2012", shared_data / "vnc_stack1"
    images, labels = (tifffile.imread(stack / f"train-{n}.tif") for n in ("volume", "labels"))
    y, x = measured(images, labels)
    assert -0.75 < y < -0.55 and -0.25 < x < -0.05
    images, labels = (tifffile.imread(other / f"{n}.tif")[:4] for n in ("raw", "membranes"))
    assert np.abs(measured(images, labels)).max() < 0.1


def test_what_cannot_be_measured_has_no_displacement(phantom):
    image, classes = phantom.image, phantom.classes
    assert measured(image[:2], classes[:2]) is None, "two slices"
    noise = np.random.default_rng(0).integers(0, 255, image.shape).astype(np.uint8)
    assert measured(noise, classes) is None, "grey values do not show the classes"
    moved = np.stack([np.roll(c, n, 0) for n, c in enumerate(classes)])
    assert measured(image, moved) is None, "slices disagree"
    assert measured(np.zeros_like(image), classes) is None, "a constant image"
    assert measured(image, np.roll(classes, 12, 1)) is None, "too far"
    for y, x in [(1, 64), (16, 64), (64, 2)]:
        assert measured(image[:, :y, :x], classes[:, :y, :x]) is None, "narrow slices"
    assert measured(classes[:, :17], classes[:, :17]) == pytest.approx((0, 0))
    assert measured(classes[:, :16], classes[:, :16]) is None, "narrow slices"
    classes = np.where(np.indices(classes.shape)[2] < 9, 9, classes).astype(np.uint8)
    assert measured(image, classes, ignore_label=9) is None, "slices without full annotation"


def test_a_recipe_keeps_the_orientation_if_labels_are_displaced():
    recipe = Recipe.of("default")
    assert recipe.oriented((-DISPLACED, 0.0)).orientation == "upright"
    assert recipe.oriented((1.0, -DISPLACED)).orientation == "fixed"
    assert recipe.oriented((0.9 * DISPLACED, 0.9 * DISPLACED)).orientation == "any"
    assert recipe.oriented(None).orientation == "any"
    for name in ("any", "upright", "fixed"):
        assert Recipe.of("default", orientation=name).oriented((0.0, 1.0)).orientation == name
    assert Recipe.of("paper").orientation == "any"


def test_training_says_and_stores_what_it_chose(phantom, tmp_path):
    image = write_stack(tmp_path / "image.tif", phantom.image)
    moved = write_stack(tmp_path / "labels.tif", np.roll(phantom.classes, -1, 1))
    settings = {"depth": 1, "base_channels": 2, "steps": 1}
    for name, rows in (("auto", 1), ("any", 0)):
        said = []
        recipe = Recipe.of("default", orientation=name, **settings)
        model = train([str(image)], [str(moved)], tmp_path / name, recipe, announce=said.extend)
        texts = [text for row, text in said if row == "orientation"]
        assert len(texts) == rows and all("by -1.0, " in text for text in texts)
        stored = read_model(model)[1].training["recipe"]["orientation"]
        assert stored == {"auto": "upright", "any": "any"}[name]
