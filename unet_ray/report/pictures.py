"""Pictures of a segmentation: grey slices, colour maps, overlays, panels side by side.

Handles pixels, colours and PNG files. Independent of stores and pages. A picture is uint8, with
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
"""Evenly spaced anchors of viridis (van der Walt and Smith 2015); lightness only rises."""

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
"""Colours that people with common colour vision deficiencies can distinguish (Okabe, Ito 2008)."""

CYAN = np.array((0, 255, 255))
YELLOW = np.array((255, 255, 0), np.uint8)
CYAN_SHARE = 0.4
# Twelve colours over this many greys, and black, fit the 256 colours of a PNG palette.
CELL_GREYS = 20
# Cells at most this many pixels apart are neighbours; it exceeds the width of a membrane.
APART = 12
# Brightness of a picture outside a frame, relative to the original.
OUTSIDE = 0.6
FONT_SIZE = 16
LINE_HEIGHT = 20
INDENT = 2


def to_grey(slice_: NDArray[Any], low: float | None = None, high: float | None = None) -> Picture:
    """Stretches a slice (y, x) of any dtype to uint8: `low` becomes 0, `high` becomes 255.

    Args:
        slice_: (y, x), any numeric dtype; NaN is shown as 0, values beyond the ends are clipped.
        low: by default the slice's 0.5th percentile. If both percentiles are equal, the minimum.
        high: by default the slice's 99.5th percentile, or the maximum, likewise.

    Returns:
        uint8 (y, x); 128 throughout if `high` is not above `low`, as in a constant slice.
    """
    values = np.asarray(slice_, np.float64)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return np.zeros(values.shape, np.uint8)
    ends = np.percentile(finite, (0.5, 99.5))
    if ends[0] == ends[1]:
        ends = np.array((finite.min(), finite.max()))
    bottom = ends[0] if low is None else low
    top = ends[1] if high is None else high
    if top <= bottom:
        return np.full(values.shape, 128, np.uint8)
    scaled = np.clip((values - bottom) / (top - bottom), 0, 1) * 255
    return np.rint(np.nan_to_num(scaled)).astype(np.uint8)


def colour_map(probability: NDArray[np.uint8]) -> Picture:
    """Colours a map (y, x) of 0 to 255 in viridis, dark violet to yellow: (y, x, 3)."""
    levels = np.arange(256) * (len(VIRIDIS) - 1) / 255
    table = [np.interp(levels, np.arange(len(VIRIDIS)), channel) for channel in VIRIDIS.T]
    rgb: Picture = np.rint(np.stack(table, axis=1)).astype(np.uint8)[probability]
    return rgb


def colour_log(values: NDArray[np.floating[Any]], low: float, high: float) -> Picture:
    """Colours positive numbers (y, x) in viridis on a logarithmic scale: (y, x, 3).

    `low` and less is dark violet, `high` and more is yellow. Numbers of at most 0 are black.
    """
    span = math.log(high) - math.log(low) or 1.0
    shares = (np.log(np.clip(values, low, high)) - math.log(low)) / span
    rgb = colour_map(np.rint(shares * 255).astype(np.uint8))
    rgb[values <= 0] = 0
    return rgb


def colour_classes(classes: NDArray[np.integer[Any]]) -> Picture:
    """Colours classes or labels (y, x) from 0: 0 is black, 1 to 7 differ, 8 repeats 1."""
    colours = len(OKABE_ITO) - 1
    index = np.where(classes == 0, 0, 1 + (classes.astype(np.int64) - 1) % colours)
    return OKABE_ITO[index]


def colour_cells(labels: NDArray[np.integer[Any]], image: Picture | None = None) -> Picture:
    """Colours each object at random; equal labels always get equal colours.

    Objects at most `APART` pixels apart get different colours, as far as twelve colours suffice.
    The colours also differ in lightness, so that most neighbours differ in a grey print too.

    Args:
        labels: objects (y, x); 0 is background and black.
        image: uint8 (y, x), visible below the colours; plain colours by default. It is reduced
            to a few grey levels, which keeps the file small.

    Returns:
        uint8 (y, x, 3).
    """
    light = [(colour.astype(int) + 255) // 2 for colour in OKABE_ITO[[1, 3, 5, 6, 7]]]
    colours = np.array([*OKABE_ITO[1:], *light])
    _, ranks = np.unique(np.append(labels, labels.dtype.type(0)), return_inverse=True)
    ranks = ranks[:-1].reshape(labels.shape)  # rank 0 is the background, even if no voxel has it
    rgb = colours[_draw_apart(ranks, len(colours))[ranks]]
    if image is not None:
        rgb = (rgb + few_greys(image, CELL_GREYS)[..., None]) // 2
    rgb[labels == 0] = 0
    return rgb.astype(np.uint8)


def _draw_apart(ranks: NDArray[np.integer[Any]], colours: int) -> NDArray[np.int64]:
    """A random colour index for each rank, or the next index that no neighbour has."""
    draws = np.random.default_rng(0).integers(colours, size=int(ranks.max(initial=0)) + 1)
    lower: dict[int, list[int]] = {}
    for low, high in _neighbours(ranks).tolist():
        lower.setdefault(high, []).append(low)
    for rank in sorted(lower):
        taken = {int(draws[other]) for other in lower[rank]}
        candidates = ((int(draws[rank]) + k) % colours for k in range(colours))
        draws[rank] = next((draw for draw in candidates if draw not in taken), draws[rank])
    return draws


def _neighbours(ranks: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Pairs (lower, higher) of objects that touch after each grows by `APART` / 2 pixels."""
    distance, nearest = ndimage.distance_transform_edt(ranks == 0, return_indices=True)
    grown = np.where(distance <= APART / 2, ranks[tuple(nearest)], 0)
    sides = [np.stack([a[:-1], a[1:]], -1).reshape(-1, 2) for a in (grown, grown.T)]
    pairs = np.sort(np.concatenate(sides), axis=1)
    return np.unique(pairs[(pairs[:, 0] > 0) & (pairs[:, 0] < pairs[:, 1])], axis=0)


