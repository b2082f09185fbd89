"""Failing tiles are retried, then quarantined; all others finish, and every failure is reported."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from subprocess import run
from threading import Event

import numpy as np
import pytest
import zarr

from tests.helper import FLOAT32, TILED, bytes_of, noise, shards_of, write_stack
from unet_ray.engine import engines as engine
from unet_ray.engine.stages import Deadline, Stage
from unet_ray.errors import InputError, QuarantinedError, RunError
from unet_ray.network.prediction import instructions
from unet_ray.segmentation import disk as disks
from unet_ray.segmentation import execution, preparation
from unet_ray.segmentation import run as run_module
from unet_ray.segmentation.outlook import plan
from unet_ray.segmentation.segment import prepare_all, segment
from unet_ray.segmentation.verification import verify
from unet_ray.storage import events as event_log
from unet_ray.storage import ledger as ledgers
from unet_ray.storage.events import read_events
from unet_ray.storage.layout import ARRAYS, EVENTS, LEDGER, PREDICTED, marks_of
from unet_ray.storage.ledger import checksums, committed, quarantined
from unet_ray.storage.marks import Mark, Marks
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.stores import Store
from unet_ray.tiling.boxes import Box
from unet_ray.versions import versions

ROOT = Path(__file__).parents[2]
TILES = 24


@pytest.fixture
def fail(monkeypatch):
    """Lets a step of some tiles fail, a number of times each; returns the tries of each tile."""
    tried = Counter()

    def install(step, failures, error):
        original = getattr(run_module.TileWorker, step)

        def failing(worker, tile, *more):
            tried[tile] += 1
            if tried[tile] <= failures.get(tile, 0):
                if not isinstance(error, Exception):
                    error()
                raise error
            return original(worker, tile, *more)

        monkeypatch.setattr(run_module.TileWorker, step, failing)
        return tried

    return install


def done(store):
    return set(np.flatnonzero(committed(store / LEDGER, TILES)).tolist())


def given_up(store):
    return set(np.flatnonzero(quarantined(store / LEDGER, TILES)).tolist())


def events(store, name):
    return [event for event in read_events(store / EVENTS) if event["event"] == name]


@pytest.mark.parametrize("step", ["read", "predict", "write"])
def test_a_tile_that_fails_twice_succeeds_at_the_third_try(task, tmp_path, fail, step):
    volume, model, whole = task
    tried = fail(step, {5: 2, 17: 1}, ValueError("flaky"))
    seen = []
    store = segment(volume, model, tmp_path / "out.zarr", TILED, seen.append)
    assert tried == {**dict.fromkeys(range(TILES), 1), 5: 3, 17: 2}
    assert bytes_of(store) == bytes_of(whole)
    assert [p.done for p in seen] == list(range(1, TILES + 1))
    assert [event["tile"] for event in events(store, "failed")] == [5, 17, 5]


def test_a_tile_that_always_fails_is_quarantined_and_the_rest_finishes(task, tmp_path, fail):
    volume, model, whole = task
    tried = fail("predict", {5: 99}, ValueError("poison"))
    out, seen = tmp_path / "out.zarr", []
    with pytest.raises(
        QuarantinedError, match=r"quarantined 1 of 24 tiles.* tile 5 .*ValueError: poison"
    ):
        segment(volume, model, out, TILED, seen.append)
    assert tried[5] == 3 and tried.total() == TILES + 2
    assert done(out) == set(range(TILES)) - {5} and given_up(out) == {5}
    assert (seen[-1].done, seen[-1].quarantined, seen[-1].total) == (23, 1, 24)
    box = str(preparation.prepare(volume, model, out, TILED).plan[5].write)
    first, *_ = events(out, "failed")
    assert first["box"] == box and "in failing" in first["trace"] and "poison" in first["trace"]
    assert [event["tile"] for event in events(out, "quarantined")] == [5]
    # The tile has no shard: a missing shard cannot be mistaken for background.
    missing = set(bytes_of(whole)) - set(bytes_of(out))
    assert missing == {f"{ARRAYS[name]}/c/{'0/' * (name != 'classes')}0/1/1" for name in PREDICTED}


def test_a_rerun_tries_only_the_quarantined_tiles(task, tmp_path, fail):
    volume, model, whole = task
    tried = fail("predict", {5: 4, 9: 3}, ValueError("poison"))
    out = tmp_path / "out.zarr"
    with pytest.raises(QuarantinedError, match="2 of 24 tiles"):
        segment(volume, model, out, TILED)
    before = Counter(tried)
    assert segment(volume, model, out, TILED) == out
    assert tried - before == {5: 2, 9: 1}
    assert bytes_of(out) == bytes_of(whole)
    assert given_up(out) == set()


def test_a_value_that_is_not_finite_is_tried_once(task, tmp_path):
    _, model, _ = task
    image = noise((3, 61, 75), "float32")
    image[2, 3, 4] = np.nan
    volume, out = write_stack(tmp_path / "nan.tif", image), tmp_path / "out.zarr"
    with pytest.raises(QuarantinedError, match=r"voxel \(z, y, x\) = \(2, 3, 4\) .* --nan zero"):
        segment(volume, model, out, TILED)
    assert given_up(out) and done(out) == set(range(TILES)) - given_up(out)
    assert {event["tile"] for event in events(out, "failed")} == given_up(out)
    assert len(events(out, "failed")) == len(given_up(out))


def test_a_damaged_input_chunk_quarantines_the_tiles_that_read_it(task, tmp_path, monkeypatch):
    monkeypatch.setattr("unet_ray.volumes.volume._PAUSE", 0)
    _, model, _ = task
    path = tmp_path / "volume.zarr"
    image = noise((3, 61, 75))
    zarr.create_array(path, data=image, chunks=(1, 61, 75))
    chunk = path / "c/1/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    out = tmp_path / "out.zarr"
    with pytest.raises(QuarantinedError, match=r"8 of 24 tiles.* cannot be read at"):
        segment(path, model, out, TILED)
    run = preparation.prepare(path, model, out, TILED)
    assert given_up(out) == {n for n in range(TILES) if run.plan[n].write.start[0] == 1}
    assert done(out) == set(range(TILES)) - given_up(out)
    assert run.provenance.normalisation["unread"] == ["1:2,0:61,0:75"]
    np.testing.assert_allclose(run.intensity.mean, image[::2].mean())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_zero_replaces_non_finite_voxels_by_zero(task, tmp_path, value):
    _, model, _ = task
    image = noise((3, 61, 75), "float32")
    image[2, 3, 4] = value
    settings = replace(TILED, nan="zero")
    volume = write_stack(tmp_path / "volume.tif", image)
    store = segment(volume, model, tmp_path / "out.zarr", settings)
    provenance = json.loads((store / "zarr.json").read_text())["attributes"]["unet_ray"]
    assert provenance["nan"] == "zero"
    # With the same mean and deviation, only the voxel itself can differ.
    run = preparation.prepare(volume, model, store, settings)
    image[2, 3, 4] = 0
    zero = write_stack(tmp_path / "zero.tif", image)
    other = preparation.prepare(zero, model, tmp_path / "zero.zarr", settings)
    execution.execute(replace(other, intensity=run.intensity), settings, print)
    for name in PREDICTED:
        one, two = (
            zarr.open_array(path / ARRAYS[name], mode="r")[:] for path in (store, other.out)
        )
        np.testing.assert_array_equal(one, two)


def test_a_slow_tile_is_retried_and_gives_the_same_bytes(task, tmp_path, fail, monkeypatch):
    volume, model, whole = task
    soon = partial(Stage, deadline=Deadline(first=60, multiple=10, least=1))
    monkeypatch.setattr(execution, "Stage", soon)
    tried = fail("predict", {5: 1, 17: 9}, Event().wait)
    out = tmp_path / "out.zarr"
    words = r"1 of 24 .* tile 17 .* did not end within (\d+) s"
    with pytest.raises(QuarantinedError, match=words) as quarantined_tile:
        segment(volume, model, out, replace(TILED, workers=9))
    # Ten times the median tile, but at least a second; no longer the initial minute.
    assert 1 <= int(re.search(words, str(quarantined_tile.value))[1]) < 60
    assert (tried[5], tried[17]) == (2, 3) and given_up(out) == {17}
    tried[17] = 99
    segment(volume, model, out, TILED)
    assert bytes_of(out) == bytes_of(whole)


def test_a_tile_that_lacks_memory_is_retried_alone(task, tmp_path, fail, monkeypatch):
    volume, model, whole = task
    run, alone = engine.run, []

    def recording(stage, tiles, *more):
        tiles = list(tiles)
        alone.append(tiles if more[-1] is True else None)
        return run(stage, tiles, *more)

    monkeypatch.setattr("unet_ray.engine.rounds.engines.run", recording)
    tried = fail("predict", {5: 1, 17: 99}, MemoryError("out of memory"))
    out = tmp_path / "out.zarr"
    with pytest.raises(QuarantinedError, match=r"1 of 24 .* tile 17 .* set --memory (\d+)MiB and"):
        segment(volume, model, out, TILED)
    assert (tried[5], tried[17]) == (2, 2) and given_up(out) == {17}
    assert sorted(alone[1]) == [5, 17] and alone[0] is None and len(alone) == 2
    tried[17] = 99
    segment(volume, model, out, TILED)
    assert bytes_of(out) == bytes_of(whole)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_or_read_only_disk_ends_the_run_at_once(task, tmp_path, fail, number):
    volume, model, whole = task
    tried = fail("write", {12: 1}, OSError(number, "the disk says no"))
    out = tmp_path / "out.zarr"
    one_by_one = replace(TILED, workers=1)
    with pytest.raises(RunError, match=r"the disk says no; 12 of 24 tiles are done and stay"):
        segment(volume, model, out, one_by_one)
    assert done(out) == set(range(12)) and given_up(out) == set()
    assert tried.total() < TILES
    segment(volume, model, out, one_by_one)
    assert bytes_of(out) == bytes_of(whole)


NOTES = pytest.mark.parametrize(
    ("module", "name", "folder"),
    [
        (os, "replace", LEDGER),
        (event_log, "open", ""),
        (os, "mkdir", marks_of("segment")),
    ],
)


@NOTES
def test_a_disk_error_at_a_note_of_the_driver_is_retried(
    task, tmp_path, bad_disk, module, name, folder
):
    volume, model, whole = task
    failures = bad_disk(module, name, times=2, folder=folder)
    out = segment(volume, model, tmp_path / "out.zarr", TILED)
    assert len(failures) == 2 and bytes_of(out) == bytes_of(whole)
    assert len(events(out, "tile")) == TILES


@NOTES
def test_a_disk_error_at_a_note_that_stays_names_the_file(
    task, tmp_path, bad_disk, module, name, folder
):
    volume, model, _ = task
    out = tmp_path / "out.zarr"
    bad_disk(module, name, folder=folder)
    with pytest.raises(RunError, match=r"Input/output error\. Check the disk, then run") as caught:
        segment(volume, model, out, TILED)
    assert str(caught.value).startswith(str(out / (folder or EVENTS)))


def test_tiles_that_only_the_marks_record_are_not_recomputed(task, tmp_path, fail):
    """The state after a driver on Ray was killed in the middle of long blocks."""
    volume, model, whole = task
    out = segment(volume, model, tmp_path / "out.zarr", TILED)
    recorded = checksums(out / LEDGER, TILES)
    assert recorded.any(axis=1).all()
    for ledger_segment in (out / LEDGER).glob("*.committed"):
        ledger_segment.unlink()
    (out / marks_of("segment") / "1").mkdir(parents=True, exist_ok=True)
    for tile in range(20):
        checksum = recorded[tile].tobytes().hex()
        Marks(out / marks_of("segment") / "1" / "0").add(Mark(tile, "done", checksum=checksum))
    tried, seen = fail("read", {}, ValueError()), []
    segment(volume, model, out, TILED, seen.append)
    assert set(tried) == {20, 21, 22, 23} and [p.done for p in seen] == [21, 22, 23, 24]
    assert bytes_of(out) == bytes_of(whole)
    assert verify(out, tiles=0).sound
    assert (checksums(out / LEDGER, TILES) == recorded).all()
    again = replace(TILED, overwrite=True)  # marks of the old store must not count
    (out / marks_of("segment") / "1").mkdir(parents=True, exist_ok=True)
    Marks(out / marks_of("segment") / "1" / "0").add(Mark(3, "done"))
    tried.clear()
    segment(volume, model, out, again)
    assert set(tried) == set(range(24)) and bytes_of(out) == bytes_of(whole)


@pytest.mark.parametrize(
    ("stored", "present"), [("AVX2", "AVX512, bfloat16"), ("AVX512, bfloat16", "DEFAULT, float32")]
)
def test_a_worker_on_a_machine_of_another_kind_writes_nothing(
    task, tmp_path, monkeypatch, stored, present
):
    volume, model, _ = task
    out = tmp_path / "out.zarr"
    monkeypatch.setattr(run_module, "instructions", lambda device: stored)
    run = preparation.prepare(volume, model, out, TILED)
    monkeypatch.setattr(run_module, "instructions", lambda device: present)
    with pytest.raises(
        RunError, match=rf"its instructions is {stored}, but {present} on .*one kind"
    ):
        run.make_worker()
    with pytest.raises(RunError, match="machines of one kind"):
        execution.execute(run, TILED, lambda progress: None)
    assert not any("/c/" in name for name in bytes_of(out))


A10G, T4 = "NVIDIA A10G, sm_86, 80 multiprocessors", "Tesla T4, sm_75, 40 multiprocessors"
ON_GPU = {"cuda": "13.0", "cudnn": "91002", "nvidia-driver": "570.86.15"}


def on_gpu(monkeypatch, gpu, **software):
    """Imitates a machine with a GPU, and returns its kind."""
    monkeypatch.setattr(run_module, "instructions", lambda device: gpu)
    monkeypatch.setattr(run_module, "gpu_versions", lambda device: {**ON_GPU, **software})
    return run_module.kind_of_machine("cuda")


def test_gpus_and_their_software_are_compared_but_not_the_driver(monkeypatch):
    stored = Provenance(on_gpu(monkeypatch, A10G))
    changes = [{"gpu": T4}, {"cudnn": "91300"}, {"cuda": "12.9"}, {"nvidia-driver": "580.1"}]
    kinds = [on_gpu(monkeypatch, **{"gpu": A10G, **change}) for change in changes]
    assert [stored.other_kind(kind) for kind in kinds] == [
        ("instructions", A10G, T4),
        ("versions.cudnn", "91002", "91300"),
        ("versions.cuda", "13.0", "12.9"),
        None,
    ]
    assert [len([*stored.differences(Provenance(kind))]) for kind in kinds] == [1, 1, 1, 0]


def test_a_process_that_only_reads_and_writes_does_not_query_the_gpu(task, monkeypatch):
    run = preparation.prepare(*task, TILED)
    run = replace(run, device="cuda", provenance=Provenance(on_gpu(monkeypatch, A10G)))
    monkeypatch.setattr(run_module, "instructions", None)  # a query would fail
    run.make_helper()
    versions_of_helper = {**versions(), "numcodecs": "0.1"}  # compresses the shards
    monkeypatch.setattr(run_module, "versions", lambda: versions_of_helper)
    with pytest.raises(RunError, match=r"its versions.numcodecs is .*, but 0.1 on "):
        run.make_helper()


def test_the_kind_of_a_machine_without_gpu_names_no_gpu():
    kind = run_module.kind_of_machine("cpu")
    assert kind == {"instructions": instructions("cpu"), "versions": versions()}
    assert {*kind["versions"]} == {"unet-ray", "torch", "numcodecs", "numpy", "zarr"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 160 kB, and a function that enlarges it to 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        yield folder, lambda: run(["mount", "-o", "remount,size=16m", folder], check=True)
    finally:
        run(["umount", folder], check=True)


def test_a_disk_that_fills_up_is_reported_and_loses_no_tile(task, small_disk, disk, monkeypatch):
    monkeypatch.setattr(ledgers, "SECONDS", 0)  # every tile is recorded at once
    volume, model, whole = task
    folder, enlarge = small_disk
    out = folder / "out.zarr"
    with pytest.raises(InputError, match="are free; free disk space"):
        segment(volume, model, out, TILED)
    disk(free=1 << 40)  # passes the check, as a disk does that fills up later
    with pytest.raises((RunError, InputError), match="No space left on device"):
        segment(volume, model, out, TILED)
    assert 0 < len(done(out)) < TILES and given_up(out) == set()
    assert not list(out.rglob("*.partial"))
    before = {tile: state_of_tile(volume, model, out, tile) for tile in done(out)}
    enlarge()
    segment(volume, model, out, TILED)
    assert bytes_of(out) == bytes_of(whole)
    assert before == {tile: state_of_tile(volume, model, out, tile) for tile in before}


@pytest.fixture
def disk(monkeypatch):
    """A function that fakes the reported size or free space of all disks."""
    usage = disks.shutil.disk_usage

    def report(**fields):
        monkeypatch.setattr(
            disks.shutil, "disk_usage", lambda place: usage(place)._replace(**fields)
        )

    return report


def bytes_stored(store):
    return sum((store / name).stat().st_size for name in shards_of(store))


def bound_of(volume, model, settings=TILED):
    """Upper bound of the disk use of a run, as `plan` states it."""
    return plan(volume, model, settings).disk_bytes


def test_a_store_that_may_not_fit_onto_its_disk_is_refused_at_once(task, tmp_path, disk):
    volume, model, whole = task
    out, bound = tmp_path / "out.zarr", bound_of(volume, model)
    disk(free=bound - 1)
    words = r"out\.zarr: its tiles may need \d+ KiB, but only \d+ KiB are free; .* another --out"
    with pytest.raises(InputError, match=words):
        segment(volume, model, out, TILED)
    assert not out.exists()
    disk(free=bound)
    segment(volume, model, out, TILED)
    assert bytes_of(out) == bytes_of(whole)
    disk(free=0)
    segment(volume, model, out, TILED)  # already finished
    disk(free=bound - bytes_stored(out))
    segment(volume, model, out, replace(TILED, overwrite=True))  # reuses the old store's space
    assert bytes_of(out) == bytes_of(whole)


def test_stores_that_fit_onto_a_disk_only_one_by_one_are_refused_at_once(task, tmp_path, disk):
    volume, model, _ = task
    copy, out = shutil.copy(volume, tmp_path / "copy.tif"), tmp_path / "many"
    inputs, bound = [str(volume), str(copy)], bound_of(volume, model)
    disk(free=2 * bound - 1)
    words = r"many: the 48 tiles of 2 stores may need \d+ KiB, .* process fewer inputs at a time"
    with pytest.raises(InputError, match=words):
        prepare_all(inputs, model, str(out), TILED)
    assert not out.exists()
    segment(volume, model, out / "volume.zarr", TILED)
    with pytest.raises(InputError, match=r"volume\.zarr: is a store; several inputs need a folder"):
        prepare_all(inputs, model, str(out / "volume.zarr"), TILED)
    disk(free=bound)
    runs = prepare_all(inputs, model, str(out), TILED)  # only the remaining tiles must fit
    assert [run.resumed for run in runs] == [True, False]
    disk(free=0)
    with pytest.raises(InputError, match=r"copy\.zarr: its tiles .* choose another --out"):
        prepare_all(inputs, model, str(out), TILED)


def test_stores_on_two_disks_are_checked_separately(task, tmp_path, small_disk, disk):
    volume, model, _ = task
    outs = small_disk[0] / "out.zarr", tmp_path / "out.zarr"
    runs = [preparation.prepare(volume, model, out, TILED) for out in outs]
    disk(free=bound_of(volume, model))
    disks.check_disks(runs, TILED)
    with pytest.raises(InputError, match="the 48 tiles of 2 stores"):
        disks.check_disks([runs[1], runs[1]], TILED)


def test_a_disk_of_unknown_size_is_not_checked(task, tmp_path, disk):
    volume, model, whole = task
    disk(free=0, total=0)
    assert bytes_of(segment(volume, model, tmp_path / "out.zarr", TILED)) == bytes_of(whole)


def test_only_the_remaining_tiles_must_fit(task, tmp_path, disk):
    volume, model, whole = task
    out = tmp_path / "out.zarr"
    first = replace(TILED, region=Box((0, 0, 0), (2, 61, 75)))
    segment(volume, model, out, first)
    disk(free=bound_of(volume, model, replace(TILED, region=Box((2, 0, 0), (3, 61, 75)))))
    segment(volume, model, out, TILED)
    assert bytes_of(out) == bytes_of(whole)


def state_of_tile(volume, model, out, tile):
    """Inode and modification time of the shards of a tile."""
    store = Store(out, ("probabilities", "classes"))
    place = preparation.prepare(volume, model, out, TILED).plan[tile]
    stats = [store.shard(name, place).stat() for name in PREDICTED]
    return [(stat.st_ino, stat.st_mtime_ns) for stat in stats]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_value_that_is_not_finite_is_quarantined_on_ray_too(task, tmp_path):
    _, model, _ = task
    image = noise((3, 61, 75), "float32")
    image[2, 3, 4] = np.inf
    volume, out = write_stack(tmp_path / "volume.tif", image), tmp_path / "out.zarr"
    settings = replace(FLOAT32, tile=(1, 64, 80), engine="ray", workers=1)
    with pytest.raises(QuarantinedError, match="1 of 3 tiles"):
        segment(volume, model, out, settings)
    assert np.flatnonzero(committed(out / LEDGER, 3)).tolist() == [0, 1]


def test_a_tile_that_lacks_memory_at_its_last_try_is_retried_alone(
    task, tmp_path, fail, monkeypatch
):
    volume, model, whole = task
    errors = iter([ValueError("flaky"), ValueError("flaky"), MemoryError("none left")])

    def error():
        raise next(errors)

    tried = fail("predict", {5: 3}, error)
    store = segment(volume, model, tmp_path / "out.zarr", TILED)
    assert tried[5] == 4 and bytes_of(store) == bytes_of(whole)


CONVOLVING = """
import sys, time, torch
from unet_ray.segmentation import run as run_module
from unet_ray.__main__ import run

read, predict = run_module.TileWorker.read, run_module.TileWorker.predict

def reads(self, tile):
    if tile == 0:
        time.sleep(1)  # until other tiles are in flight
        raise OSError(28, "No space left on device")
    return read(self, tile)

def predicts(self, tile, voxels):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        torch.nn.functional.conv2d(torch.ones(1, 64, 400, 400), torch.ones(64, 64, 3, 3))
    return predict(self, tile, voxels)

run_module.TileWorker.read, run_module.TileWorker.predict = reads, predicts
run()
"""


def test_an_error_ends_the_process_in_order_while_tiles_are_in_flight(task, tmp_path):
    volume, model, _ = task
    ended = subprocess.run(
        [
            *[sys.executable, "-c", CONVOLVING, "segment", volume, "--model", model],
            *["--out", tmp_path / "out", "--tile", "1,32,20", "--workers", "2"],
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    *_, last = ended.stderr.splitlines()
    assert re.fullmatch(r"unet-ray: .*No space left on device; 0 of 24 tiles .*", last)
