"""Cores, GPUs and memory of this machine or of a Ray cluster.

Knows how to connect to Ray and how to query its machines. Does not know what runs on them.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Literal, TypeVar

import torch

from unet_ray.engine.stages import Deadline
from unet_ray.errors import InputError, RunError, refuse_unknown
from unet_ray.machine import machine_name
from unet_ray.units import format_bytes

EngineName = Literal["local", "ray"]
Answer = TypeVar("Answer")
# Below 1, so that Ray's own tasks always find a free fraction of a CPU beside the actors.
CPUS_PER_ACTOR = 0.9
# Readers per GPU, and equally many writers. The tiny CPU request keeps them off machines without
# any CPU, such as a head that must not run work.
HELPERS, CPUS_PER_HELPER = 2, 0.01
# Per GPU. Without GPUs, segmentation passes only tile numbers and receipts through it.
OBJECT_STORE_BYTES = 1 << 30
# From these values on, Ray means that the cluster has no upper bound.
UNBOUNDED = {"CPU": 1 << 20, "GPU": 1 << 20, "memory": 1 << 60}
POLL_SECONDS = 30  # between two checks for an answer
CONNECT_SECONDS = 10.0  # until the head of a cluster must answer
GCS_WAIT = "RAY_gcs_server_port_wait_time_s"  # environment variable of Ray
# Messages that Ray logs at every start and that users can ignore.
_RAY_LOGS = {
    "ray.data": logging.WARNING,
    "ray.train": logging.WARNING,
    # Traces of exceptions that are raised anyway.
    "ray.data.exceptions": logging.CRITICAL,
    "ray.data._internal.execution.operators.actor_pool_map_operator": logging.CRITICAL,
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
}


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_engine(name: Literal["auto", "local", "ray"], job: bool = False) -> EngineName:
    """The engine of a run; ``auto`` is Ray in a job, with RAY_ADDRESS set or on several GPUs."""
    refuse_unknown("engine", name, ("auto", "local", "ray"))
    if name != "auto":
        return name
    on_ray = job or os.environ.get("RAY_ADDRESS") or torch.cuda.device_count() > 1
    return "ray" if on_ray else "local"


def side_by_side(device: str, engine: EngineName, workers: int | None, memory: int = 0) -> int:
    """Returns the number of tiles that a run predicts at a time; by default one per core or GPU.

    On Ray the memory of the cluster also limits the number, at `memory` bytes per worker.
    """
    if engine == "ray":
        return pool_size(device, workers, memory)
    return workers or usable_cores() if device == "cpu" else 1


def local_device() -> Literal["cpu", "cuda", "mps"]:
    """Returns the device of this machine: an NVIDIA or Apple GPU if torch can use one."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_device(engine: EngineName, workers: int | None = None) -> Literal["cpu", "cuda", "mps"]:
    """Returns the device of this machine, or of the cluster, including machines it may start.

    Raises:
        InputError: if the cluster can never run `workers` workers, or if torch cannot use the GPU
            that a machine offers to Ray.
    """
    if engine == "local":
        return local_device()
    connect(workers)
    device: Literal["cpu", "cuda"] = "cuda" if size_of("GPU") >= 1 else "cpu"
    pool_size(device, workers)
    if device == "cuda" and (machine := ask(_machine_without_gpu, device, engine)):
        raise InputError(
            f"{machine} offers a GPU to Ray, but torch cannot use a GPU there; install the driver "
            "of the GPU and a torch for CUDA on it, or start its Ray with --num-gpus=0."
        )
    return device


def _machine_without_gpu() -> str:
    """Returns the name of this machine if torch cannot use a GPU here, else an empty string."""
    return "" if torch.cuda.is_available() else machine_name()


