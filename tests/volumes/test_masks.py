"""Tiles selected by a mask, against a check of every voxel, and runs with a mask."""

import dataclasses

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helper import TILED, StoppedError, bytes_of, state_of, stop_after, write_stack
from unet_ray.errors import InputError
from unet_ray.report.page import write_report
from unet_ray.scores.evaluation import evaluate
from unet_ray.segmentation.outlook import plan
from unet_ray.segmentation.run import TileWorker
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.verification import verify
from unet_ray.storage.layout import LEDGER
from unet_ray.storage.ledger import committed, skipped
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import Context, TilePlan
from unet_ray.volumes import masks
from unet_ray.volumes.masks import open_mask, tiles_under

NEAR = Context((0, 0, 0), (0, 0, 0), (1, 1, 1))


class ArrayMask:
    def __init__(self, voxels):
        self.voxels, self.shape, self.dtype = voxels, (1, *voxels.shape), voxels.dtype
        self.boxes_read = []

    def read(self, box):
        self.boxes_read.append(box)
        return self.voxels[None][(slice(None), *box.slices)]


@settings(max_examples=100)
@given(st.data())
def test_a_tile_is_selected_if_its_core_touches_a_nonzero_voxel_of_the_mask(data):
    shape = data.draw(st.tuples(*[st.integers(1, 40)] * 3))
    core = data.draw(st.tuples(*[st.integers(1, 12)] * 3))
    coarse = tuple(data.draw(st.integers(1, n)) for n in shape)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    mask = ArrayMask((rng.random(coarse) < 0.05).astype(np.uint8))
    plan = TilePlan(shape, core, NEAR, core)
    with pytest.MonkeyPatch.context() as small:
        small.setattr(masks, "READ_BYTES", data.draw(st.sampled_from([1, 50, 500, 10**6])))
        selected = tiles_under(mask, plan)
    assert selected.shape == plan.counts
    for tile in plan:
        touched = [
            {m for m in range(k) if m * n < b * k and (m + 1) * n > a * k}
            for a, b, n, k in zip(tile.write.start, tile.write.stop, shape, coarse, strict=True)
        ]
        assert selected.flat[tile.index] == mask.voxels[np.ix_(*map(sorted, touched))].any()


def test_a_large_mask_is_read_in_parts(monkeypatch):
    monkeypatch.setattr(masks, "READ_BYTES", 4000)
    mask = ArrayMask(np.ones((16, 64, 64), np.uint8))
    plan = TilePlan((16, 64, 64), (4, 16, 16), NEAR, (4, 16, 16))
    assert tiles_under(mask, plan).all()
    assert max(box.size for box in mask.boxes_read) <= 4000


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        ("ZYX", (3, 5, 5), "the same or a coarser resolution"),
        ("ZCYX", (4, 2, 4, 4), "must have one channel, not 2"),
    ],
)
def test_a_mask_that_is_finer_or_has_channels_is_refused(tmp_path, axes, shape, message):
    voxels = np.zeros(shape, np.uint8)
    tifffile.imwrite(tmp_path / "mask.tif", voxels, imagej=True, metadata={"axes": axes})
    with pytest.raises(InputError, match=message):
        open_mask(tmp_path / "mask.tif", (4, 4, 9))


# Runs with a mask


@pytest.fixture
def masked(tmp_path):
    """Settings with a mask that selects 5 of the 24 tiles, and the numbers of these tiles."""
    mask = np.zeros((3, 31, 25), np.uint8)
    mask[0, 2, 2] = mask[1, 15:18, 20] = mask[2, 30, 24] = mask[2, 0, 7] = 9
    write_stack(tmp_path / "mask.tif", mask)
    return dataclasses.replace(TILED, mask=tmp_path / "mask.tif"), [0, 11, 15, 17, 23]


def test_only_the_tiles_of_a_mask_are_read_and_the_others_are_skipped(
    task, tmp_path, masked, monkeypatch
):
    volume, model, whole = task
    under_mask, numbers = masked
    read, tiles_read = TileWorker.read, []
    monkeypatch.setattr(
        TileWorker, "read", lambda worker, tile: tiles_read.append(tile) or read(worker, tile)
    )
    progress, out = [], tmp_path / "out.zarr"
    segment(volume, model, out, under_mask, progress.append)
    assert sorted(tiles_read) == numbers and [p.total for p in progress] == [5] * 5
    assert np.flatnonzero(committed(out / LEDGER, 24)).tolist() == numbers
    assert np.flatnonzero(~skipped(out / LEDGER, 24)).tolist() == numbers
    stored, expected = bytes_of(out), bytes_of(whole)
    assert stored.items() <= expected.items()
    assert sum("/c/" in name for name in stored) == 10

    before = state_of(out)
    segment(volume, model, out, under_mask)
    assert state_of(out) == before
    verdict = verify(out, tiles=1)
    assert verdict.sound and verdict.notes == ("19 of 24 tiles were left out by a mask.",)
    truth = tmp_path / "truth.tif"
    write_stack(truth, np.zeros((3, 61, 75), np.uint8))
    scored = evaluate(out, truth, "classes")
    assert 0.5 < scored.scores["accuracy"].value <= 1
    assert "19 of 24 tiles were left out by a mask and count as 0" in scored.note
    assert "19 tiles were left out by a mask." in write_report(out).read_text()

    tiles_read.clear()
    segment(volume, model, out, TILED)  # without the mask: the other tiles
    assert bytes_of(out) == expected and len(tiles_read) == 19
    assert not skipped(out / LEDGER, 24).any()


def test_tiles_skipped_by_a_mask_count_as_missing_in_a_run_without_it(task, tmp_path, masked):
    volume, model, _ = task
    under_mask, _ = masked
    out = segment(volume, model, tmp_path / "out.zarr", under_mask)
    with pytest.raises(StoppedError):
        segment(volume, model, out, TILED, stop_after(2))
    assert not skipped(out / LEDGER, 24).any()
    with pytest.raises(InputError, match="of 24 tiles are not done"):
        evaluate(out, volume, "classes")
    assert "are not done" in verify(out, tiles=0).notes[0]
    segment(volume, model, out, under_mask)  # skips the remaining tiles again
    assert (skipped(out / LEDGER, 24) == ~committed(out / LEDGER, 24)).all()


def test_a_mask_and_a_region_select_their_common_tiles(task, tmp_path, masked):
    volume, model, _ = task
    under_mask, _ = masked
    region = dataclasses.replace(under_mask, region=Box((0, 0, 0), (1, 61, 75)))
    out = tmp_path / "out.zarr"
    assert plan(volume, model, region).tiles == 1 and plan(volume, model, under_mask).tiles == 5
    segment(volume, model, out, region)
    assert np.flatnonzero(committed(out / LEDGER, 24)).tolist() == [0]
    assert np.flatnonzero(skipped(out / LEDGER, 24)).tolist() == [*range(1, 8)]
    with pytest.raises(InputError, match="16 of 24 tiles are not done"):
        evaluate(out, volume, "classes")


def test_a_run_with_an_empty_mask_skips_all_tiles(task, tmp_path):
    volume, model, _ = task
    write_stack(tmp_path / "mask.tif", np.zeros((1, 4, 4), np.uint8))
    empty = dataclasses.replace(TILED, mask=tmp_path / "mask.tif")
    out = segment(volume, model, tmp_path / "out.zarr", empty)
    assert skipped(out / LEDGER, 24).all()
