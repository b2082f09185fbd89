"""The U-Net of Ronneberger, Fischer and Brox (2015): its layers and the context they need.

Independent of volumes, tiles, files and training. All convolutions are unpadded: every output voxel
depends on real input only, so tiling is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from unet_ray.errors import InputError
from unet_ray.network.strips import convolved_by_strips, has_convolutions
from unet_ray.tiling.levels import Level, layers, output_extents
from unet_ray.tiling.tiles import Context

Norm = Literal["none", "weight", "batch"]
Convolution = nn.Conv2d | nn.ConvTranspose2d


class UNet(nn.Module):
    """The paper's network (Fig. 1): at depth 4 it has 23 convolutional layers.

    Each level has two unpadded 3x3 convolutions with ReLU. Between levels, 2x2 max-pooling leads
    down and the channels double; a 2x2 up-convolution leads up and halves the channels. Its output
    is concatenated with the cropped features of the same level. A final 1x1 convolution computes
    the class scores.

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
        self.in_channels, self.classes, self.depth = in_channels, classes, depth
        self.base_channels, self.norm, self.dropout = base_channels, norm, dropout
        widths = [base_channels * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _pair(a, b, norm) for a, b in zip([in_channels, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[:-1])
        self.join = nn.ModuleList(_pair(2 * w, w, norm) for w in widths[:-1])
        self.head = nn.Conv2d(base_channels, classes, 1)
        self.drop = nn.Dropout(dropout)
        if norm == "weight":  # a filter of mean 0 would not respond to brightness
            cast(nn.Sequential, self.down[0])[0] = nn.Conv2d(in_channels, base_channels, 3)
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
            images: ``(n, in_channels, y, x)``, floating point, normalised.

        Raises:
            InputError: if the network does not support the size y or x.
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

    def _batch_norms(self) -> list[nn.BatchNorm2d]:
        return [layer for layer in self.modules() if isinstance(layer, nn.BatchNorm2d)]

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels over (z, y, x), from the layers; kernels and pools have width 1 along z."""
        pools = [(1, *layer.stride) for layer in _convolutions(self.up)] + [(1, 1, 1)]
        kernels = [(1, *_convolutions(_layers(pair))[0].kernel_size) for pair in self.down]
        return tuple(Level(k, p) for k, p in zip(kernels, pools, strict=True))

    @property
    def context(self) -> Context:
        """Halo and step along (z, y, x), computed from the levels."""
        return Context.of_levels(self.levels)

    def _initialise(self) -> None:
        """He initialisation: N(0, sqrt(2 / N)), N = incoming nodes of one neuron (sec. 3)."""
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                # A 2x2 up-convolution of stride 2 computes each output voxel from one input voxel.
                taps = layer.kernel_size[0] ** 2 if isinstance(layer, nn.Conv2d) else 1
                nn.init.normal_(layer.weight, 0.0, (2 / (layer.in_channels * taps)) ** 0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def output_extent(self, extent: int) -> int:
        """Size of the output for `extent` input voxels along y or x, for example 388 for 572.

        Raises:
            InputError: if the network does not support that size; names the nearest valid sizes.
        """
        outputs = output_extents(self.levels, (1, extent, extent))
        if outputs is None:
            raise InputError(self._size_rule(extent))
        return outputs[-1]

    def _skip_sizes(self, image: Tensor) -> list[tuple[int, ...]]:
        """Size (y, x) of the cropped skip connection of each level, for an image."""
        extents = image.shape[-2:]
        for extent in extents:
            self.output_extent(extent)
        steps = layers(self.levels, (1, *extents))
        sizes = [step.extents[1:] for step in steps if step.kind == "up-convolution"]
        return [tuple(map(int, size)) for size in reversed(sizes)]

    def _size_rule(self, extent: int) -> str:
        """Error message for an unsupported size."""
        step, halo = self.context.step[-1], self.context.halo[-1]
        below = max(1, (extent - halo) // step)
        near = [halo + step * k for k in (below, below + 1) if halo + step * k != extent]
        return (
            f"size={extent} does not fit this network: sizes are {halo} + {step}k (k >= 1); "
            f"nearest are {' and '.join(map(str, near))}."
        )

    def forward(self, image: Tensor) -> Tensor:
        """Class scores (logits) of the middle of `image`.

        Args:
            image: ``(n, in_channels, y, x)``, floating point, normalised.

        Returns:
            ``(n, classes, y - m, x - m)``, same dtype; m = 12 * 2**depth - 8, 184 at depth 4.

        Raises:
            InputError: if the network does not support the size y or x.
        """
        skip_sizes = self._skip_sizes(image)
        skips, x = [], image
        for level, pair in enumerate(self.down):
            for layer in _layers(pair):
                x = _applied(layer, x)
            if level >= self.depth - 1:
                x = self.drop(x)
            if level < self.depth:
                skips.append(_middle(x, skip_sizes[level]))
                x = nn.functional.max_pool2d(x, 2)
        for level in reversed(range(self.depth)):
            x = _concatenated(skips, self.up[level], x)
            for layer in _layers(self.join[level]):
                x = _applied(layer, x)
        return _applied(self.head, x)

    def folded(self) -> UNet:
        """Returns an equivalent network for inference, with its norms folded into the weights.

        It is faster, and more exact in bfloat16: a convolution rounds once, a convolution followed
        by a norm twice. The new weights are computed in double precision.
        """
        plain = UNet(self.in_channels, self.classes, self.base_channels, self.depth, "none", 0.0)
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


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        near = min(max(value, low), high)
        raise InputError(f"{name}={value} must be from {low} to {high}; nearest is {near}.")


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and standard deviation ``gain * sqrt(2 / N)``.

    N is the number of weights of a filter. This is weight standardisation (Qiao et al. 2019) with
    a gain for each filter (Brock et al. 2021), scaled as in He initialisation. As with batch norm,
    signals have a similar size in all layers. Since no statistics of images are used, training and
    inference compute the same function.

    Attributes:
        gain: float32 ``(filters,)``, learned, initially 1.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel)
        self.gain = nn.Parameter(torch.ones(outputs))

    def standardised(self, weight: Tensor) -> Tensor:
        """Returns the standardised filters, computed in the precision of `weight`."""
        variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
        total = weight[0].numel() * variance
        scale = self.gain.to(weight)[:, None, None, None] * (2 / total.clamp(min=1e-4)).sqrt()
        return (weight - mean) * scale

    def forward(self, image: Tensor) -> Tensor:
        """Convolves `image` with the standardised filters."""
        return nn.functional.conv2d(image, self.standardised(self.weight), self.bias)


def _pair(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    """Two unpadded 3x3 convolutions, each followed by an optional norm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        if norm == "weight":
            layers.append(StandardisedConv2d(channels, outputs, 3))
        else:
            layers.append(nn.Conv2d(channels, outputs, 3, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _layers(pair: nn.Module) -> Iterator[nn.Module]:
    # Layers are called one by one, since nn.Sequential would keep the input of a pair in memory.
    # This saves a quarter of the peak memory at inference.
    return iter(cast(nn.Sequential, pair))


def _convolutions(layers: Iterable[nn.Module]) -> list[Convolution]:
    return [layer for layer in layers if isinstance(layer, Convolution)]


def _middle(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The middle of `x` of the given size; a copy at inference, so that `x` is freed early."""
    top, left = ((n - m) // 2 for n, m in zip(x.shape[-2:], size, strict=True))
    view = x[..., top : top + size[0], left : left + size[1]]
    return view if torch.is_grad_enabled() else view.contiguous(memory_format=_memory_format(x))


def _concatenated(skips: list[Tensor], up: nn.Module, x: Tensor) -> Tensor:
    """The last skip connection and the up-convolved `x`, concatenated along the channels."""
    if torch.is_grad_enabled():
        return torch.cat([skips.pop(), up(x)], dim=1)
    # Memory peaks here. One buffer is filled in two steps, so that skip, up-convolution and result
    # are never in memory together.
    skip = skips.pop()
    n, channels, height, width = skip.shape
    both = torch.empty(
        (n, 2 * channels, height, width),
        dtype=skip.dtype,
        device=skip.device,
        memory_format=_memory_format(skip),
    )
    both[:, :channels] = skip
    del skip
    both[:, channels:] = _applied(up, x)
    return both


def _applied(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; at inference in bounded memory where oneDNN has no convolution for `x`."""
    plain = type(layer) in get_args(Convolution)  # a subclass has other weights
    if not plain or torch.is_grad_enabled() or x.device.type != "cpu" or has_convolutions(x.dtype):
        return cast(Tensor, layer(x))
    return convolved_by_strips(cast(Convolution, layer), x)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _folded(layers: Iterable[nn.Module]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields weight and bias of each convolution, with the norm that follows it folded in."""
    stack = list(layers)
    for layer, following in zip(stack, [*stack[1:], None], strict=True):
        if not isinstance(layer, nn.Conv2d):
            continue
        weight = _double(layer.weight)
        if isinstance(layer, StandardisedConv2d):
            weight = layer.standardised(weight)
        bias = torch.zeros_like(weight[:, 0, 0, 0]) if layer.bias is None else layer.bias
        if isinstance(following, nn.BatchNorm2d):
            mean = cast(Tensor, following.running_mean)
            variance = cast(Tensor, following.running_var)
            gain = _double(following.weight) / (_double(variance) + following.eps).sqrt()
            weight, bias = (
                weight * gain[:, None, None, None],
                (_double(bias) - _double(mean)) * gain,
            )
            bias = bias + _double(following.bias)
        yield weight, bias


def _double(x: Tensor) -> Tensor:
    """Converts to float64, on the CPU for Apple GPUs, which do not support it."""
    return (x.cpu() if x.device.type == "mps" else x).double()
