"""ResNet-(6n+2) for 32-pixel images, option A: teacher of the CIFAR recipes.

Source: He et al. 2016 (arXiv 1512.03385) section 4.2; parameter names and initialisation of the LDAM-DRW and PaCo code.
"""
# B batch, C channels, H height, W width, F features, K classes

import torch.nn.functional as F
from torch import Tensor, nn

from fastdeitlt.models.classifier import Classifier


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; a change of width pads the shortcut with zero channels (option A: no parameters)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == channels else 2
        self.pad = (channels - in_channels) // 2
        self.conv1 = nn.Conv2d(in_channels, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x_BCHW)))))
        if self.stride == 2:
            x_BCHW = F.pad(x_BCHW[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out_BCHW + x_BCHW)


class ResNetCifar(nn.Module):
    """Network of three stages of 16, 32 and 64 channels, with timm's ``forward_features`` and ``forward_head``.

    Args:
        depth: 6n + 2 layers.
    """

    num_features = 64

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.linear = Classifier(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(in_channels, channels), *(BasicBlock(channels, channels) for _ in range(blocks - 1))
        )

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """Return the feature maps before pooling, [B, 64, H/4, W/4]."""
        x_BCHW = F.relu(self.bn1(self.conv1(images_BCHW)))
        return self.layer3(self.layer2(self.layer1(x_BCHW)))

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [B, K], or with ``pre_logits`` the pooled features [B, 64]."""
        features_BF = x_BCHW.mean((2, 3))
        return features_BF if pre_logits else self.linear(features_BF)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images_BCHW))
