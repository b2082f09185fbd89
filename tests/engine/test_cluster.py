"""cluster.yaml as Ray's own launcher reads it, without a network and without a cluster."""

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


@pytest.mark.parametrize("where", [[], ["available_node_types", "gpu"], ["auth"]])
def test_ray_refuses_a_misspelt_key(where):
    cluster = prepare_config(yaml.safe_load(TEXT))
    part = cluster
    for key in where:
        part = part[key]
    part["idle_timeout_minuts"] = 10
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_config(cluster)


def test_every_file_that_it_names_exists():
    named = set(re.findall(r"(?<![\w/])(?:jobs|\.ci|unet_ray)/[\w./-]*\w", TEXT))
    assert {"jobs/segment.py", "jobs/train.py", ".ci/versions.txt"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_file_that_it_copies_exists_and_keeps_its_place():
    mounts = yaml.safe_load(TEXT)["file_mounts"]
    ours = {there: here for there, here in mounts.items() if not here.startswith("~")}
    assert {"pyproject.toml", "unet_ray", ".ci/versions.txt"} <= set(ours.values())
    assert all(there == f"~/unet-ray/{here}" for there, here in ours.items())
    assert [here for here in ours.values() if not (ROOT / here).exists()] == []
