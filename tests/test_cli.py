"""The command line: flags, exit codes, one sentence for each mistake, and nothing written by it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
import zarr

from tests.helper import bytes_of, noise, random_model, state_of, write_stack
from unet_ray import cli
from unet_ray.engine import cluster
from unet_ray.network.checkpoints import read_model
from unet_ray.report import page as report
from unet_ray.storage.layout import LEDGER
from unet_ray.storage.ledger import committed
from unet_ray.versions import VERSION

ROOT = Path(__file__).parent.parent
VERBS = ("demo", "train", "plan", "segment", "evaluate", "report", "export")
TINY = [
    *("--depth", "1", "--base-channels", "2", "--patch", "44"),
    *("--elastic", "2", "--steps", "3", "--engine", "local"),
]
RUN_SECONDS = 60


@pytest.fixture
def unet_ray(monkeypatch, capsys):
    """Runs the command line in this process: gives exit code, stdout and stderr."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "usable_cores", lambda: 1)

    def call(*args, verb=None):
        monkeypatch.setattr(sys, "argv", ["unet-ray", *map(str, args)])
        capsys.readouterr()
        code = cli.main(verb)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def files(tmp_path):
    """A folder with a volume, labels for it, and a model."""
    image = noise((2, 40, 44))
    write_stack(tmp_path / "image.tif", image)
    write_stack(tmp_path / "labels.tif", np.where(image > 128, 255, 0).astype(np.uint8))
    random_model(tmp_path / "model.safetensors")
    return tmp_path


