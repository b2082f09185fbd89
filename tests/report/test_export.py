"""Exported files: the same voxels in other readers, axes, sizes, types, memory, and refusals."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import csv, parquet
from skimage import io

import unet_ray
from tests.helper import anonymous
from unet_ray.errors import DamageError, InputError, RunError
from unet_ray.report import tiff
from unet_ray.report.export import TABLE, export
from unet_ray.storage.layout import LEDGER, StoreLayout, ledger_of
from unet_ray.storage.ledger import Ledger, begin
from unet_ray.storage.places import place_of, write_whole
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.stores import Store, create_store
from unet_ray.storage.written import ONE_TASK, origin_of, source_of
from unet_ray.tiling.tiles import Context, TilePlan

CONTEXT = Context((0, 8, 8), (0, 12, 12), (1, 2, 2))
PLAN = TilePlan((5, 70, 100), (2, 32, 64), CONTEXT, (1, 32, 64))  # cut tiles on every axis
SMALL = TilePlan((1, 4, 6), (1, 4, 4), CONTEXT, (1, 4, 4))
VOXEL_SIZE = (0.05, 0.004, 0.008)
ALL = ("probabilities", "classes", "instances")


def make_store(path, outputs=ALL[:2], values=(0, 7, 255), plan=PLAN, voxel_size=VOXEL_SIZE):
    """Creates a store without any shard; returns its opened arrays."""
    source = {"shape": [1, *plan.shape], "channel": None, "time": 0, "level": 0}
    provenance = Provenance.of(
        model={"sha256": "ab", "class_values": list(values)},
        source={**source, "sampled_sha256": "cd"},
        outputs=outputs,
        plan=plan,
        precision="float32",
        normalisation={},
        device="cpu",
        tta=False,
        nan="error",
        kind={},
    )
    begin(path / LEDGER, 1, provenance.json)
    create_store(path, StoreLayout(plan, values, outputs, voxel_size), provenance)
    return Store(path, outputs)


def commit(path, tiles, plan=PLAN, stage="segment", epoch=1):
    with Ledger(path / ledger_of(stage), len(plan), epoch) as ledger:
        for tile in tiles:
            ledger.commit(tile)


def fill(store, plan=PLAN, largest_id=9, seed=0):
    """Writes all tiles of random voxels; returns the whole arrays by output."""
    rng, whole = np.random.default_rng(seed), {}
    for name in store._arrays:
        shape = store.read(name).shape
        high = {"probabilities": 256, "classes": 3, "instances": min(9, largest_id + 1)}[name]
        whole[name] = rng.integers(0, high, shape).astype(store.read(name).dtype)
    if "instances" in whole:
        whole["instances"][-1, -1, -1] = largest_id
    for tile in range(len(plan)):
        box, results = plan[tile], {}
        for name, voxels in whole.items():
            core = np.zeros((*voxels.shape[:-3], *plan.core), voxels.dtype)
            core[(..., *box.crop.slices)] = voxels[(..., *box.write.slices)]
            results[name] = core
        store.write(box, results)
    commit(store.path, range(len(plan)), plan)
    for stage, tasks in {"instances": plan, "table": ONE_TASK}.items():
        if "instances" in whole:
            source = source_of(store.path, plan)
            begin(store.path / ledger_of(stage), 2, origin_of(stage, source))
            commit(store.path, range(len(tasks)), tasks, stage, epoch=2)
    return whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A store with all outputs, and its arrays. Read-only."""
    path = tmp_path_factory.mktemp("export") / "out.zarr"
    return path, fill(make_store(path, ALL))


def table_of(ids):
    columns = {"id": pyarrow.array(ids, "uint64"), "volume": np.arange(len(ids)) / 3}
    return pyarrow.table({**columns, "border": np.arange(len(ids)) % 2 == 0})


def pages_of(file):
    """The pages of a file in their order, as Pillow reads them."""
    with Image.open(file) as image:
        for number in range(image.n_frames):
            image.seek(number)
            yield np.array(image)


# Voxels


@pytest.mark.parametrize("what", ["probabilities", "classes", "instances"])
def test_other_readers_give_the_stored_voxels(finished, tmp_path, what):
    path, whole = finished
    file = export(path, tmp_path / "a.ome.tif", what)
    expected = whole[what] if what != "probabilities" else whole[what].swapaxes(0, 1)
    for read in (tifffile.imread, io.imread):
        assert read(file).dtype == np.uint8
        np.testing.assert_array_equal(read(file), expected)
    planes = expected.reshape(-1, *PLAN.shape[1:])
    np.testing.assert_array_equal(list(pages_of(file)), planes)
    volume = unet_ray.open_volume(file)
    np.testing.assert_array_equal(np.asarray(volume), whole[what].reshape(-1, *PLAN.shape))
    assert volume.voxel_size == VOXEL_SIZE


