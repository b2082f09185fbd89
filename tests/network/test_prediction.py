"""Passes of constant voxels, streams, classes of scores, and the arithmetic of a GPU."""

import math
import os
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unet_ray import machine
from unet_ray.engine.attempts import failure
from unet_ray.errors import RunError
from unet_ray.network import prediction
from unet_ray.network.prediction import Predictor, constant_value, gpu_versions, instructions
from unet_ray.network.unet import UNet
from unet_ray.segmentation.memory import network_size
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.tiling.streaming import stream_along
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.intensity import Intensity

OUTPUTS = ("probabilities", "classes")


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = UNet(1, 3, 8, 2, "none", 0.0).eval()
    network.head.weight.data.mul_(3)
    return network


def predicted(network, plan, volume, tta=False, order=None):
    """Results of all tiles of a volume (z, y, x), and the number of computed passes."""
    predictor = Predictor(network, plan, Intensity((9.0,), (30.0,)), "float32", "cpu", tta)
    calls, forward = [], predictor._forward
    predictor._forward = lambda *args: calls.append(1) or forward(*args)
    results = {}
    for tile in map(plan.__getitem__, range(len(plan)) if order is None else order.tolist()):
        window = read_mirrored(lambda box: volume[box.slices], volume.shape, tile.read)
        results[tile.index] = predictor(tile, window[None], OUTPUTS)
    return [results[number] for number in sorted(results)], len(calls)


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_constant_passes_are_computed_once_for_each_value(network, monkeypatch, dtype, tta):
    plan = TilePlan((2, 96, 192), (2, 96, 96), network.context, (1, 32, 32))
    volume = np.zeros((2, 96, 192), dtype)
    volume[1] = 7
    volume[1, 90, 180] = 50
    cached, computed_passes = predicted(network, plan, volume, tta=tta)
    monkeypatch.setattr(prediction, "constant_value", lambda window: None)
    expected, all_passes = predicted(network, plan, volume, tta=tta)
    assert all_passes == 36 and 2 + 2 <= computed_passes < 2 + 9
    for one, two in zip(cached, expected, strict=True):
        for name in OUTPUTS:
            np.testing.assert_array_equal(one[name], two[name])
    # Constant input has a pattern of the pooling as output, so only whole passes can be cached.
    assert len(np.unique(expected[0]["probabilities"][0, 0])) > 1


@pytest.mark.parametrize(
    ("values", "computed"), [([1, 1, 2, 2, 3, 1], 4), ([1, 2, 1, 3, 1, 2], 4), ([1, 2] * 3, 2)]
)
def test_the_most_recently_used_results_are_cached(network, values, computed):
    plan = TilePlan((6, 32, 32), (6, 32, 32), network.context, (1, 32, 32))
    volume = np.repeat(np.array(values, np.uint8), 32 * 32).reshape(6, 32, 32)
    assert predicted(network, plan, volume)[1] == computed


@pytest.mark.parametrize(
    ("values", "same"),
    [
        (np.zeros((2, 3, 4, 5), np.uint16), True),
        (np.array([1, 2], np.uint8)[:, None, None, None] * np.ones((2, 3, 4, 5), np.uint8), True),
        (np.array([0.0, 1, 0], np.float32).reshape(1, 1, 1, 3), False),
        (np.array([0.0, -0.0], np.float32).reshape(1, 1, 1, 2), False),
        (np.full((1, 2, 2, 2), np.nan, np.float64), True),
    ],
)
def test_constant_means_the_same_bits_in_each_channel(values, same):
    assert (constant_value(values) is not None) == same
    assert (constant_value(values[..., ::2, ::-1]) is not None) == same
    if same and values.shape[0] == 2 and values.max():
        assert constant_value(values) != constant_value(values[::-1])


# GPUs, which these tests imitate


