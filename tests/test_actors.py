"""What an actor does with a block of tiles; all steps by one of them, or with GPUs by three."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.test_engine import Marker, Slow, Watching, marked, stage, written
from tests.test_segmentation import TILED, bytes_of
from unet_ray import actors, attempts, pool
from unet_ray.actors import Predictor, Reader, TileActor, Writer
from unet_ray.attempts import TRIES, Carried, Receipt, Stage
from unet_ray.engine import run
from unet_ray.marks import Mark
from unet_ray.preparation import prepare
from unet_ray.stores import StoreLayout, create_store

DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiles").mkdir()
    return tmp_path / "tiles"


def done_by_actors(stage, tiles):
    """What becomes of a block, by the actors that a run on such a device has."""
    batch = {"tiles": [tiles]}
    for kind in [Reader, Predictor, Writer] if stage.device == "cuda" else [TileActor]:
        batch = kind(stage)(batch)
    return batch


def told_of(batch):
    """The receipts of a block."""
    return [Receipt(*values) for values in zip(*batch.values(), strict=True)]


@DEVICES
def test_marks_that_cannot_be_made_are_failures(folder, device):
    lost = dataclasses.replace(stage(folder, device), marks=folder / "none" / "such")
    told = done_by_actors(lost, "1,2")
    assert told["tile"] == [1, 2] and set(told["verdict"]) == {"again"}
    assert all("No such file" in error for error in told["error"])
    assert not written(folder)


@DEVICES
def test_a_tile_that_fails_goes_no_further_and_the_others_do(folder, device):
    bad = {("read", 2): OSError("a"), ("predict", 3): OSError("b"), ("write", 4): OSError("c")}
    told = told_of(
        done_by_actors(dataclasses.replace(marked(folder, bad=bad), device=device), "1,2,3,4,5")
    )
    assert [r.error for r in told] == ["", "OSError: a", "OSError: b", "OSError: c", ""]
    assert [bool(r.trace) for r in told] == [False, True, True, True, False]
    assert written(folder) == {1: 1, 5: 1}
    again = told_of(done_by_actors(dataclasses.replace(marked(folder), device=device), "1,2,3,4,5"))
    assert not any(r.error for r in again)
    assert written(folder) == dict.fromkeys(range(1, 6), 1)


@DEVICES
def test_a_worker_that_is_handed_a_block_again_does_only_what_is_missing(folder, device):
    """Its first worker did tiles 1 and 2, failed with 3 and ended within 4 and 5."""
    first = {("read", 3): OSError("no"), ("read", 5): SystemExit()}
    with pytest.raises(SystemExit):
        TileActor(marked(folder, bad=first))({"tiles": ["1,2,3,4,5"]})
    with open(folder / "marks" / "1", "ab") as file:
        file.write(b'[4, "do')
    told = done_by_actors(dataclasses.replace(marked(folder), device=device), "1,2,3,4,5")
    assert told["tile"] == [1, 2, 3, 4, 5] and not any(told["error"])
    assert written(folder) == dict.fromkeys(range(1, 6), 1)
    again = TileActor(marked(folder))({"tiles": ["1,2,3,4,5"]})
    assert told_of(again) == told_of(told)
    assert written(folder).total() == 5


@pytest.mark.parametrize("kind", [Reader, Predictor, Writer])
def test_a_step_that_ends_its_process_each_time_is_given_up(folder, kind):
    """And one that only ever went on to the next step is not, however often it did."""
    block = {"carried": [Carried(Receipt(7, 0.5, held=9), 21 if kind is Writer else np.full(3, 7))]}
    block = {"tiles": ["7"]} if kind is Reader else block
    (step,) = kind.steps
    for _ in range(TRIES + 1):
        told = kind(marked(folder))(block)
        if kind is Writer:
            assert told["tile"] == [7] and told["seconds"][0] >= 0.5 and told["held"][0] >= 9
        else:
            assert told["carried"][0].receipt.tile == 7 and told["carried"][0].data is not None
    for mark in (folder / "marks").iterdir():
        mark.unlink()
    for _ in range(TRIES):
        with pytest.raises(SystemExit):
            kind(marked(folder, bad={(step, 7): SystemExit()}))(block)
    told = kind(marked(folder))(block)
    receipts = told_of(told) if kind is Writer else [told["carried"][0].receipt]
    assert receipts[0].verdict == "never"
    assert "was begun 3 times and never ended" in receipts[0].error


def test_a_worker_that_was_made_may_end_as_often_as_it_likes(folder):
    for _ in range(2 * TRIES):
        TileActor(marked(folder))
    [told] = (folder / "marks").iterdir()
    kinds = [json.loads(line)[1] for line in told.read_text().splitlines()]
    assert kinds == ["begun", "ended"] * 2 * TRIES


@DEVICES
def test_a_block_ends_early_where_its_tiles_take_longer_than_those_before(
    folder, monkeypatch, device
):
    monkeypatch.setattr(actors, "MOST_SECONDS", 0.25)
    slow = Slow(lambda tile: 0.1 * (tile > 2))
    told = done_by_actors(Stage("slow", lambda: slow, device), ",".join(map(str, range(20))))
    assert 3 < len(told["tile"]) < 9 and sorted(told["tile"]) == sorted(slow.ended)
    monkeypatch.setattr(actors, "MOST_SECONDS", 0.0)
    assert done_by_actors(Stage("slow", lambda: slow, device), "7,8")["tile"] == [7]


# An actor that has a GPU


def predicted(actor, tiles):
    """Has an actor predict tiles on as many threads, as Ray does."""
    blocks = [{"carried": [Carried(Receipt(tile, 0.0))]} for tile in tiles]
    threads = [threading.Thread(target=actor, args=(block,)) for block in blocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Busy(Watching):
    """A worker that notes, for each tile, how many are begun while it is predicted."""

    def __init__(self, marks):
        super().__init__()
        self.marks, self.begun = marks, {}

    def predict(self, tile, voxels):
        super().predict(tile, voxels)
        told = "".join(path.read_text() for path in self.marks.glob("predict-*"))
        events = [json.loads(line)[1] for line in told.splitlines()]
        self.begun[tile] = events.count("begun") - events.count("ended")


def test_a_gpu_predicts_one_tile_and_the_next_ones_wait_for_it(folder):
    there = marked(folder)
    worker = Busy(there.marks)
    actor = Predictor(
        dataclasses.replace(there, make_worker=lambda: worker, device="cuda", under_way=3)
    )
    predicted(actor, range(12))
    assert worker.most["predict"] == 1 and len(worker.begun) == 12
    assert 2 <= max(worker.begun.values()) <= 3


def test_a_tile_that_may_have_ended_its_gpu_is_tried_with_nothing_beside_it(folder):
    there = marked(folder)
    suspects = [2, 5, 6]
    for tile in suspects:
        attempts.Marks(there.marks / f"predict-{tile}").add(Mark(tile, "begun"))
    worker = Busy(there.marks)
    actor = Predictor(
        dataclasses.replace(there, make_worker=lambda: worker, device="cuda", under_way=4)
    )
    predicted(actor, range(10))
    others = [begun for tile, begun in worker.begun.items() if tile not in suspects]
    # Those whose first try was never marked as ended count as begun.
    assert len(others) == 7 and {worker.begun[tile] for tile in suspects} == {4}, worker.begun


# On Ray, in processes of their own with a Ray that is told of a GPU where there is none.


def in_ray_with_a_gpu(name, *arguments):
    """Has a function below called in such a process, and gives the list that it prints."""
    program = f"""
