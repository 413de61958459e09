"""PIRL that writes down what it saw and holds after each step, one file a rank, for tests."""

import hashlib
import json
import os
from pathlib import Path

from torch import Tensor

from fastssl import distributed
from fastssl.objectives import pirl

Options = pirl.Options
takes = pirl.takes


class Objective(pirl.Objective):
    _seen: list[int]

    def forward(
        self,
        image: Tensor,
        index: Tensor,
        patches: Tensor | None = None,
        permutation: Tensor | None = None,
        turned: Tensor | None = None,
        angle: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._seen = [*getattr(self, "_seen", []), *index.tolist()]
        return super().forward(image, index, patches, permutation, turned, angle)

    def finish_step(self) -> None:
        super().finish_step()
        weights = hashlib.sha256()
        for parameter in self.parameters():
            weights.update(parameter.detach().numpy().tobytes())
        line = {
            "images": self._seen,
            "bank": hashlib.sha256(self.memory.rows.numpy().tobytes()).hexdigest(),
            "weights": weights.hexdigest(),
        }
        self._seen = []
        path = Path(os.environ["SPY_FOLDER"]) / f"rank-{distributed.rank()}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
