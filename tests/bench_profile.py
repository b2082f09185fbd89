"""Where the CPU time of a warm `segment` goes, by step.

python -m tests.bench_profile [BASE [SLICES]]

Segments one slice of 2048 x 2048 voxels, then SLICES more, in this process, and subtracts the first
run. A step counts the CPU time of the thread that runs it, without the steps inside it. The threads
of zarr compress the chunks. The main thread starts tiles, and keeps the ledger and the event log.
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

import numpy as np
from psutil import Process

from tests.helper import noise, random_model, write_stack
from unet_ray.network.prediction import Predictor, best_precision
from unet_ray.network.unet import UNet
from unet_ray.segmentation import preparation
from unet_ray.segmentation.run import TileHelper
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings
from unet_ray.storage import stores

EXTENT = 2048
STEPS = {
    "measuring grey values": (preparation, "measure"),
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
    """CPU seconds of this process, of its main thread, and of the threads of zarr."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    threads = [(names.get(t.id, ""), t.user_time + t.system_time) for t in Process().threads()]
    zarr = sum(seconds for name, seconds in threads if name.startswith(("zarr", "asyncio")))
    return np.array([usage.ru_utime + usage.ru_stime, time.thread_time(), zarr])


def seconds_of_steps(folder, slices):
    """CPU seconds of each step of a run, and of the rest of the process."""
    clock = Clock()
    volume = write_stack(folder / "volume.tif", noise((slices, EXTENT, EXTENT)))
    with ExitStack() as patches:
        for step, (owner, attribute) in STEPS.items():
            timed = clock.timed(step, getattr(owner, attribute))
            patches.enter_context(mock.patch.object(owner, attribute, timed))
        start = cpu()
        settings = Settings(pyramid=False, overwrite=True)
        segment(volume, folder / "model.safetensors", folder / "out.zarr", settings)
        total, main, zarr = cpu() - start
    main -= clock.seconds["measuring grey values"]
    rest = total - main - zarr - sum(clock.seconds.values())
    return clock.seconds | {"threads of zarr": zarr, "main thread": main, "rest": rest}


def main(base=32, slices=8):
    """Prints a table of shares."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(folder / "model.safetensors", base=int(base), depth=4)
        seconds_of_steps(folder, 2)  # fills the heap of the process
        short, long = (seconds_of_steps(folder, n) for n in (1, 1 + int(slices)))
    seconds = {step: long[step] - short[step] for step in long}
    total = sum(seconds.values())
    print(f"{base} channels, {best_precision('cpu')}, {total:.1f} s of CPU for {slices} slices\n")
    print("| step | share of the CPU time |\n|---|---|")
    for step, taken in seconds.items():
        print(f"| {step} | {100 * taken / total:.2f} % |")
    print(f"\nthe start of a run: {short['main thread']:.2f} s of CPU")


if __name__ == "__main__":
    main(*sys.argv[1:])
