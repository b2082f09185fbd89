"""Held-out slices: their selection, their scores, and the effect of scores on a run."""

import itertools
import json
import multiprocessing
import time
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import tifffile
import torch
from scipy import ndimage

from tests.helper import load_training_data
from unet_ray.engine import cluster
from unet_ray.errors import InputError
from unet_ray.network.checkpoints import read_tensors
from unet_ray.network.unet import UNet
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings
from unet_ray.training import trainer as training
from unet_ray.training import validation
from unet_ray.training.data import HeldOut
from unet_ray.training.patches import Sampler, ahead
from unet_ray.training.recipes import Recipe
from unet_ray.training.run_folder import BEST, MODEL, RunFolder
from unet_ray.training.train import train
from unet_ray.training.trainer import Training, World
from unet_ray.training.truths import IGNORED
from unet_ray.training.validation import Validator, checked_score, score_names
from unet_ray.volumes.intensity import Intensity

TINY = {"base_channels": 2, "depth": 1, "patch": (44, 48), "elastic": 2.0, "learning_rate": 0.02}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(cluster, "usable_cores", lambda: 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of an image that equals its labels except for noise, and of the labels: six slices."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = 255 * rng.integers(0, 2, (6, 10, 10), np.uint8).repeat(7, 1).repeat(7, 2)
    image = (labels // 4 + rng.integers(60, 90, labels.shape)).astype(np.uint8)
    tifffile.imwrite(folder / "image.tif", image)
    tifffile.imwrite(folder / "labels.tif", labels)
    return str(folder / "image.tif"), str(folder / "labels.tif")


def run(files, out, watch=lambda measure: None, **chosen):
    recipe = Recipe.of("default", **{**TINY, "steps": 40, **chosen})
    return train([files[0]], [files[1]], out, recipe, watch=watch)


def load(images, labels, **chosen):
    return load_training_data(images, labels, Recipe(**chosen))


def validations(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation" in line]


def held_out(depth=1, cells=None, ignored=False):
    targets = np.zeros((depth, 8, 8), np.uint8)
    targets[:, :, :4] = 1
    if ignored:
        targets[0, 0, 0] = IGNORED
    image = np.zeros((1, depth, 8, 8), np.uint8)
    return HeldOut(image, targets, cells, Intensity((0.0,), (1.0,)))


def test_held_out_slices_are_not_used_for_training(files):
    data = load([files[0]] * 2, [files[1]] * 2, val="1:2,5:7")
    assert [len(v.targets) for v in data.volumes] == [4, 5]
    assert [len(h.targets) for h in data.held_out] == [2, 1]
    image = tifffile.imread(files[0])
    np.testing.assert_array_equal(data.held_out[0].image[0], image[[1, 5]])
    np.testing.assert_array_equal(data.volumes[0].image[0], image[[0, 2, 3, 4]])
    np.testing.assert_array_equal(data.held_out[1].image[0], image[[0]])


def test_a_fraction_takes_the_last_slices_and_at_least_one(files):
    for fraction, count in ((0.5, 3), (0.01, 1)):
        data = load([files[0]], [files[1]], val_fraction=fraction)
        assert len(data.held_out[0].targets) == count
        np.testing.assert_array_equal(
            data.held_out[0].image[0], tifffile.imread(files[0])[6 - count :]
        )


@pytest.mark.parametrize("val", ["4", "a:b", "3:3", "2:7", "-1:2", "0:6", "1:2,"])
def test_an_invalid_range_of_slices_is_refused(files, val):
    with pytest.raises(InputError, match=r"val=|leave some"):
        load([files[0]], [files[1]], val=val)


def test_scores_fit_the_labels():
    assert score_names([held_out()], 2)[-1] == "v_info"
    assert score_names([held_out()], 3)[-1] == "iou"
    assert score_names([held_out(ignored=True)], 2)[-1] == "iou"
    assert score_names([held_out(cells=np.ones((1, 8, 8), np.int64))], 2)[-1] == "seg"
    assert checked_score([held_out()], 2, "dice") == "dice"
    with pytest.raises(InputError, match=r"best_by='sge'.*v_rand"):
        checked_score([held_out()], 2, "sge")


def test_a_validation_equals_segmenting_and_scoring(files, tmp_path):
    model = run(files, tmp_path / "run", val="4:6", precision="float32")
    tensors, header = read_tensors(model)
    logged = header["training"]["validation"]
    tifffile.imwrite(tmp_path / "image.tif", tifffile.imread(files[0])[4:])
    tifffile.imwrite(tmp_path / "labels.tif", tifffile.imread(files[1])[4:])
    from unet_ray.scores.evaluation import evaluate

    data = load([files[0]], [files[1]], val="4:6")
    network = UNet(**header["architecture"]).eval()
    network.load_state_dict(tensors)
    scores = Validator(data.held_out, 2, None, "float32", "cpu")(network).scores
    assert scores == pytest.approx(logged)
    # The mean grey value of two slices differs a little from that of all six.
    store = segment(
        tmp_path / "image.tif", model, tmp_path / "out.zarr", Settings(precision="float32")
    )
    whole = evaluate(store, tmp_path / "labels.tif", "isbi").scores
    assert whole["v_rand"].value == pytest.approx(logged["v_rand"], abs=0.05)


def test_ten_validations_are_written_and_the_best_model_is_kept(files, tmp_path):
    model = run(files, tmp_path / "run", val_fraction=0.3, best_by="iou")
    lines = validations(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(4, 41, 4))
    best = max(lines, key=lambda line: line["validation"]["iou"])
    header = read_tensors(model)[1]
    assert header["training"]["validation"] == best["validation"]
    assert header["training"]["steps"] == best["step"]
    model.unlink()
    assert read_tensors(run(files, tmp_path / "run", val_fraction=0.3, best_by="iou"))[1] == header


def test_validation_does_not_change_the_training(files, tmp_path, monkeypatch):
    run(files, tmp_path / "with", val="4:6", precision="float32")
    monkeypatch.setattr(training, "VALIDATIONS", 0)
    run(files, tmp_path / "without", val="4:6", precision="float32")
    last = [sorted((tmp_path / n / "checkpoints").glob("*"))[-1] for n in ("with", "without")]
    (one, _), (other, _) = (read_tensors(path) for path in last)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


LIMIT = 3  # seconds that a worker waits for another one in a step; 30 minutes outside of tests


def train_together(rank, started, files, run, chosen):
    """One of two workers; its first worker validates for longer than the others may wait."""
    validate = validation.Validator.__call__

    def slow(self, network):
        time.sleep(1.5 * LIMIT if not run.contains(BEST) else 0)
        return validate(self, network)

    validation.Validator.__call__ = slow
    started.wait()  # so that the start of a process does not count
    torch.distributed.init_process_group(
        "gloo", f"file://{run.path}.peers", timedelta(seconds=LIMIT), 2, rank
    )
    recipe = Recipe.of("default", **{**TINY, "steps": 10, **chosen})
    data = load_training_data([files[0]], [files[1]], recipe)
    draw = partial(ahead, Sampler(data, recipe).__getitem__)
    world = World(rank, 2, torch.device("cpu"), 1)
    Training(recipe, data, run, world, draw, lambda measure: None, 60.0).go()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_workers_wait_for_a_validation_longer_than_their_time_limit(files, tmp_path):
    chosen = {"val": "4:6", "best_by": "iou"}
    spawn = multiprocessing.get_context("spawn")
    with RunFolder(tmp_path / "run").owned() as owned:
        arguments = spawn.Barrier(2), files, owned, chosen
        workers = [spawn.Process(target=train_together, args=(r, *arguments)) for r in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "run" / MODEL).exists()
    assert [line["step"] for line in validations(tmp_path / "run")][:3] == [1, 2, 3]


def test_the_arithmetic_is_settled_before_the_first_step(files, tmp_path, monkeypatch):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    monkeypatch.setattr(cudnn, "allow_tf32", True)  # as torch starts
    monkeypatch.setattr(cudnn, "deterministic", False)
    step, seen = training.Learner.step, []

    def recorded(learner, samples, number, progress):
        seen.append((number, cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic))
        return step(learner, samples, number, progress)

    monkeypatch.setattr(training.Learner, "step", recorded)
    run(files, tmp_path / "run", val="4:6", best_by="iou", steps=10)
    assert seen == [(number, False, False, True) for number in range(10)]
    assert len(validations(tmp_path / "run")) == 10


def scored(scores):
    """A validation that takes its IoU from an iterator."""

    def call(self, network):
        predictions = [np.zeros((1, *each.targets.shape), np.uint8) for each in self._held_out]
        return validation.Validated({"iou": next(scores)}, predictions, 0.5)

    return call


def test_patience_ends_a_run_that_does_not_improve(files, tmp_path, monkeypatch):
    scores = iter([0.3, 0.5, 0.4, 0.45, 0.9])
    monkeypatch.setattr(validation.Validator, "__call__", scored(scores))
    model = run(files, tmp_path / "run", val="4:6", best_by="iou", patience=2)
    assert [v["validation"]["iou"] for v in validations(tmp_path / "run")] == [0.3, 0.5, 0.4, 0.45]
    assert read_tensors(model)[1]["training"]["steps"] == 8


def test_a_run_interrupted_when_patience_ended_does_not_train_on(files, tmp_path, monkeypatch):
    monkeypatch.setattr(validation.Validator, "__call__", scored(itertools.repeat(0.5)))
    chosen = {"val": "4:6", "best_by": "iou", "patience": 2}

    def stop(measure):
        if measure.step == 12 and measure.validation:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(files, tmp_path / "run", stop, **chosen)
    run(files, tmp_path / "run", **chosen)
    assert [line["step"] for line in validations(tmp_path / "run")] == [4, 8, 12]


class StoppedError(Exception):
    """Simulates a kill."""


@pytest.mark.parametrize("step", [4, 10, 12, 30])
def test_an_interrupted_run_has_the_same_best_model_and_the_same_log(files, tmp_path, step):
    def stop(measure):
        if measure.step == step:
            raise StoppedError

    chosen = {"val": "4:6", "best_by": "iou", "precision": "float32"}
    run(files, tmp_path / "whole", **chosen)
    with pytest.raises(StoppedError):
        run(files, tmp_path / "cut", stop, **chosen)
    run(files, tmp_path / "cut", **chosen)
    whole, cut = ((tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "cut"))

    def curve(text):
        return [{**json.loads(line), "seconds": 0} for line in text.splitlines()]

    assert curve(cut) == curve(whole)
    one, other = (read_tensors(tmp_path / n / "model.safetensors") for n in ("whole", "cut"))
    assert one[1] == other[1]
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def test_cells_are_scored_slice_by_slice(monkeypatch):
    cells = np.zeros((2, 8, 8), np.int64)
    cells[0, :3, :3], cells[0, 5:, 5:], cells[1, :3, :3] = 1, 2, 2
    slices = HeldOut(
        np.zeros((1, 2, 8, 8), np.uint8),
        (cells != 0).astype(np.uint8),
        cells,
        Intensity((0.0,), (1.0,)),
    )
    validator = Validator([slices], 2, None, "float32", "cpu")
    stored = np.where(cells != 0, 255, 0).astype(np.uint8)[None]
    monkeypatch.setattr(validation, "predicted", lambda *given: stored)
    assert validator(UNet(1, 2, 2, 1)).scores == {"dice": 1.0, "iou": 1.0, "seg": 1.0, "ap50": 1.0}
    assert ndimage.label(stored[0, 0])[1] == 2


def test_held_out_slices_without_a_defined_score_are_refused():
    unannotated, empty = held_out(), held_out()
    unannotated.targets[:], empty.targets[:] = IGNORED, 0
    with pytest.raises(InputError, match="no annotated voxel"):
        checked_score([unannotated], 2, None)
    with pytest.raises(InputError, match="only the first class"):
        checked_score([empty], 2, None)


def test_slices_of_different_sizes_are_weighted_by_their_voxels():
    small, large = (
        held_out(),
        HeldOut(
            np.zeros((1, 1, 32, 8), np.uint8),
            np.ones((1, 32, 8), np.uint8),
            None,
            held_out().intensity,
        ),
    )
    large.targets[:, :16] = 0
    validator = Validator([small, large], 2, None, "float32", "cpu")
    right, wrong = np.where(small.targets, 255, 0)[None], np.full((1, 1, 32, 8), 255)
    together = validator._scores([right.astype(np.uint8), wrong.astype(np.uint8)], None)
    large_only = Validator([large], 2, None, "float32", "cpu")._scores(
        [wrong.astype(np.uint8)], None
    )
    assert together["pixel_error"] == pytest.approx(large_only["pixel_error"] * 256 / 320)


def test_cells_predicted_without_annotation_are_not_errors():
    cells = np.zeros((1, 8, 8), np.int64)
    cells[0, :3, :3] = 1
    targets = (cells != 0).astype(np.uint8)
    targets[0, 5:] = IGNORED
    slices = HeldOut(np.zeros((1, 1, 8, 8), np.uint8), targets, cells, held_out().intensity)
    stored = np.where(cells != 0, 255, 0).astype(np.uint8)[None]
    stored[0, 0, 6:, 6:] = 255
    scores = Validator([slices], 2, None, "float32", "cpu")._scores([stored], None)
    assert (scores["ap50"], scores["seg"]) == (1.0, 1.0)
