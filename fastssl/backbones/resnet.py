"""The ResNets of torchvision by name (He et al. 2016; ResNeXt: Xie 2017; wide: Zagoruyko 2016).

At any width, as Kolesnikov et al. 2019 (K19, arXiv:1901.09005) widen them: their ResNet50 v1 of
k = 4 is torchvision's resnet50. And resnet10, one basic block a stage, for small images on small
machines.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet, get_model, list_models
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastssl.pixels import MEAN, STD, Pixels
from fastssl.recompute import checkpointed

TORCHVISION = tuple(
    list_models(torchvision.models, include=("resnet*", "resnext*", "wide_resnet*"))
)
BASIC = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}  # blocks
NAMES = ("resnet10", *TORCHVISION)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which network.

    Attributes:
        name: resnet10, or torchvision's: resnet18, 34, 50, 101, 152, resnext50_32x4d, ...
        width: channels of the first stage's 3x3 convolutions, doubled at each stage that follows;
            other than 64 for networks of basic blocks only (resnet10, 18, 34).
        widening: K19's k, for every network: a width of 16k, which bottlenecks put out four times;
            k = 4 is the usual one, and 8, 12 and 16 are K19's others. null: see `width`. The wide
            ResNets of torchvision widen only what lies inside a block.
        stem: standard divides height and width by 4 (7x7 convolution of stride 2, max pool);
            small keeps them (3x3, stride 1, no pool), for images of 32 to 64 pixels, as SimCLR's
            CIFAR-10 networks do (Chen et al. 2020, appendix B.9).
        patch_mode: the first convolution and the last stage keep height and width, which are
            divided by 8 in all and not by 32, as K19's code has it for jigsaw and relative patch
            location (google/revisiting-self-supervised, config/*/imagenet.sh: a root of stride 1,
            then strides 2, 2, 1).
        representation: length of the features: one more linear layer behind the pooling, as in
            K19's study of width against representation size. null: none.
        zero_init_residual: begin with blocks that are the identity (Goyal et al. 2017, 5.1).
        activation_checkpointing: in training keep what goes into each block only, and compute what
            lies inside again for the gradients: the same ones, for less memory and more time.
    """

    name: str
    width: int = 64
    widening: int | None = None
    stem: Literal["standard", "small"] = "standard"
    patch_mode: bool = False
    representation: int | None = None
    zero_init_residual: bool = False
    activation_checkpointing: bool = False

    def __post_init__(self):
        if self.name not in NAMES:
            near = difflib.get_close_matches(self.name, NAMES)
            remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {NAMES}"
            raise ValueError(f"name ({self.name!r}) is no ResNet of torchvision; {remedy}")
        if self.widening is not None and self.widening < 1:
            raise ValueError(
                f"widening ({self.widening}) must be at least 1; K19's are 4, 8, 12 and 16"
            )
        if self.widening is not None and self.width != 64:
            raise ValueError(
                f"widening ({self.widening}) is a width of {16 * self.widening}, and width "
                f"({self.width}) another: leave one of them out"
            )
        if self.width < 1 or (self.width != 64 and self.name not in BASIC):
            raise ValueError(
                f"width ({self.width}) must be 64 for {self.name}, or the name one of "
                f"{', '.join(BASIC)} (and width at least 1); widening is for all of them"
            )
        if self.patch_mode and self.stem == "small":
            raise ValueError(
                "patch_mode (true) is for the standard stem, whose convolution then keeps height "
                "and width: leave it out, or stem: small"
            )
        if self.representation is not None and self.representation < 1:
            raise ValueError(f"representation ({self.representation}) must be at least 1, or null")


def backbone(options: Options) -> "Backbone":
    """The network without its classifier, weights drawn as torchvision draws them."""
    return Backbone(options)


