"""Reuse of host memory for batches: fresh pages cost more than the arithmetic."""

import sys
import threading
from collections import deque

import numpy as np
import torch
from torch import Tensor

MOST = 24
"""Buffers kept, about as many as batches in flight need (crops and images, prefetched, used and mixed)."""
SMALLEST = 1 << 17
"""Bytes below which the allocator reuses memory itself."""

_arrays: deque[np.ndarray] = deque(maxlen=MOST)
_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return an uninitialised tensor; on the host, reuse memory that is out of use.

    Memory is reused when no tensor, view or graph references it: a tensor from an array references the array while its
    storage exists, so the array's reference count shows idle memory.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if (device is not None and device.type != "cpu") or num_bytes < SMALLEST:
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        array = next((a for a in _arrays if a.nbytes == num_bytes and sys.getrefcount(a) <= _IDLE), None)
        if array is None:
            array = np.empty(num_bytes, np.uint8)
            _arrays.append(array)
        return torch.from_numpy(array).view(dtype).view(shape)


def _references_when_idle() -> int:
    """Return the reference count of an array that only the deque references."""
    arrays = deque([np.empty(1, np.uint8)])
    return next(sys.getrefcount(a) for a in arrays if a.nbytes)


_IDLE = _references_when_idle()
