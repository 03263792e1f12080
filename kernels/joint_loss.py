"""Joint DeiT-LT loss of both heads and its logit gradients, without dense target, host sync or atomics.

    loss = (1 - alpha) sum_b CE(cls_b, u_b) / sum_b n_b + alpha sum_b w[t_b] CE(dist_b, t_b) / sum_b w[t_b]
    u_bc = v_c ((1 - smoothing) (lam [c = y_b] + (1 - lam) [c = y'_b]) + smoothing / K),  t_b = map[argmax teacher_b]
    d loss / d cls_bc  = (1 - alpha) (softmax(cls_b)_c sum_c u_bc - u_bc) / sum_b n_b
    d loss / d dist_bc = alpha w[t_b] (softmax(dist_b)_c - [c = t_b]) / sum_b w[t_b]

v are class weights of the CLS loss, n_b = lam v[y_b] + (1 - lam) v[y'_b] (1 by default); a term whose weights sum to 0
is 0. Soft distillation and binary
cross-entropy replace one term each. Source: val-iisc/DeiT-LT losses.py, DistillationLoss; ``fastdeitlt.core.loss``.

One program per row reads the three logit rows and stores eleven statistics; one program sums the rows in a fixed order;
the backward writes each gradient once, scaled by the upstream gradient, which stays on the device. Moves 3 logits in,
then 2 logits in (from L2 when they fit: the backward follows at once) and 2 gradients out. Floor, each counted once:
5 B K elements, 2.4 us at B = 1024, K = 1000, bfloat16 and 4.3 TB/s.
Shapes: B batch, K classes, J the teacher's classes, S statistics of a row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from fastdeitlt.kernels._joint_loss_device import (
    NUM_STATS,
    joint_loss_bwd_kernel,
    joint_loss_fwd_kernel,
    joint_loss_reduce_kernel,
)
from fastdeitlt.kernels._joint_loss_reference import (
    JointLoss,
    LossSpec,
    Target,
    gathered,
    reference_losses,
)
from fastdeitlt.kernels._launch import FLOATS, AotConfig, LaunchConfig, check, interpreted, launch, schema
from fastdeitlt.kernels._measured import setting
from fastdeitlt.kernels._operator import Operator
from torch import Tensor

REDUCE_BLOCK = 1024


def key(forward: bool, num_classes: int, element_size: int) -> tuple[str, int, int]:
    """Return a setting's key: pass, classes' next power of two, bytes of a logit."""
    return "forward" if forward else "backward", triton.next_power_of_2(num_classes), element_size


def launch_config(forward: bool, num_classes: int, element_size: int, device: torch.device) -> LaunchConfig:
    """Return the measured setting.

    By default the forward has one block for up to 8,192 classes, the backward blocks of 2,048 bytes, 16 a lane.
    """
    measured_key = key(forward, num_classes, element_size)
    size = measured_key[1]
    if forward:
        block = size if size <= 8192 else 4096
        warps = block // 256
    else:
        block = min(size, 2048 // element_size)
        warps = block * element_size // 512
    default = LaunchConfig({"BLOCK": block}, num_warps=min(max(warps, 1), 8))
    return setting("joint_loss", measured_key, device, default)


def reference(
    cls_logits: Tensor, dist_logits: Tensor, labels: Tensor, teacher_logits: Tensor, **options: Any
) -> JointLoss:
    """Compute ``reference_losses``; options: fields of ``Target`` and ``LossSpec``."""
    return reference_losses(cls_logits, dist_logits, teacher_logits, *gathered(labels, options))


class _Inputs(NamedTuple):
    """Arguments of both operators, whose schema has the fields of ``target`` and ``spec`` in their place."""

    cls_logits: Tensor
    dist_logits: Tensor
    teacher_logits: Tensor
    target: Target
    spec: LossSpec

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "_Inputs":
        """Build from an operator's flat arguments."""
        end = 3 + len(Target._fields)
        return cls(*arguments[:3], Target(*arguments[3:end]), LossSpec(*arguments[end:]))

    def arguments(self) -> tuple[Any, ...]:
        """Return the flat arguments of an operator."""
        return *self[:3], *self.target, *self.spec

    def pointers(self) -> tuple[Tensor | None, ...]:
        """Return the kernels' leading arguments.

        With soft distillation the weights are logs, in teacher order.
        """
        weights, class_map = self.spec.weights, self.spec.class_map
        if self.spec.soft and weights is not None:
            weights = (weights if class_map is None else weights[class_map]).log()
        return (*self[:3], *self.target[:3], weights, self.spec.cls_weights, self.spec.log_prior, class_map)

    @property
    def inverse_tau(self) -> float:
        """Factor on the logits of the DIST loss; hard distillation has no temperature."""
        return 1 / self.spec.tau if self.spec.soft else 1.0

    def constants(self) -> dict[str, int]:
        """Return the constexprs of both kernels.

        With constant row strides Triton can vectorise.
        """
        strides = (logits.stride(0) for logits in self[:3])
        names = ("CLS_STRIDE", "DIST_STRIDE", "TEACHER_STRIDE")
        return {
            **dict(zip(names, strides, strict=True)),
            "K": self.cls_logits.size(1),
            "SOFT": self.spec.soft,
            "BCE": self.spec.bce,
        }


