"""Where files lie that outlive a run and can be made again."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """``name`` in the user's cache: $XDG_CACHE_HOME/fastdeitlt, by default ~/.cache/fastdeitlt."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdeitlt" / name
