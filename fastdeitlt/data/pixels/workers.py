"""Threads of a source: parts of a batch in parallel, batches prefetched."""

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
"""Batches prefetched."""
LARGEST_PART = 1024
"""Most items per task, so that errors and shutdown do not wait long for other tasks."""


def num_threads(configured: int = 0) -> int:
    """Return the threads of one rank: ``configured``, or for 0 the cores per rank.

    Launchers set the number of local ranks, except srun, which gives each task its own cores.
    """
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1  # the latter is deepspeed's
    return configured or max(1, len(os.sched_getaffinity(0)) // int(ranks))


def keep_to_one_core() -> None:
    """Limit torch to one thread in this thread, because the pool has one per core.

    Call ``torch.get_num_threads`` in another thread first, so that it keeps its own number.
    """
    torch.set_num_threads(1)


class Workers:
    """Threads for parts of a batch, and one that assembles batches ahead, in order.

    Only the assembling thread waits for others, so there is no deadlock.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        torch.get_num_threads()
        self.pool = ThreadPoolExecutor(count, "fastdeitlt-data", keep_to_one_core)
        self._assembler = ThreadPoolExecutor(1, "fastdeitlt-batch", keep_to_one_core)

    def split(self, work: Callable[[list[T]], R], items: list[T]) -> list[Future[R]]:
        """Submit ``work`` on contiguous parts of ``items``, in order."""
        step = min(max(1, -(-len(items) // self.count)), LARGEST_PART)
        return [self.pool.submit(work, items[start : start + step]) for start in range(0, len(items), step)]

    def ahead(self, start: Callable[[T], Callable[[], R]], items: Iterable[T]) -> Iterator[R]:
        """Yield the items' results in order, up to ``DEPTH`` prefetched.

        ``start`` runs in the consumer's thread and may submit work to the pool; the function it returns runs in the
        assembling thread. An exception is raised in place of its result; closing the iterator cancels the rest.
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
                # else an unclosed generator was collected, possibly in a thread that these wait for
                wait(running)

    def close(self) -> None:
        """Finish running tasks, cancel pending ones, end all threads.

        May be called twice.
        """
        self._assembler.shutdown(cancel_futures=True)
        self.pool.shutdown(cancel_futures=True)
