"""Services of the operating system: file locks, memory, the C library's allocator, names, clocks.

Knows the operating system. Does not know tiles, torch or Ray.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

try:
    import fcntl
    import resource
except ImportError:  # Windows, where this code is untested
    fcntl = resource = None  # type: ignore[assignment]

PROC = Path("/proc")


def try_lock(file: int) -> bool:
    """Locks an open file until it is closed. Returns False if another process has locked it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            _lock_on_windows(file, "LK_NBLCK")
    except BlockingIOError:
        return False
    except PermissionError:  # on Windows: another process has locked it
        if fcntl:
            raise
        return False
    return True


def unlock(file: int) -> None:
    """Unlocks a file, even if a forked child still has it open."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_UN)
    else:
        _lock_on_windows(file, "LK_UNLCK")


def _lock_on_windows(file: int, mode: str) -> None:
    import msvcrt

    os.lseek(file, 1 << 30, os.SEEK_SET)  # far beyond the content
    msvcrt.locking(file, getattr(msvcrt, mode), 1)  # type: ignore[attr-defined]


def sync_folder(folder: Path) -> None:
    """Waits until the file names in a folder are on disk. Windows cannot and need not."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def machine_name() -> str:
    """Returns the network name of this machine."""
    return platform.node()


def nvidia_driver() -> str:
    """Returns the version of the driver of NVIDIA GPUs; empty if there is none, or not on Linux."""
    try:
        text = (PROC / "driver/nvidia/version").read_text()
    except OSError:
        return ""
    match = re.search(r"^NVRM version:.*? (\d+(?:\.\d+)+) ", text)
    return match[1] if match else ""


def seconds_since_boot() -> float | None:
    """Returns the time of the boot clock, which nobody can set; None on systems without one.

    It continues while the machine is suspended, unlike the monotonic clock.
    """
    clock = getattr(time, "CLOCK_BOOTTIME", None)  # Linux only
    return None if clock is None else time.clock_gettime(clock)


def memory_available() -> int:
    """Returns the bytes that this process could use in total; 0 if unknown.

    The sum of the bytes that it uses now and those still free. The latter are the minimum of the
    free bytes of the machine, of its containers, and of the process's own limits (``ulimit``).
    """
    if not resource or not PROC.is_dir():
        return memory_in_use() + psutil.virtual_memory().available
    status = PROC / "self/status"
    try:
        free = _bytes_in(PROC / "meminfo", "MemAvailable")
        for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            limit, _ = resource.getrlimit(kind)
            if limit != resource.RLIM_INFINITY:
                free = min(free, max(0, limit - _bytes_in(status, name)))
    except OSError:
        return 0
    return memory_in_use() + min([free, *_free_in_cgroups()])


def _free_in_cgroups() -> Iterator[int]:
    """Yields the free bytes of each control group with a memory limit, outermost first."""
    for kind, (limit, usage, prefix) in _CGROUP.items():
        folder = CGROUPS / kind
        for name in ("", *_cgroup_names(kind)):
            folder = folder / name
            with suppress(OSError, ValueError):  # no such group, or no limit ("max")
                free = int((folder / limit).read_text()) - int((folder / usage).read_text())
                # Cached pages of files count as used, though the kernel drops them on demand.
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                cached = sum(int(stat.get(f"{prefix}{state}_file", 0)) for state in _LISTS)
                yield max(0, free + cached)


def _cgroup_names(kind: str) -> list[str]:
    """Returns the names of the control groups of this process, outermost first."""
    with suppress(OSError):
        for line in PROC_CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if kind in controllers.split(","):
                return path.strip("/").split("/")
    return []


def memory_in_use() -> int:
    """Returns the anonymous bytes of this process, or all resident bytes without ``/proc``."""
    if not PROC.is_dir():
        return psutil.Process().memory_info().rss
    try:
        return _bytes_in(PROC / "self/status", "RssAnon")
    except OSError:
        return 0


CGROUPS, PROC_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# By the name of the memory controller, empty in version 2 and "memory" in version 1: the files of
# limit and usage, and the prefix of the statistics that include all child groups.
_CGROUP = {
    "": ("memory.max", "memory.current", ""),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
_LISTS = ("active", "inactive")


def _bytes_in(file: Path, name: str) -> int:
    """Returns the bytes in the line ``NAME:  123 kB`` of a file; 0 without such a line."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.M)
    return int(match[1]) * 1024 if match else 0


def keep_freed_memory() -> None:
    """Makes the C library keep freed memory for reuse, in the whole process.

    Every pass allocates the same large buffers. Returning them to the system and mapping them
    again, page by page, takes up to a third of the time of a pass. Keeping them costs memory that
    is idle between passes, and makes the peak memory of a worker constant. Does nothing without
    glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, (_, value) in _MALLOC.items():
            mallopt(option, value)


def reserve_memory(total: int) -> None:
    """Allocates what this process lacks of `total` bytes, and frees it for later buffers.

    Call `keep_freed_memory` first. The gaps between large buffers differ from run to run. A process
    that has its planned memory before them has the same peak in every run. Memory that was free
    before counts twice, so the process may remain below `total`.

    Does nothing without glibc, if threads have heaps of their own, if the address space is limited
    (``ulimit -v`` or ``-d``), or if less than `total` is available.
    """
    if not resource or not hasattr(libc := ctypes.CDLL(None), "malloc_info"):
        return
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    missing = total - memory_in_use()
    if missing <= 0 or total > memory_available() or {*limits} != {resource.RLIM_INFINITY}:
        return
    malloc, free = libc.malloc, libc.free
    malloc.restype, malloc.argtypes, free.argtypes = _POINTER, [ctypes.c_size_t], [_POINTER]
    if _heaps(libc) == 1 and (block := malloc(missing)):
        ctypes.memset(block, 1, missing)  # the system provides memory when it is written
        free(block)


def _heaps(libc: ctypes.CDLL) -> int:
    """Returns the number of glibc's heaps, 0 if unknown; a thread may use any of several."""
    with open(os.memfd_create("heaps"), "rb") as file:
        libc.fdopen.restype, libc.fdopen.argtypes = _POINTER, [ctypes.c_int, ctypes.c_char_p]
        libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, _POINTER], [_POINTER]
        stream = libc.fdopen(os.dup(file.fileno()), b"w")
        if not stream:  # memory is short
            return 0
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        file.seek(0)  # shared with the copy that was written
        return file.read().count(b"<heap nr=")


def give_back_freed_memory() -> None:
    """Returns freed memory to the system. Without glibc, only collects garbage."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def kept_memory_environment() -> dict[str, str]:
    """Returns environment variables that do the same as `keep_freed_memory` in a new process."""
    return {name: str(value) for name, value in _MALLOC.values()}


_POINTER = ctypes.c_void_p
# Options of glibc's malloc.h and the environment variables that set them: no separate mapping for
# large buffers, no memory returned to the system, growth by 16 MiB, one arena for all threads.
_MALLOC = {
    -4: ("MALLOC_MMAP_MAX_", 0),
    -1: ("MALLOC_TRIM_THRESHOLD_", -1),  # at 2^31 - 1, larger workers would return their memory
    -2: ("MALLOC_TOP_PAD_", 16 << 20),
    -8: ("MALLOC_ARENA_MAX", 1),
}
