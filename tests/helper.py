"""Shared by tests: makes inputs, compares results, watches processes, and fakes workers.

Knows files, stores and workers of tiles. Does not know what any test promises.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
import torch
import zarr
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.engine.rounds import Progress
from unet_ray.engine.stages import Stage
from unet_ray.network.checkpoints import ModelHeader, architecture_of, read_tensors, write_model
from unet_ray.network.unet import UNet
from unet_ray.segmentation.settings import Settings
from unet_ray.training.data import TrainingData
from unet_ray.training.labels import load_labels
from unet_ray.training.maps import Labelled, weighted
from unet_ray.training.recipes import Recipe

FLOAT32 = Settings(precision="float32", workers=2)
TILED = dataclasses.replace(FLOAT32, tile=(1, 32, 20))

# Inputs


def noise(shape: Sequence[int], dtype: str = "uint8", seed: int = 0) -> NDArray[Any]:
    """Returns grey values with some structure, so that every class occurs."""
    rng = np.random.default_rng(seed)
    waves = np.add.outer(*(np.sin(np.arange(n) / 5) for n in shape[-2:]))
    image = 100 + 20 * waves + rng.normal(0, 25, shape)
    return image.clip(0, 255).astype(dtype)


def load_training_data(
    images: Sequence[Any], labels: Sequence[Any], recipe: Recipe
) -> TrainingData:
    """Loads labelled volumes with their weight maps into memory; keeps nothing on disk."""
    return weighted(load_labels(images, labels, recipe), recipe)


def in_memory_labels(image: Any, labels: Any, **chosen: Any) -> Labelled:
    """Returns labelled slices (z, y, x) without weight maps."""
    return load_labels([image], [labels], Recipe.of("default", **chosen), any_classes=True)


def write_stack(path: Path, array: NDArray[Any], **options: Any) -> Path:
    """Writes an array that ends in (z, y, x) as TIFF; returns its path."""
    axes = {"axes": "TCZYX"[-array.ndim :]}
    tifffile.imwrite(path, array, **{"photometric": "minisblack", "metadata": axes, **options})
    return path


def petabyte(folder: Path) -> Path:
    """Creates a Zarr array of 1 PB without any stored chunk; returns its path."""
    path = folder / "peta.zarr"
    zarr.create_array(path, shape=(10**5,) * 3, chunks=(64, 1024, 1024), dtype="uint8")
    return path


def random_model(
    path: Path,
    values: Sequence[int] = (0, 255),
    in_channels: int = 1,
    depth: int = 2,
    base: int = 2,
    seed: int = 0,
) -> Path:
    """Writes an untrained network whose norm layers look trained; returns its path."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet(in_channels, len(values), base, depth, "batch", 0.0)
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 2)
        network.head.weight.data.mul_(2)
    header = ModelHeader(architecture_of(network), list(values), {"method": "mean-std"})
    write_model(path, network, header)
    return path


def recipe(name: str = "default", **chosen: Any) -> Recipe:
    """Returns a recipe for a network so small that a step takes milliseconds."""
    tiny = {"base_channels": 2, "depth": 1, "patch": (44, 48), "steps": 40, "elastic": 2.0}
    return Recipe.of(name, **{**tiny, "learning_rate": 0.02, **chosen})


def random_stack(
    seed: int, shape: tuple[int, int, int] = (3, 20, 24), values: int = 40
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns a proposal and its truth of a few cells; it has errors at every threshold."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 1.5, 1.5))
    truth = smooth > -0.05
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 1, 1))
    proposal = np.clip(0.5 + 1.5 * (smooth + 0.05) + 0.4 * noise, 0, 1)
    return np.rint(proposal * values) / values, truth


