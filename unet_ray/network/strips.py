"""Convolutions of a strip of rows at a time, in bounded memory, on any processor.

Knows for which number formats torch has convolutions of its library oneDNN. Where it has none, its
own convolution writes each window of the input to memory: nine times the input for a kernel of
width 3. Does not know the layers of a network.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

STRIP_BYTES = 16 << 20  # upper bound of the windows and results of a strip, unless a row is larger


@functools.cache
def has_convolutions(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN convolves `dtype` on this processor; bfloat16 needs AVX-512."""
    available = bool(torch._C._has_mkldnn)
    if dtype == torch.bfloat16:
        # oneDNN itself answers, so ONEDNN_MAX_CPU_ISA counts.
        return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return available


def convolved_by_strips(layer: nn.Conv2d | nn.ConvTranspose2d, image: Tensor) -> Tensor:
    """Returns ``layer(image)``, computed by strips, with bfloat16 as float32.

    As in oneDNN, each bfloat16 result is a sum in float32 that is rounded once.

    Args:
        layer: unpadded, of stride 1; or transposed, with a stride of the kernel's width.
        image: ``(n, channels, y, x)``, floating point.
    """
    images, _, height, width = image.shape
    transposed = isinstance(layer, nn.ConvTranspose2d)
    stride, overlap = layer.stride[0], layer.kernel_size[0] - layer.stride[0]
    exact = torch.promote_types(image.dtype, torch.float32)
    weight = layer.weight.to(exact)
    bias = None if layer.bias is None else layer.bias.to(exact)
    convolution = functional.conv_transpose2d if transposed else functional.conv2d
    rows = height - overlap
    result = torch.empty(
        (images, layer.out_channels, stride * rows, stride * width - overlap),
        dtype=image.dtype,
        device=image.device,
        memory_format=torch.channels_last,
    )
    taps = math.prod(layer.kernel_size)
    row_bytes = 4 * images * width * taps * (layer.in_channels + layer.out_channels)
    count = max(1, STRIP_BYTES // row_bytes)
    for top in range(0, rows, count):
        strip = image[:, :, top : top + count + overlap].to(exact)
        result[:, :, stride * top : stride * (top + count)] = convolution(
            strip, weight, bias, stride=layer.stride
        )
    return result
