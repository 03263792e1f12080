"""The user cache: files shared by runs that can be rebuilt."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """Return the path of ``name`` in $XDG_CACHE_HOME/fastdeitlt (default: ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdeitlt" / name
