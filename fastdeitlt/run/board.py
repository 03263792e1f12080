"""TensorBoard event files with the numbers of metrics.jsonl."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("fastdeitlt")


class Board:
    """Writer of event files; warns once and stops writing after a file-system error.

    Args:
        folder: folder of the event files, created at the first write.
        first_step: TensorBoard drops events of earlier starts from this step on.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder, self.first_step = folder, first_step
        self._writer: SummaryWriter | None = None
        self._threads: set[threading.Thread] = set()
        self._failed = False
        self._hook = threading.excepthook

    def add(self, kind: str, facts: Mapping[str, Any], step: int) -> None:
        """Write the numeric values of ``facts``."""
        if self._failed:
            return
        try:
            if self._writer is None:
                self._open()
            assert self._writer is not None
            for name, value in facts.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Write pending events and close the files."""
        try:
            if self._writer and not self._failed:
                self._writer.close()
        except OSError as error:
            self._fail(error)
        threading.excepthook = self._hook

    def _open(self) -> None:
        before = set(threading.enumerate())
        threading.excepthook = self._report
        self._writer = SummaryWriter(str(self.folder), purge_step=self.first_step)
        self._threads = set(threading.enumerate()) - before

    def _report(self, failure: threading.ExceptHookArgs) -> None:
        """Suppress tracebacks of TensorBoard's thread: its next call raises the error."""
        if failure.thread not in self._threads or not isinstance(failure.exc_value, OSError):
            self._hook(failure)

    def _fail(self, error: OSError) -> None:
        self._failed = True
        log.warning("%s: cannot be written (%s); metrics.jsonl has the same numbers", self.folder, error)
