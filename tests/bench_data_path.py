"""Reads of Zarr and encoding of shards without a network, by zarr, zarrs and tensorstore.

python -m tests.bench_data_path FOLDER [ROUNDS]

Needs the packages zarrs and tensorstore. The volume is a real one (`fib25_crop`), repeated. Each
case runs in a process of its own, in turn, with one thread for decoding. zarr and zarrs read as
`Volume.read` does, which also checks the chunk files. Prints gigabytes of voxels per second of CPU
time and of wall time, from the fastest of the rounds.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tifffile
import zarr

from unet_ray.storage.layout import StoreLayout
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.stores import Store, create_store
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import Context, TilePlan
from unet_ray.volumes.opening import open_volume

RAW = Path(__file__).parents[2] / "shared" / "data" / "fib25_crop" / "raw.tif"
SHAPE, READ, CORE = (128, 1024, 1024), (32, 696, 696), (32, 512, 512)
FORMATS = {
    "v2, Blosc, chunks of 64": {"zarr_format": 2, "chunks": (64, 64, 64), "compressors": "blosc"},
    "v3, zstd, chunks of 64": {"chunks": (64, 64, 64)},
    "v3, zstd, chunks of 64 in shards": {"chunks": (64, 64, 64), "shards": (128, 256, 256)},
}


def repeated(shape):
    """The crop, mirrored and repeated to a shape."""
    image = tifffile.imread(RAW)
    pads = [(0, max(0, n - have)) for n, have in zip(shape, image.shape, strict=True)]
    return np.pad(image, pads, mode="symmetric")[tuple(slice(n) for n in shape)]


def write_inputs(folder):
    voxels = repeated(SHAPE)
    for number, options in enumerate(FORMATS.values()):
        if options.get("compressors") == "blosc":
            from numcodecs import Blosc

            options = {**options, "compressors": Blosc("lz4", shuffle=Blosc.BITSHUFFLE)}
        path = folder / f"input-{number}.zarr"
        array = zarr.create_array(path, shape=SHAPE, dtype=voxels.dtype, overwrite=True, **options)
        array[:] = voxels


def boxes():
    """The reads of tiles: they overlap, as the halo of a 2-D network of depth 4 needs it."""
    starts = [range(0, n - r + 1, c) for n, r, c in zip(SHAPE, READ, CORE, strict=True)]
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                yield Box((z, y, x), tuple(a + n for a, n in zip((z, y, x), READ, strict=True)))


def use(library):
    """Lets zarr decode and encode with one thread, by itself or by zarrs."""
    zarr.config.set({"threading.max_workers": 1})
    if library == "zarrs":
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def read_by_volume(path, reader):
    use(reader)
    volume = open_volume(path)
    return lambda box: volume.read(box)[0]


def read_by_tensorstore(path, reader):
    import tensorstore

    driver = "zarr3" if (path / "zarr.json").exists() else "zarr"
    context = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(path)}, "context": context}
    array = tensorstore.open(spec, read=True).result()
    return lambda box: array[box.slices].read().result()


def read(folder, number, reader):
    make = read_by_tensorstore if reader == "tensorstore" else read_by_volume
    path = folder / f"input-{number}.zarr"
    one = make(path, reader)
    expected = repeated(SHAPE)
    first = next(boxes())
    np.testing.assert_array_equal(one(first), expected[first.slices])
    start, size = seconds(), 0
    for box in boxes():
        size += one(box).nbytes
    return size, start


def encode(folder, number, encoder):
    """Both outputs of tiles: probabilities that a blurred image gives, and their classes."""
    from scipy import ndimage

    plan = TilePlan(SHAPE, CORE, Context((0, 0, 0), (0, 0, 0), (1, 1, 1)), CORE)
    blurred = ndimage.gaussian_filter(repeated(SHAPE).astype(np.float32), 2)
    ranged = 255 / (1 + np.exp(-(blurred - blurred.mean()) / 8))
    stored = {"probabilities": ranged.round().astype(np.uint8)[None]}
    stored["classes"] = (stored["probabilities"][0] > 127).astype(np.uint8)
    outputs = tuple(stored)
    out = folder / f"out-{encoder}"
    shutil.rmtree(out, ignore_errors=True)
    create_store(out, StoreLayout(plan, (0, 255), outputs, None), Provenance({}))
    store = Store(out, outputs)
    use(encoder)
    tiles = [plan[n] for n in range(len(plan))]
    parts = [{name: v[(..., *t.write.slices)] for name, v in stored.items()} for t in tiles]
    if encoder == "tensorstore":
        one = by_tensorstore(out, outputs)
    else:

        def one(tile, part):
            for name in outputs:
                store.encoded(name, tile, part[name])

    one(tiles[0], parts[0])
    start, size = seconds(), 0
    for tile, part in zip(tiles, parts, strict=True):
        one(tile, part)
        size += sum(values.nbytes for values in part.values())
    return size, start


def by_tensorstore(out, outputs):
    """Writes the same arrays in memory, with the metadata of the store."""
    import tensorstore

    from unet_ray.storage.layout import ARRAYS

    context = {"data_copy_concurrency": {"limit": 1}}
    arrays = {}
    for name in outputs:
        metadata = json.loads((out / ARRAYS[name] / "zarr.json").read_text())
        keys = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs")
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "memory", "path": f"{name}/"},
            "metadata": {key: metadata[key] for key in keys},
            "context": context,
            "store_data_equal_to_fill_value": True,
        }
        arrays[name] = tensorstore.open(spec, create=True)
    arrays = {name: array.result() for name, array in arrays.items()}

    def one(tile, part):
        for name, array in arrays.items():
            place = (0, *tile.write.slices) if array.ndim == 4 else tile.write.slices
            array[place].write(part[name].reshape(tile.write.shape)).result()

    return one


def seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime


def one_case(folder, kind, number, library):
    size, start = (read if kind == "read" else encode)(Path(folder), int(number), library)
    wall, cpu = (b - a for a, b in zip(start, seconds(), strict=True))
    print(json.dumps({"wall": size / 1e9 / wall, "cpu": size / 1e9 / cpu}))


def main(folder, rounds=3):
    """Prints a line for each format and library."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_inputs(folder)
    libraries = ("zarr", "zarrs", "tensorstore")
    kinds = [("read", number) for number in range(len(FORMATS))] + [("encode", 0)]
    rates = {}
    for _ in range(int(rounds)):
        for kind, number in kinds:
            for library in libraries:
                words = ["-m", "tests.bench_data_path", "case", folder, kind, number, library]
                done = subprocess.run(
                    [sys.executable, *map(str, words)],
                    capture_output=True,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
                if done.returncode:
                    raise SystemExit(f"{kind} {number} {library}:\n{done.stderr}")
                rates.setdefault((kind, number, library), []).append(json.loads(done.stdout))
    print("| | library | GB per CPU s | GB/s | ratio to zarr |\n|---|---|---|---|---|")
    for (kind, number, library), measured in rates.items():
        cpu, wall = (max(m[key] for m in measured) for key in ("cpu", "wall"))
        ratio = cpu / max(m["cpu"] for m in rates[kind, number, "zarr"])
        name = f"read {[*FORMATS][number]}" if kind == "read" else "encode both outputs"
        print(f"| {name} | {library} | {cpu:.3f} | {wall:.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        one_case(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
