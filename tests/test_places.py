"""Files that are there whole or not at all."""

import os

import pytest

from unet_ray.places import remove_partial, write_whole


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    write_whole(tmp_path / "deep" / "a", b"one")
    write_whole(tmp_path / "deep" / "a", b"two", scratch=tmp_path)
    assert (tmp_path / "deep" / "a").read_bytes() == b"two"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "deep"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"one")

    def fails(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        write_whole(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_what_a_kill_left_is_removed(tmp_path):
    (tmp_path / ".a.0123.partial").write_bytes(b"ha")
    (tmp_path / "a").write_bytes(b"whole")
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
