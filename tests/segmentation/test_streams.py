"""Volumes of a network in 3-D: streamed tiles, whatever begins or ends them."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr

from tests.helper import (
    FLOAT32,
    StoppedError,
    bytes_of,
    noise,
    session,
    stop_after,
    title,
    write_stack,
)
from unet_ray.network.checkpoints import ModelHeader, architecture_of, read_model, write_model
from unet_ray.network.prediction import Predictor
from unet_ray.network.unet import UNet
from unet_ray.segmentation.outlook import plan
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.verification import verify
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.tiling.tiles import round_up

ROOT = Path(__file__).parents[2]
SHAPE, TILE = (60, 44, 50), (16, 24, 28)
SETTINGS = dataclasses.replace(FLOAT32, tile=TILE, workers=1)
FLAGS = "--model model.safetensors --tile 16,24,28 --precision float32 --workers 1"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a volume, a model in 3-D, and the store of an undisturbed run."""
    folder = tmp_path_factory.mktemp("streams")
    write_stack(folder / "volume.tif", noise(SHAPE))
    torch.manual_seed(0)
    network = UNet(1, 2, 3, 2, "weight", 0.0, ((1, 1), (3, 2), (3, 1)), "before")
    header = ModelHeader(architecture_of(network), [0, 255], {"method": "mean-std"})
    write_model(folder / "model.safetensors", network, header)
    segmented(folder, "whole.zarr")
    return folder


def segmented(folder, out, watch=lambda progress: None, **changed):
    settings = dataclasses.replace(SETTINGS, **changed)
    model = folder / "model.safetensors"
    segment(folder / "volume.tif", model, folder / out, settings, watch)
    return folder / out


def counted(monkeypatch):
    """Counts the forward calls of all predictors of this process."""
    calls, forward = [], Predictor._forward
    monkeypatch.setattr(Predictor, "_forward", lambda *a: calls.append(1) or forward(*a))
    return calls


def test_the_stored_probabilities_are_those_of_one_pass(task):
    volume = tifffile.imread(task / "volume.tif").astype(np.float32)
    network = read_model(task / "model.safetensors")[0]
    context = network.context
    extents = [round_up(n, s) for n, s in zip(SHAPE, context.step, strict=True)]
    box = Box.of(extents).grow(context.before, context.after)
    voxels = read_mirrored(lambda part: volume[part.slices], SHAPE, box)
    image = torch.from_numpy((voxels - volume.mean()) / volume.std())[None, None]
    with torch.inference_mode():
        expected = network(image).softmax(1)[0, 1].mul(255).round().byte().numpy()
    stored = zarr.open_array(task / "whole.zarr" / "0", mode="r")[0]
    inside = tuple(slice(n) for n in SHAPE)
    np.testing.assert_allclose(stored.astype(int), expected[inside].astype(int), rtol=0, atol=1)
    assert len(np.unique(stored)) > 50


def test_a_plan_says_that_it_streams(task):
    outlook = plan(task / "volume.tif", task / "model.safetensors", SETTINGS)
    assert outlook.plan.streamed and outlook.plan.passes == (8, 24, 28)
    assert outlook.plan.context.halo[0] == 16  # two passes of a warm-up
    # A volume of few planes is cheaper in one pass along z.
    shallow = write_stack(task / "shallow.tif", noise((8, 44, 50)))
    assert not plan(shallow, task / "model.safetensors", SETTINGS).plan.streamed


def test_each_plane_is_computed_once_by_a_worker(task, monkeypatch):
    calls = counted(monkeypatch)
    store = segmented(task, "once.zarr")
    columns, passes, warm_up = 4, round_up(SHAPE[0], 8) // 8, 2
    assert len(calls) == columns * (passes + warm_up)
    assert bytes_of(store) == bytes_of(task / "whole.zarr")


@pytest.mark.parametrize("workers", [2, 5])
def test_the_bytes_do_not_depend_on_the_workers(task, workers):
    store = segmented(task, f"workers-{workers}.zarr", workers=workers)
    assert bytes_of(store) == bytes_of(task / "whole.zarr")


@pytest.mark.ray
def test_the_bytes_do_not_depend_on_the_engine(task, local_ray):
    store = segmented(task, "ray.zarr", engine="ray", workers=2)
    assert bytes_of(store) == bytes_of(task / "whole.zarr")


def test_a_region_in_the_middle_of_columns_has_the_bytes_of_the_whole(task):
    store = segmented(task, "region.zarr", region=Box((20, 0, 30), (40, 20, 50)), pyramid=False)
    part = {name: content for name, content in bytes_of(store).items() if "/c/" in name}
    whole = bytes_of(task / "whole.zarr")
    assert part and all(whole[name] == content for name, content in part.items())


@pytest.mark.parametrize("tiles", [1, 6, 13])
def test_a_run_that_stopped_in_a_column_goes_on(task, tiles):
    out = f"stopped-{tiles}.zarr"
    with pytest.raises(StoppedError):
        segmented(task, out, stop_after(tiles))
    assert bytes_of(segmented(task, out)) == bytes_of(task / "whole.zarr")


def started(folder, out, engine):
    """Starts the command in a process group of its own."""
    command = [sys.executable, "-m", "unet_ray", "segment", "volume.tif", *FLAGS.split()]
    return subprocess.Popen(
        [*command, "--out", out, "--engine", engine],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def planes_done(store):
    """Number of tiles on disk in each column of the store."""
    shards = (path for path in (store / "0" / "c").rglob("*") if path.is_file())
    return Counter((shard.parent.name, shard.name) for shard in shards)


def kill_at(process, store, tiles, victim):
    """Kills the driver or a worker once `tiles` are on disk; returns the tiles of each column."""
    end = time.monotonic() + 120
    while (done := planes_done(store)).total() < tiles:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    workers = (pid for pid in session(process.pid) if "(TileActor)" in title(pid))
    os.kill(process.pid if victim == "driver" else next(workers), signal.SIGKILL)
    return done


@pytest.mark.parametrize(
    "engine, victims",
    [
        ("local", ["driver"]),
        pytest.param("ray", ["worker", "driver"], marks=[pytest.mark.ray, pytest.mark.slow]),
        pytest.param("ray", ["driver", "worker"], marks=[pytest.mark.ray, pytest.mark.slow]),
    ],
)
def test_a_run_that_was_killed_in_a_column_goes_on(task, engine, victims):
    """Kills after 2 and 6 tiles: columns have 4 tiles, so each kill interrupts one."""
    store = task / f"killed-{engine}-{victims[0]}.zarr"
    process, partial = started(task, store.name, engine), []
    for number, victim in enumerate(victims):
        done = kill_at(process, store, 2 + 4 * number, victim)
        partial.append(any(0 < tiles < 4 for tiles in done.values()))
        if victim == "driver":
            assert process.wait(120) == -signal.SIGKILL
            process = started(task, store.name, engine)
    assert process.wait(120) == 0 and any(partial)
    assert bytes_of(store) == bytes_of(task / "whole.zarr")


def test_verify_recomputes_tiles_of_a_column(task):
    assert not verify(task / "whole.zarr", tiles=5).damage


@pytest.mark.slow  # its quick sibling is in test_prediction.py
def test_the_mean_over_symmetries_is_exact_too(task):
    stores = [
        segmented(task, f"tta-{tile[0]}.zarr", tta=True, tile=tile)
        for tile in ((16, 24, 28), (8, 12, 52))
    ]
    one, two = (zarr.open_array(store / "0", mode="r")[:].astype(int) for store in stores)
    assert np.abs(one - two).max() <= 1
