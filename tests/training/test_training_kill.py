"""Kills during training: the same command run again gives the result of an uninterrupted run.

Every kill is a SIGKILL of a real process. It happens at a random step with a fixed seed, once the
log or a checkpoint shows this step, and never after a fixed time.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.helper import files_in, measures, recipe, session, title
from unet_ray.engine import cluster
from unet_ray.network.checkpoints import read_model, read_tensors
from unet_ray.training.run_folder import BEST, METRICS, MODEL
from unet_ray.training.train import train

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="finds the processes of a run through /proc"
)

ROOT = Path(__file__).parents[2]
SECONDS = 240  # timeout of every wait
CHECKPOINT_SECONDS = 0.2
LOSS_BOUND = 1e-6  # relative, two workers against one with twice the batch; measured: 6e-8
WORKER = "ray::RayTrainWorker"  # title of a worker process of Ray Train

SCRIPT = """
import json, sys
from unet_ray.engine import cluster
from unet_ray.training.recipes import Recipe
from unet_ray.training.train import train


def main():
    request = json.loads(sys.argv[1])
    cluster.usable_cores = lambda: request["cores"]
    made = Recipe(**{**request["recipe"], "patch": tuple(request["recipe"]["patch"])})
    train(**request["run"], recipe=made)


if __name__ == "__main__":
    main()
