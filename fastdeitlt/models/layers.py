"""The student's layers under timm's parameter names, and the choice of who computes them."""
# B batch, C channels, H W height and width of images_BCHW, N tokens, M of them, D width;
# after the qkv projection: H heads, E width of a head (D = H E)

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeitlt.config import near
from fastdeitlt.errors import UserError

MLP_RATIO = 4


class Linear(nn.Linear):
    """A linear map, of which a call may ask for some of the output rows only, or leave the bias's gradient to others.

    A CPU's float32 product with bias first writes the bias to all of its output. Compiled there, whatever reads the
    product adds the bias instead; for GPUs the compiler does so by itself.
    """

    def forward(self, x: Tensor, rows: slice = slice(None), *, train_bias: bool = True) -> Tensor:
        weight, bias = self.weight[rows], (self.bias if train_bias else self.bias.detach())[rows]
        if x.device.type == "cpu" and torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight) + bias
        return F.linear(x, weight, bias)


# of (x_BND, its qkv projection, number of heads, how many of the first tokens ask; None = all) -> [B, N or M, D]
Attention = Callable[[Tensor, Linear, int, int | None], Tensor]


def attend(x_BND: Tensor, qkv: Linear, heads: int, num_queries: int | None) -> Tensor:
    """Softmax attention of every token, or of the first ``num_queries``, to every token.

    Returns:
        [B, N, D] or [B, M, D], heads side by side.
    """
    if num_queries is None:
        q_BHME, k_BHNE, v_BHNE = _packed(x_BND, qkv, heads).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q_BMHE, kv_BN2HE = _apart(x_BND, qkv, heads, num_queries)
        q_BHME, (k_BHNE, v_BHNE) = q_BMHE.transpose(1, 2), kv_BN2HE.permute(2, 0, 3, 1, 4)
    return _softmax_attention(q_BHME, k_BHNE, v_BHNE)


def _packed(x_BND: Tensor, qkv: Linear, heads: int, *, train_bias: bool = True) -> Tensor:
    return qkv(x_BND, train_bias=train_bias).unflatten(-1, (3, heads, -1))


def _apart(
    x_BND: Tensor, qkv: Linear, heads: int, num_queries: int, *, train_bias: bool = True
) -> tuple[Tensor, Tensor]:
    """q_BMHE and kv_BN2HE."""
    width = x_BND.shape[-1]
    q_BMD = qkv(x_BND[:, :num_queries], slice(width), train_bias=train_bias)
    kv_BNF = qkv(x_BND, slice(width, None), train_bias=train_bias)
    return q_BMD.unflatten(-1, (heads, -1)), kv_BNF.unflatten(-1, (2, heads, -1))


