"""Checks every file of a store against its provenance and ledger.

Knows the shards and the metadata of a store. Does not know how to recompute a tile.

The expected metadata are derived from the provenance, never from the ``zarr.json`` of an array,
and then compared with it. Module `shards` detects any changed byte of a shard.
"""

from __future__ import annotations

import json
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import DamageError, RunError
from unet_ray.storage.inspection import Found
from unet_ray.storage.layout import ARRAYS, LEDGER, PRIVATE, StoreLayout
from unet_ray.storage.ledger import (
    checksums,
    committed,
    damaged,
    recorded_provenance,
    skipped,
)
from unet_ray.storage.parsing import ContentError
from unet_ray.storage.places import Place, files_below, is_behind_link, stat_of
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.shards import CHECKSUM_BYTES, Shards, checksum_of
from unet_ray.storage.stores import Store, create_store, differing_keys


class Audit:
    """Compares the files of a store with an empty store created from the same provenance.

    Args:
        inspected: the result of `inspection.inspect` for the store.
        scratch: a folder for the empty store.

    Attributes:
        path: the store.
        provenance: how the store was made.
        plan: its tiles.
        outputs: names of its arrays.
        done: which tiles are committed, bool, shape (tiles,).
        empty: the empty store.

    Raises:
        DamageError: if the provenance or the ledger is missing or unusable.
        RunError: if the scratch folder cannot be written.
    """

    def __init__(self, inspected: Found, scratch: Path) -> None:
        self.path, self._scratch = inspected.path, scratch
        self.provenance = sound_provenance(inspected)
        self.plan, self.outputs = self.provenance.plan, self.provenance.outputs
        try:
            self.done = committed(self.path / LEDGER, len(self.plan))
            self._checksums = checksums(self.path / LEDGER, len(self.plan))
        except Exception as error:  # a segment may contain anything
            raise DamageError(f"{self.path / LEDGER}: cannot be read ({error}).") from error
        self.expect(_stored_voxel_size(self.path))

    def expect(self, voxel_size: tuple[float, ...] | None) -> None:
        """Creates the empty store to compare with.

        Args:
            voxel_size: (z, y, x) in micrometre, which the provenance lacks; None if unknown.
        """
        self.empty = Path(tempfile.mkdtemp(dir=self._scratch)) / "store"
        try:
            values = self.provenance.class_values
            layout = StoreLayout(self.plan, values, self.outputs, voxel_size)
            create_store(self.empty, layout, self.provenance)
            self._store = Store(self.empty, self.outputs)
        except OSError as error:
            raise RunError(f"{self.empty}: {error.strerror}; free disk space there.") from error
        except Exception as error:  # zarr refuses a provenance that describes no valid store
            raise _damaged_provenance(self.path, f"{type(error).__name__}: {error}") from error
        self._arrays = {
            name: Shards(self._store.read(name), self._store.metadata(name))
            for name in self.outputs
        }

    def shard(self, name: str, tile: int) -> Place:
        """Returns the path of a tile's shard."""
        return self.path / ARRAYS[name] / self._store.key(name, self.plan[tile])

    def damage_of(self, tile: int) -> dict[str, str]:
        """Describes the damage of a tile's shards, by output; empty if they are intact."""
        damage = {}
        for name in self.outputs:
            try:
                if self.is_foreign(name, tile, self.decode(name, tile)):
                    damage[name] = (
                        "contains other voxels than those that were committed: it is from another "
                        "tile or another run"
                    )
            except DamageError as error:
                damage[name] = str(error)
        return damage

    def is_foreign(self, name: str, tile: int, voxels: NDArray[np.uint8]) -> bool:
        """Returns whether `voxels` are not those that were committed for a tile's output.

        False if the ledger has no checksum of the tile.
        """
        start = CHECKSUM_BYTES * self.outputs.index(name)
        committed_checksum = self._checksums[tile, start : start + CHECKSUM_BYTES].tobytes()
        return any(committed_checksum) and committed_checksum.hex() != checksum_of(voxels)

    def decode(self, name: str, tile: int) -> NDArray[np.uint8]:
        """Returns the stored voxels that a tile owns, (..., z, y, x).

        Raises:
            DamageError: if its shard is missing or fails a checksum.
        """
        planned, shards = self.plan[tile], self._arrays[name]
        data = _read_file(self.path, self.shard(name, tile), shards.max_bytes)
        return shards.decode(data, planned, self._store.key(name, planned))

    def metadata_damage(self) -> dict[Place, str]:
        """Returns a sentence for each metadata file that differs from the expected one."""
        damage = {}
        for expected in sorted(self.empty.rglob("zarr.json")):
            path = self.path / expected.relative_to(self.empty)
            try:
                _compare_json(_read_file(self.path, path), expected.read_bytes())
            except DamageError as error:
                damage[path] = f"{path}: {error}."
        return damage

    def ledger_damage(self) -> Iterator[str]:
        """Yields a sentence for each damaged file of the ledger."""
        for path in damaged(self.path / LEDGER, len(self.plan)):
            yield (
                f"{path}: is damaged, so its tiles count as not done; the same `unet-ray segment` "
                "command recomputes them."
            )

    def edited_fields(self) -> Iterator[str]:
        """Yields a sentence for each field that differs from the provenance in the ledger."""
        try:
            recorded = Provenance(recorded_provenance(self.path / LEDGER))
        except DamageError as error:
            yield str(error)
            return
        for sentence in self.provenance.edits(recorded) if recorded.json else ():
            yield f"{self.path / 'zarr.json'}: {sentence}."

    def remarks(self) -> list[str]:
        """Returns notes about the store that are not damage, one sentence each."""
        masked = int(skipped(self.path / LEDGER, len(self.plan)).sum())
        missing = len(self.plan) - int(self.done.sum()) - masked
        notes = [f"{missing} of {len(self.plan)} tiles are not done."] if missing else []
        if masked:
            notes.append(f"{masked} of {len(self.plan)} tiles were left out by a mask.")
        uncommitted, strays, first_stray = 0, 0, self.path
        for path, tile in self._files():
            if tile is None:
                strays, first_stray = strays + 1, first_stray if strays else path
            elif not self.done[tile]:
                uncommitted += 1
        if uncommitted:
            notes.append(
                f"{uncommitted} shards belong to tiles that are not done: a killed run may leave "
                "them, and the next run overwrites them."
            )
        if strays:
            notes.append(
                f"{strays} files among the shards are not from unet-ray, such as "
                f"{str(first_stray)!r}."
            )
        return notes

    def _files(self) -> Iterator[tuple[Place, int | None]]:
        """Yields every file in the array folders and its tile; None if it is not a shard."""
        for name in self.outputs:
            top = self.path / ARRAYS[name]
            for path in files_below(top):
                if path != top / "zarr.json":
                    yield path, self._tile_of(name, path)

    def _tile_of(self, name: str, path: Place) -> int | None:
        parts = str(path).split("/")[-3:]
        if not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
            return None
        index, counts = tuple(map(int, parts)), self.plan.counts
        if len(index) != len(counts) or any(a >= n for a, n in zip(index, counts, strict=True)):
            return None
        tile = (index[0] * counts[1] + index[1]) * counts[2] + index[2]
        return tile if self.shard(name, tile) == path else None