@pytest.mark.parametrize("bytes_", [1, 900, 8000, 1 << 16])
def test_small_slabs_reads_and_strips_give_the_same_voxels(finished, tmp_path, monkeypatch, bytes_):
    path, whole = finished
    monkeypatch.setattr(tiff, "SLAB_BYTES", bytes_)
    monkeypatch.setattr(tiff, "READ_BYTES", bytes_)
    monkeypatch.setattr(tiff, "STRIP_BYTES", max(1, bytes_ // 10))
    file = export(path, tmp_path / "a.tif")
    np.testing.assert_array_equal(tifffile.imread(file), whole["probabilities"].swapaxes(0, 1))
    file = export(path, tmp_path / "b.tif", "instances")
    np.testing.assert_array_equal(tifffile.imread(file), whole["instances"])


@given(
    st.integers(1, 3),
    st.tuples(*[st.integers(1, 9)] * 3),
    *[st.integers(1, 9)] * 2,
    st.integers(1, 400),
)
def test_slabs_follow_the_order_of_the_file(channels, shape, chunk_depth, rows, slab_bytes):
    depth, height, width = shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiff, "SLAB_BYTES", slab_bytes)
        slabs = list(tiff._slabs(channels, shape, chunk_depth, rows, 2))
    lines = [
        (z, c, y)
        for channel, box in slabs
        for z in range(box.start[0], box.stop[0])
        for c in range(channels)[channel]
        for y in range(box.start[1], box.stop[1])
    ]
    assert lines == list(np.ndindex(depth, channels, height))
    for channel, box in slabs:
        count = len(range(channels)[channel])
        assert box.shape[1] % rows == 0 or box.stop[1] == height
        assert 2 * count * box.size <= max(slab_bytes, 2 * rows * width)
        assert box.start[0] // chunk_depth == (box.stop[0] - 1) // chunk_depth


def test_floats_are_the_stored_numbers_over_255(finished, tmp_path):
    path, whole = finished
    file = export(path, tmp_path / "a.tif", as_float=True)
    floats = tifffile.imread(file)
    assert floats.dtype == np.float32
    expected = whole["probabilities"].swapaxes(0, 1).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(floats, expected)
    np.testing.assert_array_equal(np.rint(255 * floats.astype(float)), 255 * expected)


def test_two_exports_give_the_same_bytes(finished, tmp_path):
    path, _ = finished
    files = [export(path, tmp_path / name) for name in ("a.tif", "b.TIFF")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_tiles_that_a_mask_left_out_are_zero_and_reported(tmp_path, capsys):
    store = make_store(tmp_path / "out.zarr", ["classes"])
    ones = np.ones(PLAN.core, np.uint8)
    for tile in range(1, len(PLAN)):
        store.write(PLAN[tile], {"classes": ones})
    commit(store.path, range(1, len(PLAN)))
    with Ledger(store.path / LEDGER, len(PLAN), epoch=2) as ledger:
        ledger.skip(np.arange(len(PLAN)) == 0, np.ones(len(PLAN), bool))
    voxels = tifffile.imread(export(store.path, tmp_path / "a.tif"))
    assert "1 of 18 tiles were left out by a mask and count as 0." in capsys.readouterr().err
    assert voxels[PLAN[0].write.slices].max() == 0
    assert voxels.sum() == voxels.size - PLAN[0].write.size


def test_a_store_in_an_object_store_is_exported(tmp_path):
    store = make_store(place_of("memory://export/out.zarr"), ["classes"])
    whole = fill(store)
    np.testing.assert_array_equal(
        tifffile.imread(export(store.path, tmp_path / "a.tif")), whole["classes"]
    )


# Metadata


def test_ome_metadata_have_axes_channels_and_sizes(finished, tmp_path):
    path, _ = finished
    with tifffile.TiffFile(export(path, tmp_path / "a.tif")) as file:
        assert file.is_ome and not file.is_bigtiff and not file.is_imagej
        assert (file.series[0].axes, file.series[0].shape) == ("ZCYX", (5, 2, 70, 100))
        image = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
        resolution = (
            file.pages[0].tags["XResolution"].value,
            file.pages[0].tags["YResolution"].value,
        )
        unit = file.pages[0].tags["ResolutionUnit"].value
    pixels = image["Pixels"]
    # The order of ImageJ's hyperstacks: channels change first, then slices, then frames.
    assert pixels["DimensionOrder"] == "XYCZT"
    assert [pixels[f"Size{axis}"] for axis in "XYZCT"] == [100, 70, 5, 2, 1]
    assert [pixels[f"PhysicalSize{axis}"] for axis in "ZYX"] == list(VOXEL_SIZE)
    assert {pixels[f"PhysicalSize{axis}Unit"] for axis in "ZYX"} == {"µm"}
    assert [channel["Name"] for channel in pixels["Channel"]] == ["label 7", "label 255"]
    assert image["Name"] == "probabilities"
    # The same for programs that read the tags only: pixels per centimetre.
    assert unit == tifffile.RESUNIT.CENTIMETER
    assert [a / b for a, b in resolution] == pytest.approx([1e4 / 0.008, 1e4 / 0.004])


def test_an_unknown_voxel_size_is_not_written(tmp_path):
    store = make_store(tmp_path / "out.zarr", values=(0, 255), voxel_size=None)
    whole = fill(store)
    file = export(store.path, tmp_path / "a.tif")
    with tifffile.TiffFile(file) as opened:
        assert "PhysicalSize" not in opened.ome_metadata
        assert opened.series[0].axes == "ZYX"
    np.testing.assert_array_equal(tifffile.imread(file), whole["probabilities"][0])
    assert unet_ray.open_volume(file).voxel_size is None


def test_a_size_beyond_the_range_of_the_tags_is_in_the_ome_metadata(tmp_path):
    store = make_store(tmp_path / "out.zarr", plan=SMALL, voxel_size=(1e-7,) * 3)
    fill(store, SMALL)
    with tifffile.TiffFile(export(store.path, tmp_path / "a.tif")) as opened:
        assert 'PhysicalSizeX="1e-07"' in opened.ome_metadata
        assert opened.pages[0].tags["ResolutionUnit"].value == tifffile.RESUNIT.NONE


def test_a_single_plane_of_three_columns_is_not_taken_for_colours(tmp_path):
    plan = TilePlan((1, 6, 3), (1, 6, 4), CONTEXT, (1, 6, 4))
    store = make_store(tmp_path / "out.zarr", plan=plan)
    whole = fill(store, plan)
    file = export(store.path, tmp_path / "a.tif")
    with tifffile.TiffFile(file) as opened:
        assert opened.series[0].axes == "CYX" and len(opened.pages) == 2
    np.testing.assert_array_equal(tifffile.imread(file), whole["probabilities"][:, 0])


def test_large_files_are_bigtiff(finished, tmp_path, monkeypatch):
    path, whole = finished
    size = whole["classes"].size + 5 * tiff.PAGE_BYTES
    monkeypatch.setattr(tiff, "LARGEST_TIFF", size - 1)
    file = export(path, tmp_path / "a.tif", "classes")
    with tifffile.TiffFile(file) as opened:
        assert opened.is_bigtiff and opened.is_ome
    np.testing.assert_array_equal(tifffile.imread(file), whole["classes"])
    monkeypatch.setattr(tiff, "LARGEST_TIFF", size)
    with tifffile.TiffFile(export(path, tmp_path / "b.tif", "classes")) as opened:
        assert not opened.is_bigtiff


# Types of labels


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize(
    ("largest", "dtype"),
    [
        (0, "uint8"),
        (255, "uint8"),
        (256, "uint16"),
        (65535, "uint16"),
        (65536, "uint32"),
        (2**32 - 1, "uint32"),
        (2**32, "uint64"),
        (2**64 - 1, "uint64"),
    ],
)
def test_ids_have_the_smallest_type_that_holds_them(tmp_path, largest, dtype, with_table, capsys):
    store = make_store(tmp_path / "out.zarr", ["instances"], plan=SMALL)
    whole = fill(store, SMALL, largest)["instances"]
    if with_table:
        parquet.write_table(table_of([1, largest, 2] if largest else []), store.path / TABLE)
    voxels = tifffile.imread(export(store.path, tmp_path / "a.tif"))
    assert voxels.dtype == dtype
    np.testing.assert_array_equal(voxels.reshape(SMALL.shape), whole)
    assert ("which ImageJ cannot open" in capsys.readouterr().err) == (dtype == "uint64")


def test_an_id_that_the_table_lacks_is_damage(tmp_path):
    store = make_store(tmp_path / "out.zarr", ["instances"], plan=SMALL)
    fill(store, SMALL, 256)
    parquet.write_table(table_of([1, 255]), store.path / TABLE)
    with pytest.raises(DamageError, match=r"labels/instances/0: has the id 256, which the table"):
        export(store.path, tmp_path / "a.tif")
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


# Table


def test_the_table_is_written_as_it_is(tmp_path, monkeypatch):
    store = make_store(tmp_path / "out.zarr", ["instances"], plan=SMALL)
    fill(store, SMALL)
    monkeypatch.setattr("unet_ray.report.export.ROWS", 3)
    for ids in ([*range(1, 8), 2**64 - 1], []):
        table = table_of(ids)
        parquet.write_table(table, store.path / TABLE)
        file = export(store.path, tmp_path / "objects.csv", overwrite=True)
        types = csv.ConvertOptions(column_types=table.schema)
        assert csv.read_csv(file, convert_options=types) == table
    assert file.read_text() == '"id","volume","border"\n'


@pytest.mark.parametrize("damage", ["text", "cut", "column", "type"])
def test_a_damaged_table_is_named(tmp_path, damage):
    store = make_store(tmp_path / "out.zarr", ["instances"], plan=SMALL)
    fill(store, SMALL)
    table = store.path / TABLE
    ids = pyarrow.array(["a"]) if damage == "type" else pyarrow.array([1], "uint64")
    parquet.write_table(pyarrow.table({"x" if damage == "column" else "id": ids}), table)
    if damage in ("text", "cut"):
        table.write_bytes(b"id\n1\n" if damage == "text" else table.read_bytes()[:-9])
        with pytest.raises(DamageError, match=f"^{table}: cannot be read as a table of objects"):
            export(store.path, tmp_path / "objects.csv")
    with pytest.raises(DamageError, match=f"^{table}: cannot be read as a table of objects"):
        export(store.path, tmp_path / "a.tif")
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


# Defaults and refusals


@pytest.mark.parametrize(
    ("outputs", "default"),
    [
        (ALL, "probabilities"),
        (("classes", "instances"), "instances"),
        (("classes",), "classes"),
    ],
)
def test_the_default_is_the_most_useful_output(tmp_path, outputs, default):
    store = make_store(tmp_path / "out.zarr", outputs, (0, 255), SMALL)
    whole = fill(store, SMALL)
    voxels = tifffile.imread(export(store.path, tmp_path / "a.tif"))
    np.testing.assert_array_equal(voxels, whole[default].reshape(voxels.shape))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.png", {}, r"a\.png: must end in \.tif, \.tiff or \.csv"),
        ("a", {}, r"a: must end in"),
        ("a.csv", {"what": "classes"}, r"\.csv does not fit --what classes; .* ends in \.tif"),
        ("a.tif", {"what": "objects"}, r"\.tif does not fit --what objects; .* ends in \.csv"),
        ("a.tif", {"what": "clases"}, r"'clases' must be one of .*did you mean 'classes'"),
        ("a.tif", {"what": "classes", "as_float": True}, r"needs probabilities, not classes"),
        ("a.csv", {}, r"has no objects, only probabilities and instances and classes"),
        ("missing/a.tif", {}, r"its folder does not exist; create .*missing first"),
        ("out.zarr/a.tif", {}, r"is inside the store .*out\.zarr; choose"),
        ("out.zarr/zarr.json/a.tif", {}, r"zarr\.json is a file, not a folder"),
        ("s3://bucket/a.tif", {}, r"s3://bucket/a\.tif: is a URL"),
    ],
)
def test_what_cannot_be_written_is_refused(finished, tmp_path, name, options, message):
    path, _ = finished
    link = tmp_path / "out.zarr"
    link.symlink_to(path)
    file = name if "://" in name else tmp_path / name
    with pytest.raises(InputError, match=message):
        export(path, file, **options)
    assert list(tmp_path.iterdir()) == [link]


