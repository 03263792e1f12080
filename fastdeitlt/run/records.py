"""The log of a run, metrics.jsonl: one JSON object a line."""

import errno
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdeitlt.store.files import write_atomically

log = logging.getLogger("fastdeitlt")


class Records:
    """Appends lines to metrics.jsonl. Lines that cannot be written are kept, and written before the next ones.

    ``flush`` is called before each checkpoint, by the thread that writes it: a checkpoint is saved only after the
    lines up to its step are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending = ""
        self._warned = False
        self._lock = threading.Lock()

    def append(self, line: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            FileNotFoundError, NotADirectoryError: the folder is gone.
        """
        with self._lock:
            self._pending += json.dumps(line) + "\n"
            try:
                self._write(wait=False)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR):
                    raise
                if not self._warned:
                    log.warning("%s: cannot be written (%s); its lines are kept for the next try", self.path, error)
                self._warned = True

    def flush(self) -> None:
        """Wait until every line is on the disk.

        Raises:
            OSError: some cannot be written.
        """
        with self._lock:
            self._write(wait=True)

    def _write(self, wait: bool) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                content = self._pending.encode()
                while content:
                    content = content[os.write(descriptor, content) :]
                if wait:
                    os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)  # no half lines, and none twice
                raise
        finally:
            os.close(descriptor)
        self._pending, self._warned = "", False

    def keep(self, belongs: Callable[[str], bool]) -> None:
        """Drop the lines for which ``belongs`` is false, and a last one that a crash cut short."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_atomically(self.path, "".join(line for line in lines if line.endswith("\n") and belongs(line)))

    def read(self) -> list[dict[str, Any]]:
        """The lines so far."""
        with self._lock:
            written = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            return [json.loads(line) for line in (written + self._pending).splitlines()]
