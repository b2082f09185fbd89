"""Kills in the middle: the same command again gives the bytes of a run that nobody disturbed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.test_segmentation import bytes_of, noise, random_model, write_stack
from unet_ray.ledger import committed
from unet_ray.planning import Settings
from unet_ray.segmentation import segment
from unet_ray.stores import LEDGER

ROOT = Path(__file__).parent.parent
TILES = 128
SECONDS = 120


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a volume of many tiles, a model, and the store of an undisturbed run."""
    folder = tmp_path_factory.mktemp("kill")
    write_stack(folder / "volume.tif", noise((2, 512, 256)))
    random_model(folder / "model.safetensors", base=4, depth=3)
    settings = Settings(precision="float32", tile=(1, 64, 32))
    segment(folder / "volume.tif", folder / "model.safetensors", folder / "whole.zarr", settings)
    return folder


def started(folder, out, engine="local"):
    """The command in a process of its own, one tile at a time."""
    flags = "--tile 1,64,32 --precision float32 --workers 1 --model model.safetensors"
    command = [sys.executable, "-m", "unet_ray", "segment", "volume.tif", *flags.split()]
    return subprocess.Popen(
        [*command, "--out", out, "--engine", engine],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def shards(store):
    """How many tiles of the first array are on disk."""
    return sum(1 for path in (store / "0" / "c").rglob("*") if path.is_file())


def kill_at(folder, out, count, engine):
    """Starts the command and kills it once `count` tiles are committed."""
    process, end = started(folder, out, engine), time.monotonic() + SECONDS
    while shards(folder / out) < count:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(SECONDS) == -signal.SIGKILL
    assert count <= shards(folder / out) < TILES, "too late for a kill in the middle"


def committed_shards(store):
    """Inode and time of the files of every tile that the ledger holds, over both arrays."""
    rows, columns, found = 512 // 64, 256 // 32, {}
    for number in np.flatnonzero(committed(store / LEDGER, TILES)):
        z, y, x = number // (rows * columns), number // columns % rows, number % columns
        for name in (f"0/c/0/{z}/{y}/{x}", f"labels/classes/0/c/{z}/{y}/{x}"):
            stat = (store / name).stat()
            found[name] = stat.st_ino, stat.st_mtime_ns
    return found


@pytest.mark.parametrize(
    "engine, counts",
    [
        ("local", [40]),
        pytest.param("local", [1, 50, 100], marks=pytest.mark.slow),
        pytest.param("ray", [40], marks=[pytest.mark.slow, pytest.mark.ray]),
    ],
    ids=lambda v: v if isinstance(v, str) else f"after {v}",
)
def test_a_killed_run_goes_on_to_the_same_bytes(task, engine, counts):
    out = f"{engine}-{len(counts)}.zarr"
    for count in counts:
        kept = committed_shards(task / out)
        kill_at(task, out, count, engine)
        assert kept.items() <= committed_shards(task / out).items()
    kept = committed_shards(task / out)
    assert started(task, out, engine).wait(SECONDS) == 0
    assert len(committed_shards(task / out)) == 2 * TILES
    assert bytes_of(task / out) == bytes_of(task / "whole.zarr")
    assert kept.items() <= committed_shards(task / out).items()
