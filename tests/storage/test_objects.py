"""Outputs and inputs in an object store: the same bytes as on a disk, and nothing is lost."""

import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.helper import TILED, bytes_of, noise, write_stack
from unet_ray.errors import InputError, LostError, QuarantinedError, RunError
from unet_ray.report.page import write_report
from unet_ray.scores.evaluation import evaluate
from unet_ray.segmentation import execution, preparation, repair
from unet_ray.segmentation import run as run_module
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.verification import verify
from unet_ray.storage.events import read_events
from unet_ray.storage.inspection import inspect
from unet_ray.storage.layout import ARRAYS, EVENTS, LEDGER, OBJECTS, PRIVATE, TABLE, StoreLayout
from unet_ray.storage.lease import Fence, Lease
from unet_ray.storage.ledger import begin, committed
from unet_ray.storage.objects import ObjectPath
from unet_ray.storage.places import place_of
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.stores import Store, create_store
from unet_ray.storage.swap import refuse_unconditional
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.pyramid import NO_CONTEXT
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.opening import open_volume

ROOT = Path(__file__).parents[2]
OUT = "s3://bucket/lab/out.zarr"
TILES = 24
# A disk, and each server of a bucket.
PLACES = [("out.zarr", "ours"), (OUT, "ours"), (OUT, "moto")]


def stored(bucket, out=OUT):
    """The objects of a store by name, without the private ones, which differ between runs."""
    prefix = out.removeprefix("s3://bucket/") + "/"
    objects = {key.removeprefix(prefix): content for key, content in bucket.objects.items()}
    return {n: content[0] for n, content in objects.items() if not n.startswith(PRIVATE)}


def key(name, out=OUT):
    return f"{out.removeprefix('s3://bucket/')}/{name}"


def process(task, bucket, *flags, out=OUT):
    """The command in a separate process, one tile at a time."""
    volume, model, _ = task
    fixed = "--tile 1,32,20 --precision float32 --workers 1"
    return subprocess.Popen(
        [
            *[sys.executable, "-m", "unet_ray", "segment", volume, "--model", model, "--out", out],
            *fixed.split(),
            *flags,
        ],
        env={**os.environ, **bucket.environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_bucket_has_the_same_bytes_as_a_disk_and_a_finished_run_does_nothing(task, bucket):
    volume, model, whole = task
    assert segment(volume, model, OUT, TILED) == place_of(OUT)
    assert stored(bucket) == bytes_of(whole)
    assert len([*read_events(place_of(OUT) / EVENTS)]) == TILES + 2
    before = bucket.puts.copy()
    segment(volume, model, OUT, TILED)
    assert bucket.puts == before


@pytest.mark.slow
@pytest.mark.ray
def test_ray_writes_the_same_bytes_to_a_bucket(task, bucket):
    with process(task, bucket, "--engine", "ray") as started:
        out, err = started.communicate(timeout=120)
    assert (started.returncode, out) == (0, f"{OUT}\n"), err
    assert stored(bucket) == bytes_of(task[2])
    assert not [name for name in bucket.objects if f"{PRIVATE}/marks" in name]


@pytest.mark.parametrize(
    ("bucket", "number"), [("ours", 3), ("ours", 11), ("moto", 3)], indirect=["bucket"]
)
def test_a_killed_run_resumes_and_writes_nothing_twice(task, bucket, number):
    volume, model, whole = task
    with process(task, bucket) as started:
        while sum("/0/c/" in name for name in [*bucket.objects]) < number:
            assert started.poll() is None, started.stderr.read()
            time.sleep(0.002)
        started.send_signal(signal.SIGKILL)
    done = np.flatnonzero(committed(place_of(OUT) / LEDGER, TILES))
    before = bucket.puts.copy()
    segment(volume, model, OUT, TILED)
    assert stored(bucket) == bytes_of(whole)
    store = Store(place_of(OUT), ["probabilities", "classes"])
    plan = preparation.prepare(volume, model, OUT, TILED).plan
    for name in ("probabilities", "classes"):
        for tile in done:
            shard = store.shard(name, plan[int(tile)]).key
            assert bucket.puts[shard] == before[shard] == 1


def test_a_second_run_is_refused_until_the_first_has_ended(task, bucket):
    volume, model, whole = task
    with process(task, bucket) as started:
        while key(f"{PRIVATE}/lease.json") not in bucket.objects:
            assert started.poll() is None, started.stderr.read()
            time.sleep(0.002)
        started.send_signal(signal.SIGSTOP)
        with pytest.raises(InputError, match=f"process {started.pid} on .* is writing here"):
            segment(volume, model, OUT, TILED)
        started.kill()
    segment(volume, model, OUT, TILED)
    assert stored(bucket) == bytes_of(whole)


def test_a_run_that_is_forced_out_stops(bucket, monkeypatch):
    monkeypatch.setattr("unet_ray.storage.lease.CHECK_SECONDS", 0)
    private = place_of(OUT) / PRIVATE
    notices = []
    with Lease(private) as first:
        first.check()
        with Lease(private, takeover=True, notify=notices.append) as second:
            assert (first.epoch, second.epoch) == (1, 2)
            with pytest.raises(RunError, match="has taken it over"):
                first.check()
    assert "--takeover" in notices[0]
    with Lease(private) as third:
        assert third.epoch == 3


def test_a_lost_response_of_a_put_does_not_refuse_the_lease(faulty):
    private = place_of(OUT) / PRIVATE
    with Lease(private):
        pass
    probe = ObjectPath.put_if

    def losing(path, data, tag):
        faulty.lost = 1 if path.name == "lease.json" else 0
        return probe(path, data, tag)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectPath, "put_if", losing)
        with Lease(private) as lease:
            lease.check()
            assert lease.epoch == 2


@pytest.mark.parametrize("number", range(4))
def test_a_lost_response_during_the_test_of_a_store_does_not_refuse_it(faulty, number):
    probe, calls = ObjectPath.put_if, itertools.count()

    def losing(path, data, tag):
        faulty.lost = 1 if next(calls) == number else 0
        return probe(path, data, tag)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectPath, "put_if", losing)
        refuse_unconditional(place_of(OUT))


