"""Threads of a source: parts of a batch in parallel, whole batches ahead of the consumer."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

DEPTH = 2
"""Batches prepared ahead of the one in use."""
LARGEST_PART = 1024
"""Most items handed to a thread at once, so that an error or the end need not wait long for the others."""


def num_threads(configured: int = 0) -> int:
    """Threads of one rank: ``configured``, or for 0 this process's cores divided by the ranks on this machine.

    The launchers say how many these are, but for srun, which gives each task cores of its own.
    """
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1  # the latter is deepspeed's
    return configured or max(1, len(os.sched_getaffinity(0)) // int(ranks))


def keep_to_one_core() -> None:
    """Torch does not split this thread's operations: the pool already has a thread a core.

    Threads that computed before keep their number; ``torch.get_num_threads`` makes sure that one did.
    """
    torch.set_num_threads(1)


class Workers:
    """``count`` threads for parts of a batch and one that puts batches together, in order, ahead of the consumer.

    Only the one thread waits for the others, so they cannot block each other.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        torch.get_num_threads()
        self.pool = ThreadPoolExecutor(count, "fastdeitlt-data", keep_to_one_core)
        self._assembler = ThreadPoolExecutor(1, "fastdeitlt-batch", keep_to_one_core)

    def split(self, work: Callable[[list[T]], R], items: list[T]) -> list[Future[R]]:
        """Start ``work`` on contiguous parts of ``items``, one a thread (long lists: more); results in order."""
        step = min(max(1, -(-len(items) // self.count)), LARGEST_PART)
        return [self.pool.submit(work, items[start : start + step]) for start in range(0, len(items), step)]

    def ahead(self, start: Callable[[T], Callable[[], R]], items: Iterable[T]) -> Iterator[R]:
        """Results of the items in order, up to ``DEPTH`` prepared ahead.

        ``start`` runs in the consumer's thread and may set off work in the pool; what it returns then runs in the
        assembling thread. An exception is raised where its result would have been; leaving early cancels the rest.
        """
        consumer = threading.current_thread()
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(self._assembler.submit(start(item)))
                if len(pending) > DEPTH:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            running = [future for future in pending if not future.cancel()]
            if threading.current_thread() is consumer:
                # else a generator that nobody closed was collected, perhaps in a thread that these wait for
                wait(running)

    def close(self) -> None:
        """Finish what runs, drop what waits, end all threads. May be called twice."""
        self._assembler.shutdown(cancel_futures=True)
        self.pool.shutdown(cancel_futures=True)
