"""Sizes as people write them, and memory estimates compared with measured peaks."""

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helper import TILED, anonymous, random_model, workers_of
from tests.strategies import flat_levels
from unet_ray.engine import engines
from unet_ray.engine.cluster import HELPERS
from unet_ray.errors import InputError
from unet_ray.network.arithmetic import NetworkSize, pass_bytes
from unet_ray.network.checkpoints import ModelHeader, architecture_of, write_model
from unet_ray.network.transfer import DEPTH
from unet_ray.network.unet import UNet
from unet_ray.segmentation import outlook as planning
from unet_ray.segmentation.forecast import describe
from unet_ray.segmentation.memory import (
    ALLOCATOR_FACTOR,
    DRIVER_BYTES_PER_TILE,
    GPU_TILES,
    PROCESS_BYTES,
    TILE_BATCH_BYTES,
    driver_bytes,
    helper_bytes,
    in_flight,
    needed_bytes,
    process_bytes,
    reserved_bytes,
    together,
    worker_bytes,
)
from unet_ray.segmentation.outlook import plan
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import Context, TilePlan
from unet_ray.units import format_bytes, parse_bytes

# Sizes as text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1048576", 1 << 20),
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        ("8Gi", 8 << 30),
        ("1.5GiB", 3 << 29),
        ("500 MB", 500 * 10**6),
        ("500m", 500 * 10**6),
        (" 2KiB ", 2048),
        ("2 kB", 2000),
        ("3TiB", 3 << 40),
        ("7b", 7),
    ],
)
def test_sizes_as_people_write_them_are_parsed(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "lots", "-4GiB", "4 GiB RAM", "4PiB", "4iB", "1e9", "0", "0GiB", "nan", "inf",
     "4,5GiB", "0.5", "0.9B", "9" * 400],
)  # fmt: skip
def test_an_invalid_or_zero_size_is_refused(text):
    with pytest.raises(InputError) as refused:
        parse_bytes(text)
    assert repr(text) in str(refused.value) and "4GiB" in str(refused.value)


@given(st.integers(1, 1 << 49))
def test_a_formatted_size_can_be_parsed(count):
    text = format_bytes(count)
    unit = parse_bytes("1" + text.split()[1])
    assert unit <= count * 1.001  # 1023.7 MiB is written 1.00 GiB
    assert abs(parse_bytes(text) - count) <= unit * (0.006 if "." in text else 0.5)


@pytest.mark.parametrize("count", [(1 << 20) - 1, (1 << 30) - 1, (1 << 40) - 1])
def test_1024_of_a_unit_are_written_as_one_of_the_next(count):
    assert not format_bytes(count).startswith("1024")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2048, "2 KiB"), (300 << 20, "300 MiB"), (3 << 29, "1.50 GiB")],
)
def test_sizes_are_formatted_for_people(count, text):
    assert format_bytes(count) == text


# Memory of passes and workers

NET = NetworkSize(1, 2, 16, flat_levels(4), weights=10**6, itemsize=4)
PAPER = Context((0, 92, 92), (0, 96, 96), (1, 16, 16))
extents = st.integers(1, 60).map(lambda k: 188 + 16 * k)


@given(st.integers(1, 8), extents, extents)
def test_a_larger_pass_needs_more(batch, y, x):
    needs = pass_bytes(NET, (batch, y, x))
    assert needs < pass_bytes(NET, (batch + 1, y, x))
    assert needs < pass_bytes(NET, (batch, y + 16, x))
    assert needs < pass_bytes(NET, (batch, y, x + 16))
    assert pass_bytes(NET, (batch, x, y)) == pytest.approx(needs, abs=1)


@given(st.integers(1, 4), extents, st.data())
def test_a_larger_network_needs_more(batch, extent, data):
    field = data.draw(st.sampled_from(["in_channels", "base_channels", "itemsize"]))
    larger = replace(NET, **{field: 2 * getattr(NET, field)})
    shape = (batch, extent, extent)
    assert pass_bytes(NET, shape) < pass_bytes(larger, shape)
    # At the peak the scores may not exist yet, so a few more classes may cost nothing.
    assert pass_bytes(NET, shape) <= pass_bytes(replace(NET, classes=3), shape)
    assert pass_bytes(NET, shape) < pass_bytes(replace(NET, classes=200), shape)


