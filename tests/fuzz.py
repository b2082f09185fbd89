"""Reads thousands of damaged files; each must be refused in one sentence, or read as it was.

    python -m tests.fuzz 2000

Each file is read by a process of its own, under a limit of time and of memory. A seed and a number
reproduce a file: `python -m tests.fuzz --format TIFF --number 17`. The table counts, for each
format: refusals, successes, tracebacks (any error that is not one sentence, and crashes), hangs,
processes over the limit of memory, and wrong successes. A success is wrong if a truncated image
has other voxels, or if bytes under a checksum differ.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import tifffile
import zarr
from PIL import Image
from rich.table import Table
from tifffile import _imagecodecs

from tests.damage import damage
from tests.helper import TILED, noise, random_model, recipe, write_stack
from unet_ray.cli import app
from unet_ray.cli import main as command_line
from unet_ray.errors import InputError, UnetRayError
from unet_ray.network.checkpoints import read_model
from unet_ray.report.page import write_report
from unet_ray.report.results import open_result
from unet_ray.segmentation.segment import segment
from unet_ray.storage.layout import LEDGER
from unet_ray.storage.ledger import committed, quarantined, skipped
from unet_ray.tiling.boxes import Box
from unet_ray.training.train import train
from unet_ray.units import printable, text_of
from unet_ray.volumes.opening import open_volume

SECONDS = 30  # for one file; the slowest takes one
PLANNED = 128 << 20  # bytes; a run refuses a volume that needs more than its --memory
MEMORY = 256 << 20  # bytes beyond those of an idle process: what was planned, and as much again
ADDRESSES = 4 << 30  # bytes of address space, so that a fault cannot fill the machine
SMALL = 1 << 22  # bytes of a volume that is read as a whole
VERDICTS = ["refusals", "successes", "tracebacks", "hangs", "over memory", "wrong successes"]
FAULTS = VERDICTS[2:]


# Readers: each returns a value that must not change, in a form for JSON


def read_volume(path):
    volume = open_volume(path)
    whole = Box.of(volume.shape[1:])
    is_small = whole.size * volume.shape[0] * volume.dtype.itemsize <= SMALL
    box = whole if is_small else Box.of(tuple(min(n, 32) for n in whole.shape))
    needed = box.size * volume.shape[0] * volume.dtype.itemsize + volume.index_bytes
    if needed + volume.read_overhead(box.shape) > PLANNED:
        raise InputError("the volume needs more memory than planned.")
    digest = hashlib.sha256(volume.read(box).tobytes()).hexdigest()
    volume.identity()
    return [list(map(str, volume.shape)), str(volume.dtype), digest]


def read_plain_tiff(path):
    """Reads as an installation without imagecodecs does."""
    tifffile.tifffile.imagecodecs = _imagecodecs
    return read_volume(path)


def read_weights(path):
    network, _ = read_model(path)
    digest = hashlib.sha256()
    for name, weight in network.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def read_ledger(store):
    bits = (read(store / LEDGER, 24) for read in (committed, quarantined, skipped))
    return [np.flatnonzero(each).tolist() for each in bits]


def read_store(store):
    result = open_result(store)
    box = Box.of(result.plan.shape)
    if box.size > SMALL:
        raise InputError("the store needs more memory than planned.")
    digests = [
        hashlib.sha256(result.read(name, box).tobytes()).hexdigest()
        for name in ("probabilities", "classes")
        if name in result.provenance.outputs
    ]
    write_report(store)
    return digests


def read_run(run):
    write_report(run)


def read_config(path):
    arguments = ["--config", str(path), "--images", "no-such-file", "--labels", "no-such-file"]
    app.commands["train"].make_context("train", [*arguments, "--out", "run"])
    sys.argv = ["unet-ray", "train", *arguments]
    if command_line() not in (1, 2):
        raise AssertionError("training went on without images")


# Intact files


def make_tiffs(folder):
    stack = noise((5, 40, 48), "uint16")
    write_stack(folder / "plain.tif", stack)
    write_stack(folder / "deflate.tif", stack, compression="zlib", predictor=True, rowsperstrip=16)
    write_stack(folder / "tiles.ome.tif", stack, compression="zlib", tile=(16, 16), ome=True)
    write_stack(folder / "bits.tif", stack > 100, compression="packbits", metadata=None)
    meta = {"unit": "um", "spacing": 0.5, "axes": "ZYX"}
    tifffile.imwrite(folder / "imagej.tif", stack, imagej=True, resolution=(2, 2), metadata=meta)


def make_zarrs(folder):
    stack = noise((5, 40, 48), "uint16")
    for name, options in {
        "blosc": {"zarr_format": 2, "chunks": (2, 20, 48)},
        "zstd": {"chunks": (2, 20, 48)},
        "plain": {"chunks": (5, 20, 48), "compressors": None},
        "shards": {"chunks": (1, 20, 24), "shards": (2, 40, 48)},
    }.items():
        array = zarr.create_array(
            folder / f"{name}.zarr", shape=stack.shape, dtype=stack.dtype, **options
        )
        array[:] = stack
    group = zarr.create_group(folder / "ome.zarr")
    axes = [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
    scale = [{"type": "scale", "scale": [0.5, 0.1, 0.1]}]
    levels = [{"path": "0", "coordinateTransformations": scale}]
    image = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": levels}]}
    group.attrs["ome"] = image
    group.create_array("0", data=stack, chunks=(2, 20, 48))


def make_pngs(folder):
    for name, plane in {
        "grey": noise((40, 48)),
        "deep": noise((40, 48), "uint16"),
        "colour": np.moveaxis(noise((3, 40, 48)), 0, -1),
    }.items():
        Image.fromarray(plane).save(folder / f"{name}.png")


def make_models(folder):
    random_model(folder / "model.safetensors", depth=1)


def make_stores(folder):
    volume = write_stack(folder / "volume.tif", noise((3, 61, 75)))
    model = random_model(folder / "model.safetensors")
    segment(volume, model, folder / "out.zarr", TILED)
    volume.unlink()
    model.unlink()


def make_runs(folder):
    labels = (255 * np.indices((2, 70, 70)).sum(0) // 7 % 2).astype(np.uint8)
    images = [write_stack(folder / f"{name}.tif", labels) for name in ("image", "labels")]
    train([str(images[0])], [str(images[1])], folder / "run", recipe(steps=10))
    for image in images:
        image.unlink()


def make_configs(folder):
    text = "# flags\nimages: [raw.tif]\nout: run\nsteps: 10\nminutes: 0.5\npatch: 1,380,380\n"
    (folder / "flags.yaml").write_text(f"{text}norm: weight\nval: '2:4'\n")


@dataclass(frozen=True)
class Format:
    """A format, with files of it, and how they are read.

    `checked` are the files whose bytes are under a checksum, by the end of their path.
    """

    make: object
    read: object
    checked: str = "/nothing"


FORMATS = {
    "TIFF": Format(make_tiffs, read_volume),
    "TIFF, base": Format(make_tiffs, read_plain_tiff),
    "Zarr": Format(make_zarrs, read_volume),
    "PNG": Format(make_pngs, read_volume),
    "model": Format(make_models, read_weights, "model.safetensors"),
    "store": Format(make_stores, read_store, "/c/"),
    "ledger": Format(make_stores, read_ledger, f"/{LEDGER}/"),
    "run folder": Format(make_runs, read_run),
    "config": Format(make_configs, read_config),
}


# Processes


def in_child(work, folder):
    """Does `work` in a process of its own, which inherits no thread.

    Returns:
        A verdict, its explanation, the value of `work`, and the peak of memory in bytes.
    """
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _work(work, answer)
    ends = time.monotonic() + SECONDS
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() > ends:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs", f"over {SECONDS} s", None, 0
        time.sleep(0.002)
    peak = ended[2].ru_maxrss * 1024
    if not answer.exists():
        return "tracebacks", f"ended with status {ended[1]}", None, peak
    verdict, text, value = json.loads(answer.read_text())
    return verdict, text, value, peak


def _work(work, answer):
    with open(answer.with_name("output.txt"), "wb+") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            result = "successes", "", work()
        except (UnetRayError, OSError, click.ClickException) as error:
            text = str(error)
            is_sentence = "\n" not in text.strip()
            result = "refusals" if is_sentence else "tracebacks", text, None
        except BaseException:
            result = "tracebacks", traceback.format_exc(), None
        sys.stderr.flush()
        printed = Path(output.name).read_text(errors="replace")
        if any(word in printed for word in ("Traceback", "unexpected error", "\x1b")):
            result = "tracebacks", printed, None
        answer.write_text(json.dumps(result))
        os._exit(0)


def try_number(name, number, seed, intact, folder, idle):
    """Damages one file of a format and reads it.

    Returns:
        A verdict, and its explanation with the damage.
    """
    rng = random.Random(f"{seed} {name} {number}")
    form = FORMATS[name]
    target = rng.choice(sorted(path for path in intact.iterdir() if path.name != "values"))
    copied = folder / target.name
    if target.is_dir():
        shutil.copytree(target, copied)
    else:
        shutil.copy(target, copied)
    files = sorted(p for p in copied.rglob("*") if p.is_file()) if copied.is_dir() else [copied]
    if name == "ledger":
        files = [path for path in files if form.checked in str(path)]
    file = rng.choice(files)
    kind = damage(rng, file)
    verdict, text, value, peak = in_child(lambda: form.read(copied), folder)
    if peak > idle + MEMORY:
        verdict = "over memory"
        text = f"{(peak - idle) >> 20} MiB: {text}"
    expected = json.loads((intact / "values").read_text())[target.name]
    if verdict == "successes" and not _is_right(name, kind, str(file), value, expected):
        verdict = "wrong successes"
    case = f"{name} {number}: {file.relative_to(folder)} {kind}"
    return verdict, f"{case}: {text}"


def _is_right(name, kind, file, value, expected):
    if name == "ledger":  # a lost note only repeats work
        return all({*seen} <= {*known} for seen, known in zip(value, expected, strict=True))
    must_agree = FORMATS[name].checked in file or (name not in ("store",) and kind == "truncated")
    return value == expected or not must_agree


def fuzz(name, numbers, seed, report):
    """Reads damaged files of one format; returns the number of each verdict."""
    counts = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        intact = Path(scratch, "intact")
        intact.mkdir()
        form = FORMATS[name]

        def make():
            form.make(intact)
            copied = shutil.copytree(intact, Path(scratch, "read"))
            return {path.name: form.read(path) for path in copied.iterdir()}

        verdict, text, values, _ = in_child(make, Path(scratch))
        if verdict != "successes":
            sys.exit(f"{name}: intact files cannot be read: {text}")
        (intact / "values").write_text(json.dumps(values))
        idle = in_child(lambda: None, Path(scratch))[3]
        for number in numbers:
            with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
                verdict, text = try_number(name, number, seed, intact, Path(folder), idle)
                report(verdict, text)
                counts[verdict] += 1
    return counts


def main():
    """Prints the faults, then the table; the exit code is 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", nargs="?", type=int, default=2000, help="files in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=FORMATS, action="append", help="only this format")
    parser.add_argument("--number", type=int, help="only this file of the format, in full")
    chosen = parser.parse_args()
    names = chosen.format or list(FORMATS)

    def report(verdict, text):
        if verdict in FAULTS or chosen.number is not None:
            print(printable(f"{verdict}: {text}"), flush=True)

    numbers = range(-(-chosen.count // len(names)))
    if chosen.number is not None:
        numbers = [chosen.number]
    table, total = Table("format", "files", *VERDICTS, box=None), Counter()
    for name in names:
        counts = fuzz(name, numbers, chosen.seed, report)
        table.add_row(name, *map(str, (len(numbers), *(counts[v] for v in VERDICTS))))
        total += counts
    table.add_row("all", *map(str, (total.total(), *(total[v] for v in VERDICTS))))
    print(text_of(table))
    return int(any(total[verdict] for verdict in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
