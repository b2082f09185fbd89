"""Scoring of files: formats, unet-ray stores, the pairing of slices and labels, and errors."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from tests.helper import (
    TILED,
    classes_of,
    noise,
    random_labels,
    random_model,
    random_stack,
    write_stack,
)
from unet_ray.errors import InputError, RunError
from unet_ray.scores import stacks
from unet_ray.scores.evaluation import Evaluation, evaluate
from unet_ray.scores.totals import (
    INSTANCES,
    ISBI,
    MEANINGS,
    ClassScore,
    Score,
    class_scores,
    instance_scores,
    isbi_scores,
    overlap_tables,
)
from unet_ray.segmentation.segment import segment
from unet_ray.storage.layout import LEDGER
from unet_ray.storage.ledger import Ledger
from unet_ray.tiling.boxes import Box


def stripped(scores):
    """The scores without the values of slices."""
    return {name: dataclasses.replace(score, slices=()) for name, score in scores.items()}


def of_classes(prediction, truth, per_slice=False):
    """The scores of arrays of class numbers."""
    return class_scores(overlap_tables(prediction, truth, per_slice), per_slice)


# Formats


def as_tiff(folder, name, array):
    return write_stack(folder / f"{name}.tif", array)


def as_folder(folder, name, array):
    """Slices t2.tif, t3.tif, ... t13.tif: in natural order t2 comes before t10."""
    (folder / name).mkdir()
    for z, plane in enumerate(array, start=2):
        tifffile.imwrite(folder / name / f"t{z}.tif", plane)
    return folder / name


def as_png(folder, name, array):
    (folder / name).mkdir()
    for z, plane in enumerate(array, start=2):
        Image.fromarray(plane).save(folder / name / f"slice {z}.png")
    return folder / name


def as_zarr(folder, name, array):
    chunk = tuple(max(1, n // 2) for n in array.shape)
    zarr.create_array(folder / name, data=array, chunks=chunk)
    return folder / name


FORMATS = [as_tiff, as_folder, as_png, as_zarr]
formats = pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)


@formats
def test_membranes_of_any_format(tmp_path, write):
    proposal, truth = random_stack(0, shape=(12, 16, 18))
    proposal, truth = np.rint(255 * proposal).astype(np.uint8), 255 * truth.astype(np.uint8)
    files = write(tmp_path, "prediction", proposal), write(tmp_path, "truth", truth)
    evaluation = evaluate(*files, "isbi")
    assert (evaluation.kind, evaluation.shape, evaluation.note) == ("isbi", (12, 16, 18), "")
    expected = isbi_scores(proposal, truth)
    assert evaluation.scores == stripped(expected)
    assert evaluate(*files, "isbi", per_slice=True).scores == expected


@formats
@pytest.mark.parametrize("per_slice", [False, True])
def test_objects_of_any_format(tmp_path, write, per_slice):
    arrays = [a.astype(np.uint8) for a in random_labels(0, (12, 9, 12))]
    files = [
        write(tmp_path, name, a) for name, a in zip(("prediction", "truth"), arrays, strict=True)
    ]
    evaluation = evaluate(*files, "instances", per_slice)
    assert evaluation.scores == instance_scores(*arrays, per_slice)


@formats
@pytest.mark.parametrize("per_slice", [False, True])
def test_classes_of_any_format(tmp_path, write, per_slice):
    arrays = [a.astype(np.uint8) for a in random_labels(1, (12, 9, 12), most=3)]
    files = [
        write(tmp_path, name, a) for name, a in zip(("prediction", "truth"), arrays, strict=True)
    ]
    evaluation = evaluate(*files, "classes", per_slice)
    assert repr(evaluation.scores) == repr(of_classes(*arrays, per_slice))


def test_two_formats_and_an_image_of_two_axes(tmp_path):
    prediction, truth = random_labels(2, (1, 30, 30))
    one = as_tiff(tmp_path, "prediction", prediction[0].astype(np.uint16))
    other = as_zarr(tmp_path, "truth", truth[0].astype(np.int64))
    evaluation = evaluate(one, str(other), "instances")
    assert evaluation.shape == (1, 30, 30)
    assert evaluation.scores == instance_scores(prediction, truth)


def test_ids_of_64_bits_survive(tmp_path):
    truth = np.array([[[2**63, 2**63, 2**63 + 1, 2**63 + 1, 1]]], np.uint64)
    merged = np.array([[[2**63, 2**63, 2**63, 2**63, 1]]], np.uint64)
    files = as_zarr(tmp_path, "prediction", merged), as_zarr(tmp_path, "truth", truth)
    assert evaluate(*files, "instances").scores["ap50"].value == pytest.approx(2 / 3)


@pytest.mark.parametrize("voxels", [1, 100])
def test_the_size_of_pieces_makes_no_difference(tmp_path, monkeypatch, voxels):
    prediction, truth = random_labels(3)
    files = as_zarr(tmp_path, "prediction", prediction), as_zarr(tmp_path, "truth", truth)
    monkeypatch.setattr(stacks, "PIECE_VOXELS", voxels)
    assert evaluate(*files, "instances").scores == instance_scores(prediction, truth)


def test_progress_is_reported(tmp_path):
    _, truth = random_stack(0)
    file = as_tiff(tmp_path, "truth", truth.astype(np.uint8))
    for kind, steps in (("isbi", 3), ("instances", 1), ("classes", 1)):
        calls = []
        evaluate(file, file, kind, watch=lambda *numbers, calls=calls: calls.append(numbers))
        assert calls == [(n, steps) for n in range(1, steps + 1)]


# Slices as separate images


def test_equal_labels_in_two_slices_are_two_objects(tmp_path):
    truth = np.array([[[1, 1, 1, 1]], [[1, 1, 0, 0]]], np.uint8)
    prediction = np.array([[[1, 1, 1, 1]], [[0, 0, 1, 1]]], np.uint8)
    files = as_folder(tmp_path, "prediction", prediction), as_folder(tmp_path, "truth", truth)
    assert evaluate(*files, "instances").scores["seg"].value == pytest.approx(4 / 8)
    evaluation = evaluate(*files, "instances", per_slice=True)
    assert evaluation.scores["seg"].value == pytest.approx((1 + 0) / 2)
    assert [row["seg"] for row in evaluation.to_json()["slices"]] == [1, 0]


def test_ids_that_are_numbered_slice_by_slice_are_noted():
    steady = np.zeros((3, 8, 8), np.uint8)
    steady[:, :3, :3], steady[:, 5:, 5:], steady[:, :3, 5:] = 1, 2, 3
    exchanged = steady.copy()
    exchanged[1] = steady[1, ::-1, ::-1]  # ids 1 and 2, of three
    assert "--per-slice" in evaluate(exchanged, exchanged, "instances").note
    assert "--per-slice" not in evaluate(steady, steady, "instances").note
    assert "--per-slice" not in evaluate(exchanged, exchanged, "instances", per_slice=True).note


# Folders of the Cell Tracking Challenge


@pytest.fixture
def sequence(tmp_path):
    """Folders and arrays of twelve result masks, and of the truth of three of them."""
    results, truth = (a.astype(np.uint16) for a in random_labels(4, (12, 9, 12)))
    for name in ("01_RES", "SEG"):
        (tmp_path / name).mkdir()
    for z, plane in enumerate(results):
        tifffile.imwrite(tmp_path / "01_RES" / f"mask{z:03}.tif", plane)
    for z in (2, 9, 10):
        tifffile.imwrite(tmp_path / "SEG" / f"man_seg{z:03}.tif", truth[z])
    return tmp_path / "01_RES", tmp_path / "SEG", results, truth


def test_slices_without_a_truth_are_left_out(sequence):
    folder, right, results, truth = sequence
    chosen = [2, 9, 10]
    evaluation = evaluate(folder, right, "instances", per_slice=True)
    assert evaluation.scores == instance_scores(results[chosen], truth[chosen], per_slice=True)
    assert evaluation.shape == (3, 9, 12)
    assert evaluation.note == "3 of 12 slices have a truth, paired by their numbers."


def test_a_truth_without_a_result_is_refused(sequence):
    folder, right, *_ = sequence
    (folder / "mask009.tif").unlink()
    with pytest.raises(
        InputError, match=r"01_RES: has no slice with the number of man_seg009\.tif"
    ):
        evaluate(folder, right, "instances")
    for path in folder.iterdir():
        if path.name not in ("mask000.tif", "mask001.tif"):
            path.unlink()
    with pytest.raises(InputError, match=r"with the number of man_seg002\.tif"):
        evaluate(folder, right, "instances")


def test_a_truth_without_a_number_is_refused(sequence):
    folder, right, *_ = sequence
    (right / "man_seg009.tif").rename(right / "truth.tif")
    with pytest.raises(InputError, match=r"with the number of truth\.tif"):
        evaluate(folder, right, "instances")


def test_folders_of_equal_length_are_compared_in_order(sequence):
    folder, right, results, truth = sequence
    for path in folder.iterdir():
        if path.name not in ("mask001.tif", "mask005.tif", "mask011.tif"):
            path.unlink()
    evaluation = evaluate(folder, right, "instances", per_slice=True)
    assert "in order: mask001.tif with man_seg002.tif" in evaluation.note
    expected = instance_scores(results[[1, 5, 11]], truth[[2, 9, 10]], per_slice=True)
    assert evaluation.scores == expected


def test_numbers_that_are_not_unique_do_not_pair_slices(sequence):
    folder, right, *_ = sequence
    (folder / "mask003.tif").rename(folder / "other002.tif")
    with pytest.raises(InputError, match="same shape, but are 12 x 9 x 12 and 3 x 9 x 12"):
        evaluate(folder, right, "instances")


def test_two_truths_of_one_number_are_not_paired_with_one_result(sequence):
    folder, right, *_ = sequence
    (right / "man_seg010.tif").rename(right / "man_seg_1_002.tif")
    with pytest.raises(InputError, match="same shape, but are 12 x 9 x 12 and 3 x 9 x 12"):
        evaluate(folder, right, "instances")


def test_a_stack_is_not_paired_by_numbers(sequence, tmp_path):
    _, right, results, _ = sequence
    file = as_tiff(tmp_path, "all", results)
    with pytest.raises(InputError, match="same shape, but are 12 x 9 x 12 and 3 x 9 x 12"):
        evaluate(file, right, "instances")


# Stores of unet-ray


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a volume, two models, and finished stores of two and of three classes."""
    folder = tmp_path_factory.mktemp("made")
    volume = write_stack(folder / "volume.tif", noise((3, 61, 75)))
    random_model(folder / "store.model")
    random_model(folder / "three.model", (3, 7, 200), base=3, seed=3)
    for name in ("store", "three"):
        segment(volume, folder / f"{name}.model", folder / f"{name}.zarr", TILED)
    assert set(np.unique(classes_of(folder / "three.zarr"))) == {0, 1, 2}
    return folder