def random_labels(
    seed: int, shape: tuple[int, int, int] = (4, 9, 12), most: int = 5
) -> list[NDArray[np.int64]]:
    """Returns two label maps of blocks with holes."""
    rng = np.random.default_rng(seed)
    blocks = shape[0], shape[1] // 3, shape[2] // 3
    return [
        np.kron(rng.integers(0, most + 1, blocks), np.ones((1, 3, 3), int))
        * (rng.random(shape) < 0.9)
        for _ in range(2)
    ]


# Results


class StoppedError(Exception):
    """Simulates a kill in the middle of a run."""


def stop_after(tiles: int) -> Callable[[Progress], None]:
    """Returns a callback that stops a run after `tiles` finished tiles."""

    def watch(progress: Progress) -> None:
        if progress.finished == tiles:
            raise StoppedError

    return watch


def bytes_of(store: Path) -> dict[str, bytes]:
    """Returns the content of every file of a store, except its private folder."""
    files = [p for p in store.rglob("*") if p.is_file() and ".unet_ray" not in p.parts]
    return {str(p.relative_to(store)): p.read_bytes() for p in files}


def shards_of(store: Path) -> set[str]:
    """Returns the names of the shards of a store."""
    return {name for name in bytes_of(store) if "/c/" in name}


def classes_of(store: Path) -> NDArray[np.uint8]:
    """Returns the class map of a store, (z, y, x)."""
    return np.asarray(zarr.open_array(store / "labels/classes/0", mode="r")[:])


