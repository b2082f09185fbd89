"""unet-ray: U-Net segmentation of microscopy volumes of any size, in tiles, without seams.

The names below are loaded when first used, so that importing the package needs neither torch nor
Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unet_ray.versions import VERSION

if TYPE_CHECKING:
    from unet_ray.network.checkpoints import read_model as read_model
    from unet_ray.network.unet import UNet as UNet
    from unet_ray.report.page import write_report as write_report
    from unet_ray.scores.evaluation import evaluate as evaluate
    from unet_ray.segmentation.outlook import plan as plan
    from unet_ray.segmentation.segment import segment as segment
    from unet_ray.segmentation.verification import verify as verify
    from unet_ray.tiling.boxes import Box as Box
    from unet_ray.tiling.tiles import Context as Context
    from unet_ray.tiling.tiles import TilePlan as TilePlan
    from unet_ray.training.train import train as train
    from unet_ray.volumes.opening import open_volume as open_volume
    from unet_ray.volumes.phantom import make_phantom as make_phantom


__version__ = VERSION
_ROOMS = {
    "Box": "tiling.boxes",
    "Context": "tiling.tiles",
    "TilePlan": "tiling.tiles",
    "UNet": "network.unet",
    "evaluate": "scores.evaluation",
    "make_phantom": "volumes.phantom",
    "open_volume": "volumes.opening",
    "plan": "segmentation.outlook",
    "read_model": "network.checkpoints",
    "segment": "segmentation.segment",
    "train": "training.train",
    "verify": "segmentation.verification",
    "write_report": "report.page",
}
__all__ = sorted(_ROOMS)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"unet_ray.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'unet_ray' has no attribute {name!r}")
