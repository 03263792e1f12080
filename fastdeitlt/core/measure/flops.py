"""FLOPs of a network's forward pass, and peak FLOP/s of GPUs."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

PEAK_FLOPS = {
    "H200 NVL": 836e12, "H100 NVL": 836e12, "H100 PCIe": 756e12, "H200": 989e12, "H100": 989e12, "A100": 312e12,
    "B200": 2250e12, "L40S": 362e12, "4090": 165e12,
}  # fmt: skip
"""Part of a GPU's name, the first that matches -> datasheet FLOP/s, dense bf16 with float32 accumulation."""


def peak_flops(device: torch.device) -> float | None:
    """Return a GPU's datasheet bf16 FLOP/s in ``PEAK_FLOPS``, None for others."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def forward_flops(network: nn.Module, img_size: int, device: torch.device) -> float:
    """Return the FLOPs of one image's forward pass, counted by running it."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, img_size, img_size, device=device))
    return float(counter.get_total_flops())
