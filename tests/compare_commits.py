"""Checks whether two commits make the same models, stores and scores, byte for byte.

    python -m tests.compare_commits BEFORE [AFTER]     AFTER is the working tree by default

Each commit runs from its own clone, only through the command line: train in float32, segment on the
local engine and on Ray, each twice, then verify and evaluate.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile

ROOT = Path(__file__).parents[1]
TRAIN = "--base-channels 4 --depth 2 --patch 92 --steps 60 --precision float32 --val 2:3 --seed 3"
SEGMENT = "--tile 1,64,64 --precision float32 --workers 2 --tta"


def checked_out(commit: str | None, folder: Path) -> Path:
    """Returns a clone at a commit, or the working tree without a commit."""
    if commit is None:
        return ROOT
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "checkout", "-q", commit], check=True)
    return folder


def write_inputs(folder: Path) -> None:
    """Writes a stack with membranes, its labels, and a larger volume to segment."""
    from unet_ray import make_phantom

    phantom = make_phantom((4, 200, 200), seed=1)
    tifffile.imwrite(folder / "image.tif", phantom.image, photometric="minisblack")
    cells = np.where(phantom.instances > 0, 255, 0).astype(np.uint8)
    tifffile.imwrite(folder / "labels.tif", cells, photometric="minisblack")
    volume = np.tile(phantom.image, (1, 2, 2))[:3, :333, :300]
    tifffile.imwrite(folder / "volume.tif", volume, photometric="minisblack")


def results_of(tree: Path, inputs: Path, out: Path) -> dict[str, str]:
    """Runs the commands of a tree; returns hashes of files and printed output, by name."""
    out.mkdir()

    def run(text: str) -> str:
        command = [sys.executable, "-m", "unet_ray", *text.split()]
        environment = {**os.environ, "PYTHONPATH": str(tree), "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("RAY_ADDRESS", None)
        done = subprocess.run(
            command, cwd=out, env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout

    model, volume = "run/model.safetensors", inputs / "volume.tif"
    run(f"train --images {inputs}/image.tif --labels {inputs}/labels.tif --out run {TRAIN}")
    plan = json.loads(run(f"plan {volume} --model run {SEGMENT} --json"))
    for engine in ("local", "ray"):
        run(f"segment {volume} --model run --out {engine}.zarr {SEGMENT} --engine {engine}")
        run(f"segment {volume} --model run --out {engine}.zarr {SEGMENT} --engine {engine}")
    # A region first, then the rest.
    part = f"segment {volume} --model run --out part.zarr {SEGMENT}"
    run(f"{part} --region 0:1,0:150,0:300")
    run(part)
    run(f"segment {inputs}/image.tif --model run --out truth.zarr {SEGMENT}")
    results = {
        "plan": json.dumps({name: plan[name] for name in sorted(plan) if "second" not in name
                            and "estimate" not in name and "free" not in name}),
        "verify": run("verify local.zarr --tiles 2").split(" recomputed")[0],
        "evaluate": run(f"evaluate truth.zarr {inputs}/labels.tif --as classes --json -"),
        "isbi": run(f"evaluate truth.zarr {inputs}/labels.tif --as isbi --json -"),
        model: hashlib.sha256((out / model).read_bytes()).hexdigest(),
    }  # fmt: skip
    for store in sorted(out.glob("*.zarr")):
        for path in sorted(store.rglob("*")):
            if path.is_file() and ".unet_ray" not in path.parts:
                name = str(path.relative_to(out))
                results[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return results


def main() -> int:
    """Compares the two trees; returns 1 if any result differs."""
    before, after = [*sys.argv[1:], None][:2]
    with tempfile.TemporaryDirectory(prefix="unet-ray-") as scratch:
        folder = Path(scratch)
        write_inputs(folder)
        trees = [checked_out(name, folder / f"tree{n}") for n, name in enumerate((before, after))]
        one, two = (results_of(tree, folder, folder / f"made{n}") for n, tree in enumerate(trees))
    differing = [name for name in sorted({*one, *two}) if one.get(name) != two.get(name)]
    for name in differing:
        print(f"differs: {name}\n  {one.get(name)}\n  {two.get(name)}")
    print(f"{len(one)} results compared, {len(differing)} differ")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
