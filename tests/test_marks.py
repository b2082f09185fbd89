"""Marks of the tiles of a block: what the next worker learns from the one before."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet_ray.marks import Mark, Marks

EVENTS = st.builds(
    Mark,
    st.integers(0, 3),
    st.sampled_from(["begun", "late", "failed", "done"]),
    st.floats(0, 1e6),
    st.integers(0, 1 << 50),
)


@given(st.lists(EVENTS))
def test_the_next_worker_learns_of_each_tile_what_came_after_its_last_failure(
    tmp_path_factory, events
):
    path = tmp_path_factory.mktemp("marks") / "0"
    first = Marks(path)
    assert first.before(0) == []
    for mark in events:
        first.add(mark)
    for tile in range(4):
        own = [mark for mark in events if mark.tile == tile]
        failed = [number for number, mark in enumerate(own) if mark.event == "failed"]
        assert Marks(path).before(tile) == own[failed[-1] + 1 if failed else 0 :]
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
