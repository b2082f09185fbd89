"""Pictures of a segmentation: grey slices, colour maps, overlays, panels side by side.

Knows pixels and colours; knows no files but the PNG that it writes. A picture is uint8, of
shape (y, x) in grey or (y, x, 3) in red, green, blue.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from unet_ray.errors import InputError
from unet_ray.storage.places import write_whole

Picture = NDArray[np.uint8]

VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ]
)
"""Anchors, evenly spaced, of the map of van der Walt and Smith (2015): lightness only rises."""

OKABE_ITO = np.array(
    [
        (0, 0, 0),
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (0, 114, 178),
        (213, 94, 0),
        (204, 121, 167),
    ],
    np.uint8,
)
"""Colours that all common kinds of colour vision tell apart (Okabe and Ito 2008)."""

CYAN = np.array((0, 255, 255))
YELLOW = np.array((255, 255, 0), np.uint8)
CYAN_SHARE = 0.4
# Twelve colours over so many greys, and black, fit the palette of a PNG.
CELL_GREYS = 20
# Cells that are so many pixels apart are neighbours: more than a membrane is wide.
APART = 12
# How light the part of a picture outside a frame is.
OUTSIDE = 0.6
FONT_SIZE = 16
LINE_HEIGHT = 20
INDENT = 2


def to_grey(slice_: NDArray[Any], low: float | None = None, high: float | None = None) -> Picture:
    """Stretches a slice (y, x) of any dtype to uint8: `low` and less is 0, `high` and more 255.

    Args:
        slice_: numbers; NaN is shown as 0.
        low: the slice's 0.5th percentile if not given (its least value if a rare few differ).
        high: the slice's 99.5th percentile (or its greatest value), likewise.

    Returns:
        uint8 (y, x); 128 throughout where `high` is not above `low`, as in a constant slice.
    """
    values = np.asarray(slice_, np.float64)
    known = values[np.isfinite(values)]
    if known.size == 0:
        return np.zeros(values.shape, np.uint8)
    ends = np.percentile(known, (0.5, 99.5))
    if ends[0] == ends[1]:
        ends = np.array((known.min(), known.max()))
    bottom = ends[0] if low is None else low
    top = ends[1] if high is None else high
    if top <= bottom:
        return np.full(values.shape, 128, np.uint8)
    scaled = np.clip((values - bottom) / (top - bottom), 0, 1) * 255
    return np.rint(np.nan_to_num(scaled)).astype(np.uint8)


def colour_map(probability: NDArray[np.uint8]) -> Picture:
    """Shows a map (y, x) of 0..255 in viridis, dark violet to yellow: (y, x, 3)."""
    levels = np.arange(256) * (len(VIRIDIS) - 1) / 255
    table = [np.interp(levels, np.arange(len(VIRIDIS)), channel) for channel in VIRIDIS.T]
    rgb: Picture = np.rint(np.stack(table, axis=1)).astype(np.uint8)[probability]
    return rgb


def colour_log(values: NDArray[np.floating[Any]], low: float, high: float) -> Picture:
    """Shows positive numbers (y, x) in viridis: `low` is violet, `high` yellow, ratios are even.

    Numbers of 0 and less are black. (y, x, 3).
    """
    span = math.log(high) - math.log(low) or 1.0
    shares = (np.log(np.clip(values, low, high)) - math.log(low)) / span
    rgb = colour_map(np.rint(shares * 255).astype(np.uint8))
    rgb[values <= 0] = 0
    return rgb


def colour_classes(classes: NDArray[np.integer[Any]]) -> Picture:
    """Shows classes or ids (y, x), 0 and up: 0 is black, 1 to 7 differ, 8 looks like 1 again."""
    colours = len(OKABE_ITO) - 1
    index = np.where(classes == 0, 0, 1 + (classes.astype(np.int64) - 1) % colours)
    return OKABE_ITO[index]


def colour_cells(labels: NDArray[np.integer[Any]], image: Picture | None = None) -> Picture:
    """Lays a colour of chance over each object of a grey image; the same ones for the same labels.

    Objects that lie within `APART` pixels differ, as far as twelve colours go. The colours differ
    in lightness too, so that neighbours mostly differ in grey.

    Args:
        labels: objects (y, x), 0 is background and black.
        image: uint8 (y, x), shown through the colours, in few levels, which keeps the file small;
            plain colours if not given.
    """
    light = [(colour.astype(int) + 255) // 2 for colour in OKABE_ITO[[1, 3, 5, 6, 7]]]
    colours = np.array([*OKABE_ITO[1:], *light])
    _, ranks = np.unique(np.append(labels, labels.dtype.type(0)), return_inverse=True)
    ranks = ranks[:-1].reshape(labels.shape)  # 0 is the background, whether there is some or not
    rgb = colours[_draw_apart(ranks, len(colours))[ranks]]
    if image is not None:
        rgb = (rgb + few_greys(image, CELL_GREYS)[..., None]) // 2
    rgb[labels == 0] = 0
    return rgb.astype(np.uint8)


def _draw_apart(ranks: NDArray[np.integer[Any]], colours: int) -> NDArray[np.int64]:
    """A number below `colours` for each rank: by chance, or the next that no neighbour has."""
    draws = np.random.default_rng(0).integers(colours, size=int(ranks.max(initial=0)) + 1)
    lower: dict[int, list[int]] = {}
    for low, high in _neighbours(ranks).tolist():
        lower.setdefault(high, []).append(low)
    for rank in sorted(lower):
        taken = {int(draws[other]) for other in lower[rank]}
        free = ((int(draws[rank]) + k) % colours for k in range(colours))
        draws[rank] = next((draw for draw in free if draw not in taken), draws[rank])
    return draws


def _neighbours(ranks: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Pairs (lower, higher) of objects that meet when each grows by half of `APART` pixels."""
    far, nearest = ndimage.distance_transform_edt(ranks == 0, return_indices=True)
    grown = np.where(far <= APART / 2, ranks[tuple(nearest)], 0)
    sides = [np.stack([a[:-1], a[1:]], -1).reshape(-1, 2) for a in (grown, grown.T)]
    pairs = np.sort(np.concatenate(sides), axis=1)
    return np.unique(pairs[(pairs[:, 0] > 0) & (pairs[:, 0] < pairs[:, 1])], axis=0)


