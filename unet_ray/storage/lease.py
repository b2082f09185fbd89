"""Leases: one run at a time owns an output, and others can see whether the owner is alive.

Knows processes, clocks and one small file or object. Does not know what a run does.

A lease does not exclude two owners at every instant: an owner that is silent for long loses the
lease without notice. It detects the loss in `Lease.check` and stops; its workers detect it in
`Fence.look` before each write. Two runs that resume the same store would only duplicate work. A
run that recreates the store relies on the fence and on the epoch, which increases with every
owner, also across recreated stores.

Clocks: a heartbeat has the time of two clocks. Processes of the same boot compare its boot clock,
which nobody can set, so a step of the wall clock takes no lease from a living owner. Other machines
compare its wall clock with theirs. A heartbeat in the future shows that the clocks differ. Then the
modification time of the file counts, which the file server or object store sets. An owner whose
clock is behind appears silent earlier by the same amount. So the clocks of hosts that share an
output should agree to half a minute, which any time service ensures.
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
from unet_ray.machine import PROC, machine_name, seconds_since_boot
from unet_ray.storage.objects import Content, ObjectPath
from unet_ray.storage.places import Place
from unet_ray.storage.swap import LEASE, LOCK, LOCK_SECONDS, locked, refuse_unconditional, swap_in
from unet_ray.units import printable

HEARTBEAT_SECONDS = 15.0
SILENT_SECONDS = 90.0
CHECK_SECONDS = 1.0
LATEST = 4e9  # seconds since 1970: the year 2096
_UNRELEASED: set[Place] = set()  # folders of the leases that this process could not release


@dataclass(frozen=True)
class Owner:
    """The content of a lease: the run that owns it.

    Attributes:
        host: name of the machine.
        boot_id: identifier of the current boot of that machine; empty if unknown.
        pid: process id.
        epoch: number of the owner; increases with every owner of the output.
        heartbeat: time of the last heartbeat, in seconds since 1970.
        started: start time of the process, in clock ticks since boot; None if unknown.
        namespace: PID namespace, since containers of one host have several; empty if unknown.
        released: whether the owner has released the lease.
        nonce: random string that distinguishes leases of one process.
        uptime: time of the last heartbeat, in seconds since boot; None if unknown, as in leases of
            older versions.
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
    uptime: float | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def name(self) -> tuple[object, ...]:
        """The fields that identify this owner among all owners."""
        return (
            self.host,
            self.boot_id,
            self.namespace,
            self.pid,
            self.started,
            self.epoch,
            self.nonce,
        )

    def now(self) -> Owner:
        """Returns the owner with a heartbeat at this moment."""
        return dataclasses.replace(self, heartbeat=time.time(), uptime=seconds_since_boot())

    def encode(self) -> bytes:
        """Returns the owner as JSON."""
        return json.dumps(dataclasses.asdict(self)).encode()


