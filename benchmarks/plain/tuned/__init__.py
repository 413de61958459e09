"""The tasks as an expert of PyTorch would write them for speed: bytes all the way, no PIL.

JPEGs are decoded by simplejpeg (libjpeg-turbo), crops resized by torch's antialiased resize of
bytes in the layout that it is fastest in, and only what is put out is resampled. A colour jitter is
one matrix, gray is part of it, blur a few shifted sums, and a turn a view. Workers use one thread
each and put batches straight into shared memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks.plain import workers as workers_of
from benchmarks.plain.tuned import pixels, tasks

TASKS: dict[str, Callable[[Tensor, Any], tasks.Outputs]] = {
    "pipelines.colorization": tasks.of_colorization,
    "pipelines.exemplar": tasks.of_exemplar,
    "pipelines.jigsaw": tasks.of_jigsaw,
    "pipelines.pirl_jigsaw": tasks.of_pirl_jigsaw,
    "pipelines.pirl_jigsaw_rotation": tasks.of_pirl_jigsaw_rotation,
    "pipelines.pirl_rotation": tasks.of_pirl_rotation,
    "pipelines.relative_patch": tasks.of_relative_patch,
    "pipelines.rotation": tasks.of_rotation,
    "pipelines.single_view": tasks.of_single_view,
    "pipelines.two_views": tasks.of_two_views,
}
# Values of options that there is a version of; of all others any.
HONOURED: dict[str, dict[str, Callable[[Any], bool]]] = {
    "pipelines.jigsaw": {"orders_of": lambda value: value == "image"},
    "pipelines.relative_patch": {
        "channel_drop": lambda value: value == 0,
        "downsample": lambda value: value == 0,
    },
    "pipelines.rotation": {"turns": lambda value: not any(angle % 90 for angle in value)},
}
PREFETCH = 2  # batches made ahead by each worker


def dataset(graph: str, paths: Sequence[str], options: Any, *, seed: int = 0) -> "Images":
    """The task of the graph file `graph` on image files; see benchmarks.plain.

    Args:
        graph: "pipelines.pirl_jigsaw".
        paths: of the images.
        options: an instance of that file's Options.
        seed: not read: nothing is drawn once for all images.

    Raises:
        ValueError: there is no version of the graph here, or none of what an option asks for.
    """
    if graph not in TASKS:
        raise ValueError(f"{graph}: benchmarks/plain/tuned has no version of this graph")
    for name, honoured in HONOURED.get(graph, {}).items():
        value = vars(options)[name]
        if not honoured(value):
            raise ValueError(f"{graph}.{name} ({value}): benchmarks/plain/tuned has no such thing")
    return Images(TASKS[graph], [str(path) for path in paths], options)


def loader(dataset: Dataset, *, batch: int, workers: int, pinned: bool = False) -> DataLoader:
    """Shuffled, without the last short batch; see benchmarks.plain.

    Workers seed torch and random by themselves, each its own, and use one thread.
    """
    return DataLoader(
        dataset,
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=collate,
        multiprocessing_context=workers_of.clean() if workers else None,
        pin_memory=pinned,
    )


class Images(Dataset[tasks.Outputs]):
    """Image files and what becomes of them."""

    def __init__(
        self, task: Callable[[Tensor, Any], tasks.Outputs], paths: list[str], options: Any
    ) -> None:
        self._task, self._paths, self._options = task, paths, options

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int) -> tasks.Outputs:
        """All outputs of the graph by name."""
        outputs = self._task(pixels.decode(self._paths[row]), self._options)
        return {**outputs, "index": torch.tensor(row)}


def collate(items: list[tasks.Outputs]) -> tasks.Outputs:
    """Stacks each output in the layout it has: making planes of pixels would cost as a resize."""
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        if all(value.ndim > 2 and value.stride(-3) == 1 for value in values):
            batch[name] = default_collate([value.movedim(-3, -1) for value in values]).movedim(
                -1, -3
            )
        else:
            batch[name] = default_collate(values)
    return batch
