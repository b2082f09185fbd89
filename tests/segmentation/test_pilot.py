"""Trials before a run: the estimates match the run, and no file is left behind."""

import dataclasses
import math
import sys
import tempfile
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tests.helper import TILED, noise, petabyte, random_model, resident_peak, shards_of, write_stack
from unet_ray.errors import RunError
from unet_ray.segmentation import outlook as planning
from unet_ray.segmentation import pilot
from unet_ray.segmentation.forecast import describe_trial
from unet_ray.segmentation.outlook import plan, spread
from unet_ray.segmentation.pilot import try_tiles
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.layout import chunk_of
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import Context, TilePlan


@pytest.fixture
def files(tmp_path):
    volume = write_stack(tmp_path / "volume.tif", noise((3, 61, 75)))
    return volume, random_model(tmp_path / "model.safetensors")


def test_the_estimated_bytes_per_tile_match_the_stored_bytes(files, tmp_path):
    outlook = plan(*files, TILED)
    store = segment(*files, tmp_path / "out", TILED)
    stored = sum((store / name).stat().st_size for name in shards_of(store))
    trial = try_tiles(outlook, 1)
    assert abs(trial.stored * outlook.tiles / stored - 1) < 0.3
    assert stored <= outlook.disk_bytes


@pytest.mark.parametrize("tile", [(1, 4, 4), (1, 2, 76), (1, 64, 76), (3, 64, 76)])
@pytest.mark.parametrize("outputs", [None, ("classes",)])
def test_a_store_needs_at_most_the_stated_disk_space(files, tmp_path, tile, outputs):
    settings = dataclasses.replace(TILED, tile=tile, outputs=outputs)
    store = segment(*files, tmp_path / "out", settings)
    used = [path.lstat().st_blocks * 512 for path in (store, *store.rglob("*"))]
    assert sum(used) <= plan(*files, settings).disk_bytes


def test_one_slab_of_a_large_tile_suffices_for_the_estimate(files, monkeypatch):
    outlook = plan(*files, dataclasses.replace(TILED, tile=(3, 64, 76)))
    whole = try_tiles(outlook, 1)
    shapes = []
    write = pilot.Store.write
    monkeypatch.setattr(pilot, "SLAB_BYTES", 1)
    monkeypatch.setattr(
        pilot.Store, "write", lambda *args: shapes.append(args[2]["classes"].shape) or write(*args)
    )
    slab = try_tiles(dataclasses.replace(outlook, plan=one_slice_a_pass(outlook.plan)), 1)
    assert {*shapes} == {(1, 64, 76)}
    assert abs(slab.stored / whole.stored - 1) < 0.3


def one_slice_a_pass(tiles):
    return dataclasses.replace(tiles, passes=(1, *tiles.passes[1:]))


def test_the_seconds_of_a_slab_are_scaled_to_the_tile(files, monkeypatch):
    outlook = plan(*files, dataclasses.replace(TILED, tile=(3, 64, 76)))
    clock = [0.0]

    def slowed(seconds, step):
        def slow_step(*args):
            clock[0] += seconds
            return step(*args)

        return slow_step

    monkeypatch.setattr(pilot, "SLAB_BYTES", 1)
    monkeypatch.setattr(pilot, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(pilot, "read_tile", slowed(1.0, pilot.read_tile))
    monkeypatch.setattr(pilot.Store, "write", slowed(5.0, pilot.Store.write))
    trial = try_tiles(dataclasses.replace(outlook, plan=one_slice_a_pass(outlook.plan)), 1)
    # The tile has three slices; a slab and a chunk of the input have one.
    assert (trial.read, trial.write, trial.tiles) == (3.0, 15.0, 1)


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 60), st.integers(1, 9))
def test_a_slab_is_as_deep_as_its_memory_limit_allows(z, step, layers, voxel):
    context = Context((0, 92, 92), (0, 96, 96), (1, 16, 16))
    tiles = TilePlan((100, 900, 900), (z * step, 160, 96), context, (step, 160, 96))
    layer = voxel * math.prod(tiles.read_shape[1:]) + 2 * 160 * 96
    with patch.object(pilot, "SLAB_BYTES", layers * layer):
        slab = pilot.slab_of(tiles, voxel, 2)
    depth = slab.core[0]
    assert slab.core[1:] == tiles.core[1:] and slab.passes == tiles.passes
    assert depth <= max(step, min(layers, z * step))
    chunk = chunk_of(tiles.core)[0]
    if layers >= z * step:
        assert slab == tiles
    elif layers >= math.lcm(chunk, step):
        assert depth % chunk == 0


