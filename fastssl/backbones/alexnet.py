"""AlexNet with batch norm as RotNet has it for ImageNet (Gidaris et al. 2018, section 4.2).

The layers of torchvision's AlexNet (Krizhevsky 2014, arXiv:1404.5997) with batch norm behind each
and without dropout (architectures/AlexNet.py of gidariss/FeatureLearningRotNet). Its convolutions
have biases there, which batch norm takes away again: here nothing has.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastssl.pixels import MEAN, STD, Pixels
from fastssl.recompute import checkpointed

CHANNELS = (64, 192, 384, 256, 256)  # of conv1 ... conv5; max pools behind 1, 2 and 5
HIDDEN = 4096
LEAST = {"standard": 63, "small": 15}  # pixels a side, of which the last pool makes one
_ENDS = (3, 7, 11, 14, 17)  # of conv1 ... conv5 in `features`, each with the pool before it


@dataclass(frozen=True, kw_only=True)
class Options:
    """What it is made for.

    Attributes:
        image_size: pixels a side of the images, of the patches in patch tasks: the first hidden
            layer covers the whole map, and its size with it.
        representation: length of the features, by one more linear layer; null: 4096 as they are.
        stem: standard begins with an 11x11 convolution of stride 4; small with a 3x3 one of
            stride 1, for images of 32 to 64 pixels.
        activation_checkpointing: compute the activations of each depth again in the backward pass,
            in place of keeping them: less memory, a third more work.
    """

    image_size: int = 224
    representation: int | None = None
    stem: Literal["standard", "small"] = "standard"
    activation_checkpointing: bool = False

    def __post_init__(self):
        least = LEAST[self.stem]
        if self.image_size < least:
            other = "; stem: small takes 15" if self.stem == "standard" else ""
            raise ValueError(
                f"image_size ({self.image_size}) must be at least {least} for the strides of the "
                f"{self.stem} stem and the max pools that follow{other}"
            )
        if self.representation is not None and self.representation < 1:
            raise ValueError(f"representation ({self.representation}) must be at least 1, or null")


def backbone(options: Options) -> "Backbone":
    """The network without its classifier, weights drawn as torch and both codes draw them."""
    return Backbone(options)


class Backbone(nn.Module):
    """Images of one size to features [B, 4096]."""

    def __init__(self, options: Options):
        super().__init__()
        size, standard = options.image_size, options.stem == "standard"
        self.activation_checkpointing = options.activation_checkpointing
        self.image_size: int | None = size
        remedy = "backbone.stem=small takes 15" if standard else ""
        least = LEAST[options.stem]
        self.pixels = Pixels(MEAN, STD, least=least, remedy=remedy, only=size, of="an AlexNet")
        self.normalization = (MEAN, STD)
        one, two, three, four, five = CHANNELS
        first = (11, 4, 2) if standard else (3, 1, 1)
        self.features = nn.Sequential(
            *_convolution(3, one, *first), nn.MaxPool2d(3, stride=2),
            *_convolution(one, two, 5, 1, 2), nn.MaxPool2d(3, stride=2),
            *_convolution(two, three, 3, 1, 1),
            *_convolution(three, four, 3, 1, 1),
            *_convolution(four, five, 3, 1, 1), nn.MaxPool2d(3, stride=2),
        )  # fmt: skip
        side = (size - 7) // 4 + 1 if standard else size
        for _ in range(3):
            side = (side - 3) // 2 + 1
        self.fc6 = _hidden(five * side**2)
        self.fc7 = _hidden(HIDDEN)
        self.dim = HIDDEN
        self.representation: nn.Linear | None = None
        if options.representation is not None:
            self.representation = nn.Linear(self.dim, options.representation)
            self.dim = options.representation

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, dim] of `x` [B, 3, H, W]: uint8 in 0 ... 255, or normalised floats.

        Raises:
            ValueError: the images are not of `image_size`.
        """
        return list(self.stages(x).values())[-1]

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The output of every depth for `x` as forward takes it, first to last.

        conv1 ... conv5: [B, C, H, W] after the ReLU and before a max pool, where RotNet probe them;
        fc6, fc7: [B, 4096] after the ReLU; representation, if there is one: [B, dim]. The last is
        what forward returns.
        """
        x = self.pixels(x)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        stages: dict[str, Tensor] = {}
        start = 0
        for number, end in enumerate(_ENDS, 1):
            # Cut out here, not kept: what replaces modules (SyncBatchNorm) looks in `features`.
            block = self.features[start:end]
            x = checkpointed(block, x) if recompute else block(x)
            stages[f"conv{number}"] = x
            start = end
        x = self.features[start](x).flatten(1)
        stages["fc6"] = self.fc6(x)
        stages["fc7"] = self.fc7(stages["fc6"])
        if self.representation is not None:
            stages["representation"] = self.representation(stages["fc7"])
        return stages


def _convolution(
    before: int, here: int, kernel: int, stride: int, padding: int
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    return (
        nn.Conv2d(before, here, kernel, stride=stride, padding=padding, bias=False),
        nn.BatchNorm2d(here),
        nn.ReLU(inplace=True),
    )


def _hidden(before: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(before, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU(inplace=True)
    )
