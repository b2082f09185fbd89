"""Cells of the Cell Tracking Challenge, learned from two thirds of the gold frames of a sequence.

python -m tests.bench_cells DATASET FOLDER [MINUTES [SEED]]

DATASET is DIC-C2DH-HeLa or PhC-C2DH-U373, of ../shared/data; sequence 01 is used. Every third gold
frame is kept for the score. Training sees nothing of it: it chooses its threshold on its own
frames. Prints SEG, with and without `--split`, beside the score of the paper (table 2).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copy

DATA = Path(__file__).parents[2] / "shared" / "data" / "ctc"
PAPER = {"DIC-C2DH-HeLa": 0.7756, "PhC-C2DH-U373": 0.9203}


def copy_frames(dataset, folder):
    """Copies frames and labels for learning and for the score; returns their numbers of frames."""
    gold = sorted((DATA / dataset / "01_GT" / "SEG").glob("man_seg*.tif"))
    parts = {"learn": [p for n, p in enumerate(gold) if n % 3 != 2], "test": gold[2::3]}
    for part, labels in parts.items():
        for label in labels:
            frame = DATA / dataset / "01" / f"t{label.stem.removeprefix('man_seg')}.tif"
            for source, kind in ((label, "labels"), (frame, "frames")):
                (folder / part / kind).mkdir(parents=True, exist_ok=True)
                copy(source, folder / part / kind)
    return {part: len(labels) for part, labels in parts.items()}


def unet_ray(*words):
    subprocess.run([sys.executable, "-m", "unet_ray", *map(str, words)], check=True)


def seg(folder, run, *flags):
    """SEG of the frames that were kept for it, each by itself."""
    store, scores = folder / "cells.zarr", folder / "scores.json"
    outputs = "--outputs", "probabilities,instances", "--connect", "slice", "--min-size", 200
    store_flags = "--model", run, "--out", store, "--overwrite", *flags
    unet_ray("segment", folder / "test/frames", *store_flags, *outputs)
    truth = folder / "test/labels"
    unet_ray("evaluate", store, truth, "--as", "instances", "--per-slice", "--json", scores)
    return round(json.loads(scores.read_text())["seg"], 4)


def main(dataset, folder, minutes=20, seed=1):
    folder = Path(folder)
    frames, run = copy_frames(dataset, folder), folder / f"run-{seed}"
    pair = "--images", folder / "learn/frames", "--labels", folder / "learn/labels"
    limits = "--labels-are", "instances", "--minutes", minutes, "--seed", seed
    unet_ray("train", *pair, "--out", run, *limits)
    facts = {"dataset": dataset, "seed": seed, "minutes": minutes, "frames": frames}
    facts |= {"cores": len(os.sched_getaffinity(0)), "paper": PAPER[dataset]}
    scores = {"seg": seg(folder, run), "seg_split": seg(folder, run, "--split")}
    print(json.dumps(facts | scores))


if __name__ == "__main__":
    main(*sys.argv[1:])
