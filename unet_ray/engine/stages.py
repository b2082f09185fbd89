"""A stage of work on tiles, and what a try of a tile leaves behind.

Knows names, verdicts and receipts. Does not know who runs a stage, or what a tile is about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from unet_ray.storage.places import Place

Verdict = Literal["again", "alone", "never", "stop", "broken"]
Step = Literal["read", "predict", "write"]
STEPS: tuple[Step, ...] = ("read", "predict", "write")


@dataclass(frozen=True)
class Receipt:
    """What is known of a tile that was tried.

    Attributes:
        tile: its number.
        seconds: time spent reading, predicting and writing together.
        error: one sentence if it failed; nothing was committed then.
        trace: Python's traceback.
        verdict: of a failure: ``again`` may do better, ``alone`` (on a machine's memory) may do
            better with nothing beside it, ``never`` cannot, ``stop``: nor can any other tile,
            ``broken``: nor can any other in this process, whose GPU has failed.
        memory: anonymous bytes of the process when the tile was done; 0 if unknown.
        room: of a failure for lack of memory, bytes that the process could have had; 0 if unknown.
    """

    tile: int
    seconds: float
    error: str = ""
    trace: str = ""
    verdict: Verdict = "again"
    room: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Carried:
    """A tile between two steps.

    Attributes:
        receipt: of the steps so far.
        data: what the last step gave: voxels, the result, None at last; None after a failure. To
            cross to another process, an array, or arrays by their names.
    """

    receipt: Receipt
    data: Any = None


class Helper(Protocol):
    """What reads and writes tiles; made once in each process that does."""

    def read(self, tile: int) -> Any:
        """What the tile needs from the input."""

    def write(self, tile: int, result: Any) -> None:
        """Puts the result on disk; returns when it is there."""


class Worker(Helper, Protocol):
    """The three steps of one tile; made once in each process that predicts tiles."""

    def predict(self, tile: int, voxels: Any) -> Any:
        """The tile's result, from what was read."""


class Whole:
    """A worker whose work on a tile is one function of its number."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self._function = function

    def read(self, tile: int) -> None:
        """Nothing."""

    def predict(self, tile: int, voxels: None) -> None:
        """Nothing."""

    def write(self, tile: int, result: None) -> None:
        """Calls the function."""
        self._function(tile)


@dataclass(frozen=True)
class Deadline:
    """How long a try may take, so that nothing waits for ever.

    Attributes:
        first: seconds, until a few tiles are done.
        multiple: of the median of the tiles that were done.
        least: seconds; file servers that fail over take minutes.
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
        name: for messages and the ledger.
        make_worker: makes the worker where it is to run; small to pickle.
        device: ``cpu`` (one thread per pass, workers side by side), ``cuda`` or ``mps``.
        marks: folder, seen by every worker of Ray, of what became of the tiles of each block; None
            for no marks, and no deadline on Ray.
        deadline: of a try.
        in_flight: tiles that a worker on a GPU has under way: others come and go while it predicts
            one.
        together: tiles that may go from one step to the next together, where steps are processes.
        memory: bytes that a worker needs, with its helpers; 0 if unknown.
        make_helper: makes what only reads or writes, where another predicts; by default a worker.
    """

    name: str
    make_worker: Callable[[], Worker]
    device: str
    marks: Place | None = None
    deadline: Deadline = Deadline()
    in_flight: int = 1
    together: int = 1
    memory: int = 0
    make_helper: Callable[[], Helper] | None = None

    def make_for(self, steps: Sequence[Step]) -> Helper:
        """Makes what takes these steps: a worker if one of them is to predict."""
        helper = self.make_helper if "predict" not in steps else None
        return (helper or self.make_worker)()


TryOne = Callable[[int, AbstractContextManager[Any]], Receipt]
