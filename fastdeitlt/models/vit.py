"""Student: a distilled Vision Transformer with a CLS and a DIST head, under timm's state-dict keys.

Source: DeiT (arXiv 2012.12877) section 4; DeiT-LT (arXiv 2404.02900); parameter names, initialisation and drop-path law
of timm's ``VisionTransformerDistilled``, so that either loads the other's checkpoints.
"""
# B batch, S of its samples, C channels, H W height and width of images_BCHW, N tokens (CLS, DIST, patches), M of them,
# D width, K classes

import re
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastdeitlt.config import near
from fastdeitlt.errors import UserError
from fastdeitlt.kernels._pick import check_impl
from fastdeitlt.models.classifier import Classifier
from fastdeitlt.models.layers import MLP_RATIO, Mlp, PatchEmbed, SelfAttention
from fastdeitlt.models.residual import DROP_PATH_LAWS, BranchSamples, DropPath, add_norm, draw_samples, select

NUM_PREFIX = 2  # CLS and DIST precede the patch tokens
# width, heads, depth
SIZES = {"tiny": (192, 3, 12), "small": (384, 6, 12), "base": (768, 12, 12), "large": (1024, 16, 24)}
PATCHES = (2, 4, 8, 16)
_NAME = re.compile(r"deit_(tiny|small|base|large)_distilled_patch(2|4|8|16)_([1-9]\d{0,3})")


