"""Labels by runs equal those of scipy.ndimage.label, their order included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tests.segmentation.test_unions import WORST, cases, every_connection
from unet_ray.segmentation.runs import label_runs


def assert_labels_equal_those_of_scipy(mask, structure):
    labels, count = label_runs(mask, structure)
    right, objects = ndimage.label(mask, structure)
    np.testing.assert_array_equal(labels, right)
    assert count == objects
    assert labels.dtype == np.int32


@settings(max_examples=400, deadline=None)
@given(cases(), st.permutations([0, 1, 2]))
def test_labels_equal_those_of_scipy(case, axes):
    mask, _, connection = case
    # A transposed mask is not contiguous.
    assert_labels_equal_those_of_scipy(mask.transpose(axes), connection.structure)


@every_connection
@pytest.mark.parametrize("name", WORST)
def test_labels_of_worst_cases_equal_those_of_scipy(name, connection):
    assert_labels_equal_those_of_scipy(WORST[name][0], connection.structure)


@every_connection
@pytest.mark.parametrize("shape", [(0, 3, 3), (3, 0, 3), (3, 3, 0)])
def test_an_empty_mask_has_no_labels(shape, connection):
    labels, count = label_runs(np.zeros(shape, bool), connection.structure)
    assert (labels.shape, count) == (shape, 0)


@every_connection
def test_a_union_of_long_chains_is_flat(connection):
    # Combs, whose teeth meet at their last row: runs are united in the worst order.
    mask = np.zeros((2, 64, 65), bool)
    mask[:, :, ::2] = True
    mask[1, -1] = True
    assert_labels_equal_those_of_scipy(mask, connection.structure)
    assert_labels_equal_those_of_scipy(mask[:, ::-1, ::-1], connection.structure)
