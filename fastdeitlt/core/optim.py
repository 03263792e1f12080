"""Parameter groups, optimizers and their state, learning-rate schedule, and moving average."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastdeitlt.config import Config
from fastdeitlt.errors import UserError
from fastdeitlt.kernels._pick import pick

log = logging.getLogger("fastdeitlt")


def peak_learning_rate(cfg: Config, ranks: int | None = None) -> float:
    """Return the learning rate after warm-up.

    Args:
        cfg: the run.
        ranks: data-parallel ranks of the recipe; None = train.virtual_ranks, or 1 if that is 0.

    Source: DeiT main.py (lr * batch_size * world / 512); "effective" also counts accumulation.
    """
    ranks = ranks or cfg.train.virtual_ranks or 1
    images = cfg.train.batch_size * ranks
    match cfg.optim.lr_scale:
        case "none":
            return cfg.optim.lr
        case "official":
            return cfg.optim.lr * images / 512
        case "effective":
            return cfg.optim.lr * images * cfg.train.accumulate / 512


def learning_rate(epoch_float: float, cfg: Config, ranks: int | None = None) -> float:
    """Return the learning rate at a point of training.

    Linear from warmup_lr to the peak during warm-up, then half a cosine from the peak to min_lr over *all* epochs, so
    that the rate at the end of warm-up is already slightly under the peak.

    Args:
        epoch_float: epochs since the start, with the fraction of the current one.
        cfg: the run.
        ranks: see ``peak_learning_rate``.

    Source: timm CosineLRScheduler with t_initial=epochs, warmup_prefix=False.
    """
    peak, o = peak_learning_rate(cfg, ranks), cfg.optim
    if epoch_float < o.warmup_epochs:
        return o.warmup_lr + epoch_float * (peak - o.warmup_lr) / o.warmup_epochs
    if epoch_float >= cfg.train.epochs:
        return o.min_lr
    return o.min_lr + 0.5 * (peak - o.min_lr) * (1 + math.cos(math.pi * epoch_float / cfg.train.epochs))


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Return two AdamW groups, without and with weight decay.

    Vectors, biases, tokens and position embeddings have no decay.

    With ``layer_decay`` below 1 there are two groups per layer instead, each with an ``lr_scale`` of
    layer_decay ** (number of layers above it): embeddings lowest, heads 1.

    Source: timm create_optimizer with the model's ``no_weight_decay``; ``param_groups_layer_decay``.
    """
    no_weight_decay: Callable[[], set[str]] = getattr(model, "no_weight_decay", set)
    skip = no_weight_decay()
    if layer_decay < 1:
        from timm.optim import param_groups_layer_decay  # timm is slow to import

        return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=skip, layer_decay=layer_decay)
    plain: list[Tensor] = []
    decayed: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            no_decay = parameter.ndim <= 1 or name.endswith(".bias") or name in skip
            (plain if no_decay else decayed).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def build_optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """Build AdamW or LAMB of ``optim.backend`` over ``parameter_groups``.

    The learning rate is a tensor on the parameters' device if the implementation supports it, so that changing it
    neither syncs nor recompiles. `auto` is the AdamW measured fastest on this GPU, else torch's fused one
    (``kernels._pick``), and apex for LAMB. `fastdeitlt` updates the moving average in the same pass.

    Raises:
        UserError: the implementation is not installed, needs a GPU, or does not support ``optim.algorithm``.
    """
    o = cfg.optim
    groups = parameter_groups(model, o.weight_decay, o.layer_decay)
    device = groups[1]["params"][0].device
    backend = "apex" if (o.algorithm, o.backend) == ("lamb", "auto") else o.backend
    backend = pick("adamw_ema", backend, ("step",), device)
    if o.algorithm == "lamb" and backend != "apex":
        raise UserError(
            f"optim.backend: got {backend} with optim.algorithm=lamb, expected apex. Use optim.backend=apex."
        )
    arguments: dict[str, Any] = {"betas": o.betas, "eps": o.eps}
    lr = learning_rate(0.0, cfg)
    match backend:
        case "torch":
            rates = {
                scale: torch.tensor(lr * scale, device=device) for scale in {g.get("lr_scale", 1.0) for g in groups}
            }
            groups = [{**group, "lr": rates[group.get("lr_scale", 1.0)]} for group in groups]
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, fused=True, **arguments)
        case "fastdeitlt":
            from fastdeitlt.core.flat_adamw import FlatAdamW

            optimizer = FlatAdamW(groups, lr=lr, ema_decay=o.ema_decay, **arguments)
        case "apex":
            fused_adam, fused_lamb = _apex()
            _needs_gpu("apex", device)
            if o.algorithm == "lamb":  # it clips to norm 1 by default, but the engine clips
                optimizer = fused_lamb(groups, lr=lr, adam_w_mode=True, max_grad_norm=math.inf, **arguments)
            else:
                optimizer = fused_adam(groups, lr=lr, adam_w_mode=True, **arguments)
        case "deepspeed":
            _needs_gpu("deepspeed", device)
            optimizer = _deepspeed_adam(groups, lr=lr, adam_w_mode=True, **arguments)
    log.info("optimizer: %s (%s)", {"adamw": "AdamW", "lamb": "LAMB"}[o.algorithm], backend)
    return optimizer


