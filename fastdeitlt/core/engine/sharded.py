"""Engine for several ranks: DeepSpeed ZeRO around the joint forward.

DeepSpeed partitions moments (stage 1) and gradients (stage 2) over ranks and communicates them. The loss, its autocast,
the end of a step, clipping and checkpoints are ours; checkpoints contain whole tensors, so that a run saved by two
ranks resumes on one. Stage 3 is not offered: average, evaluation and checkpoint need whole weights on each rank, so
sharded ones would be a second copy, gathered by hooks that a compiled graph cannot contain.

Weights are float32 and the forward pass autocasts itself. DeepSpeed's `bf16` mode is never on: at stage 0 it runs a
hidden optimizer step before training, which makes Adam's bias correction off by one and decays every weight once.
"""

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.core import optim
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.engine.finite_guard import FiniteGuard
from fastdeitlt.core.joint import JointForward, LocalSums, step_forward
from fastdeitlt.core.loss import JointLoss
from fastdeitlt.data.sampler import Plan
from fastdeitlt.errors import UserError
from fastdeitlt.models.vit import num_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Compiled(nn.Module):
    """Module that DeepSpeed wraps; with its hooks here, the compiled graph inside has no breaks."""

    _forward: Callable[..., JointLoss | LocalSums]

    def __init__(self, joint: JointForward, is_compiled: bool) -> None:
        super().__init__()
        self.joint = joint
        object.__setattr__(self, "_forward", step_forward(joint, is_compiled))

    def forward(self, *inputs: Any) -> JointLoss | LocalSums:
        return self._forward(*inputs)


class DeepSpeedEngine:
    """Engine of one rank of several, ZeRO stage 0 to 2.

    The student has all its weights on every rank after every step, so that average, evaluation and checkpoint are
    independent of sharding.

    Args:
        joint: the forward pass.
        cfg: the run.
        plan: plan of this rank.

    Raises:
        UserError: an optimizer that cannot be sharded.
    """

    def __init__(self, joint: JointForward, cfg: Config, plan: Plan) -> None:
        self.stage, self.offload = cfg.train.zero_stage, cfg.train.offload
        self.student = joint.student
        device = next(self.student.parameters()).device
        self.optimizer = optim.build_optimizer(self.student, _shardable(cfg))
        if self.offload:
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]))  # beside the moments
        self.clip_norm = cfg.optim.clip_norm
        self.micro_batches_per_step = plan.micro_batches_per_step
        self.alpha = cfg.loss.alpha
        self.guard = FiniteGuard(self.optimizer, cfg.train.nonfinite_skips, device)
        self._deepspeed = _import(device)
        self.engine, self.zero, _, _ = self._deepspeed.initialize(
            model=_Compiled(joint, cfg.train.compile),
            optimizer=self.optimizer,
            config=self._settings(plan.batch_size),
        )
        self.engine.set_gradient_accumulation_boundary(False)
        if self.stage:
            self._start_moments(torch.zeros(()))

    def _settings(self, batch_size: int) -> dict[str, Any]:
        # one bucket for all gradients; the default's buffer has 500 M elements (2 GB), whatever the student's size
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": num_parameters(self.student)}
        zero["overlap_comm"] = False  # with it, stages 1 and 2 wait for the device after each backward
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        elif self.stage:
            zero["compute_grad_norm"] = False
        return {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": 1,  # counted here: an epoch's last step may have fewer micro-batches
            # offloaded gradients are not accessible: DeepSpeed clips them, with a host sync, and skips steps with
            # gradients that are not finite, like FiniteGuard otherwise
            "gradient_clipping": self.clip_norm if self.offload else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own needs a compiler
            "timers": {"throughput": {"enabled": False}},  # waits for the device
        }

    def forward(self, batch: Batch, dist_weights_K: Tensor, cls_weights_K: Tensor | None) -> JointLoss:
        losses = self.engine(
            batch.images_BCHW, batch.labels_B, batch.partner_B, batch.lam, dist_weights_K, cls_weights_K,
            batch.ranks, batch.drop_paths,
        )  # fmt: skip
        return losses.joined(self.alpha) if isinstance(losses, LocalSums) else losses

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss / self.micro_batches_per_step, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> Tensor:
        optim.set_learning_rate(self.optimizer, learning_rate)
        self.engine.set_gradient_accumulation_boundary(True)
        if self.stage < 2:
            self.engine.allreduce_gradients()
        else:
            self.zero.finalize_gradient_accumulation_boundary()
        norm = None if self.offload else self._clip()
        self.engine.step()
        self.engine.set_gradient_accumulation_boundary(False)
        return torch.as_tensor(self.engine.get_global_grad_norm()) if norm is None else norm

    def _clip(self) -> Tensor:
        """Clip this rank's gradients by the norm over all ranks, without a host sync."""
        if self.stage == 0:
            gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        else:
            gradients = [part for parts in self.zero.averaged_gradients.values() for part in parts]
            norm = distributed.sum_over_ranks(torch.nn.utils.get_total_norm(gradients).square()).sqrt()
        if self.clip_norm:
            torch._foreach_mul_(gradients, optim.clip_coefficient(norm, self.clip_norm))
        self.guard.watch(norm)
        return norm

    def weights(self) -> dict[str, Tensor]:
        return self.student.state_dict()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Collect whole moments of each parameter on rank 0; every rank must call it."""
        if self.stage == 0:
            return optim.optimizer_tensors(self.student, self.optimizer)
        step = next(iter(self.optimizer.state.values()))["step"].cpu()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.student.named_parameters():
            for key in MOMENTS:
                whole = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
                if distributed.rank() == 0:
                    tensors[f"{name}/{key}"] = whole.cpu().clone()
            tensors[f"{name}/step"] = step.clone()
        return tensors

    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        self.student.load_state_dict(weights)
        if self.stage == 0:
            optim.load_optimizer(self.student, self.optimizer, optimizer)
            return
        self.zero.refresh_fp32_params()
        optim.check_optimizer(self.student, optimizer)
        if optimizer:
            self._load_moments(optimizer)

    def _start_moments(self, step: Tensor) -> None:
        """Create AdamW's state of each flat part: zero moments and the counter ``step``.

        If the first step created it, DeepSpeed would link only the first group's state to its parameters.
        """
        for flat in self.zero.single_partition_of_fp32_groups:
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            # separate counters: a shared one would be incremented once a part
            self.optimizer.state[flat] = {"step": step.clone().to(flat.device), **moments}
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()

    def _load_moments(self, optimizer: dict[str, Tensor]) -> None:
        """Load this rank's parts of whole moments."""
        self._start_moments(next(value for key, value in optimizer.items() if key.endswith("/step")))
        for name, parameter in self.student.named_parameters():
            for key in MOMENTS:
                whole = optimizer[f"{name}/{key}"].to(parameter.device)
                self._deepspeed.utils.safe_set_full_optimizer_state(parameter, whole, key)


