"""Who runs the tiles: a loop with threads in this process, or an actor pool of Ray Data.

Knows a stage (a name and how to make its worker) and tile numbers; does not know what a tile is
about. Both engines call the same three steps on the same worker class and yield one receipt per
tile, in any order, so they cannot differ in what they compute.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch

from unet_ray.errors import DeadlyError, InputError, UnetRayError, VoxelError
from unet_ray.memory import kept_memory_environment

EngineName = Literal["local", "ray"]
Verdict = Literal["again", "never", "stop"]
Answer = TypeVar("Answer")
# Tile numbers go to Ray in waves, so that the driver's memory does not grow with the volume.
WAVE = 4096
# Below one, so that Ray always finds room for its own reading and writing beside the actors.
CPUS_PER_ACTOR = 0.9
# A GPU actor takes several tiles at a time, to read and write while it predicts.
TILES_PER_GPU_BATCH = 8
# Only tile numbers and receipts cross the object store while segmenting.
OBJECT_STORE_BYTES = 1 << 30
UNBOUNDED = 1 << 20
# How often a tile is tried in a run, before it is given up.
TRIES = 3
# A disk that takes nothing more: full, over quota, read-only.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
# What Ray says on every start and users can do nothing about.
_RAY_LOGS = {
    "ray.data": logging.WARNING,
    "ray.train": logging.WARNING,
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
}


@dataclass(frozen=True)
class Receipt:
    """What is known of a tile that was tried.

    Attributes:
        tile: its number.
        seconds: time spent reading, predicting and writing together.
        error: one sentence if it failed; nothing was committed then.
        trace: where it failed, as Python tells it.
        verdict: of a failure: ``again`` may do better, ``never`` cannot, ``stop``: nor can any
            other tile.
    """

    tile: int
    seconds: float
    error: str = ""
    trace: str = ""
    verdict: Verdict = "again"


class Worker(Protocol):
    """The three steps of one tile; made once in each process that runs tiles."""

    def read(self, tile: int) -> Any:
        """What the tile needs from the input."""

    def predict(self, tile: int, voxels: Any) -> Any:
        """The tile's result, from what was read."""

    def write(self, tile: int, result: Any) -> None:
        """Puts the result on disk; returns when it is there."""


@dataclass(frozen=True)
class Stage:
    """A piece of work on all tiles of a plan.

    Attributes:
        name: for messages and the ledger.
        make_worker: makes the worker where it is to run; small to pickle.
        device: ``cpu`` (one thread per pass, workers side by side) or ``cuda``.
        begun: folder, seen by every worker of Ray, of marks of the tiles that were begun and not
            ended; None for no marks.
    """

    name: str
    make_worker: Callable[[], Worker]
    device: str
    begun: Path | None = None


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    stage: Stage, tiles: Iterable[int], engine: EngineName, workers: int | None = None
) -> Iterator[Receipt]:
    """Runs `tiles` of a stage and yields a receipt for each as it is done.

    Args:
        stage: what to do.
        tiles: which tiles.
        engine: who does it.
        workers: how many side by side; by default one per core, or one per GPU.
    """
    if engine == "ray":
        return _run_ray(stage, iter(tiles), workers)
    threads = 2 if stage.device == "cuda" else workers or usable_cores()
    return _side_by_side(stage, stage.make_worker(), iter(tiles), threads)


def find_device(engine: EngineName, workers: int | None = None) -> str:
    """``cuda`` if this machine, or the cluster as it is or may grow, has GPUs; else ``cpu``.

    Raises:
        InputError: if the cluster can never hold so many workers.
    """
    if engine == "local":
        return "cuda" if torch.cuda.is_available() else "cpu"
    connect(workers)
    device = "cuda" if cluster_size("GPU") >= 1 else "cpu"
    pool_size(device, workers)
    return device


def ask_gpu(question: Callable[[], Answer]) -> Answer:
    """Asks something on a machine of the connected cluster that has a GPU; waits until there is."""
    import ray

    answer: Answer = ray.get(ray.remote(num_gpus=1)(question).remote())
    return answer


def pool_size(device: str, workers: int | None) -> int:
    """How many workers to start on the connected cluster: those asked for, or all that fit.

    Raises:
        InputError: if it can never hold so many: Ray would wait for ever.
    """
    resource = "GPU" if device == "cuda" else "CPU"
    most = max(1, cluster_size(resource))
    if workers and workers > most:
        raise InputError(
            f"workers={workers} is more than this Ray cluster can hold: it has {most} {resource}s; "
            f"the most is {most}."
        )
    return workers or most


