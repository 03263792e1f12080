"""Prefetching of an iterator in one thread."""

import queue
import sys
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch

from fastdeitlt.data.pixels.workers import keep_to_one_core

T = TypeVar("T")


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield the items, computed up to ``depth`` ahead in a thread.

    The thread ends with the consumer. An exception of the producer is raised in place of its item.
    """
    consumer = threading.current_thread()
    torch.get_num_threads()
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        keep_to_one_core()
        try:
            for item in items:
                if not put(item, None):
                    return
            put(None, StopIteration())
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            put(None, error)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        if threading.current_thread() is consumer and not sys.is_finalizing():
            # Not where a generator that nobody closed was collected: another thread may be one that the producer waits
            # for, and once the interpreter ends the producer cannot run any more (Python 3.13 would wait for ever).
            thread.join()
