"""The U-Net of Ronneberger, Fischer and Brox (2015), also in 3-D: its layers and their context.

Independent of volumes, tiles, files and training. All convolutions are unpadded: every output voxel
depends on real input only, so tiling is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from unet_ray.errors import InputError
from unet_ray.network.arithmetic import Doubling, Orientation, Widths
from unet_ray.network.strips import Convolution, convolved_by_strips, has_convolutions
from unet_ray.tiling.boxes import Ints
from unet_ray.tiling.levels import Level, layers, output_extents
from unet_ray.tiling.tiles import Context

Norm = Literal["none", "weight", "batch"]
Forward = nn.Conv2d | nn.Conv3d
BATCH_NORMS = nn.BatchNorm2d, nn.BatchNorm3d


class UNet(nn.Module):
    """The paper's network (Fig. 1): at depth 4 it has 23 convolutional layers.

    Each level has two unpadded 3x3 convolutions with ReLU. Between levels, 2x2 max-pooling leads
    down and the channels double; a 2x2 up-convolution leads up and halves the channels. Its output
    is concatenated with the cropped features of the same level. A final 1x1 convolution computes
    the class scores.

    In 3-D, `z_levels` sets how far each level convolves and pools along z (Çiçek et al. 2016). A
    network that does neither anywhere is the 2-D one: a slice of a volume is then an image.

    Args:
        in_channels: channels of the image, 1 to 1024.
        classes: number of classes, 2 to 255.
        base_channels: channels at full resolution, 1 to 4096; 64 in the paper.
        depth: number of poolings, 1 to 8; 4 in the paper.
        norm: ``"weight"`` standardises the weights of all 3x3 convolutions except the first, which
            must respond to grey levels (see `StandardisedConv2d`). ``"batch"`` adds batch
            normalisation after every 3x3 convolution; its statistics are mean 0 and variance 1
            until `calibrate` changes them. No norm uses statistics of the input image, in training
            or at inference, so tiling stays exact.
        dropout: probability of dropping a feature at the end of the contracting path, at least 0
            and below 1. Applied only in training, after the last two levels, as in the authors'
            Caffe network.
        z_levels: for each of the ``depth + 1`` levels, from full resolution to the coarsest, the
            widths along z of its convolutions (1 or 3) and of its pooling (1 or 2, ignored for the
            last); None for a 2-D network.
        doubling: where the channels double. ``"after"`` a pooling as in 2015, or already
            ``"before"`` it, which avoids bottlenecks (Szegedy et al. 2016); up-convolutions then
            keep the channels and have no bias, as in 2016.

    Attributes:
        orientation: of the patches that the network learned from; it sets the symmetries over which
            predictions may be averaged.

    Raises:
        InputError: if an argument is outside its range.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 2,
        base_channels: int = 64,
        depth: int = 4,
        norm: Norm = "none",
        dropout: float = 0.5,
        z_levels: Sequence[Sequence[int]] | None = None,
        doubling: Doubling = "after",
    ) -> None:
        super().__init__()
        _check("in_channels", in_channels, 1, 1024)
        _check("classes", classes, 2, 255)
        _check("base_channels", base_channels, 1, 4096)
        _check("depth", depth, 1, 8)
        if norm not in get_args(Norm):
            choices = ", ".join(map(repr, get_args(Norm)))
            raise InputError(f"norm={norm!r} is not a norm: choose from {choices}.")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout={dropout} must be at least 0 and below 1.")
        if doubling not in get_args(Doubling):
            raise InputError(f"doubling={doubling!r} must be 'after' or 'before'.")
        self.in_channels, self.classes, self.depth = in_channels, classes, depth
        self.base_channels, self.norm, self.dropout = base_channels, norm, dropout
        self.doubling = doubling
        self.orientation: Orientation = "any"
        self.z_levels = _checked_z(z_levels, depth)
        axes = 3 if self.z_levels else 2
        levels = [(level.kernel[-axes:], level.pool[-axes:]) for level in self.levels]
        widths = Widths(base_channels, doubling)
        self.down = nn.ModuleList(
            _stack([widths.below(n) or in_channels, *widths.down(n)], kernel, norm)
            for n, (kernel, _) in enumerate(levels)
        )
        self.up = nn.ModuleList(
            _up(widths.down(n + 1)[-1], widths.up(n), pool, bias=doubling == "after")
            for n, (_, pool) in enumerate(levels[:-1])
        )
        self.join = nn.ModuleList(
            _stack([widths.joined(n), *widths.join(n)], kernel, norm)
            for n, (kernel, _) in enumerate(levels[:-1])
        )
        self.head = _convolution(widths.join(0)[-1], classes, (1,) * axes)
        self.drop = nn.Dropout(dropout)
        if norm == "weight":  # a filter of mean 0 would not respond to brightness
            first = _convolution(in_channels, base_channels, levels[0][0])
            cast(nn.Sequential, self.down[0])[0] = first
        self._initialise()
        self.train()

    def train(self, mode: bool = True) -> UNet:
        """Switches between training and inference; batch norm has fixed statistics in both."""
        super().train(mode)
        for norm in self._batch_norms():
            norm.eval()
        return self

    def calibrate(self, images: Tensor) -> None:
        """Sets the statistics of batch norm to those of all `images` together.

        In a single pass over all images, each layer normalises with the statistics that it will
        have at inference. The statistics are not per image, so single blank images do no harm.

        Args:
            images: as for `forward`.

        Raises:
            InputError: if the network does not support their size.
        """
        training = self.training
        self.eval()  # no dropout
        for norm in self._batch_norms():
            norm.momentum = 1.0  # replaces the statistics
            norm.train()
        try:
            with torch.no_grad():
                self(images)
        finally:
            self.train(training)

    def _batch_norms(self) -> list[nn.BatchNorm2d | nn.BatchNorm3d]:
        return [layer for layer in self.modules() if isinstance(layer, BATCH_NORMS)]

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels over (z, y, x); kernels and pools of a 2-D network have width 1 along z."""
        along_z = self.z_levels or ((1, 1),) * (self.depth + 1)
        pools = [(pool, 2, 2) for _, pool in along_z[:-1]] + [(1, 1, 1)]
        kernels = [(kernel, 3, 3) for kernel, _ in along_z]
        return tuple(Level(k, p) for k, p in zip(kernels, pools, strict=True))

    @property
    def axes(self) -> int:
        """Number of axes of an image: 2 for (y, x), or 3 for (z, y, x)."""
        return 3 if self.z_levels else 2

    @property
    def context(self) -> Context:
        """Halo and step along (z, y, x), computed from the levels."""
        return Context.of_levels(self.levels)

    def _initialise(self) -> None:
        """He initialisation: N(0, sqrt(2 / N)), N = incoming nodes of one neuron (sec. 3)."""
        for layer in self.modules():
            # On the device "meta", torch would import its compiler, which takes most of a second.
            if isinstance(layer, get_args(Convolution)) and not layer.weight.is_meta:
                # A 2x2 up-convolution of stride 2 computes each output voxel from one input voxel.
                taps = math.prod(layer.kernel_size) if isinstance(layer, get_args(Forward)) else 1
                nn.init.normal_(layer.weight, 0.0, (2 / (layer.in_channels * taps)) ** 0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def output_extent(self, extent: int, axis: int = -1) -> int:
        """Size of the output for `extent` input voxels along an axis, for example 388 for 572.

        Args:
            extent: size of the input along the axis.
            axis: axis of (z, y, x).

        Raises:
            InputError: if the network does not support that size; names the nearest valid sizes.
        """
        levels = [Level((v.kernel[axis],), (v.pool[axis],)) for v in self.levels]
        outputs = output_extents(levels, (extent,))
        if outputs is None:
            raise InputError(self._size_rule(extent, axis))
        return outputs[0]

    def skip_extents(self, extents: Sequence[int]) -> list[Ints]:
        """Extents of the cropped skip connection of each level.

        Args:
            extents: of the image, along its last axes.

        Raises:
            InputError: if the network does not support them.
        """
        axes = range(-len(extents), 0)
        for axis, extent in zip(axes, extents, strict=True):
            self.output_extent(extent, axis)
        levels = [Level(v.kernel[axes.start :], v.pool[axes.start :]) for v in self.levels]
        steps = [step for step in layers(levels, extents) if step.kind == "up-convolution"]
        return [tuple(map(int, step.extents)) for step in reversed(steps)]

    def _size_rule(self, extent: int, axis: int) -> str:
        """Error message for an unsupported size."""
        step, halo = self.context.step[axis], self.context.halo[axis]
        below = max(1, (extent - halo) // step)
        near = [halo + step * k for k in (below, below + 1) if halo + step * k != extent]
        return (
            f"size={extent} does not fit this network: sizes are {halo} + {step}k (k >= 1); "
            f"nearest are {' and '.join(map(str, near))}."
        )

    def forward(self, image: Tensor) -> Tensor:
        """Class scores (logits) of the middle of `image`.

        Args:
            image: ``(n, in_channels, y, x)``, or ``(n, in_channels, z, y, x)`` for a network in
                3-D; floating point, normalised.

        Returns:
            ``(n, classes, y - m, x - m)``, same dtype; m = 12 * 2**depth - 8, 184 at depth 4. In
            3-D also less along z, by `output_extent`.

        Raises:
            InputError: if the network does not support the size of the image.
        """
        skip_sizes = self.skip_extents(image.shape[-self.axes :])
        skips, x = [], image
        for level, stack in enumerate(self.down):
            for layer in _layers(stack):
                x = applied(layer, x)
            if level >= self.depth - 1:
                x = self.drop(x)
            if level < self.depth:
                skips.append(middle(x, skip_sizes[level]))
                x = pooled(x, self.levels[level].pool)
        for level in reversed(range(self.depth)):
            x = _concatenated(skips, self.up[level], x)
            for layer in _layers(self.join[level]):
                x = applied(layer, x)
        return applied(self.head, x)

    def folded(self) -> UNet:
        """Returns an equivalent network for inference, with its norms folded into the weights.

        It is faster, and more exact in bfloat16: a convolution rounds once, a convolution followed
        by a norm twice. The new weights are computed in double precision.
        """
        same = self.in_channels, self.classes, self.base_channels, self.depth
        plain = UNet(*same, "none", 0.0, self.z_levels, self.doubling)
        pairs = zip([*self.down, *self.join], [*plain.down, *plain.join], strict=True)
        with torch.no_grad():
            for pair, plain_pair in pairs:
                for target, (weight, bias) in zip(
                    _convolutions(plain_pair), _folded(_layers(pair)), strict=True
                ):
                    target.weight.copy_(weight)
                    cast(Tensor, target.bias).copy_(bias)
        plain.up.load_state_dict(self.up.state_dict())
        plain.head.load_state_dict(self.head.state_dict())
        return plain.eval()


def turned(network: UNet, order: Sequence[int], downwards: bool) -> UNet:
    """Returns a network that computes for a volume what `network` computes for a turned one.

    Its filters are turned instead of the volume, so it streams along z like `network`.

    Args:
        network: a network in 3-D. If z changes place, all its axes must have the same levels.
        order: the axes of a filter that become z, y and x; (0, 1, 2) leaves them.
        downwards: whether z is mirrored.
    """
    copy = deepcopy(network)
    with torch.no_grad():
        for layer in copy.modules():
            if isinstance(layer, get_args(Convolution)):
                weight = layer.weight.permute(0, 1, *(2 + axis for axis in order))
                layer.weight.copy_(weight.flip(2) if downwards else weight.clone())
    return copy


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        near = min(max(value, low), high)
        raise InputError(f"{name}={value} must be from {low} to {high}; nearest is {near}.")


def _checked_z(
    z_levels: Sequence[Sequence[int]] | None, depth: int
) -> tuple[tuple[int, int], ...] | None:
    """Returns the widths along z as tuples; None if nothing happens along z.

    Raises:
        InputError: if a width is not allowed, or the number of levels is wrong.
    """
    if z_levels is None:
        return None
    pairs = [(level[0], level[1]) for level in z_levels if len(level) == 2]
    if len(pairs) != depth + 1 or not all(k in (1, 3) and p in (1, 2) for k, p in pairs):
        raise InputError(
            f"z_levels={z_levels} must be {depth + 1} pairs of a kernel, 1 or 3, and a pooling, "
            "1 or 2."
        )
    flat = all(k == 1 for k, _ in pairs) and all(p == 1 for _, p in pairs[:-1])
    return None if flat else tuple(pairs)


class _Standardised:
    """Filters with mean 0 and standard deviation ``gain * sqrt(2 / N)``.

    N is the number of weights of a filter. This is weight standardisation (Qiao et al. 2019) with
    a gain for each filter (Brock et al. 2021), scaled as in He initialisation. As with batch norm,
    signals have a similar size in all layers. Since no statistics of images are used, training and
    inference compute the same function.

    Attributes:
        gain: float32 ``(filters,)``, learned, initially 1.
    """

    gain: nn.Parameter

    def standardised(self, weight: Tensor) -> Tensor:
        """Returns the standardised filters, computed in the precision of `weight`."""
        axes = tuple(range(1, weight.ndim))
        variance, mean = torch.var_mean(weight, axes, correction=0, keepdim=True)
        total = weight[0].numel() * variance
        gain = self.gain.to(weight).reshape(-1, *(1 for _ in axes))
        scale = gain * (2 / total.clamp(min=1e-4)).sqrt()
        return (weight - mean) * scale


class StandardisedConv2d(_Standardised, nn.Conv2d):
    """A convolution over (y, x) with standardised filters."""

    def __init__(self, inputs: int, outputs: int, kernel: Ints) -> None:
        super().__init__(inputs, outputs, kernel)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.ones(outputs))

    def forward(self, image: Tensor) -> Tensor:
        """Convolves `image` with the standardised filters."""
        return nn.functional.conv2d(image, self.standardised(self.weight), self.bias)


class StandardisedConv3d(_Standardised, nn.Conv3d):
    """A convolution over (z, y, x) with standardised filters."""

    def __init__(self, inputs: int, outputs: int, kernel: Ints) -> None:
        super().__init__(inputs, outputs, kernel)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.ones(outputs))

    def forward(self, image: Tensor) -> Tensor:
        """Convolves `image` with the standardised filters."""
        return nn.functional.conv3d(image, self.standardised(self.weight), self.bias)


def _convolution(
    inputs: int, outputs: int, kernel: Ints, norm: Norm = "none", bias: bool = True
) -> Forward:
    """An unpadded convolution over the axes of `kernel`."""
    if norm == "weight":
        standardised = StandardisedConv2d if len(kernel) == 2 else StandardisedConv3d
        return standardised(inputs, outputs, kernel)
    plain = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
    return plain(inputs, outputs, kernel, bias=bias)  # type: ignore[arg-type]


def _up(inputs: int, outputs: int, pool: Ints, bias: bool) -> Convolution:
    """The up-convolution that reverses a pooling."""
    transposed = nn.ConvTranspose2d if len(pool) == 2 else nn.ConvTranspose3d
    return transposed(inputs, outputs, pool, stride=pool, bias=bias)  # type: ignore[arg-type]


def _stack(channels: Sequence[int], kernel: Ints, norm: Norm) -> nn.Sequential:
    """Unpadded convolutions, each followed by an optional norm and ReLU.

    Args:
        channels: of the input, then of each convolution.
        kernel: width of the convolutions, per axis.
        norm: see `UNet`.
    """
    stack: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        stack.append(_convolution(inputs, outputs, kernel, norm, bias=norm != "batch"))
        if norm == "batch":
            stack.append(BATCH_NORMS[len(kernel) - 2](outputs))
        stack.append(nn.ReLU(inplace=True))
    return nn.Sequential(*stack)


def pooled(x: Tensor, pool: Ints) -> Tensor:
    """Max-pooling of ``(n, c, y, x)`` or ``(n, c, z, y, x)``; `pool` is over (z, y, x)."""
    if x.ndim == 4:
        return nn.functional.max_pool2d(x, pool[-2:])
    return nn.functional.max_pool3d(x, pool)


def _layers(stack: nn.Module) -> Iterator[nn.Module]:
    # Layers are called one by one, since nn.Sequential would keep the input of a pair in memory.
    # This saves a quarter of the peak memory at inference.
    return iter(cast(nn.Sequential, stack))


def _convolutions(layers: Iterable[nn.Module]) -> list[Convolution]:
    return [layer for layer in layers if isinstance(layer, Convolution)]


def middle(x: Tensor, size: Ints) -> Tensor:
    """The middle of `x` of the given size; a copy at inference, so that `x` is freed early."""
    view = x
    for axis, extent in zip(range(-len(size), 0), size, strict=True):
        view = view.narrow(axis, (x.shape[axis] - extent) // 2, extent)
    return view if torch.is_grad_enabled() else view.contiguous(memory_format=memory_format(x))


def _concatenated(skips: list[Tensor], up: nn.Module, x: Tensor) -> Tensor:
    """The last skip connection and the up-convolved `x`, concatenated along the channels."""
    if torch.is_grad_enabled():
        return torch.cat([skips.pop(), up(x)], dim=1)
    # Memory peaks here. One buffer is filled in two steps, so that skip, up-convolution and result
    # are never in memory together.
    skip = skips.pop()
    n, channels, *extents = skip.shape
    both = torch.empty(
        (n, channels + cast(Convolution, up).out_channels, *extents),
        dtype=skip.dtype,
        device=skip.device,
        memory_format=memory_format(skip),
    )
    both[:, :channels] = skip
    del skip
    both[:, channels:] = applied(up, x)
    return both


def applied(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; at inference in bounded memory where oneDNN has no convolution for `x`."""
    plain = type(layer) in get_args(Convolution)  # a subclass has other weights
    if not plain or torch.is_grad_enabled() or x.device.type != "cpu" or has_convolutions(x.dtype):
        return cast(Tensor, layer(x))
    return convolved_by_strips(cast(Convolution, layer), x)