def process(*args, cwd=None, **options):
    """Starts a Python of this environment that finds the package where these tests do."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell may have started the tests in the background, where Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def output_of(*args, **options):
    """Exit code, stdout and stderr of such a process."""
    with process(*args, **options) as started:
        out, err = started.communicate(timeout=RUN_SECONDS)
    return started.returncode, out, err


def flags_in(text):
    return set(re.findall(r"--[a-z][a-z0-9-]*", text))


# Help


def test_the_overview_shows_every_verb_with_all_its_flags_and_an_example(unet_ray):
    code, out, err = unet_ray("--help")
    assert (code, err) == (0, "")
    for verb in VERBS:
        assert f"Example: unet-ray {verb} " in out
        *_, text = re.split(rf"^  unet-ray {verb} ", out, flags=re.M)
        shown = flags_in(text.split("Example:")[0])
        assert shown == {
            o for p in cli.app.commands[verb].params for o in p.opts if o.startswith("--")
        } | {"--help"}


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_every_flag_explained_and_an_example(unet_ray, verb):
    code, out, err = unet_ray(verb, "--help")
    assert (code, err) == (0, "")
    assert re.search(rf"^ *Example: unet-ray {verb} .*--\w", out, re.M)
    options = [p for p in cli.app.commands[verb].params if p.param_type_name == "option"]
    assert options and [p.name for p in options if not p.help] == []
    assert {p.opts[0] for p in options} <= flags_in(out)


@pytest.mark.parametrize("verb", ["train", "segment"])
def test_a_job_has_the_help_of_its_verb(unet_ray, tmp_path, verb):
    _, of_verb, _ = unet_ray(verb, "--help")
    # from elsewhere and with no path set: a job finds the package beside itself
    script = ROOT / "jobs" / f"{verb}.py"
    code, of_job, err = output_of(script, "--help", cwd=tmp_path, env={"PYTHONPATH": ""})
    assert (code, err) == (0, "")
    assert f"Usage: python jobs/{verb}.py " in of_job and "Example:" in of_job
    assert of_job.split("Options:")[1] == of_verb.split("Options:")[1]


@pytest.mark.parametrize(
    "args", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["--version"]], ids=str
)
def test_help_loads_neither_torch_nor_ray(args):
    command = (
        "import sys; from unet_ray.cli import main; code = main(); "
        "print(sorted({'torch', 'ray', 'zarr', 'numba'} & set(sys.modules))); sys.exit(code)"
    )
    code, out, err = output_of("-c", command, *args)
    assert (code, err, out.splitlines()[-1]) == (0, "", "[]")


def test_version(unet_ray):
    assert unet_ray("--version") == (0, f"unet-ray {VERSION}\n", "")


def test_nothing_at_all_shows_the_overview(unet_ray):
    code, out, _ = unet_ray()
    assert code == 2
    assert out.strip() == unet_ray("--help")[1].strip()


def test_the_module_is_the_command(tmp_path):
    assert output_of("-m", "unet_ray", "--version", cwd=tmp_path) == (
        0,
        f"unet-ray {VERSION}\n",
        "",
    )
    code, out, err = output_of("-m", "unet_ray", "sgment", cwd=tmp_path)
    assert (code, out) == (2, "") and "did you mean 'segment'?" in err


def classes_of(store):
    return zarr.open_array(store / "labels/classes/0", mode="r")


# Training


def train(files, *args):
    data = ["--images", files / "image.tif", "--labels", files / "labels.tif"]
    return ["train", *data, "--out", files / "run", *TINY, *args]


def test_train_gives_the_path_of_the_model(unet_ray, files):
    code, out, err = unet_ray(*train(files))
    assert (code, out) == (0, f"{files / 'run' / 'model.safetensors'}\n")
    report = files / "run" / "report.html"
    *table, first, kept, last = err.splitlines()
    assert re.fullmatch(r"model +step 3; class 1 above a probability of 0\.\d{3}", kept.strip())
    assert [line.split()[0] for line in table] == [
        *("images", "labels", "classes", "held", "network", "patch", "workers", "steps")
    ]
    assert re.fullmatch(r"train: step 3, loss \d\.\d+, [\d.]+ steps/s, 0 s left", first)
    assert last == f"report: {report}" and report.is_file()
    network, header = read_model(files / "run" / "model.safetensors")
    assert (network.depth, network.base_channels) == (1, 2)
    stored = header.training["recipe"]
    assert (stored["patch"], stored["elastic"], stored["steps"], stored["minutes"]) == (
        [44, 44],
        2,
        3,
        None,
    )


def test_a_finished_training_says_so(unet_ray, files):
    unet_ray(*train(files))
    before = state_of(files)
    code, out, err = unet_ray(*train(files))
    assert (code, out) == (0, f"{files / 'run' / 'model.safetensors'}\n")
    assert err == f"{files / 'run'}: training is finished; nothing to do.\n"
    assert state_of(files) == before


def test_several_images_and_labels(unet_ray, files):
    for name in ("image", "labels"):
        tifffile.imwrite(files / f"{name}2.tif", tifffile.imread(files / f"{name}.tif")[:, ::-1])
    images = ["--images", files / "image.tif", files / "image2.tif"]
    labels = [f"--labels={files / 'labels.tif'}", "--labels", files / "labels2.tif"]
    code, _, err = unet_ray("train", *images, *labels, "--out", files / "run", *TINY)
    assert code == 0, err
    data = read_model(files / "run" / "model.safetensors")[1].data
    assert [d["name"] for d in data["images"]] == ["image.tif", "image2.tif"]
    assert [d["name"] for d in data["labels"]] == ["labels.tif", "labels2.tif"]


@pytest.fixture
def trained(monkeypatch):
    """What training would be called with, instead of training."""
    calls = []

    def train(images, labels, out, recipe, engine, workers, watch, **more):
        calls.append((images, labels, out, recipe, engine, workers))
        return Path(out) / "model.safetensors"

    monkeypatch.setattr("unet_ray.training.train.train", train)
    monkeypatch.setattr(report, "write_report", lambda path: path / "report.html")
    return calls


def test_every_flag_of_train_reaches_the_recipe(unet_ray, trained):
    flags = {
        "recipe": "paper",
        "depth": 3,
        "base_channels": 5,
        "norm": "batch",
        "dropout": 0.25,
        "batch": 3,
        "steps": 11,
        "minutes": 2.5,
        "learning_rate": 0.125,
        "momentum": 0.5,
        "w0": 3.0,
        "sigma": 4.0,
        "elastic": 1.5,
        "seed": 9,
        "precision": "bfloat16",
    }
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    more = ["--patch", "1,100,108", "--workers", "3", "--engine", "ray", "--out", "run"]
    code, _, err = unet_ray("train", "--images", "a", "b", "--labels", "c", "d", *given, *more)
    assert code == 0, err
    [(images, labels, out, recipe, name, workers)] = trained
    assert (images, labels, out, name, workers) == (["a", "b"], ["c", "d"], "run", "ray", 3)
    assert {name: getattr(recipe, name) for name in flags} == flags
    assert recipe.patch == (100, 108)


def test_a_config_file_gives_flags_and_the_command_line_wins(unet_ray, trained, tmp_path):
    values = {"images": ["a", "b"], "labels": "truth.tif", "out": "run", "depth": 2, "patch": 68}
    values |= {"base_channels": 7, "learning-rate": 0.5, "steps": 4, "recipe": "paper"}
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump(values))
    code, _, err = unet_ray("train", "--config", tmp_path / "flags.yaml", "--steps", "9")
    assert code == 0, err
    [(images, labels, out, recipe, name, workers)] = trained
    assert (images, labels, out) == (["a", "b"], ["truth.tif"], "run")
    assert (name, workers) == ("local", None)
    assert (recipe.depth, recipe.patch, recipe.base_channels) == (2, (68, 68), 7)
    assert (recipe.learning_rate, recipe.steps, recipe.recipe) == (0.5, 9, "paper")


def test_an_empty_config_file_changes_nothing(unet_ray, trained, tmp_path):
    (tmp_path / "flags.yaml").write_text("# nothing\n")
    data = ["--images", "a", "--labels", "b", "--out", "run"]
    assert unet_ray("train", "--config", tmp_path / "flags.yaml", *data)[0] == 0
    assert unet_ray("train", *data)[0] == 0
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    "verb, address, arguments, engine",
    [
        (None, None, [], "local"),
        (None, "127.0.0.1:1", [], "ray"),
        ("train", None, [], "ray"),
        ("train", None, ["--engine", "local"], "local"),
        (None, "127.0.0.1:1", ["--engine", "local"], "local"),
        (None, None, ["--engine", "ray"], "ray"),
    ],
)
def test_ray_is_the_engine_of_jobs_and_where_a_cluster_is_named(
    unet_ray, trained, monkeypatch, verb, address, arguments, engine
):
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    args = [] if verb else ["train"]
    args += ["--images", "a", "--labels", "b", "--out", "run", *arguments]
    assert unet_ray(*args, verb=verb)[0] == 0
    assert trained[0][4] == engine


# Segmenting


def segment(files, *args, out="out.zarr"):
    flags = ["--model", files / "model.safetensors", "--out", files / out, "--engine", "local"]
    return ["segment", files / "image.tif", *flags, *args]


def test_segment_gives_the_path_of_the_store_and_says_what_it_does(files):
    # A process of its own: earlier tests leave memory in this one, above 1 GiB the unit differs.
    flags = "--tile", "1,16,16", "--precision", "float32"
    code, out, err = output_of("-m", "unet_ray", *segment(files, *flags))
    assert (code, out) == (0, f"{files / 'out.zarr'}\n")
    first, *progress = err.splitlines()
    assert first.startswith("writing out.zarr: 18 tiles of 1,16,16, float32 on cpu, engine local, ")
    memory = r"\d+ MiB of \d+ MiB"
    last = rf"image\.tif: 18/18 tiles, \d+\.\d{{3}} Mvoxel/s, 0 s left, {memory}"
    assert re.fullmatch(last, progress[-1]), progress
    assert classes_of(files / "out.zarr").shape == (2, 40, 44)


def test_a_tile_that_is_fitted_is_told(unet_ray, files):
    err = unet_ray(*segment(files, "--tile", "99,15,999"))[2]
    assert "tile 99,15,999 does not fit the network and the volume; 2,16,44 is used." in err


def test_a_finished_segmentation_says_so(unet_ray, files):
    unet_ray(*segment(files))
    before = bytes_of(files / "out.zarr")
    code, out, err = unet_ray(*segment(files))
    assert (code, out) == (0, f"{files / 'out.zarr'}\n")
    assert "out.zarr: is finished; nothing to do." in err
    assert bytes_of(files / "out.zarr") == before


def test_several_inputs_go_into_a_folder(unet_ray, files):
    write_stack(files / "other.tif", noise((1, 20, 20), seed=1))
    names = ["segment", files / "image.tif", files / "other.tif"]
    model = ["--model", files / "model.safetensors", "--engine", "local"]
    code, out, err = unet_ray(*names, *model, "--out", files / "all")
    assert code == 0, err
    stores = [files / "all" / "image.zarr", files / "all" / "other.zarr"]
    assert out.splitlines() == [str(store) for store in stores]
    unet_ray(*segment(files))
    assert bytes_of(stores[0]) == bytes_of(files / "out.zarr")
    assert classes_of(stores[1]).shape == (1, 20, 20)


@pytest.mark.parametrize("verb", ["segment", "plan", "train"])
def test_content_that_is_not_read_is_named_and_refused_with_strict(unet_ray, files, verb):
    with tifffile.TiffWriter(files / "two.tif") as file:
        file.write(noise((2, 40, 44)), photometric="minisblack")
        file.write(noise((30, 30)), photometric="minisblack")
    sentence = f"{files / 'two.tif'}: only the first of its 2 images is read"
    remedy = "save another one as a file of its own."
    command = {
        "segment": segment(files),
        "plan": ["plan", "", "--model", files / "model.safetensors", "--engine", "local"],
        "train": ["train", "--labels", files / "labels.tif", "--out", files / "run", *TINY],
    }[verb]
    if verb == "train":
        command += ["--images", files / "two.tif"]
    else:
        command[1] = files / "two.tif"
    before = sorted(files.iterdir())
    refused = f"unet-ray: {sentence}, which --strict refuses; {remedy}\n"
    assert unet_ray(*command, "--strict") == (2, "", refused)
    assert sorted(files.iterdir()) == before
    code, _, err = unet_ray(*command)
    assert (code, err.count(f"unet-ray: {sentence}; {remedy}\n")) == (0, 1), err


def test_masks_labels_and_truths_that_are_read_in_part_are_named(unet_ray, files):
    for name in ("mask", "truth"):
        (files / name).mkdir()
    for number in (1, 2, 4):
        tifffile.imwrite(files / f"mask/{number}.tif", np.ones((40, 44), np.uint8))
        tifffile.imwrite(files / f"truth/{number}.tif", np.eye(40, 44, dtype=np.uint8))
    write_stack(files / "image.tif", noise((3, 40, 44)))
    gap = "slice numbers are missing, 1 in all, the first after 2.tif"
    code, _, err = unet_ray(*segment(files, "--mask", files / "mask"))
    assert code == 0 and err.count(f"{files / 'mask'}: {gap};") == 1
    strict = segment(files, "--mask", files / "mask", "--strict", out="strict.zarr")
    code, _, err = unet_ray(*strict)
    assert code == 2 and f"{gap}, which --strict refuses; " in err
    code, _, err = unet_ray("evaluate", files / "out.zarr", files / "truth", "--as", "classes")
    assert code == 0 and err.count(f"{files / 'truth'}: {gap};") == 1
    code, _, err = unet_ray("report", files / "out.zarr", "--truth", files / "truth")
    assert code == 0 and err.count(f"{files / 'truth'}: {gap};") == 1
    train = ["train", "--images", files / "image.tif", "--labels", files / "truth"]
    code, _, err = unet_ray(*train, "--out", files / "run", *TINY)
    assert code == 0 and err.count(f"{files / 'truth'}: {gap};") == 1


def test_labels_that_are_paired_by_number_may_have_gaps(unet_ray, files):
    for name, numbers in {"images": range(6), "labels": (0, 1, 4)}.items():
        (files / name).mkdir()
        for number in numbers:
            slice_ = np.eye(40, 44, dtype=np.uint8)
            tifffile.imwrite(files / f"{name}/t{number:03d}.tif", slice_)
    train = ["train", "--images", files / "images", "--labels", files / "labels", "--strict"]
    code, _, err = unet_ray(*train, "--out", files / "run", *TINY)
    assert code == 0 and "missing" not in err
    code, _, err = unet_ray("evaluate", files / "images", files / "labels", "--as", "classes")
    assert code == 0 and "missing" not in err


def test_flags_of_segment_take_effect(unet_ray, files):
    tile = ["--tile", "1,16,16", "--precision", "bfloat16", "--workers", "2"]
    part = ["--outputs", "classes", "--region", "1:2,0:10,20:30", "--memory", "1GiB"]
    code, _, err = unet_ray(*segment(files, *tile, *part))
    assert code == 0, err
    shards = [name for name in bytes_of(files / "out.zarr") if "/c/" in name]
    assert shards == ["labels/classes/0/c/1/0/1"]
    assert "1/1 tiles" in err and "bfloat16" in err
    more = ["--tile", "2,40,44", "--precision", "float32", "--overwrite"]
    code, _, err = unet_ray(*segment(files, *more))
    assert code == 0, err
    assert (files / "out.zarr" / "0").is_dir()


def test_the_channel_is_chosen(unet_ray, files):
    write_stack(files / "image.tif", np.stack([noise((2, 40, 44), seed=n) for n in range(3)]))
    code, _, err = unet_ray(*segment(files))
    assert code == 2 and "3 channels" in err and "--channel N" in err
    assert unet_ray(*segment(files, "--channel", "2"))[0] == 0


# Plans


def test_plan_for_machines(unet_ray, files):
    before = state_of(files)
    flags = ["--model", files / "model.safetensors", "--engine", "local", "--tile", "1,16,16"]
    code, out, err = unet_ray("plan", files / "image.tif", *flags, "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    keys = "tiles tile pass halo_overhead worker_memory_bytes driver_memory_bytes disk_bytes"
    assert {*keys.split(), "seconds", "price", "precision", "device"} <= set(printed)
    assert (printed["tiles"], printed["tile"], printed["pass"]) == (18, [1, 16, 16], [1, 60, 60])
    assert 18 * 256 * 2 < printed["disk_bytes"] < 18 * 20_000 + (1 << 17)
    assert printed["seconds"] > 0 and printed["price"] is None
    assert 0 < printed["disk_estimate_bytes"] <= printed["disk_bytes"]
    assert state_of(files) == before


def test_plan_for_people(unet_ray, files):
    flags = ["--model", files / "model.safetensors", "--engine", "local"]
    code, out, err = unet_ray("plan", files / "image.tif", *flags, "--price-per-hour", "3600")
    price = re.search(r"price   about ([0-9.]+)$", out, re.M)
    seconds = re.search(r"([0-9.]+) s per tile", out)
    assert abs(float(price[1]) - 2 * float(seconds[1])) < 0.02  # an hour of both tiles
    assert (code, err) == (0, "")
    assert "image.tif: uint8, (1, 2, 40, 44) (c, z, y, x)" in out
    assert "core 44" in out and "halo" in out and "MiB per worker" in out


def test_a_plan_for_gpus_of_a_cluster_tells_of_those_that_read_and_write(
    unet_ray, files, monkeypatch
):
    monkeypatch.setattr("unet_ray.engine.cluster.find_device", lambda *of: "cuda")
    monkeypatch.setattr("unet_ray.engine.cluster.pool_size", lambda *of: 3)
    flags = ["--model", files / "model.safetensors", "--engine", "ray", "--precision", "float32"]
    code, out, _ = unet_ray("plan", files / "image.tif", *flags)
    assert code == 0 and "2 tiles in float32 on cuda" in out and "4 tiles in flight" in out
    each = re.search(r"helpers 2 readers and 2 writers per GPU, (\d+) MiB each", out)
    code, out, _ = unet_ray("plan", files / "image.tif", *flags, "--json")
    assert round(json.loads(out)["helper_memory_bytes"] / (1 << 20)) == int(each[1]) > 250


def test_a_plan_takes_the_flags_of_segment(unet_ray, files, monkeypatch):
    usage, queried = shutil.disk_usage("."), []
    monkeypatch.setattr(
        "unet_ray.segmentation.disk.shutil.disk_usage", lambda path: queried.append(path) or usage
    )
    flags = [files / "image.tif", "--model", files / "model.safetensors", "--engine", "local"]
    out = files / "deep" / "out.zarr"
    code, said, err = unet_ray("plan", *flags, "--out", out, "--overwrite", "--takeover")
    assert (code, err) == (0, "") and f" free at {out}" in said and queried == [files]
    assert not out.parent.exists()
    segmented = files / "done.zarr"
    assert unet_ray("segment", *flags, "--out", segmented)[0] == 0
    old = sum(path.stat().st_size for path in segmented.rglob("*") if path.is_file())
    for more, added in (([], 0), (["--overwrite"], old)):
        said = unet_ray("plan", *flags, "--out", segmented, *more, "--json")[1]
        assert json.loads(said)["disk_free_bytes"] == usage.free + added
    assert " free in this folder" in unet_ray("plan", *flags)[1]


def test_a_plan_says_what_segment_would_refuse_and_what_could_not_be_read(
    unet_ray, files, monkeypatch
):
    flags = ["--model", files / "model.safetensors", "--engine", "local"]
    arguments = [files / "image.tif", *flags, "--out", files / "out.zarr"]
    assert json.loads(unet_ray("plan", *arguments, "--json")[1])["refusal"] is None
    assert "refused" not in unet_ray("plan", *arguments)[1]
    many = [*arguments, "--workers", "100000"]
    refused = unet_ray("segment", *many)[2].strip().removeprefix("unet-ray: ")
    assert "100000 workers need" in refused and "are available" in refused
    said = unet_ray("plan", *many)[1]
    assert "  refused by segment: " in said and "100000 workers need" in said
    usage = shutil.disk_usage(".")._replace(free=1)
    monkeypatch.setattr("unet_ray.segmentation.disk.shutil.disk_usage", lambda path: usage)
    assert json.loads(unet_ray("plan", *arguments, "--json")[1])["refusal"].endswith("are free.")
    image = tifffile.imread(files / "image.tif").astype(np.float32)
    image[0, 0, 0] = np.nan
    tifffile.imwrite(files / "nan.tif", image)
    said = unet_ray("plan", files / "nan.tif", *flags, "--tile", "1,16,16")[1]
    assert re.search(r"  failed  \d+ of \d+ inspected passes: .*nan\.tif: voxel .* is nan", said)


def test_a_mask_that_shows_nothing_is_told(unet_ray, files):
    tifffile.imwrite(files / "blank.tif", np.zeros((2, 40, 44), np.uint8))
    arguments = [files / "image.tif", "--model", files / "model.safetensors", "--engine", "local"]
    arguments += ["--mask", files / "blank.tif", "--out", files / "none.zarr"]
    code, _, err = unet_ray("segment", *arguments)
    assert code == 0 and "region and mask have no tile in common; nothing to do." in err


def test_what_is_free_in_an_object_store_nobody_knows(unet_ray, files):
    flags = [files / "image.tif", "--model", files / "model.safetensors", "--engine", "local"]
    flags += ["--out", "s3://bucket/out.zarr"]
    assert json.loads(unet_ray("plan", *flags, "--json")[1])["disk_free_bytes"] is None
    assert " free" not in unet_ray("plan", *flags)[1]


def test_a_plan_of_no_tiles(unet_ray, files):
    tifffile.imwrite(files / "blank.tif", np.zeros((2, 40, 44), np.uint8))
    arguments = [files / "image.tif", "--model", files / "model.safetensors", "--engine", "local"]
    arguments += ["--mask", files / "blank.tif", "--price-per-hour", "1"]
    code, out, err = unet_ray("plan", *arguments)
    assert (code, err) == (0, "") and "nothing to do" in out and "per tile" not in out
    plan = json.loads(unet_ray("plan", *arguments, "--json")[1])
    names = ("tiles", "seconds", "price", "disk_bytes", "disk_estimate_bytes")
    assert [plan[name] for name in names] == [0] * 5


@pytest.mark.parametrize("price", ["nan", "inf", "-1", "much"])
def test_a_price_that_is_none(unet_ray, files, price):
    arguments = [files / "image.tif", "--model", files / "model.safetensors"]
    code, _, err = unet_ray("plan", *arguments, "--price-per-hour", price)
    assert code == 2 and "price-per-hour" in err and price in err


def test_chunks_that_fit_no_memory_are_named(unet_ray, files):
    zarr.create_array(files / "a.zarr", shape=(64, 1024, 1024), chunks="auto", dtype="uint8")
    whole = {"shape": (64, 1024, 1024), "chunks": (64, 1024, 1024)}
    zarr.create_array(files / "b.zarr", **whole, dtype="uint8")
    arguments = ["--model", files / "model.safetensors", "--engine", "local", "--memory", "400MiB"]
    assert unet_ray("plan", files / "a.zarr", *arguments)[0] == 0
    code, _, err = unet_ray("plan", files / "b.zarr", *arguments)
    assert code == 2 and "stored in chunks of 64,1024,1024; set --memory " in err


# Scores


SCORES = {
    "isbi": [
        *("pixel_error", "rand_error", "rand_error_foreground"),
        *("warping_error", "v_rand", "v_info"),
    ],
    "instances": ["seg", "ap50", "ap_mean", "adapted_rand_error", "voi_split", "voi_merge"],
    "classes": ["accuracy", "iou", "dice"],
}


def evaluate(files, kind, *args, prediction="labels.tif", truth="labels.tif"):
    return ["evaluate", files / prediction, files / truth, "--as", kind, *args]


def strict(text):
    """JSON as its standard has it: no NaN."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(word))


