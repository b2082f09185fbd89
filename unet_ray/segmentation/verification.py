"""Whether a store is whole: every committed shard decodes, and some tiles give the same again.

Knows the files of a store and how a tile is made again; the arithmetic of a tile, the bytes of a
shard and the ledger are in rooms of their own.

What an array looks like is never taken from its ``zarr.json`` but derived from the provenance, and
then compared. That no byte of a shard can change unseen is what `shards` is about.
A shard that is sound but of another tile, or of another model, only recomputing can find.
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine import engines
from unet_ray.engine.stages import Receipt, Stage
from unet_ray.engine.threads import Receipts
from unet_ray.errors import DamageError, InputError, LostError, RunError
from unet_ray.segmentation.preparation import prepare
from unet_ray.segmentation.run import Segmentation
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.events import read_events
from unet_ray.storage.inspection import (
    committed_tiles,
    compare_json,
    damaged_provenance,
    is_output,
    read_file,
    refuse_link,
    sound_provenance,
    stored_voxel_size,
)
from unet_ray.storage.layout import ARRAYS, EVENTS, LEDGER, PRIVATE, StoreLayout
from unet_ray.storage.lease import Lease
from unet_ray.storage.ledger import damaged, newest, skipped
from unet_ray.storage.places import Guard, Place, Where, files_below, place_of, write_whole
from unet_ray.storage.shards import Shards
from unet_ray.storage.stores import Store, create_store

VOUCHERS = 64  # tiles that are made again at most before one is repaired, if none differs


@dataclass(frozen=True)
class Verdict:
    """What was checked of a store and what was found.

    Attributes:
        tiles: tiles that are committed.
        shards: shards that were checked.
        recomputed: numbers of the tiles that were made again and compared.
        damage: a sentence for each damaged or missing file, or tile, that is so still.
        notes: what is worth knowing and no damage; also what was damaged and is repaired.
        repaired: numbers of the tiles that were made and written again.
        refusal: why tiles could not be made again though it was asked for, or nothing.
    """

    tiles: int
    shards: int
    recomputed: tuple[int, ...] = ()
    damage: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    repaired: tuple[int, ...] = ()
    refusal: str = ""

    @property
    def sound(self) -> bool:
        """Whether all that was asked for was checked, and nothing is damaged now."""
        return not self.damage and not self.refusal

    def summary(self) -> str:
        """One line: how much was checked and whether it is well."""
        facts = [f"{self.tiles} tiles", f"{self.shards} shards checked"]
        for tiles, done in ((self.recomputed, "recomputed"), (self.repaired, "repaired")):
            if tiles:
                facts.append(f"{len(tiles)} {done} (tiles {', '.join(map(str, tiles))})")
        found = f"{len(self.damage)} damaged" if self.damage else "all as they should be"
        return f"{', '.join(facts)}: {found}."


def verify(out: Where, tiles: int = 3, repair: bool = False) -> Verdict:
    """Checks every shard of the committed tiles, and makes some tiles again to compare them.

    Decoded voxels of all outputs are compared; compressed bytes may differ between versions of a
    compressor. Memory holds one tile, and as many as the machine has cores while recomputing.

    Args:
        out: the store; a run may be writing there.
        tiles: how many sound tiles to make again, chosen at random; all if there are fewer. It
            needs input and model, where the event log says they are.
        repair: makes damaged and missing shards again, and writes them.

    Raises:
        InputError: if `out` is no output of ours; with `repair`, if a run is writing there.
        RunError: if the disk takes nothing more while repairing.
    """
    path = place_of(out)
    if tiles < 0:
        raise InputError(f"tiles={tiles} must be at least 0.")
    if not is_output(path):
        what = "is not an output of unet-ray" if path.exists() else "does not exist"
        raise InputError(f"{path}: {what}; name an OUT.zarr that `unet-ray segment` has made.")
    with tempfile.TemporaryDirectory(prefix="unet-ray-") as folder:
        try:
            sound_provenance(path)  # before a lease is made where there was none
            with _lease(path) if repair else nullcontext() as lease:
                return _Check(path, Path(folder), lease).run(tiles)
        except DamageError as error:
            return Verdict(0, 0, damage=(str(error),))


def _lease(path: Place) -> Lease:
    """The right to repair a store: until it is whole nobody else changes what was checked."""
    return Lease(path / PRIVATE, after=newest(path / LEDGER))


class _Check:
    """One call of `verify`: what is expected of the store, and what was found so far."""

    def __init__(self, path: Place, scratch: Path, lease: Lease | None) -> None:
        self._path, self._scratch = path, scratch
        self._lease = lease  # to repair what is damaged; None only to tell
        self._told, self._plan = sound_provenance(path)
        self._outputs: list[str] = self._told["outputs"]
        self._done = committed_tiles(path, self._plan)
        self._expect(stored_voxel_size(path))
        self._bad: dict[int, dict[str, str]] = {}  # what is wrong, by tile and output
        self._metadata: dict[Place, str] = {}  # what is wrong, by file
        self._failed: list[str] = []  # what could not be made again
        self._notes: list[str] = []
        self._recomputed: list[int] = []
        self._strange: list[int] = []  # of those, the ones that differ
        self._agreed: list[int] = []  # and the ones that do not, and are not of one value
        self._repaired: list[int] = []
        self._refusal = ""

    def _expect(self, voxel_size: tuple[float, ...] | None) -> None:
        """Makes an empty store as this one should be, to compare with."""
        self._empty = Path(tempfile.mkdtemp(dir=self._scratch)) / "store"
        try:
            values = self._told["model"]["class_values"]
            layout = StoreLayout(self._plan, values, self._outputs, voxel_size)
            create_store(self._empty, layout, self._told)
            self._store = Store(self._empty, self._outputs)
        except OSError as error:
            raise RunError(f"{self._empty}: {error.strerror}; make room there.") from error
        except Exception as error:  # of zarr: what cannot be a store is no provenance of one
            raise damaged_provenance(self._path, error) from error
        self._arrays = {
            name: Shards(self._store.read(name), self._store.metadata(name))
            for name in self._outputs
        }

    def run(self, tiles: int) -> Verdict:
        """Checks all, then makes again what is to be compared or repaired."""
        sample = sorted(self._check_shards(tiles))
        self._metadata, self._notes = self._check_metadata(), self._remarks()
        if sample or (self._lease and (self._bad or self._metadata)):
            self._make_again(sample)
        done = int(self._done.sum())
        return Verdict(
            tiles=done,
            shards=done * len(self._outputs),
            recomputed=tuple(sorted(self._recomputed)),
            damage=(*self._sentences(), *self._failed, *self._damaged_notes()),
            notes=tuple(self._notes),
            repaired=tuple(sorted(self._repaired)),
            refusal=self._refusal,
        )

    def _make_again(self, sample: list[int]) -> None:
        try:
            run = self._prepare()
        except InputError as error:
            self._refusal = str(error)
            return
        self._expect(run.volume.voxel_size)  # until here it was what the store says of itself
        self._metadata = self._check_metadata()
        self._recompute(run, sample)
        if not self._lease or not any(self._sentences()):
            return
        if not self._is_vouched_for(run, sample):
            self._refusal = (
                f"{self._path}: tiles without damage differ from what input, model and zarr.json "
                "give, and none agrees, so nobody knows which is right; nothing was repaired: make "
                "the store anew with --overwrite."
            )
            return
        found = [*self._sentences()]
        self._repair(run, self._lease)
        left = {*self._sentences()}
        self._notes += [f"repaired: {each}" for each in found if each not in left]

    def _is_vouched_for(self, run: Segmentation, sample: list[int]) -> bool:
        """Whether nothing tells that what makes the tiles again did not make this store.

        Makes others again to see: all, if one was found that differs, else some until one agrees.
        A tile of one value agrees with almost anything, so it vouches for nothing.
        """
        known = {*sample, *self._bad}
        others = (tile for tile in _numbers(self._done) if tile not in known)
        self._recompute(run, self._until_settled(others))
        if self._strange:
            self._recompute(run, others)
        return bool(self._agreed) or not self._strange

    def _until_settled(self, tiles: Iterator[int]) -> Iterator[int]:
        """A few tiles; no more of them once one agreed or differed."""
        for _ in range(VOUCHERS):
            if self._agreed or self._strange:
                return
            yield from itertools.islice(tiles, 1)

    def _sentences(self) -> Iterator[str]:
        yield from self._metadata.values()
        for tile, found in sorted(self._bad.items()):
            for name, what in found.items():
                yield f"{self._shard(name, tile)}: the shard of tile {tile} {what}."

    def _damaged_notes(self) -> Iterator[str]:
        for path in damaged(self._path / LEDGER, len(self._plan)):
            yield (
                f"{path}: is damaged, so the tiles that it tells of count as not done; the same "
                "`unet-ray segment` makes them again."
            )

    def _shard(self, name: str, tile: int) -> Place:
        return self._path / ARRAYS[name] / self._store.key(name, self._plan[tile])

    # Checking

    def _check_shards(self, most: int) -> list[int]:
        """Checks every committed tile; gives at most so many of the sound ones, at random."""
        chance, sound = random.SystemRandom(), 0
        chosen: list[int] = []
        stage = Stage("verify", lambda: _Checking(self._check_tile), "cpu")
        with closing(engines.run(stage, _numbers(self._done), "local")) as receipts:
            for receipt in receipts:
                if receipt.error:
                    raise RunError(f"{self._path}: tile {receipt.tile}: {receipt.error}")
                if receipt.tile in self._bad:
                    continue
                sound += 1
                # Each tile so far is among the chosen with the same chance (Knuth, algorithm R).
                if len(chosen) < most:
                    chosen.append(receipt.tile)
                elif (at := chance.randrange(sound)) < most:
                    chosen[at] = receipt.tile
        return chosen

    def _check_tile(self, tile: int) -> bool:
        """Whether all shards of a tile are sound; notes what is wrong with those that are not."""
        found = {}
        for name in self._outputs:
            try:
                self.decode(name, tile)
            except DamageError as error:
                found[name] = str(error)
        self._bad.pop(tile, None)
        if found:
            self._bad[tile] = found
        return not found

    def decode(self, name: str, tile: int) -> NDArray[np.uint8]:
        """The stored voxels that a tile owns, (..., z, y, x).

        Raises:
            DamageError: if its shard is not there, or has a byte that no checksum vouches for.
        """
        place, shards = self._plan[tile], self._arrays[name]
        data = read_file(self._path, self._shard(name, tile), shards.most)
        return shards.decode(data, place, self._store.key(name, place))

    def _check_metadata(self) -> dict[Place, str]:
        """A sentence for each metadata file that is not what the provenance implies."""
        found = {}
        for expected in sorted(self._empty.rglob("zarr.json")):
            path = self._path / expected.relative_to(self._empty)
            try:
                compare_json(read_file(self._path, path), expected.read_bytes())
            except DamageError as error:
                found[path] = f"{path}: {error}."
        return found

    def _remarks(self) -> list[str]:
        """What is worth knowing of a store and no damage."""
        masked = int(skipped(self._path / LEDGER, len(self._plan)).sum())
        missing = len(self._plan) - int(self._done.sum()) - masked
        notes = [f"{missing} of {len(self._plan)} tiles are not done."] if missing else []
        if masked:
            notes.append(f"{masked} of {len(self._plan)} tiles were left out by a mask.")
        uncommitted, strays, first = 0, 0, self._path
        for path, tile in self._files():
            if tile is None:
                strays, first = strays + 1, first if strays else path
            elif not self._done[tile]:
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
        for name in self._outputs:
            top = self._path / ARRAYS[name]
            for path in files_below(top):
                if path != top / "zarr.json":
                    yield path, self._tile_of(name, path)

    def _tile_of(self, name: str, path: Place) -> int | None:
        place = str(path).split("/")[-3:]
        if not all(part.isascii() and part.isdigit() and len(part) < 20 for part in place):
            return None
        at, counts = tuple(map(int, place)), self._plan.counts
        if len(at) != len(counts) or any(a >= n for a, n in zip(at, counts, strict=True)):
            return None
        tile = (at[0] * counts[1] + at[1]) * counts[2] + at[2]
        return tile if self._shard(name, tile) == path else None

    # Making again

    def _prepare(self) -> Segmentation:
        """The run that made this store, as its event log tells it.

        Raises:
            InputError: if input or model are not there or not the same any more.
        """
        starts = (e for e in read_events(self._path / EVENTS) if e.get("event") == "start")
        *_, last = ({}, *starts)
        source, model = last.get("input"), last.get("model")
        try:
            if not isinstance(source, str) or not isinstance(model, str):
                raise InputError("its event log does not say of which input and model it was made")
            return prepare(source, model, self._path, self._settings())
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            # What comes after it is for those who segment.
            reason = str(error).partition("; ")[0].rstrip(".")
            raise InputError(
                f"{self._path}: its tiles cannot be made again: {reason}; put back input and "
                "model as they were, or check without them: --tiles 0 and no --repair."
            ) from error

    def _settings(self) -> Settings:
        """What fixes the bytes, as the store tells it."""
        told, source = self._told, self._told["input"]
        return Settings(
            channel=source["channel"],
            time=source["time"],
            level=source["level"],
            memory=sys.maxsize,  # the plan of the store is kept, whatever it needs
            precision=told["precision"],
            tta=told["tta"],
            nan=told["nan"],
        )

    def _recompute(self, run: Segmentation, tiles: Iterable[int]) -> None:
        def compare(tile: int, result: Mapping[str, NDArray[np.uint8]]) -> None:
            found = self._differing(tile, result)
            if found:
                self._bad[tile] = found
                self._strange.append(tile)
            elif any(np.ptp(voxels) for voxels in result.values()):
                self._agreed.append(tile)

        with closing(self._made("verify", run, tiles, compare)) as receipts:
            for receipt in receipts:
                if receipt.error:
                    self._failed.append(
                        f"{self._path}: tile {receipt.tile} cannot be made again: {receipt.error}"
                    )
                else:
                    self._recomputed.append(receipt.tile)

    def _differing(self, tile: int, result: Mapping[str, NDArray[np.uint8]]) -> dict[str, str]:
        """What is wrong with each output of a tile that does not hold the voxels of `result`."""
        found = {}
        z, y, x = self._plan[tile].crop.slices
        for name in self._outputs:
            voxels = result[name][..., z, y, x]
            try:
                differing = int(np.count_nonzero(self.decode(name, tile) != voxels))
            except DamageError as error:  # since it was checked
                found[name] = str(error)
                continue
            if differing:
                found[name] = f"differs from the tile made again, in {differing} values"
        return found

    def _made(
        self,
        stage: str,
        run: Segmentation,
        tiles: Iterable[int],
        use: Callable[[int, Mapping[str, NDArray[np.uint8]]], None],
    ) -> Receipts:
        """Makes tiles again and hands the outputs of each to `use`."""
        # The empty store is known to be sound, and nothing is written there.
        worker = _Again(replace(run, out=self._empty), use)
        return engines.run(Stage(stage, lambda: worker, run.device), tiles, "local")

    def _repair(self, run: Segmentation, lease: Lease) -> None:
        """Writes damaged files again, and checks them again."""
        for path in self._metadata:
            self._write_metadata(path, lease.fence.hold)
        self._metadata = self._check_metadata()
        outputs = {tile: list(found) for tile, found in self._bad.items()}

        def write(tile: int, result: Mapping[str, NDArray[np.uint8]]) -> None:
            for name in outputs[tile]:
                refuse_link(self._path, self._shard(name, tile).parent)
            # Of the store's outputs those that are sound are left alone.
            store = Store(self._path, outputs[tile], lease.fence.hold)
            store.write(self._plan[tile], result)

        with closing(self._made("repair", run, sorted(outputs), write)) as receipts:
            for receipt in receipts:
                lease.check(now=receipt.verdict == "stop")
                self._repaired_or_not(receipt)
        lease.check(now=True)

    def _repaired_or_not(self, receipt: Receipt) -> None:
        if receipt.verdict == "stop":
            raise RunError(f"{self._path}: {receipt.error}; make room and repair again.")
        if receipt.error:
            self._failed.append(
                f"{self._path}: tile {receipt.tile} cannot be repaired: {receipt.error}"
            )
        elif self._check_tile(receipt.tile):
            self._repaired.append(receipt.tile)

    def _write_metadata(self, path: Place, guard: Guard) -> None:
        try:
            refuse_link(self._path, path.parent)
            expected = self._empty / str(path)[len(str(self._path)) + 1 :]
            write_whole(path, expected.read_bytes(), self._path / PRIVATE, guard)
        except LostError:
            raise
        except (OSError, RunError) as error:
            self._failed.append(f"{path}: cannot be repaired: {error}.")


class _Checking:
    """A worker that only looks at a tile."""

    def __init__(self, look: Callable[[int], object]) -> None:
        self._look = look

    def read(self, tile: int) -> None:
        self._look(tile)

    def predict(self, tile: int, voxels: None) -> None:
        """Nothing."""

    def write(self, tile: int, result: None) -> None:
        """Nothing."""


class _Again:
    """A worker that makes tiles as they were made, and lets another have what comes out."""

    def __init__(
        self, run: Segmentation, use: Callable[[int, Mapping[str, NDArray[np.uint8]]], None]
    ) -> None:
        worker = run.make_worker()
        self.read, self.predict, self.write = worker.read, worker.predict, use


def _numbers(done: NDArray[np.bool_]) -> Iterator[int]:
    """Where `done` is true, in ascending order, without a list of them all."""
    return (tile for tile in range(done.size) if done[tile])
