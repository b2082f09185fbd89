"""Files and JSON of any content: read within bounds, or refused with one error."""

import os

import pytest

from unet_ray.storage.parsing import ContentError, parse_json, read_file


def test_a_regular_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ContentError, match="it has 5 bytes, and at most 4 are valid"):
        read_file(tmp_path / "a", 4)


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_not_a_file_is_refused_without_reading_it(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(ContentError, match=rf"it is a .*{kind}.*, not a file"):
        read_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[" + b"9" * 6000 + b"]", "too many digits"),
        (b'{"a', "Unterminated"),
        (b"\xff\xfe\xff", "decode"),
        (b"", "Expecting value"),
    ],
)
def test_any_damage_of_json_is_one_error(text, message):
    with pytest.raises(ContentError, match=message) as error:
        parse_json(text)
    assert len(str(error.value)) < 200
