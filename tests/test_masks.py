"""Which tiles a mask asks for, against a look at every voxel."""

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_ray import masks
from unet_ray.errors import InputError
from unet_ray.masks import open_mask, tiles_under
from unet_ray.tiles import Context, TilePlan

NEAR = Context((0, 0, 0), (0, 0, 0), (1, 1, 1))


class ArrayMask:
    def __init__(self, voxels):
        self.voxels, self.shape, self.dtype = voxels, (1, *voxels.shape), voxels.dtype
        self.asked = []

    def read(self, box):
        self.asked.append(box)
        return self.voxels[None][(slice(None), *box.slices)]


@settings(max_examples=100)
@given(st.data())
def test_a_tile_is_asked_for_if_the_mask_shows_something_in_its_core(data):
    shape = data.draw(st.tuples(*[st.integers(1, 40)] * 3))
    core = data.draw(st.tuples(*[st.integers(1, 12)] * 3))
    coarse = tuple(data.draw(st.integers(1, n)) for n in shape)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    mask = ArrayMask((rng.random(coarse) < 0.05).astype(np.uint8))
    plan = TilePlan(shape, core, NEAR, core)
    with pytest.MonkeyPatch.context() as small:
        small.setattr(masks, "READ_BYTES", data.draw(st.sampled_from([1, 50, 500, 10**6])))
        found = tiles_under(mask, plan)
    assert found.shape == plan.counts
    for tile in plan:
        touched = [
            {m for m in range(k) if m * n < b * k and (m + 1) * n > a * k}
            for a, b, n, k in zip(tile.write.start, tile.write.stop, shape, coarse, strict=True)
        ]
        assert found.flat[tile.index] == mask.voxels[np.ix_(*map(sorted, touched))].any()


def test_a_large_mask_is_read_by_parts(monkeypatch):
    monkeypatch.setattr(masks, "READ_BYTES", 4000)
    mask = ArrayMask(np.ones((16, 64, 64), np.uint8))
    plan = TilePlan((16, 64, 64), (4, 16, 16), NEAR, (4, 16, 16))
    assert tiles_under(mask, plan).all()
    assert max(box.size for box in mask.asked) <= 4000


@pytest.mark.parametrize(
    ("axes", "shape", "words"),
    [("ZYX", (3, 5, 5), "as fine or coarser"), ("ZCYX", (4, 2, 4, 4), "has one channel, not 2")],
)
def test_what_is_no_mask_of_the_volume_is_refused(tmp_path, axes, shape, words):
    voxels = np.zeros(shape, np.uint8)
    tifffile.imwrite(tmp_path / "mask.tif", voxels, imagej=True, metadata={"axes": axes})
    with pytest.raises(InputError, match=words):
        open_mask(tmp_path / "mask.tif", (4, 4, 9))
