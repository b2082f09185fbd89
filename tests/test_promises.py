"""The promise: the result of a voxel depends only on the image, not on tiles, order or repeats.

An integer toy network shows it exactly, and the real network in double precision. The tiling of the
paper, 572 -> 388 pixels at a stride of 388, shows the errors of tiles off the step.
"""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.strategies import CUBE, SLICE, cubic_levels, flat_levels, plans, shapes
from tests.toynet import PRIME, ToyNet
from unet_ray.errors import InputError
from unet_ray.network.prediction import Predictor
from unet_ray.network.unet import Norm, UNet
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.tiling.tiles import TilePlan, round_up
from unet_ray.volumes.intensity import Intensity

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def tiled(predict, plan, image, numbers=None):
    """Runs a plan: reads each tile, predicts it pass by pass, and writes its core.

    Args:
        predict: a valid-convolution network, ``(z, y, x) -> (..., z, y, x)``.
        plan: the tiles.
        image: the volume, ``plan.shape``.
        numbers: the tiles in the order of processing; by default all in ascending order.
    """
    result = None
    for number in range(len(plan)) if numbers is None else numbers:
        tile = plan[number]
        voxels = read_mirrored(lambda box: image[box.slices], plan.shape, tile.read)
        for part in plan.pass_boxes(tile):
            scores = predict(voxels[Box.of(plan.pass_shape).shift(part.start).slices])
            if result is None:
                result = np.full((*scores.shape[:-3], *plan.shape), -1, scores.dtype)
            owned = part.intersect(tile.crop)
            target = owned.shift(tile.write.start).relative_to(tile.crop.start)
            result[(..., *target.slices)] = scores[(..., *owned.relative_to(part.start).slices)]
    return result


def untiled(predict, context, image):
    """Predicts the whole image in one call, mirrored by NumPy, without tiles."""
    padding = [
        (before, round_up(n, step) - n + after)
        for n, before, after, step in zip(
            image.shape, context.before, context.after, context.step, strict=True
        )
    ]
    scores = predict(np.pad(image, padding, mode="reflect"))
    return scores[(..., *Box.of(image.shape).slices)]


def images(shape):
    return arrays(np.int64, shape, elements=st.integers(0, PRIME - 1))


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, PRIME, shape)


# The toy network, exactly in integers

ANISOTROPIC = (SLICE, CUBE, CUBE)


def check_seamless(levels, plan, seed):
    net, image = ToyNet(levels, seed), noise(plan.shape, seed)
    np.testing.assert_array_equal(tiled(net, plan, image), untiled(net, plan.context, image))


@settings(max_examples=40)
@given(st.data(), st.integers(1, 3), st.integers(0, 1000))
def test_segmentation_does_not_depend_on_tile_size(data, depth, seed):
    net = ToyNet(flat_levels(depth))
    plan = data.draw(plans(most=(3, 60, 60), context=net.context))
    check_seamless(net.levels, plan, seed)


@settings(max_examples=6)
@given(st.data(), st.sampled_from([cubic_levels(1), ANISOTROPIC]), st.integers(0, 1000))
def test_segmentation_in_3d_does_not_depend_on_tile_size(data, levels, seed):
    context = ToyNet(levels).context
    plan = data.draw(plans(most=(9, 17, 17), context=context))
    check_seamless(levels, plan, seed)


@settings(max_examples=20)
@given(st.data(), shapes((2, 25, 25)))
def test_tile_size_does_not_matter_for_any_image(data, shape):
    net, image = ToyNet(flat_levels(2)), data.draw(images(shape))
    plan = data.draw(plans(context=net.context).map(lambda p: retiled(p, shape)))
    np.testing.assert_array_equal(tiled(net, plan, image), untiled(net, net.context, image))


def retiled(plan, shape):
    return TilePlan(shape, plan.core, plan.context, plan.passes)


def test_an_image_of_one_voxel():
    net = ToyNet(flat_levels(4))
    plan = TilePlan((1, 1, 1), (1, 16, 32), net.context, (1, 16, 16))
    check_seamless(net.levels, plan, seed=3)


@settings(max_examples=15)
@given(st.data())
def test_result_does_not_depend_on_tile_order_or_repeats(data):
    net = ToyNet(flat_levels(2))
    plan = data.draw(plans(most=(3, 30, 30), context=net.context))
    again = data.draw(st.lists(st.integers(0, len(plan) - 1), max_size=5))
    order = data.draw(st.permutations([*range(len(plan)), *again]))
    image = noise(plan.shape)
    np.testing.assert_array_equal(tiled(net, plan, image, order), tiled(net, plan, image))


