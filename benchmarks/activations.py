"""How much memory a training step of a network takes beside its weights and their gradients.

On a GPU the allocator says it. On a CPU every storage that an operation makes is counted from then
until it is freed, which is what that allocator would say, less what it rounds up and the
temporaries inside an operation: the same on every machine, and nothing is timed.

`python -m benchmarks.activations` prints how it grows with the depth of a RevNet: with plain
back-propagation, with every unit checkpointed, and reversible.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl.backbones import revnet
from fastssl.recompute import checkpointed

KINDS = ("plain", "checkpointed", "reversible")


@dataclass(frozen=True)
class Activations:
    """Bytes beyond weights, gradients and images."""

    kept: int  # between the passes: for the backward one
    peak: int  # at most, in either


def activations(
    network: nn.Module, images: Tensor, *, autocast: torch.dtype | None = None
) -> Activations:
    """What one step of `network` takes; it is left with gradients.

    Args:
        network: on the images' device, in training mode for what training takes; not compiled,
            where that is the CPU.
        images: [B, 3, H, W].
        autocast: torch.bfloat16 or so, in which the casts of the weights count too; None: none.
    """
    device = images.device.type

    def forward() -> Tensor:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return network(images)

    forward().float().square().mean().backward()  # gradients and workspaces are there from now on
    if device == "cuda":
        return _by_allocator(forward, network)
    there = [images, *network.parameters(), *network.buffers()]
    there += [each.grad for each in network.parameters() if each.grad is not None]
    with _Live(there) as live:
        features = forward()
        kept = live.now
        features.float().square().mean().backward()
    return Activations(kept, live.most)


def of_revnet(kind: str, times: int, images: Tensor, *, widening: int = 1) -> Activations:
    """What a step of a RevNet-50 takes with `times` as many units, trained in one of KINDS.

    Under bfloat16 autocast on a GPU, in float32 on a CPU.
    """
    units = (3 * times, 4 * times, 6 * times, 3 * times)
    options = revnet.Options(widening=widening, units=units, reversible=kind == "reversible")
    network = revnet.backbone(options).to(images.device)
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if kind == "checkpointed":
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            for number, unit in enumerate(stage):
                stage[number] = _Checkpointed(unit)
    return activations(network, images, autocast=torch.bfloat16 if images.is_cuda else None)


class _Checkpointed(nn.Module):
    def __init__(self, unit: nn.Module):
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(self.unit, x)


def _by_allocator(forward: Callable[[], Tensor], network: nn.Module) -> Activations:
    device = next(network.parameters()).device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    features = forward()
    kept = torch.cuda.memory_allocated(device) - before
    features.float().square().mean().backward()
    return Activations(kept, torch.cuda.max_memory_allocated(device) - before)


class _Live(TorchDispatchMode):
    """Counts the bytes of storages from the operation that made them until they are freed."""

    def __init__(self, there: Sequence[Tensor]):
        """Without those of `there`, which were made before."""
        super().__init__()
        self.now = self.most = 0
        self._known = {each.untyped_storage()._cdata for each in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:  # another view of it, or changed in place
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _main() -> None:
    on_gpu = torch.cuda.is_available()
    shape, widening = ((64, 3, 224, 224), 4) if on_gpu else ((8, 3, 128, 128), 1)
    images = torch.randn(shape, device="cuda" if on_gpu else "cpu")
    images = images.contiguous(memory_format=torch.channels_last)
    print(f"widening {widening}, images {shape}; MiB kept between the passes / at most")
    print(f"| units | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
    for times in (1, 2, 4):
        each = [of_revnet(kind, times, images, widening=widening) for kind in KINDS]
        cells = [f"{one.kept / 2**20:.1f} / {one.peak / 2**20:.1f}" for one in each]
        print(f"| {16 * times} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    _main()
