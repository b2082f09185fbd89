"""Versions of unet-ray and of the software that a result depends on; knows nothing else."""

from __future__ import annotations

from importlib import metadata

VERSION = "0.1.0"


def versions() -> dict[str, str]:
    """Version by package name, without a build's local suffix (``+cpu``, ``+cu130``)."""
    found = {name: metadata.version(name) for name in ("torch", "numcodecs", "numpy", "zarr")}
    return {"unet-ray": VERSION, **{n: v.split("+")[0] for n, v in found.items()}}