@given(st.integers(1, 200).map(lambda k: 188 + 16 * k))
def test_a_pass_needs_at_least_its_two_joined_buffers(extent):
    # At the last join: the joined buffer, and the up-convolution that is copied into it.
    joined = 3 * NET.base_channels * (extent - 180) ** 2 * NET.itemsize
    assert pass_bytes(NET, (1, extent, extent)) > joined


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_every_process_holds_the_index_of_the_input(engine):
    without, index = worker_bytes(NET, planned((1, 384, 384)), 1, 2).on(engine), 10 << 20
    memory = worker_bytes(NET, planned((1, 384, 384)), 1, 2, index=index).on(engine)
    assert memory.total == without.total + index
    assert memory.shared_by(3) == without.shared_by(3) + index  # they share the process
    for measuring in (0, 4 << 30):
        drivers = [
            driver_bytes(m.total, engine, "cpu", 8, measuring, m.index) for m in (without, memory)
        ]
        assert drivers[1] == drivers[0] + index


def planned(core, passes=None):
    return TilePlan((32, 2000, 2000), core, PAPER, passes or core)


def test_a_worker_needs_at_least_the_sum_of_its_parts():
    plan = planned((4, 384, 384), (2, 384, 384))
    memory = worker_bytes(NET, plan, voxel_bytes=2, outputs=3)
    assert memory.process == PROCESS_BYTES["ray"]
    assert memory.on("local").process == PROCESS_BYTES["local"]
    assert memory.weights >= NET.weights * NET.itemsize
    assert memory.tile >= 4 * 572 * 572 * 2 + 4 * 384 * 384 * 3
    assert memory.forward >= pass_bytes(NET, (2, 572, 572))
    assert memory.total >= memory.process + memory.weights + memory.tile + memory.forward


def test_workers_in_one_process_share_the_process_and_the_weights():
    memory = worker_bytes(NET, planned((1, 384, 384)), 1, 2)
    one, two, three = (memory.shared_by(n) for n in (1, 2, 3))
    assert one == memory.total
    assert two - one >= memory.tile + memory.forward
    assert three - two == pytest.approx(two - one, abs=2)
    assert two <= 2 * one - memory.process - memory.weights


def test_as_many_tiles_are_reserved_as_run_at_the_same_time():
    memory = worker_bytes(NET, planned((1, 384, 384)), 1, 2, later=True).on("local")
    settings = Settings(engine="local", workers=3)
    two, three, many = (reserved_bytes(memory, "cpu", settings, n) for n in (2, 3, 99))
    assert two - memory.shared_by(2) == three - memory.shared_by(3) < -memory.later
    assert many == three < process_bytes(memory, "cpu", settings)
    on_ray = replace(settings, engine="ray")
    assert reserved_bytes(memory, "cpu", on_ray, 99) < memory.total < two
    assert reserved_bytes(memory, "cuda", settings, 99) == 0


def test_a_run_reserves_memory_for_the_tiles_that_are_left(task, tmp_path, monkeypatch):
    volume, model, _ = task
    settings = replace(TILED, engine="local", workers=3, pyramid=False)
    memory, reserved = plan(volume, model, settings).memory, []
    monkeypatch.setattr(engines, "reserve_memory", reserved.append)
    for stop in [(1, 32, 20), (1, 32, 40), (3, 61, 75)]:  # 1, 1 and 22 new tiles
        segment(volume, model, tmp_path / "out", replace(settings, region=Box((0, 0, 0), stop)))
    assert reserved == [reserved_bytes(memory, "cpu", settings, n) for n in (1, 1, 22)]


