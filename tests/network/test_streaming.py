"""Streams of slabs through the network, against passes over the whole volume."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_ray.network.streaming import StreamedUNet
from unet_ray.network.unet import UNet


@st.composite
def networks(draw, dtype=torch.float64):
    """Networks in 3-D of any levels along z, and a slab for them."""
    depth, widths = draw(st.integers(1, 2)), st.tuples(*map(st.sampled_from, [(1, 3), (1, 2)]))
    z_levels = draw(st.lists(widths, min_size=depth + 1, max_size=depth + 1))
    z_levels[-1] = (3, 1)  # not flat
    torch.manual_seed(draw(st.integers(0, 1000)))
    doubling = draw(st.sampled_from(["after", "before"]))
    options = {"norm": "weight", "dropout": 0.0, "z_levels": z_levels, "doubling": doubling}
    network = UNet(2, 3, 2, depth, **options).folded().to(dtype)
    return network, network.context.step[0] * draw(st.integers(1, 3))


def volume_of(network, planes, seed=0):
    """Noise of an extent that the network accepts, of at least `planes` planes."""
    context = network.context
    extents = [halo + step for halo, step in zip(context.halo, context.step, strict=True)]
    extents[0] = context.halo[0] + -(-planes // context.step[0]) * context.step[0]
    generator = torch.Generator().manual_seed(seed)
    volume = torch.randn((1, 2, *extents), generator=generator)
    return volume.to(next(network.parameters()).dtype)


def streamed(network, volume, slab, start=0):
    """The scores of a stream that begins at slab `start`, without those of the warm-up."""
    stream, kept = StreamedUNet(network, slab), {}
    begins = range(start * slab, volume.shape[2] - slab + 1, slab)
    parts = [stream(volume[:, :, a : a + slab], kept) for a in begins]
    return torch.cat(parts[stream.stream.warm_up :], dim=2)


@settings(max_examples=25, deadline=None)
@given(networks(), st.integers(1, 2))
def test_a_stream_equals_one_pass_over_the_volume(case, slabs):
    network, slab = case
    warm_up = StreamedUNet(network, slab).stream.warm_up
    volume = volume_of(network, slab * (slabs + warm_up))
    with torch.inference_mode():
        whole = network(volume)
    parts = streamed(network, volume, slab)
    both = min(parts.shape[2], whole.shape[2])
    assert both >= slab
    torch.testing.assert_close(parts[:, :, :both], whole[:, :, :both], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_the_bits_do_not_depend_on_where_a_stream_begins(dtype, data):
    network, slab = data.draw(networks(dtype))
    volume = volume_of(network, slab * (3 + StreamedUNet(network, slab).stream.warm_up))
    volume = volume.contiguous(memory_format=torch.channels_last_3d)
    whole = streamed(network, volume, slab)
    assert torch.equal(streamed(network, volume, slab, start=2), whole[:, :, 2 * slab :])


def test_stored_probabilities_differ_by_at_most_one_of_255_from_one_pass():
    torch.manual_seed(0)
    options = {"norm": "weight", "dropout": 0.0, "z_levels": [(3, 2)] * 3}
    network = UNet(2, 3, 4, 2, **options).folded()
    volume = volume_of(network, 40)
    with torch.inference_mode():
        whole = network(volume).softmax(1).mul(255).round()
    parts = streamed(network, volume, 8).softmax(1).mul(255).round()
    both = min(parts.shape[2], whole.shape[2])
    assert both >= 8
    assert (parts[:, :, :both] - whole[:, :, :both]).abs().max() <= 1
