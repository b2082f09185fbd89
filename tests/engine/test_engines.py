"""Both engines: each tile once, failures in receipts, the same bytes, and no loss by a kill."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helper import (
    FLOAT32,
    Marker,
    Slow,
    Watching,
    bytes_of,
    marked,
    noise,
    random_model,
    stage,
    write_stack,
    written,
)
from unet_ray.engine import attempts, cluster, engines, pool
from unet_ray.engine import threads as loop
from unet_ray.engine.attempts import TRIES, Clock, Timeouts, is_out_of_memory
from unet_ray.engine.engines import run
from unet_ray.engine.stages import Deadline, Receipt, Stage
from unet_ray.errors import InputError, QuarantinedError, RunError, VoxelError
from unet_ray.segmentation.outlook import plan
from unet_ray.segmentation.preparation import prepare
from unet_ray.segmentation.segment import segment

ENGINES = ["local", pytest.param("ray", marks=pytest.mark.ray)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiles").mkdir()
    return tmp_path / "tiles"


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("name", ENGINES)
class TestBoth:
    def test_every_tile_gives_one_receipt_which_reports_a_failure(self, folder, name):
        bad = {
            ("read", 2): VoxelError("a.tif: voxel 7 is NaN."),
            ("predict", 4): ValueError("no such size"),
            ("write", 35): OSError(28, "No space left on device"),
        }
        tiles = [3, 1, 4, 15, 9, 2, 35, 5]
        receipts = list(run(stage(folder, bad=bad), iter(tiles), name, 2))
        assert sorted(r.tile for r in receipts) == sorted(tiles)
        assert {r.tile: (r.error, r.verdict) for r in receipts if r.error} == {
            2: ("a.tif: voxel 7 is NaN.", "never"),
            4: ("ValueError: no such size", "again"),
            35: ("OSError: [Errno 28] No space left on device", "stop"),
        }
        traces = {r.tile: r.trace for r in receipts}
        assert "in predict" in traces[4] and "ValueError: no such size" in traces[4]
        assert traces[3] == ""
        assert written(folder) == Counter([3, 1, 15, 9, 5])
        assert all(r.seconds >= 0 for r in receipts)

    def test_no_tiles_give_no_receipts(self, folder, name):
        assert list(run(stage(folder), [], name, 2)) == []


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(
    "name", ["local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]
)
def test_closing_early_stops(folder, name):
    receipts = run(stage(folder), range(400), name, 2)
    assert next(receipts).error == ""
    receipts.close()
    time.sleep(0.5)  # tiles in flight may still end
    done = written(folder).total()
    assert 0 < done < 300
    time.sleep(1)
    assert written(folder).total() == done


# Only the local engine


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_is_the_number_of_tiles_at_once(workers):
    worker = Watching(together=workers)
    receipts = list(run(Stage("watch", lambda: worker, "cpu"), range(20), "local", workers))
    assert [r.error for r in receipts] == [""] * 20
    assert worker.most["tile"] == workers


def test_one_tile_per_core_by_default(monkeypatch):
    monkeypatch.setattr(cluster, "usable_cores", lambda: 3)
    worker = Watching(together=3)
    receipts = list(run(Stage("watch", lambda: worker, "cpu"), range(12), "local"))
    assert [r.error for r in receipts] == [""] * 12
    assert worker.most["tile"] == 3


def test_a_gpu_predicts_one_tile_while_it_reads_or_writes_others():
    worker = Watching()
    list(run(Stage("watch", lambda: worker, "cuda", in_flight=3), range(20), "local", 7))
    assert (worker.most["predict"], worker.most["tile"]) == (1, 3)


def test_tiles_are_consumed_as_threads_become_free():
    worker = Watching()
    receipts = run(Stage("watch", lambda: worker, "cpu"), itertools.count(), "local", 2)
    assert {next(receipts).tile for _ in range(4)} <= set(range(6))
    receipts.close()
    count = len(worker.started)
    assert count <= 6 and worker.now["tile"] == 0  # none is still in flight
    time.sleep(0.1)
    assert len(worker.started) == count


def test_one_worker_is_made_for_all_threads(folder):
    made = []

    def make():
        made.append(1)
        return Marker(str(folder))

    list(run(Stage("mark", make, "cpu"), range(6), "local", 3))
    assert made == [1]


SOON = Deadline(first=1.5, multiple=5, least=0.5)


def test_a_tile_that_hangs_is_given_up_and_the_others_are_done(folder):
    hanging = dataclasses.replace(stage(folder, hanging=[5]), deadline=SOON)
    start = time.monotonic()
    receipts = list(run(hanging, range(8), "local", 2))
    assert time.monotonic() - start < 20
    assert [(r.tile, r.verdict, r.error[:18]) for r in receipts if r.error] == [
        (5, "again", "did not end within")
    ]
    assert set(written(folder)) == set(range(8)) - {5}


def test_two_tiles_that_hang_at_once_are_given_up_and_the_others_are_done(folder):
    hanging = dataclasses.replace(stage(folder, hanging=[4, 5]), deadline=SOON)
    receipts = list(run(hanging, range(8), "local", 2))
    assert sorted(r.tile for r in receipts if r.error) == [4, 5]
    assert set(written(folder)) == set(range(8)) - {4, 5}


def test_a_run_in_which_all_tiles_hang_ends(folder):
    hanging = dataclasses.replace(stage(folder, hanging=range(8)), deadline=SOON)
    with pytest.raises(
        RunError, match=r"4 tiles hang, and none finished in between \(limit for one: 2 s\)"
    ):
        list(run(hanging, range(8), "local", 2))


def slowly(seconds, first):
    worker = Slow(seconds)
    return worker, Stage("slow", lambda: worker, "cpu", deadline=Deadline(first, 5, 0.3))


def test_tiles_that_end_after_their_deadline_are_reported_and_the_deadline_grows():
    worker, overdue = slowly(lambda tile: 1.0, first=0.7)
    receipts = list(run(overdue, range(12), "local", 2))
    assert 0 < len([r for r in receipts if r.error]) < 8
    assert sorted(r.tile for r in receipts if not r.error) == sorted(worker.ended)
    assert len(worker.ended) >= 10  # the last ones may end unreported


def test_a_slow_caller_causes_no_timeout():
    _, quick = slowly(lambda tile: 0.05, first=0.5)
    for receipt in run(quick, range(8), "local", 4):
        time.sleep(0.6)
        assert receipt.error == ""


def test_a_caller_that_stops_does_not_wait_for_a_tile_that_hangs(monkeypatch):
    monkeypatch.setattr(loop, "GRACE_SECONDS", 0.5)
    _, hanging = slowly(lambda tile: 60 * (tile > 0), first=3600)
    start = time.monotonic()
    with closing(run(hanging, range(2), "local", 2)) as receipts:
        next(receipts)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("engine_name", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_worker_that_cannot_be_made_in_time_ends_the_run(engine_name):
    hanging = Stage("slow", partial(time.sleep, 60), "cpu", deadline=Deadline(make=0.3))
    start = time.monotonic()
    with pytest.raises(RunError, match=r"^slow: no worker started within 0 s\. Check that"):
        list(run(hanging, range(2), engine_name, 1))
    assert time.monotonic() - start < 45


@pytest.mark.parametrize(
    ("last", "cause"),
    [
        (["unet_ray.errors.RunError: a.zarr: is gone; do."], "a.zarr: is gone; do."),
        (["torch.AcceleratorError: CUDA error", "Compile with X"],
         "torch.AcceleratorError: CUDA error Compile with X"),
    ],
)  # fmt: skip
def test_the_original_error_is_extracted_from_the_message_of_ray(last, cause):
    trace = ["The actor died", '  File "a.py", line 1', "    raise ValueError: no"]
    assert pool._cause(Exception("\n".join([*trace, *last]))) == cause


def test_a_worker_that_cannot_be_made_raises_its_error():
    def fails():
        raise InputError("no such model")

    with pytest.raises(InputError, match="no such model"):
        run(Stage("broken", fails, "cpu"), range(2), "local", 1)


class UnspeakableError(Exception):
    def __str__(self):
        raise MemoryError


def test_an_error_without_a_printable_message_is_a_failure_too(folder):
    bad = {("read", 0): UnspeakableError()}
    receipts = list(run(stage(folder, bad=bad), range(3), "local", 1))
    assert [(r.tile, r.verdict) for r in receipts] == [(0, "alone"), (1, "again"), (2, "again")]
    assert [r.error for r in receipts] == ["MemoryError: ", "", ""]


GUARDED = """
import sys, threading, time
from pathlib import Path
from unet_ray.engine import guard as guard_module
from unet_ray.engine.stages import STEPS, Deadline
guard_module.NOTE_SECONDS = 0.5
steps = {"hangs": lambda *arguments: time.sleep(60), "fails": lambda *arguments: 1 / 0}
add = guard_module.Marks.add
if sys.argv[2] == "before":
    guard_module.Marks.before = steps[sys.argv[3]]
