"""Prediction of ours beside MONAI, nnU-Net and the usual loop of overlapping tiles, in one run.

python -m tests.bench_peers FOLDER [BASES [ROUNDS [EXTENT]]]

Needs the environment of ``make bench-peers``. BASES are base channels, such as 16,32,64. The image
is a square of EXTENT voxels, 2048 by default. In each round every case runs once, in a process of
its own, with as many threads as cores. The warm-up is two times one window, or all passes of ours.
Writes FOLDER/peers.json and FOLDER/peers.md: voxels per second, from the fastest round, and the
median of the ratios to our ``segment``. Cases of ours segment one slice and `SLICES`. The figure is
that of the slices between, so start-up does not count; it has a column of its own.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tifffile
import torch

from tests.helper import noise, random_model
from unet_ray.machine import keep_freed_memory
from unet_ray.network.checkpoints import read_model
from unet_ray.network.prediction import Predictor, best_precision
from unet_ray.segmentation.outlook import plan
from unet_ray.segmentation.settings import Settings
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.intensity import measure
from unet_ray.volumes.opening import open_volume

SLICES = 4
REPEATS = SLICES - 1  # of passes of ours: as many as `segment` is measured with
DEPTH, MARGIN = 4, 92  # of the usual network: 572 voxels give 388
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# Ours: passes of the network without anything else


def predictor_of(model, image, precision, tile=None):
    volume, (network, _) = open_volume(image), read_model(Path(model))
    if tile is None:
        tiles = plan(volume, model, Settings(precision=precision)).plan
    else:
        tiles = TilePlan(volume.shape[1:], tile, network.context, tile)
    return tiles, Predictor(network, tiles, measure(volume), precision, "cpu")


def passes(model, image, precision, tile=None):
    """The passes of a plan on inputs that are ready; one thread per pass if there are several."""
    tiles, predictor = predictor_of(model, image, precision, tile)
    inputs = []
    for part in map(tiles.__getitem__, range(len(tiles))):
        voxels = read_mirrored(lambda box: image[(None, *box.slices)], image.shape, part.read)
        for box in tiles.pass_boxes(part):
            stop = (start + n for start, n in zip(box.start, tiles.pass_shape, strict=True))
            window = voxels[(slice(None), *Box(box.start, tuple(stop)).slices)]
            inputs.append(predictor._image(window))
    workers = min(len(inputs), torch.get_num_threads())
    threads = torch.get_num_threads() // workers

    def one(image):
        torch.set_num_threads(threads)
        with torch.inference_mode():
            predictor._scores(image, [], 0, None).softmax(1)

    def run(repeats=REPEATS):
        with ThreadPoolExecutor(workers) as pool:
            deque(pool.map(one, inputs * repeats), 0)

    return partial(run, 1), run  # all threads are warm, as those of `segment` after its first slice


def whole(model, image, precision):
    """One pass over the whole image, with all threads."""
    return passes(model, image, precision, (1, *image.shape[1:]))


# Peers


def floats(image):
    voxels = torch.from_numpy(image[:1].astype(np.float32))[None]
    return (voxels - voxels.mean()) / voxels.std()


def usual_loop(model, image, precision):
    """Tiles of 572 in, 388 out, float32, one after another, as most U-Net code does."""
    network = read_model(Path(model))[0].eval()
    pad = torch.nn.functional.pad(floats(image), (MARGIN,) * 4, mode="reflect")
    extent, core = image.shape[1], 572 - 2 * MARGIN

    def run(number=None):
        starts = [(y, x) for y in range(0, extent, core) for x in range(0, extent, core)]
        result = torch.zeros(extent, extent)
        with torch.inference_mode():
            for top, left in starts[:number]:
                y, x = min(top, extent - core), min(left, extent - core)
                window = pad[..., y : y + 572, x : x + 572]
                result[y : y + core, x : x + core] = network(window).softmax(1)[0, 1]
        return result

    return partial(run, 1), run


def basic_unet(base):
    from monai.networks.nets import BasicUNet

    features = (base, 2 * base, 4 * base, 8 * base, 16 * base, base)
    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=features).eval()


def monai(model, image, precision, overlap):
    """``sliding_window_inference`` of MONAI: windows of 512, Gaussian blending."""
    from monai.inferers import sliding_window_inference

    network, voxels = basic_unet(read_model(Path(model))[0].base_channels), floats(image)
    network = network.to(TYPES[precision])
    voxels = voxels.to(TYPES[precision])
    if precision == "bfloat16":
        network = network.to(memory_format=torch.channels_last)
        voxels = voxels.to(memory_format=torch.channels_last)

    def run(extent=None):
        with torch.inference_mode():
            window = voxels[..., :extent, :extent]
            scores = sliding_window_inference(
                window, (512, 512), 1, network, overlap=overlap, mode="gaussian"
            )
            return scores.softmax(1)

    return partial(run, 512), run


def plain_conv_unet(base, deep_supervision=False):
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    return PlainConvUNet(
        1, 5, [base << n for n in range(5)], torch.nn.Conv2d, 3, [1, 2, 2, 2, 2], 2, 2, 2,
        conv_bias=True, norm_op=torch.nn.InstanceNorm2d, norm_op_kwargs={"affine": True},
        nonlin=torch.nn.LeakyReLU, deep_supervision=deep_supervision,
    ).eval()  # fmt: skip


def nnunet(model, image, precision):
    """The predictor of nnU-Net v2: windows of 512, step 0.5, Gaussian blending, no mirroring."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    network = plain_conv_unet(read_model(Path(model))[0].base_channels)
    predictor = nnUNetPredictor(
        tile_step_size=0.5, use_gaussian=True, use_mirroring=False, allow_tqdm=False,
        perform_everything_on_device=False, device=torch.device("cpu"),
    )  # fmt: skip
    predictor.network, predictor.allowed_mirroring_axes = network, None
    predictor.configuration_manager = SimpleNamespace(patch_size=(512, 512))
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=2)
    voxels = floats(image)

    def run(extent=None):
        window = voxels[..., :extent, :extent]
        return predictor.predict_sliding_window_return_logits(window).softmax(0)

    return partial(run, 512), run


