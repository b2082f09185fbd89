"""Streams along z, against passes over the whole volume, in integers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import cubic_levels, levels
from tests.toynet import StreamedToyNet, ToyNet
from unet_ray.errors import InputError
from unet_ray.tiling.levels import Level
from unet_ray.tiling.streaming import stream_along
from unet_ray.tiling.tiles import Context, round_up


@st.composite
def layered(draw):
    """Levels of which each convolves and pools along z or not, and a slab."""
    depth = draw(st.integers(1, 3))
    widths = st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 2]))
    pairs = draw(st.lists(widths, min_size=depth + 1, max_size=depth + 1))
    network = tuple(Level((k, 3, 3), (p, 2, 2)) for k, p in pairs)
    return network, Context.of_levels(network).step[0] * draw(st.integers(1, 3))


def slabs_of(volume, stream, slab):
    """What a stream returns for a volume whose first plane is the first of its first slab."""
    parts = [stream(volume[a : a + slab]) for a in range(0, len(volume) - slab + 1, slab)]
    return np.concatenate(parts[stream.stream.warm_up :])


def volume_of(net, planes, seed):
    """Numbers of an extent that the network accepts, of at least `planes` planes."""
    step, halo = net.context.step, net.context.halo
    extents = [h + s for h, s in zip(halo, step, strict=True)]
    extents[0] = halo[0] + round_up(planes, step[0])
    return np.random.default_rng(seed).integers(0, 100, extents)


@settings(max_examples=60, deadline=None)
@given(layered(), st.integers(1, 3), st.integers(0, 2**31))
def test_a_stream_equals_one_pass_over_the_volume(case, slabs, seed):
    network, slab = case
    net = ToyNet(network, seed)
    streamed = StreamedToyNet(net, slab)
    volume = volume_of(net, slab * (slabs + streamed.stream.warm_up), seed)
    whole, parts = net(volume), slabs_of(volume, streamed, slab)
    both = min(len(whole), len(parts))
    assert both >= slab
    np.testing.assert_array_equal(parts[:both], whole[:both])


@settings(max_examples=20, deadline=None)
@given(layered(), st.integers(1, 2), st.integers(0, 2**31))
def test_a_stream_may_begin_at_any_slab(case, skipped, seed):
    network, slab = case
    net = ToyNet(network, seed)
    streams = [StreamedToyNet(net, slab) for _ in range(2)]
    volume = volume_of(net, slab * (skipped + 1 + streams[0].stream.warm_up), seed)
    whole = slabs_of(volume, streams[0], slab)
    np.testing.assert_array_equal(slabs_of(volume[skipped * slab :], streams[1], slab)[:slab],
                                  whole[skipped * slab : (skipped + 1) * slab])  # fmt: skip


@pytest.mark.parametrize("part", ["pools", "skips", "output"])
def test_a_plane_more_or_less_changes_the_output(part):
    # The control: the tests above would see a wrong number of planes.
    net = ToyNet(cubic_levels(3))
    stream = StreamedToyNet(net, 8)
    volume = volume_of(net, 8 * (2 + stream.stream.warm_up), seed=1)
    kept = getattr(stream.stream, part)
    wrong = kept + 1 if part == "output" else (*kept[:-1], kept[-1] + 1)
    stream.stream = replace(stream.stream, **{part: wrong})
    assert not np.array_equal(slabs_of(volume, stream, 8)[:8], net(volume)[:8])


def test_the_planes_of_the_network_of_cicek():
    # By hand: after both convolutions the levels are 4, 6, 7 and 8 planes late, after the ways up
    # 16, 40 and 88. Skips are cut by 4, 16 and 40 planes at their start. The output is 92 late.
    stream = stream_along(cubic_levels(3), 32)
    assert (stream.pools, stream.skips) == ((0, 0, 1), (88 - 4 - 40, 40 - 6 - 16, 16 - 7 - 4))
    assert (stream.output, stream.warm_up) == (4, 3)
    context = stream.around(Context.of_levels(cubic_levels(3)))
    assert (context.before, context.after) == ((44, 44, 44), (96 - 44, 48, 48))


@given(levels(), st.integers(1, 4))
def test_skips_wait_for_the_levels_below_and_never_the_other_way_round(network, slabs):
    step = Context.of_levels(network).step[0]
    stream = stream_along(network, slabs * step)
    assert min((0, *stream.skips, *stream.pools, stream.output, stream.warm_up)) == 0


@pytest.mark.parametrize(("slab", "near"), [(0, 8), (12, 16), (-8, 8), (9, 8)])
def test_a_slab_that_does_not_fit_is_refused(slab, near):
    with pytest.raises(InputError, match=f"slab={slab} must be a multiple of 8; nearest is {near}"):
        stream_along(cubic_levels(3), slab)
