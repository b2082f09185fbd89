"""From a volume and a model to a store: plan -> read -> predict -> write, and what is left to do.

Knows how the pieces fit: what fixes the bytes of a run, which tiles are missing, who runs them.
The arithmetic, the network, the files and the engines are in rooms of their own.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from unet_ray import engine as engines
from unet_ray.attempts import DISK_ERRORS, TRIES, Patience, Receipt, Stage, is_out_of_memory
from unet_ray.boxes import Box
from unet_ray.checkpoints import ModelHeader, find_model, read_model, sha256_of
from unet_ray.errors import (
    InputError,
    LostError,
    QuarantinedError,
    RunError,
    VoxelError,
    refuse_below_file,
)
from unet_ray.events import EventLog
from unet_ray.intensity import Intensity, measure
from unet_ray.lease import Fence, Lease
from unet_ray.ledger import Ledger, begin, committed, newest, skipped
from unet_ray.masks import open_mask, tiles_under
from unet_ray.memory import WorkerMemory, format_bytes, room
from unet_ray.mirror import read_mirrored, reflect
from unet_ray.pilot import try_tiles
from unet_ray.places import (
    Place,
    Where,
    files_below,
    place_of,
    remove_partial,
    remove_tree,
    unusable,
)
from unet_ray.planning import (
    SAMPLE,
    Settings,
    checked_outputs,
    choose_plan,
    device_of,
    most_bytes,
    needed_memory,
    network_size,
    open_inputs,
    plan,
    precision_of,
    process_bytes,
    spread,
    stored_values,
    under_way,
)
from unet_ray.prediction import Device, Precision, Predictor, instructions
from unet_ray.stores import (
    BEGUN,
    EVENTS,
    FORMAT,
    LEDGER,
    PRIVATE,
    Store,
    StoreLayout,
    create_store,
    is_untouched,
    provenance_of,
    refuse_others,
    remove_deleted,
)
from unet_ray.tiles import TilePlan
from unet_ray.versions import versions
from unet_ray.volumes import Volume

# Told in the store, but another version of these gives the same bytes.
MARGIN = 1.5  # by which a few tiles may be mistaken about what all of them store
PIECE = 1 << 16  # tiles whose numbers are in memory at once
UNCOMPARED = ("versions.numpy", "versions.zarr")


@dataclass(frozen=True)
class Segmentation:
    """A run that is ready to start: everything that fixes its bytes.

    Attributes:
        volume: the input.
        model: the model file.
        out: the output store.
        plan: the tiles.
        intensity: grey values of the volume.
        precision, device: of the network.
        tta: average over the 8 symmetries of the square.
        nan: ``zero`` if voxels that are not finite count as 0.
        outputs: what is stored.
        class_values: label value of each class.
        memory: what one worker needs.
        provenance: all of this as JSON, kept in the store and compared when a run goes on.
        resumed: the store was there already and is continued.
        mask: shows which tiles are asked for; None for all.
        fence: keeps workers from writing once the run has lost its output; None for no such run.
    """

    volume: Volume
    model: Path
    out: Place
    plan: TilePlan
    intensity: Intensity
    precision: Precision
    device: Device
    tta: bool
    nan: str
    outputs: tuple[str, ...]
    class_values: tuple[int, ...]
    memory: WorkerMemory
    provenance: Mapping[str, Any]
    resumed: bool
    mask: Volume | None = None
    fence: Fence | None = None

    def make_worker(self) -> TileWorker:
        """The worker of the segment stage, for the process that runs it."""
        return TileWorker(self)


class TileWorker:
    """Reads, predicts and writes tiles of one run; may be shared by threads."""

    def __init__(self, run: Segmentation) -> None:
        self._run = run
        network, _ = read_model(run.model)
        self._predictor = Predictor(
            network, run.plan, run.intensity, run.precision, run.device, run.tta
        )
        self._store = Store(run.out, run.outputs, run.fence.look if run.fence else None)

    def read(self, tile: int) -> NDArray[Any]:
        """The voxels that a tile reads, ``(c, z, y, x)``, mirrored beyond the volume's faces.

        Raises:
            VoxelError: if one of them is not a finite number; names the tile and the voxel.
        """
        volume, box = self._run.volume, self._run.plan[tile].read
        voxels = read_mirrored(volume.read, volume.shape[1:], box)
        if voxels.dtype.kind != "f" or np.isfinite(voxels).all():
            return voxels
        if self._run.nan == "zero":
            return np.where(np.isfinite(voxels), voxels, voxels.dtype.type(0))
        raise VoxelError(_not_finite(self._run, tile, voxels))

    def predict(self, tile: int, voxels: NDArray[Any]) -> dict[str, NDArray[np.uint8]]:
        """The outputs on the core of a tile."""
        return self._predictor(self._run.plan[tile], voxels, self._run.outputs)

    def write(self, tile: int, result: dict[str, NDArray[np.uint8]]) -> None:
        """Writes the shards of a tile and waits until they are on disk."""
        self._store.write(self._run.plan[tile], result)


def _not_finite(run: Segmentation, tile: int, voxels: NDArray[Any]) -> str:
    volume, box = run.volume, run.plan[tile].read
    channel, *offset = np.argwhere(~np.isfinite(voxels))[0].tolist()
    seen = zip(box.start, offset, volume.shape[1:], strict=True)
    place = tuple(int(reflect(np.array(a + n), extent)) for a, n, extent in seen)
    return (
        f"{volume.path}: voxel (z, y, x) = {place} of channel {channel} is "
        f"{voxels[(channel, *offset)]}, read by tile {tile} ({run.plan[tile].write}); replace "
        f"values that are not finite, or give --nan zero and another --out."
    )


def prepare(
    source: Where,
    model: str | os.PathLike[str],
    out: Where,
    settings: Settings,
) -> Segmentation:
    """Checks everything and fixes what the bytes of the run depend on; writes nothing.

    Where the store exists, its plan, precision and normalisation are kept, so that a rerun from
    another machine or with another memory allowance goes on with the same bytes.

    Raises:
        InputError: for anything wrong with input, model, settings or an existing store.
    """
    volume, network, header = open_inputs(source, model, settings)
    path = place_of(out)
    if isinstance(path, Path):
        refuse_below_file(path)
    for read in (volume.path, find_model(model), *([settings.mask] if settings.mask else [])):
        _check_output(path, place_of(read))
    told = _told_by(path, settings.overwrite)
    device: Device = told["device"] if told else device_of(settings)
    if told and device == "cuda" and device_of(settings) != "cuda":
        raise InputError(f"{path}: was begun on a GPU, and there is none here; run it on one.")
    precision = settings.precision or (
        told["precision"] if told else precision_of(device, settings)
    )
    outputs = checked_outputs(settings.outputs or (tuple(told["outputs"]) if told else None))
    size, values = (
        network_size(network, precision, settings.tta),
        stored_values(network.classes, outputs),
    )
    if told and not settings.tile:
        tiles = TilePlan.from_json(told["plan"])
        memory = needed_memory(size, tiles, volume, values)
        memory = memory.on(settings.engine)
        _check_memory(memory, settings, path)
    else:
        tiles, memory = choose_plan(volume, network, size, settings, values)
    run = Segmentation(
        volume=volume,
        model=find_model(model),
        out=path,
        plan=tiles,
        intensity=Intensity.from_json(told["normalisation"]) if told else measure(volume),
        precision=precision,
        device=device,
        tta=settings.tta,
        nan=settings.nan,
        outputs=outputs,
        class_values=tuple(header.class_values),
        memory=memory,
        provenance={},
        resumed=told is not None,
        mask=open_mask(settings.mask, volume.shape[1:]) if settings.mask else None,
    )
    run = replace(run, provenance=_provenance(run, header, settings))
    if told:
        _refuse_difference(path, told, run.provenance)
    _check_room(run, settings)
    return run


def _told_by(path: Place, anew: bool) -> dict[str, Any] | None:
    """How the store at `path` was made that is to be continued; None if there is none to be."""
    try:
        if not anew:
            told = provenance_of(path)
            return None if is_untouched(path) else told
        refuse_others(path)
        return None
    except OSError as error:
        raise InputError(unusable(path, error)) from error


def _check_output(path: Place, read: Place) -> None:
    """Refuses a store that would lie in, or hold, something that is read."""
    there, source = (
        PurePath(os.path.realpath(p) if isinstance(p, Path) else str(p)) for p in (path, read)
    )
    if there == source or there in source.parents or source in there.parents:
        raise InputError(f"{path}: overlaps {read}, which is read; choose another --out.")


def _check_memory(memory: WorkerMemory, settings: Settings, path: Place) -> None:
    if memory.total > settings.memory:
        raise InputError(
            f"{path}: its plan needs {format_bytes(memory.total)} per worker, "
            f"{format_bytes(settings.memory)} allowed; give --memory {memory.total} or more, or "
            f"another --out."
        )


def _check_room(run: Segmentation, settings: Settings) -> None:
    """Refuses more workers in this process than the machine has memory for; Ray's are elsewhere."""
    there = room()
    if settings.engine == "ray" or not there:
        return
    needed = process_bytes(run.memory, run.device, settings)
    if needed > there:
        workers = engines.side_by_side(run.device, "local", settings.workers)
        fitting = [n for n in range(1, workers) if run.memory.shared_by(n) <= there]
        remedy = f"--workers {fitting[-1]}" if fitting else "a smaller --memory and another --out"
        raise InputError(
            f"{run.out}: {workers} workers need {format_bytes(needed)} in this process, "
            f"{format_bytes(there)} could be had; give {remedy}."
        )


