"""Report of a plan and its trial, as `unet-ray plan` prints it: text and JSON.

Knows the wording and the layout of the report. Does not know how memory, disk use and time are
estimated.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet_ray.errors import InputError
from unet_ray.storage.places import place_of
from unet_ray.units import commas, format_bytes, format_seconds

if TYPE_CHECKING:
    from unet_ray.segmentation.outlook import Outlook
    from unet_ray.segmentation.pilot import Pilot
    from unet_ray.segmentation.settings import Settings


def describe(outlook: Outlook, settings: Settings) -> str:
    """Text report of the tiles, the memory and the engine."""
    memory, shared = outlook.memory, settings.engine == "local" and outlook.workers > 1
    return "\n".join(
        [
            f"{outlook.volume.path}: {outlook.volume.dtype}, {outlook.volume.shape} (c, z, y, x)",
            repr(outlook.plan),
            f"  halo    {100 * outlook.halo_overhead:.0f} % more arithmetic than without halo and "
            "padding",
            f"  reads   {outlook.read_amplification:.2f} times the input (chunks of "
            f"{commas(outlook.volume.chunk)})",
            f"  memory  {format_bytes(outlook.worker_memory)} per worker (process "
            f"{format_bytes(memory.process)}, index {format_bytes(memory.index)}, weights "
            f"{format_bytes(memory.weights)}, tile {format_bytes(memory.tile)}, pass "
            f"{format_bytes(memory.forward)}, allocator)"
            + (f", {outlook.in_flight} tiles in flight" if outlook.in_flight > 1 else ""),
            *_helper_lines(outlook),
            f"  driver  {format_bytes(outlook.driver_memory)}"
            + (", including all workers" if shared else ""),
            f"  runs    {outlook.tiles} tiles in {outlook.precision} on {outlook.device}",
        ]
    )


def _helper_lines(outlook: Outlook) -> list[str]:
    from unet_ray.engine.cluster import HELPERS

    if not outlook.helper_memory:
        return []
    memory = format_bytes(outlook.helper_memory)
    return [f"  helpers {HELPERS} readers and {HELPERS} writers per GPU, {memory} each"]


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


def describe_trial(
    outlook: Outlook, trial: Pilot | None, per_hour: float | None, free: str
) -> list[str]:
    """Text report of disk, time and price, one string per line.

    Args:
        outlook: the plan.
        trial: measurements of a few tiles; None if none could run.
        per_hour: price of one worker per hour; None to leave the price out.
        free: text appended to the disk line, such as the free space.
    """
    if not outlook.tiles:
        return ["  nothing to do: region and mask have no tile in common"]
    if trial is None:
        return [
            f"  disk    at most {format_bytes(outlook.disk_bytes)}{free}",
            "  time    unknown: this machine lacks the device, or the memory, to run a tile",
        ]
    seconds = trial.run_seconds(outlook)
    lines = [
        f"  disk    about {format_bytes(trial.stored * outlook.tiles)}, at most "
        f"{format_bytes(outlook.disk_bytes)}{free}",
        f"  time    about {format_seconds(seconds)} with {outlook.workers} workers, plus "
        f"startup: {trial.seconds:.2f} s per tile (read {trial.read:.2f}, predict "
        f"{trial.predict:.2f},\n          write {trial.write:.2f}; {trial.tiles} tiles timed with "
        f"{trial.passes} passes, {trial.threads} at a time;\n          {trial.constant} of "
        f"{trial.inspected} inspected passes are constant)",
    ]
    if trial.failures:
        count = f"{len(trial.failures)} of {trial.inspected + len(trial.failures)}"
        lines.append(f"  failed  {count} inspected passes: {trial.failures[0]}")
    price = _price(outlook, trial, per_hour)
    return lines if price is None else [*lines, f"  price   about {price:.2f}"]
