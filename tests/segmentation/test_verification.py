"""Verification names every damage and nothing else; repair restores the same bytes."""

import dataclasses
import io
import json
import os
import random
import re
import shutil
import sys

import numpy as np
import pytest
from numcodecs import Zstd

from tests.helper import (
    FLOAT32,
    TILED,
    StoppedError,
    bytes_of,
    noise,
    random_model,
    state_of,
    stop_after,
    write_stack,
)
from unet_ray import cli
from unet_ray.errors import InputError, RunError
from unet_ray.segmentation import preparation
from unet_ray.segmentation import run as run_module
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.verification import verify
from unet_ray.storage.events import EventLog, read_events
from unet_ray.storage.layout import EVENTS, LEDGER, PREDICTED, PRIVATE, StoreLayout
from unet_ray.storage.lease import Lease
from unet_ray.storage.ledger import Ledger, begin, committed
from unet_ray.storage.places import write_whole
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.shards import declared_size
from unet_ray.storage.stores import Store, create_store
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import Context, TilePlan

TILES = 24
SHARDS = 2 * TILES
NEAR = Context((0, 4, 4), (0, 4, 4), (1, 4, 4))


@pytest.fixture
def store(task, tmp_path):
    """A copy of the store of `task`, to be damaged by a test."""
    return shutil.copytree(task[2], tmp_path / "out.zarr")