def few_greys(image: Picture, levels: int) -> Picture:
    """Reduces a grey picture (y, x) to `levels` evenly spaced levels, from black to white."""
    steps = np.rint(image.astype(np.float64) / 255 * (levels - 1))
    return np.rint(steps * 255 / (levels - 1)).astype(np.uint8)


def frame(image: Picture, top: int, left: int, height: int, width: int) -> Picture:
    """Frames a part of a picture with a yellow line between black lines and dims the rest."""
    rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
    framed = (rgb * OUTSIDE).astype(np.uint8)
    for margin, colour in ((3, OKABE_ITO[0]), (2, OKABE_ITO[4]), (1, OKABE_ITO[0])):
        edge = max(0, top - margin), max(0, left - margin)
        framed[edge[0] : top + height + margin, edge[1] : left + width + margin] = colour
    inside = slice(top, top + height), slice(left, left + width)
    framed[inside] = rgb[inside]
    return framed


def strike_out(picture: Picture, where: NDArray[np.bool_]) -> Picture:
    """Hatches the pixels in `where`, light grey with oblique lines: (y, x, 3)."""
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
    """Draws a mask in cyan over a grey image, and the borders of the truth in yellow.

    The style is that of figure 4 in Ronneberger et al. 2015.

    Args:
        image: uint8 (y, x), see `to_grey`.
        mask: predicted pixels, bool (y, x).
        truth: true objects (y, x); 0 is background. A border pixel is an object pixel with a
            4-neighbour of another value. The edge of the picture is no border.

    Returns:
        uint8 (y, x, 3).
    """
    rgb = np.repeat(image[..., None], 3, axis=-1)
    rgb[mask] = np.rint(rgb[mask] * (1 - CYAN_SHARE) + CYAN * CYAN_SHARE)
    if truth is not None:
        rgb[_borders(truth)] = YELLOW
    return rgb


def _borders(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels that are not 0 and have a 4-neighbour of another value."""
    edge = np.zeros(labels.shape, bool)
    for values, marks in ((labels, edge), (labels.T, edge.T)):
        differ = values[1:] != values[:-1]
        marks[1:] |= differ
        marks[:-1] |= differ
    border: NDArray[np.bool_] = edge & (labels != 0)
    return border


def side_by_side(panels: Sequence[Picture], captions: Sequence[str], gap: int = 8) -> Picture:
    """Joins pictures of equal height side by side on white, with a caption above each.

    Args:
        panels: uint8 (y, x) or (y, x, 3).
        captions: one per panel; wrapped between words to the panel's width.
        gap: white pixels between two panels.

    Returns:
        uint8 (y + height of the captions, sum of widths and gaps, 3).

    Raises:
        ValueError: if there is no panel, the heights differ or the captions do not match.
    """
    if len({panel.shape[0] for panel in panels}) != 1 or len(panels) != len(captions):
        raise ValueError(
            f"Panels of shapes {[panel.shape for panel in panels]} with {len(captions)} captions: "
            "panels must have one height and one caption each."
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
    """Wraps a text between words to `width` pixels; a longer word keeps a line of its own."""
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
    """Writes a picture atomically: readers see either the old file or the new one.

    Args:
        path: of the PNG file.
        picture: uint8 (y, x) or (y, x, 3).

    Raises:
        InputError: if the folder does not exist.
        ValueError: if `picture` has another dtype or shape.
    """
    path = Path(path)
    if picture.dtype != np.uint8 or (picture.ndim != 2 and picture.shape[2:] != (3,)):
        raise ValueError(
            f"A picture of {picture.dtype} and shape {picture.shape} cannot be written: "
            "it must be uint8 of shape (y, x) or (y, x, 3)."
        )
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; create it first.")
    write_whole(path, encode_png(picture))


def encode_png(picture: Picture) -> bytes:
    """Encodes a picture as PNG; with at most 256 colours as a palette, which is smaller."""
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
