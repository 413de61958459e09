"""The tasks as users of Pillow and torchvision.transforms.v2 write them: Pillow images throughout.

Sizes, areas, strengths and probabilities are the graph's. What torchvision does in its own way
stays so: contrast pivots on the image's mean gray, hue turns in HSV, and the four changes of colour
come in a random order.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.plain import workers as workers_of
from benchmarks.plain.pil import exemplar, patches, views

Task = Callable[[Image.Image], dict[str, Tensor]]

TASKS: dict[str, Callable[[Any], Task]] = {
    "pipelines.colorization": views.Colorization,
    "pipelines.exemplar": exemplar.Exemplar,
    "pipelines.jigsaw": patches.Jigsaw,
    "pipelines.pirl_jigsaw": patches.Pirl,
    "pipelines.pirl_jigsaw_rotation": patches.PirlTurned,
    "pipelines.pirl_rotation": views.PirlRotation,
    "pipelines.relative_patch": patches.RelativePatch,
    "pipelines.rotation": views.Rotation,
    "pipelines.single_view": views.SingleView,
    "pipelines.two_views": views.TwoViews,
}


def dataset(graph: str, paths: Sequence[str], options: Any, *, seed: int = 0) -> "PilImages":
    """The task of `graph` on the files `paths`; nothing is drawn once for all, so `seed` is unread.

    Raises:
        ValueError: there is no such task here, or an option has a value that it does not honour.
    """
    if graph not in TASKS:
        raise ValueError(f"pil: there is no version of {graph}; there are {', '.join(TASKS)}")
    return PilImages(paths, TASKS[graph](options))


def loader(
    dataset: Dataset[dict[str, Tensor]], *, batch: int, workers: int, pinned: bool = False
) -> DataLoader[Any]:
    """Shuffled batches; see benchmarks.plain."""
    return DataLoader(
        dataset,
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
        worker_init_fn=_seed_random,
        multiprocessing_context=workers_of.clean() if workers else None,
        pin_memory=pinned,
    )


class PilImages(Dataset[dict[str, Tensor]]):
    """One file a row."""

    def __init__(self, paths: Sequence[str], task: Task) -> None:
        self._paths, self._task = list(paths), task

    def __len__(self) -> int:
        """Images."""
        return len(self._paths)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """The graph's outputs of the image at `row`."""
        with Image.open(self._paths[row]) as file:
            image = file.convert("RGB")
        return self._task(image) | {"index": torch.tensor(row)}


def _seed_random(_: int) -> None:
    # torch seeds each worker with a number of its own, in every epoch another
    random.seed(torch.initial_seed())
