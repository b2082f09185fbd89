"""Copies one output of a store into a file: TIFF for arrays, CSV for the table of objects.

Knows what a store can give, and CSV. Does not know TIFF or how an output was computed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unet_ray.errors import DamageError, InputError, reason, refuse_below_file, refuse_unknown
from unet_ray.report.results import Result, open_result
from unet_ray.report.tiff import Watch, largest_value, write_tiff
from unet_ray.storage.inspection import inspect
from unet_ray.storage.layout import INSTANCES, LEDGER, PRIVATE, TABLE
from unet_ray.storage.ledger import skipped
from unet_ray.storage.places import PathOrUrl, Place, place_of, replacing
from unet_ray.storage.written import is_made
from unet_ray.units import warn

# What can be exported; the first that a store has is the default of a TIFF file.
WHAT = ("probabilities", "instances", "classes", "objects")
SUFFIXES = (".tif", ".tiff", ".csv")
# Outputs of a later stage than `segment`, with the name of its ledger.
STAGES = {INSTANCES: INSTANCES, "objects": "table"}
IDS = ("uint64", "uint32", "int64")  # types of the ids in the table
ROWS = 1 << 16  # of the table at a time


def export(
    out: PathOrUrl,
    file: str | os.PathLike[str],
    what: str | None = None,
    *,
    as_float: bool = False,
    overwrite: bool = False,
    watch: Watch = lambda done, total: None,
) -> Path:
    """Writes one output of a finished store to a TIFF or CSV file.

    The file appears under its name only when it is complete.

    Args:
        out: the store.
        file: path ending in .tif or .tiff (arrays), or in .csv (objects).
        what: one of `WHAT`; by default the first that the store has, or objects for .csv.
        as_float: write probabilities as float32 from 0 to 1, k / 255, in place of uint8 k.
        overwrite: replace an existing file.
        watch: called with the number of planes or rows that are written, and of all.

    Returns:
        The absolute path of the file.

    Raises:
        InputError: if `file` cannot be written, or the store lacks the output or tiles of it.
        RunError: if a file of the store is missing or damaged.
    """
    path = _checked_path(file, what, overwrite)
    store = place_of(out)
    result = _opened(store)
    if isinstance(store, Path) and path.resolve().is_relative_to(store.resolve()):
        raise InputError(f"{path}: is inside the store {store}; choose a file beside it.")
    what = _chosen(result, path, what)
    if as_float and what != "probabilities":
        raise InputError(f"float=True needs probabilities, not {what}; omit --float.")
    _refuse_unfinished(result, what)
    if what == "objects":
        _write_csv(result.path / TABLE, path, watch)
    else:
        dtype = np.dtype("<f4") if as_float else _type_of(result, what)
        write_tiff(result, what, dtype, path, watch)
    return path


def _checked_path(file: str | os.PathLike[str], what: str | None, overwrite: bool) -> Path:
    """Returns the absolute path of the new file.

    Raises:
        InputError: if its suffix is unknown or contradicts `what`, or if it cannot be written.
    """
    if what is not None:
        refuse_unknown("what", what, WHAT)
    path = place_of(file)
    if not isinstance(path, Path):
        raise InputError(f"{file}: is a URL; name a file on a disk, and copy it from there.")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if what and (suffix == ".csv") != (what == "objects"):
        ending = ".csv" if what == "objects" else ".tif"
        raise InputError(
            f"{path}: {suffix} does not fit --what {what}; name a file that ends in {ending}, or "
            "choose another --what."
        )
    refuse_below_file(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; create {path.parent} first.")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file.")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists; name another file, or replace it with --overwrite.")
    return path


def _opened(store: Place) -> Result:
    """Opens the store.

    Raises:
        InputError: if it is not an output of segment, or lacks the record of its tiles.
    """
    inspected = inspect(store)
    if not inspected.is_output:
        problem = "is not an output of segment" if store.exists() else "does not exist"
        raise InputError(f"{store}: {problem}; name the --out of `unet-ray segment`.")
    if not inspected.private:
        raise InputError(
            f"{store}: its folder {PRIVATE} is missing, so completeness cannot be checked; copy "
            "the store with its hidden files."
        )
    return open_result(store)


def _chosen(result: Result, path: Path, what: str | None) -> str:
    """The output to export.

    Raises:
        InputError: if the store does not have it; names those that it has.
    """
    stored = [name for name in WHAT if name in result.provenance.outputs]
    stored += ["objects"] if (result.path / TABLE).is_file() else []
    what = what or ("objects" if path.suffix.lower() == ".csv" else stored[0])
    if what not in stored:
        raise InputError(f"{result.path}: has no {what}, only {' and '.join(stored)}.")
    return what


def _refuse_unfinished(result: Result, what: str) -> None:
    """Refuses an output with missing tiles; reports those that a mask left out.

    Raises:
        InputError: if tiles are neither committed nor left out by a mask.
    """
    tiles, masked = len(result.plan), skipped(result.path / LEDGER, len(result.plan))
    if what in STAGES:
        stage, tasks = STAGES[what], tiles if what == INSTANCES else 1
        if not is_made(result.path, stage, result.plan, tasks):
            raise InputError(
                f"{result.path}: its {what} are not finished; run the same `unet-ray segment` "
                "again."
            )
    if missing := int((~result.done & ~masked).sum()):
        raise InputError(
            f"{result.path}: {missing} of {tiles} tiles of its {what} are not done; run the same "
            "`unet-ray segment` without --region."
        )
    if left_out := int(masked.sum()):
        warn(f"{left_out} of {tiles} tiles were left out by a mask and count as 0.")


def _type_of(result: Result, output: str) -> np.dtype[Any]:
    """The smallest unsigned type for the values of an output, little-endian."""
    stored: np.dtype[Any] = result.store.read(output).dtype
    if stored.itemsize == 1:
        return stored
    table = result.path / TABLE
    largest = _Rows(table).largest_id() if table.is_file() else largest_value(result, output)
    return np.min_scalar_type(largest).newbyteorder("<")


# Table


def _write_csv(table: Place, path: Path, watch: Watch) -> None:
    """Writes all columns and rows of the table of objects."""
    from pyarrow import csv

    with replacing(path) as partial:
        rows = _Rows(table)
        with csv.CSVWriter(str(partial), rows.schema) as writer:
            for done, batch in rows.batches():
                writer.write_batch(batch)
                watch(done, rows.count)


class _Rows:
    """The rows of the table of objects, read in batches.

    Raises:
        DamageError: if the table cannot be read; names it.
    """

    def __init__(self, table: Place) -> None:
        from pyarrow import parquet

        self._table = table
        try:
            source = str(table) if isinstance(table, Path) else io.BytesIO(table.read_bytes())
            self._file = parquet.ParquetFile(source)
        except Exception as error:  # pyarrow has many types of errors
            raise self._damage(error) from error
        self.schema, self.count = self._file.schema_arrow, self._file.metadata.num_rows

    def largest_id(self) -> int:
        """Returns the largest number in the column ``id``; 0 if there is no row."""
        if "id" not in self.schema.names or str(self.schema.field("id").type) not in IDS:
            raise self._damage(ValueError("it has no column of integers with the name id"))
        batches = (batch for _, batch in self.batches(["id"]) if len(batch))
        return max((int(batch.column("id").to_numpy(False).max()) for batch in batches), default=0)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        """Yields batches of rows, each with the number of rows up to its end."""
        done, batches = 0, self._file.iter_batches(ROWS, columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                raise self._damage(error) from error
            if batch is None:
                return
            done += len(batch)
            yield done, batch

    def _damage(self, error: Exception) -> DamageError:
        return DamageError(
            f"{self._table}: cannot be read as a table of objects ({reason(error)}); the file is "
            "damaged: copy the store again."
        )
