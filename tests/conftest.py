"""Shared by all tests: a quiet and private Ray, hypothesis settings, the real images."""

import builtins
import errno
import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.s3 import bucket, faulty, moto_bucket  # noqa: F401, fixtures
from unet_ray.storage import places

# Ray reads these at import, and its workers inherit them, so they are set before any test file.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_AUTH_MODE="disabled",  # or ray.init() writes a token into the user's home
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",  # check for reports this often, not every 2 s
)
os.environ.pop("RAY_ADDRESS", None)  # tests never run on a real cluster

# No deadline, since machines may be busy. On CI the same examples run every time.
settings.register_profile(
    "unet-ray", deadline=None, print_blob=True, derandomize="CI" in os.environ
)
settings.load_profile("unet-ray")


@pytest.fixture
def one_torch_thread():
    """Passes on one thread, as in a run: the last bits depend on the number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real images beside the project. Tests that need it are skipped without it."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("UNET_RAY_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; UNET_RAY_SHARED_DATA names another folder")
    return folder


@pytest.fixture(scope="session")
def local_ray():
    """A Ray with two CPUs, only for this session. Tests that use it need ``@pytest.mark.ray``."""
    import ray

    ray.shutdown()  # tests of plans may have started another one
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=300 * 2**20,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A volume, a model, and the store of an uninterrupted run of 24 tiles. Read-only."""
    from tests.helper import TILED, noise, random_model, write_stack
    from tests.segmentation.test_segmentation import segment

    folder = tmp_path_factory.mktemp("task")
    volume = write_stack(folder / "volume.tif", noise((3, 61, 75)))
    model = random_model(folder / "model.safetensors")
    return volume, model, segment(volume, model, folder / "whole.zarr", TILED)


@pytest.fixture
def bad_disk(monkeypatch):
    """A function that lets another one fail, as on a bad disk; returns a list of the failures."""
    monkeypatch.setattr(places, "RETRY_PAUSES", (0.0, 0.0))

    def install(module, name, times=99, number=errno.EIO, folder=""):
        failures, original = [], getattr(module, name, None) or getattr(builtins, name)

        def function(*arguments, **options):
            if len(failures) < times and any(folder in str(argument) for argument in arguments):
                failures.append(arguments)
                raise OSError(number, os.strerror(number))
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, function, raising=False)
        return failures

    return install


@pytest.fixture
def ready(request):
    """Starts Ray for the tests marked with ``ray``."""
    if request.node.get_closest_marker("ray"):
        request.getfixturevalue("local_ray")