ARGUMENTS = schema(_Inputs)
FORWARD = (
    f"({ARGUMENTS}) -> (Tensor loss, Tensor cls_loss, Tensor dist_loss, Tensor norms, Tensor stats, Tensor decision)"
)
BACKWARD = (
    "(Tensor? grad_loss, Tensor? grad_cls_loss, Tensor? grad_dist_loss, Tensor norms, Tensor stats, Tensor decision, "
    f"{ARGUMENTS}) -> (Tensor grad_cls, Tensor grad_dist)"
)


def _outputs(inputs: _Inputs) -> tuple[Tensor, ...]:
    x, batch = inputs.cls_logits, inputs.cls_logits.size(0)
    shapes = ((), (), (), (2,), (NUM_STATS, batch))
    floats = (torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes)
    return *floats, torch.empty(batch, dtype=torch.int32, device=x.device)


def _launch_forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs.of(arguments)
    batch, teacher_classes = inputs.teacher_logits.shape
    loss, cls_loss, dist_loss, norms, stats, decision = _outputs(inputs)
    num_classes, element_size = max(inputs.cls_logits.size(1), teacher_classes), inputs.cls_logits.element_size()
    config, target, spec = launch_config(True, num_classes, element_size, stats.device), inputs.target, inputs.spec
    launch(
        joint_loss_fwd_kernel, (batch,), stats,
        *inputs.pointers(), decision, stats, batch, target.smoothing, inputs.inverse_tau,
        J=teacher_classes, SMOOTH=target.smoothing > 0, **inputs.constants(), **config.options,
    )  # fmt: skip
    launch(
        joint_loss_reduce_kernel, (1,), stats,
        stats, spec.normaliser, loss, cls_loss, dist_loss, norms, spec.alpha, B=batch, BLOCK=REDUCE_BLOCK,
    )  # fmt: skip
    return loss, cls_loss, dist_loss, norms, stats, decision


def _launch_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    gradients, (norms, stats, decision), inputs = arguments[:3], arguments[3:6], _Inputs.of(arguments[6:])
    batch, num_classes = inputs.cls_logits.shape
    grad_cls = torch.empty(batch, num_classes, dtype=inputs.cls_logits.dtype, device=stats.device)
    grad_dist = torch.empty_like(grad_cls)
    config = launch_config(False, num_classes, grad_cls.element_size(), stats.device)
    launch(
        joint_loss_bwd_kernel, (batch, triton.cdiv(num_classes, config.blocks["BLOCK"])), stats,
        *inputs.pointers(), decision, stats, norms, *gradients, grad_cls, grad_dist, batch,
        inputs.target.smoothing, inputs.inverse_tau, inputs.spec.alpha, **inputs.constants(), **config.options,
    )  # fmt: skip
    return grad_cls, grad_dist


_forward = Operator("joint_loss", _launch_forward, FORWARD)
_backward = Operator("joint_loss_backward", _launch_backward, BACKWARD)


@_forward.on_cpu
def _(*arguments: Any) -> tuple[Tensor, ...]:
    if interpreted():
        return _launch_forward(*arguments)
    inputs = _Inputs.of(arguments)
    *_, norms, stats, decision = _outputs(inputs)
    return *reference_losses(*inputs), norms.zero_(), stats.zero_(), decision.zero_()


@_backward.on_cpu
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    if interpreted():
        return _launch_backward(*arguments)
    inputs = _Inputs.of(arguments[6:])
    upstream = tuple(torch.zeros(()) if gradient is None else gradient for gradient in arguments[:3])
    pull_back = torch.func.vjp(lambda *heads: tuple(reference_losses(*heads, *inputs[2:])), *inputs[:2])[1]
    return pull_back(upstream)


@_forward.fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _outputs(_Inputs.of(arguments))


@_backward.fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x = arguments[6]
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:], *(x if isinstance(x, Tensor) else None for x in inputs))
    ctx.options = [None if isinstance(x, Tensor) else x for x in inputs]


