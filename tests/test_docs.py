"""The documentation: its commands run, its links lead somewhere, and its sentences are plain.

The blocks of a page are run in order, in one scratch folder that holds the files of `FILES`:

- ```bash and ```python are run, and must succeed;
- ```sh and ```py are not run: they need a cluster, an account or a display; ```text is output;
- `SHORTER` lists what is replaced before a block is run, so that a page takes seconds.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from scipy import ndimage

from tests.helper import random_model
from unet_ray import make_phantom

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted(DOCS.rglob("*.ipynb"))]
IN_ENGLISH = [page for page in PAGES if not page.stem.endswith(".zh")]

SHORTER = {
    "--steps 400": "--steps 2 --patch 204",
    "--patch 380 --steps 1000": "--steps 2 --patch 204",
    "steps=400": "steps=10",
}

MEAN_WORDS, MOST_WORDS = 20, 40
DIALECT = re.compile(r"\btold\b|\btells?\b|\bso many\b|\bwhat is\b", re.IGNORECASE)
MOST_DIALECT = 30


# Files that pages work on


def membranes(folder, shared):
    """The training stack of ISBI 2012, copied: nothing may write to the shared data."""
    for name in ("train-volume.tif", "train-labels.tif"):
        shutil.copy(shared / "isbi2012" / name, folder)


def slices(folder, shared):
    """Two folders of PNG slices, made of a phantom."""
    phantom = make_phantom((8, 256, 256), seed=1)
    for name, stack in (("raw", phantom.image), ("labels", phantom.classes)):
        (folder / name).mkdir()
        for z, plane in enumerate(stack):
            Image.fromarray(plane).save(folder / name / f"{name}-{z}.png")


def cells(folder, shared):
    """A sequence of the Cell Tracking Challenge, copied: frames, gold and silver labels."""
    shutil.copytree(shared / "ctc" / "PhC-C2DH-U373", folder / "PhC-C2DH-U373")


def objects(folder, shared=None):
    """Labelled cells of a phantom, as a Zarr array."""
    phantom = make_phantom((8, 256, 256), seed=1)
    cells = np.stack([ndimage.label(plane)[0] for plane in phantom.classes])
    cells += np.where(cells, 1000 * np.arange(8)[:, None, None], 0)
    zarr.create_array(folder / "labels.zarr", data=cells.astype(np.uint32), chunks=(8, 64, 64))


def first_run(folder, shared=None):
    """An untrained model in ``runs/first``, and a volume with its labels."""
    phantom = make_phantom((8, 256, 256), seed=1)
    for name, stack in (("volume", phantom.image), ("labels", phantom.classes)):
        tifffile.imwrite(folder / f"{name}.tif", stack, metadata={"axes": "ZYX"})
    (folder / "runs" / "first").mkdir(parents=True)
    random_model(folder / "runs" / "first" / "model.safetensors")


FILES = {
    "tutorials/membranes.md": membranes,
    "tutorials/pngs.md": slices,
    "tutorials/cells.md": cells,
    "how-to/label-your-images.md": None,
    "how-to/restart.md": first_run,
    "how-to/mask-and-region.md": first_run,
    "how-to/memory.md": first_run,
    "how-to/find-seams.md": objects,
    "how-to/napari-and-fiji.md": first_run,
}
REAL = {"tutorials/membranes.md", "tutorials/cells.md"}
FAST = {
    *("how-to/label-your-images.md", "how-to/napari-and-fiji.md", "how-to/find-seams.md"),
}


# Blocks


def blocks(page):
    """The fenced blocks of a page, as (language, text)."""
    return re.findall(r"^ *```(\w+)\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)


def shortened(text):
    """A block as it is run."""
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return text


def run(text, language, folder, **variables):
    """Runs a block in a folder, as a user would; returns what it prints."""
    command = ["bash", "-euc", text] if language == "bash" else [sys.executable, "-c", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{text}\nends with {done.returncode}:\n{done.stdout}"
    return done.stdout


def run_page(page, folder, **variables):
    """Runs all blocks of a page in order; returns what each prints."""
    runnable = [(name, text) for name, text in blocks(page) if name in ("bash", "python")]
    assert runnable, f"{page} has no block that runs"
    return [run(shortened(text), name, folder, **variables) for name, text in runnable]


SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else SLOW) for name in FILES]
)
def test_every_command_of_a_page_runs(name, tmp_path, request):
    shared = request.getfixturevalue("shared_data") if name in REAL else None
    if make := FILES[name]:
        make(tmp_path, shared)
    run_page(DOCS / name, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_of_object_stores_run_on_a_bucket(tmp_path, bucket):
    first_run(tmp_path)
    run_page(DOCS / "how-to/object-store.md", tmp_path, **bucket.environment)
    assert any(key.endswith("volume-segmented.zarr/zarr.json") for key in bucket.objects)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_of_clusters_run_on_this_machine(tmp_path):
    first_run(tmp_path)
    run_page(DOCS / "how-to/cluster.md", tmp_path)


# Notebook

NOTEBOOK = DOCS / "tutorials/notebook.ipynb"


def cells_of(notebook, kind):
    every = json.loads(notebook.read_text())["cells"]
    return [cell for cell in every if cell["cell_type"] == kind]


def test_the_cells_of_the_notebook_run(tmp_path):
    code = "\n".join("".join(cell["source"]) for cell in cells_of(NOTEBOOK, "code"))
    run(shortened(code), "python", tmp_path)


def test_the_notebook_holds_its_outputs_and_is_small():
    code = cells_of(NOTEBOOK, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and not any(output["output_type"] == "error" for output in outputs)
    text = NOTEBOOK.read_text()
    assert len(text) < 500_000
    assert not re.search(r"/(home|root|Users)/", text), "no path of the machine that ran it"


# Links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose(page)):
        assert "://" in link or link.startswith("mailto:") or (page.parent / link).exists(), link


# Sentences


def prose(page):
    """The text of a page without code blocks; of a notebook the text cells."""
    if page.suffix == ".ipynb":
        return "\n\n".join("".join(cell["source"]) for cell in cells_of(page, "markdown"))
    return re.sub(
        r"^ *(```|~~~).*?^ *\1 *$", "\n", page.read_text(), flags=re.MULTILINE | re.DOTALL
    )


def paragraphs(text):
    """Paragraphs and list items, each on one line: no headings, tables, indented code or HTML."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|<[^>\n]+>", "", text, flags=re.DOTALL)
    paragraph, listed = [], False
    for line in [*text.splitlines(), ""]:
        item = re.match(r" *([-*+]|\d+[.)]) +", line)
        code = line.startswith("    ") and not (paragraph or listed)
        aside = re.match(r" *(#|\||!!!|===|\?\?\?|---)", line)
        if paragraph and (item or aside or code or not line.strip()):
            yield " ".join(paragraph)
            paragraph = []
        if item:
            listed = True
        elif line.strip() and not line.startswith(" "):
            listed = False
        if line.strip() and not aside and not code:
            paragraph.append(line[item.end() :] if item else line.strip().lstrip("> "))


