"""How progress is shown to people: a bar on a terminal, a plain line now and then elsewhere.

Writes to standard error only; knows numbers and text, not what is being done.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field

LINE_SECONDS = 10.0
PACE_SECONDS, PACE_TILES = 60.0, 20
BAR_WIDTH = 24


@dataclass
class ProgressLine:
    """One line that says how far a run is.

    Attributes:
        label: what is being done.
    """

    label: str
    _shown: float = field(default=-1e9, repr=False)

    def show(self, fraction: float, text: str) -> None:
        """Shows `text`; on a terminal with a bar, elsewhere at most every ten seconds.

        Args:
            fraction: how much is done, 0 to 1; the end is always shown.
            text: the numbers of this moment.
        """
        ended, now = fraction >= 1, time.monotonic()
        if sys.stderr.isatty():
            line = self._fitted(fraction, text, os.get_terminal_size(sys.stderr.fileno()).columns)
            print(f"\r\x1b[K{line}", end="\n" if ended else "", file=sys.stderr)
            sys.stderr.flush()
        elif ended or now - self._shown >= LINE_SECONDS:
            self._shown = now
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)

    def _fitted(self, fraction: float, text: str, columns: int) -> str:
        """The line with a bar, in one row of a terminal of so many columns; 0 if unknown."""
        room = (columns or 120) - 1
        width = min(BAR_WIDTH, room - len(f"{self.label} [] {text}"))
        full = round(width * fraction)
        bar = f" [{'#' * full}{'-' * (width - full)}]" if width > 3 else ""
        return f"{self.label}{bar} {text}"[:room]


class Pace:
    """How fast tiles are done now: over the last minute or the last 20, whichever is longer.

    Tiles that run side by side end nearly together, so nothing is known before each worker has done
    one, and what is measured is always some rounds of all of them. The start counts only in the
    first round: workers take a while to begin.

    Args:
        workers: tiles side by side.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers, self._seen = workers, deque([(0.0, 0, 0)])

    def saw(self, seconds: float, tiles: int, voxels: int) -> None:
        """Notes how far it is.

        Args:
            seconds: since the first tile was started.
            tiles: done since then.
            voxels: done since then.
        """
        self._seen.append((seconds, tiles, voxels))
        if not self._seen[0][1] and tiles > self._workers:
            self._seen.popleft()
        while len(self._seen) > 2 and self._is_old(*self._seen[1][:2]):
            self._seen.popleft()

    def _is_old(self, seconds: float, tiles: int) -> bool:
        now, done, _ = self._seen[-1]
        return now - seconds >= PACE_SECONDS and done - tiles >= max(PACE_TILES, 2 * self._workers)

    @property
    def voxels(self) -> float:
        """Voxels per second."""
        return self._per_second(2)

    def seconds(self, tiles: int) -> float:
        """Seconds that so many tiles take; infinite while none was done."""
        return tiles / speed if (speed := self._per_second(1)) else math.inf

    def _per_second(self, what: int) -> float:
        last = self._seen[-1]
        rounds = (each for each in self._seen if (last[1] - each[1]) % self._workers == 0)
        first = next(rounds)
        return (last[what] - first[what]) / max(last[0] - first[0], 1e-9)
