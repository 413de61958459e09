"""The ResNets of torchvision by name (He et al. 2016; ResNeXt: Xie 2017; wide: Zagoruyko 2016).

And resnet10, one basic block a stage, for small images on small machines.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet, get_model, list_models
from torchvision.models.resnet import BasicBlock, conv1x1

TORCHVISION = tuple(
    list_models(torchvision.models, include=("resnet*", "resnext*", "wide_resnet*"))
)
BASIC = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}  # blocks
NAMES = ("resnet10", *TORCHVISION)
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue in 0 ... 1, as torchvision's
STD = (0.229, 0.224, 0.225)  # own weights expect them


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which network.

    Attributes:
        name: resnet10, or torchvision's: resnet18, 34, 50, 101, 152, resnext50_32x4d, ...
        width: channels of the first stage, doubled at each that follows; other than 64 for
            networks of basic blocks only (resnet10, 18, 34).
        stem: standard divides height and width by 4 (7x7 convolution of stride 2, max pool);
            small keeps them (3x3, stride 1, no pool), for images of 32 to 64 pixels, as SimCLR's
            CIFAR-10 networks do (Chen et al. 2020, appendix B.9).
        zero_init_residual: begin with blocks that are the identity (Goyal et al. 2017, 5.1).
    """

    name: str
    width: int = 64
    stem: Literal["standard", "small"] = "standard"
    zero_init_residual: bool = False

    def __post_init__(self):
        if self.name not in NAMES:
            near = difflib.get_close_matches(self.name, NAMES)
            remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {NAMES}"
            raise ValueError(f"name ({self.name!r}) is no ResNet of torchvision; {remedy}")
        if self.width < 1 or (self.width != 64 and self.name not in BASIC):
            raise ValueError(
                f"width ({self.width}) must be 64 for {self.name}, or the name one of "
                f"{', '.join(BASIC)} (and width at least 1)"
            )


def backbone(options: Options) -> "Backbone":
    """The network without its classifier, weights drawn as torchvision draws them."""
    return Backbone(options)


class Backbone(nn.Module):
    """Images to features [B, dim].

    state_dict() has torchvision's keys less `fc.*`, so that weights travel both ways.
    """

    scale: Tensor
    shift: Tensor

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
        if options.width != 64:
            _set_width(network, options)
        self.conv1, self.bn1, self.relu = network.conv1, network.bn1, network.relu
        self.maxpool: nn.Module = network.maxpool
        if options.stem == "small":
            self.conv1 = nn.Conv2d(3, self.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4
        self.avgpool = network.avgpool
        self.dim = network.fc.in_features
        self.normalization = (MEAN, STD)
        # not in state_dict(): torchvision has no such keys
        scale = 1 / (255 * torch.tensor(STD).reshape(1, 3, 1, 1))
        shift = -torch.tensor(MEAN).reshape(1, 3, 1, 1) * 255 * scale
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, dim] of `x` [B, 3, H, W]: uint8 in 0 ... 255, or normalised floats."""
        return self.stages(x)["pool"]

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The output of every depth for `x` as forward takes it, first to last.

        stem, layer1, ..., layer4: [B, C, H, W] after the last ReLU (the stem's after its max
        pool); pool: [B, dim], what forward returns.
        """
        if x.dtype == torch.uint8:
            x = torch.addcmul(self.shift, x, self.scale)  # one pass: no float copy of the bytes
        stages = {"stem": self.maxpool(self.relu(self.bn1(self.conv1(x))))}
        stages["layer1"] = self.layer1(stages["stem"])
        stages["layer2"] = self.layer2(stages["layer1"])
        stages["layer3"] = self.layer3(stages["layer2"])
        stages["layer4"] = self.layer4(stages["layer3"])
        stages["pool"] = self.avgpool(stages["layer4"]).flatten(1)
        return stages


def _set_width(network: ResNet, options: Options) -> None:
    """Replaces what has channels, drawn as torchvision draws it."""
    width = options.width
    network.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    before, stages = width, []
    for number, blocks in enumerate(BASIC[options.name]):
        here = width * 2**number
        stage: list[nn.Module] = []
        for block in range(blocks):
            stride = 2 if number > 0 and block == 0 else 1
            shortcut = None
            if stride != 1 or before != here:
                shortcut = nn.Sequential(conv1x1(before, here, stride), nn.BatchNorm2d(here))
            stage.append(BasicBlock(before, here, stride, shortcut))
            before = here
        stages.append(nn.Sequential(*stage))
    network.layer1, network.layer2, network.layer3, network.layer4 = stages
    network.fc = nn.Linear(before, 1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, BasicBlock) and options.zero_init_residual:
            nn.init.constant_(module.bn2.weight, 0)  # pyright: ignore[reportArgumentType]
