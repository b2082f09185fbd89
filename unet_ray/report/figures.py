"""Numbers and pictures as the pages hold them.

Knows HTML's needs of a picture. Does not know what is drawn.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from unet_ray.report import charts
from unet_ray.report.pictures import Picture, colour_classes, encode_png

# Enough under a colour, and small as a file.
OVERLAY_GREYS = 64
# Pictures `STRIP` times as long as wide are zoomed in until they are `STRIP_WIDTH` wide.
STRIP, STRIP_WIDTH = 8, 32

Facts = dict[str, Any]


def by(sizes: Sequence[int]) -> str:
    """Extents as ``512 x 512``."""
    return " x ".join(map(str, sizes))


def digits_of(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, or all those before the point."""
    if not math.isfinite(value):
        return "undefined" if math.isnan(value) else "infinite"
    if abs(value) >= 10**digits:
        return charts.number(round(value))
    return f"{value:#.{digits}g}".rstrip(".")


def figure(picture: Picture, caption: str) -> Facts:
    """A picture as the page embeds it, with its caption."""
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
    """The colours of the classes in HTML."""
    return ["#" + bytes(colour).hex() for colour in colour_classes(np.arange(classes)[None])[0]]
