"""Where a run happens: this machine, or a Ray cluster: its cores, GPUs and memory.

Knows how to join Ray and what it says of its machines; does not know what is run there.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from unet_ray.engine.stages import Deadline
from unet_ray.errors import InputError, RunError
from unet_ray.units import format_bytes

EngineName = Literal["local", "ray"]
Answer = TypeVar("Answer")
# Below one, so that Ray always finds room for its own reading and writing beside the actors.
CPUS_PER_ACTOR = 0.9
# Actors that read for each GPU, and as many that write; what they ask for keeps them off machines
# without any CPU, such as a head that is to run nothing.
HELPERS, CPUS_PER_HELPER = 2, 0.01
# Where there are GPUs, for each: without them only tile numbers and receipts cross it while
# segmenting.
OBJECT_STORE_BYTES = 1 << 30
UNBOUNDED = {"CPU": 1 << 20, "GPU": 1 << 20, "memory": 1 << 60}
ASK_SECONDS = 30  # between two looks whether there is an answer
# What Ray says on every start and users can do nothing about.
_RAY_LOGS = {
    "ray.data": logging.WARNING,
    "ray.train": logging.WARNING,
    # Traces of what is raised anyway.
    "ray.data.exceptions": logging.CRITICAL,
    "ray.data._internal.execution.operators.actor_pool_map_operator": logging.CRITICAL,
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
}


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_engine(asked: Literal["auto", "local", "ray"], job: bool = False) -> EngineName:
    """The engine of a run; ``auto`` is Ray in a job, with RAY_ADDRESS set or on several GPUs."""
    if asked != "auto":
        return asked
    on_ray = job or os.environ.get("RAY_ADDRESS") or torch.cuda.device_count() > 1
    return "ray" if on_ray else "local"


def side_by_side(device: str, engine: EngineName, workers: int | None, memory: int = 0) -> int:
    """How many tiles a run predicts at a time: one on each core or GPU, unless told otherwise.

    On Ray no more than the cluster has memory for, at so many bytes each.
    """
    if engine == "ray":
        return pool_size(device, workers, memory)
    return workers or usable_cores() if device == "cpu" else 1


def local_device() -> Literal["cpu", "cuda", "mps"]:
    """The device of this machine: a GPU of NVIDIA or Apple where torch can use one."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_device(engine: EngineName, workers: int | None = None) -> Literal["cpu", "cuda", "mps"]:
    """The device of this machine, or of the cluster as it is or may grow: ``cuda`` or ``cpu``.

    Raises:
        InputError: if the cluster can never hold so many workers.
    """
    if engine == "local":
        return local_device()
    connect(workers)
    device: Literal["cpu", "cuda"] = "cuda" if size_of("GPU") >= 1 else "cpu"
    pool_size(device, workers)
    return device


def ask(question: Callable[[], Answer], device: str, engine: EngineName) -> Answer:
    """Asks something where the workers of a run are to be: here, or on a machine of the cluster.

    Waits until there is such a machine; the head of a cluster need not be one.

    Raises:
        RunError: if there is none for as long as a worker may take to be made.
    """
    if engine == "local":
        return question()
    import ray
    from ray._private import worker  # there is no public way to ask

    connect()
    if device == "cpu" and worker._global_node and worker._global_node.is_head():
        return question()  # a Ray of our own, on this machine
    gpus = int(device == "cuda")  # as those that predict ask for one
    task = ray.remote(num_cpus=0 if gpus else CPUS_PER_ACTOR, num_gpus=gpus)
    asked = task(lambda: question()).remote()  # Ray takes functions, not all that can be called
    resource = "GPU" if device == "cuda" else "CPU"
    for waited in range(0, int(Deadline.make), ASK_SECONDS):
        if ray.wait([asked], timeout=ASK_SECONDS)[0]:
            there: Answer = ray.get(asked)
            return there
        if not waited:
            print(f"unet-ray: waiting for a machine with a free {resource} ...", file=sys.stderr)
    ray.cancel(asked)
    raise RunError(
        f"no machine of this Ray cluster had a free {resource} within {Deadline.make:.0f} s; see "
        "what else runs there, and whether machines can be started; the same command goes on."
    )


