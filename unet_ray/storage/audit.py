"""Whether every file of a store is as its provenance and ledger imply.

Knows the shards and the metadata of a store. Does not know how a tile is made again.

What an array looks like is never taken from its ``zarr.json`` but derived from the provenance, and
then compared. That no byte of a shard can change unseen is what `shards` is about.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import DamageError, RunError
from unet_ray.storage.inspection import Found
from unet_ray.storage.layout import ARRAYS, LEDGER, PRIVATE, StoreLayout
from unet_ray.storage.ledger import committed, damaged, skipped
from unet_ray.storage.objects import ObjectPath
from unet_ray.storage.places import Place, files_below, stat_of
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.shards import Shards
from unet_ray.storage.stores import Store, create_store


class Audit:
    """The files of one store, compared with an empty store that is made as this one should be.

    Args:
        found: what lies at the path.
        scratch: a folder for the empty store.

    Attributes:
        path: the store.
        provenance: how it was made.
        plan: its tiles.
        outputs: what it holds.
        done: bits of the committed tiles, (tiles,).
        empty: the empty store.

    Raises:
        DamageError: if nothing says what the store should be.
        RunError: if the scratch folder is full.
    """

    def __init__(self, found: Found, scratch: Path) -> None:
        self.path, self._scratch = found.path, scratch
        self.provenance = sound_provenance(found)
        self.plan, self.outputs = self.provenance.plan, self.provenance.outputs
        try:
            self.done = committed(self.path / LEDGER, len(self.plan))
        except Exception as error:  # a segment may hold anything
            raise DamageError(f"{self.path / LEDGER}: cannot be read ({error}).") from error
        self.expect(_stored_voxel_size(self.path))

    def expect(self, voxel_size: tuple[float, ...] | None) -> None:
        """Makes the empty store to compare with; its voxel size stands in no provenance."""
        self.empty = Path(tempfile.mkdtemp(dir=self._scratch)) / "store"
        try:
            values = self.provenance.class_values
            layout = StoreLayout(self.plan, values, self.outputs, voxel_size)
            create_store(self.empty, layout, self.provenance)
            self._store = Store(self.empty, self.outputs)
        except OSError as error:
            raise RunError(f"{self.empty}: {error.strerror}; make room there.") from error
        except Exception as error:  # of zarr: what cannot be a store is no provenance of one
            raise _damaged_provenance(self.path, f"{type(error).__name__}: {error}") from error
        self._arrays = {
            name: Shards(self._store.read(name), self._store.metadata(name))
            for name in self.outputs
        }

    def shard(self, name: str, tile: int) -> Place:
        """Where the shard of a tile lies."""
        return self.path / ARRAYS[name] / self._store.key(name, self.plan[tile])

    def damage_of(self, tile: int) -> dict[str, str]:
        """What is wrong with the shards of a tile, by output; empty if they are sound."""
        found = {}
        for name in self.outputs:
            try:
                self.decode(name, tile)
            except DamageError as error:
                found[name] = str(error)
        return found

    def decode(self, name: str, tile: int) -> NDArray[np.uint8]:
        """The stored voxels that a tile owns, (..., z, y, x).

        Raises:
            DamageError: if its shard is not there, or has a byte that no checksum vouches for.
        """
        place, shards = self.plan[tile], self._arrays[name]
        data = _read_file(self.path, self.shard(name, tile), shards.most)
        return shards.decode(data, place, self._store.key(name, place))

    def metadata_damage(self) -> dict[Place, str]:
        """A sentence for each metadata file that is not what the provenance implies."""
        found = {}
        for expected in sorted(self.empty.rglob("zarr.json")):
            path = self.path / expected.relative_to(self.empty)
            try:
                _compare_json(_read_file(self.path, path), expected.read_bytes())
            except DamageError as error:
                found[path] = f"{path}: {error}."
        return found

    def ledger_damage(self) -> Iterator[str]:
        """A sentence for each damaged segment of the ledger."""
        for path in damaged(self.path / LEDGER, len(self.plan)):
            yield (
                f"{path}: is damaged, so its tiles count as not done; the same `unet-ray segment` "
                "makes them again."
            )

    def remarks(self) -> list[str]:
        """What is worth knowing of a store and no damage."""
        masked = int(skipped(self.path / LEDGER, len(self.plan)).sum())
        missing = len(self.plan) - int(self.done.sum()) - masked
        notes = [f"{missing} of {len(self.plan)} tiles are not done."] if missing else []
        if masked:
            notes.append(f"{masked} of {len(self.plan)} tiles were left out by a mask.")
        uncommitted, strays, first = 0, 0, self.path
        for path, tile in self._files():
            if tile is None:
                strays, first = strays + 1, first if strays else path
            elif not self.done[tile]:
                uncommitted += 1
        if uncommitted:
            notes.append(
                f"{uncommitted} shards are there whose tiles are not done: a kill may leave them, "
                "and the next run writes them again."
            )
        if strays:
            notes.append(f"{strays} files among the shards are none of ours, as {str(first)!r}.")
        return notes

    def _files(self) -> Iterator[tuple[Place, int | None]]:
        """Every file in the folders of the arrays, and the tile whose shard it is, if it is one."""
        for name in self.outputs:
            top = self.path / ARRAYS[name]
            for path in files_below(top):
                if path != top / "zarr.json":
                    yield path, self._tile_of(name, path)

    def _tile_of(self, name: str, path: Place) -> int | None:
        place = str(path).split("/")[-3:]
        if not all(part.isascii() and part.isdigit() and len(part) < 20 for part in place):
            return None
        at, counts = tuple(map(int, place)), self.plan.counts
        if len(at) != len(counts) or any(a >= n for a, n in zip(at, counts, strict=True)):
            return None
        tile = (at[0] * counts[1] + at[1]) * counts[2] + at[2]
        return tile if self.shard(name, tile) == path else None


def sound_provenance(found: Found) -> Provenance:
    """The provenance of a store that says all that is needed to check it.

    Raises:
        DamageError: naming what is missing or damaged.
    """
    path = found.path
    if not found.private:
        raise DamageError(
            f"{path}: its folder {PRIVATE} is missing, so nothing says which tiles are done; copy "
            "the store with hidden files."
        )
    if not found.begun:
        raise DamageError(
            f"{path / LEDGER}: is missing, so nothing says which tiles are done; copy the store "
            "again, with hidden files."
        )
    try:
        _read_file(path, path / "zarr.json")
    except DamageError as error:
        raise DamageError(f"{path / 'zarr.json'}: {error}.") from error
    if not found.provenance:
        raise _damaged_provenance(path, "not readable")
    provenance = found.provenance
    if damage := provenance.damage("plan", "outputs", "class_values", "source"):
        raise _damaged_provenance(path, damage)
    return provenance


def _damaged_provenance(path: Place, damage: str) -> DamageError:
    return DamageError(f"{path / 'zarr.json'}: its provenance is damaged ({damage}).")


def _read_file(store: Place, path: Place, most: int = 1 << 26) -> bytes:
    """The bytes of a file of a store.

    Raises:
        DamageError: if it is none, cannot be read or has more bytes than it can have.
    """
    try:
        if isinstance(path, Path):
            refuse_link(store, path)
            if not stat.S_ISREG(path.lstat().st_mode):
                what = "folder" if path.is_dir() else "special file"
                raise DamageError(f"is a {what}, not a file")
        if (size := stat_of(path).size) > most:
            raise DamageError(f"is damaged: it has {size} bytes, {most} at most are due")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DamageError("is missing") from error
    except OSError as error:
        raise DamageError(f"cannot be read ({error.strerror})") from error


def refuse_link(store: Place, path: Place) -> None:
    """Refuses what lies behind a symbolic link inside a store: it may lead anywhere.

    Raises:
        DamageError: if it does.
    """
    if isinstance(path, ObjectPath) or isinstance(store, ObjectPath):
        return
    if Path(os.path.realpath(path)) != Path(os.path.realpath(store), path.relative_to(store)):
        raise DamageError("lies behind a symbolic link")


def _compare_json(there: bytes, expected: bytes) -> None:
    right = json.loads(expected)
    try:
        stored = json.loads(there)
        keys = [key for key in {**right, **stored} if stored.get(key) != right.get(key)]
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise DamageError("is not the JSON of an array or group") from error
    if keys:
        raise DamageError(f"differs in {', '.join(map(repr, keys))} from what its store implies")


def _stored_voxel_size(path: Place) -> tuple[float, ...] | None:
    """The voxel size of the store's images, which its provenance lacks; None if there is none."""
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