def sentences(text):
    """The sentences of a text; a link counts as its words, and code as one word."""
    for paragraph in paragraphs(text):
        plain = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", paragraph)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain)
        plain = re.sub(r"``.+?``|`[^`]+`", "code", plain)
        plain = re.sub(r"\b(e\.g|i\.e|et al|eq|sec|fig|vs|approx)\.", r"\1", plain)
        for sentence in re.split(r"[.!?][\"')*_]*(?=\s|$)", plain):
            words = re.findall(r"[^\W_][^\s\u2013\u2014]*", sentence)
            if words:
                yield words


def test_sentences_are_counted_as_people_count_them():
    text = (
        "# A heading of five words\n\nOne two `unet-ray train --out x`. See [three\nfour](a.md), "
        "et al. 2015.\n\n| a | table |\n\n- An item\n  over two lines.\n\n      code of an item\n\n"
        "Last one:\n\n    indented code\n"
    )
    counts = [len(words) for words in sentences(text)]
    assert counts == [3, 6, 5, 4, 2]


@pytest.mark.parametrize("page", IN_ENGLISH, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page):
    every = list(sentences(prose(page)))
    longest = max(every, key=len, default=[])
    assert len(longest) <= MOST_WORDS, f"{len(longest)} words: {' '.join(longest)}"
    mean = sum(map(len, every)) / max(1, len(every))
    assert mean < MEAN_WORDS, f"a sentence has {mean:.1f} words on average"


def test_words_with_a_private_meaning_are_rare():
    files = [ROOT / "README.md", *sorted(DOCS.rglob("*")), *sorted((ROOT / "unet_ray").rglob("*"))]
    lines = [
        (path.relative_to(ROOT), number, line.strip())
        for path in files
        if path.suffix in (".md", ".py", ".html", ".ipynb")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if DIALECT.search(line)
    ]
    folders = Counter("/".join(path.parts[:2]) for path, *_ in lines)
    listed = "\n".join(f"{path}:{number}: {line[:100]}" for path, number, line in lines)
    assert len(lines) <= MOST_DIALECT, f"{len(lines)} lines, {dict(folders)}\n{listed}"