def _check_disk(run: Segmentation, settings: Settings, left: NDArray[np.bool_]) -> None:
    """Refuses what the disk cannot hold by far; tries some tiles only where it might not.

    Raises:
        InputError: if what the tiles that are left store, as a few of them tell, is far more than
            is free.
    """
    free, tiles = _free(run, settings), int(left.sum())
    most = most_bytes(run.plan, stored_values(len(run.class_values), run.outputs)) * tiles
    if most <= free:
        return
    stored = _stored(run, settings, np.flatnonzero(left)) * tiles
    if stored > MARGIN * free:
        raise InputError(
            f"{run.out}: its {tiles} tiles would take about {format_bytes(stored)} "
            f"({format_bytes(most)} at most), {format_bytes(free)} are free there; make room, "
            "choose another --out, or store less, as with --outputs classes or a --region."
        )


def _free(run: Segmentation, settings: Settings) -> float:
    """Bytes that may be written where the store is to be; infinite where nobody knows."""
    if not isinstance(run.out, Path):
        return math.inf
    disk = shutil.disk_usage(next(p for p in (run.out, *run.out.parents) if p.exists()))
    old = 0
    for path in files_below(run.out) if settings.overwrite else ():
        with suppress(FileNotFoundError):  # of a run that is still writing there
            old += os.lstat(str(path)).st_size
    return disk.free + old if disk.total else math.inf


