"""The spy that ends its own process as a power cut would, in the middle of a step, for tests."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from fastssl import distributed
from tests import spy_objective

Options = spy_objective.Options
takes = spy_objective.takes


def strike(place: str, step: int) -> None:
    """Has this process end if FAULTS ("RANK:PLACE:STEP ...") says so, once each.

    forward, finish, save: the process, there. machine: its launcher goes as well. term: the
    launcher is asked to stop, and passes that on. late: the process hangs when it is to save.
    """
    fault = f"{distributed.rank()}:{place}:{step}"
    marker = Path(os.environ["SPY_FOLDER"]) / f"struck-{fault}"
    if fault not in os.environ.get("FAULTS", "").split() or marker.exists():
        return
    marker.touch()
    if place == "term":
        os.kill(os.getppid(), signal.SIGTERM)
        stop: Any = signal.getsignal(signal.SIGTERM)  # stopping.Stop.ask
        while not stop.__self__.number:  # until the launcher has passed it on
            time.sleep(0.01)
        return
    if place == "late":
        time.sleep(60)
    if place == "machine":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class Objective(spy_objective.Objective):
    def forward(
        self,
        image: Tensor,
        index: Tensor,
        patches: Tensor | None = None,
        permutation: Tensor | None = None,
        turned: Tensor | None = None,
        angle: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        strike("forward", self.memory.steps + 1)
        return super().forward(image, index, patches, permutation, turned, angle)

    def finish_step(self) -> None:
        super().finish_step()
        for place in ("finish", "machine", "term"):
            strike(place, self.memory.steps)

    def state_dict(self) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for place in ("save", "late"):
            strike(place, self.memory.steps)
        return super().state_dict()
