"""Numeric precision of a device for ``train.precision``."""

import functools
import logging

import torch

log = logging.getLogger("fastdeitlt")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type: bfloat16, or None for float32.

    bfloat16 also around float8 products.

    A device without bfloat16 instructions uses float32, logged once, because emulation is slow: on a CPU with AVX2 a
    small student's step in bfloat16 takes 9 times as long as in float32, a ResNet-8's 11 times. For a GPU before Ampere
    torch's compiler does not compile bfloat16 graphs.
    """
    if precision == "fp32":
        return None
    gpu = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else torch.cpu._is_avx512_bf16_supported()
    if not native:
        _log_emulated("GPU" if gpu else "CPU")
    return torch.bfloat16 if native else None


@functools.cache
def _log_emulated(what: str) -> None:
    log.info("train.precision: this %s has no bfloat16 instructions, using float32", what)
