"""Reports are parsed: their content, what they leave out, and that they load no other file."""

import base64
import dataclasses
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from pyarrow import parquet

from tests.helper import (
    FLOAT32,
    TILED,
    bytes_of,
    noise,
    paths,
    points,
    random_model,
    recipe,
    write_stack,
)
from unet_ray.engine import cluster
from unet_ray.errors import InputError, RunError
from unet_ray.network.checkpoints import read_tensors, write_tensors
from unet_ray.report import page as report
from unet_ray.report import results, store_page, training_page
from unet_ray.report.figures import digits_of, figure
from unet_ray.report.page import write_report
from unet_ray.report.pictures import OKABE_ITO, VIRIDIS, few_greys, overlay, to_grey
from unet_ray.scores.evaluation import Evaluation, evaluate
from unet_ray.scores.metrics import ClassScore, Score
from unet_ray.scores.totals import MEANINGS
from unet_ray.segmentation.segment import segment
from unet_ray.storage.layout import ARRAYS, LEDGER, StoreLayout
from unet_ray.storage.ledger import Ledger
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.stores import Store, create_store
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import Context, TilePlan
from unet_ray.training.train import train

VOID = {"meta", "img", "br", "hr", "link", "input"}
EVIL = "<script>alert(1)<"


class Page(HTMLParser):
    """A page as tags with their attributes, and its text; tags must balance."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.open, self.words = [], [], []
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))
        self.charts = re.findall(r'<svg class="chart".*?</svg>', self.source, re.S)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self, alt=""):
        """Pixels of the pictures whose description begins with `alt`."""
        images = [a for a in self.all("img") if a["alt"].startswith(alt)]
        data = [base64.b64decode(a["src"].removeprefix("data:image/png;base64,")) for a in images]
        return [np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in data]

    def chart(self, title):
        return next(c for c in self.charts if f"<title>{title}</title>" in c)


# A training run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    labels = 255 * np.random.default_rng(0).integers(0, 2, (2, 10, 10), np.uint8)
    labels = labels.repeat(7, 1).repeat(7, 2)
    for name, array in {"image": labels // 4 + 60, "labels": labels}.items():
        tifffile.imwrite(folder / f"{name}.tif", array)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cluster, "usable_cores", lambda: 1)
        files = [str(folder / "image.tif")], [str(folder / "labels.tif")]
        train(*files, folder / "run", recipe(steps=40))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def add_lines(run, lines):
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def measured(step, **more):
    rest = {"learning_rate": 0.1, "seconds": step / 10, "progress": 0.5}
    return {"step": step, "loss": 1 / step, **rest, **more}


def test_a_run_is_reported_in_its_folder(run):
    assert write_report(run) == run / "report.html"
    page = Page(run / "report.html")
    assert [page.text.count(f" Patch {n} ") for n in range(17)] == [1] * 16 + [0]
    assert [len(page.pictures(f"Patch {n}. ")) for n in range(17)] == [3] * 16 + [0]
    assert len(page.all("img")) == 3 * 16 + 1
    assert "Image, labels and weights move together" in page.text
    assert "A U-Net was trained: 40 steps" in page.text
    for words in ("learning rate 0.02", "patch 44 x 48", "w0 10.0", "label value of each class"):
        assert words in page.text
    assert "image.tif" in page.text
    assert "There is no model yet" not in page.text
    assert "Validation" not in page.text


def test_the_loss_curve_has_every_line_of_the_log(run):
    page = Page(write_report(run))
    assert len(points(paths(page.chart("Training loss"), "line")[0])) == 4


def test_patches_are_shown_as_stored(run):
    page = Page(write_report(run))
    image, classes, weights = page.pictures("Patch 0. ")
    assert image.shape == (44, 48, 3)
    assert classes.shape == weights.shape == (28, 32, 3)
    assert {tuple(c) for c in classes.reshape(-1, 3)} == {(0, 0, 0), (230, 159, 0)}
    assert len(np.unique(weights.reshape(-1, 3), axis=0)) >= 2
    assert "Weight of a pixel" in page.text


def keep_patches(run, count, side, inner):
    """Patches of noise; the first class and the first weight of each encode its number."""
    rng, tensors = np.random.default_rng(0), {}
    for n in range(count):
        targets = rng.integers(0, 8, (inner, inner), np.uint8)
        weights = rng.exponential(size=(inner, inner)).astype(np.float32) + 0.1
        targets[0, 0], weights[0, 0] = n % 8, 100 * (n + 1)
        image = rng.normal(size=(1, side, side)).astype(np.float16)
        arrays = {"image": image, "targets": targets, "weights": weights}
        tensors |= {f"{name}.{n}": torch.from_numpy(a) for name, a in arrays.items()}
    write_tensors(run / "patches.safetensors", tensors, {})


def keep_weights(run, **volumes):
    tensors = {name.replace("_", "."): torch.from_numpy(a) for name, a in volumes.items()}
    write_tensors(run / "weights.safetensors", tensors, {})


@pytest.mark.parametrize(
    ("count", "side", "inner", "thinned"), [(1, 84, 44, 84), (3, 84, 44, 84), (16, 572, 388, 286)]
)
def test_any_number_of_patches_gives_a_sheet_of_bounded_size(run, count, side, inner, thinned):
    keep_patches(run, count, side, inner)
    keep_weights(run, weights_0=np.random.default_rng(0).random((1, 900, 900), np.float32))
    page = Page(write_report(run))
    assert len(page.pictures("Patch ")) == 3 * count
    for number in range(count):
        image, classes, weights = page.pictures(f"Patch {number}. ")
        assert image.shape == (thinned, thinned, 3)
        assert (
            classes.shape == weights.shape == (inner * thinned // side, inner * thinned // side, 3)
        )
        np.testing.assert_array_equal(classes[0, 0], OKABE_ITO[number % 8])
    assert ("One pixel in 2 is shown along each axis" in page.text) == (thinned < side)
    assert f"Image, {side} x {side} pixels" in page.source
    assert len(page.source) < 4_000_000


def test_patches_are_in_the_order_of_their_numbers(run):
    keep_patches(run, 11, 84, 44)
    page = Page(write_report(run))
    pixels = [page.pictures(f"Patch {n}. ")[2][0, 0].astype(int) for n in range(11)]
    green = [int(pixel[1]) for pixel in pixels]
    assert green == sorted(green)  # the weight of the first pixel grows with the number


def test_the_frame_of_a_thinned_patch_is_whole(run, monkeypatch):
    whole = Page(write_report(run)).pictures("Patch 0. ")[0]
    monkeypatch.setattr(training_page, "SHEET", 100)
    image, classes, _ = Page(write_report(run)).pictures("Patch 0. ")
    assert (whole.shape, image.shape, classes.shape) == ((44, 48, 3), (22, 24, 3), (14, 16, 3))
    yellow = (image == OKABE_ITO[4]).all(-1)
    assert yellow[2].sum() == yellow[19].sum() == 20
    assert yellow[:, 2].sum() == yellow[:, 21].sum() == 18


def test_any_validation_score_is_drawn(run):
    added = [
        measured(s, validation={"iou": s / 100, "accuracy": 0.9, "energy": 7.0 * s, "odd": None})
        for s in (50, 60, 70)
    ]
    add_lines(run, added)
    page = Page(write_report(run))
    charts = [c for c in page.charts if "<title>Validation" in c]
    assert ["iou" in charts[0], "accuracy" in charts[0], "energy" in charts[1]] == [True] * 3
    assert len(charts) == 2
    assert [len(points(p)) for p in paths(charts[0], "line")] == [3, 3]


def test_a_run_in_progress_is_shown_from_its_newest_checkpoint(run):
    (run / "model.safetensors").unlink()
    text = Page(write_report(run)).text
    assert "Training is under way, or was interrupted" in text
    assert "There is no model yet" in text
    assert "learning rate 0.02" in text


@pytest.mark.parametrize("left", ["metrics.jsonl", "patches.safetensors"])
def test_a_run_that_has_just_begun_shows_its_files(run, left):
    for path in run.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / "checkpoints").mkdir()
    page = Page(write_report(run))
    texts = {
        "metrics.jsonl": ["This run stored no patches", "written with the first checkpoint"],
        "patches.safetensors": ["No step has been logged", "written with the first checkpoint"],
    }
    assert all(words in page.text for words in texts[left])
    assert len(page.all("img")) == (48 if left == "patches.safetensors" else 0)
    assert "Weights of a whole slice" not in page.text


def test_an_incomplete_last_line_is_skipped(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "lo')
    assert "40 steps" in Page(write_report(run)).text


def test_a_long_run_stays_small(run):
    before = write_report(run).stat().st_size
    add_lines(run, [measured(s) for s in range(50, 200_050, 10)])
    page = Page(write_report(run))
    assert len(page.source) < before + 30_000
    assert len(points(paths(page.chart("Training loss"), "line")[0])) <= 200


def test_pixels_without_weight_are_black(run):
    edited(lambda tensors: tensors["weights.0"][:5].fill_(0))(run / "patches.safetensors")
    page = Page(write_report(run))
    assert (page.pictures("Patch 0. ")[2][:5] == 0).all()
    assert page.text.count("black has no weight") == 1  # in the patches


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", None),
        ("step", "x"),
        ("step", True),
        ("seconds", "x"),
        ("seconds", math.inf),
        ("progress", [1]),
        ("loss", math.inf),
        ("loss", math.nan),
        ("loss", "abc"),
        ("loss", None),
    ],
)
def test_lines_of_a_log_without_valid_numbers_are_left_out_and_counted(run, name, value):
    add_lines(run, [{**measured(50), name: value}])
    page = Page(write_report(run))
    assert "1 line of metrics.jsonl is not shown" in page.text
    assert "training diverged" in page.text
    assert "40 steps" in page.text
    assert len(points(paths(page.chart("Training loss"), "line")[0])) == 4


def test_every_malformed_line_is_skipped(run):
    odd = [1, [2], "x", {"seconds": 3}, measured(50, validation=[1, 2])]
    odd += [measured(60, validation={"iou": "high", "dice": math.inf, "seg": True})]
    odd += [measured(70, loss=5e-324), measured(80, seconds=5e-324), measured(90, loss=0)]
    add_lines(run, odd)
    page = Page(write_report(run))
    assert "1 line of metrics.jsonl" in page.text
    assert "Validation" not in page.text
    assert (
        len(points(paths(page.chart("Training loss"), "line")[0])) == 8
    )  # a loss of 0 has no logarithm
    assert "not shown" not in Page(write_report(cleared(run))).text


HOSTILE = [None, 5, "a", [], [5], {"a": 5}, {"recipe": 5}, [None] * 3, [{"shape": 5}]]


@pytest.mark.parametrize("field", ["training", "data", "versions", "class_values", "voxel_size"])
def test_any_header_of_a_model_gives_a_page_or_a_sentence(run, field):
    tensors, header = read_tensors(run / "model.safetensors")
    for value in HOSTILE:
        write_tensors(run / "model.safetensors", tensors, {**header, field: value})
        try:
            Page(write_report(run))
        except InputError as error:
            assert re.fullmatch(rf"{run} cannot be read as a run of unet-ray: .+\.", str(error))


def test_a_log_that_is_a_device_is_refused(run):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read as a log: it is a device"):
        write_report(run)


def cleared(run):
    (run / "metrics.jsonl").write_text("")
    return run


def torn(path):
    path.write_bytes(path.read_bytes()[:-100])


def edited(edit):
    def change(path):
        tensors, header = read_tensors(path)
        edit(tensors)
        write_tensors(path, tensors, header)

    return change


PATCH_DAMAGE = {
    "cut short": torn,
    "text": lambda path: path.write_text("no tensors"),
    "another file": lambda path: shutil.copy(path.with_name("model.safetensors"), path),
    "without classes": edited(lambda tensors: tensors.pop("targets.1")),
    "nan": edited(lambda tensors: tensors["weights.2"].fill_(math.nan)),
    "classes": edited(lambda tensors: tensors.update({"targets.0": tensors["weights.0"] * 1})),
    "many classes": edited(lambda t: t.update({"targets.0": t["targets.0"].long() + 10**9})),
    "shape": edited(lambda tensors: tensors.update({"image.3": tensors["image.3"][:, :9]})),
    "axes": edited(lambda tensors: tensors.update({"image.3": tensors["image.3"][0]})),
    "type": edited(lambda t: t.update({"image.3": t["image.3"].bfloat16()})),
    "empty": edited(lambda t: t.update({"image.3": t["image.3"][:0]})),
}


@pytest.mark.parametrize("damage", PATCH_DAMAGE)
def test_damaged_patches_are_a_note_on_the_page(run, damage):
    PATCH_DAMAGE[damage](run / "patches.safetensors")
    page = Page(write_report(run))
    assert f"The patches cannot be shown. {run / 'patches.safetensors'}" in page.text
    assert page.pictures("Patch ") == []
    assert len(page.pictures("Weights. ")) == 1
    assert "40 steps" in page.text


def test_the_slice_with_the_largest_mean_weight_is_shown(run):
    light, heavy = np.ones((3, 20, 30), np.float32), np.ones((2, 10, 12), np.float32)
    light[1, :, 15] = 30  # larger sum, but smaller mean, than `heavy`
    heavy[1, 5:] = 9
    heavy[1, 0, 0] = 0
    keep_weights(run, weights_0=light, weights_2=heavy / 2, weights_10=heavy)
    page = Page(write_report(run))
    (picture,) = page.pictures("Weights. ")
    assert "Volume 10, slice 1 of the training data, 10 x 12 pixels." in page.text
    assert "thin bright lines where cells touch" in page.text
    assert "equation 2 of Ronneberger" in page.text
    assert picture.shape == (10, 12, 3)
    assert (picture[5:] == VIRIDIS[-1]).all() and (picture[1:5] == VIRIDIS[0]).all()
    assert (picture[0, 0] == 0).all()
    bars = [c for c in page.charts if "<title>Weight of a pixel</title>" in c]
    assert len(bars) == 2 and "Colours from 1 to 9" in bars[1]
    assert page.text.count("black has no weight") == 1  # in the slice


def test_a_thin_line_is_visible_in_a_large_slice(run, monkeypatch):
    monkeypatch.setattr(training_page, "WINDOW", 20)
    slices = np.ones((1, 95, 75), np.float32)
    slices[0, :, 33] = 8
    keep_weights(run, weights_0=slices)
    page = Page(write_report(run))
    (picture,) = page.pictures("Weights. ")
    assert picture.shape == (19, 15, 3)
    assert (picture[:, 6] == VIRIDIS[-1]).all()
    assert (np.delete(picture, 6, 1) == VIRIDIS[0]).all()
    assert "95 x 75 pixels; each pixel shows the greatest weight of 5 x 5." in page.text


def test_names_in_a_file_of_weights_are_text(run):
    tensors = {f"weights.{EVIL}": torch.ones(1, 8, 8)}
    write_tensors(run / "weights.safetensors", tensors, {})
    page = Page(write_report(run))
    assert EVIL not in page.source
    assert f"Volume {EVIL}, slice 0" in page.text


def test_a_run_that_has_only_weights_shows_them(run):
    for path in run.iterdir():
        if path.name != "weights.safetensors":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / "checkpoints").mkdir()
    page = Page(write_report(run))
    assert len(page.all("img")) == len(page.pictures("Weights. Volume 0")) == 1
    assert "This run stored no patches" in page.text


def first(change):
    return edited(lambda tensors: tensors.update({"weights.0": change(tensors["weights.0"])}))


WEIGHT_DAMAGE = {
    "cut short": torn,
    "text": lambda path: path.write_text("no tensors"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "another file": lambda path: shutil.copy(path.with_name("model.safetensors"), path),
    "patches": lambda path: shutil.copy(path.with_name("patches.safetensors"), path),
    "nothing": edited(lambda tensors: tensors.clear()),
    "more": edited(lambda tensors: tensors.update({"image.0": tensors["weights.0"] * 1})),
    "nan": first(lambda w: w.index_fill(0, torch.tensor([1]), math.nan)),
    "infinite": first(lambda w: w.index_fill(0, torch.tensor([0]), math.inf)),
    "negative": first(lambda w: -w),
    "axes": first(lambda w: w[0]),
    "empty": first(lambda w: w[:, :0]),
    "double": first(lambda w: w.double()),
    "integers": first(lambda w: w.int()),
    "type": first(lambda w: w.bfloat16()),
}


@pytest.mark.parametrize("damage", WEIGHT_DAMAGE)
def test_damaged_weights_are_a_note_on_the_page(run, damage):
    path = run / "weights.safetensors"
    WEIGHT_DAMAGE[damage](path)
    page = Page(write_report(run))
    assert f"The weights of a whole slice cannot be shown. {path}" in page.text
    assert page.pictures("Weights. ") == []
    assert len(page.pictures("Patch ")) == 48
    assert "thin bright lines" not in page.text


def test_long_provenance_is_cut(run, monkeypatch):
    monkeypatch.setattr(report, "LONGEST_JSON", 300)
    page = Page(write_report(run))
    assert len(re.search(r"<pre>(.*)</pre>", page.source, re.S)[1]) < 3000
    assert "Cut here; the complete text is in the header of the model" in page.text
    monkeypatch.undo()
    assert "Cut here" not in Page(write_report(run)).text


def test_the_key_states_that_colours_repeat(run):
    assert "seven colours" not in Page(write_report(run)).text
    edited(lambda tensors: tensors["targets.0"].fill_(8))(run / "patches.safetensors")
    assert "seven colours besides black: class 8 looks like" in Page(write_report(run)).text


@pytest.mark.parametrize(
    ("value", "text"),
    [(math.nan, "undefined"), (math.inf, "infinite"), (0.5, "0.500"), (1234, "1\u202f234")],
)
def test_any_number_can_be_written(value, text):
    assert digits_of(value) == text


@pytest.mark.parametrize(
    ("shape", "zoom"), [((5, 640), 7), ((640, 5), 7), ((5, 9), 0), ((640, 640), 0), ((80, 640), 0)]
)
def test_strips_are_zoomed_in(shape, zoom):
    assert figure(np.zeros(shape, np.uint8), "")["zoom"] == zoom


# A segmentation


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    """A volume, its truth and its store, of 3 x 2 x 4 tiles."""
    folder = tmp_path_factory.mktemp("segmented")
    image = noise((3, 61, 75))
    write_stack(folder / "volume.tif", image)
    write_stack(folder / "truth.tif", np.where(image > 110, 255, 0).astype(np.uint8))
    model = random_model(folder / "model.safetensors")
    segment(folder / "volume.tif", model, folder / "out.zarr", TILED)
    return folder


@pytest.fixture
def folder(segmented, tmp_path):
    """A copy of `segmented`, whose event log names the copy of the volume."""
    copy = shutil.copytree(segmented, tmp_path / "work")
    edit_events(copy / "out.zarr", lambda e: e.update(input=str(copy / "volume.tif")))
    return copy


def edit_events(store, edit):
    path = store / ".unet_ray" / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        if event["event"] == "start":
            edit(event)
    write_events(store, events)


def write_events(store, events):
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (store / ".unet_ray" / "events.jsonl").write_text(lines)


@pytest.fixture
def scored(monkeypatch):
    """Replaces evaluate, which has its own tests; returns the list of its calls."""
    calls = []
    curve = ((0.0, 0.5), (0.1, 0.03), (0.2, math.nan))
    isbi = {"pixel_error": Score(0.03, 0.1, curve), "v_info": Score(math.nan, None, curve)}
    classes = {"iou": ClassScore(0.625, classes=((0, 0.25), (1, 1.0)))}

    def fake(prediction, truth, kind):
        calls.append((str(prediction), str(truth), kind))
        return Evaluation(kind, isbi if kind == "isbi" else classes, (3, 61, 75))

    monkeypatch.setattr(store_page, "evaluate", fake)
    return calls


def test_the_report_of_a_store_is_beside_it_and_the_store_is_unchanged(folder):
    store = folder / "out.zarr"
    before, log = bytes_of(store), (store / ".unet_ray" / "events.jsonl").read_bytes()
    assert write_report(f"{store}/") == folder / "out.report.html"
    assert bytes_of(store) == before
    assert (store / ".unet_ray" / "events.jsonl").read_bytes() == log
    page = Page(folder / "out.report.html")
    for words in ("24 of 24", "Slice z = 0", "Slice z = 2", "core 1 x 32 x 20", "volume.tif"):
        assert words in page.text
    assert len(page.all("img")) == 3 * 4
    assert "Scores" not in page.text


@pytest.mark.parametrize(
    ("name", "page"),
    [("v1.5", "v1.5"), ("v1.6.ZARR", "v1.6"), ("a.b.zarr", "a.b"), ("zarr", "zarr")],
)
def test_each_store_has_its_own_page(folder, name, page):
    store = (folder / "out.zarr").rename(folder / name)
    assert write_report(store) == folder / f"{page}.report.html"


def test_a_narrow_volume_is_enlarged(segmented, tmp_path):
    write_stack(tmp_path / "strip.tif", noise((1, 5, 900)))
    model = segmented / "model.safetensors"
    store = segment(tmp_path / "strip.tif", model, tmp_path / "out.zarr", FLOAT32)
    page = Page(write_report(store))
    assert all(a["style"] == "width:4480px" and a["class"] == "small" for a in page.all("img"))


def test_scores_come_before_the_slices(folder, scored):
    text = Page(write_report(folder / "out.zarr", folder / "truth.tif")).text
    assert text.index("Tiles done") < text.index("Scores against") < text.index("Slice z = 0")


def test_every_score_is_explained_in_its_row(folder, monkeypatch):
    everything = {name: Score(0.5) for name in MEANINGS}
    monkeypatch.setattr(
        store_page, "evaluate", lambda *a: Evaluation(a[2], everything, (3, 61, 75))
    )
    text = Page(write_report(folder / "out.zarr", folder / "truth.tif")).text.casefold()
    for best, meaning in MEANINGS.values():
        better = "higher is better; 1 is best." if best else "lower is better; 0 is best."
        assert re.search(re.escape(f"{meaning}. ".casefold()) + f".{{0,60}}{better}", text)


def test_the_first_class_is_background_whatever_its_label():
    np.testing.assert_array_equal(store_page._objects_of(np.array([[7, 9]]), [7, 9]), [[0, 9]])
    np.testing.assert_array_equal(store_page._objects_of(np.array([[7, 3]]), [7, 9]), [[7, 3]])


def test_probabilities_that_sum_to_more_than_one_leave_none(folder, monkeypatch):
    result = results.open_result(folder / "out.zarr")
    stored = np.array([200, 100], np.uint8).reshape(2, 1, 1, 1)
    monkeypatch.setattr(results.Result, "read", lambda *_: stored)
    every = result.probabilities(Box((0, 0, 0), (1, 1, 1)))
    assert every.ravel().tolist() == [0, 200, 100]


def test_a_page_has_few_histograms(segmented, tmp_path):
    model = random_model(tmp_path / "model.safetensors", values=tuple(range(9)))
    page = Page(
        write_report(segment(segmented / "volume.tif", model, tmp_path / "o.zarr", FLOAT32))
    )
    assert len([c for c in page.charts if re.search("<title>class [0-9]</title>", c)]) == 6
    assert "The other classes are not shown." in page.text
    assert "class 8 looks like class 1" in page.text


def test_the_page_has_objects_and_their_seams(folder, tmp_path):
    assert "Seams" not in Page(write_report(folder / "out.zarr")).text
    settings = dataclasses.replace(TILED, outputs=("classes", "instances"))
    model = random_model(tmp_path / "model.safetensors")
    store = segment(folder / "volume.tif", model, tmp_path / "objects.zarr", settings)
    table = parquet.read_table(store / "objects.parquet").to_pydict()
    page = Page(write_report(store))
    assert re.search(r"standard error \d\.\d\d ± \d\.\d\d \(y .*\); no seams detected: ", page.text)
    objects, border = len(table["id"]), sum(table["border"])
    assert f"{objects:,} objects; {border} of them touch the border" in page.text
    largest = sorted(zip(table["voxels"], table["id"], strict=True), key=lambda o: (-o[0], o[1]))
    rows = re.findall(r"(\d+) (\d+) unknown [\d., ]+ (?:yes|no)", page.text)
    assert rows == [(str(number), str(voxels)) for voxels, number in largest[:10]]
    assert sum("<title>Sizes of objects, 1 to " in chart for chart in page.charts) == 1


def test_the_overlay_is_that_of_the_stored_classes(folder, scored):
    page = Page(write_report(folder / "out.zarr", folder / "truth.tif"))
    classes = Store(folder / "out.zarr", ["classes"]).read("classes")[1]
    truth = tifffile.imread(folder / "truth.tif")[1]
    image = to_grey(tifffile.imread(folder / "volume.tif")[1])
    shown, prediction, probability, parts = page.pictures()[4:8]  # the second of three slices
    np.testing.assert_array_equal(shown, np.stack([image] * 3, -1))
    np.testing.assert_array_equal(
        prediction, overlay(few_greys(image, 64), classes == 1, truth == 255)
    )
    np.testing.assert_array_equal(parts.any(-1), classes == 1)
    assert probability.shape == (61, 75, 3)


def test_scores_are_shown_with_their_meaning(folder, scored):
    store = folder / "out.zarr"
    page = Page(write_report(store, folder / "truth.tif"))
    truth = str(folder / "truth.tif")
    assert scored == [(str(store), truth, "isbi"), (str(store), truth, "classes")]
    assert f"0.0300 0.1 {MEANINGS['pixel_error'][1]}. Moving a border" in page.text
    assert "Lower is better; 0 is best." in page.text
    assert "V_info undefined \N{EN DASH}" in page.text
    assert "class 0 0.250" in page.text
    curve = page.chart("pixel error")
    assert "best 0.0300 at 0.1" in curve
    assert len(points(paths(curve, "line")[0])) == 2


def test_real_scores_are_those_of_evaluate(folder):
    store, truth = folder / "out.zarr", folder / "truth.tif"
    page = Page(write_report(store, truth))
    scores = evaluate(store, truth, "classes").scores
    assert f"Accuracy {scores['accuracy'].value:#.3g}" in page.text
    assert page.text.count("is best.") == 9


def test_a_refused_score_is_explained_on_the_page(folder, monkeypatch):
    def refuse(*_):
        raise InputError("truth.tif: holds <3> values.")

    monkeypatch.setattr(store_page, "evaluate", refuse)
    text = Page(write_report(folder / "out.zarr", folder / "truth.tif")).text
    assert text.count("Not scored. truth.tif: holds <3> values.") == 1


@pytest.mark.parametrize("lost", ["gone", "another shape", "other voxels", "no log"])
def test_slices_are_shown_without_the_image(folder, lost):
    volume = folder / "volume.tif"
    if lost == "gone":
        volume.unlink()
    elif lost == "no log":
        write_events(folder / "out.zarr", [])
    else:
        write_stack(volume, noise((3, 61, 74 if lost == "another shape" else 75), seed=5))
    page = Page(write_report(folder / "out.zarr"))
    assert len(page.all("img")) == 3 * 3
    assert "shown without the image" in page.text
    words = {"gone": "does not exist", "no log": "does not name", "another shape": "another shape"}
    assert words.get(lost, "have changed since") in page.text
    if lost == "no log":
        assert "times are unknown" in page.text


def test_an_unfinished_store_is_reported_as_unfinished(segmented, tmp_path):
    region = dataclasses.replace(TILED, region=Box((1, 0, 0), (2, 32, 40)))
    model, volume = segmented / "model.safetensors", segmented / "volume.tif"
    store = segment(volume, model, tmp_path / "part.zarr", region)
    page = Page(write_report(store, segmented / "truth.tif"))
    assert "2 of 24" in page.text
    assert "22 of 24 tiles are not done" in page.text
    assert "Slice z = 1" in page.text
    assert "Slice z = 0" not in page.text
    picture = page.pictures("Prediction")[0]
    assert {tuple(c) for c in picture[32:].reshape(-1, 3)} == {(230,) * 3, (120,) * 3}
    assert not (picture[:32, :40] == 230).all(-1).any()
    assert page.text.count("Not scored.") == 1
    assert "done: 2 of 8." in "".join(page.charts)


def test_a_window_is_on_finished_tiles(segmented, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "WINDOW", 24)
    region = dataclasses.replace(TILED, region=Box((0, 32, 0), (3, 61, 40)))
    model, volume = segmented / "model.safetensors", segmented / "volume.tif"
    store = segment(volume, model, tmp_path / "part.zarr", region)
    page = Page(write_report(store))
    # Two tiles, y 32 to 61 and x 0 to 40; the nearer to the middle of the slice is the second.
    assert "(1:2,36:60,16:40)" in page.text
    grey = to_grey(tifffile.imread(volume)[1][36:60, 16:40])
    np.testing.assert_array_equal(page.pictures("Image")[1][..., 0], grey)
    assert not any((picture == 230).all(-1).any() for picture in page.pictures("Prediction"))


def test_a_store_without_a_tile_is_reported_as_empty(segmented, tmp_path):
    parts = json.loads((segmented / "out.zarr" / "zarr.json").read_text())["attributes"]["unet_ray"]
    layout = StoreLayout(TilePlan.from_json(parts["plan"]), (0, 255), parts["outputs"], None)
    create_store(tmp_path / "new.zarr", layout, Provenance(parts))
    page = Page(write_report(tmp_path / "new.zarr"))
    assert "No tile is done yet" in page.text
    assert page.all("img") == []


def test_times_of_all_starts_are_summed(folder):
    start = {"event": "start", "input": "x", "engine": "ray", "workers": 3, "missing": 24}
    events = [
        {"time": 100, **start},
        {"time": 104, "event": "tile", "tile": 0, "seconds": 4.0},
        {"time": 106, "event": "tile", "tile": 1, "seconds": 2.0},
        {"time": 9000, **start},
        {"time": 9004, "event": "tile", "tile": 2, "seconds": 3.0},
        {"time": 9005, "event": "failed", "tile": 3, "error": "full <disk>"},
    ]
    write_events(folder / "out.zarr", events)
    page = Page(write_report(folder / "out.zarr"))
    # Tiles 0 to 2 are 32 x 20 voxels each; 6 s, then 5 s.
    assert f"Throughput {3 * 32 * 20 / 11e6:#.3g} Mvoxel/s" in page.text
    assert "Working time 11 s" in page.text
    assert "median 3.00, minimum 2.00, maximum 4.00" in page.text
    assert "2, the last on engine ray with 3 workers" in page.text
    assert "Tiles failed 1 time; last error: full <disk>" in page.text
    assert "1970-01-01 00:01 UTC to 1970-01-01 02:30 UTC" in page.text


def test_a_quarantined_tile_is_shown_with_its_box_and_first_traceback(folder):
    failure = {"event": "failed", "tile": 3, "box": "0:1,0:32,60:75"}
    events = [
        {"time": 1, **failure, "error": "poison <b>", "trace": "Traceback:\n  <i>line 7</i>"},
        {"time": 2, **failure, "error": "later", "trace": "a second one"},
    ]
    write_events(folder / "out.zarr", events)
    with Ledger(folder / "out.zarr" / LEDGER, 24) as ledger:
        ledger.quarantine(3)  # committed before, so it is not quarantined
    assert "quarantined" not in Page(write_report(folder / "out.zarr")).text
    shutil.rmtree(folder / "out.zarr" / LEDGER)
    with Ledger(folder / "out.zarr" / LEDGER, 24) as ledger:
        for tile in range(24):
            (ledger.quarantine if tile in (3, 4) else ledger.commit)(tile)
    page = Page(write_report(folder / "out.zarr"))
    assert "2 tiles are quarantined" in page.text
    assert "Tile 3 (0:1,0:32,60:75): poison <b>" in page.text
    assert "<i>line 7</i>" in page.text and "a second one" not in page.text
    assert "Tile 4 (box unknown): no error in the log" in page.text


def test_a_clock_set_back_adds_no_time(folder):
    path, plan = folder / "events.jsonl", results.open_result(folder / "out.zarr").plan
    events = [{"time": t, "event": "tile", "tile": 0, "seconds": 1} for t in (104, 90, 95)]
    start = {"time": 100, "event": "start", "input": "x"}
    path.write_text("".join(json.dumps(event) + "\n" for event in [start, *events]))
    assert results.read_log(path, plan).working == 9


ODD_EVENTS = [
    {"event": "tile", "tile": -1, "seconds": 1},
    {"event": "tile", "tile": True, "seconds": 1},
    {"event": "tile", "tile": 24, "seconds": 1},
    {"event": "tile", "tile": "0", "seconds": 1},
    *({"event": "tile", "tile": 0, "time": t} for t in (math.nan, math.inf, 1e18, "1", -1, [])),
]


@pytest.mark.parametrize("event", ODD_EVENTS, ids=str)
def test_tiles_outside_the_plan_are_not_counted(folder, event):
    path, plan = folder / "events.jsonl", results.open_result(folder / "out.zarr").plan
    path.write_text(json.dumps({"time": 5, **event}) + "\n")
    log = results.read_log(path, plan)
    assert log.voxels == 0
    assert log.sorted_seconds.size == 0


@pytest.mark.parametrize("seconds", ["abc", [1], None, math.inf, math.nan, -1, True, 1e300])
def test_a_tile_of_unknown_time_is_grey_on_the_map(folder, seconds):
    write_events(folder / "out.zarr", [{"time": 5, "event": "tile", "tile": 1, "seconds": seconds}])
    page = Page(write_report(folder / "out.zarr"))
    assert "Time of a tile" not in page.text
    assert page.text.count("24 of 24") == 1


@pytest.mark.parametrize("place", [None, 5, True, {}, "a\0b", "a" * 9999, "\ud800", "", "."])
def test_a_log_that_names_no_image_is_a_note_on_the_page(folder, place):
    start = {"time": 5, "event": "start", "engine": {"a": 1}, "workers": [2]}
    start |= {} if place is None else {"input": place}
    failed = {"time": 6, "event": "failed", "error": "x" * 10**6}
    write_events(folder / "out.zarr", [start, failed])
    page = Page(write_report(folder / "out.zarr"))
    assert "shown without the image" in page.text
    assert "Tiles failed 1 time" in page.text
    assert len(page.source) < 500_000


def test_the_histogram_counts_stored_probabilities(folder):
    chart = Page(write_report(folder / "out.zarr")).chart("class 1")
    stored = Store(folder / "out.zarr", ["probabilities"]).read("probabilities")[0]
    counts = np.bincount(np.asarray(stored).ravel() // 8, minlength=32)
    bars = re.findall(r"V([\d.]+)H", paths(chart, "bars")[0])
    heights = 180 - np.array(bars, float)
    np.testing.assert_allclose(heights / heights.sum(), counts / counts.sum(), atol=0.002)


@pytest.mark.parametrize("output", ["probabilities", "classes"])
def test_a_store_of_one_output_is_reported(folder, scored, output):
    settings = dataclasses.replace(FLOAT32, outputs=(output,))
    model, volume = folder / "model.safetensors", folder / "volume.tif"
    store = segment(volume, model, folder / "one.zarr", settings)
    page = Page(write_report(store, folder / "truth.tif"))
    assert [kind for *_, kind in scored] == [{"probabilities": "isbi"}.get(output, "classes")]
    assert len(page.pictures("Probability")) == (3 if output == "probabilities" else 0)
    whole = Page(write_report(folder / "out.zarr", folder / "truth.tif"))
    for one, other in zip(page.pictures("Prediction"), whole.pictures("Prediction"), strict=True):
        assert (one == other).all(-1).mean() > 0.98  # 127.5 of 255 is either class


def test_several_classes_have_a_key_and_one_histogram_each(segmented, tmp_path):
    model = random_model(tmp_path / "model.safetensors", values=(0, 7, 9))
    store = segment(segmented / "volume.tif", model, tmp_path / "out.zarr", FLOAT32)
    page = Page(write_report(store))
    assert "class 1 (label 7)" in page.text
    assert "every class but class 0" in page.text
    assert page.chart("class 2")
    assert len(page.pictures("Classes")) == 3


def test_a_damaged_file_is_named(folder):
    for path in (folder / "out.zarr" / ARRAYS["classes"] / "c").rglob("*"):
        if path.is_file():
            data = bytearray(path.read_bytes())
            data[: len(data) // 2] = bytes(len(data) // 2)
            path.write_bytes(data)
    with pytest.raises(
        RunError,
        match=r"labels/classes/0/c/0/0/0: classes .* cannot be read .* or missing: repair",
    ):
        write_report(folder / "out.zarr")
    assert not (folder / "out.report.html").exists()


@pytest.mark.parametrize(
    "field", ["model", "input", "normalisation", "versions", "precision", "instructions"]
)
def test_any_provenance_of_a_store_gives_a_page_or_a_sentence(folder, field):
    root = folder / "out.zarr/zarr.json"
    intact = json.loads(root.read_text())
    for value in HOSTILE:
        changed = json.loads(json.dumps(intact))
        changed["attributes"]["unet_ray"][field] = value
        root.write_text(json.dumps(changed))
        try:
            Page(write_report(folder / "out.zarr"))
        except InputError as error:
            assert re.fullmatch(r".*out\.zarr[ :][^\n]+\.", str(error))


def test_a_missing_shard_is_named_and_not_drawn_as_background(folder):
    gone = folder / "out.zarr" / ARRAYS["classes"] / "c/0/0/0"
    gone.unlink()
    with pytest.raises(RunError, match=rf"{gone}: is missing, though tile 0 was finished"):
        write_report(folder / "out.zarr")


# Limits and safety


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A store of 83 Gvoxel with every third tile committed, but no shard on disk."""
    core = (16, 960, 960)
    plan = TilePlan(
        (960, 9300, 9300), core, Context((0, 4, 4), (0, 8, 8), (1, 2, 2)), (1, 960, 960)
    )
    parts = {
        "format": 1,
        "model": {"sha256": "0" * 64, "architecture": {}, "training": {}, "class_values": [0, 255]},
        "input": {
            **{"name": "big", "kind": "zarr", "shape": [1, *plan.shape], "dtype": "uint8"},
            **{"sampled_sha256": "0" * 64, "channel": None, "time": 0, "level": 0},
        },
        "outputs": ["probabilities", "classes"],
        "plan": dataclasses.asdict(plan),
        "normalisation": {"mean": [1.0], "sd": [1.0]},
        "versions": {},
    }
    path = tmp_path / "large.zarr"
    create_store(path, StoreLayout(plan, (0, 255), parts["outputs"], None), Provenance(parts))
    monkeypatch.setattr("os.fsync", lambda file: None)
    with Ledger(path / LEDGER, len(plan)) as ledger:
        for tile in range(0, len(plan), 3):
            ledger.commit(tile)
    times = [{"time": t, "event": "tile", "tile": 3 * t, "seconds": t % 7} for t in range(2000)]
    write_events(path, times)
    return path


