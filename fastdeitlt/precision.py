"""What ``train.precision`` means on a device."""

import functools
import logging

import torch

log = logging.getLogger("fastdeitlt")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type to autocast to: bfloat16, or None for float32.

    A CPU without bfloat16 instructions emulates them (on AVX2 a small student's step takes 9 times as long as in
    float32, a ResNet-8's 11 times), so it keeps float32; the log says so once.
    """
    if precision != "bf16":
        return None
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        _say_emulated()
        return None
    return torch.bfloat16


@functools.cache
def _say_emulated() -> None:
    log.info("train.precision=bf16: this CPU has no bfloat16 instructions, float32 is used")
