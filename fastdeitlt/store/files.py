"""Files and folders that are whole or absent: made under another name beside their own, then renamed into place."""

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
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def draft_file(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of ``path`` when the block ends; nothing is left when it raises."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield draft
        flush(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file in one step; what a link points to keeps its place, and a file its permissions.

    A pipe or a device, which nothing can take the place of, is written to.
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
    """A folder to fill that takes the place of ``path`` when the block ends; nothing is left when it raises.

    For whoever holds a lock on ``path``: drafts that a killed process left under its name are removed, and for a
    moment neither the old folder nor the new one is there.
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
    """An object from a JSON file, empty if there is no file.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); restore or remove it") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: got a {type(tree).__name__}, expected an object; restore or remove it")
    return tree
