"""What `tune` measures: each op of the step that has a kernel, with random inputs of a configuration's shapes."""

# B images, N tokens, H heads, E width of a head, D width, F width of the hidden layer, K classes

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastdeitlt.data import augment as augmenting
from fastdeitlt.data import mixup
from fastdeitlt.data.batches import use_kernel
from fastdeitlt.errors import UserError
from fastdeitlt.flat_adamw import ALIGNMENT
from fastdeitlt.kernels import _search, adamw_ema, attention, augment
from fastdeitlt.kernels._attention_launch import Problem, one_program
from fastdeitlt.kernels._launch import LaunchConfig
from fastdeitlt.kernels._measured import Key, trying
from fastdeitlt.kernels.add_layernorm import add_layernorm
from fastdeitlt.kernels.bias_gelu import bias_gelu
from fastdeitlt.loss import joint_loss
from fastdeitlt.models.layers import MLP_RATIO, linear_gelu, linear_gelu_kernel
from fastdeitlt.models.residual import Kept, add_norm, add_norm_kernel
from fastdeitlt.models.vit import NUM_PREFIX, Block
from fastdeitlt.speed.setup import Setup
from fastdeitlt.speed.timer import Call, passes

log = logging.getLogger("fastdeitlt")

SOURCE = (375, 500)
"""Height and width of the images that are cropped: ImageNet's usual ones."""


class Pass(NamedTuple):
    """One launch whose setting is searched."""

    call: Call
    settings: list[LaunchConfig]
    """The default first."""
    result: Call
    """What a setting must compute as the default does."""


class Part(NamedTuple):
    """One op at the shape of a configuration."""

    op: str
    key: Key
    """Of its choice."""
    passes: Mapping[Key, Pass]
    whole: Mapping[str, Call] = {}
    """Implementation -> forward and backward; none where only the step tells, or where another part chooses."""


def under(op: str, key: Key, setting: LaunchConfig, call: Call) -> Call:
    """The call with a setting."""

    def run() -> object:
        with trying(op, key, setting):
            return call()

    return run


def parts(setup: Setup) -> Iterator[Part]:
    """Every op of the step with a kernel; inputs are freed when the next part is asked for."""
    if setup.dtype != torch.float32:  # the attention kernel has no float32 on a GPU
        yield from _attention(setup)
    yield _add_layernorm(setup)
    yield _bias_gelu(setup)
    yield _joint_loss(setup)
    yield _adamw_ema(setup)
    if use_kernel(setup.cfg.augment, setup.device):
        yield _augment(setup)


def _launches(settings: _search.Settings, calls: Mapping[str, Call]) -> dict[Key, Pass]:
    """The launches of a differentiable function, by keys whose name is "forward", "backward" or of a part of one."""
    of_key = {key: calls[str(key[0]).partition("_")[0]] for key in settings}
    return {key: Pass(of_key[key], found, of_key[key]) for key, found in settings.items()}


def _random(setup: Setup, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, device=setup.device, dtype=dtype or setup.dtype).requires_grad_()


def _shape(setup: Setup) -> tuple[int, int, int, int]:
    """B, N, H, D."""
    student = setup.joint.student
    block = cast(Block, student.blocks[0])
    return len(setup.batch.labels_B), student.pos_embed.shape[1], block.attn.heads, student.width