"""


def lines_of(log):
    """Complete lines of a log that a process may be writing."""
    return log.read_text().split("\n")[:-1] if log.exists() else []


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of an image that equals its labels except for noise, and of the labels: four slices."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = 255 * rng.integers(0, 2, (4, 10, 10), np.uint8).repeat(7, 1).repeat(7, 2)
    image = (labels // 4 + rng.integers(60, 90, labels.shape)).astype(np.uint8)
    return write_pair(folder, image, labels)


def write_pair(folder, image, labels):
    for name, array in {"image": image, "labels": labels}.items():
        tifffile.imwrite(folder / f"{name}.tif", array, photometric="minisblack")
    return str(folder / "image.tif"), str(folder / "labels.tif")


class Training:
    """A training run in its own process; all processes that it starts are in its session."""

    def __init__(
        self,
        files,
        out,
        made,
        engine="local",
        workers=1,
        checkpoint_seconds=CHECKPOINT_SECONDS,
        takeover=False,
    ):
        run = {"images": [files[0]], "labels": [files[1]], "out": str(out)}
        run |= {"engine": engine, "workers": workers, "checkpoint_seconds": checkpoint_seconds}
        run["takeover"] = takeover
        request = {"run": run, "recipe": dataclasses.asdict(made)}
        # One thread per worker: threads that wait for each other are slow on a busy machine.
        request |= {"cores": workers}
        self.out, self._log = out, out.parent / f"{out.name}.log"
        with open(self._log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, json.dumps(request)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def output(self):
        """The end of the output of all training runs in this folder."""
        return self._log.read_text()[-4000:]

    def wait_until(self, ready, event):
        """Waits until `ready()` is true; fails if the process ends before."""
        end = time.monotonic() + SECONDS
        while not ready():
            assert self.process.poll() is None, f"ended before {event}:\n{self.output}"
            assert time.monotonic() < end, f"{SECONDS} s without {event}:\n{self.output}"
            time.sleep(0.002)

    def wait_for(self, step):
        """Waits for a log line of this step or a later one, and for a new checkpoint."""
        old = newest_step(self.out)
        self.wait_until(
            lambda: last_step(self.out) >= step and newest_step(self.out) > old,
            f"step {step} and a checkpoint after {old}",
        )

    def kill(self):
        """Kills the process only; returns the log lines up to the newest checkpoint."""
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.wait(SECONDS) == -signal.SIGKILL
        assert not (self.out / MODEL).exists(), "the run ended before the kill"
        return kept_lines(self.out)

    def kill_at(self, step):
        self.wait_for(step)
        return self.kill()

    def finish(self):
        assert self.process.wait(SECONDS) == 0, self.output
        assert (self.out / MODEL).exists()

    def workers(self):
        """Process ids of the workers of Ray Train."""
        return [pid for pid in session(self.process.pid) if title(pid).startswith(WORKER)]

    def end(self):
        """Kills all remaining processes of the session."""
        limit = time.monotonic() + 30
        while pids := session(self.process.pid):
            assert time.monotonic() < limit, f"processes {pids} do not end"
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()  # otherwise it remains a zombie
            time.sleep(0.05)
        self.process.wait(30)


@pytest.fixture
def start():
    """Returns a function that starts a `Training`; the fixture ends all its processes."""
    trainings = []

    def start(*args, **kwargs):
        trainings.append(Training(*args, **kwargs))
        return trainings[-1]

    yield start
    for training in trainings:
        training.end()


def last_step(out):
    lines = lines_of(out / METRICS)
    return json.loads(lines[-1])["step"] if lines else 0


def checkpoint_files(out):
    return sorted((out / "checkpoints").glob("step-*.safetensors"))


def newest_step(out):
    """Step of the newest checkpoint; 0 without one."""
    return max((int(path.stem.removeprefix("step-")) for path in checkpoint_files(out)), default=0)


def kept_lines(out):
    """Log lines up to the newest checkpoint, which a resumed run keeps."""
    newest = newest_step(out)
    assert newest > 0
    lines = [line for line in lines_of(out / METRICS) if json.loads(line)["step"] <= newest]
    assert lines
    return lines


def assert_resumed(out, kept):
    """The lines before the checkpoint are unchanged; repeated steps would differ in seconds."""
    assert lines_of(out / METRICS)[: len(kept)] == kept


def assert_same_run(out, other):
    """Model and log of two runs are equal, except for the seconds."""
    assert (out / MODEL).read_bytes() == (other / MODEL).read_bytes()
    assert timeless(out) == timeless(other)
    seconds = [m["seconds"] for m in measures(out)]
    assert seconds == sorted(seconds)


def timeless(out):
    return [{k: v for k, v in m.items() if k != "seconds"} for m in measures(out)]


def uninterrupted(files, out, made, monkeypatch):
    """The folder of an uninterrupted run in this process."""
    monkeypatch.setattr(cluster, "usable_cores", lambda: 1)
    train([files[0]], [files[1]], out, made)
    return out


def tiny(name="default", **chosen):
    return recipe(name, **{"precision": "float32", **chosen})


def test_a_killed_training_gives_the_bytes_of_an_uninterrupted_one(
    files, tmp_path, start, monkeypatch
):
    made, rng = tiny(steps=600), random.Random(1)
    whole = uninterrupted(files, tmp_path / "whole", made, monkeypatch)
    out, kept = tmp_path / "run", []
    for first in (50, 200, 350):
        before = kept
        kept = start(files, out, made).kill_at(rng.randrange(first, first + 100))
        assert_resumed(out, before)
    start(files, out, made).finish()
    assert_resumed(out, kept)
    assert_same_run(out, whole)


@pytest.mark.slow
def test_the_best_model_from_before_a_kill_is_kept(files, tmp_path, start, monkeypatch):
    # With this tiny learning rate, the first validation remains the best.
    made = tiny(steps=400, val="1:2", best_by="iou", norm="none", learning_rate=1e-9)
    whole = uninterrupted(files, tmp_path / "whole", made, monkeypatch)
    assert read_model(whole / BEST)[1].training["steps"] == 40
    out = tmp_path / "run"
    kept = start(files, out, made).kill_at(random.Random(2).randrange(100, 250))
    start(files, out, made).finish()
    assert_resumed(out, kept)
    assert_same_run(out, whole)
    assert (out / BEST).read_bytes() == (whole / BEST).read_bytes()
    assert len([m for m in measures(out) if "validation" in m]) == 10


@pytest.fixture(scope="module")
def large_files(tmp_path_factory):
    """As `files`, with slices that take long to score."""
    rng = np.random.default_rng(0)
    labels = 255 * rng.integers(0, 2, (3, 50, 50), np.uint8).repeat(7, 1).repeat(7, 2)
    image = (labels // 4 + rng.integers(60, 90, labels.shape)).astype(np.uint8)
    return write_pair(tmp_path_factory.mktemp("large"), image, labels)


@pytest.mark.slow
def test_a_training_killed_during_validation_repeats_the_validation(
    large_files, tmp_path, start, monkeypatch
):
    made = tiny(steps=40, val="1:3", best_by="iou")
    whole = uninterrupted(large_files, tmp_path / "whole", made, monkeypatch)
    out, step = tmp_path / "run", random.Random(3).randrange(8, 40, 4)
    # A tenth of the training is four steps; checkpoints are written only before validations.
    training = start(large_files, out, made, checkpoint_seconds=SECONDS)
    training.wait_until(lambda: newest_step(out) == step, f"a checkpoint of step {step}")
    kept = training.kill()
    validated = [m["step"] for m in measures(out) if "validation" in m]
    assert max(validated) == step - 4, "the validation ended before the kill"
    start(large_files, out, made, checkpoint_seconds=SECONDS).finish()
    assert_resumed(out, kept)
    assert_same_run(out, whole)
    assert (out / BEST).read_bytes() == (whole / BEST).read_bytes()


@pytest.mark.slow
def test_training_time_before_a_kill_counts(files, tmp_path, start):
    made, out = tiny(steps=None, minutes=0.15), tmp_path / "run"
    kept = start(files, out, made).kill_at(random.Random(4).randrange(200, 300))
    header = read_tensors(checkpoint_files(out)[-1])[1]
    start(files, out, made).finish()
    assert_resumed(out, kept)
    lines = measures(out)
    steps, seconds = ([m[name] for m in lines] for name in ("step", "seconds"))
    assert steps == sorted(set(steps))
    assert seconds == sorted(seconds)
    assert lines[len(kept)]["seconds"] >= header["seconds"] > 0
    # The last step may begin just before the limit.
    assert 9 <= seconds[-1] < 11
    assert read_model(out / MODEL)[1].training["steps"] == steps[-1]


@pytest.mark.slow
def test_a_paused_training_loses_its_folder_only_to_takeover(files, tmp_path, start, monkeypatch):
    made, out = tiny(steps=200), tmp_path / "run"
    whole = uninterrupted(files, tmp_path / "whole", made, monkeypatch)
    first = start(files, out, made)
    first.wait_for(random.Random(5).randrange(50, 100))
    os.kill(first.process.pid, signal.SIGSTOP)  # alive, but unable to write
    before = files_in(out)
    second = start(files, out, made)
    assert second.process.wait(SECONDS) == 1
    assert f"process {first.process.pid} on " in second.output
    assert "is writing here" in second.output and "--takeover" in second.output
    assert files_in(out) == before
    kept = kept_lines(out)
    third = start(files, out, made, takeover=True)
    third.finish()
    after = files_in(out)
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.process.wait(SECONDS) == 1
    assert "so this run stops" in first.output
    assert files_in(out) == after
    assert_resumed(out, kept)
    assert_same_run(out, whole)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_on_ray_survives_kills_of_its_driver_and_its_worker(
    files, tmp_path, start, monkeypatch
):
    made, rng = tiny(steps=1500), random.Random(6)
    whole = uninterrupted(files, tmp_path / "whole", made, monkeypatch)
    out = tmp_path / "run"
    kept = start(files, out, made, "ray").kill_at(rng.randrange(100, 300))
    # Workers of the killed driver still run; the fence of the new lease blocks their writes.
    second = start(files, out, made, "ray")
    second.wait_for(rng.randrange(900, 1200))
    assert_resumed(out, kept)
    (worker,) = second.workers()
    os.kill(worker, signal.SIGKILL)
    kept = kept_lines(out)
    second.finish()
    assert_resumed(out, kept)
    assert_same_run(out, whole)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("norm", ["none", "weight", "batch"])
def test_two_workers_survive_a_kill_of_one(files, tmp_path, start, monkeypatch, norm):
    chosen = {"name": "paper", "dropout": 0.0, "steps": 300, "learning_rate": 1e-4, "norm": norm}
    made, rng = tiny(**chosen), random.Random(7)
    whole, out = tmp_path / "whole", tmp_path / "run"
    start(files, whole, made, "ray", workers=2).finish()
    training = start(files, out, made, "ray", workers=2)
    training.wait_for(rng.randrange(50, 150))
    os.kill(rng.choice(training.workers()), signal.SIGKILL)
    kept = kept_lines(out)
    training.finish()
    assert_resumed(out, kept)
    assert_same_run(out, whole)
    single = uninterrupted(files, tmp_path / "single", tiny(**chosen, batch=2), monkeypatch)
    (one, _), (other, _) = read_model(single / MODEL), read_model(out / MODEL)
    for name, weights in one.state_dict().items():
        np.testing.assert_allclose(other.state_dict()[name], weights, rtol=1e-3, atol=1e-5)
    losses = [[m["loss"] for m in measures(folder)] for folder in (single, out)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=LOSS_BOUND)
