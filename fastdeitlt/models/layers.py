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

# of all tokens from (qkv_BN3HE,); of the first M from (q_BMHE, kv_BN2HE)
Attention = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]


def attend(qkv_BN3HE: Tensor) -> Tensor:
    """Softmax attention of every token to every token, from the packed output of the qkv projection.

    Returns:
        [B, N, D], heads side by side.
    """
    q_BHNE, k_BHNE, v_BHNE = qkv_BN3HE.permute(2, 0, 3, 1, 4).unbind(0)
    return _softmax_attention(q_BHNE, k_BHNE, v_BHNE)


def attend_first(q_BMHE: Tensor, kv_BN2HE: Tensor) -> Tensor:
    """Softmax attention of the first M tokens to all N tokens. Returns [B, M, D]."""
    k_BHNE, v_BHNE = kv_BN2HE.permute(2, 0, 3, 1, 4).unbind(0)
    return _softmax_attention(q_BMHE.transpose(1, 2), k_BHNE, v_BHNE)


def _softmax_attention(q_BHME: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
    if q_BHME.device.type == "cpu" and q_BHME.dtype == torch.bfloat16:
        # the backward of torch's attention on a CPU takes eight times as long in bfloat16 as in float32
        with torch.autocast("cpu", enabled=False):
            return _softmax_attention(q_BHME.float(), k_BHNE.float(), v_BHNE.float()).bfloat16()
    return F.scaled_dot_product_attention(q_BHME, k_BHNE, v_BHNE).transpose(1, 2).flatten(2)


def attention_functions(name: str) -> Attention:
    """The two functions of an implementation (kernels/attention.py); "auto" on a machine without a GPU is "sdpa"."""
    if name == "sdpa" or (name == "auto" and not torch.cuda.is_available()):
        return attend, attend_first
    from fastdeitlt.kernels.attention import IMPLS, attention, attention_first

    if name not in IMPLS:
        raise UserError(f"student attention {name!r}: unknown, expected one of {', '.join(IMPLS)}{near(name, IMPLS)}")
    return partial(attention, impl=name), partial(attention_first, impl=name)


# the hidden layer of (x_BND, its linear map)
Hidden = Callable[[Tensor, nn.Linear], Tensor]


def linear_gelu(x_BND: Tensor, linear: nn.Linear) -> Tensor:
    """Linear map with bias, then exact GELU."""
    return F.gelu(linear(x_BND))


def linear_gelu_kernel(x_BND: Tensor, linear: nn.Linear) -> Tensor:
    """``linear_gelu`` with bias and GELU in one pass (kernels/bias_gelu.py), whose backward sums the bias gradient."""
    from fastdeitlt.kernels.bias_gelu import bias_gelu

    return bias_gelu(F.linear(x_BND, linear.weight), linear.bias, impl="triton")


def hidden_function(name: str, width: int) -> Hidden:
    """The function of an implementation of the MLP's hidden layer; names as ``residual.add_norm_function``."""
    if name == "auto" and torch.cuda.is_available():
        from fastdeitlt.kernels.bias_gelu import choose

        name = choose("auto", MLP_RATIO * width, torch.device("cuda", torch.cuda.current_device()))
    known = {"auto": linear_gelu, "torch": linear_gelu, "triton": linear_gelu_kernel}
    if name not in known:
        raise UserError(
            f"student bias_gelu {name!r}: unknown, expected one of {', '.join(known)}{near(name, list(known))}"
        )
    return known[name]


class Linear(nn.Linear):
    """A linear map, of which a call may ask for some of the output rows only.

    A CPU's float32 product with bias first writes the bias to all of its output. Compiled there, whatever reads the
    product adds the bias instead; for GPUs the compiler does so by itself.
    """

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        weight, bias = self.weight[rows], self.bias[rows]
        if x.device.type == "cpu" and torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight) + bias
        return F.linear(x, weight, bias)


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
        self.attend, self.attend_first = attention

    def forward(self, x_BND: Tensor, num_queries: int | None = None) -> Tensor:
        """Attention of all tokens, or of the first ``num_queries`` to all tokens."""
        if num_queries is None:
            return self.attend(self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)))
        width = x_BND.shape[-1]
        q_BMHE = self.qkv(x_BND[:, :num_queries], slice(width)).unflatten(-1, (self.heads, -1))
        kv_BN2HE = self.qkv(x_BND, slice(width, None)).unflatten(-1, (2, self.heads, -1))
        return self.attend_first(q_BMHE, kv_BN2HE)


class Mlp(nn.Module):
    """Linear map and exact GELU; the second map, ``fc2``, is applied where the branch joins the stream."""

    def __init__(self, width: int, hidden: Hidden) -> None:
        super().__init__()
        self.fc1 = Linear(width, MLP_RATIO * width)
        self.fc2 = Linear(MLP_RATIO * width, width)
        self.hidden = hidden

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.hidden(x_BND, self.fc1)