def _attention(setup: Setup) -> Iterator[Part]:
    """All tokens, beside each of torch's backends that this GPU has; then the two first rows of the last block.

    All with the gradient of the projection's bias.
    """
    batch, tokens, heads, width = _shape(setup)
    head = width // heads
    if tokens > attention.MAX_TOKENS or head not in attention.WIDTHS:
        return
    qkv, bias = _random(setup, batch, tokens, 3, heads, head), _random(setup, 3 * width, dtype=torch.float32)
    problem = Problem.of(qkv, None, tokens)
    settings = _search.attention(problem, setup.device)
    triton = partial(attention.attention, qkv, qkv_bias=bias, impl="triton")
    calls = passes(triton, [qkv, bias])
    launches = _launches(settings, calls)
    backward, keys = problem.key("backward"), problem.key("backward_keys")
    if keys in settings:  # measured within a backward that launches it
        in_two = next(setting for setting in settings[backward] if not one_program(problem, setting))
        two_launches = under("attention", backward, in_two, launches[keys].call)
        launches[keys] = Pass(two_launches, settings[keys], two_launches)
    whole = {"triton": calls["whole"]}
    for impl in ("sdpa", "cudnn", "flash"):
        try:
            torchs = _summing(passes(partial(attention.attention, qkv, impl=impl), [qkv])["whole"])
            torchs()
        except (RuntimeError, UserError) as error:  # a backend that does not know the device or the shape
            log.info("attention %s: left out, %s", impl, " ".join(str(error).split())[:120])
            continue
        whole[impl] = torchs
    yield Part("attention", (tokens, head), launches, whole)
    q, kv = _random(setup, batch, NUM_PREFIX, heads, head), _random(setup, batch, tokens, 2, heads, head)
    first = partial(attention.attention_first, q, kv, qkv_bias=bias, impl="triton")
    few = _search.attention(Problem.of(q, kv, NUM_PREFIX), setup.device)
    yield Part("attention", (tokens, head), _launches(few, passes(first, [q, kv, bias])))


def _summing(whole: Callable[[], Any]) -> Call:
    """Then the pass over the gradient of the packed qkv that its projection's bias needs, where no kernel sums it."""

    def run() -> Tensor:
        (dqkv_BN3HE,) = whole()
        return cast(Tensor, dqkv_BN3HE).sum((0, 1), dtype=torch.float32)

    return run


def _add_layernorm(setup: Setup) -> Part:
    """The float32 stream, a branch with drop path, and the norm in the type of the products that read it.

    Both implementations are timed with the branch's last product, in which torch adds the bias for nothing.
    """
    batch, tokens, _, width = _shape(setup)
    x, branch = _random(setup, batch, tokens, width, dtype=torch.float32), _random(setup, batch, tokens, width)
    linear, norm = nn.Linear(width, width).to(setup.device, setup.dtype), nn.LayerNorm(width, eps=1e-6).to(setup.device)
    kept = Kept(torch.rand(batch, 1, 1, device=setup.device).round() * 2)
    bias = _random(setup, width, dtype=torch.float32)
    alone = partial(
        add_layernorm, x, branch, norm.weight, norm.bias, kept.scale_B11.flatten(), branch_bias=bias, impl="triton"
    )
    tensors = [x, branch, norm.weight, norm.bias]
    launches = _launches(_search.add_layer_norm(width, x.dtype), passes(alone, [*tensors, bias]))

    def torchs() -> tuple[Tensor, Tensor]:
        stream, normed = add_norm(x, branch, linear, kept, norm, None)
        return stream, normed.to(setup.dtype)

    tensors += [linear.weight, linear.bias]
    ours = partial(add_norm_kernel, x, branch, linear, kept, norm, None)
    return Part("add_layernorm", (width,), launches, _both(setup, ours, torchs, tensors))


def _bias_gelu(setup: Setup) -> Part:
    """The hidden layer with its product, in which torch adds the bias for nothing."""
    batch, tokens, _, width = _shape(setup)
    hidden = MLP_RATIO * width
    x, linear = _random(setup, batch, tokens, width), nn.Linear(width, hidden).to(setup.device, setup.dtype)
    u, bias = _random(setup, batch, tokens, hidden), _random(setup, hidden, dtype=torch.float32)
    tensors = [x, linear.weight, linear.bias]
    alone = passes(partial(bias_gelu, u, bias, impl="triton"), [u, bias])
    whole = _both(setup, partial(linear_gelu_kernel, x, linear), partial(linear_gelu, x, linear), tensors)
    return Part("bias_gelu", (hidden,), _launches(_search.bias_gelus(hidden), alone), whole)


