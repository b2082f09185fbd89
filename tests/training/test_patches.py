"""Training patches: inputs of a sample, position of its labels, and refused data."""

import itertools
import math
import os
import signal
import threading
import time

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from tests.helper import load_training_data, session, title
from unet_ray.errors import InputError, UnetRayError
from unet_ray.training import patches as samples
from unet_ray.training import stream
from unet_ray.training.data import TrainingData, TrainingVolume
from unet_ray.training.patches import Sampler, ahead, sample_slots
from unet_ray.training.recipes import Recipe
from unet_ray.training.stream import streamed
from unet_ray.volumes.intensity import Intensity


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes an array as a TIFF stack and returns its path."""

    def write(name, array):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, array, photometric="minisblack")
        return str(path)

    return write


def blobs(shape=(2, 96, 80), seed=0):
    """Random squares of 7 x 7 voxels with labels 0 and 255, uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 2, (shape[0], -(-shape[1] // 7), -(-shape[2] // 7)), np.uint8)
    return 255 * coarse.repeat(7, 1).repeat(7, 2)[:, : shape[1], : shape[2]]


def load(images, labels, **chosen):
    return load_training_data(images, labels, Recipe(**chosen))


def sampler_of(data, patch, seed, elastic):
    """A sampler for a network of depth 2, whose output is 40 voxels smaller than its input."""
    return Sampler(data, Recipe(depth=2, patch=patch, seed=seed, elastic=elastic))


@pytest.fixture
def data(write):
    labels = blobs()
    return load([write("image", labels)], [write("labels", labels)])


def in_memory(image, targets):
    """Training data without files; normalisation leaves the grey values unchanged."""
    channels = len(image)
    volume = TrainingVolume(
        image,
        targets,
        np.ones(targets.shape, np.float32),
        Intensity((0.0,) * channels, (1.0,) * channels),
    )
    return TrainingData((volume,), (0, 1), None, {})


def same(a, b):
    return all(
        np.array_equal(getattr(a, n), getattr(b, n)) for n in ("image", "targets", "weights")
    )


# Inputs of a sample


def test_a_sample_depends_only_on_seed_step_and_slot(data):
    first, second = (sampler_of(data, (60, 60), seed=5, elastic=3) for _ in range(2))
    ascending = [first[n, 0] for n in range(6)]
    descending = [second[n, 0] for n in reversed(range(6))][::-1]
    assert all(map(same, ascending, descending))
    assert not any(same(a, b) for a, b in itertools.combinations(ascending, 2))
    assert not same(sampler_of(data, (60, 60), seed=6, elastic=3)[0, 0], ascending[0])
    assert not any(same(first[0, slot], sample) for slot in (1, 2) for sample in ascending)


def test_shapes_and_dtypes_are_those_of_the_network(data):
    sample = sampler_of(data, (60, 76), seed=0, elastic=3)[0, 0]
    assert (sample.image.shape, sample.image.dtype) == ((1, 60, 76), np.float32)
    assert (sample.targets.shape, sample.targets.dtype) == ((20, 36), np.uint8)
    assert (sample.weights.shape, sample.weights.dtype) == ((20, 36), np.float32)


def test_a_larger_volume_is_drawn_more_often(write):
    large, small = np.full((3, 40, 40), 200, np.uint8), np.full((1, 40, 40), 20, np.uint8)
    labels = [blobs(large.shape), blobs(small.shape)]
    paths = [
        [write(f"{n}{i}", a) for i, a in enumerate(x)]
        for n, x in zip("il", [(large, small), labels], strict=True)
    ]
    data = load(*paths)
    first, second = data.volumes
    assert (first.intensity.mean, second.intensity.mean) == ((200.0,), (20.0,))
    data = TrainingData(
        tuple(
            TrainingVolume(v.image, np.full_like(v.targets, n), v.weights, v.intensity)
            for n, v in enumerate(data.volumes)
        ),
        (0, 1),
        None,
        {},
    )
    sampler = sampler_of(data, (44, 44), seed=0, elastic=0)
    share = np.mean([sampler[n, 0].targets[0, 0] for n in range(400)])
    assert share == pytest.approx(0.25, abs=0.06)


# Position of the labels of a patch


@pytest.mark.parametrize("patch, output", [((60, 60), (20, 20)), ((60, 76), (20, 36))])
def test_labels_belong_to_the_middle_of_the_image(data, patch, output, monkeypatch):
    monkeypatch.setattr(samples, "degrade", lambda image, *given: image)
    sampler = sampler_of(data, patch, seed=1, elastic=0)
    middle = tuple(slice((p - o) // 2, (p + o) // 2) for p, o in zip(patch, output, strict=True))
    compared = 0
    for number in range(30):
        sample = sampler[number, 0]
        low, high = sample.image.min(), sample.image.max()
        grey = (sample.image[0][middle] - low) / (high - low)
        uniform = (grey < 1e-3) | (grey > 1 - 1e-3)  # all voxels around it have the same label
        np.testing.assert_array_equal(sample.targets[uniform], grey[uniform] > 0.5)
        compared += uniform.mean() / 30
    assert compared > 0.5


@pytest.mark.parametrize("elastic", [0, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_labels_and_image_come_from_the_same_position(monkeypatch, elastic, axis):
    # Linear interpolation reproduces a ramp; the label is the nearest integer.
    monkeypatch.setattr(samples, "change_grey", lambda image, rng: image)
    monkeypatch.setattr(samples, "degrade", lambda image, *given: image)
    ramp = np.indices((240, 240))[axis][None].astype(np.uint8)
    data = in_memory(ramp[None].astype(np.float32), ramp)
    sampler = sampler_of(data, (60, 76), seed=3, elastic=elastic)
    compared = 0
    for number in range(40):
        sample = sampler[number, 0]
        if not 0 < sample.image.min() <= sample.image.max() < 239:
            continue  # mirrored at a face, so the ramp is not linear
        middle = sample.image[0, 20:40, 20:56]
        assert np.abs(middle - sample.targets).max() <= 0.5 + 1e-3
        compared += 1
    assert compared >= 10


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("orientation", ["any", "upright", "fixed"])
def test_patches_have_the_orientations_of_the_recipe(monkeypatch, orientation, dims):
    """The direction of two ramps, which increase along y and along x, in each patch."""
    monkeypatch.setattr(samples, "change_grey", lambda image, rng: image)
    monkeypatch.setattr(samples, "degrade", lambda image, *given: image)
    ramps = np.indices((30, 240, 240)[3 - dims :], np.float32)[-2:].reshape(2, -1, 240, 240)
    data = in_memory(ramps, np.zeros(ramps.shape[1:], np.uint8))
    settings = {"dims": dims, "depth": 1, "base_channels": 2, "elastic": 0.0, "seed": 3}
    settings |= {"patch": (28, 32, 36)[3 - dims :], "orientation": orientation}
    sampler = Sampler(data, Recipe.of("default", **settings).fitted(None))
    middle = (14, slice(15, 17), slice(17, 19))[3 - dims :]
    cosines = []
    for number in range(80):
        y, x = sampler[number, 0].image[(slice(None), *middle)]
        cosines.append((y[1, 0] - y[0, 0], x[0, 1] - x[0, 0]))
    along_y, along_x = np.transpose(cosines)
    tilted = math.cos(math.radians(30)) - 1e-3
    if orientation == "any":
        assert along_y.min() < -0.9 and along_y.max() > 0.9 and np.abs(along_y).min() < 0.2
    else:
        assert tilted <= along_y.min() < 0.9 and np.abs(along_x).min() >= tilted
        assert {*np.sign(along_x)} == ({-1, 1} if orientation == "upright" else {1})


def test_weights_match_the_labels(write):
    labels = blobs()
    data = load([write("image", labels)], [write("labels", labels)], w0=0)
    share = np.mean(labels == 0)
    expected = np.array([0.5 / share, 0.5 / (1 - share)], np.float32)
    sample = sampler_of(data, (60, 60), seed=0, elastic=5)[0, 0]
    assert set(np.unique(sample.targets)) == {0, 1}
    np.testing.assert_allclose(sample.weights, expected[sample.targets], rtol=1e-6)


def test_corners_of_the_volume_are_drawn():
    targets = np.zeros((1, 60, 60), np.uint8)
    corners = list(itertools.product([slice(0, 3), slice(-3, None)], repeat=2))
    for number, (y, x) in enumerate(corners, start=1):
        targets[0, y, x] = number
    sampler = sampler_of(in_memory(targets[None], targets), (60, 60), seed=0, elastic=2)
    drawn = [np.unique(sampler[n, 0].targets) for n in range(600)]
    counts = [sum(number in numbers for numbers in drawn) for number in range(1, 5)]
    # Starts drawn uniformly from 41 x 41 positions would show each corner about once.
    assert min(counts) >= 6, counts


def test_patches_reach_every_face_of_the_volume_and_stay_inside(monkeypatch):
    whole = samples.draw_deformation
    monkeypatch.setattr(
        samples, "draw_deformation", lambda shape, rng, *_: whole(shape, rng, 0, 0, (False, False))
    )
    shape = 3, 60, 67
    numbers = np.arange(3 * 60 * 67, dtype=np.float32).reshape(shape)  # one for each voxel
    targets, grey = np.zeros(shape, np.uint8), Intensity((0.0,), (1.0,))
    volume = TrainingVolume(numbers[None], targets, numbers, grey)
    sampler = sampler_of(TrainingData((volume,), (0, 1), None, {}), (60, 68), seed=0, elastic=0)
    drawn = []
    for number in range(150):
        patch = sampler[number, 0].weights.astype(int)
        z, y, x = np.unravel_index(patch[0, 0], shape)
        np.testing.assert_array_equal(patch, numbers[z, y : y + 20, x : x + 28])
        drawn.append((z, y, x))
    assert np.min(drawn, axis=0).tolist() == [0, 0, 0]
    assert np.max(drawn, axis=0).tolist() == [2, 60 - 20, 67 - 28]


@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 1, 9), (2, 1, 1), (1, 61, 2), (1, 20, 20)])
def test_volumes_smaller_than_the_patch_are_mirrored(shape):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, *shape)).astype(np.float32)
    targets = rng.integers(0, 3, shape).astype(np.uint8)
    sampler = sampler_of(in_memory(image, targets), (60, 60), seed=0, elastic=3)
    for number in range(5):
        sample = sampler[number, 0]
        assert sample.image.shape == (2, 60, 60) and np.isfinite(sample.image).all()
        assert sample.targets.shape == sample.weights.shape == (20, 20)
        assert set(np.unique(sample.targets)) <= set(np.unique(targets))


# Accepted and refused data


@pytest.mark.parametrize(
    "values", [(0, 255), (3, 7), (-1, 4), (1, 2, 300), tuple(range(5, 37))], ids=str
)
def test_classes_are_the_label_values_in_ascending_order(write, values):
    labels = np.random.default_rng(0).choice(values, (2, 40, 40)).astype(np.int16)
    data = load([write("image", labels)], [write("labels", labels)])
    assert data.class_values == values
    np.testing.assert_array_equal(np.array(values)[data.volumes[0].targets], labels)
    assert data.volumes[0].targets.dtype == np.uint8


def test_classes_come_from_all_volumes_together(write):
    labels = [np.full((1, 8, 8), n, np.uint8) for n in (9, 4)]
    paths = [write(f"labels{n}", array) for n, array in enumerate(labels)]
    data = load(paths, paths)
    assert data.class_values == (4, 9)
    assert [v.targets.max() for v in data.volumes] == [1, 0]
    np.testing.assert_allclose([v.weights.mean() for v in data.volumes], 1, rtol=1e-6)


def test_the_identity_names_every_file(data, write):
    assert [d["name"] for d in data.identity["images"] + data.identity["labels"]] == [
        "image.tif",
        "labels.tif",
    ]
    changed = blobs(seed=1)
    again = load([write("image", changed)], [write("labels", changed)])
    assert again.identity != data.identity


def test_every_image_has_its_own_grey_values(write):
    labels = blobs((1, 40, 40))
    images = [write("dark", labels // 8), write("bright", labels.astype(np.uint16) * 9)]
    data = load(images, [write("labels", labels)] * 2)
    dark, bright = (v.intensity.normalise(v.image) for v in data.volumes)
    np.testing.assert_allclose(dark, bright, atol=1e-5)


GOOD = blobs((2, 40, 40))
BAD_LABELS = {
    "another shape": (GOOD[:, :39], ["image.tif", "labels.tif", "2 x 40 x 40", "2 x 39 x 40"]),
    "fewer slices": (GOOD[:1], ["image.tif", "labels.tif", "2 x 40 x 40", "1 x 40 x 40"]),
    "one class": (np.full_like(GOOD, 255), ["labels.tif", "255", "two"]),
    "36 values": (np.arange(GOOD.size).reshape(GOOD.shape).astype(np.uint16) // 90, ["36", "32"]),
    "floats": (GOOD / np.float32(255), ["labels.tif", "float32"]),
}


def test_zero_may_mean_not_annotated_but_near_a_cell(write):
    cells = np.zeros((1, 60, 60), np.uint8)
    cells[0, 20:30, 20:30] = 7
    image = np.random.default_rng(0).integers(0, 255, cells.shape).astype(np.uint8)
    paths = write("image", image), write("labels", cells)
    data = load([paths[0]], [paths[1]], labels_are="instances", ignore_label=0)
    (volume,) = data.volumes
    away = ndimage.distance_transform_edt(cells[0] == 0)
    counted = volume.weights[0] > 0
    np.testing.assert_array_equal(counted, away <= 5)
    np.testing.assert_array_equal(volume.targets[0][counted], cells[0][counted] > 0)


@pytest.mark.parametrize(("stem", "partial"), [("man_seg", True), ("mask", False)])
def test_a_gold_frame_with_few_cells_is_annotated_in_part(tmp_path, capsys, stem, partial):
    rng = np.random.default_rng(0)
    cells = np.zeros((3, 60, 60), np.uint16)
    for number, corner in enumerate([(4, 4), (4, 40), (40, 4), (40, 40)], 1):
        z = slice(None) if number == 1 else slice(2)  # the last frame has one cell of four
        cells[z, corner[0] : corner[0] + 8, corner[1] : corner[1] + 8] = number
    for z, frame in enumerate(cells):
        write_slice(tmp_path / "01" / f"t{z}.tif", rng.integers(0, 255, frame.shape).astype("u1"))
        write_slice(tmp_path / "SEG" / f"{stem}{z}.tif", frame)
    data = load([str(tmp_path / "01")], [str(tmp_path / "SEG")], labels_are="instances")
    counted = data.volumes[0].weights > 0
    assert counted[:2].all()
    away = ndimage.distance_transform_edt(cells[2] == 0)
    np.testing.assert_array_equal(counted[2], (away <= 5) | (not partial))
    assert ("man_seg2.tif: far fewer cells" in capsys.readouterr().err) == partial


def test_frames_are_paired_with_their_labels_by_number(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (5, 40, 40)).astype(np.uint8)
    for number, frame in enumerate(frames):
        write_slice(tmp_path / "01" / f"t{number:03}.tif", frame)
    for number in (3, 1):
        write_slice(tmp_path / "SEG" / f"man_seg{number:03}.tif", GOOD[0] // (number + 1))
    data = load([str(tmp_path / "01")], [str(tmp_path / "SEG")])
    np.testing.assert_array_equal(data.volumes[0].image[0], frames[[1, 3]])
    assert data.unlabelled == 3 and data.volumes[0].targets.shape == (2, 40, 40)
    write_slice(tmp_path / "SEG" / "man_seg009.tif", GOOD[0])
    with pytest.raises(InputError, match=r"has no slice with the number of man_seg009\.tif"):
        load([str(tmp_path / "01")], [str(tmp_path / "SEG")])


def write_slice(path, plane):
    path.parent.mkdir(exist_ok=True)
    tifffile.imwrite(path, plane)


@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_that_do_not_fit_are_refused(write, case):
    labels, words = BAD_LABELS[case]
    paths = write("image", GOOD), write("labels", labels)
    with pytest.raises(InputError) as refused:
        load([paths[0]], [paths[1]])
    assert [word for word in words if word not in str(refused.value)] == []


def test_32_label_values_are_classes(write):
    labels = np.arange(GOOD.size).reshape(GOOD.shape).astype(np.uint16) % 32
    data = load([write("image", labels)], [write("labels", labels)])
    assert len(data.class_values) == 32


def test_labels_in_colour_are_refused(write, tmp_path):
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((40, 40, 3), np.uint8), photometric="rgb")
    with pytest.raises(InputError, match=r"rgb\.tif: labels must be integers with one channel"):
        load([write("image", GOOD[0])], [str(tmp_path / "rgb.tif")])


def test_images_with_different_numbers_of_channels_are_refused(write, tmp_path):
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((40, 40, 3), np.uint8), photometric="rgb")
    labels = write("labels", GOOD[0])
    with pytest.raises(InputError, match=r"rgb\.tif: has 3 channels, .*image\.tif has 1"):
        load([write("image", GOOD[0]), str(tmp_path / "rgb.tif")], [labels] * 2)


def test_different_numbers_of_images_and_labels_are_refused(write):
    path = write("labels", GOOD)
    with pytest.raises(InputError, match="--images names 2 files and --labels 1"):
        load([path, path], [path])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_with_nonfinite_values_is_refused(write, value):
    image = GOOD.astype(np.float32)
    image[1, 3, 4] = value
    with pytest.raises(InputError, match=r"image\.tif: has voxels that are not finite"):
        load([write("image", image)], [write("labels", GOOD)])


def test_an_ignored_label_has_weight_zero_and_is_not_a_class(write):
    labels = GOOD.copy()
    labels[0, :9] = 7
    paths = [write("image", GOOD)], [write("labels", labels)]
    data = load(*paths, ignore_label=7)
    assert data.class_values == (0, 255)
    weights = data.volumes[0].weights
    assert (weights[0, :9] == 0).all() and (np.delete(weights, np.s_[:9], 1) > 0).all()
    assert data.volumes[0].targets.max() == 1
    with pytest.raises(InputError, match=r"no voxel has the label 9 set by --ignore-label"):
        load(*paths, ignore_label=9)


def test_touching_cells_are_separated_and_their_border_has_the_largest_weight(write):
    cells = np.zeros((1, 60, 60), np.uint16)
    cells[:, 20:40, 10:30], cells[:, 20:40, 30:50] = 300, 70
    paths = [write("image", cells)], [write("labels", cells)]
    data = load(*paths, labels_are="instances")
    targets, weights = data.volumes[0].targets[0], data.volumes[0].weights[0]
    assert data.class_values == (0, 1)
    assert (targets[20:40, 29:31] == 0).all()
    assert targets.sum() == 800 - 40
    border = weights[30, 29]
    assert border == weights.max() and border > 8 * weights[5, 5]


def test_labels_without_cells_after_separation_or_with_negative_numbers_are_refused(write):
    thin = np.tile(np.arange(1, 41, dtype=np.int16), (1, 40, 1))
    image = write("image", thin)
    with pytest.raises(InputError, match="no cell after touching cells are separated"):
        load([image], [write("thin", thin)], labels_are="instances")
    with pytest.raises(InputError, match=r"below\.tif: contains -39; cell numbers must"):
        load([image], [write("below", thin - 40)], labels_are="instances")


def test_labels_beyond_int64_are_refused(write):
    labels = np.where(GOOD > 0, np.uint64(2**63), np.uint64(2**63 + 5))
    with pytest.raises(InputError, match="labels must be below 2"):
        load([write("image", GOOD)], [write("labels", labels)])


def test_training_slices_with_one_class_are_refused(write):
    labels = GOOD.copy()
    labels[0] = 255
    paths = [write("image", GOOD)], [write("labels", labels)]
    with pytest.raises(InputError, match="not held out contain only 1 of 2 classes"):
        load(*paths, val="1:2")


# Samples drawn in advance


def test_workers_together_draw_the_slots_of_one_worker_with_a_larger_batch():
    def first(rank, batch):
        return list(itertools.islice(sample_slots(7, rank, batch), 2 * batch))

    single, pair = first(0, 4), [first(rank, 2) for rank in (0, 1)]
    assert single == [(step, slot) for step in (7, 8) for slot in range(4)]
    assert single == pair[0][:2] + pair[1][:2] + pair[0][2:] + pair[1][2:]


def limit_waves(patches, monkeypatch):
    """Sets the size of a wave in patches of 60 x 60, with one wave in advance per task."""
    monkeypatch.setattr(stream, "WAVE_BYTES", patches * (4 * 3600 + 5 * 400))
    monkeypatch.setattr(stream, "WAVES_AHEAD", 1)


@pytest.mark.ray
@pytest.mark.parametrize("drawers", [1, 2])
def test_ray_data_draws_the_same_samples_in_order(drawers, data, local_ray, monkeypatch):
    recipe = Recipe(depth=2, patch=(60, 60), seed=5)
    limit_waves(5, monkeypatch)
    stream = streamed(local_ray.put(data), recipe, 1, sample_slots(3, 1, 2), drawers)
    sampler = Sampler(data, recipe)
    for slot in itertools.islice(sample_slots(3, 1, 2), 32):
        assert same(next(stream), sampler[slot])
    stream.close()
    assert drawers_end()


@pytest.mark.slow
@pytest.mark.ray
def test_ray_data_ends_after_the_last_slot(data, local_ray, monkeypatch):
    recipe = Recipe(depth=2, patch=(60, 60), seed=5)
    limit_waves(2, monkeypatch)
    slots = list(itertools.islice(sample_slots(0, 0, 1), 5))  # the last wave is half full
    stream = streamed(local_ray.put(data), recipe, 1, iter(slots), drawers=2)
    sampler = Sampler(data, recipe)
    assert all(same(sample, sampler[slot]) for sample, slot in zip(stream, slots, strict=True))


@pytest.mark.ray
@pytest.mark.parametrize("drawers", [1, 2])
def test_a_lost_drawing_task_raises_instead_of_blocking(drawers, data, local_ray, monkeypatch):
    recipe = Recipe(depth=2, patch=(60, 60), seed=5)
    limit_waves(2, monkeypatch)
    stream = streamed(local_ray.put(data), recipe, 1, sample_slots(0, 0, 1), drawers)
    next(stream)
    os.kill(drawing()[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a task that drew training patches was lost") as raised:
        for _ in range(20):
            next(stream)
    # Training is retried after this error, but not after errors of unet-ray.
    assert not isinstance(raised.value, UnetRayError)


def test_an_assertion_error_of_ray_data_is_reported_as_a_lost_task(monkeypatch):
    class LostDataset:
        def map_batches(self, *args, **kwargs):
            return self

        def iter_batches(self, **kwargs):
            raise AssertionError("Above ray.get should raise an exception.")

    monkeypatch.setattr("ray.data.from_items", lambda *args, **kwargs: LostDataset())
    monkeypatch.setattr(stream, "_this_node", dict)
    with pytest.raises(RuntimeError, match="a task that drew training patches was lost"):
        next(stream._blocks(None, Recipe(), None, 1, 1 << 20))


DRAWER = "ray::MapBatches(_draw)"


def drawing():
    """Ids of the drawing processes that this test session started."""
    return [pid for pid in session(os.getsid(0)) if title(pid).startswith(DRAWER)]


def drawers_end():
    """Waits for the drawing processes; returns whether they have ended."""
    end = time.monotonic() + 30
    while drawing() and time.monotonic() < end:
        time.sleep(0.1)
    return not drawing()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "samples"]


def ended():
    """Waits for the drawing threads; returns whether they have ended."""
    for thread in threads():
        thread.join(timeout=5)
    return not threads()


def test_ahead_yields_in_order_and_ends():
    assert list(ahead(lambda n: n * n, iter(range(20)))) == [n * n for n in range(20)]
    assert ended()


def test_ahead_draws_no_more_than_its_depth_in_advance():
    drawn = []
    stream = ahead(lambda n: drawn.append(n) or n, itertools.count(), depth=3)
    assert next(stream) == 0
    time.sleep(0.3)  # enough to draw everything in advance
    assert 4 <= len(drawn) <= 5  # three in the queue, and one waiting to enter it
    stream.close()
    assert ended()


def test_ahead_raises_an_error_after_the_samples_before_it():
    def draw(number):
        if number == 3:
            raise ValueError("sample 3 is bad")
        return number

    received = []
    with pytest.raises(ValueError, match="sample 3 is bad"):
        for sample in ahead(draw, itertools.count()):
            received.append(sample)
    assert received == [0, 1, 2]
    assert ended()


def test_ahead_stops_its_thread_when_the_caller_stops():
    stream = ahead(lambda n: n, itertools.count(), depth=2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    assert len(threads()) == 1
    del stream
    assert ended()
