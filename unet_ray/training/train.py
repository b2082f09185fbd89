"""The `train` function: trains in this process, or on workers of Ray Train.

Handles workers, their ranks and restarts after failures. Independent of the training loop.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from unet_ray.engine import cluster
from unet_ray.errors import InputError, RunError, UnetRayError
from unet_ray.machine import memory_available
from unet_ray.network.checkpoints import write_tensors
from unet_ray.training.data import TrainingData
from unet_ray.training.displacement import displacement
from unet_ray.training.labels import load_labels
from unet_ray.training.maps import weighted
from unet_ray.training.patches import Sampler, ahead, sample_slots
from unet_ray.training.recipes import (
    CPU_CHANNELS,
    Recipe,
    channels_for,
)
from unet_ray.training.run_folder import (
    METRICS,
    MODEL,
    PATCHES,
    WEIGHTS,
    OnMeasure,
    RunFolder,
    read_measures,
)
from unet_ray.training.stream import streamed
from unet_ray.training.summary import Rows, model_line, summary
from unet_ray.training.trainer import Training, World, header_of, interrupts_between_steps
from unet_ray.training.validation import checked_score

CHECKPOINT_SECONDS = 60.0
STORED_PATCHES = 16
# Share of its CPUs that a worker reserves; below 1, so that Ray can schedule drawing tasks too.
CPU_SHARE = 0.9
# Drawing tasks per GPU. One task draws about 150 patches per second, enough for a worker on CPUs.
GPU_DRAWERS = 4
FAILURES = 3  # maximum number of retries in a row without a new checkpoint

Workers = int | tuple[int, int] | None


def train(
    images: list[str],
    labels: list[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    engine: cluster.EngineName = "local",
    workers: Workers = None,
    watch: OnMeasure = lambda measure: None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    takeover: bool = False,
    announce: Callable[[Rows], None] = lambda rows: None,
    any_classes: bool = False,
    strict: bool = False,
    memory: int | None = None,
) -> Path:
    """Trains a network on labelled volumes; resumes an interrupted run.

    A finished run goes on if `recipe` has more steps or minutes than before.

    Args:
        images: paths of the images.
        labels: paths of the labels, in the same order.
        out: the RUN folder for weight maps, checkpoints, ``metrics.jsonl`` and the final model.
        recipe: all settings.
        engine: ``local`` trains in this process, ``ray`` on workers of Ray Train.
        workers: number of workers, or the minimum and the maximum; by default one, or one per GPU.
        watch: called with each measure.
        checkpoint_seconds: time between two checkpoints; does not affect the result.
        takeover: take `out` over from another training run that is writing to it.
        announce: called before the first step with a table of data, network and limits, and at the
            end with the step of the model.
        any_classes: accept label values as classes even if they look like cell numbers.
        strict: refuse images and labels of which a part would be left out; otherwise the part is
            only named on standard error.
        memory: bytes of images, labels and weight maps above which they are read by windows; by
            default half of the memory that this process could use. The model is the same.

    Returns:
        Path of the model file.

    Raises:
        InputError: if files or settings are invalid, if `out` contains another run, or if another
            run is writing to it.
        RunError: if training fails.
    """
    run = RunFolder(out)
    if engine == "local" and workers not in (None, 1):
        count = ":".join(map(str, workers)) if isinstance(workers, tuple) else workers
        raise InputError(f"workers={count} needs --engine ray; the local engine has one worker.")
    if memory is None:
        memory = memory_available() // 2 or None
    elif type(memory) is not int or memory < 1:
        raise InputError(f"memory={memory!r} must be a whole number of bytes above 0.")
    labelled = load_labels(images, labels, recipe, any_classes, strict, memory)
    recipe = recipe.fitted(labelled.voxel_size, labelled.longest)
    choice: Rows = []
    if recipe.orientation == "auto":
        moved = displacement(labelled.parts) if recipe.dims == 2 else None
        recipe = recipe.oriented(moved)
        if moved and recipe.orientation != "any":
            y, x = moved
            text = f"labels are displaced from the images by {y:.1f}, {x:.1f} voxels (y, x)"
            choice.append(("orientation", f"{recipe.orientation}: {text}; see --orientation"))
    if recipe.base_channels is None:
        kind = cluster.find_device(engine, workers[0] if isinstance(workers, tuple) else workers)
        recipe = recipe.with_channels(run.channels() or channels_for(kind))
        if kind == "cpu" and recipe.base_channels == CPU_CHANNELS:
            more = "chosen for a CPU; more may pay off after several hours, see --base-channels"
            choice.append(("channels", f"{CPU_CHANNELS}, {more}"))
    if labelled.held_out:
        checked_score(labelled.held_out, len(labelled.class_values), recipe.best_by)
    run.refuse_other(dataclasses.asdict(recipe), labelled.identity)
    model, limits = run.path / MODEL, dataclasses.asdict(recipe)
    if run.is_finished(limits):
        return model
    # Ray is set up before the lease is taken, and the first attempt runs under the same lease.
    on_ray = _OnRay(recipe, run, workers, checkpoint_seconds) if engine == "ray" else None
    with run.owned(takeover) as owned:
        if run.is_finished(limits):  # written by the previous owner of the folder in the meantime
            run.refuse_other(limits, labelled.identity)
            return model
        data = weighted(labelled, recipe, run.path / WEIGHTS, owned.guard)
        _store_patches(owned, recipe, data)
        if on_ray:
            on_ray.share(data)
            announce(on_ray.summary(owned) + choice)
            on_ray.attempt(owned, watch)
        else:
            device = torch.device(cluster.local_device())
            world = World(0, 1, device, cluster.usable_cores())
            draw = partial(ahead, Sampler(data, recipe).__getitem__)
            training = Training(recipe, data, owned, world, draw, watch, checkpoint_seconds)
            seconds = training.step_seconds() if recipe.minutes else None
            where = f"{training.precision} on {device.type}"
            announce(summary(data, recipe, 1, where, training.step, seconds) + choice)
            with interrupts_between_steps() as interrupted:
                training.go(interrupted)
    if on_ray:
        on_ray.retry(run, watch)
    announce([("model", model_line(model))])
    return model


def _store_patches(run: RunFolder, recipe: Recipe, data: TrainingData) -> None:
    """Stores the first patches of the run, as the network sees them, for the report."""
    source = {"recipe": dataclasses.asdict(recipe), "data": data.identity}
    header = {"classes": len(data.class_values), **json.loads(json.dumps(source, allow_nan=False))}
    path = run.path / PATCHES
    if path.exists() and header_of(path) == header:
        return
    sampler = Sampler(data, recipe)
    tensors = {}
    for number, slot in enumerate(islice(sample_slots(0, 0, recipe.batch), STORED_PATCHES)):
        sample = sampler[slot].in_the_middle()
        tensors[f"image.{number}"] = torch.from_numpy(sample.image).half()
        tensors[f"targets.{number}"] = torch.from_numpy(sample.targets)
        tensors[f"weights.{number}"] = torch.from_numpy(sample.weights)
    write_tensors(path, tensors, header, run.guard)


class _OnRay:
    """A training on Ray Train: attempts until one succeeds or too many fail in a row."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        workers: Workers,
        checkpoint_seconds: float,
    ) -> None:
        import ray
        import ray.train as ray_train

        fewest, most = workers if isinstance(workers, tuple) else (workers, workers)
        device = cluster.find_device("ray", fewest)
        gpu = device == "cuda"
        fewest = cluster.pool_size(device, fewest) if gpu or fewest else 1
        most = most or fewest
        # A worker cannot use more CPUs than the largest machine has.
        largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
        threads = max(1, int(min(cluster.size_of("CPU") // most, largest)))
        self._threads, self._checkpoint_seconds = threads, checkpoint_seconds
        self._scaling = ray_train.ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu=gpu,
            resources_per_worker={"CPU": CPU_SHARE * (1 if gpu else threads)},
        )
        self._recipe = recipe
        self._fewest, self._device = fewest, device
        self._scratch = run.path / "checkpoints" / "ray"
        self._done, self._failures = False, 0

    def share(self, data: TrainingData) -> None:
        """Puts the data where all workers get it."""
        import ray

        self._data, settings = data, (self._threads, self._checkpoint_seconds)
        self._worker = partial(_ray_worker, self._recipe, [ray.put(data)], *settings)

    def summary(self, owned: RunFolder) -> Rows:
        """Describes the training; the time of a step on the workers is not measured."""
        newest = owned.newest()
        step = newest.header["step"] if newest else 0
        return summary(self._data, self._recipe, self._fewest, f"on {self._device} by Ray", step)

    def attempt(self, owned: RunFolder, watch: OnMeasure) -> None:
        """Trains to the end, or until a worker is lost.

        Raises:
            RunError: if the error is final, or too many attempts in a row failed.
        """
        import ray.train as ray_train
        from ray.train.torch import TorchTrainer

        config = ray_train.RunConfig(
            # A new name, so that Ray Train restores nothing: runs resume from our checkpoints.
            name=f"attempt-{time.time_ns()}",
            storage_path=str(self._scratch),
        )
        loop, before = partial(self._worker, owned), owned.checkpoints()[:1]
        try:
            with _following(owned.path / METRICS, watch):
                TorchTrainer(loop, scaling_config=self._scaling, run_config=config).fit()
            self._done = True
        except ray_train.TrainingFailedError as error:
            # On preemptible machines, any number of failures is fine if training progresses.
            cause, final = _cause(error)
            if final:
                raise RunError(cause) from error
            if owned.checkpoints()[:1] != before:
                self._failures = 0
            else:
                self._count(cause, error)

    def retry(self, run: RunFolder, watch: OnMeasure) -> None:
        """Attempts again until one succeeds; each attempt has a lease of its own.

        A new lease stops writes by workers of the attempt before.

        Raises:
            InputError: if another training writes to the folder.
            RunError: as `attempt`.
        """
        while not self._done:
            try:
                with run.owned() as owned:
                    self.attempt(owned, watch)
            except InputError as error:
                if not isinstance(error.__cause__, OSError):
                    raise
                self._count(str(error), error)  # a lock that a lost machine still holds
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _count(self, cause: str, error: Exception) -> None:
        self._failures += 1
        if self._failures > FAILURES:
            raise RunError(f"training failed on Ray: {cause}") from error


def _ray_worker(
    recipe: Recipe, reference: list[Any], threads: int, checkpoint_seconds: float, run: RunFolder
) -> None:
    """Trains in one worker.

    An error must end all workers, since the others may be waiting for this one.
    """
    import ray
    import ray.train as ray_train
    from ray.train.torch import get_device

    context = ray_train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), get_device(), threads)
    data = ray.get(reference[0])
    drawers = GPU_DRAWERS if world.device.type == "cuda" else 1
    draw = partial(streamed, reference[0], recipe, data.channels, drawers=drawers)
    Training(recipe, data, run, world, draw, lambda m: None, checkpoint_seconds).go()


def _cause(error: Any) -> tuple[str, bool]:
    """Returns the message of the failed worker, and whether the error is final.

    An error of unet-ray itself is final and takes precedence: other workers may have failed only
    because they lost the connection to this one.
    """
    failures = list((getattr(error, "worker_failures", None) or {0: error}).values())
    for failure in failures:
        if isinstance(failure, UnetRayError):
            return str(failure), True
    return str(failures[0]).strip().splitlines()[-1], False


@contextmanager
def _following(path: Path, watch: OnMeasure) -> Iterator[None]:
    """Calls `watch` with each line that workers add to a log while the body runs."""
    ended, seen = threading.Event(), len(read_measures(path))

    def follow() -> None:
        nonlocal seen
        while True:
            last = ended.wait(0.5)
            measures = read_measures(path)
            # A restarted worker first truncates the log to its checkpoint.
            seen = min(seen, len(measures))
            for measure in measures[seen:]:
                watch(measure)
            seen = len(measures)
            if last:
                return

    thread = threading.Thread(target=follow, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
