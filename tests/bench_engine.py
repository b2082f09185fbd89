"""What Ray costs beside a plain loop, and how many tiles one driver feeds."""

import os
import statistics
import tempfile
import time
from pathlib import Path
from threading import Thread

import torch

from tests.helper import Idle, noise, random_model, write_stack
from unet_ray.engine import engines as engine
from unet_ray.engine import pool
from unet_ray.engine.stages import Stage
from unet_ray.machine import memory_in_use
from unet_ray.segmentation.preparation import prepare
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.layout import StoreLayout
from unet_ray.storage.ledger import Ledger
from unet_ray.storage.stores import create_store
from unet_ray.units import format_bytes

WORKERS = 2
EMPTY_TILES = 3000
MANY_TILES = 1_000_000
TILES_EACH = 40


IDLE = Stage("idle", Idle, "cpu")


def fed_one_by_one(workers):
    """Tiles per second of `workers` that do nothing, in blocks of one tile."""
    times, largest = [], pool.LARGEST_BLOCK
    pool.LARGEST_BLOCK = 1
    for _ in engine.run(IDLE, range(EMPTY_TILES), "ray", workers):
        times.append(time.monotonic())
    pool.LARGEST_BLOCK = largest
    return (len(times) - 2 * workers) / (times[-1] - times[2 * workers])


def noted(folder):
    """Tiles per second that a driver hands out and notes; its bytes after some and after all."""
    count, begun, bytes_held = 0, 0.0, []
    with Ledger(folder, MANY_TILES) as ledger:
        for receipt in engine.run(IDLE, range(MANY_TILES), "ray", WORKERS):
            ledger.commit(receipt.tile)
            count += 1
            if count == pool.FIRST_WAVE:
                begun = time.monotonic()
            if count in (MANY_TILES // 10, MANY_TILES):
                bytes_held.append(memory_in_use())
        seconds = time.monotonic() - begun
    return (MANY_TILES - pool.FIRST_WAVE) / seconds, *bytes_held


def task(folder, slab=4, tiles=2 * WORKERS * TILES_EACH):
    """A run of a real network (16 channels, depth 4) whose tiles take a second or more."""
    volume = write_stack(folder / "volume.tif", noise((slab * tiles, 1024, 1024)))
    model = random_model(folder / "model.safetensors", depth=4, base=16)
    run = prepare(volume, model, folder / "out", Settings(tile=(slab, 1024, 1024)))
    layout = StoreLayout(run.plan, run.class_values, run.outputs, None)
    create_store(run.out, layout, run.provenance)
    return run


def looped(run):
    """Seconds of a tile in plain loops, one on each core, with one thread per pass."""
    torch.set_num_threads(1)
    worker, seconds = run.make_worker(), []

    def loop(first):
        torch.set_num_threads(1)
        for tile in range(first, first + TILES_EACH):
            start = time.monotonic()
            worker.write(tile, worker.predict(tile, worker.read(tile)))
            seconds.append(time.monotonic() - start)

    threads = [Thread(target=loop, args=(n * TILES_EACH,)) for n in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.mean(seconds[WORKERS:])


def steady(run):
    """Start-up of the actors; then seconds of a tile by the clock, and the share of work in it."""
    stage = Stage("segment", run.make_worker, run.device)
    receipts, start = [], time.monotonic()
    first = WORKERS * TILES_EACH
    for receipt in engine.run(stage, range(first, 2 * first), "ray", WORKERS):
        receipts.append((time.monotonic(), receipt.seconds))
    begun = receipts[2 * WORKERS - 1][0]
    busy = [(at, seconds) for at, seconds in receipts if begun < at][: -WORKERS + 1 or None]
    took = busy[-1][0] - begun
    return (
        receipts[0][0] - start,
        WORKERS * took / len(busy),
        sum(s for _, s in busy) / took / WORKERS,
    )


def main():
    """Prints all."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    with tempfile.TemporaryDirectory() as name:
        run = task(Path(name))
        before = looped(run)
        start, took, busy = steady(run)
        after = looped(run)
    loop = statistics.mean([before, after])
    print(f"a tile of 4 x 1024 x 1024, {WORKERS} at a time, one thread each, {run.precision}")
    print(f"  loop {loop:.3f} s ({before:.3f} before, {after:.3f} after), Ray {took:.3f} s")
    print(f"  Ray at {loop / took:.3f} of it, workers busy {busy:.3f}, first after {start:.1f} s")
    with tempfile.TemporaryDirectory() as name:
        rate, some, all_of_them = noted(Path(name))
    print(f"tiles that do nothing: {rate:.0f} a second, noted in a ledger; the driver holds")
    print(
        f"  {format_bytes(some)} after {MANY_TILES // 10} of them, {format_bytes(all_of_them)} "
        f"after {MANY_TILES}"
    )
    one = fed_one_by_one(WORKERS)
    print(f"  one by one {one:.1f} a second to {WORKERS} workers")


if __name__ == "__main__":
    main()