guard_module.Marks.add = lambda self, mark: (
    steps[sys.argv[3]](mark) if mark.event == sys.argv[2] else add(self, mark)
)
guard = guard_module.Guard(Path(sys.argv[1]), STEPS, Deadline(1, 1, 1))
guard.run(7, guard.marks_of(7), lambda: time.sleep(60))
"""


@pytest.mark.parametrize(
    ("step", "how"), [("begun", "hangs"), ("late", "hangs"), ("late", "fails"), ("before", "hangs")]
)
def test_a_guard_ends_its_process_even_if_marks_fail(folder, step, how):
    ended = subprocess.run(
        [sys.executable, "-c", GUARDED, str(folder), step, how],
        capture_output=True,
        timeout=40,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL


def test_a_failed_gpu_has_its_own_verdict(folder):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    [receipt] = run(stage(folder, bad={("predict", 3): error}), [3], "local", 1)
    assert receipt.verdict == "broken"


@pytest.mark.parametrize(
    ("seconds", "limit"), [([], 100), ([9, 9], 100), ([1, 1, 1], 30), ([1, 8, 9], 80)]
)
def test_the_deadline_is_a_multiple_of_the_median(seconds, limit):
    timeouts = Timeouts(Deadline(first=100, multiple=10, least=30))
    for number in seconds:
        timeouts.record(Receipt(0, number))
        timeouts.record(Receipt(0, 1e6, "a failure"))
    assert timeouts.limit == limit


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch):
    times, real, this = iter([0.0, 1.0, 5000.0, 5001.0]), time.monotonic, threading.get_ident()

    def monotonic():  # threads of earlier tests still look at the clock
        return next(times) if threading.get_ident() == this else real()

    monkeypatch.setattr("unet_ray.engine.attempts.time.monotonic", monotonic)
    clock = Clock()
    assert [clock.now() for _ in range(3)] == [1.0, 3.0, 4.0]


OUT_OF_MEMORY = [
    MemoryError(),
    np.exceptions.AxisError("x"),  # unrelated to memory
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_a_lack_of_memory_has_its_own_verdict(folder, error):
    [receipt] = run(stage(folder, bad={("predict", 3): error}), [3], "local", 1)
    other = isinstance(error, np.exceptions.AxisError)
    assert (receipt.verdict, receipt.room > 1 << 24) == (
        ("again", False) if other else ("alone", True)
    )


def test_the_out_of_memory_error_of_torch_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_alone_means_one_tile_at_a_time(monkeypatch):
    monkeypatch.setattr(cluster, "usable_cores", lambda: 3)
    for device in ("cpu", "cuda"):
        worker = Watching()
        assert (
            len(list(run(Stage("w", lambda w=worker: w, device), range(6), "local", 3, True))) == 6
        )
        assert worker.most["tile"] == 1


def test_memory_is_reserved_unless_it_has_run_out(monkeypatch):
    reserved = []
    monkeypatch.setattr(engines, "reserve_memory", reserved.append)
    for alone in (False, True):
        assert (
            len(list(run(Stage("w", Watching, "cpu", reserve=7), [0, 1], "local", 1, alone))) == 2
        )
    assert reserved == [7]


# The resources of a cluster


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_memory_of_the_cluster_limits_the_workers():
    memory = cluster.size_of("memory")
    assert memory > 1 << 30
    assert [cluster.pool_size("cpu", None, memory // n) for n in (1, 2, 9)] == [1, 2, 2]
    assert cluster.pool_size("cpu", None) == 2 and cluster.pool_size("cpu", 1, memory // 2) == 1
    with pytest.raises(
        InputError, match=r"workers=2 is more .* each worker needs .* maximum is 1\."
    ):
        cluster.pool_size("cpu", 2, memory)
    with pytest.raises(InputError, match=r"workers=1 is more .* pass a smaller --memory"):
        cluster.pool_size("cpu", None, 2 * memory)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_worker_must_fit_into_the_memory_of_one_machine(monkeypatch):
    import ray

    machines = [({"CPU": 4, "memory": n << 30}, n < 99) for n in (5, 5, 2, 99)] + [({}, True)]
    nodes = [{"Resources": resources, "Alive": alive} for resources, alive in machines]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster, "size_of", {"CPU": 12, "memory": 12 << 30}.get)
    assert [cluster.max_workers("cpu", n << 30)[0] for n in (1, 2, 3, 6)] == [12, 5, 2, 0]
    assert cluster.memory_request(3 << 30) == {"memory": 3 << 30}
    assert cluster.memory_request(0) == cluster.memory_request(6 << 30) == {}
    monkeypatch.setattr(cluster, "_may_grow", lambda: True)  # by machines of unknown memory
    assert cluster.memory_request(3 << 30) == {}


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("memory", [0.0, 2.0**30, 2.0**62])
@pytest.mark.parametrize(("more", "device", "workers"), [("CPU", "cpu", 64), ("GPU", "cuda", 64)])
def test_machines_that_have_not_started_may_have_any_memory(
    monkeypatch, memory, more, device, workers
):
    monkeypatch.setattr(
        cluster, "_may_have", {"CPU": 2.0, "GPU": 0.0, "memory": memory, more: 64.0}.get
    )
    assert cluster.pool_size(device, None, 1 << 50) == workers


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_cluster_that_does_not_report_its_memory_may_have_enough(monkeypatch):
    monkeypatch.setattr(cluster, "size_of", {"CPU": 3, "GPU": 0, "memory": 0}.get)
    assert cluster.pool_size("cpu", None, 1 << 50) == 3


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_function_is_called_where_the_workers_will_run(monkeypatch):
    from ray._private import worker

    process = partial(os.getpid)  # a partial, as runs pass it
    assert cluster.ask(process, "cpu", "local") == os.getpid()
    assert cluster.ask(process, "cpu", "ray") == os.getpid()  # Ray of this process
    monkeypatch.setattr(worker._global_node, "head", False)  # Ray of another process
    assert cluster.ask(process, "cpu", "ray") != os.getpid()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_function_that_no_machine_can_call_is_reported_and_given_up(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "POLL_SECONDS", 1)
    monkeypatch.setattr(Deadline, "make", 2.0)
    with pytest.raises(RunError, match="no machine of this Ray cluster had a free GPU within 2 s"):
        cluster.ask(os.getpid, "cuda", "ray")
    assert capsys.readouterr().err.count("waiting for a machine with a free GPU") == 1


# Ray compared with the local engine


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A volume, a model, settings, and the store that the local engine writes for them."""
    folder = tmp_path_factory.mktemp("task")
    volume = write_stack(folder / "volume.tif", noise((3, 61, 75)))
    model = random_model(folder / "model.safetensors")
    settings = dataclasses.replace(FLOAT32, tile=(1, 32, 40))
    return volume, model, settings, segment(volume, model, folder / "local", settings)


