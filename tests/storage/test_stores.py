"""The result on disk: the layout of OME-Zarr 0.5, one file per tile, checksums, rewrites."""

import errno
import hashlib
import itertools
import json
import os
import zlib
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaozarrs
import zarr
from hypothesis import given
from hypothesis import strategies as st

from unet_ray.errors import DamageError, InputError, RunError
from unet_ray.storage.inspection import inspect, refuse_links, refuse_others
from unet_ray.storage.layout import (
    ARRAYS,
    EVENTS,
    LARGEST_CHUNK,
    LEDGER,
    OBJECTS,
    PRIVATE,
    TABLE,
    StoreLayout,
    array_of,
    chunk_of,
)
from unet_ray.storage.ledger import Ledger, begin
from unet_ray.storage.places import remove_tree
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.shards import Shards
from unet_ray.storage.stores import Store, create_store, remove_deleted
from unet_ray.tiling.pyramid import level_plan
from unet_ray.tiling.tiles import Context, TilePlan

CONTEXT = Context((0, 8, 8), (0, 12, 12), (1, 2, 2))
# Twelve tiles; those at the far faces of every axis are cut.
PLAN = TilePlan((5, 70, 100), (2, 64, 64), CONTEXT, (1, 64, 64))
JSON = {"format": 1, "model": {"sha256": "ab"}, "mean": [0.1, 1e-12], "who": "Müller"}
PROVENANCE = Provenance(JSON)
BOTH = ("probabilities", "classes")


FACTORS = ((1, 2, 2), (2, 4, 4))
LEVELS = [PLAN, *(level_plan(PLAN, factors) for factors in FACTORS)]
COMBINATIONS = [
    outputs
    for number in (1, 2, 3)
    for outputs in itertools.combinations(("probabilities", "classes", "instances"), number)
]


def layout(
    outputs=BOTH,
    voxel_size=(0.05, 0.004, 0.004),
    plan=PLAN,
    class_values=(0, 7, 255),
    factors=(),
):
    return StoreLayout(plan, class_values, outputs, voxel_size, factors)


def ome_of(group):
    """The OME metadata of a group."""
    return json.loads((group / "zarr.json").read_text())["attributes"]["ome"]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "out.zarr"
    create_store(path, layout(), PROVENANCE)
    return path


def predicted(plan=PLAN, seed=0):
    """Random results of each tile: whole cores, even where they extend beyond the volume."""
    rng = np.random.default_rng(seed)
    return [
        {
            "probabilities": rng.integers(0, 256, (2, *plan.core), np.uint8),
            "classes": rng.integers(0, 3, plan.core).astype(np.uint8),
        }
        for _ in range(len(plan))
    ]


def write_all(path, results, numbers=None, outputs=BOTH):
    store = Store(path, outputs)
    for number in range(len(PLAN)) if numbers is None else numbers:
        store.write(PLAN[number], results[number])
    return store


def files(path):
    """The bytes of every file of a store, without the private folder."""
    names = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    return {name: p.read_bytes() for name, p in names.items() if not name.startswith(PRIVATE)}


# The layout.


def test_the_arrays_and_files_of_a_store(path):
    probabilities, classes = (zarr.open_array(path / ARRAYS[name], mode="r") for name in BOTH)
    assert ARRAYS == {
        "probabilities": "0",
        "classes": "labels/classes/0",
        "instances": "labels/instances/0",
    }
    assert probabilities.shape == (2, 5, 70, 100) and classes.shape == (5, 70, 100)
    for array, axes in ((probabilities, "czyx"), (classes, "zyx")):
        assert array.dtype == np.uint8 and array.metadata.zarr_format == 3
        assert array.metadata.dimension_names == tuple(axes)
        assert array.shards[-3:] == PLAN.core and array.chunks[-3:] == chunk_of(PLAN.core)
    assert probabilities.shards[0] == 2 and probabilities.chunks[0] == 1
    assert list(files(path)) == [
        "0/zarr.json",
        "labels/classes/0/zarr.json",
        "labels/classes/zarr.json",
        "labels/zarr.json",
        "zarr.json",
    ]
    assert (path / PRIVATE).is_dir() and not any((path / PRIVATE).iterdir())


