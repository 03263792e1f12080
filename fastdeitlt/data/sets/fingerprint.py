"""Fingerprint of a data set, to verify a resumed run's and a model's training images."""

# N images in the set

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastdeitlt.data.sets.blobs import Blob
from fastdeitlt.data.sets.types import LongTailSet

log = logging.getLogger("fastdeitlt")
READ_FILES = 256
"""Number of files whose content is part of the fingerprint."""
THREADS = 16
"""On a network file system each file's status is a round trip."""


def fingerprint(images: LongTailSet) -> str:
    """Return the sha256 of a set in order: names, labels, and pixels or files.

    A decoded set contributes all pixels. Files contribute every size and the content of up to 256 files, evenly spaced
    in the list; resizing or re-encoding a set changes all of them. An unreadable file has a fixed placeholder.
    """
    digest = hashlib.sha256("\n".join(images.paths).encode("utf-8", "surrogateescape"))
    digest.update(np.asarray(images.labels, dtype=np.int64).tobytes())
    if images.images_NHWC is not None:
        digest.update(np.ascontiguousarray(images.images_NHWC).data)
        return digest.hexdigest()
    if images.blobs:
        digest.update(images.blobs.size_N.tobytes())
    else:
        size_N = file_facts(images.root, images.paths)[:, 0]
        for start in range(THREADS):
            digest.update(size_N[start::THREADS].tobytes())
    for index in np.unique(np.linspace(0, len(images) - 1, READ_FILES).astype(np.int64)).tolist():
        try:
            place = images.place(index)
            data = place.read() if isinstance(place, Blob) else Path(place).read_bytes()
            digest.update(hashlib.sha256(data).digest())
        except OSError:  # the reader reports or skips it (data.on_error)
            digest.update(b"unreadable")
    return digest.hexdigest()


def warn_of_moved_images(what: str, trained_on: str | None, train: LongTailSet) -> None:
    """Warn if a model's training images are not those left by today's hold-out.

    A hold-out depends on all images of a class. After images were added or removed, some that are held out now were
    training images then.

    Args:
        what: the model, for the message.
        trained_on: fingerprint of its training images; None: unknown, no warning.
        train: today's training images.
    """
    if trained_on and trained_on != fingerprint(train):
        log.warning(
            "%s: trained on other images than today's training split. Images held out now may have been among them, "
            "and then its accuracy on them is too high. Keep test images in a separate folder (test/).", what,
        )  # fmt: skip


def file_facts(root: str, paths: Sequence[str]) -> np.ndarray:
    """Return (bytes, time in ns, mode) of files, int64 [N, 3]; -1 if absent."""

    def read(path: str) -> tuple[int, int, int]:
        try:
            status = os.stat(os.path.join(root, path))
        except OSError:
            return -1, -1, -1
        return status.st_size, status.st_mtime_ns, status.st_mode

    facts_N3 = np.empty((len(paths), 3), np.int64)
    parts = [paths[start::THREADS] for start in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        for start, part in enumerate(pool.map(lambda some: [read(path) for path in some], parts)):
            facts_N3[start::THREADS] = np.array(part, np.int64).reshape(-1, 3)
    return facts_N3
