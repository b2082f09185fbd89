"""The event log of a run: appended JSON lines, for people and for the report.

Knows files and times. Does not know what a run does. The ledger records which tiles are
done, so no tile depends on this log. Readers skip lines that a kill cut short, and must not trust
values, since anyone may edit the file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unet_ray.errors import RunError, refusing
from unet_ray.storage.objects import ObjectPath
from unet_ray.storage.parsing import ContentError, parse_json, refuse_special
from unet_ray.storage.places import Place, retried

LATEST = 4e9  # seconds since 1970: the year 2096
PART_SECONDS = 10.0


class EventLog:
    """Appends events to a file and creates it if it does not exist.

    Objects cannot be appended to. In an object store the log consists of several objects; each
    contains the events of some seconds and is written by `add` or `flush`.

    Args:
        path: the file, in an existing folder; in an object store the prefix of the objects.
        check_owner: called before each write; raises if this run no longer owns the log.
    """

    def __init__(self, path: Place, check_owner: Callable[[], None] = lambda: None) -> None:
        self._path, self._check_owner = path, check_owner
        self._lines: list[bytes] = []
        self._started = self._flushed = time.monotonic()

    def add(self, event: str, **facts: Any) -> None:
        """Appends one event with the current time, in seconds since 1970, and its `facts`.

        Raises:
            OSError: if it cannot be written, after the retries of `retried`; names the file.
        """
        fields = {"time": round(time.time(), 3), "event": event, **facts}
        line = json.dumps(fields, allow_nan=False) + "\n"
        if isinstance(self._path, ObjectPath):
            self._lines.append(line.encode())
            now = time.monotonic()
            # The interval grows with the run, so that a run of days writes some hundred objects.
            if now - self._flushed > max(PART_SECONDS, (now - self._started) / 100):
                self.flush()
            return
        self._check_owner()
        path = self._path
        retried(path, lambda: self._append(path, line.encode()))

    def flush(self) -> None:
        """Writes the pending events; only an object store has any."""
        if self._lines and isinstance(self._path, ObjectPath):
            self._check_owner()
            part = self._path / f"{time.time_ns():020d}.jsonl"
            part.put(b"".join(self._lines))
            self._lines.clear()
            self._flushed = time.monotonic()

    @classmethod
    def _append(cls, path: Path, line: bytes) -> None:
        if path.exists() and not path.is_file():  # a pipe, for example, which may block forever
            raise RunError(f"{path}: is not a file; remove it, then run the same command again.")
        with open(path, "ab") as file:
            if path.stat().st_size and not cls._ends_with_newline(path):
                file.write(b"\n")
            file.write(line)

    @staticmethod
    def _ends_with_newline(path: Path) -> bool:
        with open(path, "rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"


def read_events(path: Place) -> Iterator[dict[str, Any]]:
    """Yields the events of a log in order; none if the log does not exist.

    Raises:
        InputError: if the log is not a regular file.
    """
    for line in _lines(path):
        try:
            event = parse_json(line)
        except ContentError:
            continue
        if isinstance(event, dict):
            yield event


def _lines(path: Place) -> Iterator[str]:
    if isinstance(path, ObjectPath):
        for part in path.glob("*.jsonl"):
            yield from part.read_bytes().decode("utf-8", "replace").splitlines()
    elif path.exists():
        with refusing(path, "a log"):
            refuse_special(path)
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file


def measured(value: object, low: float = 0.0, high: float = LATEST) -> float | None:
    """Returns `value` as a float if it is a number from `low` to `high`, else None.

    NaN and booleans are not numbers here.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return None
    return float(value)
