"""What an entry point does before there is a process group: who am I, whose turn is it to list."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import torch


def environment(name: str, default: int) -> int:
    """What the launcher says: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE."""
    return int(os.environ.get(name, default))


def on_cpu() -> bool:
    """Whether there is no GPU, or Accelerate was told not to use it."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU") == "True"


def mixed_precision(asked: str, on_cpu: bool, *, key: str) -> str:
    """What Accelerate calls it; auto: bf16 on a GPU that has it, fp16 on others, else fp32.

    Raises:
        ValueError: fp16 without a GPU.
    """
    # Without emulation, which older GPUs offer and which is slow.
    bf16 = not on_cpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "auto":
        asked = "fp32" if on_cpu else "bf16" if bf16 else "fp16"
    if asked == "fp16" and on_cpu:
        raise ValueError(f"{key} (fp16) needs a GPU: give fp32, bf16 or auto")
    return "no" if asked == "fp32" else asked


@contextlib.contextmanager
def one_at_a_time(cache: Path) -> Iterator[None]:
    """Processes of one machine, one after the other: the second finds the first one's work."""
    with contextlib.ExitStack() as locked:
        # Without a cache, or on a file system without locks, each does its own work.
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            file = locked.enter_context((cache / ".lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """A line for the user, at once."""
    print(text, flush=True)


def silent(_: str) -> None:
    """For the processes that are not the first."""
