"""``python -m unet_ray`` and the installed ``unet-ray``: the command line, as a process."""

from __future__ import annotations

import os
import sys

from unet_ray.cli import main


def run(verb: str | None = None) -> None:
    """Runs the command line, or one verb of it, and ends the process with its exit code."""
    code = main(verb)
    loop = sys.modules.get("unet_ray.engine.threads")  # not every verb has loaded it
    if loop and loop.has_left_threads():
        # Passes that still run would crash as Python ends; nothing half-done counts as done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
