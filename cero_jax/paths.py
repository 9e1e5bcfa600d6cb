"""Paths as a user gives them."""

import re
from pathlib import Path


def local_path(given: str) -> Path:
    """A path as a user gave it, with `~`, which a shell leaves as it is behind `=`, resolved.

    Raises ValueError for what lies on no file system of this machine, like gs://bucket/runs.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", given):
        raise ValueError(f"{given}: not a path on this machine: copy it here, or mount it, and give its path")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{given}: {error} Give the path without ~") from error
