"""Where the CPU time of a warm `segment` goes, by step.

python -m tests.bench_profile [BASE [SLICES]]

Segments SLICES of 2048 x 2048 voxels twice in this process, and measures the second run. Each step
counts the CPU time of its own threads, without the steps inside it. The last line is the rest of
the process: the engine, the ledger, and Python's own threads.
"""

import functools
import resource
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from tests.helper import noise, random_model, write_stack
from unet_ray.network.prediction import Predictor, best_precision
from unet_ray.network.unet import UNet
from unet_ray.segmentation.run import TileHelper
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings
from unet_ray.storage import stores

EXTENT = 2048
STEPS = {
    "network": (UNet, "forward"),
    "normalisation": (Predictor, "_image"),
    "softmax, finite test, uint8, classes": (Predictor, "_forward"),
    "tests for constant passes, results of a tile": (Predictor, "__call__"),
    "read": (TileHelper, "read"),
    "encoding": (stores.Store, "encoded"),
    "checksums": (stores, "checksum_of"),
    "files": (stores, "write_whole"),
    "rest of writing": (TileHelper, "write"),
}


class Clock:
    """CPU seconds of steps, each without the steps that it calls."""

    def __init__(self):
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self._inner, self._lock = threading.local(), threading.Lock()

    def timed(self, name, function):
        """The function, with its time added to a step."""

        @functools.wraps(function)
        def call(*args, **options):
            outside, self._inner.seconds = getattr(self._inner, "seconds", 0.0), 0.0
            start = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                taken = time.thread_time() - start
                with self._lock:
                    self.seconds[name] += taken - self._inner.seconds
                self._inner.seconds = outside + taken

        return call


def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(base=32, slices=8):
    """Prints a table of shares."""
    clock, start = Clock(), 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_model(folder / "model.safetensors", base=int(base), depth=4)
        volume = write_stack(folder / "volume.tif", noise((int(slices), EXTENT, EXTENT)))
        settings = Settings(pyramid=False, overwrite=True)
        segment(volume, model, folder / "out.zarr", settings)
        with ExitStack() as patches:
            for step, (owner, attribute) in STEPS.items():
                timed = clock.timed(step, getattr(owner, attribute))
                patches.enter_context(mock.patch.object(owner, attribute, timed))
            start = cpu()
            segment(volume, model, folder / "out.zarr", settings)
            total = cpu() - start
    print(f"{base} channels, {best_precision('cpu')}, {total:.1f} s of CPU\n")
    print("| step | share of the CPU time |\n|---|---|")
    for step, seconds in clock.seconds.items():
        print(f"| {step} | {100 * seconds / total:.2f} % |")
    print(f"| rest | {100 * (1 - sum(clock.seconds.values()) / total):.2f} % |")


if __name__ == "__main__":
    main(*sys.argv[1:])