@pytest.fixture
def store(tmp_path, made):
    """A finished store with probabilities and classes."""
    return shutil.copytree(made / "store.zarr", tmp_path / "store.zarr")


@pytest.fixture
def three(tmp_path, made):
    """A store of three classes, 3, 7 and 200."""
    return shutil.copytree(made / "three.zarr", tmp_path / "three.zarr")


@pytest.fixture
def cells():
    return noise((3, 61, 75), seed=5) > 100


def test_stored_probabilities_are_k_over_255(tmp_path, store, cells):
    truth = as_tiff(tmp_path, "truth", cells.astype(np.uint8))
    map_ = zarr.open_array(store / "0", mode="r")[0]
    assert len(np.unique(map_)) > 50
    scores = evaluate(store, truth, "isbi").scores
    assert scores == stripped(isbi_scores(map_ / 255, cells))
    # a threshold T on the stored map means k > 255 T
    error = dict(scores["pixel_error"].curve)[0.5]
    hits = map_ > 127.5
    assert error == pytest.approx(1 - 2 * (hits & cells).sum() / (hits.sum() + cells.sum()))


def test_a_stored_map_is_divided_by_255_even_if_all_is_0_or_1(tmp_path, store, cells):
    array = zarr.open_array(store / "0", mode="r+")
    array[:] = cells[None]
    truth = as_tiff(tmp_path, "truth", cells.astype(np.uint8))
    score = evaluate(store, truth, "isbi").scores["pixel_error"]
    # 1 is 1/255: cell only at threshold 0
    assert [value for _, value in score.curve] == [0] + [1] * 9
    # as an array without its store it is a map of zeros and ones
    score = evaluate(store / "0", truth, "isbi").scores["pixel_error"]
    assert [value for _, value in score.curve] == [0] * 10


