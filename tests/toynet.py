"""A U-Net in integers: valid convolutions, max-pooling, up-convolutions and skips, all exact.

`StreamedToyNet` is the same network, one slab after the other along z.

It has one channel, and numbers modulo a prime instead of ReLU. Nothing is rounded or suppressed, so
any difference between the input of a tile and the whole image changes the output.
"""

import numpy as np

from unet_ray.tiling.streaming import stream_along
from unet_ray.tiling.tiles import Context

PRIME = 251


class ToyNet:
    """A network with the given `levels` (`unet_ray.tiling.tiles.Level`), for int64 (z, y, x)."""

    def __init__(self, levels, seed=0):
        rng = np.random.default_rng(seed)
        self.levels = levels
        self.context = Context.of_levels(levels)
        self._down = [rng.integers(1, PRIME, (2, *v.kernel)) for v in levels]
        self._join = [rng.integers(1, PRIME, (2, *v.kernel)) for v in levels]
        self._up = [rng.integers(1, PRIME, v.pool) for v in levels]

    def __call__(self, voxels):
        """Returns the output of valid convolutions; raises ValueError if sizes do not fit."""
        return self._from(0, voxels)

    def _from(self, level, x):
        x = convolved(x, self._down[level])
        if level == len(self.levels) - 1:
            return x
        below = self._from(level + 1, pooled(x, self.levels[level].pool))
        below = np.kron(below, self._up[level])
        return convolved(2 * middle(x, below.shape) + below, self._join[level])


def convolved(x, kernels):
    for kernel in kernels:
        size = [n - k + 1 for n, k in zip(x.shape, kernel.shape, strict=True)]
        total = np.zeros(size, np.int64)
        for at in np.ndindex(kernel.shape):
            window = tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))
            total += kernel[at] * x[window]
        x = total % PRIME
    return x


def pooled(x, widths):
    pairs = [(n // p, p) for n, p in zip(x.shape, widths, strict=True)]
    cells = x.reshape([number for pair in pairs for number in pair])
    return cells.max(axis=tuple(range(1, 2 * x.ndim, 2)))


def middle(x, shape):
    excess = [size - target for size, target in zip(x.shape, shape, strict=True)]
    if any(n < 0 or n % 2 for n in excess):
        raise ValueError(f"{shape} does not fit into the middle of {x.shape}")
    return x[tuple(slice(n // 2, n // 2 + size) for n, size in zip(excess, shape, strict=True))]


class StreamedToyNet:
    """A `ToyNet` that takes slabs of (z, y, x) and keeps planes between two calls."""

    def __init__(self, net, slab):
        self.net, self.stream, self._kept = net, stream_along(net.levels, slab), {}

    def __call__(self, slab):
        if len(slab) != self.stream.slab:
            raise ValueError(f"{len(slab)} planes are not a slab of {self.stream.slab}")
        scores = self._from(0, slab)
        return self._after("output", scores, self.stream.output)[: self.stream.slab]

    def _after(self, key, x, count):
        """The kept planes, then `x`; keeps the last `count` planes. At first they are zeros."""
        kept = self._kept.get(key)
        if kept is None:
            kept = np.zeros((count, *x.shape[1:]), np.int64)
        x = np.concatenate([kept, x])
        self._kept[key] = x[len(x) - count :]
        return x

    def _convolved(self, x, kernels, key):
        for number, kernel in enumerate(kernels):
            x = convolved(self._after((*key, number), x, len(kernel) - 1), [kernel])
        return x

    def _from(self, level, x):
        net, planes = self.net, len(x)
        x = self._convolved(x, net._down[level], ("down", level))
        if level == len(net.levels) - 1:
            return x
        pool = net.levels[level].pool
        whole = self._after(("pool", level), x, self.stream.pools[level])[:planes]
        below = np.kron(self._from(level + 1, pooled(whole, pool)), net._up[level])
        skip = self._after(("skip", level), x, self.stream.skips[level])[:planes]
        skip = middle(skip, (planes, *below.shape[1:]))
        return self._convolved(2 * skip + below, net._join[level], ("join", level))
