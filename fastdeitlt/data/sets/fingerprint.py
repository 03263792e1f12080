"""What tells two data sets apart, cheaply: the fingerprint that a resumed run and a teacher's folder are checked by."""

# N images in the set

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastdeitlt.data.sets.blobs import Blob
from fastdeitlt.data.sets.types import LongTailSet

READ_FILES = 256
"""Files whose content is part of a set's fingerprint."""
THREADS = 16
"""A size costs a round trip on a network file system."""


def fingerprint(images: LongTailSet) -> str:
    """Return the sha256 of a set's content, in order: names, labels, and pixels or files.

    Of a set that comes decoded, all pixels. Of files, the size of each and the content of up to 256, evenly spaced in
    the list: a set that was resized or stored anew differs in all. A file that cannot be read counts as such.
    """
    digest = hashlib.sha256("\n".join(images.paths).encode("utf-8", "surrogateescape"))
    digest.update(np.asarray(images.labels, dtype=np.int64).tobytes())
    if images.images_NHWC is not None:
        digest.update(np.ascontiguousarray(images.images_NHWC).data)
        return digest.hexdigest()
    if images.blobs:
        digest.update(images.blobs.size_N.tobytes())
    else:
        parts = [images.paths[start::THREADS] for start in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            for sizes in pool.map(lambda paths: [_size(images.root, path) for path in paths], parts):
                digest.update(np.array(sizes, dtype=np.int64).tobytes())
    for index in np.unique(np.linspace(0, len(images) - 1, READ_FILES).astype(np.int64)).tolist():
        try:
            place = images.place(index)
            data = place.read() if isinstance(place, Blob) else Path(place).read_bytes()
            digest.update(hashlib.sha256(data).digest())
        except OSError:  # the reader says what is wrong with it, or leaves it out (data.on_error)
            digest.update(b"unreadable")
    return digest.hexdigest()


def _size(root: str, path: str) -> int:
    try:
        return os.stat(os.path.join(root, path)).st_size
    except OSError:
        return -1
