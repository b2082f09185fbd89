"""Leases: simultaneous runs, owners that were killed, suspended or are remote, and damage."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_ray import machine
from unet_ray.errors import InputError, RunError
from unet_ray.storage import lease, swap
from unet_ray.storage.lease import Lease, Owner

ROOT = Path(__file__).parents[2]
SECONDS = 60  # longer than any wait here on a busy machine

# Takes the lease when it reads a line, then checks it at every further line until end of file.
HOLDER = """
import sys
from pathlib import Path
from unet_ray import errors
from unet_ray.storage import lease
lease.HEARTBEAT_SECONDS, lease.CHECK_SECONDS = 0.05, 0
print("ready", flush=True)
sys.stdin.readline()
try:
    with lease.Lease(Path(sys.argv[1])) as owned:
        print("epoch", owned.epoch, flush=True)
        for line in sys.stdin:
            owned.check()
            print("mine", flush=True)
except errors.UnetRayError as error:
    print(type(error).__name__, error, flush=True)
    sys.stdin.read()
"""


class Holder:
    """A process that takes the lease at the first request."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def __enter__(self):
        assert self.read_line() == "ready"
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def read_line(self):
        return self.process.stdout.readline().strip()

    def request(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read_line()

    def end(self):
        """Closes its input and waits for its end."""
        self.process.communicate(timeout=SECONDS)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "OUT.zarr" / ".unet_ray"


@pytest.fixture
def holder(folder):
    """A living process that owns the lease."""
    with Holder(folder) as process:
        assert process.request() == "epoch 1"
        yield process


@pytest.fixture
def notices():
    return []


@pytest.fixture
def fast_heartbeats(monkeypatch):
    """Every check reads the file, and heartbeats follow each other closely."""
    monkeypatch.setattr(lease, "CHECK_SECONDS", 0)
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)


def content_of(folder):
    return json.loads((folder / "lease.json").read_bytes())


