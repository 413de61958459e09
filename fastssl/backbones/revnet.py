"""RevNet-50 of any width, as "Revisiting" has it (Kolesnikov et al. 2019, K19, section 3.1).

Its units are reversible (Gomez et al. 2017, arXiv:1707.04585): the input of a unit is computed back
from its output in the backward pass, so what is kept for that pass does not grow with the number of
units. K19's code (google/revisiting-self-supervised, models/resnet.py) has the same network with
plain back-propagation, which is `reversible: false` here; gradients are the same.

Three things are torch's and not the code's: batch norm (momentum 0.1 and epsilon 1e-5; 0.01, in
torch's terms, and 1e-3 there), weights (He et al. 2015 by fan-out, as torchvision draws a ResNet's;
Glorot uniform there), and the border of the first max pool (nothing is pooled from beyond it; zeros
there, which count where all of a window is negative, as no ReLU stands before).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastssl.pixels import MEAN, STD, Pixels
from fastssl.recompute import statistics_kept

UNITS = (3, 4, 6, 3)  # a stage
Halves = tuple[Tensor, Tensor]  # of the channels, as a unit takes them


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which network.

    Attributes:
        widening: K19's k: stages have 64k, 128k, 256k and 512k channels; 4 is the width of the
            usual ResNet-50, 8, 12 and 16 the others of K19.
        units: of each stage.
        last_relu: before the last pooling; false: K19's RevNet50(-).
        stem: standard divides height and width by 4 (7x7 convolution of stride 2, max pool); small
            keeps them (3x3, stride 1, no pool), for images of 32 to 64 pixels.
        patch_mode: stride 1 in the first convolution and in the last stage: 8 times the depth for
            patches of 64 pixels, as K19 has it for jigsaw and relative patch location.
        representation: length of the features, by a linear layer behind the pooling (K19, section
            4.6); null: no such layer, 512k features.
        reversible: compute inputs back in the backward pass, in place of keeping them. Under
            torch.compile the stages then run as they would without, and only what is around them is
            compiled; with false all is. Batch norm's running statistics move once a step; other
            state that a layer put into a unit moves in training (spectral norm's vectors) moves
            twice, and wants false.
    """

    widening: int = 4
    units: tuple[int, int, int, int] = UNITS
    last_relu: bool = True
    stem: Literal["standard", "small"] = "standard"
    patch_mode: bool = False
    representation: int | None = None
    reversible: bool = True

    def __post_init__(self):
        if self.widening < 1:
            raise ValueError(
                f"widening ({self.widening}) must be at least 1; K19's are 4, 8, 12 and 16"
            )
        if min(self.units) < 1:
            raise ValueError(f"units ({list(self.units)}) must be at least 1 in each of 4 stages")
        if self.patch_mode and self.stem == "small":
            raise ValueError(
                "patch_mode (true) is for the standard stem: it takes strides away that stem "
                "'small' does not have; give one of the two"
            )
        if self.representation is not None and self.representation < 1:
            raise ValueError(f"representation ({self.representation}) must be at least 1, or null")


def backbone(options: Options) -> "Backbone":
    """The network without its classifier, weights drawn as torchvision draws a ResNet's."""
    return Backbone(options)