@pytest.mark.parametrize("kind", SCORES)
def test_evaluate_shows_a_table(unet_ray, files, kind):
    before = state_of(files)
    code, out, err = unet_ray(*evaluate(files, kind))
    assert code == 0, err
    head, *rows = out.splitlines()
    assert head.split()[:3] == ["score", "at", "best"]
    assert [row.split()[0] for row in rows if not row.startswith(" ")] == SCORES[kind]
    # a prediction against itself: each score is its best value, which stands beside it
    for row in rows:
        words = row.split()
        if words[0] != "class":
            best = words[3] if kind == "isbi" else words[2]
            assert float(words[1]) == float(best), row
    assert re.search(r"^evaluate: (\d+)/\1\n\Z", err, re.M)
    assert state_of(files) == before


@pytest.mark.parametrize("kind", SCORES)
def test_evaluate_writes_json_beside_the_table(unet_ray, files, kind):
    # the folder is made, as that of every output is
    path = files / "new" / "deep" / "scores.json"
    code, out, err = unet_ray(*evaluate(files, kind, "--json", path, "--per-slice"))
    assert code == 0, err
    assert out.splitlines()[0].split()[:3] == ["score", "at", "best"]
    *_, blank, names, first, second = out.splitlines()
    assert (blank, names.split()) == ("", ["slice", *SCORES[kind]])
    assert (first[0], second[0]) == ("0", "1")
    written = strict(path.read_text())
    assert list(written) == [*SCORES[kind], "slices"]
    assert [list(row) for row in written["slices"]] == [SCORES[kind]] * 2
    assert sorted(p.name for p in path.parent.iterdir()) == ["scores.json"]
    for name, score in written.items():
        if kind == "isbi" and name != "slices":
            assert list(score) == ["value", "threshold", "curve"]


