"""Creates and opens output stores; writes and reads their shards.

Knows that one tile is one shard, so that two tiles never share a file. Does not know networks or
which tiles are done.
"""

from __future__ import annotations

import errno
import itertools
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from unet_ray.errors import DamageError, RunError
from unet_ray.storage.inspection import refuse_others
from unet_ray.storage.layout import (
    DTYPES,
    EVENTS,
    LEVEL,
    MARKS,
    OBJECTS,
    PRIVATE,
    ROOT,
    TABLE,
    StoreLayout,
    array_of,
    metadata_files,
)
from unet_ray.storage.objects import ObjectPath, remove_objects
from unet_ray.storage.parsing import ContentError, parse_json, read_file, refuse_special
from unet_ray.storage.places import (
    Guard,
    PathOrUrl,
    Place,
    files_below,
    is_behind_link,
    open_array,
    place_of,
    remove_tree,
    stat_of,
    stats_of,
    write_whole,
)
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.shards import Shards, checksum_of
from unet_ray.tiling.tiles import Tile, TilePlan

DELETED = "deleted-"  # prefix of the names of deleted parts of a store in .unet_ray
# Errors of a mount point, or of a file system that cannot move folders.
UNMOVABLE = {errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EMFILE, errno.ENOTSUP, errno.EINVAL}
LISTED_TILES = 100_000  # a run that resumes a store of at most this size looks at each shard
AT_ONCE = 1000  # objects removed per check of the guard


def create_store(
    path: Place,
    layout: StoreLayout,
    provenance: Provenance,
    guard: Guard = nullcontext,
) -> None:
    """Creates an empty store at `path`, replacing an existing store.

    The metadata of the root, which make it a store, are removed first and written last. After a
    kill the path contains remains without a root, which the next creation removes.

    Args:
        path: the store.
        layout: its arrays and metadata.
        provenance: the provenance to store in its root.
        guard: entered for each change; raises if this run may no longer write.

    Raises:
        InputError: if `path` contains files that do not belong to a store.
        OSError: if a file cannot be written or removed.
    """
    refuse_others(path)
    files = metadata_files(layout, provenance.json)
    _clear(path, guard)
    for name in files:
        if name != ROOT:
            write_whole(path / name, files[name], path / PRIVATE, guard)
    write_whole(path / ROOT, files[ROOT], path / PRIVATE, guard)


def _clear(path: Place, guard: Guard) -> None:
    """Removes a store or its remains, except its lease and ledger."""
    (path / PRIVATE).mkdir(parents=True, exist_ok=True)
    with guard():
        (path / ROOT).unlink(missing_ok=True)
    if isinstance(path, ObjectPath):
        private = f"{path / PRIVATE}/"
        old = itertools.chain(
            (item for item in path.below() if not str(item).startswith(private)),
            *((path / name).below() for name in (EVENTS, MARKS, OBJECTS)),
        )
        while batch := [*itertools.islice(old, AT_ONCE)]:
            with guard():
                remove_objects(batch)
        return
    levels = sorted(file.name for file in path.iterdir() if re.fullmatch(LEVEL, file.name))
    for name in (*levels, "labels", TABLE, EVENTS, MARKS, OBJECTS):
        _move_away(path / name, path / PRIVATE, guard)
    remove_deleted(path)


def _move_away(old: Path, private: Path, guard: Guard) -> None:
    """Moves a part of a store to the private folder, which is instant, unlike deletion."""
    try:
        with guard():
            old.rename(private / f"{DELETED}{uuid.uuid4().hex}")
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in UNMOVABLE:
            raise
        for file in files_below(old) if old.is_dir() else [old]:
            with guard():
                file.unlink(missing_ok=True)


def remove_deleted(path: Place) -> None:
    """Removes the moved parts of deleted stores, except files that cannot be removed now."""
    if isinstance(path, Path):
        for deleted in (path / PRIVATE).glob(f"{DELETED}*"):
            with suppress(OSError):  # a viewer may have a file open; the next run tries again
                remove_tree(deleted)


