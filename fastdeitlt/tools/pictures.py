"""Decoding of files, Pillow images and arrays as in evaluation."""

# H height, W width, C channels, B images

import os
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdeitlt.data.pixels.decoder import Decoder
from fastdeitlt.data.pixels.files import Encoded, UnreadableError, from_pillow, read_encoded
from fastdeitlt.data.pixels.workers import Workers, grouped, num_threads

GROUP = 8
"""Pictures decoded by one task."""
Picture = str | Path | Image.Image | np.ndarray
"""A file, a Pillow image, or a uint8 array [H, W] or [H, W, C] of gray, RGB or RGBA."""


class PictureReader:
    """Decoder of pictures on the CPU, as in evaluation.

    Args:
        exif: ``data.exif`` of the model.
    """

    def __init__(self, exif: str) -> None:
        threads = num_threads()
        self._workers, self._decoder = Workers(threads), Decoder(threads, torch.device("cpu"))
        self._read = partial(_read, exif=exif)

    def __call__(self, pictures: Sequence[Picture]) -> list[Tensor | str]:
        """Return the pixels of each picture, uint8 [H, W, 3], or why it is unreadable.

        A picture given several times is read once, because two threads cannot load one Pillow image.
        """
        once = {id(picture): picture for picture in pictures}
        decoded = chain.from_iterable(self._workers.map(self._decode, grouped(once.values(), GROUP)))
        pixels = dict(zip(once, decoded, strict=True))
        return [pixels[id(picture)] for picture in pictures]

    def _decode(self, pictures: list[Picture]) -> list[Tensor | str]:
        read = [self._read(picture) for picture in pictures]
        decoded = iter(self._decoder.whole([file for file in read if isinstance(file, Encoded)]))
        return [next(decoded) if isinstance(file, Encoded) else file for file in read]

    def close(self) -> None:
        """End the threads."""
        self._decoder.close()
        self._workers.close()


def _read(picture: Picture, exif: str) -> Encoded | str:
    try:
        if isinstance(picture, np.ndarray):
            picture = _from_array(picture)
        if isinstance(picture, Image.Image):
            return from_pillow(picture, exif=exif)
        if not isinstance(picture, str | os.PathLike):
            return f"got {type(picture).__name__}, expected a path, a Pillow image or a uint8 array"
        return read_encoded(str(picture), exif=exif)
    except UnreadableError as error:
        return str(error)


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise UnreadableError(
            f"array of {pixels.dtype} with shape {pixels.shape}, expected uint8 [height, width] or [height, width, 3]"
        )
    if 0 in pixels.shape:
        raise UnreadableError(f"array with shape {pixels.shape}, expected at least one pixel")
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
