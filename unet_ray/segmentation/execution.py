"""Execution of a prepared run: opens or creates its store and runs its stage under a lease.

Knows what `segment` adds to a stage. Does not know how the engine retries tiles, or how a tile is
computed.
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
from unet_ray.storage.ledger import begin, committed, newest
from unet_ray.storage.places import remove_partial
from unet_ray.storage.stores import Store, create_store, remove_deleted
from unet_ray.units import format_bytes, warn


def execute(run: Segmentation, settings: Settings, watch: Callable[[Progress], None]) -> int:
    """Computes the pending tiles of a run; returns their number.

    A failed tile is retried after all others and quarantined if the retries fail. After any error,
    the committed tiles stay in the store and the next run resumes from them.

    Args:
        run: the run that `prepare` returned.
        settings: the settings that were passed to `prepare`.
        watch: called after each tile that is committed or quarantined.

    Raises:
        QuarantinedError: if tiles were quarantined; all others are done.
        InputError: if another run is writing to the store.
        LostError: if another run has taken over the store.
        ChangedError: if the input or the model has changed since `prepare`.
        RunError: if the disk is full or read-only, or a worker does not fit into memory.
    """
    request = wanted_tiles(run, settings)
    if run.resumed and not pending_tiles(run, request).any():
        _require_metadata(run)
        return 0  # without a lease, so a finished store stays unchanged
    try:
        with Lease(run.out / PRIVATE, settings.takeover, after=newest(run.out / LEDGER)) as lease:
            try:
                return _execute(run, settings, request, lease, watch)
            except OSError:
                # If another run deleted the files, report the lost lease, not a disk error.
                lease.check(now=True)
                raise
    except OSError as error:  # ledger, lease and event log are on the same disk as the shards
        if error.errno not in DISK_ERRORS:
            raise RunError(
                f"{error.filename or run.out}: {error.strerror or error}. Check the disk, then run "
                "the same command again to resume."
            ) from error
        raise stopped(run.out, SEGMENT, len(run.plan), str(error.strerror)) from error
    except (RuntimeError, MemoryError) as error:  # torch raises them while a worker is created
        if isinstance(error, RunError) or not is_out_of_memory(error):
            raise
        raise RunError(
            f"{run.out}: not enough memory to start a worker ({error}); the plan needs "
            f"{format_bytes(run.memory.total)} per worker, {format_bytes(memory_available())} are "
            "available: set fewer --workers, or use a machine with more memory."
        ) from error


def _execute(
    run: Segmentation,
    settings: Settings,
    request: Request,
    lease: Lease,
    watch: Callable[[Progress], None],
) -> int:
    _open_store(run, settings, lease)
    # This run now owns the store, so all partial files are left over from earlier runs.
    lease.check(now=True)
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
        max(
            bytes_of(run.memory, run.device, settings) for bytes_of in (process_bytes, helper_bytes)
        ),
        partial(_memory_remedy, run),
    )
    mask = {"mask": run.mask.path} if run.mask else {}
    # Seen under the lease. A worker may also have marked a tile as done whose shard is gone.
    absent = ~Store(run.out, run.outputs).present(run.plan) if run.resumed else None
    if absent is not None:
        lost = request.tiles & absent & committed(run.out / LEDGER, len(run.plan))
        if count := int(lost.sum()):
            warn(f"{run.out}: committed tiles without a shard are computed again: {count}.")
    return rounds.run(
        request.tiles,
        request.skipped,
        absent,
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
        helper_memory=helper_bytes(run.memory, run.device, settings),
        make_helper=run.make_helper,
        check=run.refuse_changes,
    )


def _memory_remedy(run: Segmentation, receipt: Receipt) -> str:
    """The remedy for lack of memory; `receipt.room` is the number of bytes that were available."""
    planned = run.memory.total
    # A worker that failed within its plan had less memory than the system reports, so the
    # suggestion is also below the plan.
    suggested = min(int(0.9 * receipt.room), int(0.75 * planned)) >> 20
    return (
        f" This store's plan needs {format_bytes(planned)} per worker, and "
        f"{format_bytes(receipt.room)} were available: set --memory {suggested}MiB and another "
        "--out."
    )


def _open_store(run: Segmentation, settings: Settings, lease: Lease) -> None:
    """Opens or creates the store, and checks that it matches the run."""
    stored = None if settings.overwrite else stored_at(run.out, overwrite=False)
    if stored is None:
        with lease.fence.hold():
            # From now on no tile counts as committed.
            begin(run.out / LEDGER, lease.epoch, run.provenance.json)
        create_store(run.out, _layout(run), run.provenance, lease.fence.hold)
    else:  # another run may have created it since this one was prepared
        refuse_difference(run.out, stored, run.provenance)
    _require_metadata(run)


def _require_metadata(run: Segmentation) -> None:
    """Checks the metadata of the store, which decide where and how shards are written.

    Raises:
        RunError: if a metadata file is missing or differs from that of a new store; names it.
    """
    Store(run.out, run.outputs).require_metadata(_layout(run), run.provenance)


def _layout(run: Segmentation) -> StoreLayout:
    return StoreLayout(run.plan, run.class_values, run.outputs, run.volume.voxel_size)
