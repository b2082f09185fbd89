"""An output store: created, opened, its shards written and read.

Knows that one tile is one shard, so that writers never meet. Does not know what a network is or
which tiles are done.
"""

from __future__ import annotations

import errno
import itertools
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

from unet_ray.errors import RunError
from unet_ray.storage.inspection import refuse_others
from unet_ray.storage.layout import (
    ARRAYS,
    EVENTS,
    MARKS,
    METADATA,
    PRIVATE,
    ROOT,
    StoreLayout,
    metadata_files,
)
from unet_ray.storage.objects import ObjectPath, remove_objects
from unet_ray.storage.places import (
    Guard,
    PathOrUrl,
    Place,
    files_below,
    open_array,
    place_of,
    remove_tree,
    write_whole,
)
from unet_ray.storage.provenance import Provenance
from unet_ray.tiling.tiles import Tile, TilePlan

DELETED = "deleted-"  # what names in .unet_ray begin with that are no longer of a store
# A mount point, or a file system that moves no folders.
UNMOVABLE = {errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EMFILE, errno.ENOTSUP, errno.EINVAL}
AT_ONCE = 1000  # objects that are removed by one request


def create_store(
    path: Place,
    layout: StoreLayout,
    provenance: Provenance,
    guard: Guard = nullcontext,
) -> None:
    """Makes an empty store at `path`, in the place of any that is there.

    What makes it a store, the metadata of its root, is removed first and written last: after a kill
    there is none, but what is left of one, and that is no hindrance to the next creation.

    Args:
        path: the store.
        layout: what it looks like.
        provenance: how it is made.
        guard: held during each change; raises if nothing may be changed any more.

    Raises:
        InputError: if something is there that no store of ours holds.
    """
    refuse_others(path)
    files = metadata_files(layout, provenance.json)
    _clear(path, guard)
    for name in METADATA:
        if name in files:
            write_whole(path / name, files[name], path / PRIVATE, guard)
    write_whole(path / ROOT, files[ROOT], path / PRIVATE, guard)


def _clear(path: Place, guard: Guard) -> None:
    """Removes a store, or what is left of one, but not its lease and ledger."""
    (path / PRIVATE).mkdir(parents=True, exist_ok=True)
    with guard():
        (path / ROOT).unlink(missing_ok=True)
    if isinstance(path, ObjectPath):
        private = f"{path / PRIVATE}/"
        old = itertools.chain(
            (each for each in path.below() if not str(each).startswith(private)),
            *((path / name).below() for name in (EVENTS, MARKS)),
        )
        while some := [*itertools.islice(old, AT_ONCE)]:
            with guard():
                remove_objects(some)
        return
    for name in ("0", "labels", EVENTS, MARKS):
        _put_away(path / name, path / PRIVATE, guard)
    remove_deleted(path)


def _put_away(old: Path, private: Path, guard: Guard) -> None:
    """Moves a part of a store away, which takes no time; after that, it is nobody's."""
    try:
        with guard():
            old.rename(private / f"{DELETED}{uuid.uuid4().hex}")
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in UNMOVABLE:
            raise
        for each in files_below(old) if old.is_dir() else [old]:
            with guard():
                each.unlink(missing_ok=True)


def remove_deleted(path: Place) -> None:
    """Removes what is left of stores that were deleted, as far as it can be removed now."""
    if isinstance(path, Path):
        for each in (path / PRIVATE).glob(f"{DELETED}*"):
            with suppress(OSError):  # a viewer may hold a file open; the next run tries again
                remove_tree(each)


class Store:
    """The arrays of an existing store, opened for writing tiles and reading them back.

    Args:
        path: the store.
        outputs: which of its arrays.
        guard: held while each shard takes its place; raises if it may not.

    Raises:
        RunError: if the metadata of an array is missing or damaged.
    """

    def __init__(
        self,
        path: PathOrUrl,
        outputs: Sequence[str],
        guard: Guard | None = None,
    ) -> None:
        self.path, self._guard = place_of(path), guard
        self._arrays = {name: _opened(self.path / ARRAYS[name]) for name in outputs}
        self._metadata = {name: (self.path / ARRAYS[name] / ROOT).read_bytes() for name in outputs}

    def require_plan(self, plan: TilePlan) -> None:
        """Makes sure that a shard of each array is a core of `plan`.

        Raises:
            RunError: naming the metadata that says otherwise.
        """
        for name, array in self._arrays.items():
            if (array.shape[-3:], (array.shards or ())[-3:]) != (plan.shape, plan.core):
                raise RunError(_unfit(self.path / ARRAYS[name], "does not fit the plan"))

    def write(self, tile: Tile, results: Mapping[str, NDArray[np.uint8]]) -> None:
        """Writes the voxels that `tile` owns, whole shards, and waits until they are on disk.

        A shard is encoded in memory, written beside the arrays, and moved to its place when it is
        whole: whatever is killed, a shard that is there is complete, and nothing else is there.

        Args:
            tile: whose core it is.
            results: for each output the predicted core, ``(..., z, y, x)`` uint8.
        """
        for name in self._arrays:
            shard = self.encoded(name, tile, results[name])
            write_whole(self.shard(name, tile), shard, self.path / PRIVATE, self._guard)

    def encoded(self, name: str, tile: Tile, result: NDArray[np.uint8]) -> bytes:
        """The bytes of one shard. Nothing of an older shard is read, so damage is no hindrance.

        Args:
            name: the output.
            tile: whose core it is.
            result: the predicted core, ``(..., z, y, x)``.
        """
        front = (slice(None),) * (self._arrays[name].ndim - 3)
        memory = {"zarr.json": default_buffer_prototype().buffer.from_bytes(self._metadata[name])}
        array = zarr.open_array(MemoryStore(memory), mode="r+")
        # Background is stored like everything else: an absent shard means "not computed".
        whole = array.with_config({"write_empty_chunks": True})
        whole[(*front, *tile.write.slices)] = result[(*front, *tile.crop.slices)]
        return bytes(memory[self.key(name, tile)].to_bytes())

    def key(self, name: str, tile: Tile) -> str:
        """The name of a tile's shard in the array of one output, such as ``c/0/1/2``."""
        array = self._arrays[name]
        core = (array.shards or array.chunks)[-3:]
        place = [a // n for a, n in zip(tile.write.start, core, strict=True)]
        return str(array.metadata.encode_chunk_key((*(0,) * (array.ndim - 3), *place)))

    def shard(self, name: str, tile: Tile) -> Place:
        """The file that holds `tile` of one output."""
        return self.path / ARRAYS[name] / self.key(name, tile)

    def require(self, name: str, tile: Tile) -> None:
        """Makes sure that the shard of a finished tile is there: absent is never background.

        Raises:
            RunError: naming the file that is missing.
        """
        shard = self.shard(name, tile)
        if not shard.is_file():
            raise RunError(
                f"{shard}: is missing, though tile {tile.index} was finished; copy the store "
                "again, or repair it with `unet-ray verify --repair`."
            )

    def metadata(self, name: str) -> bytes:
        """The ``zarr.json`` of one output's array, as it was when the store was opened."""
        return self._metadata[name]

    def read(self, name: str) -> Any:
        """The array of one output, to be indexed like a NumPy array."""
        return self._arrays[name]


def _opened(place: Place) -> Any:
    try:
        return open_array(place)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise RunError(_unfit(place, "is missing or damaged")) from error


def _unfit(place: Place, what: str) -> str:
    return f"{place / ROOT}: {what}; repair it with `unet-ray verify --repair`."
