"""The decoded set: all pixels in one buffer, kept on disk, so that runs and ranks decode a set only once."""

# N images in the set, H height, W width

import hashlib
import logging
import os
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from fastdeitlt.config import DataConfig
from fastdeitlt.data.pixels.decoder import decoder_version
from fastdeitlt.data.pixels.files import shrunk
from fastdeitlt.data.pixels.reader import Stream
from fastdeitlt.data.pixels.workers import num_threads
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError
from fastdeitlt.store.files import draft_folder, flush
from fastdeitlt.store.user_cache import user_cache

log = logging.getLogger("fastdeitlt")

FORMAT = 2
"""Raise it when stored pixels or their layout change."""
BLOCK_BYTES = 1 << 26
"""Bytes under one checksum."""
LONG = 10**8
"""Bytes from which decoding a set takes so long that the log says why nothing happens."""
SAY_EVERY = 30.0
"""Seconds between lines on how far it is."""
DAMAGE = (ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True, eq=False)
class DecodedSet:
    """Decoded images of any sizes, one after the other."""

    pixels: Tensor
    """uint8, all images [H, W, 3] flattened."""
    sizes_N2: np.ndarray
    """int32 (height, width) as stored; zeros for an image that could not be read."""
    unreadable: np.ndarray
    """int64: indices of the images that could not be read."""

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each image begins in ``pixels``, and the end: int64 [N + 1]."""
        return np.concatenate([[0], num_bytes(self.sizes_N2).cumsum()])

    def image(self, slot: int) -> Tensor:
        """A view of the pixels [H, W, 3] in a slot."""
        height, width = self.sizes_N2[slot].tolist()
        return self.pixels[self.starts[slot] : self.starts[slot + 1]].view(height, width, 3)


def pack(images_NHWC: np.ndarray) -> DecodedSet:
    """A set that comes decoded (CIFAR)."""
    sizes_N2 = np.tile(np.array(images_NHWC.shape[1:3], np.int32), (len(images_NHWC), 1))
    return DecodedSet(torch.tensor(images_NHWC).reshape(-1), sizes_N2, np.zeros(0, np.int64))


def num_bytes(sizes_N2: np.ndarray) -> np.ndarray:
    """Bytes of RGB images of these sizes: int64 [N]."""
    return sizes_N2.astype(np.int64).prod(axis=1) * 3


def stored_sizes(images: LongTailSet, cfg: DataConfig, stream: Stream) -> np.ndarray:
    """(height, width) at which images are stored, int32 [N, 2]: as the cache has them, else by the files' headers."""
    try:
        with np.load(user_cache("decoded") / _key(images, cfg) / "index.npz") as index:
            return index["sizes_N2"]
    except (OSError, *DAMAGE):
        return shrunk(stream.sizes(), cfg.stored_short_side)


def open_decoded(
    images: LongTailSet, cfg: DataConfig, stream: Stream, sizes_N2: np.ndarray | None = None
) -> DecodedSet:
    """The set from the cache, decoded into it at the first call; it is mapped, so the ranks of a machine share memory.

    Processes that ask at once wait for the one that decodes. A cache that cannot be written costs a warning and
    memory: the set is then decoded for this process alone.

    Args:
        sizes_N2: what ``stored_sizes`` says, if it was asked before.

    Raises:
        UserError: an image cannot be read (see ``Stream``), or changes meanwhile.
    """
    path = user_cache("decoded") / _key(images, cfg)
    try:
        decoded = _load(path, cfg, tell=False)  # without the lock: ranks check a sound one side by side
        if decoded is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if (decoded := _load(path, cfg)) is None:
                    sizes_N2 = stored_sizes(images, cfg, stream) if sizes_N2 is None else sizes_N2
                    decoded = _decode_to_disk(path, images, cfg, stream, sizes_N2)
    except OSError as error:
        log.warning("cache %s: %s; decoding into memory, for this run only", path.parent, error.strerror or error)
        sizes_N2 = stored_sizes(images, cfg, stream) if sizes_N2 is None else sizes_N2
        pixels = torch.empty(int(num_bytes(sizes_N2).sum()), dtype=torch.uint8)
        decoded = DecodedSet(pixels, sizes_N2, _decode(pixels, images, cfg, stream, sizes_N2))
    if cfg.on_error == "raise" and len(decoded.unreadable):  # another run skipped them
        name = os.path.join(images.root, images.paths[decoded.unreadable[0]])
        raise UserError(
            f"image {name}: cannot be read ({len(decoded.unreadable)} of {len(images):,} images cannot); repair them, "
            "take them off the list, or set data.on_error=skip"
        )
    return decoded


def _key(images: LongTailSet, cfg: DataConfig) -> str:
    """Changes when the pixels to be stored could: files, their sizes and times, stored size, turning, versions."""
    root = os.path.realpath(images.root)
    key = hashlib.sha256(
        f"{FORMAT} {decoder_version()} torch {torch.__version__} {cfg.stored_short_side} {cfg.exif} {root}".encode()
    )
    for path in images.paths:
        try:
            status = os.stat(os.path.join(root, path))
            key.update(f"\n{path}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape"))
        except OSError:
            key.update(f"\n{path}\0missing".encode(errors="surrogateescape"))
    return key.hexdigest()[:32]


