"""The RUN folder of a training run: its files, checkpoints, log and lease.

Knows how checkpoints and the log survive a kill; does not know the network or the optimiser.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from unet_ray.errors import InputError, refuse_below_file, refuse_empty, refusing
from unet_ray.network.checkpoints import read_tensors, write_tensors
from unet_ray.storage.events import measured
from unet_ray.storage.lease import Fence, Lease
from unet_ray.storage.parsing import parse_json, refuse_special
from unet_ray.storage.places import Guard, remove_partial, write_whole
from unet_ray.storage.swap import LOCK
from unet_ray.units import warn

MODEL, BEST, METRICS = "model.safetensors", "best.safetensors", "metrics.jsonl"
PATCHES, WEIGHTS = "patches.safetensors", "weights.safetensors"
KEPT_CHECKPOINTS = 2
IN_2D = {"dims": 2, "anisotropy": "auto", "z_levels": None, "voxel_size": None}
LIMITS = "steps", "minutes"  # settings that may be raised to go on with a training
REPORT_STEPS = 10
LARGEST = 1e300  # bound of the numbers in a log or a checkpoint
CHECKPOINTS = "checkpoints"  # this folder also contains the lease
PART = ".part"  # end of the names of folders in it that are not complete


@dataclass(frozen=True)
class Measure:
    """One line of ``metrics.jsonl``.

    Attributes:
        step: number of completed steps.
        loss: mean weighted loss over all workers and all steps since the previous line; NaN before
            the first step.
        learning_rate: learning rate of the last step.
        seconds: training time so far, excluding interruptions.
        progress: completed share of the training, 0 to 1.
        workers: number of workers.
        patches: number of patches per step, over all workers.
        validation: scores on the held-out slices by name, if this step was validated.
    """

    step: int
    loss: float
    learning_rate: float
    seconds: float
    progress: float
    workers: int
    patches: int
    validation: Mapping[str, float] | None = None

    def line(self) -> str:
        """Returns the measure as one line of JSON, without fields that are None or NaN."""
        fields = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value is not None and value == value  # JSON has no NaN
        }
        return json.dumps(fields, allow_nan=False) + "\n"


OnMeasure = Callable[[Measure], None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: its file, tensors and header."""

    path: Path
    tensors: dict[str, Tensor]
    header: dict[str, Any]


def time_of_model(out: str | os.PathLike[str]) -> int | None:
    """Returns when the model of a RUN folder was written, in nanoseconds; None without a model."""
    model = Path(out) / MODEL
    return model.stat().st_mtime_ns if model.exists() else None


