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

from unet_ray.tiling.boxes import Ints
from unet_ray.tiling.pyramid import level_plan
from unet_ray.tiling.tiles import TilePlan

PRIVATE, ROOT = ".unet_ray", "zarr.json"
EVENTS, MARKS = f"{PRIVATE}/events.jsonl", f"{PRIVATE}/marks"
LEDGERS = f"{PRIVATE}/ledger"
OBJECTS = f"{PRIVATE}/objects"  # records of the stages that join objects across tiles
TABLE = "objects.parquet"
FORMAT = 1
ARRAYS = {
    "probabilities": "0",
    "classes": "labels/classes/0",
    "instances": "labels/instances/0",
}
DTYPES = {"probabilities": "uint8", "classes": "uint8", "instances": "uint64"}
PREDICTED = ("probabilities", "classes")  # the outputs of stage `segment`
# Patterns of the paths of a store. A level has a number without leading zeros.
LEVEL = "(?:0|[1-9][0-9]?)"
_LABELS = "labels/(?:classes|instances)"
METADATA = rf"(?:(?:{LEVEL}|labels|{_LABELS}(?:/{LEVEL})?)/)?zarr\.json"
SHARDS = rf"(?:{LEVEL}/c/0|{_LABELS}/{LEVEL}/c)/[0-9]+/[0-9]+/[0-9]+"
LARGEST_CHUNK = (32, 256, 256)


def array_of(output: str, level: int = 0) -> str:
    """Returns the path of an output's array at one level, relative to the store."""
    return f"{ARRAYS[output].removesuffix('0')}{level}"


def ledger_of(stage: str) -> str:
    """Returns the path of a stage's ledger, relative to the output."""
    return f"{LEDGERS}/{stage}"


def marks_of(stage: str) -> str:
    """Returns the path of a stage's marks, relative to the output."""
    return f"{MARKS}/{stage}"


SEGMENT = "segment"  # the stage that writes probabilities and classes
INSTANCES = "instances"  # the stage that writes the array of this name
LEDGER = ledger_of(SEGMENT)


@dataclass(frozen=True)
class StoreLayout:
    """The properties that determine the arrays and metadata of an output store.

    Attributes:
        plan: the tiles; the core of each is one shard.
        class_values: label value of each class; class 0 has no probability channel.
        outputs: the stored arrays, of ``probabilities``, ``classes`` and ``instances``.
        voxel_size: (z, y, x) in micrometre; None if unknown, stored as 1 without a unit.
        factors: factors of levels 1, 2, … relative to level 0, each (z, y, x).
    """

    plan: TilePlan
    class_values: Sequence[int]
    outputs: Sequence[str]
    voxel_size: Sequence[float] | None
    factors: Sequence[Ints] = ()

    @property
    def plans(self) -> list[TilePlan]:
        """The shards of each level, from level 0."""
        return [self.plan, *(level_plan(self.plan, factors) for factors in self.factors)]


def chunk_of(core: Sequence[int]) -> tuple[int, ...]:
    """Returns the chunk inside a shard of shape `core`, halved until small enough for viewers."""
    chunk = list(core)
    for axis, largest in enumerate(LARGEST_CHUNK):
        while chunk[axis] > largest and chunk[axis] % 2 == 0:
            chunk[axis] //= 2
    return tuple(chunk)


