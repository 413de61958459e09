"""RotNet's Network in Network for CIFAR-10 (Gidaris et al. 2018, section 4.1; Lin et al. 2014).

Blocks of three convolutions, 5x5 or 3x3 and twice 1x1, each with batch norm and ReLU. Channels,
pooling and weights as in architectures/NetworkInNetwork.py of gidariss/FeatureLearningRotNet with
`use_avg_on_conv3` off, as all its CIFAR-10 runs have it.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from fastssl.pixels import Pixels

MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)  # of CIFAR-10's red, green and blue in 0 ... 1,
STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)  # as RotNet's dataloader.py has them


@dataclass(frozen=True, kw_only=True)
class Options:
    """How deep.

    Attributes:
        blocks: 3, 4 or 5 in the paper's table 1, whose best features come from the second block
            of four.
        width: channels; the first block's layers have 1, 5/6 and 1/2 of them. RotNet: 192.
    """

    blocks: int = 4
    width: int = 192

    def __post_init__(self):
        if not 3 <= self.blocks <= 5:
            raise ValueError(f"blocks ({self.blocks}) must be 3, 4 or 5")
        if self.width < 6 or self.width % 6:
            raise ValueError(f"width ({self.width}) must be a multiple of 6: 160 of 192 is 5/6")


def backbone(options: Options) -> "Backbone":
    """The network without its classifier, weights drawn as RotNet draws them."""
    return Backbone(options)


class Backbone(nn.Module):
    """Images to features [B, dim]; made for 32 x 32 pixels, takes any size."""

    def __init__(self, options: Options):
        """Blocks conv1 ... convN; height and width are halved at the end of the first two."""
        super().__init__()
        self.pixels = Pixels(MEAN, STD, least=3)  # two poolings that halve, rounding up
        width = options.width
        first = _block(3, (width, width * 5 // 6, width // 2), 5)
        second = _block(width // 2, (width, width, width), 5)
        first.append(nn.MaxPool2d(3, stride=2, padding=1))
        second.append(nn.AvgPool2d(3, stride=2, padding=1))
        deeper = [_block(width, (width, width, width), 3) for _ in range(2, options.blocks)]
        self.blocks = nn.ModuleList([first, second, *deeper])
        self.dim = width
        self.normalization = (MEAN, STD)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, dim] of `x` [B, 3, H, W]: uint8 in 0 ... 255, or normalised floats.

        Raises:
            ValueError: the images are smaller than 3 x 3.
        """
        return self.stages(x)["pool"]

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The output of every depth for `x` as forward takes it, first to last.

        conv1 ... convN: [B, C, H, W] after the block, its pooling included, as RotNet probes them;
        pool: [B, dim], the mean over the last of them, what forward returns.
        """
        x = self.pixels(x)
        stages: dict[str, Tensor] = {}
        for number, block in enumerate(self.blocks, 1):
            x = stages[f"conv{number}"] = block(x)
        stages["pool"] = x.mean((2, 3))
        return stages


def _block(before: int, channels: tuple[int, int, int], kernel: int) -> nn.Sequential:
    """One spatial convolution, then two across channels; none changes height or width."""
    block = nn.Sequential()
    for here, side in zip(channels, (kernel, 1, 1), strict=True):
        block.append(nn.Conv2d(before, here, side, padding=side // 2, bias=False))
        block.append(nn.BatchNorm2d(here))
        block.append(nn.ReLU(inplace=True))
        before = here
    return block