@pytest.mark.parametrize("kind", SCORES)
def test_evaluate_gives_nothing_but_json_on_stdout_if_asked(unet_ray, files, kind):
    code, out, err = unet_ray(*evaluate(files, kind, "--json", "-"))
    assert code == 0, err
    assert list(strict(out)) == SCORES[kind] and out.endswith("}\n")
    unet_ray(*evaluate(files, kind, "--json", files / "scores.json"))
    assert (files / "scores.json").read_text() == out


def test_evaluate_replaces_scores_that_are_there(unet_ray, files):
    (files / "scores.json").write_text("old")
    assert unet_ray(*evaluate(files, "instances", "--json", files / "scores.json"))[0] == 0
    assert strict((files / "scores.json").read_text())["seg"] == 1


def test_what_is_not_defined_is_null_and_undefined(unet_ray, files):
    write_stack(files / "labels.tif", np.zeros((2, 40, 44), np.uint8))
    code, out, _ = unet_ray(*evaluate(files, "instances"))
    assert code == 0 and out.count("undefined") == 6
    code, out, _ = unet_ray(*evaluate(files, "instances", "--json", "-"))
    assert code == 0 and set(strict(out).values()) == {None}


def test_evaluate_scores_a_store(unet_ray, files):
    unet_ray(*segment(files))
    for kind in ("isbi", "classes"):
        args = evaluate(files, kind, "--json", "-", prediction="out.zarr")
        code, out, err = unet_ray(*args)
        assert code == 0, err
        assert list(strict(out)) == SCORES[kind]


