"""Inspects the path of an output: it may be empty, foreign, a store, or a part of one.

Knows what distinguishes a store from other files. Does not change files or read shards.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unet_ray.errors import DamageError, InputError
from unet_ray.storage.layout import (
    ARRAYS,
    FORMAT,
    LEDGER,
    LEVEL,
    METADATA,
    PRIVATE,
    ROOT,
    SHARDS,
    TABLE,
)
from unet_ray.storage.ledger import has_begun, has_notes, recorded_provenance
from unet_ray.storage.parsing import parse_json, read_file
from unet_ray.storage.places import Place, files_below, unusable
from unet_ray.storage.provenance import Provenance

_PRIVATE_FILE = re.compile(rf"{re.escape(PRIVATE)}/.*", re.DOTALL)
_STORE_FILE = re.compile(
    "|".join([METADATA, SHARDS, re.escape(TABLE), _PRIVATE_FILE.pattern]), re.DOTALL
)
# Parts of a provenance that a run needs to resume.
RESUME_PARTS = (
    *("plan", "outputs", "class_values", "channel", "time", "level", "precision"),
    *("device", "tta", "nan", "normalisation", "threshold", "factors", "objects"),
)
# Folders between an array and its shards: ``c``, one for each channel, z and y.
_FOLDER_DEPTHS = {"probabilities": 4, "classes": 3, "instances": 3}
_FOREIGN = "{}: exists and is not an output of unet-ray; choose another --out."


@dataclass(frozen=True)
class Found:
    """The result of inspecting a path.

    Attributes:
        path: the inspected path.
        what: ``nothing``; ``foreign``: files of other programs; ``store``; ``damaged``: a store
            with a damaged root or without its private folder; ``remains``: a store without its
            root, after an interrupted creation or an incomplete copy.
        private: whether the private folder exists.
        begun: whether the ledger exists.
        provenance: the provenance of a ``store``; None otherwise.
        error: the error of reading the root; None if it is readable or missing.
    """

    path: Place
    what: Literal["nothing", "foreign", "store", "damaged", "remains"]
    private: bool = False
    begun: bool = False
    provenance: Provenance | None = None
    error: OSError | None = None

    @property
    def is_output(self) -> bool:
        """Whether it is an output of unet-ray, complete or not, or a copy of one."""
        return self.what in ("store", "damaged") or self.private

    def is_untouched(self) -> bool:
        """Returns whether a store has a ledger but no recorded tile and no shard."""
        return self.begun and not has_notes(self.path / LEDGER) and _is_bare(self.path)

    def continued(self) -> Provenance | None:
        """Returns the provenance of the store to resume; None if a run must create a new store.

        Raises:
            InputError: if a run can do neither, or if the files cannot be read.
        """
        try:
            return self._continued()
        except OSError as error:
            raise InputError(unusable(self.path, error)) from error

    def _continued(self) -> Provenance | None:
        if self.error:
            raise self.error
        if self.provenance:
            if self.is_untouched():
                return None
            if damage := self.provenance.damage(*RESUME_PARTS):
                raise InputError(
                    f"{self.path}: its provenance is damaged ({damage}); choose another --out, or "
                    "recreate it with --overwrite."
                )
            self._refuse_edits(self.provenance)
            return self.provenance
        if self.what in ("foreign", "damaged"):
            raise InputError(_FOREIGN.format(self.path))
        refuse_others(self.path)
        if has_notes(self.path / LEDGER) and not _is_bare(self.path):
            raise InputError(
                f"{self.path}: exists but has no {ROOT}, like an incomplete copy; copy it again, "
                "choose another --out, or recreate it with --overwrite."
            )
        return None

    def _recorded(self) -> Provenance:
        """The provenance in the ledger."""
        try:
            return Provenance(recorded_provenance(self.path / LEDGER))
        except DamageError as error:
            raise InputError(
                f"{str(error).rstrip('.')}; choose another --out, or recreate it with --overwrite."
            ) from error

    def _refuse_edits(self, provenance: Provenance) -> None:
        """Refuses a provenance that differs from the record in the ledger."""
        recorded = self._recorded()
        edit = next(provenance.edits(recorded), "") if recorded.json else ""
        if edit and not has_notes(self.path / LEDGER):
            raise InputError(
                f"{self.path}: a run with --overwrite was interrupted when it began a new store; "
                "run it again with --overwrite, or choose another --out."
            )
        if edit:
            raise InputError(
                f"{self.path / ROOT}: {edit}; restore it, choose another --out, or recreate the "
                "store with --overwrite."
            )


def inspect(path: Place) -> Found:
    """Inspects the path of an output.

    Raises:
        InputError: if the files at `path` cannot be read.
    """
    try:
        private, begun = (path / PRIVATE).is_dir(), has_begun(path / LEDGER)
        if not (path / ROOT).is_file():
            if private:
                return Found(path, "remains", private, begun)
            return Found(path, "foreign" if _first_foreign(path) else "nothing", private, begun)
    except OSError as error:
        raise InputError(unusable(path, error)) from error
    try:
        attributes = _attributes(path)
    except OSError as error:
        return Found(path, "damaged", private, begun, error=error)
    has_provenance = isinstance(attributes, dict) and "unet_ray" in attributes
    stored = attributes["unet_ray"] if has_provenance else None
    if private and isinstance(stored, dict) and stored.get("format") == FORMAT:
        return Found(path, "store", private, begun, Provenance(stored))
    return Found(path, "damaged" if private or has_provenance else "foreign", private, begun)


def refuse_others(path: Place) -> None:
    """Refuses a path with files that do not belong to a store.

    Raises:
        InputError: if there is such a file; names the first one.
        OSError: if the files at `path` cannot be listed.
    """
    foreign = _first_foreign(path)
    if foreign:
        raise InputError(_refusal(path, foreign))


def refuse_links(path: Place, outputs: Sequence[str] = ()) -> None:
    """Refuses a store with a symbolic link among the folders and private files that a run writes.

    A write through a link would change files outside the store. Folders of shards are checked, but
    not listed, so the check is fast for millions of shards. A run replaces shards and metadata as
    whole files, so it never writes through a link in the place of one.

    Args:
        path: the store.
        outputs: names of the arrays that will be written; none for the private folder alone.

    Raises:
        InputError: if there is such a link; names the first one.
    """
    if not isinstance(path, Path):
        return
    try:
        link = next(_links(path, outputs), None)
    except OSError as error:
        raise InputError(unusable(path, error)) from error
    if link:
        raise InputError(
            f"{link}: is a symbolic link, and unet-ray follows none inside a store when it writes; "
            "move the files themselves to its place, or choose another --out."
        )


def _links(path: Path, outputs: Sequence[str]) -> Iterator[Path]:
    yield from _links_below(path / PRIVATE, sys.maxsize)
    for name in outputs:
        first = path / ARRAYS[name]
        above = (path / parent for parent in reversed(first.relative_to(path).parents))
        yield from (folder for folder in [*above][1:] if folder.is_symlink())
        for level in _levels_in(first.parent):
            yield from _links_below(level, _FOLDER_DEPTHS[name])


def _folders_of_levels(path: Path) -> list[Path]:
    """Returns the folders that contain the levels of each output."""
    return [(path / name).parent for name in ARRAYS.values()]


def _levels_in(folder: Path) -> list[Path]:
    """Returns the files of a folder that are named as levels, and links with such names."""
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if re.fullmatch(LEVEL, file.name))


def _links_below(folder: Path, depth: int) -> Iterator[Path]:
    """Yields `folder` if it is a link, else the links in it and `depth` - 1 levels below."""
    if folder.is_symlink():
        yield folder
    elif depth and folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    yield Path(entry)
                elif depth > 1 and entry.is_dir():
                    yield from _links_below(Path(entry), depth - 1)


def _refusal(path: Place, foreign: Place) -> str:
    if not _is_store(path):
        return _FOREIGN.format(path)
    return (
        f"{foreign}: is not from unet-ray and would be deleted with {path}; move it, or choose "
        "another --out."
    )


def _attributes(path: Place) -> Any:
    """Returns the attributes of a root; None if it is damaged or too large."""
    try:
        return parse_json(read_file(path / ROOT))["attributes"]
    except (ValueError, KeyError, TypeError):
        return None


def _is_store(path: Place) -> bool:
    """Returns whether `path` is a store, or has the ledger of one without a readable root."""
    attributes = _attributes(path) if (path / ROOT).is_file() else None
    if attributes is None:
        return has_begun(path / LEDGER)
    stored = attributes.get("unet_ray") if isinstance(attributes, dict) else None
    return isinstance(stored, dict) and stored.get("format") == FORMAT


def _is_bare(path: Place) -> bool:
    """Returns whether a store has no shard at any level."""
    if isinstance(path, Path):
        folders = _folders_of_levels(path)
        tops = (level / "c" for folder in folders for level in _levels_in(folder))
        return all(next(files_below(top), None) is None for top in tops)
    return not any(re.fullmatch(SHARDS, _name_in(path, file)) for file in path.below())


def _name_in(store: Place, file: Place) -> str:
    return str(file)[len(str(store)) + 1 :]


def _first_foreign(path: Place) -> Place | None:
    """Returns the first file or link that does not belong to a store; links never do."""
    if isinstance(path, Path) and not path.is_dir():
        return path if path.exists() or path.is_symlink() else None
    own_file = _STORE_FILE if _is_store(path) else _PRIVATE_FILE
    for file in files_below(path):
        link = isinstance(file, Path) and file.is_symlink()
        if link or not own_file.fullmatch(_name_in(path, file)):
            return file
    if isinstance(path, Path):  # `files_below` does not yield an empty folder with such a name
        return next((file for file in _single_files(path) if file.is_dir()), None)
    return None


def _single_files(path: Path) -> Iterator[Path]:
    """Yields the paths of the metadata of a store, existing or not, and of its table."""
    yield path / TABLE
    yield path / "labels" / ROOT
    for folder in _folders_of_levels(path):
        yield folder / ROOT
        yield from (level / ROOT for level in _levels_in(folder))
