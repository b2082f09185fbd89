"""What `plan` says of a run, beside the run; what empty or masked tiles save; and a petabyte.

python -m tests.bench_plan
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from tests.helper import noise, petabyte, random_model, resident_peak, shards_of, write_stack
from unet_ray.segmentation.outlook import plan
from unet_ray.segmentation.pilot import try_tiles
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings
from unet_ray.units import format_bytes

SHAPE = (160, 1024, 1024)
TILE = (4, 1024, 1024)


def cases(folder):
    """Name, volume and settings of each run."""
    full = noise(SHAPE)
    half = full.copy()
    half[SHAPE[0] // 2 :] = 7
    gaps = full.copy()
    gaps[:: TILE[0]] = 7  # the first slice of each tile
    mask = np.zeros((SHAPE[0], 8, 8), np.uint8)  # coarser, of the same field of view
    mask[: SHAPE[0] // 4] = 1
    volume = write_stack(folder / "full.tif", full)
    masked = Settings(tile=TILE, mask=write_stack(folder / "mask.tif", mask))
    yield "full", volume, Settings(tile=TILE)
    yield "half empty", write_stack(folder / "half.tif", half), Settings(tile=TILE)
    yield "a slice of four empty", write_stack(folder / "gaps.tif", gaps), Settings(tile=TILE)
    yield "a quarter of it, by --mask", volume, masked


def planned_petabyte(folder, model):
    """Seconds and bytes, at most, of the command that plans a volume of which nothing is stored."""
    start = time.monotonic()
    peak = resident_peak(["plan", petabyte(folder), "--model", model])
    return time.monotonic() - start, peak


def main():
    """Prints a line for each run, and one for a petabyte."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_model(folder / "model.safetensors", depth=4, base=16)
        whole = None
        for number, (what, volume, settings) in enumerate(cases(folder)):
            outlook, seen = plan(volume, model, settings), []
            trial = try_tiles(outlook)
            planned = trial.run_seconds(outlook)
            store = segment(volume, model, folder / f"{number}.zarr", settings, seen.append)
            took, tiles = seen[-1].seconds, seen[-1].finished
            stored = sum((store / shard).stat().st_size for shard in shards_of(store))
            whole = whole or took
            print(
                f"{what}: {tiles} tiles, planned {planned:.1f} s, took {took:.1f} s "
                f"({100 * (planned / took - 1):+.0f} %), {took / whole:.2f} of the whole; planned "
                f"{trial.stored * outlook.tiles / 1e6:.1f} MB, stored {stored / 1e6:.1f} MB",
                flush=True,
            )
        seconds, peak = planned_petabyte(folder, model)
        print(f"a volume of 1 PB: planned in {seconds:.1f} s with {format_bytes(peak)} at most")


if __name__ == "__main__":
    main()