def _shardable(cfg: Config) -> Config:
    """Return the configuration with an optimizer that its ZeRO stage supports.

    For sharded state this is torch's AdamW, which accepts DeepSpeed's flat parts and has a step counter for each.
    """
    o, stage = cfg.optim, cfg.train.zero_stage
    if stage and o.algorithm == "lamb":
        raise UserError(
            f"optim.algorithm=lamb: got train.zero_stage={stage}, expected 0, because LAMB needs the norms of "
            "unsharded weights. Use train.zero_stage=0, or optim.algorithm=adamw."
        )
    if o.algorithm == "lamb" or (stage == 0 and o.backend in ("apex", "deepspeed")):
        return cfg
    if o.backend not in ("auto", "torch"):
        unsharded = ", or train.zero_stage=0" if o.backend != "fastdeitlt" else ""
        raise UserError(
            f"optim.backend: got {o.backend} with the DeepSpeed engine and train.zero_stage={stage}, expected torch. "
            f"Use optim.backend=torch{unsharded}."
        )
    return cfg.model_copy(update={"optim": o.model_copy(update={"backend": "torch"})})


def _import(device: torch.device) -> Any:
    """Import DeepSpeed with this device and process group.

    It compiles no extension.
    """
    distributed.start_alone(device)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
        import deepspeed.ops
        import deepspeed.utils
    except ImportError as error:
        raise UserError(
            f"train.engine=deepspeed: DeepSpeed cannot be imported ({error}). Install it with "
            "'DS_BUILD_OPS=0 pip install deepspeed==0.19.8', or use train.engine=plain on one rank."
        ) from None
    groups = deepspeed.utils.groups
    if groups._WORLD_GROUP is None and distributed.get_world() > 1:  # its own has no timeout for a rank that hangs
        groups._WORLD_GROUP = distributed.all_ranks()
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its own calls
    deepspeed.ops.__compatible_ops__ = {}  # or it probes compilers and GPUs for extensions it could build
    # an unused optimizer of DeepSpeed calls torch.compile when imported, which adds 3 s to a rank's start
    with mock.patch.object(torch, "compile", lambda function: function):
        import deepspeed.runtime.zero.muon.muon_optimizer
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
