"""The displayed pace: that of the last minute, not of an hour ago."""

import math

import pytest

from unet_ray.progress import Pace
from unet_ray.units import format_seconds


def paced(*steps):
    """A pace after tiles of 100 voxels that took `steps` seconds each."""
    pace, now = Pace(), 0.0
    for number, seconds in enumerate(steps, start=1):
        now += seconds
        pace.saw(now, number, 100 * number)
    return pace


def test_without_a_tile_the_time_left_is_unknown():
    assert Pace().seconds(5) == math.inf and Pace().voxels == 0
    assert format_seconds(math.inf) == "unknown time"


def test_the_first_tile_counts_from_the_start():
    assert paced(4).seconds(5) == pytest.approx(20)
    assert paced(4).voxels == pytest.approx(25)


def test_the_start_of_workers_is_forgotten():
    assert paced(30, 2, 2).seconds(10) == pytest.approx(20)


def test_only_the_last_minute_counts():
    steady = [10] * 50
    assert paced(*steady, *[1] * 100).seconds(60) == pytest.approx(60)
    # Long tiles: only the last 20 count.
    assert paced(*steady, *[100] * 20).seconds(1) == pytest.approx(100)


@pytest.mark.parametrize("workers", [1, 2, 32])
@pytest.mark.parametrize("start", [0.0, 45.0])
def test_tiles_that_end_at_nearly_the_same_time_are_one_round(workers, start):
    """Rounds of 60 s: the estimate is right from the second round on, and close before."""
    pace, estimates = Pace(workers), []
    for number in range(1, 5 * workers + 1):
        round_, place = divmod(number - 1, workers)
        pace.saw(start + 60 * (round_ + 1) + 0.1 * place, number, number)
        estimates.append(pace.seconds(10 * workers))
    assert all(math.isinf(seconds) for seconds in estimates[: workers - 1])
    assert estimates[workers - 1] == pytest.approx(600 + 10 * start, rel=0.06)
    assert estimates[workers:] == pytest.approx([600] * 4 * workers, rel=0.06)


def test_the_stored_history_is_short():
    assert len(paced(*[0.5] * 1000)._seen) <= 123
