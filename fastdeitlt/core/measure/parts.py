"""Ops of the step that have a kernel, as timeable calls on random inputs of a configuration's shapes."""

# B images, N tokens, H heads, E width of a head, D width, F width of the hidden layer, K classes, J the teacher's

import copy
import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastdeitlt.config import Config
from fastdeitlt.core.batches import use_kernel
from fastdeitlt.core.engine.plain import PlainEngine
from fastdeitlt.core.flat_adamw import ALIGNMENT
from fastdeitlt.core.joint import JointForward
from fastdeitlt.core.loss import joint_loss
from fastdeitlt.core.measure.timer import Call, passes, tensors_of
from fastdeitlt.core.optim import Ema, peak_learning_rate
from fastdeitlt.data import mixup
from fastdeitlt.data.augment import transform as augmenting
from fastdeitlt.errors import UserError
from fastdeitlt.kernels import _search, adamw_ema, attention, augment
from fastdeitlt.kernels._attention_launch import Problem, one_program
from fastdeitlt.kernels._launch import LaunchConfig, context_failure
from fastdeitlt.kernels._measured import Key, trying
from fastdeitlt.kernels._pick import FLASH_MODULES, MAX_TOKENS, torch_backend
from fastdeitlt.kernels.add_layernorm import add_layernorm
from fastdeitlt.kernels.bias_gelu import bias_gelu
from fastdeitlt.models.layers import MLP_RATIO, Linear, linear_gelu
from fastdeitlt.models.residual import add_norm, draw_samples
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import NUM_PREFIX, Block, DistilledViT
from fastdeitlt.precision import autocast_dtype

log = logging.getLogger("fastdeitlt")

TORCHS = ("flash", "cudnn", "efficient", *FLASH_MODULES)
"""Implementations of attention to time beside the kernel."""
SOURCE = (375, 500)
"""Height and width of the images to crop, ImageNet's usual ones."""


SETTINGS = {
    "attention": ("student", "attention"),
    "add_layernorm": ("student", "add_layernorm"),
    "bias_gelu": ("student", "bias_gelu"),
    "joint_loss": ("loss", "impl"),
    "adamw_ema": ("optim", "backend"),
}
"""Op -> section and field of the configuration that selects its implementation."""


@dataclass(frozen=True)
class Shapes:
    """Source of a step's shapes: configuration, networks, classes and device."""

    cfg: Config
    student: DistilledViT
    teacher: Teacher | None
    num_classes: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the step's matrix products."""
        return autocast_dtype(self.cfg.train.precision, self.device) or torch.float32

    @property
    def batch(self) -> int:
        """Images in a micro-batch."""
        return self.cfg.train.batch_size

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return int(self.student.pos_embed.shape[1])

    @property
    def keys(self) -> dict[str, Key]:
        """Ops of the step that have a kernel -> key of their measurements."""
        width = self.student.width
        head = width // cast(Block, self.student.blocks[0]).attn.heads
        keys: dict[str, Key] = {
            "attention": (self.tokens, head), "add_layernorm": (width,), "bias_gelu": (MLP_RATIO * width,),
            "joint_loss": (self.num_classes,), "adamw_ema": adamw_ema.KEY, "augment": (self.student.img_size,),
        }  # fmt: skip
        has_kernel = {
            "attention": self.dtype != torch.float32 and self.tokens <= MAX_TOKENS and head in attention.WIDTHS,
            "adamw_ema": self.cfg.optim.algorithm == "adamw",
            "augment": use_kernel(self.cfg.augment, self.device),
        }
        return {op: key for op, key in keys.items() if has_kernel.get(op, True)}

    def torchs(self, op: str) -> str:
        """Return the name of torch's implementation of an op."""
        return torch_backend(self.dtype, self.device) if op == "attention" else "torch"

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a random tensor that requires a gradient."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype).requires_grad_()


class Pass(NamedTuple):
    """One launch and the settings to search."""

    call: Call
    settings: list[LaunchConfig]
    """The default first."""
    result: Call
    """Call whose result must be the same with every setting."""


