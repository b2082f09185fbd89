"""Speed of `segment` on volumes of growing size with a cheap network, on both engines.

python -m tests.bench_growth FOLDER [GIGABYTES [ROUNDS]]

GIGABYTES are sizes such as 0.064,0.5,2,20. The volumes are noise whose storage chunks are links to
a few files. Each run has a process of its own, in turn. Speeds are those between the first tile of
each worker and the last tile, so start-up does not count. Memory is the largest of a process after
a tile, of its plan. Prints a line for each run, then a table.
"""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.bench_memory import make_volume
from tests.helper import random_model
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings
from unet_ray.units import format_bytes

WORKERS, TILE, PLANE = 2, (16, 512, 512), (1024, 1024)
ENGINES = "local", "ray"


def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def one_run(volume, model, out, engine):
    """Prints Mvoxel/s, milliseconds of the driver's CPU per tile, tiles, and all seconds."""
    begun, seen, memory = time.perf_counter(), [], []

    def watch(progress):
        seen.append((time.perf_counter(), cpu(), progress.voxels))
        memory.append((progress.memory, progress.memory_stated))

    settings = Settings(
        tile=TILE, workers=WORKERS, engine=engine, precision="float32", pyramid=False
    )
    segment(volume, model, out, settings, watch)
    (first, first_cpu, first_voxels), (last, last_cpu, voxels) = seen[WORKERS - 1], seen[-1]
    facts = {
        "speed": (voxels - first_voxels) / 1e6 / (last - first),
        "driver": 1e3 * (last_cpu - first_cpu) / (len(seen) - WORKERS),
        "tiles": len(seen),
        "seconds": time.perf_counter() - begun,
        "memory": " of ".join(map(format_bytes, max(memory))),
    }
    print(json.dumps(facts))


def main(folder, gigabytes="0.064,0.5,2", rounds=1):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(folder / "model.safetensors", depth=1, base=2)
    sizes, runs = gigabytes.split(","), {}
    for size in sizes:
        volume = folder / f"volume-{size}.zarr"
        shutil.rmtree(volume, ignore_errors=True)
        make_volume(volume, float(size), objects=False, plane=PLANE)
    for _ in range(int(rounds)):
        for size in sizes:
            for engine in ENGINES:
                out = folder / "out.zarr"
                words = "case", folder / f"volume-{size}.zarr", model, out, engine
                command = [sys.executable, "-m", "tests.bench_growth", *map(str, words)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs.setdefault((size, engine), []).append(json.loads(done.stdout.splitlines()[-1]))
                shutil.rmtree(out)
                print(size, engine, runs[size, engine][-1], flush=True)
    columns = (
        "local, Mvoxel/s",
        "memory",
        "Ray, Mvoxel/s",
        "memory of a worker",
        "CPU of the driver",
    )
    print("| volume | tiles |", " | ".join(columns), "|")
    print("|---" * (2 + len(columns)) + "|")
    for size in sizes:
        cells = [f"{size} GB", str(runs[size, ENGINES[0]][0]["tiles"])]
        for taken in (runs[size, engine] for engine in ENGINES):
            cells += [
                f"{statistics.median(run['speed'] for run in taken):.2f}",
                taken[-1]["memory"],
            ]
        driver = statistics.median(run["driver"] for run in taken)
        print("|", " | ".join([*cells, f"{driver:.1f} ms per tile"]), "|")


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        one_run(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
