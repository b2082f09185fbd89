"""What lies at the path of an output: nothing, files of others, a store, or a part of one.

Knows what distinguishes a store from anything else. Changes nothing, and reads no shard.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unet_ray.errors import InputError
from unet_ray.storage.layout import ARRAYS, FORMAT, LEDGER, METADATA, PRIVATE, ROOT, SHARDS
from unet_ray.storage.ledger import has_begun, has_notes
from unet_ray.storage.places import Place, files_below, stat_of, unusable
from unet_ray.storage.provenance import Provenance

_PRIVATE = re.compile(rf"{re.escape(PRIVATE)}/.*", re.DOTALL)
_OURS = re.compile(
    "|".join([*map(re.escape, (ROOT, *METADATA)), *SHARDS, _PRIVATE.pattern]), re.DOTALL
)
# Bytes; a recipe and a plan take some thousand.
LARGEST_ROOT = 1 << 26
# Parts of a provenance that a run needs to go on.
CONTINUED = (
    *("plan", "outputs", "class_values", "channel", "time", "level", "precision"),
    *("device", "tta", "nan", "normalisation"),
)
_FOREIGN = "{}: exists and is not an output of unet-ray; choose another --out."


@dataclass(frozen=True)
class Found:
    """What one look at a path found.

    Attributes:
        path: where.
        what: ``nothing``; ``foreign``: files of others; ``store``; ``damaged``: a store whose root
            or private folder is not as it should be; ``remains``: a store without its root, as
            before the end of its creation, or in a copy that is not whole.
        private: whether the private folder is there.
        begun: whether the ledger is there.
        provenance: of a store; None for all else.
        error: why the root cannot be read; None if it can, or there is none.
    """

    path: Place
    what: Literal["nothing", "foreign", "store", "damaged", "remains"]
    private: bool = False
    begun: bool = False
    provenance: Provenance | None = None
    error: OSError | None = None

    @property
    def is_output(self) -> bool:
        """Whether it is an output of ours, whole or not, or a copy of one."""
        return self.what in ("store", "damaged") or self.private

    def is_untouched(self) -> bool:
        """Whether nothing was ever done in a store of ours: no note, and no shard."""
        return self.begun and not has_notes(self.path / LEDGER) and _is_bare(self.path)

    def continued(self) -> Provenance | None:
        """The provenance of the store that a run here continues; None if it begins a new one.

        Raises:
            InputError: if a run can do neither, or what is there cannot be read.
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
            if damage := self.provenance.damage(*CONTINUED):
                raise InputError(
                    f"{self.path}: its provenance is damaged ({damage}); choose another --out, or "
                    "make it anew with --overwrite."
                )
            return self.provenance
        if self.what in ("foreign", "damaged"):
            raise InputError(_FOREIGN.format(self.path))
        refuse_others(self.path)
        if has_notes(self.path / LEDGER) and not _is_bare(self.path):
            raise InputError(
                f"{self.path}: exists and has no {ROOT}, as a copy that is not whole; copy it "
                "again, choose another --out, or make it anew with --overwrite."
            )
        return None


def inspect(path: Place) -> Found:
    """Looks at the path of an output.

    Raises:
        InputError: if what is there cannot be read.
    """
    try:
        private, begun = (path / PRIVATE).is_dir(), has_begun(path / LEDGER)
        if not (path / ROOT).is_file():
            if private:
                return Found(path, "remains", private, begun)
            return Found(path, "foreign" if _stranger(path) else "nothing", private, begun)
    except OSError as error:
        raise InputError(unusable(path, error)) from error
    try:
        attributes = _attributes(path)
    except OSError as error:
        return Found(path, "damaged", private, begun, error=error)
    ours = isinstance(attributes, dict) and "unet_ray" in attributes
    kept = attributes["unet_ray"] if ours else None
    if private and isinstance(kept, dict) and kept.get("format") == FORMAT:
        return Found(path, "store", private, begun, Provenance(kept))
    return Found(path, "damaged" if private or ours else "foreign", private, begun)


def refuse_others(path: Place) -> None:
    """Makes sure that nothing is at `path` but what stores of ours are made of.

    Raises:
        InputError: naming the first file that is of somebody else.
        OSError: if what is there cannot be listed.
    """
    stranger = _stranger(path)
    if stranger:
        raise InputError(_refusal(path, stranger))


def _refusal(path: Place, stranger: Place) -> str:
    if not _is_ours(path):
        return _FOREIGN.format(path)
    return (
        f"{stranger}: is not of unet-ray, and would be deleted with {path}; move it, or choose "
        "another --out."
    )


def _attributes(path: Place) -> Any:
    """The attributes of a root; None if it is damaged, or too large to be one."""
    if stat_of(path / ROOT).size > LARGEST_ROOT:
        return None
    try:
        return json.loads((path / ROOT).read_text())["attributes"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None


def _is_ours(path: Place) -> bool:
    """Whether a store of ours is at `path`, or was begun and has no root yet, or no more."""
    attributes = _attributes(path) if (path / ROOT).is_file() else None
    if attributes is None:
        return has_begun(path / LEDGER)
    kept = attributes.get("unet_ray") if isinstance(attributes, dict) else None
    return isinstance(kept, dict) and kept.get("format") == FORMAT


def _is_bare(path: Place) -> bool:
    """Whether there is no shard."""
    shards = (files_below(path / name / "c") for name in ARRAYS.values())
    return all(next(each, None) is None for each in shards)


def _stranger(path: Place) -> Place | None:
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
