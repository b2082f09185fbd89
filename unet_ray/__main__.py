"""``python -m unet_ray`` and the installed ``unet-ray``: the command line."""

from __future__ import annotations

import sys

from unet_ray.cli import main


def run() -> None:
    """Runs the command line and ends the process with its exit code."""
    sys.exit(main())


if __name__ == "__main__":
    run()
