"""Transfers of passes, on a pretended device that copies as late as its lanes allow."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_ray.errors import RunError
from unet_ray.network import prediction
from unet_ray.network.prediction import Predictor
from unet_ray.network.transfer import DEPTH, Transfer, delayed
from unet_ray.network.unet import UNet
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.tiling.streaming import stream_along
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.intensity import Intensity, fits_float32

OUTPUTS = ("probabilities", "classes")


class RaceError(AssertionError):
    """Two uses of the same memory have no order, and one of them writes."""


@dataclass
class Point:
    """A point of a lane, with the number of operations of each lane that precede it."""

    lanes: "LateLanes"
    before: dict[str, int]

    def synchronize(self):
        """Lets the host wait."""
        self.lanes.arrive("host", self.before)


@dataclass
class LateLanes:
    """Lanes on a CPU: copies up and down run only when something waits for them.

    The compute lane runs at once, as torch does on a CPU. Each copy notes the lane that uses its
    memory. Two uses without an order raise a `RaceError`, even if their result would be right.
    """

    log: list[str] = field(default_factory=list)
    made: list[tuple[str, int]] = field(default_factory=list)
    ignored: str = ""  # a wait that is left out, as a bug would
    waits: int = 0  # of the host

    def __post_init__(self):
        self.clocks = {lane: {} for lane in ("host", "up", "compute", "down")}
        self.late = []  # copies that have not run: lane, number, function
        self.uses = {}  # of each memory: lane, number, whether it writes
        self.kinds = {}  # of each memory: pinned, or of the device
        self.kept = []  # so that no address is used again

    def _buffer(self, kind, size):
        buffer = torch.full((size,), 171, dtype=torch.uint8)
        self.kinds[buffer.untyped_storage().data_ptr()] = kind
        self.made.append((kind, size))
        self.kept.append(buffer)
        return buffer

    def pinned(self, size):
        """Host memory."""
        return self._buffer("pinned", size)

    def memory(self, size):
        """Memory of the device."""
        return self._buffer("memory", size)

    def record(self, lane):
        """The present end of a lane."""
        return Point(self, dict(self.clocks[lane]))

    def wait(self, lane, event):
        """A lane waits for an event."""
        self.log.append(f"{lane} waits")
        if self.ignored != lane:
            self.arrive(lane, event.before)

    def arrive(self, lane, before):
        """A lane, or the host, comes after the operations that precede a point."""
        if lane == "host":
            self.waits += 1
            if self.ignored == "host":
                return
        clock = self.clocks[lane]
        for other, number in before.items():
            clock[other] = max(clock.get(other, 0), number)
        if lane in ("host", "compute"):  # both look at the memory itself
            for copy in [c for c in self.late if c[1] <= before.get(c[0], 0)]:
                self.late.remove(copy)
                with torch.inference_mode():
                    copy[2]()

    def copy(self, lane, target, source):
        """Copies later, or at once in the compute lane."""
        self.log.append(f"{lane} copies")
        if self._kind(source) == "pinned":
            self._use("host", source, writes=True)  # the host has just written it
        host = self.clocks["host"]
        for other, number in host.items():  # the host starts each operation after its own
            self.clocks[lane][other] = max(self.clocks[lane].get(other, 0), number)
        self._use(lane, source, writes=False)
        number = self._use(lane, target, writes=True)
        if lane == "compute":
            target.copy_(source)
        else:
            self.late.append((lane, number, lambda: target.copy_(source)))

    def _kind(self, tensor):
        return self.kinds.get(tensor.untyped_storage().data_ptr())

    def _use(self, lane, tensor, writes):
        clock = self.clocks[lane]
        clock[lane] = number = clock.get(lane, 0) + 1
        place = tensor.untyped_storage().data_ptr()
        if place in self.kinds:
            uses = self.uses.setdefault(place, [])
            for other, earlier, wrote in uses:
                if (writes or wrote) and clock.get(other, 0) < earlier:
                    raise RaceError(f"{lane} uses what {other} still uses")
            uses.append((lane, number, writes))
        return number


# Copies alone


@settings(deadline=None)
@given(
    st.sampled_from(["uint8", "int8", "uint16", "int16", "float16", "float32"]),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.data(),
)
def test_voxels_go_up_as_they_are(dtype, numbers, data):
    shape = tuple(data.draw(st.tuples(*[st.integers(1, 4)] * 4)))
    transfer, dtype = Transfer(LateLanes()), np.dtype(dtype)
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    for number in numbers:
        voxels = np.random.default_rng(number).uniform(limits.min / 4, limits.max / 4, shape)
        voxels = voxels.astype(dtype)
        voxels.setflags(write=False)  # as those that Ray hands over
        for layout in (voxels, voxels[..., ::-1, :]):
            assert fits_float32(dtype)
            image = transfer.up(layout)
            assert image.dtype == torch.float32
            np.testing.assert_array_equal(image.numpy(), layout.astype(np.float32))


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=9), st.integers(0, DEPTH))
def test_results_come_down_in_their_order(numbers, ahead):
    transfer, shape = Transfer(LateLanes()), (3, 2, 5)

    def started():
        for number in numbers:
            volume = torch.full(shape, number, dtype=torch.uint8)
            yield transfer.down({"a": volume.transpose(0, 1), "b": torch.tensor(number).byte()})

    results = [fetch() for fetch in delayed(started(), ahead)]
    assert [int(result["b"]) for result in results] == numbers
    for number, result in zip(numbers, results, strict=True):
        np.testing.assert_array_equal(result["a"], np.full((2, 3, 5), number))


def test_results_outlast_their_buffer():
    transfer = Transfer(LateLanes())
    fetches = [transfer.down({"a": torch.tensor([n], dtype=torch.uint8)}) for n in range(7)]
    assert [int(fetch()["a"][0]) for fetch in reversed(fetches)] == [*reversed(range(7))]
    assert fetches[0]() is fetches[0]()


def test_buffers_are_made_once_for_each_size():
    lanes = LateLanes()
    transfer, voxels = Transfer(lanes), np.ones((1, 2, 3, 4), np.uint16)
    for _ in range(9):
        transfer.up(voxels)
        transfer.down({"a": torch.zeros(10, dtype=torch.uint8)})()
    expected = [(kind, size) for size in (48, 10) for kind in ("memory", "pinned")] * DEPTH
    assert sorted(lanes.made) == sorted(expected)
    for _ in range(9):
        np.testing.assert_array_equal(transfer.up(voxels[:, :1]).numpy(), 1)
    assert len(lanes.made) == len(expected) + 2 * DEPTH


def test_a_pass_goes_up_and_down_without_a_wait_of_the_host():
    lanes = LateLanes()
    transfer = Transfer(lanes)
    image = transfer.up(np.ones((1, 1, 2, 2), np.uint8))
    fetch = transfer.down({"a": image.byte()})
    up = ["up waits", "up copies", "compute waits", "compute copies"]
    assert lanes.log == [*up, "compute copies", "down waits", "down copies"]
    assert lanes.waits == 0 and len(lanes.late) == 1
    fetch(), fetch()
    assert lanes.waits == 1 and not lanes.late


@pytest.mark.parametrize("ignored", ["", "up", "compute", "down", "host"])
def test_a_wait_that_is_missing_is_a_race(ignored):
    transfer = Transfer(LateLanes(ignored=ignored))

    def passes():
        for number in range(5):
            transfer.up(np.zeros((1, 1, 2, 2), np.uint8))  # of a pass that then failed
            image = transfer.up(np.full((1, 1, 2, 2), number, np.uint8))
            yield transfer.down({"a": image.byte()})

    def all_passes():
        values = [int(fetch()["a"][0, 0, 0, 0]) for fetch in delayed(passes(), DEPTH - 1)]
        if values != [*range(5)]:
            raise RaceError("a result was used before it was there")

    if not ignored:
        return all_passes()
    with pytest.raises(RaceError):
        all_passes()


def test_items_are_drawn_ahead_of_their_turn():
    drawn = []
    items = (drawn.append(n) or n for n in range(4))
    seen = [(item, len(drawn)) for item in delayed(items, 1)]
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert [*delayed(range(3), 0)] == [*delayed(range(3), 5)] == [0, 1, 2]


# Predictions


def network_of(channels=1, z_levels=None, classes=3):
    torch.manual_seed(0)
    network = UNet(channels, classes, 4, 2, "weight", 0.0, z_levels).eval()
    network.head.weight.data.mul_(3)
    return network


def both(network, plan, tta=False, threshold=None, precision="float32"):
    """A predictor as on a CPU, and one with a pretended device and its lanes."""
    channels = network.in_channels
    intensity = Intensity((41.3, 7.7)[:channels], (30.1, 0.3)[:channels])
    plain, late = (
        Predictor(network, plan, intensity, precision, "cpu", tta, threshold) for _ in range(2)
    )
    lanes = LateLanes()
    late._transfer = Transfer(lanes)
    return plain, late, lanes


def volume_of(shape, dtype):
    return np.random.default_rng(0).integers(0, 99, shape).astype(dtype)


def predicted(predictor, plan, volume):
    """Results of all tiles of a volume (c, z, y, x)."""
    for tile in map(plan.__getitem__, range(len(plan))):
        yield predictor(
            tile,
            read_mirrored(lambda b: volume[(slice(None), *b.slices)], plan.shape, tile.read),
            OUTPUTS,
        )


def same(one, other):
    for left, right in zip(one, other, strict=True):
        for name in OUTPUTS:
            np.testing.assert_array_equal(left[name], right[name])


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["uint8", "uint16", "int16", "float16", "float32", "float64", "int32"]),
    st.data(),
)
def test_the_device_normalises_to_the_bits_of_the_host(dtype, data):
    finite = st.floats(-1e5, 1e5, width=32)
    count = data.draw(st.integers(1, 2))
    means = data.draw(st.lists(finite, min_size=count, max_size=count))
    sds = data.draw(st.lists(st.floats(1e-3, 1e5), min_size=count, max_size=count))
    intensity = Intensity(tuple(means), tuple(sds))
    network = network_of(count)
    plan = TilePlan((2, 8, 8), (2, 8, 8), network.context, (2, 8, 8))
    predictor = Predictor(network, plan, intensity, "float32", "cpu")
    info = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else SimpleNamespace(min=-9e4, max=9e4)
    window = np.random.default_rng(count).uniform(info.min, info.max, (count, 2, 3, 5))
    with np.errstate(over="ignore"):
        window = window.astype(dtype)
    host = predictor._image(window)
    predictor._transfer = Transfer(LateLanes())
    assert torch.equal(predictor._image(window).view(torch.int32), host.view(torch.int32))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
def test_results_have_the_bits_of_the_cpu(dtype, channels, precision):
    network = network_of(channels)
    plan = TilePlan((3, 40, 72), (2, 40, 40), network.context, (2, 20, 20))
    plain, late, lanes = both(network, plan, precision=precision)
    volume = volume_of((channels, *plan.shape), dtype)
    expected = [*predicted(plain, plan, volume)]
    assert len(np.unique([result["probabilities"] for result in expected])) > 50
    same(predicted(late, plan, volume), expected)
    size = volume[:, :2, :1, :1].nbytes if dtype != "float64" else 2 * channels * 4
    area = plan.pass_shape[1] * plan.pass_shape[2]
    assert sorted(lanes.made)[-1] == ("pinned", max(size * area, 2 * 3 * 400 + 1))
    assert len(lanes.made) == 2 * 2 * DEPTH


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_symmetries_and_thresholds_have_the_bits_of_the_cpu(tta, threshold):
    network = network_of(classes=3 if threshold is None else 2)
    plan = TilePlan((2, 40, 40), (2, 40, 40), network.context, (1, 20, 20))
    plain, late, _ = both(network, plan, tta, threshold)
    volume = volume_of((1, *plan.shape), "uint8")
    expected = [*predicted(plain, plan, volume)]
    assert len(np.unique(expected[0]["classes"])) > 1
    same(predicted(late, plan, volume), expected)


@pytest.mark.parametrize("tta", [False, True])
def test_streams_have_the_bits_of_the_cpu(tta):
    network = network_of(z_levels=((1, 1), (3, 2), (3, 1)))
    around = stream_along(network.levels, 4).around(network.context)
    plan = TilePlan((14, 20, 24), (8, 20, 24), around, (4, 20, 12), streamed=True)
    plain, late, _ = both(network, plan, tta)
    volume = volume_of((1, *plan.shape), "uint16")
    same(predicted(late, plan, volume), [*predicted(plain, plan, volume)])


def test_the_host_waits_once_for_each_pass_and_only_when_the_next_has_started():
    network = network_of()
    plan = TilePlan((1, 60, 60), (1, 60, 60), network.context, (1, 20, 20))
    _, late, lanes = both(network, plan)
    starts, forward = [], late._forward
    late._forward = lambda *args: starts.append(lanes.waits) or forward(*args)
    [*predicted(late, plan, volume_of((1, *plan.shape), "uint8"))]
    assert starts[:DEPTH] == [0, 0] and len(starts) == 9
    # From the third pass on, the host also waits for the copy from the buffer that it fills.
    assert lanes.waits == 9 + 9 - DEPTH


def test_constant_passes_are_computed_once_also_on_a_device():
    network = network_of()
    plan = TilePlan((6, 20, 20), (6, 20, 20), network.context, (1, 20, 20))
    plain, late, _ = both(network, plan)
    values = np.array([1, 1, 2, 1, 2, 1], np.uint8)
    volume = np.broadcast_to(values[:, None, None], plan.shape)[None]
    expected = [*predicted(plain, plan, volume)]
    calls, forward = [], late._forward
    late._forward = lambda *args: calls.append(1) or forward(*args)
    same(predicted(late, plan, volume), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("device", ["cpu", "pretended"])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("tta", [False, True])
def test_scores_that_are_not_finite_name_their_tile(device, constant, tta):
    network = network_of()
    plan = TilePlan((1, 40, 80), (1, 40, 40), network.context, (1, 20, 20))
    plain, late, _ = both(network, plan, tta)
    predictor = plain if device == "cpu" else late
    size = (1, *plan[1].read.shape)
    voxels = volume_of(size, "float32")
    expected = plain(plan[0], voxels, OUTPUTS)
    bad = np.full(size, np.inf, np.float32) if constant else voxels.copy()
    bad[0, 0, -1, -1] = np.inf
    for _ in range(2):  # the cache must not hide it
        with pytest.raises(RunError, match=r"^tile 1 \(.*\): the network returns scores that"):
            predictor(plan[1], bad, OUTPUTS)
    same([predictor(plan[0], voxels, OUTPUTS)], [expected])


def test_a_constant_pass_that_failed_once_is_computed_again(monkeypatch):
    network = network_of()
    plan = TilePlan((1, 40, 80), (1, 40, 40), network.context, (1, 20, 20))
    predictor, _, _ = both(network, plan, tta=False)
    voxels = np.full((1, *plan[1].read.shape), 7, np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "isfinite", lambda scores: torch.zeros_like(scores, dtype=torch.bool))
        with pytest.raises(RunError, match=r"^tile 1 "):
            predictor(plan[1], voxels, OUTPUTS)
    assert predictor(plan[1], voxels, OUTPUTS)["classes"].shape == (1, 40, 40)


@pytest.mark.parametrize("which", [0, 3, 7])
def test_the_scores_of_every_symmetry_must_be_finite(which):
    network = network_of()
    plan = TilePlan((1, 20, 20), (1, 20, 20), network.context, (1, 20, 20))
    _, late, _ = both(network, plan, tta=True)
    (folded,), calls = late._networks, []

    def damaged(image):
        calls.append(1)
        # Minus infinity alone has a softmax that is finite.
        bias = torch.tensor([0, 0, -torch.inf if len(calls) == which + 1 else 0])
        return folded(image) + bias.reshape(1, 3, 1, 1)

    late._networks = [damaged]
    with pytest.raises(RunError, match="not finite"):
        late(plan[0], volume_of((1, *plan[0].read.shape), "uint8"), OUTPUTS)
    assert len(calls) == 8


def test_planes_of_scores_that_are_not_finite_do_not_stay():
    network = network_of(z_levels=((1, 1), (3, 2), (3, 1)))
    around = stream_along(network.levels, 4).around(network.context)
    plan = TilePlan((16, 20, 12), (8, 20, 12), around, (4, 20, 12), streamed=True)
    plain, late, _ = both(network, plan)
    voxels = [volume_of((1, *plan[n].read.shape), "float32") for n in (0, 1)]
    expected = plain(plan[1], voxels[1], OUTPUTS)
    bad = voxels[0].copy()
    bad[0, -1] = np.inf  # only the last pass sees it
    with pytest.raises(RunError, match=r"^tile 0 "):
        late(plan[0], bad, OUTPUTS)
    same([late(plan[1], voxels[1], OUTPUTS)], [expected])


def test_an_algorithm_replaced_while_an_earlier_pass_waits_ends_the_process(monkeypatch):
    network = network_of()
    plan = TilePlan((1, 40, 40), (1, 40, 40), network.context, (1, 20, 20))
    _, late, lanes = both(network, plan)
    counts = iter([5, 5, 5, 6])  # before and after the first and the second pass
    monkeypatch.setattr(late, "_failed_allocations", lambda: next(counts))
    with pytest.raises(RuntimeError, match="of cuDNN"):
        late(plan[0], volume_of((1, *plan[0].read.shape), "uint8"), OUTPUTS)
    assert lanes.waits == 0  # the result of the first pass was not used either


# GPUs

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "float16", "float32"])
def test_a_gpu_normalises_to_the_bits_of_the_host(dtype):
    network = network_of(2)
    plan = TilePlan((2, 40, 40), (2, 40, 40), network.context, (2, 20, 20))
    intensity = Intensity((41.3, 7.7), (30.1, 0.3))
    host, gpu = (Predictor(network, plan, intensity, "float32", d) for d in ("cpu", "cuda"))
    for number in range(5):
        window = volume_of((2, *plan.pass_shape), dtype) + np.dtype(dtype).type(number)
        assert torch.equal(gpu._image(window).cpu(), host._image(window))


@on_gpu
def test_passes_of_a_gpu_that_overlap_have_the_bits_of_single_ones(monkeypatch):
    network = network_of()
    plan = TilePlan((8, 400, 400), (8, 400, 400), network.context, (1, 200, 200))
    volume = volume_of((1, *plan.shape), "uint16")
    predictor = Predictor(network, plan, Intensity((41.3,), (30.1,)), "float32", "cuda")
    overlapping = [*predicted(predictor, plan, volume)]
    monkeypatch.setattr(prediction, "DEPTH", 1)
    same(predicted(predictor, plan, volume), overlapping)