class Part(NamedTuple):
    """One op at the shape of a configuration."""

    op: str
    key: Key
    """Key of the op's "fastest" row."""
    passes: Mapping[Key, Pass]
    whole: Mapping[str, Call] = {}
    """Implementation -> forward and backward; empty if another part selects the implementation."""
    also: Mapping[str, Call] = {}
    """The same in another case for which this part selects the implementation: verified, not timed."""
    eager: bool = False
    """Whether ``whole`` cannot be captured in a CUDA graph."""

    def results(self, impl: str) -> list[Tensor]:
        """Return outputs and gradients of an implementation in all cases."""
        return [tensor for calls in (self.whole, self.also) if impl in calls for tensor in tensors_of(calls[impl]())]


def under(op: str, key: Key, setting: LaunchConfig, call: Call) -> Call:
    """Return the call with a launch setting."""

    def run() -> object:
        with trying(op, key, setting):
            return call()

    return run


def parts(shapes: Shapes, only: Container[str] | None = None) -> Iterator[Part]:
    """Yield the ops of the step that have a kernel, or those in ``only``.

    A part's inputs are freed with it.
    """
    builders = {
        "attention": _attention, "add_layernorm": _add_layernorm, "bias_gelu": _bias_gelu, "joint_loss": _joint_loss,
        "adamw_ema": _adamw_ema, "augment": _augment,
    }  # fmt: skip
    for op, build in builders.items():
        if op in shapes.keys and (only is None or op in only):
            yield from build(shapes)


def _launches(settings: _search.Settings, calls: Mapping[str, Call]) -> dict[Key, Pass]:
    """Return the launches of a function by key.

    Keys are "forward", "backward", or "backward_..." for a part of it.
    """
    of_key = {key: calls[str(key[0]).partition("_")[0]] for key in settings}
    return {key: Pass(of_key[key], configs, of_key[key]) for key, configs in settings.items()}


def _attention(shapes: Shapes) -> Iterator[Part]:
    """Yield attention of all tokens, then of the last block's two first rows.

    Each is beside torch's backends and includes the gradient of the projection's bias.
    """
    batch, tokens, width = shapes.batch, shapes.tokens, shapes.student.width
    head = width // (heads := cast(Block, shapes.student.blocks[0]).attn.heads)
    qkv, bias = shapes.random(batch, tokens, 3, heads, head), shapes.random(3 * width, dtype=torch.float32)
    problem = Problem.of(qkv, None)
    settings = _search.attention(problem, shapes.device)
    triton = partial(attention.attention, qkv, qkv_bias=bias, impl="triton")
    calls = passes(triton, [qkv, bias])
    launches = _launches(settings, calls)
    backward, keys = problem.key("backward"), problem.key("backward_keys")
    if keys in settings:  # measured within a backward that launches it
        in_two = next(setting for setting in settings[backward] if not one_program(problem, setting))
        two_launches = under("attention", backward, in_two, launches[keys].call)
        launches[keys] = Pass(two_launches, settings[keys], two_launches)
    q, kv = shapes.random(batch, NUM_PREFIX, heads, head), shapes.random(batch, tokens, 2, heads, head)
    first = partial(attention.attention_first, q, kv, qkv_bias=bias)
    calls_first = passes(partial(first, impl="triton"), [q, kv, bias])
    whole, also = {"triton": calls["whole"]}, {"triton": calls_first["whole"]}
    for impl in dict.fromkeys((shapes.torchs("attention"), *TORCHS)):
        try:
            torchs = _summing(passes(partial(attention.attention, qkv, impl=impl), [qkv])["whole"])
            torchs_first = passes(partial(first, impl=impl), [q, kv, bias])["whole"]
            torchs()
            torchs_first()
        except (RuntimeError, UserError) as error:  # not installed, or not for this device or shape
            if impl == shapes.torchs("attention") or context_failure(shapes.device):
                raise
            log.debug("attention %s: not measured, %s", impl, " ".join(str(error).split())[:120])
            continue
        whole[impl], also[impl] = torchs, torchs_first
    yield Part("attention", (tokens, head), launches, whole, also)
    few = _search.attention(Problem.of(q, kv), shapes.device)
    yield Part("attention", (tokens, head), _launches(few, calls_first))


