"""How people see progress: a bar on a terminal, a live bar in a notebook, lines in a log.

Writes to standard error or the notebook only. Knows numbers and text, not the work behind them.
"""

from __future__ import annotations

import html
import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from unet_ray.units import format_bytes, format_seconds, printable, text_of

if TYPE_CHECKING:  # both would load torch
    from unet_ray.engine.rounds import Progress
    from unet_ray.training.run_folder import Measure

LINE_SECONDS = 10.0
NOTEBOOK_SECONDS = 0.2
PACE_SECONDS, PACE_TILES = 60.0, 20
BAR_WIDTH = 24
LOG_WIDTH = 100


class ProgressBar:
    """Shows how much of a piece of work is done, while the context is open.

    Args:
        label: name of the work.
        quiet: show nothing.
    """

    def __init__(self, label: str, quiet: bool = False) -> None:
        self._label, self._quiet = printable(label), quiet
        self._shown = -math.inf
        self._bar: Any = None
        self._notebook: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:  # else the terminal would stay without a cursor after an error
            self._bar.stop()

    def show(self, fraction: float, text: str) -> None:
        """Shows `text` with the bar; in a log at most one line in ten seconds.

        Args:
            fraction: the part that is done, 0 to 1; the end is always shown.
            text: the numbers of this moment.
        """
        if self._quiet:
            return
        if _in_notebook():
            self._show_in_notebook(fraction, text)
        elif sys.stderr.isatty():
            self._show_on_terminal(fraction, text)
        elif fraction >= 1 or time.monotonic() - self._shown >= LINE_SECONDS:
            self._shown = time.monotonic()
            print(f"{self._label}: {text}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Prints a line that stays, above the bar."""
        if self._quiet:
            return
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def show_table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Prints names and values as a table of two columns; equal names are written once."""
        if self._quiet:
            return
        from rich.table import Table

        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        before = ""
        for name, value in rows:
            table.add_row("" if name == before else name, printable(value))
            before = name
        on_terminal = sys.stderr.isatty()
        width = os.get_terminal_size(sys.stderr.fileno()).columns if on_terminal else LOG_WIDTH
        print(text_of(table, width or LOG_WIDTH), file=sys.stderr, flush=True)

    def _show_on_terminal(self, fraction: float, text: str) -> None:
        if not self._bar:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(BAR_WIDTH),
                TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
                console=Console(stderr=True),
                redirect_stdout=False,  # results go there
            )
            self._bar.add_task(self._label, total=1.0, text="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=fraction, text=text)

    def _show_in_notebook(self, fraction: float, text: str) -> None:
        now = time.monotonic()
        if fraction < 1 and now - self._shown < NOTEBOOK_SECONDS:
            return
        self._shown = now
        bar = _NotebookBar(self._label, fraction, text)
        if self._notebook:
            self._notebook.update(bar)
        else:
            # Imported by name, since type checkers find it in a notebook's environment only.
            display = import_module("IPython.display").display
            self._notebook = display(bar, display_id=True)


class _NotebookBar:
    """One state of a bar, as a notebook shows it; needs no widgets."""

    def __init__(self, label: str, fraction: float, text: str) -> None:
        self._label, self._fraction, self._text = label, fraction, text

    def __repr__(self) -> str:
        return f"{self._label}: {self._text}"

    def _repr_html_(self) -> str:
        return (
            f"{html.escape(self._label)} <progress value='{self._fraction:.4f}' max='1'></progress>"
            f" {html.escape(self._text)}"
        )


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; never imports IPython itself."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython and hasattr(ipython, "get_ipython") else None
    return type(shell).__name__ == "ZMQInteractiveShell"


class TilesBar(ProgressBar):
    """Shows tiles, speed, time left, failures and memory; called after each tile.

    Args:
        label: name of the work.
        quiet: show nothing.
        limit: show the stated memory, too. A process that holds other data, such as a notebook,
            is larger than a run.
    """

    def __init__(self, label: str, quiet: bool = False, limit: bool = True) -> None:
        super().__init__(label, quiet)
        self._limit = limit
        self._pace: Pace | None = None
        self._stage = ""

    def __call__(self, progress: Progress) -> None:
        """Shows the state of a run."""
        if progress.stage != self._stage:
            self._stage, self._pace = progress.stage, Pace(progress.workers)
        pace = self._pace or Pace(progress.workers)
        pace.saw(progress.seconds, progress.finished, progress.voxels)
        pending = progress.total - progress.done - progress.quarantined
        memory = format_bytes(progress.memory) if progress.memory else ""
        if memory and self._limit and progress.memory_stated:
            memory += f" of {format_bytes(progress.memory_stated)}"
        parts = [
            f"{progress.stage} {progress.done}/{progress.total} tiles".removeprefix("segment "),
            f"{progress.quarantined} quarantined" if progress.quarantined else "",
            f"{progress.failures} failures" if progress.failures else "",
            f"{pace.voxels / 1e6:.3f} Mvoxel/s" if pace.voxels else "",
            f"{format_seconds(pace.seconds(pending))} left" if pace.voxels else "",
            memory,
        ]
        self.show(1 - pending / progress.total, ", ".join(filter(None, parts)))


class TrainingBar(ProgressBar):
    """Shows step, loss, speed and time left, and each validation; called with each measure."""

    def __call__(self, measure: Measure) -> None:
        """Shows a line of ``metrics.jsonl``."""
        seconds, progress = measure.seconds, max(measure.progress, 1e-9)
        left = seconds / progress * (1 - measure.progress)
        if measure.validation is not None:
            scores = ", ".join(f"{name} {v:.4f}" for name, v in measure.validation.items())
            self.say(f"step {measure.step}: validation {scores}")
        loss = f"loss {measure.loss:.4f}, " if measure.step else ""
        self.show(
            measure.progress,
            f"step {measure.step}, {loss}"
            f"{measure.step / max(seconds, 1e-9):.2f} steps/s, {format_seconds(left)} left",
        )


class Pace:
    """Speed over the last minute or the last 20 tiles, whichever is longer.

    Tiles that run side by side end nearly together, so there is no speed before each worker has
    done one tile, and only whole rounds of all workers are measured. The start of the workers
    counts in the first round only.

    Args:
        workers: tiles side by side.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers, self._seen = workers, deque([(0.0, 0, 0)])

    def saw(self, seconds: float, tiles: int, voxels: int) -> None:
        """Adds a measurement.

        Args:
            seconds: elapsed since the first tile was started.
            tiles: done since then.
            voxels: done since then.
        """
        self._seen.append((seconds, tiles, voxels))
        if not self._seen[0][1] and tiles > self._workers:
            self._seen.popleft()
        while len(self._seen) > 2 and self._is_old(*self._seen[1][:2]):
            self._seen.popleft()

    def _is_old(self, seconds: float, tiles: int) -> bool:
        now, done, _ = self._seen[-1]
        return now - seconds >= PACE_SECONDS and done - tiles >= max(PACE_TILES, 2 * self._workers)

    @property
    def voxels(self) -> float:
        """Voxels per second."""
        return self._per_second(2)

    def seconds(self, tiles: int) -> float:
        """Estimated seconds for a number of tiles; infinite before one is done."""
        return tiles / speed if (speed := self._per_second(1)) else math.inf

    def _per_second(self, what: int) -> float:
        last = self._seen[-1]
        rounds = (each for each in self._seen if (last[1] - each[1]) % self._workers == 0)
        first = next(rounds)
        return (last[what] - first[what]) / max(last[0] - first[0], 1e-9)