def test_evaluate_says_which_slices_have_a_truth(unet_ray, files):
    for folder, numbers in (("masks", range(4)), ("truth", (1, 3))):
        (files / folder).mkdir()
        for n in numbers:
            tifffile.imwrite(files / folder / f"m{n:03}.tif", np.full((5, 6), n, np.uint8))
    args = evaluate(files, "instances", "--json", "-", prediction="masks", truth="truth")
    code, out, err = unet_ray(*args)
    assert (code, strict(out)["seg"]) == (0, 1)
    assert "2 of 4 slices have a truth, paired by their numbers.\n" in err


def test_evaluate_loads_neither_torch_nor_ray(files):
    command = (
        "import sys; from unet_ray.cli import main; code = main(); "
        "print(sorted({'torch', 'ray'} & set(sys.modules))); sys.exit(code)"
    )
    code, out, err = output_of("-c", command, *evaluate(files, "isbi"))
    assert (code, out.splitlines()[-1]) == (0, "[]"), err


# Names of any bytes, and errors that no one expected


def test_names_cannot_change_the_terminal(unet_ray, files):
    name = "\x1b[31mred\x9b\r\udcff.tif"
    code, out, err = unet_ray("evaluate", files / name, files / "labels.tif", "--as", "classes")
    assert (code, out) == (2, "") and "\\x1b[31mred\\x9b\\r\\udcff.tif does not exist" in err
    os.rename(files / "labels.tif", os.fsencode(files / name))
    labels = files / name
    code, out, err = unet_ray("evaluate", labels, labels, "--as", "classes")
    assert code == 0 and "accuracy" in out and (out + err).replace("\n", "").isprintable()


@pytest.mark.parametrize("length", [200, 240, 250, 255, 256, 5000])
def test_names_of_any_length_are_written_or_refused(unet_ray, files, length):
    file = files / ("s" * (length - 5) + ".json")
    args = ["evaluate", files / "labels.tif", files / "labels.tif", "--as", "classes"]
    code, _, err = unet_ray(*args, "--json", file)
    if length <= 255:
        assert code == 0 and json.loads(file.read_text())
    else:
        assert code in (1, 2) and re.fullmatch(r"unet-ray: [^\n]+File name too long\.\n", err)


def test_an_unexpected_error_is_a_sentence_that_names_the_file_of_its_trace(
    unet_ray, files, monkeypatch, tmp_path
):
    def fails(path, truth=None):
        raise ArithmeticError("a fault\nof two lines")

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(report, "write_report", fails)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    code, out, err = unet_ray("report", files)
    (trace,) = (tmp_path / "temporary").iterdir()
    assert (code, out) == (1, "")
    assert err == (
        "unet-ray: an unexpected error ended the command (ArithmeticError: a fault); please "
        f"report it with its trace, which is in {trace}.\n"
    )
    assert trace.read_text().startswith("Traceback") and "of two lines" in trace.read_text()
    assert trace.stat().st_mode & 0o077 == 0


def test_an_unexpected_error_without_a_folder_for_its_trace_is_a_sentence(
    unet_ray, files, monkeypatch, tmp_path
):
    monkeypatch.setattr(report, "write_report", lambda path, truth=None: 1 / 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    code, out, err = unet_ray("report", files)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"unet-ray: .*ZeroDivisionError.*cannot be stored either \(No.*\)\.\n", err)


# Mistakes: exit code 2, one line, nothing written


def refused(unet_ray, folder, args, *words):
    before = state_of(folder)
    code, out, err = unet_ray(*args)
    assert (code, out) == (2, ""), err
    assert re.fullmatch(r"unet-ray: [^\n]+\n", err), err
    assert [word for word in words if word not in err] == [], err
    assert state_of(folder) == before


def test_an_unknown_verb_names_the_nearest(unet_ray, tmp_path):
    refused(unet_ray, tmp_path, ["segmnt", "x"], "'segmnt'", "did you mean 'segment'?")


@pytest.mark.parametrize(
    "verb, flag, near",
    [
        ("train", "--base-chanels", "--base-channels"),
        ("train", "--learning_rate", "--learning-rate"),
        ("segment", "--modle", "--model"),
        ("plan", "--regoin", "--region"),
        ("evaluate", "--per-slices", "--per-slice"),
    ],
)
def test_an_unknown_flag_names_the_nearest(unet_ray, tmp_path, verb, flag, near):
    refused(unet_ray, tmp_path, [verb, flag, "1"], f"{flag}", f"{near}'")


CONFIGS = {
    "base-chanels: 32": ["'base-chanels'", "did you mean 'base-channels'?"],
    "- depth": ["must be a list of flags"],
    "depth: [": ["cannot be read as YAML"],
    "batch: deep": ["--batch", "'deep'"],
    "batch: 1.5": ["--batch", "1.5"],
    "batch: [1, 2]": ["--batch", "[1, 2]"],
    "recipe: papr": ["papr", "paper"],
    "config: other.yaml": ["'config'"],
}


HOSTILE_CONFIGS = {
    "nested": "out: " + "[" * 5000,
    "digits": f"steps: {'9' * 6000}",
    "aliases": "images: &a [x, x]\nlabels: *a",
    "long": "#" * 10**6,
    "lists": "images: [[[a]]]",
    "names": "out: {a: b}",
    "number": "depth: 2001-99-99",
}


@pytest.mark.parametrize("name", HOSTILE_CONFIGS)
def test_a_hostile_config_file_is_refused(unet_ray, files, name):
    (files / "flags.yaml").write_text(HOSTILE_CONFIGS[name])
    refused(unet_ray, files, train(files, "--config", files / "flags.yaml"), "flags.yaml")


