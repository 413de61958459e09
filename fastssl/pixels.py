"""What a backbone does first: pixels are counted, and bytes become normalised floats."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue in 0 ... 1, which torchvision's
STD = (0.229, 0.224, 0.225)  # and most other published weights expect


class Pixels(nn.Module):
    """Images [B, 3, H, W] as the first layer takes them; adds nothing to a state dict."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        least: int = 1,
        remedy: str = "",
        only: int | None = None,
        of: str = "a backbone",
    ):
        """What to expect.

        Args:
            mean, std: of red, green and blue in 0 ... 1.
            least: pixels a side with which every stride still has two pixels to make one of.
            remedy: what takes smaller ones, for the message: "backbone.stem=small takes 5".
            only: pixels a side of networks whose hidden layers cover the whole map.
            of: such a network, for the message.
        """
        super().__init__()
        self.least, self.remedy, self.only, self.of = least, remedy, only, of
        scale = 1 / (255 * torch.tensor(std).reshape(1, 3, 1, 1))
        shift = -torch.tensor(mean).reshape(1, 3, 1, 1) * 255 * scale
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised float32 of uint8 in 0 ... 255; floats are normalised already.

        Raises:
            ValueError: the images are too small, or of another size than the only one.
        """
        height, width = x.shape[2:]
        if min(height, width) < self.least:
            remedy = f" ({self.remedy})" if self.remedy else ""
            raise ValueError(
                f"images of {height} x {width} pixels are too small for the strides of the "
                f"backbone, which need {self.least} pixels a side{remedy}"
            )
        if self.only is not None and (height, width) != (self.only, self.only):
            raise ValueError(
                f"images of {height} x {width} pixels for {self.of} that takes {self.only} x "
                f"{self.only} only, as its hidden layers cover the whole map: give as backbone."
                "image_size what the pipeline makes, or images of that size to trained weights"
            )
        if x.dtype == torch.uint8:
            # One pass, no float copy of the bytes; what is wider than bytes stays so in autocast.
            x = torch.addcmul(self.shift, x, self.scale)
        return x
