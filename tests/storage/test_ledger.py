"""The ledger after kills: committed tiles are kept, incomplete segments are ignored."""

import itertools
import json
import os
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_ray.errors import DamageError, LostError, RunError
from unet_ray.storage import ledger as ledger_module
from unet_ray.storage.ledger import (
    STATES,
    Ledger,
    checksums,
    committed,
    damaged,
    quarantined,
    skipped,
)

TILES = 21


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "private" / "segment"


@pytest.fixture
def unbuffered(monkeypatch):
    """Every record becomes a separate segment."""
    monkeypatch.setattr(ledger_module, "SECONDS", 0)


def numbers_of(bits):
    return np.flatnonzero(bits).tolist()


def commit(folder, *numbers, tiles=TILES, epoch=1):
    with Ledger(folder, tiles, epoch) as ledger:
        for number in numbers:
            ledger.commit(number)


def commit_and_kill(folder, *numbers):
    """Commits tiles without closing the ledger, as after a kill."""
    ledger = Ledger(folder, TILES)
    for number in numbers:
        ledger.commit(number)


def segments(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_ledger_is_empty(folder):
    assert numbers_of(committed(folder, TILES)) == [] and not folder.parent.exists()
    with Ledger(folder, TILES) as ledger:
        assert len(ledger) == 0
        assert not ledger.committed.any()


NOTES = st.tuples(st.booleans(), st.integers(0, TILES - 1))


@settings(max_examples=60)
@given(
    runs=st.lists(st.lists(NOTES, max_size=6), max_size=4), waits=st.booleans(), kills=st.booleans()
)
def test_records_survive_closing_or_a_kill(tmp_path_factory, runs, waits, kills):
    folder = tmp_path_factory.mktemp("ledger") / "segment"
    done, failed = set(), set()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ledger_module, "SECONDS", 1000 if waits and not kills else 0)
        for notes in runs:
            ledger = Ledger(folder, TILES)
            for good, tile in notes:
                (ledger.commit if good else ledger.quarantine)(tile)
                (done if good else failed).add(tile)
            if not kills:
                ledger.__exit__(None, None, None)
    assert numbers_of(committed(folder, TILES)) == sorted(done)
    assert numbers_of(quarantined(folder, TILES)) == sorted(failed - done)
    with Ledger(folder, TILES) as ledger:
        assert [t for t in range(TILES) if t in ledger] == sorted(done)
        assert len(ledger) == len(done)
        assert numbers_of(ledger.committed) == sorted(done)


def test_a_tile_outside_the_plan_is_refused_and_not_recorded(folder):
    with Ledger(folder, TILES) as ledger:
        for number in (TILES, -1):
            with pytest.raises(IndexError):
                ledger.commit(number)
        ledger.commit(3)
    assert numbers_of(committed(folder, TILES)) == [3]


def test_a_tile_that_is_committed_twice_counts_once(folder):
    with Ledger(folder, TILES) as ledger:
        for tile in (3, 3, 4):
            ledger.commit(tile)
        assert len(ledger) == 2


def test_a_segment_truncated_or_damaged_at_any_byte_is_ignored(folder, unbuffered):
    commit_and_kill(folder, 7, 0, 5)
    last = max(folder.iterdir())
    whole = last.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        for data in (whole[:at], damaged, whole[:at] + bytes(len(whole) - at)):
            last.write_bytes(data)
            if bytes(data) != whole:
                assert numbers_of(committed(folder, TILES)) == [0, 7]
    last.write_bytes(whole)
    assert numbers_of(committed(folder, TILES)) == [0, 5, 7]


def test_a_damaged_segment_is_removed_by_the_next_run(folder, unbuffered):
    commit_and_kill(folder, 7, 5)
    last = max(folder.iterdir())
    last.write_bytes(last.read_bytes()[:-1])
    assert damaged(folder, TILES) == [last]
    commit(folder)
    assert damaged(folder, TILES) == [] and not last.exists()
    assert numbers_of(committed(folder, TILES)) == [7]


def test_a_segment_of_another_plan_is_ignored(folder):
    commit(folder, 1, 8, 3)
    assert numbers_of(committed(folder, TILES + 1)) == []


def test_segments_are_never_overwritten(folder, unbuffered):
    seen = set()
    for tile in range(4):  # all with the same epoch
        commit_and_kill(folder, tile)
        new = {*segments(folder)}
        assert new - seen
        seen |= new
    assert numbers_of(committed(folder, TILES)) == [0, 1, 2, 3]


