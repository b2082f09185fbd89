"""The stages after the prediction: pyramid levels, objects and their table, on both engines."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from scipy import ndimage
from skimage.measure import regionprops_table

from tests.helper import (
    FLOAT32,
    StoppedError,
    bytes_of,
    classes_of,
    noise,
    random_model,
    state_of,
    stop_after,
    write_stack,
)
from unet_ray.errors import InputError, QuarantinedError
from unet_ray.report.export import export
from unet_ray.report.results import open_result
from unet_ray.scores.evaluation import evaluate
from unet_ray.segmentation import run, unions
from unet_ray.segmentation.outlook import plan
from unet_ray.segmentation.outlook import plan as planned
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.verification import verify
from unet_ray.storage.ledger import committed
from unet_ray.tiling.boxes import Box

OBJECTS = dataclasses.replace(
    FLOAT32, tile=(2, 32, 40), outputs=("probabilities", "classes", "instances")
)
LARGE = (3, 530, 75)  # voxels; has one pyramid level
STAGES = ("label", "join", "instances", "instances-pyramid-1", "table", "pyramid-1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture
def volume(tmp_path):
    return write_stack(tmp_path / "volume.tif", noise(LARGE))


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """A folder with a volume, and a finished store with a pyramid and objects."""
    folder = tmp_path_factory.mktemp("made")
    volume = write_stack(folder / "volume.tif", noise(LARGE))
    segment(volume, model, folder / "out.zarr", OBJECTS)
    return folder


def array(store, name):
    return zarr.open_array(store / name, mode="r")[:]


def renumbered(labels):
    """Returns labels with ids 1, 2, … in the order of their first voxels."""
    ids, first = np.unique(labels, return_index=True)
    first, ids = first[ids > 0], ids[ids > 0]
    final = np.zeros(int(labels.max()) + 1, np.uint64)
    final[ids[np.argsort(first)]] = np.arange(1, len(ids) + 1)
    return final[labels]


def expected_ids(mask, connectivity=6, connect="volume"):
    """Returns the ids of the components of a whole volume, by scipy."""
    order = {6: 1, 18: 2, 26: 3}[connectivity]
    structure = ndimage.generate_binary_structure(3, order)
    if connect == "slice":
        structure[[0, 2]] = False
    return renumbered(ndimage.label(mask, structure)[0])


def most_frequent_by_hand(labels, factors):
    """Returns the most frequent label of each block; the lower one at a tie."""
    coarse = np.zeros(
        [-(-n // f) for n, f in zip(labels.shape, factors, strict=True)], labels.dtype
    )
    for index in np.ndindex(*coarse.shape):
        block = labels[
            tuple(slice(i * f, (i + 1) * f) for i, f in zip(index, factors, strict=True))
        ]
        values, counts = np.unique(block, return_counts=True)
        coarse[index] = values[counts.argmax()]
    return coarse


# Pyramids


def test_a_level_has_means_of_probabilities_and_frequent_labels(made):
    fine, coarse = array(made / "out.zarr", "0").astype(int), array(made / "out.zarr", "1")
    assert coarse.shape == (1, 3, 265, 38)
    padded = np.pad(fine, ((0, 0), (0, 0), (0, 0), (0, 1)), mode="edge")  # a half block at the end
    total = padded.reshape(1, 3, 265, 2, 38, 2).sum((3, 5))
    np.testing.assert_array_equal(coarse, (total + 2) // 4)
    for name in ("classes", "instances"):
        levels = [array(made / "out.zarr", f"labels/{name}/{level}") for level in (0, 1)]
        np.testing.assert_array_equal(levels[1], most_frequent_by_hand(levels[0], (1, 2, 2)))


def test_a_small_volume_has_no_pyramid_and_a_flag_leaves_it_out(tmp_path, model, volume):
    small = write_stack(tmp_path / "small.tif", noise((2, 61, 75)))
    segment(small, model, tmp_path / "small.zarr", FLOAT32)
    without = dataclasses.replace(OBJECTS, pyramid=False)
    segment(volume, model, tmp_path / "out.zarr", without)
    for store in ("small.zarr", "out.zarr"):
        assert not (tmp_path / store / "1").exists()
        root = json.loads((tmp_path / store / "zarr.json").read_text())["attributes"]
        assert "levels" not in root["unet_ray"]
        assert len(root["ome"]["multiscales"][0]["datasets"]) == 1


def test_the_pyramid_follows_when_the_last_region_is_done(tmp_path, model, volume, made, capsys):
    top = dataclasses.replace(OBJECTS, region=Box((0, 0, 0), (3, 100, 75)))
    segment(volume, model, tmp_path / "out.zarr", top)
    assert "objects and pyramid follow when all tiles" in capsys.readouterr().err
    assert not (tmp_path / "out.zarr/1/c").exists()
    rest = dataclasses.replace(OBJECTS, region=Box((0, 100, 0), (3, 530, 75)))
    segment(volume, model, tmp_path / "out.zarr", rest)
    arrays = [bytes_of(folder / "out.zarr") for folder in (tmp_path, made)]
    for files in arrays:
        files.pop("zarr.json")  # the identity of the input has its time
    assert arrays[0] == arrays[1]


def test_tiles_added_after_a_mask_make_the_later_stages_again(tmp_path, model, volume, made):
    mask = np.zeros(LARGE, np.uint8)
    mask[:, :200] = 1
    write_stack(tmp_path / "mask.tif", mask)
    masked = dataclasses.replace(OBJECTS, mask=tmp_path / "mask.tif")
    segment(volume, model, tmp_path / "out.zarr", masked)
    classes = classes_of(tmp_path / "out.zarr")
    assert classes[:, :200].any() and not classes[:, 256:].any()
    ids = array(tmp_path / "out.zarr", "labels/instances/0")
    np.testing.assert_array_equal(ids, expected_ids(classes != 0))
    assert not array(tmp_path / "out.zarr", "1")[..., 130:, :].any()
    segment(volume, model, tmp_path / "out.zarr", OBJECTS)
    arrays = [bytes_of(folder / "out.zarr") for folder in (tmp_path, made)]
    for files in arrays:
        files.pop("zarr.json")
    assert arrays[0] == arrays[1]


def test_a_shard_that_a_killed_run_left_in_a_skipped_tile_is_background(
    tmp_path, model, volume, made
):
    mask = np.zeros(LARGE, np.uint8)
    mask[:, :200] = 1
    masked = dataclasses.replace(OBJECTS, mask=write_stack(tmp_path / "mask.tif", mask))
    stores = [tmp_path / "out.zarr", tmp_path / "left.zarr"]
    segment(volume, model, stores[0], masked)
    with pytest.raises(StoppedError):
        segment(volume, model, stores[1], masked, stop_after(1))
    left = [f"{name}/1/8/1" for name in ("0/c/0", "labels/classes/0/c")]
    for name in left:
        (stores[1] / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "out.zarr" / name, stores[1] / name)
    segment(volume, model, stores[1], masked)
    arrays = [bytes_of(store) for store in stores]
    assert [arrays[1].pop(name) for name in left]
    assert arrays[0] == arrays[1]


def test_objects_of_fewer_tiles_are_not_used_for_the_whole(tmp_path, model, volume):
    def stop(progress):
        if progress.stage == "label":
            raise StoppedError

    mask = np.zeros(LARGE, np.uint8)
    mask[:, :200] = 1
    write_stack(tmp_path / "mask.tif", mask)
    masked = dataclasses.replace(OBJECTS, mask=tmp_path / "mask.tif", pyramid=False)
    store = segment(volume, model, tmp_path / "out.zarr", masked)
    assert open_result(store).outputs == OBJECTS.outputs
    with pytest.raises(StoppedError):
        segment(volume, model, store, dataclasses.replace(OBJECTS, pyramid=False), stop)
    assert open_result(store).outputs == ("probabilities", "classes")
    for name in ("instances.tif", "objects.csv"):
        what = name.partition(".")[0]
        with pytest.raises(InputError, match=f"its {what} are not finished"):
            export(store, tmp_path / name, what)
    with pytest.raises(InputError, match="its objects are not finished"):
        evaluate(store, volume, "instances")


# Objects


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"connectivity": 18, "tile": (1, 64, 16)},
        {"connectivity": 26, "tile": (3, 16, 20)},
        {"connect": "slice", "connectivity": 26},
    ],
    ids=str,
)
def test_ids_are_those_of_the_whole_volume(tmp_path, model, volume, rules):
    store = segment(
        volume, model, tmp_path / "out.zarr", dataclasses.replace(OBJECTS, pyramid=False, **rules)
    )
    connection = {name: value for name, value in rules.items() if name != "tile"}
    ids = array(store, "labels/instances/0")
    assert ids.dtype == np.uint64 and ids.max() > 50
    np.testing.assert_array_equal(ids, expected_ids(classes_of(store) != 0, **connection))


@pytest.mark.ray
@pytest.mark.parametrize("pyramid", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_engines_store_the_same_objects(tmp_path, model, volume, pyramid):
    settings = dataclasses.replace(OBJECTS, outputs=("classes", "instances"), pyramid=pyramid)
    local, on_ray = (
        segment(
            volume, model, tmp_path / f"{engine}.zarr", dataclasses.replace(settings, engine=engine)
        )
        for engine in ("local", "ray")
    )
    assert bytes_of(local) == bytes_of(on_ray)


def test_small_and_border_objects_and_holes_are_decided_on_whole_objects(tmp_path, model, volume):
    rules = {"connect": "slice", "connectivity": 26, "pyramid": False}
    rules |= {"min_size": 5, "fill_holes": True, "exclude_border": True}
    store = segment(volume, model, tmp_path / "out.zarr", dataclasses.replace(OBJECTS, **rules))
    mask = classes_of(store) != 0
    in_slice = np.zeros((3, 3, 3), bool)
    in_slice[1] = True
    background, _ = ndimage.label(~mask, in_slice & ndimage.generate_binary_structure(3, 1))
    filled = mask | ~np.isin(background, on_border(background))
    assert filled.sum() > mask.sum()
    labels, _ = ndimage.label(filled, in_slice)
    sizes = np.bincount(labels.ravel())
    kept = (sizes >= 5) & ~np.isin(np.arange(len(sizes)), on_border(labels))
    kept[0] = False
    assert 0 < kept.sum() < len(sizes) - 1
    expected = renumbered(np.where(kept[labels], labels, 0))
    np.testing.assert_array_equal(array(store, "labels/instances/0"), expected)


def on_border(labels):
    """Returns the labels at the faces along y and x."""
    faces = [labels.take(i, axis) for axis in (1, 2) for i in (0, -1)]
    return np.unique(np.concatenate([face.ravel() for face in faces]))


def test_a_tile_that_a_mask_skips_is_no_hole(tmp_path, model, monkeypatch):
    monkeypatch.setattr(run.TileWorker, "predict", thresholded)
    image = np.full((1, 96, 96), 255, np.uint8)
    image[0, 40:70, 60:80] = 0  # reaches the skipped tile
    image[0, 10:12, 10:12] = 0
    mask = np.ones(image.shape, np.uint8)
    mask[0, 32:64, 32:64] = 0
    volume = write_stack(tmp_path / "volume.tif", image)
    rules = {"outputs": ("instances",), "fill_holes": True, "tile": (1, 32, 32)}
    settings = dataclasses.replace(FLOAT32, mask=write_stack(tmp_path / "mask.tif", mask), **rules)
    store = segment(volume, model, tmp_path / "out.zarr", settings)
    expected = (image > 0) & (mask > 0)
    expected[0, 10:12, 10:12] = True
    np.testing.assert_array_equal(array(store, "labels/instances/0"), expected)


def test_ids_by_first_voxel_need_no_order(tmp_path, model, volume, made):
    rules = {"ids": "first-voxel", "pyramid": False}
    store = segment(volume, model, tmp_path / "out.zarr", dataclasses.replace(OBJECTS, **rules))
    dense = array(made / "out.zarr", "labels/instances/0")
    _, first = np.unique(dense, return_index=True)
    expected = np.concatenate([[0], first[1:] + 1])[dense]
    np.testing.assert_array_equal(array(store, "labels/instances/0"), expected)


def test_the_table_equals_regionprops(made):
    store = made / "out.zarr"
    ids = array(store, "labels/instances/0").astype(np.int64)
    table = pq.read_table(store / "objects.parquet")
    properties = ("label", "area", "centroid", "bbox")
    whole = regionprops_table(ids, properties=properties)
    np.testing.assert_array_equal(table["id"], whole["label"])
    np.testing.assert_array_equal(table["voxels"], whole["area"])
    for axis, name in enumerate("zyx"):
        np.testing.assert_allclose(table[f"centroid_{name}"], whole[f"centroid-{axis}"], rtol=1e-12)
        np.testing.assert_array_equal(table[f"start_{name}"], whole[f"bbox-{axis}"])
        np.testing.assert_array_equal(table[f"stop_{name}"], whole[f"bbox-{axis + 3}"])
    numbers = np.arange(1, ids.max() + 1)
    means = ndimage.mean(array(store, "0")[0] / 255, ids, numbers)
    np.testing.assert_allclose(table["mean_probability"], means, rtol=1e-12)
    np.testing.assert_allclose(table["mean_grey_0"], ndimage.mean(noise(LARGE), ids, numbers))


def test_a_threshold_decides_the_class_map_and_the_objects(tmp_path, model, volume):
    settings = dataclasses.replace(OBJECTS, threshold=0.7, pyramid=False)
    store = segment(volume, model, tmp_path / "out.zarr", settings)
    mask = array(store, "0")[0] > 255 * 0.7
    np.testing.assert_array_equal(classes_of(store), mask)
    np.testing.assert_array_equal(array(store, "labels/instances/0"), expected_ids(mask))
    with pytest.raises(InputError, match=r"threshold \(0\.7, now None\)"):
        segment(volume, model, store, dataclasses.replace(settings, threshold=None))


def test_other_rules_are_refused_for_a_finished_store(made, model):
    for changed in ({"connectivity": 26}, {"min_size": 9}, {"ids": "first-voxel"}):
        with pytest.raises(InputError, match=f"objects.{next(iter(changed))}"):
            segment(
                made / "volume.tif",
                model,
                made / "out.zarr",
                dataclasses.replace(OBJECTS, **changed),
            )


@pytest.mark.parametrize("rule", [{"min_size": 9}, {"split": True}, {"connect": "slice"}], ids=str)
def test_rules_without_objects_are_refused(tmp_path, model, volume, rule):
    settings = dataclasses.replace(FLOAT32, **rule)
    for refused in (
        lambda: segment(volume, model, tmp_path / "out.zarr", settings),
        lambda: plan(volume, model, settings),
    ):
        with pytest.raises(InputError, match=f"{next(iter(rule))}=.* add instances to --outputs"):
            refused()
    assert not (tmp_path / "out.zarr").exists()


def test_the_disk_of_objects_in_small_tiles_is_within_the_plan(tmp_path, model, volume):
    settings = dataclasses.replace(OBJECTS, tile=(1, 16, 20), outputs=("instances",))
    store = segment(volume, model, tmp_path / "out.zarr", settings)
    used = sum(512 * path.lstat().st_blocks for path in store.rglob("*"))
    assert used <= plan(volume, model, settings).disk_bytes


def thresholded(worker, tile, voxels):
    """Returns the class map of grey values above 127, in place of the network."""
    plan = worker._run.plan
    starts = zip(plan.context.before, plan.core, strict=True)
    bright = voxels[0][tuple(slice(before, before + n) for before, n in starts)] > 127
    return {"classes": bright.astype(np.uint8)}


@pytest.mark.slow
def test_objects_split_at_their_necks_are_the_same_for_any_tiles(tmp_path, model, monkeypatch):
    monkeypatch.setattr(run.TileWorker, "predict", thresholded)
    rng = np.random.default_rng(0)
    y, x = np.indices((200, 150))
    image = np.zeros((2, 200, 150), np.uint8)
    for z, row, column in zip(rng.integers(0, 2, 60), *rng.integers(0, 200, (2, 60)), strict=True):
        image[z][(y - row) ** 2 + (x - column % 150) ** 2 < 120] = 255
    volume = write_stack(tmp_path / "discs.tif", image)
    rules = {"fill_holes": True, "connect": "slice", "outputs": ("instances",)}

    def ids(name, **chosen):
        settings = dataclasses.replace(FLOAT32, **rules, **chosen)
        return array(segment(volume, model, tmp_path / name, settings), "labels/instances/0")

    split = ids("whole.zarr", split=True, tile=(2, 200, 152))
    np.testing.assert_array_equal(split, ids("tiled.zarr", split=True, tile=(1, 40, 36)))
    joined = ids("joined.zarr", tile=(1, 40, 36))
    assert split.max() > joined.max() + 5
    np.testing.assert_array_equal(split > 0, joined > 0)


@pytest.mark.parametrize("objects", [0, 1])
def test_tiles_without_objects_leave_the_table_valid(tmp_path, model, monkeypatch, objects):
    monkeypatch.setattr(run.TileWorker, "predict", thresholded)
    image = np.zeros((2, 100, 90), np.uint8)
    image[1, 90:95, 80:84] = 200 * objects
    volume = write_stack(tmp_path / "volume.tif", image)
    settings = dataclasses.replace(FLOAT32, outputs=("instances",), tile=(1, 40, 36))
    store = segment(volume, model, tmp_path / "out.zarr", settings)
    table = pq.read_table(store / "objects.parquet").to_pydict()
    assert table["id"] == [1] * objects and table["voxels"] == [20] * objects
    assert table.get("mean_grey_0", []) == [200.0] * objects
    assert verify(store, tiles=0).sound


def test_more_objects_than_memory_are_refused_with_the_remedy(tmp_path, model, monkeypatch):
    monkeypatch.setattr(unions, "WINDOW_BYTES", 1 << 40)
    volume = write_stack(tmp_path / "volume.tif", noise((2, 61, 75)))
    settings = dataclasses.replace(OBJECTS, outputs=("instances",))
    with pytest.raises(QuarantinedError, match=r"need.* --memory \d+MiB or more"):
        segment(volume, model, tmp_path / "out.zarr", settings)
    monkeypatch.undo()
    segment(volume, model, tmp_path / "out.zarr", settings)
    assert verify(tmp_path / "out.zarr", tiles=0).sound


def test_a_plan_states_how_many_objects_fit(tmp_path, model):
    volume = write_stack(tmp_path / "volume.tif", noise((2, 61, 75)))
    few, many = (
        planned(volume, model, dataclasses.replace(OBJECTS, memory=memory)).most_objects
        for memory in (1 << 30, 4 << 30)
    )
    assert 1e6 < few < many / 4
    assert planned(volume, model, FLOAT32).most_objects is None


# Interruption and damage


@pytest.mark.parametrize(
    "stage", [*STAGES[:3], *(pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES[3:])]
)
def test_a_run_stopped_in_any_stage_resumes_to_the_same_bytes(tmp_path, made, model, stage):
    def stop(progress):
        if progress.stage == stage:
            raise StoppedError

    volume = made / "volume.tif"
    with pytest.raises(StoppedError):
        segment(volume, model, tmp_path / "out.zarr", OBJECTS, stop)
    order = ("pyramid-1", "label", "join", "instances", "instances-pyramid-1", "table")
    later = ", ".join(order[order.index(stage) + 1 :])
    notes = [line for line in verify(tmp_path / "out.zarr", 0).notes if "not made" in line]
    assert len(notes) == bool(later) and all(f"tiles: {later};" in line for line in notes)
    segment(volume, model, tmp_path / "out.zarr", OBJECTS)
    assert not any("not made" in line for line in verify(tmp_path / "out.zarr", 0).notes)
    assert bytes_of(tmp_path / "out.zarr") == bytes_of(made / "out.zarr")
    before = state_of(tmp_path / "out.zarr")
    segment(volume, model, tmp_path / "out.zarr", OBJECTS)
    assert state_of(tmp_path / "out.zarr") == before


@pytest.mark.parametrize(
    "name",
    [
        "1/c/0/0/1/0",
        pytest.param("labels/classes/1/c/0/2/0", marks=pytest.mark.slow),
        "labels/instances/0/c/1/3/1",
        pytest.param("labels/instances/1/c/0/1/0", marks=pytest.mark.slow),
        "objects.parquet",
        pytest.param(".unet_ray/objects/labels/5", marks=pytest.mark.slow),
        ".unet_ray/objects/ids/7",
        pytest.param(".unet_ray/objects/rows/3", marks=pytest.mark.slow),
    ],
)
def test_verify_names_and_repairs_damage_of_every_stage(tmp_path, made, model, name):
    shutil.copytree(made, tmp_path / "copy")
    store = tmp_path / "copy" / "out.zarr"
    shutil.copystat(made / "volume.tif", tmp_path / "copy" / "volume.tif")
    data = bytearray((store / name).read_bytes())
    data[len(data) // 2] ^= 1
    (store / name).write_bytes(data)
    report = verify(store, tiles=0)
    assert len(report.damage) == 1 and name.rpartition("/")[0] in report.damage[0]
    (store / name).unlink()
    assert len(verify(store, tiles=0).damage) == 1
    repaired = verify(store, tiles=0, repair=True)
    assert repaired.sound, repaired
    assert bytes_of(store) == bytes_of(made / "out.zarr")
    assert verify(store, tiles=0).sound


@pytest.mark.parametrize("name", ["1/c/0/0/1", "labels/instances/0/c/0/1"])
def test_a_repair_does_not_follow_links_into_another_store(tmp_path, made, name):
    shutil.copytree(made, tmp_path / "copy")
    shutil.copystat(made / "volume.tif", tmp_path / "copy" / "volume.tif")
    store, other = tmp_path / "copy" / "out.zarr", tmp_path / "other.zarr"
    shutil.copytree(store, other)
    shutil.rmtree(store / name)
    (store / name).symlink_to(other / name)
    before = state_of(other)
    report = verify(store, tiles=0, repair=True)
    assert any("cannot be repaired: it is behind a symbolic link" in line for line in report.damage)
    assert state_of(other) == before


@pytest.mark.parametrize("stage", ["pyramid-1", "join", "instances"])
def test_a_stage_with_a_damaged_record_of_its_source_is_made_again(tmp_path, made, model, stage):
    store = tmp_path / "out.zarr"
    shutil.copytree(made / "out.zarr", store)
    (born,) = (store / ".unet_ray/ledger" / stage).glob("*.born")
    born.write_bytes(b"{" + born.read_bytes())
    assert any(f"tiles: {stage};" in line for line in verify(store, tiles=0).notes)
    segment(made / "volume.tif", model, store, OBJECTS)
    assert verify(store, tiles=0).sound
    assert not any("not made" in line for line in verify(store, tiles=0).notes)
    assert bytes_of(store) == bytes_of(made / "out.zarr")


def test_ids_of_another_tile_are_refused_with_a_remedy(tmp_path, made, model):
    store = tmp_path / "out.zarr"
    shutil.copytree(made / "out.zarr", store)
    ids = {n: store / ".unet_ray/objects/ids" / str(n) for n in range(8)}
    other = max(ids, key=lambda n: ids[n].stat().st_size)
    tile = min(ids, key=lambda n: ids[n].stat().st_size)
    shutil.copy(ids[other], ids[tile])
    shutil.rmtree(store / "labels/instances/0/c")
    with pytest.raises(QuarantinedError, match=r"ids for \d+ labels.*verify --repair"):
        segment(made / "volume.tif", model, store, OBJECTS)


def test_a_lost_shard_of_a_later_stage_is_made_again(tmp_path, made, model):
    store = tmp_path / "out.zarr"
    shutil.copytree(made / "out.zarr", store)
    for name in ("1/c/0/0/1/0", "labels/instances/0/c/1/3/1", "objects.parquet"):
        (store / name).unlink()
    segment(made / "volume.tif", model, store, OBJECTS)
    assert bytes_of(store) == bytes_of(made / "out.zarr")
    (store / "objects.parquet").write_bytes(b"")
    segment(made / "volume.tif", model, store, OBJECTS)
    assert bytes_of(store) == bytes_of(made / "out.zarr")


def test_an_overwritten_store_makes_all_stages_again(tmp_path, made, model):
    store = tmp_path / "out.zarr"
    shutil.copytree(made / "out.zarr", store)
    settings = dataclasses.replace(OBJECTS, connectivity=26, overwrite=True)
    segment(made / "volume.tif", model, store, settings)
    np.testing.assert_array_equal(
        array(store, "labels/instances/0"), expected_ids(classes_of(store) != 0, 26)
    )
    for ledger in (store / ".unet_ray/ledger").iterdir():
        assert committed(ledger, len([*ledger.parent.iterdir()])) is not None
    assert verify(store, tiles=0).sound


@pytest.mark.parametrize("rules", [{"shape": 1}, {"connectivity": 7}, [5], "volume"], ids=str)
def test_damaged_rules_of_objects_are_named(tmp_path, made, rules):
    store = tmp_path / "out.zarr"
    shutil.copytree(made / "out.zarr", store)
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"]["unet_ray"]["objects"] = rules
    (store / "zarr.json").write_text(json.dumps(root))
    (damage,) = verify(store, tiles=0).damage
    assert str(store / "zarr.json") in damage and "rules of objects are damaged" in damage
