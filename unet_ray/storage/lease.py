"""One run at a time on one output: who owns it, since when, and whether the owner still lives.

Knows processes, clocks and one small file or object; does not know what a run does. That two never
own it at once is not promised, since an owner that is silent for long loses it unasked; it finds
out by `Lease.check` and stops, and its workers by `Fence.look` at each thing that they write.
Two runs that go on with the same store would only do the work twice. A run that makes the store
anew counts on the fence, and on the epoch, which grows with every owner, new store or old.

Clocks: a heartbeat is the wall clock of its owner, read by the clock of another host. One that
lies in the future is of a clock that differs: then the time of the file counts, which the file
server or object store sets. An owner whose clock is behind looks silent the sooner by that much, so
hosts that share an output should agree to half a minute, as any time service sees to.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from unet_ray.errors import InputError, LostError, RunError
from unet_ray.machine import PROC, machine_name
from unet_ray.storage.objects import Content, ObjectPath
from unet_ray.storage.places import Place
from unet_ray.storage.swap import LEASE, LOCK, LOCK_SECONDS, locked, refuse_unconditional, swap_in

HEARTBEAT_SECONDS = 15.0
SILENT_SECONDS = 90.0
CHECK_SECONDS = 1.0
LATEST = 4e9  # seconds since 1970: the year 2096
_UNRELEASED: set[Place] = set()  # folders of the leases that this process could not release


@dataclass(frozen=True)
class Owner:
    """What a lease says of the run that holds it.

    Attributes:
        host: name of its machine.
        boot_id: of that machine since it was started; empty where it tells none.
        pid: of the process.
        epoch: how many owners there were, with this one.
        heartbeat: its last sign of life, in seconds since 1970.
        started: when the process was started, in clock ticks since the boot, where that is told.
        namespace: in which its pid counts: containers of one host have several; empty if unknown.
        released: whether it is done.
        nonce: tells the leases of one process from each other.
    """

    host: str
    boot_id: str
    pid: int
    epoch: int
    heartbeat: float
    started: int | None = None
    namespace: str = ""
    released: bool = False
    nonce: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def name(self) -> tuple[object, ...]:
        """What tells this owner from every other."""
        return (
            self.host,
            self.boot_id,
            self.namespace,
            self.pid,
            self.started,
            self.epoch,
            self.nonce,
        )

    def encode(self) -> bytes:
        """The owner as JSON."""
        return json.dumps(dataclasses.asdict(self)).encode()


@dataclass(frozen=True)
class Fence:
    """Tells any process of a run, wherever it is, whether the run still owns its output.

    Attributes:
        folder: of the lease.
        owner: the run.
    """

    folder: Place
    owner: Owner

    def check(self) -> None:
        """Makes sure that the run may still write; reads one small file.

        Raises:
            LostError: if it may not.
            OSError: if the lease cannot be read.
        """
        if fate := _fate(swap_in(self.folder).read(), self.owner):
            raise LostError(f"{self.folder.parent}: {fate}, so this run stops.")

    @contextmanager
    def look(self) -> Iterator[None]:
        """Makes sure of it once, without the lock: workers may be lost at any moment.

        Raises:
            LostError, OSError: as `check`.
        """
        self.check()
        yield

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Makes sure of it, and on a disk keeps others from taking over as long as it is held.

        It is to be held for an instant: a process that is stopped meanwhile keeps them out until
        it goes on or ends. An object store has no locks; its puts are conditional instead.

        Raises:
            LostError, OSError: as `check`.
        """
        with nullcontext() if isinstance(self.folder, ObjectPath) else locked(self.folder / LOCK):
            self.check()
            yield