def _apex() -> tuple[type, type]:
    """Import NVIDIA's FusedAdam and FusedLAMB.

    Probes their extension, because PyPI's `apex` is another project.
    """
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam, FusedLAMB
    except ImportError as error:
        raise UserError(
            f"optim.backend=apex: NVIDIA apex with CUDA extensions is not installed ({error}). Build it from "
            "github.com/NVIDIA/apex (PyPI's 'apex' is unrelated), or use optim.backend=torch."
        ) from None
    return FusedAdam, FusedLAMB


def _deepspeed_adam(groups: list[dict], **arguments: Any) -> torch.optim.Optimizer:
    """Build DeepSpeed's FusedAdam, which the first instance compiles."""
    try:
        from deepspeed.ops.adam import FusedAdam
        from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException
    except ImportError as error:
        raise UserError(
            f"optim.backend=deepspeed: DeepSpeed cannot be imported ({error}). Use optim.backend=torch."
        ) from None
    try:
        return FusedAdam(groups, **arguments)
    except (ImportError, RuntimeError, OSError, CUDAMismatchException, MissingCUDAException) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"optim.backend=deepspeed: FusedAdam does not compile ({reason}), expected ninja and nvcc of CUDA "
            f"{torch.version.cuda}. Install them, or use optim.backend=torch."
        ) from None


def _needs_gpu(backend: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(f"optim.backend={backend}: got {device}, expected a GPU. Use optim.backend=torch.")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's rate to ``lr`` times its scale, without a sync."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip_coefficient(norm: Tensor, clip_norm: float) -> Tensor:
    """Return the 0-d factor that clips a 0-d norm, as clip_grad_norm_ does."""
    return (clip_norm / (norm + 1e-6)).clamp(max=1.0)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state as ``<parameter>/<state>``, equal names for every backend."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {
        f"{name_of[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    for group in optimizer.param_groups if _counts_in_groups(optimizer) else ():
        for parameter in group["params"]:
            tensors[f"{name_of[id(parameter)]}/step"] = torch.tensor(float(group.get("step", 0)))
    return tensors


def _counts_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether steps are counted by group, as in apex and DeepSpeed."""
    return hasattr(optimizer, "adam_w_mode")


def check_optimizer(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise UserError for ``optimizer_tensors`` of other parameters."""
    parameters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {key.rpartition("/")[0] for key in tensors}
    if names and names != parameters:
        raise UserError(
            f"optimizer state: belongs to other parameters (e.g. {sorted(names ^ parameters)[0]}). Start a new run."
        )


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore ``optimizer_tensors``.

    Raises:
        UserError: the state belongs to other parameters.
    """
    check_optimizer(model, tensors)
    parameters = dict(model.named_parameters())
    if tensors and _counts_in_groups(optimizer):
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        for group in optimizer.param_groups:
            group["step"] = int(tensors[f"{name_of[id(group['params'][0])]}/step"])
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("/step")}
    # AdamW's step counter is on the parameter's device only if fused or capturable, else on the CPU
    is_on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for key, tensor in tensors.items():
        name, _, state = key.rpartition("/")
        parameter = parameters[name]
        device = parameter.device if tensor.ndim or is_on_device else "cpu"
        optimizer.state[parameter][state] = tensor.to(device, copy=True)


class Ema:
    """Exponential moving average of weights and floating-point buffers, ema = decay * ema + (1 - decay) * weight.

    One update an optimizer step. (The reference updates at every micro-step, never evaluates the average, and loses
    it on resume.)

    Args:
        model: its weights are averaged.
        decay: decay of the average an update.
        optimizer: if it averages its parameters itself (``FlatAdamW.ema``), these averages are used.
    """

    def __init__(self, model: nn.Module, decay: float, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.decay = decay
        self._live = _floating(model)
        kept: dict[nn.Parameter, Tensor] = getattr(optimizer, "ema", {})
        elsewhere = {name: kept[p] for name, p in model.named_parameters() if p in kept}
        here = {name: live.detach().clone() for name, live in self._live.items() if name not in elsewhere}
        self.state = {name: elsewhere[name] if name in elsewhere else here[name] for name in self._live}
        self._averages, self._followed = list(here.values()), [self._live[name] for name in here]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights, in one fused pass."""
        if self._averages:
            torch._foreach_lerp_(self._averages, self._followed, 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the model's weights; call twice to undo."""
        for name, live in self._live.items():
            held = live.clone()
            live.copy_(self.state[name])
            self.state[name].copy_(held)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore a saved average.

        Raises:
            UserError: names or shapes differ from the model's.
        """
        for name, tensor in self.state.items():
            if name not in state or state[name].shape != tensor.shape:
                got = tuple(state[name].shape) if name in state else "nothing"
                raise UserError(
                    f"ema state: {name} has {got}, expected {tuple(tensor.shape)}. Use the state of this model."
                )
            tensor.copy_(state[name])


def _floating(model: nn.Module) -> dict[str, Tensor]:
    tensors: Iterable[tuple[str, Tensor]] = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors if tensor.is_floating_point()}
