"""One run at a time on one output: two at once, killed, stopped and foreign owners, damage."""

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

from unet_ray.errors import InputError, RunError
from unet_ray.storage import lease, swap
from unet_ray.storage.lease import Lease, Owner

ROOT = Path(__file__).parents[2]
SECONDS = 60  # longer than any wait here on a busy machine

# Takes the lease when it reads a line, then checks it at each further line, until there are none.
HOLDER = """
import sys
from pathlib import Path
from unet_ray import errors
from unet_ray.storage import lease
lease.HEARTBEAT_SECONDS, lease.CHECK_SECONDS = 0.05, 0
print("ready", flush=True)
sys.stdin.readline()
try:
    with lease.Lease(Path(sys.argv[1])) as held:
        print("epoch", held.epoch, flush=True)
        for line in sys.stdin:
            held.check()
            print("mine", flush=True)
except errors.UnetRayError as error:
    print(type(error).__name__, error, flush=True)
    sys.stdin.read()
"""


class Holder:
    """A process that takes the lease when asked to."""

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
        assert self.hear() == "ready"
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def hear(self):
        return self.process.stdout.readline().strip()

    def ask(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self):
        """Lets it end by itself, and reaps it."""
        self.process.communicate(timeout=SECONDS)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "OUT.zarr" / ".unet_ray"


@pytest.fixture
def holder(folder):
    """A living process that holds the lease."""
    with Holder(folder) as holding:
        assert holding.ask() == "epoch 1"
        yield holding


@pytest.fixture
def told():
    return []


@pytest.fixture
def hasty(monkeypatch):
    """Every check looks at the file, and hearts beat all the time."""
    monkeypatch.setattr(lease, "CHECK_SECONDS", 0)
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)


def facts(folder):
    return json.loads((folder / "lease.json").read_bytes())