class Lease:
    """The right to write one output, held while the context is open.

    A heartbeat tells others that the owner lives. One that could not be written is tried again at
    the next beat.

    Args:
        folder: of the lease, in the output; made if it is not there.
        takeover: takes the lease from whoever holds it.
        tell: is given one line if the lease is taken from another run, or cannot be released.
        after: an epoch that is known to have been; this one's is later.

    Attributes:
        epoch: 1 for the first owner of the output, one more for each later one. After a damaged
            or lost lease it goes on from the seconds since 1970, so that none is used twice.

    Raises:
        InputError: on entering, if another run holds the lease and may be alive, or if the lease
            cannot be written; says which.
    """

    def __init__(
        self,
        folder: Place,
        takeover: bool = False,
        tell: Callable[[str], None] | None = None,
        after: int = 0,
    ) -> None:
        self.epoch, self._after = 0, after
        self._folder, self._output = folder, folder.parent
        self._takeover, self._tell = takeover, tell or _tell_stderr
        self._file = swap_in(folder)
        self._me = _this_process()
        self._beaten = self._checked = time.monotonic()
        self._error: OSError | None = None
        self._lost = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if isinstance(self._folder, ObjectPath):
                refuse_unconditional(self._folder)
            line = self._take()
        except OSError as error:
            raise InputError(
                f"{self._output}: no lease can be kept in it ({error}); choose an output that can "
                "be written and locked."
            ) from error
        if line:
            self._tell(line)
        _UNRELEASED.discard(self._folder.resolve())
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(LOCK_SECONDS)
        try:
            self._write(dataclasses.replace(self._me, heartbeat=time.time(), released=True))
        except OSError as failure:
            _UNRELEASED.add(self._folder.resolve())
            self._tell(f"{self._output}: the lease could not be released ({failure}).")

    @property
    def fence(self) -> Fence:
        """What workers ask before they write."""
        return Fence(self._folder, self._me)

    def check(self, now: bool = False) -> None:
        """Makes sure that this run may go on; cheap, it looks at the file once a second.

        Args:
            now: looks at the file in any case.

        Raises:
            LostError: if another run has taken the lease over, or if it was removed.
            RunError: if its heartbeat could not be written for so long that another run may soon
                take it over.
        """
        seconds = time.monotonic() - self._checked
        if now or seconds >= CHECK_SECONDS:
            self._checked += seconds
            # A process that was stopped, or a machine that slept, catches up here.
            self._attempt(self._beat if self._silent() else self._look)
        if self._lost:
            raise LostError(self._lost)
        if self._error and self._silent():
            raise RunError(
                f"{self._output}: the lease could not be renewed for "
                f"{time.monotonic() - self._beaten:.0f} s ({self._error}), so another run may take "
                "it over; run the same command again once it can be written."
            ) from self._error

    def _take(self) -> str:
        """Takes the lease; gives what is to be told of it."""
        while True:
            content, line = self._file.read(), ""
            epoch = int(time.time()) if self._after else 1
            if content:
                owner = _decode(content.data)
                # A put whose answer was lost is ours all the same.
                if owner and owner.name == self._me.name and not owner.released:
                    self.epoch = owner.epoch
                    return ""
                line = "" if owner and owner.released else self._judge(owner, content.modified)
                epoch = owner.epoch + 1 if owner else int(time.time())
            epoch = max(epoch, self._after + 1)
            self._beaten = time.monotonic()
            self._me = dataclasses.replace(self._me, epoch=epoch, heartbeat=time.time())
            if self._file.replace(self._me.encode(), content.tag if content else None):
                self.epoch = epoch
                return line

    def _judge(self, owner: Owner | None, modified: float) -> str:
        """Why the lease may be taken from `owner`, or from nobody knows whom."""
        age = _age(owner, modified)
        name = str(owner) if owner else f"an unknown process (a damaged {LEASE})"
        taking = f"{self._output}: taking over from {name}, "
        if owner and (_is_gone(owner, self._me) or self._was_this_run(owner)):
            return f"{taking}which is gone."
        if age >= SILENT_SECONDS:
            return f"{taking}which has been silent for {age:.0f} s."
        if self._takeover:
            return f"{taking}whose last sign of life was {age:.0f} s ago, as --takeover asks."
        raise InputError(
            f"{self._output}: {name} is writing here, its last sign of life was {age:.0f} s ago; "
            "wait for it or end it, or force it out with --takeover."
        )

    def _was_this_run(self, owner: Owner) -> bool:
        """Whether a lease of this process is over, but a full disk kept it from saying so."""
        same = (owner.host, owner.pid, owner.started) == (
            self._me.host,
            self._me.pid,
            self._me.started,
        )
        return same and self._folder.resolve() in _UNRELEASED

    def _keep_beating(self) -> None:
        while not self._lost and not self._stop.wait(HEARTBEAT_SECONDS):
            self._attempt(self._beat)

    def _attempt(self, act: Callable[[], object]) -> None:
        """Does what is done again soon if it fails; `check` tells once it fails for long."""
        try:
            act()
        except OSError as error:
            self._error = error

    def _beat(self) -> None:
        """Gives a sign of life."""
        now = time.monotonic()
        self._write(dataclasses.replace(self._me, heartbeat=time.time()))
        self._beaten, self._error = now, None

    def _write(self, owner: Owner) -> None:
        """Writes `owner` into the lease, unless it is no longer this run's."""
        while content := self._look():
            if self._file.replace(owner.encode(), content.tag):
                return

    def _look(self) -> Content | None:
        """The lease if it is still this run's; else notes what became of it."""
        content = self._file.read()
        if fate := _fate(content, self._me):
            self._lost = f"{self._output}: {fate}, so this run stops; what was committed stays."
            return None
        return content

    def _silent(self) -> bool:
        return time.monotonic() - self._beaten > SILENT_SECONDS / 2


