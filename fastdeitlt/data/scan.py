"""Look at every image file of a data set: is it there, does it decode, what is odd about it, is it there twice."""

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image
from rich.console import Console
from rich.progress import track

from fastdeitlt.data.files import FORMATS, PILLOW_ERRORS, UnreadableError, read_encoded

READABLE_FORMATS = (*FORMATS, "MPO")
"""What the reader decodes, in Pillow's names (MPO is a JPEG with more of them behind it)."""
HUGE_FILE_BYTES = 256 * 2**20
HUGE_IMAGE_PIXELS = 50_000_000
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Scan:
    """What one image file turned out to be."""

    problem: str = ""
    """Why training cannot read it; empty for a good image."""
    notes: tuple[str, ...] = ()
    """What is odd about it, though it can be read."""
    digest: bytes = b""
    """sha256 of the file; empty if it could not be read."""


def scan_file(root: str, name: str) -> Scan:
    """Read and fully decode the image ``name`` (relative to ``root``). Never raises for a bad image."""
    file = os.path.join(root, name)
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            return Scan("not a file")
        if status.st_size == 0:
            return Scan("empty (0 bytes)")
        if status.st_size > HUGE_FILE_BYTES:
            return Scan(f"larger than {HUGE_FILE_BYTES // 2**20} MiB")
        with open(file, "rb") as handle:
            data = handle.read()
    except FileNotFoundError:
        return Scan("missing")
    except OSError as error:
        return Scan(f"cannot be read ({error.strerror})")
    notes = () if _inside(root, file) else ("reached through a link that leaves the root",)
    problem, odd = _decode(data)
    if not problem:  # whatever else the reader would refuse
        try:
            read_encoded(file)
        except UnreadableError as error:
            problem = f"refused by the reader ({error})"
    return Scan(problem, notes + odd, hashlib.sha256(data).digest())


def scan_files(root: str, names: list[str], num_threads: int = 0) -> Iterator[Scan]:
    """``scan_file`` of each name, in order, on ``num_threads`` threads (0 = the cores); progress on a terminal."""
    chunks = [names[start : start + 256] for start in range(0, len(names), 256)]
    console = Console(stderr=True)
    with warnings.catch_warnings(), ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what matters is in the Scan
        for chunk in track(chunks, "reading images", console=console, transient=True, disable=not console.is_terminal):
            yield from pool.map(scan_file, [root] * len(chunk), chunk)


def _inside(root: str, file: str) -> bool:
    top = os.path.realpath(root)
    return os.path.commonpath([top, os.path.realpath(file)]) == top


def _decode(data: bytes) -> tuple[str, tuple[str, ...]]:
    """(problem, notes) of encoded image bytes."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            form, mode, size = image.format or "?", image.mode, image.size
            alpha = mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            rotated = image.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1)
            image.load()
    except Image.UnidentifiedImageError:
        return "not an image", ()
    except (*PILLOW_ERRORS, MemoryError) as error:
        return f"truncated or damaged ({type(error).__name__})", ()
    if form not in READABLE_FORMATS:
        return f"{form}, which the reader cannot decode; convert it to PNG or JPEG", ()
    notes = {
        "gray": mode in ("1", "L", "LA"),
        "16 or 32 bits a channel (training sees 8)": mode.startswith(("I", "F")),
        "CMYK": mode in ("CMYK", "YCCK"),
        "an alpha channel (dropped)": alpha,
        "an EXIF rotation (ignored)": rotated,
        f"more than {HUGE_IMAGE_PIXELS // 10**6} megapixels": size[0] * size[1] > HUGE_IMAGE_PIXELS,
    }
    return "", tuple(note for note, found in notes.items() if found)
