"""The ledger after kills: what was committed stays, what was cut short was never there."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_ray.errors import InputError
from unet_ray.ledger import Ledger
from unet_ray.ledger import committed as committed_without_lock

TILES, RECORD = 9, 12


@pytest.fixture
def path(tmp_path):
    return tmp_path / "private" / "segment.ledger"


def committed(path, tiles=TILES):
    with Ledger(path, tiles) as ledger:
        done = [tile for tile in range(tiles) if tile in ledger]
        assert len(ledger) == len(done)
        assert list(ledger.missing(range(tiles))) == [t for t in range(tiles) if t not in done]
        return done


def commit(path, *numbers, tiles=TILES):
    with Ledger(path, tiles) as ledger:
        for number in numbers:
            ledger.commit(number)


def test_a_new_ledger_misses_everything(path):
    assert committed(path) == []


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, TILES - 1), max_size=4), max_size=4))
def test_what_was_committed_is_there_when_reopened(tmp_path_factory, runs):
    path = tmp_path_factory.mktemp("ledger") / "segment.ledger"
    for numbers in runs:
        commit(path, *numbers)
    assert committed(path) == sorted({number for numbers in runs for number in numbers})


def test_a_commit_is_seen_at_once_and_repeats_do_no_harm(path):
    with Ledger(path, TILES) as ledger:
        for number in (4, 2, 4):
            assert (number in ledger) == (number == 4 and len(ledger) == 2)
            ledger.commit(number)
            assert number in ledger
        assert len(ledger) == 2


def test_missing_tiles_keep_their_order(path):
    commit(path, 3, 5)
    with Ledger(path, TILES) as ledger:
        assert list(ledger.missing([8, 5, 0, 3, 7])) == [8, 0, 7]


def test_a_tail_torn_at_any_byte_counts_as_not_written(path):
    commit(path, 7, 0, 5)
    whole = path.read_bytes()
    assert len(whole) == 3 * RECORD
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert committed(path) == sorted([7, 0, 5][: cut // RECORD])
        # Reopening took the torn part away: the next records can be read again.
        commit(path, 8)
        assert committed(path) == sorted([*[7, 0, 5][: cut // RECORD], 8])


def test_a_record_damaged_at_any_byte_is_not_believed(path):
    commit(path, 7, 0, 5)
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        found = committed(path)
        sound = [7, 0, 5][: at // RECORD]
        assert set(sound) <= set(found) <= {7, 0, 5} - {[7, 0, 5][at // RECORD]}
        commit(path, 8)
        assert committed(path) == sorted([*found, 8])


def test_zeros_that_a_file_system_left_are_no_tile_zero(path):
    commit(path, 7)
    path.write_bytes(path.read_bytes() + bytes(2 * RECORD))
    assert committed(path) == [7]


def test_a_number_beyond_the_plan_is_not_believed(path):
    commit(path, 1, 8, 3)
    assert 1 in committed(path, tiles=5)
    commit(path, 4, tiles=5)
    assert {1, 4} <= set(committed(path, tiles=5)) <= {1, 3, 4}


def test_a_record_is_on_disk_when_commit_returns(path, monkeypatch):
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), sizes.append(os.fstat(file))))
    commit(path, 2, 6)
    assert [status.st_size for status in sizes] == [RECORD, 2 * RECORD]


def test_a_commit_that_is_written_in_part_is_finished_or_reported(path, monkeypatch):
    # A full disk takes a part of what is written and says so only in the number returned.
    write = os.write
    with Ledger(path, TILES) as ledger:
        ledger.commit(1)
        try:
            with monkeypatch.context() as full:
                full.setattr(os, "write", lambda file, data: write(file, data[:5]))
                ledger.commit(2)
            ledger.commit(3)
        except OSError:
            pass
        told = [tile for tile in range(TILES) if tile in ledger]
    assert committed(path) == told


def test_a_tile_that_is_not_in_the_plan_leaves_no_record(path):
    with Ledger(path, TILES) as ledger:
        with pytest.raises(IndexError):
            ledger.commit(TILES)
        ledger.commit(3)
    assert committed(path) == [3]


def test_a_ledger_that_is_open_elsewhere_is_refused(tmp_path):
    with Ledger(tmp_path / "ledger", 3) as ledger:
        with pytest.raises(InputError, match="another run is writing here"):
            Ledger(tmp_path / "ledger", 3)
        ledger.commit(1)
    with Ledger(tmp_path / "ledger", 3) as ledger:
        assert 1 in ledger


# Looking without a lock


def looked_at(path, tiles=TILES):
    done = committed_without_lock(path, tiles)
    assert done.dtype == bool and done.shape == (tiles,)
    return np.flatnonzero(done).tolist()


def test_looking_sees_what_a_run_commits_and_does_not_disturb_it(path):
    assert looked_at(path) == [] and not path.parent.exists()
    with Ledger(path, TILES) as ledger:
        for number in (4, 2):
            ledger.commit(number)
            assert number in looked_at(path)
        assert looked_at(path) == [2, 4]
        ledger.commit(8)
    assert committed(path) == looked_at(path) == [2, 4, 8]


def test_looking_at_a_torn_tail_counts_what_is_whole_and_leaves_it(path):
    commit(path, 7, 0, 5)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert looked_at(path) == sorted([7, 0, 5][: cut // RECORD])
        assert path.read_bytes() == whole[:cut]


def test_looking_does_not_believe_a_number_beyond_the_plan(path):
    commit(path, 1, 8, 3)
    assert looked_at(path, tiles=5) == committed(path, tiles=5)
    assert 8 not in looked_at(path, tiles=5)
