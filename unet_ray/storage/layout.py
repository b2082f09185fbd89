"""The layout of an output store: names, arrays and their OME metadata.

Knows OME-Zarr 0.5. Does not write files or know which tiles are done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from unet_ray.tiling.tiles import TilePlan

PRIVATE, ROOT = ".unet_ray", "zarr.json"
EVENTS, MARKS = f"{PRIVATE}/events.jsonl", f"{PRIVATE}/marks"
FORMAT = 1
ARRAYS = {"probabilities": "0", "classes": "labels/classes/0"}
# Metadata files of a store with both arrays, except its root.
METADATA = (
    "0/zarr.json",
    "labels/zarr.json",
    "labels/classes/zarr.json",
    "labels/classes/0/zarr.json",
)
SHARDS = (r"0/c/0/[0-9]+/[0-9]+/[0-9]+", r"labels/classes/0/c/[0-9]+/[0-9]+/[0-9]+")
LARGEST_CHUNK = (32, 256, 256)


def ledger_of(stage: str) -> str:
    """Returns the path of a stage's ledger, relative to the output."""
    return f"{PRIVATE}/ledger/{stage}"


def marks_of(stage: str) -> str:
    """Returns the path of a stage's marks, relative to the output."""
    return f"{MARKS}/{stage}"


SEGMENT = "segment"  # the stage that writes probabilities and classes
LEDGER = ledger_of(SEGMENT)


@dataclass(frozen=True)
class StoreLayout:
    """The properties that determine the arrays and metadata of an output store.

    Attributes:
        plan: the tiles; the core of each is one shard.
        class_values: label value of each class; class 0 has no probability channel.
        outputs: the stored arrays, of ``probabilities`` and ``classes``.
        voxel_size: (z, y, x) in micrometre; None if unknown, stored as 1 without a unit.
    """

    plan: TilePlan
    class_values: Sequence[int]
    outputs: Sequence[str]
    voxel_size: Sequence[float] | None


def chunk_of(core: Sequence[int]) -> tuple[int, ...]:
    """Returns the chunk inside a shard of shape `core`, halved until small enough for viewers."""
    chunk = list(core)
    for axis, largest in enumerate(LARGEST_CHUNK):
        while chunk[axis] > largest and chunk[axis] % 2 == 0:
            chunk[axis] //= 2
    return tuple(chunk)


def metadata_files(layout: StoreLayout, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the bytes of each metadata file of a store, by path relative to the store."""
    attributes: dict[str, Any] = {"unet_ray": dict(provenance)}
    scale = list(layout.voxel_size or (1.0, 1.0, 1.0))
    has_unit = layout.voxel_size is not None
    if "probabilities" in layout.outputs:
        attributes["ome"] = {
            "version": "0.5",
            "multiscales": [_multiscale("probabilities", "czyx", scale, has_unit)],
            "omero": {"channels": [_channel(v) for v in layout.class_values[1:]]},
        }
    files: dict[str, Any] = {}
    store = MemoryStore(files)
    zarr.create_group(store, zarr_format=3, attributes=attributes)
    if "probabilities" in layout.outputs:
        _create_array(store, "0", layout, channels=len(layout.class_values) - 1)
    if "classes" in layout.outputs:
        labels = {"ome": {"version": "0.5", "labels": ["classes"]}}
        zarr.create_group(store, path="labels", zarr_format=3, attributes=labels)
        image: dict[str, Any] = {
            "version": "0.5",
            "multiscales": [_multiscale("classes", "zyx", scale, has_unit)],
            "image-label": {
                "colors": [
                    {"label-value": k, "rgba": [*_COLOURS[k % len(_COLOURS)], 255]}
                    for k in range(len(layout.class_values))
                ],
                "properties": [
                    {"label-value": k, "value-in-training-labels": int(v)}
                    for k, v in enumerate(layout.class_values)
                ],
            },
        }
        if "probabilities" in layout.outputs:
            image["image-label"]["source"] = {"image": "../../"}
        zarr.create_group(store, path="labels/classes", zarr_format=3, attributes={"ome": image})
        _create_array(store, "labels/classes/0", layout)
    return {name: data.to_bytes() for name, data in files.items()}


# The palette of Okabe and Ito, which is distinct for people with colour vision deficiency.
_COLOURS = [(0, 0, 0), (86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0)]


def _channel(value: int) -> dict[str, Any]:
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    return {"label": f"label {value}", "color": "FFFFFF", "window": window, "active": True}


def _multiscale(name: str, axes: str, scale: Sequence[float], has_unit: bool) -> dict[str, Any]:
    unit = {"unit": "micrometer"} if has_unit else {}
    axis_metadata = [
        {"name": a, "type": "channel"} if a == "c" else {"name": a, "type": "space", **unit}
        for a in axes
    ]
    axis_scales = [1.0] * (len(axes) - 3) + [float(v) for v in scale]
    transform = [{"type": "scale", "scale": axis_scales}]
    return {
        "name": name,
        "axes": axis_metadata,
        "datasets": [{"path": "0", "coordinateTransformations": transform}],
    }


def _create_array(store: MemoryStore, name: str, layout: StoreLayout, channels: int = 0) -> None:
    channel_axis = (channels,) if channels else ()
    zarr.create_array(
        store,
        name=name,
        shape=(*channel_axis, *layout.plan.shape),
        shards=(*channel_axis, *layout.plan.core),
        chunks=(*((1,) if channels else ()), *chunk_of(layout.plan.core)),
        dtype="uint8",
        fill_value=0,
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        dimension_names=["c", "z", "y", "x"][0 if channels else 1 :],
    )
