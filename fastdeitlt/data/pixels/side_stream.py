"""CUDA work of a source beside the step, on a stream of its own."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@functools.cache
def side_stream(device: torch.device, user: str) -> torch.cuda.Stream | None:
    """A user's stream of the device, always the same, because torch keeps freed memory by stream; None for a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextmanager
def aside(stream: torch.cuda.Stream | None) -> Iterator[list[Tensor]]:
    """Enqueue on the stream what the block does; on leaving, it is done.

    The calling thread waits for this stream alone, never for the step. Tensors put into the list that the block gets
    may afterwards be used on the thread's own stream.
    """
    made: list[Tensor] = []
    if stream is None:
        yield made
        return
    # a thread begins on the first GPU; leaving the stream for that one would make a context there
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield made
    stream.synchronize()
    for tensor in made:
        tensor.record_stream(torch.cuda.current_stream(stream.device))