def test_the_number_of_local_workers_changes_no_byte(task, tmp_path):
    volume, model, settings, local = task
    alone = dataclasses.replace(settings, workers=1)
    assert bytes_of(segment(volume, model, tmp_path / "one", alone)) == bytes_of(local)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_writes_the_same_bytes_as_the_local_engine(task, tmp_path):
    volume, model, settings, local = task
    on_ray = dataclasses.replace(settings, engine="ray", workers=1)
    seen = []
    store = segment(volume, model, tmp_path / "ray", on_ray, seen.append)
    assert [p.done for p in seen] == list(range(1, 13))
    assert bytes_of(store) == bytes_of(local)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_two_workers_of_ray_resume_a_run_of_the_local_engine(task, tmp_path):
    volume, model, settings, local = task
    first = prepare(volume, model, tmp_path / "both", settings).plan[3].write
    segment(volume, model, tmp_path / "both", dataclasses.replace(settings, region=first))
    on_ray = dataclasses.replace(settings, engine="ray", workers=2)
    seen = []
    store = segment(volume, model, tmp_path / "both", on_ray, seen.append)
    assert [p.done for p in seen] == list(range(2, 13))
    assert bytes_of(store) == bytes_of(local)


@pytest.mark.ray
@pytest.mark.slow
def test_a_new_process_resumes_with_ray(task, tmp_path):
    volume, model, settings, local = task
    first = prepare(volume, model, tmp_path / "both", settings).plan[3].write
    segment(volume, model, tmp_path / "both", dataclasses.replace(settings, region=first))
    flags = "--engine ray --workers 1 --tile 1,32,40 --precision float32"
    command = [sys.executable, "-m", "unet_ray", "segment", volume, "--model", model]
    ran = subprocess.run(
        [*command, *flags.split(), "--out", tmp_path / "both"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert "INFO" not in ran.stderr  # messages of Ray
    assert bytes_of(tmp_path / "both") == bytes_of(local)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_worker_loses_no_tile(folder, workers):
    receipts = list(run(stage(folder, deadly=5), range(12), "ray", workers))
    assert (folder / "killed").exists()
    assert sorted(r.tile for r in receipts) == list(range(12))
    assert [r.error for r in receipts if r.error] == []
    assert set(written(folder)) == set(range(12))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_tile_that_kills_every_worker_is_given_up_and_the_others_are_done(folder):
    receipts = list(run(marked(folder, deadly=5, deaths=99), range(8), "ray", 2))
    assert (folder / "killed").stat().st_size == TRIES
    assert [(r.tile, r.verdict) for r in receipts if r.error] == [(5, "never")]
    assert "was started 3 times and never finished" in next(r.error for r in receipts if r.error)
    assert set(written(folder)) == set(range(8)) - {5}
    assert not [*(folder / "marks").iterdir()]


class KilledAtTheEnd(Marker):
    """A worker that is killed once: after the driver has a tile's receipt, before Ray knows it."""

    def __init__(self, folder):
        from ray.data._internal.execution.operators import actor_pool_map_operator as operator

        super().__init__(folder)
        run_task = operator._map_task

        def killed_at_the_end(*args, **kwargs):
            yield from run_task(*args, **kwargs)
            while not Path(folder, "reported").exists():
                time.sleep(0.01)
            if not Path(folder, "killed").exists():
                Path(folder, "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        operator._map_task = killed_at_the_end


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_tile_is_never_done_again_after_the_driver_has_its_receipt(folder):
    killed = dataclasses.replace(marked(folder), make_worker=partial(KilledAtTheEnd, str(folder)))
    tiles = []
    for receipt in run(killed, range(6), "ray", 1):
        assert not receipt.error
        tiles.append(receipt.tile)
        (folder / "reported").touch()
    assert (folder / "killed").exists()
    assert sorted(tiles) == [*range(6)]
    assert written(folder) == dict.fromkeys(range(6), 1)
    assert not [*(folder / "marks").iterdir()]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_tile_that_hangs_ends_its_worker_and_the_others_are_done(folder):
    hanging = dataclasses.replace(marked(folder, hanging=[5]), deadline=SOON)
    receipts = list(run(hanging, range(8), "ray", 2))
    assert (folder / "hung").stat().st_size == TRIES
    assert [(r.tile, r.verdict) for r in receipts if r.error] == [(5, "never")]
    assert "exceeded its time limit 3 times" in next(r.error for r in receipts if r.error)
    assert set(written(folder)) == set(range(8)) - {5}


def dies_while_starting(folder):
    with open(Path(folder, "made"), "ab") as mark:
        mark.write(b".")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_always_dies_while_starting_ends_the_run(folder):
    deadly = dataclasses.replace(marked(folder), make_worker=partial(dies_while_starting, folder))
    with pytest.raises(RunError, match="died 3 times while starting"):
        list(run(deadly, range(4), "ray", 1))
    assert (folder / "made").stat().st_size == TRIES


class Frozen(Marker):
    """A worker whose process is stopped, with all its threads, at one tile."""

    def read(self, tile):
        if tile == 3:
            Path(self.folder, "frozen").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().read(tile)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_frozen_worker_ends_the_run_after_a_time_limit(folder, monkeypatch):
    monkeypatch.setattr(attempts, "MAX_BLOCK_SECONDS", 5.0)
    soon = Deadline(first=3, multiple=5, least=3, make=5)
    frozen = dataclasses.replace(
        marked(folder), make_worker=partial(Frozen, str(folder)), deadline=soon
    )
    start = time.monotonic()
    with pytest.raises(RunError, match=r"no tile has finished for \d+ s\. Check that workers"):
        list(run(frozen, range(8), "ray", 1))
    assert time.monotonic() - start < 60
    os.kill(int((folder / "frozen").read_text()), signal.SIGKILL)
    again = dataclasses.replace(marked(folder), deadline=soon)
    assert {r.tile for r in run(again, range(8), "ray", 1) if not r.error} == set(range(8))


@pytest.mark.parametrize(
    ("seconds", "tiles"), [([3.0], 1), ([0.4], 1), ([0.1, 0.1, 9], 4), ([0.15], 3), ([0.0], 512)]
)
def test_a_block_is_enough_work_for_the_driver_to_keep_up(seconds, tiles):
    assert pool._tiles_for(0.4, seconds) == tiles


@pytest.mark.parametrize(
    ("device", "in_flight", "together", "seconds", "workers", "tiles", "blocks"),
    [
        ("cpu", 1, 1, 0.5, 1, 4, 4096),
        ("cpu", 1, 1, 0.5, 200, 59, 1682),
        ("cuda", 1, 1, 0.5, 2, 1, 16384),
        ("cuda", 1, 3, 0.5, 2, 3, 16384),  # `together` limits the block
        ("cuda", 1, 9, 0.5, 2, 4, 16384),  # the work limits the block
        ("cuda", 4, 20, 1.0, 2, 8, 12436),  # tiles in flight wait for each other
    ],
)
def test_waves_have_enough_blocks_and_blocks_have_enough_work(
    monkeypatch, device, in_flight, together, seconds, workers, tiles, blocks
):
    """Sizes after the first wave, if every tile takes `seconds`."""
    waves = []

    def wave(stage, blocks, size, alone, silence):
        waves.append(blocks)
        return (Receipt(tile, seconds) for block in blocks for tile in block)

    monkeypatch.setattr(pool, "connect", lambda workers: None)
    monkeypatch.setattr(pool, "max_workers", lambda *arguments: (workers, ""))
    monkeypatch.setattr(pool, "_run_wave", wave)
    stage = Stage("mark", Marker, device, in_flight=in_flight, together=together)
    reported = Counter(r.tile for r in run(stage, range(100_000), "ray", workers))
    assert reported == dict.fromkeys(range(100_000), 1)
    assert len(waves[1][0]) == tiles and len(waves[1]) == blocks
    assert len(waves[0]) == max(pool.BLOCKS_PER_WORKER * workers, pool.FIRST_WAVE)
    assert {*map(len, waves[0])} == {1}


@pytest.mark.parametrize(("gpus", "helpers"), [(0, 2), (1, 2), (3, 6), (99, 16)])
def test_readers_and_writers_follow_the_number_of_present_gpus(monkeypatch, gpus, helpers):
    pools = []

    def map_blocks(blocks, actor, stage, size, resources, calls=1):
        pools.append((actor.__name__, size, calls, resources))

    monkeypatch.setattr(pool, "_map_blocks", map_blocks)
    monkeypatch.setattr(pool, "gpus_present", lambda: gpus)
    pool._on_gpus(None, Stage("mark", Marker, "cuda", in_flight=4), 8)
    assert pools == [
        ("Reader", helpers, 1, {"num_cpus": 0.01}),
        ("GpuActor", 8, 4, {"num_cpus": 0, "num_gpus": 1}),
        ("Writer", helpers, 1, {"num_cpus": 0.01}),
    ]


@given(st.integers(0, 99), *[st.integers(1, 9)] * 2)
def test_blocks_contain_every_tile_of_a_wave_once(count, size, workers):
    wave = pool._blocks(np.arange(count), size, workers)
    assert [tile for block in wave for tile in block] == list(range(count))
    # Every worker has a block, if there are enough tiles.
    assert len(wave) >= min(count, workers)
    assert all(len(block) <= size for block in wave)
    assert len({*map(len, wave[:-1])}) <= 1 and (not wave or len(wave[-1]) <= len(wave[0]))


@given(st.integers(0, 60), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_tiles_that_a_block_had_no_time_for_join_a_later_wave(count, workers, seed):
    """Each tile is reported once, however many tiles each block finishes, at least its first."""
    rng, waves = np.random.default_rng(seed), []
    first_wave = max(2, pool.BLOCKS_PER_WORKER * workers)

    def wave(stage, blocks, size, alone, silence):
        waves.append(blocks)
        for block in blocks:
            for tile in block[: rng.integers(1, len(block) + 1)]:
                yield Receipt(tile, float(rng.choice([0.0, 0.7, 30.0])))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pool, "connect", lambda workers: None)
        patched.setattr(pool, "max_workers", lambda *arguments: (workers, ""))
        patched.setattr(pool, "_run_wave", wave)
        patched.setattr(pool, "WAVE", 20)
        patched.setattr(pool, "FIRST_WAVE", 2)
        reported = [r.tile for r in run(Stage("mark", Marker, "cpu"), range(count), "ray", workers)]
    assert sorted(reported) == list(range(count))
    assert all(block for blocks in waves for block in blocks)
    # Each wave is bounded, and the first one is smaller if every worker still gets its blocks.
    sizes = [sum(map(len, blocks)) for blocks in waves]
    assert max(sizes, default=0) <= 20 * pool.LARGEST_BLOCK
    assert max(sizes[:1], default=0) <= first_wave


def test_a_wave_without_any_receipt_is_an_error(monkeypatch):
    monkeypatch.setattr(pool, "connect", lambda workers: None)
    monkeypatch.setattr(pool, "max_workers", lambda *arguments: (1, ""))
    monkeypatch.setattr(pool, "_run_wave", lambda *arguments: iter(()))
    with pytest.raises(RunError, match="Ray has lost 3 tiles"):
        list(run(Stage("mark", Marker, "cpu"), range(3), "ray"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_waves_do_every_tile_once(folder, monkeypatch):
    monkeypatch.setattr(pool, "WAVE", 2)
    monkeypatch.setattr(pool, "FIRST_WAVE", 4)
    monkeypatch.setattr(pool, "LARGEST_BLOCK", 8)
    receipts = list(run(stage(folder), range(30), "ray", 2))  # 2, then 16, then 12
    assert sorted(r.tile for r in receipts) == list(range(30))
    assert written(folder) == Counter(range(30))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_bad_tile_fails_a_run_on_ray_with_its_own_message(task, tmp_path):
    _, model, settings, _ = task
    image = noise((3, 61, 75), "float32")
    image[2, 60, 74] = np.nan
    volume = write_stack(tmp_path / "volume.tif", image)
    on_ray = dataclasses.replace(settings, engine="ray", workers=1)
    with pytest.raises(
        QuarantinedError, match=r"voxel \(z, y, x\) = \(2, 60, 74\) .* is nan, read by tile"
    ):
        segment(volume, model, tmp_path / "out", on_ray)


def test_an_apple_gpu_is_the_device_where_torch_offers_one(task, monkeypatch):
    # Without an Apple GPU, this tests only the choice of device, precision and workers.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert cluster.find_device("local") == "mps"
    planned = plan(*task[:2], dataclasses.replace(FLOAT32, precision=None))
    assert (planned.device, planned.precision, planned.workers) == ("mps", "float32", 1)
