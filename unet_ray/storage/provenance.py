"""The provenance of a store: everything that determines its bytes.

Knows the names of its fields. Does not know what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

from unet_ray.storage.layout import ARRAYS, FORMAT
from unet_ray.tiling.boxes import Ints
from unet_ray.tiling.tiles import TilePlan

# Properties of the machine and its software that determine the bytes.
KIND = ("instructions", "versions")
# Stored but not compared, since another version gives the same bytes.
UNCOMPARED = ("versions.numpy", "versions.zarr", "versions.nvidia-driver")
MOST_LEVELS = 32  # each halves y and x
MOST_TILES = 1 << 30  # 16 PiB in tiles of 16 MiB; more would not fit in memory


@dataclass(frozen=True)
class Provenance:
    """The provenance of a store, with a property for each part of its JSON.

    If the JSON is damaged, properties may raise any error; see `damage`.

    Attributes:
        json: the provenance as stored in the root of the store.
    """

    json: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        *,
        model: Mapping[str, Any],
        source: Mapping[str, Any],
        outputs: Sequence[str],
        plan: TilePlan,
        precision: str,
        normalisation: dict[str, Any],
        device: str,
        tta: bool,
        nan: str,
        kind: Mapping[str, Any],
        threshold: float | None = None,
        factors: Sequence[Ints] = (),
        objects: Mapping[str, Any] | None = None,
    ) -> Self:
        """Returns the provenance of a run.

        Args:
            model: hash, architecture, training and class values of the model.
            source: identity of the input, with its channel, time and level.
            outputs: names of the stored arrays.
            plan: the tiles.
            precision: number format of the network.
            normalisation: intensity statistics of the input.
            device: kind of device that runs the network.
            tta: whether predictions are averaged over 8 symmetries, in 3-D over 16 or 48.
            nan: treatment of voxels that are not finite.
            kind: instructions and versions of the machine.
            threshold: probability above which a voxel is of class 1; None for the likelier class.
            factors: voxels of the volume per voxel of each pyramid level, from level 1 on.
            objects: rules of the objects; None without objects.
        """
        # Left out where absent, so that older stores, which lack them, resume.
        optional = {"threshold": threshold, "levels": [*factors] or None, "objects": objects}
        parts = {
            "format": FORMAT,
            "model": model,
            "input": source,
            "outputs": list(outputs),
            "plan": plan.to_json(),
            "precision": precision,
            "normalisation": normalisation,
            "device": device,
            "tta": tta,
            "nan": nan,
            "threads_per_pass": 1,
            **{name: kind.get(name) for name in KIND},
            **{name: value for name, value in optional.items() if value is not None},
        }
        # Tuples become lists, as in a stored provenance.
        return cls(json.loads(json.dumps(parts, allow_nan=False)))

    def damage(self, *parts: str) -> str:
        """Describes the first damage among `parts`, names of properties; empty if there is none."""
        try:
            for part in parts:
                getattr(self, part)
        except Exception as error:  # the JSON may have any form
            return f"{type(error).__name__}: {error!s:.300}"
        return ""

    @cached_property
    def plan(self) -> TilePlan:
        """The tiles."""
        plan = TilePlan.from_json(self.json["plan"])
        context = plan.context
        for sizes in (plan.shape, plan.core, plan.passes, *asdict(context).values()):
            if len(sizes) != 3 or not all(type(n) is int and 0 <= n < 2**53 for n in sizes):
                raise ValueError(f"a plan with sizes {sizes!r:.100}")
        if type(plan.streamed) is not bool:
            raise ValueError(f"a plan that is streamed {plan.streamed!r:.100}")
        if 0 in plan.shape or len(plan) > MOST_TILES:
            raise ValueError(f"a plan of shape {plan.shape} and core {plan.core}")
        return plan

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the stored arrays."""
        outputs = self.json["outputs"]
        if not outputs or not {*outputs} <= {*ARRAYS}:
            raise ValueError(f"outputs {outputs}")
        return tuple(outputs)

    @property
    def model_sha256(self) -> str:
        """Hash of the model file."""
        return self.json["model"]["sha256"]  # type: ignore[no-any-return]

    @property
    def class_values(self) -> list[int]:
        """Label value of each class in the training labels."""
        values = list(self.json["model"]["class_values"])
        if not 2 <= len(values) <= 255 or not all(type(v) is int for v in values):
            raise ValueError(f"class values {values!r:.100}")
        return values

    @property
    def source(self) -> Mapping[str, Any]:
        """Identity of the input."""
        return dict(self.json["input"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of the input, (c, z, y, x)."""
        return tuple(self.source["shape"])

    @property
    def sampled_sha256(self) -> str:
        """Hash of a sample of the input's voxels."""
        return self.source["sampled_sha256"]  # type: ignore[no-any-return]

    @property
    def channel(self) -> int | None:
        """Channel of the input; None for all."""
        channel = self.source["channel"]
        return None if channel is None else _whole(channel)

    @property
    def time(self) -> int:
        """Time point of the input."""
        return _whole(self.source["time"])

    @property
    def level(self) -> int:
        """Resolution level of the input; 0 is the finest."""
        return _whole(self.source["level"])

    @property
    def precision(self) -> Any:
        """Number format of the network."""
        return self.json["precision"]

    @property
    def device(self) -> Any:
        """Kind of device that ran the network."""
        return self.json["device"]

    @property
    def tta(self) -> bool:
        """Whether predictions are averaged over 8 symmetries, in 3-D over 16 or 48."""
        return self.json["tta"]  # type: ignore[no-any-return]

    @property
    def nan(self) -> Any:
        """Treatment of voxels that are not finite."""
        return self.json["nan"]

    @property
    def threshold(self) -> float | None:
        """Probability above which a voxel is of class 1; None for the likelier class."""
        return self.json.get("threshold")

    @property
    def factors(self) -> tuple[Ints, ...]:
        """Voxels of the volume per voxel of each pyramid level, (z, y, x), from level 1 on."""
        levels = tuple(tuple(_whole(n) for n in level) for level in self.json.get("levels", ()))
        if len(levels) > MOST_LEVELS or not all(len(n) == 3 and min(n) >= 1 for n in levels):
            raise ValueError(f"pyramid levels {levels!r:.100}")
        return levels

    @property
    def objects(self) -> Mapping[str, Any] | None:
        """Rules of the objects; None without objects."""
        objects = self.json.get("objects")
        return None if objects is None else dict(objects)

    @property
    def normalisation(self) -> dict[str, Any]:
        """Intensity statistics of the input."""
        return self.json["normalisation"]  # type: ignore[no-any-return]

    @property
    def kind(self) -> Mapping[str, Any]:
        """Instructions and versions of the machine."""
        return {name: self.json.get(name) for name in KIND}

    def differences(self, other: Provenance) -> Iterator[tuple[str, Any, Any]]:
        """Yields each field that differs, with its value in this provenance and in `other`."""
        own_fields, other_fields = dict(flat_fields(self.json)), dict(flat_fields(other.json))
        for field in dict.fromkeys([*other_fields, *own_fields]):
            if field not in UNCOMPARED and own_fields.get(field) != other_fields.get(field):
                yield field, own_fields.get(field), other_fields.get(field)

    def edits(self, recorded: Provenance) -> Iterator[str]:
        """Describes each field that differs from the provenance `recorded` in the ledger."""
        own_fields, recorded_fields = dict(flat_fields(self.json)), dict(flat_fields(recorded.json))
        for field in dict.fromkeys([*recorded_fields, *own_fields]):
            own, original = own_fields.get(field), recorded_fields.get(field)
            if own != original:
                yield (
                    f"its {field} was changed from {original!r:.100} to {own!r:.100} after the run "
                    "began"
                )

    def other_kind(self, kind: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
        """Returns the first field of `kind` that differs, its stored and its new value.

        Returns None if no field differs.
        """
        stored = dict(flat_fields(self.json))
        for field, value in flat_fields(kind):
            if field not in UNCOMPARED and stored.get(field, value) != value:
                return field, stored[field], value
        return None


def _whole(number: object) -> int:
    """Returns a number of a channel, time point or level.

    Raises:
        ValueError: if it is not a whole number of 32 bits, 0 or more.
    """
    if type(number) is not int or not 0 <= number < 2**32:
        raise ValueError(f"{number!r:.100} is not a whole number")
    return number


def flat_fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested mappings, each with its dotted name."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
