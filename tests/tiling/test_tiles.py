"""Tiles: the voxels that each reads and owns, and the numbers that make tiling exact."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import (
    CUBE,
    SLICE,
    boxes,
    contexts,
    cubic_levels,
    flat_levels,
    levels,
    plans,
    shapes,
)
from unet_ray.errors import InputError
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.levels import Level, output_extents
from unet_ray.tiling.tiles import Context, TilePlan, equal_core, round_up

PAPER = Context((0, 92, 92), (0, 96, 96), (1, 16, 16))


def paper_plan(shape=(3, 1000, 700), core=(1, 384, 384)):
    return TilePlan(shape, core, PAPER, core)


# The plan: a function of an integer.


@settings(max_examples=60)
@given(plans())
def test_writes_partition_the_image(plan):
    painted = np.zeros(plan.shape, np.uint8)
    for tile in plan:
        painted[tile.write.slices] += 1
    assert (painted == 1).all()


@given(plans())
def test_every_read_has_one_shape(plan):
    assert {tile.read.shape for tile in plan} == {plan.read_shape}


@given(plans())
def test_every_read_starts_on_the_step(plan):
    for tile in plan:
        starts = zip(tile.read.start, plan.context.before, plan.context.step, strict=True)
        assert all((start + before) % step == 0 for start, before, step in starts)


@given(plans())
def test_a_tile_reads_its_core_and_the_halo_around_it(plan):
    for tile in plan:
        core = Box(
            tuple(a + n for a, n in zip(tile.read.start, plan.context.before, strict=True)),
            tuple(b - n for b, n in zip(tile.read.stop, plan.context.after, strict=True)),
        )
        assert core.shape == plan.core
        assert tile.write == core.intersect(Box.of(plan.shape)) and tile.write.size
        assert tile.crop.shift(core.start) == tile.write


@given(plans())
def test_plan_survives_pickle_in_less_than_2_kB(plan):
    data = pickle.dumps(plan)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert copy == plan and list(copy) == list(plan)


@given(plans())
def test_plan_survives_json(plan):
    fields = json.loads(json.dumps(dataclasses.asdict(plan)))
    copy = TilePlan.from_json(fields)
    # tuples, not lists: plans are compared and hashed
    assert copy == plan and hash(copy) == hash(plan)
    assert list(copy) == list(plan)


def test_the_pickle_of_a_huge_plan_is_small():
    plan = paper_plan(shape=(10**6, 10**7, 10**7))
    assert len(pickle.dumps(plan)) < 2000
    assert plan[len(plan) - 1].write.stop == plan.shape


@given(plans(), st.data())
def test_a_tile_is_a_pure_function_of_its_number(plan, data):
    numbers = data.draw(st.lists(st.integers(0, len(plan) - 1), min_size=1))
    in_order = list(plan)
    assert len(in_order) == len(plan)
    for number in numbers:
        assert plan[number] == in_order[number] and plan[number].index == number


@given(plans())
def test_tiles_are_numbered_in_reading_order(plan):
    starts = [tile.write.start for tile in plan]
    assert starts == sorted(starts)


@pytest.mark.parametrize("number", [-1, 18, 10**9])
def test_a_tile_number_outside_the_plan_is_refused(number):
    with pytest.raises(IndexError, match="of a plan with 18 tiles"):
        paper_plan()[number]


@settings(max_examples=60)
@given(plans(), boxes(low=-30, high=90))
def test_a_region_selects_exactly_the_tiles_that_overlap_it(plan, region):
    touching = [tile.index for tile in plan if tile.write.intersect(region).size]
    assert list(plan.within(region)) == touching


@settings(max_examples=60)
@given(plans())
def test_passes_of_one_shape_cover_what_the_tile_writes_once(plan):
    for tile in [plan[0], plan[len(plan) - 1]]:
        painted = np.zeros(plan.core, int)
        for part in plan.pass_boxes(tile):
            assert part.shape == plan.passes and part.intersect(tile.crop).size
            assert all(a % n == 0 for a, n in zip(part.start, plan.passes, strict=True))
            painted[part.slices] += 1
        assert painted.max() == 1 and (painted[tile.crop.slices] == 1).all()


def test_the_repr_of_a_plan_draws_a_tile():
    drawn = repr(paper_plan())
    assert "18 tiles, 3 x 3 x 2" in drawn
    assert "|-92-|" in drawn and " core 384 " in drawn and "|-96-|  = 572 read" in drawn
    for label, numbers in {"volume": (3, 1000, 700), "core": (1, 384, 384)}.items():
        assert f"{label:<7}" + " x ".join(f"{n:>5}" for n in numbers) in drawn


@pytest.mark.parametrize(
    ("core", "axis", "near"),
    [
        ((1, 388, 384), 1, 384),
        ((1, 384, 395), 2, 400),
        ((1, 384, 7), 2, 16),
        ((1, 384, 0), 2, 16),
        ((1, -384, 384), 1, 16),
        ((0, 384, 384), 0, 1),
    ],
)
def test_a_core_off_the_step_is_refused_naming_the_nearest(core, axis, near):
    with pytest.raises(InputError) as refused:
        TilePlan((4, 1000, 1000), core, PAPER, core)
    message = str(refused.value)
    assert f"tile={','.join(map(str, core))}" in message and message.endswith(f"nearest is {near}.")
    assert f"axis {axis} must be a multiple of its step, {PAPER.step[axis]};" in message


def test_a_core_that_passes_do_not_divide_is_refused():
    with pytest.raises(
        InputError, match="axis 1 must be a multiple of its pass, 48; nearest is 48"
    ):
        TilePlan((4, 1000, 1000), (2, 64, 64), PAPER, (1, 48, 64))


def test_a_pass_off_the_step_is_refused():
    # The core is valid, but its second pass would start on another phase of the max-pooling.
    with pytest.raises(InputError, match="step"):
        TilePlan((4, 1000, 1000), (2, 48, 48), PAPER, (1, 24, 24))


# Equal tiles.

sizes = {"extent": st.integers(1, 5000), "largest": st.integers(1, 2000)}


@given(**sizes, step=st.sampled_from([1, 2, 4, 8, 16]))
def test_equal_tiles_are_as_few_and_then_as_small_as_possible(extent, largest, step):
    core = equal_core(extent, largest, step)
    allowed = max(step, largest // step * step)
    tiles = -(-extent // core)
    assert core % step == 0 and step <= core <= allowed
    assert tiles == -(-extent // allowed)
    # With cores one step smaller, the same number of tiles would not cover the extent.
    assert tiles * core >= extent > tiles * (core - step)


@given(**sizes, step=st.sampled_from([1, 2, 4, 8, 16]))
def test_equal_tiles_leave_no_sliver(extent, largest, step):
    core = equal_core(extent, largest, step)
    tiles = -(-extent // core)
    last = extent - (tiles - 1) * core
    # Tiles of one size, a multiple of the step, cannot be closer to equal shares.
    assert core - last < tiles * step
    assert core - extent / tiles < step


def test_equal_tiles_of_an_image_of_2048():
    assert equal_core(2048, 1344, 16) == 1024
    assert equal_core(2000, 1344, 16) == 1008  # 1008 and 992, not 1344 and 656


@given(st.integers(0, 10**6), st.integers(1, 100))
def test_round_up(value, step):
    assert value <= round_up(value, step) < value + step and round_up(value, step) % step == 0


# The numbers of a network.


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_the_context_of_the_papers_layers(depth):
    step = 2**depth
    for network_levels, axes in ((flat_levels(depth), 2), (cubic_levels(depth), 3)):
        still = 3 - axes
        context = Context.of_levels(network_levels)
        assert context.step == (1,) * still + (step,) * axes
        assert context.before == (0,) * still + (6 * step - 4,) * axes
        assert context.after == (0,) * still + (6 * step,) * axes
        assert context.halo == (0,) * still + (12 * step - 4,) * axes


@pytest.mark.parametrize(
    ("depth", "extent", "output"),
    [(4, 572, 388), (3, 132, 44), (3, 116, 28), (4, 188, 4), (4, 571, None), (4, 172, None)],
)
def test_the_output_extents_of_the_papers(depth, extent, output):
    extents = output_extents([Level((3,), (2,))] * (depth + 1), [extent])
    assert extents == (output and (output,))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_valid_input_sizes_follow_the_formula(depth):
    smallest, lost = 4 * (2**depth - 1), 12 * 2**depth - 8
    for extent in range(1, 400):
        fits = extent > lost and (extent - smallest) % 2**depth == 0
        extents = output_extents([Level((3,), (2,))] * (depth + 1), [extent])
        assert extents == ((extent - lost,) if fits else None)


def walked(positions, kernels, pools):
    """Returns the input positions of the output voxels of a U-Net along one axis.

    Two convolutions drop the ends, pooling keeps the first position of each cell, and
    up-convolution restores the positions of the cell. A skip connection must have the same ones.
    """
    ends = kernels[0] - 1
    positions = positions[ends : len(positions) - ends]
    assert len(positions)
    if not pools:
        return positions
    assert len(positions) % pools[0] == 0
    spacing = positions[1] - positions[0] if len(positions) > 1 else 1
    below = walked(positions[:: pools[0]], kernels[1:], pools[1:])
    up = (below[:, None] + spacing * np.arange(pools[0])).ravel()
    excess = len(positions) - len(up)
    assert excess % 2 == 0
    np.testing.assert_array_equal(positions[excess // 2 : len(positions) - excess // 2], up)
    return up[ends : len(up) - ends]


@given(
    st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 2, 3])), max_size=4),
    st.sampled_from([1, 3, 5]),
    st.integers(1, 3),
)
def test_contexts_agree_with_walking_through_the_layers(drawn, deepest, steps):
    kernels, pools = [k for k, _ in drawn] + [deepest], [p for _, p in drawn]
    axis = [Level((k,), (p,)) for k, p in zip(kernels, [*pools, 1], strict=True)]
    context = Context.of_levels(axis)
    (before,), (after,), (step,) = context.before, context.after, context.step
    core = step * steps
    output = walked(np.arange(-before, core + after), kernels, pools)
    # The core comes first; the excess after it is dropped.
    np.testing.assert_array_equal(output[:core], np.arange(core))
    assert output_extents(axis, [before + core + after]) == (len(output),)
    assert len(output) < core + 2 * step + 8


def test_an_anisotropic_network():
    # Flat at full resolution, as for thick slices; cubic below: z is pooled once, y and x twice.
    context = Context.of_levels((SLICE, CUBE, CUBE))
    assert context.step == (2, 4, 4)
    for axis, kernels, pools in ((0, [1, 3, 3], [1, 2]), (1, [3, 3, 3], [2, 2])):
        before, after, core = context.before[axis], context.after[axis], 3 * context.step[axis]
        output = walked(np.arange(-before, core + after), kernels, pools)
        np.testing.assert_array_equal(output[:core], np.arange(core))
    assert context.before[1:] == (20, 20) and context.after[1:] == (24, 24)
    assert (context.before[0], context.after[0]) == (8, 8)


@given(levels())
def test_axes_are_independent(network_levels):
    whole = Context.of_levels(network_levels)
    for axis in range(3):
        single = Context.of_levels(
            [Level((v.kernel[axis],), (v.pool[axis],)) for v in network_levels]
        )
        assert single == Context((whole.before[axis],), (whole.after[axis],), (whole.step[axis],))


@given(contexts(), shapes())
def test_input_extents_are_a_halo_and_steps(context, steps):
    core = tuple(n * s for n, s in zip(steps, context.step, strict=True))
    plan = TilePlan((1, 1, 1), core, context, core)
    assert plan.read_shape == tuple(c + h for c, h in zip(core, context.halo, strict=True))
    assert plan.pass_shape == plan.read_shape