def test_the_metadata_of_the_image(path):
    root = json.loads((path / "zarr.json").read_text())
    assert root["zarr_format"] == 3 and root["node_type"] == "group"
    (image,) = root["attributes"]["ome"]["multiscales"]
    assert [axis["name"] for axis in image["axes"]] == ["c", "z", "y", "x"]
    assert [axis["type"] for axis in image["axes"]] == ["channel", "space", "space", "space"]
    assert {axis.get("unit") for axis in image["axes"][1:]} == {"micrometer"}
    (level,) = image["datasets"]
    assert level["path"] == "0"
    assert level["coordinateTransformations"] == [
        {"type": "scale", "scale": [1, 0.05, 0.004, 0.004]}
    ]
    assert len(root["attributes"]["ome"]["omero"]["channels"]) == 2
    label = json.loads((path / "labels/classes/zarr.json").read_text())["attributes"]["ome"]
    properties = label["image-label"]["properties"]
    assert [(p["label-value"], p["value-in-training-labels"]) for p in properties] == [
        (0, 0),
        (1, 7),
        (2, 255),
    ]


def test_an_unknown_voxel_size_has_no_unit(tmp_path):
    create_store(tmp_path / "out.zarr", layout(voxel_size=None), Provenance({}))
    (image,) = zarr.open_group(tmp_path / "out.zarr", mode="r").attrs["ome"]["multiscales"]
    assert image["datasets"][0]["coordinateTransformations"][0]["scale"] == [1, 1, 1, 1]
    assert not any("unit" in axis for axis in image["axes"])


@pytest.mark.parametrize("factors", [(), FACTORS], ids=["one level", "pyramid"])
@pytest.mark.parametrize("voxel_size", [None, (0.05, 0.004, 0.004)])
@pytest.mark.parametrize("outputs", COMBINATIONS, ids="-".join)
def test_the_store_is_valid_ome_zarr(tmp_path, outputs, voxel_size, factors):
    path = tmp_path / "out.zarr"
    create_store(path, layout(outputs, voxel_size, factors=factors), PROVENANCE)
    yaozarrs.validate_zarr_store(path)
    labels = [name for name in outputs if name != "probabilities"]
    if labels:
        yaozarrs.validate_zarr_store(path / "labels")
        assert zarr.open_group(path / "labels", mode="r").attrs["ome"]["labels"] == labels
    for name in labels:
        yaozarrs.validate_zarr_store(path / "labels" / name)


@pytest.mark.parametrize("outputs", COMBINATIONS, ids="-".join)
def test_the_image_at_the_root_is_the_first_output(tmp_path, outputs):
    path = tmp_path / "out.zarr"
    create_store(path, layout(outputs, factors=FACTORS), PROVENANCE)
    (image,) = ome_of(path)["multiscales"]
    assert image["name"] == outputs[0]
    assert "".join(axis["name"] for axis in image["axes"]).removeprefix("c") == "zyx"
    for level, (dataset, plan) in enumerate(zip(image["datasets"], LEVELS, strict=True)):
        assert dataset["path"] == array_of(outputs[0], level)
        array = zarr.open_array(path / dataset["path"], mode="r")
        assert array.shape[-3:] == plan.shape and array.ndim == len(image["axes"])


def test_the_arrays_of_all_levels(tmp_path):
    path = tmp_path / "out.zarr"
    create_store(path, layout([*ARRAYS], factors=FACTORS), PROVENANCE)
    assert [plan.shape for plan in LEVELS] == [PLAN.shape, (5, 35, 50), (3, 18, 25)]
    assert [plan.core for plan in LEVELS] == [PLAN.core, (2, 36, 50), (2, 18, 26)]
    for name, (level, plan) in itertools.product(ARRAYS, enumerate(LEVELS)):
        array = zarr.open_array(path / array_of(name, level), mode="r")
        assert array.dtype == (np.uint64 if name == "instances" else np.uint8)
        assert array.fill_value == 0 and array.shape[-3:] == plan.shape
        assert array.shards[-3:] == plan.core and array.chunks[-3:] == chunk_of(plan.core)
        stored = json.loads((path / array_of(name, level) / "zarr.json").read_text())
        codecs = stored["codecs"][0]["configuration"]["codecs"]
        assert [codec["name"] for codec in codecs] == ["bytes", "zstd", "crc32c"]


