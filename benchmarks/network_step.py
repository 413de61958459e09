"""The networks of `python -m benchmarks networks`: how each is made, stepped, counted, taken apart.

A step is forward and backward in training mode on the same normalised images, from a gradient of
the features that is drawn once: no head, no optimizer, no loader.
"""

import functools
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50

from benchmarks.activations import Activations, activations
from benchmarks.method import Contender
from fastssl.backbones import resnet, resnet_v2, revnet, vgg

Variant = Literal["contiguous", "channels-last", "compiled"]
VARIANTS: tuple[Variant, ...] = ("contiguous", "channels-last", "compiled")
REFERENCE = "torchvision"
MATMUL = "matmul"
# What an operator's name says of the kind of its work; the first that fits counts.
KINDS = {
    "convolution": ("conv", "::mm", "addmm", "::bmm", "::linear"),
    "norm": ("batch_norm", "native_norm"),
    "pooling": ("pool", "::mean"),
    "copies": ("copy", "clone", "::cat", "pad", "fill_", "zero", "slice", "split", "narrow"),
    "ReLU": ("relu", "threshold", "clamp"),
    "sums": ("::add", "::sub", "::mul", "::div", "::sum"),
}


@dataclass(frozen=True)
class Network:
    """One of those compared."""

    title: str  # in tables
    make: Callable[[int, int], nn.Module]  # of K19's k and the images' pixels a side
    counts_as: str | None = None  # whose arithmetic it does: recomputing is no more work done
    compiles: bool = True  # else compiling it tells nothing that another one does not


def _torchvision(widening: int, side: int) -> nn.Module:
    del widening, side  # what all others are compared with: always the usual ResNet-50
    network = resnet50()
    network.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return network


def _v1(widening: int, side: int) -> nn.Module:
    del side
    return resnet.backbone(resnet.Options(name="resnet50", widening=widening))


def _v2(widening: int, side: int) -> nn.Module:
    del side
    return resnet_v2.backbone(resnet_v2.Options(widening=widening))


def _v2_minus(widening: int, side: int) -> nn.Module:
    del side
    return resnet_v2.backbone(resnet_v2.Options(widening=widening, last_relu=False))


def _revnet(widening: int, side: int) -> nn.Module:
    del side
    return revnet.backbone(revnet.Options(widening=widening))


def _revnet_plain(widening: int, side: int) -> nn.Module:
    del side
    return revnet.backbone(revnet.Options(widening=widening, reversible=False))


def _vgg19(widening: int, side: int) -> nn.Module:
    return vgg.backbone(vgg.Options(widening=widening, image_size=side))


NETWORKS = {
    REFERENCE: Network("torchvision's resnet50", _torchvision),
    "v1": Network("ResNet50 v1", _v1),
    "v2": Network("ResNet50 v2", _v2),
    "v2-": Network("ResNet50 v2(-)", _v2_minus, compiles=False),
    # Its units run eagerly in any case; and what torch.compile gives up in it, it would give up in
    # the plain one, too, while the process lasts.
    "revnet": Network("RevNet50, reversible", _revnet, counts_as="revnet-plain", compiles=False),
    "revnet-plain": Network("RevNet50, plain", _revnet_plain),
    "vgg19": Network("VGG19-BN", _vgg19),
}


@dataclass(frozen=True)
class Setting:
    """What all networks are given."""

    device: torch.device
    side: int  # pixels
    batch: int  # images
    bf16: bool  # autocast; else float32


@dataclass(frozen=True)
class Counts:
    """Exact, of one image; what is computed again in the backward pass is not counted."""

    parameters: int
    forward_macs: int  # multiply-adds of convolutions and matrix products
    training_flops: int  # forward and backward, two for a multiply-add


def counts(name: str, widening: int, side: int) -> Counts:
    """Counted on the meta device: nothing is computed.

    Raises:
        ValueError: the images are too small for the network.
    """
    return _counts(NETWORKS[name].counts_as or name, widening, side)


