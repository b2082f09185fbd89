"""Actors on a block of tiles: one runs all steps, or, with GPUs, three run one step each."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.helper import TILED, Marker, Slow, Watching, bytes_of, marked, stage, written
from unet_ray.engine import actors, parcels, pool
from unet_ray.engine.actors import GpuActor, Reader, TileActor, Writer
from unet_ray.engine.attempts import TRIES
from unet_ray.engine.engines import run
from unet_ray.engine.stages import STEPS, Receipt, Stage, TileState
from unet_ray.segmentation.preparation import prepare
from unet_ray.storage.layout import StoreLayout
from unet_ray.storage.marks import Mark, Marks
from unet_ray.storage.stores import create_store

DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiles").mkdir()
    return tmp_path / "tiles"


def done_by_actors(stage, tiles):
    """The receipts of a block, from the actors that a run on this device uses."""
    table = pa.table({"tiles": [tiles]})
    for kind in [Reader, GpuActor, Writer] if stage.device == "cuda" else [TileActor]:
        actor = kind(stage)
        table = pa.concat_tables(actor(table.slice(row, 1)) for row in range(len(table)))
    return receipts_of(table)


def receipts_of(table):
    """The receipts of a table."""
    return [Receipt(**row) for row in table.select(parcels.RECEIPT).to_pylist()]


@DEVICES
def test_marks_that_cannot_be_made_are_failures(folder, device):
    unmarked = dataclasses.replace(stage(folder, device), marks=folder / "none" / "such")
    receipts = done_by_actors(unmarked, "1,2")
    assert [(r.tile, r.verdict) for r in receipts] == [(1, "again"), (2, "again")]
    assert all("No such file" in r.error for r in receipts)
    assert not written(folder)


@DEVICES
def test_a_failed_tile_skips_the_next_steps_and_the_others_do_not(folder, device):
    bad = {("read", 2): OSError("a"), ("predict", 3): OSError("b"), ("write", 4): OSError("c")}
    failing = dataclasses.replace(marked(folder, bad=bad), device=device)
    receipts = done_by_actors(failing, "1,2,3,4,5")
    assert [r.error for r in receipts] == ["", "OSError: a", "OSError: b", "OSError: c", ""]
    assert [bool(r.trace) for r in receipts] == [False, True, True, True, False]
    assert written(folder) == {1: 1, 5: 1}
    again = done_by_actors(dataclasses.replace(marked(folder), device=device), "1,2,3,4,5")
    assert not any(r.error for r in again)
    assert written(folder) == dict.fromkeys(range(1, 6), 1)


@DEVICES
def test_a_worker_that_receives_a_block_again_does_only_the_missing_tiles(folder, device):
    """The first workers finish tiles 1, 2 and 4 and fail at tile 3; one dies in tile 5."""
    first = {("read", 3): OSError("no"), ("write", 5): SystemExit()}
    broken = dataclasses.replace(marked(folder, bad=first), device=device)
    with pytest.raises(SystemExit):
        done_by_actors(broken, "1,2,3,4,5")
    with open(folder / "marks" / {"cpu": "1", "cuda": "4"}[device], "ab") as file:
        file.write(b'[4, "do')
    whole = dataclasses.replace(marked(folder), device=device)
    receipts = done_by_actors(whole, "1,2,3,4,5")
    assert [r.tile for r in receipts] == [1, 2, 3, 4, 5] and not any(r.error for r in receipts)
    assert written(folder) == dict.fromkeys(range(1, 6), 1)
    assert done_by_actors(whole, "1,2,3,4,5") == receipts
    assert written(folder).total() == 5


BLOCKS = {
    Reader: pa.table({"tiles": ["7"]}),
    GpuActor: parcels.packed([TileState(Receipt(7, 0.5, memory=9), np.full(3, 7))]),
    Writer: parcels.packed([TileState(Receipt(7, 0.5, memory=9), np.array([21]))]),
}


@pytest.mark.parametrize("kind", [Reader, GpuActor, Writer])
def test_a_step_that_ends_its_process_each_time_is_given_up(folder, kind):
    """A tile whose step succeeds each time is not given up, however often it is repeated."""
    for _ in range(TRIES + 1):
        (receipt,) = receipts_of(kind(marked(folder))(BLOCKS[kind]))
        assert (receipt.tile, receipt.error) == (7, "")
        assert kind is Reader or (receipt.seconds >= 0.5 and receipt.memory >= 9)
    assert written(folder).total() == (kind is Writer)
    for mark in (folder / "marks").iterdir():
        mark.unlink()
    for _ in range(TRIES):
        with pytest.raises(SystemExit):
            kind(marked(folder, bad={(kind.steps[0], 7): SystemExit()}))(BLOCKS[kind])
    (receipt,) = receipts_of(kind(marked(folder))(BLOCKS[kind]))
    assert receipt.verdict == "never" and "was started 3 times and never finished" in receipt.error


@pytest.mark.parametrize("kind", [Reader, GpuActor])
@pytest.mark.parametrize(
    ("error", "verdict"), [(SystemExit(), "never"), (MemoryError(), "alone"), (OSError(), "again")]
)
def test_packing_is_part_of_the_step(folder, monkeypatch, kind, error, verdict):
    """Packing copies arrays, so a process may be killed for lack of memory there."""

    def fails(tiles):
        if not tiles[0].receipt.error:
            raise error
        return packed(tiles)

    packed = actors.packed
    monkeypatch.setattr(actors, "packed", fails)
    for _ in range(TRIES * isinstance(error, SystemExit)):
        with pytest.raises(SystemExit):
            kind(marked(folder))(BLOCKS[kind])
    (receipt,) = receipts_of(kind(marked(folder))(BLOCKS[kind]))
    assert receipt.verdict == verdict and receipt.error


def test_a_tile_that_kills_its_reader_fails_no_other_tile_of_its_block(folder):
    block = pa.table({"tiles": ["1,2,3"]})
    for _ in range(TRIES):
        with pytest.raises(SystemExit):
            Reader(marked(folder, bad={("read", 2): SystemExit()}))(block)
    receipts = receipts_of(Reader(marked(folder, bad={("read", 2): SystemExit()}))(block))
    assert [r.verdict for r in receipts] == ["again", "never", "again"]
    assert [bool(r.error) for r in receipts] == [False, True, False]


def test_an_error_message_that_cannot_be_encoded_is_reported(folder):
    bad = {("read", 1): OSError("no file \udcff")}
    (receipt,) = done_by_actors(stage(folder, bad=bad), "1")
    assert receipt.error == "OSError: no file ?"


def test_only_a_worker_that_dies_while_starting_counts_as_failed(folder):
    for _ in range(2 * TRIES):
        TileActor(marked(folder))
    [marks] = (folder / "marks").iterdir()
    events = [json.loads(line)[1] for line in marks.read_text().splitlines()]
    assert events == ["begun", "ended"] * 2 * TRIES


def test_a_block_ends_early_when_its_tiles_take_longer_than_earlier_ones(folder, monkeypatch):
    monkeypatch.setattr(actors, "MAX_BLOCK_SECONDS", 0.25)
    slow = Slow(lambda tile: 0.1 * (tile > 2))
    receipts = done_by_actors(Stage("slow", lambda: slow, "cpu"), ",".join(map(str, range(20))))
    assert 3 < len(receipts) < 9 and [r.tile for r in receipts] == slow.ended
    monkeypatch.setattr(actors, "MAX_BLOCK_SECONDS", 0.0)
    (receipt,) = done_by_actors(Stage("slow", lambda: slow, "cpu"), "7,8")
    assert receipt.tile == 7


# GPU actors


def predicted(actor, tiles):
    """Calls an actor on one thread per tile, as Ray does."""
    blocks = [parcels.packed([TileState(Receipt(tile, 0.0))]) for tile in tiles]
    threads = [threading.Thread(target=actor, args=(block,)) for block in blocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Busy(Watching):
    """A worker that counts the tiles in flight while it predicts each tile."""

    def __init__(self, marks):
        super().__init__()
        self.marks, self.begun = marks, {}

    def predict(self, tile, voxels):
        super().predict(tile, voxels)
        marks = "".join(path.read_text() for path in self.marks.glob("predict-*"))
        events = [json.loads(line)[1] for line in marks.splitlines()]
        self.begun[tile] = events.count("begun") - events.count("ended")


def test_a_gpu_predicts_one_tile_while_the_next_ones_wait(folder):
    marked_stage = marked(folder)
    worker = Busy(marked_stage.marks)
    actor = GpuActor(
        dataclasses.replace(marked_stage, make_worker=lambda: worker, device="cuda", in_flight=3)
    )
    predicted(actor, range(12))
    assert worker.most["predict"] == 1 and len(worker.begun) == 12
    assert 2 <= max(worker.begun.values()) <= 3


def test_a_tile_that_may_have_killed_its_gpu_actor_is_tried_without_others(folder):
    marked_stage = marked(folder)
    suspects = [2, 5, 6]
    for tile in suspects:
        Marks(marked_stage.marks / f"predict-{tile}").add(Mark(tile, "begun"))
    worker = Busy(marked_stage.marks)
    actor = GpuActor(
        dataclasses.replace(marked_stage, make_worker=lambda: worker, device="cuda", in_flight=4)
    )
    predicted(actor, range(10))
    others = [begun for tile, begun in worker.begun.items() if tile not in suspects]
    # Suspects count as in flight: their first attempts were never marked as ended.
    assert len(others) == 7 and {worker.begun[tile] for tile in suspects} == {4}, worker.begun


MEMORY = 1 << 29  # of a GPU actor with two readers and two writers


# On Ray, in a separate process whose Ray is configured with a GPU that does not exist


def in_ray_with_a_gpu(name, *arguments):
    """Calls a function of this module in such a process, and returns the list that it prints."""
    program = f"""
