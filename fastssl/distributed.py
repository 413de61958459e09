"""What a process needs to know of the others: its rank, how many there are, and their tensors.

`rank` and `world` are global (over all machines). Everything works without a process group, where
the answer is that of one process.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl import starting


def rank() -> int:
    """The global index of this process, 0 ... world - 1."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """The number of processes over all machines."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def place() -> tuple[int, int]:
    """Rank and world; before there is a process group, as the launcher says.

    For what is made on the CPU before the group is, and is another thing on each process.
    """
    if dist.is_available() and dist.is_initialized():
        return rank(), world()
    return starting.environment("RANK", 0), starting.environment("WORLD_SIZE", 1)


@torch.no_grad()
def gather(tensor: Tensor) -> Tensor:
    """The same-shaped `tensor` [B, ...] of every process, joined in rank order: [world * B, ...].

    Carries no gradient. Rank order is the order in which the order plan cuts a step's images, so
    the result equals what one process with the whole batch would hold.
    """
    if world() == 1:
        return tensor.detach()
    tensor = tensor.detach().contiguous()
    joined = tensor.new_empty((world() * len(tensor), *tensor.shape[1:]))
    dist.all_gather_into_tensor(joined, tensor)
    return joined


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """As `gather`, and the gradient of what every process made of this one's part comes back.

    DDP divides by the number of processes: where each process's loss is a mean over its own
    images, the averaged gradient is that of one process with the joined batch.
    """
    return tensor if world() == 1 else _Gather.apply(tensor)  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)  # summed in place
        dist.all_reduce(gradient)  # over what all processes made of all parts
        return gradient.chunk(world())[rank()]


@torch.no_grad()
def gather_to_first(tensor: Tensor) -> list[Tensor]:
    """The same-shaped `tensor` of every process in rank order, on rank 0; elsewhere nothing."""
    if world() == 1:
        return [tensor.detach()]
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world())] if rank() == 0 else None
    dist.gather(tensor, parts, dst=0)
    return parts or []


@torch.no_grad()
def add_up(tensor: Tensor) -> Tensor:
    """The sum of the same-shaped `tensor` of every process, in its place. Carries no gradient."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def add_up_and_deal(tensor: Tensor) -> Tensor:
    """This process's part [B, ...] of the sum over processes of `tensor` [world * B, ...].

    The parts are dealt in rank order, as `gather` joins them. Carries no gradient.
    """
    if world() == 1:
        return tensor
    part = tensor.new_empty((len(tensor) // world(), *tensor.shape[1:]))
    dist.reduce_scatter_tensor(part, tensor.contiguous())
    return part


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrites the tensors of every process with those of rank 0."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def object_from_first(value: object, control: "dist.ProcessGroup | None") -> Any:
    """Rank 0's value, on every process; `control` is a group over the CPU, None for one process."""
    if control is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control)
    return box[0]


def objects_to_first(value: object, control: "dist.ProcessGroup | None") -> list[Any]:
    """Every process's value in rank order, on rank 0; elsewhere a list of nothing."""
    if control is None:
        return [value]
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(value, boxes if dist.get_rank() == 0 else None, dst=0, group=control)
    return boxes
