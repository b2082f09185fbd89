"""Fine-tuning with few labels: a model of ISBI 2012 on a part of the VNC stack.

python -m tests.bench_fine_tuning MODEL FOLDER [MINUTES [SEED]]

MODEL has learned ISBI 2012 without slices 9 to 11 and 21 to 23. Slices 0 to 10 of the VNC stack are
for learning, of which squares with 0.5 % of the voxels are labelled; slices 11 to 14 are for the
score. Prints a line of JSON for the model before, after fine-tuning on the squares, on the squares
together with ISBI 2012, and on all labels of slices 0 to 10, with scores on both stacks.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import tifffile

DATA = Path(__file__).parents[2] / "shared" / "data"
UNLABELLED, SIDE, SHARE = 100, 64, 0.005
LEARN, TEST, HELD_OUT = slice(0, 11), slice(11, 15), [9, 10, 11, 21, 22, 23]


def write_stacks(folder, seed):
    """Writes images and labels of both stacks; returns the share of voxels that are labelled."""
    raw = tifffile.imread(DATA / "vnc_stack1" / "raw.tif")
    cells = np.where(tifffile.imread(DATA / "vnc_stack1" / "membranes.tif") == 255, 0, 255)
    few = np.full(cells[LEARN].shape, UNLABELLED)
    rng = np.random.default_rng(seed)
    for _ in range(int(SHARE * few.size / SIDE**2)):
        z, y, x = (int(rng.integers(n)) for n in np.subtract(few.shape, (0, SIDE, SIDE)))
        few[z, y : y + SIDE, x : x + SIDE] = cells[z, y : y + SIDE, x : x + SIDE]
    isbi, isbi_labels = (
        tifffile.imread(DATA / "isbi2012" / f"train-{name}.tif") for name in ("volume", "labels")
    )
    known = np.setdiff1d(np.arange(len(isbi)), HELD_OUT)
    for name, array in {
        "learn": raw[LEARN],
        "few": few,
        "all": cells[LEARN],
        "vnc": raw[TEST],
        "vnc-truth": cells[TEST],
        "old": isbi[known],
        "old-labels": isbi_labels[known],
        "isbi": isbi[HELD_OUT],
        "isbi-truth": isbi_labels[HELD_OUT],
    }.items():
        tifffile.imwrite(folder / f"{name}.tif", array.astype(np.uint8), photometric="minisblack")
    return (few != UNLABELLED).mean()


def unet_ray(*words):
    subprocess.run([sys.executable, "-m", "unet_ray", *map(str, words)], check=True)


def scores(folder, model):
    """Scores of a model on slices of both stacks that it has not seen."""
    result = {}
    for stack in ("vnc", "isbi"):
        store, file = folder / f"{stack}.zarr", folder / "scores.json"
        out = "--out", store, "--overwrite", "--no-pyramid"
        unet_ray("segment", folder / f"{stack}.tif", "--model", model, *out)
        truth = folder / f"{stack}-truth.tif"
        unet_ray("evaluate", store, truth, "--as", "isbi", "--json", file)
        values = json.loads(file.read_text())
        for name in ("pixel_error", "v_rand", "v_info"):
            result[f"{stack}_{name}"] = round(values[name]["value"], 4)
    return result


def main(model, folder, minutes=5, seed=1):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    share = write_stacks(folder, int(seed))
    print(json.dumps({"labels": "none", **scores(folder, model)}), flush=True)
    for labels in ("few", "few+old", "all"):
        run, few = folder / labels, labels.startswith("few")
        images, truths = [folder / "learn.tif"], [folder / f"{'few' if few else 'all'}.tif"]
        if labels == "few+old":
            images, truths = [*images, folder / "old.tif"], [*truths, folder / "old-labels.tif"]
        pairs = [
            w for i, t in zip(images, truths, strict=True) for w in ("--images", i, "--labels", t)
        ]
        flags = ["--minutes", minutes, "--seed", seed]
        if few:
            flags += ["--ignore-label", UNLABELLED]
        unet_ray("train", *pairs, *flags, "--from", model, "--out", run)
        facts = {"labels": labels, "share": round(share, 4) if few else 1}
        print(json.dumps(facts | scores(folder, run)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
