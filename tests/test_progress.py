"""The displayed pace: that of the last minute, not of an hour ago."""

import math
import os
import struct
import subprocess
import sys
from contextlib import suppress

import pytest

from unet_ray import progress
from unet_ray.progress import Pace, ProgressBar
from unet_ray.units import format_seconds


def paced(*steps):
    """A pace after tiles of 100 voxels that took `steps` seconds each."""
    pace, now = Pace(), 0.0
    for number, seconds in enumerate(steps, start=1):
        now += seconds
        pace.saw(now, number, 100 * number)
    return pace


def test_without_a_tile_the_time_left_is_unknown():
    assert Pace().seconds(5) == math.inf and Pace().voxels == 0
    assert format_seconds(math.inf) == "unknown time"


def test_the_first_tile_counts_from_the_start():
    assert paced(4).seconds(5) == pytest.approx(20)
    assert paced(4).voxels == pytest.approx(25)


def test_the_start_of_workers_is_forgotten():
    assert paced(30, 2, 2).seconds(10) == pytest.approx(20)


def test_only_the_last_minute_counts():
    steady = [10] * 50
    assert paced(*steady, *[1] * 100).seconds(60) == pytest.approx(60)
    # Long tiles: only the last 20 count.
    assert paced(*steady, *[100] * 20).seconds(1) == pytest.approx(100)


@pytest.mark.parametrize("workers", [1, 2, 32])
@pytest.mark.parametrize("start", [0.0, 45.0])
def test_tiles_that_end_at_nearly_the_same_time_are_one_round(workers, start):
    """Rounds of 60 s: the estimate is right from the second round on, and close before."""
    pace, estimates = Pace(workers), []
    for number in range(1, 5 * workers + 1):
        round_, place = divmod(number - 1, workers)
        pace.saw(start + 60 * (round_ + 1) + 0.1 * place, number, number)
        estimates.append(pace.seconds(10 * workers))
    assert all(math.isinf(seconds) for seconds in estimates[: workers - 1])
    assert estimates[workers - 1] == pytest.approx(600 + 10 * start, rel=0.06)
    assert estimates[workers:] == pytest.approx([600] * 4 * workers, rel=0.06)


def test_the_stored_history_is_short():
    assert len(paced(*[0.5] * 1000)._seen) <= 123


def test_a_log_has_a_line_at_the_start_and_at_the_end(capsys):
    with ProgressBar("work") as bar:
        for step in range(5):
            bar.show(step / 4, f"{step} of 4")
    assert capsys.readouterr().err == "work: 0 of 4\nwork: 4 of 4\n"
    with ProgressBar("work", quiet=True) as bar:
        bar.show(1, "4 of 4")
        bar.say("a line")
        bar.show_table([("a", "b")])
    assert capsys.readouterr().err == ""


def test_a_table_repeats_no_name(capsys):
    ProgressBar("work").show_table([("images", "a.tif"), ("images", "b.tif"), ("patch", "380")])
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert lines == [["images", "a.tif"], ["b.tif"], ["patch", "380"]]


TERMINAL = """
import sys, time
from unet_ray.progress import ProgressBar
with ProgressBar("volume.tif") as bar:
    bar.show(0.25, "1/4 tiles")
    time.sleep(0.5)  # it is drawn ten times a second
    bar.say("a line that stays")
    if sys.argv[1] == "fails":
        raise SystemExit(3)
    bar.show(1.0, "4/4 tiles")
"""


@pytest.mark.parametrize(("how", "code"), [("ends", 0), ("fails", 3)])
def test_a_terminal_shows_a_bar_and_gets_its_cursor_back(how, code):
    pty = pytest.importorskip("pty", reason="needs a Unix terminal")
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", TERMINAL, how], stderr=follower, text=True)
    os.close(follower)
    shown = b""
    with suppress(OSError):  # Linux raises it at the end
        while part := os.read(leader, 4096):
            shown += part
    os.close(leader)
    assert process.wait(60) == code
    text = shown.decode()
    assert "volume.tif" in text and "1/4 tiles" in text and "a line that stays" in text
    assert ("4/4 tiles" in text) == (how == "ends")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is visible again


class Notebook:
    """Stands for IPython in a kernel."""

    def __init__(self):
        self.shown = []

    def get_ipython(self):
        return type("ZMQInteractiveShell", (), {})()

    def display(self, bar, display_id):
        self.shown.append(bar._repr_html_())
        return type("Handle", (), {"update": lambda _, bar: self.shown.append(bar._repr_html_())})()


def test_a_notebook_shows_one_live_bar(monkeypatch, capsys):
    notebook = Notebook()
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    monkeypatch.setattr(progress, "NOTEBOOK_SECONDS", 0.0)
    with ProgressBar("<volume>") as bar:
        bar.show(0.5, "1/2 tiles")
        bar.show(1.0, "2/2 tiles")
    assert [text.count("<progress value='") for text in notebook.shown] == [1, 1]
    assert "&lt;volume&gt;" in notebook.shown[0] and "2/2 tiles" in notebook.shown[1]
    assert capsys.readouterr().err == ""


LONG = """
import time
from unet_ray.progress import ProgressBar
with ProgressBar("volume.zarr") as bar:
    for step in (1, 2):
        bar.show(step / 3, f"{step}/3 tiles, 3 failures, 1.234 Mvoxel/s, 3 min 05 s left")
        time.sleep(0.3)
"""


@pytest.mark.parametrize("columns", [120, 60, 40, 20])
def test_a_bar_takes_one_row(columns):
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", LONG], stderr=follower)
    os.close(follower)
    shown = b""
    with suppress(OSError):  # Linux raises it at the end
        while part := os.read(leader, 4096):
            shown += part
    os.close(leader)
    assert process.wait(60) == 0
    text = shown.decode()
    assert "vol" in text
    assert "\x1b[1A" not in text  # the cursor never moves up, as it would from a second row
