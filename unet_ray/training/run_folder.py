"""The RUN folder of a training: its files, its checkpoints, its log, and who may write there.

Knows what is kept and how it survives a kill; does not know how a network learns.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from unet_ray.errors import InputError, refuse_below_file
from unet_ray.network.checkpoints import read_tensors, write_tensors
from unet_ray.storage.lease import Fence, Lease
from unet_ray.storage.places import Guard, remove_partial, write_whole
from unet_ray.storage.swap import LOCK

MODEL, BEST, METRICS = "model.safetensors", "best.safetensors", "metrics.jsonl"
PATCHES, WEIGHTS = "patches.safetensors", "weights.safetensors"
KEPT_CHECKPOINTS = 2
REPORT_STEPS = 10
CHECKPOINTS = "checkpoints"  # the lease is kept there, too


@dataclass(frozen=True)
class Measure:
    """A line of ``metrics.jsonl``.

    Attributes:
        step: steps done.
        loss: mean weighted loss over the steps since the last line, and over all workers.
        learning_rate: of the last step.
        seconds: of training so far, over all interruptions.
        progress: 0 to 1.
        workers: how many train together.
        patches: how many a step sees, of all workers together.
        validation: scores on the held-out slices, by name, where they were just computed.
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
        """The measure as JSON."""
        told = {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }
        return json.dumps(told) + "\n"


OnMeasure = Callable[[Measure], None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read: the file, its tensors and its header."""

    path: Path
    tensors: dict[str, Tensor]
    header: dict[str, Any]


class RunFolder:
    """The folder of one training run.

    Args:
        path: the folder; it need not be there yet.
        fence: of the lease on it; without one the folder is read only.

    Attributes:
        guard: held during each write, so that a training that lost its lease writes nothing.

    Raises:
        InputError: if it is a file, or a folder of something else.
    """

    def __init__(self, path: str | os.PathLike[str], fence: Fence | None = None) -> None:
        self.path = Path(path).absolute()
        self.guard: Guard = fence.hold if fence else nullcontext
        known = (f"{CHECKPOINTS}/{LOCK}", METRICS, MODEL)
        refuse_below_file(self.path)
        if self.path.is_file():
            raise InputError(f"{self.path}: is a file; --out of train is a folder.")
        if self.path.is_dir() and any(self.path.iterdir()) and not any(map(self.holds, known)):
            raise InputError(
                f"{self.path}: exists and is not a training run; choose another --out."
            )

    def holds(self, name: str) -> bool:
        """Whether a file or folder of this name is there."""
        return (self.path / name).exists()

    @contextmanager
    def owned(self, takeover: bool = False) -> Iterator[RunFolder]:
        """The folder under a lease, made if absent, without the remains of killed writers.

        Args:
            takeover: ends another training that writes here.

        Raises:
            InputError: if another training writes here, or if no checkpoint is whole.
        """
        with Lease(self.path / CHECKPOINTS, takeover) as lease:
            run = RunFolder(self.path, lease.fence)
            for folder in (run.path, run.path / CHECKPOINTS):
                remove_partial(folder)
            run._set_damaged_aside()
            yield run

    def checkpoints(self) -> list[Path]:
        """Checkpoint files, newest first."""
        return sorted((self.path / CHECKPOINTS).glob("step-*.safetensors"), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole."""
        for path in self.checkpoints():
            if found := _read(path):
                return found
        return None

    def _set_damaged_aside(self) -> None:
        """Renames damaged checkpoints, so that they do not count among the last ones.

        Raises:
            InputError: if no checkpoint is whole; a new start would lose the log as well.
        """
        found = self.checkpoints()
        damaged = [path for path in found if not _read(path)]
        if found and damaged == found:
            raise InputError(
                f"{self.path}: all its checkpoints are damaged ({found[0].name} is the newest); "
                "choose another --out, or remove them to start anew."
            )
        for path in damaged:
            print(f"unet-ray: {path}: damaged; the one before it is used.", file=sys.stderr)
            path.rename(path.with_suffix(".damaged"))

    def save(self, step: int, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Writes a checkpoint and drops all but the newest ones."""
        path = self.path / CHECKPOINTS / f"step-{step:09d}.safetensors"
        write_tensors(path, tensors, header, self.guard)
        for old in self.checkpoints()[KEPT_CHECKPOINTS:]:
            old.unlink()

    def refuse_other(self, recipe: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Refuses to go on with a run of another recipe or other data, naming what differs.

        Raises:
            InputError: naming the field.
        """
        if header := self._header():
            self.refuse_header(header, recipe, data)

    def refuse_header(
        self, header: Mapping[str, Any], recipe: Mapping[str, Any], data: Mapping[str, Any]
    ) -> None:
        """Refuses a header of another recipe or other data, naming what differs.

        Raises:
            InputError: naming the field.
        """
        if "recipe" not in header.get("training", {}):
            raise InputError(
                f"{self.path}: holds a model that was not trained here; choose another --out."
            )
        there = {"recipe": header["training"]["recipe"], "data": header["data"]}
        here = json.loads(json.dumps({"recipe": recipe, "data": data}))
        for part in here:
            for field, value in here[part].items():
                if there[part].get(field) != value:
                    raise InputError(
                        f"{self.path}: was trained with another {field} "
                        f"({_short(there[part].get(field))}, now {_short(value)}); choose another "
                        "--out."
                    )

    def _header(self) -> dict[str, Any] | None:
        if self.holds(MODEL):
            return read_tensors(self.path / MODEL)[1]
        newest = self.newest()
        return newest.header if newest else None


def _read(path: Path) -> Checkpoint | None:
    """A checkpoint; None if it is damaged. A disk that fails to read is no damage."""
    try:
        return Checkpoint(path, *read_tensors(path))
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return None


def _short(value: Any) -> str:
    """A setting as it is, files by name and checksum."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        return str(value)
    return ", ".join(f"{each.get('name')} {str(each.get('sha256'))[:8]}" for each in value)


class Log:
    """``metrics.jsonl``: one line per some steps, cut back to the checkpoint on a restart.

    Args:
        run: its folder.
        step: of the checkpoint.
        pending: losses of the steps since the last line, as the checkpoint kept them.
        workers, patches: as of `Measure`.
        watch: called with each line.
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
        kept = [measure for measure in self.kept() if measure.step <= step]
        lines = "".join(measure.line() for measure in kept)
        write_whole(self._path, lines.encode(), guard=self._guard)
        if kept and kept[-1].step == step:
            self.pending.clear()  # the checkpoint is older than the line of its own step

    def kept(self) -> list[Measure]:
        """What the log holds."""
        return read_measures(self._path)

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
        with self._guard(), open(self._path, "a") as file:
            file.write(measure.line())
        self.pending.clear()
        self._watch(measure)

    def _last_loss(self) -> float:
        kept = self.kept()
        return kept[-1].loss if kept else math.nan


def read_measures(path: Path) -> list[Measure]:
    """The lines of a log that are whole; a kill may have cut the last one short."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(errors="replace").split("\n")
    return [measure for measure in map(_measure, lines) if measure]


def _measure(line: str) -> Measure | None:
    """A line of the log; None if a damaged disk or another program has spoilt it."""
    try:
        told = Measure(**json.loads(line))
        return told if math.isfinite(told.step + told.loss + told.progress) else None
    except (ValueError, TypeError):
        return None
