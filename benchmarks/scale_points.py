"""The points of `python -m benchmarks scale`: one thing at one size, in a process of its own.

    python -m benchmarks.scale_points WHAT '{"size": 10000, ...}'      # prints a line of JSON

A process of its own, because memory that was freed stays with a process, and its peak is for ever.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from torch.nn import functional

from fastssl import config, demo, order
from fastssl.loader import Loader
from fastssl.memory import Memory
from fastssl.objectives import pirl
from pipelines import ops, patch_grid, permutations, pirl_jigsaw
from pipelines.readers import folder
from pipelines.readers.names import Names

BATCH = 256  # images a step of a process
DIMENSION = 128
CHECKOUT = Path(__file__).resolve().parents[1]
PEAK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
LINKS = 60_000  # names of one file: ext4 allows 65,000
CLASSES = 1000  # folders


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """What is to be measured."""

    size: int
    repeats: int = 3
    seconds: float = 1.0  # of the processes' measuring
    least: float = 0.2  # seconds that a repeat of something short is made to take
    threads: int = 1
    device: str = "cpu"  # of bank and negatives
    recipe: str = ""  # of processes
    overrides: tuple[str, ...] = ()
    entries: str = ""  # folder of the hard links, kept; empty: a temporary one


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What was measured."""

    name: str
    unit: str
    values: list[float]


def images(point: Point) -> Iterator[Quantity]:
    """The listing's arrays, made up, and the order plan as train.py asks for it."""
    samples, memory = held(lambda: listing(point.size))
    yield Quantity("listing in memory", "MB", [memory])
    epochs: list[float] = []
    peak = 0.0
    for epoch in range(point.repeats):

        def plan(epoch: int = epoch) -> float:
            began = time.perf_counter()
            order.shuffled(point.size, 0, epoch, 0, 1, BATCH)
            return time.perf_counter() - began

        seconds, used = peaked(plan)
        epochs.append(seconds)
        peak = max(peak, used)
    yield Quantity("order of an epoch", "s", epochs)
    yield Quantity("order of an epoch, memory", "MB", [peak])
    steps = order.steps_per_epoch(point.size, 1, BATCH)
    count = iter(range(10**9))

    def rows() -> np.ndarray:
        step = next(count) % steps
        last = point.repeats - 1
        return samples.usable[order.shuffled(point.size, 0, last, 0, 1, BATCH)[step]]

    yield Quantity("rows of a step", "ms", timed(rows, point))
    chosen = rows()
    names = timed(lambda: [samples.names[row] for row in chosen], point)
    yield Quantity("names of a step", "ms", names)


def files(point: Point) -> Iterator[Quantity]:
    """Real files, tiny PNGs in 100 folders, through list_samples; the page cache is warm."""
    with tempfile.TemporaryDirectory(prefix="fastssl-scale-") as made:
        root = Path(made) / "images"
        png = tiny_png()
        for number in range(point.size):
            path = root / f"n{number % 100:08d}" / f"n{number % 100:08d}_{number:08d}.png"
            if number < 100:
                path.parent.mkdir(parents=True)
            path.write_bytes(png)
        options = folder.Options(root=str(root))
        first: list[float] = []
        again: list[float] = []
        peak = 0.0
        for repeat in range(point.repeats):
            cache = Path(made) / f"cache-{repeat}"
            for times in (first, again):

                def scan(cache: Path = cache) -> float:
                    began = time.perf_counter()
                    found = folder.list_samples(options, cache=cache, say=lambda _: None)
                    assert len(found.usable) == point.size, "not every file was found"
                    return time.perf_counter() - began

                seconds, used = peaked(scan)
                times.append(seconds)
                peak = max(peak, used)
    yield Quantity("listing, every header read", "s", first)
    yield Quantity("listing, headers remembered", "s", again)
    yield Quantity("listing, memory", "MB", [peak])


