"""Sizes and modification times of an input's files, which show whether it has changed.

Knows names, sizes and times. Does not know formats or voxels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray.errors import ChangedError
from unet_ray.storage.places import Stat, place_of, stat_of, state_of


@dataclass(frozen=True)
class Fingerprint:
    """The state of an input's files.

    Attributes:
        path: the input.
        size: of all files together, in bytes.
        modified_ns: their newest modification time, in nanoseconds since 1970.
        files_sha256: hash of their names, sizes and times.
        stats: size and time of each file, without the chunks of a Zarr array.
        chunk_hashes: sorted hashes of 8 bytes, of the name, size and time of each chunk.
        all_chunks: whether they cover all chunks that are read, not a sample. Chunks outside the
            sample must not be newer than `modified_ns`.
    """

    path: str
    size: int
    modified_ns: int
    files_sha256: str
    stats: Mapping[str, Stat]
    chunk_hashes: bytes = b""
    all_chunks: bool = True

    @classmethod
    def of(
        cls,
        path: str,
        files: Iterable[str],
        chunks: Mapping[str, Stat | None],
        all_chunks: bool = True,
    ) -> Fingerprint:
        """Returns the fingerprint of an input.

        Args:
            path: the input.
            files: names of its files.
            chunks: size and time of each of its chunks by name; None for a missing chunk.
            all_chunks: whether they are all chunks.

        Raises:
            OSError: if a file does not exist or cannot be accessed.
        """
        stats = {name: stat_of(place_of(name)) for name in sorted(files)}
        digest = hashlib.sha256()
        known: dict[str, Stat | None] = {**stats, **chunks}
        for name, stat in known.items():
            digest.update(_line(path, name, stat))
        present = [stat for stat in known.values() if stat]
        hashes = [_hash(path, name, stat) for name, stat in chunks.items()]
        return cls(
            path,
            sum(stat.size for stat in present),
            max((stat.modified_ns for stat in present), default=0),
            digest.hexdigest(),
            stats,
            np.sort(np.array(hashes, np.uint64)).tobytes(),
            all_chunks,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields that identify an input, without its path."""
        return {
            "bytes": self.size,
            "modified_ns": self.modified_ns,
            "files_sha256": self.files_sha256,
        }

    def refuse_change(self, names: Iterable[str]) -> None:
        """Checks files and chunks that were read.

        Raises:
            ChangedError: if one has changed; names it.
        """
        for name in names:
            stat = state_of(name)
            same = self.stats[name] == stat if name in self.stats else self._has_chunk(name, stat)
            if not same:
                raise changed(name)

    def _has_chunk(self, name: str, stat: Stat | None) -> bool:
        if not self.all_chunks and (stat is None or stat.modified_ns <= self.modified_ns):
            return True
        hashes = np.frombuffer(self.chunk_hashes, np.uint64)
        number = np.uint64(_hash(self.path, name, stat))
        place = np.searchsorted(hashes, number)
        return bool(place < len(hashes) and hashes[place] == number)


def _line(path: str, name: str, stat: Stat | None) -> bytes:
    """Describes the state of a file in one line; its name is relative to the input."""
    inside = name[len(path) :].strip("/") or os.path.basename(name)
    state = f"{stat.size} {stat.modified_ns}" if stat else "missing"
    return f"{inside} {state}\n".encode(errors="surrogateescape")


def _hash(path: str, name: str, stat: Stat | None) -> int:
    digest = hashlib.blake2b(_line(path, name, stat), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def changed(name: str, mixed: bool = False) -> ChangedError:
    """Returns the error for an input or a model that has changed since the run began.

    Args:
        name: of the file.
        mixed: whether committed tiles may be of the changed file.
    """
    if mixed:
        return ChangedError(
            f"{name} has changed since this run began, and tiles may be of either state; start "
            "over with --overwrite."
        )
    return ChangedError(
        f"{name} has changed since this run began; restore it and run the same command again, or "
        "start over with --overwrite."
    )