def cluster_size(resource: str) -> int:
    """How much of a resource (``CPU`` or ``GPU``) the cluster has, or can start machines for."""
    import ray
    from ray._private.state import state  # as Ray Train does: there is no public way to ask

    may_have = (state.get_max_resources_from_cluster_config() or {}).get(resource, 0)
    has = int(ray.cluster_resources().get(resource, 0))
    # A cluster without an upper bound says so with a huge number: then what is there counts.
    return max(has, int(may_have)) if may_have < UNBOUNDED else max(has, 1)


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
                f"RAY_ADDRESS={address}: cannot join that Ray ({str(error).splitlines()[0]}); a "
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
        object_store_memory=OBJECT_STORE_BYTES,
    )
    threading.Thread(target=_tell_end_of_ray, name="raylet", daemon=True).start()


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


def _attempt(worker: Worker, tile: int, alone: AbstractContextManager[Any]) -> Receipt:
    """Read, predict, write; a failure becomes a receipt that says what happened."""
    start = time.monotonic()
    try:
        voxels = worker.read(tile)
        with alone:
            result = worker.predict(tile, voxels)
        worker.write(tile, result)
    except Exception as error:  # not swallowed: the driver decides, and shows it
        trace = traceback.format_exc()
        return Receipt(tile, time.monotonic() - start, _told(error), trace, _verdict(error))
    return Receipt(tile, time.monotonic() - start)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, UnetRayError) else f"{type(error).__name__}: {error}"


def _verdict(error: Exception) -> Verdict:
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return "stop"
    return "never" if isinstance(error, VoxelError | DeadlyError) else "again"


def _side_by_side(
    stage: Stage, worker: Worker, tiles: Iterator[int], threads: int
) -> Iterator[Receipt]:
    """Runs tiles on threads of this process, as many at a time as there are threads."""
    # On a GPU one pass runs at a time, while the other thread reads or writes its tile.
    alone = threading.Lock() if stage.device == "cuda" else nullcontext()
    waiting: set[Future[Receipt]] = set()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    patient = True
    try:
        while True:
            for tile in itertools.islice(tiles, threads - len(waiting)):
                waiting.add(pool.submit(_attempt, worker, tile, alone))
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except KeyboardInterrupt:
        patient = False
        raise
    finally:
        pool.shutdown(wait=patient, cancel_futures=True)


class _Marking:
    """A worker that marks what it begins: Ray tries a tile that kills its actor without end."""

    def __init__(self, worker: Worker, begun: Path) -> None:
        self._worker, self._begun = worker, begun

    def read(self, tile: int) -> Any:
        with open(self._begun / str(tile), "ab") as mark:
            deaths = mark.tell()
            if deaths >= TRIES:
                raise DeadlyError(
                    f"was begun {deaths} times and never ended: its workers were killed, as by a "
                    "lack of memory; give fewer --workers, or machines with more memory."
                )
            mark.write(b".")
        return self._worker.read(tile)

    def predict(self, tile: int, voxels: Any) -> Any:
        return self._worker.predict(tile, voxels)

    def write(self, tile: int, result: Any) -> None:
        self._worker.write(tile, result)
        (self._begun / str(tile)).unlink(missing_ok=True)


class _TileActor:
    """A worker in a Ray actor. It reads, predicts and writes: only receipts leave it."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._worker = stage, stage.make_worker()
        if stage.begun:
            self._worker = _Marking(self._worker, stage.begun)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        tiles = [int(tile) for tile in batch["tile"]]
        if self._stage.device == "cuda":
            receipts = list(_side_by_side(self._stage, self._worker, iter(tiles), threads=2))
        else:
            # No threads of our own: the convolution library keeps buffers for each it has seen.
            torch.set_num_threads(1)
            receipts = [_attempt(self._worker, tile, nullcontext()) for tile in tiles]
        return {name: [getattr(r, name) for r in receipts] for name in _COLUMNS}


def _run_ray(stage: Stage, tiles: Iterator[int], workers: int | None) -> Iterator[Receipt]:
    import ray
    from ray.data import ActorPoolStrategy

    connect(workers)
    gpu = stage.device == "cuda"
    size = pool_size(stage.device, workers)
    batch = TILES_PER_GPU_BATCH if gpu else 1
    while wave := list(itertools.islice(tiles, WAVE)):
        blocks = -(-len(wave) // batch)
        # `from_items`, not `range`, whose read tasks take a whole CPU each and starve the actors.
        numbers = ray.data.from_items([{"tile": t} for t in wave], override_num_blocks=blocks)
        receipts = numbers.map_batches(
            _TileActor,
            fn_constructor_args=(stage,),
            batch_size=batch,
            compute=ActorPoolStrategy(size=min(size, blocks)),
            num_cpus=CPUS_PER_ACTOR,
            num_gpus=1 if gpu else None,
            runtime_env={"env_vars": kept_memory_environment()},
        )
        for rows in receipts.iter_batches(batch_size=None, prefetch_batches=0):
            for row in zip(*(rows[name].tolist() for name in _COLUMNS), strict=True):
                yield Receipt(*row)


_COLUMNS = tuple(field.name for field in fields(Receipt))
