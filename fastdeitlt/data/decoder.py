"""Stage 2, decoding: encoded images to pixels by DALI. No other module imports it.

DALI only turns the bytes of a file into the pixels of a region. We read the bytes, because DALI 2.4 ends the process on
files it cannot parse, and resize ourselves, because its resize takes a CPU longer than decoding and is not Pillow's.
It is imported when the first image is decoded: a step on images that nobody reads (`tune`, `bench --synthetic`) goes
without it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.data.files import Encoded

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

MAX_DECODE = 256
"""Most images in one run of the decoding graph."""


def decoder_version() -> str:
    """What decodes, and its version."""
    import nvidia.dali

    return f"dali {nvidia.dali.__version__}"


def decode_graph(threads: int, device: torch.device, engine_share: float = 0.65) -> Pipeline:
    """The DALI graph, not yet built: inputs ``encoded`` (bytes) and ``region`` (top, left, height, width).

    ``engine_share`` of the JPEG files go to a GPU's hardware decoder, if it has one.

    Orientation tags are ignored, as timm and Pillow's ``Image.open`` do. ``peek_image_shape`` is there for safety: a
    header that does not parse raises in it, but ends the process in the decoder.
    """
    from nvidia.dali import Pipeline, fn, math, types

    on_gpu = device.type == "cuda"
    graph = Pipeline(MAX_DECODE, threads, (device.index or 0) if on_gpu else None, prefetch_queue_depth=1)
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
    """Regions of encoded images to RGB pixels: uint8 [height, width, 3] tensors on the device, one an image.

    On a CPU equal to Pillow's ``convert("RGB")``, except for 16-bit images, which are scaled rather than clipped.
    """

    def __init__(self, threads: int, device: torch.device, engine_share: float = 0.65) -> None:
        self._new_graph = partial(decode_graph, threads, device, engine_share)
        self._graph: Pipeline | None = None

    def __call__(self, files: list[Encoded], regions_B4: np.ndarray) -> list[Tensor]:
        """Decode.

        Args:
            regions_B4: int32 (top, left, height, width), inside the images.

        Raises:
            RuntimeError: DALI could not decode one of them; it does not say which.
        """
        pixels: list[Tensor] = []
        for start in range(0, len(files), MAX_DECODE):
            part = slice(start, start + MAX_DECODE)
            graph, self._graph = self._graph or self._new_graph(), None  # a graph that raised is dead
            (out,) = graph.run(encoded=[file.data for file in files[part]], region=regions_B4[part])
            self._graph = graph
            pixels += [torch.from_dlpack(out[i]) for i in range(len(out))]
        return pixels

    def close(self) -> None:
        """End DALI's threads."""
        self._graph = None
