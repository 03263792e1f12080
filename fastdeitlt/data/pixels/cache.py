"""On-disk cache of decoded sets, shared by runs and ranks."""

# N images in the set, H height, W width

import hashlib
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import PIL
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from fastdeitlt import distributed
from fastdeitlt.config import DataConfig
from fastdeitlt.data.pixels.decoder import decoder_version
from fastdeitlt.data.pixels.workers import num_threads
from fastdeitlt.data.sets.fingerprint import file_facts
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError, counted
from fastdeitlt.store.files import draft_folder, flush, user_cache

log = logging.getLogger("fastdeitlt")

FORMAT = 4
"""Format version; increase it when pixels of any file, the files refused, or the layout change."""
BLOCK_BYTES = 1 << 26
"""Bytes per checksum."""
LONG = 10**8
"""Bytes from which decoding is logged."""
SAY_EVERY = 30.0
"""Seconds between progress lines."""
DAMAGE = (ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True, eq=False)
class DecodedSet:
    """Decoded images of any sizes in one buffer."""

    pixels: Tensor
    """uint8, all images [H, W, 3] flattened and concatenated."""
    sizes_N2: np.ndarray
    """int32 (height, width) as stored; zeros for an unreadable image."""
    unreadable: np.ndarray
    """int64 indices of the unreadable images."""

    @cached_property
    def starts(self) -> np.ndarray:
        """Offset of each image in ``pixels``, and the end: int64 [N + 1]."""
        return np.concatenate([[0], num_bytes(self.sizes_N2).cumsum()])

    def image(self, slot: int) -> Tensor:
        """Return a view of the pixels [H, W, 3] of one image."""
        height, width = self.sizes_N2[slot].tolist()
        return self.pixels[self.starts[slot] : self.starts[slot + 1]].view(height, width, 3)


def pack(images_NHWC: np.ndarray) -> DecodedSet:
    """Copy the images of a set that comes decoded (CIFAR) into a ``DecodedSet``."""
    sizes_N2 = np.tile(np.array(images_NHWC.shape[1:3], np.int32), (len(images_NHWC), 1))
    return DecodedSet(torch.tensor(images_NHWC).reshape(-1), sizes_N2, np.zeros(0, np.int64))


def num_bytes(sizes_N2: np.ndarray) -> np.ndarray:
    """Return the bytes of RGB images of these sizes, int64 [N]."""
    return sizes_N2.astype(np.int64).prod(axis=1) * 3


def stored_sizes(path: Path) -> np.ndarray | None:
    """Return the cached images' (height, width), int32 [N, 2]; None if not cached."""
    try:
        with np.load(path / "index.npz") as index:
            return index["sizes_N2"]
    except (OSError, *DAMAGE):
        return None


def open_decoded(
    path: Path, images: LongTailSet, cfg: DataConfig, sizes_N2: np.ndarray, decoded_N: Iterable[Tensor | None]
) -> DecodedSet | None:
    """Map a set from the cache, filling the cache at the first call.

    The ranks of a machine share the mapped memory. With concurrent calls one process decodes and the others wait. If
    the cache cannot be written, a warning is logged and the set is decoded into the memory of this process; None: auto
    streams instead on several ranks, each of which would need that memory.

    Args:
        path: ``cache_path`` of the set.
        sizes_N2: (height, width) of the stored images, int32 [N, 2]; zeros for an unreadable one.
        decoded_N: the images [H, W, 3] to store, None for an unreadable one. Iterated at most once, and only if the
            set is not cached.

    Raises:
        UserError: an image cannot be read, or changes during the call.
    """
    decoded = None
    try:
        decoded = _load(path, cfg, tell=False)  # without the lock: ranks verify an intact set in parallel
        if decoded is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if (decoded := _load(path, cfg)) is None:
                    with draft_folder(path) as draft:
                        pixels = _reserve(draft / "pixels.npy", int(num_bytes(sizes_N2).sum()))
                        decoded = _fill(torch.from_numpy(pixels), images, sizes_N2, decoded_N)
                        _seal(draft, pixels, decoded, images, cfg)
    except OSError as error:
        if streams := cfg.residency == "auto" and not cfg.stored_short_side and distributed.get_world() > 1:
            instead = "streaming, as each rank would keep all pixels in memory"
        else:
            instead = "keeping the pixels in memory for this run"
        log.warning("cache %s: %s; %s", path.parent, error.strerror or error, instead)
        if streams:
            return None
        if decoded is None:
            memory = torch.empty(int(num_bytes(sizes_N2).sum()), dtype=torch.uint8)
            decoded = _fill(memory, images, sizes_N2, decoded_N)
        else:  # decoded into a draft, which would occupy the disk while it is mapped
            decoded = replace(decoded, pixels=decoded.pixels.clone())
    if cfg.on_error == "raise" and len(decoded.unreadable):  # another run skipped them
        raise UserError(
            f"image {images.name(decoded.unreadable[0])}: cannot be read ({len(decoded.unreadable):,} of "
            f"{counted(len(images), 'image')} unreadable). Repair or remove them, or set data.on_error=skip."
        )
    return decoded