def test_a_conditional_put_sends_tag_and_version(monkeypatch):
    """Google's stores identify an object by its version, which the test server lacks."""
    modes = []

    def put(store, key, data, mode):
        modes.append(mode)
        return {"e_tag": '"a"', "version": "17"}

    monkeypatch.setattr("obstore.put", put)
    place = ObjectPath("memory://", "x")
    assert place.put_if(b"", place.put_if(b"", None)) is not None
    assert modes == ["create", {"e_tag": '"a"', "version": "17"}]


def test_a_store_without_conditional_puts_is_refused_before_anything_is_written(task, faulty):
    volume, model, _ = task
    faulty.deaf = True
    with pytest.raises(InputError, match="does not honour conditional puts"):
        segment(volume, model, OUT, TILED)
    assert faulty.objects == {}


@pytest.mark.parametrize(("how", "words"), [("denied", "access denied"), ("full", "507")])
def test_a_full_or_read_only_store_ends_the_run_at_once(task, faulty, how, words):
    volume, model, whole = task
    setattr(faulty, how, "/0/c/0/1")
    with pytest.raises(RunError, match=rf"{words} .* tiles are done and stay"):
        segment(volume, model, OUT, dataclasses.replace(TILED, workers=1))
    assert len([e for e in read_events(place_of(OUT) / EVENTS) if e["event"] == "failed"]) == 1
    setattr(faulty, how, None)
    segment(volume, model, OUT, TILED)
    assert stored(faulty) == bytes_of(whole)


def test_a_store_that_denies_access_is_refused(task, faulty):
    volume, model, _ = task
    faulty.denied = "."
    with pytest.raises(InputError, match=r"cannot be used .*AWS_ACCESS_KEY_ID"):
        segment(volume, model, OUT, TILED)


def test_the_next_run_retries_a_quarantined_tile(task, bucket, monkeypatch):
    volume, model, whole = task
    with monkeypatch.context() as failing:
        predict = run_module.TileWorker.predict
        failing.setattr(
            run_module.TileWorker,
            "predict",
            lambda worker, tile, voxels: predict(worker, tile, voxels if tile != 7 else None),
        )
        with pytest.raises(QuarantinedError, match="1 of 24 tiles"):
            segment(volume, model, OUT, TILED)
    segment(volume, model, OUT, TILED)
    assert stored(bucket) == bytes_of(whole)


def test_overwriting_leaves_nothing_of_the_old_store(task, bucket):
    volume, model, whole = task
    other = dataclasses.replace(TILED, tile=(1, 64, 76))
    segment(volume, model, OUT, other)
    with pytest.raises(InputError, match=r"another plan\.core"):
        segment(volume, model, OUT, TILED)
    segment(volume, model, OUT, dataclasses.replace(TILED, overwrite=True))
    assert stored(bucket) == bytes_of(whole)