@pytest.mark.parametrize("name", ARRAYS)
def test_the_centre_of_a_coarse_voxel_is_the_mean_of_the_centres_that_it_covers(tmp_path, name):
    path, size = tmp_path / "out.zarr", (0.05, 0.004, 0.006)
    create_store(path, layout([*ARRAYS], size, factors=FACTORS), PROVENANCE)
    group = path / ARRAYS[name].removesuffix("0")
    (image,) = ome_of(group)["multiscales"]
    first, *coarse = (dataset["coordinateTransformations"] for dataset in image["datasets"])
    assert [entry["type"] for entry in first] == ["scale"] and first[0]["scale"][-3:] == [*size]
    for factors, (scale, translation) in zip(FACTORS, coarse, strict=True):
        assert (scale["type"], translation["type"]) == ("scale", "translation")
        if name == "probabilities":
            assert (scale["scale"].pop(0), translation["translation"].pop(0)) == (1, 0)
        for axis, (s, f) in enumerate(zip(size, factors, strict=True)):
            third = translation["translation"][axis] + 2 * scale["scale"][axis]
            assert third == pytest.approx(np.mean([s * (2 * f + k) for k in range(f)]))


def test_channels_have_distinct_colours_and_one_alone_is_white(tmp_path):
    for class_values in ((0, 255), (0, 7, 255), range(8)):
        path = tmp_path / f"{len(class_values)}.zarr"
        create_store(path, layout(class_values=class_values), PROVENANCE)
        channels = ome_of(path)["omero"]["channels"]
        assert [c["label"] for c in channels] == [f"label {v}" for v in class_values[1:]]
        assert all(c["window"] == {"min": 0, "max": 255, "start": 0, "end": 255} for c in channels)
        colours = [c["color"] for c in channels]
        assert len({*colours}) == len(colours) and "000000" not in colours
        assert (colours == ["FFFFFF"]) == (len(class_values) == 2)
    label = ome_of(tmp_path / "3.zarr/labels/classes")["image-label"]
    of_labels = [bytes(colour["rgba"][:3]).hex().upper() for colour in label["colors"]]
    assert of_labels[1:] == [c["color"] for c in ome_of(tmp_path / "3.zarr")["omero"]["channels"]]


def test_a_class_map_at_the_root_is_shown_from_black_to_white(tmp_path):
    for class_values in ((0, 255), (0, 7, 255)):
        path = tmp_path / f"{len(class_values)}.zarr"
        create_store(path, layout(["classes"], class_values=class_values), PROVENANCE)
        (channel,) = ome_of(path)["omero"]["channels"]
        largest = len(class_values) - 1
        assert channel["window"] == {"min": 0, "max": largest, "start": 0, "end": largest}
        assert (channel["label"], channel["color"]) == ("classes", "FFFFFF")


def test_instances_name_their_image_and_leave_colours_to_viewers(tmp_path):
    path = tmp_path / "out.zarr"
    create_store(path, layout([*ARRAYS]), PROVENANCE)
    assert ome_of(path / "labels/instances")["image-label"] == {"source": {"image": "../../"}}


def test_the_metadata_of_a_store_without_levels_do_not_change(tmp_path):
    # A run resumes a store only with the same metadata, so older stores need exactly these.
    path = tmp_path / "out.zarr"
    create_store(path, layout(class_values=(0, 255)), PROVENANCE)
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"]
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    channel = {"label": "label 255", "color": "FFFFFF", "window": window, "active": True}
    assert ome_of(path) == {
        "version": "0.5",
        "multiscales": [
            {
                "name": "probabilities",
                "axes": [{"name": "c", "type": "channel"}, *axes],
                "datasets": [dataset_of([1.0, 0.05, 0.004, 0.004])],
            }
        ],
        "omero": {"channels": [channel]},
    }
    assert ome_of(path / "labels") == {"version": "0.5", "labels": ["classes"]}
    assert ome_of(path / "labels/classes") == {
        "version": "0.5",
        "multiscales": [
            {"name": "classes", "axes": axes, "datasets": [dataset_of([0.05, 0.004, 0.004])]}
        ],
        "image-label": {
            "colors": [
                {"label-value": 0, "rgba": [0, 0, 0, 255]},
                {"label-value": 1, "rgba": [86, 180, 233, 255]},
            ],
            "properties": [
                {"label-value": 0, "value-in-training-labels": 0},
                {"label-value": 1, "value-in-training-labels": 255},
            ],
            "source": {"image": "../../"},
        },
    }


def dataset_of(scale):
    """The metadata of level 0."""
    return {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}


cores = st.tuples(st.integers(1, 64), *[st.integers(1, 84).map(lambda k: 16 * k)] * 2)


