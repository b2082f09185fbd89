"""A second, tiny stage in the same runner is killed and resumed independently of other stages."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.helper import Marker, session, stage, written
from unet_ray.engine.rounds import Rounds, numbers_of, tries
from unet_ray.engine.stages import Stage
from unet_ray.errors import QuarantinedError
from unet_ray.storage.layout import LEDGER, ledger_of, marks_of
from unet_ray.storage.lease import Lease
from unet_ray.storage.ledger import Ledger, committed
from unet_ray.storage.marks import Mark, Marks
from unet_ray.tiling.levels import Level
from unet_ray.tiling.tiles import Context, TilePlan

ROOT = Path(__file__).parents[2]
LEVELS = (Level((1, 3, 3), (1, 2, 2)),) * 2
PLAN = TilePlan((1, 64, 64), (1, 8, 8), Context.of_levels(LEVELS), (1, 8, 8))
TILES = len(PLAN)


class Counting(Marker):
    """A worker that slowly adds a file for each tile."""

    def write(self, tile, result):
        time.sleep(0.1)
        super().write(tile, result)


def count(out, folder, engine):
    """Runs the stage on the output to its end."""
    with Lease(Path(out) / ".unet_ray") as lease:
        rounds = Rounds(
            Stage("count", partial(Counting, str(folder)), "cpu"), PLAN, Path(out), lease, engine, 2
        )
        return rounds.run(np.ones(TILES, bool), np.zeros(TILES, bool))


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "engine", ["local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]
)
def test_a_second_stage_is_killed_and_resumed_by_its_own_records(tmp_path, engine):
    out, folder = tmp_path / "out", tmp_path / "tiles"
    folder.mkdir()
    # Ledger and marks of the other stage list all tiles as done.
    (out / marks_of("segment") / "1").mkdir(parents=True)
    with Ledger(out / LEDGER, TILES) as ledger:
        for tile in range(TILES):
            ledger.commit(tile)
            Marks(out / marks_of("segment") / "1" / "0").add(Mark(tile, "done"))
    command = [sys.executable, "-c", "import sys; from tests.engine.test_rounds import count; "]
    command[-1] += "count(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [*command, str(out), str(folder), engine]
    with subprocess.Popen(arguments, env=environment, start_new_session=True) as running:
        until(lambda: committed(out / ledger_of("count"), TILES).any() or running.poll())
        for pid in session(running.pid):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not session(running.pid))
    before, recorded = written(folder), committed(out / ledger_of("count"), TILES)
    assert 0 < recorded.sum() < TILES
    subprocess.run(arguments, env=environment, check=True)
    after = written(folder)
    assert set(after) == set(range(TILES))
    once = dict.fromkeys(numbers_of(recorded), 1)
    assert {tile: after[tile] for tile in numbers_of(recorded)} == once
    # Only tiles that the ledger did not record before the kill are written twice.
    assert sum(after.values()) <= TILES + sum(before.values()) - recorded.sum()
    assert committed(out / ledger_of("count"), TILES).all()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiles").mkdir()
    return tmp_path / "tiles"


def test_a_tile_is_tried_three_times_unless_fewer_are_requested(folder):
    bad = {("read", 1): OSError(5, "Input/output error")}
    attempts = tries(stage(folder, bad=bad), range(3))
    outcomes = [(r.tile, bool(r.error), again) for r, again in attempts]
    assert Counter(outcomes) == Counter(
        {(0, False, False): 1, (2, False, False): 1, (1, True, True): 2, (1, True, False): 1}
    )
    once = [again for receipt, again in tries(stage(folder, bad=bad), [1], most=1)]
    assert once == [False]


def test_a_tile_that_lacks_memory_is_tried_alone_and_then_given_up(folder):
    bad = {("read", 1): MemoryError("out of memory")}
    attempts = tries(stage(folder, bad=bad), range(3))
    assert [again for receipt, again in attempts if receipt.error] == [True, False]


def test_a_stage_names_its_quarantined_tiles_and_finishes_all_others(tmp_path, folder):
    failing = stage(folder, bad={("predict", 5): ValueError("no such voxel")})
    seen = []
    with Lease(tmp_path / "out" / ".unet_ray") as lease:
        rounds = Rounds(failing, PLAN, tmp_path / "out", lease, watch=seen.append)
        with pytest.raises(QuarantinedError, match=r"1 of 64 .* tile 5 .*no such voxel"):
            rounds.run(np.ones(TILES, bool), np.zeros(TILES, bool))
    assert set(written(folder)) == {*range(TILES)} - {5}
    assert (seen[-1].done, seen[-1].quarantined, seen[-1].total) == (TILES - 1, 1, TILES)
    done = committed(tmp_path / "out" / ledger_of(failing.name), TILES)
    assert done.sum() == TILES - 1 and not done[5]
