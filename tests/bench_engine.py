"""What Ray costs beside a plain loop, and how many tiles one driver feeds."""

import os
import statistics
import tempfile
import time
from pathlib import Path
from threading import Thread

import torch

from tests.test_segmentation import noise, random_model, write_stack
from unet_ray import engine
from unet_ray.attempts import Stage
from unet_ray.planning import Settings
from unet_ray.segmentation import prepare
from unet_ray.stores import StoreLayout, create_store

WORKERS = 2
EMPTY_TILES = 3000
TILES_EACH = 12


class Idle:
    """A worker with nothing to do."""

    def read(self, tile):
        """Nothing."""

    def predict(self, tile, voxels):
        """Nothing."""

    def write(self, tile, result):
        """Nothing."""


def fed(largest):
    """Tiles per second of workers that do nothing, from the second wave on."""
    engine.LARGEST_BLOCK = largest
    stage, told = Stage("idle", Idle, "cpu"), []
    for _ in engine.run(stage, range(EMPTY_TILES), "ray", WORKERS):
        told.append(time.monotonic())
    first = WORKERS * 2 if largest == 1 else engine.FIRST_WAVE
    return (len(told) - first) / (told[-1] - told[first])


def task(folder):
    """A run of a real network (16 channels, depth 4) whose tiles take a second or more."""
    tiles = 2 * WORKERS * TILES_EACH
    volume = write_stack(folder / "volume.tif", noise((4 * tiles, 1024, 1024)))
    model = random_model(folder / "model.safetensors", depth=4, base=16)
    run = prepare(volume, model, folder / "out", Settings(tile=(4, 1024, 1024)))
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
    told, start = [], time.monotonic()
    first = WORKERS * TILES_EACH
    for receipt in engine.run(stage, range(first, 2 * first), "ray", WORKERS):
        told.append((time.monotonic(), receipt.seconds))
    begun = told[2 * WORKERS - 1][0]
    busy = [(at, seconds) for at, seconds in told if begun < at][: -WORKERS + 1 or None]
    took = busy[-1][0] - begun
    return told[0][0] - start, WORKERS * took / len(busy), sum(s for _, s in busy) / took / WORKERS


def main():
    """Prints both."""
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
    one, many = fed(1), fed(64)
    print(f"tiles that do nothing: {one:.1f} a second one by one, {many:.0f} in larger blocks")


if __name__ == "__main__":
    main()
