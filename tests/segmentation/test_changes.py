"""Inputs, models and stores that change between two runs, or while a run goes on."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import tifffile
import zarr

from tests.helper import (
    TILED,
    StoppedError,
    bytes_of,
    classes_of,
    noise,
    random_model,
    stop_after,
    write_stack,
)
from unet_ray.errors import ChangedError, InputError, RunError
from unet_ray.segmentation import execution, preparation
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.verification import verify
from unet_ray.storage.events import read_events
from unet_ray.storage.layout import EVENTS, LEDGER, marks_of
from unet_ray.storage.ledger import begin, checksums
from unet_ray.storage.marks import Mark, Marks
from unet_ray.volumes import ome_zarr
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume

IMAGE, OTHER = noise((3, 61, 75)), noise((3, 61, 75), seed=1)
ENGINES = ["local", pytest.param("ray", marks=pytest.mark.ray)]
SLOW_ON_RAY = ["local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]


@pytest.fixture
def model(tmp_path):
    return random_model(tmp_path / "model.safetensors")


def write_folder(path, image):
    path.mkdir(exist_ok=True)
    for z, plane in enumerate(image):
        tifffile.imwrite(path / f"{z}.tif", plane)
    return path


def write_zarr(path, image):
    zarr.create_array(path, data=image, chunks=(1, 32, 40), overwrite=True)
    return path


WRITERS = {"tiff": write_stack, "folder": write_folder, "zarr": write_zarr}
LAST_FILE = {"tiff": "", "folder": "2.tif", "zarr": "c/2/1/1"}  # which the last tiles read


@pytest.fixture(params=[*WRITERS])
def kind(request):
    return request.param


@pytest.fixture
def source(tmp_path, kind):
    return WRITERS[kind](tmp_path / "volume", IMAGE)


@pytest.fixture
def file(source, kind):
    return source / LAST_FILE[kind]


def replace_file(file, kind, folder, how="new"):
    """Replaces a file of the input by one of another image; returns a function that undoes it.

    Args:
        file: the file.
        kind: of the input.
        folder: for the other image and the replaced file.
        how: ``new`` or ``old``: modification time of the file in its place; or ``gone``: none.
    """
    other = WRITERS[kind](folder / "other", OTHER) / LAST_FILE[kind]
    kept = folder / "kept"
    shutil.move(file, kept)
    if how != "gone":
        shutil.copyfile(other, file)
    if how == "old":
        os.utime(file, ns=(1, 1))
    return lambda: os.replace(kept, file)


# While a run goes on


@pytest.mark.parametrize("engine", SLOW_ON_RAY)
def test_a_model_that_is_replaced_stops_the_run(tmp_path, model, engine, request):
    if engine == "ray":
        request.getfixturevalue("local_ray")
    source = write_stack(tmp_path / "volume.tif", IMAGE)
    settings = dataclasses.replace(TILED, engine=engine)
    run = preparation.prepare(source, model, tmp_path / "out.zarr", settings)
    random_model(model, seed=1)
    with pytest.raises(ChangedError, match=r"model\.safetensors has changed since this run began"):
        execution.execute(run, settings, print)
    assert not checksums(run.out / LEDGER, len(run.plan)).any()
    random_model(model)
    assert verify(segment(source, model, run.out, settings), tiles=0).tiles == 24
    assert checksums(run.out / LEDGER, len(run.plan)).any(axis=1).all()


@pytest.mark.parametrize(
    "kind, how", [(k, h) for k in WRITERS for h in ("new", "old")] + [("zarr", "gone")]
)
def test_an_input_that_is_replaced_stops_the_run(tmp_path, model, source, file, kind, how):
    whole = bytes_of(segment(source, model, tmp_path / "whole.zarr", TILED))
    undo = []

    def watch(progress):
        if progress.done == 4 and not undo:
            undo.append(replace_file(file, kind, tmp_path, how))

    settings = dataclasses.replace(TILED, workers=1)
    out = tmp_path / "out.zarr"
    with pytest.raises(ChangedError, match=f"tile [0-9]+ .*{file} has changed") as caught:
        segment(source, model, out, settings, watch)
    assert str(caught.value).startswith(f"{out}: ")
    with pytest.raises(InputError, match=r"was made with another input\."):
        segment(source, model, out, settings)
    undo[0]()
    assert bytes_of(segment(source, model, out, settings)) == whole


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_new_worker_compares_its_input(tmp_path, model, source, file, kind):
    settings = dataclasses.replace(TILED, engine="ray")
    run = preparation.prepare(source, model, tmp_path / "out.zarr", settings)
    replace_file(file, kind, tmp_path)
    with pytest.raises(RunError, match="has changed since this run began"):
        execution.execute(run, settings, print)
    assert not verify(run.out, tiles=0).sound or verify(run.out, tiles=0).tiles < 24


def test_a_file_that_is_replaced_before_it_is_pinned_is_opened_again(tmp_path, model, monkeypatch):
    source = write_stack(tmp_path / "volume.tif", IMAGE)
    other = tmp_path / "other.tif"
    write_stack(other, OTHER, description="voxels start at another offset " * 9)
    whole = classes_of(segment(other, model, tmp_path / "whole.zarr", TILED))
    pin = Volume.pin

    def late(volume):
        os.replace(other, source)
        pin(volume)

    monkeypatch.setattr(Volume, "pin", late)
    out = segment(source, model, tmp_path / "out.zarr", TILED)
    np.testing.assert_array_equal(classes_of(out), whole)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_slice_that_is_added_stops_new_workers(tmp_path, model):
    source = write_folder(tmp_path / "volume", IMAGE)
    settings = dataclasses.replace(TILED, engine="ray")
    run = preparation.prepare(source, model, tmp_path / "out.zarr", settings)
    tifffile.imwrite(source / "3.tif", IMAGE[0])
    with pytest.raises(ChangedError, match="has changed since it was opened: it had 3 slices"):
        execution.execute(run, settings, print)


def test_an_older_file_that_replaces_a_slice_is_a_change(tmp_path):
    source = write_folder(tmp_path / "volume", IMAGE)
    volume = open_volume(source)
    volume.pin()
    (source / "other.tif").write_bytes((source / "1.tif").read_bytes())
    os.utime(source / "other.tif", (1, 1))
    os.replace(source / "other.tif", source / "1.tif")
    with pytest.raises(ChangedError, match=r"1\.tif has changed"):
        np.asarray(volume)


def test_an_array_that_is_removed_has_changed(tmp_path):
    source = write_zarr(tmp_path / "volume.zarr", IMAGE)
    volume = open_volume(source)
    volume.pin()
    np.asarray(volume)
    shutil.rmtree(source)
    with pytest.raises(ChangedError, match="has changed since this run began"):
        volume.refuse_changes()


@pytest.mark.parametrize("how", ["changed", "removed"])
def test_a_change_after_the_last_read_stops_the_run_before_its_end(
    tmp_path, model, source, file, kind, how
):
    def watch(progress):
        if progress.done == 24:
            replace_file(file, kind, tmp_path) if how == "changed" else file.unlink()

    out = tmp_path / "out.zarr"
    with pytest.raises(ChangedError, match=f"{source} has changed since this run began"):
        segment(source, model, out, TILED, watch)
    assert "end" not in {event["event"] for event in read_events(out / EVENTS)}


# Between two runs


@pytest.mark.parametrize("finished", [False, True])
def test_a_rewritten_chunk_is_another_input(tmp_path, model, finished):
    source = tmp_path / "volume.zarr"
    zarr.create_array(source, data=IMAGE, chunks=(1, 8, 8))
    out, settings = tmp_path / "out.zarr", TILED
    if finished:
        segment(source, model, out, settings)
    else:
        preparation.prepare(source, model, out, settings)
        with pytest.raises(ZeroDivisionError):
            segment(source, model, out, settings, lambda progress: 1 // 0)
    chunk = source / "c/1/3/4"
    content = chunk.read_bytes()
    chunk.write_bytes(content)  # the size is the same, and no sample of voxels contains it
    with pytest.raises(InputError, match=r"another input\.modified_ns"):
        segment(source, model, out, settings)


def test_chunks_of_other_time_points_do_not_matter(tmp_path):
    source = tmp_path / "volume.zarr"
    zarr.create_array(source, data=np.stack([IMAGE[None], OTHER[None]]), chunks=(1, 1, 1, 32, 40))
    before = open_volume(source, time=1).identity()
    chunk = source / "c/0/0/1/0/0"
    chunk.write_bytes(chunk.read_bytes())
    assert open_volume(source, time=1).identity() == before
    assert open_volume(source, time=0).identity()["modified_ns"] > before["modified_ns"]


def test_a_sample_of_many_chunks_contains_the_first_and_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(ome_zarr, "LISTED_CHUNKS", 10)
    monkeypatch.setattr(ome_zarr, "SAMPLED_CHUNKS", 3)
    source = write_zarr(tmp_path / "volume.zarr", IMAGE)  # 3 x 2 x 2 chunks

    def changes(name):
        before = open_volume(source).identity()["files_sha256"]
        os.utime(source / "c" / name, ns=(1, 1))
        return open_volume(source).identity()["files_sha256"] != before

    assert [changes(name) for name in ("0/0/0", "0/0/1", "2/1/1")] == [True, False, True]


def test_a_model_that_is_replaced_while_a_run_is_prepared_is_not_mixed(
    tmp_path, model, monkeypatch
):
    source = write_stack(tmp_path / "volume.tif", IMAGE)
    measure = preparation.measure

    def replaces_model(volume):
        random_model(model, seed=1)
        return measure(volume)

    monkeypatch.setattr(preparation, "measure", replaces_model)
    with pytest.raises(RunError, match="has changed since this run began"):
        segment(source, model, tmp_path / "out.zarr", TILED)


# Stores with deleted files


def test_lost_shards_of_a_finished_store_are_computed_again(tmp_path, task, capsys):
    source, model, whole = task
    out = tmp_path / "out.zarr"
    shutil.copytree(whole, out)
    (out / "0/c/0/1/0/2").unlink()
    (out / "labels/classes/0/c/2/1/3").unlink()
    shutil.rmtree(out / "0/c/0/0/1")
    segment(source, model, out, TILED)
    assert "committed tiles without a shard are computed again: 6." in capsys.readouterr().err
    assert bytes_of(out) == bytes_of(whole)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    segment(source, model, out, TILED)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    "name",
    ["0/zarr.json", "labels/zarr.json", "labels/classes/zarr.json", "labels/classes/0/zarr.json"],
)
def test_a_finished_store_without_metadata_is_refused(tmp_path, task, name):
    source, model, whole = task
    out = tmp_path / "out.zarr"
    shutil.copytree(whole, out)
    (out / name).unlink()
    with pytest.raises(RunError, match=f"{out / name}: is missing.*--repair"):
        segment(source, model, out, TILED)
    assert verify(out, tiles=0, repair=True).sound
    assert bytes_of(out) == bytes_of(whole)


def test_an_empty_shard_is_computed_again(tmp_path, task):
    source, model, whole = task
    out = tmp_path / "out.zarr"
    shutil.copytree(whole, out)
    (out / "0/c/0/1/0/2").write_bytes(b"")
    segment(source, model, out, TILED)
    assert bytes_of(out) == bytes_of(whole)


def test_a_marked_tile_without_its_shard_is_computed(tmp_path, task):
    source, model, whole = task
    out = tmp_path / "out.zarr"
    shutil.copytree(whole, out)
    for ledger_segment in (out / LEDGER).glob("*.committed"):
        ledger_segment.unlink()
    (out / marks_of("segment") / "1").mkdir(parents=True, exist_ok=True)
    for tile in range(24):
        Marks(out / marks_of("segment") / "1" / "0").add(Mark(tile, "done"))
    (out / "0/c/0/1/0/2").unlink()
    segment(source, model, out, TILED)
    assert bytes_of(out) == bytes_of(whole)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
        {"fill_value": 7},
        {"codecs": []},
    ],
    ids=lambda change: next(iter(change)),
)
def test_edited_metadata_of_an_array_are_refused(tmp_path, task, change, finished):
    source, model, whole = task
    out = tmp_path / "out.zarr"
    if finished:
        shutil.copytree(whole, out)
    else:
        with pytest.raises(StoppedError):
            segment(source, model, out, TILED, stop_after(4))
    path = out / "0/zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match=rf"{path}: (differs in '{next(iter(change))}'|is missing)"):
        segment(source, model, out, TILED)
    assert verify(out, tiles=0, repair=True).sound
    assert bytes_of(segment(source, model, out, TILED)) == bytes_of(whole)


def test_an_overwrite_that_was_killed_at_its_start_is_no_edit(tmp_path, task):
    source, model, whole = task
    out = tmp_path / "out.zarr"
    shutil.copytree(whole, out)
    begin(out / LEDGER, 5, {"model": "another"})
    before = bytes_of(out)
    with pytest.raises(InputError, match="--overwrite was interrupted"):
        segment(source, model, out, TILED)
    assert bytes_of(out) == before
    segment(source, model, out, dataclasses.replace(TILED, overwrite=True))
    assert bytes_of(out) == bytes_of(whole)
    assert verify(out, tiles=0).sound


def test_segment_refuses_an_edited_provenance(tmp_path, task):
    source, _, whole = task
    out = tmp_path / "out.zarr"
    shutil.copytree(whole, out)
    root = json.loads((out / "zarr.json").read_text())
    other = random_model(tmp_path / "other.safetensors", seed=1)
    run = preparation.prepare(source, other, tmp_path / "new.zarr", TILED)
    root["attributes"]["unet_ray"]["model"] = run.provenance.json["model"]
    (out / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(InputError, match=r"zarr\.json: its model\.sha256 was changed from"):
        segment(source, other, out, TILED)


def test_a_damaged_record_of_the_provenance_is_named(tmp_path, task):
    source, model, whole = task
    out = tmp_path / "out.zarr"
    shutil.copytree(whole, out)
    (record,) = (out / LEDGER).glob("*.born")
    content = record.read_bytes()
    for damaged in (content[:-9], content.replace(b"float32", b"float64"), b"[" * 10**5, b"7"):
        record.write_bytes(damaged)
        assert verify(out, tiles=0).damage[0].startswith(f"{record}: is damaged")
        with pytest.raises(InputError, match=f"{record}: is damaged.*--overwrite"):
            segment(source, model, out, TILED)
