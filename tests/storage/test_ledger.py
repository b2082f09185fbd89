"""The ledger after kills: what was committed stays, what was cut short was never there."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_ray.errors import LostError, RunError
from unet_ray.storage import ledger as ledgers
from unet_ray.storage.ledger import STATES, Ledger, committed, quarantined

TILES = 21


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "private" / "segment"


@pytest.fixture
def at_once(monkeypatch):
    """Every note becomes a segment of its own."""
    monkeypatch.setattr(ledgers, "SECONDS", 0)


def held(bits):
    return np.flatnonzero(bits).tolist()


def commit(folder, *numbers, tiles=TILES, epoch=1):
    with Ledger(folder, tiles, epoch) as ledger:
        for number in numbers:
            ledger.commit(number)


def cut_short(folder, *numbers):
    """Commits, and is killed: nothing of what closes a ledger happens."""
    ledger = Ledger(folder, TILES)
    for number in numbers:
        ledger.commit(number)


def segments(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_ledger_misses_everything(folder):
    assert held(committed(folder, TILES)) == [] and not folder.parent.exists()
    with Ledger(folder, TILES) as ledger:
        assert len(ledger) == 0
        assert not ledger.committed.any()


NOTES = st.tuples(st.booleans(), st.integers(0, TILES - 1))


@settings(max_examples=60)
@given(
    runs=st.lists(st.lists(NOTES, max_size=6), max_size=4), waits=st.booleans(), kills=st.booleans()
)
def test_what_was_noted_is_there_when_reopened(tmp_path_factory, runs, waits, kills):
    folder = tmp_path_factory.mktemp("ledger") / "segment"
    done, given_up = set(), set()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ledgers, "SECONDS", 1000 if waits and not kills else 0)
        for notes in runs:
            ledger = Ledger(folder, TILES)
            for good, tile in notes:
                (ledger.commit if good else ledger.quarantine)(tile)
                (done if good else given_up).add(tile)
            if not kills:
                ledger.__exit__(None, None, None)
    assert held(committed(folder, TILES)) == sorted(done)
    assert held(quarantined(folder, TILES)) == sorted(given_up - done)
    with Ledger(folder, TILES) as ledger:
        assert [t for t in range(TILES) if t in ledger] == sorted(done)
        assert len(ledger) == len(done)
        assert held(ledger.committed) == sorted(done)


def test_a_tile_that_is_not_in_the_plan_leaves_no_note(folder):
    with Ledger(folder, TILES) as ledger:
        for number in (TILES, -1):
            with pytest.raises(IndexError):
                ledger.commit(number)
        ledger.commit(3)
    assert held(committed(folder, TILES)) == [3]


def test_a_segment_cut_or_damaged_at_any_byte_holds_nothing(folder, at_once):
    cut_short(folder, 7, 0, 5)
    last = max(folder.iterdir())
    whole = last.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        for data in (whole[:at], damaged, whole[:at] + bytes(len(whole) - at)):
            last.write_bytes(data)
            if bytes(data) != whole:
                assert held(committed(folder, TILES)) == [0, 7]
    last.write_bytes(whole)
    assert held(committed(folder, TILES)) == [0, 5, 7]


def test_a_segment_of_another_plan_holds_nothing(folder):
    commit(folder, 1, 8, 3)
    assert held(committed(folder, TILES + 1)) == []


def test_no_segment_is_ever_written_over(folder, at_once):
    seen = set()
    for tile in range(4):  # all of one epoch
        cut_short(folder, tile)
        new = {*segments(folder)}
        assert new - seen
        seen |= new
    assert held(committed(folder, TILES)) == [0, 1, 2, 3]


def test_segments_are_put_together_before_they_are_many(folder, at_once, monkeypatch):
    monkeypatch.setattr(ledgers, "SEGMENTS", 5)
    for tile, ledger in zip(range(TILES), itertools.repeat(Ledger(folder, TILES)), strict=False):
        ledger.commit(tile)
        assert len(segments(folder)) <= 6
        assert held(committed(folder, TILES)) == list(range(tile + 1))


def test_a_closed_ledger_is_one_segment_per_state_and_stays_as_it_is(folder, at_once):
    commit(folder, *range(9))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == len(STATES)
    commit(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_kill_while_segments_are_put_together_loses_nothing(folder, at_once, monkeypatch):
    cut_short(folder, 4, 9, 2, 7)

    class KilledError(Exception):
        pass

    def killed(*_args, **_kwargs):
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.unlink", killed)
        with pytest.raises(KilledError):
            Ledger(folder, TILES)
    assert held(committed(folder, TILES)) == [2, 4, 7, 9]
    commit(folder, 5)
    assert held(committed(folder, TILES)) == [2, 4, 5, 7, 9]


def test_a_note_is_on_disk_soon_though_no_other_follows(folder, monkeypatch):
    monkeypatch.setattr(ledgers, "SECONDS", 0.05)
    ledger = Ledger(folder, TILES)
    ledger.commit(1)
    ledger.commit(2)  # within the time of the first
    end = time.monotonic() + 10
    while held(committed(folder, TILES)) != [1, 2]:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_disk_is_told_and_loses_no_note(folder, at_once, monkeypatch):
    ledger = Ledger(folder, TILES)
    ledger.commit(1)

    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ledgers, "write_whole", full)
        with pytest.raises(OSError, match="No space"):
            ledger.commit(2)
    ledger.flush()
    assert held(committed(folder, TILES)) == [1, 2]


def test_millions_of_tiles_open_quickly_enough_to_be_one_small_file(folder):
    tiles = 10_000_000
    with Ledger(folder, tiles) as ledger:
        for tile in (0, 1, 5_000_000, tiles - 1):
            ledger.commit(tile)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    assert held(committed(folder, tiles)) == [0, 1, 5_000_000, tiles - 1]


# A store that was made anew.


def test_what_a_run_notes_that_was_forced_out_of_the_store_before_counts_for_nothing(folder):
    old = Ledger(folder, TILES, epoch=3)
    old.commit(1)
    old.flush()
    old.commit(2)
    ledgers.begin(folder, 4)
    assert held(committed(folder, TILES)) == []
    with Ledger(folder, TILES, epoch=4) as new:
        new.commit(5)
    old.flush()
    old.commit(7)
    old.__exit__(None, None, None)
    assert held(committed(folder, TILES)) == [5]
    assert ledgers.damaged(folder, TILES) == []
    with Ledger(folder, TILES, epoch=5) as new:
        assert len(new) == 1
    assert {path.name[:8] for path in folder.iterdir()} == {"00000004"}


def test_the_last_store_made_counts(folder):
    assert not ledgers.has_begun(folder) and not ledgers.has_notes(folder)
    for epoch in (1, 2, 5):
        ledgers.begin(folder, epoch)
        assert ledgers.has_begun(folder) and not ledgers.has_notes(folder)
        assert held(committed(folder, TILES)) == []
        commit(folder, 3, epoch=epoch)
        assert ledgers.has_notes(folder) and ledgers.newest(folder) == epoch
    assert held(committed(folder, TILES)) == [3]


def test_an_older_run_can_neither_begin_a_store_nor_go_on_with_it(folder):
    ledgers.begin(folder, 4)
    commit(folder, 5, epoch=4)
    for epoch in (3, 4):
        with pytest.raises(LostError, match="another run has taken over"):
            ledgers.begin(folder, epoch)
    with pytest.raises(LostError, match="another run has taken over"):
        Ledger(folder, TILES, epoch=3)
    assert held(committed(folder, TILES)) == [5]


@pytest.mark.parametrize("name", ["00000001-00000001.committed", "00000001-00000001.skipped"])
def test_a_segment_that_leads_nowhere_is_named(folder, name):
    folder.mkdir(parents=True)
    (folder / name).symlink_to("nowhere")
    with pytest.raises(RunError, match=rf"{name}: exists but cannot be read"):
        committed(folder, TILES)
