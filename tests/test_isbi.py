"""ISBI 2012 end to end: trains on real membranes, and compares results of several tile sizes."""

import numpy as np
import pytest
import zarr

from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.layout import ARRAYS, PREDICTED
from unet_ray.training.recipes import Recipe
from unet_ray.training.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TILES = [None, (4, 256, 256), (8, 384, 384), (1, 176, 512), (8, 128, 128), (16, 64, 64)]


@pytest.fixture(scope="module")
def data(shared_data):
    return shared_data / "isbi2012"


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    images, labels = [str(data / f"train-{name}.tif") for name in ("volume", "labels")]
    recipe = Recipe.of("default", base_channels=16, steps=400)
    return train([images], [labels], tmp_path_factory.mktemp("isbi") / "run", recipe)


def maps(store):
    return [zarr.open_array(store / ARRAYS[name], mode="r")[:] for name in PREDICTED]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_tile_sizes_give_the_same_map(model, data, tmp_path, precision):
    results = []
    for number, tile in enumerate(TILES):
        settings = Settings(tile=tile, precision=precision)
        out = tmp_path / f"{number}.zarr"
        results.append(maps(segment(data / "test-volume.tif", model, out, settings)))
    (whole, classes), *others = results
    assert 0.1 < (classes == 0).mean() < 0.4, "membranes are about a fifth of the volume"
    for tile, (map_, other_classes) in zip(TILES[1:], others, strict=True):
        difference = np.abs(map_.astype(int) - whole)
        flipped = other_classes != classes
        print(
            f"{precision} {tile}: at most {difference.max()} of 255, "
            f"{(difference > 0).mean():.2e} of the voxels differ, {flipped.sum()} classes"
        )
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
        assert np.all(np.abs(whole[0][flipped] - 127.5) <= 1), "classes flip at ties only"