def sound_provenance(inspected: Found) -> Provenance:
    """Returns the provenance of a store after checking the parts that an audit needs.

    Raises:
        DamageError: if the provenance, the ledger or the root is missing or damaged.
    """
    path = inspected.path
    if not inspected.private:
        raise DamageError(
            f"{path}: its folder {PRIVATE} is missing, so the finished tiles are unknown; copy the "
            "store again, including hidden files."
        )
    if not inspected.begun:
        raise DamageError(
            f"{path / LEDGER}: is missing, so the finished tiles are unknown; copy the store "
            "again, including hidden files."
        )
    try:
        _read_file(path, path / "zarr.json")
    except DamageError as error:
        raise DamageError(f"{path / 'zarr.json'}: {error}.") from error
    if not inspected.provenance:
        raise _damaged_provenance(path, "not readable")
    provenance = inspected.provenance
    if damage := provenance.damage("plan", "outputs", "class_values", "source"):
        raise _damaged_provenance(path, damage)
    return provenance


def _damaged_provenance(path: Place, damage: str) -> DamageError:
    return DamageError(f"{path / 'zarr.json'}: its provenance is damaged ({damage}).")


def _read_file(store: Place, path: Place, max_bytes: int = 1 << 26) -> bytes:
    """Returns the bytes of a file of a store.

    Raises:
        DamageError: if it is missing, not a regular file, unreadable or above `max_bytes`.
    """
    try:
        if isinstance(path, Path):
            refuse_link(store, path)
            if not stat.S_ISREG(path.lstat().st_mode):
                file_type = "folder" if path.is_dir() else "special file"
                raise DamageError(f"is a {file_type}, not a file")
        if (size := stat_of(path).size) > max_bytes:
            raise DamageError(f"is damaged: it has {size} bytes, but at most {max_bytes} are valid")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DamageError("is missing") from error
    except OSError as error:
        raise DamageError(f"cannot be read ({error.strerror})") from error


def refuse_link(store: Place, path: Place) -> None:
    """Refuses a path behind a symbolic link inside a store, since links may lead anywhere.

    Raises:
        DamageError: if a part of `path` below `store` is a symbolic link.
    """
    if is_behind_link(store, path):
        raise DamageError("is behind a symbolic link")


def _compare_json(stored_json: bytes, expected_json: bytes) -> None:
    try:
        keys = differing_keys(stored_json, expected_json)
    except ContentError as error:
        raise DamageError("is not the JSON of an array or group") from error
    if keys:
        raise DamageError(f"differs in {', '.join(map(repr, keys))} from the expected metadata")


def _stored_voxel_size(path: Place) -> tuple[float, ...] | None:
    """Returns the voxel size (z, y, x) from the image metadata, in micrometre; None if unknown."""
    for group in (path, path / "labels/classes"):
        try:
            metadata = json.loads((group / "zarr.json").read_text())["attributes"]["ome"]
            image = metadata["multiscales"][0]
            scale = image["datasets"][0]["coordinateTransformations"][0]["scale"][-3:]
            if any("unit" in axis for axis in image["axes"]):
                return tuple(map(float, scale))
            return None
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            continue
    return None