import sys, ray
from tests.engine import test_actors
ray.init(
    address="local",
    num_cpus=2,
    num_gpus=1,
    include_dashboard=False,
    log_to_driver=False,
    object_store_memory=300 << 20,
)
test_actors.{name}(*sys.argv[1:])
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    # Ray may print other lines.
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("[")]
    return json.loads(line)


class Dying(Marker):
    """A worker that kills its process `deaths` times in each step, at a different tile."""

    tiles = {"read": 10, "predict": 12, "write": 14}  # noqa: RUF012

    def step(self, name, tile):
        super().step(name, tile)
        if tile == self.tiles[name]:
            with open(Path(self.folder, f"killed-{name}"), "ab") as mark:
                if mark.tell() < self.deaths:
                    mark.write(b".")
                    mark.flush()
                    os.kill(os.getpid(), signal.SIGKILL)


def kill_each_step(folder, deaths):
    """Runs 24 tiles in three waves: three tiles fail, and three kill their actors."""
    pool.FIRST_WAVE, pool.GPU_WAVE, pool.BLOCKS_PER_WORKER = 8, 4, 1
    bad = {("read", 0): OSError("a"), ("predict", 1): OSError("b"), ("write", 20): OSError("c")}
    dying = dataclasses.replace(
        marked(Path(folder)),
        make_worker=partial(Dying, folder, bad=bad, deaths=int(deaths)),
        device="cuda",
        in_flight=4,
        together=3,
    )
    receipts = [dataclasses.asdict(receipt) for receipt in run(dying, range(24), "ray")]
    print(json.dumps(receipts))


