"""Convolutions by strips: the same results as by whole images."""

import pytest
import torch
from torch import nn

from unet_ray.network import strips
from unet_ray.network.strips import convolved_by_strips, has_convolutions
from unet_ray.network.unet import UNet

LAYERS = {
    "convolution": lambda: nn.Conv2d(3, 5, 3),
    "up-convolution": lambda: nn.ConvTranspose2d(3, 5, 2, stride=2),
    "head": lambda: nn.Conv2d(3, 2, 1),
}


@pytest.fixture(params=[1, 1 << 14, 1 << 30])
def strip_bytes(request, monkeypatch):
    """Strips of one row, of a few rows, and one strip for all."""
    monkeypatch.setattr(strips, "STRIP_BYTES", request.param)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strips_give_the_results_of_the_layer(layer, dtype, strip_bytes):
    torch.manual_seed(0)
    layer = LAYERS[layer]().to(dtype)
    image = torch.randn(2, 3, 23, 30).to(dtype)
    with torch.inference_mode():
        results = convolved_by_strips(layer, image)
        whole = layer.double()(image.double())
    assert results.dtype == dtype and results.shape == whole.shape
    assert results.is_contiguous(memory_format=torch.channels_last)
    # Rounded once, so the error is at most half of the last bit, and a sum in float32.
    precision = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    exact = dtype == torch.float64
    torch.testing.assert_close(
        results.double(), whole, rtol=1e-12 if exact else precision, atol=1e-12 if exact else 1e-5
    )


@pytest.mark.parametrize("norm", ["none", "weight", "batch"])
def test_a_network_uses_strips_only_at_inference_and_where_onednn_has_no_convolution(
    norm, monkeypatch
):
    torch.manual_seed(0)
    network = UNet(1, 2, 3, depth=2, norm=norm)
    image = torch.randn(2, 1, 44, 48)
    with torch.inference_mode():
        expected = network.eval().folded()(image)
    used = []
    monkeypatch.setattr(
        "unet_ray.network.unet.convolved_by_strips",
        lambda layer, x: used.append(layer) or convolved_by_strips(layer, x),
    )
    for available in (True, False):
        monkeypatch.setattr("unet_ray.network.unet.has_convolutions", lambda dtype, a=available: a)
        with torch.inference_mode():
            torch.testing.assert_close(network.folded()(image), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-4)
        if available:
            assert not used
    folded = 2 * (2 * 2 + 1) + 2 + 1  # convolutions, up-convolutions and the head
    # Standardised layers compute their weights themselves.
    assert len(used) == folded + (4 if norm == "weight" else folded)
    used.clear()
    network(image)
    assert not used


def test_float32_is_always_convolved_by_onednn():
    assert has_convolutions(torch.float32) == torch.backends.mkldnn.is_available()
