"""Sizes and modification times of an input's files, which show whether it has changed.

Knows names, sizes and times. Does not know formats or voxels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from unet_ray.errors import ChangedError
from unet_ray.storage.places import Stat, place_of, stat_of


@dataclass(frozen=True)
class Fingerprint:
    """The state of an input's files.

    Attributes:
        path: the input.
        bytes: total size of the files.
        modified_ns: their newest modification time, in nanoseconds since 1970.
        files_sha256: hash of their names, sizes and times.
        stats: size and time of each file that is compared on its own. The others, such as the
            chunks of a Zarr array, may be too many; they must not be newer than `modified_ns`.
    """

    path: str
    bytes: int
    modified_ns: int
    files_sha256: str
    stats: Mapping[str, Stat]

    @classmethod
    def of(cls, path: str, files: Iterable[str], chunks: Mapping[str, Stat | None]) -> Fingerprint:
        """Returns the fingerprint of an input.

        Args:
            path: the input.
            files: names of its files.
            chunks: size and time of each of its chunks by name; None for a missing chunk.

        Raises:
            OSError: if a file does not exist or cannot be accessed.
        """
        stats = {name: stat_of(place_of(name)) for name in sorted(files)}
        digest = hashlib.sha256()
        known: dict[str, Stat | None] = {**stats, **chunks}
        for name, stat in known.items():
            inside = name[len(path) :].strip("/") or os.path.basename(name)
            state = f"{stat.size} {stat.modified_ns}" if stat else "missing"
            digest.update(f"{inside} {state}\n".encode(errors="surrogateescape"))
        present = [stat for stat in known.values() if stat]
        return cls(
            path,
            sum(stat.size for stat in present),
            max(stat.modified_ns for stat in present),
            digest.hexdigest(),
            stats,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields that identify an input, without its path."""
        fields = asdict(self)
        return {name: fields[name] for name in ("bytes", "modified_ns", "files_sha256")}

    def refuse_change(self, names: Iterable[str]) -> None:
        """Checks files that were read; a missing chunk is no change, since it has no voxels.

        Raises:
            ChangedError: if a file has changed; names it.
        """
        for name in names:
            try:
                stat = stat_of(place_of(name))
            except FileNotFoundError:
                if name in self.stats:
                    raise changed(name) from None
                continue
            recorded = self.stats.get(name)
            if stat != recorded and (recorded or stat.modified_ns > self.modified_ns):
                raise changed(name)


def changed(name: str) -> ChangedError:
    """Returns the error for an input that has changed since the run began."""
    return ChangedError(
        f"{name} has changed since this run began; restore it and run the same command again, or "
        "start over with --overwrite."
    )
