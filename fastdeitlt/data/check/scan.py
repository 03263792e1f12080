"""Scan every image file of a data set: existence, decoding, oddities, digests."""

import hashlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from fastdeitlt.config import DataConfig
from fastdeitlt.data.pixels.decoder import Decoder
from fastdeitlt.data.pixels.files import (
    PILLOW_ERRORS,
    Encoded,
    UnreadableError,
    glance,
    read_encoded,
    stated_orientation,
)
from fastdeitlt.data.pixels.workers import Workers, num_threads
from fastdeitlt.data.sets.blobs import Blob, Blobs
from fastdeitlt.data.sets.class_names import listed
from fastdeitlt.data.sets.types import LongTailSet, Sets
from fastdeitlt.errors import UserError, counted

log = logging.getLogger("fastdeitlt")

HUGE_IMAGE_PIXELS = 50_000_000
GROUP = 32
"""Files read and decoded together."""
NUM_GLANCES = 32
"""Threads that read the ends of files: more than cores, because they mostly wait for network storage."""
MANY = 10_000
"""Number of files from which progress is shown."""
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Scan:
    """Scan result of one image file."""

    problem: str = ""
    """Why training cannot read it; empty for a valid image."""
    doubt: str = ""
    """Damage that Pillow reports and training does not detect."""
    notes: tuple[str, ...] = ()
    """Oddities of a readable image."""
    digest: bytes = b""
    """sha256 of the file; empty if it could not be read."""


def scan_files(root: str, names: list[str], cfg: DataConfig, blobs: Blobs | None = None) -> Iterator[Scan]:
    """Read and decode each image below ``root`` as in training, in order.

    Does not raise for a bad image.

    Args:
        cfg: ``num_threads`` (0 = the cores) and ``exif``.
        blobs: locations of the images inside shards; None: each is a file.
    """
    threads, console = num_threads(cfg.num_threads), Console(stderr=True)
    numbers = range(len(names))
    groups = [numbers[start : start + GROUP] for start in range(0, len(names), GROUP)]
    with (
        warnings.catch_warnings(),
        closing(Workers(threads)) as workers,
        closing(Decoder(threads, torch.device("cpu"))) as decoder,
    ):
        warnings.simplefilter("ignore")  # Pillow warns of odd files; findings are in the Scan

        def scans_of(group: range) -> list[Scan]:
            places = [blobs[i] if blobs else os.path.join(root, names[i]) for i in group]
            return _decode([_read(root, place, cfg.exif) for place in places], decoder)

        shown = track(groups, "reading images", console=console, transient=True, disable=not console.is_terminal)
        for scans in workers.map(scans_of, shown):
            yield from scans


def check_files(sets: Sets, cfg: DataConfig, remedy: str = "Repair or remove them, or set data.on_error=skip.") -> str:
    """Check that every image file of every split is present and whole.

    Reads the first and last bytes of JPEG and PNG files, decodes nothing. With ``data.on_error=skip`` unreadable files
    are counted in a warning, except if they are all training images of a class (none could replace them) or a split.

    Returns:
        A summary of the check.

    Raises:
        UserError: files are missing, truncated or no images; the message has the first of each split.
    """
    files = [(split, images) for split, images in sets if images.images_NHWC is None]
    total = sum(len(images) for _, images in files)
    if total >= MANY:
        log.info("checking the first and last bytes of %s image files", f"{total:,}")
    problems = []
    for split, images in files:
        if faults := _faults(images, split):
            shown = "; ".join(f"{images.paths[i]}: {faults[i]}" for i in sorted(faults)[:NUM_EXAMPLES])
            problems.append(
                f"{len(faults):,} of {counted(len(images), f'{split} image')} in {images.root} unreadable ({shown})"
            )
            if cfg.on_error == "skip":
                lost = _lost_classes(images, faults) if split == "train" else ""
                if lost or len(faults) == len(images):
                    what = f", among them all of {lost}" if lost else ", none is left to score"
                    raise UserError(f"data: {problems[-1]}{what}. Repair or remove them.")
                used = "replaced by images of the same class" if split == "train" else "not scored"
                log.warning("data: %s; %s", problems[-1], used)
    if problems and cfg.on_error == "raise":
        raise UserError(f"data: {'; '.join(problems)}. {remedy}")
    summary = (
        f"first and last bytes of {counted(total, 'file')}, not decoded (see 'data check')" if total else "decoded"
    )
    return f"{summary}; {'; '.join(problems)}" if problems else summary