@pytest.mark.parametrize("white", [1, 255])
def test_classes_of_a_store_are_numbers(tmp_path, store, cells, white):
    truth = as_tiff(tmp_path, "truth", cells * np.uint8(white))
    evaluation = evaluate(store, truth, "classes")
    assert evaluation.scores == of_classes(classes_of(store), cells.astype(np.uint8))
    assert [k for k, _ in evaluation.scores["iou"].classes] == [0, 1]
    # a store may also be the truth
    turned = evaluate(truth, store, "classes").scores
    assert turned["accuracy"] == evaluation.scores["accuracy"]
    assert turned["iou"] == evaluation.scores["iou"]


def test_a_store_against_itself(store):
    scores = evaluate(store, store, "classes").scores
    assert [score.value for score in scores.values()] == [1, 1, 1]


def test_class_numbers_of_a_store_are_matched_with_label_values(tmp_path, three):
    numbers = (noise((3, 61, 75), seed=7) // 40).clip(0, 2)
    expected = of_classes(classes_of(three), numbers)
    for name, truth in (
        ("values", np.array([3, 7, 200], np.uint8)[numbers]),
        ("numbers", numbers),
    ):
        evaluation = evaluate(three, as_tiff(tmp_path, name, truth), "classes")
        assert repr(evaluation.scores) == repr(expected), name
    others = as_tiff(tmp_path, "others", np.array([0, 128, 255], np.uint8)[numbers])
    with pytest.raises(InputError, match=r"others\.tif: holds 0, 128, 255, but the classes"):
        evaluate(three, others, "classes")


def test_the_mapping_of_labels_is_reported(tmp_path, three):
    numbers = (noise((3, 61, 75), seed=7) // 40).clip(0, 2)
    truth = as_tiff(tmp_path, "values", np.array([3, 7, 200], np.uint8)[numbers])
    evaluation = evaluate(three, truth, "classes")
    assert "truth 3 = 0, 7 = 1, 200 = 2" in evaluation.note
    assert "class 2 (label 200)" in evaluation.table()
    assert evaluate(three, three, "classes").note == ""


@pytest.mark.parametrize("kind", ["isbi", "classes"])
def test_a_missing_shard_is_named_and_not_read_as_background(store, tmp_path, kind):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    gone = sorted((copy / {"isbi": "0", "classes": "labels/classes/0"}[kind] / "c").rglob("*"))
    gone = next(path for path in gone if path.is_file())
    gone.unlink()
    with pytest.raises(RunError, match=re.escape(str(gone))):
        evaluate(copy, copy, kind)


def test_a_copy_without_hidden_files_is_refused(store, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    shutil.rmtree(copy / ".unet_ray")
    with pytest.raises(InputError, match=r"\.unet_ray is missing"):
        evaluate(copy, copy, "classes")


@pytest.mark.parametrize("key", ["model", "plan", "outputs"])
def test_damaged_metadata_of_a_store_is_reported(store, tmp_path, key):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    metadata = json.loads((copy / "zarr.json").read_text())
    del metadata["attributes"]["unet_ray"][key]
    (copy / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match="damaged metadata"):
        evaluate(copy, copy, "classes")


def test_class_numbers_of_a_store_are_never_read_as_label_values(tmp_path, made):
    # Number 1 is the class of label value 2, even if no other number occurs.
    model = random_model(tmp_path / "model.safetensors", (1, 2))
    store = segment(made / "volume.tif", model, tmp_path / "out.zarr", TILED)
    zarr.open_array(store / "labels/classes/0", mode="r+")[:] = 1
    truth = np.full((3, 61, 75), 1, np.uint8)
    truth[0] = 2
    scores = evaluate(store, as_tiff(tmp_path, "truth", truth), "classes").scores
    assert scores["accuracy"].value == pytest.approx(1 / 3)
    assert scores["iou"].classes == ((0, 0), (1, pytest.approx(1 / 3)))


def test_a_class_missing_in_the_truth_keeps_its_number(tmp_path, three):
    # without the middle one, 200 is still class 2, as in the store
    truth = np.where(noise((3, 61, 75), seed=7) > 100, 200, 3).astype(np.uint8)
    expected = of_classes(classes_of(three), np.where(truth == 200, 2, 0))
    evaluation = evaluate(three, as_tiff(tmp_path, "truth", truth), "classes")
    assert repr(evaluation.scores) == repr(expected)
    assert dict(evaluation.scores["iou"].classes)[1] == 0


def test_a_class_missing_in_a_store_used_as_truth_keeps_its_number(tmp_path, three):
    array = zarr.open_array(three / "labels/classes/0", mode="r+")
    array[:] = np.where(array[:] == 1, 2, array[:])
    prediction = np.where(noise((3, 61, 75), seed=7) > 100, 2, 0).astype(np.uint8)
    scores = evaluate(as_tiff(tmp_path, "prediction", prediction), three, "classes").scores
    assert scores == of_classes(prediction, array[:])
    assert [k for k, _ in scores["iou"].classes] == [0, 2]


@pytest.mark.parametrize("values", [(0, 1, 2, 3), (0, 9), (3, 7, 200, 201)], ids=str)
def test_a_truth_of_other_classes_than_the_store_is_refused(tmp_path, three, values):
    truth = np.array(values, np.uint8)[noise((3, 61, 75), seed=7) // 8 % len(values)]
    file = as_tiff(tmp_path, "truth", truth)
    message = (
        rf"truth\.tif: holds {', '.join(map(str, values))}, but the classes of .*three\.zarr are"
    )
    with pytest.raises(InputError, match=message + " 3, 7, 200; --as classes compares class maps"):
        evaluate(three, file, "classes")


def test_objects_are_refused_as_truth_for_classes(tmp_path, store):
    for most in (5, 100):
        truth = (noise((3, 61, 75), seed=7) * 2.5).astype(np.uint8) % (most + 1)
        file = as_tiff(tmp_path, f"truth {most}", truth)
        with pytest.raises(InputError, match=rf"truth {most}\.tif: holds .*class map"):
            evaluate(store, file, "classes")


def test_a_store_of_several_classes_is_refused_as_membranes(tmp_path, three, cells):
    truth = as_tiff(tmp_path, "truth", cells.astype(np.uint8))
    with pytest.raises(InputError, match=r"three\.zarr: has 2 channels; scores need one map"):
        evaluate(three, truth, "isbi")


def test_an_output_that_is_not_stored_is_refused(tmp_path, made, store, cells):
    truth = as_tiff(tmp_path, "truth", cells.astype(np.uint8))
    with pytest.raises(
        InputError,
        match=r"store\.zarr: holds probabilities and classes, no instances, which --as instances",
    ):
        evaluate(store, truth, "instances")
    settings = dataclasses.replace(TILED, outputs=("classes",))
    files = made / "volume.tif", made / "store.model"
    classes = segment(*files, tmp_path / "classes.zarr", settings)
    with pytest.raises(InputError, match=r"classes\.zarr: holds classes, no probabilities"):
        evaluate(classes, truth, "isbi")
    assert evaluate(classes, truth, "classes").scores == evaluate(store, truth, "classes").scores


@pytest.mark.parametrize("kind", ["isbi", "classes"])
def test_an_unfinished_store_is_refused_on_either_side(tmp_path, made, cells, kind):
    inputs = made / "volume.tif", made / "store.model"
    region = dataclasses.replace(TILED, region=Box((0, 0, 0), (3, 30, 75)))
    store = segment(*inputs, tmp_path / "part.zarr", region)
    truth = as_tiff(tmp_path, "truth", cells.astype(np.uint8))
    message = r"part\.zarr: 12 of 24 tiles are not done; run the same"
    for files in ((store, truth), (truth, store)):
        with pytest.raises(InputError, match=message):
            evaluate(*files, kind)
    segment(*inputs, store, TILED)
    evaluate(store, truth, kind)


def test_a_store_that_cannot_be_read_is_refused(tmp_path, store, cells):
    truth = as_tiff(tmp_path, "truth", cells.astype(np.uint8))
    (store / "zarr.json").write_text("{")
    with pytest.raises(InputError, match=r"store\.zarr"):
        evaluate(store, truth, "isbi")


def test_a_single_missing_tile_is_refused(tmp_path, store, cells):
    truth = as_tiff(tmp_path, "truth", cells.astype(np.uint8))
    shutil.rmtree(store / LEDGER)
    with Ledger(store / LEDGER, 24) as ledger:
        for tile in range(23):
            ledger.commit(tile)
    with pytest.raises(InputError, match=r"store\.zarr: 1 of 24 tiles are not done"):
        evaluate(store, truth, "isbi")


# Classes of files


def classes(tmp_path, prediction, truth):
    files = (
        as_tiff(tmp_path, name, np.array([row], np.uint8))
        for name, row in (("prediction", prediction), ("truth", truth))
    )
    return evaluate(*files, "classes").scores


NUMBERS = ([0, 1, 1, 0, 1], [0, 1, 0, 0, 1])


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ([0, 1], [0, 1]),
        ([0, 255], [0, 255]),
        ([0, 1], [0, 255]),
        ([0, 255], [0, 1]),
        ([0, 1], [7, 9]),  # numbers against values
        ([7, 9], [7, 9]),
    ],
)
def test_two_classes_by_values_numbers_or_black_and_white(tmp_path, ours, theirs):
    rows = (np.array(values)[row] for values, row in zip((ours, theirs), NUMBERS, strict=True))
    scores = classes(tmp_path, *([row] for row in rows))
    assert scores["accuracy"].value == 4 / 5
    # 0: two right of three; 1: two right of three
    assert scores["iou"].classes == ((0, 2 / 3), (1, 2 / 3))


def test_numbers_of_three_classes_against_values(tmp_path):
    scores = classes(tmp_path, [[0, 1, 2, 2]], [[3, 7, 200, 7]])
    assert scores["iou"].classes == ((0, 1), (1, 1 / 2), (2, 1 / 2))


def test_label_values_take_precedence_over_class_numbers(tmp_path):
    # 1 could be number 1, which is 2; it is the value 1, number 0
    scores = classes(tmp_path, [[1, 1, 2]], [[1, 2, 2]])
    assert scores["accuracy"].value == pytest.approx(2 / 3)
    assert scores["iou"].classes == ((0, 1 / 2), (1, 1 / 2))


@pytest.mark.parametrize(
    "prediction, truth", [([[0, 0, 2]], [[0, 1, 2]]), ([[0, 1, 2]], [[0, 0, 2]])]
)
def test_a_class_missing_in_truth_or_prediction_has_no_overlap(tmp_path, prediction, truth):
    scores = classes(tmp_path, prediction, truth)
    assert scores["iou"].classes == ((0, 1 / 2), (1, 0), (2, 1))
    assert scores["iou"].value == pytest.approx(1 / 2)


def test_a_prediction_of_one_class_is_scored(tmp_path):
    for black_and_white in ([[0, 0, 255]], [[0, 0, 1]]):
        scores = classes(tmp_path, [[0, 0, 0]], black_and_white)
        assert scores["iou"].classes == ((0, 2 / 3), (1, 0))


@pytest.mark.parametrize(
    "prediction, truth, message",
    [
        ([[0, 255]], [[0, 1]], None),  # black and white
        ([[0, 77]], [[0, 1]], r"holds 77, which is no class of"),
        (
            [[5, 77]],
            [[0, 1]],
            r"prediction\.tif: holds 5, which is no class of .*truth\.tif \(0, 1\)",
        ),
        ([[0, 1, 255]], [[0, 1, 1]], r"holds 255, which is no class of"),
        ([list(range(33))], [[0, 1] * 16 + [0]], r"prediction\.tif: holds 33 labels, too many"),
        ([[0, 1] * 16 + [0]], [list(range(33))], r"truth\.tif: holds 33 labels, too many"),
        ([[0, 40, 41]], [[0, 1, 1]], r"holds 40, which is no class of .* \(0, 1\); --as classes"),
    ],
    ids=str,
)
def test_labels_that_are_not_classes_are_refused(tmp_path, prediction, truth, message):
    if message is None:
        assert classes(tmp_path, prediction, truth)["accuracy"].value == 1
        return
    with pytest.raises(InputError, match=message):
        classes(tmp_path, prediction, truth)


def test_probabilities_are_refused_as_classes(tmp_path):
    file = as_tiff(tmp_path, "p", np.zeros((1, 3, 3), np.float32))
    with pytest.raises(InputError, match=r"p\.tif: labels must be integers .* not float32"):
        evaluate(file, file, "classes")


# Errors name files


def test_errors_name_the_file(tmp_path):
    small = as_tiff(tmp_path, "small", np.zeros((2, 3, 4), np.uint8))
    large = as_tiff(tmp_path, "large", np.zeros((2, 3, 5), np.uint8))
    grey = as_tiff(tmp_path, "grey", np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    with pytest.raises(InputError, match=r"small\.tif and .*large\.tif: .* 2 x 3 x 4 and 2"):
        evaluate(small, large, "instances")
    with pytest.raises(InputError, match=r"grey\.tif: slice 0 holds 2; a truth holds 0"):
        evaluate(small, grey, "isbi")
    with pytest.raises(InputError, match=r"nothing\.tif does not exist"):
        evaluate(small, tmp_path / "nothing.tif", "isbi")
    broken = np.full((2, 3, 4), 0.5, np.float32)
    broken[1, 2, 3] = np.nan
    with pytest.raises(InputError, match=r"nan\.tif: voxel \(z, y, x\) = \(1, 2, 3\) is nan"):
        evaluate(as_tiff(tmp_path, "nan", broken), small, "isbi")
    signed = as_tiff(tmp_path, "signed", np.full((2, 3, 4), -2, np.int16))
    with pytest.raises(InputError, match=r"signed\.tif: labels .* not int16 with -2"):
        evaluate(signed, small, "instances")


def test_an_error_counts_slices_in_the_compared_stack(sequence):
    folder, right, *_ = sequence
    for path in folder.iterdir():
        z = int(path.stem[-3:])
        tifffile.imwrite(path, np.where(z == 9, 2.0, 0.5) * np.ones((9, 12), np.float32))
    for path in right.iterdir():
        tifffile.imwrite(path, np.zeros((9, 12), np.uint8))
    with pytest.raises(InputError, match=r"01_RES: voxel \(z, y, x\) = \(1, 0, 0\) is 2\.0"):
        evaluate(folder, right, "isbi")


# JSON and text


def strict(text):
    """Parses standard JSON, which has no NaN."""

    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_every_score_has_a_meaning():
    assert set(MEANINGS) == {*ISBI, *INSTANCES, "accuracy", "iou", "dice"}
    assert all(best in (0, 1) and what for best, what in MEANINGS.values())


def test_membranes_as_json_and_as_text():
    proposal, truth = random_stack(1)
    evaluation = Evaluation("isbi", isbi_scores(proposal, truth), truth.shape)
    values = strict(json.dumps(evaluation.to_json()))
    slices = values.pop("slices")
    assert list(values) == list(ISBI)
    for name, score in evaluation.scores.items():
        assert values[name]["value"] == score.value and values[name]["threshold"] == score.threshold
        assert [tuple(point) for point in values[name]["curve"]] == list(score.curve)
        assert [row[name] for row in slices] == list(score.slices)
    lines = evaluation.table().splitlines()
    for name, score in evaluation.scores.items():
        [line] = [line for line in lines if line.startswith(f"{name} ")]
        assert re.match(rf"{name} +{score.value:.6f}  {score.threshold:.1f}  +[01]  \w", line)
    assert lines[7] == "" and len(lines) == 7 + 1 + 1 + 3
    for z, line in enumerate(lines[9:]):
        numbers = [f"{score.slices[z]:.6f}" for score in evaluation.scores.values()]
        assert line.split() == [str(z), *numbers]
    assert lines[8].split() == ["slice", *ISBI]


def test_classes_as_json_and_as_text():
    evaluation = Evaluation(
        "classes", of_classes(np.array([[0, 0, 1]]), np.array([[0, 1, 1]])), (1, 1, 3)
    )
    assert strict(json.dumps(evaluation.to_json())) == {
        "accuracy": 2 / 3,
        "iou": {"0": 1 / 2, "1": 1 / 2, "mean": 1 / 2},
        "dice": {"0": 2 / 3, "1": 2 / 3, "mean": 2 / 3},
    }
    assert re.search(
        r"^iou +0\.500000 .*\n  class 0 +0\.500000\n  class 1 ", evaluation.table(), re.M
    )


def test_an_undefined_score_is_null_in_json_and_undefined_in_text(tmp_path):
    empty = as_tiff(tmp_path, "empty", np.zeros((2, 3, 4), np.uint8))
    evaluation = evaluate(empty, empty, "isbi", per_slice=True)
    values = strict(json.dumps(evaluation.to_json()))
    for name in ("v_rand", "v_info", "rand_error_foreground"):
        assert values[name]["value"] is None and values[name]["threshold"] is None
        assert {value for _, value in values[name]["curve"]} == {None}
        assert [row[name] for row in values["slices"]] == [None, None]
        assert re.search(rf"^{name} +undefined  +[01]  ", evaluation.table(), re.M)
    assert values["pixel_error"]["value"] == 0
    evaluation = evaluate(empty, empty, "instances")
    assert set(evaluation.to_json().values()) == {None} and "slices" not in evaluation.to_json()
    assert evaluation.table().count("undefined") == 6


def test_a_class_missing_in_a_slice_is_null_in_its_row():
    scores = {"iou": ClassScore(0.5, slices=(0.5, math.nan), classes=((0, 0.5), (1, math.nan)))}
    values = Evaluation("classes", scores, (2, 1, 1)).to_json()
    assert values == {
        "iou": {"0": 0.5, "1": None, "mean": 0.5},
        "slices": [{"iou": 0.5}, {"iou": None}],
    }


def test_a_table_without_slices_ends_with_its_scores():
    table = Evaluation("instances", {"seg": Score(0.5), "ap50": Score(0.25)}, (1, 1, 1)).table()
    head, *rows = table.splitlines()
    assert head.split() == ["score", "at", "best", "meaning"]
    assert [row.split()[:3] for row in rows] == [
        ["seg", "0.500000", "1"],
        ["ap50", "0.250000", "1"],
    ]


@pytest.mark.parametrize(
    ("prediction", "truth", "accuracy"),
    [(0, 255, 0.0), (255, 0, 0.0), (255, 1, 1.0), (1, 255, 1.0), (0, 0, 1.0)],
)
def test_masks_of_one_value_are_compared_as_black_and_white(tmp_path, prediction, truth, accuracy):
    paths = [
        as_tiff(tmp_path, name, np.full((1, 4, 4), value, np.uint8))
        for name, value in (("prediction", prediction), ("truth", truth))
    ]
    assert evaluate(*paths, "classes").scores["accuracy"].value == accuracy