def put(folder, owner, age=0.0):
    """Writes a lease file with a modification time `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lease.json"
    path.write_bytes(owner if isinstance(owner, bytes) else owner.encode())
    os.utime(path, (time.time() - age,) * 2)


def remote_owner(age=0.0, **changes):
    owner = Owner("elsewhere", "1234", 77, epoch=4, heartbeat=time.time() - age, started=5)
    return dataclasses.replace(owner, **changes)


def local_owner(pid, **changes):
    """An owner on this machine with a current heartbeat."""
    with_pid = {"pid": pid, "epoch": 4, "heartbeat": time.time(), "started": 1}
    return dataclasses.replace(lease._this_process(), **{**with_pid, **changes})


def ended_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(SECONDS)
    return process.pid


def wait_until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def owner_in(folder):
    """The content of a lease file, except both times of the heartbeat of a living owner."""
    data = (folder / "lease.json").read_bytes()
    owner = lease._decode(data)
    return dataclasses.replace(owner, heartbeat=0, uptime=None) if owner else data


def refusal_of(folder, **options):
    """The message of a refused lease; the file must be unchanged, and no notice given."""
    notices, before = [], owner_in(folder)
    with pytest.raises(InputError) as caught, Lease(folder, notify=notices.append, **options):
        pass
    assert notices == []
    assert owner_in(folder) == before
    return str(caught.value)


# Taking the lease


def test_a_free_lease_is_taken_and_released_without_notices(folder, notices, capfd):
    for epoch in (1, 2, 3):
        with Lease(folder, notify=notices.append) as owned:
            assert owned.epoch == content_of(folder)["epoch"] == epoch
            assert content_of(folder)["pid"] == os.getpid()
            assert content_of(folder)["released"] is False
            owned.check()
        assert content_of(folder)["released"] is True
    assert notices == []
    assert capfd.readouterr() == ("", "")


def test_a_lease_after_a_later_epoch_continues_from_it(folder):
    with Lease(folder) as owned:
        assert owned.epoch == 1
    for after, epoch in ((7, 8), (3, 9), (9, 10)):
        with Lease(folder, after=after) as owned:
            assert owned.epoch == content_of(folder)["epoch"] == epoch


def test_a_failed_run_releases_the_lease(folder, notices):
    with pytest.raises(ZeroDivisionError), Lease(folder):
        1 / 0  # noqa: B018
    with Lease(folder, notify=notices.append) as owned:
        assert owned.epoch == 2
    assert notices == []


def test_a_second_run_is_refused_in_one_sentence(folder, holder):
    text = refusal_of(folder)
    assert text.startswith(f"{folder.parent}: process {holder.pid} on {os.uname().nodename} ")
    assert re.search(r"its last heartbeat was \d s ago", text)
    assert "--takeover" in text
    assert text.count("\n") == 0
    holder.process.stdin.write("\n")
    holder.process.stdin.flush()
    assert holder.read_line() == "mine"


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_after_a_kill_the_next_run_takes_the_lease(folder, holder, notices, reaped):
    os.kill(holder.pid, signal.SIGKILL)
    flags = os.WEXITED | (0 if reaped else os.WNOWAIT)  # waits for its end in either case
    os.waitid(os.P_PID, holder.pid, flags)
    with Lease(folder, notify=notices.append) as owned:
        assert owned.epoch == 2
    name = f"process {holder.pid} on {os.uname().nodename}"
    assert notices == [f"{folder.parent}: taking over from {name}, which has ended."]


def test_notices_go_to_standard_error_by_default(folder, capfd):
    put(folder, local_owner(ended_pid()))
    with Lease(folder):
        pass
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"{folder.parent}: taking over ") and err.count("\n") == 1


def test_a_released_lease_is_taken_without_notices(folder, holder, notices):
    holder.end()
    with Lease(folder, notify=notices.append) as owned:
        assert owned.epoch == 2
    assert notices == []


def test_an_owner_on_another_host_is_respected_for_90_seconds(folder, notices):
    put(folder, remote_owner(age=80))
    text = refusal_of(folder)
    assert re.search(r"process 77 on elsewhere is writing .* last heartbeat was 8\d s ago", text)
    put(folder, remote_owner(age=95))
    with Lease(folder, notify=notices.append) as owned:
        assert owned.epoch == 5
    (line,) = notices
    assert re.search(r"from process 77 on elsewhere, which has been silent for 9\d s", line)


def test_for_a_heartbeat_in_the_future_the_modification_time_counts(folder, notices):
    put(folder, remote_owner(age=-3600), age=80)
    assert re.search(r" 8\d s ago", refusal_of(folder))
    put(folder, remote_owner(age=-3600), age=-3600)
    assert " 0 s ago" in refusal_of(folder)
    put(folder, remote_owner(age=-3600), age=95)
    with Lease(folder, notify=notices.append):
        assert len(notices) == 1


@pytest.mark.parametrize("step", [3600, -3600])
def test_a_step_of_the_wall_clock_takes_no_lease_from_a_living_process(
    folder, holder, monkeypatch, step
):
    wall_clock = time.time
    monkeypatch.setattr(time, "time", lambda: wall_clock() + step)
    assert re.search(
        rf"process {holder.pid} on .* its last heartbeat was \d s ago", refusal_of(folder)
    )
    assert holder.request() == "mine"


def container_owner(silent, **changes):
    """An owner in another container of this machine, whose process cannot be queried."""
    uptime = machine.seconds_since_boot() - silent
    return local_owner(1, host="container", namespace="another", uptime=uptime, **changes)


@pytest.mark.parametrize("step", [3600, 0, -3600])
def test_on_one_boot_silence_is_measured_by_the_boot_clock(folder, notices, step):
    put(folder, container_owner(silent=80, heartbeat=time.time() - step), age=step)
    assert re.search(r" 8\d s ago", refusal_of(folder))
    put(folder, container_owner(silent=95, heartbeat=time.time() - step), age=step)
    with Lease(folder, notify=notices.append):
        assert re.search(r"which has been silent for 9\d s", notices[0])


@pytest.mark.parametrize("reason", ["another boot", "an older version", "another time namespace"])
def test_without_a_common_boot_clock_the_wall_clock_counts(folder, notices, reason):
    owners = {
        "another boot": container_owner(silent=0, boot_id="another"),
        "an older version": dataclasses.replace(container_owner(silent=0), uptime=None),
        "another time namespace": container_owner(silent=-3600),
    }
    owner = owners[reason]
    put(folder, dataclasses.replace(owner, heartbeat=time.time() - 80))
    assert re.search(r" 8\d s ago", refusal_of(folder))
    put(folder, dataclasses.replace(owner, heartbeat=time.time() - 95))
    with Lease(folder, notify=notices.append):
        assert re.search(r"which has been silent for 9\d s", notices[0])


def test_a_lease_of_an_older_version_is_read(folder, notices):
    fields = dataclasses.asdict(remote_owner(age=95))
    del fields["uptime"]
    put(folder, json.dumps(fields).encode())
    with Lease(folder, notify=notices.append) as owned:
        assert owned.epoch == 5
    assert "from process 77 on elsewhere, which has been silent" in notices[0]


def test_an_owner_whose_pid_was_reused_has_ended(folder, notices):
    started = lease._this_process().started
    put(folder, local_owner(os.getpid(), started=started))
    refusal_of(folder)
    put(folder, local_owner(os.getpid(), started=started - 1))
    with Lease(folder, notify=notices.append):
        assert "which has ended" in notices[0]


@pytest.mark.parametrize("field", ["host", "boot_id", "namespace"])
def test_a_pid_of_another_host_boot_or_namespace_is_ignored(folder, field):
    put(folder, local_owner(ended_pid(), **{field: "another"}))
    refusal_of(folder)


def test_without_namespace_and_start_time_the_pid_decides(folder, notices):
    put(folder, local_owner(os.getpid(), namespace="", started=None))
    refusal_of(folder)
    put(folder, local_owner(ended_pid(), namespace="", started=None))
    with Lease(folder, notify=notices.append):
        assert len(notices) == 1


def test_another_users_process_is_alive(folder, monkeypatch):
    def kill(pid, number):
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "kill", kill)
    put(folder, local_owner(os.getpid(), started=lease._this_process().started))
    refusal_of(folder)


def test_any_process_name_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "PROC", tmp_path)
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "stat").write_bytes(b"5 (a) Z 1 (\xff) S " + b" ".join([b"0"] * 18) + b" 123")
    assert lease._process(5) == ("S", 123)


def test_without_proc_the_pid_decides(folder, tmp_path, monkeypatch, notices):
    monkeypatch.setattr(lease, "PROC", tmp_path / "none")
    with Lease(folder):
        assert content_of(folder)["started"] is None
        refusal_of(folder)
    put(folder, local_owner(ended_pid(), started=None))
    with Lease(folder, notify=notices.append):
        assert "which has ended" in notices[0]


def test_of_many_simultaneous_runs_one_wins(folder):
    put(folder, local_owner(ended_pid()))
    with ExitStack() as stack:
        racers = [stack.enter_context(Holder(folder)) for _ in range(8)]
        for racer in racers:
            racer.process.stdin.write("\n")
        for racer in racers:
            racer.process.stdin.flush()
        lines = {racer.pid: racer.read_line() for racer in racers}
        (winner,) = [pid for pid, text in lines.items() if text == "epoch 5"]
        others = [text for pid, text in lines.items() if pid != winner]
        assert all(text.startswith("InputError") for text in others)
        assert all(f"process {winner} on " in text for text in others)


@pytest.mark.parametrize("owner", [None, remote_owner(age=100), remote_owner(released=True)])
def test_a_run_is_refused_if_another_takes_the_lease_first(folder, monkeypatch, owner, notices):
    if owner:
        put(folder, owner)
    replace = swap._SwapFile.replace

    def late(self, data, tag):
        monkeypatch.setattr(swap._SwapFile, "replace", replace)
        first.__enter__()
        return replace(self, data, tag)

    first = Lease(folder, notify=[].append)
    monkeypatch.setattr(swap._SwapFile, "replace", late)
    with (
        pytest.raises(InputError, match=f"process {os.getpid()} "),
        Lease(folder, notify=notices.append),
    ):
        pass
    assert notices == []
    first.check()
    first.__exit__(None, None, None)


def test_the_lease_changes_only_under_the_lock(folder, monkeypatch):
    with Lease(folder):
        pass
    before = content_of(folder)
    monkeypatch.setattr(swap, "LOCK_SECONDS", 0.05)
    with open(folder / ".lease.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="has been locked"), Lease(folder):
            pass
    assert content_of(folder) == before
    with Lease(folder) as owned:
        assert owned.epoch == 2


# Losing the lease


def test_a_forced_takeover_stops_the_old_run(folder, holder, monkeypatch, notices):
    monkeypatch.setattr(lease, "CHECK_SECONDS", 0)
    with Lease(folder, takeover=True, notify=notices.append) as owned:
        assert owned.epoch == 2
        (line,) = notices
        assert f"from process {holder.pid} on " in line and "because of --takeover" in line
        answer = holder.request()
        assert answer.startswith(f"LostError {folder.parent}: process {os.getpid()} on ")
        holder.end()
        owned.check()
        assert content_of(folder)["epoch"] == 2
        assert content_of(folder)["released"] is False


def test_two_runs_of_one_process_are_distinguished(folder, fast_heartbeats):
    with Lease(folder) as first, Lease(folder, takeover=True, notify=[].append) as second:
        with pytest.raises(RunError, match=f"process {os.getpid()} on .* has taken it over"):
            first.check()
        second.check()


def test_a_forced_takeover_of_a_free_lease_gives_no_notice(folder, notices):
    for _ in range(2):
        with Lease(folder, takeover=True, notify=notices.append):
            pass
    assert notices == []


def test_a_run_suspended_for_long_detects_that_it_lost_the_lease(
    folder, holder, monkeypatch, notices
):
    monkeypatch.setattr(lease, "CHECK_SECONDS", 0)
    refusal_of(folder)
    os.kill(holder.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, holder.pid, os.WSTOPPED)
    monkeypatch.setattr(lease, "SILENT_SECONDS", 0.3)
    time.sleep(0.4)
    with Lease(folder, notify=notices.append) as owned:
        monkeypatch.setattr(lease, "SILENT_SECONDS", 90.0)
        assert "which has been silent for" in notices[0]
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.request().startswith("LostError")
        holder.end()
        owned.check()
    assert content_of(folder)["epoch"] == 2


def test_a_suspended_run_that_kept_its_lease_continues(folder, monkeypatch):
    with Lease(folder) as owned:
        before = content_of(folder)["heartbeat"]
        monkeypatch.setattr(lease, "CHECK_SECONDS", 0)
        monkeypatch.setattr(lease, "SILENT_SECONDS", 0)
        owned.check()
        assert content_of(folder)["heartbeat"] > before


def test_the_new_owner_is_named_even_after_its_release(folder, fast_heartbeats):
    with Lease(folder) as owned:
        put(folder, remote_owner(released=True))
        with pytest.raises(RunError, match="process 77 on elsewhere has taken it over"):
            owned.check()


@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_a_removed_or_damaged_lease_is_not_rewritten(folder, fast_heartbeats, content):
    with Lease(folder) as owned:
        put(folder, b"")
        (folder / "lease.json").unlink() if content is None else put(folder, content)
        with pytest.raises(RunError, match="removed or damaged"):
            owned.check()
    if content is None:
        assert not (folder / "lease.json").exists()
    else:
        assert (folder / "lease.json").read_bytes() == content


def test_check_reads_the_file_at_most_once_a_second(folder, monkeypatch):
    reads, read = [], swap._SwapFile.read
    with Lease(folder) as owned:
        monkeypatch.setattr(swap._SwapFile, "read", lambda self: reads.append(1) or read(self))
        monkeypatch.setattr(lease, "CHECK_SECONDS", 1000)
        for _ in range(100):
            owned.check()
        assert reads == []
        monkeypatch.setattr(lease, "CHECK_SECONDS", 0)
        owned.check()
        assert reads == [1]


# Heartbeats


def test_heartbeats_continue_until_the_run_ends(folder, fast_heartbeats):
    with Lease(folder) as owned:
        first = content_of(folder)
        for _ in range(3):
            before = content_of(folder)["heartbeat"]
            wait_until(lambda before=before: content_of(folder)["heartbeat"] > before)
        times = {"heartbeat": 0, "uptime": 0}
        assert {**content_of(folder), **times} == {**first, **times}
        assert content_of(folder)["uptime"] > first["uptime"]
        assert abs(content_of(folder)["heartbeat"] - time.time()) < SECONDS
        owned.check()
    assert "lease" not in {thread.name for thread in threading.enumerate()}
    after = (folder / "lease.json").read_bytes()
    time.sleep(0.05)
    assert (folder / "lease.json").read_bytes() == after


def test_a_heartbeat_in_progress_does_not_undo_the_release(folder, fast_heartbeats, monkeypatch):
    beats, beat = [], Lease._beat

    def slow(self):
        beat(self)
        beats.append(1)
        time.sleep(0.2)

    monkeypatch.setattr(Lease, "_beat", slow)
    with Lease(folder) as owned:
        wait_until(lambda: beats)
    assert "lease" not in {thread.name for thread in threading.enumerate()}
    owned._beat()
    assert content_of(folder)["released"] is True


def test_the_release_does_not_wait_for_the_next_heartbeat(folder):
    with Lease(folder):
        start = time.monotonic()
    assert time.monotonic() - start < lease.HEARTBEAT_SECONDS / 2


def failing(monkeypatch, code=errno.ENOSPC):
    """Makes every write fail; returns the list of failed writes."""
    failures = []

    def write(path, data):
        failures.append(path)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(swap, "write_whole", write)
    return failures


def test_a_failed_heartbeat_is_retried(folder, fast_heartbeats, monkeypatch):
    write = swap.write_whole
    with Lease(folder) as owned:
        failures = failing(monkeypatch)
        wait_until(lambda: len(failures) > 2)
        owned.check()
        before = content_of(folder)["heartbeat"]
        monkeypatch.setattr(swap, "write_whole", write)
        wait_until(lambda: content_of(folder)["heartbeat"] > before)
        owned.check()
        monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 1000)
        time.sleep(0.05)
        monkeypatch.setattr(lease, "CHECK_SECONDS", 1000)
        monkeypatch.setattr(lease, "SILENT_SECONDS", 0)
        owned.check()  # the earlier failure no longer counts


def test_silence_is_measured_from_the_last_heartbeat(folder, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time, sleep=time.sleep)
    monkeypatch.setattr(lease, "time", clock)
    with Lease(folder, notify=[].append) as owned:
        now[0] = 46
        owned.check()  # writes the overdue heartbeat
        failing(monkeypatch)
        now[0] = 90
        owned.check()
        now[0] = 92
        with pytest.raises(RunError, match="could not be renewed for 46 s"):
            owned.check()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_failing_heartbeats_stop_the_run_after_a_while(
    folder, fast_heartbeats, monkeypatch, notices, code
):
    with Lease(folder, notify=notices.append) as owned:
        failures = failing(monkeypatch, code)
        wait_until(lambda: failures)
        owned.check()
        monkeypatch.setattr(lease, "SILENT_SECONDS", 0.2)
        time.sleep(0.11)
        with pytest.raises(RunError, match=os.strerror(code)) as caught:
            owned.check()
        assert str(caught.value).startswith(f"{folder.parent}: the lease could not be renewed")
        monkeypatch.setattr(lease, "SILENT_SECONDS", 90.0)
    assert [line for line in notices if "could not be released" in line] == notices != []


def test_an_unreadable_lease_stops_the_run_after_the_same_time(
    folder, fast_heartbeats, monkeypatch
):
    def read(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Lease(folder, notify=[].append) as owned:
        monkeypatch.setattr(swap._SwapFile, "read", read)
        owned.check()
        monkeypatch.setattr(lease, "SILENT_SECONDS", 0)
        with pytest.raises(RunError, match=os.strerror(errno.EIO)):
            owned.check()


def test_a_read_only_output_is_refused(folder, monkeypatch):
    failing(monkeypatch, errno.EROFS)
    with pytest.raises(InputError, match=r"OUT.zarr: .*Read-only"), Lease(folder):
        pass


def test_an_output_that_is_a_file_is_refused(folder):
    folder.parent.write_bytes(b"")
    with pytest.raises(InputError, match=r"OUT.zarr: cannot store a lease"), Lease(folder):
        pass


# Damage

HOSTILE = [
    *(b"", b"{", b"null", b"[]", b'"host"', b"7", b"\xff\xfe", b"[" * 60000, b"\0" * 10**6),
    *(b'{"pid": ' + b"9" * 5000 + b"}", remote_owner().encode()[:-9]),
    *(remote_owner(pid=pid).encode() for pid in (-1, 0, 2**31, 1e3, True, None, "7", [])),
    *(
        remote_owner(heartbeat=h).encode()
        for h in (float("nan"), float("inf"), 1e300, -1, "1", None)
    ),
    *(remote_owner(heartbeat=h).encode() for h in (10**400, True, [])),
    *(remote_owner(uptime=u).encode() for u in (float("nan"), -1, 10**400, "1", True)),
    *(remote_owner(epoch=epoch).encode() for epoch in (0, -1, 2**63, 10**400, 1.5, True, None)),
    *(remote_owner(started=started).encode() for started in (-1, 10**400, 0.5, "1", True)),
    *(remote_owner(host=host).encode() for host in (None, 7, "a\nb", "\x1b[2J", "\ud800")),
    *(
        remote_owner(boot_id=3).encode(),
        remote_owner(namespace=[]).encode(),
        remote_owner(released=1).encode(),
    ),
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_damaged_lease_has_an_unknown_owner(folder, notices, content):
    put(folder, content, age=80)
    text = refusal_of(folder)
    assert "an unknown process (a damaged lease.json) is writing here" in text
    assert re.search(r" 8\d s ago", text)
    put(folder, content, age=95)
    before = int(time.time())
    with Lease(folder, notify=notices.append) as owned:
        assert owned.epoch >= before  # not used by an earlier run
        owned.check()
    assert len(notices) == 1
    with Lease(folder, notify=notices.append) as owned:
        assert owned.epoch > before
    assert len(notices) == 1


def test_a_damaged_lease_can_be_taken_by_force(folder, notices):
    put(folder, b"garbage")
    with Lease(folder, takeover=True, notify=notices.append):
        assert "because of --takeover" in notices[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
NAMES = [field.name for field in dataclasses.fields(Owner)]
RECORDS = st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1).map(
    lambda changes: json.dumps({**dataclasses.asdict(remote_owner()), **changes}).encode()
)


@settings(max_examples=100)
@given(st.binary(max_size=100) | RECORDS)
def test_any_content_of_a_lease_is_handled(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("lease")
    put(folder, content)
    try:
        with Lease(folder, notify=[].append) as owned:
            owned.check()
    except InputError as error:
        assert "is writing here" in str(error) and "\n" not in str(error)
    with Lease(folder, takeover=True, notify=[].append) as owned:
        owned.check()
    assert content_of(folder)["released"] is True