class RunFolder:
    """The folder of one training run.

    Args:
        path: the folder; created later if it does not exist.
        fence: fence of the lease on the folder; without one, the folder must only be read.

    Attributes:
        guard: entered around each write; raises if the run has lost its lease.

    Raises:
        InputError: if the path is empty, a file, or a folder that is not a training run.
    """

    def __init__(self, path: str | os.PathLike[str], fence: Fence | None = None) -> None:
        refuse_empty(path)
        self.path = Path(path).absolute()
        self.guard: Guard = fence.hold if fence else nullcontext
        markers = (f"{CHECKPOINTS}/{LOCK}", METRICS, MODEL)
        refuse_below_file(self.path)
        if self.path.is_file():
            raise InputError(f"{self.path}: is a file; --out must be a folder.")
        if self.path.is_dir() and any(self.path.iterdir()) and not any(map(self.contains, markers)):
            raise InputError(
                f"{self.path}: exists and is not a training run; choose another --out."
            )

    def contains(self, name: str) -> bool:
        """Returns whether the folder contains a file or folder of this name."""
        return (self.path / name).exists()

    @contextmanager
    def owned(self, takeover: bool = False) -> Iterator[RunFolder]:
        """Leases the folder, creating it if needed, and removes partly written files.

        Args:
            takeover: take the lease even if another training run is writing to the folder.

        Yields:
            The folder, writable under the lease.

        Raises:
            InputError: if another training run is writing to the folder, or if all its checkpoints
                are damaged.
        """
        with Lease(self.path / CHECKPOINTS, takeover) as lease:
            run = RunFolder(self.path, lease.fence)
            run._remove_partial()
            run._set_damaged_aside()
            yield run
            run._remove_partial()  # of workers that were lost meanwhile

    def _remove_partial(self) -> None:
        with self.guard():
            for folder in (self.path, self.path / CHECKPOINTS):
                remove_partial(folder)
        for folder in (self.path / CHECKPOINTS).glob(f"*{PART}"):
            shutil.rmtree(folder, ignore_errors=True)

    def checkpoints(self) -> list[Path]:
        """Returns the checkpoint files, newest first."""
        return sorted((self.path / CHECKPOINTS).glob("step-*.safetensors"), reverse=True)

    def newest(self) -> Checkpoint | None:
        """Reads the newest undamaged checkpoint; returns None if there is none."""
        for path in self.checkpoints():
            if checkpoint := _read(path):
                return checkpoint
        return None

    def _set_damaged_aside(self) -> None:
        """Renames damaged checkpoints, so that `save` does not count them among the newest.

        Raises:
            InputError: if all checkpoints are damaged. Starting over would also lose the log.
        """
        checkpoints = self.checkpoints()
        damaged = [path for path in checkpoints if not _read(path)]
        if checkpoints and damaged == checkpoints:
            raise InputError(
                f"{self.path}: all its checkpoints are damaged ({checkpoints[0].name} is the "
                "newest); choose another --out, or remove them to start over."
            )
        for path in damaged:
            warn(f"{path}: damaged; the previous checkpoint is used.")
            # A worker of the owner before may just have removed the file.
            with self.guard(), suppress(FileNotFoundError):
                path.rename(path.with_suffix(".damaged"))

    def save(self, step: int, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Writes a checkpoint and removes all but the newest ones."""
        path = self.path / CHECKPOINTS / f"step-{step:09d}.safetensors"
        write_tensors(path, tensors, header, self.guard)
        with self.guard():
            for old in self.checkpoints()[KEPT_CHECKPOINTS:]:
                old.unlink(missing_ok=True)

    def refuse_other(self, recipe: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Refuses to resume a run with another recipe or other data.

        Raises:
            InputError: if a field differs; names the field.
        """
        if header := self._header():
            self.refuse_header(header, recipe, data)

    def refuse_header(
        self, header: Mapping[str, Any], recipe: Mapping[str, Any], data: Mapping[str, Any]
    ) -> None:
        """Refuses the header of a run with another recipe or other data; its limits may differ.

        Raises:
            InputError: if a field differs; names the field.
        """
        try:
            stored = {"recipe": dict(header["training"]["recipe"]), "data": dict(header["data"])}
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path}: contains a model but no training run; choose another --out."
            ) from error
        current = json.loads(json.dumps({"recipe": recipe, "data": data}, allow_nan=False))
        # Versions without 3-D trained all networks in 2-D.
        stored["recipe"] = {**IN_2D, **stored["recipe"]}
        if new := [field for field in current["recipe"] if field not in stored["recipe"]]:
            raise InputError(
                f"{self.path}: an older version of unet-ray trained it, without {new[0]!r}; choose "
                "another --out, or go on with that version."
            )
        for part in current:
            for field, value in current[part].items():
                if field not in LIMITS and stored[part].get(field) != value:
                    before, now = _short(stored[part].get(field)), _short(value)
                    renamed = {"start": "from", "z_levels": "voxel-size"}
                    flag = renamed.get(field, field.replace("_", "-"))
                    raise InputError(
                        f"{self.path}: was trained with --{flag} {before}, not "
                        f"{now}; choose another --out."
                    )

    def is_finished(self, recipe: Mapping[str, Any]) -> bool:
        """Returns whether the folder contains a model of a training with these limits.

        Args:
            recipe: all settings; those besides the limits are those of the run.

        Raises:
            InputError: if a training with other limits, finished or not, is already beyond these.
        """
        header = self._header()
        if header is None:
            return False
        before = header["training"]["recipe"]
        if all(before.get(name) == recipe[name] for name in LIMITS):
            return self.contains(MODEL)
        newest = self.newest()
        if newest is None:
            raise InputError(f"{self.path}: has no checkpoint to go on from; choose another --out.")
        done = {"steps": newest.header["step"], "minutes": newest.header["seconds"] / 60}
        for name in LIMITS:
            if recipe[name] is not None and recipe[name] <= done[name]:
                raise InputError(
                    f"{name}={recipe[name]:g} is too few to go on: {self.path} was trained for "
                    f"{done['steps']} steps and {done['minutes']:.1f} minutes; set more, or choose "
                    "another --out."
                )
        return False

    def channels(self) -> int | None:
        """Returns the channels of the network of this run; None if the run has not begun.

        So a run goes on with the channels that it chose, on a machine with another device as well.
        """
        architecture = (self._header() or {}).get("architecture")
        channels = architecture.get("base_channels") if isinstance(architecture, dict) else None
        return channels if type(channels) is int else None

    def _header(self) -> dict[str, Any] | None:
        if self.contains(MODEL):
            return read_tensors(self.path / MODEL)[1]
        newest = self.newest()
        return newest.header if newest else None


