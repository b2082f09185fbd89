"""Data types of a stage: its worker, its tiles between two steps, and their receipts.

Knows names, verdicts and receipts. Does not know who runs a stage, or what a tile contains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from unet_ray.storage.places import Place

Verdict = Literal["again", "alone", "never", "stop", "changed", "refused", "broken"]
Step = Literal["read", "predict", "write"]
STEPS: tuple[Step, ...] = ("read", "predict", "write")


@dataclass(frozen=True)
class Receipt:
    """The outcome of one attempt at a tile.

    Attributes:
        tile: its number.
        seconds: time spent reading, predicting and writing together.
        error: one sentence if the attempt failed; nothing was committed then.
        trace: Python's traceback.
        verdict: what to do after a failure. ``again``: retry. ``alone``: retry while no other tile
            uses the machine's memory. ``never``: give up this tile. ``stop``: end the run, since
            other tiles would fail too. ``changed``: end the run, since its input has changed.
            ``refused``: end the run, since a worker cannot be made. ``broken``: end this process,
            since its GPU has failed.
        memory: anonymous bytes of the process when the tile was done; 0 if unknown.
        room: bytes available to the process when memory ran out; 0 if unknown, or if the failure
            had another cause.
        checksum: of what the attempt wrote, as hexadecimal digits; "" if unknown.
    """

    tile: int
    seconds: float
    error: str = ""
    trace: str = ""
    verdict: Verdict = "again"
    room: int = 0
    memory: int = 0
    checksum: str = ""


@dataclass(frozen=True)
class TileState:
    """A tile between two steps.

    Attributes:
        receipt: of the steps so far.
        data: output of the last step: the voxels, the result, or None after a failure or the last
            step. Between processes, it must be an array, or a mapping of names to arrays.
    """

    receipt: Receipt
    data: Any = None


class Helper(Protocol):
    """Reads and writes tiles. Each process that does so makes one."""

    def read(self, tile: int) -> Any:
        """Returns the input voxels of the tile."""

    def write(self, tile: int, result: Any) -> str | None:
        """Writes the result; returns its checksum, if there is one, when it is on disk."""


class Worker(Helper, Protocol):
    """Runs all three steps of a tile. Each process that predicts makes one."""

    def predict(self, tile: int, voxels: Any) -> Any:
        """Returns the result of the tile from its input voxels."""


class Whole:
    """A worker that processes a tile by a single function of its number.

    Args:
        function: may return the checksum of what it wrote.
    """

    def __init__(self, function: Callable[[int], str | None]) -> None:
        self._function = function

    def read(self, tile: int) -> None:
        """Does nothing."""

    def predict(self, tile: int, voxels: None) -> None:
        """Does nothing."""

    def write(self, tile: int, result: None) -> str | None:
        """Calls the function; returns its result."""
        return self._function(tile)


@dataclass(frozen=True)
class Deadline:
    """Time limits, so that a run never waits forever.

    Attributes:
        first: seconds for an attempt until a few tiles are done.
        multiple: later limit for an attempt, as a multiple of the median of finished attempts.
        least: lower bound in seconds of that limit; failover of a file server takes minutes.
        make: seconds to make a worker.
    """

    first: float = 3600.0
    multiple: float = 20.0
    least: float = 300.0
    make: float = 3600.0


@dataclass(frozen=True)
class Stage:
    """A piece of work on all tiles of a plan.

    Attributes:
        name: used in messages and for the ledger.
        make_worker: makes the worker, in the process that uses it; must be small when pickled.
        device: ``cpu`` (one thread per pass, several workers in parallel), ``cuda`` or ``mps``.
        marks: folder that all Ray workers can access, for the progress of the tiles of each block.
            None for neither marks nor deadlines on Ray.
        deadline: time limits.
        in_flight: tiles that a GPU worker processes at a time; it predicts one while others are
            read or written.
        together: at most this many tiles pass together from the process of one step to the next.
        memory: bytes that a worker and its helpers need; 0 if unknown.
        reserve: bytes that a process reserves before it makes its first worker; 0 for none. A retry
            alone on the local engine reserves nothing.
        helper_memory: bytes that each of its helpers needs; 0 without helpers.
        make_helper: makes the object that reads or writes in processes that do not predict; by
            default a worker.
        layer: distance between the numbers of two tiles of which the second continues the first; 0
            if each tile is computed by itself.
        longest: at most this many tiles that continue each other go to one worker as a run.
        check: called before the end of the stage is recorded; raises if results may be wrong.
    """

    name: str
    make_worker: Callable[[], Worker]
    device: str
    marks: Place | None = None
    deadline: Deadline = Deadline()
    in_flight: int = 1
    together: int = 1
    memory: int = 0
    reserve: int = 0
    helper_memory: int = 0
    make_helper: Callable[[], Helper] | None = None
    layer: int = 0
    longest: int = 1
    check: Callable[[], None] = lambda: None

    def make_for(self, steps: Sequence[Step]) -> Helper:
        """Makes a worker if `steps` include ``predict``, else a helper."""
        helper = self.make_helper if "predict" not in steps else None
        return (helper or self.make_worker)()


def runs_of(tiles: Iterable[int], stage: Stage) -> Iterator[list[int]]:
    """Yields the tiles in runs, in their order; each tile of a run continues the one before."""
    run: list[int] = []
    for tile in tiles:
        follows = run and tile == run[-1] + stage.layer and len(run) < stage.longest
        if run and not follows:
            yield run
            run = []
        run.append(tile)
    if run:
        yield run


TryOne = Callable[[int, AbstractContextManager[Any]], Receipt]
