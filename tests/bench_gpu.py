"""How busy something like a GPU is kept: by one actor that reads and writes too, or by stages.

    python -m tests.bench_gpu

No GPU is needed: what predicts waits as long as a GPU would take. Tiles are read from plain TIFF,
and both outputs are written. As stages of Ray Data, readers, the GPU and writers are actors of
their own, and voxels and results (uint8) cross the object store between them.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from threading import Lock

import numpy as np
import ray.data
import tifffile
from ray.data import ActorPoolStrategy

from tests.test_segmentation import noise, random_model
from unet_ray import cluster, engine, pool
from unet_ray.attempts import Stage
from unet_ray.planning import GPU_TILES, Settings
from unet_ray.preparation import prepare, read_tile
from unet_ray.stores import StoreLayout, create_store

# All are the first few tiles, again and again, so that they need little room.
SLAB, TILES, DIFFERENT, SPEEDS = 16, 384, 32, (40, 60, 80)
WARM = pool.BLOCKS_EACH * pool.TILES_PER_GPU_BLOCK  # of the first wave, in short blocks
HELPERS, HELPER_CPUS = 2, 0.4  # readers, and as many writers
TILES_A_BLOCK = (1, 4)


def busy_seconds_of_cores():
    """Of all cores of this machine, since it was started."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


class Pretended:
    """Waits instead of predicting, and notes in a file when it did; reads and writes as a run."""

    def __init__(self, run, seconds, results, times):
        self._real = run.make_worker()
        self._seconds, self._results, self._times = seconds, dict(np.load(results)), times

    def read(self, tile):
        """The voxels."""
        return self._real.read(tile % DIFFERENT)

    def write(self, tile, result):
        """Writes the shards."""
        self._real.write(tile % DIFFERENT, result)

    def predict(self, tile, voxels):
        """What another tile gave, after so many seconds."""
        start, cores = time.monotonic(), busy_seconds_of_cores()
        time.sleep(self._seconds)
        with open(self._times, "a") as file:
            file.write(f"{start} {time.monotonic()} {cores}\n")
        return self._results


class Reader:
    """The first stage: what tiles read."""

    def __init__(self, run):
        self._run = run

    def __call__(self, batch):
        """Adds the voxels."""
        run = self._run
        voxels = [
            read_tile(run.volume, run.plan[int(tile) % DIFFERENT], run.nan)
            for tile in batch["tile"]
        ]
        return {**batch, "voxels": np.stack(voxels)}


class Gpu:
    """The second stage; it takes two batches at a time, and predicts one tile."""

    def __init__(self, *told):
        self._pretended, self._alone = Pretended(*told), Lock()

    def __call__(self, batch):
        """Results instead of voxels."""
        results = []
        for tile, voxels in zip(batch["tile"], batch["voxels"], strict=True):
            with self._alone:
                results.append(self._pretended.predict(tile, voxels))
        return {
            "tile": batch["tile"],
            **{name: np.stack([result[name] for result in results]) for name in results[0]},
        }


class Writer:
    """The third stage."""

    def __init__(self, run):
        self._worker, self._outputs = run.make_worker(), run.outputs

    def __call__(self, batch):
        """Only numbers are left."""
        for n, tile in enumerate(batch["tile"]):
            self._worker.write(int(tile) % DIFFERENT, {o: batch[o][n] for o in self._outputs})
        return {"tile": batch["tile"]}


def task(folder):
    """A run of many tiles of plain TIFF, written plane by plane."""
    planes, count = noise((SLAB, 1024, 1024)), SLAB * DIFFERENT
    volume = folder / "volume.tif"
    tifffile.imwrite(
        volume,
        (planes[n % SLAB] for n in range(count)),
        shape=(count, *planes.shape[1:]),
        dtype=planes.dtype,
        photometric="minisblack",
        metadata={"axes": "ZYX"},
    )
    model = random_model(folder / "model.safetensors", depth=4, base=4)
    run = prepare(volume, model, folder / "out", Settings(tile=(SLAB, 1024, 1024)))
    layout = StoreLayout(run.plan, run.class_values, run.outputs, None)
    create_store(run.out, layout, run.provenance)
    return run


def as_stages(told, tiles_a_block):
    """Runs the tiles by three stages of Ray Data."""
    run = told[0]
    numbers = [{"tile": tile} for tile in range(TILES)]
    helpers = {"compute": ActorPoolStrategy(size=HELPERS), "num_cpus": HELPER_CPUS}
    done = (
        ray.data.from_items(numbers, override_num_blocks=len(numbers) // tiles_a_block)
        .map_batches(Reader, fn_constructor_args=(run,), batch_size=tiles_a_block, **helpers)
        .map_batches(
            Gpu,
            fn_constructor_args=told,
            batch_size=tiles_a_block,
            compute=ActorPoolStrategy(size=1),
            num_cpus=0.1,
            num_gpus=1,
            max_concurrency=2,
        )
        .map_batches(Writer, fn_constructor_args=(run,), batch_size=tiles_a_block, **helpers)
    )
    count = sum(len(rows["tile"]) for rows in done.iter_batches(batch_size=None))
    if count != TILES:
        raise RuntimeError(f"{count} of {TILES} tiles came back")


def as_one(told):
    """Runs the tiles as `segment` does."""
    marks = told[-1].with_suffix(".marks")
    marks.mkdir()
    stage = Stage("gpu", lambda: Pretended(*told), "cuda", marks, under_way=GPU_TILES)
    failures = [r.error for r in engine.run(stage, range(TILES), "ray") if r.error]
    if failures:
        raise RuntimeError(failures[0])


def measured(times):
    """The share of time that the GPU was busy; seconds that all cores worked, a tile."""
    starts, ends, cores = np.loadtxt(times)[WARM:].T
    return (ends - starts).sum() / (ends.max() - starts.min()), np.ptp(cores) / (len(cores) - 1)


def main():
    """Prints a line for each speed."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("speeds", nargs="*", type=float, default=SPEEDS, help="Mvoxel/s")
    asked = asked.parse_args()
    ray.init(
        address="local",
        num_cpus=max(2, cluster.usable_cores()),
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2 << 30,
    )
    pool.FIRST_WAVE = 1  # as short as can be
    ways = {"one actor": as_one}
    for count in TILES_A_BLOCK:
        ways[f"stages, {count} a block"] = lambda told, count=count: as_stages(told, count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = task(folder)
        real = run.make_worker()
        results = folder / "results.npz"
        np.savez(results, **real.predict(0, real.read(0)))
        for speed in asked.speeds:
            for way, go in ways.items():
                times = folder / f"{speed}.{way}.times"
                go((run, run.plan[0].write.size / 1e6 / speed, results, times))
                busy, cores = measured(times)
                told = f"busy {busy:.3f}, {cores:.2f} s of CPU a tile"
                print(f"{speed:g} Mvoxel/s, {way}: {told}", flush=True)


if __name__ == "__main__":
    main()