def _softmax_attention(q_BHME: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
    if q_BHME.device.type == "cpu" and q_BHME.dtype == torch.bfloat16:
        # the backward of torch's attention on a CPU takes eight times as long in bfloat16 as in float32
        with torch.autocast("cpu", enabled=False):
            return _softmax_attention(q_BHME.float(), k_BHNE.float(), v_BHNE.float()).bfloat16()
    return F.scaled_dot_product_attention(q_BHME, k_BHNE, v_BHNE).transpose(1, 2).flatten(2)


def attend_kernel(x_BND: Tensor, qkv: Linear, heads: int, num_queries: int | None, *, impl: str) -> Tensor:
    """``attend`` through kernels/attention.py, whose kernel gives the projection's bias its gradient as well.

    That would be another pass over the gradient of the projection's output.
    """
    from fastdeitlt.kernels.attention import attention, attention_first, choose

    dtype = torch.get_autocast_dtype(x_BND.device.type) if torch.is_autocast_enabled(x_BND.device.type) else x_BND.dtype
    kernel = choose(impl, x_BND.shape[1], x_BND.shape[-1] // heads, dtype, x_BND.device) == "triton"
    # the bias is read after the projection has run: ZeRO's stage 3 takes its weights away when it has
    if num_queries is None:
        qkv_BN3HE = _packed(x_BND, qkv, heads, train_bias=not kernel)
        return attention(qkv_BN3HE, qkv_bias=qkv.bias if kernel else None, impl=impl)
    q_BMHE, kv_BN2HE = _apart(x_BND, qkv, heads, num_queries, train_bias=not kernel)
    return attention_first(q_BMHE, kv_BN2HE, qkv_bias=qkv.bias if kernel else None, impl=impl)


def attention_function(name: str) -> Attention:
    """The function of an implementation (kernels/attention.py); "auto" on a machine without a GPU is "sdpa"."""
    if name == "sdpa" or (name == "auto" and not torch.cuda.is_available()):
        return attend
    from fastdeitlt.kernels.attention import IMPLS

    if name not in IMPLS:
        raise UserError(f"student attention {name!r}: unknown, expected one of {', '.join(IMPLS)}{near(name, IMPLS)}")
    return partial(attend_kernel, impl=name)


# the hidden layer of (x_BND, its linear map)
Hidden = Callable[[Tensor, nn.Linear], Tensor]


def linear_gelu(x_BND: Tensor, linear: nn.Linear) -> Tensor:
    """Linear map with bias, then exact GELU."""
    return F.gelu(linear(x_BND))


def linear_gelu_kernel(x_BND: Tensor, linear: nn.Linear) -> Tensor:
    """``linear_gelu`` with bias and GELU in one pass (kernels/bias_gelu.py), whose backward sums the bias gradient."""
    from fastdeitlt.kernels.bias_gelu import bias_gelu

    return bias_gelu(F.linear(x_BND, linear.weight), linear.bias, impl="triton")


def linear_gelu_auto(x_BND: Tensor, linear: nn.Linear) -> Tensor:
    """``linear_gelu`` by what was measured fastest where x is: a student that is on the CPU of a tuned GPU has torch's.

    An export of it would otherwise hold our kernels.
    """
    from fastdeitlt.kernels.bias_gelu import choose

    kernel = choose("auto", linear.out_features, x_BND.device) == "triton"
    return linear_gelu_kernel(x_BND, linear) if kernel else linear_gelu(x_BND, linear)


def hidden_function(name: str) -> Hidden:
    """The function of an implementation of the MLP's hidden layer; names as ``residual.add_norm_function``."""
    auto = linear_gelu_auto if torch.cuda.is_available() else linear_gelu
    known = {"auto": auto, "torch": linear_gelu, "triton": linear_gelu_kernel}
    if name not in known:
        raise UserError(
            f"student bias_gelu {name!r}: unknown, expected one of {', '.join(known)}{near(name, list(known))}"
        )
    return known[name]


class PatchProjection(nn.Conv2d):
    """Non-overlapping patches through one linear map: a convolution whose stride is its kernel.

    Trained as a matrix product, which is faster and whose gradients repeat bit for bit, as cuDNN's of a convolution
    need not; evaluated as timm does it, so that logits are equal bit for bit.
    """

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Patches row by row, [B, N, D]."""
        if not self.training:
            return super().forward(images_BCHW).flatten(2).transpose(1, 2)
        patch = self.kernel_size[0]
        patches_BCIPJQ = images_BCHW.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        patches_BNE = patches_BCIPJQ.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches_BNE, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Images to tokens."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(3, width, kernel_size=patch, stride=patch)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        tokens_BND: Tensor = self.proj(images_BCHW)
        return tokens_BND


class SelfAttention(nn.Module):
    """Multi-head self-attention up to the heads' outputs; ``proj`` is applied where the branch joins the stream."""

    def __init__(self, width: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.attend = attention

    def forward(self, x_BND: Tensor, num_queries: int | None = None) -> Tensor:
        """Attention of all tokens, or of the first ``num_queries`` to all tokens."""
        return self.attend(x_BND, self.qkv, self.heads, num_queries)


class Mlp(nn.Module):
    """Linear map and exact GELU; the second map, ``fc2``, is applied where the branch joins the stream."""

    def __init__(self, width: int, hidden: Hidden) -> None:
        super().__init__()
        self.fc1 = Linear(width, MLP_RATIO * width)
        self.fc2 = Linear(MLP_RATIO * width, width)
        self.hidden = hidden

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.hidden(x_BND, self.fc1)
