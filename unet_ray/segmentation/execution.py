"""A prepared run, executed: its store opened or made, its stage run to the end under a lease.

Knows what `segment` adds to a stage. Does not know how tiles are tried, or what is in one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from unet_ray.engine.attempts import DISK_ERRORS, is_out_of_memory
from unet_ray.engine.rounds import Progress, Rounds, stopped
from unet_ray.engine.stages import Receipt, Stage
from unet_ray.errors import RunError
from unet_ray.machine import memory_available
from unet_ray.segmentation.memory import (
    helper_bytes,
    in_flight,
    needed_bytes,
    process_bytes,
    together,
)
from unet_ray.segmentation.preparation import (
    Request,
    pending_tiles,
    stored_at,
    wanted_tiles,
)
from unet_ray.segmentation.run import Segmentation, refuse_difference
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.layout import LEDGER, PRIVATE, SEGMENT, StoreLayout
from unet_ray.storage.lease import Lease
from unet_ray.storage.ledger import begin, newest
from unet_ray.storage.places import remove_partial
from unet_ray.storage.stores import Store, create_store, remove_deleted
from unet_ray.units import format_bytes


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
    if run.resumed and not pending_tiles(run, wanted).any():
        return 0  # a finished store is not touched at all
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
        raise stopped(run.out, SEGMENT, len(run.plan), str(error.strerror)) from error
    except (RuntimeError, MemoryError) as error:  # of torch, while a worker is made
        if isinstance(error, RunError) or not is_out_of_memory(error):
            raise
        raise RunError(
            f"{run.out}: no memory for a worker ({error}); the plan needs "
            f"{format_bytes(run.memory.total)} each, {format_bytes(memory_available())} are "
            "available: give fewer --workers, or use a machine with more memory."
        ) from error


def _execute(
    run: Segmentation,
    settings: Settings,
    wanted: Request,
    lease: Lease,
    watch: Callable[[Progress], None],
) -> int:
    _open_store(run, settings, lease)
    lease.check(now=True)  # from here on what is half-written is of runs that are over
    remove_partial(run.out / PRIVATE)
    remove_deleted(run.out)
    rounds = Rounds(
        _stage(replace(run, fence=lease.fence), settings),
        run.plan,
        run.out,
        lease,
        settings.engine,
        settings.workers,
        watch,
        max(kind(run.memory, run.device, settings) for kind in (process_bytes, helper_bytes)),
        partial(_remedy, run),
    )
    mask = {"mask": run.mask.path} if run.mask else {}
    return rounds.run(
        wanted.tiles,
        wanted.skipped,
        input=run.volume.path,
        model=str(run.model.absolute()),
        **mask,
    )


def _stage(run: Segmentation, settings: Settings) -> Stage:
    return Stage(
        SEGMENT,
        run.make_worker,
        run.device,
        in_flight=in_flight(run.memory, run.device, settings),
        together=together(run.memory, run.device, settings),
        memory=needed_bytes(run.memory, run.device, settings),
        make_helper=run.make_helper,
    )


def _remedy(run: Segmentation, receipt: Receipt) -> str:
    """What to do about a lack of memory where a worker could have had `receipt.room` bytes."""
    planned = run.memory.total
    # A worker that failed within its plan had less than the system says; and all have more.
    fits = min(int(0.9 * receipt.room), int(0.75 * planned)) >> 20
    return (
        f" The plan of this store is for {format_bytes(planned)} per worker, and "
        f"{format_bytes(receipt.room)} could be had: give --memory {fits}MiB and another --out."
    )


def _open_store(run: Segmentation, settings: Settings, lease: Lease) -> None:
    """Opens the store, or makes it; makes sure that it is of this run."""
    stored = None if settings.overwrite else stored_at(run.out, overwrite=False)
    if stored is None:
        with lease.fence.hold():
            begin(run.out / LEDGER, lease.epoch)  # from here on nothing counts as done
        layout = StoreLayout(run.plan, run.class_values, run.outputs, run.volume.voxel_size)
        create_store(run.out, layout, run.provenance, lease.fence.hold)
    else:  # another may have made it since
        refuse_difference(run.out, stored, run.provenance)
    Store(run.out, run.outputs).require_plan(run.plan)
