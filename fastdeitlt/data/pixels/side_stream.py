"""Side streams for a source's CUDA work, concurrent with the training step."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@functools.cache
def side_stream(device: torch.device, user: str) -> torch.cuda.Stream | None:
    """Return a user's one stream, as torch caches memory by stream; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextmanager
def aside(stream: torch.cuda.Stream | None) -> Iterator[list[Tensor]]:
    """Run the block's CUDA work on the stream and wait for it at the end.

    The calling thread waits for this stream alone, not for the step. Tensors appended to the yielded list may then be
    used on the thread's own stream.
    """
    outputs: list[Tensor] = []
    if stream is None:
        yield outputs
        return
    # a thread starts on GPU 0; switching back to it would create a context there
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield outputs
    stream.synchronize()
    for tensor in outputs:
        tensor.record_stream(torch.cuda.current_stream(stream.device))
