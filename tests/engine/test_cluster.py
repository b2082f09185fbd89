"""Checks cluster.yaml with Ray's own launcher code, and the token of a private Ray."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from unet_ray.engine import cluster as cluster_room

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text()


def test_ray_accepts_the_cluster():
    cluster = prepare_config(yaml.safe_load(TEXT))
    validate_config(cluster)
    head, gpu = (cluster["available_node_types"][name] for name in ("head", "gpu"))
    assert "GPU" not in head["resources"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, cluster["max_workers"])


@pytest.mark.parametrize("path", [[], ["available_node_types", "gpu"], ["auth"]])
def test_ray_refuses_a_misspelt_key(path):
    cluster = prepare_config(yaml.safe_load(TEXT))
    part = cluster
    for key in path:
        part = part[key]
    part["idle_timeout_minuts"] = 10
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_config(cluster)


def test_every_file_that_the_cluster_file_names_exists():
    named = set(re.findall(r"(?<![\w/])(?:jobs|\.ci|unet_ray)/[\w./-]*\w", TEXT))
    assert {"jobs/segment.py", "jobs/train.py", ".ci/versions.txt"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_file_that_the_cluster_file_copies_exists_and_keeps_its_path():
    mounts = yaml.safe_load(TEXT)["file_mounts"]
    ours = {remote: local for remote, local in mounts.items() if not local.startswith("~")}
    assert {"pyproject.toml", "unet_ray", ".ci/versions.txt"} <= set(ours.values())
    assert all(remote == f"~/unet-ray/{local}" for remote, local in ours.items())
    assert [local for local in ours.values() if not (ROOT / local).exists()] == []


CONNECT = """
from pathlib import Path
from unet_ray.engine import cluster
cluster.connect()
import ray
print(ray.get(ray.remote(lambda: "connected").remote()))
print(oct((Path.home() / ".ray" / "auth_token").stat().st_mode & 0o777))
"""


@pytest.mark.ray
def test_only_its_owner_can_read_the_token_of_a_private_ray():
    with tempfile.TemporaryDirectory(prefix="ray-") as home:
        variables = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
        result = subprocess.run(
            [sys.executable, "-c", CONNECT],
            env={**variables, "HOME": home, "PYTHONPATH": str(ROOT)},
            umask=0o022,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.stdout.split() == ["connected", "0o600"], result.stderr


@pytest.fixture
def token(tmp_path, monkeypatch):
    """The file of the token in an empty home folder."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ray" / "auth_token"


def test_an_existing_token_is_kept(token):
    token.parent.mkdir()
    token.write_text("of another cluster")
    cluster_room._make_token()
    assert token.read_text() == "of another cluster"
    assert [*token.parent.iterdir()] == [token]


@pytest.mark.parametrize(
    "variable",
    [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "ab"), ("RAY_AUTH_TOKEN_PATH", "/token")],
    ids=lambda variable: variable[0],
)
def test_no_token_is_made_if_the_environment_has_another(token, monkeypatch, variable):
    monkeypatch.setenv(*variable)
    cluster_room._make_token()
    assert not token.exists()
