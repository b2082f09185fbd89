"""Streams along z against separate tiles and one pass over the volume.

python -m tests.bench_streaming [BASE_CHANNELS [EXTENT [PLANES]]]

The network is that of Çiçek et al. (depth 3, cubic), in the best precision of this machine, with
random weights. A volume of PLANES x EXTENT x EXTENT voxels is predicted in three ways, each three
times in turn: streamed, in separate tiles that need no more memory, and in one pass. Prints
multiplications over those without halo, peak memory by the plan, and seconds (least of three).
"""

import json
import sys
import time

import numpy as np
import torch

from unet_ray.machine import keep_freed_memory
from unet_ray.network.arithmetic import (
    core_multiplications,
    halo_overhead,
    kept_bytes,
    pass_bytes,
    slab_bytes,
    slab_multiplications,
)
from unet_ray.network.prediction import Predictor, best_precision
from unet_ray.network.unet import UNet
from unet_ray.segmentation.memory import network_size
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.tiling.streaming import stream_along
from unet_ray.tiling.tiles import TilePlan, round_up
from unet_ray.volumes.intensity import Intensity

SLAB, DEPTH, ROUNDS = 8, 3, 3


def network_of(base):
    torch.manual_seed(0)
    return UNet(1, 2, base, DEPTH, "none", 0.0, ((3, 2),) * (DEPTH + 1), "before").eval()


def plans(network, size, shape):
    """A plan for each way of predicting the volume, and the bytes of a pass."""
    stream = stream_along(network.levels, SLAB)
    core = tuple(round_up(n, 8) for n in shape)
    streamed = TilePlan(shape, core, stream.around(network.context), (SLAB, *core[1:]), True)
    most = slab_bytes(size, streamed.pass_shape) + kept_bytes(size, stream, streamed.pass_shape)
    whole = TilePlan(shape, core, network.context, core)
    sizes = [(z, n, n) for z in range(8, core[0] + 1, 8) for n in range(8, core[1] + 1, 8)]
    tiles = [TilePlan(shape, each, network.context, each) for each in sizes]
    fitting = [plan for plan in tiles if pass_bytes(size, plan.pass_shape) <= most]
    separate = min(fitting or tiles[:1], key=lambda plan: halo_overhead(size, plan))
    ways = {"streamed": streamed, "separate": separate, "one pass": whole}
    needed = {name: pass_bytes(size, plan.pass_shape) for name, plan in ways.items()}
    return ways, needed | {"streamed": most}


def seconds(network, plan, volume, precision):
    predictor = Predictor(network, plan, Intensity((128.0,), (50.0,)), precision, "cpu")
    start = time.perf_counter()
    for tile in plan:
        voxels = read_mirrored(
            lambda box: volume[(slice(None), *box.slices)], plan.shape, tile.read
        )
        predictor(tile, voxels, ("probabilities",))
    return time.perf_counter() - start


def main(base=8, extent=168, planes=128):
    torch.set_num_threads(1)
    keep_freed_memory()
    precision, network = best_precision("cpu"), network_of(int(base))
    size, shape = network_size(network, precision), (int(planes), int(extent), int(extent))
    volume = np.random.default_rng(0).integers(0, 255, (1, *shape)).astype(np.uint8)
    ways, memory = plans(network, size, shape)
    times = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, plan in ways.items():
            times[name].append(seconds(network, plan, volume, precision))
    for name, plan in ways.items():
        row = {"way": name, "core": plan.core, "pass": plan.pass_shape, "precision": precision}
        row |= {"multiplications": round(1 + halo_overhead(size, plan), 3)}
        row |= {"mebibytes": memory[name] >> 20, "seconds": round(min(times[name]), 2)}
        print(json.dumps(row))
    for cross in (132, 260, 516, 1028):
        core = Box.of((SLAB, cross - 92, cross - 92)).shape
        ratio = slab_multiplications(size, (SLAB, cross, cross)) / core_multiplications(size, core)
        print(json.dumps({"cross-section": cross, "multiplications": round(ratio, 3)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