def test_a_tile_that_waits_for_its_pass_needs_its_voxels_and_a_copy_only():
    memory = worker_bytes(NET, planned((1, 384, 384)), 1, 2)
    assert memory.shared_by(1, 1) == memory.total and memory.shared_by(3, 3) == memory.shared_by(3)
    assert memory.tile + memory.copy < memory.shared_by(2, 1) - memory.total
    assert memory.shared_by(4, 1) < memory.shared_by(2)


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_driver_needs_the_larger_of_measuring_and_running(engine):
    running = driver_bytes(500 << 20, engine, "cpu", 8, 0)
    assert driver_bytes(500 << 20, engine, "cpu", 8, 100 << 20) == running
    idle = PROCESS_BYTES[engine] + 8 * DRIVER_BYTES_PER_TILE
    assert driver_bytes(500 << 20, engine, "cpu", 8, 1 << 30) == idle + (1 << 30)


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_drivers_memory_includes_large_chunks_for_measuring(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(planning, "device_of", lambda settings: "cpu")
    monkeypatch.setattr(planning.cluster, "side_by_side", lambda *_: 1)
    chunk = 128, 1024, 1024
    zarr.create_array(tmp_path / "a.zarr", shape=(256, 1024, 1024), chunks=chunk, dtype="uint16")
    model = random_model(tmp_path / "model.safetensors", depth=1, base=2)
    outlook = plan(tmp_path / "a.zarr", model, Settings(engine=engine))
    # The chunk as stored, as decoded, and the returned voxels.
    assert outlook.driver_memory > PROCESS_BYTES[engine] + 3 * (256 << 20)


def test_a_plan_for_the_local_engine_states_a_worker_that_also_fits_on_ray(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "device_of", lambda settings: "cpu")
    monkeypatch.setattr(planning.cluster, "side_by_side", lambda *_: 1)
    zarr.create_array(tmp_path / "a.zarr", shape=(8, 512, 512), chunks=(8, 128, 128), dtype="u1")
    model = random_model(tmp_path / "model.safetensors")
    local, ray = (
        plan(tmp_path / "a.zarr", model, Settings(engine=engine, workers=1))
        for engine in ("local", "ray")
    )
    assert local.worker_memory == ray.worker_memory == ray.memory.total
    assert local.driver_memory < local.worker_memory
    process, amount = format_bytes(PROCESS_BYTES["ray"]), format_bytes(local.worker_memory)
    text = describe(local, Settings(engine="local", workers=1))
    assert f"memory  {amount} per worker on Ray (process {process}," in text


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_memory_limit_bounds_the_tiles_in_flight_on_a_gpu(engine):
    memory = worker_bytes(NET, planned((64, 384, 384), (1, 384, 384)), 1, 2).on(engine)
    needs = [memory.shared_by(n, 1) for n in range(1, GPU_TILES + 1)]
    for tiles, allowed in enumerate(needs, start=1):
        settings = Settings(engine=engine, memory=allowed)
        assert in_flight(memory, "cuda", settings) == tiles
        assert process_bytes(memory, "cuda", settings) == allowed
        assert in_flight(memory, "cuda", replace(settings, memory=allowed - 1)) == max(1, tiles - 1)
        assert in_flight(memory, "cpu", settings) == 1
    assert in_flight(memory, "cuda", Settings(engine=engine)) == GPU_TILES
    on_cpu = process_bytes(memory, "cpu", Settings(engine=engine, workers=3))
    assert on_cpu == memory.shared_by(3 if engine == "local" else 1)


def test_the_memory_limit_bounds_the_batch_of_small_tiles_for_a_gpu():
    memory = worker_bytes(NET, planned((1, 384, 384)), 1, 2).on("ray")
    batch = TILE_BATCH_BYTES // memory.tile
    assert batch > 9
    enough = Settings(engine="ray", memory=memory.shared_by(GPU_TILES * batch, 1))
    assert together(memory, "cuda", enough) == batch
    assert process_bytes(memory, "cuda", enough) == enough.memory
    less = replace(enough, memory=enough.memory - 1)
    assert together(memory, "cuda", less) == batch - 1
    assert process_bytes(memory, "cuda", less) < less.memory
    # Helpers hold the same tiles, but no network.
    assert memory.process < helper_bytes(memory, "cuda", enough)
    assert helper_bytes(memory, "cuda", less) < helper_bytes(memory, "cuda", enough)
    helpers = 2 * HELPERS * helper_bytes(memory, "cuda", enough)
    assert needed_bytes(memory, "cuda", enough) == enough.memory + helpers
    for device, engine in [("cpu", "ray"), ("cuda", "local")]:
        other = replace(enough, engine=engine)
        assert together(memory, device, other) == 1
        assert helper_bytes(memory, device, other) == 0
        assert needed_bytes(memory, device, other) == process_bytes(memory, device, other)
    large = worker_bytes(NET, planned((999, 384, 384), (1, 384, 384)), 1, 2).on("ray")
    assert together(large, "cuda", Settings(engine="ray", memory=1 << 40)) == 1


@given(
    st.sampled_from([1, 2, 4]),
    st.integers(1, 8),
    st.integers(2, 9),
    st.sampled_from([1, 2, 16]),
    st.sampled_from([2, 4]),
    st.integers(1, 40),
    st.integers(1, 8),
)
def test_page_locked_buffers_fit_into_the_share_of_a_pass(
    voxel, channels, classes, base, itemsize, extent, batch
):
    passes = (batch, 16 * extent, 16 * extent)
    net = NetworkSize(channels, classes, base, flat_levels(4), weights=10**6, itemsize=itemsize)
    shape = tuple(p + h for p, h in zip(passes, PAPER.halo, strict=True))
    up, down = math.prod(shape) * channels * voxel, math.prod(passes) * classes + 1
    # torch rounds the size of each up to a power of two.
    locked = sum(DEPTH * 2 ** (size - 1).bit_length() for size in (up, down))
    assert locked <= ALLOCATOR_FACTOR * pass_bytes(net, shape)


@given(st.integers(1, 16), st.integers(1, 30), st.integers(1, 30))
def test_a_larger_tile_needs_more_and_smaller_passes_less(z, y, x):
    core = (z, 16 * y, 16 * x)
    needs = worker_bytes(NET, planned(core), 1, 2).total
    for axis, step in enumerate(PAPER.step):
        more = tuple(n + step * (a == axis) for a, n in enumerate(core))
        assert needs < worker_bytes(NET, planned(more), 1, 2).total
    assert worker_bytes(NET, planned(core, (1, *core[1:])), 1, 2).total <= needs


def measured_peaks(arguments, engine, environment=None):
    """Largest anonymous memory of the command and of any worker while `segment` runs, in bytes."""
    command = [sys.executable, "-m", "unet_ray", "segment", *map(str, arguments)]
    command += ["--engine", engine, "--workers", "1" if engine == "local" else "2"]
    driver = worker = 0
    environment = {**os.environ, **(environment or {})}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as running:
        while running.poll() is None:
            driver = max(driver, anonymous(running.pid))
            worker = max([worker, *map(anonymous, workers_of(running.pid, engine))])
            time.sleep(0.05)
    assert running.returncode == 0
    return driver, worker


READ = r"""
import re, sys, threading
from pathlib import Path
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.opening import open_volume

path, channel, *box = sys.argv[1:]
volume = open_volume(path, channel=int(channel) if channel else None)
box = Box((0, 0, 0), (1, 300, 300)) if box else Box.of(volume.shape[1:])

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024

peak = first = anonymous()
done = threading.Event()

def sample():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

sampler = threading.Thread(target=sample)
sampler.start()
for _ in range(5):
    returned = volume.read(box).nbytes
done.set()
sampler.join()
print(peak - first - returned, volume.read_overhead(box.shape))
"""


def write_images(folder, voxels):
    """Writes an RGB image (y, x, 3) to files with large storage units, and one of its planes."""
    strip = {"compression": "zlib", "compressionargs": {"level": 0}}
    tile = {**strip, "tile": (1024, 1024)}
    tifffile.imwrite(
        folder / "rgb.tif", voxels, photometric="rgb", rowsperstrip=len(voxels), **strip
    )
    tifffile.imwrite(folder / "small.tif", voxels[:900, :900], photometric="rgb", **tile)
    tifffile.imwrite(folder / "plane.tif", voxels[..., 0].astype("u2"), byteorder=">", **tile)
    (folder / "slices").mkdir()
    for name in ("rgb.png", "slices/1.png", "slices/2.png"):
        Image.fromarray(voxels).save(folder / name, compress_level=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_read_needs_at_most_its_stated_overhead(tmp_path):
    write_images(tmp_path, np.random.default_rng(0).integers(0, 255, (2600, 2600, 3), np.uint8))
    cases = [(name, "0", "part") for name in ("rgb.tif", "small.tif", "rgb.png", "slices")]
    for name, *rest in [*cases, ("plane.tif", ""), ("rgb.png", ""), ("slices", "")]:
        command = [sys.executable, "-c", READ, tmp_path / name, *rest]
        reader = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, stated = map(int, reader.stdout.split())
        assert peak < 1.15 * stated + (2 << 20), (name, rest, peak >> 20, stated >> 20)


PASSES = r"""
import os
import torch
from tests.helper import anonymous
from unet_ray.machine import keep_freed_memory
from unet_ray.network.arithmetic import pass_bytes
from unet_ray.network.unet import UNet
from unet_ray.segmentation.memory import network_size

torch.set_num_threads(1)
keep_freed_memory()
network = UNet(1, 2, 4, 4)
for precision, y in (("bfloat16", 540), ("float32", 700)):
    dtype = getattr(torch, precision)
    folded = network.folded().to(dtype).to(memory_format=torch.channels_last)
    image = torch.rand(1, 1, y, y + 160).to(dtype)
    before = anonymous(os.getpid())
    with torch.inference_mode():
        for _ in range(2):
            folded(image).float().softmax(1)
    needs = pass_bytes(network_size(network, precision), (1, y, y + 160))
    print(precision, anonymous(os.getpid()) - before, needs)
"""
# Passes alone leave fewer gaps than a worker, which reads and writes tiles between them.
GAPS_OF_PASSES = 1.65
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("limits", [{}, AVX2], ids=["this-machine", "AVX2"])
def test_passes_stay_under_the_plan_on_every_processor(limits):
    command, environment = [sys.executable, "-c", PASSES], {**os.environ, **limits}
    passes = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for line in passes.stdout.splitlines():
        precision, grown, needs = line.split()
        assert int(grown) < GAPS_OF_PASSES * int(needs) + (16 << 20), (precision, grown, needs)


def make_case(folder, shape, channels, depth=4, z_levels=None):
    """A volume of noise written slab by slab, and a random model."""
    volume = zarr.create_array(
        folder / "volume.zarr", shape=shape, chunks=(16, 256, 256), dtype="uint8"
    )
    noise = np.random.default_rng(0).integers(0, 255, (16, *shape[1:]), dtype=np.uint8)
    for z in range(0, shape[0], 16):
        volume[z : z + 16] = noise[: shape[0] - z]
    doubling = "before" if z_levels else "after"  # as in training
    network = UNet(1, 2, channels, depth, z_levels=z_levels, doubling=doubling)
    header = ModelHeader(architecture_of(network), [0, 255], {"method": "mean-std"})
    write_model(folder / "model.safetensors", network, header)
    return folder / "volume.zarr", folder / "model.safetensors"


def check_peak(folder, shape, channels, engine, needed=False, **options):
    """Compares the peak of a run with its plan; `needed`: of a run that reserves no memory."""
    volume, model = make_case(folder, shape, channels, **options)
    environment = without_reservation(folder) if needed else {}
    outlook = plan(volume, model, Settings(engine=engine))
    memory, planned = outlook.memory, outlook.memory.total
    given = [volume, "--model", model, "--out", folder / "out.zarr"]
    driver, peak = measured_peaks(given, engine, environment)
    kind = "needed" if needed else "peak"
    print(f"{engine}, {channels} channels, {shape}: {kind} {peak / planned:.2f} of {planned >> 20}")
    print(f"driver {driver >> 20} of {outlook.driver_memory >> 20} MiB")
    assert 0.7 <= peak / planned <= 1.0 and driver <= outlook.driver_memory
    if not needed:
        reserved = reserved_bytes(memory, "cpu", Settings(engine=engine, workers=1), 1)
        assert peak >= reserved - (16 << 20)
    return peak


def without_reservation(folder):
    """An environment where processes take memory only when a tile needs it."""
    (folder / "path").mkdir()
    (folder / "path/sitecustomize.py").write_text(
        "import unet_ray.machine\nunet_ray.machine.reserve_memory = lambda total: None\n"
    )
    paths = [str(folder / "path"), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("needed", [False, True], ids=["reserved", "needed"])
def test_peak_memory_stays_under_the_plan(tmp_path, needed):
    check_peak(tmp_path, (32, 1024, 1024), 4, "local", needed)


ZS = ((1, 1), (1, 1), (3, 2), (3, 1))  # voxels that are long along z
IN_3D = {"depth": 1, "z_levels": ((3, 2),) * 2}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "options", [IN_3D, {"depth": 2, "z_levels": ((3, 2),) * 3}, {"depth": 3, "z_levels": ZS}]
)
def test_peak_memory_of_streams_stays_under_the_plan(tmp_path, options):
    check_peak(tmp_path, (96, 512, 512), 4, "local", needed=True, **options)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_peak_memory_of_streams_does_not_grow_with_the_volume(tmp_path, engine):
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    first = check_peak(small, (48, 2048, 2048), 1, engine, **IN_3D)
    second = check_peak(large, (480, 2048, 2048), 1, engine, **IN_3D)
    assert second <= 1.05 * first


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("channels", [4, 16])
def test_peak_memory_does_not_grow_with_the_volume(tmp_path, engine, channels):
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    first = check_peak(small, (48, 2048, 2048), channels, engine)
    # 2 GB with few channels, 800 MB with more: 2 GB would take a quarter of an hour.
    slices = 480 if channels == 4 else 192
    second = check_peak(large, (slices, 2048, 2048), channels, engine)
    assert second <= 1.05 * first


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("limits", [{}, AVX2], ids=["this-machine", "AVX2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("depth", "channels"), [(2, 4), (2, 16), (3, 8), (4, 2), (4, 4), (4, 12)])
def test_a_worker_on_ray_stays_under_the_plan_on_every_processor(
    tmp_path, depth, channels, precision, limits
):
    volume, model = make_case(tmp_path, (16, 1300, 2200), channels, depth)
    settings = Settings(engine="ray", precision=precision, pyramid=False)
    planned = plan(volume, model, settings).worker_memory
    given = [volume, "--model", model, "--out", tmp_path / "out.zarr", "--precision", precision]
    given.append("--no-pyramid")  # its stages have memory of their own, beside that of passes
    _, peak = measured_peaks(given, "ray", {**limits, **without_reservation(tmp_path)})
    case = f"depth {depth}, {channels} channels, {precision}, {'AVX2' if limits else 'all'}"
    print(f"{case}: {peak / planned:.2f}, {peak >> 20} of {planned >> 20} MiB")
    assert 0.6 <= peak / planned <= 1.0


@pytest.mark.parametrize(("chunk", "named"), [((1, 40, 44), False), ((64, 4096, 4096), True)])
def test_an_error_names_the_chunks_only_if_they_cause_it(tmp_path, chunk, named):
    zarr.create_array(tmp_path / "v.zarr", shape=(64, 4096, 4096), chunks=chunk, dtype="u1")
    model = random_model(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="too little for this model") as refused:
        plan(tmp_path / "v.zarr", model, Settings(memory=(900 if named else 100) << 20))
    assert ("stored in chunks of" in str(refused.value)) == named
