"""How progress is shown to people: a bar on a terminal, a plain line now and then elsewhere.

Writes to standard error only; knows numbers and text, not what is being done.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

LINE_SECONDS = 10.0
BAR_WIDTH = 24


def format_seconds(seconds: float) -> str:
    """A duration for people: ``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


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
            full = round(BAR_WIDTH * fraction)
            bar = "#" * full + "-" * (BAR_WIDTH - full)
            print(
                f"\r\x1b[K{self.label} [{bar}] {text}", end="\n" if ended else "", file=sys.stderr
            )
            sys.stderr.flush()
        elif ended or now - self._shown >= LINE_SECONDS:
            self._shown = now
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)
