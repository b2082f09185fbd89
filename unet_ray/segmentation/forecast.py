"""Report of a plan and its trial, as `unet-ray plan` prints it: text and JSON.

Knows the wording and the layout of the report. Does not know how memory, disk use and time are
estimated.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from unet_ray.errors import InputError
from unet_ray.storage.places import place_of
from unet_ray.tiling.levels import descriptions
from unet_ray.units import commas, format_bytes, format_seconds, text_of

if TYPE_CHECKING:
    from unet_ray.segmentation.outlook import Outlook
    from unet_ray.segmentation.pilot import Pilot
    from unet_ray.segmentation.settings import Settings


Rows = list[tuple[str, str]]
NAME_WIDTH = 8  # characters


def describe(outlook: Outlook, settings: Settings) -> str:
    """Text report of the tiles, the memory and the engine."""
    volume, memory = outlook.volume, outlook.memory.on("ray")
    in_flight = f", {outlook.in_flight} tiles in flight" if outlook.in_flight > 1 else ""
    parts = ", ".join(
        f"{name} {format_bytes(count)}"
        for name, count in {
            "process": memory.process,
            "index": memory.index,
            "weights": memory.weights,
            "tile": memory.tile,
            "pass": memory.forward,
            **({"streams": memory.streams} if memory.streams else {}),
        }.items()
    )
    shared = settings.engine == "local" and outlook.workers > 1
    rows = [
        *_level_rows(outlook),
        (
            "halo",
            f"{100 * outlook.halo_overhead:.0f} % more arithmetic than without halo and padding"
            + _without_streams(outlook),
        ),
        (
            "reads",
            f"{outlook.read_amplification:.2f} times the input (chunks of {commas(volume.chunk)})",
        ),
        (
            "memory",
            f"{format_bytes(outlook.worker_memory)} per worker on Ray "
            f"({parts}, allocator){in_flight}",
        ),
        *_helper_rows(outlook),
        (
            "driver",
            format_bytes(outlook.driver_memory) + (", including all workers" if shared else ""),
        ),
        *_object_rows(outlook),
        ("runs", f"{outlook.tiles} tiles in {outlook.precision} on {outlook.device}"),
    ]
    title = f"{volume.path}: {volume.dtype}, {volume.shape} (c, z, y, x)"
    return "\n".join([title, repr(outlook.plan), table_of(rows)])


def _without_streams(outlook: Outlook) -> str:
    without = outlook.overhead_without_streams
    return "" if without is None else f"; {100 * without:.0f} % without streaming along z"


def _level_rows(outlook: Outlook) -> Rows:
    """How each level of a network in 3-D convolves and pools."""
    network = outlook.network
    levels = descriptions(network.levels) if network.axes == 3 else []
    return [(f"level {number}", line) for number, line in enumerate(levels)]


def table_of(rows: Rows) -> str:
    """Names and values as text in two columns."""
    table = Table.grid()
    table.add_column(width=2)
    table.add_column(width=NAME_WIDTH)
    table.add_column(no_wrap=True)
    for name, value in rows:
        table.add_row("", Text(name), Text(value))
    return text_of(table)


def _helper_rows(outlook: Outlook) -> Rows:
    from unet_ray.engine.cluster import HELPERS

    if not outlook.helper_memory:
        return []
    memory = format_bytes(outlook.helper_memory)
    return [("helpers", f"{HELPERS} readers and {HELPERS} writers per GPU, {memory} each")]


def _object_rows(outlook: Outlook) -> Rows:
    if outlook.most_objects is None:
        return []
    return [("objects", f"at most about {outlook.most_objects:,} within --memory")]


def refusal_of(outlook: Outlook, settings: Settings, out: str | None, free: float) -> str | None:
    """Why `segment` would refuse the run; None if it fits into this machine's memory and disk."""
    from unet_ray.segmentation.preparation import check_memory

    try:
        check_memory(place_of(out or Path.cwd()), outlook.memory, outlook.device, settings)
    except InputError as error:
        return str(error)
    if out and outlook.disk_bytes > free:
        return (
            f"{out}: its tiles may need {format_bytes(outlook.disk_bytes)}, but only "
            f"{format_bytes(free)} are free."
        )
    return None


def trial_json(outlook: Outlook, trial: Pilot | None, per_hour: float | None) -> dict[str, Any]:
    """Estimates of the trial for JSON, in seconds, bytes and the currency; None where unknown."""
    seconds = trial and trial.run_seconds(outlook)
    return {
        "tile_seconds": trial and round(trial.seconds, 4),
        "seconds": seconds and round(seconds, 1),
        "price": _price(outlook, trial, per_hour),
        "disk_estimate_bytes": trial and round(trial.stored * outlook.tiles),
    }


def _price(outlook: Outlook, trial: Pilot | None, per_hour: float | None) -> float | None:
    """Price of the run at `per_hour` for one worker; independent of the number of workers."""
    if trial is None or per_hour is None:
        return None
    return round(trial.seconds * outlook.tiles / 3600 * per_hour, 4)


def describe_trial(outlook: Outlook, trial: Pilot | None, per_hour: float | None, free: str) -> str:
    """Text report of disk, time and price.

    Args:
        outlook: the plan.
        trial: measurements of a few tiles; None if none could run.
        per_hour: price of one worker per hour; None to leave the price out.
        free: text appended to the disk line, such as the free space.
    """
    if not outlook.tiles:
        return "  nothing to do: region and mask have no tile in common"
    if trial is None:
        why = "unknown: this machine lacks the device, or the memory, to run a tile"
        most = f"at most {format_bytes(outlook.disk_bytes)}{free}"
        return table_of([("disk", most), ("time", why)])
    seconds = trial.run_seconds(outlook)
    rows = [
        (
            "disk",
            f"about {format_bytes(trial.stored * outlook.tiles)}, at most "
            f"{format_bytes(outlook.disk_bytes)}{free}",
        ),
        (
            "time",
            f"about {format_seconds(seconds)} with {outlook.workers} workers, plus startup: "
            f"{trial.seconds:.2f} s per tile (read {trial.read:.2f}, predict {trial.predict:.2f},\n"
            f"write {trial.write:.2f}; {trial.tiles} tiles timed with {trial.passes} passes, "
            f"{trial.threads} at a time;\n{trial.constant} of {trial.inspected} inspected passes "
            "are constant)",
        ),
    ]
    if trial.failures:
        count = f"{len(trial.failures)} of {trial.inspected + len(trial.failures)}"
        rows.append(("failed", f"{count} inspected passes: {trial.failures[0]}"))
    if (needed := trial.needed_helpers) > trial.helpers:
        busy = f"{needed} readers and {needed} writers would keep it busy"
        rows.append(("waits", f"a GPU waits for its files: {busy}"))
    price = _price(outlook, trial, per_hour)
    if price is not None:
        rows.append(("price", f"about {price:.2f}"))
    return table_of(rows)