def entries(point: Point) -> Iterator[Quantity]:
    """Real directory entries, as many as there are images: hard links to a few tiny PNGs.

    The first listing reads every header and is made once; the others find it kept. The last ones
    are two processes at the same time. A file with many names has one inode, which is sooner found
    than as many inodes would be.
    """
    with contextlib.ExitStack() as stack:
        made = point.entries or stack.enter_context(
            tempfile.TemporaryDirectory(prefix="fastssl-scale-")
        )
        root, cache = Path(made) / f"images-{point.size}", Path(made) / f"cache-{point.size}"
        if not root.exists():
            link(root, point.size)
        if not cache.exists():
            first = together(root, cache, "check", 1)
            yield Quantity("entries, every header read", "s", first["seconds"])
            yield Quantity("entries, every header read, peak", "B/image", first["peak"])
        for how in ("check", "trust"):
            runs = [together(root, cache, how, 1) for _ in range(point.repeats)]
            for key, unit in (("seconds", "s"), ("CPU", "s"), ("peak", "B/image")):
                values = [run[key][0] for run in runs]
                yield Quantity(f"entries kept, {how}, {key}", unit, values)
        two = together(root, cache, "check", 2)
        yield Quantity("entries kept, of two processes, seconds", "s", two["seconds"])
        yield Quantity("entries kept, of two processes, RSS", "B/image", two["RSS"])
        yield Quantity("entries kept, of two processes, PSS", "B/image", two["PSS"])


def bank(point: Point) -> Iterator[Quantity]:
    """The memory bank: made, read and written a batch at a time."""
    device = torch.device(point.device)

    def make() -> tuple[Memory, float]:
        began = time.perf_counter()
        made = Memory(point.size, DIMENSION, momentum=0.5, seed=0)
        return made, time.perf_counter() - began

    (memory, seconds), peak = peaked(make)
    yield Quantity("first rows", "s", [seconds])
    yield Quantity("peak while made", "MB", [peak])
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    memory = memory.to(device)
    if device.type == "cuda":
        yield Quantity("GPU memory", "MB", [(torch.cuda.memory_allocated() - before) / 1e6])
    else:
        size = memory.rows.element_size() * memory.rows.numel()
        yield Quantity("rows", "MB", [size / 1e6])
    numbers = torch.Generator().manual_seed(0)
    embedding = functional.normalize(torch.randn(BATCH, DIMENSION, generator=numbers), dim=1)
    embedding = embedding.to(device)

    def step() -> None:
        index = torch.randint(point.size, (BATCH,), generator=numbers).to(device)
        (memory.rows[index] * embedding).sum(1)
        memory.see(index, embedding)
        memory.finish_step()
        wait(device)

    yield Quantity("lookup and update", "ms", timed(step, point))


def negatives(point: Point) -> Iterator[Quantity]:
    """PIRL's loss (eq. 5) and InfoNCE, forward and backward, with so many shared negatives."""
    device = torch.device(point.device)
    memory = Memory(max(100_000, point.size + 1), DIMENSION, momentum=0.5, seed=0).to(device)
    numbers = torch.Generator().manual_seed(0)
    views = torch.randn(2, 64, DIMENSION, generator=numbers).to(device).requires_grad_()
    index = torch.arange(64, device=device)
    peak = 0.0
    for loss in ("nce", "infonce"):
        options = pirl.Options(loss=loss, negatives=point.size)

        def score(options: pirl.Options = options) -> None:
            drawn = memory.draw(options.negatives)
            unit = functional.normalize(views, dim=2)
            own = drawn == index[:, None]
            losses, _ = pirl.contrast(unit, memory.rows[index], memory.rows[drawn], own, options)
            losses.mean().backward()
            wait(device)

        score()  # the first call starts threads and allocators
        _, used = peaked(score)
        peak = max(peak, used)
        yield Quantity(f"loss {loss}, 2 x 64 views", "ms", timed(score, point))
    if device.type == "cpu":
        yield Quantity("loss, memory", "MB", [peak])


def sets(point: Point) -> Iterator[Quantity]:
    """A far-apart set of orders of 9 cells: computed, read from its file, drawn in a graph."""
    with tempfile.TemporaryDirectory(prefix="fastssl-scale-") as made:
        computed: list[float] = []
        read: list[float] = []
        for repeat in range(point.repeats):
            permutations._chosen.cache_clear()  # which a new process would not have either
            cache = Path(made) / str(repeat)
            for times in (computed, read):
                began = time.perf_counter()
                permutations.permutation_set(9, point.size, cache=cache)
                times.append(time.perf_counter() - began)
            if sum(computed) > 20:  # the first tells enough of what takes so long
                break
    yield Quantity("set computed", "s", computed)
    if not permutations.is_quick(9, point.size):
        yield Quantity("set from its file", "s", read)
    yield Quantity("draw", "CPU ms/image", _draws(point, 9, point.size))