class Stepper:
    """A network, images, and steps of the one on the other."""

    def __init__(
        self, name: str, widening: int, variant: Variant, on: Setting, backend: str = "inductor"
    ):
        """Draws the weights and the images.

        Args:
            name: of NETWORKS.
            widening: K19's k.
            variant: compiled is channels-last, too, as fastssl/train.py has both.
            on: images and precision.
            backend: torch.compile's.
        """
        torch.manual_seed(0)
        self.on = on
        self.network = NETWORKS[name].make(widening, on.side).to(on.device).train()
        self.images = torch.randn(on.batch, 3, on.side, on.side, device=on.device)
        if variant != "contiguous":
            self.network = self.network.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        if variant == "compiled":
            self.network.compile(backend=backend)
        self._gradient: Tensor | None = None

    def step(self) -> None:
        """Forward and backward; no gradient is left."""
        with torch.autocast(self.on.device.type, dtype=torch.bfloat16, enabled=self.on.bf16):
            features = self.network(self.images)
        if self._gradient is None:
            self._gradient = torch.randn_like(features)
        features.backward(self._gradient)
        self.network.zero_grad()  # tens of networks are held at once: their weights are enough
        wait(self.on.device)

    def activations(self) -> Activations:
        """The memory of one step; not for a compiled network."""
        autocast = torch.bfloat16 if self.on.bf16 else None
        found = activations(self.network, self.images, autocast=autocast)
        self.network.zero_grad()
        return found


def contender(name: str, stepper: Stepper) -> Contender:
    """Its steps for `benchmarks.method.alternate`."""

    def run() -> int:
        stepper.step()
        return stepper.on.batch

    return Contender(name, run, queue=0)


def matmul(on: Setting) -> tuple[Contender, int]:
    """A large matrix product at the networks' precision, and its floating-point operations."""
    size = 8192 if on.device.type == "cuda" else 2048
    dtype = torch.bfloat16 if on.bf16 else torch.float32
    a, b = (torch.randn(size, size, device=on.device, dtype=dtype) for _ in range(2))

    def run() -> int:
        torch.mm(a, b)
        wait(on.device)
        return 1

    return Contender(MATMUL, run, queue=0), 2 * size**3


def parts(stepper: Stepper) -> dict[str, float]:
    """Milliseconds an image of each of KINDS, and of "other"; the middle of three profiled steps.

    Not for a compiled network, whose operators are not those of KINDS any more.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else every profile says that it was begun
    stepper.step()  # what is made once is there
    on_gpu = stepper.on.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    found: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "other")}
    for _ in range(3):
        with profile(activities=activities, acc_events=True) as profiled:
            stepper.step()
        once = dict.fromkeys(found, 0.0)  # microseconds
        for event in profiled.key_averages():
            if event.device_type.name != "CPU":
                continue  # kernels, whose time stands at their operators, too
            # on a GPU its own time: what the CPU does meanwhile is launching
            took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            once[kind_of(event.key)] += took
        for kind, took in once.items():
            found[kind].append(took)
    return {kind: statistics.median(each) / 1000 / stepper.on.batch for kind, each in found.items()}


def kind_of(operator: str) -> str:
    """Which of KINDS an operator (aten::cudnn_batch_norm) is of, or "other"."""
    for kind, words in KINDS.items():
        if any(word in operator for word in words):
            return kind
    return "other"


def wait(device: torch.device) -> None:
    """Until the GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def _counts(name: str, widening: int, side: int) -> Counts:
    with torch.device("meta"):
        network = NETWORKS[name].make(widening, side).train()
        images = torch.empty(2, 3, side, side)  # two: a norm needs two values of a channel
    with FlopCounterMode(display=False) as forward:
        features = network(images)
    with FlopCounterMode(display=False) as backward:
        features.sum().backward()
    flops = forward.get_total_flops()
    return Counts(
        parameters=sum(each.numel() for each in network.parameters()),
        forward_macs=flops // 2 // 2,
        training_flops=(flops + backward.get_total_flops()) // 2,
    )