@given(cores)
def test_chunks_are_halved_shards_small_enough_for_viewers(core):
    chunk = chunk_of(core)
    for whole, part, largest in zip(core, chunk, LARGEST_CHUNK, strict=True):
        parts, rest = divmod(whole, part)
        assert rest == 0 and parts & (parts - 1) == 0
        assert part <= largest or part % 2
        assert parts == 1 or 2 * part > largest


# Tiles.


def test_written_tiles_are_read_back(path):
    results = predicted()
    store = write_all(path, results)
    for name in BOTH:
        whole = store.read(name)[:]
        for tile in PLAN:
            expected = results[tile.index][name][(..., *tile.crop.slices)]
            np.testing.assert_array_equal(whole[(..., *tile.write.slices)], expected)
        np.testing.assert_array_equal(zarr.open_array(path / ARRAYS[name], mode="r")[:], whole)


def test_one_tile_is_one_file_per_output(path):
    results, empty = predicted(), set(files(path))
    store = Store(path, BOTH)
    shards = set()
    for tile in PLAN:
        before = files(path)
        store.write(tile, results[tile.index])
        after = files(path)
        new = {store.shard(name, tile).relative_to(path).as_posix() for name in BOTH}
        assert set(after) - set(before) == new and len(new) == 2
        assert all(after[name] == before[name] for name in before)
        shards |= new
    assert len(shards) == 2 * len(PLAN) and set(files(path)) == empty | shards


