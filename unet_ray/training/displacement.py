"""Displacement of labels from their images, measured by correlation.

Knows slices and classes as arrays. Does not know what causes a displacement, or how a training
reacts to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.tiling.boxes import Box
from unet_ray.training.maps import Part
from unet_ray.training.truths import IGNORED

# At most, of a training: slices, slices read to choose these, and voxels of each along y and x.
SLICES, READ, EXTENT = 16, 64, 1024
FEWEST = 3  # slices; with fewer, their agreement is unknown
SMOOTHING = 1.5  # voxels
REACH = 8  # largest displacement, in voxels
# Least correlation of the gradients of grey values and classes at its peak, and largest standard
# deviation of the peaks of slices, in voxels.
CORRELATED, SPREAD = 0.4, 0.25
Peak = tuple[float, float, float]  # position along y and x in voxels, and correlation there


def displacement(parts: Sequence[Part]) -> tuple[float, float] | None:
    """Returns how far the labels are displaced from the images along y and x, in voxels.

    The estimate is the peak of the correlation of two gradients: of the grey values, and of the
    border between class 0 and the others. Gradients have no correlation with slow changes of grey
    inside objects, as shading.

    Args:
        parts: volumes to learn from.

    Returns:
        The mean over slices; None if it cannot be measured: if fewer than three slices have labels
        everywhere, of up to 64, if slices disagree, or if edges of the image are not where the
        labels end.
    """
    slices = islice(_slices(parts), SLICES)
    found = [peak for image, mask in slices if (peak := _strongest(image, mask)) is not None]
    peaks = np.array(found).reshape(-1, 2)
    if len(peaks) < FEWEST or peaks.std(axis=0).max() > SPREAD:
        return None
    y, x = peaks.mean(axis=0)
    return float(y), float(x)


def _slices(parts: Sequence[Part]) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
    """Yields the middle of slices that have labels everywhere: grey values (c, y, x) and classes.

    The first few are evenly spread over all volumes, and so are the next.
    """
    planes = [(part, z) for part in parts for z in range(part.shape[0])]
    stride = -(-len(planes) // SLICES)
    spread = (n for first in range(stride) for n in range(first, len(planes), stride))
    for number in islice(spread, READ):
        part, z = planes[number]
        box = _middle(z, part.shape)
        targets = part.truth(box).targets[0]
        if (targets != IGNORED).all():
            yield part.image[(slice(None), *box.slices)][:, 0], targets > 0


def _middle(z: int, shape: Iterable[int]) -> Box:
    _, *plane = shape
    extents = [min(n, EXTENT) for n in plane]
    start = (z, *((n - e) // 2 for n, e in zip(plane, extents, strict=True)))
    return Box(start, (z + 1, *(s + e for s, e in zip(start[1:], extents, strict=True))))


def _strongest(image: NDArray[Any], mask: NDArray[np.bool_]) -> tuple[float, float] | None:
    """Returns the peak of the channel with the strongest one; None if all are weak."""
    peaks = [peak for channel in image if (peak := _peak(channel, mask)) is not None]
    y, x, correlation = max(peaks, key=lambda peak: abs(peak[2]), default=(0.0, 0.0, 0.0))
    return (y, x) if abs(correlation) >= CORRELATED else None


def _peak(image: NDArray[Any], mask: NDArray[np.bool_]) -> Peak | None:
    """Returns the peak of the correlation of gradients; None if there is none within `REACH`."""
    if min(image.shape) <= 2 * REACH:
        return None
    height, width = image.shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    taper = np.outer(np.hanning(height), np.hanning(width))
    spectra = []
    for values in (image, mask):
        smooth = ndimage.gaussian_filter(values.astype(np.float64), SMOOTHING)
        # The frequency turns the product of two spectra into that of their gradients.
        spectrum = frequency * np.fft.rfft2(taper * (smooth - smooth.mean()))
        norm = np.linalg.norm(np.fft.irfft2(spectrum, s=image.shape))
        if not norm:
            return None
        spectra.append(spectrum / norm)
    correlation = np.fft.irfft2(spectra[0].conj() * spectra[1], s=image.shape)
    near = np.roll(correlation, (REACH, REACH), (0, 1))[: 2 * REACH + 1, : 2 * REACH + 1]
    y, x = (int(n) for n in np.unravel_index(np.abs(near).argmax(), near.shape))
    if not (0 < y < 2 * REACH and 0 < x < 2 * REACH):
        return None
    along_y, along_x = near[y - 1 : y + 2, x], near[y, x - 1 : x + 2]
    return y - REACH + _vertex(along_y), x - REACH + _vertex(along_x), float(near[y, x])


def _vertex(values: NDArray[np.float64]) -> float:
    """Returns the position of the vertex of the parabola through values at -1, 0 and 1."""
    before, here, after = values
    return float((before - after) / 2 / (before - 2 * here + after))
