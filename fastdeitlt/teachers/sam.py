"""Sharpness-aware minimisation (SAM and ASAM) around any optimizer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer


class SAM(Optimizer):
    """Sharpness-aware minimisation around any optimizer.

    A step has two passes over the same images, which may be split into micro-batches whose gradients accumulate::

        loss(model(images)).backward()
        optimizer.first_step()  # w + e, e = rho g / (|g| + 1e-12)
        with frozen_batch_stats(model):
            loss(model(images)).backward()
        optimizer.second_step()  # back to w, then the base optimizer's step

    The perturbation uses the current gradients: under DistributedDataParallel these are global; run the first pass
    within ``model.no_sync()`` for each rank's own (m-sharpness, as in the paper on several accelerators). Weight decay
    applies at w. The base optimizer may be ``ZeroRedundancyOptimizer``.

    Args:
        params: parameters or parameter groups; ``rho`` and ``adaptive`` may differ by group.
        base_optimizer: an optimizer class, instantiated with ``kwargs``, or an optimizer of the same parameters.
        rho: radius of the perturbation; change it with ``set_rho`` or the groups' ``rho``.
        adaptive: scale the perturbation by the weights (ASAM), e = rho w^2 g / (||w| g| + 1e-12).

    Raises:
        ValueError: rho is negative; ``params`` differ from those of an optimizer instance; kwargs with an instance.

    Source: Foret et al. 2021 (arXiv 2010.01412), algorithm 1; Kwon et al. 2021 (arXiv 2102.11600), equation 5;
    davda54/sam.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        base_optimizer: type[Optimizer] | Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        if rho < 0:
            raise ValueError(f"rho: got {rho}, expected a number >= 0")
        if isinstance(base_optimizer, Optimizer):
            if kwargs:
                raise ValueError(
                    f"{', '.join(kwargs)}: got an optimizer instance, expected a class. Set them in the instance."
                )
            own = [p for entry in params for p in (entry["params"] if isinstance(entry, dict) else [entry])]
            base = [p for group in base_optimizer.param_groups for p in group["params"]]
            if {id(p) for p in own} != {id(p) for p in base}:
                raise ValueError(f"params: got {len(own)} tensors, expected the {len(base)} of the base optimizer")
            self.base_optimizer = base_optimizer
        else:
            self.base_optimizer = base_optimizer(params, **kwargs)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._perturbed = False
        super().__init__(self.base_optimizer.param_groups, {"rho": rho, "adaptive": adaptive})
        self._link_state()

    def _link_state(self) -> None:
        """Share groups and state with the base optimizer, for schedulers and checkpoints."""
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with the base optimizer's defaults."""
        if self.param_groups is not self.base_optimizer.param_groups:  # in the constructor of Optimizer
            return super().add_param_group(param_group)
        self.base_optimizer.add_param_group(param_group)
        self._link_state()

    def set_rho(self, rho: float) -> None:
        """Set the radius of every group."""
        for group in self.param_groups:
            group["rho"] = rho

    @torch.no_grad()
    def first_step(self, zero_grad: bool = True) -> None:
        """Move the weights from w to w + e along the gradients, and clear the gradients.

        Raises:
            RuntimeError: no gradients, or the weights are already at w + e.
        """
        if self._perturbed:
            raise RuntimeError("first_step: called twice. Call second_step in between.")
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        weights = [p for _, members in groups for p in members]
        if not weights:
            raise RuntimeError("first_step: no gradients. Run backward first.")
        steps = []
        norms: list[Tensor] = []
        for group, members in groups:
            if not members:
                continue
            grads: Any = [p.grad for p in members]
            if group["adaptive"]:
                grads = torch._foreach_mul(grads, torch._foreach_abs(members))
            norms += torch._foreach_norm(grads, 2, dtype=torch.float32)
            steps.append((group, members, grads))
        device = weights[0].device
        norm = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
        self._copy_weights(weights)
        for group, members, grads in steps:
            ascent = torch._foreach_mul(grads, (group["rho"] / (norm + 1e-12)).to(grads[0].device))
            if group["adaptive"]:
                torch._foreach_mul_(ascent, torch._foreach_abs(members))
            torch._foreach_add_(members, ascent)
        self._perturbed = True
        if zero_grad:
            self.zero_grad()

    def _copy_weights(self, weights: list[Tensor]) -> None:
        if [id(p) for p, _ in self._copies] != [id(p) for p in weights]:
            self._copies = [(p, torch.empty_like(p)) for p in weights]
        torch._foreach_copy_([copy for _, copy in self._copies], weights)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the weights from w + e to exactly w, without a step."""
        if self._perturbed:
            torch._foreach_copy_([p for p, _ in self._copies], [copy for _, copy in self._copies])
            self._perturbed = False

    @torch.no_grad()
    def second_step(self, zero_grad: bool = True) -> None:
        """Restore w, run the base optimizer with the gradients at w + e, and clear them.

        Raises:
            RuntimeError: the weights are not at w + e.
        """
        if not self._perturbed:
            raise RuntimeError("second_step: called before first_step")
        self.restore()
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor | float:  # type: ignore[override]
        """Run both passes; ``closure`` runs forward and backward and returns the loss.

        Existing gradients are used as the first pass's; otherwise the closure computes them.

        Returns:
            The loss at w, or at w + e if the caller ran the first pass.
        """
        if closure is None:
            raise ValueError("closure: got None, expected a function; or call first_step and second_step")
        loss: Tensor | float | None = None
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            with torch.enable_grad():
                loss = closure()
        self.first_step()
        with torch.enable_grad():
            second_loss = closure()
        self.second_step()
        return second_loss if loss is None else loss

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state with each group's rho.

        Raises:
            RuntimeError: called between the two steps, with the weights at w + e.
        """
        if self._perturbed:
            raise RuntimeError("state_dict: called between first_step and second_step. Save after second_step.")
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; a base optimizer's own state is accepted too."""
        self.base_optimizer.load_state_dict(state_dict)
        self._link_state()


@contextmanager
def frozen_batch_stats(model: nn.Module, frozen: bool = True) -> Iterator[None]:
    """Keep batch-norm running statistics unchanged in training within the block.

    SAM's second pass is at weights that are never used. ``frozen=False`` updates the statistics there too, as
    val-iisc/Saddle-LongTail.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats] if frozen else []
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
