"""A Ray that is gone, fails to start, or has no usable GPU: one sentence, nothing is written."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from ray._private import services

from unet_ray.engine import cluster
from unet_ray.errors import InputError

# The Ray of this test process must not be used, so each command runs in a process of its own.
COMMAND = "from unet_ray.__main__ import run; run()"


@pytest.fixture
def closed():
    """The address of a port that no program uses."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{unused.getsockname()[1]}"


def refusal(program, arguments, **environment):
    """Returns the sentence of a command that must refuse to start."""
    ran = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    (sentence,) = ran.stderr.splitlines()  # and neither a trace nor a warning
    return sentence


@pytest.fixture
def commands(task, tmp_path):
    """The arguments of `segment` and `train` on Ray. After the test, nothing may be written."""
    volume, model, store = task
    out = ["--out", tmp_path / "out.zarr", "--engine", "ray"]
    labels = store / "labels" / "classes"
    yield {
        "segment": ["segment", volume, "--model", model, *out],
        "train": ["train", "--images", volume, "--labels", labels, "--steps", 1, *out],
    }
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("verb", ["segment", "train"])
def test_a_head_that_is_gone_is_named_at_once(commands, closed, verb):
    sentence = refusal(COMMAND, commands[verb], RAY_ADDRESS=closed)
    assert sentence.startswith(f"unet-ray: RAY_ADDRESS={closed}: cannot connect to this Ray ")
    assert "(Connection refused); start it, correct the address, or unset it" in sentence


def test_a_recorded_head_that_is_gone_is_named_too(monkeypatch, closed):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: closed)
    with pytest.raises(InputError, match=r"RAY_ADDRESS=auto: cannot .* \(Connection refused\);"):
        cluster._join("auto")


def test_a_port_of_another_program_is_named(monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"^RAY_ADDRESS={address}: .*another program uses"):
            cluster._join(address)
    assert cluster.GCS_WAIT not in os.environ  # or a private Ray would have too little time


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://127.0.0.1:10001", "for `ray job submit` only; set the HOST:PORT"),
        ("https://127.0.0.1:8265", "for `ray job submit` only; set the HOST:PORT"),
        ("head", "Invalid address format: head"),
    ],
)
def test_an_address_that_is_not_of_a_head_is_refused(address, words):
    with pytest.raises(InputError, match=rf"^RAY_ADDRESS={address}: .*{words}"):
        cluster._join(address)


def test_a_private_ray_that_does_not_start_is_reported(commands):
    program = (
        f"from ray._private import services; services.GCS_SERVER_EXECUTABLE = 'false'; {COMMAND}"
    )
    sentence = refusal(program, commands["segment"], RAY_gcs_server_port_wait_time_s="1")
    assert sentence.startswith("unet-ray: Ray does not start on ")
    assert sentence.endswith("or set --engine local.")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU of this machine")
def test_a_machine_whose_gpu_torch_cannot_use_is_named(commands):
    program = f"""
import ray
ray.init(
    address="local",
    num_cpus=2,
    num_gpus=1,
    include_dashboard=False,
    log_to_driver=False,
    logging_level="WARNING",
    object_store_memory=100 << 20,
)
{COMMAND}
"""
    sentence = refusal(program, commands["segment"])
    assert " offers a GPU to Ray, but torch cannot use a GPU there; install" in sentence
    assert sentence.endswith("or start its Ray with --num-gpus=0.")
