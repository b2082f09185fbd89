"""Reads files and JSON that anyone may have written, within bounds.

Knows how large and how deep a file may be. Does not know the meaning of its content.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from unet_ray.storage.places import Place, stat_of

# Bytes; the metadata of a store take some thousand.
LARGEST_JSON = 1 << 26


class ContentError(ValueError):
    """Content that breaks a rule of its format. The message does not name the file."""


def refuse_special(place: Place) -> None:
    """Refuses devices, pipes, sockets and folders, since reading them may never end.

    Raises:
        ContentError: if `place`, or the target of a link, is not a regular file.
        OSError: if it does not exist.
    """
    if isinstance(place, Path) and not stat.S_ISREG(place.stat().st_mode):
        kind = "a folder" if place.is_dir() else "a device, pipe or socket"
        raise ContentError(f"it is {kind}, not a file")


def read_file(place: Place, limit: int = LARGEST_JSON) -> bytes:
    """Returns the bytes of a regular file or an object.

    Args:
        place: the file; a link is followed.
        limit: largest valid size, in bytes.

    Raises:
        ContentError: if it is not a regular file, or larger than `limit`.
        OSError: if it does not exist or cannot be read.
    """
    refuse_special(place)
    if (size := stat_of(place).size) > limit:
        raise ContentError(f"it has {size} bytes, and at most {limit} are valid")
    return place.read_bytes()


def parse_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ContentError: if it is not JSON, is nested too deep, or has a number with too many digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ContentError("its JSON is nested too deep") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ContentError(str(error)) from error
    except ValueError as error:
        raise ContentError("its JSON has a number with too many digits") from error
