"""Predictions on held-out slices that are stored for the report."""

from contextlib import nullcontext

import numpy as np
import pytest

from unet_ray.errors import InputError
from unet_ray.network.checkpoints import read_tensors, write_tensors
from unet_ray.report.training_page import _predictions
from unet_ray.training.data import HeldOut
from unet_ray.training.gallery import PLACE, PLACES, PREDICTIONS, WINDOW, store_predictions
from unet_ray.training.truths import IGNORED
from unet_ray.volumes.intensity import Intensity

SIDE = 4 * PLACE


@pytest.fixture
def held_out():
    targets = np.zeros((1, SIDE, SIDE), np.uint8)
    targets[:, ::2] = 1
    image = np.zeros((1, 1, SIDE, SIDE), np.uint8)
    return [HeldOut(image, targets, None, Intensity((0.0,), (1.0,)))]


def stored(path, step, held_out, prediction):
    store_predictions(path, step, held_out, [prediction], nullcontext)
    return read_tensors(path)[0]


def test_each_validation_adds_a_window_and_a_resumed_run_drops_later_ones(held_out, tmp_path):
    right = 255 * held_out[0].targets[None]
    steps = []
    for step in (10, 20, 30, 20):
        tensors = stored(tmp_path / PREDICTIONS, step, held_out, right)
        steps.append(sorted(name for name in tensors if name.startswith("step.")))
    assert steps[2] == ["step.10", "step.20", "step.30"]
    assert steps[3] == ["step.10", "step.20"]
    assert tensors["step.20"].shape == tensors["image"].shape == (WINDOW, WINDOW)


def test_places_go_from_the_worst_to_the_best(held_out, tmp_path):
    prediction = 255 * held_out[0].targets[None]
    prediction[0, 0, :PLACE, :PLACE] = 0  # half of the voxels are wrong
    prediction[0, 0, PLACE : 2 * PLACE, :9] = 0
    tensors = stored(tmp_path / PREDICTIONS, 1, held_out, prediction)
    wrong = [
        int(((tensors[f"place.{n}.prediction"] > 127) != tensors[f"place.{n}.targets"]).sum())
        for n in range(2 * PLACES)
    ]
    assert wrong[0] == PLACE**2 // 2 and wrong[1] == 9 * PLACE // 2
    assert wrong == sorted(wrong, reverse=True) and wrong[-1] == 0


def test_places_are_wrong_by_the_threshold_of_the_class_map(held_out, tmp_path):
    prediction = np.where(held_out[0].targets, 60, 20).astype(np.uint8)[None]  # right above 40
    prediction[0, 0, PLACE:, PLACE:] = 50  # wrong in half of the voxels
    path = tmp_path / PREDICTIONS
    store_predictions(path, 1, held_out, [prediction], nullcontext, 40 / 255)
    tensors = read_tensors(path)[0]
    values = [set(tensors[f"place.{n}.prediction"].flatten().tolist()) for n in range(2 * PLACES)]
    assert values == [{50}] * PLACES + [{20, 60}] * PLACES


def test_voxels_without_annotation_are_never_wrong(held_out, tmp_path):
    held_out[0].targets[0, :PLACE, :PLACE] = IGNORED
    prediction = np.zeros((1, 1, SIDE, SIDE), np.uint8)
    prediction[0, 0, ::2] = 255
    prediction[0, 0, PLACE:, PLACE:] = 0
    tensors = stored(tmp_path / PREDICTIONS, 1, held_out, prediction)
    assert not any((tensors[f"place.{n}.targets"] == IGNORED).all() for n in range(2 * PLACES))


@pytest.mark.parametrize("lost", ["image", "targets", "place.0.image", "place.1.targets"])
def test_a_damaged_file_is_refused_by_the_report(held_out, tmp_path, lost):
    tensors = stored(tmp_path / PREDICTIONS, 1, held_out, 255 * held_out[0].targets[None])
    assert _predictions(tmp_path / PREDICTIONS)["worst"]
    del tensors[lost]
    write_tensors(tmp_path / PREDICTIONS, tensors, {"classes": 2})
    with pytest.raises(InputError, match="does not hold predictions"):
        _predictions(tmp_path / PREDICTIONS)
