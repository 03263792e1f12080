"""Encoded image files: reading, checks, and removal of harmful metadata."""

import errno
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from fastdeitlt.data.sets.blobs import MAX_BYTES, Blob

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
"""Supported formats, Pillow's names. Not JPEG2000: a damaged one ends the process in DALI 2.4."""
MAX_PIXELS = 89_478_485
"""Largest image accepted: Pillow's limit against decompression bombs."""
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
"""Exceptions that Pillow raises on damaged files."""
ORIENTATION = 0x0112
"""EXIF and TIFF tag of the orientation, 1 to 8; 1 = upright."""
_OF_FILE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL,
)  # fmt: skip
"""System errors about a file itself."""
_BEGINNINGS = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n"}
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""Markers of the chunks from which Pillow reads a PNG's orientation."""


class UnreadableError(Exception):
    """A file is not a usable image; Pillow's or the system's error is the cause."""

    @property
    def is_of_system(self) -> bool:
        """Return whether the system failed, such as by a stale handle, not this file."""
        cause = self.__cause__
        return isinstance(cause, OSError) and cause.errno is not None and cause.errno not in _OF_FILE


@dataclass(frozen=True, eq=False)
class Encoded:
    """An image file ready for decoding, with the size of the decoded image."""

    sample: int
    data: np.ndarray
    """uint8, without metadata that DALI applies, warns about or fails on."""
    height: int
    width: int
    orientation: int = 1
    """EXIF orientation to apply, 1 to 8; ``height`` and ``width`` are those after it."""


def read_encoded(place: str | Blob, sample: int = 0, *, exif: str = "ignore", header_only: bool = False) -> Encoded:
    """Read an image file, or a part of a file, and check it without decoding.

    Truncated files are refused here, because decoding a region above the cut would not fail.

    Args:
        sample: index of the image in its set, stored in the result.
        exif: ``data.exif``. A TIFF's own orientation tag is always applied, as in Pillow.
        header_only: determine the size alone; ``data`` stays empty.

    Raises:
        UnreadableError: not a regular file, empty, not an image, truncated, or too large.
    """
    with _unreadable(), _open(place) as file:
        return _examine(file, sample, exif, header_only)


def from_pillow(image: Image.Image, sample: int = 0, *, exif: str = "ignore") -> Encoded:
    """Encode an image in memory as PNG, for the same decoder as files.

    Raises:
        UnreadableError: more than 16 bits per channel, too many pixels, or a TIFF that Pillow misreads.
    """
    buffer = io.BytesIO()
    with _unreadable():
        _refuse_misread(image)
        image.load()  # applies a TIFF's orientation and removes its tag
        if image.mode in ("I", "F"):
            raise UnreadableError(f"mode {image.mode}, expected 8 or 16 bits per channel")
        converted = image if image.mode in _PNG_MODES else image.convert("RGB")
        converted.save(buffer, "PNG", compress_level=1, exif=image.getexif())
        return _examine(buffer, sample, exif, header_only=False)


def glance(place: str | Blob) -> None:
    """Check the first and last bytes of an image; fully read one of other formats.

    A compressed one in a zip is read as well.

    Raises:
        UnreadableError: see ``read_encoded``.
    """
    beginning = end = b""
    with suppress(OSError):  # read_encoded finds the reason
        descriptor = os.open(place.file if isinstance(place, Blob) else place, os.O_RDONLY | os.O_NONBLOCK)
        try:
            start = place.start if isinstance(place, Blob) else 0
            size = place.size if isinstance(place, Blob) else os.fstat(descriptor).st_size
            if size <= MAX_BYTES:
                beginning, end = os.pread(descriptor, 16, start), os.pread(descriptor, 16, start + max(0, size - 16))
        finally:
            os.close(descriptor)
    if not any(beginning.startswith(mark) and end.endswith(_ENDS[kind]) for kind, mark in _BEGINNINGS.items()):
        read_encoded(place, header_only=True)


def shrunk(sizes_N2: np.ndarray, short_side: int) -> np.ndarray:
    """Return sizes with the shorter side limited (0: no limit), int32 [N, 2]."""
    short_N1 = sizes_N2.min(axis=1, keepdims=True)
    smaller_N2 = sizes_N2.astype(np.int64) * short_side // np.maximum(short_N1, 1)
    return np.where((short_side > 0) & (short_N1 > short_side), smaller_N2, sizes_N2).astype(np.int32)