def metadata_files(layout: StoreLayout, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the bytes of each metadata file of a store, by path relative to the store."""
    files: dict[str, Any] = {}
    store = MemoryStore(files)
    attributes = {"unet_ray": dict(provenance), "ome": _image(layout)}
    zarr.create_group(store, zarr_format=3, attributes=attributes)
    labels = [name for name in ("classes", "instances") if name in layout.outputs]
    if "probabilities" in layout.outputs:
        _create_arrays(store, "probabilities", layout)
    if labels:
        listed = {"ome": {"version": "0.5", "labels": labels}}
        zarr.create_group(store, path="labels", zarr_format=3, attributes=listed)
    for name in labels:
        label_image = {"ome": _label_image(name, layout)}
        zarr.create_group(store, path=f"labels/{name}", zarr_format=3, attributes=label_image)
        _create_arrays(store, name, layout)
    return {name: data.to_bytes() for name, data in files.items()}


# The palette of Okabe and Ito, which is distinct for people with colour vision deficiency.
_COLOURS = [(0, 0, 0), (86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0)]
# Black would be invisible in a channel. Beyond seven classes, colours repeat.
_CHANNEL_COLOURS = [*_COLOURS[1:], (240, 228, 66), (0, 114, 178)]


def _image(layout: StoreLayout) -> dict[str, Any]:
    """The image at the root: the probabilities, or the first label image of a store without."""
    if "probabilities" in layout.outputs:
        return {
            "version": "0.5",
            "multiscales": [_multiscale("probabilities", layout)],
            "omero": {"channels": _channels(layout.class_values)},
        }
    name = next(name for name in ARRAYS if name in layout.outputs)
    multiscale = _multiscale(name, layout, f"labels/{name}/")
    image: dict[str, Any] = {"version": "0.5", "multiscales": [multiscale]}
    if name == "classes":
        # Without a window, viewers show the classes 0 and 1 of 255 as black.
        channel = _channel("classes", (255, 255, 255), len(layout.class_values) - 1)
        image["omero"] = {"channels": [channel]}
    return image


def _label_image(name: str, layout: StoreLayout) -> dict[str, Any]:
    """A label image. Instances have no list of colours, so viewers choose random ones."""
    label: dict[str, Any] = {}
    if name == "classes":
        label["colors"] = [
            {"label-value": k, "rgba": [*_COLOURS[k % len(_COLOURS)], 255]}
            for k in range(len(layout.class_values))
        ]
        label["properties"] = [
            {"label-value": k, "value-in-training-labels": int(v)}
            for k, v in enumerate(layout.class_values)
        ]
    if "probabilities" in layout.outputs or name == "instances":
        label["source"] = {"image": "../../"}
    return {"version": "0.5", "multiscales": [_multiscale(name, layout)], "image-label": label}


def _channels(class_values: Sequence[int]) -> list[dict[str, Any]]:
    """The channels of classes 1, 2, …, coloured like their labels; one alone is white."""
    colours = [(255, 255, 255)] if len(class_values) == 2 else _CHANNEL_COLOURS
    return [
        _channel(f"label {value}", colours[k % len(colours)], 255)
        for k, value in enumerate(class_values[1:])
    ]


def _channel(label: str, colour: Sequence[int], largest: int) -> dict[str, Any]:
    """A channel that viewers show from black at 0 to `colour` at the value `largest`."""
    return {
        "label": label,
        "color": bytes(colour).hex().upper(),
        "window": {"min": 0, "max": largest, "start": 0, "end": largest},
        "active": True,
    }


def _multiscale(name: str, layout: StoreLayout, folder: str = "") -> dict[str, Any]:
    """The axes and levels of an output; `folder` is that of its arrays, relative to the group."""
    unit = {} if layout.voxel_size is None else {"unit": "micrometer"}
    axes = [{"name": axis, "type": "space", **unit} for axis in "zyx"]
    if name == "probabilities":
        axes.insert(0, {"name": "c", "type": "channel"})
    datasets = [
        {
            "path": f"{folder}{level}",
            "coordinateTransformations": _transformations(
                layout.voxel_size or (1.0, 1.0, 1.0), factors, len(axes)
            ),
        }
        for level, factors in enumerate([(1, 1, 1), *layout.factors])
    ]
    return {"name": name, "axes": axes, "datasets": datasets}


def _transformations(
    voxel_size: Sequence[float], factors: Sequence[int], axes: int
) -> list[dict[str, Any]]:
    """Places the centres of a level's voxels in space, where the first of level 0 is at 0."""
    sizes = list(zip(voxel_size, factors, strict=True))
    scale = [1.0] * (axes - 3) + [float(s * f) for s, f in sizes]
    transformations: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
    if max(factors) > 1:
        translation = [0.0] * (axes - 3) + [float(s * (f - 1) / 2) for s, f in sizes]
        transformations.append({"type": "translation", "translation": translation})
    return transformations


def _create_arrays(store: MemoryStore, name: str, layout: StoreLayout) -> None:
    """Creates the arrays of all levels of an output."""
    channels = (len(layout.class_values) - 1,) if name == "probabilities" else ()
    for level, plan in enumerate(layout.plans):
        zarr.create_array(
            store,
            name=array_of(name, level),
            shape=(*channels, *plan.shape),
            shards=(*channels, *plan.core),
            chunks=(*(1 for _ in channels), *chunk_of(plan.core)),
            dtype=DTYPES[name],
            fill_value=0,
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            dimension_names=[*("c" for _ in channels), "z", "y", "x"],
        )
