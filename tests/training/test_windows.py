"""Training data larger than memory: read by windows, with the same samples and the same model."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tests.helper import load_training_data, measures, noise, write_stack
from unet_ray.errors import ChangedError, InputError, RunError
from unet_ray.network.checkpoints import read_model
from unet_ray.tiling.boxes import Box
from unet_ray.training import maps, pairs
from unet_ray.training.labels import load_labels
from unet_ray.training.maps import weighted
from unet_ray.training.patches import Sampler
from unet_ray.training.recipes import Recipe
from unet_ray.training.train import train
from unet_ray.training.truths import Components
from unet_ray.training.weights import cells_of
from unet_ray.training.windows import Planes, take_planes
from unet_ray.volumes.opening import open_volume

SHAPE = (20, 70, 90)
TINY = {"base_channels": 2, "depth": 1, "steps": 4, "elastic": 2.0, "precision": "float32"}
PATCH = {2: (44, 44), 3: (24, 44, 44)}
STORED = "weights.safetensors"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(maps, "BLOCK", (8, 32, 32))
    monkeypatch.setattr(pairs, "SLAB_BYTES", 5000)


@pytest.fixture
def files(tmp_path):
    """Returns an image in Zarr, and labels that are classes or cells, as paths."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(SHAPE), 2.5)
    classes = np.where(smooth > 0.02, 2, np.where(smooth < -0.02, 1, 0)).astype(np.uint8)
    cells = (ndimage.label(smooth > 0)[0] * 3).astype(np.uint16)
    classes[5, 10:40] = cells[6, 30:60, 20:50] = 250
    image = (noise(SHAPE) // 3 + 40 * classes.clip(0, 2)).astype(np.uint8)
    zarr.create_array(tmp_path / "image.zarr", data=image, chunks=(4, 32, 32))
    for name, labels in (("classes", classes), ("instances", cells)):
        write_stack(tmp_path / f"{name}.tif", labels)
    return tmp_path


def recipe_of(dims, **changes):
    return Recipe.of("default", **TINY | {"dims": dims, "patch": PATCH[dims]} | changes)


def load(files, recipe, memory=None, run="run"):
    labels = files / f"{recipe.labels_are}.tif"
    pair = [str(files / "image.zarr")], [str(labels)]
    labelled = load_labels(*pair, recipe, any_classes=True, memory=memory)
    return weighted(labelled, recipe, files / run / STORED)


CASES = [
    {},
    {"w0": 0.0},
    {"val": "3:5,12:13"},
    {"ignore_label": 250},
    {"labels_are": "instances"},
    {"labels_are": "instances", "ignore_label": 250, "val": "0:2"},
    {"labels_are": "instances", "ignore_label": 0, "val_fraction": 0.2},
    {"voxel_size": (2.0, 1.0, 1.0), "val": "7:8"},
]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(c) or "default")
def test_samples_and_held_out_slices_are_those_of_volumes_in_memory(files, dims, changes):
    recipe = recipe_of(dims, **changes)
    whole, windowed = load(files, recipe), load(files, recipe, memory=1)
    assert isinstance(windowed.volumes[0].image, Planes)
    for name in ("identity", "counts", "class_values", "voxel_size"):
        assert getattr(whole, name) == getattr(windowed, name)
    for one, two in zip(whole.volumes, windowed.volumes, strict=True):
        for name in ("targets", "weights", "labelled"):
            np.testing.assert_array_equal(getattr(one, name)[:], getattr(two, name)[:])
    for one, two in zip(whole.held_out, windowed.held_out, strict=True):
        everything = (slice(None), *Box.of(one.targets.shape).slices)
        np.testing.assert_array_equal(one.slices[everything], two.slices[everything])
        np.testing.assert_array_equal(one.targets, two.targets)
        assert (one.cells is None) == (two.cells is None)
        if one.cells is not None:
            np.testing.assert_array_equal(one.cells, two.cells)
    fitted = recipe.fitted(whole.voxel_size)
    samplers = Sampler(whole, fitted), Sampler(windowed, fitted)
    for step in range(4):
        one, two = (sampler[step, 0] for sampler in samplers)
        for name in ("image", "targets", "weights"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_training_by_windows_gives_the_same_model_and_goes_on(files, dims, monkeypatch):
    recipe = recipe_of(dims, val="3:5")
    pair = [str(files / "image.zarr")], [str(files / "classes.tif")]
    rows = []
    models = [
        train(*pair, files / name, recipe, memory=memory, announce=rows.extend)
        for name, memory in (("whole", None), ("windowed", 1000))
    ]
    states = [read_model(model)[0].state_dict() for model in models]
    assert all((states[0][name] == states[1][name]).all() for name in states[0])
    assert ("memory", "images, labels and weight maps are read by windows; see --memory") in rows
    assert (files / "windowed/weights.zarr").is_dir()
    assert not (files / "windowed" / STORED).exists()

    monkeypatch.setattr(maps, "weight_map", None)  # is not called again
    longer = recipe_of(dims, val="3:5", steps=6)
    train(*pair, files / "windowed", longer, memory=1000)
    assert max(measure["step"] for measure in measures(files / "windowed")) == 6


def test_maps_that_are_not_complete_are_computed_again(files, monkeypatch):
    recipe, scratch = recipe_of(3), files / "run" / "checkpoints"

    def fails(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(maps, "labelled_squares", fails)
        load(files, recipe, memory=1)
    assert len([*scratch.iterdir()]) == 1 and not (files / "run/weights.zarr").exists()
    data = load(files, recipe, memory=1)
    expected = load(files, recipe, run="other").volumes[0].weights
    np.testing.assert_array_equal(data.volumes[0].weights[:], expected)
    with monkeypatch.context() as context:
        context.setattr(maps, "weight_map", None)  # they are used as they are
        load(files, recipe, memory=1)
    other = load(files, recipe_of(3, w0=5.0), memory=1).volumes[0].weights[:]
    assert not np.array_equal(other, expected)
    load(files, recipe)  # with more memory
    assert sorted(os.listdir(files / "run")) == ["checkpoints", "weights.safetensors"]
    load(files, recipe, memory=1)
    assert sorted(os.listdir(files / "run")) == ["checkpoints", "weights.zarr"]


def test_a_training_killed_while_it_computes_maps_goes_on(files):
    """The folder of a killed run is a training run, and the next start cleans it."""
    pair = [str(files / "image.zarr")], [str(files / "instances.tif")]
    program = """
import os, signal, sys
from unet_ray.training import maps
from unet_ray.training.recipes import Recipe
from unet_ray.training.train import train
maps.labelled_squares = lambda weights: os.kill(os.getpid(), signal.SIGKILL)
recipe = Recipe.of("default", base_channels=2, depth=1, steps=2, labels_are="instances")
train([sys.argv[1]], [sys.argv[2]], sys.argv[3], recipe, memory=1)
"""
    words = [sys.executable, "-c", program, pair[0][0], pair[1][0], str(files / "run")]
    assert subprocess.run(words, capture_output=True).returncode == -signal.SIGKILL
    assert [*(files / "run/checkpoints").glob("weights-*.part")]
    recipe = Recipe.of("default", base_channels=2, depth=1, steps=2, labels_are="instances")
    train(*pair, files / "run", recipe, memory=1)
    assert not [*(files / "run/checkpoints").glob("*.part")]
    assert (files / "run/weights.zarr").is_dir()


def test_a_file_that_changes_during_a_training_is_refused(files):
    data = load(files, recipe_of(2), memory=1)
    sampler = Sampler(data, recipe_of(2))
    assert sampler[0, 0].image.shape == (1, 44, 44)
    stack = open_volume(str(files / "image.zarr")).read(Box.of(SHAPE))[0]
    zarr.create_array(files / "image.zarr", data=stack // 2, chunks=(4, 32, 32), overwrite=True)
    with pytest.raises(ChangedError, match=r"image\.zarr has changed .* choose another --out"):
        for step in range(50):
            sampler[step, 0]


def test_voxels_that_are_not_finite_are_refused(files):
    stack = open_volume(str(files / "image.zarr")).read(Box.of(SHAPE))[0].astype(np.float32)
    stack[13, 40, 50] = np.nan
    zarr.create_array(files / "image.zarr", data=stack, chunks=(4, 32, 32), overwrite=True)
    for memory in (None, 1):
        with pytest.raises(InputError, match=r"image\.zarr: has voxels that are not finite"):
            load(files, recipe_of(2), memory)
    assert not [*files.glob("run/*")]


def test_damaged_weight_maps_are_named(files):
    recipe = recipe_of(3)
    data = load(files, recipe, memory=1)
    assert sorted(p.name for p in (files / "run/weights.zarr").iterdir()) == [
        *("targets.0", "weights.0", "zarr.json")
    ]
    chunk = next(p for p in (files / "run/weights.zarr/weights.0/c").rglob("*") if p.is_file())
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(RunError, match=r"Delete weights\.zarr in the RUN folder"):
        data.volumes[0].weights[:]
    chunk.unlink()
    with pytest.raises(RunError, match=r"a chunk is missing\. Delete weights\.zarr"):
        data.volumes[0].weights[:]
    shutil.rmtree(files / "run/weights.zarr/targets.0")
    with pytest.raises(RunError, match=r"targets\.0: cannot be read"):
        load(files, recipe, memory=1)


def test_an_input_cannot_be_changed(files):
    planes = Planes(open_volume(str(files / "image.zarr")), range(3))
    with pytest.raises(TypeError, match="only read"):
        planes[0:1, 0:1, 0:1] = 7
    assert take_planes(planes, [0, 2]).shape == (1, 2, 70, 90)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.integers(2, 4),
)
def test_components_of_boxes_are_those_of_the_volume(seed, shape, block, classes):
    targets = np.random.default_rng(seed).integers(0, classes, shape).astype(np.uint8)
    boxes = [*Box.of(shape).split(block)]
    components = Components(
        lambda box: targets[box.slices], boxes, np.zeros(shape, np.int64), classes
    ).of(Box.of(shape))
    expected = cells_of(targets, classes, dims=3)
    pairs = np.unique([expected.ravel(), components.ravel()], axis=1)
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    np.testing.assert_array_equal(components == 0, expected == 0)


@pytest.mark.parametrize("dims", [2, 3])
def test_each_patch_of_few_labels_shows_one(tmp_path, dims):
    labels = np.full((12, 150, 160), 7, np.uint8)
    labels[3, 140:146, 20:26], labels[9, 60:70, 0:9] = 0, 255
    paths = [str(tmp_path / name) for name in ("image.tif", "labels.tif")]
    for path, array in zip(paths, (noise(labels.shape), labels), strict=True):
        write_stack(Path(path), array)
    patch = {2: (84, 84), 3: (24, 84, 84)}[dims]
    recipe = recipe_of(dims, ignore_label=7, elastic=0.0, w0=0.0, patch=patch)
    data = load_training_data(paths[:1], paths[1:], recipe)
    assert data.volumes[0].labelled.sum() == 3  # squares of 32 x 32
    fitted = recipe.fitted(None)
    samples = [Sampler(data, fitted)[step, 0] for step in range(40)]
    # A square has labels somewhere; a rotated patch may miss that part of it.
    assert np.mean([sample.weights.any() for sample in samples]) > 0.6
    assert {int(t) for s in samples for t in np.unique(s.targets[s.weights > 0])} == {0, 1}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_the_volume(tmp_path):
    """Peaks of a training with --memory 64MiB on volumes of 128 MiB and 2 GiB."""
    code = """
import resource, sys
from unet_ray.training.recipes import Recipe
from unet_ray.training.train import train
recipe = Recipe.of("default", base_channels=2, depth=1, steps=3, patch=(28, 44, 44), dims=3,
                   w0=float(sys.argv[2]), precision="float32", val=sys.argv[3])
folder = sys.argv[1]
train([folder + "/image.zarr"], [folder + "/labels.zarr"], folder + "/run", recipe, memory=64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    peaks = {}
    for depth in (128, 2048):
        folder = tmp_path / str(depth)
        chunks = (32, 128, 128)
        shape = (depth, 1024, 1024)
        for name in ("image", "labels"):
            zarr.create_array(folder / f"{name}.zarr", shape=shape, chunks=chunks, dtype=np.uint8)
        image, labels = (zarr.open_array(folder / f"{n}.zarr") for n in ("image", "labels"))
        for box in Box.of(shape).split((32, 512, 512)):
            grey = noise(box.shape, seed=box.start[0])
            image[box.slices], labels[box.slices] = grey, np.where(grey > 100, 255, 0)
        words = [sys.executable, "-c", code, str(folder), "0", "40:42"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks[depth] = float(done.stdout)
    print(f"peaks in MiB: {peaks}")
    assert peaks[2048] < 1.1 * peaks[128]


def test_a_tiff_stack_is_read_by_windows(tmp_path):
    stack = noise((6, 50, 60))
    tifffile.imwrite(tmp_path / "stack.tif", stack, rowsperstrip=8, photometric="minisblack")
    planes = Planes(open_volume(str(tmp_path / "stack.tif")), [0, 1, 4])
    window = planes[:, 1:3, 5:20, 30:60]
    np.testing.assert_array_equal(window, stack[None, [1, 4], 5:20, 30:60])


@pytest.mark.parametrize("memory", [0, -1, float("nan"), "1GiB", [1]])
def test_a_memory_that_is_no_number_of_bytes_is_refused(files, memory):
    pair = [str(files / "image.zarr")], [str(files / "classes.tif")]
    with pytest.raises(InputError, match="must be a whole number of bytes above 0"):
        train(*pair, files / "run", recipe_of(2), memory=memory)
