"""Atomic writes of files and folders (a temporary name, then a rename), and the cache of rebuildable files."""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdeitlt.errors import UserError


def flush(path: Path) -> None:
    """Fsync a file, or the directory entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expect_folder(*files: str | Path | None) -> None:
    """Raise UserError if the folder of a file to be written does not exist."""
    for file in files:
        if file and not Path(file).absolute().parent.is_dir():
            raise UserError(f"{file}: no such folder {Path(file).parent}. Create it first.")


@contextmanager
def draft_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` if the block does not raise."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield draft
        flush(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically, keeping its permissions; links are followed.

    A pipe or device is written to directly.
    """
    if path.exists() and (not path.is_file() or path.is_relative_to("/dev")):
        path.write_text(text, encoding="utf-8")
        return
    target = path.resolve()
    with draft_file(target) as draft:
        draft.write_text(text, encoding="utf-8")
        if target.exists():
            shutil.copymode(target, draft)


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``path`` if the block does not raise.

    Requires a lock on ``path``: drafts left by a killed process are removed, and ``path`` does not exist between the
    two renames.
    """
    for stale in path.parent.glob(f"{path.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent) as temporary:
        draft = Path(temporary) / "new"
        draft.mkdir()
        yield draft
        if path.exists():
            path.rename(Path(temporary) / "old")
        draft.rename(path)
        flush(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file; empty if there is no file.

    Raises:
        UserError: the file cannot be read, or is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}). Restore or remove it.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: got a {type(tree).__name__}, expected an object. Restore or remove it.")
    return tree


def user_cache(name: str) -> Path:
    """Return the path of ``name`` in the cache that all runs share.

    The cache is the folder fastdeitlt of $XDG_CACHE_HOME, by default ~/.cache.

    Raises:
        UserError: the user has no home folder.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and a user id without an account, as in some containers
        raise UserError(
            "home folder: none, expected one for the cache. export HOME=FOLDER or XDG_CACHE_HOME=FOLDER."
        ) from None
    return cache / "fastdeitlt" / name
