"""Checks cluster.yaml with Ray's own launcher code, without a network or a cluster."""

import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

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
