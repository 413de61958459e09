"""VGG19 with batch norm as Kolesnikov et al. 2019 have it (K19, arXiv:1901.09005, section 3.1).

The convolutions of Simonyan & Zisserman 2015, then two hidden layers of 512 k with batch norm and
ReLU behind each and no dropout (google/revisiting-self-supervised, models/vggnet.py). Nothing has a
bias that batch norm would take away again. Patch tasks have the same strides as all others.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from fastssl.pixels import MEAN, STD, Pixels
from fastssl.recompute import checkpointed

CONVOLUTIONS = (2, 2, 4, 4, 4)  # of each block; each ends in a max pool
CHANNELS = (8, 16, 32, 64, 64)  # of each block, times k
HIDDEN = 512  # times k
LEAST = {"standard": 32, "small": 8}  # pixels a side: five pools halve them, or three


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which network.

    Attributes:
        widening: K19's k: blocks have 8k, 16k, 32k, 64k and 64k channels; 8 is the usual VGG19.
        image_size: pixels a side of the images, of the patches in patch tasks: the first hidden
            layer covers the whole map, and its size with it. K19: 224, and 64 for patches.
        representation: length of the features, by one more linear layer; null: 512 k as they are.
        stem: standard divides height and width by 32 in all; small leaves out the first two max
            pools, for images of 32 to 64 pixels.
        activation_checkpointing: compute a block's activations again in the backward pass, in place
            of keeping them: less memory, a third more work.
    """

    widening: int = 8
    image_size: int = 224
    representation: int | None = None
    stem: Literal["standard", "small"] = "standard"
    activation_checkpointing: bool = False

    def __post_init__(self):
        if self.widening < 1:
            raise ValueError(
                f"widening ({self.widening}) must be at least 1; K19's are 4, 8, 12 and 16"
            )
        least = LEAST[self.stem]
        if self.image_size < least:
            other = "; stem: small takes 8" if self.stem == "standard" else ""
            raise ValueError(
                f"image_size ({self.image_size}) must be at least {least}: the max pools of the "
                f"{self.stem} stem and all that follow divide it by that{other}"
            )
        if self.representation is not None and self.representation < 1:
            raise ValueError(f"representation ({self.representation}) must be at least 1, or null")


def backbone(options: Options) -> "Backbone":
    """The network without its classifier, weights drawn as torchvision draws convolutions'."""
    return Backbone(options)


class Backbone(nn.Module):
    """Images of one size to features [B, 512 k].

    state_dict() has torchvision's keys for the convolutions and their norms: `features.*`.
    """

    def __init__(self, options: Options):
        super().__init__()
        k, size = options.widening, options.image_size
        self.activation_checkpointing = options.activation_checkpointing
        self.image_size: int | None = size
        remedy = "backbone.stem=small takes 8" if options.stem == "standard" else ""
        least = LEAST[options.stem]
        self.pixels = Pixels(MEAN, STD, least=least, remedy=remedy, only=size, of="a VGG19")
        self.normalization = (MEAN, STD)
        self.features = _features(k, options.stem)
        side = size // LEAST[options.stem]  # a pool drops the odd row and column, as K19's
        self.fc6 = _hidden(CHANNELS[-1] * k * side**2, HIDDEN * k, side)
        self.fc7 = _hidden(HIDDEN * k, HIDDEN * k, 1)
        self.dim = HIDDEN * k
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

        conv1 ... conv5: [B, C, H, W] after a block's last ReLU, before its max pool, where K19
        probe them; fc6, fc7: [B, 512 k] after the ReLU; representation, if there is one: [B, dim].
        The last is what forward returns.
        """
        x = self.pixels(x)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        stages: dict[str, Tensor] = {}
        start = 0
        for number, convolutions in enumerate(CONVOLUTIONS, 1):
            # Cut out here, not kept: what replaces modules (SyncBatchNorm) looks in `features`.
            end = start + 3 * convolutions + (number > 1)  # the pool before it belongs to a block
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


def _features(k: int, stem: str) -> nn.Sequential:
    """Blocks of convolutions, norms and ReLUs, a max pool behind each."""
    layers: list[str | int] = []
    for convolutions, channels in zip(CONVOLUTIONS, CHANNELS, strict=True):
        layers += [*[channels * k] * convolutions, "M"]
    features = make_layers(layers, batch_norm=True)
    pools = [name for name, each in features.named_children() if isinstance(each, nn.MaxPool2d)]
    for name in pools[:2] if stem == "small" else ():
        features.set_submodule(name, nn.Identity())  # the others keep their keys
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = None
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return features


def _hidden(before: int, here: int, side: int) -> nn.Sequential:
    """A layer that sees the whole map of `side` x `side`, norm and ReLU.

    K19 write it as a convolution whose kernel is as large as the map; a product of matrices is the
    same and faster. Its weights are drawn as those of that convolution: of deviation 0.0032 at
    k = 8 and 7 x 7, where K19's Glorot has 0.0030 and torchvision's VGG 0.01.
    """
    linear = nn.Linear(before, here, bias=False)
    nn.init.normal_(linear.weight, std=math.sqrt(2 / (here * side**2)))
    return nn.Sequential(linear, nn.BatchNorm1d(here), nn.ReLU(inplace=True))