def _joint_loss(setup: Setup) -> Part:
    """Both losses and both gradients of a mixed, re-weighted batch."""
    teacher, batch, num_classes = setup.joint.teacher, setup.batch, len(setup.counts)
    assert teacher is not None
    with torch.no_grad(), setup.autocast():
        teacher_logits = teacher(batch.images_BCHW)
    cls_logits, dist_logits = heads = [_random(setup, len(batch.labels_B), num_classes) for _ in range(2)]
    options: dict[str, Any] = {
        "weights": torch.rand(num_classes, device=setup.device) + 0.1,
        "class_map": teacher.class_map,
    }
    options |= {"partner": batch.partner_B, "lam": batch.lam, "smoothing": setup.cfg.mixup.smoothing}
    ours, torchs = (
        partial(joint_loss, cls_logits, dist_logits, batch.labels_B, teacher_logits, impl=impl, **options)
        for impl in ("triton", "torch")
    )
    largest = max(num_classes, teacher_logits.shape[1])
    launches = _launches(_search.joint_losses(largest, heads[0].element_size()), passes(ours, heads))
    return Part("joint_loss", (num_classes,), launches, _both(setup, ours, torchs, heads))


def _adamw_ema(setup: Setup) -> Part:
    """The flat step; which optimizer is faster only the whole step tells."""
    weights = sum(parameter.numel() for parameter in setup.joint.student.parameters())
    size = -(-weights // ALIGNMENT) * ALIGNMENT  # as the optimizer's buffers, which the kernel reads 16 bytes at a time
    flat = torch.rand(5, size, device=setup.device)
    lr, step = torch.full((), 1e-3, device=setup.device), torch.full((), 7.0, device=setup.device)
    options: dict[str, Any] = {"lr": lr, "step": step, "num_decayed": size // 2, "weight_decay": 0.05, "scale": lr}

    def on(buffers: Sequence[Tensor]) -> None:
        weights, grads, exp_avg, exp_avg_sq, ema = buffers
        adamw_ema.adamw_ema(weights, grads, exp_avg, exp_avg_sq, ema=ema, ema_decay=0.999, **options)

    def result() -> list[Tensor]:
        copies = list(flat.clone())
        on(copies)
        return copies

    settings = _search.elementwise({adamw_ema.KEY: adamw_ema.DEFAULT})
    return Part(
        "adamw_ema", adamw_ema.KEY, {adamw_ema.KEY: Pass(partial(on, list(flat)), settings[adamw_ema.KEY], result)}
    )


def _augment(setup: Setup) -> Part:
    """Crop to mixed batch, from noise."""
    batch, (height, width), cfg, side = len(setup.batch.labels_B), SOURCE, setup.cfg.augment, setup.size
    numbers = np.arange(batch)
    pixels = torch.randint(0, 256, (batch * height * width * 3,), dtype=torch.uint8, device=setup.device)
    draws = augmenting.draw(numbers, numbers * 0, seed=0, epoch=0, cfg=cfg, size=side)
    mix = mixup.draw(0, 0, 0, 0, setup.cfg.mixup, side)
    sizes_B2 = np.tile(np.array((height, width)), (batch, 1))
    call = partial(
        augment.augment, pixels, numbers * height * width * 3, sizes_B2, draws, mix, cfg, side, dtype=setup.dtype
    )
    settings = _search.elementwise({(kernel, side): augment.default_config(kernel) for kernel in augment.SEARCHED})
    return Part("augment", (side,), {key: Pass(call, found, call) for key, found in settings.items()})


def _both(
    setup: Setup, triton: Callable[[], Any], torchs: Callable[[], Any], tensors: Sequence[Tensor]
) -> dict[str, Call]:
    """Forward and backward of the kernel's function and of torch's, which is compiled as the step is."""
    functions = {"triton": triton, "torch": _compiled(setup, torchs)}
    return {impl: passes(function, tensors)["whole"] for impl, function in functions.items()}


def _compiled(setup: Setup, function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        return function()

    return torch.compile(call, dynamic=False) if setup.cfg.train.compile else function