def test_a_config_file_that_is_a_device_is_refused(unet_ray, files):
    (files / "flags.yaml").symlink_to("/dev/zero")
    args = train(files, "--config", files / "flags.yaml")
    refused(unet_ray, files, args, "flags.yaml", "it is a device, pipe or socket")


@pytest.mark.parametrize("text", CONFIGS)
def test_a_mistake_in_a_config_file_is_refused(unet_ray, files, text):
    (files / "flags.yaml").write_text(text)
    refused(unet_ray, files, train(files, "--config", files / "flags.yaml"), *CONFIGS[text])


def test_a_config_file_that_is_not_there_is_refused(unet_ray, files):
    refused(unet_ray, files, train(files, "--config", files / "no.yaml"), "no.yaml", "No such file")


@pytest.mark.parametrize(
    "verb, word",
    [
        ("train", "--images"),
        ("segment", "INPUT"),
        ("plan", "INPUT"),
        ("evaluate", "PREDICTION"),
        ("evaluate prediction.tif", "TRUTH"),
        ("evaluate prediction.tif truth.tif", "--as"),
    ],
)
def test_a_missing_flag_is_named(unet_ray, tmp_path, verb, word):
    refused(unet_ray, tmp_path, verb.split(), "Missing", word)


MALFORMED = {
    "--tile": ["1,2", "0,32,32", "-1,32,32", "a,b,c", "1,2,3,4", "", "1.5,2,3", "16"],
    "--region": [
        *("1:2", "0:1,0:1", "0:1,0:1,5:5", "5:3,0:1,0:1", "a:b,0:1,0:1", "0:1,0:1,0", ""),
        *("-1:2,0:1,0:1", "0:1,0:1,0:1,0:1", ":,:,:", "0:3,0:1,0:1", "0:1,0:41,0:1"),
    ],
    "--memory": ["banana", "0", "-1", "4 elephants", "", "4GiB!", "1e3MB", "nanGB", "9" * 400],
    "--workers": ["0", "-3", "two", "1.5"],
    "--outputs": ["class", "probabilities,", "classes;probabilities"],
    "--engine": ["dask"],
    "--precision": ["float16"],
    "--channel": ["1", "-1", "red"],
    "--level": ["1", "-1"],
    "--time": ["1", "-1"],
}


@pytest.mark.parametrize(
    "flag, text", [(f, text) for f, texts in MALFORMED.items() for text in texts]
)
def test_a_malformed_flag_of_segment_is_refused(unet_ray, files, flag, text):
    refused(unet_ray, files, segment(files, flag, text), flag.removeprefix("--"))


def test_memory_that_is_too_little_is_refused(unet_ray, files):
    refused(unet_ray, files, segment(files, "--memory", "100MiB"), "memory=100 MiB", "needs")


BAD_TRAINING = {
    "--dims": ["1", "4"],
    "--anisotropy": ["some"],
    "--voxel-size": ["1,2", "a,b,c", "0,1,1", "1,inf,1"],
    "--depth": ["0", "9", "deep"],
    "--base-channels": ["0", "-2"],
    "--dropout": ["1", "-0.5"],
    "--patch": ["0", "-44", "45", "a", "44,44", "2,44,44", "1,44", "", "1,44,45"],
    "--batch": ["0"],
    "--steps": ["0", "-1"],
    "--minutes": ["0", "nan"],
    "--learning-rate": ["0", "-1", "nan"],
    "--momentum": ["1"],
    "--w0": ["-1"],
    "--sigma": ["0"],
    "--elastic": ["-1"],
    "--seed": ["-1"],
    "--workers": ["0", "2", "1:2", "0:2", "3:2", "2:", "1:2:3", "a:b", ""],
    "--recipe": ["papr"],
    "--norm": ["group"],
}


@pytest.mark.parametrize(
    "flag, text", [(f, text) for f, texts in BAD_TRAINING.items() for text in texts]
)
def test_a_bad_flag_of_train_is_refused(unet_ray, files, flag, text):
    word = "size" if flag == "--patch" and text in ("45", "1,44,45") else flag[2:].split("-")[0]
    refused(unet_ray, files, train(files, flag, text), word)


def test_a_range_of_workers_is_passed_on(unet_ray, files, trained):
    unet_ray(*train(files, "--workers", "2:8", "--engine", "ray"))
    assert trained[0][5] == (2, 8)


def test_a_network_in_3d_is_passed_on(unet_ray, files, trained):
    unet_ray(*train(files, "--dims", "3", "--voxel-size", "4,1,1", "--patch", "20,44,44"))
    recipe = trained[0][3]
    assert (recipe.dims, recipe.depth, recipe.voxel_size) == (3, 1, (4.0, 1.0, 1.0))
    assert recipe.patch == (20, 44, 44)


def broken_file(files, kind):
    """Puts something else in place of the image; gives words that its refusal must hold."""
    path = files / "image.tif"
    content = path.read_bytes()
    path.unlink()
    if kind == "missing":
        return ["image.tif does not exist"]
    if kind == "empty":
        path.touch()
        return ["image.tif is empty"]
    if kind == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
        return ["image.tif", "truncated"]
    if kind == "empty folder":
        path.mkdir()
        return ["image.tif contains no TIFF or PNG slices"]
    path.write_bytes(b"PK\x03\x04" + content)
    return ["image.tif", "a zip archive"]


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "empty folder", "foreign"])
@pytest.mark.parametrize("verb", ["train", "plan", "segment"])
def test_a_file_that_is_no_volume_is_refused(unet_ray, files, verb, kind):
    words = broken_file(files, kind)
    model = ["--model", files / "model.safetensors", "--engine", "local"]
    args = {
        "train": train(files),
        "segment": segment(files),
        "plan": ["plan", files / "image.tif", *model],
    }
    refused(unet_ray, files, args[verb], *words)


def test_a_truncated_file_is_told_in_one_line_outside_of_tests_too(files):
    broken_file(files, "truncated")
    code, out, err = output_of("-m", "unet_ray", *segment(files))
    assert (code, out) == (2, "")
    assert re.fullmatch(r"unet-ray: .*image\.tif.*truncated.*\n", err), err
    assert not (files / "out.zarr").exists()


@pytest.fixture
def locked(monkeypatch):
    """Names of files that cannot be opened, to be filled."""

    # as another user would see it: the one who runs tests may read everything
    def guarded(path, *args, **options):
        if isinstance(path, str | os.PathLike) and os.path.basename(path) in locked:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return opened(path, *args, **options)

    opened, locked = open, []
    monkeypatch.setattr("builtins.open", guarded)
    return locked


@pytest.mark.parametrize("verb", [train, segment])
def test_an_unreadable_volume_is_refused(unet_ray, files, locked, verb):
    locked.append("image.tif")
    refused(unet_ray, files, verb(files), "image.tif cannot be read", "Permission denied")


def test_an_unreadable_model_is_refused(unet_ray, files, locked):
    locked.append("model.safetensors")
    refused(unet_ray, files, segment(files), "model.safetensors", "Permission denied")