def channels_last(axes: int) -> torch.memory_format:
    """The memory format of images of 2 or 3 axes with the channels last."""
    return torch.channels_last if axes == 2 else torch.channels_last_3d


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of `x`: with the channels last, or contiguous."""
    last = channels_last(x.ndim - 2)
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format


def _folded(layers: Iterable[nn.Module]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields weight and bias of each convolution, with the norm that follows it folded in."""
    stack = list(layers)
    for layer, following in zip(stack, [*stack[1:], None], strict=True):
        if not isinstance(layer, get_args(Forward)):
            continue
        weight = _double(layer.weight)
        if isinstance(layer, _Standardised):
            weight = layer.standardised(weight)
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
        if isinstance(following, BATCH_NORMS):
            mean = cast(Tensor, following.running_mean)
            variance = cast(Tensor, following.running_var)
            gain = _double(following.weight) / (_double(variance) + following.eps).sqrt()
            scale = gain.reshape(-1, *(1 for _ in weight.shape[1:]))
            weight, bias = weight * scale, (_double(bias) - _double(mean)) * gain
            bias = bias + _double(following.bias)
        yield weight, bias


def _double(x: Tensor) -> Tensor:
    """Converts to float64, on the CPU for Apple GPUs, which do not support it."""
    return (x.cpu() if x.device.type == "mps" else x).double()
