"""Numbers and pictures in the form that the HTML pages need.

Handles formatting and embedding. Independent of the content of pictures.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from unet_ray.report import charts
from unet_ray.report.pictures import Picture, colour_classes, encode_png

# Grey levels below an overlay: enough for the eye, and the file stays small.
OVERLAY_GREYS = 64
# Pictures more than `STRIP` times as long as wide are enlarged to a width of `STRIP_WIDTH` pixels.
STRIP, STRIP_WIDTH = 8, 32

Facts = dict[str, Any]


def by(sizes: Sequence[int]) -> str:
    """Formats sizes as ``512 x 512``."""
    return " x ".join(map(str, sizes))


def digits_of(value: float, digits: int = 3) -> str:
    """Formats a number with `digits` significant digits; integer digits are never dropped."""
    if not math.isfinite(value):
        return "undefined" if math.isnan(value) else "infinite"
    if abs(value) >= 10**digits:
        return charts.number(round(value))
    return f"{value:#.{digits}g}".rstrip(".")


def figure(picture: Picture, caption: str) -> Facts:
    """A picture embedded as a data URL, with its caption, size in pixels and zoom factor."""
    data = base64.b64encode(encode_png(picture)).decode()
    short, long = sorted(picture.shape[:2])
    return {
        "source": f"data:image/png;base64,{data}",
        "caption": caption,
        "width": picture.shape[1],
        "height": picture.shape[0],
        "zoom": -(-STRIP_WIDTH // short) if long > STRIP * short and long > 200 else 0,
    }


def colours_of(classes: int) -> list[str]:
    """The HTML colours of `classes` classes."""
    return ["#" + bytes(colour).hex() for colour in colour_classes(np.arange(classes)[None])[0]]