def orders(point: Point) -> Iterator[Quantity]:
    """An order drawn from all of them, where no set is given: `size` is the number of orders."""
    cells = next(cells for cells in range(2, 10) if math.factorial(cells) == point.size)
    yield Quantity("draw from all orders", "CPU ms/image", _draws(point, cells, None))


def patches(point: Point) -> Iterator[Quantity]:
    """So many patches cut out of a resized image and coloured each on its own, by the CPU graph."""
    numbers = np.random.default_rng(0)
    pixels = [numbers.integers(0, 256, (255, 255, 3), np.uint8) for _ in range(32)]
    options = pirl_jigsaw.Options()

    def graph() -> Any:
        image = fn.external_source(lambda: pixels, layout="HWC")
        cells = np.arange(point.size)
        cut = patch_grid.cut_patches(image, cells, point.size, "cpu", crop=255, grid=3, patch=64)
        return ops.random_colors(cut, options, "cpu", point.size)

    yield Quantity("patches cut and coloured", "CPU ms/image", _cpu_ms(graph, len(pixels), point))


def process(point: Point) -> Iterator[Quantity]:
    """One loader of several: warms up, says so, waits for a line on stdin, then measures."""
    recipe = config.load(point.recipe, point.overrides)
    reader = recipe.data.module
    samples = reader.list_samples(recipe.data.options, cache=demo.cache(), say=lambda _: None)
    batch = min(64, len(samples.usable))
    plan = order.shuffled(len(samples.usable), 0, 0, 0, 1, batch)
    loading = dataclasses.replace(recipe.loader, threads=point.threads)
    loader = Loader(
        reader,
        samples,
        recipe.pipeline.module,
        recipe.pipeline.options,
        lambda step: samples.usable[plan[step % len(plan)]],
        batch=batch,
        seed=0,
        device=torch.device("cpu"),
        loading=loading,
        say=lambda _: None,
    )
    for _ in range(2 * loading.prefetch + 1):
        next(loader)
    rates: list[float] = []
    for _ in range(point.repeats):
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(loading.prefetch + 1):  # made while the others were waited for
            next(loader)
        count = 0
        began = time.perf_counter()
        while time.perf_counter() - began < point.seconds or not count:
            next(loader)
            count += 1
        rates.append(batch * count / (time.perf_counter() - began))
    yield Quantity("loader", "images/s", rates)
    yield Quantity("loader, memory", "MB", [_status("VmHWM")])


# ---- How ----------------------------------------------------------------------------------------