def test_a_machine_with_little_memory_uses_fewer_threads_or_none(files, monkeypatch):
    outlook = plan(*files, TILED)
    monkeypatch.setattr(pilot.cluster, "usable_cores", lambda: 3)
    for fitting in (3, 2, 1):
        available = outlook.memory.shared_by(fitting)
        monkeypatch.setattr(pilot, "memory_available", lambda n=available: n)
        assert try_tiles(outlook).threads == fitting
    monkeypatch.setattr(pilot, "memory_available", lambda: outlook.memory.total - 1)
    assert try_tiles(outlook) is None
    monkeypatch.setattr(pilot, "memory_available", lambda: 0)  # unknown
    assert try_tiles(outlook).threads == 3


def test_more_workers_than_cores_are_no_faster(files, monkeypatch):
    monkeypatch.setattr(pilot.cluster, "usable_cores", lambda: 2)
    trial = dataclasses.replace(try_tiles(plan(*files, TILED)), first=0.0)
    for workers, rounds in ((1, 24), (2, 12), (8, 12)):
        outlook = plan(*files, dataclasses.replace(TILED, workers=workers))
        assert trial.run_seconds(outlook) == pytest.approx(rounds * trial.seconds)
    on_ray = dataclasses.replace(outlook, engine="ray")
    assert trial.run_seconds(on_ray) == pytest.approx(3 * trial.seconds)


def test_the_size_of_constant_passes_is_estimated_from_whole_chunks(files, tmp_path):
    zarr.create_array(tmp_path / "blank.zarr", shape=(32, 61, 75), chunks=(32, 61, 75), dtype="u1")
    settings = dataclasses.replace(TILED, tile=(32, 64, 76))
    outlook = plan(tmp_path / "blank.zarr", files[1], settings)
    outlook = dataclasses.replace(outlook, plan=one_slice_a_pass(outlook.plan))
    store = segment(tmp_path / "blank.zarr", files[1], tmp_path / "out.zarr", settings)
    stored = sum((store / shard).stat().st_size for shard in shards_of(store))
    assert abs(try_tiles(outlook).stored / stored - 1) < 0.5


