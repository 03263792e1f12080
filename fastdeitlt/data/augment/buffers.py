"""Memory of host batches, used again once nothing refers to it: fresh pages cost more than the arithmetic on them."""

import sys
import threading
from collections import deque

import numpy as np
import torch
from torch import Tensor

MOST = 24
"""Buffers kept: about what the batches in flight take (crops and images of those prepared, used and mixed)."""
SMALLEST = 1 << 17
"""Bytes below which the allocator has warm memory anyway."""

_arrays: deque[np.ndarray] = deque(maxlen=MOST)
_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """``torch.empty``; on the host the memory of an earlier tensor that no tensor, view or graph holds any more.

    A tensor made from an array holds a reference to it as long as its storage lives, so the array's reference count
    tells.
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
    """What the search above counts for an array that only the deque holds."""
    arrays = deque([np.empty(1, np.uint8)])
    return next(sys.getrefcount(a) for a in arrays if a.nbytes)


_IDLE = _references_when_idle()
