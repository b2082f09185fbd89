"""The machine below this process: its memory, its C library, its name.

Knows the operating system. Does not know tiles, torch or Ray.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

try:
    import fcntl
    import resource
except ImportError:  # Windows, where this was not run
    fcntl = resource = None  # type: ignore[assignment]

PROC = Path("/proc")


def try_lock(file: int) -> bool:
    """Locks an open file until it is closed; returns False if another process holds it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            _lock_on_windows(file, "LK_NBLCK")
    except BlockingIOError:
        return False
    except PermissionError:  # on Windows: another holds it
        if fcntl:
            raise
        return False
    return True


def unlock(file: int) -> None:
    """Unlocks a file, though a forked child may have it open too."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_UN)
    else:
        _lock_on_windows(file, "LK_UNLCK")


def _lock_on_windows(file: int, mode: str) -> None:
    import msvcrt

    os.lseek(file, 1 << 30, os.SEEK_SET)  # far behind what is written there
    msvcrt.locking(file, getattr(msvcrt, mode), 1)  # type: ignore[attr-defined]


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk; Windows cannot, and needs not."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def machine_name() -> str:
    """The network name of this machine."""
    return platform.node()


def memory_available() -> int:
    """Bytes that this process could hold if nothing else changed; 0 where that is unknown.

    What it holds, and what is free on the machine or, if that is less, in its container or by a
    limit of its own (``ulimit``).
    """
    if not resource or not PROC.is_dir():
        return memory_in_use() + psutil.virtual_memory().available
    status = PROC / "self/status"
    try:
        free = _told(PROC / "meminfo", "MemAvailable")
        for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            most, _ = resource.getrlimit(limit)
            if most != resource.RLIM_INFINITY:
                free = min(free, max(0, most - _told(status, name)))
    except OSError:
        return 0
    return memory_in_use() + min([free, *_left_in_containers()])


def _left_in_containers() -> Iterator[int]:
    """Bytes left in each control group of this process that limits them, from the outermost in."""
    for kind, (most, used, cache) in _CGROUP.items():
        folder = CGROUPS / kind
        for name in ("", *_cgroup_names(kind)):
            folder = folder / name
            with suppress(OSError, ValueError):  # no such group, or no limit ("max")
                left = int((folder / most).read_text()) - int((folder / used).read_text())
                # Pages of files count as used, though they are given up when others need room.
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                files = sum(int(stat.get(f"{cache}{each}_file", 0)) for each in _LISTS)
                yield max(0, left + files)


def _cgroup_names(kind: str) -> list[str]:
    """The names, from the outermost in, of the groups that hold this process."""
    with suppress(OSError):
        for line in PROC_CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if kind in controllers.split(","):
                return path.strip("/").split("/")
    return []


def memory_in_use() -> int:
    """Anonymous bytes that this process holds; all resident ones where there is no ``/proc``."""
    if not PROC.is_dir():
        return psutil.Process().memory_info().rss
    try:
        return _told(PROC / "self/status", "RssAnon")
    except OSError:
        return 0


CGROUPS, PROC_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Version 2, whose controller has no name, and 1: files of limit and use, and what comes before the
# names of sums over a group and those in it.
_CGROUP = {
    "": ("memory.max", "memory.current", ""),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
_LISTS = ("active", "inactive")


def _told(file: Path, name: str) -> int:
    """The bytes in a line ``NAME:  123 kB`` of a file."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def keep_freed_memory() -> None:
    """Makes the C library keep what is freed for the next pass, for this whole process.

    Every pass asks for the same large buffers again. Handing them back to the system and getting
    them anew, page by page, takes up to a third of the time of a pass; keeping them costs memory
    that is idle between passes, and makes the peak of a worker one number that does not drift.
    Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, (_, value) in _MALLOC.items():
            mallopt(option, value)


def give_back_freed_memory() -> None:
    """Gives what is kept for the next pass back to the system, where there is glibc."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def kept_memory_environment() -> dict[str, str]:
    """The same as environment variables, for a process that is yet to start."""
    return {name: str(value) for name, value in _MALLOC.values()}


# Options of glibc's malloc.h and the variables that set them: no mapping of its own for a large
# buffer, nothing given back, growth by 16 MiB, one arena for all threads.
_MALLOC = {
    -4: ("MALLOC_MMAP_MAX_", 0),
    -1: ("MALLOC_TRIM_THRESHOLD_", 2**31 - 1),
    -2: ("MALLOC_TOP_PAD_", 16 << 20),
    -8: ("MALLOC_ARENA_MAX", 1),
}
