"""The Python API: the same results as the command line, for arrays and files."""

import copy
import inspect
import os
import sys
from importlib.resources import files

import numpy as np
import pytest
import tifffile
import zarr

import unet_ray
from tests.helper import noise, random_model
from unet_ray.api import settings_of
from unet_ray.errors import InputError, RunError
from unet_ray.segmentation.settings import Settings
from unet_ray.tiling.boxes import Box

TINY = {"steps": 3, "depth": 1, "base_channels": 2, "patch": (28, 28)}


def stored(folder, array):
    """The path of a file that holds the array."""
    if array.ndim == 4:
        chunks = (array.shape[0], 1, min(64, array.shape[2]), array.shape[3])
        zarr.create_array(folder / "image.zarr", data=array, chunks=chunks)
        return folder / "image.zarr"
    tifffile.imwrite(folder / "image.tif", array, photometric="minisblack")
    return folder / "image.tif"


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((70, 90), "uint8"),
        ((5, 7), "uint16"),  # smaller than the halo
        ((3, 70, 90), "uint16"),
        ((9, 40, 33), "float32"),
        ((2, 3, 70, 90), "uint8"),
        ((3, 2, 6, 8), "float32"),
    ],
)
@pytest.mark.parametrize("tile", [None, (1, 32, 32)])
def test_predict_gives_the_bytes_that_segment_stores(tmp_path, shape, dtype, tile):
    array = noise(shape, dtype) if dtype != "float32" else noise(shape).astype(dtype) / 7
    channels = shape[0] if len(shape) == 4 else 1
    model = unet_ray.load(
        random_model(tmp_path / "model.safetensors", (0, 3, 9), in_channels=channels)
    )
    chosen = {"tile": tile, "precision": "float32", "progress": False}
    store = unet_ray.segment(stored(tmp_path, array), model, tmp_path / "out.zarr", **chosen)
    found = model.predict(array, dtype="uint8", **chosen)
    assert found.plan == store._result.plan
    axes = shape[-3:] if len(shape) > 2 else (1, *shape)
    np.testing.assert_array_equal(
        found.probabilities.reshape(2, *axes), np.asarray(store.probabilities[:])
    )
    np.testing.assert_array_equal(found.classes.reshape(axes), np.asarray(store.classes[:]))
    spatial = shape[-3:] if len(shape) != 2 else shape
    assert found.probabilities.shape == (2, *spatial) and found.classes.shape == spatial
    assert found.class_values == (0, 3, 9)


def test_float_probabilities_are_the_stored_ones_over_255(tmp_path):
    model = unet_ray.load(random_model(tmp_path / "model.safetensors"))
    array = noise((50, 60))
    whole, part = (model.predict(array, dtype=d, progress=False) for d in ("uint8", "float32"))
    assert part.probabilities.dtype == np.float32
    np.testing.assert_array_equal(np.rint(part.probabilities * 255), whole.probabilities)
    with pytest.raises(InputError, match="dtype='float64' must be"):
        model.predict(array, dtype="float64")


def test_what_does_not_fit_the_model_is_refused(tmp_path):
    model = unet_ray.load(random_model(tmp_path / "model.safetensors", in_channels=2))
    with pytest.raises(InputError, match=r"array: has 1 channels, but .* was trained on 2"):
        model.predict(noise((40, 40)), progress=False)
    with pytest.raises(InputError, match="has 1 axes"):
        model.predict(np.zeros(40), progress=False)
    one = unet_ray.load(random_model(tmp_path / "one.safetensors"))
    image = noise((40, 40)).astype(np.float32)
    image[3, 4] = np.nan
    with pytest.raises(RunError, match=r"voxel \(z, y, x\) = \(0, 3, 4\) of channel 0 is nan"):
        one.predict(image, progress=False)
    assert one.predict(image, nan="zero", progress=False).classes.shape == (40, 40)


@pytest.fixture
def pair():
    """An image and its labels, three slices of two classes."""
    labels = (noise((3, 12, 12), seed=1) > 128).repeat(6, 1).repeat(6, 2).astype(np.uint8)
    return labels * 90 + noise(labels.shape) // 4, labels


def test_arrays_train_the_same_weights_as_files(tmp_path, pair):
    paths = [tmp_path / "image.tif", tmp_path / "labels.tif"]
    for path, array in zip(paths, pair, strict=True):
        tifffile.imwrite(path, array, photometric="minisblack")
    one = unet_ray.train(*pair, tmp_path / "arrays", **TINY, progress=False)
    other = unet_ray.train(*map(str, paths), tmp_path / "files", **TINY, progress=False)
    weights, expected = (unet_ray.read_model(m)[0].state_dict() for m in (one, tmp_path / "files"))
    assert all((weights[name] == expected[name]).all() for name in expected)
    assert (tmp_path / "arrays" / "report.html").exists()
    assert "classes 0, 1" in repr(other) and repr(other).startswith("<Model ")
    again = unet_ray.train(*pair, tmp_path / "arrays", **TINY, progress=False)
    assert again.path == one.path
    with pytest.raises(InputError, match="steps=1 is too few"):
        unet_ray.train(*pair, tmp_path / "arrays", **{**TINY, "steps": 1}, progress=False)
    more = unet_ray.train(*pair, tmp_path / "arrays", **{**TINY, "steps": 4}, progress=False)
    assert more.header.training["steps"] == 4


