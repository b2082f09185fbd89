"""Who runs the tiles: a loop with threads in this process, or an actor pool of Ray Data.

Knows a stage (a name and how to make its worker) and tile numbers; does not know what a tile is
about. Both engines try tiles in the same way with the same worker class and yield one receipt per
tile, in any order, so they cannot differ in what they compute.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import statistics
import sys
import threading
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from unet_ray.attempts import (
    MOST_SECONDS,
    SEEN,
    TICK,
    Clock,
    Deadline,
    Guarded,
    Patience,
    Receipt,
    Stage,
    TryOne,
    Worker,
    attempt,
    failure,
    made_in_time,
)
from unet_ray.errors import InputError, RunError
from unet_ray.memory import format_bytes, give_back_freed_memory, kept_memory_environment
from unet_ray.places import Place, remove_below

EngineName = Literal["local", "ray"]
Answer = TypeVar("Answer")
Receipts = Generator[Receipt, None, None]
# How long one waits for tiles that are under way when no more are wanted.
GRACE_SECONDS = 5.0
# Tile numbers go to Ray in waves of blocks, so that the driver's memory does not grow with the
# volume. Between two blocks a worker idles for some 50 ms, and one driver feeds some tens of blocks
# a second, so a block is at least so much work; what a tile takes is measured in a first wave. Each
# wave begins with new actors, so it is to last long enough, however many they are. Where tiles take
# longer than those before, as tissue after empty background, a block ends early, and what is left
# of it goes with the next wave.
WAVE, FIRST_WAVE = 4096, 512
BLOCK_SECONDS, WAVE_SECONDS, LARGEST_BLOCK = 2.0, 600.0, 512
# Below one, so that Ray always finds room for its own reading and writing beside the actors.
CPUS_PER_ACTOR = 0.9
# So many a worker at least, where there are tiles enough: else some would wait for the last one.
BLOCKS_EACH = 4
# A GPU waits at the end of a block, so its blocks are long from the first.
TILES_PER_GPU_BLOCK = 32
# Only tile numbers and receipts cross the object store while segmenting.
OBJECT_STORE_BYTES = 1 << 30
UNBOUNDED = {"CPU": 1 << 20, "GPU": 1 << 20, "memory": 1 << 60}
ASK_SECONDS = 30  # between two looks whether there is an answer
THREAD = "tile"  # the name of each thread that a tile may keep busy
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


def run(
    stage: Stage,
    tiles: Iterable[int],
    engine: EngineName,
    workers: int | None = None,
    alone: bool = False,
) -> Receipts:
    """Runs `tiles` of a stage and yields a receipt for each as it is done.

    Who stops before the end closes it, or what is under way goes on unheard. A tile that was given
    up may be told of twice, the second time as done.

    Args:
        stage: what to do.
        tiles: which tiles.
        engine: who does it.
        workers: how many side by side; by default one per core, or one per GPU.
        alone: one tile at a time, by one fresh worker.

    Raises:
        RunError: if tile after tile hangs and none ends, or so many that they fill the memory.
    """
    if engine == "ray":
        return _run_ray(stage, iter(tiles), 1 if alone else workers, alone)
    if alone:
        give_back_freed_memory()
        if stage.device == "cuda":
            torch.cuda.empty_cache()
    threads = 1 if alone else _threads(stage, workers)
    try_one = partial(attempt, _worker_of(stage))
    return _side_by_side(try_one, stage.device, stage.deadline, iter(tiles), threads)


def _threads(stage: Stage, workers: int | None) -> int:
    return stage.under_way if stage.device == "cuda" else workers or usable_cores()


def side_by_side(device: str, engine: EngineName, workers: int | None, memory: int = 0) -> int:
    """How many tiles a run predicts at a time: one on each core or GPU, unless told otherwise.

    On Ray no more than the cluster has memory for, at so many bytes each.
    """
    if engine == "ray":
        return pool_size(device, workers, memory)
    return 1 if device == "cuda" else workers or usable_cores()


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
    task = ray.remote(num_cpus=CPUS_PER_ACTOR, num_gpus=int(device == "cuda"))
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
    most, has = _most(device, memory)
    asked = workers or 1
    if asked > most:
        remedy = f"the most is {most}" if most else "give a smaller --memory and another --out"
        raise InputError(
            f"workers={asked} is more than this Ray cluster can hold: it has {has}; {remedy}."
        )
    return workers or most


def _most(device: str, memory: int) -> tuple[int, str]:
    """How many workers the cluster holds, and what of it says so."""
    resource = "GPU" if device == "cuda" else "CPU"
    most = max(1, cluster_size(resource))
    there = cluster_size("memory")
    if not memory or not there or _may_grow() or there // memory >= most:
        return most, f"{most} {resource}s"
    each = f"each worker needs {format_bytes(memory)}"
    return there // memory, f"{format_bytes(there)} of memory, and {each}"


def _may_grow() -> bool:
    """Whether machines may come whose memory nobody knows yet."""
    import ray

    has = ray.cluster_resources()
    return any(_may_have(resource) > has.get(resource, 0) for resource in ("CPU", "GPU"))


def cluster_size(resource: str) -> int:
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
        object_store_memory=OBJECT_STORE_BYTES,
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


def _worker_of(stage: Stage) -> Worker:
    """The worker of a stage, made in time: it reads the model, and opens input and output."""
    made: SimpleQueue[Worker | Exception] = SimpleQueue()

    def make() -> None:
        try:
            made.put(stage.make_worker())
        except Exception as error:  # raised below, where it is awaited
            made.put(error)

    threading.Thread(target=make, name=THREAD, daemon=True).start()
    try:
        worker = made.get(timeout=min(stage.deadline.make, threading.TIMEOUT_MAX))
    except Empty:
        raise RunError(
            f"{stage.name}: no worker could be made within {stage.deadline.make:.0f} s; see "
            "whether input, model and output answer; the same command goes on."
        ) from None
    if isinstance(worker, Exception):
        raise worker
    return worker


def has_left_threads() -> bool:
    """Whether tiles may still be under way in this process, of which nobody wants to hear."""
    threads = [thread for thread in threading.enumerate() if thread.name == THREAD]
    for thread in threads:
        thread.join(0.1)  # those that are told to end do so at once
    return any(thread.is_alive() for thread in threads)


class _Hand:
    """A thread that tries one tile after another, as they are handed to it."""

    def __init__(self, try_one: Callable[[int], Receipt], ended: SimpleQueue[Any]) -> None:
        self._try, self._ended = try_one, ended
        self._tiles: SimpleQueue[int | None] = SimpleQueue()
        threading.Thread(target=self._work, name=THREAD, daemon=True).start()

    def take(self, tile: int | None) -> None:
        """Hands it a tile, or lets it go with None."""
        self._tiles.put(tile)

    def _work(self) -> None:
        torch.set_num_threads(1)
        while (tile := self._tiles.get()) is not None:
            try:
                receipt = self._try(tile)
            except Exception as error:  # nobody would ever hear of this tile
                receipt = failure(tile, 0.0, error)
            self._ended.put((self, receipt))


class _SideBySide:
    """Tries tiles on threads of this process, as many at a time as there are threads.

    A try that takes too long is given up with its thread, since a thread cannot be ended, and
    another takes the next tile; should it end after all, that is told in a second receipt. When
    that happens again and again and no try ends in between, nothing works any more.
    """

    def __init__(
        self,
        try_one: Callable[[int], Receipt],
        deadline: Deadline,
        tiles: Iterator[int],
        threads: int,
    ) -> None:
        self._try, self._tiles, self._threads = try_one, tiles, threads
        self._patience, self._clock = Patience(deadline), Clock()
        self._ended: SimpleQueue[tuple[_Hand, Receipt]] = SimpleQueue()
        self._idle: list[_Hand] = []
        self._busy: dict[_Hand, tuple[int, float]] = {}
        self._lost: set[_Hand] = set()
        self._in_a_row = 0  # tries given up since one ended

    def receipts(self) -> Receipts:
        """A receipt for each tile, as it ends."""
        try:
            while self._hand_out():
                told = self._await(min(TICK, self._patience.limit / 4))
                yield from [*told, *self._give_up_late()]
                self._refuse_to_hang()
        except GeneratorExit:
            end = time.monotonic() + GRACE_SECONDS  # what is under way may just end
            while self._busy and (left := end - time.monotonic()) > 0:
                self._await(left)
            raise
        finally:
            for hand in [*self._idle, *self._busy, *self._lost]:
                hand.take(None)

    def _hand_out(self) -> bool:
        """Gives every idle thread a tile; whether any is busy then."""
        for tile in itertools.islice(self._tiles, self._threads - len(self._busy)):
            hand = self._idle.pop() if self._idle else _Hand(self._try, self._ended)
            self._busy[hand] = tile, self._clock.now()
            hand.take(tile)
        return bool(self._busy)

    def _await(self, seconds: float) -> list[Receipt]:
        """What has ended since; waits so long for the first."""
        told = []
        with suppress(Empty):
            while True:
                hand, receipt = self._ended.get(timeout=seconds)
                seconds, self._in_a_row = 0.0, 0
                self._patience.saw(receipt)
                if self._busy.pop(hand, None):
                    self._idle.append(hand)
                    told.append(receipt)
                else:
                    self._lost.remove(hand)
                    hand.take(None)
                    told += [] if receipt.error else [receipt]
        return told

    def _give_up_late(self) -> list[Receipt]:
        now, limit = self._clock.now(), self._patience.limit
        late = {hand: told for hand, told in self._busy.items() if now - told[1] > limit}
        for hand in late:
            del self._busy[hand]
            self._lost.add(hand)
            self._in_a_row += 1
        return [
            Receipt(tile, now - begun, f"did not end within {limit:.0f} s.")
            for tile, begun in late.values()
        ]

    def _refuse_to_hang(self) -> None:
        if self._in_a_row >= 2 * max(2, self._threads):
            reason = "and none ended in between"
        elif len(self._lost) > 8 * self._threads:
            reason = "and each keeps its memory"
        else:
            return
        raise RunError(
            f"{len(self._lost)} tiles hang, {reason} (each may take {self._patience.limit:.0f} s): "
            "see whether input and output answer; what is done stays, the same command goes on."
        )


def _side_by_side(
    try_one: TryOne, device: str, deadline: Deadline, tiles: Iterator[int], threads: int
) -> Receipts:
    # On a GPU one pass runs at a time, while the other thread reads or writes its tile.
    alone = threading.Lock() if device == "cuda" else nullcontext()
    return _SideBySide(lambda tile: try_one(tile, alone), deadline, tiles, threads).receipts()


class _TileActor:
    """A worker in a Ray actor. It reads, predicts and writes: only receipts leave it."""

    def __init__(self, stage: Stage) -> None:
        self._gpu, self._under_way = stage.device == "cuda", stage.under_way
        with made_in_time(stage.marks, _name()) if stage.marks else nullcontext():
            self._try: TryOne = partial(attempt, _worker_of(stage))
        self._guard: Guarded | None = None
        if stage.marks:
            self._guard = Guarded(self._try, stage.marks, stage.deadline)
            self._try = self._guard.attempt

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (block,) = batch["tiles"]
        tiles = [int(tile) for tile in block.split(",")]
        if self._guard:
            self._guard.take(tiles)
        receipts = self._on_gpu(tiles) if self._gpu else self._on_cpu(tiles)  # of those in time
        return {name: [getattr(r, name) for r in receipts] for name in _COLUMNS}

    def _on_cpu(self, tiles: list[int]) -> list[Receipt]:
        # No threads of our own: the convolution library keeps buffers for each it has seen.
        torch.set_num_threads(1)
        return [self._try(tile, nullcontext()) for tile in _in_time(tiles)]

    def _on_gpu(self, tiles: list[int]) -> list[Receipt]:
        # A tile that may have ended its process is tried with nothing beside it.
        first = [tile for tile in tiles if self._guard and self._guard.is_suspect(tile)]
        others = _in_time([tile for tile in tiles if tile not in first])
        # The guard of the actor keeps the time.
        rest = _side_by_side(
            self._try, "cuda", Deadline(math.inf, math.inf, math.inf), others, self._under_way
        )
        return [*(self._try(tile, nullcontext()) for tile in first), *rest]


def _name() -> str:
    """Of this actor, the same when Ray starts it anew."""
    import ray

    return ray.get_runtime_context().get_actor_id() if ray.is_initialized() else str(os.getpid())


def _in_time(tiles: Sequence[int]) -> Iterator[int]:
    """The first tile, and others as long as there is time for more."""
    end = time.monotonic() + MOST_SECONDS
    return itertools.takewhile(lambda tile: tile == tiles[0] or time.monotonic() < end, tiles)


def _run_ray(stage: Stage, tiles: Iterator[int], workers: int | None, alone: bool) -> Receipts:
    import ray.data  # noqa: F401  # first: it says how loud it is, which `connect` says after it

    connect(workers)
    most, _ = _most(stage.device, stage.memory)  # a machine may be lost between two rounds
    size = max(1, min(workers or most, most))
    goal = min(MOST_SECONDS, max(BLOCK_SECONDS, WAVE_SECONDS * size / WAVE))
    few = 1 if alone else _tiles_of_gpu(stage.device)
    seconds: list[float] = []
    left = np.empty(0, np.int64)
    while True:
        count = few * (WAVE if seconds else min(WAVE, FIRST_WAVE))
        more = np.fromiter(itertools.islice(tiles, max(0, count - left.size)), np.int64)
        wave, left = np.concatenate([left[:count], more]), left[count:]
        if not wave.size:
            return
        told = array("q")
        for receipt in _run_wave(stage, _blocks(wave, few, size), size):
            told.append(receipt.tile)
            seconds = seconds if receipt.error else [*seconds[-SEEN:], receipt.seconds]
            yield receipt
        if not told:
            raise RunError(f"{stage.name}: Ray has lost {wave.size} tiles; give the command again.")
        left = np.concatenate([np.setdiff1d(wave, np.frombuffer(told, np.int64)), left])
        if stage.marks:
            _forget(stage.marks)
        if seconds and not alone:
            few = max(_tiles_of_gpu(stage.device), _tiles_for(goal, seconds))


class _Silence:
    """Ends a wave of which nothing is heard for too long; an `ExecutionCallback` of Ray Data.

    A worker ends itself when a tile takes too long, but not if it is frozen, or if a disk never
    lets it go; and where none can even begin, none counts. What a step of Ray's loop raises is
    raised where receipts are awaited.
    """

    patience: Patience  # of the wave of this process
    clock: Clock
    heard: float

    @classmethod
    def begin(cls, deadline: Deadline) -> None:
        """Begins to wait for a wave."""
        cls.patience, cls.clock, cls.heard = Patience(deadline), Clock(), 0.0

    @classmethod
    def end(cls, receipt: Receipt) -> None:
        """Something was heard."""
        cls.patience.saw(receipt)
        cls.heard = cls.clock.now()

    def on_execution_step(self, executor: object) -> None:
        """Looks at the clock.

        Raises:
            RunError: if it is too long.
        """
        silent = self.clock.now() - self.heard
        if silent > self.patience.silence:
            raise RunError(
                f"no tile has ended for {silent:.0f} s: see whether workers can start, and whether "
                "input and output answer; what is done stays, the same command goes on."
            )

    def before_execution_starts(self, executor: object) -> None:
        """Nothing."""

    def after_execution_succeeds(self, executor: object) -> None:
        """Nothing."""

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        """Nothing."""


@contextmanager
def _ended_by_silence(stage: Stage) -> Iterator[None]:
    """A wave may last as long as something is heard of it now and then."""
    from ray.data import DataContext

    classes: list[Any] = DataContext.get_current().custom_execution_callback_classes
    _Silence.begin(stage.deadline)
    classes.append(_Silence)
    try:
        yield
    finally:
        classes.remove(_Silence)


def _run_wave(stage: Stage, wave: Sequence[Sequence[int]], size: int) -> Receipts:
    """Receipts of the tiles that some blocks had time for."""
    import ray
    from ray.data import ActorPoolStrategy

    with _ended_by_silence(stage) if stage.marks else nullcontext():
        # `from_items`, not `range`, whose read tasks take a whole CPU each and starve the actors.
        blocks = ray.data.from_items(
            [{"tiles": ",".join(map(str, block))} for block in wave], override_num_blocks=len(wave)
        )
        receipts = blocks.map_batches(
            _TileActor,
            fn_constructor_args=(stage,),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(size, len(wave))),
            num_cpus=CPUS_PER_ACTOR,
            num_gpus=1 if stage.device == "cuda" else None,
            runtime_env={"env_vars": kept_memory_environment()},
        )
        try:
            for rows in receipts.iter_batches(batch_size=None, prefetch_batches=0):
                for row in zip(*(rows[name].tolist() for name in _COLUMNS), strict=True):
                    receipt = Receipt(*row)
                    if stage.marks:
                        _Silence.end(receipt)
                    yield receipt
        except ray.exceptions.RayError as error:  # of a worker that could not be made, mostly
            raise RunError(_cause(error)) from error


def _forget(marks: Place) -> None:
    """Removes the marks of blocks that are all done, of which nobody will ask again."""
    with suppress(OSError):  # they stay true
        remove_below(marks)


def _cause(error: Exception) -> str:
    """What Ray tells of an error of ours, without its traces, which come before."""
    lines = str(error).strip().splitlines()
    named = (n for n, line in enumerate(lines) if _ERROR.match(line))
    told = " ".join(line.strip() for line in lines[max(named, default=-1) :])
    return re.sub(r"^unet_ray\.errors\.\w+: ", "", told)


def _tiles_of_gpu(device: str) -> int:
    return TILES_PER_GPU_BLOCK if device == "cuda" else 1


def _blocks(wave: NDArray[np.int64], size: int, workers: int) -> list[list[int]]:
    """A wave in blocks of at most so many tiles, and some a worker."""
    size = max(1, min(size, math.ceil(wave.size / (BLOCKS_EACH * workers))))
    return [wave[first : first + size].tolist() for first in range(0, wave.size, size)]


def _tiles_for(goal: float, seconds: Sequence[float]) -> int:
    """How many tiles take so many seconds, as far as a block goes."""
    usual = statistics.median(seconds)
    return min(LARGEST_BLOCK, math.ceil(goal / max(usual, goal / LARGEST_BLOCK)))


_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt): ")
_COLUMNS = tuple(field.name for field in fields(Receipt))
