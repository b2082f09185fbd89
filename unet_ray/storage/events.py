"""The event log of a run: JSON lines that are only appended to, for people and for the report.

Knows files and times; does not know what a run does. Nothing is decided by this log: what is done
stands in the ledger. A line that a kill cut short is passed over when the log is read, and what
other hands wrote into it is not trusted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unet_ray.storage.objects import ObjectPath
from unet_ray.storage.places import Place

LATEST = 4e9  # seconds since 1970: the year 2096
PART_SECONDS = 10.0


class EventLog:
    """Appends events to a file, made if it is not there.

    Objects cannot be appended to: in an object store the log is a number of parts, each written
    when some time has passed, or by `flush`.

    Args:
        path: the file, its folder must exist; or what the names of the parts begin with.
        may_write: asked before each writing; raises if the log is no longer this run's.
    """

    def __init__(self, path: Place, may_write: Callable[[], None] = lambda: None) -> None:
        self._path, self._may_write = path, may_write
        self._lines: list[bytes] = []
        self._begun = self._written = time.monotonic()

    def add(self, event: str, **facts: Any) -> None:
        """Appends one event with the time of now, in seconds since 1970, and what is told of it."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n"
        if isinstance(self._path, ObjectPath):
            self._lines.append(line.encode())
            now = time.monotonic()
            # Ever longer, so that the parts of a run of days are some hundred.
            if now - self._written > max(PART_SECONDS, (now - self._begun) / 100):
                self.flush()
            return
        self._may_write()
        with open(self._path, "ab") as file:
            if file.tell() and not self._ends_with_newline(self._path):
                file.write(b"\n")
            file.write(line.encode())

    def flush(self) -> None:
        """Writes what is not written yet."""
        if self._lines and isinstance(self._path, ObjectPath):
            self._may_write()
            part = self._path / f"{time.time_ns():020d}.jsonl"
            part.put(b"".join(self._lines))
            self._lines.clear()
            self._written = time.monotonic()

    @staticmethod
    def _ends_with_newline(path: Path) -> bool:
        with open(path, "rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"


def read_events(path: Place) -> Iterator[dict[str, Any]]:
    """The events of a log in their order; none if there is no log."""
    for line in _lines(path):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            yield event


def _lines(path: Place) -> Iterator[str]:
    if isinstance(path, ObjectPath):
        for part in path.glob("*.jsonl"):
            yield from part.read_bytes().decode("utf-8", "replace").splitlines()
    elif path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file


def measured(value: object, low: float = 0.0, high: float = LATEST) -> float | None:
    """A fact of an event as a number, if it is one from `low` to `high`: not NaN, nor true."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return None
    return float(value)
