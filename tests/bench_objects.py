"""What objects and pyramids cost beside the prediction, and beside one call of scipy.

The class map of the second part is a smoothed noise of the same size for both; both read it from a
store and write ids to one.
"""

import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import zarr
from scipy import ndimage

from tests.helper import random_model, write_stack
from unet_ray.segmentation.run import TileWorker
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.events import read_events
from unet_ray.storage.layout import EVENTS
from unet_ray.volumes.phantom import make_phantom

WORKERS, ROUNDS = 2, 3
PREDICTED = (16, 1536, 1536)
LABELLED = (256, 1024, 1024)
OUTPUTS = ("probabilities", "classes", "instances")


def blobs(shape, seed=0):
    """Smooth blobs of about 20 voxels, bool, made slab by slab."""
    rng = np.random.default_rng(seed)
    noise = rng.random(shape, np.float32)
    return ndimage.uniform_filter(ndimage.uniform_filter(noise, 9), 5) > 0.505


def seconds_by_stage(store):
    """Seconds of each stage of a run, from its event log."""
    seconds = Counter()
    for event in read_events(store / EVENTS):
        if event.get("event") == "end":
            seconds[event["stage"]] += event["seconds"]
    return seconds


def bright(worker, voxels, above):
    """The class map of a tile whose grey values are above a limit."""
    plan = worker._run.plan
    starts = zip(plan.context.before, plan.core, strict=True)
    core = tuple(slice(before, before + n) for before, n in starts)
    return {"classes": (voxels[0][core] > above).astype(np.uint8)}


def beside_the_prediction(folder):
    """Prints the share of each later stage in the time of the prediction.

    The network is random and has the time of a trained one. Its class map is replaced by that of
    bright voxels, which are cells: a random one has thousands of specks.
    """
    predict = TileWorker.predict

    def cells(worker, tile, voxels):
        return {**predict(worker, tile, voxels), **bright(worker, voxels, 120)}

    TileWorker.predict = cells
    volume = write_stack(folder / "volume.tif", make_phantom(PREDICTED, 1).image)
    model = random_model(folder / "model.safetensors", base=32, depth=4)
    settings = Settings(workers=WORKERS, outputs=OUTPUTS)
    small = write_stack(folder / "small.tif", make_phantom((2, 600, 600), 1).image)
    segment(small, model, folder / "small.zarr", settings)  # compiles the code
    segment(volume, model, folder / "out.zarr", settings)
    seconds = seconds_by_stage(folder / "out.zarr")
    predicted = seconds.pop("segment")
    print(f"prediction, 32 channels, {PREDICTED}: {predicted:.1f} s")
    for stage, later in seconds.items():
        print(f"  {stage:20} {later:6.2f} s  {100 * later / predicted:5.1f} %")
    TileWorker.predict = predict
    print(f"  all later stages     {100 * sum(seconds.values()) / predicted:.1f} %")


def beside_one_call(folder):
    """Prints how fast objects are labelled, relative to one call for the whole volume."""
    mask = blobs(LABELLED)
    volume = folder / "mask.zarr"
    zarr.create_array(volume, data=mask.astype(np.uint8), chunks=(16, 512, 512))
    model = random_model(folder / "small.safetensors", base=2, depth=1)

    TileWorker.predict = lambda worker, tile, voxels: bright(worker, voxels, 0)
    ratios = []
    for number in range(ROUNDS):
        out = folder / f"objects-{number}.zarr"
        settings = Settings(
            workers=WORKERS, outputs=("instances",), pyramid=False, tile=(16, 512, 512)
        )
        segment(volume, model, out, settings)
        seconds = seconds_by_stage(out)
        ours = sum(seconds[stage] for stage in ("label", "join", "instances"))
        start = time.monotonic()
        labels, count = ndimage.label(zarr.open_array(out / "labels/classes/0", mode="r")[:])
        array = zarr.create_array(
            folder / f"whole-{number}.zarr",
            shape=LABELLED,
            shards=(16, 512, 512),
            chunks=(16, 256, 256),
            dtype="uint64",
        )
        array[:] = labels.astype(np.uint64)
        whole = time.monotonic() - start
        ratios.append(whole / ours)
        print(f"{count} objects: {dict(seconds)}; one call {whole:.1f} s; speed {ratios[-1]:.2f}")
    print(f"speed of labelling {LABELLED} in tiles, one call = 1: {median(ratios):.2f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        beside_the_prediction(Path(name))
        beside_one_call(Path(name))