class Backbone(nn.Module):
    """Images to features [B, dim].

    state_dict() has torchvision's keys less `fc.*`, so that weights travel both ways.
    """

    def __init__(self, options: Options):
        """Takes torchvision's network apart and keeps its children under their names there."""
        super().__init__()
        if options.name in TORCHVISION:
            network = get_model(options.name, zero_init_residual=options.zero_init_residual)
        else:
            network = ResNet(
                BasicBlock, list(BASIC[options.name]), zero_init_residual=options.zero_init_residual
            )
        assert isinstance(network, ResNet)
        width = options.width if options.widening is None else 16 * options.widening
        if width != 64:
            _set_width(network, width, zero_init_residual=options.zero_init_residual)
        self.pixels = _pixels(options)
        self.conv1, self.bn1, self.relu = network.conv1, network.bn1, network.relu
        self.maxpool: nn.Module = network.maxpool
        if options.stem == "small":
            self.conv1 = nn.Conv2d(3, self.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4
        if options.patch_mode:
            for convolution in (self.conv1, *self.layer4.modules()):
                if isinstance(convolution, nn.Conv2d):
                    convolution.stride = (1, 1)
        self.avgpool = network.avgpool
        self.dim = network.fc.in_features
        self.representation: nn.Linear | None = None
        if options.representation is not None:
            self.representation = nn.Linear(self.dim, options.representation)
            self.dim = options.representation
        self.normalization = (MEAN, STD)
        self.activation_checkpointing = options.activation_checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, dim] of `x` [B, 3, H, W]: uint8 in 0 ... 255, or normalised floats.

        Raises:
            ValueError: the images are too small for the strides; says the least size.
        """
        return list(self.stages(x).values())[-1]

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The output of every depth for `x` as forward takes it, first to last.

        stem, layer1, ..., layer4: [B, C, H, W] after the last ReLU (the stem's after its max
        pool); pool: [B, C], their mean; representation: [B, dim], where there is one. What
        forward returns is the last.
        """
        x = self.pixels(x)
        stages = {"stem": self.maxpool(self.relu(self.bn1(self.conv1(x))))}
        stages["layer1"] = self._through(self.layer1, stages["stem"])
        stages["layer2"] = self._through(self.layer2, stages["layer1"])
        stages["layer3"] = self._through(self.layer3, stages["layer2"])
        stages["layer4"] = self._through(self.layer4, stages["layer3"])
        stages["pool"] = self.avgpool(stages["layer4"]).flatten(1)
        if self.representation is not None:
            stages["representation"] = self.representation(stages["pool"])
        return stages

    def _through(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.activation_checkpointing and self.training and torch.is_grad_enabled()):
            return blocks(x)
        for block in blocks:
            x = checkpointed(block, x)
        return x


def _pixels(options: Options) -> Pixels:
    """Every stride halves, rounding up: two pixels for the last one of n take 2^(n - 1) + 1."""
    if options.stem == "small":
        return Pixels(MEAN, STD, least=5)
    if options.patch_mode:
        return Pixels(MEAN, STD, least=5)
    remedy = "backbone.stem=small takes 5, and so does backbone.patch_mode=true"
    return Pixels(MEAN, STD, least=17, remedy=remedy)


def _set_width(network: ResNet, width: int, *, zero_init_residual: bool) -> None:
    """Replaces what has channels, drawn as torchvision draws it."""
    first, *others = network.layer1, network.layer2, network.layer3, network.layer4
    block = Bottleneck if isinstance(first[0], Bottleneck) else BasicBlock
    network.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    network.inplanes = width  # from here on torchvision's own method counts
    network.layer1 = network._make_layer(block, width, len(first))
    network.layer2, network.layer3, network.layer4 = (
        network._make_layer(block, width * 2**stage, len(blocks), stride=2)
        for stage, blocks in enumerate(others, 1)
    )
    network.fc = nn.Linear(network.inplanes, 1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            nn.init.constant_(last.weight, 0)  # pyright: ignore[reportArgumentType]