def _stored(run: Segmentation, settings: Settings, tiles: NDArray[np.intp]) -> float:
    """Bytes of one of these tiles on disk, as a few of them tell; 0 if they cannot be tried."""
    z, y, x = run.plan.core
    asked = replace(
        settings,
        region=None,
        mask=None,
        tile=(z, y, x),
        memory=sys.maxsize,
        outputs=run.outputs,
        precision=run.precision,
    )
    try:
        outlook = plan(run.volume.path, run.model, asked)
        trial = try_tiles(replace(outlook, sample=tuple(spread(tiles, SAMPLE))), workers=1)
    except (RunError, OSError):  # of a bad chunk, or another disk: the run itself will tell
        return 0.0
    return trial.stored if trial else 0.0


def _provenance(run: Segmentation, header: ModelHeader, settings: Settings) -> dict[str, Any]:
    """Everything that fixes the bytes of a store, and nothing that does not."""
    channels = run.volume.shape[0]
    told = {
        "format": FORMAT,
        "model": {
            "sha256": sha256_of(run.model),
            "architecture": header.architecture,
            "training": header.training,
            "class_values": header.class_values,
        },
        "input": {
            **run.volume.identity(),
            # Not naming the only channel or time point is naming it.
            "channel": 0 if settings.channel is None and channels == 1 else settings.channel,
            "time": settings.time or 0,
            "level": settings.level,
        },
        "outputs": list(run.outputs),
        "plan": asdict(run.plan),
        "precision": run.precision,
        "normalisation": run.intensity.to_json(),
        "device": run.device,
        "tta": run.tta,
        "nan": run.nan,
        "instructions": instructions(run.device),
        "threads_per_pass": 1,
        "versions": versions(),
    }
    return cast(dict[str, Any], json.loads(json.dumps(told)))  # tuples become lists, as when read


