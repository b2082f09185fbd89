"""The ladder of the nine wings: who may import whom, and who may know torch and Ray."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "unet_ray"

# Each wing imports only from those before it; `ground` is the files of GROUND, without a folder.
LADDER = [
    "ground",
    "tiling",
    "storage",
    "volumes",
    "engine",
    "network",
    "scores",
    "training",
    "segmentation",
    "report",
]
GROUND = ["errors", "versions", "units", "machine", "compiled"]
NO_TORCH = ["ground", "tiling", "storage", "volumes", "scores"]
KNOW_RAY = ["engine", "training"]
VISIBLE = "unet_ray jobs tests docs cluster.yaml pyproject.toml README.md Makefile LICENSE"

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
}
ROOMS = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
every_room = pytest.mark.parametrize("room", sorted(ROOMS))


def wing_of(room):
    """The wing of a room such as ``tiling.boxes``; ``top`` of the files above all wings."""
    first, *below = room.split(".")
    if below or first in LADDER:
        return first
    return "ground" if first in GROUND else "top"


def tree_of(room):
    return ast.parse(ROOMS[room].read_text())


def imports_of(room):
    """Dotted names of everything that a file imports, such as ``unet_ray.tiling.boxes.Box``."""
    for node in ast.walk(tree_of(room)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room}, line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_of(room):
    """The rooms that a file imports from; ``__init__`` where it names the package alone."""
    for dotted in imports_of(room):
        top, *rest = dotted.split(".")
        if top == "unet_ray":
            names = (".".join(rest[:end]) for end in range(len(rest), 0, -1))
            yield next((name for name in names if name in ROOMS), "__init__")


def test_every_wing_has_its_rung_and_every_ground_file_is_there():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(LADDER[1:])
    assert set(GROUND) <= set(ROOMS)


@every_room
def test_imports_go_down_the_ladder(room):
    wing = wing_of(room)
    if wing != "top":
        assert {wing_of(other) for other in rooms_of(room)} <= set(LADDER[: LADDER.index(wing) + 1])


def test_no_circle_of_imports():
    TopologicalSorter({room: {*rooms_of(room)} - {room} for room in ROOMS}).prepare()


def test_a_wing_that_imports_a_later_one_is_found(monkeypatch, tmp_path):
    bad = tmp_path / "boxes.py"
    bad.write_text("from unet_ray.report.page import write_report")
    monkeypatch.setitem(ROOMS, "tiling.boxes", bad)
    with pytest.raises(AssertionError):
        test_imports_go_down_the_ladder("tiling.boxes")
    monkeypatch.setitem(ROOMS, "report.page", bad)
    bad.write_text("from unet_ray.report.figures import figure")
    other = tmp_path / "figures.py"
    other.write_text("from unet_ray.report.page import write_report")
    monkeypatch.setitem(ROOMS, "report.figures", other)
    with pytest.raises(CycleError):
        test_no_circle_of_imports()


@every_room
def test_torch_and_ray_stay_in_their_wings(room):
    wing, tops = wing_of(room), {dotted.split(".")[0] for dotted in imports_of(room)}
    assert not (wing in NO_TORCH and "torch" in tops)
    assert wing in KNOW_RAY or "ray" not in tops


@every_room
def test_nothing_that_is_read_can_run_code(room):
    nodes = [n for n in ast.walk(tree_of(room)) if isinstance(n, ast.Attribute | ast.keyword)]
    said = {*imports_of(room), *map(ast.unparse, nodes)}
    assert not said & {"torch.load", "allow_pickle=True"}
    assert not {dotted.split(".")[0] for dotted in said} & {"pickle", "cloudpickle"}


@every_room
def test_every_file_opens_by_saying_what_it_knows(room):
    assert ast.get_docstring(tree_of(room))


@pytest.mark.parametrize("wing", LADDER[1:])
def test_every_wing_says_what_it_does_not_know(wing):
    said = ast.get_docstring(tree_of(wing))
    assert "\nKnows " in said and " Does not know " in said.replace("\n", " ")


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


def test_the_readme_tree_names_every_wing_in_order_and_every_file_beside_them():
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("    unet_ray/\n") : text.index("    jobs/  ")]
    assert re.findall(r"^      (\w+)/ ", tree, re.M) == LADDER[1:]
    there = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\b(\w+\.py)\b", tree)) == there