def test_labels_that_number_cells_need_a_word(tmp_path, pair):
    labels = np.zeros((1, 72, 72), np.uint8)
    for number in range(1, 10):
        y, x = divmod(number - 1, 3)
        labels[0, 24 * y + 4 : 24 * y + 20, 24 * x + 4 : 24 * x + 20] = number
    image = labels * 9 + noise(labels.shape) // 8
    with pytest.raises(InputError, match="look like cell numbers; set --labels-are instances"):
        unet_ray.train(image, labels, tmp_path / "run", **TINY, progress=False)
    for kind in ("instances", "classes"):
        out = tmp_path / kind
        unet_ray.train(image, labels, out, labels_are=kind, **TINY, progress=False)
    with pytest.raises(InputError, match="exchange images and labels"):
        unet_ray.train(labels, image, tmp_path / "run", **TINY, progress=False)


def test_a_store_prints_with_a_picture_and_is_a_path(tmp_path):
    model = random_model(tmp_path / "model.safetensors")
    source = stored(tmp_path, noise((3, 70, 90)))
    store = unet_ray.segment(source, model, tmp_path / "out.zarr", progress=False)
    assert os.fspath(store) == str(store) == str(tmp_path / "out.zarr")
    assert "probabilities and classes of 3 x 70 x 90 voxels" in repr(store)
    assert "<img src='data:image/png;base64," in store._repr_html_()
    assert store.provenance["input"]["name"] == "image.tif"
    assert unet_ray.open_store(store).done == store.done
    assert unet_ray.verify(store, tiles=0).sound
    assert unet_ray.report(store) == tmp_path / "out.report.html"
    only = unet_ray.segment(source, model, tmp_path / "c.zarr", outputs="classes", progress=False)
    assert "<img" in only._repr_html_()
    with pytest.raises(InputError, match="has no probabilities, only classes"):
        only.probabilities  # noqa: B018


def test_scores_of_arrays_are_those_of_files(tmp_path, pair):
    _, labels = pair
    prediction = labels.copy()
    prediction[:, :20] = 0
    tifffile.imwrite(tmp_path / "p.tif", prediction, photometric="minisblack")
    tifffile.imwrite(tmp_path / "t.tif", labels, photometric="minisblack")
    arrays = unet_ray.evaluate(prediction, labels, "classes", progress=False)
    stored_ones = unet_ray.evaluate(
        tmp_path / "p.tif", tmp_path / "t.tif", "classes", progress=False
    )
    assert arrays.to_json() == stored_ones.to_json()
    assert repr(arrays) == arrays.table()


def test_flags_are_values_or_texts():
    texts = settings_of(
        region="0:2,0:64,10:20",
        tile="1,32,32",
        memory="2GiB",
        outputs="classes",
        precision="auto",
        engine="local",
    )
    values = settings_of(
        region=np.s_[0:2, 0:64, 10:20],
        tile=[1, 32, 32],
        memory=2 << 30,
        outputs=["classes"],
        engine="local",
    )
    assert texts == values
    assert texts.region == Box((0, 0, 10), (2, 64, 20))
    with pytest.raises(InputError, match="must be three slices"):
        settings_of(region=(1, 2, 3))
    with pytest.raises(InputError, match="workers=0"):
        settings_of(workers=0)


def test_a_misspelt_keyword_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"segment\(\) has no keyword 'memry' \(did you mean 'mem"):
        unet_ray.segment("a.tif", "run", "out.zarr", memry=3)
    with pytest.raises(TypeError, match="train"):
        unet_ray.train("a.tif", "b.tif", tmp_path, minuts=3)
    with pytest.raises(InputError, match="tta: set it in the settings"):
        unet_ray.segment("a.tif", "run", "out.zarr", Settings(), tta=True)


@pytest.mark.parametrize("verb", ["segment", "plan", "train"])
def test_signatures_name_each_keyword(verb):
    names = inspect.signature(getattr(unet_ray, verb)).parameters
    assert {"train": "minutes", "segment": "region", "plan": "tile"}[verb] in names
    assert not any(p.kind is p.VAR_KEYWORD for p in names.values())


def test_a_plan_prints_as_a_table(tmp_path):
    model = random_model(tmp_path / "model.safetensors")
    plan = unet_ray.plan(stored(tmp_path, noise((3, 70, 90))), model)
    assert "  core " in repr(plan) and plan.to_json()["tiles"] == plan.tiles


def test_an_array_is_a_volume_and_a_volume_an_array(tmp_path):
    array = noise((3, 20, 30))
    volume = unet_ray.open_volume(array)
    assert volume.shape == (1, 3, 20, 30) and "array" in repr(volume)
    np.testing.assert_array_equal(np.asarray(volume)[0], array)
    np.testing.assert_array_equal(
        np.asarray(unet_ray.open_volume(stored(tmp_path, array)))[0], array
    )
    assert unet_ray.open_volume(volume) is volume
    with pytest.raises(InputError, match="an array has one level"):
        unet_ray.open_volume(array, level=1)


