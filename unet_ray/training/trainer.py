"""The training loop of the U-Net with the paper's weighted loss.

Knows steps, the optimiser, validation and when to stop. Does not know how patches are drawn or how
the RUN folder stores files.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unet_ray.errors import InputError, RunError
from unet_ray.machine import keep_freed_memory
from unet_ray.network.checkpoints import (
    WEIGHT,
    ModelHeader,
    architecture_of,
    read_hashed_model,
    read_tensors,
    write_tensors,
)
from unet_ray.network.prediction import (
    Device,
    Precision,
    best_precision,
    gpu_versions,
    settle_arithmetic,
)
from unet_ray.network.unet import UNet, channels_last
from unet_ray.training.data import TrainingData
from unet_ray.training.gallery import PREDICTIONS, store_predictions
from unet_ray.training.patches import Sample, Sampler, SampleSlot, sample_slots
from unet_ray.training.recipes import Recipe
from unet_ray.training.run_folder import (
    BEST,
    MODEL,
    REPORT_STEPS,
    Log,
    OnMeasure,
    RunFolder,
)
from unet_ray.training.validation import Validator, calibrated
from unet_ray.versions import versions

VALIDATIONS = 10
CALIBRATION_PATCHES = 8
NO_LIMIT = timedelta(days=365)
LAST = "last."  # prefix of the weights of the last step, if those of the model are averages
Draw = Callable[[Iterator[SampleSlot]], Iterator[Sample]]
Loss = float | Tensor  # reading a tensor of a GPU waits for all that the GPU has still to do


@dataclass(frozen=True)
class World:
    """The workers that train together, as seen from one of them.

    Attributes:
        rank: rank of this worker, from 0.
        size: number of workers.
        device: device of this worker.
        threads: number of CPU threads of this worker.
    """

    rank: int
    size: int
    device: torch.device
    threads: int

    @property
    def first(self) -> bool:
        """Whether this worker writes the files."""
        return self.rank == 0

    def agree(self, loss: Loss, progress: float) -> tuple[Loss, float]:
        """Returns the mean loss of all workers and the progress of the first one.

        Several workers wait for their GPUs here. A single worker does not, and its loss is not
        read.
        """
        if self.size == 1:
            return loss, progress
        terms = [float(loss) / self.size, progress if self.first else 0.0]
        sums = torch.tensor(terms, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return float(sums[0]), float(sums[1])

    def group_without_limit(self) -> Any:
        """Returns a process group in which workers wait for each other without a time limit.

        Every worker must call this at the same point. The default group gives up after 30 minutes,
        which stops a training whose worker hangs in a step. It would also stop a training whose
        first worker validates for longer.
        """
        return torch.distributed.new_group(timeout=NO_LIMIT) if self.size > 1 else None

    def meet(self, group: Any) -> None:
        """Returns when every worker has called this, however long that takes.

        If a worker ends, its connections break, and the others raise an error at once.
        """
        if self.size > 1:
            count = torch.ones(1, device=self.device)
            torch.distributed.all_reduce(count, group=group)
            count.item()  # on a GPU, only reading the sum waits for it


def header_of(path: Path) -> dict[str, Any]:
    """Reads the header of a file that can be recreated; returns ``{}`` if it is damaged."""
    try:
        return read_tensors(path)[1]
    except InputError:
        return {}


@contextmanager
def interrupts_between_steps() -> Iterator[Callable[[], bool]]:
    """Delays Ctrl-C to the end of a step; a second one takes effect at once.

    An interrupt within a step would leave weights that no undisturbed run has.

    Yields:
        A function that returns whether Ctrl-C was pressed.
    """
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield lambda: False  # only the main thread gets signals, and this one may be ignored
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


class _Clock:
    """Measures training time, and progress towards the limit of steps or minutes."""

    def __init__(self, recipe: Recipe, elapsed: float) -> None:
        self._recipe, self._start = recipe, time.monotonic() - elapsed

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def leave_out(self, seconds: float) -> None:
        """Does not count some seconds since the start."""
        self._start += seconds

    def progress(self, step: int) -> float:
        """Returns the larger of the completed shares of steps and minutes, 0 to 1."""
        return _progress(self._recipe, step, self.seconds)


def _progress(recipe: Recipe, step: int, seconds: float) -> float:
    minutes = seconds / 60 / recipe.minutes if recipe.minutes else 0.0
    steps = step / recipe.steps if recipe.steps else 0.0
    return min(1.0, max(minutes, steps))


@dataclass(frozen=True)
class _State:
    """State of the training at a checkpoint; the defaults are those of a new run.

    Attributes:
        precision: number format of the arithmetic.
        step: number of completed steps.
        seconds: training time.
        learning_rate: learning rate of the last step.
        pending_losses: losses of the steps since the last line of the log.
    """

    precision: Precision | None = None
    step: int = 0
    seconds: float = 0.0
    learning_rate: float = 0.0
    pending_losses: Sequence[float] = ()


class Training:
    """The training of one worker; the first worker writes checkpoints, metrics and the model.

    Args:
        recipe: settings of the run.
        data: labelled volumes.
        run: the RUN folder.
        world: the workers that train together.
        draw: returns the samples of an iterator of steps and slots, in order.
        watch: called with each measure.
        checkpoint_seconds: least time between two checkpoints.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        run: RunFolder,
        world: World,
        draw: Draw,
        watch: OnMeasure,
        checkpoint_seconds: float,
    ) -> None:
        torch.set_num_threads(world.threads)
        keep_freed_memory()
        settle_arithmetic()
        torch.manual_seed(recipe.seed)
        self._recipe, self._data, self._run, self._world = recipe, data, run, world
        self._draw, self._checkpoint_seconds = draw, checkpoint_seconds
        self._network = recipe.network(data.channels, len(data.class_values))
        self._network.to(world.device).to(memory_format=channels_last(recipe.dims))  # type: ignore[call-overload]
        self._optimiser = optimiser_for(recipe, self._network)
        self._average: Average | None = None
        self._start = ""  # SHA-256 of the model that the training starts from
        state = self._restore() or self._begin()
        self.step = state.step
        self.precision: Precision = state.precision or precision_for(recipe, world)
        self._learner = Learner(
            recipe,
            self._network,
            self._optimiser,
            world,
            self.precision,
            state.learning_rate,
        )
        self._clock, self._saved = _Clock(recipe, state.seconds), time.monotonic()
        self._log = self._validation = None
        self._unread: list[Loss] = []  # losses of the last steps
        self._unlimited, self._last_tenth = world.group_without_limit(), -1
        if world.first and recipe.averaged and self._average is None:
            self._average = Average(self._network, recipe.averaged)
        if world.first and not run.checkpoints():
            self._save()  # its header lets later runs refuse another recipe or other data
        if world.first:
            patches = world.size * recipe.batch
            self._log = Log(run, state.step, state.pending_losses, world.size, patches, watch)
            if data.held_out:
                self._validation = _Validation(recipe, data, run, self._log, self.precision, world)
                self._validation.forget_after(self.step)

    def step_seconds(self) -> float:
        """Measures one step on a copy of the network; nothing of the run changes."""
        copy = deepcopy(self._network)
        optimiser = optimiser_for(self._recipe, copy)
        learner = Learner(self._recipe, copy, optimiser, self._world, self.precision, 0.0)
        sampler = Sampler(self._data, self._recipe)
        batch = [sampler[0, slot] for slot in range(self._recipe.batch)]
        begun = time.monotonic()
        float(learner.step(batch, 0, 0.0))  # the first step is slow: libraries choose their kernels
        start = time.monotonic()
        float(learner.step(batch, 0, 0.0))  # a step has ended when its loss can be read
        seconds = time.monotonic() - start
        self._clock.leave_out(time.monotonic() - begun)
        return seconds

    def go(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Trains until a limit or the end of patience is reached, then writes the model.

        Args:
            interrupted: returns whether to stop after this step.

        Raises:
            RunError: if the loss or a weight is not finite.
            KeyboardInterrupt: if the training was interrupted; a checkpoint of the last step is
                written before.
        """
        samples = self._draw(sample_slots(self.step, self._world.rank, self._recipe.batch))
        _, progress = self._world.agree(0.0, self._clock.progress(self.step))
        while True:
            if interrupted():
                self._save()
                raise KeyboardInterrupt
            if self._between_steps(progress) or progress >= 1:
                break
            batch = list(islice(samples, self._recipe.batch))
            own = self._learner.step(batch, self.step, progress)
            self.step += 1
            if self._average:
                self._average.add(self._network)
            loss, progress = self._world.agree(own, self._clock.progress(self.step))
            self._unread.append(loss)
            if self._world.size > 1:  # `agree` has read it, so all workers stop in the same step
                self._read_losses()
            if self.step % REPORT_STEPS == 0:
                self._read_losses()
                if self._log:
                    self._log.flush(self.step, self._learner.rate, self._clock.seconds, progress)
        self._read_losses()
        if self._log:
            self._log.flush(self.step, self._learner.rate, self._clock.seconds, 1.0)
            self._save()
            self._write_model()

    def _between_steps(self, progress: float) -> bool:
        """Validates and saves when due; returns whether patience is exhausted."""
        if _tenth(progress) > self._last_tenth:
            self._last_tenth = _tenth(progress)
            if self._validation and self._validation.due(progress):
                self._save()  # so that a kill during validation loses no step
                header, rate = self._header(), self._learner.rate
                self._validation.run(
                    self._model, header, self.step, rate, self._clock.seconds, progress
                )
            # Progress is equal on all workers, so the others come here in the same step.
            self._world.meet(self._unlimited)
        if self._world.first and time.monotonic() - self._saved > self._checkpoint_seconds:
            self._save()
        if self._recipe.patience is None:
            return False
        exhausted = self._validation is not None and self._validation.patience_exhausted()
        return self._world.agree(0.0, float(exhausted))[1] > 0

    def _read_losses(self) -> None:
        """Reads the losses of the last steps, for the log.

        A single worker calls it before a line or a checkpoint is written, and not in each step. So
        its GPU has work waiting while the next step is prepared.

        Raises:
            RunError: if one is not finite; names its step.
        """
        first = self.step - len(self._unread) + 1
        losses = [float(loss) for loss in self._unread]
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise self._diverged(step, f"the loss is {loss}")
        self._unread.clear()
        if self._log:
            self._log.add(losses)

    def _diverged(self, step: int, symptom: str) -> RunError:
        trained = [path for path in self._run.checkpoints() if int(path.stem.removeprefix("step-"))]
        models = [path for path in [self._run.path / BEST, *trained] if path.exists()]
        return RunError(
            f"step {step}: {symptom}; train again with a --learning-rate below "
            f"{self._recipe.learning_rate:g} and another --out"
            + (f" (the last good model is {models[0]})." if models else ".")
        )

    def _header(self) -> ModelHeader:
        return ModelHeader(
            architecture=architecture_of(self._network),
            class_values=list(self._data.class_values),
            normalisation={"method": "mean-std"},
            voxel_size=list(self._data.voxel_size) if self._data.voxel_size else None,
            training={
                "recipe": dataclasses.asdict(self._recipe),
                "precision": self.precision,
                "steps": self.step,
                **({"start_sha256": self._start} if self._start else {}),
            },
            data=self._data.identity,
            versions={**versions(), **gpu_versions(self._device)},
        )

    def _save(self) -> None:
        """Writes a checkpoint: weights, optimiser state and the state of the training.

        Raises:
            RunError: if the loss of a step since the last line of the log, or a weight, is not
                finite.
        """
        self._read_losses()
        weights = self._network.state_dict()
        if nonfinite := [name for name, t in weights.items() if not t.isfinite().all()]:
            raise self._diverged(self.step, f"weight {nonfinite[0]!r} is no longer finite")
        tensors = {WEIGHT + name: t for name, t in self._model.state_dict().items()}
        if self._average:
            tensors |= {LAST + name: t for name, t in weights.items()}
        for index, values in self._optimiser.state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:
                    tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value)
        state = {
            "step": self.step,
            "seconds": self._clock.seconds,
            "learning_rate": self._learner.rate,
            "pending_losses": self._log.pending if self._log else [],
        }
        self._run.save(self.step, tensors, {**dataclasses.asdict(self._header()), **state})
        self._saved = time.monotonic()

    def _begin(self) -> _State:
        """Loads the weights to start from, or calibrates batch norm, if the network has one.

        Every worker calibrates on the same patches.
        """
        if self._recipe.start:
            start, header, self._start = read_hashed_model(self._recipe.start)
            self._refuse_start(header)
            self._network.load_state_dict(start.state_dict())
        elif self._recipe.norm == "batch":
            sampler = Sampler(self._data, self._recipe)
            images = [sampler[step, 0].image for step in range(CALIBRATION_PATCHES)]
            self._network.calibrate(torch.from_numpy(np.stack(images)).to(self._world.device))
        return _State()

    def _refuse_start(self, header: ModelHeader) -> None:
        """Refuses a model to start from that has other channels or classes.

        Raises:
            InputError: if they differ.
        """
        fits = {
            "in_channels": ("channels", "images", self._data.channels),
            "classes": ("classes", "labels", len(self._data.class_values)),
        }
        for name, (what, whose, count) in fits.items():
            if header.architecture[name] != count:
                raise InputError(
                    f"{self._recipe.start}: has {header.architecture[name]} {what}, but the "
                    f"{whose} have {count}; train without --from."
                )

    def _restore(self) -> _State | None:
        """Loads the newest checkpoint and returns its state; returns None if there is none."""
        newest = self._run.newest()
        if newest is None:
            return None
        tensors, header = newest.tensors, newest.header
        self._run.refuse_header(header, dataclasses.asdict(self._recipe), self._data.identity)
        model, last = _named(tensors, WEIGHT), _named(tensors, LAST)
        self._network.load_state_dict(last or model)
        if self._world.first and last:
            self._average = Average(self._network, self._recipe.averaged, header["step"])
            self._average.network.load_state_dict(model)
        optimiser_state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".")
                optimiser_state.setdefault(int(index), {})[key] = tensor
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": optimiser_state, "param_groups": groups})
        self._start = header["training"].get("start_sha256", "")
        names = "step", "seconds", "learning_rate", "pending_losses"
        return _State(header["training"]["precision"], **{name: header[name] for name in names})

    def _write_model(self) -> None:
        """Writes the best model, or the current one if no validation has stored a best model."""
        best, model = self._run.path / BEST, self._run.path / MODEL
        if self._validation and best.exists():
            tensors, header = read_tensors(best)
            # The best model may be older than the present limits.
            header["training"]["recipe"] = dataclasses.asdict(self._recipe)
            write_tensors(model, tensors, header, self._run.guard)
        else:
            network = self._model.eval()
            threshold = calibrated(network, self._data, self.precision, self._device)
            header = dataclasses.asdict(replace(self._header(), threshold=threshold))
            write_tensors(model, network.state_dict(), header, self._run.guard)

    @property
    def _model(self) -> UNet:
        """The network that is validated and stored."""
        return self._average.network if self._average else self._network

    @property
    def _device(self) -> Device:
        return cast(Device, self._world.device.type)


class _Validation:
    """Validates the network at regular progress, stores the best model and tracks patience."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        run: RunFolder,
        log: Log,
        precision: Precision,
        world: World,
    ) -> None:
        self._best_file, self._guard = run.path / BEST, run.guard
        self._held_out, self._predictions_file = data.held_out, run.path / PREDICTIONS
        self._log, self._patience = log, recipe.patience
        device = cast(Device, world.device.type)
        classes = len(data.class_values)
        self._validator = Validator(data.held_out, classes, recipe.best_by, precision, device)
        self._best: Mapping[str, float] | None = None
        # A model to start from is scored before the first step, and may remain the best one.
        self._since_best, self._last_tenth = 0, -1 if recipe.start else 0
        for measure in log.measures():
            if measure.validation is not None:
                # Limits that were raised have made the progress smaller than it was then.
                now = _progress(recipe, measure.step, measure.seconds)
                self._last_tenth = _tenth(min(measure.progress, now))
                self._record(measure.validation)

    def forget_after(self, step: int) -> None:
        """Forgets the best model if it is from a step after `step`, or missing, or damaged.

        A resumed run repeats the steps after its checkpoint and validates them again.
        """
        header = header_of(self._best_file) if self._best_file.exists() else {}
        if header.get("training", {}).get("steps", math.inf) > step:
            with self._guard():
                self._best_file.unlink(missing_ok=True)
            self._best = None

    def due(self, progress: float) -> bool:
        """Returns whether progress has reached a tenth that was not validated yet."""
        return _tenth(progress) > self._last_tenth

    def run(
        self,
        network: UNet,
        header: ModelHeader,
        step: int,
        rate: float,
        seconds: float,
        progress: float,
    ) -> None:
        """Scores the network, stores it if it is the best so far, and logs the scores."""
        training = network.training
        result = self._validator(network.eval())
        network.train(training)
        scores = result.scores
        store_predictions(
            self._predictions_file,
            step,
            self._held_out,
            result.predictions,
            self._guard,
            result.threshold,
        )
        self._last_tenth = _tenth(progress)
        if self._record(scores):
            facts = {**header.training, "validation": scores}
            best = replace(header, training=facts, threshold=result.threshold)
            fields = dataclasses.asdict(best)
            write_tensors(self._best_file, network.state_dict(), fields, self._guard)
        self._log.flush(step, rate, seconds, progress, scores)

    def _record(self, scores: Mapping[str, float]) -> bool:
        """Counts a validation; returns whether it is the best so far."""
        if not self._validator.better(scores, self._best):
            self._since_best += 1
            return False
        self._best, self._since_best = scores, 0
        return True

    def patience_exhausted(self) -> bool:
        """Returns whether `patience` validations in a row have brought no better score."""
        return self._patience is not None and self._since_best >= self._patience


