"""A step of training beside a bare step of the same network, MONAI's and nnU-Net's, in one run.

python -m tests.bench_steps FOLDER [BASES [ROUNDS [STEPS]]]
python -m tests.bench_steps profile [BASE [STEPS]]

The first form needs the environment of ``make bench-peers``; elsewhere it leaves out the peers.
BASES are base channels, such as 16,32. In each round every case runs once, in a process of its own,
with as many threads as cores. It takes `WARM` steps and then STEPS measured ones, of one patch
each. Writes FOLDER/steps.json and FOLDER/steps.md. They have the least seconds and the most memory
of the rounds, and the medians of the ratios to our step on a constant patch.

Our network is unpadded, so it labels the middle of its patch; the peers pad and label all of it.
So the table has a ratio per step and one per labelled voxel. All networks have the same channels
and depth. The peers have the loss and the optimiser that they recommend.

The second form prints where the time of our step goes. Its patches are drawn in the same thread, so
the shares sum to 100 %; in a training, another thread draws them meanwhile. The profiler itself
takes some microseconds of each operation, which count as the part they are in.
"""

import importlib.util
import itertools
import json
import os
import resource
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import psutil
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as profiler

from tests.bench_peers import basic_unet, floats, in_turn, plain_conv_unet, seconds, write_tables
from tests.bench_training import learner_of, step_data
from unet_ray.machine import give_back_freed_memory, keep_freed_memory
from unet_ray.network.prediction import best_precision
from unet_ray.network.unet import StandardisedConv2d
from unet_ray.tiling.tiles import round_up
from unet_ray.training.patches import Sampler, ahead, sample_slots
from unet_ray.training.trainer import Average

WARM = 3  # the first steps are slower: libraries choose their kernels
MULTIPLE = 16  # of the patch of nnU-Net's network, which halves it four times


class Case(NamedTuple):
    """A step of training, on a square patch.

    Attributes:
        step: takes the step of a number.
        patch: extent of the input.
        output: extent of the labelled part.
    """

    step: Callable[[int], object]
    patch: int
    output: int


# Ours


def our_step(base, precision, drawn=False, averaged=False):
    """`Learner.step`, and what else a training does in each step."""
    recipe, data = step_data(base, precision)
    learner = learner_of(recipe, torch.get_num_threads())
    samples = ahead(Sampler(data, recipe).__getitem__, sample_slots(0, 0, recipe.batch))
    average = Average(learner._network, recipe.averaged)
    if not drawn:
        same = next(samples)
        samples.close()
        samples = itertools.repeat(same)

    def step(number):
        learner.step([next(samples)], number, 0.0)
        if averaged:
            average.add(learner._network)

    return Case(step, recipe.patch[0], recipe.output[0])


def bare_step(base, precision, channels_last=True, fused=None):
    """Our network and our kind of optimiser in a loop by hand, without anything else."""
    recipe, data = step_data(base, precision)
    sample = Sampler(data, recipe)[0, 0]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = recipe.network(1, 2).to(memory_format=layout)
    image = torch.from_numpy(sample.image[None]).contiguous(memory_format=layout)
    targets = torch.from_numpy(sample.targets[None]).long()
    optimiser = torch.optim.AdamW(network.parameters(), recipe.learning_rate, fused=fused)
    dtype = getattr(torch, precision)

    def step(number):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype, dtype != torch.float32):
            scores = network(image)
        functional.cross_entropy(scores.float(), targets).backward()
        optimiser.step()

    return Case(step, recipe.patch[0], recipe.output[0])


# Peers


def labelled(base, multiple=1):
    """A window of the same images of at least our patch, and its labels: tensors (1, 1, y, x)."""
    recipe, data = step_data(base)
    extent, volume = round_up(recipe.patch[0], multiple), data.volumes[0]
    image = floats(volume.image[0, :1, :extent, :extent])
    targets = torch.from_numpy(volume.targets[:1, :extent, :extent]).long()[None]
    return image, targets, extent


def peer_step(network, optimiser, image, precision, loss_of, clip=0.0):
    """A loop by hand; in bfloat16 with the channels last, as ours, though few users do that."""
    dtype = getattr(torch, precision)
    if dtype != torch.float32:
        network.to(memory_format=torch.channels_last)
        image = image.contiguous(memory_format=torch.channels_last)

    def step(number):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype, dtype != torch.float32):
            scores = network(image)
        loss_of(scores).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimiser.step()

    return step


