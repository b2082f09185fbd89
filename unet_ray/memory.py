"""Bytes that a pass, a tile and a worker need: sums that can be read, before anything runs.

Knows sizes and widths of the network's layers as numbers; does not know torch. Checked against
measured peaks by a test.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from unet_ray.errors import InputError
from unet_ray.tiles import TilePlan

# Anonymous memory of a worker process that has loaded torch, zarr and (on Ray) Ray itself, before
# it holds any weight or voxel. Measured; see tests/test_memory.py.
PROCESS_BYTES = 200 << 20
# What the convolution library holds beside its input and output (packed weights, scratch), and
# what the allocator cannot give back at once: measured over 16 to 64 channels and both dtypes.
WORKSPACE = 1.10

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{u}i": 1 << 10 * k for k, u in enumerate("kmgt", start=1)}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500 MB`` or ``1048576``.

    Raises:
        InputError: if it is no size or not above zero.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not found or found[2] not in _UNITS or not float(found[1]):
        raise InputError(f"memory={text!r} is not a size: write a number and a unit, as in 4GiB.")
    return int(float(found[1]) * _UNITS[found[2]])


def format_bytes(count: float) -> str:
    """A size for people, in powers of 1024: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit in ("B", "KiB", "MiB") else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} PiB"


@dataclass(frozen=True)
class NetworkSize:
    """The numbers of a network that memory depends on.

    Attributes:
        in_channels, classes, base_channels, depth: as of the network.
        weights: number of parameters.
        itemsize: bytes of one activation: 4 for float32, 2 for bfloat16.
    """

    in_channels: int
    classes: int
    base_channels: int
    depth: int
    weights: int
    itemsize: int


def pass_bytes(net: NetworkSize, pass_shape: tuple[int, ...]) -> int:
    """Peak of one forward call at inference, walking down and up the network.

    Args:
        net: size of the network.
        pass_shape: (slices in the batch, y, x) that the call is given.
    """
    batch, y, x = pass_shape

    def features(channels: int, shrunk: float, level: int) -> float:
        area = (y / 2**level - shrunk) * (x / 2**level - shrunk)
        return float(batch * channels * area * net.itemsize)

    widths = [net.base_channels * 2**level for level in range(net.depth + 1)]
    image = batch * net.in_channels * y * x * (4 + net.itemsize)
    peak, shrunk = 0.0, 0.0
    skips: list[float] = []
    below = features(net.in_channels, 0, 0)
    for level, width in enumerate(widths):
        first, second = features(width, shrunk + 2, level), features(width, shrunk + 4, level)
        peak = max(peak, sum(skips) + below + first, sum(skips) + first + second)
        shrunk = (shrunk + 4) / 2
        below = second / 4
        if level < net.depth:
            skips.append(features(width, _margin(net.depth, level), level))
            peak = max(peak, sum(skips) + second + below)
    for level in reversed(range(net.depth)):
        skip, held = skips[level], sum(skips[:level])
        below = features(2 * widths[level], _margin(net.depth, level) + 4, level) / 2
        # The joined buffer is twice a skip; the skip goes before the up-convolution comes.
        peak = max(peak, held + 3 * skip + below, held + 2 * skip + skip)
    scores = batch * net.classes * y * x * (net.itemsize + 4 + 4)
    return int(image + max(peak, skips[0] + scores) * WORKSPACE)


def _margin(depth: int, level: int) -> float:
    """Voxels of `level` between the face of the input and what is joined there, both sides."""
    shrink = 12 * 2**depth - 8
    margin = float(shrink - 4)
    for _ in range(level):
        margin = margin / 2 - 4
    return margin


@dataclass(frozen=True)
class WorkerMemory:
    """What one worker needs, in bytes; `total` is what is promised."""

    process: int
    weights: int
    tile: int
    forward: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.process + self.weights + self.tile + self.forward

    def shared_by(self, threads: int) -> int:
        """Bytes of one process in which `threads` workers run side by side."""
        return self.process + self.weights + threads * (self.tile + self.forward)


def worker_bytes(net: NetworkSize, plan: TilePlan, voxel_bytes: int, outputs: int) -> WorkerMemory:
    """What a worker needs that reads, predicts and writes one tile at a time.

    Args:
        net: size of the network.
        plan: the tiles.
        voxel_bytes: bytes of one voxel of the volume, all channels.
        outputs: uint8 values stored per voxel.
    """
    read = math.prod(plan.read_shape) * voxel_bytes
    write = math.prod(plan.core) * outputs
    forward = pass_bytes(net, (plan.pass_shape[0], plan.pass_shape[1], plan.pass_shape[2]))
    # While a tile is written the pass is over, and encoding needs about another copy of it.
    return WorkerMemory(
        PROCESS_BYTES, net.weights * (4 + net.itemsize), read + write, max(forward, write, read)
    )
