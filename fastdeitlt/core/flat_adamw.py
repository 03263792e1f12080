"""AdamW on flat buffers: step, gradient scale and moving average in one pass over memory.

The parameters become views of one buffer, ordered by learning-rate scale; of equal scale, first those with weight
decay. State has the names and shapes of torch.optim.AdamW's, so that either loads the other's checkpoint.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastdeitlt.errors import UserError
from fastdeitlt.kernels.adamw_ema import adamw_ema

ALIGNMENT = 64
"""Alignment of each parameter in elements: 256 bytes, enough for any vector load."""


class FlatAdamW(torch.optim.Optimizer):
    """AdamW by ``kernels.adamw_ema``, with a factor on the gradients and the moving average.

    Args:
        groups: parameters, or groups with a ``weight_decay`` each; at most one of them other than 0. A group may have
            an ``lr_scale``: groups of equal scale share one learning rate and one launch of the kernel.
        lr: learning rate, a float or a 0-d tensor; ``group["lr"]`` becomes a tensor on the device, ``lr`` times scale.
        betas, eps, weight_decay: as torch.optim.AdamW.
        ema_decay: decay of the average a step. 0 = no average.

    Attributes:
        ema: parameter -> view of its moving average; empty without one.
        grad_scale: 0-d factor on the gradients of the next step only, on the device (clipping); 0 skips that step,
            even if a gradient is not finite.

    Raises:
        UserError: parameters that are not float32 on one device, or two different weight decays.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        ema_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        parameters = self._ordered()
        device = parameters[0].device
        self.ema_decay = ema_decay
        lr = torch.as_tensor(lr, dtype=torch.float32).to(device)
        self._lrs = {scale: lr * scale for scale in sorted({_scale(group) for group in self.param_groups})}
        for group in self.param_groups:
            group["lr"] = self._lrs[_scale(group)]
        self._one = torch.ones((), device=device)
        self.grad_scale = self._one
        self._gathered = False
        self._allocate(parameters)

    def _ordered(self) -> list[nn.Parameter]:
        """Return the parameters by learning-rate scale, decayed first."""
        decays = {group["weight_decay"] for group in self.param_groups if group["weight_decay"]}
        if len(decays) > 1:
            raise UserError(
                f"FlatAdamW: got weight decays {sorted(decays)}, expected one besides 0. Use torch.optim.AdamW."
            )
        groups = sorted(self.param_groups, key=lambda group: (_scale(group), not group["weight_decay"]))
        parameters = [parameter for group in groups for parameter in group["params"]]
        for p in parameters:
            if p.dtype != torch.float32 or p.device != parameters[0].device:
                raise UserError(
                    f"FlatAdamW: a parameter of shape {tuple(p.shape)} is {p.dtype} on {p.device}, expected float32 on "
                    f"{parameters[0].device}. Keep float32 weights and let autocast convert."
                )
        return parameters

    def _allocate(self, parameters: list[nn.Parameter]) -> None:
        """Allocate flat buffers and their views, and make each parameter a view."""
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        decayed = {p for group in self.param_groups if group["weight_decay"] for p in group["params"]}
        scale_of = {p: _scale(group) for group in self.param_groups for p in group["params"]}
        self._spans = []
        end = 0
        for scale in self._lrs:
            span = [(size, p in decayed) for size, p in zip(sizes, parameters, strict=True) if scale_of[p] == scale]
            start, end = end, end + sum(size for size, _ in span)
            self._spans.append((scale, slice(start, end), sum(size for size, decays in span if decays)))
        self._parameters = parameters

        def flat() -> tuple[Tensor, list[Tensor]]:
            buffer = torch.zeros(sum(sizes), device=parameters[0].device)
            pieces = zip(buffer.split(sizes), parameters, strict=True)
            return buffer, [piece[: p.numel()].view(p.shape) for piece, p in pieces]

        self._weights, weights = flat()
        self._grads, self._grad_views = flat()
        self._exp_avg, exp_avg = flat()
        self._exp_avg_sq, exp_avg_sq = flat()
        self._steps = torch.zeros(len(parameters), device=parameters[0].device)
        states = zip(parameters, self._steps.unbind(), exp_avg, exp_avg_sq, strict=True)
        self._views = {p: {"step": step, "exp_avg": m, "exp_avg_sq": v} for p, step, m, v in states}
        self._ema: Tensor | None = None
        ema: list[Tensor] = []
        torch._foreach_copy_(weights, [p.data for p in parameters])
        if self.ema_decay:
            self._ema, ema = flat()
            self._ema.copy_(self._weights)
        for p, view in zip(parameters, weights, strict=True):
            p.data = view
        self.ema = dict(zip(parameters, ema, strict=False))

    def _adopt(self) -> None:
        """Copy loaded state into the buffers and replace it by their views."""
        for group in self.param_groups:
            if group["lr"] is not (kept := self._lrs[_scale(group)]):
                kept.copy_(torch.as_tensor(group["lr"]))
                group["lr"] = kept
        for parameter, views in self._views.items():
            state = self.state[parameter]
            for name, view in views.items():
                if name in state and state[name] is not view:
                    view.copy_(state[name])
                state[name] = view

    @torch.no_grad()
    def gather(self) -> Tensor:
        """Copy the gradients into their buffer; return their 0-d norm on the device.

        Raises:
            UserError: a parameter without gradient.
        """
        self._collect()
        return torch.linalg.vector_norm(self._grads)

    def _collect(self) -> None:
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if len(grads) < len(self._parameters):
            missing = next(tuple(p.shape) for p in self._parameters if p.grad is None)
            raise UserError(f"FlatAdamW: a parameter of shape {missing} has no gradient. Freeze or use it.")
        torch._foreach_copy_(self._grad_views, grads)
        self._gathered = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update weights and average, one launch per learning-rate scale.

        Gathers the gradients if not yet done.

        Raises:
            UserError: see ``gather``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._gathered:
            self._collect()
        self._adopt()
        first, step = self.param_groups[0], self._steps.add_(self.grad_scale != 0)[0]
        for scale, span, num_decayed in self._spans:
            adamw_ema(
                self._weights[span],
                self._grads[span],
                self._exp_avg[span],
                self._exp_avg_sq[span],
                lr=self._lrs[scale],
                step=step,
                num_decayed=num_decayed,
                weight_decay=max(group["weight_decay"] for group in self.param_groups),
                betas=first["betas"],
                eps=first["eps"],
                scale=self.grad_scale,
                ema=None if self._ema is None else self._ema[span],
                ema_decay=self.ema_decay,
            )
        self.grad_scale, self._gathered = self._one, False
        return loss


def _scale(group: dict[str, Any]) -> float:
    return group.get("lr_scale", 1.0)
