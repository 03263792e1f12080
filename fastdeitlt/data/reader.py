"""Stage 2: read and decode image files as they are needed. No other module imports DALI.

What comes out is a pure function of the files and the request, so a run that resumes in mid-epoch asks from there on.
DALI only turns bytes into the pixels of a region; we read the bytes, choose the regions and resize, because DALI 2.4
crashes on files it cannot parse, and its resize on a CPU takes longer than decoding and is not Pillow's.
"""

# N images in the set, B images of a request, U distinct images of a group of requests, H height, W width, S output side

import io
import logging
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import batched, chain
from pathlib import Path

import nvidia.dali
import numpy as np
import torch
from nvidia.dali import Pipeline, fn, math, types
from PIL import Image
from torch import Tensor

from fastdeitlt.config import DataConfig
from fastdeitlt.data.augment import CropRequest
from fastdeitlt.data.longtail import LongTailSet
from fastdeitlt.data.resize import centre_crop, crop_resize
from fastdeitlt.data.workers import Workers, num_threads
from fastdeitlt.errors import UserError

log = logging.getLogger("fastdeitlt")

DECODER = f"dali {nvidia.dali.__version__}"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
MAX_PIXELS = 1 << 27
"""Larger images are refused: one would take more than 400 MB decoded, far above any data set's and a known attack."""
MAX_DECODE = 256
"""Images in one run of the DALI graph."""


class Unreadable(Exception):
    """A file is no image we can use; the message is the reason."""
