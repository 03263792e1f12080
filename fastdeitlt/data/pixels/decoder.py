"""Image decoding with DALI, which no other module imports.

DALI only decodes regions. Files are read and checked before, because DALI 2.4 ends the process on files it cannot
parse; resizing is separate, because DALI's takes longer than decoding on a CPU and differs from Pillow's. DALI is
imported at the first decoding, so that synthetic images (`tune`, `bench --synthetic`) do not need it.
"""

from __future__ import annotations

import io
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdeitlt.data.pixels.files import FORMATS, PILLOW_ERRORS, Encoded
from fastdeitlt.errors import UserError

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

MAX_DECODE = 256
"""Most images in one run of the decoding graph."""
TURNS = {2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}
"""Orientation -> (transpose, then flip rows, flip columns). Source: TIFF 6.0, tag 274,
``PIL.ImageOps.exif_transpose``."""


def _dali() -> ModuleType:
    try:
        import nvidia.dali
    except ImportError as error:
        raise UserError(
            f"data: DALI cannot be imported ({error}). Install nvidia-dali-cuda130==2.4.* (also needed without a GPU)."
        ) from None
    return nvidia.dali


def decoder_version() -> str:
    """Return the decoder's name and version."""
    return f"dali {_dali().__version__}"


def decode_graph(threads: int, device: torch.device, engine_share: float = 0.65) -> Pipeline:
    """Define the DALI graph of inputs ``encoded`` (bytes) and ``region``.

    ``region`` is (top, left, height, width). ``engine_share`` is the share of JPEG files for the GPU's hardware
    decoder, if it has one. Orientation tags are ignored: ``Decoder`` applies them. ``peek_image_shape`` raises on a
    header that does not parse; the decoder would end the process.
    """
    dali = _dali()
    from nvidia.dali import fn, math, types

    on_gpu = device.type == "cuda"
    graph = dali.Pipeline(MAX_DECODE, threads, (device.index or 0) if on_gpu else None, prefetch_queue_depth=1)
    with graph:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
        region = fn.external_source(name="region", dtype=types.DALIDataType.INT32, ndim=1)
        size = fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.DALIDataType.INT32)[:2]
        pixels = fn.decoders.image_slice(
            encoded,
            start=region[:2],
            shape=math.min(region[2:], size - region[:2]),
            axis_names="HW",
            device="mixed" if on_gpu else "cpu",
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            hw_decoder_load=engine_share,
        )
        graph.set_outputs(pixels)
    return graph


class Decoder:
    """Decode regions of images to RGB, uint8 [height, width, 3] on the device.

    On a CPU equal to Pillow's ``convert("RGB")``, except for 16-bit images, which are scaled, not clipped.

    Several threads may use it. On a CPU each has a decoding graph with one thread; a GPU has one graph for all.

    Args:
        threads: of a GPU's graph.
        device: device of the pixels.
        engine_share: see ``decode_graph``.
    """

    def __init__(self, threads: int, device: torch.device, engine_share: float = 0.65) -> None:
        on_gpu = device.type == "cuda"
        self._new_graph = partial(decode_graph, threads if on_gpu else 1, device, engine_share)
        self._idle: list[Pipeline] = []
        self._turn: AbstractContextManager[object] = threading.Lock() if on_gpu else nullcontext()

    def __call__(self, files: list[Encoded], regions_B4: np.ndarray) -> list[Tensor]:
        """Decode a region of each file.

        Args:
            regions_B4: int32 (top, left, height, width) within the images after orientation.

        Raises:
            RuntimeError: DALI could not decode one of the files; see ``faults``.
        """
        pixels: list[Tensor] = []
        for start in range(0, len(files), MAX_DECODE):
            part = slice(start, start + MAX_DECODE)
            stored_B4 = regions_B4[part].copy()
            for i, file in enumerate(files[part]):
                if file.orientation != 1:
                    stored_B4[i] = _stored(file, *stored_B4[i].tolist())
            with self._turn:
                try:
                    graph = self._idle.pop()  # no check before: another thread may take the last one in between
                except IndexError:
                    graph = self._new_graph()
                (out,) = graph.run(encoded=[file.data for file in files[part]], region=stored_B4)
                self._idle.append(graph)  # unless it raised: then it is unusable
            pixels += [_turned(torch.from_dlpack(out[i]), file.orientation) for i, file in enumerate(files[part])]
        return pixels

    def whole(self, files: list[Encoded]) -> list[Tensor | str]:
        """Decode whole images; return the reason in place of one that does not decode.

        Raises:
            RuntimeError: DALI fails on the batch, but on no single file.
        """
        sizes_B2 = np.array([(file.height, file.width) for file in files], np.int32).reshape(-1, 2)
        regions_B4 = np.concatenate([np.zeros_like(sizes_B2), sizes_B2], 1)
        try:
            return list(self(files, regions_B4))
        except RuntimeError as error:
            reasons = self.faults(files, regions_B4, error)
            good = [i for i in range(len(files)) if i not in reasons]
            pixels = iter(self([files[i] for i in good], regions_B4[good]))
            return [reasons[i] if i in reasons else next(pixels) for i in range(len(files))]

    def faults(self, files: list[Encoded], regions_B4: np.ndarray, error: RuntimeError) -> dict[int, str]:
        """Return why files of a failed batch do not decode.

        Raises ``error`` if none fails.
        """
        reasons = {}
        for i, file in enumerate(files):
            try:
                self([file], regions_B4[i : i + 1])
            except RuntimeError as reason:
                reasons[i] = _why(file, reason)
        if not reasons:
            raise error
        return reasons

    def close(self) -> None:
        """End DALI's threads."""
        self._idle.clear()


def _stored(file: Encoded, top: int, left: int, height: int, width: int) -> list[int]:
    """Return the region of the stored image for a region of the oriented image."""
    swapped, rows, columns = TURNS[file.orientation]
    top = file.height - top - height if rows else top
    left = file.width - left - width if columns else left
    return [left, top, width, height] if swapped else [top, left, height, width]


def _turned(pixels_HWC: Tensor, orientation: int) -> Tensor:
    """Apply an orientation to stored pixels."""
    if orientation == 1:
        return pixels_HWC
    swapped, *backwards = TURNS[orientation]
    turned = pixels_HWC.transpose(0, 1) if swapped else pixels_HWC
    return turned.flip([axis for axis in (0, 1) if backwards[axis]]).contiguous()


def _why(file: Encoded, error: RuntimeError) -> str:
    """Return why an image does not decode: Pillow's error, else DALI's."""
    try:
        Image.open(io.BytesIO(file.data.tobytes()), formats=FORMATS).load()
    except PILLOW_ERRORS as reason:
        return str(reason) or type(reason).__name__
    messages = [line for line in str(error).splitlines() if line and "pipeline" not in line and "Traceback" not in line]
    return f"not decodable by DALI ({messages[-1].strip() if messages else error})"