class Block(nn.Module):
    """Pre-norm transformer block; each residual branch is dropped a sample with probability ``drop_path``.

    ``impls`` are the implementations of attention, add_layernorm and bias_gelu.
    """

    def __init__(self, width: int, heads: int, drop_path: float, impls: tuple[str, str, str]) -> None:
        super().__init__()
        attention, self.add_layernorm, bias_gelu = impls
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, heads, attention)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, bias_gelu)
        self.drop_path = drop_path

    def forward(
        self,
        x_BND: Tensor,
        normed_SND: Tensor,
        drop_path: tuple[BranchSamples | None, BranchSamples | None],
        next_norm: nn.LayerNorm,
        next_samples: BranchSamples | None,
        num_queries: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the stream after the block and its ``next_norm``.

        Each sum is fused with the norm after it, so a block ends with the next layer's norm.

        Args:
            x_BND: the stream.
            normed_SND: ``norm1`` of the attention's samples.
            drop_path: samples of the attention and of the MLP.
            next_norm, next_samples: norm and samples of the next layer.
            num_queries: number of leading tokens to compute: exact if no later layer reads the others.
        """
        attn_samples, mlp_samples = drop_path
        heads_SMD, proj, impl = self.attn(normed_SND, num_queries), self.attn.proj, self.add_layernorm
        x_BMD, normed_SMD = add_norm(
            x_BND[:, :num_queries], heads_SMD, proj, attn_samples, self.norm2, mlp_samples, impl
        )
        return add_norm(x_BMD, self.mlp(normed_SMD), self.mlp.fc2, mlp_samples, next_norm, next_samples, impl)


class Shape(NamedTuple):
    """Sizes of a student: images and patches in pixels, classes, width, attention heads, blocks."""

    img_size: int
    patch: int
    num_classes: int
    width: int
    heads: int
    depth: int


class DistilledViT(nn.Module):
    """Vision Transformer with two prefix tokens, each with a head. Build it with ``create_student``.

    Args:
        shape: sizes of the network.
        drop_path: drop probability of the last block; block i has linspace(0, drop_path, depth)[i].
        drop_path_law: "bernoulli" or "count", see ``draw_samples``.
        last_block_shortcut: in training, compute only the CLS and DIST rows in the last block (about 7 % less work).
        impls: implementations of attention, add_layernorm and bias_gelu, see ``kernels._pick``.
    """

    def __init__(
        self,
        shape: Shape,
        drop_path: float,
        drop_path_law: str,
        last_block_shortcut: bool,
        impls: tuple[str, str, str],
    ) -> None:
        super().__init__()
        img_size, patch, num_classes, width, heads, depth = shape
        self.img_size, self.patch, self.num_classes, self.width = img_size, patch, num_classes, width
        self.drop_path_law, self.last_block_shortcut = drop_path_law, last_block_shortcut
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.dist_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, NUM_PREFIX + (img_size // patch) ** 2, width))
        for op, impl in zip(("attention", "add_layernorm", "bias_gelu"), impls, strict=True):
            check_impl(op, impl)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(width, heads, rate, impls) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = Classifier(width, num_classes)
        self.head_dist = Classifier(width, num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.cls_token, std=1e-6)
        for parameter in (self.dist_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay, other than biases and norms."""
        return {"pos_embed", "cls_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of layers for layer-wise learning rates.

        Embeddings, each block, heads.
        """
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]  # the final norm belongs to the last block
        return {"stem": r"^cls_token|pos_embed|patch_embed|dist_token", "blocks": blocks}

    def _embed(self, images_BCHW: Tensor) -> Tensor:
        if images_BCHW.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"student: got images {tuple(images_BCHW.shape)}, expected sides of {self.img_size} pixels"
            )
        prefix_B2D = torch.cat((self.cls_token, self.dist_token), 1).expand(images_BCHW.shape[0], -1, -1)
        return torch.cat((prefix_B2D, self.patch_embed(images_BCHW)), 1) + self.pos_embed

    def draw_drop_path(self, batch: int) -> list[DropPath]:
        """Draw the drop path of every block for a batch."""
        x_B11, law = self.pos_embed.new_zeros(batch, 1, 1), self.drop_path_law
        rates = [block.drop_path if self.training else 0.0 for block in cast(list[Block], list(self.blocks))]
        return [(draw_samples(x_B11, rate, law), draw_samples(x_B11, rate, law)) for rate in rates]

    def _run(self, images_BCHW: Tensor, num_queries: int | None, drop_paths: list[DropPath] | None = None) -> Tensor:
        """Return tokens after the final norm, [B, N, D].

        With ``num_queries`` the last block computes only the first tokens.
        """
        x_BND, blocks = self._embed(images_BCHW), cast(list[Block], list(self.blocks))
        drop_paths = drop_paths or self.draw_drop_path(x_BND.shape[0])  # len would fix the batch of an exported graph
        nexts = [(block.norm1, attn) for block, (attn, _) in zip(blocks, drop_paths, strict=True)] + [(self.norm, None)]
        normed_SND = blocks[0].norm1(select(x_BND, drop_paths[0][0]))
        for i, block in enumerate(blocks):
            queries = num_queries if i == len(blocks) - 1 else None
            x_BND, normed_SND = block(x_BND, normed_SND, drop_paths[i], *nexts[i + 1], queries)
        return normed_SND

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """Return all tokens after the final norm, [B, N, D].

        CLS, DIST, then patches row by row.
        """
        return self._run(images_BCHW, None)

    def forward_prefix(self, images_BCHW: Tensor, drop_paths: list[DropPath] | None = None) -> Tensor:
        """Return CLS and DIST after the final norm, [B, 2, D]."""
        # in eval mode the whole block, in timm's order of sums: equal bit for bit
        num_queries = NUM_PREFIX if self.last_block_shortcut and self.training else None
        return self._run(images_BCHW, num_queries, drop_paths)[:, :NUM_PREFIX]

    def forward_heads(self, images_BCHW: Tensor, drop_paths: list[DropPath] | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of the CLS and DIST head, [B, K] each.

        In train and eval mode.
        """
        x_B2D = self.forward_prefix(images_BCHW, drop_paths)
        return self.head(x_B2D[:, 0]), self.head_dist(x_B2D[:, 1])

    def forward(self, images_BCHW: Tensor, drop_paths: list[DropPath] | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return (cls_logits_BK, dist_logits_BK) in train mode, else their mean.

        ``drop_paths`` is the drop path of train mode.
        """
        cls_logits_BK, dist_logits_BK = self.forward_heads(images_BCHW, drop_paths)
        if self.training:
            return cls_logits_BK, dist_logits_BK
        return (cls_logits_BK + dist_logits_BK) / 2


def create_student(
    name: str,
    num_classes: int,
    img_size: int | None = None,
    drop_path: float = 0.1,
    depth: int | None = None,
    attention: str = "auto",
    *,
    add_layernorm: str = "auto",
    bias_gelu: str = "auto",
    drop_path_law: str = "bernoulli",
    last_block_shortcut: bool = True,
) -> DistilledViT:
    """Create a student with new weights.

    Args:
        name: deit_{tiny,small,base,large}_distilled_patch{2,4,8,16}_<size>.
        img_size: height and width of the images in pixels. 0 or None = the size in the name.
        drop_path: stochastic depth of the last block.
        depth: number of blocks. 0 or None = 12 (large: 24).
        attention, add_layernorm, bias_gelu: implementations, see ``kernels._pick``.
        drop_path_law: bernoulli or count; see ``draw_samples``.

    Raises:
        UserError: an unknown name, an image size that the patch does not divide, a value out of range.
    """
    match = _NAME.fullmatch(name)
    if not match:
        names = [
            f"deit_{size}_distilled_patch{patch}_{side}"
            for size in SIZES
            for patch in PATCHES
            for side in (32, 224, 384)
        ]
        raise UserError(
            f"student {name!r}: unknown name, expected deit_{{{','.join(SIZES)}}}_distilled_patch{{2,4,8,16}}_<size>"
            f"{near(name, names)}"
        )
    width, heads, blocks = SIZES[match[1]]
    patch, side = int(match[2]), img_size or int(match[3])
    if side < patch or side % patch:
        raise UserError(
            f"student {name}: image size {side} does not divide into patches of {patch}. Use "
            f"{max(round(side / patch), 1) * patch}."
        )
    if num_classes < 1:
        raise UserError(f"student {name}: got {num_classes} classes, expected at least 1")
    if not 0 <= drop_path < 1:
        raise UserError(f"student {name}: got drop_path {drop_path}, expected 0 <= drop_path < 1")
    if drop_path_law not in DROP_PATH_LAWS:
        raise UserError(
            f"student {name}: got drop_path_law {drop_path_law!r}, expected one of {', '.join(DROP_PATH_LAWS)}"
        )
    if depth and depth < 0:
        raise UserError(f"student {name}: got depth {depth}, expected at least 1 block (0 = {blocks})")
    shape = Shape(side, patch, num_classes, width, heads, depth or blocks)
    return DistilledViT(shape, drop_path, drop_path_law, last_block_shortcut, (attention, add_layernorm, bias_gelu))


def num_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def flops_per_image(model: DistilledViT) -> float:
    """Return the FLOPs of one image's forward pass.

    Matrix products only, 2 per multiply-add; training is three times. The last-block shortcut is not subtracted, so
    that MFU compares across programs.
    """
    width, tokens = model.width, model.pos_embed.shape[1]
    patches = 2 * (tokens - NUM_PREFIX) * 3 * model.patch**2 * width
    row = 2 * (2 + 2 * MLP_RATIO) * width**2 + 4 * tokens * width  # query, proj, MLP and the attention of one token
    keys_values = 2 * 2 * width**2
    return float(patches + len(model.blocks) * tokens * (row + keys_values) + 4 * width * model.num_classes)
