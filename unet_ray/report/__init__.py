"""HTML pages and pictures of training runs and of segmentations, and exported files.

Knows how results are drawn and copied into files. Does not know how they were computed.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unet_ray.storage.places import PathOrUrl, Place


class _Callable(ModuleType):
    """This package, which is also the function ``unet_ray.report(path)``.

    The verb and the folder share a name, and Python sets the folder as ``unet_ray.report``
    whenever one of its files is imported.
    """

    def __call__(self, path: PathOrUrl, truth: PathOrUrl | None = None) -> Place:
        """Writes the HTML page about a RUN folder or a store; see `write_report`."""
        from unet_ray.report.page import write_report

        return write_report(path, truth)


sys.modules[__name__].__class__ = _Callable
