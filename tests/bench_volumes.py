"""Networks in 2-D and in 3-D on the same volume, for the same time.

python -m tests.bench_volumes vnc|ovule FOLDER [MINUTES [SEED [DIMS]]]

vnc: membranes of an anisotropic stack; slices 11 to 14 are held out. ovule: cells of a confocal
volume, labelled in 3-D; planes 80 to 99 are held out. Prints a line of JSON for each network with
the scores of the model that training keeps. DIMS is 2, 3 or 23 for both.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import tifffile

from unet_ray.network.checkpoints import read_model

DATA = Path(__file__).parents[2] / "shared" / "data"
VOLUMES = {
    "vnc": ("vnc_stack1", "0.045,0.0046,0.0046", "11:15", ()),
    "ovule": ("ovule_1135", "0.2837,0.1268,0.1268", "80:100", ("--labels-are", "instances")),
}


def write_labels(name, source, folder):
    """Writes labels as `train` reads them; returns their path."""
    if name == "ovule":
        return source / "labels.tif"
    membranes = tifffile.imread(source / "membranes.tif") == 255
    path = folder / "labels.tif"
    tifffile.imwrite(path, np.where(membranes, 0, 255).astype(np.uint8), photometric="minisblack")
    return path


def main(name, folder, minutes=20, seed=1, dims="23"):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part, voxel_size, held_out, flags = VOLUMES[name]
    source = DATA / part
    pair = "--images", source / "raw.tif", "--labels", write_labels(name, source, folder)
    flags = *flags, "--val", held_out, "--minutes", minutes, "--seed", seed
    for axes in dims:
        run = folder / f"{name}-{axes}d-{seed}"
        words = ["train", *pair, "--out", run, "--dims", axes, "--voxel-size", voxel_size, *flags]
        subprocess.run([sys.executable, "-m", "unet_ray", *map(str, words)], check=True)
        header = read_model(run)[1]
        facts = {"volume": name, "dims": int(axes), "seed": seed, "step": header.training["steps"]}
        scores = {k: round(v, 4) for k, v in header.training["validation"].items()}
        print(json.dumps(facts | scores), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
