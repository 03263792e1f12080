"""The official code's numbers in ``tests/data``, and the weights and images that they were computed with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdeitlt.core.loss import joint_loss

DATA = Path(__file__).parent / "data"


def load(name: str):
    return json.loads((DATA / f"{name}.json").read_text())


def arrays(name: str, case: dict, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of one of several cases."""
    prefix = f"c{case['case']}_"
    with np.load(DATA / f"{name}.npz") as file:
        found = {key.removeprefix(prefix): file[key] for key in file if key.startswith(prefix)}
    return {key: torch.from_numpy(values).to(device) for key, values in found.items()}


def normal(key: list[int], shape) -> Tensor:
    return torch.from_numpy(np.random.default_rng(key).standard_normal(tuple(shape)).astype(np.float32))


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Give a model the golden weights."""
    for j, (key, tensor) in enumerate(sorted(model.state_dict().items())):
        if tensor.is_floating_point():
            values = normal([seed, j], tensor.shape) * 0.05
            tensor.copy_(values.abs() + 1 if key.endswith("running_var") else values)


def images(seed: int, shape) -> Tensor:
    return normal([seed, 999], shape)


JOINT_LOSSES = pytest.mark.parametrize(
    "case", load("joint_loss"), ids=lambda c: f"{c['case']}-{c['distillation']}-K{c['C']}"
)


def assert_joint_loss(case: dict, impl: str, device: torch.device | str = "cpu", atol: float = 1e-12) -> None:
    """The official losses and gradients, of an implementation."""
    g = arrays("joint_loss", case, device)
    share = 1 - case["beta"] ** g["counts"].double()
    weights = (1 / share / (1 / share).sum() * case["C"]).float()
    heads = [g["cls"].requires_grad_(), g["dist"].requires_grad_()]
    losses = joint_loss(
        *heads, g["labels"], g["teacher"], partner=g["labels"].flip(0) if case["mixed"] else None, lam=case["lam"],
        smoothing=case["smoothing"], weights=weights if case["weighted"] else None, tau=case["tau"],
        class_map=g["class_map"] if case["map_teacher_classes"] else None, distillation=case["distillation"],
        impl=impl,
    )  # fmt: skip
    expected = [case["loss"], 2 * case["half_cls"], 2 * case["half_dist"]]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-5, abs=atol)
    losses.loss.backward()
    for head, gradient in zip(heads, (g["dcls"], g["ddist"]), strict=True):
        torch.testing.assert_close(head.grad, gradient, rtol=0, atol=1e-6)
