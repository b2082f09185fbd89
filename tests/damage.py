"""Damages files at random, as disks, broken programs and attackers do.

Knows the syntax of JSON, TIFF, PNG and safetensors, so that damage reaches what a checksum or a
length would hide. Does not know how anything is read.
"""

import copy
import functools
import json
import os
import re
import struct
import zlib

NUMBERS = (
    0,
    1,
    2,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**62,
    2**63 - 1,
    2**64 - 1,
)
VALUES = (
    *(None, True, -1, 0, 1, 0.5, -0.0, 2**31, 2**53, 2**63, 2**64, 10**4000, 1e308),
    *(float("inf"), float("nan"), "", "NaN", "\x1b[31m", "\ud800", "\0", "../..", "a" * 300),
    *([], {}, [[]], [0], [0, 0, 0], [1, 2, 3], ["a"], {"a": 1}, [{}], [None] * 1000),
)
TEXTS = (b"INF", b"NaN", b"-1", b"0", b"1e999", b"9" * 6000, b"\x1b[2J", b"\xff\xfe", b"")
BOMB_BYTES = 700 << 20


def damage(rng, file):
    """Damages a file; returns the kind of damage, such as ``truncated``."""
    special = rng.random()
    if special < 0.05:
        return _replace(rng, file)
    stored = file.read_bytes()
    damaged, kind = _damaged(rng, stored)
    file.write_bytes(damaged)
    return kind


def _replace(rng, file):
    """Replaces a file by something that is not one."""
    file.unlink()
    kind = rng.choice(["missing", "device", "pipe", "folder", "loop"])
    if kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    return kind


def _damaged(rng, data):
    structures = {b"{": _json, b"[": _json, b"II*\0": _tiff, b"\x89PNG": _png}
    for magic, structure in structures.items():
        if data.startswith(magic) and rng.random() < 0.6:
            return structure(rng, data)
    if data[8:9] == b"{" and rng.random() < 0.7:
        return _safetensors(rng, data)
    return _bytes(rng, data)


# Bytes of any format


def _bytes(rng, data):
    kind = rng.choice(
        ["flipped", "truncated", "cut", "repeated", "filled", "number", "text", "text", "noise"]
    )
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    changed = bytearray(data)
    if kind == "flipped":
        for _ in range(rng.choice([1, 1, 2, 8]) if data else 0):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncated":
        del changed[rng.choice([0, first, last, max(0, len(data) - 1)]) :]
    elif kind == "cut":
        del changed[first : min(last, first + 64)]
    elif kind == "repeated":
        changed[first:first] = data[first:last]
    elif kind == "filled":
        last = min(last, first + 64)
        changed[first:last] = bytes([rng.choice([0, 255])]) * (last - first)
    elif kind == "noise":
        last = min(last, first + 64)
        changed[first:last] = rng.randbytes(last - first)
    elif kind == "number":
        width, order = rng.choice("HIQ"), rng.choice("<>")
        number = struct.pack(order + width, _number(rng, width))
        changed[first : first + len(number)] = number
    else:
        words = list(re.finditer(rb"[0-9.]+|[A-Za-z]{3,}", data))
        first, last = rng.choice(words).span() if words else (0, 0)
        changed[first:last] = rng.choice(TEXTS)
    return bytes(changed), kind


def _number(rng, width):
    return rng.choice(NUMBERS) % 256 ** struct.calcsize(f"<{width}")


# JSON


def _json(rng, data):
    if rng.random() < 0.1:
        return b'{"a":' * 100_000, "nested"
    try:
        tree = json.loads(data)
    except ValueError:  # such as a log of several lines
        lines = data.split(b"\n")
        number = rng.randrange(len(lines))
        lines[number] = _json(rng, lines[number])[0] if lines[number] else b"[]"
        return b"\n".join(lines), "json"
    return _dumped(damaged_tree(rng, tree)), "json"


def damaged_tree(rng, tree):
    """Returns a copy of a JSON value with one part damaged."""
    tree = copy.deepcopy(tree)
    places = [*_places(tree)]
    if not places:
        return rng.choice(VALUES)
    parent, key = rng.choice(places)
    if isinstance(parent[key], str) and parent[key].startswith("{"):  # JSON in JSON
        parent[key] = _dumped(damaged_tree(rng, json.loads(parent[key]))).decode()
    elif rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(VALUES)
    return tree


def _places(tree):
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def _dumped(tree):
    return json.dumps(tree).encode()


# TIFF: the entries of its directories


def _tiff(rng, data):
    entries = [*_entries(data)]
    if not entries:
        return _bytes(rng, data)
    changed = bytearray(data)
    if rng.random() < 0.02:
        return _tiff_bomb(changed, entries), "bomb"
    place = rng.choice(entries)
    field, width = rng.choice([(0, "H"), (2, "H"), (4, "I"), (8, "I"), (8, "I")])
    struct.pack_into(f"<{width}", changed, place + field, _number(rng, width))
    return bytes(changed), "tag"


def _entries(data):
    """Yields the place of each entry of each directory of a little-endian TIFF file."""
    (directory,) = struct.unpack_from("<I", data, 4)
    seen = set()
    while directory and directory not in seen and directory + 6 <= len(data):
        seen.add(directory)
        (count,) = struct.unpack_from("<H", data, directory)
        end = directory + 2 + 12 * count
        if end + 4 > len(data):
            return
        yield from range(directory + 2, end, 12)
        (directory,) = struct.unpack_from("<I", data, end)


def _tiff_bomb(changed, entries):
    """Points the first strips or tiles to deflated zeros of many times their size."""
    start, bomb = len(changed), _bomb()
    values = {259: 8, 273: start, 324: start, 279: len(bomb), 325: len(bomb)}
    for place in entries:
        tag, _, count, value = struct.unpack_from("<HHII", changed, place)
        if tag in values and count == 1:
            struct.pack_into("<HI", changed, place + 2, 4, 1)
            struct.pack_into("<I", changed, place + 8, values[tag])
        elif tag in values and value + 4 <= start:
            struct.pack_into("<H", changed, place + 2, 4)
            struct.pack_into("<I", changed, value, values[tag])
    return bytes(changed) + bomb


@functools.cache
def _bomb():
    packer, zeros = zlib.compressobj(9), bytes(1 << 20)
    first, again = (packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + again * (BOMB_BYTES >> 20)


# PNG: its chunks, with correct checksums


def _png(rng, data):
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append([data[place + 4 : place + 8], data[place + 8 : place + 8 + length]])
        place += 12 + length
    if not chunks:
        return _bytes(rng, data)
    chunk = rng.choice([chunks[0], rng.choice(chunks)])
    kind = "png"
    if rng.random() < 0.1:
        chunk[1] = _bomb()
        kind = "bomb"
    else:
        chunk[1], _ = _bytes(rng, chunk[1])
    packed = (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return data[:8] + b"".join(packed), kind


# safetensors: its header


def _safetensors(rng, data):
    length = int.from_bytes(data[:8], "little")
    if 8 + length > len(data):
        return _bytes(rng, data)
    if rng.random() < 0.1:
        header = b'{"a":' * 100_000
    else:
        tree = json.loads(data[8 : 8 + length])
        metadata = tree.get("__metadata__", {})
        if rng.random() < 0.6 and metadata.get("header", "").startswith("{"):
            metadata["header"] = _json(rng, metadata["header"].encode())[0].decode()
            header = _dumped(tree)
        else:
            header = _dumped(damaged_tree(rng, tree))
    return len(header).to_bytes(8, "little") + header + data[8 + length :], "header"
