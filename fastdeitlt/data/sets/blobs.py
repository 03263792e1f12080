"""Encoded images stored inside larger files."""

# N images in the set

import os
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_BYTES = 256 * 2**20
"""Largest encoded image accepted."""


class Blob(NamedTuple):
    """Location of one encoded image in a file."""

    file: str
    start: int
    size: int
    """Bytes in the file."""
    is_deflated: bool
    """Compressed, as in most zips."""

    def read(self) -> bytes:
        """Return the encoded image.

        Raises:
            OSError: the file is missing, too short, or its entry is damaged or too large.
        """
        if self.size > MAX_BYTES:
            raise OSError(f"larger than {MAX_BYTES // 2**20} MiB")
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            data = os.pread(descriptor, self.size, self.start)
        finally:
            os.close(descriptor)
        if len(data) < self.size:
            raise OSError("the shard ends before the image")
        return inflated(data) if self.is_deflated else data


def inflated(data: bytes) -> bytes:
    """Decompress a deflated zip entry.

    Raises:
        OSError: it is damaged, or larger than ``MAX_BYTES``.
    """
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = stream.decompress(data, MAX_BYTES)
    except zlib.error as error:
        raise OSError(f"damaged entry of a zip ({error})") from None
    if not stream.eof:
        raise OSError(f"damaged entry of a zip, or one of more than {MAX_BYTES // 2**20} MiB")
    return content


@dataclass(frozen=True, eq=False)
class Blobs:
    """Location of each encoded image of a set."""

    files: list[str]
    file_N: np.ndarray
    """Index into ``files``, int32 [N]."""
    start_N: np.ndarray
    """int64 [N]."""
    size_N: np.ndarray
    """Bytes in the file, int64 [N]."""
    deflated_N: np.ndarray
    """bool [N]."""

    def __getitem__(self, sample: int) -> Blob:
        """Return the location of one image."""
        file = self.files[int(self.file_N[sample])]
        return Blob(file, int(self.start_N[sample]), int(self.size_N[sample]), bool(self.deflated_N[sample]))

    def take(self, chosen: np.ndarray) -> "Blobs":
        """Return the locations of the images ``chosen``, in that order."""
        parts = (values[chosen] for values in (self.file_N, self.start_N, self.size_N, self.deflated_N))
        return Blobs(self.files, *parts)
