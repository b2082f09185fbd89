"""The pace that people are told: that of now, not of an hour ago."""

import math

import pytest

from unet_ray.progress import Pace
from unet_ray.units import format_seconds


def paced(*steps):
    """A pace after tiles of 100 voxels that took so many seconds each."""
    pace, now = Pace(), 0.0
    for number, seconds in enumerate(steps, start=1):
        now += seconds
        pace.saw(now, number, 100 * number)
    return pace


def test_without_a_tile_nothing_is_known():
    assert Pace().seconds(5) == math.inf and Pace().voxels == 0
    assert format_seconds(math.inf) == "unknown time"


def test_the_first_tile_counts_from_the_start():
    assert paced(4).seconds(5) == pytest.approx(20)
    assert paced(4).voxels == pytest.approx(25)


def test_the_start_of_workers_is_forgotten():
    assert paced(30, 2, 2).seconds(10) == pytest.approx(20)


def test_the_pace_is_that_of_the_last_minute():
    steady = [10] * 50
    assert paced(*steady, *[1] * 100).seconds(60) == pytest.approx(60)
    # Long tiles: of the last 20.
    assert paced(*steady, *[100] * 20).seconds(1) == pytest.approx(100)


@pytest.mark.parametrize("workers", [1, 2, 32])
@pytest.mark.parametrize("start", [0.0, 45.0])
def test_tiles_that_end_nearly_together_are_a_round(workers, start):
    """Rounds of 60 s: what is told is right from the second round on, and never far off before."""
    pace, told = Pace(workers), []
    for number in range(1, 5 * workers + 1):
        round_, place = divmod(number - 1, workers)
        pace.saw(start + 60 * (round_ + 1) + 0.1 * place, number, number)
        told.append(pace.seconds(10 * workers))
    assert all(math.isinf(seconds) for seconds in told[: workers - 1])
    assert told[workers - 1] == pytest.approx(600 + 10 * start, rel=0.06)
    assert told[workers:] == pytest.approx([600] * 4 * workers, rel=0.06)


def test_little_is_remembered():
    assert len(paced(*[0.5] * 1000)._seen) <= 123
