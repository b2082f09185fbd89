"""A short run of the fuzzer, and whether it notices each kind of fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICK = ["TIFF", "TIFF, base", "Zarr", "PNG", "model", "config"]  # others need a whole run
FAULTS = """if True:
    import json, os, pathlib, signal, tempfile
    import numpy as np
    from tests import fuzz
    from unet_ray.errors import InputError

    def raises(error):
        raise error

    def large():
        np.ones(fuzz.MEMORY // 4)

    work = {
        "one sentence": lambda: raises(InputError("a sentence.")),
        "two lines": lambda: raises(InputError("two\\nlines.")),
        "error": lambda: raises(RecursionError("deep")),
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "print": lambda: os.write(2, b"Traceback (most recent call last):"),
        "endless": lambda: signal.pause(),
        "value": lambda: [1, 2],
    }
    folder = pathlib.Path(tempfile.mkdtemp())
    beyond = fuzz.in_child(large, folder)[3] - fuzz.in_child(lambda: None, folder)[3]
    fuzz.SECONDS = 3
    results = {name: fuzz.in_child(each, folder) for name, each in work.items()}
    results["large"] = "", "", None, beyond - fuzz.MEMORY
    print(json.dumps(results))
"""


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sixty_damaged_files_are_refused_or_read_as_they_were():
    chosen = [argument for name in QUICK for argument in ("--format", name)]
    *_, last = run("-m", "tests.fuzz", "60", *chosen).splitlines()
    name, files, refusals, successes, *faults = last.split()
    assert (name, files) == ("all", "60") and int(refusals) + int(successes) == 60
    assert int(refusals) > 10 < int(successes) and faults == ["0"] * 4


def test_the_fuzzer_notices_every_kind_of_fault():
    results = json.loads(run("-c", FAULTS))
    assert {name: verdict for name, (verdict, *_) in results.items() if name != "large"} == {
        "one sentence": "refusals",
        "two lines": "tracebacks",
        "error": "tracebacks",
        "crash": "tracebacks",
        "print": "tracebacks",
        "endless": "hangs",
        "value": "successes",
    }
    assert results["value"][2] == [1, 2] and results["large"][3] > 0