def few_greys(image: Picture, levels: int) -> Picture:
    """A grey picture (y, x) in so many evenly spaced levels, black and white among them."""
    steps = np.rint(image.astype(np.float64) / 255 * (levels - 1))
    return np.rint(steps * 255 / (levels - 1)).astype(np.uint8)


def frame(image: Picture, top: int, left: int, height: int, width: int) -> Picture:
    """Marks a part of a picture: a yellow line around it, black on both sides, and dim without."""
    rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
    framed = (rgb * OUTSIDE).astype(np.uint8)
    for margin, colour in ((3, OKABE_ITO[0]), (2, OKABE_ITO[4]), (1, OKABE_ITO[0])):
        edge = max(0, top - margin), max(0, left - margin)
        framed[edge[0] : top + height + margin, edge[1] : left + width + margin] = colour
    inside = slice(top, top + height), slice(left, left + width)
    framed[inside] = rgb[inside]
    return framed


def strike_out(picture: Picture, where: NDArray[np.bool_]) -> Picture:
    """Shows in light grey with oblique lines what there is no picture of: (y, x, 3)."""
    struck = picture.copy() if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=-1)
    rows, columns = np.indices(where.shape)
    struck[where] = 230
    struck[where & ((rows + columns) % 12 < 2)] = 120
    return struck


