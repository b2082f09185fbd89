"""Writes the report about a training run or a segmentation: one HTML file with pictures.

Handles the kind of page that a path needs, and the template. Independent of the page's content.
"""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment

from unet_ray.errors import InputError, refusing
from unet_ray.report.figures import Facts, by, digits_of
from unet_ray.report.store_page import about_store
from unet_ray.report.training_page import about_run
from unet_ray.storage.places import PathOrUrl, Place, place_of, write_whole
from unet_ray.training.run_folder import METRICS, MODEL
from unet_ray.units import format_seconds
from unet_ray.versions import VERSION

# At most this many characters of provenance; a damaged file may hold any amount.
LONGEST_JSON = 200_000


def write_report(path: PathOrUrl, truth: PathOrUrl | None = None) -> Place:
    """Writes the HTML report about a RUN folder, or about an output store.

    The page is one file that loads nothing from elsewhere. Its size is bounded. Only parts of
    the data are read, except for stored weight maps and for scores, which are read completely.

    Args:
        path: RUN folder of `train`, or store of `segment`; either may be unfinished.
        truth: labels of the segmented volume, to draw and to score.

    Returns:
        Path of the page: ``RUN/report.html``, or ``NAME.report.html`` beside ``NAME.zarr``.

    Raises:
        InputError: if `path` is neither or holds nothing yet, or if `truth` does not fit.
        RunError: if a stored file is damaged.
    """
    place = place_of(path)
    if isinstance(place, Path) and place.name == MODEL and place.is_file():
        place = place.parent  # a model stands for its RUN folder
    page: Place
    if isinstance(place, Path) and _is_run(place):
        if truth is not None:
            raise InputError(
                f"{place}: is a training run, but --truth needs an output of segment; omit --truth."
            )
        page, facts = place / "report.html", about_run(place)
    else:
        page, facts = (
            place.with_name(f"{_stem(place.name)}.report.html"),
            about_store(place, truth),
        )
    with refusing(place, f"a {facts['kind']} of unet-ray"):  # its JSON may have any form
        text = _rendered({"name": place.name, "version": VERSION, **facts})
    write_whole(page, text.encode("utf-8", "replace"))  # file names need not be valid UTF-8
    return page


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MODEL, METRICS, "checkpoints"))


def _stem(name: str) -> str:
    """A store's name without ``.zarr``; other suffixes stay, as in ``v1.5``."""
    return name[:-5] if name.lower().endswith(".zarr") and len(name) > 5 else name


def _rendered(facts: Facts) -> str:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "by": by,
        "digits": digits_of,
        "seconds": lambda s: format_seconds(s) if s >= 10 else f"{digits_of(s)} s",
        "json": lambda facts: json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False),
    }
    environment.globals["longest"] = LONGEST_JSON
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(facts)
