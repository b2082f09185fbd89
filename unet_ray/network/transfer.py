"""Transfer of passes to a GPU and back, while the GPU computes other passes.

Knows page-locked buffers and the order of copies. Does not know networks or tiles.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Passes under way in each direction, each with buffers of its own: one that is copied or waits, and
# one that is computed.
DEPTH = 2
# Queues of a GPU; the order of operations is fixed inside a queue, and by events between two.
Lane = Literal["up", "compute", "down"]
Arrays = dict[str, NDArray[np.uint8]]
Item = TypeVar("Item")


class Event(Protocol):
    """A point in a lane."""

    def synchronize(self) -> None:
        """Waits until the device has reached the point."""


class Lanes(Protocol):
    """The memory and the lanes of a device."""

    def pinned(self, size: int) -> Tensor:
        """Page-locked host memory, uint8 ``(size,)``."""

    def memory(self, size: int) -> Tensor:
        """Memory of the device, uint8 ``(size,)``, ready for use in the compute lane."""

    def record(self, lane: Lane) -> Event:
        """The point in a lane after all its operations until now."""

    def wait(self, lane: Lane, event: Event) -> None:
        """Lets later operations of a lane wait for a point of another lane."""

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        """Copies and converts values in a lane; returns before the copy is complete."""


class CudaLanes:
    """The lanes of a CUDA device; networks compute in the current stream.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[Lane, torch.cuda.Stream] = {
            "up": torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
            "down": torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
        }

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return self._streams.get(lane) or torch.cuda.current_stream(self._device)

    def pinned(self, size: int) -> Tensor:
        """Page-locked host memory, uint8 ``(size,)``."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def memory(self, size: int) -> Tensor:
        """Memory of the device, uint8 ``(size,)``, ready for use in the compute lane."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def record(self, lane: Lane) -> Event:
        """The point in a lane after all its operations until now."""
        # A thread that waits leaves its core to readers.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream(lane))
        return event

    def wait(self, lane: Lane, event: Event) -> None:
        """Lets later operations of a lane wait for a point of another lane."""
        self._stream(lane).wait_event(cast(torch.cuda.Event, event))

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        """Copies and converts values in a lane; returns before the copy is complete."""
        with torch.cuda.stream(self._stream(lane)):
            target.copy_(source, non_blocking=True)


class Transfer:
    """Copies voxels to a device and results back, in buffers that are made once and used in turn.

    Neither copy waits for the device, unless all `DEPTH` buffers of its direction are in use. The
    caller uses one thread at a time.

    Args:
        lanes: the device.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._up: deque[_Buffers] = deque()
        self._down: deque[_Buffers] = deque()

    def up(self, voxels: NDArray[Any]) -> Tensor:
        """Returns the voxels in float32 on the device, for use in the compute lane.

        They go up as stored, and the device converts them.

        Args:
            voxels: of any shape; their dtype is a number of at most 16 bits, or float32.
        """
        lanes, buffers = self._lanes, self._next(self._up, voxels.nbytes)
        host = buffers.host.numpy().view(voxels.dtype).reshape(voxels.shape)
        np.copyto(host, voxels)
        lanes.wait("up", buffers.used)
        lanes.copy("up", buffers.device, buffers.host)
        sent = lanes.record("up")
        buffers.settle = sent.synchronize
        lanes.wait("compute", sent)
        stored = buffers.device.view(torch.from_numpy(host).dtype).view(voxels.shape)
        image = torch.empty(voxels.shape, dtype=torch.float32, device=stored.device)
        lanes.copy("compute", image, stored)
        buffers.used = lanes.record("compute")
        return image

    def down(self, results: Mapping[str, Tensor]) -> Callable[[], Arrays]:
        """Starts the copy of results to the host; returns a function that waits for them.

        Args:
            results: of the compute lane, by name; uint8.
        """
        lanes, size = self._lanes, sum(values.numel() for values in results.values())
        buffers = self._next(self._down, size)
        shapes = {name: tuple(values.shape) for name, values in results.items()}
        for values, part in zip(results.values(), _parts(buffers.device, shapes), strict=True):
            lanes.copy("compute", part, values)
        lanes.wait("down", lanes.record("compute"))
        lanes.copy("down", buffers.host, buffers.device)
        pending = _Pending(buffers.host, shapes, lanes.record("down"))
        buffers.settle = pending
        return pending

    def _next(self, ring: deque[_Buffers], size: int) -> _Buffers:
        """The buffers of a direction that were used longest ago, after their copy is complete."""
        if len(ring) == DEPTH:
            oldest = ring.popleft()
            oldest.settle()
            if oldest.host.numel() == size:
                ring.append(oldest)
                return oldest
        made = _Buffers(self._lanes, size)
        ring.append(made)
        return made


class _Buffers:
    """Buffers of one pass in one direction.

    Attributes:
        host, device: page-locked memory, and memory of the device.
        used: the point in the compute lane after which `device` may be written.
        settle: waits until `host` may be written.
    """

    def __init__(self, lanes: Lanes, size: int) -> None:
        self.host, self.device = lanes.pinned(size), lanes.memory(size)
        self.used = lanes.record("compute")
        self.settle: Callable[[], object] = lambda: None


class _Pending:
    """Results that a device still computes or copies; a call waits for them."""

    def __init__(self, host: Tensor, shapes: Mapping[str, tuple[int, ...]], copied: Event) -> None:
        self._host, self._shapes, self._copied = host, shapes, copied
        self._arrays: Arrays | None = None

    def __call__(self) -> Arrays:
        """Returns the results by name; the first call copies them from the buffer."""
        if self._arrays is None:
            self._copied.synchronize()
            parts = _parts(self._host, self._shapes)
            copies = (part.numpy().copy() for part in parts)
            self._arrays = dict(zip(self._shapes, copies, strict=True))
        return self._arrays


def _parts(buffer: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
    """Views of a buffer, one after the other."""
    start = 0
    for shape in shapes.values():
        size = math.prod(shape)
        yield buffer[start : start + size].view(shape)
        start += size


def delayed(items: Iterable[Item], count: int) -> Iterator[Item]:
    """Yields items in their order, each after the `count` items behind it were drawn."""
    drawn, waiting = iter(items), deque[Item]()
    waiting.extend(itertools.islice(drawn, count))
    for item in drawn:
        waiting.append(item)
        yield waiting.popleft()
    yield from waiting
