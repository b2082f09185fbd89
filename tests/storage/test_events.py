"""The event log: appended lines, and a reader that skips truncated ones."""

import json
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_ray.errors import RunError
from unet_ray.storage import events
from unet_ray.storage.events import EventLog, measured, read_events


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def names_in(path):
    return [event["event"] for event in read_events(path)]


def test_a_missing_log_has_no_events(path):
    assert list(read_events(path)) == []
    EventLog(path)
    assert not path.exists()


def test_events_are_read_in_order_with_facts_and_times(path):
    log, before = EventLog(path), time.time()
    log.add("start", tiles=24, name="Größe\nzwei Zeilen", region=None)
    log.add("tile", index=3, seconds=0.25)
    first, second = read_events(path)
    assert before - 0.001 <= first.pop("time") <= second.pop("time") <= time.time() + 0.001
    assert first == {"event": "start", "tiles": 24, "name": "Größe\nzwei Zeilen", "region": None}
    assert second == {"event": "tile", "index": 3, "seconds": 0.25}


def test_a_line_is_one_json_object(path):
    log = EventLog(path)
    for n in range(3):
        log.add("tile", index=n)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]
    assert path.read_bytes().endswith(b"\n")


def test_another_run_appends_to_the_log(path):
    EventLog(path).add("one")
    before = path.read_bytes()
    EventLog(path).add("two")
    assert path.read_bytes().startswith(before)
    assert names_in(path) == ["one", "two"]


def test_a_disk_error_that_passes_loses_no_event(path, bad_disk):
    log = EventLog(path)
    log.add("start")
    with open(path, "ab") as file:
        file.write(b'{"event": "ta')  # the part that a failed write has left
    failures = bad_disk(events, "open", times=2)
    log.add("tile", tile=1)
    assert len(failures) == 2 and names_in(path) == ["start", "tile"]


def test_a_disk_error_that_stays_names_the_log(path, bad_disk):
    failures = bad_disk(events, "open")
    with pytest.raises(OSError, match="Input/output error") as caught:
        EventLog(path).add("start")
    assert len(failures) == 3 and caught.value.filename == str(path)


def test_a_tail_truncated_at_any_byte_loses_only_its_line(path):
    log = EventLog(path)
    for name in ("one", "two"):
        log.add(name, text="ä" * 3)
    whole = path.read_bytes()
    end = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        # a line counts even without its newline
        complete = ["one"] * (cut >= end - 1) + ["two"] * (cut >= len(whole) - 1)
        assert names_in(path) == complete
        log.add("three")
        assert names_in(path) == [*complete, "three"]
        assert path.read_bytes().startswith(whole[:cut])


def test_lines_that_are_not_events_are_skipped(path):
    EventLog(path).add("one")
    with open(path, "ab") as file:
        file.write(b'\n\xff\xfe\n[1, 2]\n"word"\n{"event": \nnull\n{}\n')
    EventLog(path).add("two")
    assert [event.get("event") for event in read_events(path)] == ["one", None, "two"]


@settings(max_examples=50)
@given(st.binary(max_size=60))
def test_events_are_read_after_any_content(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    path.write_bytes(content)
    EventLog(path).add("last")
    assert last_name_in(path) == "last"
    assert path.read_bytes().startswith(content)


def last_name_in(path):
    *_, last = read_events(path)
    return last["event"]


def test_a_concurrent_reader_sees_complete_lines(path):
    log = EventLog(path)
    log.add("one")
    events = read_events(path)
    assert next(events)["event"] == "one"
    log.add("two")
    assert names_in(path) == ["one", "two"]


def test_a_line_nested_too_deep_is_skipped(path):
    path.write_bytes(b"[" * 100_000 + b"\n")
    EventLog(path).add("two")
    assert names_in(path) == ["two"]


@pytest.mark.parametrize(
    "value", ["1", None, [1], {}, True, -1e-9, 1e18, 10**400, float("nan"), float("inf")]
)
def test_invalid_values_are_not_measured(value):
    assert measured(value) is None


def test_numbers_within_the_bounds_are_measured():
    assert [measured(v) for v in (0, 2.5, 4e9)] == [0.0, 2.5, 4e9]
    assert measured(-3, low=-4) == -3.0
    assert measured(5e9, high=5e9) == 5e9


def test_a_pipe_in_place_of_the_log_is_refused(tmp_path):
    path = tmp_path / "events.jsonl"
    os.mkfifo(path)
    with pytest.raises(RunError, match=f"{path}: is not a file"):
        EventLog(path).add("start")
