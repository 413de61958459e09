"""The reader of folders, with a pause before each batch of one process."""

import os
import time
from collections.abc import Callable

import numpy as np
from nvidia.dali.data_node import DataNode

from pipelines.images import Decoding, Image
from pipelines.readers import folder

Options, list_samples = folder.Options, folder.list_samples
RANK, SLOW_RANK = (int(os.environ.get(name, "0")) for name in ("RANK", "SLOW_RANK"))


def source(
    samples: folder.Samples, rows: Callable[[int], np.ndarray], decoding: Decoding
) -> tuple[Image, DataNode]:
    def late(step: int) -> np.ndarray:
        if RANK == SLOW_RANK:
            time.sleep(0.15)
        return rows(step)

    return folder.source(samples, late, decoding)