def test_labels_of_another_shape_are_refused(unet_ray, files):
    write_stack(files / "labels.tif", np.zeros((2, 40, 43), np.uint8))
    words = ["image.tif", "labels.tif", "2 x 40 x 44", "2 x 40 x 43"]
    refused(unet_ray, files, train(files), *words)


def test_labels_of_one_class_are_refused(unet_ray, files):
    write_stack(files / "labels.tif", np.full((2, 40, 44), 255, np.uint8))
    refused(unet_ray, files, train(files), "labels.tif", "255", "one class")


def test_more_images_than_labels_are_refused(unet_ray, files):
    args = train(files, "--images", files / "image.tif")
    refused(unet_ray, files, args, "--images names 2 files and --labels 1")


def test_nan_in_a_training_image_is_refused(unet_ray, files):
    image = noise((2, 40, 44), "float32")
    image[0, 0, 0] = np.nan
    write_stack(files / "image.tif", image)
    refused(unet_ray, files, train(files), "image.tif", "not finite")


def test_nan_in_a_volume_quarantines_its_tile_and_names_the_voxel(unet_ray, files):
    image = noise((2, 40, 44), "float32")
    image[1, 7, 9] = np.nan
    write_stack(files / "image.tif", image)
    code, out, err = unet_ray(*segment(files))
    assert (code, out) == (3, f"{files / 'out.zarr'}\n")
    last = err.splitlines()[-1]
    assert last.startswith("unet-ray: ") and "voxel (z, y, x) = (1, 7, 9)" in last
    assert re.search(r"read by tile \d+ \(\d+:\d+,", last)
    assert "--nan zero" in last and "1 quarantined" in err
    code, _, err = unet_ray(*segment(files), "--nan", "zero")
    assert code == 2 and "was made with another nan (error, now zero)" in err
    assert unet_ray(*segment(files, "--nan", "zero", out="zero.zarr"))[0] == 0


MODELS = {
    "missing": (None, "no such model file"),
    "pickle": (b"\x80\x04\x95" + b"0" * 60, "pickle"),
    "zip": (b"PK\x03\x04" + b"0" * 60, "pickle"),
    "empty": (b"", "0 bytes"),
    "truncated": (400, "truncated"),
    "cut in its weights": (-100, "truncated"),
    "TIFF": (b"II*\0" + b"0" * 60, "TIFF"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_file_that_is_no_model_is_refused(unet_ray, files, kind):
    path = files / "model.safetensors"
    content, word = MODELS[kind]
    if isinstance(content, int):
        content = path.read_bytes()[:content]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(unet_ray, files, segment(files), "model.safetensors", word)


def test_a_model_whose_channels_do_not_fit_is_refused(unet_ray, files):
    random_model(files / "model.safetensors", in_channels=3)
    refused(unet_ray, files, segment(files), "image.tif: has 1 channels", "3")


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_output_that_is_not_ours_is_refused(unet_ray, files, kind, flags):
    path = files / "out.zarr"
    if kind == "folder":
        path.mkdir()
        path /= "thesis.tex"
    path.write_text("years of work")
    refused(unet_ray, files, segment(files, *flags), "out.zarr: exists and is not an output")


def test_an_output_folder_that_is_a_file_is_refused(unet_ray, files):
    write_stack(files / "other.tif", noise((1, 20, 20)))
    args = segment(files, files / "other.tif", out="labels.tif")
    refused(unet_ray, files, args, "labels.tif")
    refused(unet_ray, files, segment(files, out="labels.tif/out.zarr"), "labels.tif")


@pytest.mark.parametrize("verb", ["demo", "train", "plan", "segment", "segment several"])
def test_an_empty_output_is_refused(unet_ray, files, monkeypatch, verb):
    monkeypatch.chdir(files)  # which an empty name would mean
    write_stack(files / "other.tif", noise((1, 20, 20)))
    args = {
        "demo": ["demo"],
        "train": train(files),
        "plan": ["plan", *segment(files)[1:]],
        "segment": segment(files),
        "segment several": segment(files, files / "other.tif"),
    }
    refused(unet_ray, files, [*args[verb], "--out", ""], "out='' names no ", "name one")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_run_that_is_not_ours_is_refused(unet_ray, files, kind):
    path = files / "run"
    if kind == "folder":
        path.mkdir()
        (path / "chapter.tex").write_text("years of work")
    else:
        path.write_text("years of work")
    refused(unet_ray, files, train(files), f"{path}: ", "--out")


def test_one_bad_input_of_several_writes_nothing_for_the_others(unet_ray, files):
    (files / "empty.tif").touch()
    refused(unet_ray, files, segment(files, files / "empty.tif"), "empty.tif is empty")


def test_two_inputs_of_one_name_are_refused(unet_ray, files):
    (files / "b").mkdir()
    write_stack(files / "b" / "image.tif", noise((1, 20, 20)))
    refused(unet_ray, files, segment(files, files / "b" / "image.tif"), "'image'")


def test_other_settings_on_a_run_are_refused_by_name(unet_ray, files):
    unet_ray(*train(files))
    refused(unet_ray, files, train(files, "--seed", "5"), "trained with --seed 0, not 5")
    unet_ray(*segment(files, "--tile", "1,16,16"))
    refused(
        unet_ray, files, segment(files, "--tile", "2,16,16"), "another plan.core", "--overwrite"
    )


# Mistakes of evaluate


def test_an_unknown_kind_of_score_is_refused(unet_ray, files):
    refused(unet_ray, files, evaluate(files, "cells"), "--as", "'cells'", "instances")


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "empty folder", "foreign"])
@pytest.mark.parametrize("side", ["prediction", "truth"])
def test_a_file_that_cannot_be_scored_is_refused(unet_ray, files, side, kind):
    words = broken_file(files, kind)
    refused(unet_ray, files, evaluate(files, "isbi", **{side: "image.tif"}), *words)


@pytest.mark.parametrize("kind", SCORES)
def test_images_of_other_shapes_are_not_compared(unet_ray, files, kind):
    write_stack(files / "other.tif", np.zeros((2, 40, 43), np.uint8))
    words = ["other.tif", "labels.tif", "2 x 40 x 43", "2 x 40 x 44"]
    refused(unet_ray, files, evaluate(files, kind, prediction="other.tif"), *words)


def test_a_number_that_is_no_probability_is_refused_with_its_voxel(unet_ray, files):
    image = np.full((2, 40, 44), 0.5, np.float32)
    image[1, 7, 9] = np.nan
    write_stack(files / "image.tif", image)
    before = state_of(files)
    args = evaluate(files, "isbi", "--json", files / "scores.json", prediction="image.tif")
    code, out, err = unet_ray(*args)
    assert (code, out) == (2, "")
    # slices before it were scored, which may be printed
    assert "image.tif: voxel (z, y, x) = (1, 7, 9) is nan; " in err.splitlines()[-1]
    assert state_of(files) == before


def test_a_truth_of_grey_values_is_refused(unet_ray, files):
    words = ["image.tif: slice 0 holds", "0 (membrane)", "1 or 255 (cell)"]
    refused(unet_ray, files, evaluate(files, "isbi", truth="image.tif"), *words)


