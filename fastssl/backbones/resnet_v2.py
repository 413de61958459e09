"""ResNet-50 v2, pre-activation (He et al. 2016, arXiv:1603.05027), as K19 widens and changes it.

K19 is Kolesnikov, Zhai and Beyer 2019 (arXiv:1901.09005); its code (models/resnet.py)
puts the stride on the 3x3 convolution. With k = 4 this is timm's resnetv2_50, whose keys the
weights have; ours has what that lacks: RN50 v2(-), patch mode and the small stem, without timm.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import network_keys
from fastssl.pixels import MEAN, STD, Pixels
from fastssl.recompute import checkpointed

BLOCKS = (3, 4, 6, 3)  # of each stage


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which network.

    Attributes:
        widening: K19's k: the stem has 16k channels, the stages 64k, 128k, 256k and 512k; 4 is
            the usual ResNet-50.
        last_relu: end with ReLU before the pooling; false is K19's RN50 v2(-).
        stem: standard divides height and width by 4 (7x7 convolution of stride 2, max pool);
            small keeps them (3x3, stride 1, no pool), for images of 32 to 64 pixels.
        patch_mode: a first stride of 1, and 2, 2, 1 in place of 2, 2, 2 between the stages, as
            K19's code has it for jigsaw and relative patch location.
        representation: length of a vector that one more linear layer makes of the pooled features
            (K19 tells the effects of width and length apart by it); null: none.
        activation_checkpointing: keep the input of each block only, and compute it a second time
            in the backward pass: less memory, more time, the same gradients.
    """

    widening: int = 4
    last_relu: bool = True
    stem: Literal["standard", "small"] = "standard"
    patch_mode: bool = False
    representation: int | None = None
    activation_checkpointing: bool = False

    def __post_init__(self):
        if self.widening < 1:
            raise ValueError(
                f"widening ({self.widening}) must be at least 1; K19's are 4, 8, 12 and 16"
            )
        if self.patch_mode and self.stem == "small":
            raise ValueError(
                "patch_mode (true) changes the strides of the standard stem: give stem=standard, "
                "or patch_mode=false"
            )
        if self.representation is not None and self.representation < 1:
            raise ValueError(
                f"representation ({self.representation}) must be at least 1, or null for none"
            )


def backbone(options: Options) -> "Backbone":
    """The network without its classifier, weights drawn as torchvision draws a ResNet's."""
    return Backbone(options)


class Backbone(nn.Module):
    """Images to features [B, dim].

    state_dict() has the keys of timm's resnetv2_50 less `head.*`, so that weights travel both
    ways, and `representation.*` where there is one.
    """

    def __init__(self, options: Options):
        """Stem, four stages, the last norm."""
        super().__init__()
        # Strides of 2 make one pixel of the last two: 2 ** (their number - 1) + 1, as they round
        # up. The standard stem has 5 of them, the small one 3, and patch mode 3.
        least = 17 if options.stem == "standard" and not options.patch_mode else 5
        remedy = "backbone.stem=small takes 5, and so does backbone.patch_mode=true"
        remedy = remedy if least == 17 else ""
        self.pixels = Pixels(MEAN, STD, least=least, remedy=remedy)
        self.network = _Network(options)
        network_keys.as_of_network(self)
        self.dim = options.representation or 512 * options.widening
        self.normalization = (MEAN, STD)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, dim] of `x` [B, 3, H, W]: uint8 in 0 ... 255, or normalised floats.

        Raises:
            ValueError: the images are too small.
        """
        return [*self.stages(x).values()][-1]

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The output of every depth for `x` as forward takes it, first to last.

        stem, layer1, ..., layer4: [B, C, H, W], the stem's after its max pool, and each layer's
        the sum that its last block ends with, before norm and ReLU, as K19's code and timm take
        it; pool: [B, 512 k], of layer4 after the last norm (and ReLU); representation: [B, dim],
        where there is one.
        """
        network, x = self.network, self.pixels(x)
        stages = {"stem": network.stem(x)}
        x = stages["stem"]
        for number, stage in enumerate(network.stages, 1):
            x = stages[f"layer{number}"] = stage(x)
        x = network.norm(x)
        stages["pool"] = (F.relu(x, inplace=True) if network.last_relu else x).mean((2, 3))
        if network.representation is not None:
            stages["representation"] = network.representation(stages["pool"])
        return stages


class _Network(nn.Module):
    """What has weights: one module, as timm's name for its stages is that of our method."""

    def __init__(self, options: Options):
        super().__init__()
        channels = 16 * options.widening
        # K19's code pads the max pool by zeros, torch and timm by minus infinity, which is not the
        # same here, where no ReLU comes before it: the border of its output differs. Ours: torch.
        if options.stem == "small":
            layers = [("conv", nn.Conv2d(3, channels, 3, padding=1, bias=False))]
        else:
            stride = 1 if options.patch_mode else 2
            conv = nn.Conv2d(3, channels, 7, stride=stride, padding=3, bias=False)
            layers = [("conv", conv), ("pool", nn.MaxPool2d(3, stride=2, padding=1))]
        self.stem = nn.Sequential(OrderedDict(layers))
        strides = (1, 2, 2, 1) if options.patch_mode else (1, 2, 2, 2)
        self.stages = nn.ModuleList()
        before = channels
        for number, (blocks, stride) in enumerate(zip(BLOCKS, strides, strict=True)):
            here = 64 * options.widening * 2**number
            recompute = options.activation_checkpointing
            self.stages.append(_Stage(before, here, stride, blocks, recompute=recompute))
            before = here
        self.norm = nn.BatchNorm2d(before)
        self.last_relu = options.last_relu
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.representation = None
        if options.representation is not None:
            self.representation = nn.Linear(before, options.representation)


class _Stage(nn.Module):
    """Blocks, the first of which changes channels and height and width."""

    def __init__(self, before: int, channels: int, stride: int, blocks: int, *, recompute: bool):
        super().__init__()
        self.recompute = recompute
        first = _Block(before, channels, stride, project=True)
        others = (_Block(channels, channels, 1, project=False) for _ in range(blocks - 1))
        self.blocks = nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpointed(block, x)
            else:
                x = block(x)
        return x


class _Block(nn.Module):
    """Norm, ReLU and convolution three times, added to what came in."""

    def __init__(self, before: int, channels: int, stride: int, *, project: bool):
        super().__init__()
        inner = channels // 4
        # where channels or stride change; behind the first norm and ReLU, with no norm of its own
        self.downsample = None
        if project:
            conv = nn.Conv2d(before, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(OrderedDict(conv=conv))
        self.norm1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(active)
        x = self.conv1(active)
        x = self.conv2(F.relu(self.norm2(x), inplace=True))
        x = self.conv3(F.relu(self.norm3(x), inplace=True))
        return x + shortcut