def cache_path(images: LongTailSet, cfg: DataConfig) -> Path:
    """Return the cache folder of a set.

    Its name is a hash of all that determines the pixels: files, their sizes, times and permissions, stored size, EXIF
    handling, versions.
    """
    root = os.path.realpath(images.root)
    key = hashlib.sha256(
        f"{FORMAT} {decoder_version()} pillow {PIL.__version__} {cfg.stored_short_side} {cfg.exif} {root}".encode()
    )
    if images.blobs:
        blobs = images.blobs
        for values in (blobs.file_N, blobs.start_N, blobs.size_N, blobs.deflated_N):
            key.update(np.ascontiguousarray(values).data)
    files = images.blobs.files if images.blobs else images.paths
    key.update("\0".join(files).encode(errors="surrogateescape"))
    key.update(file_facts(root, files).data)
    return user_cache("decoded") / key.hexdigest()[:32]


def _fill(pixels: Tensor, images: LongTailSet, sizes_N2: np.ndarray, decoded_N: Iterable[Tensor | None]) -> DecodedSet:
    """Copy the decoded images into ``pixels``."""
    bytes_N = num_bytes(sizes_N2)
    ends_N, total = bytes_N.cumsum(), int(bytes_N.sum())
    if total >= LONG:
        log.info("decoding %s once (%.1f GB)", counted(len(images), "image"), total / 1e9)
    started = last_log = time.monotonic()
    unreadable = []
    for sample, image in enumerate(decoded_N):
        end = int(ends_N[sample])
        start = end - int(bytes_N[sample])
        if (now := time.monotonic()) - last_log >= SAY_EVERY:
            last_log = now
            seconds = (now - started) * (total - start) / max(start, 1)
            log.info("decoded %s of %s images, %.0f s left", f"{sample:,}", f"{len(images):,}", seconds)
        if image is None:
            unreadable.append(sample)
        elif image.shape[:2] != tuple(sizes_N2[sample].tolist()):
            raise UserError(f"image {images.paths[sample]} in {images.root}: changed while it was read. Start again.")
        else:
            pixels[start:end].view(image.shape).copy_(image)
    return DecodedSet(pixels, sizes_N2, np.array(unreadable, np.int64))


def _reserve(path: Path, total: int) -> np.ndarray:
    """Map a new file of ``total`` bytes, allocated so that a full disk raises early."""
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        os.posix_fallocate(file.fileno(), file.tell(), total)
    return np.load(path, mmap_mode="r+")


def _seal(draft: Path, pixels: np.ndarray, decoded: DecodedSet, images: LongTailSet, cfg: DataConfig) -> None:
    """Flush the pixels, then write the index with their checksums."""
    pixels.flush()  # type: ignore[attr-defined]
    digests, root = _digests(decoded, cfg), os.path.realpath(images.root)
    np.savez(draft / "index.npz", sizes_N2=decoded.sizes_N2, unreadable=decoded.unreadable, digests=digests, root=root)
    for name in ("pixels.npy", "index.npz", "."):
        flush(draft / name)


def _load(path: Path, cfg: DataConfig, tell: bool = True) -> DecodedSet | None:
    """Load and verify a cached set; None if missing or damaged (logged if ``tell``)."""
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
    """Return the sha256 of the index and of each block of pixels."""
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
    """Folder of its images; empty for an unfinished set."""
    num_images: int
    num_bytes: int
    modified: float
    """Time of decoding, Unix time in seconds."""


def cached_sets() -> list[CachedSet]:
    """List the decoded sets in the user cache, also unfinished ones, oldest first."""
    folder = user_cache("decoded")
    sets = []
    for path in (path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        try:
            with np.load(path / "index.npz") as index:
                root, num_images = str(index["root"]), len(index["sizes_N2"])
        except (OSError, *DAMAGE):
            root, num_images = "", 0
        total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        sets.append(CachedSet(path, root, num_images, total, path.stat().st_mtime))
    return sorted(sets, key=lambda cached: (cached.modified, cached.path))


def clear() -> list[CachedSet]:
    """Remove the decoded sets from the user cache; return those still being decoded.

    A process that has mapped a set can use it until it ends.
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