def test_a_run_recreates_a_store_whose_creation_was_killed(task, bucket):
    volume, model, whole = task
    segment(volume, model, OUT, TILED)
    names = "0/zarr.json", "lease.json", ".born", "00000001.committed"
    remains = {k: v for k, v in bucket.objects.items() if k.endswith(names)}
    bucket.objects.clear()
    bucket.objects.update(remains)
    segment(volume, model, OUT, TILED)
    assert stored(bucket) == bytes_of(whole)


@pytest.mark.parametrize(("out", "bucket"), PLACES, indirect=["bucket"])
def test_two_runs_that_create_one_store_are_ordered_by_the_lease(
    task, bucket, tmp_path, monkeypatch, out
):
    volume, model, _ = task
    monkeypatch.chdir(tmp_path)
    late = preparation.prepare(volume, model, out, TILED)
    early = preparation.prepare(volume, model, out, TILED)
    execution.execute(early, TILED, print)
    assert execution.execute(late, TILED, print) == 0
    other = dataclasses.replace(TILED, nan="zero")
    with pytest.raises(InputError, match=r"another nan"):
        preparation.prepare(volume, model, out, other)


@pytest.mark.parametrize("name", ["thesis.tex", "0/c/0/0/0/0", "zarr.json"])
def test_files_of_other_programs_are_not_changed(task, bucket, name):
    volume, model, _ = task
    bucket.put(key(name), b"years of work", None, None)
    for overwrite in (False, True):
        settings = dataclasses.replace(TILED, overwrite=overwrite)
        with pytest.raises(InputError, match="exists"):
            segment(volume, model, OUT, settings)
        assert [*bucket.objects] == [key(name)]


def test_verify_names_and_repairs_damaged_objects(task, bucket):
    volume, model, whole = task
    segment(volume, model, OUT, TILED)
    flipped, gone = key("0/c/0/1/1/1"), key("labels/classes/0/c/2/0/0")
    data, tag, when = bucket.objects[flipped]
    bucket.objects[flipped] = bytes([*data[:-30], data[-30] ^ 4, *data[-29:]]), tag, when
    del bucket.objects[gone]
    bucket.objects.pop(key("labels/zarr.json"))
    bucket.put(key("0/notes.txt"), b"", None, None)
    verdict = verify(OUT, tiles=1)
    assert [sentence.partition(": ")[0] for sentence in verdict.damage] == [
        f"{OUT}/labels/zarr.json", f"s3://bucket/{flipped}", f"s3://bucket/{gone}"
    ]  # fmt: skip
    assert "notes.txt" in verdict.notes[0]
    bucket.objects.pop(key("0/notes.txt"))
    assert verify(OUT, repair=True).sound
    assert stored(bucket) == bytes_of(whole)


def test_scores_and_report_are_the_same_as_for_a_disk(task, bucket, tmp_path):
    volume, model, whole = task
    segment(volume, model, OUT, TILED)
    truth = write_stack(tmp_path / "truth.tif", (noise((3, 61, 75)) > 99).astype("uint8") * 255)
    scores = [evaluate(place, truth, "classes").scores for place in (OUT, whole)]
    assert scores[0] == scores[1]
    page = write_report(OUT, truth)
    assert str(page) == "s3://bucket/lab/out.report.html"
    assert page.read_text().count("<img") == write_report(whole, truth).read_text().count("<img")


def test_a_volume_in_a_bucket_is_read_like_one_on_a_disk(task, bucket, tmp_path):
    _, model, _ = task
    image = noise((3, 61, 75))
    local = tmp_path / "volume.zarr"
    zarr.create_array(local, data=image, chunks=(1, 32, 40))
    for file in local.rglob("*"):
        if file.is_file():
            name = f"volume.zarr/{file.relative_to(local).as_posix()}"
            bucket.put(name, file.read_bytes(), None, None)
    source = "s3://bucket/volume.zarr"
    volume = open_volume(source)
    assert (volume.path, volume.shape, volume.chunk) == (source, (1, 3, 61, 75), (1, 32, 40))
    np.testing.assert_array_equal(volume.read(Box.of((3, 61, 75)))[0], image)
    from_bucket = segment(source, model, tmp_path / "a.zarr", TILED)
    from_disk = segment(local, model, tmp_path / "b.zarr", TILED)
    for name in ("0", "labels/classes/0"):
        one, two = (zarr.open_array(s / name, mode="r")[:] for s in (from_bucket, from_disk))
        np.testing.assert_array_equal(one, two)
    segment(source, model, tmp_path / "a.zarr", TILED)  # the same input
    with pytest.raises(InputError, match=r"overlaps the input s3://bucket/volume\.zarr"):
        segment(source, model, f"{source}/out.zarr", TILED)
    bucket.put("volume.zarr/c/1/0/0", b"other", None, None)
    with pytest.raises(InputError, match=r"another input\.bytes"):
        segment(source, model, tmp_path / "a.zarr", TILED)


