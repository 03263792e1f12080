"""Guard that skips optimizer steps with gradients that are not finite, without a host sync."""

from typing import Any

import torch
from torch import Tensor

from fastdeitlt.core.flat_adamw import FlatAdamW


class FiniteGuard:
    """Skip the update of a step whose gradient norm is not finite, decided on the device.

    After more than ``skips`` such steps in a row all further updates are skipped; the host detects it from the norms at
    its next report. Weights stay equal bit for bit; so do moments with torch's AdamW and FlatAdamW, while with others
    they are updated with a gradient of 0.

    Args:
        optimizer: torch's fused AdamW and FlatAdamW skip the whole step; another with a tensor as learning rate runs it
            with rate and gradient 0. One with a number (apex, DeepSpeed's FusedAdam: their kernels have a no-op flag,
            but the line that reads it is commented out) runs it with gradient 0, and its weights are then restored from
            a copy; that costs the weights' memory once more.
        skips: train.nonfinite_skips.
        device: device of the gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, skips: int, device: torch.device) -> None:
        self.optimizer, self.skips = optimizer, skips
        self.in_a_row, self.failed = torch.zeros((), device=device), torch.zeros((), device=device)
        self.skip = torch.zeros((), device=device)
        self.is_torch = isinstance(optimizer, torch.optim.AdamW)
        self.previous: list[Tensor] = []
        if not self.is_torch and not isinstance(optimizer.param_groups[0]["lr"], Tensor):
            self.previous = [torch.empty_like(p, requires_grad=False) for p in self._weights()]
            optimizer.register_step_post_hook(self._restore)

    def _weights(self) -> list[Tensor]:
        return [p for g in self.optimizer.param_groups for p in g["params"]]

    def watch(self, norm: Tensor) -> None:
        """Skip the next optimizer step if its gradient norm is not finite."""
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
        if self.previous:
            torch._foreach_copy_(self.previous, [p.detach() for p in self._weights()])
        else:
            rates = {id(g["lr"]): g["lr"] for g in self.optimizer.param_groups}
            torch._foreach_mul_(list(rates.values()), 1 - self.skip)

    @torch.no_grad()
    def _restore(self, *_: Any) -> None:
        """Restore the weights from before a step that was to be skipped."""
        weights = self._weights()
        pairs = zip(self.previous, weights, strict=True)
        torch._foreach_copy_(weights, [torch.where(self.skip > 0, previous, p) for previous, p in pairs])