def _summing(whole: Callable[[], Any]) -> Call:
    """Add the sum for the projection's bias, which only our kernel includes."""

    def run() -> tuple[Tensor, ...]:
        out_BND, dqkv_BN3HE = whole()
        return out_BND, dqkv_BN3HE, dqkv_BN3HE.sum((0, 1), dtype=torch.float32).flatten()

    return run


def _add_layernorm(shapes: Shapes) -> Iterator[Part]:
    """Yield add and LayerNorm of a float32 stream and a dropped branch.

    The output has the type of the matrix products. Both implementations are timed with the branch's last product, in
    which torch adds the bias at no cost.
    """
    batch, tokens, width = shapes.batch, shapes.tokens, shapes.student.width
    x, branch = shapes.random(batch, tokens, width, dtype=torch.float32), shapes.random(batch, tokens, width)
    linear = Linear(width, width).to(shapes.device, shapes.dtype)
    norm = nn.LayerNorm(width, eps=1e-6).to(shapes.device)
    samples = draw_samples(x, shapes.cfg.student.drop_path / 2, "bernoulli")  # the blocks' mean
    scale_B = None if samples is None else samples.scale_B11.flatten()
    bias = shapes.random(width, dtype=torch.float32)
    kernel = partial(add_layernorm, x, branch, norm.weight, norm.bias, scale_B, branch_bias=bias, impl="triton")
    tensors = [x, branch, norm.weight, norm.bias]
    launches = _launches(_search.add_layer_norm(width, x.dtype), passes(kernel, [*tensors, bias]))

    def torchs() -> tuple[Tensor, Tensor]:
        stream, normed = add_norm(x, branch, linear, samples, norm, None)
        return stream, normed.to(shapes.dtype)

    tensors += [linear.weight, linear.bias]
    ours = partial(add_norm, x, branch, linear, samples, norm, None, "triton")
    yield Part("add_layernorm", (width,), launches, _both(shapes, ours, torchs, tensors))


def _bias_gelu(shapes: Shapes) -> Iterator[Part]:
    """Yield bias and GELU of the hidden layer with its matrix product.

    In the product torch adds the bias at no cost.
    """
    batch, tokens, width = shapes.batch, shapes.tokens, shapes.student.width
    hidden = MLP_RATIO * width
    x, linear = shapes.random(batch, tokens, width), Linear(width, hidden).to(shapes.device, shapes.dtype)
    u, bias = shapes.random(batch, tokens, hidden), shapes.random(hidden, dtype=torch.float32)
    tensors = [x, linear.weight, linear.bias]
    kernel_passes = passes(partial(bias_gelu, u, bias, impl="triton"), [u, bias])
    whole = _both(shapes, partial(linear_gelu, x, linear, "triton"), partial(linear_gelu, x, linear), tensors)
    yield Part("bias_gelu", (hidden,), _launches(_search.bias_gelus(hidden), kernel_passes), whole)


def _joint_loss(shapes: Shapes) -> Iterator[Part]:
    """Yield both losses and both gradients of a mixed, re-weighted batch."""
    batch, num_classes, teacher = shapes.batch, shapes.num_classes, shapes.teacher
    class_map = None if teacher is None else teacher.class_map
    teacher_logits = shapes.random(batch, num_classes if teacher is None else teacher.num_classes).detach()
    cls_logits, dist_logits = heads = [shapes.random(batch, num_classes) for _ in range(2)]
    labels_B = torch.arange(batch, device=shapes.device) % num_classes
    weights = torch.rand(num_classes, device=shapes.device) + 0.1
    options: dict[str, Any] = {"weights": weights, "class_map": class_map, "smoothing": shapes.cfg.mixup.smoothing}
    options |= {"partner": labels_B.flip(0), "lam": torch.full((), 0.7, device=shapes.device)}
    ours, torchs = (
        partial(joint_loss, cls_logits, dist_logits, labels_B, teacher_logits, impl=impl, **options)
        for impl in ("triton", "torch")
    )
    largest = max(num_classes, teacher_logits.shape[1])
    launches = _launches(_search.joint_losses(largest, heads[0].element_size()), passes(ours, heads))
    yield Part("joint_loss", (num_classes,), launches, _both(shapes, ours, torchs, heads))


