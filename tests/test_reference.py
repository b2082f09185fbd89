"""The README and docs/reference: their tables and code are those of the program."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click.testing
import pytest
import tifffile
import zarr

import unet_ray
from tests.helper import noise, random_model, write_stack
from unet_ray import errors
from unet_ray.cli import app
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings

ROOT = Path(__file__).parent.parent
README, CHINESE = ROOT / "README.md", ROOT / "docs/README.zh.md"
REFERENCE = ROOT / "docs/reference"

# What is replaced before a block is run, so that a training takes seconds.
SMALL = {
    "--minutes 10": "--steps 2 --depth 1 --base-channels 2 --patch 44 --elastic 2",
    "minutes=10": "steps=2, depth=1, base_channels=2, patch=44, elastic=2",
}


def blocks(page, language):
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def shortened(block):
    for long, short in SMALL.items():
        block = block.replace(long, short)
    return block


def column(page, heading):
    """The first column of the tables below a heading, without its marks."""
    part = page.read_text().split(f"\n{heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE)


@pytest.fixture
def stacks(tmp_path, monkeypatch):
    """A working folder with the files that pages name."""
    for name, seed in (("raw", 1), ("volume", 2)):
        tissue = unet_ray.make_phantom((2, 128, 128), seed)
        write_stack(tmp_path / f"{name}.tif", tissue.image)
        write_stack(tmp_path / ("membranes.tif" if seed == 1 else "truth.tif"), tissue.classes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(page):
    names = {}
    for block in blocks(page, "python"):
        exec(compile(shortened(block), page.name, "exec"), names)
    return names


# README


def test_the_python_of_the_readme_runs(stacks, capsys):
    names = run_python(README)
    assert names["prediction"].classes.shape == names["store"].classes.shape == (2, 128, 128)
    assert "v_rand" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_of_the_readme_run(stacks):
    (block,) = blocks(README, "bash")
    command = 'unet-ray() { "$PYTHON" -m unet_ray "$@"; }\n' + shortened(block)
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-euc", command], env=environment, check=True, timeout=300)
    assert zarr.open_array(stacks / "volume-segmented.zarr/0", mode="r").shape == (1, 2, 128, 128)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("language", ["python", "bash"])
def test_the_chinese_readme_has_the_same_code(language):
    assert blocks(CHINESE, language) == blocks(README, language)


def test_the_readme_has_the_plan_of_the_isbi_stack(shared_data, tmp_path):
    model = random_model(tmp_path / "model.safetensors", depth=4, base=16)
    stack = shared_data / "isbi2012/test-volume.tif"
    plan = repr(unet_ray.plan(stack, model, workers=2, precision="bfloat16"))
    shown = plan.replace(str(stack), "/data/test-volume.tif").replace("on cuda", "on cpu")
    for page in (README, CHINESE):
        assert shown in page.read_text()


# Python page and exit codes


def test_the_python_page_names_every_export():
    tables = re.findall(r"^\| `(\w+)` \|", (REFERENCE / "python.md").read_text(), re.MULTILINE)
    assert sorted(tables) == sorted(dir(unet_ray))


def test_the_code_of_the_python_page_runs(stacks):
    names = run_python(REFERENCE / "python.md")
    assert names["page"].exists()


def test_the_page_of_exit_codes_is_right():
    text = (REFERENCE / "exit-codes.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\| `(\w+Error)` \|$", text, re.MULTILINE)
    assert {name: int(code) for code, name in rows} == {
        name: getattr(errors, name).exit_code
        for name in ("InputError", "RunError", "QuarantinedError")
    }
    (block,), (output,) = (blocks(REFERENCE / "exit-codes.md", kind) for kind in ("bash", "text"))
    args = re.search(r"unet-ray (.*?) \|\|", block)[1].split()
    with pytest.raises(errors.InputError) as refused:
        click.testing.CliRunner().invoke(app, args, standalone_mode=False, catch_exceptions=False)
    path = Path("no-such-file.tif").absolute()
    said = str(refused.value).replace(str(path), f"/data/{path.name}").split(" (did")[0]
    assert f"unet-ray: {said.rstrip('.')}.\nexit code {refused.value.exit_code}\n" == output


# Store, events, formats


@pytest.fixture(scope="module")
def complete_store(task, tmp_path_factory):
    """A store with a pyramid, objects, and every field of the provenance."""
    folder = tmp_path_factory.mktemp("complete")
    volume = write_stack(folder / "volume.tif", noise((1, 520, 40)))
    outputs = ("classes", "instances")
    return segment(volume, task[1], folder / "out.zarr", Settings(threshold=0.4, outputs=outputs))


def test_the_page_of_the_store_has_every_field_of_the_provenance(complete_store):
    provenance = dict(zarr.open_group(complete_store, mode="r").attrs)["unet_ray"]
    assert column(REFERENCE / "store.md", "## Provenance") == list(provenance)


def test_the_page_of_the_store_has_every_name_in_the_private_folder(complete_store):
    store = complete_store
    names = {path.name for path in (store / ".unet_ray").iterdir()}
    listed = column(REFERENCE / "store.md", "## State of the runs")
    assert {name.split("/")[0] for name in listed} == names


def test_the_page_of_formats_names_axes_as_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(blocks(REFERENCE / "formats.md", "python")[0], {})
    assert unet_ray.open_volume("named.tif").shape == (1, 4, 64, 64)
    with pytest.warns(DeprecationWarning, match="stored as RGB"):
        tifffile.imwrite("colour.tif", tifffile.imread("named.tif"))
    assert unet_ray.open_volume("colour.tif").shape == (4, 1, 64, 64)


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_command_completes_in_a_shell(shell):
    page = (ROOT / "docs/how-to/shell-completion.md").read_text()
    variable, value = re.search(rf"(_UNET_RAY_COMPLETE)=({shell}_source) unet-ray", page).groups()
    if shell == "bash" and sys.platform != "linux":
        pytest.skip("click asks an installed bash for its version, and macOS has an old one")
    done = subprocess.run(
        [sys.executable, "-m", "unet_ray"],
        env={**os.environ, variable: value, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_UNET_RAY_COMPLETE" in done.stdout