def recorded(make, kind, folder):
    """Makes a worker, and records the memory that its actor has requested from Ray."""
    import ray

    requested = ray.get_runtime_context().get_assigned_resources().get("memory", 0)
    Path(folder, f"{kind} {requested:.0f}").touch()
    return make()


def segment_on_gpus(volume, model, out):
    """Segments with readers, GPU actors and writers, as if the CPU were a GPU.

    Prints the errors, and the warnings of Ray Data.
    """
    import ray

    task = prepare(volume, model, Path(out), TILED)
    create_store(
        task.out, StoreLayout(task.plan, task.class_values, task.outputs, None), task.provenance
    )
    marks = Path(out, ".unet_ray", "marks")
    marks.mkdir(parents=True)
    folder = Path(out).parent
    stage = Stage(
        "x",
        partial(recorded, task.make_worker, "worker", folder),
        "cuda",
        marks,
        in_flight=4,
        memory=MEMORY,
        helper_memory=MEMORY // 8,  # less than the helpers use
        make_helper=partial(recorded, task.make_helper, "helper", folder),
    )
    detectors = ray.data.DataContext.get_current().issue_detectors_config
    detectors.high_memory_detector_config.detection_time_interval_s = 0.1
    warnings, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("ray.data").addHandler(handler)
    errors = [receipt.error for receipt in run(stage, range(len(task.plan)), "ray")]
    print(json.dumps([errors, warnings]))


