"""Who takes part in `python -m benchmarks tasks`: each for the gate and for the clock.

All have the same files, the same number of threads or workers, and batches of one size. Batches are
wanted on the training device: what comes from a plain loader is copied there, to a GPU from pinned
memory.
"""

import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import bounds, gate, same_files
from benchmarks.method import Contender
from benchmarks.plain import ffcv
from benchmarks.same_files import Files
from fastssl.loader import Loader, Options
from pipelines.readers import folder

# Entries in the list that a plain loader shuffles, at least: files come in it several times, so
# that its workers do not stop at the end of an epoch of a few batches.
EPOCH = 50_000


@dataclass(frozen=True)
class Task:
    """A recipe's task on some files."""

    recipe: str  # its name
    graph: str  # "pipelines.pirl_jigsaw"
    module: ModuleType
    options: Any  # of the graph
    files: Files
    batch: int  # images
    loading: Options  # with threads
    device: torch.device

    @property
    def threads(self) -> int:
        """Of each contender, or worker processes."""
        assert self.loading.threads is not None
        return self.loading.threads

    @property
    def paths(self) -> list[str]:
        """The files."""
        return [str(self.files.samples.path(int(row))) for row in self.files.rows]


def fastssl(task: Task) -> Contender:
    """The recipe's graph in fastssl.loader."""
    loader = Loader(
        task.files.reader,
        task.files.samples,
        task.module,
        task.options,
        task.files.order(task.batch),
        batch=task.batch,
        seed=task.files.seed,
        device=task.device,
        loading=task.loading,
    )

    def run() -> int:
        next(loader)
        _finish(task.device)
        loader.data_wait()  # forgets its events
        return task.batch

    return Contender("fastssl", run, queue=task.loading.prefetch)


def fastssl_make(task: Task) -> gate.Make:
    """The same, for the gate."""

    def make(paths: Sequence[str], options: Any) -> Mapping[str, Tensor]:
        listed = folder.Options(root=str(Path(paths[0]).parent))
        samples = folder.list_samples(listed, cache=None, say=lambda _: None)
        loader = Loader(
            folder,
            samples,
            task.module,
            options,
            lambda _: np.arange(len(paths)),
            batch=len(paths),
            seed=0,
            device=task.device,
            loading=task.loading,
        )
        return {name: tensor.cpu() for name, tensor in next(loader).items()}

    return make


def bound(task: Task) -> Contender:
    """DALI at decoding and resizing alone."""
    resizes = bounds.resizes(task.graph)
    backend = "cpu" if task.device.type == "cpu" else "gpu"
    pipeline = same_files.pipeline(
        task.files,
        lambda image, index: [*resizes(image, task.options, backend), index],
        task.loading,
        batch=task.batch,
        device=task.device,
    )

    def run() -> int:
        if task.device.type == "cpu":
            pipeline.run()
        else:
            pipeline.run(torch.cuda.current_stream())
            _finish(task.device)
        return task.batch

    return Contender("bound", run, queue=task.loading.prefetch)


def plain(task: Task, name: str, module: ModuleType, workers: int) -> Contender:
    """A torch DataLoader: `module` is a file of benchmarks.plain.

    Raises:
        ValueError: it has no version of the task.
    """
    paths = task.paths
    made = module.dataset(task.graph, paths * -(-EPOCH // len(paths)), task.options, seed=0)
    is_gpu = task.device.type == "cuda"
    batches = _endless(module.loader(made, batch=task.batch, workers=workers, pinned=is_gpu))

    def run() -> int:
        for tensor in next(batches).values():
            tensor.to(task.device, non_blocking=is_gpu)
        _finish(task.device)
        return task.batch

    # closing drops the last reference to the loader, which ends its workers
    return Contender(name, run, batches.close, queue=2 * workers)


def plain_make(graph: str, module: ModuleType) -> gate.Make:
    """The same, for the gate, in this process."""

    def make(paths: Sequence[str], options: Any) -> Mapping[str, Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        made = module.dataset(graph, paths, options, seed=0)
        return next(iter(module.loader(made, batch=len(paths), workers=0)))

    return make


def ffcv_contender(task: Task, python: str | None, temporary: Path) -> tuple[Contender, str]:
    """FFCV, from the bytes of the same JPEGs; and its version.

    Raises:
        ffcv.Unavailable: it is not installed, or can't do the task.
        ValueError: it can't do what an option asks for, or `python` is no interpreter.
    """
    worker = _ffcv(task, task.paths, task.options, task.batch, python, temporary)

    def run() -> int:
        return worker.run()

    return Contender("ffcv", run, worker.close, queue=worker.queue), worker.version


def ffcv_make(task: Task, python: str | None, temporary: Path) -> gate.Make:
    """The same, for the gate."""

    def make(paths: Sequence[str], options: Any) -> Mapping[str, Tensor]:
        worker = _ffcv(task, paths, options, len(paths), python, temporary)
        try:
            return worker.sample_batch()
        finally:
            worker.close()

    return make


def _ffcv(
    task: Task, paths: Sequence[str], options: Any, batch: int, python: str | None, temporary: Path
) -> ffcv.Worker:
    return ffcv.start(
        paths,
        graph=task.graph,
        options=options,
        form="jpeg",
        batch=batch,
        threads=task.threads,
        folder=temporary,
        python=python,
    )


def _endless(loader: "DataLoader[dict[str, Tensor]]") -> Generator[dict[str, Tensor], None, None]:
    while True:
        yield from loader


def _finish(device: torch.device) -> None:
    """Waits for the batch alone: other streams may go on with the next ones."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