def test_segments_are_merged_while_they_are_few(folder, unbuffered, monkeypatch):
    monkeypatch.setattr(ledger_module, "SEGMENTS", 5)
    for tile, ledger in zip(range(TILES), itertools.repeat(Ledger(folder, TILES)), strict=False):
        ledger.commit(tile)
        assert len(segments(folder)) <= 6
        assert numbers_of(committed(folder, TILES)) == list(range(tile + 1))


def test_a_closed_ledger_has_one_segment_per_state_and_does_not_change(folder, unbuffered):
    commit(folder, *range(9))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == len(STATES)
    commit(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_kill_while_segments_are_merged_loses_nothing(folder, unbuffered, monkeypatch):
    commit_and_kill(folder, 4, 9, 2, 7)

    class KilledError(Exception):
        pass

    def killed(*_args, **_kwargs):
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.unlink", killed)
        with pytest.raises(KilledError):
            Ledger(folder, TILES)
    assert numbers_of(committed(folder, TILES)) == [2, 4, 7, 9]
    commit(folder, 5)
    assert numbers_of(committed(folder, TILES)) == [2, 4, 5, 7, 9]


def test_a_record_is_written_soon_even_if_no_other_follows(folder, monkeypatch):
    monkeypatch.setattr(ledger_module, "SECONDS", 0.05)
    ledger = Ledger(folder, TILES)
    ledger.commit(1)
    ledger.commit(2)  # within the interval of the first
    end = time.monotonic() + 10
    while numbers_of(committed(folder, TILES)) != [1, 2]:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_disk_raises_and_loses_no_record(folder, unbuffered, monkeypatch):
    ledger = Ledger(folder, TILES)
    ledger.commit(1)

    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ledger_module, "write_whole", full)
        with pytest.raises(OSError, match="No space"):
            ledger.commit(2)
    ledger.flush()
    assert numbers_of(committed(folder, TILES)) == [1, 2]


def test_a_ledger_of_millions_of_tiles_is_small(folder):
    tiles = 10_000_000
    with Ledger(folder, tiles) as ledger:
        for tile in (0, 1, 5_000_000, tiles - 1):
            ledger.commit(tile)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    assert numbers_of(committed(folder, tiles)) == [0, 1, 5_000_000, tiles - 1]


def bits_of(*numbers):
    bits = np.zeros(TILES, bool)
    bits[[*numbers]] = True
    return bits


@pytest.mark.parametrize("kills", [False, True])
def test_skipped_tiles_of_an_earlier_mask_are_forgotten_where_requested(folder, kills):
    requested, masks = bits_of(*range(10)), [bits_of(1, 2), bits_of(2, 3), bits_of()]
    for mask, expected in zip(masks, [[1, 2, 15], [2, 3, 15], [15]], strict=True):
        ledger = Ledger(folder, TILES)
        ledger.skip(bits_of(15), bits_of(15))  # a tile of another region keeps its state
        ledger.skip(mask, requested)
        if not kills:
            ledger.__exit__(None, None, None)
        assert numbers_of(skipped(folder, TILES)) == expected


def test_a_committed_tile_is_neither_skipped_nor_quarantined(folder):
    with Ledger(folder, TILES) as ledger:
        ledger.quarantine(4)
        ledger.skip(bits_of(4, 5, 6), bits_of(4, 5, 6))
        ledger.commit(4)
        ledger.commit(5)
    assert numbers_of(quarantined(folder, TILES)) == []
    assert numbers_of(skipped(folder, TILES)) == [6]
    with Ledger(folder, TILES) as ledger:
        ledger.skip(bits_of(5, 7), bits_of(5, 6, 7))
    assert numbers_of(skipped(folder, TILES)) == [7]


# Recreated stores


def test_records_of_a_run_that_lost_the_store_are_ignored_in_the_next_store(folder):
    old = Ledger(folder, TILES, epoch=3)
    old.commit(1)
    old.flush()
    old.commit(2)
    ledger_module.begin(folder, 4)
    assert numbers_of(committed(folder, TILES)) == []
    with Ledger(folder, TILES, epoch=4) as new:
        new.commit(5)
    old.flush()
    old.commit(7)
    old.__exit__(None, None, None)
    assert numbers_of(committed(folder, TILES)) == [5]
    assert ledger_module.damaged(folder, TILES) == []
    with Ledger(folder, TILES, epoch=5) as new:
        assert len(new) == 1
    assert {path.name[:8] for path in folder.iterdir()} == {"00000004"}


