"""Model files: round trips, refusals and their messages, and atomic writes."""

import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save

from unet_ray.errors import InputError
from unet_ray.network.checkpoints import (
    FORMAT,
    ModelHeader,
    architecture_of,
    find_model,
    read_hashed_model,
    read_model,
    read_tensors,
    write_model,
    write_tensors,
)
from unet_ray.network.unet import UNet

ARCHITECTURE = {
    "in_channels": 2,
    "classes": 3,
    "base_channels": 2,
    "depth": 1,
    "norm": "batch",
    "dropout": 0.25,
}
HEADER = ModelHeader(
    architecture=ARCHITECTURE,
    class_values=[0, 7, 255],
    normalisation={"method": "mean-std"},
    voxel_size=[0.05, 0.004, 0.004],
    training={"steps": 12, "loss": 0.1 + 0.2, "recipe": "paper"},
    data={"images": {"name": "noyaux d'été.tif", "hash": "ab"}},
    versions={"torch": "2.9"},
)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return UNet(**ARCHITECTURE)


@pytest.fixture
def path(tmp_path, network):
    path = tmp_path / "model.safetensors"
    write_model(path, network, HEADER)
    return path


def refusal(path):
    """The error message for a file; checks that it names the file and has one line."""
    with pytest.raises(InputError) as error:
        read_model(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.endswith(".") and "\n" not in message
    return message.removeprefix(f"{path}: ")


# Round trips.


def test_a_model_is_read_as_it_was_written(path, network):
    loaded, header = read_model(path)
    assert header == HEADER
    assert not loaded.training and architecture_of(loaded) == ARCHITECTURE
    written, read = network.state_dict(), loaded.state_dict()
    assert list(written) == list(read)
    assert all(torch.equal(written[name], read[name]) for name in written)
    image = torch.randn(1, 2, 24, 28)
    assert torch.equal(network.eval()(image), loaded(image))


def test_the_header_is_plain_json_with_all_fields(path):
    # Parsed by hand, as a program without unet-ray would.
    data = path.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    header = json.loads(metadata["header"])
    assert len(header.pop("sha256")) == 64
    assert header == {
        "format": FORMAT,
        "architecture": ARCHITECTURE,
        "class_values": [0, 7, 255],
        "normalisation": {"method": "mean-std"},
        "voxel_size": [0.05, 0.004, 0.004],
        "training": {"steps": 12, "loss": 0.1 + 0.2, "recipe": "paper"},
        "data": {"images": {"name": "noyaux d'été.tif", "hash": "ab"}},
        "versions": {"torch": "2.9"},
        "threshold": None,
    }


def test_writing_a_model_again_writes_the_same_bytes(path, network):
    # Runs identify their model by this hash. Repeated, since a random order may match once.
    hashes = {hashlib.sha256(path.read_bytes()).hexdigest()}
    for _ in range(10):
        write_model(path, network, HEADER)
        hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert hashes == {read_hashed_model(path)[2]}


def test_a_checkpoint_stores_any_tensors(tmp_path):
    path = tmp_path / "step.safetensors"
    tensors = {"a": torch.arange(6).reshape(2, 3).t(), "b": torch.tensor(1.5, dtype=torch.float64)}
    write_tensors(path, tensors, {"step": 3})
    read, header = read_tensors(path)
    assert header == {"step": 3} and set(read) == {"a", "b"}
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())


def test_a_model_is_found_by_its_run_folder_or_its_file(path, monkeypatch):
    assert find_model(path.parent) == find_model(path) == path
    monkeypatch.chdir(path.parent.parent)
    assert find_model(path.parent.name) == path


# Refusals.


def saved(legacy):
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