def ask(question: Callable[[], Answer], device: str, engine: EngineName) -> Answer:
    """Calls a function where the workers will run: in this process, or on a cluster machine.

    Waits until such a machine is available; the head of a cluster need not be one.

    Raises:
        RunError: if none is available within the time limit for making a worker.
    """
    if engine == "local":
        return question()
    import ray
    from ray._private import worker  # Ray has no public function for this

    connect()
    if device == "cpu" and worker._global_node and worker._global_node.is_head():
        return question()  # `connect` has started Ray on this machine
    gpus = int(device == "cuda")  # the request of a GPU actor
    task = ray.remote(num_cpus=0 if gpus else CPUS_PER_ACTOR, num_gpus=gpus)
    pending = task(lambda: question()).remote()  # Ray accepts functions, not every callable
    resource = "GPU" if device == "cuda" else "CPU"
    for waited in range(0, int(Deadline.make), POLL_SECONDS):
        if ray.wait([pending], timeout=POLL_SECONDS)[0]:
            answer: Answer = ray.get(pending)
            return answer
        if not waited:
            print(f"unet-ray: waiting for a machine with a free {resource} ...", file=sys.stderr)
    ray.cancel(pending)
    raise RunError(
        f"no machine of this Ray cluster had a free {resource} within {Deadline.make:.0f} s. Check "
        "what else runs on the cluster and whether it can start machines, then run the same "
        "command again to resume."
    )


def pool_size(device: str, workers: int | None, memory: int = 0) -> int:
    """Returns the number of workers to start on the cluster.

    Args:
        device: of each worker.
        workers: requested number; by default as many as the cluster can run.
        memory: bytes that each worker needs; 0 if unknown.

    Raises:
        InputError: if the cluster can never run the requested number: Ray would wait forever, or
            machines would run out of memory.
    """
    connect(workers)
    limit, resources = max_workers(device, memory)
    requested = workers or 1
    if requested > limit:
        remedy = f"the maximum is {limit}" if limit else "pass a smaller --memory and another --out"
        raise InputError(
            f"workers={requested} is more than this Ray cluster can run: it has {resources}; "
            f"{remedy}."
        )
    return workers or limit


def max_workers(device: str, memory: int) -> tuple[int, str]:
    """Returns how many workers the cluster can run, and the resources that limit them."""
    resource = "GPU" if device == "cuda" else "CPU"
    units = max(1, size_of(resource))
    if not memory or not _memory_is_known() or (fitting := _fitting(memory)) >= units:
        return units, f"{units} {resource}s"
    need = f"each worker needs {format_bytes(memory)}"
    return fitting, f"{format_bytes(size_of('memory'))} of memory, and {need}"


def memory_request(memory: int) -> dict[str, int]:
    """Returns the argument for Ray by which an actor requests memory, in bytes.

    It is empty if `memory` is 0, if machines do not state their memory, or if none has enough: Ray
    would wait forever for one that has.
    """
    return {"memory": memory} if memory and _memory_is_known() and _fitting(memory) else {}


def _memory_is_known() -> bool:
    """Returns whether all machines that the cluster may have are present and state their memory."""
    return size_of("memory") > 0 and not _may_grow()