@settings(max_examples=15)
@given(st.data())
def test_a_region_equals_the_same_part_of_the_whole_image(data):
    net = ToyNet(flat_levels(2))
    plan = data.draw(plans(most=(3, 40, 40), context=net.context))
    start = tuple(data.draw(st.integers(0, n - 1)) for n in plan.shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, plan.shape, strict=True))
    region, image = Box(start, stop), noise(plan.shape)
    part = tiled(net, plan, image, plan.within(region))
    np.testing.assert_array_equal(part[region.slices], tiled(net, plan, image)[region.slices])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_toy_network_detects_an_offset_that_is_off_the_step(depth):
    # A negative control: if this network ignored the offset, the tests above would prove nothing.
    net, step = ToyNet(flat_levels(depth)), 2**depth
    image = noise((1, 12 * step - 4 + 7 * step, 12 * step - 4 + 7 * step))
    whole = net(image)
    for offset in (step // 2, step):
        part = net(image[:, offset : offset - 2 * step, offset : offset - 2 * step])
        same_part = whole[:, offset:, offset:][:, : part.shape[1], : part.shape[2]]
        differ = np.count_nonzero(part != same_part) / part.size
        assert differ == 0 if offset == step else differ > 0.5


# The real network in double precision


def unet(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    network = UNet(**{"base_channels": 2, "classes": 2, "depth": 2, **options})
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # zero at first, but never after training
            torch.nn.init.normal_(parameter, 0, 0.1)
    return network.eval().to(dtype)


def on_slices(network):
    """Returns a 2-D network as a function of (z, y, x), in the dtype of the network."""
    dtype = next(network.parameters()).dtype

    def predict(voxels):
        with torch.inference_mode():
            scores = network(torch.from_numpy(np.ascontiguousarray(voxels))[:, None].to(dtype))
        return scores.transpose(0, 1).numpy()

    return predict


def grey(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@settings(max_examples=15)
@given(st.data(), st.sampled_from([(2, 2), (4, 2), (3, 3)]), st.sampled_from(get_args(Norm)))
def test_the_real_network_does_not_depend_on_tile_size(data, size, norm):
    network = unet(base_channels=size[0], depth=size[1], classes=3, norm=norm)
    plan = data.draw(plans(most=(3, 50, 50), context=network.context))
    image, predict = grey(plan.shape), on_slices(network)
    whole = untiled(predict, plan.context, image)
    assert whole.shape == (3, *plan.shape)
    np.testing.assert_allclose(tiled(predict, plan, image), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_a_network_of_the_papers_depth_does_not_depend_on_tile_size(dtype, rtol):
    network, image = unet(base_channels=3, depth=4, dtype=dtype), grey((2, 100, 130))
    predict = on_slices(network)
    plan = TilePlan(image.shape, (2, 48, 64), network.context, (1, 48, 32))
    whole = untiled(predict, network.context, image)
    np.testing.assert_allclose(tiled(predict, plan, image), whole, rtol=rtol, atol=rtol)


# The tiling of the paper, for contrast


def overlap_tiles(predict, image, stride):
    """Predicts tiles of 572 -> 388 pixels side by side (Ronneberger et al. 2015, Fig. 2)."""
    result = np.empty((2, *image.shape))
    for y in range(0, image.shape[1], stride):
        for x in range(0, image.shape[2], stride):
            read = Box((0, y - 92, x - 92), (1, y + 480, x + 480))
            voxels = read_mirrored(lambda box: image[box.slices], image.shape, read)
            target = result[..., y : y + stride, x : x + stride]
            target[...] = predict(voxels)[..., : target.shape[-2], : target.shape[-1]]
    return result


@pytest.fixture(scope="module")
def paper():
    """A network of the paper's depth, an image two tiles wide, and its whole-image scores."""
    network, image = unet(base_channels=2, depth=4, seed=1), grey((1, 400, 772))
    predict = on_slices(network)
    scores = untiled(predict, network.context, image)
    with torch.no_grad():  # makes each class half of the image
        network.head.bias[1] -= np.median(scores[1] - scores[0])
    return predict, image, untiled(predict, network.context, image)


def test_unaligned_step_leaves_seams(paper):
    predict, image, whole = paper
    assert 0.4 < whole.argmax(0).mean() < 0.6
    flips = overlap_tiles(predict, image, 388).argmax(0) != whole.argmax(0)
    assert not flips[:, :388, :388].any()  # the first tile is on the step
    assert flips.mean() >= 0.01, f"{flips.sum()} of {flips.size} pixels change class"


def test_aligned_step_leaves_none(paper):
    predict, image, whole = paper
    scores = overlap_tiles(predict, image, 384)
    np.testing.assert_allclose(scores, whole, rtol=0, atol=1e-10)
    assert np.count_nonzero(scores.argmax(0) != whole.argmax(0)) == 0


def test_a_plan_refuses_the_papers_stride():
    with pytest.raises(InputError, match="multiple of its step, 16; nearest is 384"):
        TilePlan((1, 772, 772), (1, 388, 388), unet(depth=4).context, (1, 388, 388))


# Stored bytes


def stored(network, plan, volume, numbers=None, tta=False):
    """Returns probabilities and classes as a run stores them: uint8, from a volume (c, z, y, x)."""
    intensity = Intensity((volume.mean(),), (volume.std(),))
    predictor = Predictor(network, plan, intensity, "float32", "cpu", tta)
    arrays = {
        "probabilities": np.full((network.classes - 1, *plan.shape), 99, np.uint8),
        "classes": np.full(plan.shape, 99, np.uint8),
    }
    for number in range(len(plan)) if numbers is None else numbers:
        tile = plan[number]

        def read(box):
            return volume[(slice(None), *box.slices)]

        voxels = read_mirrored(read, plan.shape, tile.read)
        for name, core in predictor(tile, voxels, tuple(arrays)).items():
            arrays[name][(..., *tile.write.slices)] = core[(..., *tile.crop.slices)]
    return arrays


@pytest.fixture(scope="module")
def run():
    network = unet(dtype=torch.float32, classes=3, base_channels=4, norm="batch")
    volume = np.random.default_rng(0).integers(0, 256, (1, 5, 70, 90), np.uint8)
    return network, volume, TilePlan(volume.shape[1:], (2, 24, 32), network.context, (2, 24, 16))


def test_stored_bytes_do_not_depend_on_order_or_repeats(run):
    network, volume, plan = run
    first = stored(network, plan, volume)
    backwards = [*reversed(range(len(plan))), 3, 3]
    again = stored(network, plan, volume, backwards)
    assert all((first[name] == again[name]).all() for name in first)


def test_stored_bytes_of_another_tile_size_differ_by_at_most_one(run):
    network, volume, plan = run
    small = stored(network, plan, volume)
    core = (5, 72, 92)
    other = stored(network, TilePlan(plan.shape, core, plan.context, core), volume)
    difference = np.abs(small["probabilities"].astype(int) - other["probabilities"])
    assert difference.max() <= 1 and np.count_nonzero(difference) < 1e-3 * difference.size
    assert (small["classes"] == other["classes"]).all()


def test_the_stored_probabilities_are_the_softmax_of_the_network(run):
    network, volume, plan = run
    arrays = stored(network, plan, volume)
    normal = (volume[0] - volume.mean()) / volume.std()
    scores = untiled(on_slices(network.double()), plan.context, normal)
    network.float()
    exact = np.exp(scores) / np.exp(scores).sum(0)
    assert np.abs(arrays["probabilities"] / 255 - exact[1:]).max() < 0.5 / 255 + 1e-4
    top = np.sort(exact, axis=0)
    clear = top[-1] - top[-2] > 1e-4
    assert clear.mean() > 0.99 and len(np.unique(arrays["classes"])) == 3
    assert (arrays["classes"] == exact.argmax(0))[clear].all()


# Averages over the symmetries of the square


def test_averaged_bytes_of_another_tile_size_differ_by_at_most_one(run):
    network, volume, plan = run
    small = stored(network, plan, volume, tta=True)
    for core in ((5, 72, 92), (1, 24, 48)):
        other = stored(network, TilePlan(plan.shape, core, plan.context, core), volume, tta=True)
        difference = np.abs(small["probabilities"].astype(int) - other["probabilities"])
        assert difference.max() <= 1 and np.count_nonzero(difference) < 1e-3 * difference.size
        assert (small["classes"] == other["classes"]).all()


def test_averaged_bytes_are_the_mean_of_eight_whole_images(run):
    network, volume, plan = run
    arrays = stored(network, plan, volume, tta=True)
    assert (arrays["probabilities"] != stored(network, plan, volume)["probabilities"]).any()
    normal = (volume[0] - volume.mean()) / volume.std()
    context = plan.context
    padding = [
        (before, round_up(n, step) - n + after)
        for n, before, after, step in zip(
            normal.shape, context.before, context.after, context.step, strict=True
        )
    ]
    padded, predict = np.pad(normal, padding, mode="reflect"), on_slices(network.double())
    total = 0
    for turns in range(4):
        for mirrored in (False, True):
            turned = np.rot90(padded, turns, (1, 2))
            scores = predict(turned[..., ::-1].copy() if mirrored else turned.copy())
            shares = np.exp(scores) / np.exp(scores).sum(0)
            shares = shares[..., ::-1] if mirrored else shares
            total = total + np.rot90(shares, -turns, (2, 3))
    network.float()
    exact = total[(..., *Box.of(normal.shape).slices)] / 8
    assert np.abs(arrays["probabilities"] / 255 - exact[1:]).max() < 0.5 / 255 + 1e-4