import sys, ray
from tests import test_actors
ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
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
    # Ray may tell something, too.
    (told,) = [line for line in ran.stdout.splitlines() if line.startswith("[")]
    return json.loads(told)


class Dying(Marker):
    """A worker whose process ends in each step, with a tile of its own, so many times."""

    tiles = {"read": 3, "predict": 5, "write": 7}  # noqa: RUF012

    def step(self, name, tile):
        super().step(name, tile)
        if tile == self.tiles[name]:
            with open(Path(self.folder, f"killed-{name}"), "ab") as mark:
                if mark.tell() < self.deaths:
                    mark.write(b".")
                    mark.flush()
                    os.kill(os.getpid(), signal.SIGKILL)


def kill_each_step(folder, deaths):
    """24 tiles in three waves, of which three fail, and three end those who take their steps."""
    pool.FIRST_WAVE, pool.GPU_WAVE, pool.BLOCKS_EACH = 8, 4, 1
    bad = {("read", 0): OSError("a"), ("predict", 1): OSError("b"), ("write", 20): OSError("c")}
    dying = dataclasses.replace(
        marked(Path(folder)),
        make_worker=partial(Dying, folder, bad=bad, deaths=int(deaths)),
        device="cuda",
        under_way=4,
        together=3,
    )
    receipts = [dataclasses.asdict(receipt) for receipt in run(dying, range(24), "ray")]
    print(json.dumps(receipts))


def segment_on_gpus(volume, model, out):
    """Segments by actors of three kinds, as if the CPU were a GPU."""
    task = prepare(volume, model, Path(out), TILED)
    create_store(
        task.out, StoreLayout(task.plan, task.class_values, task.outputs, None), task.provenance
    )
    marks = Path(out, ".unet_ray", "marks")
    marks.mkdir(parents=True)
    stage = Stage("x", task.make_worker, "cuda", marks, under_way=4, make_helper=task.make_helper)
    print(json.dumps([receipt.error for receipt in run(stage, range(len(task.plan)), "ray")]))


@pytest.mark.ray
def test_readers_and_writers_for_gpus_give_the_bytes_of_the_local_engine(task, tmp_path):
    volume, model, store = task
    told = in_ray_with_a_gpu("segment_on_gpus", volume, model, tmp_path / "out.zarr")
    assert told == [""] * 24
    assert bytes_of(tmp_path / "out.zarr") == bytes_of(store)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, 99])
def test_whoever_of_them_is_killed_every_tile_is_told_of_and_written_once(folder, deaths):
    told = in_ray_with_a_gpu("kill_each_step", folder, deaths)
    assert sorted(receipt["tile"] for receipt in told) == [*range(24)]
    failed = {receipt["tile"]: receipt["error"] for receipt in told if receipt["error"]}
    given_up = {3, 5, 7} if deaths > TRIES else set()
    assert failed.keys() == {0, 1, 20} | given_up
    assert all("was begun 3 times and never ended" in failed[tile] for tile in given_up)
    assert [failed[tile] for tile in (0, 1, 20)] == ["OSError: a", "OSError: b", "OSError: c"]
    assert written(folder) == dict.fromkeys({*range(24)} - failed.keys(), 1)
    for step in attempts.STEPS:
        assert (folder / f"killed-{step}").stat().st_size == min(deaths, TRIES)
    assert not [*(folder / "marks").iterdir()]