def _fate(content: Content | None, me: Owner) -> str:
    """What became of the lease of `me`; nothing if it still holds it."""
    owner = _decode(content.data) if content else None
    if owner and owner.name == me.name and not owner.released:
        return ""
    if owner and owner.name != me.name:
        return f"{owner} has taken it over"
    return f"its {LEASE} was removed or damaged"


def _decode(data: bytes) -> Owner | None:
    """The owner that a lease names; None if it is damaged."""
    try:
        facts = json.loads(data)
        owner = Owner(
            **{f.name: facts[f.name] for f in dataclasses.fields(Owner) if f.name in facts}
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return owner if _is_sound(owner) else None


def _is_sound(owner: Owner) -> bool:
    """Whether all that was read is of its type and range."""
    return (
        isinstance(owner.host, str)
        and owner.host.isprintable()
        and isinstance(owner.boot_id, str)
        and isinstance(owner.namespace, str)
        and isinstance(owner.released, bool)
        and isinstance(owner.nonce, str)
        and _is_whole(owner.pid, 1, 2**31 - 1)
        and _is_whole(owner.epoch, 1, 2**62)
        and (owner.started is None or _is_whole(owner.started, 0, 2**63))
        and type(owner.heartbeat) in (int, float)
        and 0 <= owner.heartbeat <= LATEST
    )


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _age(owner: Owner | None, modified: float) -> float:
    """Seconds since the last sign of life, by this machine's clock."""
    now = time.time()
    last = owner.heartbeat if owner and owner.heartbeat <= now else modified
    return max(0.0, now - last)


def _is_gone(owner: Owner, me: Owner) -> bool:
    """Whether the process of `owner` has ended: it ran where this one runs, and is not there."""
    if (owner.host, owner.boot_id) != (me.host, me.boot_id):
        return False
    if owner.namespace not in ("", me.namespace):
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it is there, and another user's
    state, started = _process(owner.pid)
    reused = None not in (owner.started, started) and owner.started != started
    return reused or state in ("Z", "X")


def _process(pid: int) -> tuple[str, int | None]:
    """State of a process, and when it was started, in clock ticks since the boot; see proc(5)."""
    try:
        data = (PROC / str(pid) / "stat").read_bytes()
        state, *rest = data.rpartition(b")")[2].split()  # its name may hold anything
        return state.decode(), int(rest[18])
    except (OSError, ValueError, IndexError):  # no such folder, as on macOS, or ended meanwhile
        return "", None


def _this_process() -> Owner:
    """The owner that this process would be, before it has an epoch."""
    try:
        boot_id = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink(PROC / "self/ns/pid")
    except OSError:
        boot_id = namespace = ""
    pid = os.getpid()
    return Owner(
        host=machine_name(),
        boot_id=boot_id,
        pid=pid,
        epoch=0,
        heartbeat=0.0,
        started=_process(pid)[1],
        namespace=namespace,
        nonce=uuid.uuid4().hex,
    )


def _tell_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