def put(folder, owner, age=0.0):
    """Writes a lease, by hand and `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lease.json"
    path.write_bytes(owner if isinstance(owner, bytes) else owner.encode())
    os.utime(path, (time.time() - age,) * 2)


def foreign(age=0.0, **changes):
    owner = Owner("elsewhere", "1234", 77, epoch=4, heartbeat=time.time() - age, started=5)
    return dataclasses.replace(owner, **changes)


def here(pid, **changes):
    """An owner of this machine that is heard of just now."""
    with_pid = {"pid": pid, "epoch": 4, "heartbeat": time.time(), "started": 1}
    return dataclasses.replace(lease._this_process(), **{**with_pid, **changes})


def ended_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(SECONDS)
    return process.pid


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def owner_in(folder):
    """What a lease file holds, but for the heartbeat, which a living owner writes anew."""
    data = (folder / "lease.json").read_bytes()
    owner = lease._decode(data)
    return dataclasses.replace(owner, heartbeat=0) if owner else data


def refused(folder, **options):
    """The refusal of a lease, which leaves the file as it was and tells nothing else."""
    told, before = [], owner_in(folder)
    with pytest.raises(InputError) as caught, Lease(folder, notify=told.append, **options):
        pass
    assert told == []
    assert owner_in(folder) == before
    return str(caught.value)


# Who may take it


def test_a_free_output_is_taken_and_released_in_silence(folder, told, capfd):
    for epoch in (1, 2, 3):
        with Lease(folder, notify=told.append) as held:
            assert held.epoch == facts(folder)["epoch"] == epoch
            assert facts(folder)["pid"] == os.getpid()
            assert facts(folder)["released"] is False
            held.check()
        assert facts(folder)["released"] is True
    assert told == []
    assert capfd.readouterr() == ("", "")


def test_a_run_that_fails_releases_too(folder, told):
    with pytest.raises(ZeroDivisionError), Lease(folder):
        1 / 0  # noqa: B018
    with Lease(folder, notify=told.append) as held:
        assert held.epoch == 2
    assert told == []


def test_the_second_of_two_is_refused_in_one_sentence(folder, holder):
    text = refused(folder)
    assert text.startswith(f"{folder.parent}: process {holder.pid} on {os.uname().nodename} ")
    assert re.search(r"its last heartbeat was \d s ago", text)
    assert "--takeover" in text
    assert text.count("\n") == 0
    holder.process.stdin.write("\n")
    holder.process.stdin.flush()
    assert holder.hear() == "mine"


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_after_a_kill_the_next_just_works(folder, holder, told, reaped):
    os.kill(holder.pid, signal.SIGKILL)
    flags = os.WEXITED | (0 if reaped else os.WNOWAIT)  # until it has ended, in either case
    os.waitid(os.P_PID, holder.pid, flags)
    with Lease(folder, notify=told.append) as held:
        assert held.epoch == 2
    name = f"process {holder.pid} on {os.uname().nodename}"
    assert told == [f"{folder.parent}: taking over from {name}, which has ended."]


def test_by_default_standard_error_is_told(folder, capfd):
    put(folder, here(ended_pid()))
    with Lease(folder):
        pass
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"{folder.parent}: taking over ") and err.count("\n") == 1


def test_who_released_leaves_to_any_next(folder, holder, told):
    holder.end()
    with Lease(folder, notify=told.append) as held:
        assert held.epoch == 2
    assert told == []


def test_a_foreign_host_is_believed_for_90_seconds(folder, told):
    put(folder, foreign(age=80))
    text = refused(folder)
    assert re.search(r"process 77 on elsewhere is writing .* last heartbeat was 8\d s ago", text)
    put(folder, foreign(age=95))
    with Lease(folder, notify=told.append) as held:
        assert held.epoch == 5
    (line,) = told
    assert re.search(r"from process 77 on elsewhere, which has been silent for 9\d s", line)


def test_a_heartbeat_from_the_future_counts_by_the_time_of_the_file(folder, told):
    put(folder, foreign(age=-3600), age=80)
    assert re.search(r" 8\d s ago", refused(folder))
    put(folder, foreign(age=-3600), age=-3600)
    assert " 0 s ago" in refused(folder)
    put(folder, foreign(age=-3600), age=95)
    with Lease(folder, notify=told.append):
        assert len(told) == 1


def test_a_pid_that_another_process_has_now_is_gone(folder, told):
    started = lease._this_process().started
    put(folder, here(os.getpid(), started=started))
    refused(folder)
    put(folder, here(os.getpid(), started=started - 1))
    with Lease(folder, notify=told.append):
        assert "which has ended" in told[0]


@pytest.mark.parametrize("field", ["host", "boot_id", "namespace"])
def test_a_pid_says_nothing_elsewhere(folder, field):
    put(folder, here(ended_pid(), **{field: "another"}))
    refused(folder)


def test_an_owner_that_names_no_namespace_or_start_is_judged_by_its_pid(folder, told):
    put(folder, here(os.getpid(), namespace="", started=None))
    refused(folder)
    put(folder, here(ended_pid(), namespace="", started=None))
    with Lease(folder, notify=told.append):
        assert len(told) == 1


def test_another_users_process_is_alive(folder, monkeypatch):
    def kill(pid, number):
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "kill", kill)
    put(folder, here(os.getpid(), started=lease._this_process().started))
    refused(folder)


def test_a_process_may_be_named_as_it_likes(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "PROC", tmp_path)
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "stat").write_bytes(b"5 (a) Z 1 (\xff) S " + b" ".join([b"0"] * 18) + b" 123")
    assert lease._process(5) == ("S", 123)


def test_without_proc_the_pid_alone_counts(folder, tmp_path, monkeypatch, told):
    monkeypatch.setattr(lease, "PROC", tmp_path / "none")
    with Lease(folder):
        assert facts(folder)["started"] is None
        refused(folder)
    put(folder, here(ended_pid(), started=None))
    with Lease(folder, notify=told.append):
        assert "which has ended" in told[0]


def test_many_at_once_and_one_wins(folder):
    put(folder, here(ended_pid()))
    with ExitStack() as stack:
        racers = [stack.enter_context(Holder(folder)) for _ in range(8)]
        for racer in racers:
            racer.process.stdin.write("\n")
        for racer in racers:
            racer.process.stdin.flush()
        heard = {racer.pid: racer.hear() for racer in racers}
        (winner,) = [pid for pid, text in heard.items() if text == "epoch 5"]
        others = [text for pid, text in heard.items() if pid != winner]
        assert all(text.startswith("InputError") for text in others)
        assert all(f"process {winner} on " in text for text in others)


@pytest.mark.parametrize("owner", [None, foreign(age=100), foreign(released=True)])
def test_who_is_overtaken_while_taking_is_refused(folder, monkeypatch, owner, told):
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
        Lease(folder, notify=told.append),
    ):
        pass
    assert told == []
    first.check()
    first.__exit__(None, None, None)


def test_the_lease_is_changed_under_the_lock_alone(folder, monkeypatch):
    with Lease(folder):
        pass
    before = facts(folder)
    monkeypatch.setattr(swap, "LOCK_SECONDS", 0.05)
    with open(folder / ".lease.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="has been locked"), Lease(folder):
            pass
    assert facts(folder) == before
    with Lease(folder) as held:
        assert held.epoch == 2


# Who has lost it


def test_a_takeover_by_force_stops_the_old_one(folder, holder, monkeypatch, told):
    monkeypatch.setattr(lease, "CHECK_SECONDS", 0)
    with Lease(folder, takeover=True, notify=told.append) as held:
        assert held.epoch == 2
        (line,) = told
        assert f"from process {holder.pid} on " in line and "because of --takeover" in line
        answer = holder.ask()
        assert answer.startswith(f"LostError {folder.parent}: process {os.getpid()} on ")
        holder.end()
        held.check()
        assert facts(folder)["epoch"] == 2
        assert facts(folder)["released"] is False


def test_two_runs_of_one_process_are_two(folder, hasty):
    with Lease(folder) as first, Lease(folder, takeover=True, notify=[].append) as second:
        with pytest.raises(RunError, match=f"process {os.getpid()} on .* has taken it over"):
            first.check()
        second.check()


def test_force_where_nobody_is_needs_no_word(folder, told):
    for _ in range(2):
        with Lease(folder, takeover=True, notify=told.append):
            pass
    assert told == []


def test_who_was_stopped_for_long_finds_out(folder, holder, monkeypatch, told):
    monkeypatch.setattr(lease, "CHECK_SECONDS", 0)
    refused(folder)
    os.kill(holder.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, holder.pid, os.WSTOPPED)
    monkeypatch.setattr(lease, "SILENT_SECONDS", 0.3)
    time.sleep(0.4)
    with Lease(folder, notify=told.append) as held:
        monkeypatch.setattr(lease, "SILENT_SECONDS", 90.0)
        assert "which has been silent for" in told[0]
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.ask().startswith("LostError")
        holder.end()
        held.check()
    assert facts(folder)["epoch"] == 2


def test_who_was_stopped_and_not_missed_goes_on(folder, monkeypatch):
    with Lease(folder) as held:
        before = facts(folder)["heartbeat"]
        monkeypatch.setattr(lease, "CHECK_SECONDS", 0)
        monkeypatch.setattr(lease, "SILENT_SECONDS", 0)
        held.check()
        assert facts(folder)["heartbeat"] > before


def test_the_new_owner_is_named_also_when_it_is_done(folder, hasty):
    with Lease(folder) as held:
        put(folder, foreign(released=True))
        with pytest.raises(RunError, match="process 77 on elsewhere has taken it over"):
            held.check()


@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_a_lease_that_is_taken_away_is_not_written_again(folder, hasty, content):
    with Lease(folder) as held:
        put(folder, b"")
        (folder / "lease.json").unlink() if content is None else put(folder, content)
        with pytest.raises(RunError, match="removed or damaged"):
            held.check()
    if content is None:
        assert not (folder / "lease.json").exists()
    else:
        assert (folder / "lease.json").read_bytes() == content


def test_a_check_looks_at_most_once_a_second(folder, monkeypatch):
    reads, read = [], swap._SwapFile.read
    with Lease(folder) as held:
        monkeypatch.setattr(swap._SwapFile, "read", lambda self: reads.append(1) or read(self))
        monkeypatch.setattr(lease, "CHECK_SECONDS", 1000)
        for _ in range(100):
            held.check()
        assert reads == []
        monkeypatch.setattr(lease, "CHECK_SECONDS", 0)
        held.check()
        assert reads == [1]


# The heart


def test_the_heart_beats_and_ends_with_the_run(folder, hasty):
    with Lease(folder) as held:
        first = facts(folder)
        for _ in range(3):
            before = facts(folder)["heartbeat"]
            until(lambda before=before: facts(folder)["heartbeat"] > before)
        assert {**facts(folder), "heartbeat": 0} == {**first, "heartbeat": 0}
        assert abs(facts(folder)["heartbeat"] - time.time()) < SECONDS
        held.check()
    assert "lease" not in {thread.name for thread in threading.enumerate()}
    after = (folder / "lease.json").read_bytes()
    time.sleep(0.05)
    assert (folder / "lease.json").read_bytes() == after


def test_a_beat_in_its_middle_is_waited_for_and_undoes_nothing(folder, hasty, monkeypatch):
    beats, beat = [], Lease._beat

    def slow(self):
        beat(self)
        beats.append(1)
        time.sleep(0.2)

    monkeypatch.setattr(Lease, "_beat", slow)
    with Lease(folder) as held:
        until(lambda: beats)
    assert "lease" not in {thread.name for thread in threading.enumerate()}
    held._beat()
    assert facts(folder)["released"] is True


def test_nobody_waits_for_the_last_beat(folder):
    with Lease(folder):
        start = time.monotonic()
    assert time.monotonic() - start < lease.HEARTBEAT_SECONDS / 2


def failing(monkeypatch, code=errno.ENOSPC):
    """Lets every write fail; gives the list of those that did."""
    failures = []

    def write(path, data):
        failures.append(path)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(swap, "write_whole", write)
    return failures


def test_a_beat_that_cannot_be_written_is_tried_again(folder, hasty, monkeypatch):
    write = swap.write_whole
    with Lease(folder) as held:
        failures = failing(monkeypatch)
        until(lambda: len(failures) > 2)
        held.check()
        before = facts(folder)["heartbeat"]
        monkeypatch.setattr(swap, "write_whole", write)
        until(lambda: facts(folder)["heartbeat"] > before)
        held.check()
        monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 1000)
        time.sleep(0.05)
        monkeypatch.setattr(lease, "CHECK_SECONDS", 1000)
        monkeypatch.setattr(lease, "SILENT_SECONDS", 0)
        held.check()  # that old failure is forgotten


def test_silence_is_counted_from_the_last_beat(folder, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time, sleep=time.sleep)
    monkeypatch.setattr(lease, "time", clock)
    with Lease(folder, notify=[].append) as held:
        now[0] = 46
        held.check()  # beats itself
        failing(monkeypatch)
        now[0] = 90
        held.check()
        now[0] = 92
        with pytest.raises(RunError, match="could not be renewed for 46 s"):
            held.check()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_heart_that_cannot_beat_for_long_stops_the_run(folder, hasty, monkeypatch, told, code):
    with Lease(folder, notify=told.append) as held:
        failures = failing(monkeypatch, code)
        until(lambda: failures)
        held.check()
        monkeypatch.setattr(lease, "SILENT_SECONDS", 0.2)
        time.sleep(0.11)
        with pytest.raises(RunError, match=os.strerror(code)) as caught:
            held.check()
        assert str(caught.value).startswith(f"{folder.parent}: the lease could not be renewed")
        monkeypatch.setattr(lease, "SILENT_SECONDS", 90.0)
    assert [line for line in told if "could not be released" in line] == told != []


def test_a_lease_that_cannot_be_read_stops_the_run_no_sooner(folder, hasty, monkeypatch):
    def read(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Lease(folder, notify=[].append) as held:
        monkeypatch.setattr(swap._SwapFile, "read", read)
        held.check()
        monkeypatch.setattr(lease, "SILENT_SECONDS", 0)
        with pytest.raises(RunError, match=os.strerror(errno.EIO)):
            held.check()


def test_an_output_that_cannot_be_written_is_refused(folder, monkeypatch):
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
    *(b'{"pid": ' + b"9" * 5000 + b"}", foreign().encode()[:-9]),
    *(foreign(pid=pid).encode() for pid in (-1, 0, 2**31, 1e3, True, None, "7", [])),
    *(foreign(heartbeat=h).encode() for h in (float("nan"), float("inf"), 1e300, -1, "1", None)),
    *(foreign(heartbeat=h).encode() for h in (10**400, True, [])),
    *(foreign(epoch=epoch).encode() for epoch in (0, -1, 2**63, 10**400, 1.5, True, None)),
    *(foreign(started=started).encode() for started in (-1, 10**400, 0.5, "1", True)),
    *(foreign(host=host).encode() for host in (None, 7, "a\nb", "\x1b[2J", "\ud800")),
    *(foreign(boot_id=3).encode(), foreign(namespace=[]).encode(), foreign(released=1).encode()),
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_damaged_lease_is_of_an_unknown_owner(folder, told, content):
    put(folder, content, age=80)
    text = refused(folder)
    assert "an unknown process (a damaged lease.json) is writing here" in text
    assert re.search(r" 8\d s ago", text)
    put(folder, content, age=95)
    before = int(time.time())
    with Lease(folder, notify=told.append) as held:
        assert held.epoch >= before  # no run had it before
        held.check()
    assert len(told) == 1
    with Lease(folder, notify=told.append) as held:
        assert held.epoch > before
    assert len(told) == 1


def test_a_damaged_lease_yields_to_force(folder, told):
    put(folder, b"garbage")
    with Lease(folder, takeover=True, notify=told.append):
        assert "because of --takeover" in told[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
NAMES = [field.name for field in dataclasses.fields(Owner)]
RECORDS = st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1).map(
    lambda changes: json.dumps({**dataclasses.asdict(foreign()), **changes}).encode()
)


@settings(max_examples=100)
@given(st.binary(max_size=100) | RECORDS)
def test_no_content_keeps_a_lease_from_being_judged(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("lease")
    put(folder, content)
    try:
        with Lease(folder, notify=[].append) as held:
            held.check()
    except InputError as error:
        assert "is writing here" in str(error) and "\n" not in str(error)
    with Lease(folder, takeover=True, notify=[].append) as held:
        held.check()
    assert facts(folder)["released"] is True