def _refuse_difference(path: Place, told: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    there, here = dict(_flat(told)), dict(_flat(now))
    for field in UNCOMPARED:
        there.pop(field, None)
        here.pop(field, None)
    for field in [*here, *there]:
        if there.get(field) != here.get(field):
            raise InputError(
                f"{path}: was made with another {field} ({there.get(field)}, now "
                f"{here.get(field)}); choose another --out, or delete it with --overwrite."
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a tile.

    Attributes:
        done, total: tiles committed, and tiles asked for, in this region.
        quarantined: tiles that this call has given up.
        finished: tiles done by this call.
        voxels: voxels written by this call so far.
        seconds: since the first tile was started.
        failures: tries that failed in this call.
        held: the most bytes that a process held after a tile; 0 if unknown.
        promised: bytes that one was planned to hold at most.
    """

    done: int
    total: int
    quarantined: int
    finished: int
    voxels: int
    seconds: float
    failures: int = 0
    held: int = 0
    promised: int = 0


def execute(run: Segmentation, settings: Settings, watch: Callable[[Progress], None]) -> int:
    """Does what is missing of a run; returns the number of tiles that it did.

    A tile that fails is tried again after all others, and quarantined when that was of no use.

    Args:
        run: from `prepare`.
        settings: the same as given there.
        watch: called after each tile that is done or given up.

    Raises:
        QuarantinedError: if tiles failed too often; all others are done.
        InputError: if another run is writing there.
        LostError: if another run has taken over.
        RunError: if the disk takes nothing more. What was committed stays in either case, and the
            next run goes on from it.
    """
    wanted = wanted_tiles(run, settings)
    if run.resumed and not _left(run, wanted).any():
        return 0  # a finished store is not touched at all
    _check_disk(run, settings, _left(run, wanted) & wanted.tiles)
    try:
        with Lease(run.out / PRIVATE, settings.takeover, after=newest(run.out / LEDGER)) as lease:
            try:
                return _execute(run, settings, wanted, lease, watch)
            except OSError:
                lease.check(now=True)  # what another run deleted is no error of a disk
                raise
    except OSError as error:  # of ledger, lease or log, which lie on the same disk
        if error.errno not in DISK_ERRORS:
            raise
        raise RunError(_stopped(run, str(error.strerror))) from error
    except (RuntimeError, MemoryError) as error:  # of torch, while a worker is made
        if isinstance(error, RunError) or not is_out_of_memory(error):
            raise
        raise RunError(
            f"{run.out}: no memory for a worker ({error}); its plan is for "
            f"{format_bytes(run.memory.total)} each, {format_bytes(room())} could be had: give "
            "fewer --workers, or use a machine with more."
        ) from error


def _execute(
    run: Segmentation,
    settings: Settings,
    wanted: Wanted,
    lease: Lease,
    watch: Callable[[Progress], None],
) -> int:
    _open_store(run, settings, lease)
    lease.check(now=True)  # from here on what is half-written is of runs that are over
    remove_partial(run.out / PRIVATE)
    remove_partial(run.out / LEDGER)
    remove_deleted(run.out)
    with Ledger(run.out / LEDGER, len(run.plan), lease.epoch) as ledger:
        owned = replace(run, fence=lease.fence)
        execution = _Execution(owned, settings, wanted, lease, ledger, watch)
        try:
            return execution.go()
        finally:
            with suppress(LostError):  # then it is the log of another run
                execution.log.flush()


def _open_store(run: Segmentation, settings: Settings, lease: Lease) -> None:
    """Opens the store, or makes it; makes sure that what lies there is of this run."""
    told = None if settings.overwrite else _told_by(run.out, anew=False)
    if told is None:
        with lease.fence.hold():
            begin(run.out / LEDGER, lease.epoch)  # from here on nothing counts as done
        layout = StoreLayout(run.plan, run.class_values, run.outputs, run.volume.voxel_size)
        create_store(run.out, layout, run.provenance, lease.fence.hold)
    else:  # another may have made it since
        _refuse_difference(run.out, told, run.provenance)
    Store(run.out, run.outputs).require_plan(run.plan)


@dataclass(frozen=True)
class Wanted:
    """What was asked for: the tiles of a region, and of those the ones that a mask shows.

    Attributes:
        region: of the volume.
        tiles: bits of the tiles that are to be done, (tiles,).
        skipped: bits of those in the region that are not, (tiles,).
    """

    region: Box
    tiles: NDArray[np.bool_]
    skipped: NDArray[np.bool_]


def wanted_tiles(run: Segmentation, settings: Settings) -> Wanted:
    """Which tiles of a run were asked for."""
    region = settings.region or Box.of(run.plan.shape)
    inside = np.zeros(run.plan.counts, bool)
    inside[run.plan.part(region).slices] = True
    shown = tiles_under(run.mask, run.plan) if run.mask else np.ones(1, bool)
    return Wanted(region, (inside & shown).ravel(), (inside & ~shown).ravel())


def _left(run: Segmentation, wanted: Wanted) -> NDArray[np.bool_]:
    """Bits of the tiles that are still to be done, or to be noted as skipped."""
    done = committed(run.out / LEDGER, len(run.plan))
    noted = skipped(run.out / LEDGER, len(run.plan)) if wanted.skipped.any() else done
    return (wanted.tiles & ~done) | (wanted.skipped & ~done & ~noted)


def promised_memory(run: Segmentation, settings: Settings) -> int:
    """Bytes of a process in which tiles run: a worker's, or all workers' of this process."""
    return process_bytes(run.memory, run.device, settings)


def _numbers(bits: NDArray[np.bool_]) -> Iterator[int]:
    """Where `bits` are true, in ascending order, without a list of them all."""
    for start in range(0, bits.size, PIECE):
        yield from (start + np.flatnonzero(bits[start : start + PIECE])).tolist()


def _stopped(run: Segmentation, error: str) -> str:
    done = int(committed(run.out / LEDGER, len(run.plan)).sum())
    return (
        f"{run.out}: {error}; {done} of {len(run.plan)} tiles are done and stay: make room, and "
        "give the same command again."
    )


class _Execution:
    """One call of `execute`: what it has done so far, in ledger, event log and progress."""

    def __init__(
        self,
        run: Segmentation,
        settings: Settings,
        wanted: Wanted,
        lease: Lease,
        ledger: Ledger,
        watch: Callable[[Progress], None],
    ) -> None:
        self._run, self._settings, self._watch = run, settings, watch
        self._lease, self._ledger = lease, ledger
        self.log = EventLog(run.out / EVENTS, lease.fence.check)
        self._wanted, self._total = wanted, int(wanted.tiles.sum())
        self._start, self._before, self._done, self._voxels = time.monotonic(), 0, 0, 0
        self._given_up: dict[int, str] = {}
        self._failures, self._held = 0, 0
        self._promised = promised_memory(run, settings)

    def go(self) -> int:
        run, settings = self._run, self._settings
        self._lease.check(now=True)
        if self._wanted.skipped.any():
            self._ledger.skip(self._wanted.skipped)
        missing = self._wanted.tiles & ~self._ledger.committed
        self._before = self._total - int(missing.sum())
        self.log.add(
            "start",
            input=run.volume.path,
            model=str(run.model.absolute()),
            engine=settings.engine,
            workers=settings.workers,
            missing=self._total - self._before,
            **({"mask": run.mask.path} if run.mask else {}),
        )
        begun = run.out / BEGUN
        remove_tree(begun)
        begun.mkdir()
        ahead = under_way(run.memory, run.device, settings)
        self._stage = Stage("segment", run.make_worker, run.device, begun, under_way=ahead)
        self._patience = Patience(self._stage.deadline)
        again = self._try(_numbers(missing))
        for last in [False] * (TRIES - 2) + [True]:
            crowd = [receipt.tile for receipt in again if receipt.verdict == "again"]
            again = [receipt for receipt in again if receipt.verdict == "alone"]
            again += self._try(crowd, last) if crowd else []
            alone = [receipt.tile for receipt in again if receipt.verdict == "alone"]
            again = [receipt for receipt in again if receipt.verdict == "again"]
            again += self._try(alone, last=True, alone=True) if alone else []
        self._lease.check(now=True)  # else it would tell of the work of another
        self.log.add("end", tiles=self._done, seconds=round(self._seconds, 3))
        if self._given_up:
            raise QuarantinedError(self._told())
        return self._done

    def _try(self, tiles: Iterable[int], last: bool = False, alone: bool = False) -> list[Receipt]:
        """Tries tiles; gives the failures of those that are to be tried again."""
        failed: dict[int, Receipt] = {}
        settings = self._settings
        # Workers that are made anew have measured nothing yet.
        deadline = replace(self._stage.deadline, first=self._patience.limit)
        stage = replace(self._stage, deadline=deadline)
        trying = engines.run(stage, tiles, settings.engine, settings.workers, alone)
        with closing(trying) as receipts:
            for receipt in receipts:
                self._lease.check()
                self._patience.saw(receipt)
                if not receipt.error:
                    failed.pop(receipt.tile, None)
                    self._commit(receipt)
                elif self._failed(receipt, last, alone):
                    failed[receipt.tile] = receipt
        return [*failed.values()]

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _commit(self, receipt: Receipt) -> None:
        self._given_up.pop(receipt.tile, None)  # it ended after all
        self._ledger.commit(receipt.tile)
        self.log.add("tile", tile=receipt.tile, seconds=round(receipt.seconds, 4))
        self._done += 1
        self._voxels += self._run.plan[receipt.tile].write.size
        self._held = max(self._held, receipt.held)
        self._tell()

    def _failed(self, receipt: Receipt, last: bool, alone: bool) -> bool:
        """Notes a failure; whether the tile is to be tried again in this run."""
        if receipt.verdict == "stop":
            self._lease.check(now=True)  # a worker may have found out first
        tile, box = receipt.tile, str(self._run.plan[receipt.tile].write)
        error = receipt.error + (self._fitting(receipt.room) if receipt.room else "")
        self._failures += 1
        self.log.add("failed", tile=tile, box=box, error=error, trace=receipt.trace)
        if receipt.verdict == "stop":
            self._ledger.flush()
            raise RunError(_stopped(self._run, error))
        if receipt.verdict == "broken":
            raise RunError(
                f"{self._run.out}: tile {tile} ({box}): {error}; the GPU cannot be used any more "
                "in this process: give the same command again, it goes on."
            )
        given_up = {"again": last, "alone": alone}.get(receipt.verdict, True)
        if not given_up:
            return True
        self._ledger.quarantine(tile)
        self.log.add("quarantined", tile=tile, box=box, error=error)
        self._given_up[tile] = error
        self._tell()
        return False

    def _fitting(self, room: int) -> str:
        """What to do about a lack of memory where a worker could have had `room` bytes."""
        planned = self._run.memory.total
        # A worker that failed within its plan had less than the system says; and all have more.
        fits = min(int(0.9 * room), int(0.75 * planned)) >> 20
        return (
            f" The plan of this store is for {format_bytes(planned)} per worker, and "
            f"{format_bytes(room)} could be had: give --memory {fits}MiB and another --out."
        )

    def _tell(self) -> None:
        done, given_up = self._before + self._done, len(self._given_up)
        self._watch(
            Progress(
                done,
                self._total,
                given_up,
                self._done,
                self._voxels,
                self._seconds,
                self._failures,
                self._held,
                self._promised,
            )
        )

    def _told(self) -> str:
        tile, error = next(iter(self._given_up.items()))
        return (
            f"{self._run.out}: quarantined {len(self._given_up)} of {self._total} tiles, all "
            f"others are done; the first is tile {tile} ({self._run.plan[tile].write}): {error} "
            "The same command tries only these again."
        )


def segment(
    source: Where,
    model: str | os.PathLike[str],
    out: Where,
    settings: Settings | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Place:
    """Segments one volume into a store, or goes on with it where it stopped.

    Args:
        source: path of the volume.
        model: RUN folder or model file.
        out: path of the store.
        settings: what to do otherwise than by default.
        watch: called after each tile.

    Returns:
        Path of the store.

    Raises:
        InputError: for anything wrong with input, model, settings or an existing store.
        QuarantinedError: if tiles failed too often; all others are done.
        RunError: if the disk takes nothing more.
    """
    settings = settings or Settings()
    run = prepare(source, model, out, settings)
    execute(run, settings, watch)
    return run.out


def prepare_all(
    sources: Sequence[str], model: str, out: str, settings: Settings
) -> list[Segmentation]:
    """Prepares every input before any is run; see `prepare` and `output_paths`.

    Raises:
        InputError: also if a store would overlap the input of another.
    """
    stores = output_paths(sources, out)
    runs = [
        prepare(source, model, store, settings)
        for source, store in zip(sources, stores, strict=True)
    ]
    for run in runs:
        for each in runs:
            _check_output(run.out, place_of(each.volume.path))
    return runs


def output_paths(sources: Sequence[str], out: str) -> list[Place]:
    """The store of each input: `out` itself for one, a store each in folder `out` for several.

    Raises:
        InputError: if two inputs would share a store.
    """
    if len(sources) == 1:
        return [place_of(out)]
    names = [Path(source).name for source in sources]
    stems = [re.sub(r"(\.ome)?\.(tiff?|zarr|png)$", "", name, flags=re.I) for name in names]
    for stem in stems:
        if stems.count(stem) > 1:
            raise InputError(f"Two inputs are named {stem!r}: run them with an --out each.")
    return [place_of(out) / f"{stem}.zarr" for stem in stems]
