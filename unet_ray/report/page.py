"""The page about a training run or a segmentation: one HTML file with pictures.

Knows which kind of page a path needs, and its template. Does not know what is worth showing.
"""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment

from unet_ray.errors import InputError
from unet_ray.report.figures import Facts, by, digits_of
from unet_ray.report.store_page import about_store
from unet_ray.report.training_page import about_run
from unet_ray.storage.places import PathOrUrl, Place, place_of, write_whole
from unet_ray.training.run_folder import METRICS, MODEL
from unet_ray.units import format_seconds
from unet_ray.versions import VERSION

# Characters of provenance on the page; a file may hold any amount.
LONGEST_JSON = 200_000


def write_report(path: PathOrUrl, truth: PathOrUrl | None = None) -> Place:
    """Writes the page about a RUN folder, into it, or about an output store, beside it.

    The page is one file that loads nothing from elsewhere. Its size and what is read for it are
    bounded, but for the kept weight maps and the scores, for which all of the maps, of the store
    and of the truth is read.

    Args:
        path: RUN folder of `train`, or store of `segment`; either may be unfinished.
        truth: labels of the volume that was segmented, to draw and to score.

    Returns:
        Path of the page: ``RUN/report.html``, or ``NAME.report.html`` beside ``NAME.zarr``.

    Raises:
        InputError: if `path` is neither, or holds nothing yet; if `truth` does not fit.
        RunError: if what is stored is damaged.
    """
    found = place_of(path)
    page: Place
    if isinstance(found, Path) and _is_run(found):
        if truth is not None:
            raise InputError(f"{found}: is a training run; --truth is for an output of segment.")
        page, facts = found / "report.html", about_run(found)
    else:
        page, facts = (
            found.with_name(f"{_stem(found.name)}.report.html"),
            about_store(found, truth),
        )
    text = _rendered({"name": found.name, "version": VERSION, **facts})
    write_whole(page, text.encode("utf-8", "replace"))  # a file's name need not be UTF-8
    return page


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MODEL, METRICS, "checkpoints"))


def _stem(name: str) -> str:
    """A store's name without its ending; ``v1.5`` has none."""
    return name[:-5] if name.lower().endswith(".zarr") and len(name) > 5 else name


def _rendered(facts: Facts) -> str:
    pages = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {
        "by": by,
        "digits": digits_of,
        "seconds": lambda s: format_seconds(s) if s >= 10 else f"{digits_of(s)} s",
        "json": lambda told: json.dumps(told, indent=2, ensure_ascii=False),
    }
    pages.globals["longest"] = LONGEST_JSON
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return pages.from_string(template).render(facts)
