"""Measurement of the fastest kernels, shared by all ranks, before the step is compiled."""

import torch

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT


def measure_kernels(
    cfg: Config, student: DistilledViT, teacher: Teacher | None, num_classes: int, device: torch.device
) -> None:
    """Measure the ops that are set to "auto".

    Once for each GPU, torch, Triton and shape.

    Rank 0 measures, and all ranks use its rows. Does nothing without a GPU; with train.measure_kernels=false it only
    shares rank 0's rows.
    """
    if device.type != "cuda":
        return
    from fastdeitlt.core.measure.first_start import current_rows  # Triton is slow to import, and may be missing on CPUs
    from fastdeitlt.core.measure.parts import Shapes
    from fastdeitlt.kernels._measured import prefer

    rows = distributed.on_main(lambda: current_rows(Shapes(cfg, student, teacher, num_classes, device)))
    if distributed.get_world() > 1:
        prefer(rows)
