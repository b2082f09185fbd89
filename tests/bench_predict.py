"""CPU time of `Model.predict` and of `segment`, beside the passes of the network alone.

    python -m tests.bench_predict [SLICES]

Each runs in a process of its own, in turn, `ROUNDS` times; the figures are medians of ratios.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from tests.helper import noise, random_model

ROUNDS = 3
EXTENT = 512
CHANNELS = 64


def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_minflt


def raw(model, image):
    """The forward passes of the plan on inputs that are ready, on as many threads as cores."""
    import torch

    from unet_ray.engine.cluster import usable_cores
    from unet_ray.machine import keep_freed_memory

    keep_freed_memory()
    from unet_ray.network.checkpoints import read_model
    from unet_ray.network.prediction import Predictor, best_precision
    from unet_ray.segmentation.outlook import plan
    from unet_ray.segmentation.run import read_tile
    from unet_ray.segmentation.settings import Settings
    from unet_ray.volumes.intensity import measure
    from unet_ray.volumes.opening import open_volume

    volume, (network, _) = open_volume(np.load(image)), read_model(Path(model))
    tiles = plan(volume, model, Settings()).plan
    predictor = Predictor(network, tiles, measure(volume), best_precision("cpu"), "cpu")
    inputs = []
    for tile in tiles:
        voxels = read_tile(volume, tile, "error")
        for z in range(tile.write.shape[0]):
            inputs.append(predictor._image(voxels[:, z : z + 1]))
    waiting, lock = iter(inputs), threading.Lock()

    def work():
        torch.set_num_threads(1)
        with torch.inference_mode():
            while True:
                with lock:
                    image = next(waiting, None)
                if image is None:
                    return
                predictor._scores(image, [], 0, None).softmax(1)

    start = cpu()
    threads = [threading.Thread(target=work) for _ in range(usable_cores())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return start


def predict(model, image):
    import unet_ray

    loaded, voxels = unet_ray.load(model), np.load(image)
    start = cpu()
    loaded.predict(voxels, dtype="uint8", progress=False)
    return start


def segment(model, image):
    import tifffile

    import unet_ray

    path = Path(image).with_suffix(".tif")
    if not path.exists():
        tifffile.imwrite(path, np.load(image), photometric="minisblack")
    loaded = unet_ray.load(model)
    start = cpu()
    unet_ray.segment(path, loaded, Path(image).with_suffix(".zarr"), overwrite=True, progress=False)
    return start


KINDS = {"raw passes": raw, "predict": predict, "segment": segment}


def main():
    """Prints the ratios."""
    if len(sys.argv) == 4:
        start = KINDS[sys.argv[1]](sys.argv[2], sys.argv[3])
        print(json.dumps([b - a for a, b in zip(start, cpu(), strict=True)]))
        return
    slices = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_model(folder / "model.safetensors", base=CHANNELS, depth=4)
        np.save(folder / "image.npy", noise((slices, EXTENT, EXTENT)))
        rounds = []
        for _ in range(ROUNDS):
            taken = {}
            for kind in KINDS:
                command = [sys.executable, "-m", "tests.bench_predict", kind, str(model)]
                command.append(str(folder / "image.npy"))
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                taken[kind] = json.loads(done.stdout)
            rounds.append(taken)
    for kind in KINDS:
        seconds, faults = zip(*(taken[kind] for taken in rounds), strict=True)
        ratio = statistics.median(t[kind][0] / t["raw passes"][0] for t in rounds)
        print(
            f"{kind:12} {statistics.median(seconds):7.2f} s CPU, {ratio:5.3f} of the raw passes, "
            f"{statistics.median(faults):9.0f} page faults"
        )


if __name__ == "__main__":
    main()