def test_the_seconds_are_for_a_whole_tile(files, monkeypatch):
    predictor = pilot.Predictor.__call__
    passes = []

    def counted(*arguments):
        passes.append(1)
        return predictor(*arguments)

    monkeypatch.setattr(pilot.Predictor, "__call__", counted)
    ticks = iter(range(10**6))
    monkeypatch.setattr(pilot, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(pilot, "TRIAL_SECONDS", 10**6)
    monkeypatch.setattr(pilot, "INSPECT_SECONDS", 10**6)
    settings = dataclasses.replace(TILED, tile=(3, 32, 40))
    outlook = plan(*files, settings)
    deep = dataclasses.replace(outlook, plan=dataclasses.replace(outlook.plan, passes=(1, 32, 40)))
    trial = try_tiles(deep, 1)
    # Each step takes one tick and a tile has three passes. The first pass, a warm-up, is not timed.
    assert len(passes) - 1 == trial.passes == trial.inspected == 12 and trial.tiles == 4
    assert trial.predict >= 3 * trial.read > 0


def test_a_worker_on_a_gpu_reads_and_writes_while_it_predicts():
    on_cpu = pilot.Pilot(8, 8, 2, 1, read=1, predict=4, write=2, stored=1)
    assert on_cpu.seconds == 7
    assert dataclasses.replace(on_cpu, in_flight=2).seconds == 4
    assert dataclasses.replace(on_cpu, in_flight=2, read=5).seconds == 5.5
    helped = dataclasses.replace(on_cpu, in_flight=4, helpers=2)
    assert helped.seconds == 4
    assert dataclasses.replace(helped, write=9).seconds == 4.5


@given(*[st.integers(1, 10**6)] * 3)
def test_the_needed_readers_and_writers_keep_a_gpu_busy(read, predict, write):
    trial = pilot.Pilot(8, 8, 2, 4, read, predict, write, stored=1, helpers=2)
    needed = trial.needed_helpers
    assert dataclasses.replace(trial, helpers=needed).seconds == pytest.approx(predict)
    if needed > 1:
        assert dataclasses.replace(trial, helpers=needed - 1).seconds > predict
    assert dataclasses.replace(trial, helpers=0).needed_helpers == 0
    assert dataclasses.replace(trial, predict=0.0).needed_helpers == 0  # all is constant


@pytest.mark.parametrize(("read", "write", "needed"), [(8.1, 1, 3), (1, 41, 11), (8, 8, 0)])
def test_a_plan_states_that_a_gpu_would_wait_for_files(files, read, write, needed):
    trial = pilot.Pilot(8, 8, 2, 4, read, 4.0, write, stored=1, helpers=2)
    text = describe_trial(plan(*files, TILED), trial, None, "")
    line = f"waits   a GPU waits for its files: {needed} readers and {needed} writers would keep"
    assert (line in text) if needed else ("waits" not in text)


def test_slices_that_cannot_be_read_are_skipped(files, monkeypatch):
    outlook = plan(*files, dataclasses.replace(TILED, tile=(1, 64, 76)))
    read = outlook.volume.read

    def damaged(box):
        if box.start[0] <= 1 < box.stop[0]:
            raise RunError("a chunk is damaged")
        return read(box)

    monkeypatch.setattr(outlook.volume, "read", damaged)
    assert try_tiles(outlook, 1).tiles == 2


def test_constant_background_costs_next_to_nothing(tmp_path, files):
    empty = write_stack(tmp_path / "empty.tif", np.full((3, 61, 75), 7, np.uint8))
    settings = dataclasses.replace(TILED, tile=(3, 64, 76))
    empty, full = (try_tiles(plan(path, files[1], settings), 1) for path in (empty, files[0]))
    assert empty.predict == 0 < full.predict
    assert (empty.passes, full.first) == (0, 0) and empty.first > 0  # computed once


def test_the_trial_samples_passes_within_a_tile(tmp_path, files):
    image = noise((16, 61, 75))
    image[:2] = 0
    volume = write_stack(tmp_path / "blank.tif", image)
    settings = dataclasses.replace(TILED, tile=(16, 64, 76))
    outlook = plan(volume, files[1], settings)
    outlook = dataclasses.replace(outlook, plan=one_slice_a_pass(outlook.plan))
    store = segment(volume, files[1], tmp_path / "out", settings)
    trial, stored = try_tiles(outlook, 1), sum(map(len, shard_bytes(store)))
    assert (trial.tiles, trial.inspected, trial.constant) == (1, 16, 2)
    assert abs(trial.stored / stored - 1) < 0.3
    assert trial.predict == pytest.approx(14 * trial.first)  # `first` is one pass


@pytest.mark.parametrize("empty", [slice(0, 20), slice(20, 40), slice(1, 40, 2), slice(0, 39)])
def test_constant_passes_are_counted_however_long_the_others_take(
    tmp_path, files, empty, monkeypatch
):
    image = noise((40, 32, 32))
    image[empty] = 7
    volume = write_stack(tmp_path / "some.tif", image)
    outlook = plan(volume, files[1], dataclasses.replace(TILED, tile=(1, 32, 32), workers=1))
    monkeypatch.setattr(pilot, "TRIAL_SECONDS", 0)
    trial, full = try_tiles(outlook, 1), 40 - len(range(40)[empty])
    assert (trial.inspected, trial.constant, trial.passes, trial.tiles) == (40, 40 - full, 1, 2)
    assert trial.predict == pytest.approx(trial.first * full / 40)
    rest = 40 * (trial.read + trial.write)
    assert trial.run_seconds(outlook) == pytest.approx(trial.first * (full + 1) + rest)


def test_the_inspected_passes_cover_all_tiles_and_all_depths(files):
    outlook = plan(*files, dataclasses.replace(TILED, tile=(3, 64, 76)))
    tiles = dataclasses.replace(one_slice_a_pass(outlook.plan), shape=(9000, 120, 140))
    tiles = dataclasses.replace(tiles, core=(30, 64, 76))
    passes = pilot._plan_of_passes(tiles)
    sample = spread(range(len(tiles)), planning.SAMPLE)
    numbers = pilot._random_passes(dataclasses.replace(outlook, plan=tiles, sample=sample), passes)
    assert len(numbers) == len({*numbers}) == pilot.INSPECTIONS
    owners = [pilot._owner(tiles, passes[number]).index for number in numbers]
    assert {*owners} == {*sample}
    depths = [passes[number].write.start[0] % 30 for number in numbers]
    assert len({*depths}) > 15 and min(depths) < 5 and max(depths) >= 25


def test_inspection_respects_its_time_limit(files, monkeypatch):
    monkeypatch.setattr(pilot, "INSPECT_SECONDS", 0)
    assert try_tiles(plan(*files, TILED), 1).inspected == pilot.KINDS


def test_a_trial_removes_its_files_and_accepts_an_empty_sample(files, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    outlook = plan(*files, TILED)
    assert try_tiles(outlook).tiles > 0
    assert not list((tmp_path / "scratch").iterdir())
    empty = try_tiles(dataclasses.replace(outlook, sample=()))
    assert (empty.tiles, empty.seconds, empty.stored) == (0, 0, 0)
    if not pilot.torch.cuda.is_available():
        assert try_tiles(dataclasses.replace(outlook, device="cuda")) is None


def test_an_unreadable_input_is_reported(files, monkeypatch):
    outlook = plan(*files, TILED)

    def fail(*arguments):
        raise RunError("volume.tif cannot be read.")

    monkeypatch.setattr(outlook.volume, "read", fail)
    with pytest.raises(RunError, match="cannot be read"):
        try_tiles(outlook)


def test_tiles_with_non_finite_voxels_are_zeroed_or_skipped(tmp_path, files):
    voxels = noise((3, 61, 75)).astype(np.float32)
    voxels[:, :3, :3] = np.nan
    volume = write_stack(tmp_path / "nan.tif", voxels)
    settings = dataclasses.replace(TILED, tile=(1, 64, 76))
    zero = dataclasses.replace(settings, nan="zero")
    store = segment(volume, files[1], tmp_path / "out", zero)
    outlook = plan(volume, files[1], zero)
    trial, stored = try_tiles(outlook, 1), sum(map(len, shard_bytes(store)))
    assert trial.tiles == 3 and abs(trial.stored * outlook.tiles / stored - 1) < 0.3
    with pytest.raises(
        RunError, match=r"no tile could be processed: .*nan, read by tile .*--nan zero"
    ):
        try_tiles(plan(volume, files[1], settings), 1)
    voxels[1:, :3, :3] = 7
    partly_nan = plan(write_stack(tmp_path / "some.tif", voxels), files[1], settings)
    assert try_tiles(partly_nan, 1).tiles == 2


def shard_bytes(store):
    return [(store / name).read_bytes() for name in shards_of(store)]


@pytest.mark.parametrize("region", [None, Box((1, 30, 20), (2, 61, 40))])
def test_only_tiles_of_the_region_are_sampled(files, region, monkeypatch):
    outlook = plan(*files, dataclasses.replace(TILED, region=region))
    tiles = outlook.plan
    inside = {*tiles.within(region or Box.of(tiles.shape))}
    assert {*outlook.sample} <= inside and len(outlook.sample) == len(inside) == outlook.tiles


def test_only_tiles_under_the_mask_are_sampled(files, tmp_path):
    mask_voxels = np.zeros((3, 61, 75), np.uint8)
    mask_voxels[2, 40:, 50:] = 1
    mask = write_stack(tmp_path / "mask.tif", mask_voxels)
    outlook = plan(*files, dataclasses.replace(TILED, mask=mask))
    boxes = [outlook.plan[tile].write for tile in outlook.sample]
    assert len(boxes) == outlook.tiles == 2
    assert all(mask_voxels[box.slices].any() for box in boxes)


@pytest.mark.parametrize(("count", "limit"), [(0, 5), (3, 5), (5, 5), (100, 7), (10**12, 64)])
def test_a_sample_is_spread_evenly(count, limit):
    sample = spread(range(count), limit)
    assert len(sample) == min(count, limit) == len({*sample})
    assert all(0 <= n < count for n in sample)
    if len(sample) > 1:
        gaps = np.diff(sample)
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_planning_a_petabyte_needs_less_than_a_gigabyte(files, tmp_path):
    assert resident_peak(["plan", petabyte(tmp_path), "--model", files[1]]) < 10**9


def test_a_petabyte_is_planned_from_its_metadata(files, tmp_path):
    outlook = planning.plan(petabyte(tmp_path), files[1], Settings())
    assert outlook.tiles > 8e6 and len(outlook.sample) == planning.SAMPLE
    assert outlook.to_json()["driver_memory_bytes"] < 4 << 30
