"""Checks the metadata of a store against its provenance, and prepares the checks of its tiles.

Knows the metadata of a store. Does not know how to recompute a tile.

The expected metadata are derived from the provenance, never from the ``zarr.json`` of an array,
and then compared with it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from unet_ray.errors import DamageError, RunError
from unet_ray.storage.inspection import Found
from unet_ray.storage.layout import LEDGER, PREDICTED, PRIVATE, SEGMENT, StoreLayout
from unet_ray.storage.ledger import recorded_provenance
from unet_ray.storage.parsing import ContentError
from unet_ray.storage.places import Place
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.stores import create_store, differing_keys
from unet_ray.storage.tile_audit import TileAudit, read_checked
from unet_ray.storage.written import Written


class Audit:
    """Compares the files of a store with an empty store created from the same provenance.

    Args:
        inspected: the result of `inspection.inspect` for the store.
        scratch: a folder for the empty store.

    Attributes:
        path: the store.
        provenance: how the store was made.
        empty: the empty store.
        predicted: the files of the predicted tiles.

    Raises:
        DamageError: if the provenance or the ledger is missing or unusable.
        RunError: if the scratch folder cannot be written.
    """

    def __init__(self, inspected: Found, scratch: Path) -> None:
        self.path, self._scratch = inspected.path, scratch
        self.provenance = sound_provenance(inspected)
        self.empty = self._create_empty(stored_voxel_size(self.path))
        outputs = tuple(name for name in self.provenance.outputs if name in PREDICTED)
        self.predicted = self.of(Written(SEGMENT, self.provenance.plan, outputs))

    def of(self, written: Written) -> TileAudit:
        """Returns the audit of the tiles of one stage.

        Raises:
            DamageError: if its ledger cannot be read.
        """
        return TileAudit(self.path, written, self.empty)

    def expect(self, voxel_size: tuple[float, ...] | None) -> None:
        """Creates the empty store to compare with.

        Args:
            voxel_size: (z, y, x) in micrometre, which the provenance lacks; None if unknown.
        """
        self.empty = self._create_empty(voxel_size)
        self.predicted.expect(self.empty)

    def _create_empty(self, voxel_size: tuple[float, ...] | None) -> Path:
        empty, made = Path(tempfile.mkdtemp(dir=self._scratch)) / "store", self.provenance
        try:
            layout = StoreLayout(
                made.plan, made.class_values, made.outputs, voxel_size, made.factors
            )
            create_store(empty, layout, made)
        except OSError as error:
            raise RunError(f"{empty}: {error.strerror}; free disk space there.") from error
        except Exception as error:  # zarr refuses a provenance that describes no valid store
            raise _damaged_provenance(self.path, f"{type(error).__name__}: {error}") from error
        return empty

    def metadata_damage(self) -> dict[Place, str]:
        """Returns a sentence for each metadata file that differs from the expected one."""
        damage = {}
        for expected in sorted(self.empty.rglob("zarr.json")):
            path = self.path / expected.relative_to(self.empty)
            try:
                _compare_json(read_checked(self.path, path), expected.read_bytes())
            except DamageError as error:
                damage[path] = f"{path}: {error}."
        return damage

    def edited_fields(self) -> Iterator[str]:
        """Yields a sentence for each field that differs from the provenance in the ledger."""
        try:
            recorded = Provenance(recorded_provenance(self.path / LEDGER))
        except DamageError as error:
            yield str(error)
            return
        for sentence in self.provenance.edits(recorded) if recorded.json else ():
            yield f"{self.path / 'zarr.json'}: {sentence}."


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
        read_checked(path, path / "zarr.json")
    except DamageError as error:
        raise DamageError(f"{path / 'zarr.json'}: {error}.") from error
    if not inspected.provenance:
        raise _damaged_provenance(path, "not readable")
    provenance = inspected.provenance
    if damage := provenance.damage("plan", "outputs", "class_values", "source", "factors"):
        raise _damaged_provenance(path, damage)
    return provenance


def _damaged_provenance(path: Place, damage: str) -> DamageError:
    return DamageError(f"{path / 'zarr.json'}: its provenance is damaged ({damage}).")


def _compare_json(stored_json: bytes, expected_json: bytes) -> None:
    try:
        keys = differing_keys(stored_json, expected_json)
    except ContentError as error:
        raise DamageError("is not the JSON of an array or group") from error
    if keys:
        raise DamageError(f"differs in {', '.join(map(repr, keys))} from the expected metadata")


def stored_voxel_size(path: Place) -> tuple[float, ...] | None:
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
