"""Colorization: tell the colour of each pixel of a gray image (Zhang et al. 2016).

The ab plane of Lab is cut into 313 bins; a pixel's colour is a distribution over the five nearest;
cross-entropy of the prediction with it, on a quarter of the image's resolution. Rare colours count
more (section 2.2), or the answer to everything would be a grayish brown:

    w = 1 / ((1 - lambda) p + lambda / 313), scaled so that its mean under p is 1
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.distributed import gather, world
from fastssl.lab import BINS, Bins, gray_of_equal_lightness, lab_to_rgb, read_prior, rgb_to_lab

QUARTER = 4  # pixels between two targets
GRAY = 5  # of a and b: an image that nowhere goes beyond has no colour to tell (NonGrayMaskLayer)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The paper's settings; "the code" is resources/caffe_traininglayers.py of its authors.

    Attributes:
        head: hypercolumn reads all depths: every map through a 1x1 convolution, brought to the
            target's size and added up, then ReLU and a 1x1 convolution (Larsson et al. 2016,
            section 3.2). deepest reads the last map through one 1x1 convolution, resized, as Zhang
            does; his network is dilated to keep a map of 1/8, where a ResNet's last is 1/32 of the
            image and cannot tell the colour of a pixel: hence the default.
        channels: of the hypercolumn.
        encoding: hard is the simple variant: only the nearest bin is right.
        neighbours: bins of the soft encoding. The paper: 5; the code: 10.
        sigma: of their Gaussian weights.
        rebalance: False: every pixel counts alike.
        uniform: lambda of the paper's equation 4 (gamma in the code).
        prior: a file of 313 numbers, Zhang's prior_probs.npy: the distribution p of colours over
            the training set. null: what was seen up to the step before, over all processes,
            smoothed with a Gaussian of `sigma` as the paper smooths (the counts are in the
            checkpoint).
    """

    head: Literal["hypercolumn", "deepest"] = "hypercolumn"
    channels: int = 256
    encoding: Literal["soft", "hard"] = "soft"
    neighbours: int = 5
    sigma: float = 5.0
    rebalance: bool = True
    uniform: float = 0.5
    prior: str | None = None

    def __post_init__(self):
        if self.channels < 1:
            raise ValueError(f"channels ({self.channels}) must be at least 1")
        if not 1 <= self.neighbours <= 10:
            raise ValueError(f"neighbours ({self.neighbours}) must be in 1 ... 10")
        if not self.sigma > 0:
            raise ValueError(f"sigma ({self.sigma}) must be above 0")
        if not 0 < self.uniform <= 1:
            raise ValueError(
                f"uniform ({self.uniform}) must be above 0, or colours never seen would weigh"
                " without end, and at most 1"
            )
        if self.prior is not None:
            read_prior(self.prior)


