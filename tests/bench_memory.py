"""Peak memory of driver and workers against what `plan` says, for volumes of any size.

    python -m tests.bench_memory 2 20 --engine ray

The volumes are noise whose storage chunks are links to a few files, so that they need no room.
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

from tests.helper import anonymous, random_model, workers_of
from unet_ray.units import format_bytes

CHUNK = (16, 1024, 1024)
PLANE = (4096, 4096)
DIFFERENT = 8
SETTINGS = ["--memory", "1GiB", "--workers", "2", "--precision", "float32"]


def make_volume(path, gigabytes):
    """An OME-less Zarr array of so many 10**9 voxels, uint8."""
    depth = round(gigabytes * 10**9 / PLANE[0] / PLANE[1] / CHUNK[0]) * CHUNK[0]
    volume = zarr.create_array(path, shape=(depth, *PLANE), chunks=CHUNK, dtype="uint8")
    rng, files = np.random.default_rng(0), []
    for place in np.ndindex(tuple(n // c for n, c in zip(volume.shape, CHUNK, strict=True))):
        files.append(path.joinpath("c", *map(str, place)))
        if len(files) <= DIFFERENT:
            z, y, x = (slice(a * c, (a + 1) * c) for a, c in zip(place, CHUNK, strict=True))
            volume[z, y, x] = rng.integers(0, 256, CHUNK, np.uint8)
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
    arguments = arguments.parse_args()
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = random_model(folder / "model.safetensors", depth=1, base=2)
            volume = make_volume(folder / "volume.zarr", gigabytes)
            given = [volume, "--model", model, "--engine", arguments.engine, *SETTINGS]
            told = subprocess.run(
                command("plan", *given, "--json"), capture_output=True, check=True
            )
            plan = json.loads(told.stdout)
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
