"""Measures how busy the readers and writers on Ray keep a GPU, and the rate of each step of a tile.

    python -m tests.bench_gpu [MVOXEL_PER_S ...]
    python -m tests.bench_gpu rates [BASE]

The first needs no GPU: an actor waits as long as a GPU of that speed would predict. Tiles are read
from plain TIFF, and both outputs are written. The memory of the helpers follows, and the number of
tiles that one driver feeds to idle actors. The second runs each step alone, with a network of BASE
channels; without a GPU its device is the CPU.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

import numpy as np
import ray
import tifffile
import torch

from tests.helper import Idle, actors_of, anonymous, noise, random_model
from unet_ray.engine import cluster
from unet_ray.engine import engines as engine
from unet_ray.engine.cluster import HELPERS, local_device
from unet_ray.engine.stages import Stage
from unet_ray.segmentation.memory import GPU_TILES, helper_bytes, in_flight, together
from unet_ray.segmentation.preparation import prepare
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.layout import StoreLayout
from unet_ray.storage.stores import create_store
from unet_ray.tiling.boxes import Box
from unet_ray.units import format_bytes

# All are the first few tiles, again and again, so that they need little room.
SLAB, TILES, DIFFERENT, SPEEDS = 16, 384, 32, (40, 60, 80)
WARM = 64  # tiles that do not count
FED = 1024
CHANNELS = 64  # of the paper's network
LEAST_CALLS, RATE_SECONDS = 3, 2.0  # of each step


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
        """The results of another tile, after the seconds of a prediction."""
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


def go(arguments):
    """Runs the tiles as `segment` does."""
    run, marks = arguments[0], arguments[-1].with_suffix(".marks")
    marks.mkdir()
    settings = Settings(engine="ray")
    stage = Stage(
        "gpu",
        lambda: Pretended(*arguments),
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
    """Tiles per second that pass through idle actors, over a whole wave."""
    times = []
    for _ in engine.run(Stage("idle", Idle, "cuda", in_flight=GPU_TILES), range(FED), "ray"):
        times.append(time.monotonic())
    return (FED - WARM) / (times[-1] - times[WARM])


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


def rates(base=CHANNELS):
    """Prints the rate of each step of a default tile, and which step bounds the rate of a run."""
    torch.set_num_threads(1)
    device = local_device()
    print(f"device {device}" + (": copies are memory copies" if device == "cpu" else ""))
    with tempfile.TemporaryDirectory() as name:
        run = default_run(Path(name), base)
        plan = run.plan
        print(f"{base} channels, {run.precision}, tile {plan.core}, passes {plan.passes}")
        measured = rates_of(run, device)
    for step, rate in measured.items():
        print(f"{step:9} {rate:10.2f} Mvoxel/s")
    for step in ("reader", "writer"):
        measured[step] *= HELPERS
    print(f"{min(measured, key=measured.get)} bounds the rate with {HELPERS} readers and writers")


def default_run(folder, base):
    """A run with default settings on plain TIFF."""
    volume = folder / "volume.tif"
    tifffile.imwrite(volume, noise((SLAB, 2048, 2048)), photometric="minisblack")
    model = random_model(folder / "model.safetensors", depth=4, base=base)
    run = prepare(volume, model, folder / "out", Settings(engine="local"))
    layout = StoreLayout(run.plan, run.class_values, run.outputs, None)
    create_store(run.out, layout, run.provenance)
    return run


def rates_of(run, device):
    """Million voxels of the core per second, for each step of a tile alone."""
    helper, plan, outputs = run.make_helper(), run.plan, tuple(run.predicted)
    predictor = run.make_worker()._predictor
    window = helper.read(0)[(slice(None), *Box.of(plan.pass_shape).slices)]
    scored = predictor._forward(window, outputs)()
    counts = [core // part for core, part in zip(plan.core, plan.passes, strict=True)]
    results = {name: np.tile(scored[name], counts) for name in outputs}
    image = predictor._image(window)

    def compute():
        with torch.inference_mode():
            predictor._computed(image, outputs, ())

    one, tile = math.prod(plan.passes) / 1e6, math.prod(plan.core) / 1e6
    return {
        "reader": tile / seconds_of(lambda: helper.read(0)),
        "copy up": one / seconds_of(copy_of(window.nbytes, device, up=True)),
        "network": one / seconds_of(compute),
        "copy down": one / seconds_of(copy_of(sum(map(np.size, scored.values())), device)),
        "writer": tile / seconds_of(lambda: helper.write(0, results)),
    }


def copy_of(size, device, up=False):
    """A function that copies bytes from page-locked memory to a device, or back."""
    host = torch.ones(size, dtype=torch.uint8, pin_memory=device == "cuda")
    there = host.to(device, copy=True)
    target, source = (there, host) if up else (host, there)
    return lambda: target.copy_(source, non_blocking=True)


def seconds_of(step):
    """Mean seconds of a step, after one that does not count."""
    done = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    step(), done()
    calls, start = 0, time.monotonic()
    while calls < LEAST_CALLS or time.monotonic() - start < RATE_SECONDS:
        step(), done()
        calls += 1
    return (time.monotonic() - start) / calls


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
            shares = f"busy {busy:.3f}, {cores:.2f} s of CPU a tile"
            print(f"{speed:g} Mvoxel/s: {shares}", flush=True)
        held = ", ".join(f"{kind} {format_bytes(most)}" for kind, most in peaks.bytes.items())
        helper = helper_bytes(run.memory.on("ray"), "cuda", Settings(engine="ray"))
        print(f"at most {held}; planned for a reader or writer {format_bytes(helper)}")
    print(f"tiles that do nothing, one by one: {fed():.1f} a second by one driver")


if __name__ == "__main__":
    if sys.argv[1:2] == ["rates"]:
        rates(*map(int, sys.argv[2:3]))
    else:
        main()
