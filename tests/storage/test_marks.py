"""Marks of the tiles of a block: what the next worker learns from the one before."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet_ray.storage.marks import Mark, Marks, remove_older, tiles_done
from unet_ray.storage.places import files_below, place_of

EVENTS = st.builds(
    Mark,
    st.integers(0, 3),
    st.sampled_from(["begun", "late", "ended", "done"]),
    st.floats(0, 1e6),
    st.integers(0, 1 << 50),
)


def new_folder(kind, tmp_path_factory):
    if kind == "disk":
        return tmp_path_factory.mktemp("marks")
    return place_of(f"memory://{uuid.uuid4().hex}/marks")


KINDS = pytest.mark.parametrize("kind", ["disk", "objects"])


@KINDS
@given(events=st.lists(EVENTS))
def test_the_next_worker_learns_of_each_tile_what_came_after_its_last_failure(
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
    assert first.before(0) == []  # its own marks are no news to it


@pytest.mark.parametrize("end", range(1, 12))
def test_a_line_that_is_cut_off_is_no_mark(tmp_path, end):
    path = tmp_path / "0"
    Marks(path).add(Mark(5, "begun"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:end])
    assert Marks(path).before(5) == [Mark(5, "begun")]


def test_marks_that_cannot_be_read_or_written_say_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        Marks(tmp_path / "none" / "0").add(Mark(1, "begun"))
    with pytest.raises(IsADirectoryError):
        Marks(tmp_path).before(1)


@KINDS
def test_the_next_run_learns_what_was_done_since_the_store_was_made(kind, tmp_path_factory):
    folder = new_folder(kind, tmp_path_factory)
    for epoch, tile, event in [(3, 1, "done"), (4, 2, "begun"), (4, 5, "done"), (1759, 7, "done")]:
        place = folder / str(epoch)
        place.mkdir(parents=True, exist_ok=True)
        Marks(place / "0").add(Mark(tile, event))
    assert sorted(tiles_done(folder, since=0)) == [1, 5, 7]
    assert sorted(tiles_done(folder, since=4)) == [5, 7]
    remove_older(folder, 1759)
    assert sorted(tiles_done(folder, since=0)) == [7]
    assert len([*files_below(folder)]) == 1
    remove_older(folder, 1760)
    assert not [*files_below(folder)] and not [*tiles_done(folder / "none", since=0)]


def test_objects_that_are_no_marks_are_passed_over():
    folder = place_of(f"memory://{uuid.uuid4().hex}/marks")
    (folder / "3" / "7").put(b'[7, "done", 1.0, 0]\n')  # as an older version wrote them
    (folder / "3" / "0" / "a,b,c,d,e,f").put(b"")
    Marks(folder / "3" / "0").add(Mark(4, "done"))
    assert [*tiles_done(folder, since=0)] == [4]
    assert Marks(folder / "3" / "0").before(4) == [Mark(4, "done")]
    remove_older(folder, 4)
    assert not [*folder.below()]


def test_no_object_of_marks_is_written_twice():
    """Some object stores take one write a second of each."""
    path = place_of(f"memory://{uuid.uuid4().hex}/marks") / "0"
    for worker in (Marks(path), Marks(path), Marks(path)):
        for event in ("begun", "done"):
            worker.add(Mark(4, event))
    assert len([*path.below()]) == 6