def monai_step(base, precision):
    """MONAI: BasicUNet with the loss of Dice and cross-entropy, and AdamW."""
    from monai.losses import DiceCELoss

    image, targets, extent = labelled(base)
    network, loss = basic_unet(base).train(), DiceCELoss(to_onehot_y=True, softmax=True)
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3)

    def loss_of(scores):
        return loss(scores.float(), targets)

    return Case(peer_step(network, optimiser, image, precision, loss_of), extent, extent)


def nnunet_step(base, precision):
    """nnU-Net v2: PlainConvUNet, its loss with deep supervision, SGD, and its clipping."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    image, targets, extent = labelled(base, MULTIPLE)
    network = plain_conv_unet(base, deep_supervision=True).train()
    overlap = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    single = DC_and_CE_loss(overlap, {}, dice_class=MemoryEfficientSoftDiceLoss)
    # Its trainer halves the weight from scale to scale and leaves out the coarsest.
    loss = DeepSupervisionWrapper(single, [4 / 7, 2 / 7, 1 / 7, 0.0])
    scales = [targets[..., :: 1 << n, :: 1 << n].float() for n in range(4)]
    optimiser = torch.optim.SGD(
        network.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True
    )

    def loss_of(outputs):
        return loss([scores.float() for scores in outputs], scales)

    return Case(peer_step(network, optimiser, image, precision, loss_of, 12), extent, extent)


OURS = "ours, constant patch"
BY_MALLOC = "bare, contiguous, memory by default"
MAKE = {
    "ours, drawn patches and average": partial(our_step, drawn=True, averaged=True),
    "ours, drawn patches": partial(our_step, drawn=True),
    OURS: our_step,
    "bare": bare_step,
    "bare, fused optimiser": partial(bare_step, fused=True),
    "bare, contiguous": partial(bare_step, channels_last=False),
    BY_MALLOC: partial(bare_step, channels_last=False),
    "MONAI": monai_step,
    "nnU-Net": nnunet_step,
}
PEERS = {"MONAI": "monai", "nnU-Net": "nnunetv2"}
IN_FLOAT32 = "bare, contiguous", BY_MALLOC  # as most code does
IN_BOTH = OURS, "bare", *PEERS  # others only in our default precision


def cases():
    """Names and precisions of the cases that can run here."""
    default = best_precision("cpu")
    for name in MAKE:
        if name in PEERS and importlib.util.find_spec(PEERS[name]) is None:
            continue
        if name not in IN_FLOAT32:
            yield name, default
        if name in IN_FLOAT32 or (name in IN_BOTH and default != "float32"):
            yield name, "float32"


def forget_peak():
    """Returns the resident MiB, and makes them the peak so far, as far as the system allows."""
    give_back_freed_memory()  # else the first steps would fill what the preparation has freed
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss / 2**20


def one_case(name, precision, base, steps):
    """Prints wall and CPU seconds of a step, MiB at the peak, and the extents of the patch."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if name != BY_MALLOC:
        keep_freed_memory()  # as ours, for all: only what the name says differs
    torch.manual_seed(0)
    case = MAKE[name](int(base), precision)
    before = forget_peak()
    for number in range(WARM):
        case.step(number)
    start = seconds()
    for number in range(WARM, WARM + int(steps)):
        case.step(number)
    wall, cpu = ((b - a) / int(steps) for a, b in zip(start, seconds(), strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"wall": wall, "cpu": cpu, "peak": peak, "step": peak - before}
    print(json.dumps({**figures, "patch": case.patch, "output": case.output}))


def table(results, base):
    """Returns Markdown: a line for each case, with ratios to our step on a constant patch."""
    ours = results[f"{OURS}; {best_precision('cpu')}"]
    lines = [
        f"{base} base channels, one patch per step:",
        "",
        "| step | precision | patch, labelled | ms | CPU s | MiB at the peak | of it by steps "
        "| µs per labelled voxel | time / ours | time / ours per labelled voxel |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, rounds in results.items():
        name, precision = key.split("; ")
        first = rounds[0]
        ratio = statistics.median(r["wall"] / o["wall"] for r, o in zip(rounds, ours, strict=True))
        least = {figure: min(r[figure] for r in rounds) for figure in ("wall", "cpu")}
        most = {figure: max(r[figure] for r in rounds) for figure in ("peak", "step")}
        per_voxel = ratio * (ours[0]["output"] / first["output"]) ** 2
        columns = (
            name,
            precision,
            f"{first['patch']}, {first['output']}",
            f"{1e3 * least['wall']:.0f}",
            f"{least['cpu']:.2f}",
            f"{most['peak']:.0f}",
            f"{most['step']:.0f}",
            f"{1e6 * least['wall'] / first['output'] ** 2:.2f}",
            f"{ratio:.2f}",
            f"{per_voxel:.2f}",
        )
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


# Where the time goes

PARTS = (
    "convolutions, forward",
    "convolutions, backward",
    "standardised filters, both ways",
    "other layers, both ways",
    "loss, both ways",
    "optimiser and clipping",
    "average of weights",
    "drawing and deformation",
)
CONVOLUTIONS = "aten::conv2d", "aten::conv_transpose2d"
OTHER_LAYERS = "relu", "maxpool", "max_pool", "cat", "slice"
# After the loss, only the gradients of filters pass through these.
OF_FILTERS = "mul", "sub", "div", "varmean", "sqrt", "clamp", "reciprocal", "view", "reshape"
BACKWARD = "autograd::engine::evaluate_function: "


def named(part, function):
    """The function, whose time counts as that part."""

    def call(*args, **keywords):
        with record_function(part):
            return function(*args, **keywords)

    return call


def part_of(name, in_loss):
    """The part that an operation belongs to; None if the operations in it decide that.

    `in_loss` says whether the backward pass is still before the first convolution.
    """
    if name in PARTS:
        return name
    if name.startswith("Optimizer."):
        return "optimiser and clipping"
    if name in CONVOLUTIONS:
        return "convolutions, forward"
    backward = name.startswith(BACKWARD)
    kind = name.removeprefix(BACKWARD).removeprefix("aten::").lower()
    if backward and kind.startswith("convolution"):
        return "convolutions, backward"
    if backward and in_loss:
        return "loss, both ways"
    if backward and kind.startswith(OF_FILTERS):
        return "standardised filters, both ways"
    return "other layers, both ways" if kind.startswith(OTHER_LAYERS) else None


def shares(step):
    """Microseconds of each part of a profiled step; the rest is all time outside the parts."""
    taken, in_loss, waiting = dict.fromkeys(PARTS, 0.0), True, [step]
    while waiting:
        event = waiting.pop()
        part = part_of(event.name, in_loss)
        in_loss = in_loss and part != "convolutions, backward"
        if part:
            taken[part] += event.cpu_time_total
        else:
            children = sorted(event.cpu_children, key=lambda child: child.time_range.start)
            waiting += reversed(children)  # so that events are visited in the order of time
    return {**taken, "rest": step.cpu_time_total - sum(taken.values())}


def profile(base=16, steps=10):
    """Prints the share of each part of our step."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()
    recipe, data = step_data(int(base))
    learner, sampler = learner_of(recipe, torch.get_num_threads()), Sampler(data, recipe)
    average = Average(learner._network, recipe.averaged)
    learner._loss = named("loss, both ways", learner._loss)
    draw = named("drawing and deformation", sampler.__getitem__)
    add = named("average of weights", average.add)
    clipped = named("optimiser and clipping", torch.nn.utils.clip_grad_norm_)

    def step(number):
        with record_function("step"):
            learner.step([draw((number, 0))], number, 0.0)
            add(learner._network)

    filters = named("standardised filters, both ways", StandardisedConv2d.standardised)
    with (
        patch.object(torch.nn.utils, "clip_grad_norm_", clipped),
        patch.object(StandardisedConv2d, "standardised", filters),
    ):
        for number in range(WARM):
            step(number)
        with profiler(activities=[ProfilerActivity.CPU]) as profiled:
            for number in range(int(steps)):
                step(number)
    profiles = [shares(event) for event in profiled.events() if event.name == "step"]
    means = {part: statistics.mean(one[part] for one in profiles) for part in profiles[0]}
    total = sum(means.values())
    percent = {part: round(100 * means[part] / total, 1) for part in PARTS}
    percent["rest"] = 100 - sum(percent.values())
    print(f"{base} base channels, {learner._dtype}, {total / 1e3:.0f} ms per step:\n")
    print("| part | ms | share |\n|---|---|---|")
    for part, value in percent.items():
        print(f"| {part} | {means[part] / 1e3:.1f} | {value:.1f} % |")


def main(folder, bases="16,32", rounds=3, steps=20):
    if folder in ("case", "profile"):
        raise SystemExit("case NAME PRECISION BASE STEPS, or profile [BASE [STEPS]]")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    everything, tables = {}, []
    for base in map(int, bases.split(",")):
        everything[base] = in_turn("tests.bench_steps", cases(), int(rounds), base, base, steps)
        tables.append(table(everything[base], base))
    write_tables(folder, "steps", everything, tables)


if __name__ == "__main__":
    actions = {"case": one_case, "profile": profile}
    if sys.argv[1:2] and sys.argv[1] in actions:
        actions[sys.argv[1]](*sys.argv[2:])
    else:
        main(*sys.argv[1:])
