"""Ranks and what they say to each other: the only importer of torch.distributed."""

import os
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as collective


def start(device_type: str, timeout_s: int = 300) -> tuple[int, int]:
    """(rank, world). Joins the group that a launcher such as torchrun set up; alone it is (0, 1) without one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not collective.is_initialized():
        backend = "nccl" if device_type == "cuda" else "gloo"
        collective.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return rank(), get_world()


def rank() -> int:
    """This process's rank; 0 when alone."""
    return collective.get_rank() if collective.is_initialized() else 0


def local_rank() -> int:
    """This process's rank on its machine; 0 when alone."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_world() -> int:
    """Number of processes; 1 when alone."""
    return collective.get_world_size() if collective.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In-place sum over ranks, on the device, without a host sync; nothing when alone."""
    if collective.is_initialized():
        collective.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait for every rank; nothing when alone."""
    if collective.is_initialized():
        collective.barrier()


def device_of(kind: str) -> torch.device:
    """The device of this rank for `auto`, `cpu` or `cuda`."""
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def stop() -> None:
    """Leave the group."""
    if collective.is_initialized():
        collective.destroy_process_group()
