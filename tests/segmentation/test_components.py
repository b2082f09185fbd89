"""Connected components of one tile, and the bytes of its record."""

import struct
import zlib
from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.segmentation.test_unions import CONNECTIONS, bordering, cases, every_connection
from unet_ray.errors import DamageError, RunError
from unet_ray.segmentation import packing
from unet_ray.segmentation.components import (
    Connection,
    TileRecord,
    TileSummary,
    label_components,
)
from unet_ray.tiling.boxes import Box


def record_of(mask, plan, connection, index):
    write = plan[index].write
    labels, count = label_components(mask[write.slices], connection)
    return labels, TileRecord.of(labels, count, write, plan.shape, connection)


def same(first, second, kind=TileRecord):
    """Whether two records, or their summaries, have equal arrays of equal dtypes."""
    for field in fields(kind):
        pairs = [(getattr(first, field.name), getattr(second, field.name))]
        if field.name in ("low", "high"):
            pairs = list(zip(*pairs[0], strict=True))
        for a, b in pairs:
            np.testing.assert_array_equal(a, b)
            assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
    return True


# Connections


@pytest.mark.parametrize(
    ("connect", "connectivity", "neighbours", "complement"),
    [
        ("volume", 6, 6, 26),
        ("volume", 18, 18, 6),
        ("volume", 26, 26, 6),
        ("slice", 6, 4, 8),
        ("slice", 18, 8, 4),
        ("slice", 26, 8, 4),
    ],
)
def test_a_connection_has_the_neighbours_of_its_name(connect, connectivity, neighbours, complement):
    connection = Connection(connect, connectivity)
    assert connection.structure.sum() == neighbours + 1
    assert connection.complement.structure.sum() == complement + 1
    assert connection.complement.connect == connect
    assert connection.structure[1, 1, 1]


@pytest.mark.parametrize(
    ("shape", "volume", "slices"),
    [((5, 5, 5), (0, 1, 2), (1, 2)), ((1, 5, 5), (1, 2), (1, 2)), ((5, 1, 5), (0, 2), (2,))],
)
def test_an_axis_of_extent_1_has_no_border(shape, volume, slices):
    assert Connection("volume").borders(shape) == volume
    assert Connection("slice").borders(shape) == slices


# Labels and records


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_a_record_has_the_sizes_first_voxels_and_borders_of_its_labels(case, data):
    mask, plan, connection = case
    index = data.draw(st.integers(0, len(plan) - 1))
    labels, record = record_of(mask, plan, connection, index)
    assert labels.dtype == np.int32
    whole = np.zeros(plan.shape, np.int64)
    whole[plan[index].write.slices] = labels
    np.testing.assert_array_equal(np.unique(labels[labels > 0]), np.arange(1, record.count + 1))
    firsts = [int(np.flatnonzero(whole == n)[0]) for n in range(1, record.count + 1)]
    assert record.first.tolist() == firsts == sorted(firsts)
    assert record.sizes.tolist() == [(labels == n).sum() for n in range(1, record.count + 1)]
    at_border = np.unique(whole[bordering(plan.shape, connection)])
    assert (np.flatnonzero(record.border) + 1).tolist() == at_border[at_border > 0].tolist()
    for axis, (low, high) in enumerate(zip(record.low, record.high, strict=True)):
        for face, plane in ((low, labels.take(0, axis)), (high, labels.take(-1, axis))):
            touching = np.concatenate([[0], record.touching])
            np.testing.assert_array_equal(touching[face], plane if face.size else face)
    assert same(TileRecord.from_bytes(record.to_bytes()), record)
    assert same(TileSummary.from_bytes(record.to_bytes()), record, TileSummary)


@every_connection
def test_only_faces_towards_other_tiles_are_kept(connection):
    labels, count = label_components(np.ones((2, 3, 4), bool), connection)
    record = TileRecord.of(labels, count, Box((2, 0, 4), (4, 3, 8)), (6, 3, 8), connection)
    z = (3, 4) if connection.connect == "volume" else (0, 0)
    assert [face.shape for face in record.low] == [z, (0, 0), (2, 3)]
    assert [face.shape for face in record.high] == [z, (0, 0), (0, 0)]
    assert record.touching.tolist() == list(range(1, count + 1))


def test_labels_inside_a_tile_touch_no_other():
    mask = np.zeros((5, 5, 5), bool)
    mask[0, 0, 0] = mask[2, 2, 2] = mask[4, 1, 1] = True
    labels, count = label_components(mask, Connection())
    record = TileRecord.of(labels, count, Box((0, 5, 5), (5, 10, 10)), (5, 10, 10), Connection())
    assert record.touching.tolist() == [1]
    assert record.border.tolist() == [True, False, True]


