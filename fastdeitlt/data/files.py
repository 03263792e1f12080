"""Encoded image files: read them and refuse what no decoder should see."""

import os
import stat
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
"""Pillow names of what is taken. Not JPEG2000: a damaged one ends the process in DALI 2.4."""
MAX_PIXELS = 89_478_485
"""Largest image taken: Pillow's limit against decompression bombs."""
PILLOW_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises on damaged files."""


class UnreadableError(Exception):
    """A file is not an image we can use; the message says why."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A file as it is on disk, and the size its header states."""

    sample: int
    data: np.ndarray
    height: int
    width: int


def read_encoded(path: str, sample: int = 0, header_only: bool = False) -> Encoded:
    """Read a file and check what can be checked without decoding it.

    A JPEG without an end marker is truncated; decoding a region above the cut would not show that.

    Args:
        sample: index of the image in its set, passed on.
        header_only: for the size alone; ``data`` stays empty.

    Raises:
        UnreadableError: no regular file, empty, not an image, truncated, too large.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would hang
            raise UnreadableError("not a file")
        if status.st_size == 0:
            raise UnreadableError("empty file")
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            (width, height), kind, header_bytes = image.size, image.format, file.tell()
            file.seek(0)
            data = b"" if header_only else file.read()
    except UnidentifiedImageError:
        raise UnreadableError(f"not an image ({', '.join(FORMATS)})") from None
    except PILLOW_ERRORS as error:
        raise UnreadableError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from None
    if height * width > MAX_PIXELS:
        raise UnreadableError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
    if kind == "JPEG" and not header_only and data.rfind(b"\xff\xd9", header_bytes) < 0:
        raise UnreadableError("truncated JPEG")
    return Encoded(sample, np.frombuffer(data, np.uint8), height, width)


def shrunk(sizes_N2: np.ndarray, short_side: int) -> np.ndarray:
    """Sizes after images with a longer shorter side are resized to ``short_side``; 0 = as they are. int32 [N, 2]."""
    short_N1 = sizes_N2.min(axis=1, keepdims=True)
    smaller_N2 = sizes_N2.astype(np.int64) * short_side // np.maximum(short_N1, 1)
    return np.where((short_side > 0) & (short_N1 > short_side), smaller_N2, sizes_N2).astype(np.int32)
