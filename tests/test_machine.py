"""The operating system behind one module: memory figures, kept memory, use without Linux."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unet_ray import machine

ROOT = Path(__file__).parents[1]

# Not run on Windows or macOS: this hides the parts of Linux that they lack.
ELSEWHERE = """
import sys
from pathlib import Path
import psutil, ray.data, ray.train, torch, zarr  # which use them on Linux
sys.modules["fcntl"] = sys.modules["resource"] = None
import importlib, pkgutil
import unet_ray
from unet_ray import machine
machine.PROC = Path("/nowhere")
names = [module.name for module in pkgutil.walk_packages(unet_ray.__path__, "unet_ray.")]
for name in names:
    if name != "unet_ray.__main__":
        importlib.import_module(name)
from unet_ray.storage.lease import Lease
assert 0 < machine.memory_in_use() < machine.memory_available() and machine.machine_name()
print(len(names))
"""


def test_every_module_imports_without_the_modules_of_linux():
    command = [sys.executable, "-c", ELSEWHERE]
    ran = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(ran.stdout) > 90


def test_only_one_open_file_has_a_lock_until_it_is_released(tmp_path):
    with open(tmp_path / "lock", "wb") as one, open(tmp_path / "lock", "wb") as two:
        assert machine.try_lock(one.fileno()) and not machine.try_lock(two.fileno())
        machine.unlock(one.fileno())
        assert machine.try_lock(two.fileno())


# Memory that is never written takes none of the machine.
KEPT = """
import ctypes, sys
from unet_ray.machine import keep_freed_memory

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("size", *"abcdefghi")]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mallinfo2.restype = Heap
if sys.argv[1] == "call":
    keep_freed_memory()
libc.free(libc.malloc(3 << 30))
print(libc.mallinfo2().size >> 30)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize("way", ["call", "environment"])
def test_the_c_library_keeps_more_than_two_gibibytes(way):
    settings = machine.kept_memory_environment() if way == "environment" else {}
    command, environment = [sys.executable, "-c", KEPT, way], {**os.environ, **settings}
    ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert int(ran.stdout) >= 3


RESERVED = """
import sys, threading
from unet_ray import machine

def reserve(more):
    before = machine.memory_in_use()
    machine.reserve_memory(before + (more << 20))
    return machine.memory_in_use() - before >> 20

if "threads" in sys.argv:  # the second one has a heap of its own
    started, barrier = [], threading.Barrier(3)
    for _ in range(2):
        threading.Thread(target=lambda: (started.append(b"1" * 10**6), barrier.wait())).start()
    barrier.wait()
machine.keep_freed_memory()
if "limit" in sys.argv:
    machine.resource.setrlimit(machine.resource.RLIMIT_AS, (1 << 40, 1 << 40))
grown = reserve(300)
before = machine.memory_in_use()
used = b"1" * (200 << 20)
machine.memory_available = lambda: before + (50 << 20)
print(grown, machine.memory_in_use() - before >> 20, reserve(400))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc")
@pytest.mark.parametrize("case", ["", "threads", "limit"])
def test_memory_is_reserved_once_and_then_used(case):
    command = [sys.executable, "-c", RESERVED, case]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    grown, more, beyond_the_machine = map(int, ran.stdout.split())
    if case:  # heaps of threads, or a limit of the address space: nothing is reserved
        assert grown == 0 and more >= 190
    else:
        assert 296 <= grown <= 304 and more <= 1
    assert beyond_the_machine == 0


GROUPS = [
    (
        "0::/pod/box",
        "",
        {"memory.max": "limit", "memory.current": "used"},
        "active_file 100\ninactive_file 20\nanon 5\n",
    ),
    (
        "9:cpu,memory:/pod/box",
        "memory",
        {"memory.limit_in_bytes": "limit", "memory.usage_in_bytes": "used"},
        "active_file 7\ntotal_active_file 100\ntotal_inactive_file 20\n",
    ),
]


@pytest.mark.parametrize(("line", "kind", "names", "stat"), GROUPS, ids=["v2", "v1"])
@pytest.mark.parametrize("tight", ["", "pod", "pod/box", None])
def test_free_memory_is_that_of_the_tightest_container_without_cached_files(
    tmp_path, monkeypatch, line, kind, names, stat, tight
):
    (tmp_path / "cgroup").write_text(f"12:pids:/other\n{line}\n")
    monkeypatch.setattr(machine, "PROC_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    for group in ("", "pod", "pod/box"):
        folder = tmp_path / kind / group
        folder.mkdir(parents=True, exist_ok=True)
        values = {"limit": "9000" if group == tight else str(2**62), "used": "8000"}
        for name, kind_of_value in names.items():
            (folder / name).write_text(values[kind_of_value] + "\n")
        (folder / "memory.stat").write_text(stat)
    free = min(machine._free_in_cgroups())
    assert free == 1120 if tight is not None else free > 2**61


def test_a_container_whose_name_is_hidden_from_within_counts_by_its_root(tmp_path, monkeypatch):
    (tmp_path / "cgroup").write_text("0::/machine/of/another\n")
    monkeypatch.setattr(machine, "PROC_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    assert not [*machine._free_in_cgroups()]
    (tmp_path / "memory.max").write_text("5000")
    (tmp_path / "memory.current").write_text("1000")
    (tmp_path / "memory.stat").write_text("inactive_file 500\n")
    assert [*machine._free_in_cgroups()] == [4500]
    (tmp_path / "memory.max").write_text("max")
    assert not [*machine._free_in_cgroups()]
