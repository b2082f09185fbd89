"""``ray job submit --working-dir . -- python jobs/segment.py ...``: the verb `segment`, on Ray."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unet_ray.cli import main

if __name__ == "__main__":
    sys.exit(main("segment"))
