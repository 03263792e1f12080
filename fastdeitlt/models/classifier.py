"""Classifiers with float32 logits.

In bfloat16 the two best logits can be equal: for 3.5 % of random features with 1,000 random classes, and for 0.4 % of a
quick-start teacher's decisions on mixed images. The decision is then the lower label: in most long-tailed sets the more
frequent class.
"""
# B batch, F features, K classes

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


class Classifier(nn.Linear):
    """Linear classifier; in eval mode, in float32 also under autocast."""

    def forward(self, features_BF: Tensor) -> Tensor:
        return super().forward(features_BF) if self.training else linear_float32(features_BF, self.weight, self.bias)


class ConvClassifier(nn.Conv2d):
    """Classifier of pooled features by a 1x1 convolution; in eval mode, in float32 also under autocast."""

    def forward(self, features_BF11: Tensor) -> Tensor:
        if self.training:
            return super().forward(features_BF11)
        return linear_float32(features_BF11.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


class NormedLinear(nn.Module):
    """Cosine classifier: unit features times unit class vectors; logits in [-1, 1], float32 also under autocast.

    Source: LDAM (arXiv 1906.07413), whose code stores the weight as [F, K].
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.empty(in_features, num_classes).uniform_(-1, 1), dim=0))

    def forward(self, features_BF: Tensor) -> Tensor:
        return linear_float32(F.normalize(features_BF, dim=1), F.normalize(self.weight, dim=0).T)


@fx.wrap  # one node for torch.fx, which cannot trace a context
def linear_float32(features_BF: Tensor, weight_KF: Tensor, bias_K: Tensor | None = None) -> Tensor:
    """Return logits_BK computed outside autocast."""
    device = features_BF.device.type
    if not torch.is_autocast_enabled(device):  # no context in an exported graph
        return F.linear(features_BF, weight_KF, bias_K)
    with torch.autocast(device, enabled=False):
        return F.linear(features_BF.float(), weight_KF.float(), None if bias_K is None else bias_K.float())


def with_classifier(layer: nn.Linear | nn.Conv2d) -> Classifier | ConvClassifier:
    """Return a classifier with the parameters of a linear layer or a 1x1 convolution."""
    classifier: Classifier | ConvClassifier
    if isinstance(layer, nn.Linear):
        sizes = layer.in_features, layer.out_features
        classifier = nn.utils.skip_init(Classifier, *sizes, bias=layer.bias is not None)
    else:
        sizes = layer.in_channels, layer.out_channels
        classifier = nn.utils.skip_init(ConvClassifier, *sizes, 1, bias=layer.bias is not None)
    classifier.weight, classifier.bias = layer.weight, layer.bias
    return classifier