WEIGHTS = {"weights": [0.1, 0.2, 0.3]}
FOREIGN = {
    "pickle": (pickle.dumps(WEIGHTS), "a Python pickle, which could run code"),
    "old pickle": (pickle.dumps(WEIGHTS, protocol=2), "a Python pickle, which could run code"),
    "oldest pickle": (pickle.dumps(WEIGHTS, protocol=0), "not a safetensors file"),
    "torch.save": (saved(legacy=False), r"a PyTorch .pt file contains a pickle"),
    "old torch.save": (saved(legacy=True), "a Python pickle, which could run code"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(88), "an HDF5 file"),
    "TIFF": (b"II*\0\x08\0\0\0" + bytes(88), "a TIFF image"),
    "big-endian TIFF": (b"MM\0*\0\0\0\x08" + bytes(88), "a TIFF image"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(88), "not a safetensors file"),
    "text": (b"model: my best one, honestly\n", "not a safetensors file"),
    "zeros": (bytes(100), "not a safetensors file"),
    "empty": (b"", "a file of 0 bytes"),
    "other safetensors": (save({"w": torch.zeros(3)}), "that unet-ray did not write"),
    "other format": (
        save({"w": torch.zeros(3)}, {"header": '{"format": "unet-ray model 9"}'}),
        r"that unet-ray did not write \(format 'unet-ray model 9'",
    ),
    "no object": (save({}, {"header": "[]"}), "did not write"),
    "no JSON": (save({}, {"header": "{"}), "damaged"),
    "null": (save({}, {"header": "null"}), "did not write"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_format_of_a_foreign_file_is_named(tmp_path, kind):
    data, message = FOREIGN[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert re.search(message, refusal(path))


class Bomb:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_the_code_in_a_pickle_is_never_run(tmp_path, write):
    path, folder = tmp_path / "model.safetensors", tmp_path / "ran"
    with open(path, "wb") as file:
        write(Bomb(folder), file)
    assert "pickle" in refusal(path)
    assert not folder.exists()
    pickle.loads(pickle.dumps(Bomb(folder)))
    assert folder.exists()  # the bomb works


def test_a_missing_file_is_reported_as_missing(tmp_path):
    assert "no such model file" in refusal(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="no such model file"):
        read_model(tmp_path)  # a folder without a model


def test_a_file_truncated_anywhere_is_reported_as_truncated(path):
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in sorted({*range(0, len(whole), 13), header - 1, header, len(whole) - 1}):
        path.write_bytes(whole[:length])
        message = refusal(path)
        assert f"a file of {length} bytes" in message if length < 10 else "truncated" in message
        if 10 <= length < header:
            assert f"its header needs {header} bytes, it has {length}" in message


def test_a_damaged_header_causes_no_error_but_an_input_error(path):
    whole = path.read_bytes()
    for position in range(0, 8 + int.from_bytes(whole[:8], "little"), 11):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            read_model(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ")


MISFITS = {
    "values of another kind": {"class_values": ["a", "b", "c"]},
    "values out of order": {"class_values": [0, 255, 7]},
    "another normalisation": {"normalisation": {"method": "percentiles"}},
    "other widths": {"architecture": {**ARCHITECTURE, "base_channels": 3}},
    "other depth": {"architecture": {**ARCHITECTURE, "depth": 2}},
    "other norm": {"architecture": {**ARCHITECTURE, "norm": "none"}},
    "unknown argument": {"architecture": {**ARCHITECTURE, "attention": True}},
    "number out of range": {"architecture": {**ARCHITECTURE, "classes": 1}},
    "word for a number": {"architecture": {**ARCHITECTURE, "depth": "four"}},
    "no architecture": {"architecture": None},
    "a class without a value": {"class_values": [0, 255]},
    "a threshold for three classes": {"threshold": 0.5},
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_header_that_does_not_match_the_weights_is_refused(path, network, kind):
    write_model(path, network, replace(HEADER, **MISFITS[kind]))
    assert "header and weights do not match" in refusal(path)


@pytest.mark.parametrize("threshold", [1.0, -0.1, float("nan"), "0.5", False, [0.5]])
def test_a_threshold_that_is_not_a_probability_is_refused(threshold):
    two = {"architecture": {**ARCHITECTURE, "classes": 2}, "class_values": [0, 255]}
    replace(HEADER, **two, threshold=0.0).check()
    with pytest.raises(ValueError, match=r"threshold .* is not a probability of class 1"):
        replace(HEADER, **two, threshold=threshold).check()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "another file of a RUN folder, not a model"),
        ({"architecture": ARCHITECTURE}, "header and weights do not match"),
    ],
)
def test_an_incomplete_header_is_refused(path, network, header, message):
    write_tensors(path, network.state_dict(), header)
    assert message in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(path, network, value):
    with torch.no_grad():
        network.head.weight[1, 0] = value
    write_model(path, network, HEADER)
    assert refusal(path) == "weight 'head.weight' is not finite; train again."


# Atomic writes.


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failed_write_leaves_only_the_old_file(path, monkeypatch, step):
    before = path.read_bytes()

    def fails(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match="the disk is full"):
        write_model(path, UNet(**ARCHITECTURE), HEADER)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_flushed_to_disk_before_it_is_renamed(path, monkeypatch):
    calls = []
    fsync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), move(a, b)))
    write_model(path, UNet(**ARCHITECTURE), HEADER)
    assert calls[:2] == ["fsync", "replace"]


