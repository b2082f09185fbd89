"""How busy something like a GPU is kept by those that read and write for it on Ray.

    python -m tests.bench_gpu

No GPU is needed: what predicts waits as long as a GPU would take. Tiles are read from plain TIFF,
and both outputs are written. Then what its helpers held, and how many tiles one driver feeds to
actors that do nothing.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from threading import Thread

import numpy as np
import ray
import tifffile

from tests.helper import Idle, actors_of, anonymous, noise, random_model
from unet_ray.engine import cluster
from unet_ray.engine import engines as engine
from unet_ray.engine.stages import Stage
from unet_ray.segmentation.memory import GPU_TILES, helper_bytes, in_flight, together
from unet_ray.segmentation.preparation import prepare
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.layout import StoreLayout
from unet_ray.storage.stores import create_store
from unet_ray.units import format_bytes

# All are the first few tiles, again and again, so that they need little room.
SLAB, TILES, DIFFERENT, SPEEDS = 16, 384, 32, (40, 60, 80)
WARM = 64  # tiles that do not count
FED = 1024


def busy_seconds_of_cores():
    """Of all cores of this machine, since it was started."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


class Repeated:
    """Reads and writes the first few tiles, again and again, as a run does."""

    def __init__(self, run):
        self._real = run.make_helper()

    def read(self, tile):
        """The voxels."""
        return self._real.read(tile % DIFFERENT)

    def write(self, tile, result):
        """Writes the shards."""
        self._real.write(tile % DIFFERENT, result)


class Pretended(Repeated):
    """Waits instead of predicting, and notes in a file when it did."""

    def __init__(self, run, seconds, results, times):
        super().__init__(run)
        self._seconds, self._results, self._times = seconds, dict(np.load(results)), times

    def predict(self, tile, voxels):
        """What another tile gave, after so many seconds."""
        start, cores = time.monotonic(), busy_seconds_of_cores()
        time.sleep(self._seconds)
        with open(self._times, "a") as file:
            file.write(f"{start} {time.monotonic()} {cores}\n")
        return self._results


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


def go(told):
    """Runs the tiles as `segment` does."""
    run, marks = told[0], told[-1].with_suffix(".marks")
    marks.mkdir()
    settings = Settings(engine="ray")
    stage = Stage(
        "gpu",
        lambda: Pretended(*told),
        "cuda",
        marks,
        in_flight=in_flight(run.memory, "cuda", settings),
        together=together(run.memory, "cuda", settings),
        make_helper=lambda: Repeated(run),
    )
    failures = [r.error for r in engine.run(stage, range(TILES), "ray") if r.error]
    if failures:
        raise RuntimeError(failures[0])


def fed():
    """Tiles a second, of a whole wave, that go through actors with nothing to do."""
    told = []
    for _ in engine.run(Stage("idle", Idle, "cuda", in_flight=GPU_TILES), range(FED), "ray"):
        told.append(time.monotonic())
    return (FED - WARM) / (told[-1] - told[WARM])


class Peaks(Thread):
    """The most anonymous memory of any process of each kind, as long as it is watched."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes = {"Reader": 0, "GpuActor": 0, "Writer": 0}
        self.start()

    def run(self):
        """Looks again and again."""
        while True:
            for kind, most in self.bytes.items():
                self.bytes[kind] = max([most, *map(anonymous, actors_of(kind))])
            time.sleep(0.1)


def measured(times):
    """The share of time that the GPU was busy; seconds that all cores worked, a tile."""
    starts, ends, cores = np.loadtxt(times)[WARM:].T
    return (ends - starts).sum() / (ends.max() - starts.min()), np.ptp(cores) / (len(cores) - 1)


def main():
    """Prints a line for each speed."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("speeds", nargs="*", type=float, default=SPEEDS, help="Mvoxel/s")
    arguments = arguments.parse_args()
    ray.init(
        address="local",
        num_cpus=max(2, cluster.usable_cores()),
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=cluster.OBJECT_STORE_BYTES,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = task(folder)
        real = run.make_worker()
        results = folder / "results.npz"
        np.savez(results, **real.predict(0, real.read(0)))
        peaks = Peaks()
        for speed in arguments.speeds:
            times = folder / f"{speed}.times"
            go((run, run.plan[0].write.size / 1e6 / speed, results, times))
            busy, cores = measured(times)
            told = f"busy {busy:.3f}, {cores:.2f} s of CPU a tile"
            print(f"{speed:g} Mvoxel/s: {told}", flush=True)
        told = ", ".join(f"{kind} {format_bytes(most)}" for kind, most in peaks.bytes.items())
        helper = helper_bytes(run.memory.on("ray"), "cuda", Settings(engine="ray"))
        print(f"at most {told}; planned for a reader or writer {format_bytes(helper)}")
    print(f"tiles that do nothing, one by one: {fed():.1f} a second by one driver")


if __name__ == "__main__":
    main()
