"""The levels of a pyramid: factors from extents and voxel sizes, shapes, and plans of shards."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import plans, shapes
from unet_ray.tiling.pyramid import LARGEST_TOP, NO_CONTEXT, factors_of, level_plan, level_shape
from unet_ray.tiling.tiles import Context, TilePlan

large_shapes = st.tuples(st.integers(1, 3000), st.integers(1, 200_000), st.integers(1, 200_000))
voxel_sizes = st.none() | st.tuples(*[st.floats(1e-3, 1e3)] * 3)
volumes = st.tuples(large_shapes, voxel_sizes)


def ratios(factors):
    """The factors of each level relative to the level below."""
    levels = [np.array(level) for level in ((1, 1, 1), *factors)]
    return [coarse / fine for fine, coarse in itertools.pairwise(levels)]


@given(volumes)
def test_each_level_halves_some_axes_of_the_level_below(volume):
    for ratio in ratios(factors_of(*volume)):
        assert set(ratio) <= {1, 2} and 2 in ratio[1:]


@given(volumes)
def test_the_last_level_is_the_first_that_fits(volume):
    shape, factors = volume[0], factors_of(*volume)
    extents = [level_shape(shape, level)[1:] for level in ((1, 1, 1), *factors)]
    assert max(extents[-1]) <= LARGEST_TOP
    assert all(max(level) > LARGEST_TOP for level in extents[:-1])


@given(shapes((3000, LARGEST_TOP, LARGEST_TOP)), voxel_sizes)
def test_a_volume_that_fits_has_no_levels(shape, voxel_size):
    assert factors_of(shape, voxel_size) == ()


@given(volumes)
def test_the_shape_of_a_level_counts_the_blocks_that_contain_a_voxel(volume):
    shape = volume[0]
    for factors in factors_of(*volume):
        last_voxels = [(n - 1) // f for n, f in zip(shape, factors, strict=True)]
        assert level_shape(shape, factors) == tuple(last + 1 for last in last_voxels)


@given(volumes)
def test_an_axis_is_never_halved_below_one_voxel(volume):
    shape = volume[0]
    for factors in factors_of(*volume):
        assert all(f == 1 or f < 2 * n for n, f in zip(shape, factors, strict=True))


@given(volumes)
def test_levels_do_not_depend_on_the_unit_of_the_voxel_size(volume):
    shape, voxel_size = volume
    if voxel_size:
        assert factors_of(shape, [1024 * s for s in voxel_size]) == factors_of(shape, voxel_size)


@pytest.mark.parametrize(
    ("voxel_size", "expected"),
    [
        (None, [(1, 2, 2), (1, 4, 4), (1, 8, 8), (1, 16, 16)]),
        ((1, 1, 1), [(2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16)]),
        ((5, 1, 1), [(1, 2, 2), (1, 4, 4), (1, 8, 8), (2, 16, 16)]),
        ((4, 1, 1), [(1, 2, 2), (1, 4, 4), (2, 8, 8), (4, 16, 16)]),
        ((2, 1, 3), [(1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16)]),
        ((0.5, 1, 1), [(2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16)]),
    ],
)
def test_z_is_halved_once_its_voxels_are_no_longer_than_those_along_y_and_x(voxel_size, expected):
    assert factors_of((100, 8000, 5000), voxel_size) == tuple(expected)


def test_axes_of_one_voxel_are_kept():
    assert factors_of((1, 1100, 900), (1, 1, 1)) == ((1, 2, 2), (1, 4, 4))
    assert factors_of((3, 1, 1100), (1, 1, 1)) == ((2, 1, 2), (4, 1, 4))
    assert factors_of((1, 2, 2000), None) == ((1, 2, 2), (1, 2, 4))


@settings(max_examples=60)
@given(plans(), st.tuples(*[st.sampled_from([1, 2, 4])] * 3))
def test_the_tiles_of_a_level_cover_it_once_and_read_no_halo(base, factors):
    plan = level_plan(base, factors)
    assert plan.shape == level_shape(base.shape, factors) and plan.context == NO_CONTEXT
    painted = np.zeros(plan.shape, np.uint8)
    for tile in plan:
        assert tile.read.shape == plan.core
        painted[tile.write.slices] += 1
    assert (painted == 1).all()
    for core, largest, step, extent in zip(
        plan.core, base.core, base.context.step, plan.shape, strict=True
    ):
        assert core % step == 0 and core <= largest and core < extent + step
    assert len(plan) <= len(base)


def test_a_level_keeps_the_shards_of_the_volume_where_they_fit():
    context = Context((0, 92, 92), (0, 96, 96), (1, 16, 16))
    base = TilePlan((5, 3000, 1914), (2, 1024, 1024), context, (1, 512, 512))
    assert level_plan(base, (1, 2, 2)).core == (2, 1024, 960)
    assert level_plan(base, (4, 4, 4)).core == (2, 752, 480)