def _lost_classes(images: LongTailSet, faults: dict[int, str]) -> str:
    """Name the classes of which no image can be read; "" if there are none."""
    bad_K = np.bincount(images.labels[list(faults)], minlength=images.num_classes)
    return listed(images.class_name(k) for k in np.flatnonzero((bad_K > 0) & (bad_K == images.counts)).tolist())


def _faults(images: LongTailSet, split: str) -> dict[int, str]:
    """Return why files cannot be read, by index."""
    console = Console(stderr=True)
    parts = [range(start, min(start + 512, len(images))) for start in range(0, len(images), 512)]

    def faults_of(part: range) -> dict[int, str]:
        reasons = {}
        for index in part:
            try:
                glance(images.place(index))
            except UnreadableError as error:
                reasons[index] = str(error)
        return reasons

    hidden = not console.is_terminal or len(images) < MANY
    with ThreadPoolExecutor(NUM_GLANCES) as pool:
        reasons = track(pool.map(faults_of, parts), f"{split} files", len(parts), console=console, disable=hidden)
        return {index: reason for part in reasons for index, reason in part.items()}


def _read(root: str, place: str | Blob, exif: str) -> tuple[Scan, Encoded | None]:
    """Return the file's scan and, unless it has a problem, its bytes for the decoder."""
    try:
        file = read_encoded(place, exif=exif)
        data = place.read() if isinstance(place, Blob) else Path(place).read_bytes()
    except UnreadableError as error:
        return Scan(str(error)), None
    is_inside = isinstance(place, Blob) or _inside(root, place)
    notes = () if is_inside else ("linked to a file outside the root",)
    doubt, odd = _oddities(data, exif)
    return Scan("", doubt, notes + odd, hashlib.sha256(data).digest()), file


def _decode(pairs: list[tuple[Scan, Encoded | None]], decoder: Decoder) -> list[Scan]:
    """Return the scans, with a problem for each file that does not decode."""
    outcomes = iter(decoder.whole([file for _, file in pairs if file]))
    scans = []
    for scan, file in pairs:
        if file and isinstance(next(outcomes), str):
            scan = replace(scan, problem="truncated or damaged", doubt="")
        scans.append(scan)
    return scans


def _inside(root: str, path: str) -> bool:
    top = os.path.realpath(root)
    return os.path.commonpath([top, os.path.realpath(path)]) == top


def _oddities(data: bytes, exif: str) -> tuple[str, tuple[str, ...]]:
    """Return (doubt, notes) of encoded image bytes."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, size = image.mode, image.size
            alpha = mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            turned = image.format != "TIFF" and stated_orientation(image, data) in range(2, 9)
            image.load()
    except (*PILLOW_ERRORS, MemoryError) as error:
        return f"damaged, but accepted by the training decoder (Pillow: {type(error).__name__})", ()
    turning = {"ignore": "ignored; data.exif=apply turns images upright", "apply": "turned upright by data.exif=apply"}
    notes = {
        "gray": mode in ("1", "L", "LA"),
        "16 or 32 bits per channel (converted to 8)": mode.startswith(("I", "F")),
        "CMYK": mode in ("CMYK", "YCCK"),
        "an alpha channel (dropped)": alpha,
        f"an EXIF orientation ({turning[exif]})": turned,
        f"more than {HUGE_IMAGE_PIXELS // 10**6} megapixels": size[0] * size[1] > HUGE_IMAGE_PIXELS,
    }
    return "", tuple(note for note, found in notes.items() if found)