def listing(size: int) -> folder.Samples:
    """Samples as list_samples would give them, of files that do not exist."""
    text = np.full((size, 36), ord("0"), np.uint8)
    text[:] = np.frombuffer(b"n00000000/n00000000_000000000000.JPG", np.uint8)
    numbers = np.arange(size)
    for place in range(10):  # digits, the last first
        text[:, 31 - place] += ((numbers // 10**place) % 10).astype(np.uint8)
    names = Names(text.reshape(-1), np.arange(0, 36 * (size + 1), 36, dtype=np.int64))
    return folder.Samples(
        root="/nowhere",
        names=names,
        classes=("n00000000",),
        labels=np.zeros(size, np.int64),
        height=np.full(size, 375, np.int32),
        width=np.full(size, 500, np.int32),
        usable=np.arange(size),
        bad={},
        fingerprint="",
    )


def link(root: Path, count: int) -> None:
    """Makes `count` names in the folders of classes, of as few files as may have so many."""
    part = root.with_name(f"{root.name}.part")
    part.mkdir(parents=True)
    file, number = part, 0
    for name in range(min(CLASSES, count)):
        here = part / f"n{name:08d}"
        here.mkdir()
        for image in range(name, count, CLASSES):
            path = here / f"n{name:08d}_{image // CLASSES:08d}.png"
            if number % LINKS == 0:
                path.write_bytes(tiny_png())
                file = path
            else:
                os.link(file, path)
            number += 1
    part.rename(root)


def together(root: Path, cache: Path, how: str, count: int) -> dict[str, list[float]]:
    """Seconds and memory of new processes that list a folder at the same time and hold it.

    Memory is what the listing and the order of an epoch add to a process, an image.
    """
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.scale_listing", str(root), str(cache), how],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    found: dict[str, list[float]] = defaultdict(list)
    try:
        for line in ("go\n", "tell\n"):  # all are imported, then all have listed
            for child in children:
                assert child.stdin is not None, "a pipe was asked for"
                assert child.stdout is not None, "a pipe was asked for"
                if child.stdout.readline() != "ready\n":
                    raise RuntimeError(f"{root} could not be listed")
            for child in children:
                assert child.stdin is not None, "a pipe was asked for"
                child.stdin.write(line)
                child.stdin.flush()
        told = []
        for child in children:  # each waits with its memory until all have told
            assert child.stdout is not None, "a pipe was asked for"
            told.append(json.loads(child.stdout.readline()))
        for each in told:
            for key, value in each.items():
                found[key].append(value)
        return found
    finally:
        for child in children:
            child.kill()
            child.communicate()


def timed(run: Callable[[], object], point: Point) -> list[float]:
    """Milliseconds of a call, one value a repeat; short calls are made often."""
    run()
    began = time.perf_counter()
    run()
    once = time.perf_counter() - began
    calls = max(1, min(100_000, int(point.least / max(once, 1e-7))))
    values = []
    for _ in range(point.repeats):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        values.append(1000 * (time.perf_counter() - began) / calls)
    return values


def peaked(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` gives, and by how many MB the process's memory peaked above where it stood.

    VmHWM set back by clear_refs, proc(5): ru_maxrss of a new process starts at its parent's size.
    """
    _trim()
    with contextlib.suppress(OSError):  # not everywhere allowed; then the peak is that of a start
        PEAK.write_text("5")
    before = _status("VmRSS")
    result = run()
    return result, max(0.0, _status("VmHWM") - before)


def held(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` gives, and how many MB the process holds more for it."""
    _trim()
    before = _status("VmRSS")
    result = run()
    _trim()
    return result, max(0.0, _status("VmRSS") - before)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tiny_png() -> bytes:
    """A PNG of 8 x 8 gray pixels: 67 bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    side = (8).to_bytes(4, "big")
    head = chunk(b"IHDR", side + side + bytes([8, 0, 0, 0, 0]))  # 8 bits, gray
    body = chunk(b"IDAT", zlib.compress(bytes(9 * 8)))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def _trim() -> None:
    """Gives back to the system what is free but kept, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> float:
    """A line of /proc/self/status in MB (1e6 bytes)."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"{STATUS} has no {key}: this kernel does not tell memory")


def _draws(point: Point, cells: int, count: int | None) -> list[float]:
    """CPU milliseconds to draw an order, an image."""
    return _cpu_ms(lambda: patch_grid.random_permutation(cells, count), BATCH, point)


def _cpu_ms(graph: Callable[[], Any], batch: int, point: Point) -> list[float]:
    """CPU milliseconds an image of a DALI graph on the CPU, whatever else the machine does."""
    none: Any = None  # no GPU
    pipeline = Pipeline(batch_size=batch, num_threads=1, device_id=none, seed=0)
    with pipeline:
        pipeline.set_outputs(graph())
    pipeline.build()
    for _ in range(5):
        pipeline.run()
    values = []
    for _ in range(point.repeats):
        runs = 0
        end = time.perf_counter() + point.least
        cpu = time.process_time()
        while time.perf_counter() < end or runs < 10:
            pipeline.run()
            runs += 1
        values.append(1000 * (time.process_time() - cpu) / (runs * batch))
    return values


POINTS: dict[str, Callable[[Point], Iterator[Quantity]]] = {
    each.__name__: each
    for each in (images, files, entries, bank, negatives, sets, orders, patches, process)
}


def main(arguments: list[str]) -> None:
    """Measures what the parent asks for."""
    what, given = arguments
    point = Point(**json.loads(given))
    torch.set_num_threads(point.threads)
    found = [dataclasses.asdict(each) for each in POINTS[what](point)]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
