"""Training on workers of Ray Train, and both jobs submitted to a real Ray head."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from tests.helper import classes_of, measures, model_content, noise, write_stack
from unet_ray.engine import cluster
from unet_ray.errors import RunError
from unet_ray.network.checkpoints import find_model, read_model
from unet_ray.training.recipes import Recipe
from unet_ray.training.train import train

ROOT = Path(__file__).parent.parent
SECONDS = 240


@pytest.fixture
def files(tmp_path):
    """Paths of an image and of its labels."""
    image = noise((2, 60, 64))
    labels = np.where(image > 128, 255, 0).astype(np.uint8)
    paths = write_stack(tmp_path / "image.tif", image), write_stack(tmp_path / "labels.tif", labels)
    return [str(path) for path in paths]


def recipe(name="default", **chosen):
    tiny = {"base_channels": 2, "depth": 1, "patch": (44, 48), "steps": 12, "elastic": 2.0}
    return Recipe.of(name, **{**tiny, "precision": "float32", **chosen})


def on_ray(files, out, recipe, workers, reports, seconds=60):
    return train([files[0]], [files[1]], out, recipe, "ray", workers, reports.append, seconds)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_one_worker_of_ray_trains_the_same_model_as_the_local_engine(files, tmp_path, monkeypatch):
    reports = []
    model = on_ray(files, tmp_path / "ray", recipe(), 1, reports)
    assert model == find_model(tmp_path / "ray")
    assert [m.step for m in reports] == [m["step"] for m in measures(tmp_path / "ray")] == [10, 12]
    stored = sorted(path.name for path in (tmp_path / "ray" / "checkpoints").iterdir())
    steps = [f"step-{n:09d}.safetensors" for n in (0, 12)]
    assert stored == [".lease.lock", "lease.json", *steps]  # and no files of Ray
    monkeypatch.setattr(cluster, "usable_cores", lambda: 2)  # the number of CPUs of that Ray
    local = train([files[0]], [files[1]], tmp_path / "local", recipe())
    assert model_content(model) == model_content(local)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_two_workers_train_the_same_model_as_one_with_twice_the_batch(files, tmp_path):
    chosen = {"name": "paper", "dropout": 0.0, "steps": 10, "learning_rate": 1e-4}
    together = on_ray(files, tmp_path / "ray", recipe(**chosen), 2, [])
    single = train([files[0]], [files[1]], tmp_path / "local", recipe(**chosen, batch=2))
    (one, _), (other, header) = read_model(single), read_model(together)
    assert header.training["steps"] == 10
    for name, weights in one.state_dict().items():
        np.testing.assert_allclose(other.state_dict()[name], weights, rtol=1e-3, atol=1e-5)
    assert len(measures(tmp_path / "ray")) == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_training_uses_all_workers_that_the_cluster_can_run(files, tmp_path):
    reports = []
    model = on_ray(files, tmp_path / "run", recipe(batch=2), (1, 4), reports)
    assert {(m.workers, m.patches) for m in reports} == {(2, 4)}
    assert read_model(model)[1].training["steps"] == 12


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_failure_of_a_worker_is_reported_with_its_own_message(files, tmp_path):
    with pytest.raises(RunError, match=r"the loss is (nan|inf); train again with a") as failed:
        on_ray(files, tmp_path / "run", recipe(learning_rate=1e30), 1, [])
    assert str(failed.value).startswith("step ")  # no retry, which would fail again
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_failure_of_only_the_first_worker_ends_the_others(files, tmp_path):
    # One step makes the weights infinite, and only the first worker saves them.
    diverging = recipe("paper", learning_rate=1e38)
    with pytest.raises(RunError, match="is no longer finite"):
        on_ray(files, tmp_path / "run", diverging, 2, [], seconds=0)


# A separate Ray head


def free_ports(count):
    """Returns free ports."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


@pytest.fixture
def head():
    """Starts a Ray head in its own process; yields the address for jobs and the environment."""
    # Not in the folder of the test, because paths of sockets must be short.
    home = Path(tempfile.mkdtemp(prefix="ray-"))
    binaries = Path(sys.executable).parent
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")},
        "HOME": str(home),
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # otherwise it waits 30 s for jobs
    }
    names = ["port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port"]
    names += ["dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port"]
    names += ["node-manager-port", "object-manager-port"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    flags = [f"--{name}={port}" for name, port in ports.items()]
    command = [binaries / "ray", "start", "--head", "--block", "--num-cpus=2", *flags]
    command += ["--object-store-memory=200000000", f"--temp-dir={home / 'r'}"]
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=home, start_new_session=True
        )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        wait_for(address, process, home / "log")
        yield address, environment
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(home, ignore_errors=True)


def wait_for(address, process, log):
    end = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)


def submit(head, *command):
    """Submits a job from the project's folder, and waits until it ends."""
    address, environment = head
    client = [Path(sys.executable).parent / "ray", "job", "submit", "--address", address]
    return subprocess.run(
        [*client, "--working-dir", ".", "--", "python", *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_jobs_train_and_segment_on_a_real_head(head, files, tmp_path):
    image, labels = files
    tiny = ["--base-channels=2", "--depth=1", "--patch=44", "--steps=10", "--workers=1"]
    data = ["--images", image, "--labels", labels, "--out", tmp_path / "run"]
    job = submit(head, "jobs/train.py", *data, *tiny)
    assert job.returncode == 0, job.stdout + job.stderr
    assert str(tmp_path / "run" / "model.safetensors") in job.stdout.splitlines()
    assert read_model(tmp_path / "run" / "model.safetensors")[1].training["steps"] == 10
    out = ["--model", tmp_path / "run", "--out", tmp_path / "out.zarr", "--tile", "1,32,32"]
    job = submit(head, "jobs/segment.py", image, *out)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "engine ray" in job.stdout and "8/8 tiles" in job.stdout
    assert str(tmp_path / "out.zarr") in job.stdout.splitlines()
    assert classes_of(tmp_path / "out.zarr").shape == (2, 60, 64)
    job = submit(head, "jobs/segment.py", tmp_path / "no.tif", *out)
    assert job.returncode == 1
    assert "unet-ray: " in job.stdout and "no.tif does not exist" in job.stdout