def test_an_existing_file_is_kept_without_overwrite(finished, tmp_path):
    path, whole = finished
    file = tmp_path / "a.tif"
    file.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"a\.tif: exists; .*--overwrite"):
        export(path, file)
    assert file.read_bytes() == b"mine"
    export(path, file, "classes", overwrite=True)
    np.testing.assert_array_equal(tifffile.imread(file), whole["classes"])
    folder = tmp_path / "b.tif"
    folder.mkdir()
    with pytest.raises(InputError, match=r"b\.tif: is a folder"):
        export(path, folder, overwrite=True)


def test_a_place_that_is_no_store_is_refused(tmp_path):
    for name, message in (("none.zarr", "does not exist"), ("", "is not an output of segment")):
        with pytest.raises(InputError, match=message):
            export(tmp_path / name, tmp_path / "a.tif")
    store = make_store(tmp_path / "out.zarr", ["classes"], plan=SMALL)
    fill(store, SMALL)
    (store.path / ".unet_ray").rename(tmp_path / "hidden")
    with pytest.raises(InputError, match=r"its folder \.unet_ray is missing, so completeness"):
        export(store.path, tmp_path / "a.tif")


def test_unfinished_tiles_are_refused(tmp_path):
    store = make_store(tmp_path / "out.zarr", ("classes", "instances"))
    commit(store.path, range(10))
    with pytest.raises(InputError, match="8 of 18 tiles of its classes are not done; run the same"):
        export(store.path, tmp_path / "a.tif", "classes")
    commit(store.path, range(10, 18))
    commit(store.path, range(3), stage="instances")
    with pytest.raises(InputError, match="its instances are not finished; run the same"):
        export(store.path, tmp_path / "a.tif")
    parquet.write_table(table_of([1]), store.path / TABLE)
    with pytest.raises(InputError, match="its objects are not finished; run the same"):
        export(store.path, tmp_path / "a.csv")