@pytest.fixture
def unet_ray(monkeypatch, capsys):
    """Runs the command line in this process; returns exit code, stdout and stderr."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["unet-ray", *map(str, args)])
        capsys.readouterr()
        code = cli.main()
        return code, *capsys.readouterr()

    return call


def plan_of(store):
    return TilePlan.from_json(
        json.loads((store / "zarr.json").read_text())["attributes"]["unet_ray"]["plan"]
    )


def shard_of(store, tile, name="probabilities"):
    return Store(store, [name]).shard(name, plan_of(store)[tile])


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def the_damage(store, shard, tile, *words, **options):
    """Checks that only this shard is damaged, and that one sentence with `words` names it."""
    verdict = verify(store, **{"tiles": 0, **options})
    [sentence] = verdict.damage
    assert sentence.startswith(f"{shard}: the shard of tile {tile} "), sentence
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence and sentence.endswith(".") and not sentence.endswith("..")
    assert not verdict.sound and verdict.shards == SHARDS
    return verdict


# Sound stores


def test_a_sound_store_is_reported_and_not_changed(store):
    before = state_of(store)
    verdict = verify(store, tiles=2)
    assert (verdict.tiles, verdict.shards) == (TILES, SHARDS)
    assert (verdict.damage, verdict.notes, verdict.repaired) == ((), (), ())
    assert verdict.sound and len({*verdict.recomputed}) == 2
    assert {*verdict.recomputed} <= {*range(TILES)}
    assert state_of(store) == before


def test_the_requested_number_of_tiles_is_recomputed(store, monkeypatch):
    recomputed, predict = [], run_module.TileWorker.predict

    def counted(worker, tile, voxels):
        recomputed.append(tile)
        return predict(worker, tile, voxels)

    monkeypatch.setattr(run_module.TileWorker, "predict", counted)
    assert verify(store, tiles=0).recomputed == () and recomputed == []
    assert verify(store, tiles=10**9).recomputed == (*range(TILES),)
    assert sorted(recomputed) == [*range(TILES)]
    recomputed.clear()
    assert {verify(store, tiles=1).recomputed for _ in range(8)} != {(0,)}
    assert len(recomputed) == 8


def test_repair_of_a_sound_store_changes_nothing(store):
    before = bytes_of(store)
    verdict = verify(store, tiles=0, repair=True)
    assert verdict.sound and not verdict.repaired and bytes_of(store) == before


@pytest.mark.parametrize("outputs", [("probabilities",), ("classes",)])
def test_a_store_with_one_output_and_unusual_settings_is_sound(tmp_path, task, outputs):
    volume, model, _ = task
    settings = dataclasses.replace(TILED, outputs=outputs, tta=True, nan="zero", channel=0, time=0)
    store = segment(volume, model, tmp_path / "out.zarr", settings)
    verdict = verify(store, tiles=1)
    assert verdict.sound and verdict.shards == TILES


def test_a_voxel_size_with_a_unit_is_no_damage(tmp_path, task):
    written = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    metadata = {"axes": "ZYX", "PhysicalSizeZ": 2.0, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    volume = write_stack(
        tmp_path / "volume.ome.tif", noise((2, 20, 20)), metadata=metadata, **written
    )
    store = segment(volume, task[1], tmp_path / "out.zarr", FLOAT32)
    assert '"unit": "micrometer"' in (store / "zarr.json").read_text()
    assert verify(store).sound


@pytest.fixture
def wide(tmp_path):
    """A store whose shards hold several inner chunks, some of them outside the volume."""
    plan = TilePlan((1, 300, 600), (1, 512, 512), NEAR, (1, 512, 512))
    provenance = {"format": 1, "model": {"class_values": [0, 7, 255]}, "input": {}}
    provenance |= {"outputs": [*PREDICTED], "plan": dataclasses.asdict(plan)}
    path, rng = tmp_path / "wide.zarr", np.random.default_rng(0)
    create_store(path, StoreLayout(plan, [0, 7, 255], [*PREDICTED], None), Provenance(provenance))
    with Ledger(path / LEDGER, len(plan)) as ledger:
        for tile in range(len(plan)):
            maps = rng.integers(0, 3, (2, 1, 512, 512), np.uint8)
            Store(path, [*PREDICTED]).write(plan[tile], {"probabilities": maps, "classes": maps[0]})
            ledger.commit(tile)
    return path


def test_inner_chunks_outside_the_volume_do_not_count_as_missing(wide):
    verdict = verify(wide, tiles=0)
    assert verdict.sound and (verdict.tiles, verdict.shards) == (2, 4)


# Damaged shards


@pytest.mark.parametrize("seed", range(20))
def test_every_flipped_bit_is_found(store, seed):
    rng = random.Random(seed)
    tile, name = rng.randrange(TILES), rng.choice([*PREDICTED])
    shard = shard_of(store, tile, name)
    flip(shard, rng.randrange(8 * shard.stat().st_size))
    the_damage(store, shard, tile, "damaged")


def test_every_byte_of_a_shard_is_covered(task, tmp_path):
    volume = write_stack(tmp_path / "volume.tif", noise((1, 5, 6)))
    store = segment(volume, task[1], tmp_path / "out.zarr")
    shard = shard_of(store, 0, "classes")
    whole = shard.read_bytes()
    for at in range(len(whole)):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        assert len(verify(store, tiles=0).damage) == 1, at
    shard.write_bytes(whole)
    assert verify(store, tiles=0).sound


@pytest.mark.parametrize("tile", [0, 1])
def test_flipped_bits_are_found_among_several_inner_chunks(wide, tile):
    shard = shard_of(wide, tile)
    whole, rng = shard.read_bytes(), random.Random(tile)
    index = 16 * 8 + 4
    offsets = [rng.randrange(len(whole)) for _ in range(8)]
    for at in [*offsets, *(len(whole) - rng.randint(1, index) for _ in range(8))]:
        flip(shard, 8 * at + rng.randrange(8))
        assert len(verify(wide, tiles=0).damage) == 1, at
        shard.write_bytes(whole)


def test_bytes_between_the_chunks_of_a_shard_are_found(store):
    """An index that skips some bytes can have a valid checksum, and readers do not notice."""
    from google_crc32c import value

    shard = shard_of(store, 7)
    data, end = shard.read_bytes(), shard.stat().st_size - 20
    index = np.frombuffer(data[end:-4], "<u8").copy()
    index[0] += 3
    index = index.tobytes()
    shard.write_bytes(b"gap" + data[:end] + index + value(index).to_bytes(4, "little"))
    assert Store(store, ["probabilities"]).read("probabilities")[:].any()
    the_damage(store, shard, 7, "index")


@pytest.mark.parametrize("left", [0, 1, 19, 20, 0.5, -1])
def test_a_truncated_shard_is_found(store, left):
    shard = shard_of(store, 5)
    data = shard.read_bytes()
    shard.write_bytes(data[: int(left * len(data)) if isinstance(left, float) else left])
    the_damage(store, shard, 5, "truncated")


def test_a_missing_shard_is_found(store):
    shard = shard_of(store, 11, "classes")
    shard.unlink()
    the_damage(store, shard, 11, "is missing")


def test_every_damaged_shard_has_a_line(store):
    shutil.rmtree(store / "labels/classes/0/c")
    verdict = verify(store, tiles=0)
    assert len(verdict.damage) == TILES and verdict.summary() == (
        f"{TILES} tiles, {SHARDS} shards checked: {TILES} damaged."
    )


def test_a_shard_of_another_tile_is_detected_without_recomputing(store):
    whole = bytes_of(store)
    one, other = shard_of(store, 2), shard_of(store, 9)
    content = one.read_bytes()
    assert plan_of(store)[2].write.shape == plan_of(store)[9].write.shape
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    verdict = verify(store, tiles=0)
    assert [s.split(" contains other voxels")[0] for s in verdict.damage] == [
        f"{path}: the shard of tile {tile}" for path, tile in ((one, 2), (other, 9))
    ]
    verdict = verify(store, tiles=TILES, repair=True)
    assert verdict.repaired == (2, 9) and len(verdict.recomputed) == TILES - 2
    assert bytes_of(store) == whole


# Forged shards


def test_a_link_is_no_shard_and_repair_does_not_write_to_its_target(store, tmp_path):
    shard, elsewhere = shard_of(store, 3), tmp_path / "elsewhere"
    shutil.move(shard, elsewhere)
    shard.symlink_to(elsewhere)
    the_damage(store, shard, 3, "symbolic link")
    before = state_of(tmp_path)[elsewhere]
    assert verify(store, tiles=0, repair=True).sound
    assert shard.is_file() and not shard.is_symlink() and state_of(tmp_path)[elsewhere] == before


def test_a_linked_folder_is_damage_that_repair_does_not_touch(store, tmp_path):
    shard = shard_of(store, 0, "classes")
    shutil.move(shard.parent, tmp_path / "elsewhere")
    shard.parent.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / shard.name).unlink()
    before = state_of(tmp_path / "elsewhere")
    verdict = verify(store, tiles=0, repair=True)
    assert verdict.damage and all("symbolic link" in sentence for sentence in verdict.damage)
    assert not verdict.repaired and state_of(tmp_path / "elsewhere") == before


def test_a_linked_private_folder_is_not_written_by_a_repair(store, tmp_path):
    shutil.move(store / PRIVATE, tmp_path / "elsewhere")
    (store / PRIVATE).symlink_to(tmp_path / "elsewhere")
    before = state_of(tmp_path)
    with pytest.raises(InputError, match=rf"^{store / PRIVATE}: is a symbolic link"):
        verify(store, tiles=0, repair=True)
    assert verify(store, tiles=0).sound
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("loop", ["itself", "gone"])
def test_a_broken_link_is_no_shard(store, tmp_path, loop):
    shard = shard_of(store, 3)
    shard.unlink()
    shard.symlink_to(shard if loop == "itself" else tmp_path / "gone")
    the_damage(store, shard, 3)


def test_a_folder_is_no_shard_and_is_not_deleted(store):
    shard = shard_of(store, 3)
    shard.unlink()
    shard.mkdir()
    (shard / "thesis.tex").write_text("years of work")
    verdict = the_damage(store, shard, 3, "is a folder, not a file")
    assert "thesis.tex" in verdict.notes[0]
    verdict = verify(store, tiles=0, repair=True)
    assert len(verdict.damage) == 2 and "tile 3 cannot be repaired" in verdict.damage[1]
    assert (shard / "thesis.tex").exists()


def test_a_pipe_is_no_shard(store):
    shard = shard_of(store, 3)
    shard.unlink()
    os.mkfifo(shard)
    the_damage(store, shard, 3, "not a file")


def test_a_file_in_place_of_a_folder_is_damage(store):
    folder = shard_of(store, 0).parent
    shutil.rmtree(folder)
    folder.write_text("")
    verdict = verify(store, tiles=0, repair=True)
    assert verdict.damage and not verdict.repaired
    assert "cannot be read (Not a directory)" in verdict.damage[0]


def test_a_shard_that_cannot_be_read_is_damage(store, monkeypatch):
    shard, opened = shard_of(store, 3), io.open

    def guarded(path, *args, **options):
        if str(path) == str(shard):  # as another user would see it
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr("io.open", guarded)
    the_damage(store, shard, 3, "cannot be read (Permission denied)")


def test_a_shard_of_absurd_size_is_not_read(store):
    shard = shard_of(store, 3)
    os.truncate(shard, 1 << 42)
    the_damage(store, shard, 3, "bytes")


def forged(frame, chunks=1):
    """A shard of one inner chunk, with valid checksums."""
    from google_crc32c import value

    chunk = frame + value(frame).to_bytes(4, "little")
    index = np.array([0, len(chunk)] * chunks, "<u8").tobytes()
    return chunk + index + value(index).to_bytes(4, "little")


def test_a_forged_shard_with_valid_checksums_is_detected(store):
    frame = bytes(Zstd(level=1).encode(np.zeros(640, np.uint8)))
    shard_of(store, 3).write_bytes(forged(frame))
    the_damage(store, shard_of(store, 3), 3, "contains other voxels")


@pytest.mark.parametrize("size", [639, 641, 2**40, 2**63])
def test_an_inner_chunk_of_another_size_is_never_decompressed(store, size):
    shard = shard_of(store, 3)
    # a header that declares `size` bytes, and one block of a repeated byte
    frame = b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + b"\x03\x14\x00\x00"
    shard.write_bytes(forged(frame))
    the_damage(store, shard, 3, f"{size} bytes, not 640")


def test_a_bomb_of_several_frames_is_damage(store):
    shard = shard_of(store, 3)
    frames = bytes(Zstd().encode(np.zeros(640, np.uint8))) * 2
    shard.write_bytes(forged(frames))
    the_damage(store, shard, 3, "damaged")


@pytest.mark.parametrize("spans", [[2**64 - 1, 2**64 - 1], [0, 2**63], [2**63, 2**63], [20, 0]])
def test_an_index_that_points_elsewhere_is_damage(store, spans):
    from google_crc32c import value

    shard, index = shard_of(store, 3), np.array(spans, "<u8").tobytes()
    shard.write_bytes(index + value(index).to_bytes(4, "little"))
    the_damage(store, shard, 3, "index")


@pytest.mark.parametrize("size", [0, 1, 255, 256, 300, 65791, 65792, 2**20])
def test_the_declared_size_of_a_frame_is_its_content_size(size):
    assert declared_size(bytes(Zstd().encode(np.zeros(size, np.uint8))) or b"") in (size, None)
    assert size == 0 or declared_size(bytes(Zstd().encode(np.zeros(size, np.uint8)))) == size


@pytest.mark.parametrize(
    "frame", [b"", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\x00", b"PK\3\4" * 9]
)
def test_data_that_is_no_frame_has_no_declared_size(frame):
    assert declared_size(frame) is None


# Metadata

FILES = ["zarr.json", "0/zarr.json", "labels/zarr.json", "labels/classes/zarr.json"]
FILES += ["labels/classes/0/zarr.json"]


@pytest.mark.parametrize(
    "name, how",
    [(name, how) for name in FILES[1:] for how in ("missing", "other")]
    + [("0/zarr.json", how) for how in ("broken", "list", "deep", "empty")],
)
def test_damaged_metadata_is_named_and_repaired(store, name, how):
    path, whole = store / name, bytes_of(store)
    root = json.loads(path.read_text())
    texts = {"broken": "{", "other": json.dumps({**root, "zarr_format": 2}), "list": "[]"}
    texts |= {"deep": "[" * 200000, "empty": ""}
    path.unlink() if how == "missing" else path.write_text(texts[how])
    [sentence] = verify(store, tiles=0).damage
    assert sentence.startswith(f"{path}: ")
    assert ("'zarr_format'" in sentence) == (how == "other")
    verdict = verify(store, tiles=0, repair=True)
    assert verdict.sound and verdict.notes == (f"repaired: {sentence}",)
    assert bytes_of(store) == whole


def test_tiles_are_recomputed_even_if_an_array_cannot_be_opened(store):
    (store / "0/zarr.json").unlink()
    verdict = verify(store, tiles=TILES)
    assert verdict.recomputed == (*range(TILES),) and len(verdict.damage) == 1


def test_a_changed_voxel_size_is_found(store):
    whole = bytes_of(store)
    path = store / "zarr.json"
    root = json.loads(path.read_text())
    root["attributes"]["ome"]["multiscales"][0]["axes"][1]["unit"] = "micrometer"
    path.write_text(json.dumps(root))
    assert not verify(store, tiles=0).sound
    [sentence] = verify(store, tiles=1).damage  # only the volume has the right unit
    assert sentence.startswith(f"{path}: differs in 'attributes'")
    assert verify(store, repair=True).sound and bytes_of(store) == whole


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 200000, '{"attributes": {"unet_ray": 3}}'])
def test_a_store_without_provenance_is_damaged(store, text):
    (store / "zarr.json").write_text(text)
    verdict = verify(store, repair=True)
    [sentence] = verdict.damage
    assert sentence.startswith(f"{store / 'zarr.json'}: its provenance is damaged")
    (store / "zarr.json").unlink()
    assert verify(store).damage == (f"{store / 'zarr.json'}: is missing.",)


INVALID = [
    ("plan", {}),
    ("plan", 3),
    ("plan.shape", [3, 61]),
    ("plan.shape", [3, 61, -75]),
    ("plan.shape", [10**9, 10**9, 10**9]),
    ("plan.core", [1, 32, 0]),
    ("plan.core", [1, "32", 20]),
    ("plan.core", [2**62, 2**60, 2**60]),
    ("outputs", []),
    ("outputs", ["masks"]),
    ("outputs", 3),
    ("model", None),
    ("model", {}),
    ("model.class_values", []),
    ("model.class_values", [0, "x"]),
    ("input", 3),
]


@pytest.mark.parametrize("key, value", INVALID, ids=str)
def test_invalid_provenance_is_damage(store, key, value):
    root = json.loads((store / "zarr.json").read_text())
    *folders, last = ["attributes", "unet_ray", *key.split(".")]
    place = root
    for folder in folders:
        place = place[folder]
    place[last] = value
    (store / "zarr.json").write_text(json.dumps(root))
    assert verify(store, tiles=0).damage


@pytest.mark.parametrize("key", ["precision", "input.channel", "input.level", "model.sha256"])
def test_tiles_are_not_recomputed_from_the_provenance_of_another_run(store, key):
    root = json.loads((store / "zarr.json").read_text())
    *folders, last = ["attributes", "unet_ray", *key.split(".")]
    place = root
    for folder in folders:
        place = place[folder]
    place[last] = "strange"
    (store / "zarr.json").write_text(json.dumps(root))
    verdict = verify(store)
    assert verdict.refusal and not verdict.recomputed and not verdict.sound
    [sentence] = verify(store, tiles=0).damage
    assert sentence.startswith(f"{store / 'zarr.json'}: its {key} was changed from ")
    assert sentence.endswith(" to 'strange' after the run began.")


def test_a_copy_without_hidden_files_is_damaged(store):
    shutil.rmtree(store / PRIVATE)
    [sentence] = verify(store).damage
    assert f"{PRIVATE} is missing" in sentence


# Notes that are no damage


def test_an_unfinished_store_is_sound_and_reported_as_unfinished(tmp_path, task):
    region = dataclasses.replace(TILED, region=Box((0, 0, 0), (1, 61, 75)))
    store = segment(*task[:2], tmp_path / "out.zarr", region)
    verdict = verify(store, tiles=1)
    assert verdict.sound and (verdict.tiles, verdict.shards) == (8, 16)
    assert verdict.notes == ("16 of 24 tiles are not done.",)


def test_an_interrupted_store_is_sound(tmp_path, task):
    out = tmp_path / "out.zarr"
    with pytest.raises(StoppedError):
        segment(*task[:2], out, TILED, stop_after(5))
    done = int(committed(out / LEDGER, TILES).sum())
    verdict = verify(out, tiles=1)
    assert verdict.sound and (verdict.tiles, verdict.shards) == (done, 2 * done)
    assert verdict.notes[0] == f"{TILES - done} of 24 tiles are not done."


def test_an_empty_store_is_sound(tmp_path, task):
    run = preparation.prepare(*task[:2], tmp_path / "out.zarr", TILED)
    layout = StoreLayout(run.plan, run.class_values, run.outputs, run.volume.voxel_size)
    begin(run.out / LEDGER, 1)
    create_store(run.out, layout, run.provenance)
    verdict = verify(run.out)
    assert verdict.sound and verdict.shards == 0 and verdict.recomputed == ()


def test_uncommitted_shards_are_a_note(store):
    shutil.rmtree(store / LEDGER)
    with Ledger(store / LEDGER, TILES) as ledger:
        for tile in range(20):
            ledger.commit(tile)
    flip(shard_of(store, 22), 5)
    verdict = verify(store, tiles=0)
    assert verdict.sound and verdict.shards == 40
    assert verdict.notes[0] == "4 of 24 tiles are not done."
    assert verdict.notes[1].startswith("8 shards belong to tiles that are not done")


def test_a_damaged_ledger_is_damage_until_the_run_resumes(store, task):
    volume, model, whole = task
    [segment_of_ledger] = (store / LEDGER).glob("*.committed")
    flip(segment_of_ledger, 400)
    verdict = verify(store, tiles=0, repair=True)
    [sentence] = verdict.damage
    assert sentence.startswith(f"{segment_of_ledger}: is damaged") and "segment" in sentence
    assert verdict.notes[0] == "24 of 24 tiles are not done."
    segment(volume, model, store, TILED)
    assert verify(store, tiles=0).sound and bytes_of(store) == bytes_of(whole)


@pytest.mark.parametrize(
    "stray", ["notes.txt", "c/0/0", "c/0/0/0/99", "c/0/0/0/00", "c/1/0/0/0", "d/0/0/0/0", "c/٣/0/0"]
)
def test_a_stray_file_is_a_note(store, stray):
    path = store / "0" / stray
    if path.exists():
        path = path / "x"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    verdict = verify(store, tiles=0, repair=True)
    assert verdict.sound and path.exists()
    note = f"1 files among the shards are not from unet-ray, such as {str(path)!r}."
    assert verdict.notes == (note,)


# Repair


def damage_all_kinds(store):
    """Damages four shards of tiles 1, 4 and 20, each in another way."""
    shard_of(store, 1).unlink()
    flip(shard_of(store, 4), 77)
    os.truncate(shard_of(store, 4, "classes"), 30)
    shard_of(store, 20, "classes").write_bytes(b"")


def test_repair_restores_the_same_bytes_and_changes_no_other_file(store):
    whole, before = bytes_of(store), state_of(store)
    damage_all_kinds(store)
    assert len(verify(store, tiles=0).damage) == 4
    verdict = verify(store, tiles=0, repair=True)
    assert verdict.sound and verdict.repaired == (1, 4, 20)
    assert len(verdict.notes) == 4 and all(n.startswith("repaired: ") for n in verdict.notes)
    assert bytes_of(store) == whole
    written = {shard_of(store, 1), shard_of(store, 4), shard_of(store, 4, "classes")}
    written.add(shard_of(store, 20, "classes"))
    after = state_of(store)
    touched = {p for p in after if p.is_file() and PRIVATE not in p.parts} & {
        p for p in after if after[p] != before.get(p)
    }
    assert touched == written
    assert verify(store, tiles=0).notes == ()


def test_repair_is_refused_while_a_run_is_writing(store):
    damage_all_kinds(store)
    before = bytes_of(store)
    with Lease(store / PRIVATE), pytest.raises(InputError, match=str(os.getpid())):
        verify(store, tiles=0, repair=True)
    assert bytes_of(store) == before


def test_a_full_disk_ends_a_repair(store, monkeypatch):
    damage_all_kinds(store)

    def full(path, *more):
        if store in path.parents:
            raise OSError(28, "No space left on device")
        write_whole(path, *more)

    monkeypatch.setattr("unet_ray.storage.stores.write_whole", full)
    with pytest.raises(RunError, match="No space left on device; free disk space"):
        verify(store, tiles=0, repair=True)


def test_a_tile_that_cannot_be_recomputed_is_damage(store, monkeypatch):
    def fail(worker, tile):
        raise ValueError("unreadable")

    monkeypatch.setattr(run_module.TileWorker, "read", fail)
    [sentence] = verify(store, tiles=1).damage
    assert re.search(r"tile \d+ cannot be recomputed: ValueError: unreadable", sentence)
    shard_of(store, 1).unlink()
    assert "tile 1 cannot be repaired" in verify(store, tiles=0, repair=True).damage[-1]


# Input and model


def log_start(store, **facts):
    """Adds a start event with another input or model to the event log."""
    start = next(e for e in read_events(store / EVENTS) if e["event"] == "start")
    EventLog(store / EVENTS).add(
        "start", **{"input": start["input"], "model": start["model"]} | facts
    )


@pytest.mark.parametrize("field", ["input", "model"])
@pytest.mark.parametrize("logged", ["gone.tif", None, 3, ""])
def test_without_input_or_model_only_checksums_are_checked(store, field, logged):
    damaged = shard_of(store, 3)
    log_start(store, **{field: logged})
    verdict = verify(store)
    assert verdict.shards == SHARDS and not verdict.damage and not verdict.sound
    assert verdict.recomputed == () and "--tiles 0" in verdict.refusal
    assert logged != "gone.tif" or "gone.tif" in verdict.refusal
    assert verify(store, tiles=0, repair=True).sound
    damaged.unlink()
    verdict = verify(store, tiles=0, repair=True)
    assert len(verdict.damage) == 1 and verdict.refusal


def test_another_model_is_refused_by_name(store, tmp_path):
    log_start(store, model=str(random_model(tmp_path / "other.safetensors", seed=3)))
    refusal = verify(store).refusal
    assert "another model.sha256" in refusal and "--overwrite" not in refusal


def test_a_store_without_a_log_is_checked(store):
    (store / EVENTS).unlink()
    assert "event log" in verify(store).refusal and verify(store, tiles=0).sound


# The command


def test_the_command_reports_a_sound_store(unet_ray, store):
    code, out, err = unet_ray("verify", store)
    assert (code, err) == (0, "")
    tiles = r"\(tiles \d+, \d+, \d+\)"
    assert re.fullmatch(
        rf"{re.escape(str(store))}: 24 tiles, 48 shards checked, 3 recomputed {tiles}: "
        r"no damage found\.\n",
        out,
    )


def test_the_command_names_damage_and_repairs_it(unet_ray, store):
    shard = shard_of(store, 4)
    flip(shard, 77)
    code, out, err = unet_ray("verify", store, "--tiles", "0")
    assert (code, err) == (1, "")
    first, last = out.splitlines()
    assert first.startswith(f"{shard}: the shard of tile 4 is damaged")
    assert last == f"{store}: 24 tiles, 48 shards checked: 1 damaged."
    code, out, err = unet_ray("verify", store, "--tiles", "0", "--repair")
    assert (code, err) == (0, "")
    repaired, last = out.splitlines()
    assert repaired == f"repaired: {first}"
    assert last == (f"{store}: 24 tiles, 48 shards checked, 1 repaired (tiles 4): no damage found.")


def test_the_command_refuses_to_recompute_in_one_sentence(unet_ray, store):
    log_start(store, input="gone.tif")
    code, out, err = unet_ray("verify", store)
    assert code == 2 and out == f"{store}: 24 tiles, 48 shards checked: no damage found.\n"
    assert re.fullmatch(r"unet-ray: .*gone\.tif.*--tiles 0.*\n", err)
    shard_of(store, 4).unlink()
    code, out, err = unet_ray("verify", store, "--repair")
    assert code == 1 and "is missing" in out and "gone.tif" in err


@pytest.mark.parametrize("kind", ["nothing", "file", "folder", "zarr"])
def test_a_path_that_is_no_output_is_refused(unet_ray, tmp_path, kind):
    path = tmp_path / "out.zarr"
    if kind == "file":
        path.write_text("x")
    elif kind != "nothing":
        path.mkdir()
    if kind == "zarr":
        (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    code, out, err = unet_ray("verify", path)
    assert (code, out) == (2, "") and err.count("\n") == 1 and str(path) in err


def test_a_negative_number_of_tiles_is_refused(unet_ray, store):
    code, out, err = unet_ray("verify", store, "--tiles", "-1")
    assert (code, out) == (2, "") and "-1" in err
    assert unet_ray("verify", store, "--tiles", "many")[0] == 2


# Shards with valid checksums that another run made


def of_another_model(store, task, names=None):
    """Replaces shards by those of another model; returns the names of those that differ."""
    other = random_model(store.parent / "other.safetensors", seed=1)
    theirs = bytes_of(segment(task[0], other, store.parent / "other.zarr", TILED))
    mine = bytes_of(store)
    changed = [n for n in names or mine if "/c/" in n and mine[n] != theirs[n]]
    for name in changed:
        (store / name).write_bytes(theirs[name])
    return changed


def test_repair_finds_all_tiles_of_another_model_after_the_first(store, task):
    whole = bytes_of(store)
    tiles = [f"0/c/0/{z}/{y}/0" for z in range(3) for y in range(2)]
    assert len(of_another_model(store, task, tiles)) == 6
    verdict = verify(store, tiles=TILES - 4, repair=True)  # so that the sample contains one of them
    assert verdict.sound and len(verdict.repaired) == 6
    assert bytes_of(store) == whole


def test_a_store_with_all_shards_of_another_model_is_repaired(store, task):
    whole = bytes_of(store)
    assert len(of_another_model(store, task)) == SHARDS
    assert len(verify(store, tiles=0).damage) == SHARDS
    assert len(verify(store, tiles=2, repair=True).repaired) == TILES
    assert bytes_of(store) == whole


def test_nothing_is_repaired_with_an_edited_provenance(store):
    file = store / "zarr.json"
    root = json.loads(file.read_text())
    root["attributes"]["unet_ray"]["normalisation"]["mean"] = [50.0]
    file.write_text(json.dumps(root))
    shard_of(store, 3).unlink()
    before = bytes_of(store)
    verdict = verify(store, tiles=2, repair=True)
    assert not verdict.sound and not verdict.repaired
    assert "its normalisation.mean was changed from" in verdict.refusal
    assert bytes_of(store) == before


def test_a_tile_is_not_repaired_if_its_recomputed_voxels_differ_from_the_committed(
    store, monkeypatch
):
    shard_of(store, 3).unlink()
    before = bytes_of(store)
    predict = run_module.TileWorker.predict
    monkeypatch.setattr(
        run_module.TileWorker,
        "predict",
        lambda worker, tile, voxels: {
            name: values ^ 1 for name, values in predict(worker, tile, voxels).items()
        },
    )
    verdict = verify(store, tiles=0, repair=True)
    assert not verdict.sound and not verdict.repaired
    assert any("tile 3 cannot be repaired: the recomputed voxels" in s for s in verdict.damage)
    assert bytes_of(store) == before


def test_a_copy_without_its_ledger_is_damaged(store):
    shutil.rmtree(store / LEDGER)
    (damage,) = verify(store, tiles=0).damage
    assert "ledger/segment: is missing" in damage


def test_repair_adds_the_image_that_older_code_left_out_without_probabilities(task, tmp_path):
    volume, model, _ = task
    settings = dataclasses.replace(TILED, outputs=("classes",))
    store = segment(volume, model, tmp_path / "out.zarr", settings)
    root = store / "zarr.json"
    written = root.read_bytes()
    older = json.loads(written)
    del older["attributes"]["ome"]
    root.write_text(json.dumps(older))
    assert not verify(store, tiles=0).sound
    verify(store, tiles=0, repair=True)
    assert root.read_bytes() == written and verify(store, tiles=0).sound
