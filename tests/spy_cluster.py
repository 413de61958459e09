"""The spy that also writes down each image's pixels and the local rank, for tests."""

import hashlib
import json
import os
from pathlib import Path

from torch import Tensor

from fastssl import distributed
from tests import spy_objective

Options = spy_objective.Options


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
        line = {
            "local_rank": int(os.environ["LOCAL_RANK"]),
            "pixels": [hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in image],
        }
        path = Path(os.environ["SPY_FOLDER"]) / f"pixels-{distributed.rank()}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return super().forward(image, index, patches, permutation, turned, angle)
