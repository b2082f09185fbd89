"""Killed runs with objects and a pyramid: each stage resumes and gives the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helper import bytes_of, noise, random_model, session, write_stack
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings

ROOT = Path(__file__).parents[2]
SECONDS = 180
OUTPUTS = ("probabilities", "classes", "instances")
# The first file that a stage writes, by its name.
FIRST_FILES = {
    "segment": "0/c",
    "pyramid-1": "1/c",
    "holes": ".unet_ray/objects/hole-labels",
    "join-holes": ".unet_ray/objects/hole-ids",
    "label": ".unet_ray/objects/labels",
    "join": ".unet_ray/objects/ids",
    "instances": "labels/instances/0/c",
    "instances-pyramid-1": "labels/instances/1/c",
    "table": "objects.parquet",
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a volume of many tiles, a model, and the store of an undisturbed run."""
    folder = tmp_path_factory.mktemp("kill")
    write_stack(folder / "volume.tif", noise((2, 544, 256)))
    random_model(folder / "model.safetensors", base=4, depth=3)
    settings = Settings(
        precision="float32", tile=(1, 64, 32), outputs=OUTPUTS, fill_holes=True, min_size=3
    )
    segment(folder / "volume.tif", folder / "model.safetensors", folder / "whole.zarr", settings)
    return folder


def started(folder, out, engine):
    """Starts the command in a process of its own."""
    flags = "--tile 1,64,32 --precision float32 --workers 2 --model model.safetensors "
    flags += f"--outputs {','.join(OUTPUTS)} --fill-holes --min-size 3 --engine {engine}"
    command = [sys.executable, "-m", "unet_ray", "segment", "volume.tif", *flags.split()]
    return subprocess.Popen(
        [*command, "--out", out],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill(process):
    """Kills all processes of a command; returns whether it was still running."""
    running = process.poll() is None
    for pid in session(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=SECONDS)
    return running


def wait_for(ready, process):
    """Waits until `ready()` or the end of the process."""
    end = time.monotonic() + SECONDS
    while process.poll() is None and not ready():
        assert time.monotonic() < end
        time.sleep(0.001)


def files(store):
    """Number of files of a store."""
    return sum(len(names) for _, _, names in os.walk(store))


def finish(folder, out, engine):
    process = started(folder, out, engine)
    _, stderr = process.communicate(timeout=2 * SECONDS)
    assert process.returncode == 0, stderr
    assert bytes_of(folder / out) == bytes_of(folder / "whole.zarr")


@pytest.mark.parametrize(
    "stages",
    [
        ("label", "instances"),
        pytest.param(tuple(FIRST_FILES), marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_a_run_killed_at_the_start_of_stages_ends_in_the_same_bytes(task, stages):
    killed, store = 0, task / f"local-{len(stages)}.zarr"
    for stage in stages:
        process = started(task, store.name, "local")
        wait_for((store / FIRST_FILES[stage]).exists, process)
        assert (store / FIRST_FILES[stage]).exists(), stage
        killed += kill(process)
    assert killed >= len(stages) - 2  # a short stage may end before the signal arrives
    finish(task, store.name, "local")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "engine, kills", [("local", 30), pytest.param("ray", 20, marks=pytest.mark.ray)]
)
def test_a_sweep_of_kills_in_all_stages_ends_in_the_same_bytes(task, engine, kills):
    rng, killed, run = random.Random(kills), 0, 0
    while killed < kills:
        run += 1
        store = task / f"{engine}-{run}.zarr"
        for _ in range(12):
            process = started(task, store.name, engine)
            goal = files(store) + rng.randrange(1, 120)
            wait_for(lambda: files(store) >= goal, process)  # noqa: B023
            if not kill(process):
                break
            killed += 1
        finish(task, store.name, engine)
    print(f"{engine}: {killed} kills in {run} runs")
