"""unet-ray: U-Net segmentation of microscopy volumes of any size, in tiles, without seams.

The names below are loaded when first used, so that importing the package needs neither torch nor
Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unet_ray.versions import VERSION

if TYPE_CHECKING:
    from unet_ray.boxes import Box as Box
    from unet_ray.checkpoints import read_model as read_model
    from unet_ray.evaluation import evaluate as evaluate
    from unet_ray.network import UNet as UNet
    from unet_ray.phantom import make_phantom as make_phantom
    from unet_ray.planning import plan as plan
    from unet_ray.report import write_report as write_report
    from unet_ray.segmentation import segment as segment
    from unet_ray.tiles import Context as Context
    from unet_ray.tiles import TilePlan as TilePlan
    from unet_ray.training import train as train
    from unet_ray.verification import verify as verify
    from unet_ray.volumes import open_volume as open_volume


__version__ = VERSION
_ROOMS = {
    "Box": "boxes",
    "Context": "tiles",
    "TilePlan": "tiles",
    "UNet": "network",
    "evaluate": "evaluation",
    "make_phantom": "phantom",
    "open_volume": "volumes",
    "plan": "planning",
    "read_model": "checkpoints",
    "segment": "segmentation",
    "train": "training",
    "verify": "verification",
    "write_report": "report",
}
__all__ = sorted(_ROOMS)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"unet_ray.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'unet_ray' has no attribute {name!r}")
