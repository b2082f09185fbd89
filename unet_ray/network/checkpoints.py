"""Model files: safetensors with a JSON header that says how the model was made.

Knows bytes on disk and the network's name for each weight; runs no code that a file holds. The
same format, with optimiser state added, serves as a checkpoint of training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unet_ray.errors import InputError
from unet_ray.network.unet import UNet
from unet_ray.storage.places import Guard, write_whole

FORMAT = "unet-ray model 1"
WEIGHT = "model."  # how the names of a checkpoint's weights begin


@dataclass(frozen=True)
class ModelHeader:
    """What a model file says of itself, enough to use it with nothing else.

    Attributes:
        architecture: arguments of `UNet`.
        class_values: label value of each class, ascending; ISBI: 0 membrane, 255 cell.
        normalisation: how intensities are prepared, ``{"method": "mean-std"}``; the values come
            from each volume itself.
        voxel_size: (z, y, x) in micrometre of the training images, where their file says so.
        training: settings and results of the training run.
        data: fingerprint of images and labels.
        versions: software that wrote the file.
    """

    architecture: dict[str, Any]
    class_values: list[int]
    normalisation: dict[str, Any]
    voxel_size: list[float] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Refuses what this version could not honour.

        Raises:
            ValueError: naming what.
        """
        values = self.class_values
        if not all(isinstance(v, int) for v in values) or sorted(set(values)) != values:
            raise ValueError(f"class values {values} are not ascending integers")
        if len(values) != self.architecture["classes"]:
            raise ValueError(f"{len(values)} class values")
        if self.normalisation.get("method") != "mean-std":
            raise ValueError(f"normalisation {self.normalisation} is not mean-std")

    def network(self) -> UNet:
        """An untrained network of this architecture."""
        return UNet(**self.architecture)


def architecture_of(network: UNet) -> dict[str, Any]:
    """The arguments that make a network like this one."""
    names = ("in_channels", "classes", "base_channels", "depth", "norm", "dropout")
    return {name: getattr(network, name) for name in names}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    guard: Guard | None = None,
) -> None:
    """Writes tensors and a JSON-able header so that `path` is whole or absent."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = {"format": FORMAT, "sha256": _digest(plain), **header}
    # One key only: safetensors writes several in random order, and equal models are equal files.
    write_whole(path, save(plain, {"header": json.dumps(told, sort_keys=True)}), guard=guard)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_tensors` wrote.

    Raises:
        InputError: if the file is missing, cut short, or of another kind; says which kind.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such model file; give a RUN folder or a .safetensors file.")
    try:
        if problem := _foreign(path):
            raise InputError(f"{path}: {problem}; unet-ray reads only its own .safetensors models.")
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            written = header.pop("format", None) if isinstance(header, dict) else None
            if written != FORMAT:
                raise InputError(
                    f"{path}: a safetensors file that unet-ray did not write (format {written!r}, "
                    f"not {FORMAT!r}); train one with `unet-ray train`."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.pop("sha256", None) != _digest(tensors):
            raise InputError(f"{path}: a damaged model file (its checksum differs).")
        return tensors, header
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except (SafetensorError, json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{path}: a damaged or truncated model file ({error}).") from error


def write_model(path: Path, network: UNet, header: ModelHeader) -> None:
    """Writes the weights of `network` (float32) and its header, atomically."""
    write_tensors(path, network.state_dict(), dataclasses.asdict(header))


def read_model(path: Path) -> tuple[UNet, ModelHeader]:
    """The network of a model file or of a checkpoint, ready for inference, and its header.

    Raises:
        InputError: as `read_tensors`; also if the header and the weights do not fit.
    """
    tensors, told = read_tensors(path)
    if "step" in told:  # a checkpoint: beside the weights it has the optimiser's state
        tensors = {n.removeprefix(WEIGHT): t for n, t in tensors.items() if n.startswith(WEIGHT)}
        told = {name: told[name] for name in told if name in ModelHeader.__dataclass_fields__}
    try:
        header = ModelHeader(**told)
        header.check()
        with torch.device("meta"):  # no memory for a network that may not fit the file
            network = header.network()
        network.load_state_dict(tensors, assign=True)
    except (TypeError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{path}: header and weights do not fit each other ({first}).") from error
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise InputError(f"{path}: weight {bad[0]!r} is not finite; train again.")
    return network.eval(), header


def find_model(path: str | os.PathLike[str]) -> Path:
    """The model file of a RUN folder, or the file itself.

    Raises:
        InputError: if the training of that folder has not ended; names its newest checkpoint.
    """
    found = Path(path).absolute()
    if not found.is_dir():
        return found
    model = found / "model.safetensors"
    checkpoints = sorted((found / "checkpoints").glob("step-*.safetensors"))
    if checkpoints and not model.exists():
        raise InputError(
            f"{found}: its training has not ended; run the same `train` again, or give --model "
            f"{checkpoints[-1]}."
        )
    return model


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _foreign(path: Path) -> str | None:
    """What kind of file this is, if its first bytes show that it is no safetensors file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(16)
    if size < 10:
        return f"a file of {size} bytes"
    kinds = {
        b"\x80": "a Python pickle, which could run code when opened",
        b"PK\x03\x04": "a zip archive (a PyTorch .pt file holds a pickle, which could run code)",
        b"\x89HDF": "an HDF5 file (Keras weights?)",
        b"II*\x00": "a TIFF image",
        b"MM\x00*": "a TIFF image",
    }
    for magic, kind in kinds.items():
        if start.startswith(magic) and start[8:9] != b"{":
            return kind
    if start[8:9] != b"{":
        return f"not a safetensors file (it starts with {start[:8]!r})"
    header = int.from_bytes(start[:8], "little")
    return (
        f"truncated: its header needs {8 + header} bytes, it has {size}"
        if 8 + header > size
        else None
    )
