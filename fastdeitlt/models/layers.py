"""Layers of the student under timm's parameter names, in torch operations or through a kernel."""
# B batch, C channels, H W height and width of images_BCHW, N tokens, M of them, D width;
# after the qkv projection: H heads, E width of a head (D = H E)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeitlt.kernels._pick import pick, pick_attention
from fastdeitlt.models.fp8 import linear as linear_fp8

MLP_RATIO = 4


class Linear(nn.Linear):
    """Linear map with optional output rows only, or without a gradient of the bias.

    A CPU's float32 product with bias first writes the bias to all of its output. When compiled there, the bias is added
    separately, so that it fuses with the product's reader; for GPUs the compiler does this itself.
    """

    fp8 = False
    """Whether products are computed in float8 in training."""

    def product(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Apply the map without its bias."""
        weight = self.weight[rows]
        return linear_fp8(x, weight) if self.fp8 and self.training else F.linear(x, weight)

    def forward(self, x: Tensor, rows: slice = slice(None), *, train_bias: bool = True) -> Tensor:
        bias = (self.bias if train_bias else self.bias.detach())[rows]
        by_reader = x.device.type == "cpu" and torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
        if by_reader or (self.fp8 and self.training):
            product = self.product(x, rows)
            return product + bias.to(product.dtype)
        return F.linear(x, self.weight[rows], bias)


def attend(x_BND: Tensor, qkv: Linear, heads: int, num_queries: int | None, impl: str = "sdpa") -> Tensor:
    """Compute softmax attention of every token to every token.

    With ``num_queries`` only the first tokens are queries.

    Args:
        impl: see ``kernels._pick``. The kernel also computes the gradient of the projection's bias, otherwise another
            pass over the gradient of the projection's output.

    Returns:
        [B, N, D] or [B, M, D], heads side by side.
    """
    device = x_BND.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x_BND.dtype
    impl = pick_attention(impl, x_BND.shape[1], x_BND.shape[-1] // heads, dtype, device)
    kernel = impl == "triton"
    if num_queries is None:
        qkv_BN3HE = qkv(x_BND, train_bias=not kernel).unflatten(-1, (3, heads, -1))
    else:
        width = x_BND.shape[-1]
        q_BMHE = qkv(x_BND[:, :num_queries], slice(width), train_bias=not kernel).unflatten(-1, (heads, -1))
        kv_BN2HE = qkv(x_BND, slice(width, None), train_bias=not kernel).unflatten(-1, (2, heads, -1))
    if impl == "sdpa":
        if num_queries is None:
            return _softmax_attention(*qkv_BN3HE.permute(2, 0, 3, 1, 4).unbind(0))
        return _softmax_attention(q_BMHE.transpose(1, 2), *kv_BN2HE.permute(2, 0, 3, 1, 4))
    from fastdeitlt.kernels.attention import attention, attention_first  # Triton is slow to import

    bias = qkv.bias if kernel else None
    if num_queries is None:
        return attention(qkv_BN3HE, qkv_bias=bias, impl=impl)
    return attention_first(q_BMHE, kv_BN2HE, qkv_bias=bias, impl=impl)


def _softmax_attention(q_BHME: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
    if q_BHME.device.type == "cpu" and q_BHME.dtype == torch.bfloat16:
        # the backward of torch's attention on a CPU takes eight times as long in bfloat16 as in float32
        with torch.autocast("cpu", enabled=False):
            return _softmax_attention(q_BHME.float(), k_BHNE.float(), v_BHNE.float()).bfloat16()
    return F.scaled_dot_product_attention(q_BHME, k_BHNE, v_BHNE).transpose(1, 2).flatten(2)


def linear_gelu(x_BND: Tensor, linear: Linear, impl: str = "torch") -> Tensor:
    """Apply a linear map, bias and exact GELU; the kernel fuses the last two."""
    if pick("bias_gelu", impl, (linear.out_features,), x_BND.device) == "torch":
        return F.gelu(linear(x_BND))
    from fastdeitlt.kernels.bias_gelu import bias_gelu

    return bias_gelu(linear.product(x_BND), linear.bias, impl="triton")


class PatchProjection(nn.Conv2d):
    """Linear map of non-overlapping patches: a convolution whose stride is its kernel size.

    In training it is a matrix product, faster and with gradients that are equal bit for bit between runs, unlike
    cuDNN's; in eval mode a convolution as in timm, so that logits are equal bit for bit.
    """

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Project patches row by row, [B, N, D]."""
        if not self.training:
            return super().forward(images_BCHW).flatten(2).transpose(1, 2)
        patch = self.kernel_size[0]
        patches_BCIPJQ = images_BCHW.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        patches_BNE = patches_BCIPJQ.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches_BNE, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Embedding of images as patch tokens."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(3, width, kernel_size=patch, stride=patch)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        tokens_BND: Tensor = self.proj(images_BCHW)
        return tokens_BND


class SelfAttention(nn.Module):
    """Multi-head self-attention up to the heads' outputs; ``proj`` is applied in ``add_norm``."""

    def __init__(self, width: int, heads: int, impl: str) -> None:
        super().__init__()
        self.heads, self.impl = heads, impl
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_BND: Tensor, num_queries: int | None = None) -> Tensor:
        """Compute attention of all tokens, or of the first ``num_queries``, to all."""
        return attend(x_BND, self.qkv, self.heads, num_queries, self.impl)


class Mlp(nn.Module):
    """Linear map and exact GELU; the second map, ``fc2``, is applied in ``add_norm``."""

    def __init__(self, width: int, impl: str) -> None:
        super().__init__()
        self.impl = impl
        self.fc1 = Linear(width, MLP_RATIO * width)
        self.fc2 = Linear(MLP_RATIO * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return linear_gelu(x_BND, self.fc1, self.impl)