@contextmanager
def _unreadable() -> Iterator[None]:
    """Convert errors of Pillow and the system to UnreadableError."""
    try:
        yield
    except PILLOW_ERRORS as error:
        raise UnreadableError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


@contextmanager
def _open(place: str | Blob) -> Iterator[BinaryIO]:
    if isinstance(place, Blob):
        yield io.BytesIO(place.read())
        return
    status = os.stat(place)
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would hang
        raise UnreadableError("not a file")
    if status.st_size == 0:
        raise UnreadableError("empty file")
    if status.st_size > MAX_BYTES:
        raise UnreadableError(f"larger than {MAX_BYTES // 2**20} MiB")
    with open(place, "rb") as file:
        yield file


def _examine(file: BinaryIO, sample: int, exif: str, header_only: bool) -> Encoded:
    with _open_image(file) as image:
        kind: str = image.format or ""
        tags: Any = getattr(image, "tag_v2", {})
        width, height = (int(tags[256]), int(tags[257])) if kind == "TIFF" else image.size
        if height * width > MAX_PIXELS:
            raise UnreadableError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
        if image.mode == "F":
            raise UnreadableError("floating-point pixels, expected 8 or 16 bits per channel")
        _refuse_misread(image)
        if _is_cut(file, kind, tags):
            raise UnreadableError(f"truncated {kind}")
        if kind == "TIFF" and not header_only and _needs_pillow(image, tags):
            return from_pillow(image.convert("RGB"), sample)
        data = b"" if header_only and not (kind == "PNG" and exif == "apply") else _contents(file)
        if kind == "PPM" and not header_only:
            data = _scaled(image, data)
        orientation = tags.get(ORIENTATION, 1) if kind == "TIFF" else 1
        if exif == "apply" and kind != "TIFF":
            orientation = stated_orientation(image, data)
    if orientation not in range(2, 9):
        orientation = 1
    if orientation >= 5:
        height, width = width, height
    pixels = np.frombuffer(b"" if header_only else _only_pixels(data, kind), np.uint8)
    return Encoded(sample, pixels, height, width, orientation)


def _open_image(file: BinaryIO) -> ImageFile.ImageFile:
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        pass
    try:
        file.seek(0)
        with Image.open(file) as image:
            kind = f"{image.format} image"
    except PILLOW_ERRORS:
        kind = "not an image"
    raise UnreadableError(f"{kind}, expected {', '.join(FORMATS)}")


def _needs_pillow(image: Image.Image, tags: Any) -> bool:
    """Return whether DALI 2.4 fails on a TIFF that Pillow decodes.

    Bilevel; gray or palette with alpha; colours premultiplied by alpha.
    """
    return image.mode == "1" or tags.get(277) == 2 or 1 in tags.get(338, ())


def _refuse_misread(image: Image.Image) -> None:
    """Raise on a TIFF that both DALI 2.4 and Pillow decode to wrong pixels."""
    if image.format != "TIFF":
        return
    tags: Any = getattr(image, "tag_v2", {})
    photometric, bits = tags.get(262), max(tags.get(258, (1,)))
    if bits > 16:
        raise UnreadableError(f"TIFF with {bits} bits per channel, expected 8 or 16")
    if photometric == 8:
        raise UnreadableError("Lab TIFF, expected RGB, gray, palette or CMYK")
    if photometric == 0 and bits > 8:
        raise UnreadableError(f"TIFF with {bits} bits in which 0 is white, expected 0 as black")
    if tags.get(284) == 2 and tags.get(277, 1) > 1 and (bits > 8 or 2 in tags.get(338, ())):
        what = f"{bits} bits per channel" if bits > 8 else "an alpha channel"
        raise UnreadableError(f"planar TIFF with {what}, expected interleaved channels")
    if image.mode == "La":
        raise UnreadableError("gray TIFF premultiplied by alpha, expected unassociated alpha")