@dataclass(frozen=True)
class Fence:
    """Lets any process of a run, on any machine, check whether the run still owns its output.

    Attributes:
        folder: folder of the lease.
        owner: the run.
    """

    folder: Place
    owner: Owner

    def check(self) -> None:
        """Checks that the run may still write; reads one small file.

        Raises:
            LostError: if another run owns the output, or if the lease was removed or damaged.
            OSError: if the lease cannot be read.
        """
        if reason := _loss_reason(swap_in(self.folder).read(), self.owner):
            raise LostError(f"{self.folder.parent}: {reason}, so this run stops.")

    @contextmanager
    def look(self) -> Iterator[None]:
        """Runs `check` on entering, without the lock, since a worker may be lost at any time.

        Raises:
            LostError, OSError: as `check`.
        """
        self.check()
        yield

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Runs `check` on entering; on a disk, no other run can take over inside the context.

        Keep the context short: a process that is suspended inside it blocks other runs until it
        continues or ends. An object store has no locks; its conditional puts replace them.

        Raises:
            LostError, OSError: as `check`.
        """
        with nullcontext() if isinstance(self.folder, ObjectPath) else locked(self.folder / LOCK):
            self.check()
            yield


class Lease:
    """The right to write one output, owned while the context is open.

    A thread writes heartbeats, which show other runs that the owner is alive. If a heartbeat
    cannot be written, the next one is tried as usual.

    Args:
        folder: folder of the lease, in the output; created if it does not exist.
        takeover: takes the lease even from an owner that may be alive.
        notify: called with one line if the lease is taken from another run or cannot be released;
            prints it to standard error by default.
        after: an epoch that was used before; the new epoch is later.

    Attributes:
        epoch: 1 for the first owner of the output, increased by 1 for every later one. After a
            damaged or removed lease it continues from the seconds since 1970, to avoid reuse.

    Raises:
        InputError: on entering, if another owner may be alive or the lease cannot be written.
    """

    def __init__(
        self,
        folder: Place,
        takeover: bool = False,
        notify: Callable[[str], None] | None = None,
        after: int = 0,
    ) -> None:
        self.epoch, self._after = 0, after
        self._folder, self._output = folder, folder.parent
        self._takeover, self._notify = takeover, notify or _print_to_stderr
        self._file = swap_in(folder)
        self._me = _this_process()
        self._last_beat = self._last_check = time.monotonic()
        self._error: OSError | None = None
        self._loss = ""  # message of the LostError, once the lease is lost
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_repeatedly, name="lease", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if isinstance(self._folder, ObjectPath):
                refuse_unconditional(self._folder)
            notice = self._take()
        except OSError as error:
            raise InputError(
                f"{self._output}: cannot store a lease in it ({error}); choose an output on a disk "
                "that can be written and locked."
            ) from error
        if notice:
            self._notify(notice)
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
            self._write(dataclasses.replace(self._me.now(), released=True))
        except OSError as failure:
            _UNRELEASED.add(self._folder.resolve())
            self._notify(f"{self._output}: the lease could not be released ({failure}).")

    @property
    def fence(self) -> Fence:
        """The check that workers run before they write."""
        return Fence(self._folder, self._me)

    def check(self, now: bool = False) -> None:
        """Checks that this run still owns the lease; reads the file at most once a second.

        Args:
            now: reads the file in any case.

        Raises:
            LostError: if another run owns the lease, or if it was removed or damaged.
            RunError: if no heartbeat could be written for so long that another run may soon take
                the lease.
        """
        seconds = time.monotonic() - self._last_check
        if now or seconds >= CHECK_SECONDS:
            self._last_check += seconds
            # After a suspended process or machine continues, the overdue heartbeat is written here.
            self._attempt(self._beat if self._is_silent() else self._read_own)
        if self._loss:
            raise LostError(self._loss)
        if self._error and self._is_silent():
            raise RunError(
                f"{self._output}: the lease could not be renewed for "
                f"{time.monotonic() - self._last_beat:.0f} s ({self._error}), so another run may "
                "take it over; rerun the same command once the output can be written."
            ) from self._error

    def _take(self) -> str:
        """Takes the lease; returns a notice for the user, empty if the lease was free."""
        while True:
            content, notice = self._file.read(), ""
            epoch = int(time.time()) if self._after else 1
            if content:
                owner = _decode(content.data)
                # An earlier put of this loop succeeded, though its response was lost.
                if owner and owner.name == self._me.name and not owner.released:
                    self.epoch = owner.epoch
                    return ""
                notice = "" if owner and owner.released else self._notice(owner, content.modified)
                epoch = owner.epoch + 1 if owner else int(time.time())
            epoch = max(epoch, self._after + 1)
            self._last_beat = time.monotonic()
            self._me = dataclasses.replace(self._me.now(), epoch=epoch)
            if self._file.replace(self._me.encode(), content.tag if content else None):
                self.epoch = epoch
                return notice

    def _notice(self, owner: Owner | None, modified: float) -> str:
        """Returns the notice of a takeover; `owner` is None if the lease is damaged.

        Raises:
            InputError: if this run may not take the lease.
        """
        age = _seconds_silent(owner, self._me, modified)
        name = str(owner) if owner else f"an unknown process (a damaged {LEASE})"
        taking = f"{self._output}: taking over from {name}, "
        if owner and (_has_ended(owner, self._me) or self._is_unreleased(owner)):
            return f"{taking}which has ended."
        if age >= SILENT_SECONDS:
            return f"{taking}which has been silent for {age:.0f} s."
        if self._takeover:
            return f"{taking}whose last heartbeat was {age:.0f} s ago, because of --takeover."
        raise InputError(
            f"{self._output}: {name} is writing here, its last heartbeat was {age:.0f} s ago; "
            "wait for it, end it, or force it out with --takeover."
        )

    def _is_unreleased(self, owner: Owner) -> bool:
        """Returns whether `owner` is an ended lease of this process that could not be released."""
        same = (owner.host, owner.pid, owner.started) == (
            self._me.host,
            self._me.pid,
            self._me.started,
        )
        return same and self._folder.resolve() in _UNRELEASED

    def _beat_repeatedly(self) -> None:
        while not self._loss and not self._stop.wait(HEARTBEAT_SECONDS):
            self._attempt(self._beat)

    def _attempt(self, action: Callable[[], object]) -> None:
        """Calls `action` and records an OSError, which `check` raises if it persists."""
        try:
            action()
        except OSError as error:
            self._error = error

    def _beat(self) -> None:
        """Writes a heartbeat."""
        now = time.monotonic()
        self._write(self._me.now())
        self._last_beat, self._error = now, None

    def _write(self, owner: Owner) -> None:
        """Writes `owner` into the lease if this run still owns it."""
        while content := self._read_own():
            if self._file.replace(owner.encode(), content.tag):
                return

    def _read_own(self) -> Content | None:
        """Returns the lease if this run still owns it; otherwise records the loss."""
        content = self._file.read()
        if reason := _loss_reason(content, self._me):
            self._loss = f"{self._output}: {reason}, so this run stops; committed work is kept."
            return None
        return content

    def _is_silent(self) -> bool:
        return time.monotonic() - self._last_beat > SILENT_SECONDS / 2


def _loss_reason(content: Content | None, me: Owner) -> str:
    """Returns why `me` no longer owns the lease; empty if it still does."""
    owner = _decode(content.data) if content else None
    if owner and owner.name == me.name and not owner.released:
        return ""
    if owner and owner.name != me.name:
        return f"{owner} has taken it over"
    return f"its {LEASE} was removed or damaged"


def _decode(data: bytes) -> Owner | None:
    """Returns the owner in a lease; None if the lease is damaged."""
    try:
        facts = json.loads(data)
        owner = Owner(
            **{f.name: facts[f.name] for f in dataclasses.fields(Owner) if f.name in facts}
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return owner if _is_valid(owner) else None


def _is_valid(owner: Owner) -> bool:
    """Returns whether every field has its type and range."""
    return (
        isinstance(owner.host, str)
        and owner.host.isprintable()
        and isinstance(owner.boot_id, str)
        and isinstance(owner.namespace, str)
        and isinstance(owner.released, bool)
        and isinstance(owner.nonce, str)
        and _is_integer(owner.pid, 1, 2**31 - 1)
        and _is_integer(owner.epoch, 1, 2**62)
        and (owner.started is None or _is_integer(owner.started, 0, 2**63))
        and _is_seconds(owner.heartbeat)
        and (owner.uptime is None or _is_seconds(owner.uptime))
    )


def _is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_seconds(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= LATEST  # type: ignore[operator]


def _seconds_silent(owner: Owner | None, me: Owner, modified: float) -> float:
    """Returns the seconds since the last heartbeat, by a clock that this process can read too."""
    # Containers of one machine have the same boot clock, though other names and other PIDs.
    if owner and owner.boot_id and owner.boot_id == me.boot_id:
        uptime = seconds_since_boot()
        # An uptime in the future is of a time namespace, whose boot clock differs.
        if uptime is not None and owner.uptime is not None and owner.uptime <= uptime:
            return uptime - owner.uptime
    now = time.time()
    last = owner.heartbeat if owner and owner.heartbeat <= now else modified
    return max(0.0, now - last)


def _has_ended(owner: Owner, me: Owner) -> bool:
    """Returns whether `owner` ran in this PID namespace and its process has ended."""
    if (owner.host, owner.boot_id) != (me.host, me.boot_id):
        return False
    if owner.namespace not in ("", me.namespace):
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it runs as another user
    state, started = _process(owner.pid)
    reused = None not in (owner.started, started) and owner.started != started
    return reused or state in ("Z", "X")


def _process(pid: int) -> tuple[str, int | None]:
    """Returns the state and start time of a process, in clock ticks since boot; see proc(5)."""
    try:
        data = (PROC / str(pid) / "stat").read_bytes()
        state, *rest = data.rpartition(b")")[2].split()  # the name before it may contain anything
        return state.decode(), int(rest[18])
    except (OSError, ValueError, IndexError):  # no /proc, as on macOS, or the process has ended
        return "", None


def _this_process() -> Owner:
    """Returns this process as an owner, without epoch and heartbeat."""
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


def _print_to_stderr(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
