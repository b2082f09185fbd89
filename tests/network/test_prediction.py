"""Passes of constant voxels: computed once per value, with identical results."""

import numpy as np
import pytest
import torch

from unet_ray.network import prediction
from unet_ray.network.prediction import Predictor, constant_value
from unet_ray.network.unet import UNet
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.intensity import Intensity

OUTPUTS = ("probabilities", "classes")


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = UNet(1, 3, 8, 2, "none", 0.0).eval()
    network.head.weight.data.mul_(3)
    return network


def predicted(network, plan, volume, monkeypatch=None, tta=False):
    """Results of all tiles of a volume (z, y, x), and the number of computed passes."""
    predictor = Predictor(network, plan, Intensity((9.0,), (30.0,)), "float32", "cpu", tta)
    calls, forward = [], predictor._forward
    predictor._forward = lambda *args: calls.append(1) or forward(*args)
    results = []
    for tile in plan:
        before, after = plan.context.before, plan.context.after
        padded = np.pad(volume, [*zip(before, after, strict=True)], mode="reflect")
        window = padded[tuple(slice(a + b, c + b) for a, b, c in zip(
            tile.read.start, before, tile.read.stop, strict=True))]  # fmt: skip
        results.append(predictor(tile, window[None], OUTPUTS))
    return results, len(calls)


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_constant_passes_are_computed_once_for_each_value(network, monkeypatch, dtype, tta):
    plan = TilePlan((2, 96, 192), (2, 96, 96), network.context, (1, 32, 32))
    volume = np.zeros((2, 96, 192), dtype)
    volume[1] = 7
    volume[1, 90, 180] = 50
    cached, computed_passes = predicted(network, plan, volume, tta=tta)
    monkeypatch.setattr(prediction, "constant_value", lambda window: None)
    expected, all_passes = predicted(network, plan, volume, tta=tta)
    assert all_passes == 36 and 2 + 2 <= computed_passes < 2 + 9
    for one, two in zip(cached, expected, strict=True):
        for name in OUTPUTS:
            np.testing.assert_array_equal(one[name], two[name])
    # Constant input has a pattern of the pooling as output, so only whole passes can be cached.
    assert len(np.unique(expected[0]["probabilities"][0, 0])) > 1


@pytest.mark.parametrize(
    ("values", "computed"), [([1, 1, 2, 2, 3, 1], 4), ([1, 2, 1, 3, 1, 2], 4), ([1, 2] * 3, 2)]
)
def test_the_most_recently_used_results_are_cached(network, values, computed):
    plan = TilePlan((6, 32, 32), (6, 32, 32), network.context, (1, 32, 32))
    volume = np.repeat(np.array(values, np.uint8), 32 * 32).reshape(6, 32, 32)
    assert predicted(network, plan, volume)[1] == computed


@pytest.mark.parametrize(
    ("values", "same"),
    [
        (np.zeros((2, 3, 4, 5), np.uint16), True),
        (np.array([1, 2], np.uint8)[:, None, None, None] * np.ones((2, 3, 4, 5), np.uint8), True),
        (np.array([0.0, 1, 0], np.float32).reshape(1, 1, 1, 3), False),
        (np.array([0.0, -0.0], np.float32).reshape(1, 1, 1, 2), False),
        (np.full((1, 2, 2, 2), np.nan, np.float64), True),
    ],
)
def test_constant_means_the_same_bits_in_each_channel(values, same):
    assert (constant_value(values) is not None) == same
    assert (constant_value(values[..., ::2, ::-1]) is not None) == same
    if same and values.shape[0] == 2 and values.max():
        assert constant_value(values) != constant_value(values[::-1])
