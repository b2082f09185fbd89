"""The ladder of the package: who may import whom, who may know torch and Ray, what is visible."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "unet_ray"

# A file imports only from the rungs below its own and from the files before it on its own rung.
RUNGS = (
    "errors versions places compiled boxes mirror progress",
    "tiles memory cost tiff volumes masks intensity ledger marks stores shards lease events "
    "weights augment warping thinning overlaps cuts stacks scores metrics "
    "phantom pictures charts results",
    "network checkpoints prediction recipes runs",
    "annotations samples attempts cluster loop parcels actors pool engine",
    "evaluation validation training planning preparation pilot execution disk segmentation "
    "verification report demo",
    "__init__ cli __main__",
)
LADDER = [name for rung in RUNGS for name in rung.split()]
ROOMS = {*LADDER, *(path.stem for path in PACKAGE.rglob("*.py"))}
BELOW_TORCH = [name for rung in RUNGS[:2] for name in rung.split()]
KNOW_RAY = ["cluster", "actors", "pool", "training", "samples"]
VISIBLE = "unet_ray jobs tests docs cluster.yaml pyproject.toml README.md Makefile LICENSE"

# A file of the ladder that is not written yet has nothing to test.
written = pytest.mark.parametrize("name", [n for n in LADDER if (PACKAGE / f"{n}.py").exists()])


def tree_of(name):
    return ast.parse((PACKAGE / f"{name}.py").read_text())


def imports_of(name):
    """Dotted names of everything imported anywhere in a file, ``unet_ray.boxes.Box`` included."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py, line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_of(name):
    """The files of the package that a file imports from; ``__init__`` where it names the facade."""
    for dotted in imports_of(name):
        top, *rest = dotted.split(".")
        if top == "unet_ray":
            yield rest[0] if rest and rest[0] in ROOMS else "__init__"


def test_every_file_has_its_place_on_the_ladder():
    assert set(LADDER) == ROOMS


@written
def test_imports_go_down_the_ladder(name):
    assert set(rooms_of(name)) <= set(LADDER[: LADDER.index(name)])


@written
def test_torch_and_ray_stay_in_their_rooms(name):
    tops = {dotted.split(".")[0] for dotted in imports_of(name)}
    assert not (name in BELOW_TORCH and "torch" in tops)
    assert name in KNOW_RAY or "ray" not in tops


@written
def test_nothing_that_is_read_can_run_code(name):
    nodes = [n for n in ast.walk(tree_of(name)) if isinstance(n, ast.Attribute | ast.keyword)]
    said = {*imports_of(name), *map(ast.unparse, nodes)}
    assert not said & {"torch.load", "allow_pickle=True"}
    assert not {dotted.split(".")[0] for dotted in said} & {"pickle", "cloudpickle"}


@written
def test_every_file_opens_by_saying_what_it_knows(name):
    assert ast.get_docstring(tree_of(name))


def test_the_package_loads_neither_torch_nor_ray_by_itself():
    command = "import sys, unet_ray; sys.exit(not {'torch', 'ray'}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)


def test_jobs_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("jobs/*.py")}
    assert [name for name, lines in lengths.items() if lines > 60] == []


def test_the_visible_top_level_is_what_the_design_names():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git work tree: what else lies here is not the project's")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    top = {line.split("/")[0] for line in tracked}
    assert {name for name in top if not name.startswith(".")} == set(VISIBLE.split())


def test_the_readme_tree_names_every_file_of_the_package():
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("    unet_ray/\n") : text.index("    jobs/  ")]
    named = re.findall(r"\b(\w+\.(?:py|html))\s", tree)
    there = {p.name for p in PACKAGE.iterdir() if p.suffix in (".py", ".html")} - {"__init__.py"}
    assert sorted(named) == sorted(there)