def test_faces_with_more_labels_than_16_bits_survive_their_bytes():
    mask = np.indices((1, 512, 512)).sum(0) % 2 == 0
    labels, count = label_components(mask, Connection())
    write = Box((1, 0, 0), (2, 512, 512))
    record = TileRecord.of(labels, count, write, (3, 512, 512), Connection())
    assert record.high[0].max() == count == 1 << 17
    assert same(TileRecord.from_bytes(record.to_bytes()), record)


# Bytes from any source


def sample(connection=CONNECTIONS[0]):
    mask = np.random.default_rng(0).random((4, 6, 8)) < 0.3
    labels, count = label_components(mask, connection)
    return TileRecord.of(labels, count, Box((4, 0, 8), (8, 6, 16)), (12, 12, 24), connection)


def test_every_changed_byte_of_a_record_is_detected():
    data = sample().to_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(DamageError):
            TileRecord.from_bytes(bytes(damaged))


def test_every_truncated_record_is_detected():
    data = sample().to_bytes()
    for length in range(len(data)):
        with pytest.raises(DamageError):
            TileRecord.from_bytes(data[:length])
    with pytest.raises(DamageError):
        TileRecord.from_bytes(data + b"\0")


def test_a_block_of_another_kind_is_damage():
    with pytest.raises(DamageError, match="start"):
        TileRecord.from_bytes(b"objects1" + sample().to_bytes()[8:])


@pytest.mark.parametrize("kind", [b"labels-1", b"basins-1"])
@pytest.mark.parametrize("read", [TileRecord.from_bytes, TileSummary.from_bytes])
def test_a_record_of_an_older_version_is_no_damage(kind, read):
    with pytest.raises(RunError, match=r"older version .* --overwrite") as refused:
        read(kind + sample().to_bytes()[8:])
    assert not isinstance(refused.value, DamageError)  # repair would not help


def hostile(lengths, content):
    """A record whose checksum is right."""
    rest = struct.pack(f"<{len(lengths)}Q", *lengths) + content
    block = b"summary1" + struct.pack("<I", zlib.crc32(rest)) + rest
    return packing.pack_pair(b"labels-2", block, b"")


@pytest.mark.parametrize(
    "lengths",
    [[2**63] + [0] * 4, [2**64 - 8] * 5, [packing.LARGEST + 8] + [0] * 4, [7] + [0] * 4],
    ids=["one huge", "all huge", "above the limit", "part of a number"],
)
def test_impossible_lengths_are_refused_before_memory_is_taken(lengths, monkeypatch):
    monkeypatch.setattr(packing, "_codec", None)
    with pytest.raises(DamageError, match="impossible lengths"):
        TileRecord.from_bytes(hostile(lengths, b""))


def test_more_bytes_than_stated_are_not_decompressed():
    bomb = pa.Codec("zstd").compress(bytes(1 << 24), asbytes=True)
    for size in (72, 1 << 25):
        with pytest.raises(DamageError, match="decompressed"):
            TileRecord.from_bytes(hostile([size] + [0] * 4, bomb))


def test_a_record_beyond_the_limit_is_not_written(monkeypatch):
    record = sample()
    monkeypatch.setattr(packing, "LARGEST", 100)
    with pytest.raises(RunError, match="use smaller tiles"):
        record.to_bytes()


RECORD = sample()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (4, 6, 8)},
        {"shape": (12, 12, -1)},
        {"write": Box((4, 0, 8), (8, 6, 15))},
        {"write": Box((4, 0, 8), (4, 6, 16))},
        {"sizes": RECORD.sizes[:-1]},
        {"sizes": RECORD.sizes - RECORD.sizes.max()},
        {"first": RECORD.first[::-1].copy()},
        {"first": RECORD.first - RECORD.first[0] - 1},
        {"first": RECORD.first + 12 * 12 * 24},
        {"border": RECORD.border[1:]},
        {"touching": RECORD.touching[1:]},
        {"touching": RECORD.touching[::-1].copy()},
        {"touching": RECORD.touching - RECORD.touching[0]},
        {"touching": RECORD.touching + np.int32(RECORD.count)},
        {"low": (RECORD.low[0] + np.int32(10_000), *RECORD.low[1:])},
        {"high": (RECORD.high[0] - np.int32(1), *RECORD.high[1:])},
        {"high": (RECORD.high[0][1:], *RECORD.high[1:])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_records_that_cannot_be_are_damage(change):
    with pytest.raises(DamageError):
        TileRecord.from_bytes(replace(RECORD, **change).to_bytes())