def _adamw_ema(shapes: Shapes) -> Iterator[Part]:
    """Yield the kernel alone, and the step with clipping and average beside torch's."""
    weights = sum(parameter.numel() for parameter in shapes.student.parameters())
    size = -(-weights // ALIGNMENT) * ALIGNMENT  # aligned like the optimizer's buffers, for 16-byte loads
    flat = torch.rand(5, size, device=shapes.device)
    lr, step = torch.full((), 1e-3, device=shapes.device), torch.full((), 7.0, device=shapes.device)
    options: dict[str, Any] = {"lr": lr, "step": step, "num_decayed": size // 2, "weight_decay": 0.05, "scale": lr}

    def on(buffers: Sequence[Tensor]) -> None:
        weights, grads, exp_avg, exp_avg_sq, ema = buffers
        adamw_ema.adamw_ema(weights, grads, exp_avg, exp_avg_sq, ema=ema, ema_decay=0.999, **options)

    def result() -> list[Tensor]:
        copies = list(flat.clone())
        on(copies)
        return copies

    settings = _search.elementwise({adamw_ema.KEY: adamw_ema.DEFAULT})
    launches = {adamw_ema.KEY: Pass(partial(on, list(flat)), settings[adamw_ema.KEY], result)}
    whole = {impl: _optimizer(shapes, impl) for impl in ("fastdeitlt", "torch")}
    yield Part("adamw_ema", adamw_ema.KEY, launches, whole, eager=True)


def _optimizer(shapes: Shapes, backend: str) -> Call:
    """Return the engine's step from zero weights, whose results are the updates."""
    student, cfg = copy.deepcopy(shapes.student), shapes.cfg
    for parameter in student.parameters():
        parameter.data.zero_()
    sections = {"optim": cfg.optim.model_copy(update={"backend": backend})}
    sections["train"] = cfg.train.model_copy(update={"compile": False})  # type: ignore[assignment]
    cfg = cfg.model_copy(update=sections)
    joint = JointForward(student, None, [1] * shapes.num_classes, cfg, shapes.device)
    engine = PlainEngine(joint, cfg, 1)
    ema = Ema(student, cfg.optim.ema_decay, engine.optimizer) if cfg.optim.ema_decay else None
    generator, rate = torch.Generator(shapes.device).manual_seed(0), peak_learning_rate(cfg)
    gradients = [torch.randn(p.shape, device=p.device, generator=generator) for p in engine.parameters]

    def step() -> list[Tensor]:
        for parameter, gradient in zip(engine.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = engine.step(rate)
        if ema:
            ema.update()
        return [norm, *engine.parameters]

    return step


def _augment(shapes: Shapes) -> Iterator[Part]:
    """Yield the augmentation of noise, from crop to mixed batch."""
    batch, (height, width), cfg, side = shapes.batch, SOURCE, shapes.cfg.augment, shapes.student.img_size
    numbers = np.arange(batch)
    pixels = torch.randint(0, 256, (batch * height * width * 3,), dtype=torch.uint8, device=shapes.device)
    draws = augmenting.draw(numbers, numbers * 0, seed=0, epoch=0, cfg=cfg, size=side)
    mix = mixup.draw(0, 0, 0, 0, shapes.cfg.mixup, side)
    sizes_B2 = np.tile(np.array((height, width)), (batch, 1))
    call = partial(
        augment.augment, pixels, numbers * height * width * 3, sizes_B2, draws, mix, cfg, side, dtype=shapes.dtype
    )
    settings = _search.elementwise({(kernel, side): augment.default_config(kernel) for kernel in augment.SEARCHED})
    yield Part("augment", (side,), {key: Pass(call, configs, call) for key, configs in settings.items()})


def _both(
    shapes: Shapes, triton: Callable[[], Any], torchs: Callable[[], Any], tensors: Sequence[Tensor]
) -> dict[str, Call]:
    """Return both passes of the kernel and of torch, compiled if the step is."""

    def call() -> Any:
        return torchs()

    functions = {"triton": triton, "torch": torch.compile(call, dynamic=False) if shapes.cfg.train.compile else torchs}
    return {impl: passes(function, tensors)["whole"] for impl, function in functions.items()}
