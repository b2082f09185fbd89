"""The event log of a run: JSON lines that are only appended to, for people and for the report.

Knows files and times; does not know what a run does. Nothing is decided by this log: what is done
stands in the ledger. A line that a kill cut short is passed over when the log is read, and what
other hands wrote into it is not trusted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LATEST = 4e9  # seconds since 1970: the year 2096


class EventLog:
    """Appends events to a file; made if it is not there.

    Args:
        path: the file, its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, event: str, **facts: Any) -> None:
        """Appends one event with the time of now, in seconds since 1970, and what is told of it."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n"
        with open(self._path, "ab") as file:
            if file.tell() and not self._ends_with_newline():
                file.write(b"\n")
            file.write(line.encode())

    def _ends_with_newline(self) -> bool:
        with open(self._path, "rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a log in their order; none if there is no log."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict):
                yield event


def measured(value: object, low: float = 0.0, high: float = LATEST) -> float | None:
    """A fact of an event as a number, if it is one from `low` to `high`: not NaN, nor true."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return None
    return float(value)
