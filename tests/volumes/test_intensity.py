"""Mean and deviation of intensities against NumPy, for all dtypes and sizes of pieces."""

import json
import tracemalloc

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from unet_ray.errors import InputError, RunError
from unet_ray.tiling.boxes import Box
from unet_ray.volumes import intensity
from unet_ray.volumes import volume as volumes
from unet_ray.volumes.intensity import Intensity, measure, measured_bytes
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume


class ArrayVolume:
    """An array as a volume (c, z, y, x); records which boxes were read."""

    def __init__(self, voxels, chunk=(1, 1, 1)):
        self.voxels, self.chunk, self.boxes_read = voxels, chunk, []
        self.shape, self.dtype = voxels.shape, voxels.dtype

    def read(self, box):
        self.boxes_read.append(box)
        return self.voxels[(slice(None), *box.slices)].copy()

    def read_with_retries(self, box):
        return Volume.read_with_retries(self, box)


def assert_close(measured, mean, sd):
    np.testing.assert_allclose(measured.mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(measured.sd, sd, rtol=1e-9, atol=1e-12)


def per_channel(voxels, function):
    return [function(channel.astype(np.float64)) for channel in voxels]


@settings(max_examples=30)
@given(
    st.sampled_from(["uint8", "uint16", "int16", "int32", "float32", "float64"]),
    st.tuples(st.integers(1, 3), *[st.integers(1, 40)] * 3),
    st.integers(0, 99),
)
def test_mean_and_deviation_are_those_of_numpy(dtype, shape, seed):
    rng = np.random.default_rng(seed)
    voxels = (rng.normal(size=shape) * 20 + rng.integers(60, 120)).clip(0, 255).astype(dtype)
    measured, sd = measure(ArrayVolume(voxels)), per_channel(voxels, np.std)
    assert_close(measured, per_channel(voxels, np.mean), np.where(np.array(sd) == 0, 1, sd))


@given(st.data(), st.sampled_from(["uint8", "uint16"]))
def test_mean_and_deviation_of_any_integers(data, dtype):
    voxels = data.draw(arrays(dtype, (2, 2, 3, 4)))
    sd = np.array(per_channel(voxels, np.std))
    assert_close(
        measure(ArrayVolume(voxels)), per_channel(voxels, np.mean), np.where(sd == 0, 1, sd)
    )


def test_values_far_from_zero_keep_their_digits():
    rng = np.random.default_rng(0)
    voxels = (rng.normal(size=(1, 20, 30, 40)) + 1e7).astype(np.float64)
    assert_close(
        measure(ArrayVolume(voxels)), per_channel(voxels, np.mean), per_channel(voxels, np.std)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_ignored(bad):
    voxels = np.random.default_rng(0).normal(7, 3, (2, 20, 9, 11)).astype(np.float32)
    voxels[0, ::3] = bad
    voxels[0, 0] = bad  # all voxels of the first pieces
    finite = [channel[np.isfinite(channel)] for channel in voxels]
    assert_close(
        measure(ArrayVolume(voxels)), per_channel(finite, np.mean), per_channel(finite, np.std)
    )


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_channel_normalises_to_zero(value):
    voxels = np.full((2, 3, 4, 5), value, np.uint8)
    voxels[1, 0, 0, 0] ^= 1
    measured = measure(ArrayVolume(voxels))
    assert measured.mean[0] == value and measured.sd[0] == 1 and measured.sd[1] != 1
    assert not measured.normalise(voxels)[0].any()


@settings(max_examples=20)
@given(st.tuples(*[st.integers(1, 30)] * 3), st.sampled_from(["uint8", "uint16", "float32"]))
def test_the_values_do_not_depend_on_chunks(chunk, dtype):
    voxels = np.random.default_rng(1).integers(0, 256, (2, 40, 50, 60)).astype(dtype)
    volume = ArrayVolume(voxels, chunk)
    with pytest.MonkeyPatch.context() as small:
        small.setattr(intensity, "PIECE", (7, 16, 16))
        measured = measure(volume)
    assert len(volume.boxes_read) > 1
    assert_close(measured, per_channel(voxels, np.mean), per_channel(voxels, np.std))
    # Chunks are read whole, and once.
    reads = np.zeros(voxels.shape[1:], int)
    for box in volume.boxes_read:
        reads[box.slices] += 1
        assert all(a % n == 0 for a, n in zip(box.start, chunk, strict=True))
    assert (reads == 1).all()


# Volumes with unreadable parts.


class DamagedVolume(ArrayVolume):
    """An array volume whose voxel `bad` (z, y, x) cannot be read the first `times` times."""

    def __init__(self, voxels, chunk, bad, times):
        super().__init__(voxels, chunk)
        self.bad, self.times = Box.of((1, 1, 1)).shift(bad), times

    def read(self, box):
        if box.intersect(self.bad).size and self.times:
            self.times -= 1
            raise RunError("a.zarr cannot be read.")
        return super().read(box)


@pytest.mark.parametrize("shape", [(1, 32, 1024, 1024), (8, 4, 512, 512)])
def test_measuring_needs_no_more_memory_than_estimated(tmp_path, shape):
    chunk = (1, *shape[1:])
    array = zarr.create_array(tmp_path / "a.zarr", shape=shape, chunks=chunk, dtype="uint16")
    array[:] = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16)
    volume = open_volume(tmp_path / "a.zarr")
    measure(volume)  # so that late imports are not counted
    tracemalloc.start()
    try:
        measure(volume)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert measured_bytes(volume) / 3 < peak <= measured_bytes(volume)


@pytest.fixture
def damaged(monkeypatch):
    """Voxels, and their volume in chunks of 4 x 8 x 8, one of which fails at first."""
    monkeypatch.setattr(volumes, "_PAUSE", 0)
    voxels = np.random.default_rng(3).normal(100, 30, (1, 8, 16, 24)).clip(0, 255)

    def make(times, dtype="uint8"):
        volume = voxels.astype(dtype)
        return volume, DamagedVolume(volume, (4, 8, 8), (5, 3, 9), times)

    return make


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_read_that_succeeds_after_retries_changes_no_bit(damaged, times, dtype, monkeypatch):
    monkeypatch.setattr(intensity, "PIECE", (4, 8, 8))
    voxels, volume = damaged(times, dtype)
    assert measure(volume) == measure(ArrayVolume(voxels, (4, 8, 8)))
    assert volume.times == 0


def test_an_unreadable_chunk_is_left_out_and_recorded(damaged):
    voxels, volume = damaged(10**9)
    measured, readable = measure(volume), np.ones(voxels.shape, bool)
    readable[:, 4:8, 0:8, 8:16] = False
    assert_close(measured, [voxels[readable].mean()], [voxels[readable].std()])
    assert measured.unread == ("4:8,0:8,8:16",)
    assert Intensity.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_a_volume_that_is_gone_is_refused_after_few_reads(monkeypatch):
    monkeypatch.setattr(volumes, "_PAUSE", 0)
    monkeypatch.setattr(intensity, "PIECE", (1, 8, 8))

    class Gone(ArrayVolume):
        def read(self, box):
            self.boxes_read.append(box)
            raise RunError("a.zarr cannot be read.")

    volume = Gone(np.ones((1, 9, 64, 64), np.uint8), (1, 2, 2))
    with pytest.raises(InputError, match=r"a.zarr cannot be read"):
        measure(volume)
    pieces = 9 * 64
    assert len(volume.boxes_read) <= pieces + 3 * (1 + intensity.PROBED_CHUNKS)


@pytest.mark.parametrize("piece", [(1, 8, 8), (16, 64, 64)])
def test_a_volume_that_is_unreadable_at_first_is_measured_without_its_bad_chunk(monkeypatch, piece):
    monkeypatch.setattr(volumes, "_PAUSE", 0)
    monkeypatch.setattr(intensity, "PIECE", piece)
    voxels = np.random.default_rng(5).integers(0, 255, (1, 4, 16, 16), np.uint8)
    pieces = len(intensity._pieces(ArrayVolume(voxels, (1, 4, 4))))

    class Away(ArrayVolume):
        def read(self, box):
            self.boxes_read.append(box)
            first = box.start == (0, 0, 0)  # the first chunk stays unreadable
            if len(self.boxes_read) <= pieces or first:
                raise RunError(f"a.zarr: {box} cannot be read.")
            return voxels[(slice(None), *box.slices)]

    readable = np.ones(voxels.shape, bool)
    readable[:, 0, :4, :4] = False
    measured = measure(Away(voxels, (1, 4, 4)))
    assert_close(measured, [voxels[readable].mean()], [voxels[readable].std()])
    assert measured.unread == ("0:1,0:4,0:4",)


def test_a_piece_without_finite_values_that_is_read_by_chunks_is_ignored(monkeypatch):
    monkeypatch.setattr(volumes, "_PAUSE", 0)

    class Narrow(ArrayVolume):
        def read(self, box):
            if box.size > 16:
                raise RunError("a.zarr: the read is too large.")
            return super().read(box)

    measured = measure(Narrow(np.full((1, 2, 8, 8), np.nan, np.float32), (1, 4, 4)))
    assert (measured.mean, measured.sd, measured.unread) == ((0.0,), (1.0,), ())


@settings(max_examples=30)
@given(st.tuples(*[st.integers(1, 40)] * 3), st.integers(0, 4))
def test_pieces_are_aligned_to_chunks(chunk, small):
    volume = ArrayVolume(np.zeros((1, 50, 40, 30), np.uint8), chunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intensity, "PIECE", (16, 8, 8))
        patch.setattr(intensity, "PIECE_BYTES", 1000 * small + 1)
        measure(volume)
    for box in volume.boxes_read:
        assert all(a % n == 0 for a, n in zip(box.start, chunk, strict=True))
    assert sum(box.size for box in volume.boxes_read) == 50 * 40 * 30


def test_an_unreadable_volume_is_refused(monkeypatch):
    monkeypatch.setattr(volumes, "_PAUSE", 0)
    volume = DamagedVolume(np.ones((1, 1, 5, 5)), (1, 8, 8), (0, 0, 0), 10**9)
    with pytest.raises(InputError, match=r"a.zarr cannot be read"):
        measure(volume)


# Volumes that are measured from a sample.


@pytest.fixture
def large(monkeypatch):
    """A volume of 256 pieces, 8 times as large as the limit of an exact measurement."""
    monkeypatch.setattr(intensity, "PIECE", (4, 8, 8))
    monkeypatch.setattr(intensity, "EXACT_BYTES", 8192)
    return np.random.default_rng(2).integers(0, 256, (1, 16, 64, 64), np.uint8)


def sampled(voxels):
    volume = ArrayVolume(voxels)
    return measure(volume), volume.boxes_read


def test_a_large_volume_is_measured_on_a_sample(large):
    measured, boxes = sampled(large)
    pieces = list(Box.of(large.shape[1:]).split((4, 8, 8)))
    assert set(boxes) < set(pieces) and len(boxes) == len(set(boxes))
    assert boxes[0] == pieces[0]
    assert 16 < len(boxes) < 64  # about one in eight of 256
    read = np.concatenate([large[0][box.slices].ravel() for box in boxes]).astype(float)
    assert_close(measured, [read.mean()], [read.std()])
    assert abs(measured.mean[0] - large.mean()) < 3 and abs(measured.sd[0] - large.std()) < 3


def test_the_sample_is_always_the_same_and_independent_of_the_content(large):
    first, again = sampled(large), sampled(large)
    assert first == again
    assert sampled(255 - large)[1] == first[1]


def test_a_volume_of_exactly_the_limit_is_measured_whole(large):
    voxels = large[:, :2]
    measured, boxes = sampled(voxels)
    assert voxels.nbytes == 8192 and sum(box.size for box in boxes) == voxels[0].size
    assert_close(measured, per_channel(voxels, np.mean), per_channel(voxels, np.std))
    assert sum(box.size for box in sampled(large[:, :3])[1]) < large[0, :3].size


def test_the_limit_is_2_GiB():
    assert intensity.EXACT_BYTES == 2**31


# Normalisation.


def test_normalised_values_have_mean_0_and_deviation_1():
    voxels = np.random.default_rng(3).integers(0, 60000, (2, 9, 30, 31)).astype(np.uint16)
    voxels[1] //= 7
    normal = measure(ArrayVolume(voxels)).normalise(voxels)
    assert normal.dtype == np.float32 and normal.shape == voxels.shape
    exact = [(v - v.mean()) / v.std() for v in voxels.astype(np.float64)]
    np.testing.assert_allclose(normal, exact, atol=1e-5)


def test_normalising_does_not_change_its_input():
    voxels = np.ones((1, 2, 2), np.float32)
    Intensity((5.0,), (2.0,)).normalise(voxels)
    assert (voxels == 1).all()


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=3), st.floats(1e-9, 1e9))
def test_values_survive_json(mean, sd):
    values = Intensity(tuple(mean), (sd,) * len(mean))
    fields = json.loads(json.dumps(values.to_json()))
    assert fields["method"] == "mean-std" and Intensity.from_json(fields) == values


def test_values_far_from_zero_keep_their_distances():
    values = np.arange(8, dtype=np.int32).reshape(1, 1, 2, 4)
    far = Intensity((1e9 + 3.5,), (2.0,))
    expected = (values - 3.5) / 2
    assert np.allclose(far.normalise(values + np.int32(10**9)), expected, atol=1e-6)


def test_values_whose_variance_is_not_a_float_are_refused():
    with pytest.raises(InputError, match="so large that their variance exceeds the range of float"):
        measure(open_volume(np.array([[1e300, -1e300], [0, 1]])))