@pytest.fixture(scope="module")
def on_gpus(task, tmp_path_factory):
    """The store of `segment_on_gpus`, and what it prints."""
    out = tmp_path_factory.mktemp("gpus") / "out.zarr"
    return out, *in_ray_with_a_gpu("segment_on_gpus", *task[:2], out)


@pytest.mark.ray
def test_readers_and_writers_for_gpus_give_the_bytes_of_the_local_engine(task, on_gpus):
    out, errors, *_ = on_gpus
    assert errors == [""] * 24
    assert bytes_of(out) == bytes_of(task[2])


@pytest.mark.ray
def test_actors_request_their_memory_and_ray_does_not_warn_of_it(on_gpus):
    out, _, warnings = on_gpus
    requested = {path.name for path in out.parent.iterdir() if path != out}
    assert requested == {f"worker {MEMORY // 2}", f"helper {MEMORY // 8}"}
    assert [warning for warning in warnings if "memory" in warning] == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, 99])
def test_every_tile_is_reported_and_written_once_whichever_actor_is_killed(folder, deaths):
    receipts = in_ray_with_a_gpu("kill_each_step", folder, deaths)
    assert sorted(receipt["tile"] for receipt in receipts) == [*range(24)]
    failed = {receipt["tile"]: receipt["error"] for receipt in receipts if receipt["error"]}
    given_up = {10, 12, 14} if deaths > TRIES else set()
    assert failed.keys() == {0, 1, 20} | given_up
    assert all("was started 3 times and never finished" in failed[tile] for tile in given_up)
    assert [failed[tile] for tile in (0, 1, 20)] == ["OSError: a", "OSError: b", "OSError: c"]
    assert written(folder) == dict.fromkeys({*range(24)} - failed.keys(), 1)
    for step in STEPS:
        assert (folder / f"killed-{step}").stat().st_size == min(deaths, TRIES)
    assert not [*(folder / "marks").iterdir()]


class Large(Marker):
    """A worker whose voxels and results are large compared to the object store."""

    def read(self, tile):
        return np.full(8 << 20, tile, np.uint8)

    def predict(self, tile, voxels):
        return {"a": voxels, "b": voxels}

    def write(self, tile, result):
        super().write(tile, np.full(1, 3 * int(result["b"][-1])))


def run_beside_others(folder):
    """Runs while other tasks use nearly all CPUs."""
    import ray
    from ray.util import placement_group

    ray.get(placement_group([{"CPU": 1.9}]).ready())
    large = dataclasses.replace(
        marked(Path(folder)), make_worker=partial(Large, folder), device="cuda", in_flight=4
    )
    alone = run(large, range(58, 60), "ray", alone=True)
    receipts = [*run(large, range(58), "ray"), *alone]
    print(json.dumps([receipt.error for receipt in receipts]))


@pytest.mark.ray
@pytest.mark.slow
def test_gpu_runs_need_no_free_cpu_and_no_more_than_the_object_store(folder):
    assert in_ray_with_a_gpu("run_beside_others", folder) == [""] * 60
    assert written(folder) == dict.fromkeys(range(60), 1)
