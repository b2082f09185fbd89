"""Files and objects that are written atomically."""

import errno
import os
import pickle
import re
import sys
import time
import uuid
from contextlib import nullcontext
from pathlib import Path, PurePath

import pytest

from unet_ray.errors import InputError
from unet_ray.storage.objects import ObjectPath
from unet_ray.storage.places import (
    files_below,
    place_of,
    remove_partial,
    remove_tree,
    stat_of,
    write_whole,
)


def test_a_file_is_replaced_without_leaving_temporary_files(tmp_path):
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


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_error_that_passes_is_retried(tmp_path, bad_disk, step):
    failures = bad_disk(os, step, times=2)
    write_whole(tmp_path / "a", b"one")
    assert len(failures) == 2 and (tmp_path / "a").read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(("number", "tries"), [(errno.EIO, 3), (errno.ENOSPC, 1)])
def test_a_disk_error_that_stays_names_the_file(tmp_path, bad_disk, step, number, tries):
    write_whole(tmp_path / "a", b"one")
    failures = bad_disk(os, step, number=number)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_whole(tmp_path / "a", b"two")
    assert len(failures) == tries and caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_temporary_files_of_a_kill_are_removed(tmp_path):
    (tmp_path / ".a.0123.partial").write_bytes(b"ha")
    (tmp_path / "a").write_bytes(b"whole")
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_an_object_that_others_keep_writing_raises(monkeypatch):
    place = place_of(f"memory://{uuid.uuid4().hex}/a")
    monkeypatch.setattr("unet_ray.storage.places.PAUSES", (0.0, 0.0))
    others = iter([b"theirs"])
    write_whole(place, b"one", guard=lambda: nullcontext([place.put(data) for data in others]))
    assert place.read_bytes() == b"one"
    with pytest.raises(OSError, match="other processes keep writing this object"):
        write_whole(place, b"two", guard=lambda: nullcontext(place.put(uuid.uuid4().bytes)))


# Names in object stores


def test_a_name_in_a_bucket_has_the_parts_of_a_path():
    place = place_of("s3://bucket/lab//out.zarr/")
    assert place == ObjectPath("s3://bucket", "lab/out.zarr")
    assert str(place / "0" / PurePath("c/1.x")) == "s3://bucket/lab/out.zarr/0/c/1.x"
    assert (place.name, place.stem, place.suffix) == ("out.zarr", "out", ".zarr")
    assert str(place.parent) == "s3://bucket/lab"
    assert place.with_name("b") == place.parent / "b"
    assert place_of(place) is place and pickle.loads(pickle.dumps(place)) == place
    assert place_of("S3://bucket/a") == place_of("s3://bucket/a")


def test_a_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place_of("a:b/c") == tmp_path / "a:b" / "c"
    assert place_of(Path("x/../y")) == tmp_path / "y"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://server/a", "https:// is not a supported object store"),
        ("s4://bucket/a", "did you mean 's3'"),
        ("s3://bucket", "is not a name in a bucket; write s3://BUCKET/NAME"),
        ("s3://bucket//", "is not a name in a bucket"),
        ("s3:///a", "is not a name in a bucket"),
        ("s3://bucket/a/../../b", "contains a part '.' or '..'"),
        ("s3://bucket/./b", "contains a part '.' or '..'"),
        ("s3://bucket/a\\b", "a backslash"),
        ("s3://bucket/a\nb", "a control character"),
    ],
)
def test_invalid_names_in_a_bucket_are_refused(url, words):
    with pytest.raises(InputError, match=re.escape(words)):
        place_of(url)


def test_object_stores_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InputError, match="pip install obstore"):
        place_of("s3://bucket/a").exists()


@pytest.fixture
def memory():
    """A place in an object store that only this test uses."""
    return place_of(f"memory://{uuid.uuid4().hex}/a")


def test_objects_are_written_read_listed_and_removed(memory):
    assert not memory.exists() and list(memory.below()) == []
    for name in ("b", "b/c", "b/d.x", "e", "new"):
        write_whole(memory / name, name.encode())
    assert (memory / "e").read_text() == "e" and (memory / "new").read_bytes() == b"new"
    assert memory.is_dir() and not memory.is_file() and (memory / "b").is_file()
    assert [str(p)[len(str(memory)) :] for p in memory.below()] == [
        "/b", "/b/c", "/b/d.x", "/e", "/new"
    ]  # fmt: skip
    assert [p.name for p in memory.glob("[a-d]*")] == ["b"]
    assert [p.name for p in files_below(memory / "b")] == ["c", "d.x"]
    assert stat_of(memory / "e").size == 1
    (memory / "e").unlink()
    (memory / "e").unlink()
    remove_tree(memory / "b")
    assert [p.name for p in memory.below()] == ["b", "new"]
    remove_tree(memory / "b")
    for access in (ObjectPath.read_bytes, stat_of):
        with pytest.raises(FileNotFoundError, match=re.escape(str(memory / "e"))):
            access(memory / "e")


def test_a_conditional_put_with_an_old_tag_is_refused(memory):
    first = memory.put_if(b"1", None)
    assert first and memory.put_if(b"2", None) is None
    second = memory.put_if(b"2", first)
    assert second and memory.put_if(b"3", first) is None
    content = memory.content()
    assert (content.data, content.tag) == (b"2", second) and abs(
        content.modified - time.time()
    ) < 60
    memory.unlink()
    assert memory.put_if(b"4", second) is None and not memory.exists()