def test_only_the_records_of_the_last_store_count(folder):
    assert not ledger_module.has_begun(folder) and not ledger_module.has_notes(folder)
    for epoch in (1, 2, 5):
        ledger_module.begin(folder, epoch)
        assert ledger_module.has_begun(folder) and not ledger_module.has_notes(folder)
        assert numbers_of(committed(folder, TILES)) == []
        commit(folder, 3, epoch=epoch)
        assert ledger_module.has_notes(folder) and ledger_module.newest(folder) == epoch
    assert numbers_of(committed(folder, TILES)) == [3]


def test_an_older_run_can_neither_create_nor_resume_a_store(folder):
    ledger_module.begin(folder, 4)
    commit(folder, 5, epoch=4)
    for epoch in (3, 4):
        with pytest.raises(LostError, match="another run has taken over"):
            ledger_module.begin(folder, epoch)
    with pytest.raises(LostError, match="another run has taken over"):
        Ledger(folder, TILES, epoch=3)
    assert numbers_of(committed(folder, TILES)) == [5]


@pytest.mark.parametrize("name", ["00000001-00000001.committed", "00000001-00000001.skipped"])
def test_a_segment_that_is_a_broken_link_is_named(folder, name):
    folder.mkdir(parents=True)
    (folder / name).symlink_to("nowhere")
    with pytest.raises(RunError, match=rf"{name}: exists but cannot be read"):
        committed(folder, TILES)


# Checksums and provenance


def checksum(tile, outputs=2):
    return f"{tile + 1:016x}" * outputs


@settings(max_examples=60)
@given(
    runs=st.lists(st.lists(st.integers(0, TILES - 1), max_size=6), max_size=4), kills=st.booleans()
)
def test_checksums_survive_closing_merging_or_a_kill(tmp_path_factory, runs, kills):
    folder, done = tmp_path_factory.mktemp("ledger") / "segment", set()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ledger_module, "SECONDS", 0)
        patched.setattr(ledger_module, "SEGMENTS", 4)
        for tiles in runs:
            ledger = Ledger(folder, TILES)
            for tile in tiles:
                ledger.commit(tile, checksum(tile))
                done.add(tile)
            if not kills:
                ledger.__exit__(None, None, None)
    rows = checksums(folder, TILES)
    recorded = {tile: row.tobytes().hex() for tile, row in enumerate(rows) if row.any()}
    assert recorded == {tile: checksum(tile) for tile in done}


def test_large_segments_are_not_merged_again(folder, unbuffered, monkeypatch):
    monkeypatch.setattr(ledger_module, "MERGED_BYTES", 3000)
    monkeypatch.setattr(ledger_module, "SEGMENTS", 10)
    with Ledger(folder, 400) as ledger:
        for tile in range(400):
            ledger.commit(tile, checksum(tile))
    large = {path: path.read_bytes() for path in folder.glob("*.committed")}
    assert 3 <= len(large) <= 10
    with Ledger(folder, 400) as ledger:
        ledger.commit(7, checksum(7))
    assert len({*large} - {*folder.iterdir()}) <= 2
    assert [row.tobytes().hex() for row in checksums(folder, 400)] == [*map(checksum, range(400))]


HEADER = {"format": 2, "tiles": TILES, "first": 0, "bits": 3, "packed": 9, "checksum": 0}
FORGED = [
    *({name: value} for name in HEADER for value in (-1, "DIGITS", 2**63, 1.5, "3", None, [])),
    *({"first": TILES - 2}, {"bits": TILES + 1}, {"checksum": 257}, {"checksum": 8}, {"packed": 2}),
]


@pytest.mark.parametrize("change", FORGED, ids=lambda change: str(change)[:20])
def test_a_segment_with_a_valid_checksum_and_invalid_content_is_damaged(folder, change):
    folder.mkdir(parents=True)
    packed = zlib.compress(np.packbits(np.ones(3, bool)).tobytes(), 1)
    sound = HEADER | {"packed": len(packed)}
    path = folder / "00000001-00000001.committed"

    def write(header):
        data = header + b"\n" + packed
        path.write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))

    write(json.dumps(sound).encode())
    assert numbers_of(committed(folder, TILES)) == [0, 1, 2]
    text = json.dumps(sound | change).replace('"DIGITS"', "9" * 6000)
    write(text.encode())
    assert ledger_module.damaged(folder, TILES) == [path]
    assert not committed(folder, TILES).any()
    with Ledger(folder, TILES) as ledger:
        assert not len(ledger)
    assert not path.exists()