def _decode(pixels: Tensor, images: LongTailSet, cfg: DataConfig, stream: Stream, sizes_N2: np.ndarray) -> np.ndarray:
    """Fill ``pixels``; indices of the images that cannot be read."""
    bytes_N = num_bytes(sizes_N2)
    ends_N, total = bytes_N.cumsum(), int(bytes_N.sum())
    if total >= LONG:
        log.info("decoding %s images once (%.1f GB)", f"{len(images):,}", total / 1e9)
    started = said = time.monotonic()
    unreadable = []
    for sample, image in enumerate(stream.decoded(range(len(images)), cfg.stored_short_side)):
        end = int(ends_N[sample])
        start = end - int(bytes_N[sample])
        if (now := time.monotonic()) - said >= SAY_EVERY:
            said = now
            seconds = (now - started) * (total - start) / max(start, 1)
            log.info("decoded %s of %s images, %.0f s left", f"{sample:,}", f"{len(images):,}", seconds)
        if image is None:
            unreadable.append(sample)
        elif image.shape[:2] != tuple(sizes_N2[sample].tolist()):
            raise UserError(f"image {images.paths[sample]} under {images.root}: changed while it was read; start again")
        else:
            pixels[start:end].view(image.shape).copy_(image)
    return np.array(unreadable, np.int64)


def _decode_to_disk(
    path: Path, images: LongTailSet, cfg: DataConfig, stream: Stream, sizes_N2: np.ndarray
) -> DecodedSet:
    """Decode into a draft of the folder; space is reserved first, so a full disk shows before the work."""
    with draft_folder(path) as draft:
        with open(draft / "pixels.npy", "wb") as file:
            total = int(num_bytes(sizes_N2).sum())
            header = {"descr": "|u1", "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            os.posix_fallocate(file.fileno(), file.tell(), total)
        pixels = np.load(draft / "pixels.npy", mmap_mode="r+")
        unreadable = _decode(torch.from_numpy(pixels), images, cfg, stream, sizes_N2)
        decoded = DecodedSet(torch.from_numpy(pixels), sizes_N2, unreadable)
        pixels.flush()
        digests, root = _digests(decoded, cfg), os.path.realpath(images.root)
        np.savez(draft / "index.npz", sizes_N2=sizes_N2, unreadable=unreadable, digests=digests, root=root)
        for name in ("pixels.npy", "index.npz", "."):
            flush(draft / name)
    return decoded


def _load(path: Path, cfg: DataConfig, tell: bool = True) -> DecodedSet | None:
    """The set if it is there and sound; ``tell`` of one that is not."""
    if not path.exists():
        return None
    try:
        with np.load(path / "index.npz") as index:
            sizes_N2, unreadable, digests = index["sizes_N2"], index["unreadable"], index["digests"]
        pixels = torch.from_numpy(np.load(path / "pixels.npy", mmap_mode="c"))
        decoded = DecodedSet(pixels, sizes_N2, unreadable)
        if len(pixels) != decoded.starts[-1] or not np.array_equal(digests, _digests(decoded, cfg)):
            raise ValueError("checksums differ")
    except (FileNotFoundError, *DAMAGE) as error:
        if tell:
            log.warning("cache %s: damaged (%s); decoding again", path, error)
        return None
    return decoded


def _digests(decoded: DecodedSet, cfg: DataConfig) -> np.ndarray:
    """SHA-256 of the index and of each block of pixels."""
    pixels = decoded.pixels.numpy()
    blocks = [pixels[start : start + BLOCK_BYTES] for start in range(0, len(pixels), BLOCK_BYTES)]
    index = np.concatenate([decoded.sizes_N2.ravel().astype(np.int64), decoded.unreadable])
    with ThreadPoolExecutor(num_threads(cfg.num_threads)) as pool:
        return np.array(list(pool.map(lambda block: hashlib.sha256(block).hexdigest(), [index, *blocks])))


@dataclass(frozen=True)
class CachedSet:
    """A decoded set in the user cache."""

    path: Path
    root: str
    """Folder of its images; empty if the set is not whole."""
    num_images: int
    num_bytes: int
    modified: float
    """Time of decoding in seconds since the epoch."""


def cached_sets() -> list[CachedSet]:
    """List the decoded sets in the user cache, unfinished ones too, the oldest first."""
    folder = user_cache("decoded")
    found = []
    for path in (path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        try:
            with np.load(path / "index.npz") as index:
                root, num_images = str(index["root"]), len(index["sizes_N2"])
        except (OSError, *DAMAGE):
            root, num_images = "", 0
        total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        found.append(CachedSet(path, root, num_images, total, path.stat().st_mtime))
    return sorted(found, key=lambda cached: (cached.modified, cached.path))


def clear() -> list[CachedSet]:
    """Remove the decoded sets from the user cache, and return those that stay because a process is decoding them.

    A process that reads a set keeps it until it ends.
    """
    staying = []
    for cached in cached_sets():
        key = cached.path.name.partition(".")[0]
        try:
            with FileLock(cached.path.with_name(f"{key}.lock"), timeout=0):
                shutil.rmtree(cached.path)
        except Timeout:
            staying.append(cached)
    return staying
