"""Real loaders for `tune`: the images, a candidate while it is measured, short and long turns."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline

from benchmarks import method
from benchmarks.halving import Failed, Turn
from fastssl import demo, loader
from fastssl.config import Recipe
from fastssl.loader import DataError, Loader

IMAGES = 4096  # of the listing at most, drawn at random, to fit into the page cache
BATCH_SECONDS = 0.25  # that a batch takes at most, or turns would be long


class Images:
    """The recipe's images, or some of them, in the page cache."""

    def __init__(self, recipe: Recipe, until: float) -> None:
        """Lists the images and reads them.

        Args:
            recipe: its data and pipeline count.
            until: the time, by perf_counter, after which no more are read, and used.
        """
        if recipe.demo:
            demo.render()
        self.recipe, self._said = recipe, set[str]()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.samples = recipe.data.module.list_samples(
            recipe.data.options, cache=demo.cache(), say=print
        )
        usable = self.samples.usable
        order = np.random.default_rng(0).permutation(len(usable))
        rows, paths = usable[order[:IMAGES]], []
        for row in rows:
            path = self.samples.path(row)
            if time.perf_counter() > until and len(paths) >= 64:
                break
            if os.path.isfile(path):  # not for stores, which hold many images in a file
                method.read_into_cache([path])
                paths.append(path)
        self.are_warm = bool(paths)
        self.rows = rows[: len(paths)] if paths else rows
        self.count = len(self.rows)
        self.text = f"{self.count:,} of {len(usable):,} images of {self.samples.root}"

    def start(self, options: loader.Options, batch: int) -> Loader:
        """A loader of them, on the GPU if there is one."""
        return Loader(
            self.recipe.data.module,
            self.samples,
            self.recipe.pipeline.module,
            self.recipe.pipeline.options,
            lambda step: self.rows[(np.arange(batch) + step * batch) % len(self.rows)],
            batch=batch,
            seed=0,
            device=self.device,
            loading=options,
            say=self._say_once,
        )

    def leave_out(self, rows: Iterable[int]) -> None:
        """Takes rows out that can't be decoded: each loader would stumble over them anew."""
        self.rows = np.setdiff1d(self.rows, list(rows), assume_unique=True)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            print(text)


class Running:
    """A candidate while it is measured."""

    def __init__(self, images: Images, options: loader.Options, batch: int, name: str) -> None:
        """Nothing is made before the first batch."""
        self._loader: Loader | None = images.start(options, batch)
        self._images, self._batch, self._name = images, batch, name

    def run(self) -> int:
        """Takes a batch, on the device.

        Raises:
            Failed: DALI, the driver or the memory refuses.
        """
        assert self._loader is not None, "closed"
        try:
            next(self._loader)
            if self._images.device.type == "cuda":
                torch.cuda.current_stream(self._images.device).synchronize()
        except (RuntimeError, MemoryError, DataError) as error:
            raise Failed(self._name, reason(error)) from error
        return self._batch

    def close(self) -> None:
        """Ends the threads and frees the memory."""
        if self._loader is not None:
            self._images.leave_out(self._loader.skipped)
            self._loader.close()
        self._loader = None


def reason(error: Exception) -> str:
    """The telling line of what DALI or torch says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line and "Critical" not in line]
    return (telling or lines or [type(error).__name__])[0][:200]


@dataclass(frozen=True)
class Look:
    """What is known of the present settings before they are measured."""

    batch: int  # images, for all turns
    batch_seconds: float
    overhead: float  # seconds of a turn before its clock runs


def first_look(images: Images, present: loader.Options, most: int) -> Look:
    """Finds a batch that takes no more than BATCH_SECONDS, and what a turn costs beside.

    Args:
        images: to load.
        present: the recipe's settings.
        most: images of the batch in training.

    Raises:
        ValueError: the recipe's own settings don't run.
    """
    small = min(8, most)
    running = Running(images, present, small, "present")
    try:
        began = time.perf_counter()
        running.run()
        build = time.perf_counter() - began
        for _ in range(present.prefetch + 2):
            running.run()
        began, runs = time.perf_counter(), 0
        while time.perf_counter() - began < 2 * BATCH_SECONDS or runs < 2:
            running.run()
            runs += 1
        rate = small * runs / (time.perf_counter() - began)
    except Failed as failure:
        raise ValueError(f"the recipe's own settings can't run here: {failure}") from failure
    finally:
        running.close()
    batch = small
    while 2 * batch <= min(most, rate * BATCH_SECONDS):
        batch *= 2
    return Look(batch, batch / rate, build + (present.prefetch + 2) * batch / rate)


def short_turn(
    images: Images, options: loader.Options, batch: int, seconds: float, name: str
) -> Turn:
    """A turn of a loader built for it, from the time that as many are taken as are made.

    Raises:
        Failed: it does not run.
    """
    running = Running(images, options, batch, name)
    try:
        for _ in range(options.prefetch + 2):  # what was made ahead, and one that was begun
            running.run()
        done = runs = 0
        cpu, began = method.cpu_seconds(), time.perf_counter()
        while time.perf_counter() - began < seconds or runs <= options.prefetch:
            done += running.run()
            runs += 1
        wall = time.perf_counter() - began
        return Turn(done / wall, 1000 * (method.cpu_seconds() - cpu) / done)
    finally:
        running.close()


@dataclass(frozen=True)
class Turns:
    """What `take_turns` measured."""

    settings: dict[str, tuple[loader.Options, int]]  # by name, with the batch
    measured: dict[str, method.Measured]
    failed: dict[str, str]  # the reason, in a line


def take_turns(
    settings: dict[str, tuple[loader.Options, int]],
    images: Images,
    *,
    repeats: int,
    seconds: float,
) -> Turns:
    """Measures all by turns; where one fails, the others anew."""
    left, failed = dict(settings), {}
    while left:
        contenders = []
        for name, (options, batch) in left.items():
            running = Running(images, options, batch, name)
            contenders.append(
                method.Contender(name, running.run, running.close, queue=options.prefetch)
            )
        try:
            measured = method.alternate(contenders, repeats=repeats, seconds=seconds)
        except Failed as failure:
            failed[failure.who] = str(failure)
            del left[failure.who]
        else:
            return Turns(settings, measured, failed)
    return Turns(settings, {}, failed)


def settings_asked_for(images: Images) -> set[str]:
    """Which settings of decoding the recipe's graph looks at, on this device: others do nothing."""
    recipe, gpu = images.recipe, images.device.type == "cuda"
    decoding = _Asked()
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=0 if gpu else None)  # pyright: ignore[reportArgumentType]  None: no GPU
    with pipeline:
        image, index = recipe.data.module.source(
            images.samples, lambda step: np.zeros(1, np.int64), decoding
        )
        backend = "gpu" if gpu else "cpu"
        recipe.pipeline.module.graph(image, index, recipe.pipeline.options, backend)
    return decoding.asked


class _Asked:
    """Settings of decoding that remember which of them were looked at."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    @property
    def decoder(self) -> Literal["auto", "cpu"]:
        self.asked.add("decoder")
        return "auto"

    @property
    def hw_decoder_load(self) -> float:
        self.asked.add("hw_decoder_load")
        return 0.65

    @property
    def region(self) -> bool:
        self.asked.add("region")
        return True
