"""Seams: counts against a slow oracle, verdicts on labels cut on purpose, bounded reads."""

import itertools
import math

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, stats

from unet_ray.errors import InputError
from unet_ray.scores import seams
from unet_ray.scores.seams import Error, Rates, seams_of, stored_seams
from unet_ray.volumes.opening import open_volume


def blobs(shape, seed=0, sigma=2.0):
    """Connected components of smooth noise."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    return ndimage.label(ndimage.gaussian_filter(noise, sigma) > 0.02)[0].astype(np.uint64)


def cut(labels, every, share=1.0, seed=0):
    """Labels with a new id in each tile, for a random share of the objects."""
    labels = labels.astype(np.int64)
    count = int(labels.max()) + 1
    chosen = np.random.default_rng(seed).random(count) < share
    chosen[0] = False
    tiles = np.zeros(labels.shape, np.int64)
    for axis, tile in enumerate(every):
        along = np.arange(labels.shape[axis]) // tile
        tiles = tiles * (along[-1] + 1) + along.reshape([-1 if i == axis else 1 for i in range(3)])
    return np.where(chosen[labels], count * (1 + tiles) + labels, labels)


def oracle(labels, every, axis, computed):
    """Pairs and ends at the tile planes of an axis and at its control planes, voxel by voxel."""
    tile, counts = every[axis], {"tile": [0, 0], "control": [0, 0]}
    distances = [d for d in (4, 8) if 2 * d < tile] or [d for d in (1,) if tile > 2]
    offsets = [0, *distances, *(-d for d in distances)]
    for start in range(tile, labels.shape[axis], tile):
        for offset, place in itertools.product(offsets, np.ndindex(*labels.shape)):
            if place[axis] != start + offset:
                continue
            before = tuple(n - (i == axis) for i, n in enumerate(place))
            owner = [n // m for n, m in zip(place, every, strict=True)]
            owner[axis] = start // tile
            neighbour = [n - (i == axis) for i, n in enumerate(owner)]
            if not (computed[tuple(owner)] and computed[tuple(neighbour)]):
                continue
            kind = "control" if offset else "tile"
            counts[kind][0] += bool(labels[place] or labels[before])
            counts[kind][1] += labels[place] != labels[before]
    return counts


@st.composite
def cases(draw):
    """Labels, the extents of a tile, and which tiles are computed."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 14), st.integers(1, 30)))
    every = draw(st.tuples(st.integers(1, 5), st.integers(1, 11), st.integers(1, 20)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(["uint8", "uint16", "int32", "uint64"]))
    highest = draw(st.integers(0, 4))
    labels = rng.integers(0, highest + 1, shape).astype(dtype)
    if dtype == "uint64":
        labels *= np.uint64(1 << 62)  # ids that differ only beyond the 53 bits of a float
        labels += (rng.random(shape) < 0.1).astype(np.uint64)
    counts = [-(-n // m) for n, m in zip(shape, every, strict=True)]
    computed = rng.random(counts) < draw(st.sampled_from([0.6, 1.0]))
    return labels, every, computed


@given(cases())
def test_counts_equal_those_of_every_pair_of_voxels(case):
    labels, every, computed = case
    result = seams_of(labels, every, None if computed.all() else computed)
    for axis, rates in enumerate(result.axes):
        counts = oracle(labels, every, axis, computed)
        if every[axis] > 2:
            assert [rates.pairs, rates.ends] == counts["tile"]
        (pairs, ends), (control_pairs, control_ends) = counts["tile"], counts["control"]
        assert rates.control_rate == (control_ends / control_pairs if control_pairs else None)
        if pairs and control_pairs:
            assert rates.rate == ends / pairs
        else:
            assert rates.ratio is None and rates.verdict == "unknown"


@given(cases(), st.integers(1, 50))
def test_small_windows_give_the_same_counts(case, side):
    labels, every, computed = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seams, "WINDOW", 512)
        whole = seams_of(labels, every, computed)
        patch.setattr(seams, "SMALLEST_WINDOW", 1)
        patch.setattr(seams, "FEW_WINDOWS", side)
        parts = seams_of(labels, every, computed)
    for one, other in zip(whole.axes, parts.axes, strict=True):
        assert (one.pairs, one.ends, one.control_rate) == (
            other.pairs,
            other.ends,
            other.control_rate,
        )


@given(cases(), st.randoms(use_true_random=False))
def test_ids_are_only_names(case, random):
    labels, every, computed = case
    ids = np.unique(labels)
    names = random.sample(range(1, 256), len(ids))
    renamed = np.zeros(labels.shape, np.uint8)
    for label, name in zip(ids, names, strict=True):
        renamed[labels == label] = name if label else 0
    assert seams_of(labels, every, computed) == seams_of(renamed, every, computed)


def test_tile_planes_without_objects_have_no_rate():
    labels = np.zeros((2, 1, 8), np.uint8)
    labels[0, 0, 3] = labels[1, 0, 6] = 1  # objects at control planes of the tile plane x = 5 alone
    rates = seams_of(labels, (2, 1, 5)).axes[2]
    assert (rates.planes, rates.pairs, rates.verdict) == (0, 0, "unknown")
    assert rates.control_rate == 1.0 and rates.error is None


@given(cases())
def test_the_axes_are_treated_alike(case):
    labels, every, computed = case
    result = seams_of(labels, every, computed)
    turned = seams_of(
        labels.transpose(2, 0, 1), (every[2], *every[:2]), computed.transpose(2, 0, 1)
    )
    for one, other in zip(result.axes, np.roll(np.array(turned.axes), -1), strict=True):
        assert (one.planes, one.pairs, one.ends, one.control_rate) == (
            other.planes,
            other.pairs,
            other.ends,
            other.control_rate,
        )


# Verdicts


def test_whole_objects_have_no_seams_and_cut_objects_have():
    labels, every = blobs((64, 96, 96), 1), (32, 32, 32)
    whole, parts = seams_of(labels, every), seams_of(cut(labels, every), every)
    assert whole.verdict == "sound" and whole.sound
    assert abs(whole.total.ratio - 1) < 3 * whole.total.ratio_error < 0.25
    assert parts.verdict == "cut" and not parts.sound
    assert all(rates.rate == 1 and rates.verdict == "cut" for rates in parts.axes)
    some = seams_of(cut(labels, every, 0.05), every)
    assert 1 < some.total.ratio < parts.total.ratio


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_cut_along_one_axis_is_detected(axis):
    labels, every = blobs((64, 96, 96), 2), [1000] * 3
    every[axis] = 32
    parts = cut(labels, every)
    result = seams_of(parts, (32, 32, 32))
    assert [rates.verdict for rates in result.axes] == [
        "cut" if i == axis else "sound" for i in range(3)
    ]
    assert result.verdict == "cut"


def test_one_object_in_tiles_has_an_infinite_ratio():
    labels = np.ones((64, 64, 64), np.uint8)
    whole, parts = (seams_of(each, (16, 16, 16)) for each in (labels, cut(labels, (16, 16, 16))))
    assert whole.total.ratio is None and whole.sound and whole.total.text() == "–"  # noqa: RUF001
    assert parts.total.ratio == math.inf and parts.verdict == "cut"
    assert parts.summary() == "inf (z inf, y inf, x inf)"


def test_cubes_on_a_lattice_are_judged():
    z, y, x = (np.arange(n) // 20 for n in (64, 256, 256))
    cubes = 1 + 400 * z[:, None, None] + 20 * y[:, None] + x
    every = (32, 64, 64)
    whole, parts = (seams_of(each, every) for each in (cubes, cut(cubes, every)))
    assert whole.verdict == "sound" and parts.verdict == "cut"
    assert parts.axes[0].verdict == "sound"  # one plane alone may be a coincidence


def test_labels_of_slices_show_nothing_along_z_and_do_not_hide_other_cuts():
    labels = np.stack([1000 * z + blobs((1, 128, 128), z)[0] for z in range(8)])
    labels[labels % 1000 == 0] = 0
    assert seams_of(labels, (4, 32, 32)).sound
    parts = seams_of(cut(labels, (8, 32, 32)), (4, 32, 32))
    z, y, x = parts.axes
    assert z.control_rate == 1 and z.verdict == "sound"
    assert parts.total.pairs == y.pairs + x.pairs and parts.total.verdict == "cut"


def test_one_end_at_a_tile_plane_is_no_seam():
    labels = np.ones((32, 256, 256), np.uint8)
    labels[16:, :5, :5] = 2
    result = seams_of(labels, (16, 256, 256))
    assert result.total.ratio == math.inf and result.verdict == "sound"
    corner = seams_of(labels[:, :64, :64], (16, 64, 64))
    assert corner.total.ratio == math.inf and corner.verdict == "unknown"


def test_too_few_labels_are_not_judged():
    for labels in (np.zeros((8, 32, 32), np.uint8), np.eye(32, dtype=np.uint8)[None].repeat(8, 0)):
        result = seams_of(labels, (8, 30, 30))
        assert result.axes[0].planes == 0 and result.sound
    assert seams_of(np.zeros((8, 32, 32), np.uint8), (8, 16, 16)).verdict == "unknown"
    assert "too few" in seams_of(np.zeros((8, 32, 32), np.uint8), (8, 16, 16)).sentence()


def test_enlarged_labels_have_no_seams():
    labels = blobs((1, 96, 96), 3).repeat(4, 1).repeat(4, 2)
    assert seams_of(labels, (1, 48, 48)).sound


def test_tiles_that_were_not_computed_cut_nothing():
    labels, every = blobs((48, 96, 96), 4), (16, 32, 32)
    computed = np.random.default_rng(0).random((3, 3, 3)) < 0.6
    masked = labels * computed.repeat(16, 0).repeat(32, 1).repeat(32, 2)
    assert seams_of(masked, every).verdict == "cut"
    assert seams_of(masked, every, computed).sound


# Errors of the ratio


def test_few_degrees_of_freedom_need_a_larger_deviation():
    assert Error(1.0, 1e9).quantile == pytest.approx(3, abs=2e-4)
    assert Error(1.0, 3).quantile == pytest.approx(stats.t.ppf(stats.norm.cdf(3), 3), rel=1e-3)
    far = Rates(1, 1000, 70, 0.01, Error(0.01, 10))
    assert far.verdict == "cut" and Rates(1, 1000, 70, 0.01, Error(0.01, 3)).verdict == "sound"


def test_the_standard_error_is_that_of_repeated_volumes():
    ratios, errors = [], []
    for seed in range(60):
        total = seams_of(blobs((1, 128, 128), seed), (1, 32, 32)).total
        ratios.append(total.ratio)
        errors.append(total.ratio_error)
    assert np.mean(ratios) == pytest.approx(1, abs=3 * np.std(ratios) / math.sqrt(60))
    assert 0.7 < np.mean(errors) / np.std(ratios) < 1.5


def test_shifted_sections_widen_the_error():
    rng = np.random.default_rng(5)
    sections = [
        np.roll(blobs((1, 256, 256), 6)[0], rng.integers(-3, 4, 2), (0, 1)) for _ in range(8)
    ]
    z, *_ = seams_of(np.stack(sections), (4, 256, 256)).axes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seams, "_error_between_planes", lambda planes: None)
        narrow, *_ = seams_of(np.stack(sections), (4, 256, 256)).axes
    assert z.error.value > 2 * narrow.error.value and z.verdict == "sound"


@given(st.lists(st.tuples(st.floats(0.01, 10), st.integers(1, 50)), min_size=1, max_size=3))
def test_errors_add_as_welch_and_satterthwaite_say(errors):
    added = seams._sum_of(errors)
    assert added.value == pytest.approx(math.sqrt(sum(value**2 for value, _ in errors)))
    freedoms = [freedom for _, freedom in errors]
    assert min(freedoms) * (1 - 1e-9) <= added.freedom <= sum(freedoms) * (1 + 1e-9)
    if len(errors) == 1:
        assert added.freedom == pytest.approx(freedoms[0])


# Real labels


def slices_of(cells):
    """Cells of each slice, 4-connected; ids do not repeat."""
    labels, last = np.zeros(cells.shape, np.int64), 0
    for z, plane in enumerate(cells):
        parts, count = ndimage.label(plane)
        labels[z], last = np.where(parts, parts + last, 0), last + count
    return labels


@pytest.fixture(scope="module")
def real(shared_data):
    """Neurites in slices of the VNC, and neurites of FIB-25 in 3-D."""
    membranes = tifffile.imread(shared_data / "vnc_stack1/membranes.tif")
    return {
        "vnc": (slices_of(membranes == 0), (len(membranes), 128, 128)),
        "fib25": (tifffile.imread(shared_data / "fib25_crop/labels.tif"), (40, 40, 40)),
    }


@pytest.mark.parametrize(("name", "bound", "some"), [("vnc", 0.10, 0.05), ("fib25", 0.15, 0.3)])
def test_real_objects_have_no_seams_and_cut_ones_have(real, name, bound, some):
    labels, every = real[name]
    whole = seams_of(labels, every)
    assert whole.sound and abs(whole.total.ratio - 1) < bound
    for share, least in ((some, 1.5), (1, 20)):
        result = seams_of(cut(labels, every, share), every)
        assert result.verdict == "cut" and result.total.ratio > least, share


def test_nearby_control_planes_are_less_noisy_than_planes_in_the_middle(real, monkeypatch):
    labels, every = real["vnc"]

    def scatter():
        shifted = (labels[:, shift:, 2 * shift :] for shift in range(0, 64, 6))
        return np.std([seams_of(each, every).total.ratio for each in shifted])

    near = scatter()
    monkeypatch.setattr(seams, "_controls", lambda extent: [-extent // 4, extent // 4, extent // 2])
    assert near < 0.8 * scatter()


# Reading


class Recorded:
    """Labels of any extent: ids of blocks of 37 voxels; records the voxels of each read."""

    def __init__(self, shape):
        self.shape, self.dtype, self.reads = shape, np.dtype(np.uint64), []

    def __getitem__(self, box):
        z, y, x = (np.arange(s.start, s.stop, dtype=np.uint64) // np.uint64(37) for s in box)
        assert all(0 <= s.start < s.stop <= n for s, n in zip(box, self.shape, strict=True))
        labels = z[:, None, None] + 3 * y[:, None] + 7 * x + 1
        self.reads.append(labels.size)
        return labels


def test_a_huge_volume_is_read_in_windows_and_by_a_sample():
    labels = Recorded((1000, 20_000, 20_000))
    result = seams_of(labels, (64, 1024, 1024), most_pairs=1 << 22)
    assert max(labels.reads) <= 18 * 512 * 512
    assert sum(labels.reads) <= 3 * 18 * (1 << 22)
    assert all(0 < rates.planes < 20 for rates in result.axes)
    assert result == seams_of(labels, (64, 1024, 1024), most_pairs=1 << 22)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "uint64"])
def test_stored_labels_give_the_same_as_an_array(tmp_path, version, dtype):
    labels = blobs((12, 40, 50)).astype(dtype)
    zarr.create_array(tmp_path / "a.zarr", data=labels, chunks=(5, 16, 16), zarr_format=version)
    expected = seams_of(labels, (6, 16, 20))
    assert stored_seams(tmp_path / "a.zarr", (6, 16, 20)) == expected
    assert seams_of(zarr.open_array(tmp_path / "a.zarr", mode="r"), (6, 16, 20)) == expected
    assert seams_of(open_volume(tmp_path / "a.zarr"), (6, 16, 20)) == expected


def test_a_level_of_an_ome_zarr_group_and_a_tiff_file_are_read(tmp_path):
    labels = blobs((12, 40, 50)).astype(np.uint32)
    group = zarr.create_group(tmp_path / "labels/cells")
    group.create_array("0", data=labels, chunks=(6, 20, 25))
    axes = [{"name": axis, "type": "space"} for axis in "zyx"]
    scale = {"type": "scale", "scale": [1, 1, 1]}
    levels = [{"path": "0", "coordinateTransformations": [scale]}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": levels}]}
    expected = seams_of(labels, (6, 16, 20))
    assert stored_seams(tmp_path / "labels/cells", (6, 16, 20)) == expected
    tifffile.imwrite(tmp_path / "labels.tif", labels, metadata={"axes": "ZYX"})
    assert stored_seams(tmp_path / "labels.tif", (6, 16, 20)) == expected


def test_a_plane_is_a_volume_with_one_slice(tmp_path):
    labels = blobs((1, 80, 90))
    zarr.create_array(tmp_path / "plane.zarr", data=labels[0], chunks=(32, 32))
    assert stored_seams(tmp_path / "plane.zarr", (4, 32, 32)) == seams_of(labels, (1, 32, 32))


# Refusals


def test_other_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="has float32 voxels, but labels are integers"):
        seams_of(np.zeros((4, 4, 4), np.float32), (2, 2, 2))
    with pytest.raises(InputError, match="have 2 axes"):
        seams_of(np.zeros((4, 4), np.uint8), (2, 2, 2))
    for every in ((2, 2), (0, 2, 2)):
        with pytest.raises(InputError, match=r"every=.* must be three numbers above zero"):
            seams_of(np.zeros((4, 4, 4), np.uint8), every)
    zarr.create_array(tmp_path / "two.zarr", data=np.zeros((2, 4, 20, 20), np.uint8))
    with pytest.raises(InputError, match="has 2 channels, but labels have one"):
        stored_seams(tmp_path / "two.zarr", (2, 4, 4))
    with pytest.raises(InputError, match=r"every=9,90,90 leaves no tile plane .* 4 x 20 x 20"):
        zarr.create_array(tmp_path / "one.zarr", data=np.zeros((4, 20, 20), np.uint8))
        stored_seams(tmp_path / "one.zarr", (9, 90, 90))


@pytest.mark.parametrize("name", ["zarr.json", ".zgroup"])
def test_an_image_with_labels_is_refused(tmp_path, name):
    (tmp_path / "image.zarr/labels").mkdir(parents=True)
    (tmp_path / "image.zarr/labels" / name).write_text("{}")
    with pytest.raises(InputError, match=r"name the labels, as in .*image.zarr/labels/NAME"):
        stored_seams(tmp_path / "image.zarr", (2, 4, 4))
