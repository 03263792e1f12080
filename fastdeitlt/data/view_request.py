"""Request for crops that are augmented and mixed in the thread that cuts them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdeitlt.data import mixup
from fastdeitlt.data.augment import colour
from fastdeitlt.data.augment.colour import View, ViewDraws
from fastdeitlt.data.mixup import MixDraw
from fastdeitlt.data.pixels.request import CropRequest
from fastdeitlt.data.pixels.side_stream import aside


@dataclass(frozen=True, kw_only=True)
class ViewRequest(CropRequest):
    """Request for a view of a batch; finished crops are normalised, mixed images."""

    view: View
    view_draws: ViewDraws
    mix: MixDraw = field(default_factory=MixDraw)
    side: torch.cuda.Stream | None
    """Stream of the augmentation on a GPU."""

    def finish(self, crops_BHWC: Tensor) -> Tensor:
        """Augment and mix the crops."""
        with aside(self.side) as outputs:  # on the step's stream, copying draws to the device would wait for the step
            outputs.append(mixup.apply(colour.apply(crops_BHWC, self.view_draws, self.view), self.mix))
        return outputs[0]