def test_only_small_parts_of_a_large_store_are_read(large, monkeypatch):
    boxes, read = [], results.Result.read
    monkeypatch.setattr(Store, "require", lambda *_: None)  # there are no shards

    def counted(result, output, box):
        boxes.append(box)
        return read(result, output, box)

    monkeypatch.setattr(results.Result, "read", counted)
    page = Page(write_report(large))
    assert 60 < len(boxes) <= 5 * 2 + 64
    assert sum(box.size for box in boxes) < 200e6
    assert len(page.source) < 5e6
    assert "2000 of 6000" in page.text
    chunks = {box for box in boxes if box.shape[0] > 1}
    assert len(chunks) == len(boxes) - 10
    assert (
        len({tuple(a % n for a, n in zip(b.start, (16, 960, 960), strict=True)) for b in chunks})
        > 9
    )
    slices = sorted({box.start[0] for box in boxes if box.shape[0] == 1})
    assert len(slices) == 5
    np.testing.assert_allclose(np.diff(slices), 960 / 5, atol=16)
    assert "a part of each" in page.text
    assert f"{len(boxes) - 10} random storage chunks" in page.text
    assert len([c for c in page.charts if "Cells that are done" in c]) == 4
    for picture in page.pictures():
        assert max(picture.shape) <= 640
        assert not (picture == 230).all(-1).all()  # a part of it is done


