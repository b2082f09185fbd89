"""Marks of the tiles of a block, and what the next worker reads from them."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet_ray.storage.marks import Mark, Marks, marks_done, remove_older
from unet_ray.storage.places import files_below, place_of

EVENTS = st.builds(
    Mark,
    st.integers(0, 3),
    st.sampled_from(["begun", "late", "ended", "done"]),
    st.floats(0, 1e6),
    st.integers(0, 1 << 50),
    st.binary(max_size=16).map(bytes.hex),
)


def numbers_done(folder, since):
    return [mark.tile for mark in marks_done(folder, since)]


def new_folder(kind, tmp_path_factory):
    if kind == "disk":
        return tmp_path_factory.mktemp("marks")
    return place_of(f"memory://{uuid.uuid4().hex}/marks")


KINDS = pytest.mark.parametrize("kind", ["disk", "objects"])


@KINDS
@given(events=st.lists(EVENTS))
def test_the_next_worker_reads_the_marks_since_the_last_end_of_a_tile(
    kind, tmp_path_factory, events
):
    path = new_folder(kind, tmp_path_factory) / "0"
    first = Marks(path)
    assert first.before(0) == []
    for mark in events:
        first.add(mark)
    for tile in range(4):
        own = [mark for mark in events if mark.tile == tile]
        ended = [number for number, mark in enumerate(own) if mark.event == "ended"]
        assert Marks(path).before(tile) == own[ended[-1] + 1 if ended else 0 :]
    assert first.before(0) == []  # its own marks do not count


@pytest.mark.parametrize("end", range(1, 12))
def test_a_truncated_line_is_ignored(tmp_path, end):
    path = tmp_path / "0"
    Marks(path).add(Mark(5, "begun"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:end])
    assert Marks(path).before(5) == [Mark(5, "begun")]


def test_unreadable_or_unwritable_marks_raise(tmp_path):
    with pytest.raises(FileNotFoundError):
        Marks(tmp_path / "none" / "0").add(Mark(1, "begun"))
    with pytest.raises(IsADirectoryError):
        Marks(tmp_path).before(1)


@KINDS
def test_the_next_run_reads_the_tiles_done_since_the_store_was_created(kind, tmp_path_factory):
    folder = new_folder(kind, tmp_path_factory)
    for epoch, tile, event in [(3, 1, "done"), (4, 2, "begun"), (4, 5, "done"), (1759, 7, "done")]:
        place = folder / str(epoch)
        place.mkdir(parents=True, exist_ok=True)
        Marks(place / "0").add(Mark(tile, event))
    assert sorted(numbers_done(folder, since=0)) == [1, 5, 7]
    assert sorted(numbers_done(folder, since=4)) == [5, 7]
    remove_older(folder, 1759)
    assert sorted(numbers_done(folder, since=0)) == [7]
    assert len([*files_below(folder)]) == 1
    remove_older(folder, 1760)
    assert not [*files_below(folder)] and not [*numbers_done(folder / "none", since=0)]


@pytest.mark.parametrize(
    "line",
    ['["7", "done"]', '[7, "done", 1, 1, 1234]', '[7, "done", 1, 1, "zz"]', '[7, "done", 1, 1, 8]'],
)
def test_marks_with_an_invalid_tile_or_checksum_are_ignored(tmp_path, line):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "0").write_text(f'{line}\n[4, "done", 1.0, 0, "0a"]\n')
    assert [*marks_done(tmp_path, since=0)] == [Mark(4, "done", 1.0, 0, "0a")]


def test_objects_that_are_not_marks_are_ignored():
    folder = place_of(f"memory://{uuid.uuid4().hex}/marks")
    (folder / "3" / "7").put(b'[7, "done", 1.0, 0]\n')  # the format of an older version
    (folder / "3" / "0" / "a,b,c,d,e,f").put(b"")
    Marks(folder / "3" / "0").add(Mark(4, "done"))
    assert [*numbers_done(folder, since=0)] == [4]
    assert Marks(folder / "3" / "0").before(4) == [Mark(4, "done")]
    remove_older(folder, 4)
    assert not [*folder.below()]


def test_no_object_is_written_twice():
    """Some object stores allow one write per second and object."""
    path = place_of(f"memory://{uuid.uuid4().hex}/marks") / "0"
    for worker in (Marks(path), Marks(path), Marks(path)):
        for event in ("begun", "done"):
            worker.add(Mark(4, event))
    assert len([*path.below()]) == 6
