"""Training of the U-Net: the paper's weighted loss, on one process or on workers of Ray Train.

Knows steps, the optimiser, checkpoints and when to stop. Where patches come from is samples.py's;
what the network looks like is network.py's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unet_ray import engine as engines
from unet_ray.checkpoints import (
    ModelHeader,
    architecture_of,
    read_tensors,
    write_model,
    write_tensors,
)
from unet_ray.errors import InputError, RunError, refuse_below_file
from unet_ray.files import write_whole
from unet_ray.memory import keep_freed_memory
from unet_ray.network import UNet
from unet_ray.prediction import Precision, best_precision
from unet_ray.recipes import Recipe
from unet_ray.samples import Sample, Sampler, TrainingData, ahead, load_training_data
from unet_ray.validation import Validator, checked_score
from unet_ray.versions import versions

CHECKPOINT_SECONDS = 60.0
REPORT_STEPS = 10
KEPT_CHECKPOINTS = 2
VALIDATIONS = 10
BEST = "best.safetensors"
PATCHES, KEPT_PATCHES = "patches.safetensors", 4


@dataclass(frozen=True)
class Measure:
    """A line of ``metrics.jsonl``.

    Attributes:
        step: steps done.
        loss: mean weighted loss over the steps since the last line.
        learning_rate: of the last step.
        seconds: of training so far, over all interruptions.
        progress: 0 to 1.
        validation: scores on the held-out slices, by name, where they were just computed.
    """

    step: int
    loss: float
    learning_rate: float
    seconds: float
    progress: float
    validation: Mapping[str, float] | None = None

    def line(self) -> str:
        """The measure as JSON."""
        told = {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }
        return json.dumps(told) + "\n"


Watch = Callable[[Measure], None]


@dataclass(frozen=True)
class _World:
    """Who trains together: this worker's rank, how many there are, and the device of this one."""

    rank: int
    size: int
    device: torch.device
    threads: int


