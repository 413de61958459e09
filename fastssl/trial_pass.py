"""What a pass tells of a network: whether images are too small for it, and its blocks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ANY = 64  # pixels a side that nearly every network of more than one size takes
WEIGHTS = 8  # layers with weights that a block has at most; a residual block has two to six
FAILURES = (RuntimeError, ValueError, AssertionError)  # on small images: each library has its own
_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_LISTS = (nn.Sequential, nn.ModuleList)
_WEIGHTED = (nn.Conv2d, nn.Linear)


def least_side(network: nn.Module, usual: int) -> int:
    """The least pixels a side that a network takes; 1 where it does not take `usual` either.

    Too small is what the network fails on, and a stride with less than two pixels to make one of.
    Runs on the device that the network is on; it is left as it was.

    Args:
        network: images [B, 3, H, W] to features, of more than one size.
        usual: pixels a side that it was made for.
    """
    below, least = 0, ANY
    if not takes(network, ANY):
        if not takes(network, usual):
            return 1
        below, least = ANY, usual
    while least - below > 1:
        middle = (below + least) // 2
        below, least = (below, middle) if takes(network, middle) else (middle, least)
    return least


def takes(network: nn.Module, side: int) -> bool:
    """Whether a blank image of `side` pixels is not too small; the network is left as it was."""
    try:
        with starved_strides(network) as starved:
            _run(network, side)
    except FAILURES:
        return False
    return not starved


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
    with one tensor, and give one: the largest of at most `WEIGHTS` layers, or larger where such a
    module has none within.

    Args:
        network: images [B, 3, H, W] to features; left as it was.
        side: pixels, that it takes.
    """
    calls: dict[nn.Module, list[bool]] = {}

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        plain = len(given) == 1 and not named and isinstance(given[0], Tensor)
        calls.setdefault(module, []).append(plain and isinstance(out, Tensor))

    handles = [each.register_forward_hook(note, with_kwargs=True) for each in network.modules()]
    try:
        _run(network, side)
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


def _run(network: nn.Module, side: int) -> None:
    """In eval mode, so that neither running statistics nor random numbers move."""
    weight = next(network.parameters())
    modes = [(each, each.training) for each in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype))
    finally:
        for module, mode in modes:
            module.training = mode