@pytest.mark.parametrize("damage", ["missing", "empty", "flipped"])
def test_a_damaged_shard_is_named_and_nothing_is_written(tmp_path, damage):
    store = make_store(tmp_path / "out.zarr", ["classes"])
    fill(store)
    shard = store.shard("classes", PLAN[7])
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        flipped = bytes([*content[:20], content[20] ^ 1, *content[21:]])
        shard.write_bytes(b"" if damage == "empty" else flipped)
    with pytest.raises(RunError, match=f"^{shard}: .*unet-ray verify --repair"):
        export(store.path, tmp_path / "a.tif")
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


def test_a_full_disk_is_named_and_leaves_no_file(finished, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError(28, os.strerror(28))

    path, _ = finished
    monkeypatch.setattr(tifffile.TiffWriter, "write", fail)
    with pytest.raises(OSError, match="No space left") as full:
        export(path, tmp_path / "a.tif")
    assert full.value.filename == str(tmp_path / "a.tif")
    assert list(tmp_path.iterdir()) == []


# Processes

LARGE = TilePlan((16, 4096, 4096), (16, 512, 512), CONTEXT, (1, 512, 512))
GIBIBYTE = 1 << 30


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A store of 256 Mi voxels, in which all shards have the same bytes."""
    path = tmp_path_factory.mktemp("large") / "out.zarr"
    store = make_store(path, ["probabilities"], (0, 255), LARGE)
    voxels = np.full((1, *LARGE.core), 99, np.uint8)
    shard = store.encoded("probabilities", LARGE[0], voxels)
    for tile in range(len(LARGE)):
        write_whole(store.shard("probabilities", LARGE[tile]), shard)
    commit(path, range(len(LARGE)), LARGE)
    return path


def start(*arguments):
    """Starts an export in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "unet_ray", "export", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell may have started the tests in the background, where Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded(large, tmp_path):
    file, peak = tmp_path / "a.ome.tif", 0
    with start(large, file, "--float") as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.01)
    assert process.returncode == 0
    with tifffile.TiffFile(file) as opened:
        assert opened.series[0].nbytes == GIBIBYTE
        assert (opened.pages[15].asarray() == np.float32(99) / np.float32(255)).all()
    print(f"peak {peak >> 20} MiB")
    assert 0 < peak < 300 << 20


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_killed_export_leaves_no_file(large, tmp_path, name):
    file = tmp_path / "a.ome.tif"
    file.write_bytes(b"before")
    with start(large, file, "--float", "--overwrite") as process:
        while not any(part.stat().st_size for part in tmp_path.glob(".*.partial")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=60)
    assert out == "" and "Traceback" not in err
    assert file.read_bytes() == b"before"
    if name == "SIGINT":
        assert process.returncode == 130
        last = err.splitlines()[-1]
        assert last.startswith("unet-ray: Interrupted. ") and "is not written" in last
        assert list(tmp_path.iterdir()) == [file]


def test_the_command_prints_the_path_and_shows_progress(tmp_path):
    store = make_store(tmp_path / "out.zarr", ["classes"])
    whole, file = fill(store), tmp_path / "classes.tif"
    with start(store.path, file, "--what", "classes") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == f"{file}\n" and err.splitlines()[-1] == "export: 5/5"
    np.testing.assert_array_equal(tifffile.imread(file), whole["classes"])


def test_the_function_is_the_command(finished, tmp_path):
    path, _ = finished
    file = unet_ray.export(path, tmp_path / "a.tif", float=True, progress=False)
    other = export(path, tmp_path / "b.tif", "probabilities", as_float=True)
    assert file.read_bytes() == other.read_bytes()
