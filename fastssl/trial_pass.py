"""What a pass tells of a network: which sizes of images it takes, and its blocks."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ANY = 64  # pixels a side that nearly every network of more than one size takes
WEIGHTS = 8  # layers with weights that a block has at most; a residual block has two to six
FAILURES = (RuntimeError, ValueError, AssertionError)  # on sizes: each library has its own
MULTIPLE = 32  # pixels a side: of networks that take multiples, nearly all take this one's
_ABOVE = (1, 2, 5, 11, 22, 45)  # pixels: networks of multiples fail on some of them
_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_LISTS = (nn.Sequential, nn.ModuleList)
_WEIGHTED = (nn.Conv2d, nn.Linear)


def on_paper(network: nn.Module) -> nn.Module:
    """A copy that has the shapes of weights in place of weights.

    Its passes cost no memory, and little time; it fails on the sizes of images that the network
    fails on, and on all where the network computes with values.
    """
    tensors = [*network.parameters(), *network.buffers()]
    shapes: dict[int, Any] = {id(tensor): tensor.detach().to("meta") for tensor in tensors}
    return copy.deepcopy(network, shapes)


def least_side(network: nn.Module, usual: int) -> int | None:
    """The least pixels a side that a network takes; None where there is no such size.

    Too small is what the network fails on, and a stride with less than two pixels to make one of.
    Of networks that take multiples of some size, or that do not take `usual`, there is none: a few
    sizes below must all be too small, and a few above must not.
    Runs on the device that the network is on; it is left as it was.

    Args:
        network: images [B, 3, H, W] to features, of more than one size.
        usual: pixels a side that it was made for.
    """
    below, least = 0, ANY
    if not takes(network, ANY):
        if not takes(network, usual):
            return None
        below, least = ANY, usual
    while least - below > 1:
        middle = (below + least) // 2
        below, least = (below, middle) if takes(network, middle) else (middle, least)
    if not all(takes(network, least + more) for more in _ABOVE):
        return None
    smaller = {least // 2, least * 3 // 4, least - 2}
    return None if any(takes(network, side) for side in smaller if side > 0) else least


def sides_near(network: nn.Module, side: int) -> list[int]:
    """The multiples of `MULTIPLE` next to `side`, below and above, that a network takes."""
    below = (side - 1) // MULTIPLE * MULTIPLE
    above = (side // MULTIPLE + 1) * MULTIPLE
    return [each for each in (below, above) if each > 0 and takes(network, each)]


def takes(network: nn.Module, height: int, width: int | None = None) -> bool:
    """Whether a blank image of that size is not too small; the network is left as it was.

    Args:
        network: images [B, 3, H, W] to features.
        height: pixels.
        width: pixels; None: as many.
    """
    with starved_strides(network) as starved:
        failed = fails(network, height, width)
    return not failed and not starved


def fails(network: nn.Module, height: int, width: int | None = None) -> bool:
    """Whether it raises an error on a blank image of that size; arguments as those of `takes`."""
    try:
        _run(network, height, height if width is None else width)
    except FAILURES:
        return True
    return False


@contextlib.contextmanager
def starved_strides(network: nn.Module) -> Iterator[list[nn.Module]]:
    """The layers that, within, were given less than two pixels to make one of."""
    starved: list[nn.Module] = []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if min(given[0].shape[2:]) < 2:
            starved.append(module)

    # Hooks for this pass only.
    handles = [
        each.register_forward_pre_hook(look)
        for each in network.modules()
        if isinstance(each, _STRIDED) and each.stride not in (1, (1, 1))
    ]
    try:
        yield starved
    finally:
        for handle in handles:
            handle.remove()


def blocks(network: nn.Module, side: int) -> list[str]:
    """Names of the modules between which a network may be cut, first to last.

    Members of lists (nn.Sequential, nn.ModuleList), or siblings of one class, that are called once,
    with a tensor (and whatever else), and give one (or several): the largest of at most `WEIGHTS`
    layers, or larger where such a module has none within.

    Args:
        network: images [B, 3, H, W] to features; left as it was.
        side: pixels, that it takes.
    """
    calls: dict[nn.Module, list[bool]] = {}

    def note(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        first = out[0] if isinstance(out, tuple) and out else out
        has_tensor = bool(given) and isinstance(given[0], Tensor)
        calls.setdefault(module, []).append(has_tensor and isinstance(first, Tensor))

    handles = [each.register_forward_hook(note) for each in network.modules()]
    try:
        _run(network, side, side)
    finally:
        for handle in handles:
            handle.remove()

    def within(module: nn.Module, name: str, is_member: bool) -> list[str]:
        weighted = sum(isinstance(each, _WEIGHTED) for each in module.modules())
        may_be = is_member and weighted > 1 and calls.get(module) == [True]
        if may_be and weighted <= WEIGHTS:
            return [name]
        kinds = [type(child) for child in module.children()]
        found = [
            path
            for key, child in module.named_children()
            for path in within(
                child,
                f"{name}.{key}" if name else key,
                is_member=isinstance(module, _LISTS)
                or (not isinstance(child, _LISTS) and kinds.count(type(child)) > 1),
            )
        ]
        return found or ([name] if may_be else [])

    return within(network, "", is_member=False)


def _run(network: nn.Module, height: int, width: int) -> None:
    """In eval mode, so that neither running statistics nor random numbers move."""
    weight = next(network.parameters())
    modes = [(each, each.training) for each in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype))
    finally:
        for module, mode in modes:
            module.training = mode