@pytest.mark.parametrize("name", ["nothing.zarr", "volume.tif"])
def test_only_zarr_is_read_from_a_bucket(bucket, name):
    bucket.put("volume.tif", b"II*\0", None, None)
    with pytest.raises(InputError, match="cannot be read from an object store"):
        open_volume(f"s3://bucket/{name}")


def test_a_copy_without_its_private_folder_is_damaged(task, bucket):
    volume, model, _ = task
    segment(volume, model, OUT, TILED)
    for name in [name for name in bucket.objects if PRIVATE in name]:
        del bucket.objects[name]
    (damage,) = verify(OUT, tiles=0).damage
    assert ".unet_ray is missing" in damage


def test_the_ledger_of_a_deleted_store_is_ignored(task, bucket):
    volume, model, whole = task
    segment(volume, model, OUT, TILED)
    for name in [name for name in bucket.objects if PRIVATE not in name]:
        del bucket.objects[name]
    segment(volume, model, OUT, TILED)
    assert stored(bucket) == bytes_of(whole)


def test_another_store_replaces_one_whose_creation_was_killed(task, bucket, tmp_path):
    volume, model, _ = task
    classes = dataclasses.replace(TILED, outputs=("classes",))
    whole = segment(volume, model, tmp_path / "whole.zarr", classes)
    put = ObjectPath.put_if

    def killed(path, data, tag):
        if path == place_of(OUT) / "zarr.json":
            raise KeyboardInterrupt
        return put(path, data, tag)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectPath, "put_if", killed)
        with pytest.raises(KeyboardInterrupt):
            segment(volume, model, OUT, TILED)
    assert key("0/zarr.json") in bucket.objects
    segment(volume, model, OUT, classes)
    assert stored(bucket) == bytes_of(whole)


def test_a_run_that_lost_its_lease_writes_nothing_to_the_next_store(
    task, bucket, tmp_path, monkeypatch
):
    volume, model, _ = task
    fresh = dataclasses.replace(TILED, tile=(1, 64, 76))
    whole = segment(volume, model, tmp_path / "whole.zarr", fresh)

    def overwrite(progress):
        if progress.finished == 3:
            other = dataclasses.replace(fresh, overwrite=True, takeover=True)
            segment(volume, model, OUT, other)

    with pytest.raises(LostError, match="has taken it over, so this run stops"):
        segment(volume, model, OUT, dataclasses.replace(TILED, workers=1), overwrite)
    assert stored(bucket) == bytes_of(whole)
    assert verify(OUT).sound


def interrupted(monkeypatch, on, method, number, act):
    """Calls `act` in call `number` of `method`; calls from `act` are not counted."""
    calls, original = itertools.count(1), getattr(on, method)

    def called(*args, **kwargs):
        if next(calls) == number:
            monkeypatch.setattr(on, method, original)
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(on, method, called)


OTHER_VOXELS = dataclasses.replace(TILED, tta=True)
TAKING = dataclasses.replace(OTHER_VOXELS, overwrite=True, takeover=True)


@pytest.fixture(scope="module")
def other_bytes(task, tmp_path_factory):
    """The bytes that the later run writes: the same tiles with other voxels."""
    volume, model, _ = task
    return bytes_of(
        segment(volume, model, tmp_path_factory.mktemp("other_bytes") / "out.zarr", OTHER_VOXELS)
    )


# The lease is checked before each step: the ledger, the old root, the old arrays (on a disk also
# the table, log, marks and objects), five metadata files, and the shards of the tiles.
STEPS = [("out.zarr", "ours", "hold", n + 1) for n in range(13)]
STEPS += [(OUT, "ours", "hold", n + 1) for n in range(8)]
STEPS += [(OUT, "moto", "hold", n) for n in (1, 4, 8)]
STEPS += [(*place, "look", n) for place in PLACES for n in (1, 20)]