WHOLE, PASSES = "whole image in one pass", "aligned passes"
IN_PROCESS = {
    WHOLE: whole,
    PASSES: passes,
    "usual loop 572/388": usual_loop,
    "MONAI, overlap 0.25": partial(monai, overlap=0.25),
    "MONAI, overlap 0.5": partial(monai, overlap=0.5),
    "nnU-Net, step 0.5": nnunet,
}


# Ours: from file to store


def by_command(model, file, out, precision, engine="local"):
    import unet_ray

    root = str(Path(unet_ray.__file__).parents[1])
    words = "segment", file, "--model", model, "--out", out, "--overwrite", "--quiet"
    words = *words, "--precision", precision, "--engine", engine
    environment = {**os.environ, "PYTHONPATH": root, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "unet_ray", *map(str, words)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def by_function(model, file, out, precision):
    import unet_ray

    flags = {"overwrite": True, "progress": False, "precision": precision}
    unet_ray.segment(file, unet_ray.load(model), out, **flags)


SEGMENTS = {
    "segment, function": by_function,
    "segment, command": by_command,
    "segment, command on Ray": partial(by_command, engine="ray"),
}
OURS = "segment, function"


def seconds():
    """Wall time, and CPU time of this process and its ended children."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in both)


def one_case(name, precision, model, folder):
    """Prints wall seconds, CPU seconds and MiB at the peak of one case."""
    keep_freed_memory()
    folder = Path(folder)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if name in IN_PROCESS:
        image = np.ascontiguousarray(tifffile.imread(folder / "slice.tif")[None])
        warm, run = IN_PROCESS[name](model, image, precision)
        for _ in range(2):  # the heap of the process still grows in the second run
            warm()
        start = seconds()
        run()
        runs = REPEATS if name in (WHOLE, PASSES) else 1
        wall, cpu = ((b - a) / runs for a, b in zip(start, seconds(), strict=True))
        first = 0.0
    else:
        taken = []
        for file in ("slice", "stack"):
            start = seconds()
            SEGMENTS[name](model, folder / f"{file}.tif", folder / "out.zarr", precision)
            taken.append([b - a for a, b in zip(start, seconds(), strict=True)])
        (first, first_cpu), (wall, cpu) = taken
        wall, cpu = (wall - first) / (SLICES - 1), (cpu - first_cpu) / (SLICES - 1)
        first -= wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "start": first}))


def cases():
    """Names and precisions of the cases."""
    formats = ["float32", *({best_precision("cpu")} - {"float32"})]
    for precision in formats:
        for name in (*IN_PROCESS, *SEGMENTS):
            only_float32 = name.startswith(("usual", "nnU-Net")) or name.endswith("overlap 0.5")
            if precision == "float32" or not only_float32:
                yield name, precision


def measured(folder, base, rounds, extent):
    """Writes the model and the images, and runs all cases; see `in_turn`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(folder / "model.safetensors", base=base, depth=DEPTH)
    stack = noise((SLICES, extent, extent))
    tifffile.imwrite(folder / "slice.tif", stack[0], photometric="minisblack")
    tifffile.imwrite(folder / "stack.tif", stack, photometric="minisblack")
    return in_turn("tests.bench_peers", cases(), rounds, base, model, folder)


def in_turn(module, cases, rounds, base, *arguments):
    """Runs all cases of a module in turn; returns the results of each, in the order of rounds."""
    cases, results = [*cases], {}
    for number in range(rounds):
        for name, precision in cases:
            words = "-m", module, "case", name, precision, *map(str, arguments)
            done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}, {precision}:\n{done.stderr}")
            result = json.loads(done.stdout.splitlines()[-1])
            results.setdefault(f"{name}; {precision}", []).append(result)
            print(base, number, name, precision, result, file=sys.stderr, flush=True)
    return results


