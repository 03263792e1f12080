"""CUDA work of a source beside the step, on a stream of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream of the device; None for a CPU."""
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
    with torch.cuda.stream(stream):
        yield made
    stream.synchronize()
    for tensor in made:
        tensor.record_stream(torch.cuda.current_stream(stream.device))