@pytest.mark.parametrize("kind", ["run", "store"])
def test_nothing_is_loaded_from_elsewhere(run, folder, scored, kind):
    path = (
        write_report(run)
        if kind == "run"
        else write_report(folder / "out.zarr", folder / "truth.tif")
    )
    page = Page(path)
    policy = next(a for a in page.all("meta") if "http-equiv" in a)
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    source = re.sub(r'xmlns="http://www.w3.org/2000/svg"|base64,[^"]*', "", page.source)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|javascript:", source)
    for _, attributes in page.tags:
        assert not {"href", "srcset", "action", "background"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/png;").startswith("data:image/png;")
    assert all(a.get("alt") for a in page.all("img"))
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"


def test_names_from_files_are_harmless(segmented, tmp_path, run, scored):
    name = f"{EVIL}.tif"
    shutil.copy(segmented / "volume.tif", tmp_path / name)
    shutil.copy(segmented / "truth.tif", tmp_path / f"truth{name}")
    model = segmented / "model.safetensors"
    store = segment(tmp_path / name, model, tmp_path / f"{EVIL}.zarr", FLOAT32)
    (tmp_path / name).unlink()
    add_lines(run, [measured(50, validation={EVIL: 0.5})])
    for path in (write_report(store, tmp_path / f"truth{name}"), write_report(run)):
        page = Page(path)
        assert EVIL in page.text
        assert "<script" not in page.source
        assert not page.all("script")


def test_a_path_that_is_neither_run_nor_store_is_refused(run, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file.zarr").write_text("x")
    for path, words in {
        "nowhere": "does not exist",
        "empty": "neither a training run nor an output",
        "file.zarr": "neither a training run nor an output",
        "begun": "training has written nothing yet",
    }.items():
        with pytest.raises(InputError, match=words):
            write_report(tmp_path / path)
    with pytest.raises(InputError, match="is a training run, but --truth needs"):
        write_report(run, folder / "truth.tif")
    assert not list(tmp_path.rglob("*report.html"))


@pytest.mark.parametrize("shape", [(3, 61, 74), (2, 3, 61, 75), (2, 61, 75)])
def test_a_truth_of_another_shape_is_refused(folder, shape):
    write_stack(folder / "truth.tif", np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match=r"1 x 3 x 61 x 75|--time"):
        write_report(folder / "out.zarr", folder / "truth.tif")
    with pytest.raises(InputError, match="does not exist"):
        write_report(folder / "out.zarr", folder / "nothing.tif")
    assert not (folder / "out.report.html").exists()
