"""Execution of a prepared run: opens or creates its store and runs its stages under a lease.

Knows what `segment` adds to a stage, and the order of stages. Does not know how the engine retries
tiles, or how a tile is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from unet_ray.engine.attempts import DISK_ERRORS, is_out_of_memory
from unet_ray.engine.rounds import Progress, Rounds, stopped
from unet_ray.engine.stages import Deadline, Receipt, Stage
from unet_ray.errors import RunError
from unet_ray.machine import memory_available
from unet_ray.segmentation.chain import Link, chain_of
from unet_ray.segmentation.memory import (
    helper_bytes,
    in_columns,
    in_flight,
    needed_bytes,
    process_bytes,
    reserved_bytes,
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
from unet_ray.storage.layout import LEDGER, LEDGERS, PRIVATE, SEGMENT, StoreLayout
from unet_ray.storage.lease import Lease
from unet_ray.storage.ledger import begin, committed, newest_below
from unet_ray.storage.places import remove_partial
from unet_ray.storage.stores import Store, create_store, remove_deleted
from unet_ray.storage.written import ONE_TASK, source_of
from unet_ray.units import format_bytes, warn

JOIN_SECONDS = 86400.0  # limit of a task that unites all tiles of a volume


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
    if is_finished(run, request):
        _require_metadata(run)
        return 0  # without a lease, so a finished store stays unchanged
    try:
        newest = newest_below(run.out / LEDGERS)
        with Lease(run.out / PRIVATE, settings.takeover, after=newest) as lease:
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


def is_finished(run: Segmentation, request: Request) -> bool:
    """Returns whether no tile of any stage of a run is left to compute."""
    if not run.resumed or pending_tiles(run, request).any():
        return False
    links = chain_of(run.plan, run.outputs, run.factors, run.rules)
    source = source_of(run.out, run.plan) if links else None
    return source is None or not any(link.pending(run.out, source).any() for link in links)


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
    pending = pending_tiles(run, request) if run.resumed else request.tiles
    rounds = Rounds(
        _stage(replace(run, fence=lease.fence), settings, int(pending.sum())),
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
    absent = ~Store(run.out, run.predicted).present(run.plan) if run.resumed else None
    if absent is not None:
        lost = request.tiles & absent & committed(run.out / LEDGER, len(run.plan))
        if count := int(lost.sum()):
            warn(f"{run.out}: committed tiles without a shard are computed again: {count}.")
    tiles = rounds.run(
        request.tiles,
        request.skipped,
        absent,
        input=run.volume.path,
        model=str(run.model.absolute()),
        **mask,
    )
    return tiles + _run_links(replace(run, fence=lease.fence), settings, lease, watch)


def _run_links(
    run: Segmentation, settings: Settings, lease: Lease, watch: Callable[[Progress], None]
) -> int:
    """Runs the stages after the prediction; returns the number of their computed tiles."""
    links = chain_of(run.plan, run.outputs, run.factors, run.rules)
    source = source_of(run.out, run.plan) if links else None
    if links and source is None:
        missing = "objects and pyramid" if run.rules else "the pyramid"
        warn(f"{run.out}: {missing} follow when all tiles of the volume are segmented.")
        return 0
    return sum(_run_link(link, run, source, settings, lease, watch) for link in links if source)


def _run_link(
    link: Link,
    run: Segmentation,
    source: str,
    settings: Settings,
    lease: Lease,
    watch: Callable[[Progress], None],
) -> int:
    written = link.written
    if not link.pending(run.out, source).any():
        return 0
    if not link.continues(run.out, source):
        with lease.fence.hold():
            begin(run.out / written.ledger, lease.epoch, link.origin(source))
    stage = Stage(
        written.stage,
        partial(link.make_worker, run),
        "cpu",
        deadline=Deadline(first=JOIN_SECONDS) if written.plan == ONE_TASK else Deadline(),
        memory=run.memory.total,
        check=run.refuse_changes if link.reads_input else lambda: None,
    )
    rounds = Rounds(
        stage,
        written.plan,
        run.out,
        lease,
        settings.engine,
        settings.workers,
        watch,
        settings.memory if written.plan == ONE_TASK else process_bytes(run.memory, "cpu", settings),
        partial(_memory_remedy, run),
    )
    tiles = np.ones(len(written.plan), bool)
    return rounds.run(tiles, ~tiles, ~written.present(run.out))


def _stage(run: Segmentation, settings: Settings, tiles: int) -> Stage:
    stage = Stage(
        SEGMENT,
        run.make_worker,
        run.device,
        in_flight=in_flight(run.memory, run.device, settings),
        together=together(run.memory, run.device, settings),
        memory=needed_bytes(run.memory, run.device, settings),
        reserve=reserved_bytes(run.memory, run.device, settings, tiles),
        helper_memory=helper_bytes(run.memory, run.device, settings),
        make_helper=run.make_helper,
        check=run.refuse_changes,
    )
    return in_columns(stage, run.plan, settings)


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
    voxel_size = run.volume.voxel_size
    return StoreLayout(run.plan, run.class_values, run.outputs, voxel_size, run.factors)