def test_every_name_is_listed_and_typed():
    assert files(unet_ray).joinpath("py.typed").is_file()
    assert {"load", "train", "plan", "segment", "evaluate", "verify", "report", "open_volume"} <= {
        *dir(unet_ray)
    }
    for name in unet_ray.__all__:
        assert getattr(unet_ray, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        unet_ray.nothing  # noqa: B018
    assert "unet_ray.report" in sys.modules and callable(unet_ray.report)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"labels_are": "instance"}, "labels_are='instance' must be one of classes, instances"),
        ({"precision": "float16"}, "precision='float16' must be one of auto, float32, bfloat16"),
        ({"engine": "rey"}, "engine='rey' must be one of auto, local, ray"),
        ({"recipe": "foo"}, "recipe='foo' must be one of default, paper"),
        ({"steps": "3"}, "steps='3' must be a whole number"),
    ],
)
def test_a_setting_that_does_not_exist_is_refused_in_train(tmp_path, pair, chosen, message):
    with pytest.raises(InputError, match=message):
        unet_ray.train(*pair, tmp_path / "run", **{**TINY, **chosen}, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"nan": "foo"}, "nan='foo' must be one of error, zero"),
        ({"precision": "float16"}, "precision='float16' must be one of float32, bfloat16"),
        ({"workers": "2"}, "workers='2' must be a whole number"),
        ({"region": np.s_[:, 0:9, 0:9]}, "must be three slices"),
        ({"region": np.s_[0:2]}, "must be three slices"),
        ({"tile": (1, 2)}, "must be three whole numbers"),
    ],
)
def test_a_setting_that_does_not_exist_is_refused_in_segment(chosen, message):
    with pytest.raises(InputError, match=message):
        settings_of(**{"engine": "local", **chosen})


def test_what_is_no_volume_is_refused(tmp_path, pair):
    image, labels = pair
    model = unet_ray.load(random_model(tmp_path / "model.safetensors"))
    prediction = model.predict(image, progress=False)
    assert unet_ray.evaluate(prediction, labels, "classes", progress=False).shape == labels.shape
    np.testing.assert_array_equal(
        model.predict(image[0].tolist(), progress=False).classes.shape, image[0].shape
    )
    for wrong in (None, iter([image]), prediction):
        with pytest.raises(InputError, match="is not a volume; pass a path or an array"):
            model.predict(wrong, progress=False)
    with pytest.raises(InputError, match="a masked array: fill it first"):
        model.predict(np.ma.masked_array(image), progress=False)
    with pytest.raises(InputError, match="segment reads a stored volume"):
        unet_ray.segment(image, model, tmp_path / "out.zarr")
    with pytest.raises(InputError, match="at least one volume each"):
        unet_ray.train([], [], tmp_path / "run")
    with pytest.raises(InputError, match="as='isbii' must be one of isbi, instances, classes"):
        unet_ray.evaluate(image, labels, "isbii", progress=False)
    with pytest.raises(InputError, match=r"not an image file; name it .*out\.zarr"):
        unet_ray.segment(stored(tmp_path, image), model, tmp_path / "out.tif", progress=False)


def test_an_array_is_cut_into_the_tiles_of_its_plain_tiff(tmp_path):
    model = random_model(tmp_path / "model.safetensors", depth=4)
    array = np.zeros((10, 1500, 2500), np.uint8)
    plans = [unet_ray.plan(source, model).plan for source in (array, stored(tmp_path, array))]
    assert plans[0] == plans[1]


def test_byte_order_does_not_matter(tmp_path):
    model = unet_ray.load(random_model(tmp_path / "model.safetensors"))
    array = noise((2, 50, 60), "uint16")
    one, other = (model.predict(a, progress=False) for a in (array, array.astype(">u2")))
    np.testing.assert_array_equal(one.probabilities, other.probabilities)
    first, second = (unet_ray.open_volume(a).identity() for a in (array, array + np.uint16(1)))
    changed = array.copy()
    changed[1, 3, 4] += 1
    assert first != second and first != unet_ray.open_volume(changed).identity()


def test_a_resumed_training_has_a_new_report(tmp_path, pair):
    def stop(measure):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unet_ray.train(*pair, tmp_path / "run", **{**TINY, "steps": 12}, watch=stop)
    page = unet_ray.report(tmp_path / "run")
    assert "no model yet" in page.read_text()
    model = unet_ray.train(*pair, tmp_path / "run", **{**TINY, "steps": 12}, progress=False)
    assert "no model yet" not in page.read_text()
    assert unet_ray.report(model) == page


def test_a_plan_can_be_copied(tmp_path):
    plan = unet_ray.plan(noise((3, 70, 90)), random_model(tmp_path / "model.safetensors"))
    assert copy.deepcopy(plan).tiles == plan.tiles