def overlay(
    image: Picture,
    mask: NDArray[np.bool_],
    truth: NDArray[np.bool_ | np.integer[Any]] | None = None,
) -> Picture:
    """Lays a mask in cyan over a grey image, and the border of the truth in yellow.

    The style of figure 4 in Ronneberger et al. 2015.

    Args:
        image: uint8 (y, x), shown as it is; see `to_grey`.
        mask: what was found, bool (y, x).
        truth: what should have been found (y, x): 0 is nothing, other numbers are objects. The
            border is the pixels of objects with another number in one of the 4 neighbours; the
            edge of the picture is no border.

    Returns:
        uint8 (y, x, 3).
    """
    rgb = np.repeat(image[..., None], 3, axis=-1)
    rgb[mask] = np.rint(rgb[mask] * (1 - CYAN_SHARE) + CYAN * CYAN_SHARE)
    if truth is not None:
        rgb[_borders(truth)] = YELLOW
    return rgb


def _borders(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels that are not 0 and have a 4-neighbour of another number."""
    found = np.zeros(labels.shape, bool)
    for near, far in ((labels, found), (labels.T, found.T)):
        differ = near[1:] != near[:-1]
        far[1:] |= differ
        far[:-1] |= differ
    border: NDArray[np.bool_] = found & (labels != 0)
    return border


def side_by_side(panels: Sequence[Picture], captions: Sequence[str], gap: int = 8) -> Picture:
    """Puts pictures of one height next to each other, on white, with a caption above each.

    Args:
        panels: uint8 (y, x) or (y, x, 3).
        captions: one for each panel; wrapped between words to the panel's width.
        gap: white pixels between two panels.

    Returns:
        uint8 (y + the captions' height, sum of the widths and gaps, 3).

    Raises:
        ValueError: if there is no panel, their heights differ or a caption is missing.
    """
    if len({panel.shape[0] for panel in panels}) != 1 or len(panels) != len(captions):
        raise ValueError(
            f"Panels of shapes {[panel.shape for panel in panels]} with {len(captions)} captions: "
            "side_by_side needs panels of one height and one caption for each."
        )
    widths = [panel.shape[1] for panel in panels]
    texts = [_wrap(text, width) for text, width in zip(captions, widths, strict=True)]
    bar = LINE_HEIGHT * max(len(lines) for lines in texts)
    space = np.full((bar + panels[0].shape[0], gap, 3), 255, np.uint8)
    columns: list[Picture] = []
    for panel, lines in zip(panels, texts, strict=True):
        rgb = panel if panel.ndim == 3 else np.repeat(panel[..., None], 3, axis=-1)
        columns += [np.concatenate([_caption(lines, rgb.shape[1], bar), rgb]), space]
    return np.concatenate(columns[:-1], axis=1)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _wrap(text: str, width: int) -> list[str]:
    """Breaks a text between words so that its lines fit `width` pixels where words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font().getlength(longer) > width - 2 * INDENT:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _caption(lines: list[str], width: int, height: int) -> Picture:
    """Black text on a white bar, (height, width, 3)."""
    bar = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(bar), _font()
    for i, line in enumerate(lines):
        draw.text((INDENT, i * LINE_HEIGHT), line, "black", font)
    return np.asarray(bar)


def write_png(path: str | os.PathLike[str], picture: Picture) -> None:
    """Writes a picture to `path`, all or nothing: a reader sees the old file or the new one.

    Raises:
        InputError: if the folder does not exist.
        ValueError: if `picture` is not uint8 of shape (y, x) or (y, x, 3).
    """
    path = Path(path)
    if picture.dtype != np.uint8 or (picture.ndim != 2 and picture.shape[2:] != (3,)):
        raise ValueError(
            f"A picture of {picture.dtype} and shape {picture.shape} cannot be written: "
            "it must be uint8, (y, x) or (y, x, 3)."
        )
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; make it first.")
    write_whole(path, encode_png(picture))


def encode_png(picture: Picture) -> bytes:
    """A picture as the bytes of a PNG file; of up to 256 colours as a palette, which is smaller."""
    image = Image.fromarray(picture)
    if picture.ndim == 3:
        packed = picture.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        colours, index = np.unique(packed, return_inverse=True)
        if len(colours) <= 256:
            image = Image.fromarray(index.reshape(packed.shape).astype(np.uint8))
            image.putpalette([int(c >> shift & 255) for c in colours for shift in (16, 8, 0)])
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    return encoded.getvalue()
