"""Streams along y of a network in 2-D, beside passes over whole tiles: tried and dropped.

python -m tests.bench_rows [BASE_CHANNELS [ROUNDS]]

A core of 1024 x 1024 voxels is one pass, as `segment` computes it, or a part of a core of twice the
height that a stream computes by a few rows per call, without halo along y. Prints the CPU seconds
per megavoxel of each on one thread, least of all rounds, and the time relative to the pass.
"""

import json
import sys
import time

import numpy as np
import torch
from torch import nn

from unet_ray.network.prediction import Predictor, best_precision
from unet_ray.network.streaming import StreamedUNet, _after, _delayed
from unet_ray.network.unet import UNet, applied, memory_format
from unet_ray.tiling.streaming import stream_along
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.intensity import Intensity

CORE, ROWS = 1024, (32, 64, 128, 256)


class StreamedRows(StreamedUNet):
    """Streams rows through a network in 2-D, as `StreamedUNet` streams planes."""

    def __init__(self, network, rows):
        self._network, self.stream = network, stream_along(network.levels, rows, 1)

    def __call__(self, rows, kept):
        skips = self._network.skip_extents(rows.shape[3:])
        scores = applied(self._network.head, self._level(0, [rows], skips, kept))
        return _delayed(scores, kept, ("output", 0, 0), self.stream.output)

    def _convolved(self, stack, given, kept, key):
        x = given.pop()
        for number, layer in enumerate(stack):
            if isinstance(layer, nn.Conv2d):
                x = _after(x, kept, (*key, number), layer.kernel_size[0] - 1)
            x = applied(layer, x)
        return x

    def over(self, image, rows):
        """The scores of the first rows of an image."""
        slab, kept, scores = self.stream.slab, {}, []
        for start in range(0, rows + self.stream.warm_up * slab, slab):
            part = image[:, :, start : start + slab]
            part = nn.functional.pad(part, (0, 0, 0, slab - part.shape[2]))
            part = part.contiguous(memory_format=memory_format(image))
            scores.append(self(part, kept))
        return torch.cat(scores[self.stream.warm_up :], dim=2)[:, :, :rows]


def prepared(network, core, precision):
    """The folded network, an image and a call of one pass."""
    plan = TilePlan((1, *core), (1, *core), network.context, (1, *core))
    predictor = Predictor(network, plan, Intensity((128.0,), (50.0,)), precision, "cpu")
    voxels = np.random.default_rng(0).integers(0, 255, (1, *plan.pass_shape)).astype(np.uint8)
    image = predictor._image(voxels).contiguous(memory_format=torch.channels_last)
    return predictor._network, image, lambda: predictor._scores(image, [], 0, None)


def main(base=32, rounds=5):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network, precision = UNet(1, 2, int(base), 4, "none", 0.0).eval(), best_precision("cpu")
    _, _, one_pass = prepared(network, (CORE, CORE), precision)
    folded, tall, _ = prepared(network, (2 * CORE, CORE), precision)
    ways = {"pass": (one_pass, CORE**2)}
    for rows in ROWS:
        stream = StreamedRows(folded, rows)
        ways[f"{rows} rows"] = lambda stream=stream: stream.over(tall, 2 * CORE), 2 * CORE**2
    with torch.inference_mode():
        whole, by_rows = folded(tall).float(), StreamedRows(folded, 64).over(tall, 2 * CORE)
        assert (whole[:, :, : 2 * CORE] - by_rows.float()).abs().max() < 0.1
        least = dict.fromkeys(ways, float("inf"))
        for _ in range(int(rounds)):
            for name, (call, voxels) in ways.items():
                start = time.process_time()
                call()
                least[name] = min(least[name], 1e6 * (time.process_time() - start) / voxels)
    for name, seconds in least.items():
        row = {"way": name, "seconds": round(seconds, 3), "precision": precision}
        print(json.dumps(row | {"time / pass": round(seconds / least["pass"], 2)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
