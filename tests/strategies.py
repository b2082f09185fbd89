"""Hypothesis strategies for shapes, boxes, contexts and plans, small enough to check each voxel."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from unet_ray.tiling.boxes import Box
from unet_ray.tiling.levels import Level
from unet_ray.tiling.tiles import Context, TilePlan

SLICE = Level((1, 3, 3), (1, 2, 2))  # a 2-D network on a volume: no convolution along z
CUBE = Level((3, 3, 3), (2, 2, 2))


def flat_levels(depth):
    """Levels of the paper's network."""
    return (SLICE,) * (depth + 1)


def cubic_levels(depth):
    """Levels of the same network in 3-D."""
    return (CUBE,) * (depth + 1)


def shapes(most=(20, 70, 70)):
    return st.tuples(*(st.integers(1, n) for n in most))


def boxes(axes=3, low=-60, high=60):
    """Boxes at any position, including empty ones."""
    corner = st.integers(low, high)
    ranges = st.lists(st.tuples(corner, corner).map(sorted), min_size=axes, max_size=axes)
    return ranges.map(lambda drawn: Box(*map(tuple, zip(*drawn, strict=True))))


@st.composite
def levels(draw, deepest=4):
    """Levels of 2-D, 3-D and anisotropic U-Nets; the latter are flat at first and cubic below."""
    depth = draw(st.integers(1, deepest))
    flat = draw(st.sampled_from([0, 1, depth, depth + 1]))
    return flat_levels(depth)[:flat] + cubic_levels(depth)[flat:]


def contexts(deepest=4):
    return levels(deepest).map(Context.of_levels)


@st.composite
def plans(draw, most=(20, 70, 70), context=None):
    """Plans of few voxels. Passes divide a core, and are multiples of the step, as cores are."""
    chosen = context or draw(contexts())
    core, passes = [], []
    for step in chosen.step:
        parts, steps = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        passes.append(step * steps)
        core.append(step * steps * parts)
    return TilePlan(draw(shapes(most)), tuple(core), chosen, tuple(passes))


def labels(most=3, width=(1, 12)):
    """Two small label images (y, x) of the same shape, with few labels."""

    def images(shape):
        image = arrays(np.int32, shape, elements=st.integers(0, most))
        return st.tuples(image, image)

    return st.tuples(st.integers(1, 3), st.integers(*width)).flatmap(images)


@st.composite
def pairs(draw, most=12):
    """A truth and a proposal of blobs and noise, with ties, and of varying similarity."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = rng.integers(draw(st.sampled_from([1, 8])), most + 1, 2)
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), draw(st.sampled_from([0, 0.7, 1])))
    truth = smooth > draw(st.sampled_from([-0.4, 0, 0.4])) * smooth.std()
    noise = rng.random(shape)
    similar = draw(st.sampled_from([0, 0.3, 0.6, 0.9]))
    proposal = np.clip(similar * truth + (1 - similar) * noise, 0, 1)
    levels = draw(st.sampled_from([1, 2, 10, 255, None]))
    return truth, proposal if levels is None else np.rint(proposal * levels) / levels
