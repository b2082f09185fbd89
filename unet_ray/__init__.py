"""unet-ray: U-Net segmentation of microscopy volumes of any size, in tiles, without seams.

The names below are loaded when they are first used, so that importing the package loads neither
torch nor Ray::

    model = unet_ray.train("raw.tif", "membranes.tif", "runs/first", minutes=10)
    prediction = model.predict(array)
    store = unet_ray.segment("volume.zarr", model, "volume-segmented.zarr")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unet_ray.versions import VERSION

if TYPE_CHECKING:
    from unet_ray import metrics as metrics
    from unet_ray.api import Model as Model
    from unet_ray.api import OutputStore as OutputStore
    from unet_ray.api import Plan as Plan
    from unet_ray.api import Prediction as Prediction
    from unet_ray.api import evaluate as evaluate
    from unet_ray.api import export as export
    from unet_ray.api import load as load
    from unet_ray.api import open_store as open_store
    from unet_ray.api import plan as plan
    from unet_ray.api import segment as segment
    from unet_ray.api import train as train
    from unet_ray.api import verify as verify
    from unet_ray.errors import DamageError as DamageError
    from unet_ray.errors import InputError as InputError
    from unet_ray.errors import LostError as LostError
    from unet_ray.errors import QuarantinedError as QuarantinedError
    from unet_ray.errors import RunError as RunError
    from unet_ray.errors import UnetRayError as UnetRayError
    from unet_ray.errors import VoxelError as VoxelError
    from unet_ray.network.checkpoints import read_model as read_model
    from unet_ray.network.unet import UNet as UNet
    from unet_ray.report.page import write_report as write_report
    from unet_ray.segmentation.settings import Settings as Settings
    from unet_ray.tiling.boxes import Box as Box
    from unet_ray.tiling.tiles import Context as Context
    from unet_ray.tiling.tiles import TilePlan as TilePlan
    from unet_ray.training.recipes import Recipe as Recipe
    from unet_ray.volumes.opening import open_volume as open_volume
    from unet_ray.volumes.phantom import make_phantom as make_phantom

    report = write_report


__version__ = VERSION
_API = "Model OutputStore Plan Prediction evaluate export load open_store plan segment train verify"
_ERRORS = "DamageError InputError LostError QuarantinedError RunError UnetRayError VoxelError"
_ROOMS = {
    **dict.fromkeys(_API.split(), "api"),
    **dict.fromkeys(_ERRORS.split(), "errors"),
    "Box": "tiling.boxes",
    "Context": "tiling.tiles",
    "Recipe": "training.recipes",
    "Settings": "segmentation.settings",
    "TilePlan": "tiling.tiles",
    "UNet": "network.unet",
    "make_phantom": "volumes.phantom",
    "open_volume": "volumes.opening",
    "read_model": "network.checkpoints",
    "write_report": "report.page",
}
_MODULES = "metrics", "report"
__all__ = sorted([*_ROOMS, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"unet_ray.{_ROOMS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"unet_ray.{name}")
    raise AttributeError(f"module 'unet_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
