"""What lies at the path of an output.

Knows stores, whole or damaged, and files of others. Changes nothing.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import DamageError, InputError
from unet_ray.storage.layout import ARRAYS, FORMAT, LEDGER, METADATA, PRIVATE, ROOT, SHARDS
from unet_ray.storage.ledger import committed, has_begun, has_notes
from unet_ray.storage.objects import ObjectPath
from unet_ray.storage.places import Place, files_below, stat_of, unusable
from unet_ray.tiling.tiles import TilePlan


def told_by(path: Place, anew: bool) -> dict[str, Any] | None:
    """How the store at `path` was made that is to be continued; None if there is none to be.

    Args:
        path: the store.
        anew: whether it is to be made anew in any case.

    Raises:
        InputError: if what is there is not ours, or cannot be read.
    """
    try:
        if not anew:
            told = provenance_of(path)
            return None if is_untouched(path) else told
        refuse_others(path)
        return None
    except OSError as error:
        raise InputError(unusable(path, error)) from error


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
    "|".join([*map(re.escape, (ROOT, *METADATA)), *SHARDS, _PRIVATE.pattern]), re.DOTALL
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


def read_file(store: Place, path: Place, most: int = 1 << 26) -> bytes:
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
    """Refuses what lies behind a symbolic link inside a store: it may lead anywhere."""
    if isinstance(path, ObjectPath) or isinstance(store, ObjectPath):
        return
    if Path(os.path.realpath(path)) != Path(os.path.realpath(store), path.relative_to(store)):
        raise DamageError("lies behind a symbolic link")


def compare_json(there: bytes, expected: bytes) -> None:
    """Compares a metadata file with what it should hold.

    Raises:
        DamageError: naming the keys that differ.
    """
    right = json.loads(expected)
    try:
        told = json.loads(there)
        keys = [key for key in {**right, **told} if told.get(key) != right.get(key)]
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise DamageError("is not the JSON of an array or group") from error
    if keys:
        raise DamageError(f"differs in {', '.join(map(repr, keys))} from what its store implies")


def sound_provenance(path: Place) -> tuple[dict[str, Any], TilePlan]:
    """What a store says of itself, as far as it is needed here.

    Raises:
        DamageError: if that is damaged.
    """
    if not has_private(path):
        raise DamageError(
            f"{path}: its folder {PRIVATE} is missing, so nothing says which tiles are done; copy "
            "the store with hidden files."
        )
    if not has_begun(path / LEDGER):
        raise DamageError(
            f"{path / LEDGER}: is missing, so nothing says which tiles are done; copy the store "
            "again, with hidden files."
        )
    try:
        read_file(path, path / "zarr.json")
    except DamageError as error:
        raise DamageError(f"{path / 'zarr.json'}: {error}.") from error
    try:
        told = provenance_of(path) or {}
        plan = TilePlan.from_json(told["plan"])
        if len(plan.shape) != 3 or not all(type(n) is int and n > 0 for n in plan.shape):
            raise ValueError(f"a plan of shape {plan.shape}")
        if not told["outputs"] or not {*told["outputs"]} <= {*ARRAYS}:
            raise ValueError(f"outputs {told['outputs']}")
        return {**told, "model": dict(told["model"]), "input": dict(told["input"])}, plan
    except Exception as error:  # any JSON may stand there
        raise damaged_provenance(path, error) from error


def damaged_provenance(path: Place, error: Exception) -> DamageError:
    """The error for a provenance that cannot be read because of `error`."""
    what = "not readable" if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return DamageError(f"{path / 'zarr.json'}: its provenance is damaged ({what}).")


def committed_tiles(path: Place, plan: TilePlan) -> NDArray[np.bool_]:
    """Bits of the committed tiles of a store, (tiles,).

    Raises:
        DamageError: if its ledger cannot be read.
    """
    try:
        return committed(path / LEDGER, len(plan))
    except Exception as error:  # a segment may hold anything
        raise DamageError(f"{path / LEDGER}: cannot be read ({error}).") from error


def stored_voxel_size(path: Place) -> tuple[float, ...] | None:
    """The voxel size that the store's images tell, which its provenance does not; None if none."""
    for group in (path, path / "labels/classes"):
        try:
            told = json.loads((group / "zarr.json").read_text())["attributes"]["ome"]
            image = told["multiscales"][0]
            scale = image["datasets"][0]["coordinateTransformations"][0]["scale"][-3:]
            if any("unit" in axis for axis in image["axes"]):
                return tuple(map(float, scale))
            return None
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            continue
    return None