def _tenth(progress: float) -> int:
    # A rounding error just below a whole tenth must not delay a validation.
    return math.floor(progress * VALIDATIONS + 1e-9)


class Average:
    """A moving average of the weights of a network.

    Its predictions vary less between two validations than those of the last weights.

    Args:
        network: whose weights are averaged; copied.
        steps: the average extends over about this many steps, at the start over fewer.
        done: averages that the weights of `network` already contain.

    Attributes:
        network: the copy with the averaged weights, in inference mode.
    """

    def __init__(self, network: UNet, steps: int, done: int = 0) -> None:
        self._steps, self._done = steps, done
        self.network = deepcopy(network).requires_grad_(False).eval()

    def add(self, network: UNet) -> None:
        """Adds the weights after a step.

        The count is a plain number: `AveragedModel` of torch keeps it in a tensor, copies that to
        the GPU and reads it there in each step.
        """
        averaged: list[Tensor] = [*self.network.parameters()]
        current: list[Tensor] = [*network.parameters()]
        with torch.no_grad():
            if self._done:
                share = max(1 / self._steps, 9 / (10 + self._done))
                torch._foreach_lerp_(averaged, current, share)
            else:
                torch._foreach_copy_(averaged, current)
        self._done += 1


class Learner:
    """Steps of the optimiser on weighted cross-entropy, the paper's energy (eq. 1)."""

    def __init__(
        self,
        recipe: Recipe,
        network: UNet,
        optimiser: torch.optim.Optimizer,
        world: World,
        precision: Precision,
        rate: float,
    ) -> None:
        self._recipe, self._world, self._optimiser = recipe, world, optimiser
        self._network, self._dtype = network.train(), getattr(torch, precision)
        self._model: nn.Module = DistributedDataParallel(network) if world.size > 1 else network
        self.rate = rate

    def step(self, samples: list[Sample], number: int, progress: float) -> Tensor:
        """Updates the weights from one batch and returns its loss, without waiting for a GPU.

        Args:
            samples: the batch.
            number: number of the step. With the recipe's seed and the rank, it determines dropout.
            progress: completed share of the training, 0 to 1; sets the learning rate.
        """
        sequence = np.random.SeedSequence([self._recipe.seed, number, self._world.rank])
        torch.manual_seed(int(sequence.generate_state(1)[0]))
        self.rate = self._recipe.learning_rate * (1 - progress) ** self._recipe.decay
        for group in self._optimiser.param_groups:
            group["lr"] = self.rate
        image, targets, weights = self._tensors(samples)
        with torch.autocast(self._world.device.type, self._dtype, self._dtype != torch.float32):
            scores = self._model(image)
        loss = self._loss(scores, targets, weights)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._recipe.clip:
            nn.utils.clip_grad_norm_(self._network.parameters(), self._recipe.clip)
        self._optimiser.step()
        return loss.detach()

    def _loss(self, scores: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(scores.float(), targets, reduction="none")
        return (losses * weights).mean()

    def _tensors(self, samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        def stacked(arrays: list[np.ndarray[Any, Any]]) -> Tensor:
            tensor = torch.from_numpy(np.stack(arrays))
            if self._world.device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(self._world.device, non_blocking=True)

        image = stacked([s.image for s in samples])
        image = image.contiguous(memory_format=channels_last(image.ndim - 2))
        targets = stacked([s.targets for s in samples]).long()
        return image, targets, stacked([s.weights for s in samples])


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names start with a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def optimiser_for(recipe: Recipe, network: UNet) -> torch.optim.Optimizer:
    """Creates the optimiser of a recipe for the parameters of `network`."""
    parameters, rate = network.parameters(), recipe.learning_rate
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=recipe.momentum)
    return torch.optim.AdamW(parameters, rate)


def precision_for(recipe: Recipe, world: World) -> Precision:
    """Returns the number format of a recipe; ``auto`` selects the best one of the device."""
    if recipe.precision != "auto":
        return recipe.precision
    return best_precision(cast(Device, world.device.type))
