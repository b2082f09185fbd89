"""Time to the first committed tile of a 256 x 256 image, beside the imports that it needs.

python -m tests.bench_startup [ROUNDS]

Each command runs in a process of its own, in turn. Prints the median time of each, and the medians
of the ratios: the local engine to ``import torch``, Ray to ``import torch`` and ``ray.init``.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.helper import noise, random_model, write_stack
from unet_ray.storage.layout import LEDGER
from unet_ray.storage.ledger import committed

IMPORTS = {
    "import torch": "import torch",
    "import torch, ray.init": "import torch, ray; ray.init(include_dashboard=False)",
}
ENGINES = {"local": "import torch", "ray": "import torch, ray.init"}


def seconds_of_import(code):
    """Seconds until the code has run; the end of its process does not count."""
    start = time.perf_counter()
    done = [sys.executable, "-c", f"{code}; print('done', flush=True); input()"]
    with subprocess.Popen(
        done, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as running:
        if running.stdout.readline() != b"done\n":
            raise SystemExit(f"{code} failed")
        taken = time.perf_counter() - start
        running.communicate(b"\n")
    return taken


def seconds_to_first_tile(folder, engine):
    out = folder / f"{engine}-{time.monotonic_ns()}.zarr"
    words = "segment", folder / "image.tif", "--model", folder / "model.safetensors"
    words = *words, "--out", out, "--engine", engine, "--quiet"
    command = [sys.executable, "-m", "unet_ray", *map(str, words)]
    start = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as running:
        while not np.any(committed(out / LEDGER, 1)):
            time.sleep(0.005)
            if running.poll() is not None:
                break
        taken = time.perf_counter() - start
        if running.wait(60):
            os.killpg(running.pid, signal.SIGKILL)
            raise SystemExit(f"{' '.join(command)} failed")
    return taken


def main(rounds=5):
    taken = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_stack(folder / "image.tif", noise((1, 256, 256)))
        random_model(folder / "model.safetensors", depth=4, base=16)
        for _ in range(int(rounds)):
            for label, code in IMPORTS.items():
                taken.setdefault(label, []).append(seconds_of_import(code))
            for engine in ENGINES:
                taken.setdefault(engine, []).append(seconds_to_first_tile(folder, engine))
    for label, seconds in taken.items():
        print(f"{label}: {statistics.median(seconds):.2f} s (least {min(seconds):.2f} s)")
    for engine, label in ENGINES.items():
        ratio = statistics.median(a / b for a, b in zip(taken[engine], taken[label], strict=True))
        print(f"first tile, {engine} / {label}: {ratio:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
