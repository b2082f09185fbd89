"""Killed runs: the same command resumes and gives the bytes of an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helper import bytes_of, noise, random_model, session, state_of, title, write_stack
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.layout import LEDGER
from unet_ray.storage.ledger import committed

ROOT = Path(__file__).parents[2]
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
    """Starts the command in a process of its own, one tile at a time."""
    flags = "--tile 1,64,32 --precision float32 --workers 1 --model model.safetensors"
    command = [sys.executable, "-m", "unet_ray", "segment", "volume.tif", *flags.split()]
    return subprocess.Popen(
        [*command, "--out", out, "--engine", engine],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def shards(store):
    """Number of tiles of the first array on disk."""
    return sum(1 for path in (store / "0" / "c").rglob("*") if path.is_file())


def wait_for(ready, process):
    end = time.monotonic() + SECONDS
    while not ready():
        assert process.poll() is None, f"ended too early: {process.stderr.read()}"
        assert time.monotonic() < end
        time.sleep(0.002)


def is_stopped(pid):
    """Whether every thread of a process has stopped; a signal takes effect with a delay."""
    states = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(state.rpartition(")")[2].split()[0] == "T" for state in states)


def ended(process):
    """Waits for the end of a process; returns its stderr."""
    return process.communicate(timeout=SECONDS)[1]


def kill_at(folder, out, count, engine):
    """Starts the command and kills it once `count` tiles are committed."""
    process = started(folder, out, engine)
    wait_for(lambda: shards(folder / out) >= count, process)
    os.kill(process.pid, signal.SIGKILL)
    ended(process)
    assert process.returncode == -signal.SIGKILL
    assert count <= shards(folder / out) < TILES, "too late for a kill in the middle"


def committed_shards(store):
    """Inode and modification time of every committed shard, over both arrays."""
    rows, columns, files = 512 // 64, 256 // 32, {}
    for number in np.flatnonzero(committed(store / LEDGER, TILES)):
        z, y, x = number // (rows * columns), number // columns % rows, number % columns
        for name in (f"0/c/0/{z}/{y}/{x}", f"labels/classes/0/c/{z}/{y}/{x}"):
            stat = (store / name).stat()
            files[name] = stat.st_ino, stat.st_mtime_ns
    return files


@pytest.mark.parametrize(
    "engine, counts",
    [
        ("local", [40]),
        pytest.param("local", [1, 50, 100], marks=pytest.mark.slow),
        pytest.param("ray", [40], marks=[pytest.mark.slow, pytest.mark.ray]),
    ],
    ids=lambda v: v if isinstance(v, str) else f"after {v}",
)
def test_a_killed_run_resumes_to_the_same_bytes(task, engine, counts):
    out = f"{engine}-{len(counts)}.zarr"
    for count in counts:
        before = committed_shards(task / out)
        kill_at(task, out, count, engine)
        assert before.items() <= committed_shards(task / out).items()
    before = committed_shards(task / out)
    last = started(task, out, engine)
    stderr = ended(last)
    assert last.returncode == 0, stderr
    assert len(committed_shards(task / out)) == 2 * TILES
    assert bytes_of(task / out) == bytes_of(task / "whole.zarr")
    assert before.items() <= committed_shards(task / out).items()


def test_a_second_run_is_refused_until_the_first_is_killed(task):
    first = started(task, "twice.zarr")
    wait_for(lambda: shards(task / "twice.zarr") >= 10, first)
    os.kill(first.pid, signal.SIGSTOP)  # alive, but writes nothing
    wait_for(lambda: is_stopped(first.pid), first)
    before = state_of(task / "twice.zarr")
    second = started(task, "twice.zarr")
    stderr = ended(second)
    assert second.returncode == 2
    assert f"process {first.pid} on " in stderr.splitlines()[-1] and "--takeover" in stderr
    assert state_of(task / "twice.zarr") == before
    first.kill()
    ended(first)
    third = started(task, "twice.zarr")
    stderr = ended(third)
    assert third.returncode == 0
    assert stderr.count(f"taking over from process {first.pid} on ") == 1
    assert bytes_of(task / "twice.zarr") == bytes_of(task / "whole.zarr")


VICTIMS = {"worker": "(TileActor)", "raylet": "/raylet"}


def victims(process, kind):
    """Ids of the processes of a kind that a command started."""
    return [pid for pid in session(process.pid) if VICTIMS[kind] in title(pid)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "engine, kinds",
    [
        ("local", ["driver"] * 28),
        pytest.param(
            "ray", ["worker"] * 12 + ["driver"] * 7 + ["raylet"] * 5, marks=pytest.mark.ray
        ),
    ],
)
def test_a_sweep_of_kills_ends_in_the_same_bytes(task, engine, kinds):
    rng, out, process, begun = random.Random(len(kinds)), f"sweep-{engine}.zarr", None, []
    rng.shuffle(kinds)
    for number, kind in enumerate(kinds):
        before = committed_shards(task / out)
        count = shards(task / out) + rng.randrange(1, 4)
        assert count < TILES, f"too late for kill {number}"
        if process is None:
            process = started(task, out, engine)
            begun.append(process)
        wait_for(lambda: shards(task / out) >= count, process)  # noqa: B023
        victim = process.pid if kind == "driver" else rng.choice(victims(process, kind))
        os.kill(victim, signal.SIGKILL)
        if kind != "worker":
            ended(process)
            assert process.returncode == (-signal.SIGKILL if kind == "driver" else 1)
            process = None
        assert before.items() <= committed_shards(task / out).items()
    before = committed_shards(task / out)
    process = process or started(task, out, engine)
    assert ended(process) is not None and process.returncode == 0
    assert bytes_of(task / out) == bytes_of(task / "whole.zarr")
    assert before.items() <= committed_shards(task / out).items()
    for command in begun:
        for pid in session(command.pid):
            os.kill(pid, signal.SIGKILL)


LOST_MACHINE = """
import sys
import ray
from ray.cluster_utils import Cluster
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
lost, _ = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
killed = []


def watch(progress):
    if progress.done >= 20 and not killed:
        killed.append(progress.done)
        lost.kill_raylet()


settings = Settings(precision="float32", tile=(1, 64, 32), engine="ray", workers=3)
segment("volume.tif", "model.safetensors", sys.argv[1], settings, watch)
print("killed after", killed[0], "CPUs left", int(ray.cluster_resources()["CPU"]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_machine_changes_no_byte(task, tmp_path):
    """A cluster of three simulated machines; the raylet of one is killed, with its worker."""
    ran = subprocess.run(
        [sys.executable, "-c", LOST_MACHINE, tmp_path / "out.zarr"],
        cwd=task,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
    )
    assert "CPUs left 2" in ran.stdout, ran.stderr
    assert bytes_of(tmp_path / "out.zarr") == bytes_of(task / "whole.zarr")
