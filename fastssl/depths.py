"""Which parameters and modules of a backbone belong to which of its stages, whatever it is made of.

Found by reachability, not by names: what the output of a stage depends on, and that of the stage
before does not, belongs to the stage.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Pixels a side of the image it is found by: small, else larger, as some networks need.
_SIDES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 384)


@dataclass(frozen=True)
class Depths:
    """The stages that have parameters, from the image on, and what belongs to each."""

    stages: tuple[str, ...]
    parameters: dict[str, int]  # name in the backbone -> position in `stages`
    modules: dict[str, int]  # the same of modules: the deepest of what each is made of


def depths(backbone: nn.Module) -> Depths:
    """Runs the backbone once on the device that it is on; it is left as it was.

    What no stage depends on counts as part of the last. The one vector behind the last map, and a
    vector behind a norm only (a vision transformer's, a ResNet v2's), count to the map: training
    these alone is no stage of a network. Hidden layers behind one another (VGG's fc6 and fc7) are.

    Raises:
        ValueError: it has no parameters, or takes none of the images tried.
    """
    parameters = dict(backbone.named_parameters())
    if not parameters:
        raise ValueError(f"the backbone {type(backbone).__name__} has no parameters")
    every = dict(backbone.named_modules())
    leaves = {name: each for name, each in every.items() if not [*each.children()]}
    made: dict[nn.Module, Any] = {}  # what each leaf's output was computed by

    def note(leaf: nn.Module, _: object, output: object) -> None:
        made[leaf] = output.grad_fn if isinstance(output, Tensor) else None

    with _as_for_gradients(backbone):
        handles = [leaf.register_forward_hook(note) for leaf in leaves.values()]
        try:
            outputs = _run(backbone, next(iter(parameters.values())))
        finally:
            for handle in handles:
                handle.remove()
        depth_of, reached = _walk(outputs.values())
    of_tensor = {id(tensor): depth for tensor, depth in reached}
    last = max(of_tensor.get(id(each), 0) for each in parameters.values())
    found = {name: of_tensor.get(id(each), last) for name, each in parameters.items()}
    sizes = dict.fromkeys(sorted(set(found.values())), 0)  # most dimensions of a parameter there
    for name, depth in found.items():
        sizes[depth] = max(sizes[depth], parameters[name].ndim)
    shapes = [output.ndim for output in outputs.values()]
    here = [depth for depth in sizes if not _is_of_the_map(depth, shapes, sizes[depth])]
    stages = tuple(name for number, name in enumerate(outputs) if number in here)

    def position(depth: int) -> int:
        """Among the stages with parameters: one without counts to the one before it."""
        return max(0, sum(number <= depth for number in here) - 1)

    of_leaf = {}
    for name, leaf in leaves.items():
        own = [found[f"{name}.{key}" if name else key] for key, _ in leaf.named_parameters()]
        of_leaf[leaf] = position(own[0] if own else depth_of.get(made.get(leaf), last))
    modules = {
        name: max(of_leaf[leaf] for leaf in each.modules() if leaf in of_leaf)
        for name, each in every.items()
    }
    return Depths(stages, {name: position(depth) for name, depth in found.items()}, modules)


def learning(objective: nn.Module) -> str:
    """What a run says of it: how many parameters learn, and in which of the backbone's stages.

    Args:
        objective: a module with a `backbone`, whose other parameters are heads.
    """
    backbone = objective.get_submodule("backbone")
    parameters = dict(backbone.named_parameters())
    every = sum(each.numel() for each in parameters.values())
    taught = {name: each.numel() for name, each in parameters.items() if each.requires_grad}
    count = sum(taught.values())
    heads = sum(each.numel() for each in objective.parameters() if each.requires_grad) - count
    where = ""
    if 0 < len(taught) < len(parameters):
        found = depths(backbone)
        numbers = sorted({found.parameters[name] for name in taught})
        where = f" ({', '.join(found.stages[number] for number in numbers)})"
    return f"learning: {count:,} of the backbone's {every:,} parameters{where}, {heads:,} of heads"


def _is_of_the_map(depth: int, shapes: list[int], most: int) -> bool:
    """Whether a stage is no more than what its network puts behind the last map.

    Args:
        depth: its place.
        shapes: dimensions of every stage's output.
        most: dimensions of its parameters.
    """
    if shapes[depth] == 4 or 4 not in shapes[:depth]:
        return False
    return most < 2 or (depth == len(shapes) - 1 and shapes[depth - 1] == 4)


@contextlib.contextmanager
def _as_for_gradients(backbone: nn.Module) -> Iterator[None]:
    """Eval mode, and a gradient for every parameter, for the time of a `with`."""
    modes = [(each, each.training) for each in backbone.modules()]
    wants = [(each, each.requires_grad) for each in backbone.parameters()]
    backbone.eval().requires_grad_(True)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, its in wants:
            parameter.requires_grad_(its)


def _run(backbone: Any, like: Tensor) -> dict[str, Tensor]:
    """The output of every stage for a grey image."""
    refused: Exception | None = None
    sides = _sides(backbone)
    for side in sides:
        image = torch.zeros(1, 3, side, side, dtype=like.dtype, device=like.device)
        try:
            with torch.enable_grad():
                return backbone.stages(image)
        except (RuntimeError, ValueError, AssertionError) as error:  # too small, or of one size
            refused = error
    raise ValueError(
        f"the stages of {type(backbone).__name__} can't be told apart: it takes no image of "
        f"{', '.join(map(str, sides))} pixels a side ({refused})"
    )


def _sides(backbone: nn.Module) -> tuple[int, ...]:
    """What to try: the network's own size, where it takes no other."""
    size = vars(backbone).get("image_size")  # of those whose layers cover the whole image
    if size is not None:
        return (size,)
    return _SIDES


def _walk(outputs: Iterable[Tensor]) -> tuple[dict[Any, int], list[tuple[Tensor, int]]]:
    """The first stage that depends on each node of autograd's graph, and on each parameter."""
    depth_of: dict[Any, int] = {}  # holds the nodes, which are else made anew when asked for
    reached: list[tuple[Tensor, int]] = []
    for depth, output in enumerate(outputs):
        waiting: list[Any] = [output.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in depth_of:
                continue
            depth_of[node] = depth
            if node.name() == "torch::autograd::AccumulateGrad":  # it ends at a parameter
                reached.append((node.variable, depth))
            waiting += [before for before, _ in node.next_functions]
    return depth_of, reached
