"""The result of a run on disk: OME-Zarr 0.5 with probabilities, classes and how they were made.

Knows the layout of design §5 and that one tile is one shard, so writers never meet. Does not know
what a network is or which tiles are done.
"""

from __future__ import annotations

import errno
import itertools
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from unet_ray.errors import InputError, RunError
from unet_ray.storage.ledger import has_begun, has_notes
from unet_ray.storage.places import (
    Guard,
    ObjectPath,
    Place,
    Where,
    files_below,
    open_array,
    place_of,
    remove_objects,
    remove_tree,
    write_whole,
)
from unet_ray.tiling.tiles import Tile, TilePlan

PRIVATE, ROOT = ".unet_ray", "zarr.json"
LEDGER, EVENTS = f"{PRIVATE}/ledger/segment", f"{PRIVATE}/events.jsonl"
MARKS = f"{PRIVATE}/marks"
FORMAT = 1
ARRAYS = {"probabilities": "0", "classes": "labels/classes/0"}
# Of a whole store, without its root.
METADATA = (
    "0/zarr.json",
    "labels/zarr.json",
    "labels/classes/zarr.json",
    "labels/classes/0/zarr.json",
)
_SHARDS = (r"0/c/0/[0-9]+/[0-9]+/[0-9]+", r"labels/classes/0/c/[0-9]+/[0-9]+/[0-9]+")
LARGEST_CHUNK = (32, 256, 256)
DELETED = "deleted-"  # what names in .unet_ray begin with that are no longer of a store
# A mount point, or a file system that moves no folders.
UNMOVABLE = {errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EMFILE, errno.ENOTSUP, errno.EINVAL}
AT_ONCE = 1000  # objects that are removed by one request


@dataclass(frozen=True)
class StoreLayout:
    """What an output store looks like.

    Attributes:
        plan: the tiles; a core is a shard.
        class_values: label value of each class; class 0 has no probability channel.
        outputs: which of ``probabilities`` and ``classes`` are stored.
        voxel_size: (z, y, x) in micrometre, or None if unknown (then 1, without a unit).
    """

    plan: TilePlan
    class_values: Sequence[int]
    outputs: Sequence[str]
    voxel_size: Sequence[float] | None


def chunk_of(core: Sequence[int]) -> tuple[int, ...]:
    """The storage chunk inside a shard of `core`: halved until small enough for viewers."""
    chunk = list(core)
    for axis, largest in enumerate(LARGEST_CHUNK):
        while chunk[axis] > largest and chunk[axis] % 2 == 0:
            chunk[axis] //= 2
    return tuple(chunk)


