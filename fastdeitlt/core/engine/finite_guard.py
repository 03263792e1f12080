"""A step whose gradients are not finite changes nothing, and the host does not wait to learn of it."""

from typing import Any

import torch
from torch import Tensor

from fastdeitlt.core.flat_adamw import FlatAdamW


class FiniteGuard:
    """Leaves out the update of a step whose gradient norm is not finite; decided on the device, without a host sync.

    More than ``skips`` such steps in a row are a failure, after which no update is made any more. The host learns of
    it from the norms, at its next report. Weights stay as they were bit for bit; moments too with torch's AdamW and
    FlatAdamW, and with the others they take a gradient of 0.

    Args:
        optimizer: torch's fused AdamW and FlatAdamW leave the whole step out; another with a tensor as learning rate
            takes one of rate and gradient 0. One with a number (apex, DeepSpeed's FusedAdam: their kernels are handed a
            flag to do nothing, and their source has the line that reads it commented out) takes one of gradient 0,
            after which its weights are put back from a copy; that costs the weights' memory once more.
        skips: train.nonfinite_skips.
        device: of the gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, skips: int, device: torch.device) -> None:
        self.optimizer, self.skips = optimizer, skips
        self.in_a_row, self.failed = torch.zeros((), device=device), torch.zeros((), device=device)
        self.skip = torch.zeros((), device=device)
        self.is_torch = isinstance(optimizer, torch.optim.AdamW)
        self.kept: list[Tensor] = []
        if not self.is_torch and not isinstance(optimizer.param_groups[0]["lr"], Tensor):
            self.kept = [torch.empty_like(p, requires_grad=False) for p in self._weights()]
            optimizer.register_step_post_hook(self._put_back)

    def _weights(self) -> list[Tensor]:
        return [p for g in self.optimizer.param_groups for p in g["params"]]

    def watch(self, norm: Tensor) -> None:
        """Called before each optimizer step with the norm that decides."""
        bad = 1 - norm.isfinite().float()
        self.in_a_row.add_(bad).mul_(bad)
        self.failed.copy_(torch.maximum(self.failed, (self.in_a_row > self.skips).float()))
        self.skip = torch.maximum(bad, self.failed)
        if self.is_torch:
            self.optimizer.found_inf = self.skip  # type: ignore[attr-defined]
            return
        if isinstance(self.optimizer, FlatAdamW):
            self.optimizer.grad_scale = torch.where(self.skip > 0, 0.0, self.optimizer.grad_scale)
            return
        grads = [p.grad for p in self._weights() if p.grad is not None]
        torch._foreach_copy_(grads, [torch.where(self.skip > 0, 0.0, g) for g in grads])
        if self.kept:
            torch._foreach_copy_(self.kept, [p.detach() for p in self._weights()])
        else:
            rates = {id(g["lr"]): g["lr"] for g in self.optimizer.param_groups}
            torch._foreach_mul_(list(rates.values()), 1 - self.skip)

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        """After the optimizer's step: the weights from before it, where it was to be left out."""
        weights = self._weights()
        pairs = zip(self.kept, weights, strict=True)
        torch._foreach_copy_(weights, [torch.where(self.skip > 0, kept, p) for kept, p in pairs])