def test_a_segment_that_inflates_without_end_is_damaged(folder):
    folder.mkdir(parents=True)
    packed = zlib.compress(bytes(1_800_000), 9)  # small enough to be read
    data = json.dumps(HEADER | {"packed": len(packed)}).encode() + b"\n" + packed
    path = folder / "00000001-00000001.committed"
    path.write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))
    tracemalloc.start()
    assert ledger_module.damaged(folder, TILES) == [path]
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("content", [b"[" * 10**6, b"\xff\xfe", b"{}", b"7\n", b""])
def test_any_header_with_a_valid_checksum_is_damaged(folder, content):
    folder.mkdir(parents=True)
    path = folder / "00000001-00000001.quarantined"
    path.write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))
    assert ledger_module.damaged(folder, TILES) == [path]


def test_a_segment_of_absurd_size_is_not_read(folder):
    folder.mkdir(parents=True)
    path = folder / "00000001-00000001.committed"
    path.touch()
    os.truncate(path, 1 << 42)
    assert ledger_module.damaged(folder, TILES) == [path]


def test_a_segment_that_is_a_link_to_a_device_is_named(folder):
    folder.mkdir(parents=True)
    (folder / "00000001-00000001.committed").symlink_to("/dev/zero")
    with pytest.raises(RunError, match=r"committed: exists but cannot be read"):
        committed(folder, TILES)


def test_segments_and_records_of_older_versions_are_read(folder):
    folder.mkdir(parents=True)
    (folder / "00000001.born").touch()
    header = {"format": 1, "tiles": TILES, "first": 2, "bits": 3}
    packed = zlib.compress(np.packbits(np.ones(3, bool)).tobytes(), 1)
    data = json.dumps(header).encode() + b"\n" + packed
    path = folder / "00000001-00000001.committed"
    path.write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))
    assert numbers_of(committed(folder, TILES)) == [2, 3, 4]
    assert not checksums(folder, TILES).any()
    assert ledger_module.recorded_provenance(folder) == {}


def test_a_segment_that_is_damaged_after_it_was_read_is_not_merged(folder, unbuffered, monkeypatch):
    monkeypatch.setattr(ledger_module, "SEGMENTS", 6)
    ledger = Ledger(folder, TILES)
    for tile in range(6):
        ledger.commit(tile, checksum(tile))
    first = min(folder.iterdir())
    first.write_bytes(first.read_bytes()[:-1])
    ledger.commit(6, checksum(6))
    assert numbers_of(committed(folder, TILES)) == [*range(1, 7)]
    assert ledger_module.damaged(folder, TILES) == [first]


def test_a_merge_reads_a_bounded_number_of_tiles(folder, unbuffered, monkeypatch):
    monkeypatch.setattr(ledger_module, "MERGED_TILES", 5)
    commit_and_kill(folder, *range(12))
    with Ledger(folder, TILES):
        assert len([*folder.glob("*.committed")]) == 12 - 6 + 1
    assert numbers_of(committed(folder, TILES)) == [*range(12)]
    monkeypatch.setattr(ledger_module, "SEGMENTS", 4)
    with Ledger(folder, TILES, epoch=2) as ledger:  # the segment of 6 tiles stays
        for tile in range(12, TILES):
            ledger.commit(tile)
        assert len(segments(folder)) <= 6
    assert numbers_of(committed(folder, TILES)) == [*range(TILES)]


def test_the_ledger_records_the_provenance_of_the_newest_store(folder):
    assert ledger_module.recorded_provenance(folder) == {}
    for epoch in (1, 2):
        ledger_module.begin(folder, epoch, {"epoch": epoch})
        assert ledger_module.recorded_provenance(folder) == {"epoch": epoch}
    record = folder / "00000002.born"
    record.write_bytes(record.read_bytes().replace(b": 2", b": 3"))
    with pytest.raises(DamageError, match=rf"{record}: is damaged"):
        ledger_module.recorded_provenance(folder)