def test_an_unfinished_store_is_refused(unet_ray, files):
    unet_ray(*segment(files, "--tile", "1,16,16", "--region", "0:1,0:16,0:16"))
    words = ["out.zarr: 17 of 18 tiles are not done", "unet-ray segment"]
    refused(unet_ray, files, evaluate(files, "isbi", prediction="out.zarr"), *words)


def test_a_store_without_objects_is_refused(unet_ray, files):
    unet_ray(*segment(files))
    words = ["out.zarr: holds probabilities and classes, no instances", "--as instances"]
    refused(unet_ray, files, evaluate(files, "instances", prediction="out.zarr"), *words)


@pytest.mark.parametrize("name", ["labels.tif", "labels.tif/scores.json", "", "folder"])
def test_scores_are_not_written_where_no_file_can_be(unet_ray, files, monkeypatch, name):
    (files / "folder").mkdir()
    monkeypatch.chdir(files)
    refused(unet_ray, files, evaluate(files, "isbi", "--json", name), name or "'.'")


def test_scores_are_not_written_over_what_is_scored(unet_ray, files, monkeypatch):
    unet_ray(*segment(files))
    monkeypatch.chdir(files)
    for name in ("image.tif", files / "labels.tif", "out.zarr/zarr.json", "out.zarr/new.json"):
        for side in ("prediction", "truth"):
            scored = str(name).split("/zarr")[0].split("/new")[0]
            args = evaluate(files, "isbi", "--json", name, **{side: scored})
            refused(unet_ray, files, args, "which is scored")


# Ctrl-C


def wait_for(condition, started):
    """Waits until `condition` holds while a process runs."""
    end = time.monotonic() + RUN_SECONDS
    while not condition():
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_ctrl_c_keeps_what_was_committed_and_a_rerun_finishes(unet_ray, files):
    write_stack(files / "image.tif", noise((4, 256, 256)))
    args = segment(files, "--tile", "1,32,32", "--workers", "1", "--precision", "float32")
    ledger, shards = files / "out.zarr" / LEDGER, files / "out.zarr" / "0" / "c"
    with process("-m", "unet_ray", *args) as started:
        wait_for(lambda: sum(path.is_file() for path in shards.rglob("*")) > 30, started)
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=RUN_SECONDS)
    assert (started.returncode, out) == (130, "")
    assert err.splitlines()[-1].startswith("unet-ray: Interrupted. ")
    assert "Traceback" not in err
    assert 30 <= committed(ledger, 256).sum() < 256
    code, out, err = unet_ray(*args)
    assert (code, out) == (0, f"{files / 'out.zarr'}\n")
    assert "resuming out.zarr" in err and "256/256 tiles" in err
    assert committed(ledger, 256).all()


def test_ctrl_c_ends_training(files):
    args = train(files, "--steps", "1000000")
    metrics = files / "run" / "metrics.jsonl"
    with process("-m", "unet_ray", *args, env={"OMP_NUM_THREADS": "1"}) as started:
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, started)
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=RUN_SECONDS)
    assert (started.returncode, out) == (130, "")
    assert err.splitlines()[-1].startswith("unet-ray: Interrupted. ")
    assert "Traceback" not in err
    checkpoints = sorted((files / "run" / "checkpoints").glob("step-*.safetensors"))
    reached = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert int(checkpoints[-1].stem.removeprefix("step-")) >= reached  # no step is lost


def test_a_short_flag_ends_a_list_of_files(unet_ray, files):
    assert unet_ray(*train(files, "-q"))[0] == 0
    args = ["train", "--out", files / "other", *TINY]
    pair = ["--labels", files / "labels.tif", "--images", files / "image.tif", "-q"]
    code, _, err = unet_ray(*args, *pair)
    assert code == 0 and err.startswith("report: ")
    assert "--images PATH..." in unet_ray(*args, *pair[:-1], "-h")[1]


def test_a_dashboard_is_not_a_ray_to_join(files):
    def in_its_own_process(*args):  # where no Ray was started yet
        return output_of("-m", "unet_ray", *args, env={"RAY_ADDRESS": "http://127.0.0.1:1"})

    args = [*segment(files), "--engine", "ray"]
    refused(in_its_own_process, files, args, "RAY_ADDRESS=http://127.0.0.1:1")


# Seams of labels


@pytest.fixture
def cells(tmp_path):
    """Two Zarr arrays: squares in a volume, and the same squares cut at every 32 voxels."""
    grid = np.arange(128) // 20
    squares = (grid[:, None] * 7 + grid + 1)[None].repeat(8, 0).astype(np.uint32)
    tiles = np.arange(128) // 32
    parts = squares + 100 * (tiles[:, None] * 4 + tiles).astype(np.uint32)
    for name, labels in (("whole", squares), ("parts", parts)):
        zarr.create_array(tmp_path / f"{name}.zarr", data=labels, chunks=(8, 64, 64))
    return tmp_path


def test_labels_of_any_tool_are_judged_without_a_store(unet_ray, cells):
    seams = ["verify", "--every", "8,32,32", "--seams"]
    code, out, err = unet_ray(*seams, cells / "whole.zarr")
    z, y, x, total, last = out.splitlines()
    assert (code, err, z) == (0, "", "z: – (no tile planes with labels)")  # noqa: RUF001
    assert re.fullmatch(
        r"y: \d\.\d\d ± \d\.\d\d \(3 tile planes: .*% of 3072 pairs end; inside tiles .*%\)", y
    )
    assert x.startswith("x: ") and total.startswith("all: ")
    assert last.startswith(f"{cells / 'whole.zarr'}: no seams detected: ")
    code, out, err = unet_ray(*seams, cells / "parts.zarr")
    *_, total, last = out.splitlines()
    assert (code, err) == (1, "") and "100.00% of 6144 pairs end" in total
    assert last.startswith(f"{cells / 'parts.zarr'}: seams detected: ")


def test_seams_that_cannot_be_judged_are_refused(unet_ray, cells):
    labels = cells / "whole.zarr"
    for args, message in (
        (["--seams", labels], "--seams needs --every as well"),
        (["--every", "8,32,32"], "--every needs --seams as well"),
        (["--repair", "--seams", labels, "--every", "8,32,32"], "--repair needs a store"),
        (["--tiles", "3", "--seams", labels, "--every", "8,32,32"], "--tiles needs a store"),
        (["--seams", labels, "--every", "32,32"], "every='32,32' must be three numbers"),
        (["--seams", labels, "--every", "8,0,32"], "every='8,0,32' must be three numbers"),
        (["--seams", labels, "--every", "8,128,128"], "leaves no tile plane"),
        (["--seams", cells / "none.zarr", "--every", "8,32,32"], "does not exist"),
        ([], "Missing argument 'OUT.zarr'. Or judge labels of any tool, with --seams"),
    ):
        code, out, err = unet_ray("verify", *args)
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err, args
