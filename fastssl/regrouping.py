"""On from a checkpoint with another number of processes: what is joined, what begins anew.

Weights, optimizer and bank are of no process, and the order plan keeps to the epoch's images
(train.rows_of_step), so that each is still seen once an epoch. What a process has of its own is the
random stream of its augmentations, which begins anew, its skip list and its losses since the last
line of the log, which are joined.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

PROCESSES, PARTS = "processes", "train.accumulate"  # names in a fingerprint


def is_regrouped(saved: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether the batch is now cut among other processes or into other parts.

    Args:
        saved: the fingerprint of the checkpoint.
        here: that of this start.
    """
    return any(saved[name] != here[name] for name in (PROCESSES, PARTS))


def may_differ(saved: dict[str, Any], here: dict[str, Any]) -> tuple[str, ...]:
    """The names of a fingerprint that may differ: processes; parts, where pieces stay as large."""
    if any(name not in either for name in (PROCESSES, PARTS) for either in (saved, here)):
        return ()
    if saved[PROCESSES] * saved[PARTS] == here[PROCESSES] * here[PARTS]:
        return (PROCESSES, PARTS)
    return (PROCESSES,)


def told(saved: dict[str, Any], here: dict[str, Any]) -> str:
    """A line for the user of what that means."""
    before, now = (each["train.batch"] // each[PROCESSES] // each[PARTS] for each in (saved, here))
    pieces = f"; a pass has {now} images in place of {before}" if before != now else ""
    return (
        f"processes: {saved[PROCESSES]} before, {here[PROCESSES]} now{pieces}: each image is "
        "still seen once an epoch, but random augmentation begins anew from the seed, the process "
        "and the step, so that the weights will not be those of an unchanged run to the last bit"
    )


def sources(before: int, rank: int, world: int) -> range:
    """Of the processes that an epoch was planned for, those whose images `rank` of `world` takes.

    Where the order is one of chunks, each process reads chunks of its own, and an epoch that was
    planned anew in its midst would show some images twice and others never.
    """
    return range(rank * before // world, -(-(rank + 1) * before // world))


def piece(plans: list[np.ndarray], before: int, rank: int, world: int) -> np.ndarray:
    """What `rank` of `world` sees of an epoch that was planned for `before` processes.

    Args:
        plans: of the `sources`, int64 [steps, batch / before] each.
        before: processes that the epoch was planned for.
        rank: the process now.
        world: processes now.

    Returns:
        int64 [steps, batch / world]; a step has the images it was planned to have.
    """
    joined = np.concatenate(plans, axis=1)
    whole = plans[0].shape[1] * before
    begin = rank * whole // world - sources(before, rank, world)[0] * plans[0].shape[1]
    return joined[:, begin : begin + whole // world]


def skipped(ranks: list[dict[str, Any]]) -> dict[int, str]:
    """The skip list of all processes.

    Args:
        ranks: of a checkpoint, what each process saved.
    """
    return {row: reason for here in ranks for row, reason in here["loader"]["skipped"].items()}


def recent(
    ranks: list[dict[str, Any]], parts: int, parts_now: int
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The losses and metrics since the last line, as a process saves them: means, a step's alike.

    Args:
        ranks: of a checkpoint, what each process saved.
        parts: micro-batches a step of a process, then.
        parts_now: the same for this start.
    """
    steps = len(ranks[0]["recent"]) // parts
    joined = []
    for step in range(steps):
        of_step = [each for here in ranks for each in here["recent"][step * parts :][:parts]]
        loss = torch.stack([loss for loss, _ in of_step]).mean()
        metrics = {
            name: torch.stack([values[name] for _, values in of_step]).mean()
            for name in of_step[0][1]
        }
        joined += [(loss, metrics)] * parts_now
    return joined
