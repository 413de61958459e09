"""SIGINT and SIGTERM as a wish, which a run looks at after each step and a probe's each batch."""

import contextlib
import signal
from collections.abc import Iterator

import torch
import torch.distributed as dist

STOPPED = 75  # EX_TEMPFAIL, the exit code after a signal and a checkpoint: try again


class Stopped(Exception):
    """A signal has asked to stop: what was begun is given up, on all processes at one place."""


class Stop:
    """Whether a signal has asked to stop."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self.number = 0

    @property
    def name(self) -> str:
        """Of the signal."""
        return signal.Signals(self.number).name if self.number else "another process"

    def ask(self, number: int, _: object) -> None:
        """The handler of a signal."""
        self.number = self.number or number

    def agreed(self, control: "dist.ProcessGroup | None") -> bool:
        """The same answer on every process: yes as soon as one was asked.

        Args:
            control: a group over the CPU, so that no step waits for a GPU; None: one process.
        """
        if control is None:
            return self.number != 0
        asked = torch.tensor([self.number])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=control)
        self.number = int(asked)
        return self.number != 0


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Turns SIGINT and SIGTERM into a wish.

    A second one changes nothing: launchers repeat the signal, and it must not cut the last
    checkpoint off.
    """
    stop = Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
