"""How a store was made: everything that fixes its bytes.

Knows the names under which it is kept. Does not know what any of it means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

from unet_ray.storage.layout import ARRAYS, FORMAT
from unet_ray.tiling.tiles import TilePlan

# What of the machine and its software fixes the bytes.
KIND = ("instructions", "versions")
# Kept in the store, but another version of these gives the same bytes.
UNCOMPARED = ("versions.numpy", "versions.zarr")


@dataclass(frozen=True)
class Provenance:
    """How a store was made, as JSON and by its parts.

    A part of a damaged provenance raises ValueError, KeyError, TypeError or AttributeError.

    Attributes:
        json: all of it, as the root of the store holds it.
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
    ) -> Self:
        """The provenance of a run.

        Args:
            model: hash, architecture, training and class values of the model.
            source: identity of the input, with its channel, time and level.
            outputs: what is stored.
            plan: the tiles.
            precision: number format of the network.
            device: that runs it.
            normalisation: the grey values of the input.
            tta: average over the 8 symmetries of the square.
            nan: how voxels that are not finite count.
            kind: instructions and versions of the machine.
        """
        parts = {
            "format": FORMAT,
            "model": model,
            "input": source,
            "outputs": list(outputs),
            "plan": asdict(plan),
            "precision": precision,
            "normalisation": normalisation,
            "device": device,
            "tta": tta,
            "nan": nan,
            "threads_per_pass": 1,
            **{name: kind.get(name) for name in KIND},
        }
        return cls(json.loads(json.dumps(parts)))  # tuples become lists, as when it is read

    def damage(self, *parts: str) -> str:
        """What is wrong with some parts of it, named as here; empty if they can be read."""
        try:
            for part in parts:
                getattr(self, part)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    @cached_property
    def plan(self) -> TilePlan:
        """The tiles."""
        plan = TilePlan.from_json(self.json["plan"])
        if len(plan.shape) != 3 or not all(type(n) is int and n > 0 for n in plan.shape):
            raise ValueError(f"a plan of shape {plan.shape}")
        return plan

    @property
    def outputs(self) -> tuple[str, ...]:
        """What is stored."""
        outputs = self.json["outputs"]
        if not outputs or not {*outputs} <= {*ARRAYS}:
            raise ValueError(f"outputs {outputs}")
        return tuple(outputs)

    @property
    def class_values(self) -> list[int]:
        """Label value of each class in training."""
        return list(dict(self.json["model"])["class_values"])

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
        """The channel of the input; None for all."""
        return self.source["channel"]  # type: ignore[no-any-return]

    @property
    def time(self) -> int:
        """The time point of the input."""
        return self.source["time"]  # type: ignore[no-any-return]

    @property
    def level(self) -> int:
        """The resolution of the input, 0 being the finest."""
        return self.source["level"]  # type: ignore[no-any-return]

    @property
    def precision(self) -> Any:
        """The number format of the network."""
        return self.json["precision"]

    @property
    def device(self) -> Any:
        """The kind of device that ran the network."""
        return self.json["device"]

    @property
    def tta(self) -> bool:
        """Whether predictions are averaged over the 8 symmetries of the square."""
        return self.json["tta"]  # type: ignore[no-any-return]

    @property
    def nan(self) -> Any:
        """How voxels that are not finite count."""
        return self.json["nan"]

    @property
    def normalisation(self) -> dict[str, Any]:
        """The grey values of the input."""
        return self.json["normalisation"]  # type: ignore[no-any-return]

    @property
    def kind(self) -> Mapping[str, Any]:
        """Instructions and versions of the machine."""
        return {name: self.json.get(name) for name in KIND}

    def differences(self, other: Provenance) -> Iterator[tuple[str, Any, Any]]:
        """The fields that differ, with their values here and in `other`."""
        here, there = dict(flat_fields(self.json)), dict(flat_fields(other.json))
        for field in dict.fromkeys([*there, *here]):
            if field not in UNCOMPARED and here.get(field) != there.get(field):
                yield field, here.get(field), there.get(field)

    def other_kind(self, kind: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
        """The first field of `kind` that is kept with another value, and both values."""
        kept = dict(flat_fields(self.json))
        for field, value in flat_fields(kind):
            if field not in UNCOMPARED and kept.get(field, value) != value:
                return field, kept[field], value
        return None


def flat_fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, each by its dotted name."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
