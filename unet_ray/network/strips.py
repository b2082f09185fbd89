"""Convolutions of a strip of rows or planes at a time, in bounded memory, on any processor.

Knows for which number formats torch has convolutions of its library oneDNN. Where it has none, its
own convolution writes each window of the input to memory: nine times the input for a kernel of
3 x 3. Does not know the layers of a network.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Convolution = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVOLUTIONS: dict[type, Callable[..., Tensor]] = {
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
    nn.ConvTranspose2d: functional.conv_transpose2d,
    nn.ConvTranspose3d: functional.conv_transpose3d,
}
STRIP_BYTES = 16 << 20  # upper bound of the windows and results of a strip, unless a row is larger


@functools.cache
def has_convolutions(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN convolves `dtype` on this processor; bfloat16 needs AVX-512."""
    available = bool(torch._C._has_mkldnn)
    if dtype == torch.bfloat16:
        # oneDNN itself answers, so ONEDNN_MAX_CPU_ISA counts.
        return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return available


def convolved_by_strips(layer: Convolution, image: Tensor) -> Tensor:
    """Returns ``layer(image)``, computed by strips, with bfloat16 as float32.

    As in oneDNN, each bfloat16 result is a sum in float32 that is rounded once.

    Args:
        layer: a convolution over 2 or 3 axes, unpadded, of stride 1; or a transposed one, with a
            stride of the kernel's width.
        image: ``(n, channels, y, x)`` or ``(n, channels, z, y, x)``, floating point.
    """
    strides = layer.stride
    overlaps = [k - s for k, s in zip(layer.kernel_size, strides, strict=True)]
    exact = torch.promote_types(image.dtype, torch.float32)
    weight = layer.weight.to(exact)
    bias = None if layer.bias is None else layer.bias.to(exact)
    axes = zip(image.shape[2:], strides, overlaps, strict=True)
    extents = [stride * extent - overlap for extent, stride, overlap in axes]
    result = torch.empty(
        (len(image), layer.out_channels, *extents),
        dtype=image.dtype,
        device=image.device,
        memory_format=torch.channels_last if image.ndim == 4 else torch.channels_last_3d,
    )
    convolution, taps = CONVOLUTIONS[type(layer)], math.prod(layer.kernel_size)
    voxels = len(image) * math.prod(image.shape[3:])
    count = max(1, STRIP_BYTES // (4 * voxels * taps * (layer.in_channels + layer.out_channels)))
    stride, overlap = strides[0], overlaps[0]
    for top in range(0, image.shape[2] - overlap, count):
        strip = image[:, :, top : top + count + overlap].to(exact)
        result[:, :, stride * top : stride * (top + count)] = convolution(
            strip, weight, bias, stride=strides
        )
    return result
