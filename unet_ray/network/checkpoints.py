"""Model files: safetensors with a JSON header that describes the model and its training.

Handles the bytes on disk and the names of the weights. Never runs code from a file. Checkpoints of
training have the same format, with the state of the optimiser added.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load, save
from torch import Tensor

from unet_ray.errors import InputError, reason
from unet_ray.network.arithmetic import PLANE, Orientation
from unet_ray.network.unet import UNet
from unet_ray.storage.parsing import parse_json
from unet_ray.storage.places import Guard, write_whole

FORMAT = "unet-ray model 1"
WEIGHT = "model."  # prefix of the names of weights in a checkpoint


@dataclass(frozen=True)
class ModelHeader:
    """Description of a model, sufficient to use its file without other information.

    Attributes:
        architecture: arguments of `UNet`.
        class_values: label value of each class, ascending; ISBI 2012: 0 = membrane, 255 = cell.
        normalisation: preparation of intensities, ``{"method": "mean-std"}``. Mean and standard
            deviation are measured for each volume.
        voxel_size: voxel size (z, y, x) of the training images in micrometres, if known.
        training: settings and results of the training run.
        data: identity of the training images and labels.
        versions: versions of the software that wrote the file.
        threshold: probability above which a voxel is of class 1, for two classes; None for the most
            probable class. Training chooses it on slices with labels.
    """

    architecture: dict[str, Any]
    class_values: list[int]
    normalisation: dict[str, Any]
    voxel_size: list[float] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    threshold: float | None = None

    @property
    def orientation(self) -> Orientation:
        """Orientation of the patches of the training; ``any`` if the header does not state it."""
        recipe = self.training.get("recipe")
        stated = recipe.get("orientation") if isinstance(recipe, dict) else None
        return cast(Orientation, stated) if stated in [*PLANE] else "any"

    def check(self) -> None:
        """Checks that this version supports every field, since a file may hold any JSON.

        Raises:
            ValueError: if it does not.
        """
        values = self.class_values
        if not all(type(v) is int and abs(v) < 2**63 for v in values):
            raise ValueError(f"class values {values!r:.100} are not integers of 64 bits")
        if sorted(set(values)) != values:
            raise ValueError(f"class values {values!r:.100} are not ascending")
        if len(values) != self.architecture["classes"]:
            raise ValueError(
                f"{len(values)} class values for {self.architecture['classes']} classes"
            )
        if self.normalisation.get("method") != "mean-std":
            raise ValueError(f"normalisation {self.normalisation!r:.100} is not mean-std")
        sizes = self.voxel_size or (1.0, 1.0, 1.0)
        if len(sizes) != 3 or not all(0 < size < math.inf for size in sizes):
            raise ValueError(f"voxel size {sizes!r:.100} is not three lengths")
        share = 0 if self.threshold is None else self.threshold
        of_class_1 = type(share) in (int, float) and 0 <= share < 1
        if not of_class_1 or (self.threshold is not None and len(values) != 2):
            raise ValueError(f"threshold {self.threshold!r:.100} is not a probability of class 1")
        for name in ("training", "data", "versions"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} is not a JSON object")

    def network(self) -> UNet:
        """An untrained network of this architecture."""
        return UNet(**self.architecture)


def architecture_of(network: UNet) -> dict[str, Any]:
    """Returns the arguments of `UNet` that create this architecture."""
    names = ["in_channels", "classes", "base_channels", "depth", "norm", "dropout"]
    if network.z_levels or network.doubling != "after":  # versions without 3-D read the others
        names += ["z_levels", "doubling"]
    return {name: getattr(network, name) for name in names}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    guard: Guard | None = None,
) -> None:
    """Writes tensors and a header for JSON atomically: `path` is complete or absent."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    fields = {"format": FORMAT, "sha256": _digest(plain), **header}
    # One key only: safetensors writes several in random order, but equal models need equal files.
    text = json.dumps(fields, sort_keys=True, allow_nan=False)
    write_whole(path, save(plain, {"header": text}), guard=guard)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the header of a file that `write_tensors` wrote.

    Raises:
        InputError: if the file is missing, truncated, damaged or of another format.
    """
    return _parse(path, _read_bytes(path))


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise InputError(
                f"{path}: no such model file; pass a RUN folder or a .safetensors file."
            )
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}).") from error


def _parse(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if problem := _format_problem(data):
        raise InputError(f"{path}: {problem}; unet-ray reads only its own .safetensors models.")
    try:
        header_bytes = int.from_bytes(data[:8], "little")
        metadata = parse_json(data[8 : 8 + header_bytes]).get("__metadata__", {})
        header = parse_json(metadata.get("header", "{}"))
        file_format = header.pop("format", None) if isinstance(header, dict) else None
        if file_format != FORMAT:
            raise InputError(
                f"{path}: a safetensors file that unet-ray did not write (format "
                f"{file_format!r}, not {FORMAT!r}); train a model with `unet-ray train`."
            )
        tensors = load(data)
        if header.pop("sha256", None) != _digest(tensors):
            raise InputError(f"{path}: a damaged model file (its checksum does not match).")
        return tensors, header
    except InputError:
        raise
    except Exception as error:  # a parser of arbitrary bytes may fail in any way
        raise InputError(f"{path}: a damaged or truncated model file ({reason(error)}).") from error


def write_model(path: Path, network: UNet, header: ModelHeader) -> None:
    """Writes the float32 weights of `network` and its header atomically."""
    write_tensors(path, network.state_dict(), dataclasses.asdict(header))


def read_model(path: str | os.PathLike[str]) -> tuple[UNet, ModelHeader]:
    """Reads the model of a RUN folder, a model file or a checkpoint.

    Returns:
        The network, ready for inference, and its header.

    Raises:
        InputError: if `read_tensors` refuses the file, header and weights do not match, or a weight
            is not finite.
    """
    network, header, _ = read_hashed_model(path)
    return network, header


def read_hashed_model(path: str | os.PathLike[str]) -> tuple[UNet, ModelHeader, str]:
    """Reads a model as `read_model` does; also returns the SHA-256 of the very bytes it parsed.

    Raises:
        InputError: see `read_model`.
    """
    path = find_model(path)
    data = _read_bytes(path)
    tensors, fields = _parse(path, data)
    if "step" in fields:  # a checkpoint also contains the state of the optimiser
        tensors = {n.removeprefix(WEIGHT): t for n, t in tensors.items() if n.startswith(WEIGHT)}
        fields = {name: fields[name] for name in fields if name in ModelHeader.__dataclass_fields__}
    if "architecture" not in fields:
        raise InputError(f"{path}: another file of a RUN folder, not a model; pass the folder.")
    try:
        header = ModelHeader(**fields)
        header.check()
        with torch.device("meta"):  # allocates no memory, since the header may be wrong
            network = header.network()
        for name, weight in network.state_dict().items():
            if tensors[name].dtype != weight.dtype:
                raise ValueError(f"weight {name!r} is {tensors[name].dtype}, not {weight.dtype}")
        network.load_state_dict(tensors, assign=True)
        network.orientation = header.orientation
    except Exception as error:  # the header may hold any JSON
        raise InputError(f"{path}: header and weights do not match ({reason(error)}).") from error
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise InputError(f"{path}: weight {bad[0]!r} is not finite; train again.")
    return network.eval(), header, hashlib.sha256(data).hexdigest()


def find_model(path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of the model file in a RUN folder, or of the file at `path`.

    Raises:
        InputError: if the training in that folder has not finished.
    """
    absolute = Path(path).absolute()
    if not absolute.is_dir():
        return absolute
    model = absolute / "model.safetensors"
    checkpoints = sorted((absolute / "checkpoints").glob("step-*.safetensors"))
    if checkpoints and not model.exists():
        raise InputError(
            f"{absolute}: its training has not finished; run the same `train` again to resume it, "
            f"or pass {checkpoints[-1]}."
        )
    return model


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _format_problem(data: bytes) -> str | None:
    """Describes a file if its first bytes show that it is not a complete safetensors file."""
    size, start = len(data), data[:16]
    if size < 10:
        return f"a file of {size} bytes"
    kinds = {
        b"\x80": "a Python pickle, which could run code when opened",
        b"PK\x03\x04": "a zip archive (a PyTorch .pt file contains a pickle, which could run code)",
        b"\x89HDF": "an HDF5 file (Keras weights?)",
        b"II*\x00": "a TIFF image",
        b"MM\x00*": "a TIFF image",
    }
    for magic, kind in kinds.items():
        if start.startswith(magic) and start[8:9] != b"{":
            return kind
    if start[8:9] != b"{":
        return f"not a safetensors file (it starts with {start[:8]!r})"
    header_bytes = int.from_bytes(start[:8], "little")
    return (
        f"truncated: its header needs {8 + header_bytes} bytes, it has {size}"
        if 8 + header_bytes > size
        else None
    )
