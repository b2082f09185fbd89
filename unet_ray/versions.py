"""Versions of unet-ray and of the packages that affect its results.

Independent of every other module.
"""

from __future__ import annotations

from importlib import metadata

VERSION = "0.1.0"


def versions() -> dict[str, str]:
    """Returns versions by package name, without build suffixes such as ``+cpu`` or ``+cu130``."""
    installed = {name: metadata.version(name) for name in ("torch", "numcodecs", "numpy", "zarr")}
    return {"unet-ray": VERSION, **{n: v.split("+")[0] for n, v in installed.items()}}