class Backbone(nn.Module):
    """Images to features [B, dim]."""

    def __init__(self, options: Options):
        super().__init__()
        self.options = options
        channels = 64 * options.widening
        if options.stem == "small":
            self.root: nn.Module = nn.Conv2d(3, channels, 3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            stride = 1 if options.patch_mode else 2
            self.root = nn.Conv2d(3, channels, 7, stride=stride, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(channels, options.units[0])
        self.layer2 = _stage(2 * channels, options.units[1])
        self.layer3 = _stage(4 * channels, options.units[2])
        self.layer4 = _stage(8 * channels, options.units[3])
        self.norm = nn.BatchNorm2d(8 * channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.dim = 8 * channels
        self.representation: nn.Linear | None = None
        if options.representation is not None:
            self.representation = nn.Linear(self.dim, options.representation)
            self.dim = options.representation
        self.normalization = (MEAN, STD)
        if options.stem == "small" or options.patch_mode:
            self.pixels = Pixels(MEAN, STD, least=5)
        else:
            remedy = "backbone.stem=small takes 5, and so does backbone.patch_mode=true"
            self.pixels = Pixels(MEAN, STD, least=17, remedy=remedy)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, dim] of `x` [B, 3, H, W]: uint8 in 0 ... 255, or normalised floats.

        Raises:
            ValueError: the images are too small.
        """
        return list(self._end(self._halves(x)["layer4"]).values())[-1]

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The output of every depth for `x` as forward takes it, first to last.

        stem, layer1 ... layer4: [B, C, H, W], both halves of the channels, layer4 after the last
        norm (and ReLU); pool: [B, 512k]; and representation [B, dim] where there is one.
        """
        halves = self._halves(x)
        joined = {name: torch.cat(halves[name], dim=1) for name in list(halves)[:-1]}
        return {**joined, **self._end(halves["layer4"])}

    def _halves(self, x: Tensor) -> dict[str, Halves]:
        """What comes out of the stem and of every stage."""
        x = self.maxpool(self.root(self.pixels(x)))
        # The halves are summed up, and subtracted again: under autocast not in 16 bits.
        if x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type):
            x = x.float()
        # Views of one tensor have gaps between pixels, with which channels-last memory is lost.
        first, second = map(_compact, x.chunk(2, dim=1))
        stem = first, second
        halves = {"stem": stem}
        here = halves["layer1"] = self._through(self.layer1, stem)
        here = halves["layer2"] = self._through(self.layer2, _between_stages(here, shrink=True))
        here = halves["layer3"] = self._through(self.layer3, _between_stages(here, shrink=True))
        shrink = not self.options.patch_mode
        halves["layer4"] = self._through(self.layer4, _between_stages(here, shrink=shrink))
        return halves

    def _through(self, stage: nn.ModuleList, halves: Halves) -> Halves:
        units = list(stage)
        if self.options.reversible and torch.is_grad_enabled():
            return _backward_by_units(units, halves, list(stage.parameters()))
        return _forward(units, halves)

    def _end(self, halves: Halves) -> dict[str, Tensor]:
        x = self.norm(torch.cat(halves, dim=1))
        x = F.relu(x) if self.options.last_relu else x
        end = {"layer4": x, "pool": x.mean((2, 3))}
        if self.representation is not None:
            end["representation"] = self.representation(end["pool"])
        return end


def _stage(channels: int, units: int) -> nn.ModuleList:
    return nn.ModuleList(_Residual(channels // 2) for _ in range(units))


class _Residual(nn.Module):
    """What a unit adds to one half of the channels, seeing the other: norm, ReLU, convolution x 3.

    The inner width is a quarter of the half's: c/8 of a stage of c channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = channels // 4
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.relu(self.norm1(x)))
        x = self.conv2(F.relu(self.norm2(x)))
        return self.conv3(F.relu(self.norm3(x)))


def _between_stages(halves: Halves, *, shrink: bool) -> Halves:
    """Half the height and width, twice the channels: the new ones are zero.

    The code pads the joined tensor on both sides: the first half in front, the second behind. It
    pools with TensorFlow's padding SAME: an odd side is rounded up, its last pixel stands alone.
    """
    if shrink:
        first, second = (
            F.avg_pool2d(each, 2, ceil_mode=True, count_include_pad=False) for each in halves
        )
    else:
        first, second = halves
    channels = first.shape[1]
    return (
        _compact(F.pad(first, (0, 0, 0, 0, channels, 0))),
        _compact(F.pad(second, (0, 0, 0, 0, 0, channels))),
    )


def _compact(x: Tensor) -> Tensor:
    """Without gaps, channels last where they are."""
    last = x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _forward(units: list[nn.Module], halves: Halves) -> Halves:
    """x1, x2 to x2, x1 + F(x2): they change places, or only one of them would ever be changed."""
    first, second = halves
    for unit in units:
        first, second = second, first + unit(second)
    return first, second


@torch.compiler.disable()  # a compiler would fall out of it at every unit's random state
def _backward_by_units(
    units: list[nn.Module], halves: Halves, parameters: list[nn.Parameter]
) -> Halves:
    return _Reversible.apply(units, *halves, *parameters)


class _Reversible(torch.autograd.Function):
    """The units of a stage, of which only the last one's output is kept.

    Their parameters are arguments, so that gradients go the ordinary way: to .grad, and to DDP.
    """

    @staticmethod
    def forward(
        ctx: Any, units: list[nn.Module], first: Tensor, second: Tensor, *parameters: Tensor
    ) -> Halves:
        ctx.units, ctx.random, ctx.state = units, [], _state(units)
        device = first.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        of_first_unit = second
        for unit in units:
            ctx.random.append(_random_state(first.device))
            first, second = _forward([unit], (first, second))
        # What the first unit sees is kept as it was: half of its channels are zeros behind another
        # stage, where ReLU has its kink, and what is computed back lies on either side of zero.
        # Parameters take no memory here, and autograd refuses those that are changed in between.
        ctx.save_for_backward(of_first_unit, first, second, *parameters)
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore
        of_first, of_second = gradients
        of_first_unit, first, second, *_ = ctx.saved_tensors
        if _state(ctx.units) != ctx.state:
            raise RuntimeError(
                "a RevNet's units have other parameters in the backward pass than in the forward "
                "pass, another mode (train, eval), or in eval mode other running statistics, and "
                "would give the gradients of another network: leave them alone in between, or give "
                "backbone.reversible=false"
            )
        enabled, dtype = ctx.autocast
        of_parameters: list[list[Tensor | None]] = []
        for unit, random in zip(reversed(ctx.units), reversed(ctx.random), strict=True):
            # first = x2 and second = x1 + F(x2); the gradients are theirs
            seen = (of_first_unit if unit is ctx.units[0] else first).detach().requires_grad_()
            with (
                torch.enable_grad(),
                # its cache would hold weights of another call's graph
                torch.autocast(seen.device.type, dtype, enabled, cache_enabled=False),
                _random_as(random, seen.device),
                statistics_kept(unit),
            ):
                added = unit(seen)
            wanted = [each for each in unit.parameters() if each.requires_grad]
            through, *found = torch.autograd.grad(added, [seen, *wanted], of_second)
            of = iter(found)
            of_parameters.append(
                [next(of) if each.requires_grad else None for each in unit.parameters()]
            )
            first, second = second - added.detach(), seen.detach()
            of_first, of_second = of_second, of_first + through
        flat = [each for unit in reversed(of_parameters) for each in unit]
        return (None, of_first, of_second, *flat)


def _state(units: list[nn.Module]) -> tuple[list[int], list[bool], list[tuple[int, int]]]:
    """What a unit is computed again with: which parameters, the mode of each module, and buffers.

    Those of modules in eval mode, with how often they were written to: in training mode batch norm
    moves its running statistics, which it does not read.
    """
    modules = [module for unit in units for module in unit.modules()]
    parameters = [id(each) for unit in units for each in unit.parameters()]
    frozen = [each for module in modules if not module.training for each in module.buffers(False)]
    buffers = [(id(each), each._version) for each in frozen]
    return parameters, [each.training for each in modules], buffers


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


@contextlib.contextmanager
def _random_as(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Random numbers as from `state` on; afterwards as if none had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