@pytest.mark.parametrize(("out", "bucket", "method", "number"), STEPS, indirect=["bucket"])
def test_a_run_that_recreates_a_store_can_lose_its_lease_at_every_step(
    task, other_bytes, bucket, tmp_path, monkeypatch, out, method, number
):
    volume, model, whole = task
    monkeypatch.chdir(tmp_path)
    if out == OUT:
        segment(volume, model, out, TILED)
    else:
        shutil.copytree(whole, out)
    interrupted(
        monkeypatch, Fence, method, number, lambda: segment(volume, model, out, TAKING)
    )  # fmt: skip
    with pytest.raises(LostError, match=r"out\.zarr: process \d+ on .* has taken it over"):
        segment(volume, model, out, dataclasses.replace(TILED, overwrite=True, workers=1))
    assert (stored(bucket) if out == OUT else bytes_of(tmp_path / out)) == other_bytes
    verdict = verify(out, tiles=0)
    assert verdict.sound and verdict.tiles == TILES
    # The log contains no event of the run that lost its lease.
    events = [each["event"] for each in read_events(place_of(out) / EVENTS)]
    assert events == ["start", *["tile"] * TILES, "end"]


@pytest.mark.parametrize(("out", "bucket"), PLACES, indirect=["bucket"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RunError("tiles hang")])
def test_a_run_that_lost_its_lease_adds_nothing_to_the_log_of_the_next(
    task, bucket, tmp_path, monkeypatch, out, error
):
    volume, model, _ = task
    monkeypatch.chdir(tmp_path)

    def interrupted_and_ended(progress):
        if progress.finished == 3:
            segment(volume, model, out, TAKING)
            raise error

    with pytest.raises(type(error)):
        segment(volume, model, out, dataclasses.replace(TILED, workers=1), interrupted_and_ended)
    events = [each["event"] for each in read_events(place_of(out) / EVENTS)]
    assert events == ["start", *["tile"] * TILES, "end"]


@pytest.mark.parametrize(("out", "bucket"), PLACES, indirect=["bucket"])
def test_another_run_replaces_a_store_without_any_work(
    task, other_bytes, bucket, tmp_path, monkeypatch, out
):
    volume, model, _ = task
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution.Rounds, "run", lambda self, *args, **facts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            segment(volume, model, out, TILED)
    assert (place_of(out) / "zarr.json").is_file()
    segment(volume, model, out, OTHER_VOXELS)
    assert (stored(bucket) if out == OUT else bytes_of(tmp_path / out)) == other_bytes


@pytest.mark.parametrize("bucket", ["ours", "moto"], indirect=True)
@pytest.mark.parametrize("level", range(2))
def test_shards_of_every_level_count_and_are_removed(bucket, level):
    plan, out = TilePlan((1, 8, 8), (1, 4, 4), NO_CONTEXT, (1, 4, 4)), place_of(OUT)
    factors, provenance = ((1, 2, 2),), Provenance({"format": 1})
    pyramid = StoreLayout(plan, (0, 255), [*ARRAYS], None, factors)
    flat = StoreLayout(plan, (0, 255), ["classes"], None)
    create_store(out, flat, provenance)
    expected = stored(bucket)
    create_store(out, pyramid, provenance)
    begin(out / LEDGER, 1)
    assert inspect(out).is_untouched()
    store, tile = Store(OUT, ["instances"], level=level), pyramid.plans[level][0]
    store.write(tile, {"instances": np.ones((1, 4, 4), np.uint64)})
    (out / TABLE).put(b"PAR1")
    (out / OBJECTS / "labels/3").put(b"of an older run")
    assert not inspect(out).is_untouched()
    assert store.present(pyramid.plans[level]).sum() == 1
    create_store(out, flat, provenance)
    assert stored(bucket) == expected and not (out / OBJECTS).exists()


@pytest.mark.parametrize("name", ["zarr.json", "0/c/0/0/1/1"])
def test_a_delayed_put_is_refused(task, other_bytes, bucket, monkeypatch, name):
    volume, model, _ = task
    put, sent = ObjectPath.put_if, []

    def late(path, data, tag):
        if path == place_of(OUT) / name and not sent:
            sent.append(data)
            segment(volume, model, OUT, TAKING)
        return put(path, data, tag)

    monkeypatch.setattr(ObjectPath, "put_if", late)
    with pytest.raises(LostError, match="has taken it over"):
        segment(volume, model, OUT, dataclasses.replace(TILED, workers=1))
    assert sent and stored(bucket) == other_bytes


def test_a_repair_owns_the_lease_while_it_checks(task, bucket, monkeypatch):
    volume, model, whole = task
    segment(volume, model, OUT, TILED)
    del bucket.objects[key("0/c/0/0/1/1")]
    seen = []

    def overwrite(run, *args, **kwargs):
        with pytest.raises(InputError, match="is writing here"):
            segment(volume, model, OUT, dataclasses.replace(TILED, overwrite=True))
        seen.append(run)

    interrupted(monkeypatch, repair, "prepare", 1, lambda: overwrite("one"))
    assert verify(OUT, repair=True).sound and seen
    assert stored(bucket) == bytes_of(whole)