def test_tiles_of_every_level_and_dtype_are_read_back(tmp_path):
    path, rng = tmp_path / "out.zarr", np.random.default_rng(0)
    create_store(path, layout([*ARRAYS], factors=FACTORS), PROVENANCE)
    for level, plan in enumerate(LEVELS):
        store = Store(path, [*ARRAYS], level=level)
        store.require_plan(plan)
        assert not store.present(plan).any()
        whole = {
            "probabilities": rng.integers(0, 256, (2, *plan.shape), np.uint8),
            "classes": rng.integers(0, 3, plan.shape).astype(np.uint8),
            "instances": rng.integers(0, 2**64, plan.shape, np.uint64),
        }
        for tile in plan:
            cores = {
                name: np.zeros((*voxels.shape[:-3], *plan.core), voxels.dtype)
                for name, voxels in whole.items()
            }
            for name, core in cores.items():
                core[(..., *tile.crop.slices)] = whole[name][(..., *tile.write.slices)]
            checksum = store.write(tile, cores)
            *bytes_of_maps, ids = (whole[n][(..., *tile.write.slices)].tobytes() for n in whole)
            digests = [hashlib.blake2b(part, digest_size=8).hexdigest() for part in bytes_of_maps]
            halves = ids[: len(ids) // 2], ids[len(ids) // 2 :]
            assert checksum == "".join([*digests, *(f"{zlib.crc32(half):08x}" for half in halves)])
        assert store.present(plan).all()
        for name, voxels in whole.items():
            np.testing.assert_array_equal(store.read(name)[:], voxels)
            for tile in plan:
                part = Shards(store.read(name)).decode(store.shard(name, tile).read_bytes(), tile)
                np.testing.assert_array_equal(part, voxels[(..., *tile.write.slices)])


def test_a_level_or_dtype_that_does_not_match_the_plan_is_refused(tmp_path):
    path = tmp_path / "out.zarr"
    create_store(path, layout([*ARRAYS], factors=FACTORS), PROVENANCE)
    with pytest.raises(RunError, match=r"out\.zarr/1/zarr\.json: does not match the plan"):
        Store(path, [*ARRAYS], level=1).require_plan(PLAN)
    with pytest.raises(RunError, match=r"out\.zarr/3/zarr\.json: is missing or damaged"):
        Store(path, ["probabilities"], level=3)
    metadata = path / "labels/instances/2/zarr.json"
    metadata.write_text(metadata.read_text().replace('"uint64"', '"uint32"'))
    with pytest.raises(RunError, match=f"^{metadata}: does not match the plan"):
        Store(path, ["instances"], level=2).require_plan(LEVELS[2])


def test_a_tile_of_background_is_written(path):
    store, tile = Store(path, BOTH), PLAN[len(PLAN) - 1]
    nothing = {name: np.zeros_like(core) for name, core in predicted()[0].items()}
    for name in BOTH:
        assert not store.shard(name, tile).exists()
    store.write(tile, nothing)
    for name in BOTH:
        # The shard contains voxels, not only an index of missing chunks.
        data = zarr.open_array(path / ARRAYS[name], mode="r")
        index = (
            16 * int(np.prod([s // c for s, c in zip(data.shards, data.chunks, strict=True)])) + 4
        )
        assert store.shard(name, tile).stat().st_size > index


def test_only_the_requested_outputs_are_written(tmp_path):
    path = tmp_path / "out.zarr"
    create_store(path, layout(("classes",)), Provenance({}))
    write_all(path, predicted(), outputs=("classes",))
    assert not (path / "0").exists() and (path / "labels/classes/0/c/2/1/1").is_file()


def test_bytes_do_not_depend_on_order_or_repeats(path, tmp_path):
    results, other = predicted(), tmp_path / "other.zarr"
    create_store(other, layout(), PROVENANCE)
    write_all(path, results)
    write_all(other, results, [*reversed(range(len(PLAN))), 5, 5, 11])
    assert files(other) == files(path)


def test_the_bytes_of_a_tile_do_not_depend_on_earlier_content(path):
    results = predicted()
    write_all(path, predicted(seed=1))
    again = write_all(path, results)
    fresh = path.with_name("fresh.zarr")
    create_store(fresh, layout(), PROVENANCE)
    write_all(fresh, results)
    assert files(path) == files(fresh)
    assert (again.read("classes")[:] == Store(fresh, BOTH).read("classes")[:]).all()


DAMAGES = {
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "index": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "voxels": lambda data: data[:5] + bytes([data[5] ^ 1]) + data[6:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", [0, len(PLAN) - 1], ids=["inner tile", "edge tile"])
def test_a_damaged_shard_is_rewritten(path, number, damage):
    # A rerun must repair any damage by a crash or a bad disk.
    results = predicted()
    write_all(path, results)
    sound = files(path)
    for name in BOTH:
        shard = Store(path, BOTH).shard(name, PLAN[number])
        shard.write_bytes(DAMAGES[damage](shard.read_bytes()))
    Store(path, BOTH).write(PLAN[number], results[number])
    assert files(path) == sound


def test_repeating_a_killed_write_leaves_no_temporary_files(path, monkeypatch):
    results = predicted()
    store = write_all(path, results)
    sound = files(path)

    class Killed(BaseException):
        """Stands for a kill; no code catches it."""

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patched:
        for owner, name in ((Path, "replace"), (Path, "rename"), (os, "replace"), (os, "rename")):
            patched.setattr(owner, name, killed)
        with pytest.raises(Killed):
            store.write(PLAN[3], results[3])
    write_all(path, results)
    assert sorted(files(path)) == sorted(sound)


@pytest.mark.parametrize("name", BOTH)
def test_a_flipped_bit_anywhere_is_detected_by_reading(path, name):
    store = write_all(path, predicted())
    tile = PLAN[5]
    shard = store.shard(name, tile)
    sound = shard.read_bytes()
    where = (..., *tile.write.slices)
    for at in {*range(0, len(sound), len(sound) // 40), len(sound) - 1}:
        damaged = bytearray(sound)
        damaged[at] ^= 0x10
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match="checksum"):
            zarr.open_array(path / ARRAYS[name], mode="r")[where]
    shard.write_bytes(sound)
    zarr.open_array(path / ARRAYS[name], mode="r")[where]


@pytest.mark.parametrize("name", BOTH)
def test_a_shard_that_is_too_large_is_not_read(path, name, monkeypatch):
    store = write_all(path, predicted())
    with open(store.shard(name, PLAN[5]), "ab") as file:
        file.truncate(1 << 30)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    with pytest.raises(DamageError, match=r"it has 1073741824 bytes, but at most"):
        store.decoded(name, PLAN[5])


def test_a_tile_is_on_disk_when_write_returns(path, monkeypatch):
    synced, fsync = [], os.fsync

    def watched(file):
        fsync(file)
        synced.append(os.fstat(file).st_ino)

    monkeypatch.setattr(os, "fsync", watched)
    store = write_all(path, predicted(), [2])
    for name in BOTH:
        shard = store.shard(name, PLAN[2])
        assert {shard.stat().st_ino, shard.parent.stat().st_ino} <= set(synced)


# Interrupted creation and files of other programs.


class KilledError(Exception):
    """Stands for a process that is killed."""


def dying(number):
    """A guard that kills its process when it is entered for time `number`, from 0."""
    calls = itertools.count()

    @contextmanager
    def guard():
        if next(calls) == number:
            raise KilledError
        yield

    return guard


@pytest.mark.parametrize("new", ["a new store", "a recreated store"])
def test_a_creation_killed_at_any_step_leaves_no_store_and_can_be_repeated(tmp_path, new):
    fresh = tmp_path / "fresh.zarr"
    create_store(fresh, layout(("classes",)), PROVENANCE)
    for number in itertools.count():
        path = tmp_path / f"{number}.zarr"
        begin(path / LEDGER, 1)
        if new == "a recreated store":
            create_store(path, layout(), PROVENANCE)
            write_all(path, predicted(), [0, 7])
        try:
            create_store(path, layout(), PROVENANCE, dying(number))
            break
        except KilledError:
            pass
        assert number == 0 or inspect(path).continued() is None
        create_store(path, layout(("classes",)), PROVENANCE)  # removes all remains
        assert files(path) == files(fresh)
        remove_deleted(path)
        assert {file.name for file in (path / PRIVATE).iterdir()} == {"ledger"}
    assert number > 8  # every file, and every step before


@pytest.mark.parametrize("new", ["a new store", "a recreated store"])
def test_a_creation_changes_files_only_inside_its_guard(tmp_path, new):
    path = tmp_path / "out.zarr"
    if new == "a recreated store":
        create_store(path, layout(), PROVENANCE)
        write_all(path, predicted(), [0, 7])
    states = [files(path)]

    @contextmanager
    def guard():
        assert files(path) == states[-1]
        yield
        states.append(files(path))

    create_store(path, layout(), PROVENANCE, guard)
    assert files(path) == states[-1]


def test_late_shards_of_another_run_are_removed_by_the_next_creation(tmp_path):
    path = tmp_path / "out.zarr"
    create_store(path, layout(), PROVENANCE)
    write_all(path, predicted(), [3])  # by a run that has lost its store in the meantime
    (path / "zarr.json").unlink()
    with pytest.raises(InputError, match="not an output of unet-ray"):
        inspect(path).continued()
    begin(path / LEDGER, 2)
    assert inspect(path).continued() is None
    create_store(path, layout(), PROVENANCE)
    assert not [*path.rglob("c")]


def test_an_incomplete_copy_is_not_replaced(path):
    begin(path / LEDGER, 1)
    write_all(path, predicted(), [3])
    with Ledger(path / LEDGER, len(PLAN)) as ledger:
        ledger.commit(3)
    (path / "zarr.json").unlink()
    with pytest.raises(
        InputError, match=r"has no zarr\.json, like an incomplete copy; copy it again"
    ):
        inspect(path).continued()
    remove_tree(path / "0")
    remove_tree(path / "labels")  # as `rm -r OUT.zarr/*` does, which leaves hidden files
    assert inspect(path).continued() is None


OTHERS = {
    "a label image": "labels/nuclei/zarr.json",
    "notes": "notes.txt",
    "notes beside the shards": "0/notes.txt",
    "another level": "1/c/0/0/0",
    "notes among the shards": "0/c/notes.txt",
    "a picture among the shards": "labels/classes/0/c/mine/1/2",
    "a time point": "0/c/1/0/0/0",
    "a level with another name": "01/zarr.json",
    "a label level with another name": "labels/classes/00/zarr.json",
    "a table of others": "table.parquet",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_other_programs_in_a_store_are_not_deleted(path, kind):
    other = path / OTHERS[kind]
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_text("years of work")
    before = files(path)
    for act in (lambda: refuse_others(path), lambda: create_store(path, layout(), Provenance({}))):
        with pytest.raises(
            InputError, match=rf"{other}: is not from unet-ray and would be deleted"
        ):
            act()
    assert files(path) == before


def test_a_store_with_all_outputs_is_recreated_without_remains(tmp_path):
    path = tmp_path / "out.zarr"
    create_store(path, layout(), PROVENANCE)
    small = files(path)
    create_store(path, layout([*ARRAYS], factors=FACTORS), PROVENANCE)
    for level, plan in enumerate(LEVELS):
        cores = {"instances": np.ones(plan.core, np.uint64)}
        Store(path, ["instances"], level=level).write(plan[0], cores)
    (path / TABLE).write_bytes(b"PAR1")
    (path / OBJECTS / "labels").mkdir(parents=True)
    (path / OBJECTS / "labels" / "3").write_bytes(b"of an older run")
    refuse_others(path)
    create_store(path, layout(), PROVENANCE)
    assert files(path) == small and not (path / OBJECTS).exists()


@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("name", ARRAYS)
def test_a_store_with_a_shard_at_any_level_is_not_untouched(tmp_path, name, level):
    path = tmp_path / "out.zarr"
    create_store(path, layout([*ARRAYS], factors=FACTORS), PROVENANCE)
    begin(path / LEDGER, 1)
    assert inspect(path).is_untouched()
    store = Store(path, [name], level=level)
    core = np.zeros((2, *LEVELS[level].core) if name == "probabilities" else LEVELS[level].core)
    store.write(LEVELS[level][0], {name: core.astype(store.read(name).dtype)})
    assert not inspect(path).is_untouched()


@pytest.mark.parametrize("name", ["1", "labels", "labels/instances", "labels/instances/2/c"])
def test_links_in_the_place_of_levels_are_refused(tmp_path, name):
    path, aside = tmp_path / "out.zarr", tmp_path / "aside"
    create_store(path, layout([*ARRAYS], factors=FACTORS), PROVENANCE)
    refuse_links(path, [*ARRAYS])
    aside.mkdir()
    if (path / name).exists():
        remove_tree(path / name)
    (path / name).symlink_to(aside)
    with pytest.raises(InputError, match=f"^{path / name}: is a symbolic link"):
        refuse_links(path, [*ARRAYS])


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY])
def test_a_store_is_recreated_where_folders_cannot_be_moved(path, monkeypatch, code):
    before = files(path)
    write_all(path, predicted(), [0, 3])
    (path / EVENTS).write_text("of an older run")

    def fails(*args):
        raise OSError(code, "no moving here")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fails)
        create_store(path, layout(), PROVENANCE)
    assert files(path) == before and not (path / EVENTS).exists()


def test_a_store_is_recreated_while_old_files_cannot_be_removed(path, monkeypatch):
    before = files(path)
    write_all(path, predicted(), [0, 3])
    with monkeypatch.context() as patched:
        patched.setattr(
            "shutil.rmtree", lambda *args: os.rmdir(path)
        )  # as if a viewer had a file open
        create_store(path, layout(), PROVENANCE)
    assert files(path) == before
    assert {file.name[:8] for file in (path / PRIVATE).iterdir()} == {"deleted-"}
    remove_deleted(path)
    assert not [*(path / PRIVATE).iterdir()]


def test_a_store_with_a_damaged_root_can_be_recreated(path):
    before = files(path)
    (path / "zarr.json").write_text('{"attributes": {')
    with pytest.raises(InputError, match="not an output of unet-ray"):
        create_store(path, layout(), PROVENANCE)
    begin(path / LEDGER, 1)
    create_store(path, layout(), PROVENANCE)
    assert files(path) == before


def test_a_store_is_untouched_until_a_shard_or_a_record_is_written(path):
    assert not inspect(path).is_untouched()  # it has no ledger
    begin(path / LEDGER, 1)
    assert inspect(path).is_untouched()
    write_all(path, predicted(), [3])
    assert not inspect(path).is_untouched()
    create_store(path, layout(), PROVENANCE)
    with Ledger(path / LEDGER, len(PLAN)) as ledger:
        ledger.quarantine(3)
    assert not inspect(path).is_untouched()


@pytest.mark.parametrize("name", ["0", "labels", "0/zarr.json", "zarr.json", ".unet_ray/ledger"])
def test_links_are_never_followed(tmp_path, name):
    path, aside = tmp_path / "out.zarr", tmp_path / "aside"
    aside.mkdir()
    (aside / "zarr.json").write_text("years of work")
    (path / name).parent.mkdir(parents=True)
    (path / name).symlink_to(aside / "zarr.json" if name.endswith("json") else aside)
    with pytest.raises(InputError, match="not an output of unet-ray"):
        create_store(path, layout(), PROVENANCE)
    assert (aside / "zarr.json").read_text() == "years of work"


FOLDERS = ["zarr.json", "0/zarr.json", "labels/instances/3/zarr.json", "objects.parquet"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path, name):
    (tmp_path / "out.zarr" / name).mkdir(parents=True)
    with pytest.raises(InputError, match="not an output of unet-ray"):
        inspect(tmp_path / "out.zarr").continued()


@pytest.mark.parametrize("damage", ["missing", "another plan", "no JSON"])
def test_damaged_metadata_are_named(path, damage):
    file = path / "labels" / "classes" / "0" / "zarr.json"
    if damage == "missing":
        file.unlink()
    elif damage == "no JSON":
        file.write_text("{")
    else:
        file.write_text(file.read_text().replace(str(PLAN.shape[2]), str(PLAN.shape[2] + 1)))
    with pytest.raises(RunError, match=rf"^{file}: .*; repair it with `unet-ray verify --repair`"):
        Store(path, ["classes"]).require_plan(PLAN)


def test_arrays_with_shards_of_another_core_are_refused(path):
    other = TilePlan(PLAN.shape, (2, 64, 128), CONTEXT, (1, 64, 64))
    Store(path, BOTH).require_plan(PLAN)
    with pytest.raises(RunError, match=r"0/zarr\.json: does not match the plan"):
        Store(path, BOTH).require_plan(other)


def test_a_missing_shard_of_a_finished_tile_is_named(path):
    store = write_all(path, predicted(), [3])
    for name in BOTH:
        store.require(name, PLAN[3])
        with pytest.raises(RunError, match=f"^{store.shard(name, PLAN[4])}: is missing, though"):
            store.require(name, PLAN[4])


def test_the_provenance_of_a_store_is_read_back(path):
    assert inspect(path).provenance == PROVENANCE
    assert inspect(path.with_name("none.zarr")).continued() is None


FOREIGN = {
    "photos": {"cat.jpg": "meow"},
    "another image": {"zarr.json": json.dumps({"zarr_format": 3, "attributes": {"ome": {}}})},
    "no attributes": {"zarr.json": json.dumps({"zarr_format": 3})},
    "no group": {"zarr.json": "[]"},
    "no JSON": {"zarr.json": "{"},
    "deep": {"zarr.json": "[" * 200_000},
    "no text": {"zarr.json": b"\xff\xfe"},
    "a word for provenance": {"zarr.json": json.dumps({"attributes": {"unet_ray": "mine"}})},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_folder_is_refused(tmp_path, kind):
    folder = tmp_path / "thesis"
    folder.mkdir()
    for name, content in FOREIGN[kind].items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"thesis: exists and is not an output of unet-ray; .*\.$"):
        inspect(folder).continued()


@pytest.mark.parametrize("content", [b'{"a":' * 10**5, b"[" + b"9" * 6000, b"[]", b"{}", None])
def test_damaged_metadata_of_an_array_are_named(path, content):
    metadata = path / "0/zarr.json"
    metadata.unlink()
    if content is None:
        metadata.symlink_to("/dev/zero")
    else:
        metadata.write_bytes(content)
    with pytest.raises(RunError, match=r"0/zarr\.json: is missing or damaged"):
        Store(path, BOTH)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("plan", "shape", [2**60, 1, 1]),
        ("plan", "shape", [1.5, 1, 1]),
        ("plan", "shape", [10**4000, 1, 1]),
        ("plan", "core", [0, 64, 64]),
        ("plan", "context", {"before": [0], "after": [0], "step": [0]}),
        ("plan", "context", {"before": [0, 0, 0], "after": [0, 0, 0], "step": [0, 0, 0]}),
        ("model", "class_values", ["a", "b"]),
        ("model", "class_values", [0] * 10**6),
        ("model", "class_values", None),
    ],
)
def test_a_hostile_provenance_is_damage(part, key, value):
    parts = {"plan": json.loads(json.dumps(asdict(PLAN))), "model": {"class_values": [0, 7]}}
    assert Provenance(parts).damage("plan", "class_values") == ""
    parts[part] = {**parts[part], key: value}
    damage = Provenance(parts).damage("plan", "class_values")
    assert damage and len(damage) < 400


def test_an_empty_shard_is_not_background(path):
    store, tile = Store(path, BOTH), PLAN[0]
    store.write(tile, predicted()[0])
    store.require("classes", tile)
    shard = store.shard("classes", tile)
    shard.write_bytes(b"")
    with pytest.raises(RunError, match="is empty, though tile 0 was finished"):
        store.require("classes", tile)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(RunError, match="is not a file, though tile 0 was finished"):
        store.require("classes", tile)


def test_an_unreadable_root_does_not_count_as_foreign(path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(errno.EIO, "unreadable")

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(OSError, match="unreadable"):
        refuse_others(path)
    with pytest.raises(InputError, match="unreadable"):
        inspect(path).continued()


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "thesis.doc").write_bytes(b"words")
    with pytest.raises(InputError, match="not an output of unet-ray"):
        inspect(tmp_path / "thesis.doc").continued()
