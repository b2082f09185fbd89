"""Peak memory of driver and workers against what `plan` says, for volumes of any size.

    python -m tests.bench_memory 2 20 --engine ray
    python -m tests.bench_memory 4 --objects

The volumes are noise whose storage chunks are links to a few files, so that they need no room. With
objects and a pyramid the noise is smooth, since sharp noise has an object for every few voxels.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import zarr
from scipy import ndimage

from tests.helper import anonymous, random_model, workers_of
from unet_ray.units import format_bytes

CHUNK = (16, 1024, 1024)
PLANE = (4096, 4096)
DIFFERENT = 8
SETTINGS = ["--workers", "2", "--precision", "float32"]
LIMIT = {False: ["--memory", "1GiB"], True: ["--memory", "2GiB"]}
OBJECTS = ["--outputs", "probabilities,classes,instances"]


def smooth(shape, seed):
    """Smooth noise of full contrast, uint8."""
    noise = np.random.default_rng(seed).random(shape, np.float32)
    noise = ndimage.uniform_filter(ndimage.uniform_filter(noise, 7), 5)
    return np.clip(128 + (noise - 0.5) * 6000, 0, 255).astype(np.uint8)


def make_volume(path, gigabytes, objects, plane=PLANE):
    """A Zarr array without OME metadata of that many 10**9 voxels, uint8."""
    depth = round(gigabytes * 10**9 / plane[0] / plane[1] / CHUNK[0]) * CHUNK[0]
    volume = zarr.create_array(path, shape=(depth, *plane), chunks=CHUNK, dtype="uint8")
    rng, files = np.random.default_rng(0), []
    for place in np.ndindex(tuple(n // c for n, c in zip(volume.shape, CHUNK, strict=True))):
        files.append(path.joinpath("c", *map(str, place)))
        if len(files) <= DIFFERENT:
            z, y, x = (slice(a * c, (a + 1) * c) for a, c in zip(place, CHUNK, strict=True))
            sharp = rng.integers(0, 256, CHUNK, np.uint8)
            volume[z, y, x] = smooth(CHUNK, len(files)) if objects else sharp
        else:
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            os.link(files[len(files) % DIFFERENT], files[-1])
    return path


def command(verb, *arguments):
    """The command line as a process of its own would be given it."""
    return [sys.executable, "-m", "unet_ray", verb, *map(str, arguments)]


def peaks(arguments, engine):
    """Most anonymous bytes of the driver, and of any worker; seconds."""
    start, driver, worker = time.monotonic(), 0, 0
    with subprocess.Popen(command("segment", *arguments), stdout=subprocess.DEVNULL) as running:
        while running.poll() is None:
            driver = max(driver, anonymous(running.pid))
            worker = max([worker, *map(anonymous, workers_of(running.pid, engine))])
            time.sleep(0.2)
    if running.returncode or not worker:
        sys.exit(running.returncode or "no worker was seen")
    return driver, worker, time.monotonic() - start


def main():
    """Prints a line for each size."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("gigabytes", nargs="+", type=float)
    arguments.add_argument("--engine", choices=["local", "ray"], default="ray")
    arguments.add_argument("--objects", action="store_true", help="also objects and a pyramid")
    arguments = arguments.parse_args()
    objects = arguments.objects
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = random_model(folder / "model.safetensors", depth=1, base=2)
            volume = make_volume(folder / "volume.zarr", gigabytes, objects)
            given = [volume, "--model", model, "--engine", arguments.engine, *SETTINGS]
            given += [*LIMIT[objects], *(OBJECTS if objects else ["--no-pyramid"])]
            planned = subprocess.run(
                command("plan", *given, "--json"), capture_output=True, check=True
            )
            plan = json.loads(planned.stdout)
            driver, worker, seconds = peaks(
                [*given, "--out", folder / "out.zarr"], arguments.engine
            )
        facts = [f"driver {format_bytes(driver)} of {format_bytes(plan['driver_memory_bytes'])}"]
        if arguments.engine == "ray":  # else the workers are threads of the driver
            most = format_bytes(plan["worker_memory_bytes"])
            facts.append(f"worker {format_bytes(worker)} of {most}")
        print(
            f"{gigabytes:g} GB, {arguments.engine}: {plan['tiles']} tiles, {', '.join(facts)}, "
            f"{seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