@pytest.fixture
def switches():
    """The switches of torch, set to other values than those that a predictor needs."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic
    cudnn.allow_tf32 = matmul.allow_tf32 = cudnn.benchmark = True
    cudnn.deterministic = False
    yield cudnn, matmul
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic = before


def test_a_predictor_settles_the_arithmetic(network, switches, monkeypatch):
    cudnn, matmul = switches
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    plan = TilePlan((1, 32, 32), (1, 32, 32), network.context, (1, 32, 32))
    Predictor(network, plan, Intensity((9.0,), (30.0,)), "float32", "cpu")
    assert not cudnn.allow_tf32 and not matmul.allow_tf32
    assert cudnn.deterministic and not cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def imitate_gpu(monkeypatch, name="NVIDIA A10G", major=8, minor=6, multiprocessors=80):
    properties = SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=multiprocessors
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_the_instructions_of_a_gpu_name_its_model(monkeypatch):
    imitate_gpu(monkeypatch)
    assert instructions("cuda") == "NVIDIA A10G, sm_86, 80 multiprocessors"
    imitate_gpu(monkeypatch, "Tesla T4", 7, 5, 40)
    assert instructions("cuda") == "Tesla T4, sm_75, 40 multiprocessors"


DRIVERS = {
    "535.104.05": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15",
    "570.86.15": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release",
}


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_versions_of_a_gpu_are_those_of_its_software(tmp_path, monkeypatch, driver):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert gpu_versions("cuda") == {"cuda": "13.0", "cudnn": "91002"}
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    (tmp_path / "driver/nvidia/version").write_text(f"{DRIVERS[driver]}\nGCC version: 12.3.0\n")
    assert gpu_versions("cuda") == {"cuda": "13.0", "cudnn": "91002", "nvidia-driver": driver}
    assert gpu_versions("cpu") == {}


@pytest.mark.parametrize("ended", [False, True], ids=["completed", "out of memory"])
@pytest.mark.parametrize("failed", [0, 1, 2])
def test_an_algorithm_replaced_for_lack_of_memory_ends_the_process(
    network, monkeypatch, failed, ended
):
    plan = TilePlan((1, 32, 32), (1, 32, 32), network.context, (1, 32, 32))
    predictor = Predictor(network, plan, Intensity((9.0,), (30.0,)), "float32", "cpu")
    counts, scores = iter([5, 5 + failed + ended]), predictor._scores
    monkeypatch.setattr(predictor, "_failed_allocations", lambda: next(counts))

    def pass_of(image, finite, network, kept):
        if ended:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scores(image, finite, network, kept)

    monkeypatch.setattr(predictor, "_scores", pass_of)
    outcome = nullcontext()
    if failed:
        outcome = pytest.raises(RuntimeError, match="of cuDNN")
    elif ended:
        outcome = pytest.raises(torch.OutOfMemoryError)
    with outcome as caught:
        predictor(plan[0], np.zeros((1, *plan[0].read.shape), np.uint8), OUTPUTS)
    if failed or ended:
        verdict = failure(0, 0.0, caught.value).verdict
        assert verdict == ("broken" if failed else "alone")


def test_failed_allocations_are_those_of_the_gpu(network, monkeypatch):
    plan = TilePlan((1, 32, 32), (1, 32, 32), network.context, (1, 32, 32))
    predictor = Predictor(network, plan, Intensity((9.0,), (30.0,)), "float32", "cpu")
    assert predictor._failed_allocations() == 0
    predictor._device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_ooms": 3})
    assert predictor._failed_allocations() == 3


@pytest.mark.parametrize("tta", [False, True])
def test_tiles_of_a_network_in_3d_are_parts_of_the_whole_volume(tta):
    torch.manual_seed(0)
    network = UNet(1, 3, 4, 2, "weight", 0.0, ((1, 1), (3, 2), (3, 1))).eval()
    step = network.context.step
    volume = np.random.default_rng(0).integers(0, 99, (12, 40, 48)).astype(np.uint8)
    extents = tuple(-(-n // s) * s for n, s in zip(volume.shape, step, strict=True))
    core = tuple(2 * s for s in step)
    whole, parts = ({name: np.zeros((2, *extents)) for name in OUTPUTS} for _ in range(2))
    for results, size in ((whole, extents), (parts, core)):
        plan = TilePlan(volume.shape, size, network.context, size)
        for tile, result in zip(plan, predicted(network, plan, volume, tta=tta)[0], strict=True):
            start = tuple(n - c for n, c in zip(tile.write.start, tile.crop.start, strict=True))
            box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
            for name in OUTPUTS:
                results[name][(slice(None), *box)] = result[name]
    assert len(plan) > 20
    inside = (slice(None), *(slice(n) for n in volume.shape))
    for name, most in (("probabilities", 1), ("classes", 0)):
        np.testing.assert_allclose(parts[name][inside], whole[name][inside], rtol=0, atol=most)
    assert len(np.unique(whole["probabilities"])) > 50


def whole_of(results, plan):
    """The results of all tiles, as arrays of the volume."""
    whole = {name: np.zeros((2, *plan.shape), int) for name in OUTPUTS}
    for tile, result in zip(plan, results, strict=True):
        for name in OUTPUTS:
            box = slice(None), *tile.write.slices
            whole[name][box] = result[name][(..., *tile.crop.slices)]
    return whole


@pytest.mark.parametrize("tta", [False, True])
def test_streamed_tiles_are_those_of_separate_passes(tta):
    torch.manual_seed(0)
    network = UNet(1, 3, 4, 2, "weight", 0.0, ((1, 1), (3, 2), (3, 1))).eval()
    volume = np.random.default_rng(0).integers(0, 99, (22, 40, 24)).astype(np.uint8)
    separate = TilePlan(volume.shape, (24, 20, 24), network.context, (24, 20, 24))
    around = stream_along(network.levels, 4).around(network.context)
    streamed = TilePlan(volume.shape, (8, 20, 24), around, (4, 20, 12), streamed=True)
    expected = whole_of(predicted(network, separate, volume, tta=tta)[0], separate)
    results, calls = predicted(network, streamed, volume, tta=tta)
    got = whole_of(results, streamed)
    np.testing.assert_allclose(got["probabilities"], expected["probabilities"], rtol=0, atol=1)
    np.testing.assert_array_equal(got["classes"], expected["classes"])
    # In ascending order a tile rarely follows the one below it, in the order of columns always.
    columns = np.arange(len(streamed)).reshape(3, 2, 1).transpose(1, 2, 0).ravel()
    in_columns, fewer = predicted(network, streamed, volume, tta=tta, order=columns)
    warm_up = around.halo[0] // 4
    assert (calls, fewer) == (2 * 2 * (6 + 3 * warm_up), 2 * 2 * (6 + warm_up))
    for one, two in zip(results, in_columns, strict=True):
        for name in OUTPUTS:
            np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize(
    ("z_levels", "symmetries"), [(((1, 1), (3, 2), (3, 1)), 16), (((3, 2),) * 3, 48)]
)
def test_the_mean_over_symmetries_does_not_depend_on_the_turn_of_a_volume(z_levels, symmetries):
    torch.manual_seed(0)
    network = UNet(1, 3, 2, 2, "weight", 0.0, z_levels).eval()
    step, halo = network.context.step, network.context.halo
    core = tuple(2 * s for s in step) if symmetries == 16 else (8,) * 3
    plan = TilePlan(core, core, network.context, core)
    predictor = Predictor(network, plan, Intensity((50.0,), (30.0,)), "float32", "cpu", tta=True)
    extents = [c + h for c, h in zip(core, halo, strict=True)]
    voxels = np.random.default_rng(0).integers(0, 99, extents).astype(np.uint8)
    scores, calls = predictor._scores, []
    predictor._scores = lambda *args: calls.append(1) or scores(*args)

    def averaged(volume):
        with torch.inference_mode():
            return predictor._averaged(predictor._image(volume[None]), [], ())

    whole = averaged(voxels)
    assert len(calls) == symmetries
    turns = [lambda a: a.flip(-3), lambda a: a.flip(-1), lambda a: a.rot90(1, (-2, -1))]
    if symmetries == 48:
        turns += [lambda a: a.rot90(1, (-3, -2)), lambda a: a.transpose(-3, -1)]
    for turn in turns:
        turned = averaged(turn(torch.from_numpy(voxels.astype(np.float32))).numpy())
        torch.testing.assert_close(turned, turn(whole), rtol=0, atol=1e-5)
    assert whole.std() > 0.01


@pytest.mark.parametrize(("orientation", "in_the_plane"), [("upright", 2), ("fixed", 1)])
@pytest.mark.parametrize("z_levels", [None, ((3, 2),) * 3])
def test_a_network_of_one_orientation_sees_no_other(orientation, in_the_plane, z_levels):
    torch.manual_seed(0)
    network = UNet(1, 3, 2, 2, "weight", 0.0, z_levels).eval()
    network.orientation = orientation
    core = (1, 16, 16) if z_levels is None else (8, 16, 16)
    plan = TilePlan(core, core, network.context, core)
    predictor = Predictor(network, plan, Intensity((50.0,), (30.0,)), "float32", "cpu", tta=True)
    extents = [c + h for c, h in zip(core, network.context.halo, strict=True)]
    voxels = np.random.default_rng(0).integers(0, 99, extents).astype(np.uint8)
    scores, calls = predictor._scores, []
    predictor._scores = lambda *args: calls.append(1) or scores(*args)

    def averaged(volume):
        with torch.inference_mode():
            return predictor._averaged(predictor._image(volume[None].copy()), [], ())

    whole = averaged(voxels)
    symmetries = in_the_plane * (1 if z_levels is None else 2)
    assert len(calls) == symmetries == network_size(network, "float32", True).symmetries
    mirrored = {axis: averaged(np.flip(voxels, axis)).flip(axis) for axis in (-3, -2, -1)}
    equal = {axis: torch.allclose(same, whole, atol=1e-5) for axis, same in mirrored.items()}
    assert not equal[-2] and equal[-1] == (orientation == "upright")
    assert z_levels is None or equal[-3]


def results_of(scores):
    """The results of a tile whose scores are given, (1, classes, 20, 20)."""
    network = UNet(1, scores.shape[1], 4, 2, "none", 0.0).eval()
    plan = TilePlan((1, 20, 20), (1, 20, 20), network.context, (1, 20, 20))
    predictor = Predictor(network, plan, Intensity((0.0,), (1.0,)), "float32", "cpu")
    predictor._networks = [lambda image: scores]
    shape = 1, *plan[0].read.shape
    voxels = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    return predictor(plan[0], voxels, OUTPUTS)


@pytest.mark.parametrize("values", ["ties", "any"])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_class_is_that_of_the_largest_score_and_the_lowest_at_a_tie(classes, values):
    scores = torch.randn(1, classes, 20, 20, generator=torch.manual_seed(1))
    scores = scores.round() if values == "ties" else scores
    got = results_of(scores)["classes"]
    np.testing.assert_array_equal(got, scores.numpy().argmax(axis=1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 17, 799])
def test_one_score_that_is_not_finite_is_detected(bad, where):
    scores = torch.randn(1, 2, 20, 20, generator=torch.manual_seed(1))
    scores.view(-1)[where] = bad
    with pytest.raises(RunError, match="not finite"):
        results_of(scores)