class Objective(nn.Module):
    """The head, and the count of colours seen."""

    counts: Tensor
    prior: Tensor
    blur: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        options: Options,
        *,
        images: int,
        classes: int,
        labels: Tensor | None,
        seed: int,
    ):
        """A head for the maps of `backbone`, told by a dry run on black pixels."""
        del images, classes, labels, seed
        super().__init__()
        self.options = options
        self.backbone = backbone
        self.bins = Bins()
        maps = _maps(backbone)
        if options.head == "hypercolumn":
            self.head: nn.Module = Hypercolumn(maps, options.channels)
        else:
            self.head = Deepest(maps)
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.int64))
        self.seen: list[Tensor] = []  # counts of this step's batches
        prior = torch.zeros(BINS)
        if options.prior is not None:
            prior = torch.tensor(read_prior(options.prior), dtype=torch.float32)
        self.register_buffer("prior", prior / prior.sum().clamp_min(1e-12), persistent=False)
        squares = (self.bins.centers[:, None] - self.bins.centers).square().sum(-1)
        blur = torch.exp(-squares / (2 * options.sigma**2))
        self.register_buffer("blur", blur / blur.sum(1, keepdim=True), persistent=False)

    def forward(self, image: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tell the colours of a batch from its lightness.

        The backbone sees gray RGB of the same L, so that it stays one for ordinary images and
        evaluation feeds it as any other; Zhang's first layer has one channel, L - 50.

        Args:
            image: [B, 3, S, S], uint8, in colour.
            index: [B], int64: which images.

        Returns:
            The weighted mean loss over the pixels that count (those of gray images do not), and:
            `accuracy`, how often the likeliest bin is the nearest one, the weights taken out of
            the prediction; `chance`, the share of the commonest bin among the batch's pixels, which
            is what the best constant answer would score; `gray`, the part of gray images.
        """
        del index
        logits = self._logits(image)
        # Q = bins, K = neighbours, h x w = a quarter of the image
        with torch.autocast(image.device.type, enabled=False):
            logits_BQhw = logits.to(torch.promote_types(logits.dtype, torch.float32))
            # the upper left pixel of every 4 x 4, as the code's convolution of stride 4 picks them
            ab_B2hw = rgb_to_lab(image[:, :, ::QUARTER, ::QUARTER])[:, 1:]
            colored_B = (ab_B2hw.abs() > GRAY).flatten(1).any(1)
            neighbours = self.options.neighbours if self.options.encoding == "soft" else 1
            numbers_BhwK, shares_BhwK = self.bins.soft_encode(
                ab_B2hw.movedim(1, -1), neighbours, self.options.sigma
            )
            nearest_Bhw = numbers_BhwK[..., 0]
            counted_Bhw = colored_B[:, None, None].expand_as(nearest_Bhw)
            weights_Q = self.weights()
            # cross-entropy, without the 313 numbers a pixel that a dense target would take
            right_BhwK = logits_BQhw.gather(1, numbers_BhwK.movedim(-1, 1)).movedim(1, -1)
            loss_Bhw = logits_BQhw.logsumexp(1) - (shares_BhwK * right_BhwK).sum(-1)
            summed = (counted_Bhw * weights_Q[nearest_Bhw] * loss_Bhw).sum()
            # DDP averages over processes, and each may count another number of pixels
            counted = gather(counted_Bhw.sum()[None]).sum().clamp_min(1)
            loss = summed * (world() / counted)

        with torch.no_grad():
            counts_Q = torch.zeros_like(self.counts).scatter_add_(
                0, nearest_Bhw.flatten(), counted_Bhw.flatten().long()
            )
            # a loss with weights teaches weighted shares: divided out, they compare with chance
            guess_Bhw = (logits_BQhw - weights_Q.log()[:, None, None]).argmax(1)
            here = counted_Bhw.sum().clamp_min(1)
            metrics = {
                "accuracy": (counted_Bhw & (guess_Bhw == nearest_Bhw)).sum() / here,
                "chance": counts_Q.max() / here,
                "gray": 1 - colored_B.float().mean(),
            }
        if self.training and torch.is_grad_enabled():  # not while only looking
            self.seen.append(counts_Q)
        return loss, metrics

    @torch.no_grad()
    def weights(self) -> Tensor:
        """W of every bin, [313]: that of a pixel is its nearest bin's."""
        if not self.options.rebalance:
            return torch.ones_like(self.prior)
        prior = self.prior
        if self.options.prior is None:
            # one more of each: before anything is seen, all colours weigh alike
            share = (self.counts + 1).double() / (self.counts + 1).sum()
            prior = (share @ self.blur.double()).float()
        weights = 1 / ((1 - self.options.uniform) * prior + self.options.uniform / BINS)
        return weights / (prior * weights).sum()

    @torch.no_grad()
    def finish_step(self) -> None:
        """Add the colours of the step's batches, on all processes, to the counts of each."""
        if self.seen:
            # whole numbers: their sum is the same in any order
            self.counts += gather(torch.stack(self.seen).sum(0, keepdim=True)).sum(0)
            self.seen.clear()

    @torch.no_grad()
    def colorize(self, image: Tensor) -> Tensor:
        """The colours predicted for `image`, both uint8 [B, 3, S, S], with its own lightness."""
        ab = self.bins.annealed_mean(self._logits(image))
        height, width = image.shape[-2:]
        ab = _at(ab, QUARTER, (height, width), step=1)
        return lab_to_rgb(torch.cat([rgb_to_lab(image)[:, :1], ab], dim=1))

    def _logits(self, image: Tensor) -> Tensor:
        """[B, 313, h, w] on a quarter of the resolution, rounded up."""
        gray = gray_of_equal_lightness(image).expand_as(image)
        gray = gray.contiguous(memory_format=torch.channels_last)
        stages = self.backbone.stages(gray)  # pyright: ignore[reportCallIssue]  a backbone has it
        height, width = (-(-side // QUARTER) for side in image.shape[-2:])
        return self.head(list(stages.values()), (height, width))


class Hypercolumn(nn.Module):
    """All depths, added up where they lie over one another.

    The pooled features are a depth, too, the same everywhere: so the loss itself trains what
    evaluation reads. Larsson has none, nor the batch norm, without which the sum of so many
    would start the softmax far from even.
    """

    def __init__(self, maps: list["Map"], channels: int):
        """For the outputs of stages()."""
        super().__init__()
        self.strides = [each.stride for each in maps]
        self.projections = nn.ModuleList(
            nn.Conv2d(each.channels, channels, 1, bias=number == 0)
            for number, each in enumerate(maps)
        )
        self.norm = nn.BatchNorm2d(channels)
        self.bins = nn.Conv2d(channels, BINS, 1)

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits [B, 313, *size] of every depth's [B, C, H, W] or [B, C]."""
        total = None
        for each, stride, projection in zip(maps, self.strides, self.projections, strict=True):
            part = each if each.ndim == 4 else each[:, :, None, None]
            # projected first: the same as resized first, both being linear, and cheaper
            part = projection(part)
            if stride:
                part = _at(part, stride, size)
            total = part if total is None else total + part
        assert total is not None, "a backbone must offer stages()"
        return self.bins(functional.relu(self.norm(total)))


class Deepest(nn.Module):
    """The last map alone; a backbone must have no weights behind it."""

    def __init__(self, maps: list["Map"]):
        """For the outputs of stages()."""
        super().__init__()
        self.last = max(number for number, each in enumerate(maps) if each.stride)
        self.stride = maps[self.last].stride
        self.bins = nn.Conv2d(maps[self.last].channels, BINS, 1)

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits [B, 313, *size]."""
        return _at(self.bins(maps[self.last]), self.stride, size)


class Map(NamedTuple):
    """One output of stages()."""

    channels: int
    stride: int  # pixels between two places of it; 0: it has no places


def _at(part: Tensor, stride: int, size: tuple[int, int], step: int = QUARTER) -> Tensor:
    """The values [B, C, *size] of a map [B, C, H, W] at every `step` pixels, linear in between.

    Place i of the map is centred on pixel stride * i, as the usual padding has it: interpolate()
    would read the deepest map of a ResNet 14 pixels off.
    """
    for dimension, count in zip((2, 3), size, strict=True):
        last = part.shape[dimension] - 1
        place = torch.arange(count, device=part.device) * (step / stride)
        place = place.clamp(max=last)  # beyond the last place: its value
        low = place.floor().long()
        share = (
            (place - low).to(part.dtype).reshape([-1 if d == dimension else 1 for d in range(4)])
        )
        high = (low + 1).clamp(max=last)
        below, above = part.index_select(dimension, low), part.index_select(dimension, high)
        part = torch.lerp(below, above, share)
    return part


@torch.no_grad()
def _maps(backbone: nn.Module) -> list[Map]:
    """What stages() gives; leaves the backbone as it was."""
    training = [(module, module.training) for module in backbone.modules()]
    backbone.eval()  # batch norm's statistics stay, dropout draws nothing
    side = 128  # a multiple of the strides of usual networks
    black = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    stages = backbone.stages(black)  # pyright: ignore[reportCallIssue]  a backbone has it
    for module, was in training:
        module.training = was
    return [
        Map(each.shape[1], round(side / each.shape[2]) if each.ndim == 4 else 0)
        for each in stages.values()
    ]