def state_of(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Returns inode, size and time of all files below a folder: equal only if none was touched."""
    stats = {p: p.lstat() for p in folder.rglob("*")}
    return {p: (s.st_ino, s.st_size, s.st_mtime_ns) for p, s in stats.items()}


def files_in(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Returns time and content of every file below a folder."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def measures(out: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def model_content(model: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns header and tensors of a model file in a form that can be compared."""
    tensors, header = read_tensors(model)
    return dict(header), {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ElementTree.Element:
    """Returns the root of a chart; fails unless it is well-formed XML."""
    return ElementTree.fromstring(svg)


def paths(svg: str, name: str | None = None) -> list[str | None]:
    """Returns the path data of the lines of a chart, or of those of one class."""
    nodes = [n for n in parsed(svg).iter(f"{SVG}path") if name in (None, n.get("class"))]
    return [node.get("d") for node in nodes]


def points(path: str) -> NDArray[np.float64]:
    """Returns the corners (x, y) of a line of a chart."""
    return np.array(re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path), float)


# Processes


def session(leader: int) -> list[int]:
    """Returns the ids of the living processes of a session, in ascending order."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session_id, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        if int(session_id) == leader and state not in "ZX":
            pids.append(int(folder.name))
    return sorted(pids)


def title(pid: int) -> str:
    """Returns the command line of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def status_bytes(pid: int, name: str) -> int:
    """Returns a size in ``/proc/PID/status``, in bytes; 0 once the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(rf"{name}:\s+(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


def anonymous(pid: int) -> int:
    """Returns the anonymous memory of a process, in bytes."""
    return status_bytes(pid, "RssAnon")


def actors_of(kind: str) -> list[int]:
    """Returns the ids of the processes of all Ray actors of one class."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"({kind})" in (folder / "cmdline").read_text():
                pids.append(int(folder.name))
        except OSError:
            continue
    return pids


def workers_of(driver: int, engine: str) -> list[int]:
    """Returns the ids of the predicting processes: the command itself, or its Ray actors."""
    return [driver] if engine == "local" else actors_of("TileActor")


def resident_peak(arguments: Sequence[object]) -> int:
    """Runs a command of unet-ray; returns its peak memory in bytes, including mapped files."""
    command, peak = [sys.executable, "-m", "unet_ray", *map(str, arguments)], 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        while running.poll() is None:
            peak = max(peak, status_bytes(running.pid, "VmHWM"))
            time.sleep(0.05)
    assert running.returncode == 0
    return peak


# Workers of tiles, without torch or voxels


class Marker:
    """A worker that adds an empty file to a folder for each tile that it writes.

    Args:
        folder: of the files.
        bad: exceptions to raise, by (step, tile).
        deadly: tile whose prediction kills its process.
        deaths: number of times that it does.
        hanging: tiles whose prediction takes a minute.
    """

    def __init__(
        self,
        folder: str,
        bad: Mapping[tuple[str, int], Exception] | None = None,
        deadly: int | None = None,
        deaths: int = 1,
        hanging: Collection[int] = (),
    ) -> None:
        self.folder, self.bad, self.deadly, self.deaths = folder, bad or {}, deadly, deaths
        self.hanging = hanging

    def step(self, name: str, tile: int) -> None:
        if (name, tile) in self.bad:
            raise self.bad[name, tile]

    def read(self, tile: int) -> NDArray[np.int64]:
        self.step("read", tile)
        return np.full(3, tile)

    def predict(self, tile: int, voxels: NDArray[np.int64]) -> NDArray[np.int64]:
        self.step("predict", tile)
        assert voxels.tolist() == [tile] * 3
        if tile in self.hanging:
            with open(Path(self.folder, "hung"), "ab") as mark:
                mark.write(b".")
            time.sleep(60)
        if tile == self.deadly:
            with open(Path(self.folder, "killed"), "ab") as mark:
                if mark.tell() < self.deaths:
                    mark.write(b".")
                    mark.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
        return np.asarray(voxels.sum(keepdims=True))

    def write(self, tile: int, result: NDArray[np.int64]) -> None:
        self.step("write", tile)
        assert result.tolist() == [3 * tile]
        Path(self.folder, f"{tile} {os.getpid()} {time.monotonic_ns()}").touch()


def written(folder: Path) -> Counter[int]:
    """Returns how often a `Marker` has written each tile."""
    return Counter(int(p.name.split()[0]) for p in folder.iterdir() if p.name[0].isdigit())


def stage(folder: Path, device: str = "cpu", **chosen: Any) -> Stage:
    """Returns a stage of `Marker`."""
    return Stage("mark", partial(Marker, str(folder), **chosen), device)


def marked(folder: Path, **chosen: Any) -> Stage:
    """Returns a stage of `Marker` with marks."""
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    return dataclasses.replace(stage(folder, **chosen), marks=marks)


class Watching:
    """A worker that counts how many of its steps run at the same time, in one process.

    Args:
        together: this many tiles wait for each other before any continues; fewer is an error.
    """

    def __init__(self, together: int = 1) -> None:
        self.lock, self.started = threading.Lock(), list[int]()
        self.now, self.most = Counter[str](), Counter[str]()
        self.meeting = threading.Barrier(together, timeout=20)

    def during(self, *names: str) -> None:
        with self.lock:
            for name in names:
                self.now[name] += 1
                self.most[name] = max(self.most[name], self.now[name])
        time.sleep(0.01)

    def after(self, *names: str) -> None:
        with self.lock:
            self.now.subtract(names)

    def read(self, tile: int) -> None:
        self.started.append(tile)
        self.during("tile")
        self.meeting.wait()

    def predict(self, tile: int, voxels: None) -> None:
        self.during("predict")
        self.after("predict")

    def write(self, tile: int, result: None) -> None:
        self.after("tile")


class Slow:
    """A worker whose tiles take the time that `seconds` returns for their number."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds, self.ended = seconds, list[int]()

    def read(self, tile: int) -> None:
        time.sleep(self.seconds(tile))

    def predict(self, tile: int, voxels: None) -> None:
        """Does nothing."""

    def write(self, tile: int, result: None) -> None:
        self.ended.append(tile)


class Idle:
    """A worker that does nothing."""

    def read(self, tile: int) -> None:
        """Does nothing."""

    def predict(self, tile: int, voxels: None) -> None:
        """Does nothing."""

    def write(self, tile: int, result: None) -> None:
        """Does nothing."""