def _autograd(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    norms, stats, decision, *tensors = ctx.saved_tensors
    inputs = [x if tensor is None else tensor for tensor, x in zip(tensors, ctx.options, strict=True)]
    return *_backward(*gradients[:3], norms, stats, decision, *inputs), *[None] * (len(inputs) - 2)


_forward.autograd(_autograd, _setup_context)


def joint_loss(
    cls_logits: Tensor, dist_logits: Tensor, labels: Tensor, teacher_logits: Tensor, **options: Any
) -> JointLoss:
    """Compute ``losses`` with the fields of ``Target`` and ``LossSpec`` as keywords.

    Args:
        cls_logits, dist_logits: [B, K] float32, float16 or bfloat16, each row contiguous.
        labels: [B] int64 classes.
        teacher_logits: [B, J], any of the three types.
        options: as of ``reference``. Soft distillation with a class_map needs a permutation.

    Raises:
        UserError: a shape, type, device or layout does not fit.
    """
    return losses(cls_logits, dist_logits, teacher_logits, *gathered(labels, options))


def losses(
    cls_logits: Tensor, dist_logits: Tensor, teacher_logits: Tensor, target: Target, spec: LossSpec
) -> JointLoss:
    """Compute ``reference_losses`` in two launches, and both gradients in one.

    On a CPU tensor the op is the float32 reference, or the kernel itself under TRITON_INTERPRET=1.

    Raises:
        UserError: a shape, type, device or layout does not fit.
    """
    inputs = _Inputs(cls_logits, dist_logits, teacher_logits.detach(), target, spec)
    _check(inputs)
    return JointLoss(*_forward(*inputs.arguments())[:3])


def _check(inputs: _Inputs) -> None:
    x = inputs.cls_logits
    batch, num_classes = x.size(0), x.size(-1)
    teacher_classes = inputs.teacher_logits.size(-1)
    vector, integer, full = (num_classes,), (torch.int64,), (torch.float32,)
    expected: dict[str, tuple[tuple[int | None, ...], tuple[torch.dtype, ...], bool]] = {
        "cls_logits": ((None, None), FLOATS, False),
        "dist_logits": ((batch, num_classes), (x.dtype,), False),
        "teacher_logits": ((batch, num_classes if inputs.spec.soft else None), FLOATS, False),
        "labels": ((batch,), integer, True),
        "partner": ((batch,), integer, True),
        "lam": ((), (torch.float64, *FLOATS), True),
        "weights": (vector, full, True),
        "cls_weights": (vector, full, True),
        "log_prior": (vector, full, True),
        "class_map": ((teacher_classes,), integer, True),
        "normaliser": ((), full, True),
    }
    tensors = inputs._asdict() | inputs.target._asdict() | inputs.spec._asdict()
    for name, (shape, dtypes, contiguous) in expected.items():
        tensor = tensors[name]
        if tensor is not None:
            check("joint_loss", name, tensor, shape, dtypes, x.device, contiguous)


def aot_configs() -> list[AotConfig]:
    """Return the shipped kernels.

    Each data set's class count in bfloat16; variants, float16, float32 at 1,000.
    """
    cases: list[tuple[str, int, dict[str, bool]]] = [("bf16", k, {}) for k in (10, 100, 365, 1000)]
    cases += [("fp32", 1000, {}), ("fp16", 1000, {}), ("bf16", 1000, {"BCE": True}), ("bf16", 1000, {"SOFT": True})]
    cases += [("bf16", 8142, {}), ("bf16", 21841, {})]
    backward = [_aot_config(joint_loss_bwd_kernel, *case) for case in cases]
    blocks = {"B": REDUCE_BLOCK, "BLOCK": REDUCE_BLOCK}
    reduce = AotConfig.of(joint_loss_reduce_kernel, LaunchConfig(blocks), blocks, {})
    return [*(_aot_config(joint_loss_fwd_kernel, *case) for case in cases), *backward, reduce]


def _aot_config(kernel: Any, kind: str, num_classes: int, variant: dict[str, bool]) -> AotConfig:
    forward = kernel is joint_loss_fwd_kernel
    config = launch_config(forward, num_classes, 4 if kind == "fp32" else 2, torch.device("cpu"))
    strides = dict.fromkeys(("CLS_STRIDE", "DIST_STRIDE", "TEACHER_STRIDE"), num_classes)
    constexprs = {**strides, "K": num_classes, "J": num_classes, "SMOOTH": True}
    constexprs |= {"SOFT": False, "BCE": False, **variant, **config.blocks}
    integers = dict.fromkeys(("p_labels", "p_partner", "p_class_map"), "*i64") | {"p_decision": "*i32", "B": "i32"}
    logits = dict.fromkeys(("p_cls", "p_dist", "p_teacher", "p_grad_cls", "p_grad_dist"), f"*{kind}")
    note = " ".join([f"K={num_classes}", *variant, f"BLOCK={config.blocks['BLOCK']}"])
    # rows of an odd number of classes are not aligned, and soft distillation stores in the teacher's order
    narrow = 0 if not forward and num_classes % 8 == 0 and "SOFT" not in variant else None
    return AotConfig.of(kernel, config, constexprs, integers | logits, narrow_stores=narrow, note=note)
