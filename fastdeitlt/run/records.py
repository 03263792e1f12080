"""The records of a run, metrics.jsonl: one JSON object per line."""

import errno
import json
import logging
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdeitlt.store.files import write_atomically

log = logging.getLogger("fastdeitlt")


class Records:
    """Writer of metrics.jsonl; failed lines are kept and retried.

    ``flush`` is called before each checkpoint by its writer thread: a checkpoint is saved only after the lines up to
    its step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending = ""
        self._warned = False
        self._lock = threading.Lock()

    def append(self, line: dict[str, Any]) -> None:
        """Append a line, with null for numbers that are not finite: JSON has no NaN.

        Raises:
            FileNotFoundError, NotADirectoryError: the folder was removed.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with self._lock:
            self._pending += json.dumps(finite) + "\n"
            try:
                self._write(wait=False)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR):
                    raise
                if not self._warned:
                    log.warning("%s: cannot be written (%s); its lines are kept for the next attempt", self.path, error)
                self._warned = True

    def flush(self) -> None:
        """Write and fsync all lines.

        Raises:
            OSError: lines cannot be written.
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
                os.ftruncate(descriptor, size)  # no partial or duplicate lines
                raise
        finally:
            os.close(descriptor)
        self._pending, self._warned = "", False

    def keep(self, belongs: Callable[[str], bool]) -> None:
        """Drop the lines for which ``belongs`` is false, and a truncated last line."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_atomically(self.path, "".join(line for line in lines if line.endswith("\n") and belongs(line)))

    def read(self) -> list[dict[str, Any]]:
        """Return the records so far."""
        with self._lock:
            written = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            return [json.loads(line) for line in (written + self._pending).splitlines()]
