"""Runs `train` on Ray: ``ray job submit --working-dir . -- python jobs/train.py ...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unet_ray.__main__ import run

if __name__ == "__main__":
    run("train")