def train(
    images: list[str],
    labels: list[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    engine: engines.EngineName = "local",
    workers: int | None = None,
    watch: Watch = lambda measure: None,
) -> Path:
    """Trains a network on labelled volumes; goes on where an interrupted run stopped.

    Args:
        images: paths of the images.
        labels: paths of their class labels.
        out: the RUN folder: checkpoints, ``metrics.jsonl`` and, at the end, the model.
        recipe: all settings.
        engine: ``local`` trains in this process, ``ray`` on workers of Ray Train.
        workers: how many train together; by default one, or one per GPU.
        watch: called with each measure.

    Returns:
        Path of the model file.

    Raises:
        InputError: for bad files or settings, or if `out` holds another run.
        RunError: if training fails.
    """
    run = Path(out).absolute()
    _check_run_folder(run)
    if engine == "local" and workers not in (None, 1):
        raise InputError(f"workers={workers} needs --engine ray: the local engine has one.")
    data = load_training_data(
        images,
        labels,
        recipe.w0,
        recipe.sigma,
        recipe.labels_are,
        recipe.ignore_label,
        recipe.val,
        recipe.val_fraction,
    )
    if data.held_out:
        checked_score(data.held_out, len(data.class_values), recipe.best_by)
    about = {"recipe": dataclasses.asdict(recipe), "data": data.identity}
    model = run / "model.safetensors"
    _refuse_other_run(run, about)
    if model.exists():
        return model
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    _keep_patches(run / PATCHES, recipe, data)
    if engine == "ray":
        _fit_on_ray(recipe, data, run, workers, watch)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        _fit(recipe, data, run, _World(0, 1, device, engines.usable_cores()), watch)
    return model


def _check_run_folder(run: Path) -> None:
    known = ("checkpoints", "metrics.jsonl", "model.safetensors")
    refuse_below_file(run)
    if run.is_file():
        raise InputError(f"{run}: is a file; --out of train is a folder.")
    if run.is_dir() and any(run.iterdir()) and not any((run / name).exists() for name in known):
        raise InputError(f"{run}: exists and is not a training run; choose another --out.")


def _refuse_other_run(run: Path, about: dict[str, Any]) -> None:
    """Refuses to go on with a run of other settings or data, naming the field that differs."""
    model = run / "model.safetensors"
    whole = (model, read_tensors(model)) if model.exists() else _newest(run)
    if whole is None:
        return
    header = whole[1][1]
    if "recipe" not in header.get("training", {}):
        raise InputError(f"{run}: holds a model that was not trained here; choose another --out.")
    there = {"recipe": header["training"]["recipe"], "data": header["data"]}
    here = json.loads(json.dumps(about))
    for part in here:
        for field, value in here[part].items():
            if there[part].get(field) != value:
                raise InputError(
                    f"{run}: was trained with another {field} ({there[part].get(field)}, now "
                    f"{value}); choose another --out."
                )


def _checkpoints(run: Path) -> list[Path]:
    """Checkpoint files, newest first."""
    return sorted((run / "checkpoints").glob("step-*.safetensors"), reverse=True)


def _newest(run: Path) -> tuple[Path, tuple[dict[str, Tensor], dict[str, Any]]] | None:
    """The newest checkpoint that is whole, and what it holds; a damaged one is passed over."""
    for path in _checkpoints(run):
        try:
            return path, read_tensors(path)
        except InputError as error:
            print(f"unet-ray: {error} The one before it is used.", file=sys.stderr)
    return None


def _keep_patches(path: Path, recipe: Recipe, data: TrainingData) -> None:
    """Keeps the first patches of the run, as the network sees them, for people to look at."""
    if path.exists():
        return
    sampler = Sampler(data, recipe.patch, recipe.output, recipe.seed, recipe.elastic)
    tensors = {}
    for number in range(KEPT_PATCHES):
        sample = sampler[number]
        tensors[f"image.{number}"] = torch.from_numpy(sample.image).half()
        tensors[f"targets.{number}"] = torch.from_numpy(sample.targets)
        tensors[f"weights.{number}"] = torch.from_numpy(sample.weights)
    write_tensors(path, tensors, {"classes": len(data.class_values)})


class _Clock:
    """How far training is: by steps, by minutes, whichever bound comes first."""

    def __init__(self, recipe: Recipe, world: _World, elapsed: float) -> None:
        self._recipe, self._world = recipe, world
        self._start, self._stopped = time.monotonic() - elapsed, False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def stop(self) -> None:
        """Ends training on every worker; only rank 0 is asked."""
        self._stopped = True

    def progress(self, step: int) -> float:
        """0 to 1, the same number on every worker."""
        minutes = self.seconds / 60 / self._recipe.minutes if self._recipe.minutes else 0.0
        steps = step / self._recipe.steps if self._recipe.steps else 0.0
        progress = 1.0 if self._stopped else min(1.0, max(minutes, steps))
        if self._world.size > 1:
            shared = torch.tensor([progress], dtype=torch.float64, device=self._world.device)
            torch.distributed.broadcast(shared, src=0)
            progress = float(shared)
        return progress


def _fit(recipe: Recipe, data: TrainingData, run: Path, world: _World, watch: Watch) -> None:
    """The training loop of one worker; rank 0 writes checkpoints, metrics and the model."""
    torch.set_num_threads(world.threads)
    keep_freed_memory()
    torch.manual_seed(recipe.seed)
    network = recipe.network(data.channels, len(data.class_values))
    network.to(world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = _optimiser(recipe, network)
    step, elapsed, precision, pending = _restore(run, network, optimiser, world.device)
    precision = precision or _precision(recipe, world)
    learner = _Learner(recipe, network, optimiser, world, precision)
    header = partial(_header, recipe, data, network, precision)
    log = _Log(run / "metrics.jsonl", step, pending, watch if world.rank == 0 else None)
    clock = _Clock(recipe, world, elapsed)
    judge = _Judge(recipe, data, run, log, precision, world, step) if world.rank == 0 else None
    saved = time.monotonic()
    batches = _batches(recipe, data, world, step)

    def save() -> None:
        _save(run, step, clock.seconds, network, optimiser, header(step), log.pending)

    progress = clock.progress(step)
    while True:
        if judge and judge.due(progress):
            save()
            judge.judge(network, header(step), step, learner.rate, clock.seconds, progress)
            saved = time.monotonic()
        if judge and judge.impatient():  # also of a run that was cut off right there
            clock.stop()
        progress = clock.progress(step)
        if progress >= 1:
            break
        loss = learner.step(next(batches), step, progress)
        step += 1
        progress = clock.progress(step)
        if not math.isfinite(loss):
            raise RunError(f"step {step}: the loss is {loss}; lower --learning-rate and run again.")
        log.add(step, loss, learner.rate, clock.seconds, progress)
        if world.rank == 0 and time.monotonic() - saved > CHECKPOINT_SECONDS:
            save()
            saved = time.monotonic()
    log.flush(step, learner.rate, clock.seconds, 1.0)
    if world.rank == 0:
        save()
        best = run / BEST
        if best.exists():
            write_whole(run / "model.safetensors", best.read_bytes())
            best.unlink()
        else:
            write_model(run / "model.safetensors", network.cpu(), header(step))


class _Judge:
    """Validates now and then, keeps the best model, and knows when patience is at an end."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        run: Path,
        log: _Log,
        precision: Precision,
        world: _World,
        step: int,
    ) -> None:
        self._best_file, self._log, self._patience = run / BEST, log, recipe.patience
        self._validator = (
            Validator(
                data.held_out,
                len(data.class_values),
                recipe.best_by,
                precision,
                "cuda" if world.device.type == "cuda" else "cpu",
            )
            if data.held_out
            else None
        )
        self._best: Mapping[str, float] | None = None
        self._since, self._judged = 0, 0
        for measure in log.kept():
            if measure.validation is not None:
                self._judged = _tenth(measure.progress)
                self._note(measure.validation)
        if not self._holds_best_of(step):
            self._best_file.unlink(missing_ok=True)
            self._best = None

    def _holds_best_of(self, step: int) -> bool:
        """Whether the best model is there, and not of a step that is yet to come again."""
        if not self._best_file.exists():
            return False
        return bool(read_tensors(self._best_file)[1]["training"]["steps"] <= step)

    def due(self, progress: float) -> bool:
        """Whether another tenth of the training is done."""
        return self._validator is not None and _tenth(progress) > self._judged

    def judge(
        self,
        network: UNet,
        header: ModelHeader,
        step: int,
        rate: float,
        seconds: float,
        progress: float,
    ) -> None:
        """Scores the network, keeps it if it is the best, and writes the scores down."""
        if self._validator is None:
            return
        network.eval()
        scores = self._validator(network)
        network.train()
        self._judged = _tenth(progress)
        if self._note(scores):
            told = dataclasses.asdict(header)
            told["training"] = {**told["training"], "validation": scores}
            write_tensors(self._best_file, network.state_dict(), told)
        self._log.flush(step, rate, seconds, progress, scores)

    def _note(self, scores: Mapping[str, float]) -> bool:
        """Counts a validation; says whether it is the best so far."""
        if self._validator is None or not self._validator.better(scores, self._best):
            self._since += 1
            return False
        self._best, self._since = scores, 0
        return True

    def impatient(self) -> bool:
        """Whether too many validations have brought nothing better."""
        return self._patience is not None and self._since >= self._patience


def _tenth(progress: float) -> int:
    return math.floor(progress * VALIDATIONS + 1e-9)


class _Learner:
    """One step of the optimiser on the paper's energy (eq. 1): weighted cross-entropy."""

    def __init__(
        self,
        recipe: Recipe,
        network: UNet,
        optimiser: torch.optim.Optimizer,
        world: _World,
        precision: Precision,
    ) -> None:
        self._recipe, self._world, self._optimiser = recipe, world, optimiser
        self._network, self._dtype = network.train(), getattr(torch, precision)
        self._model: nn.Module = DistributedDataParallel(network) if world.size > 1 else network
        self.rate = 0.0

    def step(self, samples: list[Sample], number: int, progress: float) -> float:
        """Learns from a batch; returns its loss. Chance (dropout) depends on the number alone."""
        chance = np.random.SeedSequence([self._recipe.seed, number, self._world.rank])
        torch.manual_seed(int(chance.generate_state(1)[0]))
        self.rate = self._recipe.learning_rate * (1 - progress) ** self._recipe.decay
        for group in self._optimiser.param_groups:
            group["lr"] = self.rate
        image, targets, weights = self._tensors(samples)
        with torch.autocast(self._world.device.type, self._dtype, self._dtype != torch.float32):
            scores = self._model(image)
        losses = nn.functional.cross_entropy(scores.float(), targets, reduction="none")
        loss = (losses * weights).mean()
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._recipe.clip:
            nn.utils.clip_grad_norm_(self._network.parameters(), self._recipe.clip)
        self._optimiser.step()
        return float(loss.detach())

    def _tensors(self, samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        def stacked(arrays: list[np.ndarray[Any, Any]]) -> Tensor:
            tensor = torch.from_numpy(np.stack(arrays))
            if self._world.device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(self._world.device, non_blocking=True)

        image = stacked([s.image for s in samples]).contiguous(memory_format=torch.channels_last)
        targets = stacked([s.targets for s in samples]).long()
        return image, targets, stacked([s.weights for s in samples])


def _optimiser(recipe: Recipe, network: UNet) -> torch.optim.Optimizer:
    parameters, rate = network.parameters(), recipe.learning_rate
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=recipe.momentum)
    return torch.optim.AdamW(parameters, rate)


def _precision(recipe: Recipe, world: _World) -> Precision:
    if recipe.precision != "auto":
        return recipe.precision
    return best_precision("cuda" if world.device.type == "cuda" else "cpu")


def _batches(
    recipe: Recipe, data: TrainingData, world: _World, step: int
) -> Iterator[list[Sample]]:
    """The batches of this worker from `step` on: a step's samples are numbered across workers."""
    sampler = Sampler(data, recipe.patch, recipe.output, recipe.seed, recipe.elastic)
    numbers = (
        (s * world.size + world.rank) * recipe.batch + k
        for s in count(step)
        for k in range(recipe.batch)
    )
    samples = ahead(sampler.__getitem__, numbers)
    while True:
        yield [next(samples) for _ in range(recipe.batch)]


def _header(
    recipe: Recipe, data: TrainingData, network: UNet, precision: Precision, step: int
) -> ModelHeader:
    return ModelHeader(
        architecture=architecture_of(network),
        class_values=list(data.class_values),
        normalisation={"method": "mean-std"},
        voxel_size=list(data.voxel_size) if data.voxel_size else None,
        training={"recipe": dataclasses.asdict(recipe), "precision": precision, "steps": step},
        data=data.identity,
        versions=versions(),
    )


def _save(
    run: Path,
    step: int,
    seconds: float,
    network: UNet,
    optimiser: torch.optim.Optimizer,
    header: ModelHeader,
    pending: Sequence[float],
) -> None:
    """Writes a checkpoint and drops all but the newest ones."""
    tensors = {f"model.{name}": t for name, t in network.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        for name, value in state.items():
            if value is not None:
                tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value)
    told = {
        **dataclasses.asdict(header),
        "step": step,
        "seconds": seconds,
        "pending_losses": list(pending),
    }
    write_tensors(run / "checkpoints" / f"step-{step:09d}.safetensors", tensors, told)
    for old in _checkpoints(run)[KEPT_CHECKPOINTS:]:
        old.unlink()


def _restore(
    run: Path, network: UNet, optimiser: torch.optim.Optimizer, device: torch.device
) -> tuple[int, float, Precision | None, list[float]]:
    """Loads the newest checkpoint.

    Returns:
        Steps done, seconds trained, precision, and the losses since the last line of the log.
    """
    newest = _newest(run)
    if newest is None:
        return 0, 0.0, None, []
    tensors, header = newest[1]
    prefix = "model."
    network.load_state_dict(
        {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    )
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    return (
        header["step"],
        header["seconds"],
        header["training"]["precision"],
        header["pending_losses"],
    )


class _Log:
    """``metrics.jsonl``: one line per some steps, cut back to the checkpoint on a restart."""

    def __init__(
        self, path: Path, step: int, pending: Sequence[float], watch: Watch | None
    ) -> None:
        self._path, self._watch = path, watch
        self.pending = list(pending)
        if watch is not None:
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
            write_whole(path, "".join(line + "\n" for line in kept).encode())
            if kept and json.loads(kept[-1])["step"] == step:
                self.pending.clear()  # the checkpoint is older than the line of its own step

    def kept(self) -> list[Measure]:
        """What the log holds."""
        return [Measure(**json.loads(line)) for line in _lines(self._path)]

    def add(self, step: int, loss: float, rate: float, seconds: float, progress: float) -> None:
        """Counts a step; every so many are a line."""
        self.pending.append(loss)
        if step % REPORT_STEPS == 0:
            self.flush(step, rate, seconds, progress)

    def flush(
        self,
        step: int,
        rate: float,
        seconds: float,
        progress: float,
        validation: Mapping[str, float] | None = None,
    ) -> None:
        """Writes a line of the steps since the last one, or of no step but with a validation."""
        if self._watch is None or not (self.pending or validation is not None):
            return
        loss = float(np.mean(self.pending)) if self.pending else self._last_loss()
        measure = Measure(step, loss, rate, round(seconds, 3), progress, validation)
        with open(self._path, "a") as file:
            file.write(measure.line())
        self.pending.clear()
        self._watch(measure)

    def _last_loss(self) -> float:
        kept = self.kept()
        return kept[-1].loss if kept else math.nan


def _lines(path: Path) -> list[str]:
    """Whole lines of a log; a last one that a kill cut short is left out."""
    if not path.exists():
        return []
    *whole, _ = path.read_text().split("\n")
    return whole


def _fit_on_ray(
    recipe: Recipe, data: TrainingData, run: Path, workers: int | None, watch: Watch
) -> None:
    import ray
    import ray.train as ray_train
    from ray.train.torch import TorchTrainer

    device = engines.find_device("ray", workers)
    gpu = device == "cuda"
    size = engines.pool_size(device, workers) if gpu or workers else 1
    # A worker lives on one machine, however many the cluster has.
    largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
    threads = max(1, int(min(engines.cluster_size("CPU") // size, largest)))
    reference = ray.put(data)
    scratch = run / "checkpoints" / "ray"
    trainer = TorchTrainer(
        partial(_ray_worker, recipe, [reference], run, threads),
        scaling_config=ray_train.ScalingConfig(
            num_workers=size, use_gpu=gpu, resources_per_worker={"CPU": 1 if gpu else threads}
        ),
        run_config=ray_train.RunConfig(
            # A new name each time: what is resumed is our own newest checkpoint.
            name=f"attempt-{time.time_ns()}",
            storage_path=str(scratch),
            failure_config=ray_train.FailureConfig(max_failures=3),
        ),
    )
    with _following(run / "metrics.jsonl", watch):
        try:
            trainer.fit()
        except ray_train.TrainingFailedError as error:
            raise RunError(f"training failed on Ray: {_cause(error)}") from error
    shutil.rmtree(scratch, ignore_errors=True)


def _ray_worker(recipe: Recipe, reference: list[Any], run: Path, threads: int) -> None:
    import ray
    import ray.train as ray_train
    from ray.train.torch import get_device

    context = ray_train.get_context()
    world = _World(context.get_world_rank(), context.get_world_size(), get_device(), threads)
    _fit(recipe, ray.get(reference[0]), run, world, lambda measure: None)


def _cause(error: Any) -> str:
    """The first worker's own words, without Ray's stack of frames around them."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    return str(next(iter(failures.values()))).strip().splitlines()[-1]


@contextmanager
def _following(path: Path, watch: Watch) -> Iterator[None]:
    """Calls `watch` with the lines that workers add to a log, while the body runs."""
    ended, seen = threading.Event(), len(_lines(path))

    def follow() -> None:
        nonlocal seen
        while True:
            last = ended.wait(0.5)
            lines = _lines(path)
            # A restarted worker cuts the log back to its checkpoint first.
            seen = min(seen, len(lines))
            for line in lines[seen:]:
                watch(Measure(**json.loads(line)))
            seen = len(lines)
            if last:
                return

    thread = threading.Thread(target=follow, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