class Store:
    """The arrays of an existing store, opened for writing and reading tiles.

    Args:
        path: the store.
        outputs: names of the arrays to open.
        guard: entered while a shard is replaced; raises if this run may no longer write.
        level: level of the arrays; all tiles given to the methods are of the plan of this level.

    Raises:
        RunError: if the metadata of an array are missing or damaged.
    """

    def __init__(
        self,
        path: PathOrUrl,
        outputs: Sequence[str],
        guard: Guard | None = None,
        level: int = 0,
    ) -> None:
        self.path, self._guard = place_of(path), guard
        self._places = {name: self.path / array_of(name, level) for name in outputs}
        self._arrays = {name: _open(place) for name, place in self._places.items()}
        self._metadata = {name: (self._places[name] / ROOT).read_bytes() for name in outputs}

    def require_plan(self, plan: TilePlan) -> None:
        """Checks that the arrays have the shape of `plan`, its cores as shards, and their dtypes.

        Raises:
            RunError: if not; names the metadata file.
        """
        for name, array in self._arrays.items():
            layout = array.dtype, array.shape[-3:], (array.shards or ())[-3:]
            if layout != (DTYPES[name], plan.shape, plan.core):
                raise RunError(_metadata_message(self._places[name], "does not match the plan"))

    def require_metadata(self, layout: StoreLayout, provenance: Provenance) -> None:
        """Checks that each metadata file below the root is that of a new store with this layout.

        Raises:
            RunError: if a file is missing or differs; names it.
        """
        for name, expected in metadata_files(layout, provenance.json).items():
            path = self.path / name
            if name == ROOT:
                continue
            try:
                keys = differing_keys(read_file(path), expected)
            except FileNotFoundError as error:
                raise RunError(_metadata_message(path.parent, "is missing")) from error
            except ContentError as error:
                raise RunError(_metadata_message(path.parent, f"is damaged ({error})")) from error
            if keys:
                damage = f"differs in {', '.join(map(repr, keys))} from that of a new store"
                raise RunError(_metadata_message(path.parent, damage))

    def present(self, plan: TilePlan) -> NDArray[np.bool_]:
        """Returns which tiles have a shard that is not empty in every output, shape (tiles,).

        The shards are not read. All are assumed to exist in a store of more than `LISTED_TILES`
        tiles, since the check would take minutes.
        """
        tiles = np.ones(len(plan), bool)
        for name in self._arrays if len(plan) <= LISTED_TILES else ():
            parent = str(self.shard(name, plan[0])).removesuffix("0/0/0")
            names = [f"{parent}{z}/{y}/{x}" for z, y, x in np.ndindex(*plan.counts)]
            stats = stats_of(self._places[name], names).values()
            tiles &= [stat is not None and stat.size > 0 for stat in stats]
        return tiles

    def write(self, tile: Tile, results: Mapping[str, NDArray[Any]]) -> str:
        """Writes the voxels that `tile` owns; returns their checksum when they are on disk.

        A shard is encoded in memory and written atomically. So after a kill, every shard is
        complete, and temporary files are only in the private folder.

        Args:
            tile: the tile to write.
            results: for each output the core, ``(..., z, y, x)``, in the dtype of its array. Voxels
                outside the volume may be left out.

        Returns:
            `checksum_of` each output's voxels, joined in the order of the outputs.

        Raises:
            OSError: if a shard cannot be written.
            RunError: if the folder of a shard is new and behind a symbolic link.
        """
        checksums, (z, y, x) = "", tile.crop.slices
        for name in self._arrays:
            shard, path = self.encoded(name, tile, results[name]), self.shard(name, tile)
            # A run checks the existing folders once, before it starts (`refuse_links`), so only a
            # new folder needs a check. A link in place of the shard itself is replaced.
            if not path.parent.is_dir() and is_behind_link(self.path, path.parent):
                raise RunError(f"{path.parent}: is behind a symbolic link, so nothing is written.")
            write_whole(path, shard, self.path / PRIVATE, self._guard)
            checksums += checksum_of(results[name][..., z, y, x])
        return checksums

    def encoded(self, name: str, tile: Tile, result: NDArray[Any]) -> bytes:
        """Returns the bytes of one shard, without reading an existing, possibly damaged one.

        Args:
            name: name of the output.
            tile: the tile of the shard.
            result: the core, ``(..., z, y, x)``, in the dtype of the array.
        """
        leading = (slice(None),) * (self._arrays[name].ndim - 3)
        memory = {"zarr.json": default_buffer_prototype().buffer.from_bytes(self._metadata[name])}
        array = zarr.open_array(MemoryStore(memory), mode="r+")
        # Shards of background are stored too, since a missing shard means "not computed".
        full_array = array.with_config({"write_empty_chunks": True})
        full_array[(*leading, *tile.write.slices)] = result[(*leading, *tile.crop.slices)]
        return bytes(memory[self.key(name, tile)].to_bytes())

    def key(self, name: str, tile: Tile) -> str:
        """Returns the name of a tile's shard in the array of one output, such as ``c/0/1/2``."""
        array = self._arrays[name]
        core = (array.shards or array.chunks)[-3:]
        coordinates = [a // n for a, n in zip(tile.write.start, core, strict=True)]
        return str(array.metadata.encode_chunk_key((*(0,) * (array.ndim - 3), *coordinates)))

    def shard(self, name: str, tile: Tile) -> Place:
        """Returns the path of a tile's shard in one output."""
        return self._places[name] / self.key(name, tile)

    def require(self, name: str, tile: Tile) -> None:
        """Checks that a finished tile has a shard, since zarr reads missing and empty ones as 0.

        Raises:
            RunError: if the shard is missing, empty or not a file.
        """
        shard = self.shard(name, tile)
        try:
            refuse_special(shard)
            damage = "" if stat_of(shard).size else "is empty"
        except ContentError:
            damage = "is not a file"
        except (FileNotFoundError, NotADirectoryError):
            damage = "is missing"
        if damage:
            raise RunError(
                f"{shard}: {damage}, though tile {tile.index} was finished; copy the store "
                "again, or repair it with `unet-ray verify --repair`."
            )

    def decoded(self, name: str, tile: Tile) -> NDArray[Any]:
        """Returns the voxels that `tile` owns, ``(..., z, y, x)``, after checking its whole shard.

        Measured for whole shards, it takes half the time of a read by zarr for bytes, and 0.8 times
        for ids; tiles that are decoded side by side do not wait for each other.

        Raises:
            DamageError: if a byte of the shard has changed since it was written.
            OSError: if it cannot be read.
        """
        shards, shard = Shards(self._arrays[name]), self.shard(name, tile)
        if (size := stat_of(shard).size) > shards.max_bytes:  # the memory is not planned for it
            raise DamageError(
                f"is damaged: it has {size} bytes, but at most {shards.max_bytes} are valid"
            )
        return shards.decode(shard.read_bytes(), tile)

    def read(self, name: str) -> Any:
        """Returns the Zarr array of one output, which can be indexed like a NumPy array."""
        return self._arrays[name]


def differing_keys(stored_json: bytes, expected_json: bytes) -> list[str]:
    """Returns the keys in which two metadata files differ.

    Raises:
        ContentError: if the stored one is no JSON object.
    """
    stored, expected = parse_json(stored_json), parse_json(expected_json)
    if not isinstance(stored, dict):
        raise ContentError("it is not the JSON of an array or group")
    return [key for key in {**expected, **stored} if stored.get(key) != expected.get(key)]


def _open(place: Place) -> Any:
    try:
        parse_json(read_file(place / ROOT))  # zarr would read a file of any size
        return open_array(place)
    except Exception as error:  # zarr fails in many ways on damaged metadata
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise RunError(_metadata_message(place, "is missing or damaged")) from error


def _metadata_message(place: Place, damage: str) -> str:
    return f"{place / ROOT}: {damage}; repair it with `unet-ray verify --repair`."
