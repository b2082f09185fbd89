"""The cost of the halo, against the layers of the network and against reference values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.strategies import cubic_levels, flat_levels
from unet_ray.network.arithmetic import (
    NetworkSize,
    core_multiplications,
    halo_overhead,
    kept_bytes,
    pass_multiplications,
    read_amplification,
    slab_multiplications,
)
from unet_ray.network.streaming import StreamedUNet
from unet_ray.network.unet import UNet
from unet_ray.segmentation.memory import network_size
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.tiling.tiles import Context, TilePlan

PAPER = Context((0, 92, 92), (0, 96, 96), (1, 16, 16))


def paper(base_channels=64):
    return NetworkSize(1, 2, base_channels, flat_levels(4), weights=0, itemsize=4)


@pytest.mark.parametrize(
    ("extent", "ratio"),
    [
        (252, 5.0),
        (316, 2.5),
        (380, 1.89),
        (444, 1.63),
        (508, 1.48),
        (572, 1.39),
        (700, 1.28),
        (892, 1.20),
        (1084, 1.15),
        (1276, 1.125),
        (1532, 1.10),
        (2044, 1.07),
    ],
)
def test_the_cost_of_the_halo(extent, ratio):
    core = extent - 188
    total = pass_multiplications(paper(), (1, extent, extent))
    digits = len(str(ratio).split(".")[1])
    assert total / core_multiplications(paper(), (1, core, core)) == pytest.approx(
        ratio, abs=0.51 * 10**-digits
    )


@pytest.mark.parametrize(
    ("extents", "ratio"),
    [((116, 132, 132), 13.4), ((196,) * 3, 2.57), ((260,) * 3, 1.79), ((164,) * 3, 3.86)],
)
def test_the_cost_of_the_halo_in_3d(extents, ratio):
    net = NetworkSize(1, 2, 32, cubic_levels(3), weights=0, itemsize=4)
    core = [n - 92 for n in extents]
    total = pass_multiplications(net, extents)
    assert total / core_multiplications(net, core) == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize(("cross_section", "ratio"), [(132, 3.9), (260, 1.46), (516, 1.17)])
def test_the_cost_of_the_halo_of_a_stream(cross_section, ratio):
    net = NetworkSize(1, 2, 32, cubic_levels(3), weights=0, itemsize=4)
    extents, core = (8, *(cross_section,) * 2), (8, *(cross_section - 92,) * 2)
    total = slab_multiplications(net, extents)
    assert total / core_multiplications(net, core) == pytest.approx(ratio, rel=0.04)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(["after", "before"]))
def test_the_planes_that_a_stream_keeps_are_those_counted(depth, steps, doubling):
    with torch.device("meta"):
        network = UNet(2, 3, 4, depth, "none", 0.0, ((1, 1), *((3, 2),) * depth), doubling)
    network.to_empty(device="cpu")
    slab = network.context.step[0] * steps
    streamed, kept = StreamedUNet(network, slab), {}
    extents = (slab, *(halo + step for halo, step in zip(
        network.context.halo[1:], network.context.step[1:], strict=True)))  # fmt: skip
    streamed(torch.zeros(1, 2, *extents), kept)
    counted = kept_bytes(network_size(network, "float32"), streamed.stream, extents)
    assert sum(planes.numel() * 4 for planes in kept.values()) == counted


@pytest.mark.parametrize(("base_channels", "kiloflops"), [(64, 1467.8), (32, 367.3)])
def test_the_cost_of_a_voxel_without_halo(base_channels, kiloflops):
    # A multiplication and an addition are two operations.
    flops = 2 * core_multiplications(paper(base_channels), (1, 512, 512)) / 512**2
    assert round(flops / 1000, 1) == kiloflops


@pytest.mark.parametrize(
    ("options", "extents"),
    [
        ({}, (572, 572)),
        ({"in_channels": 3, "classes": 5, "base_channels": 7, "depth": 3}, (100, 132)),
        ({"depth": 1}, (20, 30)),
        ({"depth": 2, "z_levels": ((3, 2),) * 3}, (44, 44, 52)),
        ({"depth": 2, "z_levels": ((1, 1), (3, 1), (3, 1)), "doubling": "before"}, (20, 44, 52)),
    ],
)
def test_multiplications_are_those_of_the_layers(options, extents):
    counted = 0

    def count(layer, given, output):
        nonlocal counted
        taps = math.prod(layer.kernel_size) if isinstance(layer, nn.Conv2d | nn.Conv3d) else 1
        counted += layer.in_channels * taps * output.numel()

    with torch.device("meta"):  # shapes only
        network = UNet(**options)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                layer.register_forward_hook(count)
        network(torch.empty(1, network.in_channels, *extents))
    size = network_size(network, "float32")
    assert pass_multiplications(size, (1, *extents)[-3:]) == counted


def test_the_overhead_of_a_plan_that_fits_the_volume():
    plan = TilePlan((4, 768, 1152), (2, 384, 384), PAPER, (1, 384, 384))
    assert halo_overhead(paper(), plan) == pytest.approx(0.39, abs=0.01)


def test_parts_of_cores_outside_the_volume_count():
    # 5 slices in passes of 2 are 6; 768 rows in cores of 512 are 1024.
    core = (2, 512, 384)
    plan = TilePlan((5, 768, 1152), core, PAPER, core)
    ratio = pass_multiplications(paper(), (1, 700, 572)) / core_multiplications(
        paper(), (1, 512, 384)
    )
    assert halo_overhead(paper(), plan) == pytest.approx(ratio * 6 / 5 * 1024 / 768 - 1)


def test_passes_outside_the_volume_are_not_run_and_do_not_count():
    # The last slab of 4 has one slice in the volume: one pass of 2 is run, the other is not.
    plan_of_5 = TilePlan((5, 768, 1152), (4, 384, 384), PAPER, (2, 384, 384))
    plan_of_6 = TilePlan((6, 768, 1152), (4, 384, 384), PAPER, (2, 384, 384))
    cost_of_5 = halo_overhead(paper(), plan_of_5) + 1
    cost_of_6 = halo_overhead(paper(), plan_of_6) + 1
    assert cost_of_5 * 5 == pytest.approx(cost_of_6 * 6)


def test_small_passes_cost_as_much_as_small_cores():
    plan = TilePlan((1, 768, 768), (1, 768, 768), PAPER, (1, 384, 384))
    same = TilePlan((1, 768, 768), (1, 384, 384), PAPER, (1, 384, 384))
    assert halo_overhead(paper(), plan) == pytest.approx(halo_overhead(paper(), same))


@settings(max_examples=60)
@given(st.tuples(*[st.integers(1, 60)] * 3), st.tuples(*[st.integers(1, 20)] * 3), st.data())
def test_read_amplification_is_that_of_reading_every_tile(shape, chunk, data):
    core = tuple(data.draw(st.integers(1, 5)) * 4 for _ in range(3))
    plan = TilePlan(shape, core, Context((0, 5, 9), (0, 7, 12), (1, 4, 4)), core)
    decoded = 0

    def read(box):
        nonlocal decoded
        extents = (
            min(-(-b // c) * c, n) - a // c * c
            for a, b, c, n in zip(box.start, box.stop, chunk, shape, strict=True)
        )
        decoded += math.prod(extents)
        return np.zeros(box.shape, np.uint8)

    for tile in plan:
        read_mirrored(read, shape, tile.read)
    assert read_amplification(plan, chunk) == pytest.approx(decoded / math.prod(shape))