def _fitting(memory: int) -> int:
    """Returns how many workers of `memory` bytes fit into the present machines."""
    import ray

    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return sum(int(resources.get("memory", 0)) // memory for resources in alive)


def _may_grow() -> bool:
    """Returns whether the cluster may start more machines, whose memory is unknown."""
    import ray

    current = ray.cluster_resources()
    return any(_may_have(resource) > current.get(resource, 0) for resource in ("CPU", "GPU"))


def gpus_present() -> int:
    """Returns the number of GPUs that the cluster has now."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def size_of(resource: str) -> int:
    """Returns the ``CPU``, ``GPU`` or ``memory`` of the cluster, with the machines it may start.

    If it may grow without limit, only its present machines count.
    """
    import ray

    may_have = _may_have(resource)
    current = int(ray.cluster_resources().get(resource, 0))
    return max(current, int(may_have)) if may_have < UNBOUNDED[resource] else max(current, 1)


def _may_have(resource: str) -> float:
    """Returns how much the fully grown cluster has of a resource; 0 if Ray reports none."""
    from ray._private.state import state  # as Ray Train does: Ray has no public function for this

    return float((state.get_max_resources_from_cluster_config() or {}).get(resource, 0))


def connect(workers: int | None = None) -> None:
    """Connects to the cluster at ``RAY_ADDRESS``, or else starts Ray on this machine.

    Raises:
        InputError: if the cluster at ``RAY_ADDRESS`` does not accept the connection, or Ray does
            not start.
    """
    import ray

    for name, level in _RAY_LOGS.items():
        logging.getLogger(name).setLevel(level)
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        _join(address)
    else:
        _start(workers)


def _join(address: str) -> None:
    """Connects to a cluster within a minute.

    Raises:
        InputError: if it does not accept the connection.
    """
    import ray

    if "://" in address:
        raise InputError(
            f"RAY_ADDRESS={address}: an address with :// is for `ray job submit` only; set the "
            "HOST:PORT of the cluster's head, or unset it to run on this machine."
        )
    # Ray tries once, for 40 seconds. By default it tries for a quarter of an hour.
    before = os.environ.get(GCS_WAIT)
    os.environ.setdefault(GCS_WAIT, "1")
    try:
        _refuse_silent_head(address)
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises errors of many types, also plain exceptions
        raise InputError(
            f"RAY_ADDRESS={address}: cannot connect to this Ray cluster ({_first_line(error)}); "
            "start it, correct the address, or unset it to run on this machine."
        ) from error
    finally:
        if before is None:
            del os.environ[GCS_WAIT]  # a private Ray may need longer to start


def _refuse_silent_head(address: str) -> None:
    """Connects to the head of a cluster, since Ray itself tries for long and reports no cause.

    Raises:
        OSError: if the head does not accept the connection, or does not answer as Ray does.
        ValueError: if the address is malformed.
    """
    import grpc
    from ray._private import gcs_utils, services  # Ray has no public function for this

    if head := services.canonicalize_bootstrap_address(address):
        socket.create_connection(services.extract_ip_port(head), CONNECT_SECONDS).close()
        with gcs_utils.create_gcs_channel(head) as channel:
            try:
                grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
            except grpc.FutureTimeoutError:
                raise TimeoutError("another program uses this port, or Ray hangs") from None


def _start(workers: int | None) -> None:
    """Starts a private Ray; a plain ``ray.init()`` would connect to any Ray of this machine.

    Raises:
        InputError: if it does not start.
    """
    import ray

    _make_token()
    # Otherwise Ray prints an error about every actor pool of Ray Data, whatever its arguments.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    gpus = torch.cuda.device_count()
    try:
        ray.init(
            address="local",
            num_cpus=max(usable_cores(), workers or 1),
            num_gpus=gpus,  # Ray itself would also count GPUs that torch cannot use
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=OBJECT_STORE_BYTES * max(1, gpus),
        )
    except Exception as error:  # Ray raises errors of many types, also plain exceptions
        raise InputError(
            f"Ray does not start on {machine_name()} ({_first_line(error)}); check its free memory "
            "and the disk of its temporary files, or set --engine local."
        ) from error
    threading.Thread(target=_report_end_of_ray, name="raylet", daemon=True).start()


def _make_token() -> None:
    """Makes the token of Ray that `ray.init` would make, but only its owner can read the file.

    Whoever can read it can run code as this user while Ray runs, since Ray listens on the network.
    """
    chosen = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}
    path = Path.home() / ".ray" / "auth_token"
    if chosen or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or path.exists():
        return
    with suppress(OSError):  # another process was faster; or else Ray tries, and shows the error
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent) as file:  # only its owner can read it
            file.write(secrets.token_hex(32))
            file.flush()
            os.link(file.name, path)  # fails if the file exists, so it never replaces a token


def _first_line(error: Exception) -> str:
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return text.strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _report_end_of_ray() -> None:
    """Prints why this process ends: Ray ends it without a message when its raylet has died."""
    import ray
    from ray._private import worker  # Ray has no public function for this

    (raylet,) = worker._global_node.all_processes["raylet"]
    raylet.process.wait()
    if ray.is_initialized():
        print(
            f"unet-ray: Ray on this machine has ended (raylet, process {raylet.process.pid}): it "
            "was killed, or memory ran out. Run the same command again to resume.",
            file=sys.stderr,
            flush=True,
        )
