"""The order of the nine subpackages: which may import which, and which may use torch and Ray."""

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

# Each subpackage imports only from earlier ones. `ground` means the modules of GROUND.
LAYERS = [
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
USE_RAY = ["engine", "training"]
VISIBLE = "unet_ray jobs tests docs cluster.yaml pyproject.toml README.md Makefile LICENSE"

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
every_module = pytest.mark.parametrize("module", sorted(MODULES))


def layer_of(module):
    """Returns the layer of a module such as ``tiling.boxes``; ``top`` if it is above all layers."""
    first, *below = module.split(".")
    if below or first in LAYERS:
        return first
    return "ground" if first in GROUND else "top"


def tree_of(module):
    return ast.parse(MODULES[module].read_text())


def imports_of(module):
    """Yields the dotted names that a module imports, such as ``unet_ray.tiling.boxes.Box``."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_of(module):
    """Yields the modules of unet_ray that a module imports; ``__init__`` for the package itself."""
    for dotted in imports_of(module):
        top, *rest = dotted.split(".")
        if top == "unet_ray":
            names = (".".join(rest[:end]) for end in range(len(rest), 0, -1))
            yield next((name for name in names if name in MODULES), "__init__")


def test_every_subpackage_is_a_layer_and_every_ground_module_exists():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(LAYERS[1:])
    assert set(GROUND) <= set(MODULES)


@every_module
def test_imports_follow_the_order_of_the_layers(module):
    layer = layer_of(module)
    if layer != "top":
        assert {layer_of(other) for other in modules_of(module)} <= set(
            LAYERS[: LAYERS.index(layer) + 1]
        )


def test_imports_form_no_cycle():
    TopologicalSorter({module: {*modules_of(module)} - {module} for module in MODULES}).prepare()


def test_an_import_of_a_later_layer_is_detected(monkeypatch, tmp_path):
    bad = tmp_path / "boxes.py"
    bad.write_text("from unet_ray.report.page import write_report")
    monkeypatch.setitem(MODULES, "tiling.boxes", bad)
    with pytest.raises(AssertionError):
        test_imports_follow_the_order_of_the_layers("tiling.boxes")
    monkeypatch.setitem(MODULES, "report.page", bad)
    bad.write_text("from unet_ray.report.figures import figure")
    other = tmp_path / "figures.py"
    other.write_text("from unet_ray.report.page import write_report")
    monkeypatch.setitem(MODULES, "report.figures", other)
    with pytest.raises(CycleError):
        test_imports_form_no_cycle()


@every_module
def test_only_some_layers_import_torch_and_ray(module):
    layer, packages = layer_of(module), {dotted.split(".")[0] for dotted in imports_of(module)}
    assert not (layer in NO_TORCH and "torch" in packages)
    assert layer in USE_RAY or "ray" not in packages


@every_module
def test_no_input_file_can_run_code(module):
    nodes = [n for n in ast.walk(tree_of(module)) if isinstance(n, ast.Attribute | ast.keyword)]
    names = {*imports_of(module), *map(ast.unparse, nodes)}
    assert not names & {"torch.load", "allow_pickle=True"}
    assert not {dotted.split(".")[0] for dotted in names} & {"pickle", "cloudpickle"}


@every_module
def test_json_has_no_numbers_that_are_not_json(module):
    if module in ("engine.parcels", "storage.ledger", "storage.lease"):
        pytest.skip("writes only numbers of its own, never those of an input")
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
            assert "allow_nan=False" in map(ast.unparse, node.keywords), f"line {node.lineno}"


@every_module
def test_every_module_has_a_docstring(module):
    assert ast.get_docstring(tree_of(module))


@pytest.mark.parametrize("layer", LAYERS[1:])
def test_every_subpackage_states_what_it_knows_and_does_not_know(layer):
    docstring = ast.get_docstring(tree_of(layer))
    assert "\nKnows " in docstring and " Does not know " in docstring.replace("\n", " ")


def test_the_package_loads_neither_torch_nor_ray_by_itself():
    command = "import sys, unet_ray; sys.exit(not {'torch', 'ray'}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)


def test_jobs_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("jobs/*.py")}
    assert [name for name, lines in lengths.items() if lines > 60] == []


def test_the_visible_top_level_is_what_the_design_names():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git work tree: files here may not belong to the project")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    top = {line.split("/")[0] for line in tracked}
    assert {name for name in top if not name.startswith(".")} == set(VISIBLE.split())


def test_the_tree_for_contributors_names_every_subpackage_in_order_and_every_top_module():
    text = (ROOT / ".github/CONTRIBUTING.md").read_text()
    tree = text[text.index("    unet_ray/\n") : text.index("    jobs/  ")]
    assert re.findall(r"^      (\w+)/ ", tree, re.M) == LAYERS[1:]
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\b(\w+\.py)\b", tree)) == modules
