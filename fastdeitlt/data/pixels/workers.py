"""Threads of a source: one per core, each for whole batches."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

import torch

from fastdeitlt import distributed
from fastdeitlt.machine import usable_cores

T = TypeVar("T")
R = TypeVar("R")

CPU = torch.device("cpu")
GPU_BATCHES = 8
"""Most batches in preparation at once for a GPU, because each occupies its memory; one decoding graph serves all."""


def num_threads(configured: int = 0) -> int:
    """Return the threads of one rank: ``configured``, or for 0 the cores per rank."""
    return configured or max(1, usable_cores() // distributed.local_world())


def keep_to_one_core() -> None:
    """Limit torch to one thread in this thread, because the pool has one per core.

    Call ``torch.get_num_threads`` in another thread first, so that it keeps its own number.
    """
    torch.set_num_threads(1)


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of ``size``, the last one shorter."""
    rest = iter(items)
    return iter(lambda: list(islice(rest, size)), [])


class Workers:
    """Threads that each compute whole results, in order, ahead of the consumer.

    A result is not divided among threads: parts of one batch wait for each other, whole batches do not.

    Args:
        count: number of threads.
        device: device of the results; for a GPU at most ``GPU_BATCHES`` threads.
    """

    def __init__(self, count: int, device: torch.device = CPU) -> None:
        self.count = count if device.type == "cpu" else min(count, GPU_BATCHES)
        torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.count, "fastdeitlt-data", keep_to_one_core)

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield ``work`` of the items in order, one per thread and one more prefetched.

        An exception is raised in place of its result; closing the iterator cancels the rest.
        """
        consumer = threading.current_thread()
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(work, item))
                if len(pending) > self.count + 1:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            running = [future for future in pending if not future.cancel()]
            if threading.current_thread() is consumer:
                # else an unclosed generator was collected, possibly in a thread that these wait for
                wait(running)

    def close(self) -> None:
        """Finish running tasks, cancel pending ones, end threads. May be called twice."""
        self._pool.shutdown(cancel_futures=True)
