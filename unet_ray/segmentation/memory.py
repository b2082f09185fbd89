"""Bytes that a pass, a tile and a worker need: sums that can be read, before anything runs.

Knows sizes and widths of the network's layers as numbers; does not know torch. Checked against
measured peaks by a test.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from unet_ray.errors import InputError
from unet_ray.tiling.tiles import TilePlan

# Anonymous memory of a worker process that has loaded torch and zarr, and on Ray also Ray Data,
# before it holds any weight or voxel. Measured, as the two below; tests/test_memory.py checks.
PROCESS_BYTES = {"local": 165 << 20, "ray": 250 << 20}
# What the allocator keeps beyond what lives at the peak (see `keep_freed_memory`): holes between
# buffers of different sizes, and a fixed part for the convolution library's own code and scratch.
KEPT = 1.65
SCRATCH_BYTES = 96 << 20
# Anonymous memory of the driver of a run on Ray, and what it notes of each tile: is it asked for,
# left, committed, quarantined, skipped. Measured with 32 and with 4096 tiles; where there are GPUs,
# whose waves have more blocks, with 16384.
DRIVER_BYTES = {"cpu": 400 << 20, "cuda": 480 << 20}
TILE_NOTES = 12
# Results of constant passes that are kept: empty background is one value, seldom two.
CONSTANTS = 2

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{u}i": 1 << 10 * k for k, u in enumerate("kmgt", start=1)}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500 MB`` or ``1048576``.

    Raises:
        InputError: if it is no size or not above zero.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    size = float(found[1]) * _UNITS.get(found[2], 0) if found else 0.0
    if not 1 <= size < 2**63:
        raise InputError(f"memory={text!r} is not a size: write a number and a unit, as in 4GiB.")
    return int(size)


def format_bytes(count: float) -> str:
    """A size for people, in powers of 1024: ``900 MiB``, ``1.50 GiB``."""
    for unit, digits in (("B", 0), ("KiB", 0), ("MiB", 0), ("GiB", 2), ("TiB", 2)):
        if round(count, digits) < 1024:
            return f"{count:.{digits}f} {unit}"
        count /= 1024
    return f"{count:.2f} PiB"


@dataclass(frozen=True)
class NetworkSize:
    """The numbers of a network that memory depends on.

    Attributes:
        in_channels, classes, base_channels, depth: as of the network.
        weights: number of parameters.
        itemsize: bytes of one activation: 4 for float32, 2 for bfloat16.
        tta: passes are averaged over the symmetries of the square.
    """

    in_channels: int
    classes: int
    base_channels: int
    depth: int
    weights: int
    itemsize: int
    tta: bool = False


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
        peak = max(peak, held + 3 * skip + below)
    scores = batch * net.classes * y * x * (net.itemsize + 4 + 4)
    if net.tta:  # the turned image, and the sum so far, stay beside every pass
        image += batch * y * x * (net.in_channels * net.itemsize + net.classes * 4)
        scores += batch * net.classes * y * x * 4
    return int(image + max(peak, skips[0] + scores))


def _margin(depth: int, level: int) -> float:
    """Voxels of `level` between the face of the input and what is joined there, both sides."""
    shrink = 12 * 2**depth - 8
    margin = float(shrink - 4)
    for _ in range(level):
        margin = margin / 2 - 4
    return margin


@dataclass(frozen=True)
class WorkerMemory:
    """What one worker needs, in bytes; `total` is what is promised.

    Attributes:
        process: the interpreter with its libraries.
        index: of the input, which every process opens: where its strips or tiles are.
        load: peak while the model is loaded: file, network and folded network beside each other.
        weights: of the network that predicts.
        tile: voxels read and values to be written, with the constant passes that are kept.
        copy: of voxels or values, while a tile is read or written.
        forward: peak of one pass.
    """

    process: int
    index: int
    load: int
    weights: int
    tile: int
    copy: int
    forward: int

    @property
    def total(self) -> int:
        """All of it together, with what the allocator keeps."""
        return self.shared_by(1)

    def on(self, engine: str) -> WorkerMemory:
        """The same for a worker of this engine, ``local`` or ``ray``."""
        return replace(self, process=PROCESS_BYTES[engine])

    def shared_by(self, threads: int, passes: int | None = None) -> int:
        """Bytes of one process with so many tiles under way.

        Args:
            threads: tiles that are read, predicted or written at the same time.
            passes: of these are predicted at the same time; all of them, if not given.
        """
        passes = threads if passes is None else passes
        # While a tile is read or written no pass of it runs.
        most = passes * max(self.forward, self.copy) + (threads - passes) * self.copy
        work = self.weights + threads * self.tile + most
        return self.process + self.index + max(self.load, SCRATCH_BYTES + int(KEPT * work))

    def helper(self, tiles: int) -> int:
        """Bytes of a process that reads or writes so many tiles together for one that predicts."""
        # What is read or to be written, as it crosses, and as it is put there.
        work = 3 * tiles * self.tile + self.copy
        return self.process + self.index + SCRATCH_BYTES + int(KEPT * work)


def worker_bytes(
    net: NetworkSize, plan: TilePlan, voxel_bytes: int, outputs: int, held: int = 0, index: int = 0
) -> WorkerMemory:
    """What a worker needs that reads, predicts and writes one tile at a time.

    Args:
        net: size of the network.
        plan: the tiles.
        voxel_bytes: bytes of one voxel of the volume, all channels.
        outputs: uint8 values stored per voxel.
        held: bytes of the input's storage units while a tile is read.
        index: bytes that opening the input takes.
    """
    read = math.prod(plan.read_shape) * voxel_bytes
    write = math.prod(plan.core) * outputs
    constants = CONSTANTS * math.prod(plan.passes) * outputs
    forward = pass_bytes(net, (plan.pass_shape[0], plan.pass_shape[1], plan.pass_shape[2]))
    return WorkerMemory(
        # The larger of the two, or a plan would depend on the engine.
        process=PROCESS_BYTES["ray"],
        index=index,
        load=net.weights * (3 * 4 + net.itemsize),
        weights=net.weights * net.itemsize,
        tile=read + write + constants,
        copy=max(write, read, held),  # for mirroring and encoding
        forward=forward,
    )


def driver_bytes(
    workers: int, engine: str, device: str, tiles: int, measuring: int = 0, index: int = 0
) -> int:
    """What the process needs that starts a run: on the local engine with all its workers.

    Args:
        workers: bytes of a process with workers.
        engine: ``local`` or ``ray``.
        device: of the workers, ``cpu`` or ``cuda``.
        tiles: of the plan.
        measuring: what grey values are measured with, before there are workers.
        index: bytes that opening the input takes.
    """
    running = workers if engine == "local" else DRIVER_BYTES[device] + index
    return TILE_NOTES * tiles + max(running, PROCESS_BYTES[engine] + index + measuring)


def room() -> int:
    """Bytes that this process could hold if nothing else changed; 0 where the system tells none.

    What it holds, and what is free on the machine or, if that is less, in its container or by a
    limit of its own (``ulimit``).
    """
    status = Path("/proc/self/status")
    try:
        free = _told(Path("/proc/meminfo"), "MemAvailable")
        for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            most, _ = resource.getrlimit(limit)
            if most != resource.RLIM_INFINITY:
                free = min(free, max(0, most - _told(status, name)))
    except OSError:
        return 0
    return held() + min([free, *_left_in_containers()])


def _left_in_containers() -> Iterator[int]:
    """Bytes left in each control group of this process that limits them, from the outermost in."""
    for kind, (most, used, cache) in _CGROUP.items():
        folder = CGROUPS / kind
        for name in ("", *_cgroup_names(kind)):
            folder = folder / name
            with suppress(OSError, ValueError):  # no such group, or no limit ("max")
                left = int((folder / most).read_text()) - int((folder / used).read_text())
                # Pages of files count as used, though they are given up when others need room.
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                files = sum(int(stat.get(f"{cache}{each}_file", 0)) for each in _LISTS)
                yield max(0, left + files)


def _cgroup_names(kind: str) -> list[str]:
    """The names, from the outermost in, of the groups that hold this process."""
    with suppress(OSError):
        for line in PROC_CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if kind in controllers.split(","):
                return path.strip("/").split("/")
    return []


def held() -> int:
    """Anonymous bytes that this process holds; 0 where the system does not tell."""
    try:
        return _told(Path("/proc/self/status"), "RssAnon")
    except OSError:
        return 0


CGROUPS, PROC_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Version 2, whose controller has no name, and 1: files of limit and use, and what comes before the
# names of sums over a group and those in it.
_CGROUP = {
    "": ("memory.max", "memory.current", ""),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
_LISTS = ("active", "inactive")


def _told(file: Path, name: str) -> int:
    """Bytes that a line ``NAME:  123 kB`` of a file tells."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def keep_freed_memory() -> None:
    """Tells the C library to keep what is freed for the next pass, for this whole process.

    Every pass asks for the same large buffers again. Handing them back to the system and getting
    them anew, page by page, takes up to a third of the time of a pass; keeping them costs memory
    that lies idle between passes, and makes the peak of a worker one number that does not drift.
    Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, (_, value) in _MALLOC.items():
            mallopt(option, value)


def give_back_freed_memory() -> None:
    """Gives what is kept for the next pass back to the system, where there is glibc."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def kept_memory_environment() -> dict[str, str]:
    """The same as environment variables, for a process that is yet to start."""
    return {name: str(value) for name, value in _MALLOC.values()}


# Options of glibc's malloc.h and the variables that set them: no mapping of its own for a large
# buffer, nothing given back, growth by 16 MiB, one arena for all threads.
_MALLOC = {
    -4: ("MALLOC_MMAP_MAX_", 0),
    -1: ("MALLOC_TRIM_THRESHOLD_", 2**31 - 1),
    -2: ("MALLOC_TOP_PAD_", 16 << 20),
    -8: ("MALLOC_ARENA_MAX", 1),
}
