"""Segmentation on the local engine: the promises about stored bytes, and the refusals."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr

from tests.helper import (
    FLOAT32,
    TILED,
    StoppedError,
    bytes_of,
    classes_of,
    noise,
    random_model,
    shards_of,
    state_of,
    stop_after,
    write_stack,
)
from unet_ray.errors import InputError, LostError, QuarantinedError, RunError
from unet_ray.network.arithmetic import halo_overhead, read_amplification
from unet_ray.network.checkpoints import read_model
from unet_ray.network.unet import UNet
from unet_ray.segmentation import (
    execution,
    preparation,
)
from unet_ray.segmentation import (
    outlook as planning,
)
from unet_ray.segmentation import run as run_module
from unet_ray.segmentation import (
    segment as segmentation,
)
from unet_ray.segmentation.memory import PROCESS_BYTES, network_size
from unet_ray.segmentation.planning import choose_plan
from unet_ray.segmentation.segment import output_paths, segment
from unet_ray.segmentation.settings import Settings
from unet_ray.segmentation.verification import verify
from unet_ray.storage import lease
from unet_ray.storage.layout import LEDGER, PRIVATE
from unet_ray.storage.lease import Lease
from unet_ray.storage.ledger import Ledger
from unet_ray.storage.provenance import flat_fields
from unet_ray.storage.stores import Store
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.opening import open_volume

COARSE = dataclasses.replace(FLOAT32, tile=(3, 32, 40))

# Measured with 93 random networks (depth 1 to 4, 2 to 32 base channels), each with three or four
# pairs of tile sizes, on a CPU with native bfloat16: no difference at all. A library may sum in
# another order for another shape, so that activations round the other way. The bound allows for
# that: it is the difference to float32, 3.4 of 255, rounded up.
BFLOAT16_BOUND = 4


@pytest.fixture
def model(tmp_path):
    return random_model(tmp_path / "model.safetensors")


@pytest.fixture
def write(tmp_path):
    def write(array, name="volume.tif", **options):
        return write_stack(tmp_path / name, array, **options)

    return write


@pytest.fixture
def volume(write):
    return write(noise((3, 61, 75)))


@pytest.fixture
def predicted(monkeypatch):
    """Numbers of the tiles that are predicted, in the order of their start."""
    tiles, predict = [], run_module.TileWorker.predict

    def counted(worker, tile, voxels):
        tiles.append(tile)
        return predict(worker, tile, voxels)

    monkeypatch.setattr(run_module.TileWorker, "predict", counted)
    return tiles


def in_one_pass(model, image):
    """Probabilities (classes, z, y, x) of an image (c, z, y, x) in one pass, without tiles."""
    network, _ = read_model(model)
    context = network.context
    grey = image.astype(np.float64)
    axes = (1, 2, 3)
    grey = (grey - grey.mean(axes, keepdims=True)) / grey.std(axes, keepdims=True)
    (_, t, left), (_, b, r), (_, y, x) = context.before, context.after, context.step
    more = [-n % s for n, s in zip(image.shape[-2:], (y, x), strict=True)]
    pad = [(0, 0), (0, 0), (t, b + more[0]), (left, r + more[1])]
    batch = torch.from_numpy(np.pad(grey, pad, mode="reflect").astype(np.float32)).transpose(0, 1)
    with torch.inference_mode():
        p = network(batch).softmax(1).transpose(0, 1).numpy()
    return p[..., : image.shape[-2], : image.shape[-1]]


def assert_agrees(store, p, within=1):
    """Checks stored outputs: probabilities to `within` of 255, classes equal except at ties."""
    maps, classes = probabilities_of(store), classes_of(store)
    assert np.abs(maps - np.rint(255 * p[1:])).max() <= within
    assert (np.abs(maps - 255 * p[1:]) > 0.5 + 1e-3).mean() < 1e-3
    first, second = np.sort(p, axis=0)[::-1][:2]
    tie = 255 * (first - second) <= 2
    np.testing.assert_array_equal(classes[~tie], p.argmax(0)[~tie])
    assert tie.mean() < 0.2 or classes.size < 100  # else too few voxels are compared


def probabilities_of(store):
    return zarr.open_array(store / "0", mode="r")[:].astype(int)


# The result does not depend on the tiles


@pytest.mark.parametrize("tile", [(1, 16, 20), (2, 32, 24), (3, 64, 76), (1, 4, 76), None], ids=str)
def test_float32_equals_a_pass_over_the_whole_image(tmp_path, model, volume, tile):
    store = segment(volume, model, tmp_path / "out", dataclasses.replace(FLOAT32, tile=tile))
    p = in_one_pass(model, tifffile.imread(volume)[None])
    assert 0.1 < p.argmax(0).mean() < 0.9
    assert_agrees(store, p)


def test_float32_differs_by_at_most_one_between_tile_sizes(tmp_path, model, write):
    volume = write(noise((2, 200, 180)))
    tiles = [(2, 200, 180), (1, 36, 180), (2, 64, 60)]
    stores = [
        segment(volume, model, tmp_path / str(n), dataclasses.replace(FLOAT32, tile=tile))
        for n, tile in enumerate(tiles)
    ]
    maps, classes = zip(*((probabilities_of(s), classes_of(s)) for s in stores), strict=True)
    for other, labels in zip(maps[1:], classes[1:], strict=True):
        apart = np.abs(maps[0] - other)
        assert apart.max() <= 1 and apart.astype(bool).mean() < 1e-3
        tie = np.abs(maps[0][0] - 127.5) <= 1
        np.testing.assert_array_equal(labels[~tie], classes[0][~tie])
        assert tie.mean() < 0.2


def test_bfloat16_differs_by_a_few_between_tile_sizes(tmp_path, write):
    volume, differences = write(noise((2, 100, 90))), []
    for seed in range(2):
        model = random_model(tmp_path / f"{seed}.safetensors", seed=seed)
        stores = [
            segment(volume, model, tmp_path / f"{seed}-{n}", Settings(precision="bfloat16", tile=t))
            for n, t in enumerate([(2, 100, 92), (1, 16, 16)])
        ]
        one, other = map(probabilities_of, stores)
        differences.append(np.abs(one - other).max())
    assert max(differences) <= BFLOAT16_BOUND, differences
    p = in_one_pass(model, tifffile.imread(volume)[None])
    assert np.abs(probabilities_of(stores[0]) - 255 * p[1:]).mean() < 2


IMAGES = {
    "2-D": noise((61, 75)),
    "smaller than the halo": noise((2, 9, 11)),
    "one voxel wide": noise((3, 40, 1)),
    "one voxel high": noise((3, 1, 40)),
    "one voxel": noise((1, 2, 1)),
    "uint16": noise((2, 40, 33), "uint16") * 200,
    "int16": noise((2, 40, 33), "int16") - 300,
    "float32": noise((2, 40, 33), "float32") / 1e4,
    "float64": noise((2, 40, 33), "float64") * 1e6,
}


@pytest.mark.parametrize("name", IMAGES)
def test_any_shape_and_dtype_equals_a_pass_over_the_whole_image(tmp_path, model, name):
    image = IMAGES[name]
    zarr.create_array(tmp_path / "volume.zarr", data=image)
    store = segment(tmp_path / "volume.zarr", model, tmp_path / "out", TILED)
    image = image.reshape(-1, *image.shape[-2:])
    assert classes_of(store).shape == image.shape
    assert_agrees(store, in_one_pass(model, image[None]))


def test_several_channels_and_classes(tmp_path, write):
    values = (3, 7, 200)
    model = random_model(tmp_path / "model.safetensors", values, in_channels=2, base=3, seed=3)
    image = np.stack([noise((2, 50, 41), seed=n) for n in range(2)])
    path = write(image, "volume.ome.tif", ome=True)
    store = segment(path, model, tmp_path / "out", TILED)
    p = in_one_pass(model, image)
    assert set(np.unique(p.argmax(0))) == {0, 1, 2}
    assert probabilities_of(store).shape == (2, 2, 50, 41)
    assert_agrees(store, p)
    group = json.loads((store / "zarr.json").read_text())["attributes"]
    names = [c["label"] for c in group["ome"]["omero"]["channels"]]
    assert names == ["label 7", "label 200"]
    assert group["unet_ray"]["model"]["class_values"] == [3, 7, 200]


def test_the_chosen_channel_is_segmented(tmp_path, model, write):
    image = np.stack([noise((2, 30, 41), seed=n) for n in range(2)])
    path = write(image, "volume.ome.tif", ome=True)
    store = segment(path, model, tmp_path / "out", dataclasses.replace(TILED, channel=1))
    assert_agrees(store, in_one_pass(model, image[1:]))


def test_the_requested_tile_is_rounded_up_and_clamped(tmp_path, model, volume):
    for n, (requested, fitted) in enumerate(
        [((1, 1, 1), (1, 4, 4)), ((9, 999, 17), (3, 64, 20)), ((2, 61, 75), (2, 64, 76))]
    ):
        settings = dataclasses.replace(FLOAT32, tile=requested)
        run = preparation.prepare(volume, model, tmp_path / str(n), settings)
        assert run.plan.core == fitted


# Repeated runs


def test_a_second_run_gives_the_same_bytes(tmp_path, model, volume):
    one, other = (segment(volume, model, tmp_path / n, TILED) for n in ("one", "other"))
    assert len(shards_of(one)) == 2 * 3 * 2 * 4
    assert bytes_of(one) == bytes_of(other)


@pytest.mark.parametrize("stops", [(1,), (12,), (3, 4, 10), (23,)], ids=str)
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path, model, volume, predicted, stops):
    whole = segment(volume, model, tmp_path / "whole", TILED)
    assert sorted(predicted) == list(range(24))
    done = 0
    for tiles in stops:
        with pytest.raises(StoppedError):
            segment(volume, model, tmp_path / "cut", TILED, stop_after(tiles))
        done += tiles
    predicted.clear()
    seen = []
    store = segment(volume, model, tmp_path / "cut", TILED, seen.append)
    assert len(predicted) == len(set(predicted)) == len(seen) == 24 - done
    assert [p.done for p in seen] == list(range(done + 1, 25))
    assert {p.total for p in seen} == {24}
    assert bytes_of(store) == bytes_of(whole)


def test_only_missing_tiles_are_written(tmp_path, model, volume):
    with pytest.raises(StoppedError):
        segment(volume, model, tmp_path / "cut", TILED, stop_after(10))
    with Ledger(tmp_path / "cut" / LEDGER, 24) as ledger:
        committed = [n for n in range(24) if n in ledger]
    assert len(committed) == 10
    plan = preparation.prepare(volume, model, tmp_path / "cut", TILED).plan
    store = Store(tmp_path / "cut", ("probabilities", "classes"))
    shards = [
        store.shard(name, plan[n]) for name in ("probabilities", "classes") for n in committed
    ]
    before = [shard.stat() for shard in shards]
    segment(volume, model, tmp_path / "cut", TILED)
    after = [shard.stat() for shard in shards]
    assert [(s.st_ino, s.st_mtime_ns) for s in after] == [(s.st_ino, s.st_mtime_ns) for s in before]


def test_a_finished_run_does_nothing(tmp_path, model, volume, predicted):
    store = segment(volume, model, tmp_path / "out", TILED)
    before = state_of(tmp_path)
    predicted.clear()
    assert segment(volume, model, store, TILED) == store
    assert predicted == [] and state_of(tmp_path) == before


@pytest.mark.parametrize(
    "region",
    [Box((0, 0, 0), (1, 1, 1)), Box((1, 17, 19), (3, 40, 75)), Box((2, 60, 74), (3, 61, 75))],
    ids=str,
)
def test_a_region_gives_the_bytes_of_the_same_part_of_the_whole(tmp_path, model, volume, region):
    whole = bytes_of(segment(volume, model, tmp_path / "whole", TILED))
    settings = dataclasses.replace(TILED, region=region)
    part = segment(volume, model, tmp_path / "part", settings)
    assert {name: content for name, content in whole.items() if name in bytes_of(part)} == bytes_of(
        part
    )
    ranges = zip(region.start, region.stop, (1, 32, 20), strict=True)
    touched = np.prod([-(-b // n) - a // n for a, b, n in ranges])
    assert len(shards_of(part)) == 2 * touched
    classes, part_classes = classes_of(tmp_path / "whole"), classes_of(part)
    assert part_classes.shape == classes.shape
    np.testing.assert_array_equal(part_classes[region.slices], classes[region.slices])


def test_regions_accumulate(tmp_path, model, volume, predicted):
    whole = segment(volume, model, tmp_path / "whole", TILED)
    predicted.clear()
    for corners in [((0, 0, 0), (3, 20, 75)), ((1, 10, 0), (2, 61, 75)), ((0, 33, 0), (3, 61, 75))]:
        segment(volume, model, tmp_path / "out", dataclasses.replace(TILED, region=Box(*corners)))
    assert sorted(predicted) == list(range(24))
    assert bytes_of(tmp_path / "out") == bytes_of(whole)


@pytest.mark.parametrize(
    "outputs, present, absent",
    [(("classes",), "labels", "0"), (("probabilities",), "0", "labels")],
    ids=["classes", "probabilities"],
)
def test_only_the_requested_outputs_are_stored(tmp_path, model, volume, outputs, present, absent):
    whole = bytes_of(segment(volume, model, tmp_path / "whole", TILED))
    settings = dataclasses.replace(TILED, outputs=outputs)
    store = segment(volume, model, tmp_path / "out", settings)
    assert (store / present).is_dir() and not (store / absent).exists()
    shards = shards_of(store)
    assert len(shards) == 24
    assert {n: c for n, c in bytes_of(store).items() if n in shards} == {
        n: whole[n] for n in shards
    }
    # a rerun without `outputs` uses those of the store
    assert preparation.prepare(volume, model, store, TILED).outputs == outputs


@pytest.mark.parametrize("change", [-1, 1 << 30])
def test_a_store_keeps_its_plan_with_another_memory(tmp_path, model, volume, predicted, change):
    opened, (network, _) = open_volume(volume), read_model(model)
    size = network_size(network, "float32")
    plan, need = choose_plan(opened, network, size, FLOAT32, 2)
    # Tiles must fit into a Ray worker, even on the local engine.
    one_less = dataclasses.replace(FLOAT32, memory=need.on("ray").total - 1)
    _, less = choose_plan(opened, network, size, one_less, 2)
    assert less.total < need.total
    chosen = (need if change > 0 else less).on("ray").total
    first = dataclasses.replace(FLOAT32, memory=chosen)
    # a new store would get another plan with the memory of the second call
    second = dataclasses.replace(FLOAT32, memory=(less if change > 0 else need.on("ray")).total)
    whole = segment(volume, model, tmp_path / "whole", first)
    with pytest.raises(StoppedError):
        segment(volume, model, tmp_path / "cut", first, stop_after(1))
    if change > 0:
        with pytest.raises(InputError, match=rf"cut: its plan needs .* --memory {need.total}"):
            segment(volume, model, tmp_path / "cut", second)
        second = dataclasses.replace(second, memory=need.total + change)
    segment(volume, model, tmp_path / "cut", second)
    assert bytes_of(tmp_path / "cut") == bytes_of(whole)
    assert preparation.prepare(volume, model, tmp_path / "cut", second).plan != plan or change > 0


# Provenance


def test_provenance_does_not_depend_on_user_place_and_time(tmp_path, model, volume):
    one = segment(volume, model, tmp_path / "one", TILED)
    (tmp_path / "elsewhere").mkdir()
    moved = [shutil.move(path, tmp_path / "elsewhere" / path.name) for path in (model, volume)]
    other = dataclasses.replace(
        TILED, workers=1, memory=7 << 30, region=Box((0, 0, 0), (3, 61, 75))
    )
    again = segment(moved[1], moved[0], tmp_path / "elsewhere" / "again", other)
    assert bytes_of(one) == bytes_of(again)
    provenance = json.loads((one / "zarr.json").read_text())["attributes"]["unet_ray"]
    text = json.dumps(provenance)
    assert str(tmp_path) not in text
    words = {key for key, _ in flat_fields(provenance)}
    assert not {w for w in words if re.search("engine|workers|memory|region|path|seconds|host", w)}


def test_provenance_records_everything_that_determines_the_bytes(tmp_path, model, volume):
    store = segment(volume, model, tmp_path / "out", TILED)
    provenance = json.loads((store / "zarr.json").read_text())["attributes"]["unet_ray"]
    image = tifffile.imread(volume).astype(float)
    assert provenance["input"]["name"] == "volume.tif"
    assert provenance["plan"]["core"] == [1, 32, 20]
    assert provenance["precision"] == "float32" and provenance["device"] in ("cpu", "cuda")
    assert provenance["normalisation"]["mean"] == pytest.approx([image.mean()], rel=1e-12)
    assert provenance["normalisation"]["sd"] == pytest.approx([image.std()], rel=1e-12)
    assert provenance["model"]["architecture"]["depth"] == 2
    assert len(provenance["model"]["sha256"]) == 64
    assert {"unet-ray", "torch", "numpy", "zarr"} <= set(provenance["versions"])


# Refusals


OTHER = {
    "model.sha256": {"model": {"seed": 1}},
    "input.": {"image": noise((3, 61, 75), seed=1)},
    "plan.core": {"settings": {"tile": (1, 16, 16)}},
    "precision": {"settings": {"precision": "bfloat16"}},
    "outputs": {"settings": {"outputs": ("classes",)}},
}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
@pytest.mark.parametrize("field", OTHER)
def test_another_run_on_the_same_store_is_refused_by_name(
    tmp_path, model, volume, write, field, finished
):
    if finished:
        segment(volume, model, tmp_path / "out", COARSE)
    else:
        with pytest.raises(StoppedError):
            segment(volume, model, tmp_path / "out", COARSE, stop_after(3))
    other = OTHER[field]
    if "model" in other:
        model = random_model(tmp_path / "other.safetensors", **other["model"])
    if "image" in other:
        volume = write(other["image"])
    settings = dataclasses.replace(COARSE, **other.get("settings", {}))
    before = state_of(tmp_path)
    with pytest.raises(InputError, match=rf"out: was made with another {field}.*--overwrite"):
        segment(volume, model, tmp_path / "out", settings)
    assert state_of(tmp_path) == before


def test_overwrite_creates_a_new_store(tmp_path, model, volume):
    segment(volume, model, tmp_path / "out", TILED)
    settings = dataclasses.replace(TILED, tile=(3, 64, 40), overwrite=True)
    segment(volume, model, tmp_path / "out", settings)
    fresh = segment(
        volume, model, tmp_path / "fresh", dataclasses.replace(settings, overwrite=False)
    )
    assert bytes_of(tmp_path / "out") == bytes_of(fresh)
    segment(volume, model, tmp_path / "new", settings)
    assert bytes_of(tmp_path / "new") == bytes_of(fresh)


def test_overwrite_deletes_nothing_before_all_checks_passed(tmp_path, model, volume):
    segment(volume, model, tmp_path / "out", COARSE)
    before = state_of(tmp_path)
    settings = dataclasses.replace(COARSE, region=Box((0, 0, 0), (4, 1, 1)), overwrite=True)
    with pytest.raises(InputError, match="region"):
        segment(volume, model, tmp_path / "out", settings)
    assert state_of(tmp_path) == before


def test_overwrite_never_deletes_its_own_input(tmp_path, volume):
    model = random_model(tmp_path / "model.safetensors")
    store = segment(volume, model, tmp_path / "out", COARSE)
    before = state_of(tmp_path)
    with pytest.raises(InputError, match="out"):
        segment(store, model, store, dataclasses.replace(COARSE, overwrite=True))
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("kind", ["mask", "model", "volume"])
def test_overwrite_never_deletes_an_input_of_the_run(tmp_path, volume, kind):
    out = tmp_path / "out"
    inputs = {"model": random_model(tmp_path / "model.safetensors"), "volume": volume}
    inputs["mask"] = write_stack(tmp_path / "mask.tif", np.ones((3, 61, 75), np.uint8))
    segment(volume, inputs["model"], out, COARSE)
    inside = out / PRIVATE / Path(inputs[kind]).name  # all files in this folder count as ours
    inputs[kind] = shutil.copy(inputs[kind], inside)
    before = state_of(tmp_path)
    settings = dataclasses.replace(COARSE, mask=inputs["mask"], overwrite=True)
    with pytest.raises(InputError, match=rf"{out}: overlaps the input {inside}"):
        segment(inputs["volume"], inputs["model"], out, settings)
    assert state_of(tmp_path) == before


def test_an_impossible_output_path_is_named(tmp_path, model, volume):
    long = tmp_path / ("x" * 300)
    with pytest.raises(InputError, match=rf"{long}: cannot be used \(File name too long\)"):
        segment(volume, model, long, TILED)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(InputError, match=rf"{loop}: exists and is not an output"):
        segment(volume, model, loop, TILED)


FOREIGN = {
    "folder": lambda path: [path.mkdir(), (path / "chapter.tex").write_text("years of work")],
    "a broken link": lambda path: path.symlink_to("nowhere"),
    "metadata of another": lambda path: zarr.create_group(path / "labels"),
    "file": lambda path: path.write_text("years of work"),
    "array": lambda path: zarr.create_array(path, shape=(4,), dtype="uint8"),
    "group": lambda path: zarr.create_group(path, attributes={"ome": {"version": "0.5"}}),
    "damaged": lambda path: [path.mkdir(), (path / "zarr.json").write_text('{"attributes": {')],
    "oddity": lambda path: zarr.create_group(path, attributes={"unet_ray": "a word"}),
    "empty provenance": lambda path: zarr.create_group(path, attributes={"unet_ray": {}}),
    "later format": lambda path: zarr.create_group(path, attributes={"unet_ray": {"format": 2}}),
}


def test_an_empty_folder_becomes_a_store(tmp_path, model, volume):
    (tmp_path / "out").mkdir()
    whole = segment(volume, model, tmp_path / "whole", TILED)
    assert bytes_of(segment(volume, model, tmp_path / "out", TILED)) == bytes_of(whole)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_never_touched(tmp_path, model, volume, kind, overwrite):
    FOREIGN[kind](tmp_path / "out")
    before = state_of(tmp_path)
    with pytest.raises(InputError, match="out: exists and is not an output of unet-ray"):
        segment(volume, model, tmp_path / "out", dataclasses.replace(TILED, overwrite=overwrite))
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("value, place", [(np.nan, (1, 30, 40)), (np.inf, (0, 0, 0))])
def test_a_value_that_is_not_finite_is_named_with_its_tile(tmp_path, model, write, value, place):
    image = noise((3, 61, 75), "float32")
    image[place] = value
    volume = write(image)
    with pytest.raises(QuarantinedError, match=re.escape(f"voxel (z, y, x) = {place} ")) as named:
        segment(volume, model, tmp_path / "out", TILED)
    assert str(volume) in str(named.value) and str(value) in str(named.value)
    number = int(re.search(r"read by tile (\d+)", str(named.value))[1])
    plan = preparation.prepare(volume, model, tmp_path / "out", TILED).plan
    read = plan[number].read
    assert all(a <= p < b for a, p, b in zip(read.start, place, read.stop, strict=True))
    with Ledger(tmp_path / "out" / LEDGER, len(plan)) as ledger:
        assert number not in ledger


def test_too_little_memory_is_refused(tmp_path, model, volume):
    with pytest.raises(InputError, match=r"memory=\d+ MiB is too little .* needs \d+ MiB"):
        segment(volume, model, tmp_path / "out", dataclasses.replace(FLOAT32, memory=100 << 20))
    assert not (tmp_path / "out").exists()


def test_little_memory_still_gets_the_largest_tile_that_fits_the_engine(tmp_path, model, write):
    volume = write(noise((3, 900, 1000)))

    def planned(engine, memory):
        settings = dataclasses.replace(FLOAT32, engine=engine, memory=memory)
        return planning.plan(volume, model, settings)

    smallest = planning.plan(volume, model, dataclasses.replace(FLOAT32, tile=(1, 4, 4)))
    memory = smallest.memory.total + (40 << 20)
    assert memory < smallest.memory.on("ray").total
    outlook = planned("local", memory)
    assert outlook.memory.total <= memory and outlook.plan.core[1] > 100
    # A little more memory must not switch to the smallest tiles that fit into a Ray worker.
    for more in (0, 1, 2, 4, 8, 16):
        memory = smallest.memory.on("ray").total + (more << 20)
        assert planned("local", memory).halo_overhead <= 1.5 * outlook.halo_overhead + 1
    with pytest.raises(InputError, match="is too little for this model"):
        too_little = dataclasses.replace(FLOAT32, memory=smallest.memory.total - 1)
        planning.plan(volume, model, dataclasses.replace(too_little, engine="local"))


def test_the_error_for_a_too_large_tile_names_one_that_fits(tmp_path, model, write):
    volume = write(noise((3, 900, 1000)))
    opened, (network, _) = open_volume(volume), read_model(model)
    half = dataclasses.replace(FLOAT32, tile=(3, 452, 1000))
    _, need = choose_plan(opened, network, network_size(network, "float32"), half, 2)
    settings = dataclasses.replace(FLOAT32, tile=(3, 900, 1000), memory=need.total, pyramid=False)
    with pytest.raises(InputError, match=r"tile=3,900,1000 needs .* allowed; tile=") as refused:
        segment(volume, model, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    named = re.search(r"tile=([\d,]+) needs [^;]*$", str(refused.value))[1]
    fits = dataclasses.replace(settings, tile=tuple(map(int, named.split(","))))
    run = preparation.prepare(volume, model, tmp_path / "out", fits)
    assert run.plan.core == fits.tile and run.memory.total <= settings.memory


@pytest.fixture(scope="module")
def large_network():
    return UNet(1, 2, base_channels=64, depth=4)


def chosen(folder, network, shape, chunks, memory):
    """The plan for a Zarr array without stored chunks, in bfloat16."""
    zarr.create_array(folder / "a.zarr", shape=shape, chunks=chunks, dtype="uint16")
    volume, size = open_volume(folder / "a.zarr"), network_size(network, "bfloat16")
    plan, need = choose_plan(volume, network, size, Settings(memory=memory), 2)
    assert need.on("ray").total <= memory
    return plan, halo_overhead(size, plan), read_amplification(plan, chunks)


@pytest.mark.parametrize(
    ("chunks", "memory", "core"),
    [
        ((1, 512, 512), 3846, (16, 1024, 1024)),
        ((1, 512, 512), 774, (16, 512, 512)),
        ((64, 64, 64), 3846, (64, 1024, 1024)),
        ((64, 1024, 1024), 3846, (64, 1024, 1024)),
        ((1024, 64, 64), 3846, (1000, 416, 416)),
    ],
)
def test_tiles_are_as_deep_as_a_chunk_or_a_slab(tmp_path, large_network, chunks, memory, core):
    limit = PROCESS_BYTES["ray"] + (memory << 20)
    plan, _, _ = chosen(tmp_path, large_network, (1000, 2048, 2048), chunks, limit)
    assert plan.core == core


def test_tiles_of_deep_chunks_are_split_before_they_are_mostly_halo(tmp_path, large_network):
    whole = 4096, 4096, 4096
    plan, halo, reads = chosen(tmp_path, large_network, whole, (2048, 64, 64), 1 << 30)
    assert 1 < plan.core[0] < 2048 and min(plan.core[1:]) > 128
    assert halo < 1.5 and reads < 30


def test_channels_that_do_not_fit_are_refused(tmp_path, model, write, volume):
    colour = write(noise((40, 40, 3)), "colour.tif", photometric="rgb", metadata=None)
    with pytest.raises(InputError, match=r"colour\.tif: has 3 channels, .* on 1; .*--channel N"):
        segment(colour, model, tmp_path / "out", TILED)
    three = random_model(tmp_path / "three.safetensors", in_channels=3)
    with pytest.raises(InputError, match=r"volume\.tif: has 1 channels, .*three.* on 3\."):
        segment(volume, three, tmp_path / "out", TILED)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [(4, 61, 75), (3, 62, 75), (3, 61, 76)], ids=str)
def test_a_region_outside_is_refused(tmp_path, model, volume, stop):
    settings = dataclasses.replace(TILED, region=Box((0, 0, 0), stop))
    with pytest.raises(InputError, match=r"region=0:.* inside the volume, 0:3,0:61,0:75"):
        segment(volume, model, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_an_unknown_output_is_refused(tmp_path, model, volume):
    settings = dataclasses.replace(TILED, outputs=("probability",))
    with pytest.raises(InputError, match=r"'probability' .* \(did you mean 'probabilities'\?\)"):
        segment(volume, model, tmp_path / "out", settings)


# Several inputs


def test_one_input_goes_to_the_path_itself_and_several_into_a_folder():
    assert output_paths(["a/x.tif"], "out.zarr") == [Path("out.zarr").absolute()]
    named = output_paths(["a/x.tif", "y.OME.TIFF", "z.ome.zarr", "folder/", "p.png"], "out")
    assert [path.name for path in named] == ["x.zarr", "y.zarr", "z.zarr", "folder.zarr", "p.zarr"]
    assert {path.parent for path in named} == {Path("out").absolute()}
    bucket = output_paths(["a/x.tif", "y.tif"], "s3://bucket/out")
    assert [*map(str, bucket)] == ["s3://bucket/out/x.zarr", "s3://bucket/out/y.zarr"]
    with pytest.raises(InputError, match="Two inputs are named 'x'"):
        output_paths(["a/x.tif", "b/x.zarr"], "out")


def test_a_plan_predicts_the_run_and_writes_nothing(tmp_path, model, volume):
    before = state_of(tmp_path)
    settings = dataclasses.replace(TILED, region=Box((0, 0, 0), (1, 61, 75)))
    outlook = planning.plan(volume, model, settings)
    assert state_of(tmp_path) == before
    assert (outlook.tiles, outlook.plan.core) == (8, (1, 32, 20))
    store = segment(volume, model, tmp_path / "out", settings)
    assert sum(os.path.getsize(store / name) for name in shards_of(store)) <= outlook.disk_bytes


def test_naming_the_only_channel_and_time_point_changes_nothing(tmp_path, model, volume):
    store = segment(volume, model, tmp_path / "out", FLOAT32)
    named = dataclasses.replace(FLOAT32, channel=0, time=0)
    assert preparation.prepare(volume, model, store, named).resumed


def test_another_channel_on_the_same_store_is_refused(tmp_path, model):
    path = write_stack(tmp_path / "two.tif", noise((2, 3, 40, 40)))
    store = segment(path, model, tmp_path / "out", dataclasses.replace(FLOAT32, channel=0))
    with pytest.raises(InputError, match="another input"):
        segment(path, model, store, dataclasses.replace(FLOAT32, channel=1))


def test_an_input_inside_the_output_of_another_is_refused(tmp_path, model, volume):
    stem = volume.name.removesuffix(".tif")
    first = segment(volume, model, tmp_path / "many" / f"{stem}.zarr", FLOAT32)
    inside = first / "labels" / "classes" / "0"
    before = state_of(tmp_path)
    again = dataclasses.replace(FLOAT32, overwrite=True)
    with pytest.raises(InputError, match="overlaps the input"):
        segmentation.prepare_all([str(volume), str(inside)], model, str(tmp_path / "many"), again)
    assert state_of(tmp_path) == before


def test_a_second_run_on_a_store_is_refused_unless_it_takes_over(tmp_path, model, volume):
    store = segment(volume, model, tmp_path / "out", FLOAT32)
    before = bytes_of(store)
    shutil.rmtree(store / LEDGER)  # else no tile is pending
    again = dataclasses.replace(FLOAT32, overwrite=True)
    with Lease(store / PRIVATE):
        for settings in (FLOAT32, again):
            with pytest.raises(InputError, match=rf"out: process {os.getpid()} on .*--takeover"):
                segment(volume, model, store, settings)
        assert bytes_of(store) == before
        segment(volume, model, store, dataclasses.replace(FLOAT32, takeover=True))
    assert bytes_of(store) == before


def test_a_run_that_was_taken_over_stops_and_loses_nothing(
    tmp_path, model, volume, monkeypatch, capsys
):
    monkeypatch.setattr(lease, "CHECK_SECONDS", 0)
    whole = segment(volume, model, tmp_path / "whole", TILED)

    def take_over(progress):
        if progress.finished == 5:
            last = Box((2, 60, 74), (3, 61, 75))
            other = dataclasses.replace(TILED, takeover=True, region=last)
            segment(volume, model, tmp_path / "out", other)

    with pytest.raises(RunError, match="so this run stops; committed work is kept"):
        segment(volume, model, tmp_path / "out", TILED, take_over)
    assert "taking over from process" in capsys.readouterr().err
    seen = []
    store = segment(volume, model, tmp_path / "out", TILED, seen.append)
    assert seen[0].done >= 7  # five of the first run, one of the second, and this one
    assert bytes_of(store) == bytes_of(whole)


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.ray)])
@pytest.mark.usefixtures("ready")
def test_a_run_writes_nothing_after_another_recreated_its_store(tmp_path, model, volume, engine):
    """The old run is computing a tile while the new one replaces the store."""
    fresh = dataclasses.replace(TILED, tile=(1, 64, 76))
    whole = segment(volume, model, tmp_path / "whole", fresh)
    store = tmp_path / "out"
    old = dataclasses.replace(TILED, engine=engine, workers=1)

    def overwrite(progress):
        if progress.finished == 3:
            other = dataclasses.replace(fresh, overwrite=True, takeover=True)
            segment(volume, model, store, other)

    with pytest.raises(LostError, match="has taken it over, so this run stops"):
        segment(volume, model, store, old, overwrite)
    assert bytes_of(store) == bytes_of(whole)
    assert verify(store).sound
    assert segment(volume, model, store, fresh, pytest.fail) == store


def test_a_run_is_refused_if_the_store_changed_after_preparation(tmp_path, model, volume):
    other = dataclasses.replace(TILED, tile=(1, 64, 76))
    for out in ("new", "old"):
        if out == "old":
            segment(
                volume,
                model,
                tmp_path / out,
                dataclasses.replace(TILED, region=Box((2, 60, 74), (3, 61, 75))),
            )
        prepared = preparation.prepare(volume, model, tmp_path / out, TILED)
        whole = segment(
            volume, model, tmp_path / out, dataclasses.replace(other, overwrite=out == "old")
        )
        before = state_of(whole)
        with pytest.raises(InputError, match=r"another plan\.core"):
            execution.execute(prepared, TILED, print)
        after = state_of(whole)
        assert {k for k in after if after[k] != before.get(k)} <= {
            whole / PRIVATE / name for name in ("", "lease.json")
        }


def test_overwriting_through_a_link_leaves_the_link(tmp_path, model, volume):
    whole = segment(volume, model, tmp_path / "whole", TILED)
    target = segment(volume, model, tmp_path / "disk", dataclasses.replace(TILED, tile=(1, 64, 76)))
    (tmp_path / "out").symlink_to(target)
    segment(volume, model, tmp_path / "out", dataclasses.replace(TILED, overwrite=True))
    assert (tmp_path / "out").is_symlink()
    assert bytes_of(target) == bytes_of(whole)


LINKS = [
    *(".unet_ray", ".unet_ray/ledger", ".unet_ray/ledger/segment", ".unet_ray/marks"),
    *(".unet_ray/events.jsonl", ".unet_ray/.lease.lock"),
    *("0", "0/c", "0/c/0", "0/c/0/0", "0/c/0/0/0"),
    *("labels", "labels/classes", "labels/classes/0", "labels/classes/0/c/0"),
]


@pytest.mark.parametrize("overwrite", [False, True], ids=["resumed", "overwritten"])
@pytest.mark.parametrize("name", LINKS)
def test_a_link_inside_a_store_is_refused_before_anything_is_written(
    tmp_path, model, volume, name, overwrite
):
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        segment(volume, model, out, TILED, stop_after(3))
    shutil.move(out / name, tmp_path / "elsewhere")
    (out / name).symlink_to(tmp_path / "elsewhere")
    before = state_of(tmp_path)
    settings = dataclasses.replace(TILED, overwrite=overwrite)
    for run in (
        lambda: segment(volume, model, out, settings),
        lambda: segmentation.prepare_all([str(volume)], model, str(out), settings),
    ):
        with pytest.raises(InputError, match=rf"^{out / name}: is ") as caught:
            run()
        assert "link" in str(caught.value) or overwrite
    assert state_of(tmp_path) == before


def test_a_folder_that_becomes_a_link_during_a_run_is_not_filled(tmp_path, model, volume):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def watch(progress):
        if progress.finished == 1:  # the slice of z = 2 has no folder yet
            (tmp_path / "out/0/c/0/2").symlink_to(elsewhere)

    with pytest.raises(QuarantinedError, match=r"0/c/0/2/0: is behind a symbolic link"):
        segment(volume, model, tmp_path / "out", TILED, watch)
    assert not [*elsewhere.iterdir()]


@pytest.mark.parametrize(("free", "remedy"), [(300, r"--workers \d+\."), (64, "a smaller --mem")])
def test_more_workers_than_fit_into_memory_are_refused(
    tmp_path, model, volume, monkeypatch, free, remedy
):
    monkeypatch.setattr(preparation, "memory_available", lambda: free << 20)
    many = dataclasses.replace(TILED, workers=500)
    with pytest.raises(InputError, match=rf"500 workers need .* are available; set .*{remedy}"):
        segment(volume, model, tmp_path / "out", many)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage", [{"outputs": ["x"]}, {"outputs": []}, {"plan": {}}, {"device": None}, {"input": 3}]
)
def test_a_store_whose_provenance_is_damaged_is_refused(tmp_path, model, volume, damage):
    store = segment(volume, model, tmp_path / "out", TILED)
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"]["unet_ray"] |= damage
    if None in damage.values():
        del root["attributes"]["unet_ray"]["device"]
    (store / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(InputError, match=r"out: its provenance is damaged \(.*--overwrite"):
        segment(volume, model, store, TILED)