def _scaled(image: ImageFile.ImageFile, data: bytes) -> bytes:
    """Rewrite a PNM with 255 as its maximum, as DALI scales no other but 65,535.

    Equal to Pillow, whose decoder of these files is a slow loop in Python.
    """
    codec, _, start, args = image.tile[0]
    if not isinstance(args, tuple) or args[1] in (255, 65535):
        return data
    maximum, is_rgb = args[1], image.mode == "RGB"
    count = image.width * image.height * (3 if is_rgb else 1)
    if codec == "ppm_plain":  # decimal numbers and comments
        numbers = re.sub(rb"#[^\r\n]*", b"", data[start:]).split()[:count]
        values = np.fromiter(map(int, numbers), np.int64)
    else:
        size = 1 if maximum < 256 else 2
        num_bytes = min(count, (len(data) - start) // size) * size
        values = np.frombuffer(data[start : start + num_bytes], f">u{size}")
    if len(values) < count:
        raise UnreadableError("truncated PPM")
    scaled = np.rint(np.arange(maximum + 1) / maximum * 255).astype(np.uint8)
    pixels = scaled[values.clip(0, maximum)]
    return b"%s\n%d %d\n255\n" % (b"P6" if is_rgb else b"P5", *image.size) + pixels.tobytes()


def _contents(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def _is_cut(file: BinaryIO, kind: str, tags: Any) -> bool:
    """Return whether the file is truncated, as far as its format shows it."""
    size = file.seek(0, os.SEEK_END)
    if kind == "TIFF":
        starts, lengths = (tags.get(strips) or tags.get(tiles) or () for strips, tiles in ((273, 324), (279, 325)))
        return any(start + length > size for start, length in zip(starts, lengths, strict=False))
    if kind == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 > size
    if (end := _ENDS.get(kind)) is None:
        return False
    file.seek(max(0, size - len(end)))
    if file.read() == end:
        return False
    data = _contents(file)  # trailing data may follow the end marker
    return data.rfind(end, _first_scan(data) if kind != "PNG" else 0) < 0


def _first_scan(data: bytes) -> int:
    """Return the offset of a JPEG's first scan, past a thumbnail's end marker."""
    position = 2
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] != b"\xda":
        filled = data[position + 1 : position + 2] == b"\xff"
        position += 1 if filled else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position


def stated_orientation(image: Image.Image, data: bytes) -> Any:
    """Return the orientation as ``PIL.ImageOps.exif_transpose``; 1 if damaged.

    Args:
        image: opened by Pillow.
        data: the file, if it is a PNG.
    """
    try:
        if image.format != "PNG":
            return image.getexif().get(ORIENTATION, 1)
        if not any(mark in data for mark in _PNG_EXIF):  # Pillow would decode the whole PNG
            return 1
        with Image.open(io.BytesIO(data)) as copy:
            return copy.getexif().get(ORIENTATION, 1)
    except PILLOW_ERRORS:
        return 1


def _only_pixels(data: bytes, kind: str) -> bytes:
    """Remove metadata that DALI 2.4 mishandles.

    libpng warns about odd colour profiles at each read; DALI's WebP parser fails on metadata of odd length; OpenCV,
    DALI's fallback for TIFF, applies the orientation tag.
    """
    if kind == "PNG":
        chunks, position = [data[:8]], 8
        while position < len(data):
            end = position + 12 + int.from_bytes(data[position : position + 4], "big")
            if data[position + 4 : position + 8] in _PNG_PIXELS:
                chunks.append(data[position:end])
            position = end
        return b"".join(chunks)
    if kind == "WEBP":
        position = 12
        while position < len(data):
            length = int.from_bytes(data[position + 4 : position + 8], "little")
            end = position + 8 + length + length % 2
            if data[position : position + 4] in (b"VP8 ", b"VP8L"):
                return b"RIFF" + (4 + end - position).to_bytes(4, "little") + b"WEBP" + data[position:end]
            position = end
    if kind == "TIFF" and data[:4] in (b"II*\0", b"MM\0*"):
        order = "<" if data[:2] == b"II" else ">"
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (number,) = struct.unpack_from(f"{order}H", data, start)
        for entry in range(start + 2, start + 2 + 12 * number, 12):
            if struct.unpack_from(f"{order}H", data, entry) == (ORIENTATION,):
                return data[:entry] + struct.pack(f"{order}HHIHH", ORIENTATION, 3, 1, 1, 0) + data[entry + 12 :]
    return data
