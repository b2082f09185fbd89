"""A plan and its trial in words and JSON, as `unet-ray plan` prints them.

Knows what people ask before a run. Computes no bytes and no seconds itself.
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
    """The plan in words: tiles, memory, engine."""
    memory, together = outlook.memory, settings.engine == "local" and outlook.workers > 1
    return "\n".join(
        [
            f"{outlook.volume.path}: {outlook.volume.dtype}, {outlook.volume.shape} (c, z, y, x)",
            repr(outlook.plan),
            f"  halo    {100 * outlook.halo_overhead:.0f} % more arithmetic than the voxels alone",
            f"  reads   {outlook.read_amplification:.2f} times the input, in its chunks of "
            f"{commas(outlook.volume.chunk)}",
            f"  memory  {format_bytes(outlook.worker_memory)} per worker (process "
            f"{format_bytes(memory.process)}, index {format_bytes(memory.index)}, weights "
            f"{format_bytes(memory.weights)}, tile {format_bytes(memory.tile)}, pass "
            f"{format_bytes(memory.forward)}, allocator)"
            + (f", {outlook.in_flight} tiles under way" if outlook.in_flight > 1 else ""),
            *_helpers(outlook),
            f"  driver  {format_bytes(outlook.driver_memory)}"
            + (", all workers in it" if together else ""),
            f"  runs    {outlook.tiles} tiles in {outlook.precision} on {outlook.device}",
        ]
    )


def _helpers(outlook: Outlook) -> list[str]:
    from unet_ray.engine.cluster import HELPERS

    if not outlook.helper_memory:
        return []
    each = format_bytes(outlook.helper_memory)
    return [f"  helpers {HELPERS} that read and {HELPERS} that write for each GPU, {each} each"]


def refusal_of(outlook: Outlook, settings: Settings, out: str | None, free: float) -> str | None:
    """Why `segment` would refuse what was planned; None if it fits this machine and its disk."""
    from unet_ray.segmentation.preparation import check_room

    try:
        check_room(place_of(out or Path.cwd()), outlook.memory, outlook.device, settings)
    except InputError as error:
        return str(error)
    if out and outlook.disk_bytes > free:
        return (
            f"{out}: its tiles may take {format_bytes(outlook.disk_bytes)}, {format_bytes(free)} "
            "are free there."
        )
    return None


def trial_json(outlook: Outlook, trial: Pilot | None, price: float | None) -> dict[str, Any]:
    """The results of a trial as JSON; null where unknown."""
    seconds = trial and trial.run_seconds(outlook)
    return {
        "tile_seconds": trial and round(trial.seconds, 4),
        "seconds": seconds and round(seconds, 1),
        "price": _price(outlook, trial, price),
        "disk_estimate_bytes": trial and round(trial.stored * outlook.tiles),
    }


def _price(outlook: Outlook, trial: Pilot | None, per_hour: float | None) -> float | None:
    """What all workers cost together, however many they are."""
    if trial is None or per_hour is None:
        return None
    return round(trial.seconds * outlook.tiles / 3600 * per_hour, 4)


def describe_trial(
    outlook: Outlook, trial: Pilot | None, per_hour: float | None, free: str
) -> list[str]:
    """Disk, time and price in words, as far as a trial of some tiles measured them."""
    if not outlook.tiles:
        return ["  nothing to do: region and mask have no tile in common"]
    if trial is None:
        return [
            f"  disk    at most {format_bytes(outlook.disk_bytes)}{free}",
            "  time    not known: a tile needs a device, or memory, that is not in this machine",
        ]
    seconds = trial.run_seconds(outlook)
    lines = [
        f"  disk    about {format_bytes(trial.stored * outlook.tiles)}, at most "
        f"{format_bytes(outlook.disk_bytes)}{free}",
        f"  time    about {format_seconds(seconds)} with {outlook.workers} workers, after the "
        f"start: {trial.seconds:.2f} s a tile (read {trial.read:.2f}, predict "
        f"{trial.predict:.2f},\n          write {trial.write:.2f}; {trial.tiles} tiles timed by "
        f"{trial.passes} passes, {trial.threads} at a time;\n          {trial.constant} of "
        f"{trial.looks} passes looked at are constant)",
    ]
    if trial.failures:
        count = f"{len(trial.failures)} of {trial.looks + len(trial.failures)}"
        lines.append(f"  failed  {count} passes looked at: {trial.failures[0]}")
    price = _price(outlook, trial, per_hour)
    return lines if price is None else [*lines, f"  price   about {price:.2f}"]