def pool_size(device: str, workers: int | None, memory: int = 0) -> int:
    """How many workers to start on the cluster: those asked for, or all that fit.

    Args:
        device: of each.
        workers: asked for.
        memory: bytes that each needs; 0 if that is not known yet.

    Raises:
        InputError: if it can never hold so many: Ray would wait for ever, or machines run out of
            memory.
    """
    connect(workers)
    most, has = most_workers(device, memory)
    asked = workers or 1
    if asked > most:
        remedy = f"the most is {most}" if most else "give a smaller --memory and another --out"
        raise InputError(
            f"workers={asked} is more than this Ray cluster can hold: it has {has}; {remedy}."
        )
    return workers or most


def most_workers(device: str, memory: int) -> tuple[int, str]:
    """How many workers the cluster holds, and what of it says so."""
    resource = "GPU" if device == "cuda" else "CPU"
    most = max(1, size_of(resource))
    there = size_of("memory")
    if not memory or not there or _may_grow() or there // memory >= most:
        return most, f"{most} {resource}s"
    each = f"each worker needs {format_bytes(memory)}"
    return there // memory, f"{format_bytes(there)} of memory, and {each}"


def _may_grow() -> bool:
    """Whether machines may come whose memory nobody knows yet."""
    import ray

    has = ray.cluster_resources()
    return any(_may_have(resource) > has.get(resource, 0) for resource in ("CPU", "GPU"))


def gpus_there() -> int:
    """How many GPUs the cluster has at this moment."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def size_of(resource: str) -> int:
    """How much of ``CPU``, ``GPU`` or ``memory`` the cluster has, or can start machines for."""
    import ray

    may_have = _may_have(resource)
    has = int(ray.cluster_resources().get(resource, 0))
    # A cluster without an upper bound says so with a huge number: then what is there counts.
    return max(has, int(may_have)) if may_have < UNBOUNDED[resource] else max(has, 1)


def _may_have(resource: str) -> float:
    """How much the machines of the cluster have together when it has grown; 0 if it tells none."""
    from ray._private.state import state  # as Ray Train does: there is no public way to ask

    return float((state.get_max_resources_from_cluster_config() or {}).get(resource, 0))


def connect(workers: int | None = None) -> None:
    """Joins the cluster that ``RAY_ADDRESS`` names, else starts a Ray of our own on this machine.

    A plain ``ray.init()`` would attach to whatever cluster the machine has on record.
    """
    import ray

    for name, level in _RAY_LOGS.items():
        logging.getLogger(name).setLevel(level)
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"RAY_ADDRESS={address}: cannot join that Ray ({_line(error)}); a "
                f"dashboard's http address is for `ray job submit` only; unset it to run here."
            ) from error
        return
    # Ray's own core prints an error about every actor pool of Ray Data, whatever its arguments.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray.init(
        address="local",
        num_cpus=max(usable_cores(), workers or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=OBJECT_STORE_BYTES * max(1, torch.cuda.device_count()),
    )
    threading.Thread(target=_tell_end_of_ray, name="raylet", daemon=True).start()


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _tell_end_of_ray() -> None:
    """Says why this process ends: Ray ends it without a word soon after its raylet is killed."""
    import ray
    from ray._private import worker  # there is no public way to ask

    (raylet,) = worker._global_node.all_processes["raylet"]
    raylet.process.wait()
    if ray.is_initialized():
        print(
            f"unet-ray: Ray on this machine has ended (raylet, process {raylet.process.pid}): it "
            "was killed, or memory ran out; what was committed stays, the same command goes on.",
            file=sys.stderr,
            flush=True,
        )
