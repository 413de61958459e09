"""Images with their transformed copies, by the graph that a run was trained with.

Where that graph puts out no `image` (jigsaw, rotation), the image is that of the evaluation graph.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl import loader, order
from fastssl.config import Part

VIEWS = ("patches", "turned")
BATCH = 64


def outputs(reader: ModuleType, samples: Any, graph: Part) -> set[str]:
    """The names that `graph` puts out."""
    return set(loader.output_names(reader, samples, graph.module, graph.options))


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of `rows`, evenly spaced: of every class, as listings are sorted by class."""
    count = min(most, len(rows))
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def passes(
    reader: ModuleType,
    samples: Any,
    graphs: list[Part],
    rows: np.ndarray,
    *,
    times: int,
    seed: int,
    device: torch.device,
    loading: loader.Options,
    say: Callable[[str], None],
) -> Iterator[Iterator[dict[str, Tensor]]]:
    """`times` passes over `rows`, each transformed anew; the same seed gives the same pixels.

    Args:
        reader: pipelines/readers/*.
        samples: its listing.
        graphs: run side by side on the same images; of an output that two have, the first's counts.
        rows: of the listing.
        times: passes.
        seed: of the transforms.
        device: where tensors are wanted.
        loading: how batches are made.
        say: told about files that can't be decoded, which are left out.

    Yields:
        A pass, whose batches must be used up before the next one.
    """
    # Of about the same size, as batch norm may look at each: none of them a single image.
    batch = -(-len(rows) // -(-len(rows) // BATCH))
    plan = order.in_order(len(rows), 0, 1, batch)
    loaders = [
        loader.Loader(
            reader,
            samples,
            graph.module,
            graph.options,
            lambda step: rows[plan[step % len(plan)]],
            batch=batch,
            seed=seed,
            device=device,
            loading=loading,
            say=say,
        )
        for graph in graphs
    ]

    def one_pass() -> Iterator[dict[str, Tensor]]:
        for number, places in enumerate(plan):
            batches = [next(each) for each in loaders]
            planned = torch.from_numpy(rows[places]).to(device)
            # the last batch is filled up, and a file that can't be decoded stands for another
            kept = torch.arange(batch, device=device) < len(rows) - number * batch
            for each in batches:
                kept &= each["index"] == planned
            joined: dict[str, Tensor] = {}
            for each in batches:
                joined = {name: tensor[kept] for name, tensor in each.items()} | joined
            if kept.any():
                yield joined

    try:
        for _ in range(times):
            yield one_pass()
    finally:
        for each in loaders:
            each.close()
