"""Failures of the machine, and not of this code: what happened and what may help, in one line."""

import errno

import torch
import torch.distributed as dist

from fastssl import checkpoint

# What torch says on a CPU, where it has no class for it, also of bytes beyond 64 bits.
_NO_PLACE = (
    "can't allocate memory",
    "Storage size calculation overflowed",
    "Overflow when unpacking long",
    "Invalid buffer size",
)


def is_of_memory(error: BaseException) -> bool:
    """Whether there was not enough of it, on the CPU or the GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(each in str(error) for each in _NO_PLACE)


def is_of_others(error: BaseException) -> bool:
    """Whether another process of the run has gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def is_mistake(error: BaseException) -> bool:
    """Whether the user's input is at fault, and not a store that went away when it was read."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError):
            return False
        cause = cause.__cause__
    return isinstance(error, ValueError)


def told(error: BaseException) -> str | None:
    """A line for the user; None where a traceback is due."""
    lines = str(error).splitlines()  # C++ frames follow the first
    reason = (lines[0] if lines else type(error).__name__)[:300]
    if isinstance(error, checkpoint.CheckpointError):
        return str(error)
    if isinstance(error, OSError):
        full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        return str(error) if error.errno in full else None
    if is_of_others(error):
        return (
            "the other processes of the run cannot be reached any more: one of them has ended, or "
            "its machine, and tells why if it can. Started again, the run goes on from its last "
            f"checkpoint, if it has saved one ({reason})"
        )
    if is_of_memory(error):
        return (
            "there is not enough memory: train.accumulate cuts a batch into parts, train.precision="
            "bf16 halves what is kept of it, loader.prefetch=1 what is made ahead; or take a "
            f"smaller backbone or head ({reason})"
        )
    return None