def create_store(
    path: Place,
    layout: StoreLayout,
    provenance: Mapping[str, Any],
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
    files = _metadata(layout, provenance)
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


def refuse_others(path: Place) -> None:
    """Makes sure that nothing is at `path` but what stores of ours are made of.

    Raises:
        InputError: naming the first file that is of somebody else.
        OSError: if what is there cannot be listed.
    """
    other = _other(path)
    if other and not _is_ours(path):
        raise InputError(_OTHERS.format(path))
    if other:
        raise InputError(
            f"{other}: is not of unet-ray, and would be deleted with {path}; move it, or choose "
            "another --out."
        )


_PRIVATE = re.compile(rf"{re.escape(PRIVATE)}/.*", re.DOTALL)
_OURS = re.compile(
    "|".join([*map(re.escape, (ROOT, *METADATA)), *_SHARDS, _PRIVATE.pattern]), re.DOTALL
)
_OTHERS = "{}: exists and is not an output of unet-ray; choose another --out."


def _is_ours(path: Place) -> bool:
    """Whether a store of ours is at `path`, or was begun and has no root yet, or no more."""
    if not (path / ROOT).is_file():
        return has_begun(path / LEDGER)
    try:
        attributes = json.loads((path / ROOT).read_text())["attributes"]
    except (ValueError, RecursionError, KeyError, TypeError):  # damaged
        return has_begun(path / LEDGER)
    told = attributes.get("unet_ray") if isinstance(attributes, dict) else None
    return isinstance(told, dict) and told.get("format") == FORMAT


def is_untouched(path: Place) -> bool:
    """Whether nothing was ever done in a store of ours: no note, and no shard."""
    return has_begun(path / LEDGER) and not has_notes(path / LEDGER) and _is_bare(path)


def _is_bare(path: Place) -> bool:
    """Whether there is no shard."""
    shards = (files_below(path / name / "c") for name in ARRAYS.values())
    return all(next(each, None) is None for each in shards)


def _other(path: Place) -> Place | None:
    """The first file in the place of a store that is none of ours, as links never are."""
    if isinstance(path, Path) and not path.is_dir():
        return path if path.exists() or path.is_symlink() else None
    ours = _OURS if _is_ours(path) else _PRIVATE
    for each in files_below(path):
        link = isinstance(each, Path) and each.is_symlink()
        if link or not ours.fullmatch(str(each)[len(str(path)) + 1 :]):
            return each
    if isinstance(path, Path):  # a folder without files is not among them
        return next((path / name for name in (ROOT, *METADATA) if (path / name).is_dir()), None)
    return None


def _metadata(layout: StoreLayout, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    """The metadata files of a store, by name."""
    attributes: dict[str, Any] = {"unet_ray": dict(provenance)}
    scale = list(layout.voxel_size or (1.0, 1.0, 1.0))
    known = layout.voxel_size is not None
    if "probabilities" in layout.outputs:
        attributes["ome"] = {
            "version": "0.5",
            "multiscales": [_multiscale("probabilities", "czyx", scale, known)],
            "omero": {"channels": [_channel(v) for v in layout.class_values[1:]]},
        }
    files: dict[str, Any] = {}
    store = MemoryStore(files)
    zarr.create_group(store, zarr_format=3, attributes=attributes)
    if "probabilities" in layout.outputs:
        _create_array(store, "0", layout, channels=len(layout.class_values) - 1)
    if "classes" in layout.outputs:
        labels = {"ome": {"version": "0.5", "labels": ["classes"]}}
        zarr.create_group(store, path="labels", zarr_format=3, attributes=labels)
        image: dict[str, Any] = {
            "version": "0.5",
            "multiscales": [_multiscale("classes", "zyx", scale, known)],
            "image-label": {
                "colors": [
                    {"label-value": k, "rgba": [*_COLOURS[k % len(_COLOURS)], 255]}
                    for k in range(len(layout.class_values))
                ],
                "properties": [
                    {"label-value": k, "value-in-training-labels": int(v)}
                    for k, v in enumerate(layout.class_values)
                ],
            },
        }
        if "probabilities" in layout.outputs:
            image["image-label"]["source"] = {"image": "../../"}
        zarr.create_group(store, path="labels/classes", zarr_format=3, attributes={"ome": image})
        _create_array(store, "labels/classes/0", layout)
    return {name: data.to_bytes() for name, data in files.items()}


# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
_COLOURS = [(0, 0, 0), (86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0)]


def _channel(value: int) -> dict[str, Any]:
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    return {"label": f"label {value}", "color": "FFFFFF", "window": window, "active": True}


def _multiscale(name: str, axes: str, scale: Sequence[float], known: bool) -> dict[str, Any]:
    unit = {"unit": "micrometer"} if known else {}
    described = [
        {"name": a, "type": "channel"} if a == "c" else {"name": a, "type": "space", **unit}
        for a in axes
    ]
    numbers = [1.0] * (len(axes) - 3) + [float(v) for v in scale]
    transform = [{"type": "scale", "scale": numbers}]
    return {
        "name": name,
        "axes": described,
        "datasets": [{"path": "0", "coordinateTransformations": transform}],
    }


def _create_array(store: MemoryStore, name: str, layout: StoreLayout, channels: int = 0) -> None:
    front = (channels,) if channels else ()
    zarr.create_array(
        store,
        name=name,
        shape=(*front, *layout.plan.shape),
        shards=(*front, *layout.plan.core),
        chunks=(*((1,) if channels else ()), *chunk_of(layout.plan.core)),
        dtype="uint8",
        fill_value=0,
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        dimension_names=["c", "z", "y", "x"][0 if channels else 1 :],
    )


def is_output(path: Place) -> bool:
    """Whether a folder is an output of ours, whole or not, or a copy of one."""
    if has_private(path):
        return True
    try:
        return "unet_ray" in json.loads((path / ROOT).read_text())["attributes"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def has_private(path: Place) -> bool:
    """Whether what tells which tiles are done is there."""
    return (path / PRIVATE).is_dir()


def provenance_of(path: Place) -> dict[str, Any] | None:
    """How the store at `path` was made, or None if there is nothing at `path` that counts.

    Raises:
        InputError: if what is there is not a store of ours.
        OSError: if it cannot be read.
    """
    if not (path / ROOT).is_file():
        refuse_others(path)
        if has_notes(path / LEDGER) and not _is_bare(path):
            raise InputError(
                f"{path}: exists and has no {ROOT}, as a copy that is not whole; copy it again, "
                "choose another --out, or make it anew with --overwrite."
            )
        return None
    try:
        told = json.loads((path / ROOT).read_text())["attributes"]["unet_ray"]
        if told["format"] != FORMAT or not has_private(path):
            raise ValueError(f"format {told['format']}")
        return dict(told)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(_OTHERS.format(path)) from error


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
        path: Where,
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