def test_a_file_whose_bytes_have_changed_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.arange(8.0), "b": torch.zeros(2, dtype=torch.uint8)}, {})
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes(9))
    with pytest.raises(InputError, match=r"a\.safetensors: a damaged .*checksum"):
        read_tensors(path)


HOSTILE_HEADERS = {
    "class_values": [
        None,
        5,
        "ab",
        [0, 7, "b"],
        [0, 7, 10**4000],
        [0, 255, 7],
        [True, 7, 255],
        [0.5],
    ],
    "voxel_size": [5, "abc", [1.0, 2.0], [float("inf"), 1.0, 1.0], [0.0, 1.0, 1.0]],
    "training": [None, [], "a"],
    "data": [None, 5],
    "versions": [None, []],
    "normalisation": [None, [], "mean-std"],
    "architecture": [None, [], {"classes": 3}, {**ARCHITECTURE, "depth": "deep"}],
}


@pytest.mark.parametrize("field", HOSTILE_HEADERS)
def test_headers_of_other_types_are_refused(path, network, field):
    for value in HOSTILE_HEADERS[field]:
        rewrite_header(path, network, {field: value})
        assert "do not match" in refusal(path) or "not a model" in refusal(path)


def rewrite_header(path, network, fields):
    """Writes a model whose header has other fields, as a hand would."""
    write_model(path, network, HEADER)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    inner = {**json.loads(header["__metadata__"]["header"]), **fields}
    header["__metadata__"]["header"] = json.dumps(inner)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("stated", ["any", "upright", "fixed", "auto", None, [], {}, 7])
def test_the_network_knows_the_orientation_of_its_training(path, network, stated):
    rewrite_header(path, network, {"training": {"recipe": {"orientation": stated}}})
    known = stated if stated in ("upright", "fixed") else "any"
    assert read_model(path)[0].orientation == known
    rewrite_header(path, network, {"training": {}})
    assert read_model(path)[0].orientation == "any"


@pytest.mark.parametrize("inner", ['{"a":' * 10**5, f"[{'9' * 6000}]", "[]", "5"])
def test_any_json_in_the_header_is_refused(path, network, inner):
    write_model(path, network, HEADER)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["header"] = inner
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert len(refusal(path)) < 400


def test_weights_of_another_type_are_refused(path, network):
    write_tensors(
        path,
        {name: tensor.double() for name, tensor in network.state_dict().items()},
        asdict(HEADER),
    )
    assert "is torch.float64, not torch.float32" in refusal(path)


def test_numbers_that_are_not_json_are_never_written(path, network):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_model(path, network, replace(HEADER, voxel_size=[float("inf"), 1.0, 1.0]))
    assert path.read_bytes() == before


def test_reading_a_model_does_not_import_the_compiler_of_torch(tmp_path):
    """Its import takes most of a second, in the driver and in each worker."""
    write_model(tmp_path / "model.safetensors", UNet(2, 3, 2, 1, "batch", 0.25), HEADER)
    code = (
        "import sys, pathlib; from unet_ray.network.checkpoints import read_model; "
        "read_model(pathlib.Path(sys.argv[1])); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.safetensors"], check=True)