def _read(path: Path) -> Checkpoint | None:
    """Reads a checkpoint; returns None if it is damaged.

    A read error of the disk is raised: the checkpoint may be intact and must not be set aside.
    """
    try:
        checkpoint = Checkpoint(path, *read_tensors(path))
        return checkpoint if _is_complete(checkpoint.header) else None
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return None


def _is_complete(header: Mapping[str, Any]) -> bool:
    """Returns whether a header has the state of a training, as `RunFolder.save` writes it."""
    losses = header.get("pending_losses")
    if type(header.get("step")) is not int or not isinstance(losses, list):
        return False
    numbers = [header["step"], header.get("seconds"), header.get("learning_rate"), *losses]
    return all(measured(number, -LARGEST, LARGEST) is not None for number in numbers)


def _short(value: Any) -> str:
    """Formats a setting; a list of files is shortened to names and checksums."""
    if not isinstance(value, list) or not all(isinstance(file, dict) for file in value):
        return str(value)
    return ", ".join(f"{file.get('name')} {str(file.get('sha256'))[:8]}" for file in value)


class Log:
    """Writes ``metrics.jsonl``, whose training writes a line every `REPORT_STEPS` steps.

    On a restart, lines of steps after the checkpoint are removed.

    Args:
        run: folder of the log.
        step: step of the checkpoint.
        pending: losses of the steps since the last line, from the checkpoint.
        workers, patches: as in `Measure`.
        watch: called with each new line.
    """

    def __init__(
        self,
        run: RunFolder,
        step: int,
        pending: Sequence[float],
        workers: int,
        patches: int,
        watch: OnMeasure,
    ) -> None:
        self._path, self._guard, self._watch = run.path / METRICS, run.guard, watch
        self._workers, self._patches = workers, patches
        self.pending = list(pending)
        measures = [measure for measure in self.measures() if measure.step <= step]
        lines = "".join(measure.line() for measure in measures)
        write_whole(self._path, lines.encode(), guard=self._guard)
        if measures and measures[-1].step == step:
            self.pending.clear()  # the line was written after the checkpoint and includes them

    def measures(self) -> list[Measure]:
        """Reads the lines of the log."""
        return read_measures(self._path)

    def add(self, losses: Sequence[float]) -> None:
        """Adds the losses of steps; `flush` writes their mean."""
        self.pending.extend(losses)

    def flush(
        self,
        step: int,
        rate: float,
        seconds: float,
        progress: float,
        validation: Mapping[str, float] | None = None,
    ) -> None:
        """Writes a line if there are new steps or validation scores since the last line."""
        if not self.pending and validation is None:
            return
        loss = float(np.mean(self.pending)) if self.pending else self._last_loss()
        measure = Measure(
            step,
            loss,
            rate,
            round(seconds, 3),
            progress,
            self._workers,
            self._patches,
            validation,
        )
        try:
            with self._guard(), open(self._path, "a") as file:
                file.write(measure.line())
        except TimeoutError:
            if validation is not None:
                raise
            return  # the lock is busy: these steps join the next line
        self.pending.clear()
        self._watch(measure)

    def _last_loss(self) -> float:
        measures = self.measures()
        return measures[-1].loss if measures else math.nan


def read_measures(path: Path) -> list[Measure]:
    """Reads a log without its last line if a kill has left that line incomplete.

    Raises:
        InputError: if it is not a regular file.
    """
    if not path.exists():
        return []
    with refusing(path, "a log"):
        refuse_special(path)
    *lines, _ = path.read_text(errors="replace").split("\n")
    return [measure for measure in map(_measure, lines) if measure]


def _measure(line: str) -> Measure | None:
    """Parses a line of the log; returns None if it is damaged or not a measure."""
    try:
        measure = Measure(**{"loss": math.nan, **parse_json(line)})
        scores = dict(measure.validation or {})
    except (ValueError, TypeError):
        return None
    fields = dataclasses.asdict(measure)
    del fields["validation"]
    if not measure.step:
        del fields["loss"]
    numbers = [*fields.values(), *scores.values()]
    finite = all(measured(number, -LARGEST, LARGEST) is not None for number in numbers)
    return measure if finite and type(measure.step) is int else None
