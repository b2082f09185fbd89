"""Sizes as people write them, and sums that grow with what they are sums of."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet_ray.errors import InputError
from unet_ray.memory import (
    PROCESS_BYTES,
    NetworkSize,
    format_bytes,
    parse_bytes,
    pass_bytes,
    worker_bytes,
)
from unet_ray.tiles import Context, TilePlan

# Sizes of people.


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1048576", 1 << 20),
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        ("8Gi", 8 << 30),
        ("1.5GiB", 3 << 29),
        ("500 MB", 500 * 10**6),
        ("500m", 500 * 10**6),
        (" 2KiB ", 2048),
        ("2 kB", 2000),
        ("3TiB", 3 << 40),
        ("7b", 7),
    ],
)
def test_sizes_that_people_write(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "lots", "-4GiB", "4 GiB RAM", "4PiB", "4iB", "1e9", "0", "0GiB", "nan", "inf",
     "4,5GiB", "0.5", "0.9B", "9" * 400],
)  # fmt: skip
def test_what_is_no_size_above_zero_is_refused(text):
    with pytest.raises(InputError) as refused:
        parse_bytes(text)
    assert repr(text) in str(refused.value) and "4GiB" in str(refused.value)


@given(st.integers(1, 1 << 49))
def test_a_size_that_was_written_can_be_read(count):
    text = format_bytes(count)
    unit = parse_bytes("1" + text.split()[1])
    assert unit <= count
    assert abs(parse_bytes(text) - count) <= unit * (0.006 if "." in text else 0.5)


@pytest.mark.parametrize("count", [(1 << 20) - 1, (1 << 30) - 1, (1 << 40) - 1])
def test_1024_of_a_unit_are_one_of_the_next(count):
    assert not format_bytes(count).startswith("1024")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2048, "2 KiB"), (300 << 20, "300 MiB"), (3 << 29, "1.50 GiB")],
)
def test_sizes_for_people(count, text):
    assert format_bytes(count) == text


# Bytes of a pass and of a worker; their truth against measured peaks is tested elsewhere.

NET = NetworkSize(in_channels=1, classes=2, base_channels=16, depth=4, weights=10**6, itemsize=4)
PAPER = Context((0, 92, 92), (0, 96, 96), (1, 16, 16))
extents = st.integers(1, 60).map(lambda k: 188 + 16 * k)


@given(st.integers(1, 8), extents, extents)
def test_a_larger_pass_needs_more(batch, y, x):
    needs = pass_bytes(NET, (batch, y, x))
    assert needs < pass_bytes(NET, (batch + 1, y, x))
    assert needs < pass_bytes(NET, (batch, y + 16, x))
    assert needs < pass_bytes(NET, (batch, y, x + 16))
    assert pass_bytes(NET, (batch, x, y)) == pytest.approx(needs, abs=1)


@given(st.integers(1, 4), extents, st.data())
def test_a_larger_network_needs_more(batch, extent, data):
    field = data.draw(st.sampled_from(["in_channels", "base_channels", "itemsize"]))
    larger = replace(NET, **{field: 2 * getattr(NET, field)})
    shape = (batch, extent, extent)
    assert pass_bytes(NET, shape) < pass_bytes(larger, shape)
    # The scores are not always there when the peak is.
    assert pass_bytes(NET, shape) <= pass_bytes(replace(NET, classes=3), shape)
    assert pass_bytes(NET, shape) < pass_bytes(replace(NET, classes=200), shape)


@given(st.integers(1, 200).map(lambda k: 188 + 16 * k))
def test_a_pass_needs_at_least_what_stands_side_by_side(extent):
    # Where the last two levels are joined: the buffer of both, and what comes up into it.
    joined = 3 * NET.base_channels * (extent - 180) ** 2 * NET.itemsize
    assert pass_bytes(NET, (1, extent, extent)) > joined


def planned(core, passes=None):
    return TilePlan((32, 2000, 2000), core, PAPER, passes or core)


def test_a_worker_needs_at_least_the_sum_of_its_parts():
    plan = planned((4, 384, 384), (2, 384, 384))
    memory = worker_bytes(NET, plan, voxel_bytes=2, outputs=3)
    assert memory.process == PROCESS_BYTES["ray"]
    assert memory.on("local").process == PROCESS_BYTES["local"]
    assert memory.weights >= NET.weights * NET.itemsize
    assert memory.tile >= 4 * 572 * 572 * 2 + 4 * 384 * 384 * 3
    assert memory.forward >= pass_bytes(NET, (2, 572, 572))
    assert memory.total >= memory.process + memory.weights + memory.tile + memory.forward


def test_workers_in_one_process_share_the_process_and_the_weights():
    memory = worker_bytes(NET, planned((1, 384, 384)), 1, 2)
    one, two, three = (memory.shared_by(n) for n in (1, 2, 3))
    assert one == memory.total
    assert two - one >= memory.tile + memory.forward
    assert three - two == pytest.approx(two - one, abs=2)
    assert two <= 2 * one - memory.process - memory.weights


@given(st.integers(1, 16), st.integers(1, 30), st.integers(1, 30))
def test_a_larger_tile_needs_more_and_smaller_passes_less(z, y, x):
    core = (z, 16 * y, 16 * x)
    needs = worker_bytes(NET, planned(core), 1, 2).total
    for axis, step in enumerate(PAPER.step):
        more = tuple(n + step * (a == axis) for a, n in enumerate(core))
        assert needs < worker_bytes(NET, planned(more), 1, 2).total
    assert worker_bytes(NET, planned(core, (1, *core[1:])), 1, 2).total <= needs
