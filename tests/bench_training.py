"""How long the parts of training take: weight map, deformation, and a step that waits for neither.

python -m tests.bench_training
"""

import time
from functools import partial

import numpy as np
import torch
from scipy import ndimage

from unet_ray import make_phantom
from unet_ray.engine.cluster import connect, usable_cores
from unet_ray.machine import keep_freed_memory
from unet_ray.training.augment import draw_deformation, warp_image, warp_labels
from unet_ray.training.data import TrainingData, TrainingVolume
from unet_ray.training.patches import Sampler, ahead, sample_slots
from unet_ray.training.recipes import Recipe
from unet_ray.training.stream import streamed
from unet_ray.training.train import CPU_SHARE
from unet_ray.training.trainer import Learner, World, optimiser_for, precision_for
from unet_ray.training.weights import border_term, class_weights, weight_map
from unet_ray.volumes.intensity import Intensity


def least(function, times):
    """The shortest of several calls, in seconds."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        took.append(time.perf_counter() - start)
    return min(took)


def cells(count):
    """Labels of `count` round cells that do not touch, on 512 x 512."""
    rng = np.random.default_rng(count)
    seeds = np.zeros((512, 512), np.int64)
    seeds[tuple(rng.integers(0, 512, (2, count)))] = np.arange(1, count + 1)
    away, nearest = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
    labels = seeds[tuple(nearest)]
    labels[away > 220 / count**0.5] = 0
    return labels


def one_transform_per_cell(labels):
    """What most programs do."""
    ids = np.unique(labels)[1:]
    away = np.stack([ndimage.distance_transform_edt(labels != i) for i in ids])
    d1, d2 = np.sort(away, axis=0)[:2]
    return 10 * np.exp(-((d1 + d2) ** 2) / 50)


def bench_weight_map():
    for count in (100, 1000):
        labels = cells(count)
        right = np.where(labels == 0, one_transform_per_cell(labels), 0)
        error = np.abs(border_term(labels, inside=False) - right).max()
        ours = least(lambda labels=labels: border_term(labels, inside=False), 7)
        theirs = least(lambda labels=labels: one_transform_per_cell(labels), 1)
        print(
            f"weight map, {count} cells of 512 x 512: {1e3 * ours:.1f} ms, one transform per cell "
            f"{theirs:.2f} s: {theirs / ours:.0f} times faster, differs by {error:.0e}"
        )


def bench_deformation():
    rng = np.random.default_rng(0)
    image = rng.random((1, 900, 900), np.float32)
    labels = (image[0] > 0.5).astype(np.uint8)

    def ours():
        bend = draw_deformation((572, 572), rng, 10.0)
        warp_image(image, (449.5, 449.5), bend)
        warp_labels(labels, (449.5, 449.5), bend)

    places = np.mgrid[64:636, 64:636] + rng.normal(0, 2, (2, 572, 572))

    def scipys():
        ndimage.map_coordinates(image[0], places, order=3)
        ndimage.map_coordinates(labels, places, order=0)

    ours()
    a, b = least(ours, 10), least(scipys, 3)
    print(
        f"deformation of a 572 patch and its labels: {1e3 * a:.1f} ms, scipy cubic {1e3 * b:.0f} "
        f"ms: {b / a:.1f} times faster"
    )


def step_data(base=32, precision="auto"):
    """Phantom data in memory, and the default recipe."""
    settings = {"patch": (380, 380), "steps": 1000}
    recipe = Recipe.of("default", base_channels=base, precision=precision, **settings)
    phantom = make_phantom((8, 512, 512), seed=0)
    targets = (phantom.classes > 0).astype(np.uint8)
    weights = weight_map(targets, 2, balance=class_weights(targets, 2))
    volume = TrainingVolume(phantom.image[None], targets, weights, Intensity((128.0,), (50.0,)))
    return recipe, TrainingData((volume,), (0, 1), None, {})


def learner_of(recipe, threads):
    """What takes the steps of a new network, as in a training of one worker."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    world = World(0, 1, torch.device("cpu"), threads)
    network = recipe.network(1, 2).to(memory_format=torch.channels_last)
    optimiser = optimiser_for(recipe, network)
    return Learner(recipe, network, optimiser, world, precision_for(recipe, world), 0.0)


def time_steps(recipe, data, draw, threads, settle, rounds=5, steps=80):
    """Seconds of a step on a constant patch, and of one on drawn ones, round by round.

    Of a wave or more, so that its drawing is in it; none is drawn beside the constant patch, for
    the stream is full by then.
    """
    learner = learner_of(recipe, threads)
    samples = draw(sample_slots(0, 0, 1))
    same = next(samples)
    for _ in range(5):
        learner.step([same], 0, 0.0)
    bare, real = [], []
    for _ in range(rounds):
        time.sleep(settle)
        bare.append(least(lambda: [learner.step([same], n, 0.0) for n in range(steps)], 1))
        real.append(least(lambda: [learner.step([next(samples)], n, 0.0) for n in range(steps)], 1))
    samples.close()
    return np.array(bare) / steps, np.array(real) / steps


def bench_step():
    recipe, data = step_data()
    threads = torch.get_num_threads()
    draw = partial(ahead, Sampler(data, recipe).__getitem__)
    tell_step("a thread", threads, *time_steps(recipe, data, draw, threads, 0.1))


def bench_step_on_ray():
    """The same in a process of Ray with all cores, fed by the Ray Data stream."""
    import ray

    recipe, data = step_data()
    connect()
    reference, threads = ray.put(data), usable_cores()
    worker = ray.remote(num_cpus=CPU_SHARE * threads)(timed_on_ray)
    tell_step("Ray Data", threads, *ray.get(worker.remote(recipe, [reference], threads)))
    ray.shutdown()


def timed_on_ray(recipe, reference, threads):
    import ray

    data = ray.get(reference[0])
    return time_steps(recipe, data, partial(streamed, reference[0], recipe, 1), threads, 1)


def tell_step(source, threads, bare, real):
    print(
        f"step, 32 channels, patch 380, {threads} threads: {1e3 * np.median(real):.0f} ms with "
        f"patches from {source}, {1e3 * np.median(bare):.0f} ms on a constant patch: "
        f"{np.median(bare / real):.3f} ({', '.join(f'{r:.3f}' for r in bare / real)})"
    )


def main():
    """Prints one line for each part."""
    bench_weight_map()
    bench_deformation()
    bench_step()
    bench_step_on_ray()


if __name__ == "__main__":
    main()