def table(results, base, extent):
    """Returns Markdown: a line for each case, with ratios to our function in that precision."""
    lines = [
        f"{base} base channels, {extent} x {extent} voxels:",
        "",
        "| pipeline | precision | Mvoxel/s | CPU s per Mvoxel | time / ours | start-up s |",
        "|---|---|---|---|---|---|",
    ]
    for key, rounds in results.items():
        name, precision = key.split("; ")
        ours = results[f"{OURS}; {precision}"]
        ratio = statistics.median(r["wall"] / o["wall"] for r, o in zip(rounds, ours, strict=True))
        speed = extent**2 / 1e6 / min(r["wall"] for r in rounds)
        cpu = f"{min(r['cpu'] for r in rounds) / (extent**2 / 1e6):.2f}"
        if name.endswith("Ray"):
            cpu = ""  # workers of Ray are not children of this process
        start = f"{min(r['start'] for r in rounds):.1f}" if name in SEGMENTS else ""
        lines.append(f"| {name} | {precision} | {speed:.3f} | {cpu} | {ratio:.2f} | {start} |")
    return "\n".join(lines)


def machine():
    """What decides the speed here."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "precision": best_precision("cpu"),
        "torch": torch.__version__,
    }


def write_tables(folder, name, everything, tables):
    """Writes the results as JSON and the tables, below a line on the machine, as Markdown."""
    here = machine()
    (folder / f"{name}.json").write_text(json.dumps({"machine": here, "results": everything}))
    line = f"Machine: {', '.join(f'{k} {v}' for k, v in here.items())}"
    text = "\n\n".join([line, *tables])
    (folder / f"{name}.md").write_text(text + "\n")
    print(text)


def main(folder, bases="16,32,64", rounds=3, extent=2048):
    if folder == "case":
        raise SystemExit("case NAME PRECISION MODEL FOLDER")
    folder, extent = Path(folder), int(extent)
    everything, tables = {}, []
    for base in map(int, bases.split(",")):
        everything[base] = measured(folder / str(base), base, int(rounds), extent)
        tables.append(table(everything[base], base, extent))
    write_tables(folder, "peers", everything, tables)


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        one_case(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
