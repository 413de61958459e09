"""What `python -m fastssl.doctor` tells of a recipe: valid, images, disk, first batch, the limit.

One process's share of the work, for seconds: whether it runs, and which of loader and step is the
slower. `python -m benchmarks stages` measures the same with repeats and spread.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl import config, demo, labelled, loader, machine, optim, order, run_folder, trained
from fastssl.config import Recipe
from fastssl.doctor import Line, guarded
from fastssl.loader import DataError, Loader, output_names, threads_per_process

LOADER_SECONDS = STEP_SECONDS = 3.0
MOST_IMAGES = {"cpu": 64, "cuda": 256}  # of a batch: more takes longer and is not faster
DISK_BYTES, DISK_FILES, DISK_SECONDS = 64_000_000, 512, 3.0
PIECE = 1 << 20  # bytes of a store's file
SLOW_START = 2.0  # seconds to the first batch
FREE = 2.0  # GiB where the run folder comes: checkpoints


def check_recipe(asked: dict[str, Any]) -> Iterator[Line]:
    """All lines about a recipe.

    Args:
        asked: path, overrides, and say, which is told what long waits are for.
    """
    torch.set_num_threads(threads_per_process(1))
    try:
        recipe = config.load(asked["path"], asked["overrides"])
    except config.RecipeError as error:
        for text in str(error).splitlines():
            yield Line("FAIL", "recipe", text)
        return
    parts = f"{recipe.pipeline.use}, {recipe.objective.use}, {recipe.backbone.use}"
    yield Line("ok", "recipe", f"{asked['path']} is valid: {parts}")
    yield from guarded("run folder", _run_folder, recipe)

    try:
        if recipe.demo:
            demo.render(say=asked["say"])
        reader = recipe.data.module
        began = time.perf_counter()
        samples = reader.list_samples(recipe.data.options, cache=demo.cache(), say=asked["say"])
        seconds = time.perf_counter() - began
        names = output_names(reader, samples, recipe.pipeline.module, recipe.pipeline.options)
        config.check_outputs(recipe.objective, names, recipe.pipeline)
    except ValueError as error:
        for text in str(error).splitlines():
            yield Line("FAIL", "images" if "data.root" in text else "recipe", text)
        return
    yield from guarded("images", _images, recipe, samples, seconds)
    yield from _speed(recipe, samples, asked["say"])


def _run_folder(recipe: Recipe) -> Iterator[Line]:
    """Room for checkpoints, and the right to write them."""
    folder = Path(recipe.train.out or Path("runs") / recipe.name).expanduser().absolute()
    place = next(each for each in (folder, *folder.parents) if each.exists())
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize / 2**30
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Line("FAIL", "run folder", f"{folder} can't be written: name another: train.out=...")
    elif free < FREE:
        text = f"{free:.1f} GiB free at {folder}: make room, or name another: train.out=..."
        yield Line("FAIL", "run folder", text)
    else:
        try:
            run_folder.open_run(folder, recipe.train.resume, recipe.values)  # reads only
        except config.RecipeError as error:
            yield Line("FAIL", "run folder", str(error))
            return
        yield Line("ok", "run folder", f"{folder}, {free:,.0f} GiB free")


def _images(recipe: Recipe, samples: Any, seconds: float) -> Iterator[Line]:
    usable, bad = len(samples.usable), len(samples.bad)
    where = "built-in, with the recipe's demo section" if recipe.demo else samples.root
    kinds = f", {len(samples.classes)} classes" if samples.classes else ""
    text = f"{usable:,} usable{kinds} ({where}), listed in {seconds:.1f} s"
    if usable < recipe.train.batch:
        yield Line(
            "FAIL",
            "images",
            f"{text}: fewer than one batch: give train.batch at most {usable} (it is "
            f"{recipe.train.batch}) or more images",
        )
    else:
        yield Line("ok", "images", text)
    if bad:
        row, reason = next(iter(samples.bad.items()))
        yield Line(
            "note",
            "images",
            f"{bad:,} can't be decoded and are left out, such as {samples.path(row)} ({reason}): "
            "repair or remove them, or leave it so (data.bad=skip)",
        )


def _speed(recipe: Recipe, samples: Any, say: Callable[[str], None]) -> Iterator[Line]:
    """First batch, disk, loader and step, and which of them is the limit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processes = max(1, torch.cuda.device_count())
    loading = recipe.loader
    if loading.threads is None:
        loading = replace(loading, threads=threads_per_process(processes))
    share = recipe.train.batch // (processes * recipe.train.accumulate)
    batch = max(1, min(share, MOST_IMAGES[device.type], len(samples.usable)))
    rows = _rows(samples, recipe.train.seed, batch)
    rates: dict[str, float] = {}

    def disk() -> Iterator[Line]:
        assert loading.threads is not None, "resolved above"
        all_of_them = replace(recipe.data.options, limit=None)  # files hold those that are left out
        whole = recipe.data.module.list_samples(all_of_them, cache=demo.cache(), say=lambda _: None)
        yield from _disk(whole, loading.threads, rates)

    def loads() -> Iterator[Line]:
        made = Loader(
            recipe.data.module,
            samples,
            recipe.pipeline.module,
            recipe.pipeline.options,
            rows,
            batch=batch,
            seed=recipe.train.seed,
            device=device,
            loading=loading,
            say=say,
        )
        yield from _loads(made, loading, batch, device, rates, first)

    def steps() -> Iterator[Line]:
        yield from _steps(recipe, samples, first, device, rates)

    first: dict[str, Tensor] = {}
    yield from guarded("disk", disk)
    yield from guarded("first batch", loads)
    if first:
        yield from guarded("step", steps)
    if {"loader", "step"} <= rates.keys():
        yield limit(rates, device.type)


def _rows(samples: Any, seed: int, batch: int) -> Callable[[int], np.ndarray]:
    """The rows of a step, in the order in which training reads them: by chunks where there are."""
    count, chunks = len(samples.usable), samples.chunks
    if chunks is None:
        plan = order.shuffled(count, seed, 0, 0, 1, batch)
    else:
        plan = order.by_chunks(chunks, seed, 0, 0, 1, batch, samples.window)
    return lambda step: samples.usable[plan[step % len(plan)]]


def _disk(samples: Any, threads: int, rates: dict[str, float]) -> Iterator[Line]:
    """Reads some of the files, put out of the page cache before where that can be done."""
    pieces, image_bytes = _pieces(samples)
    if not pieces:
        is_away = labelled.is_url(samples.path(int(samples.usable[0])))
        why = "images are in an object store" if is_away else "it holds no files to read"
        yield Line("note", "disk", f"not measured: {samples.root}: {why}")
        return
    end = time.perf_counter() + DISK_SECONDS
    count = cold = read = 0
    seconds = 0.0
    with ThreadPoolExecutor(threads) as pool:  # as many as the loader has
        for start in range(0, len(pieces), 32):
            block = pieces[start : start + 32]
            cold += sum(pool.map(_drop, block))  # not timed
            began = time.perf_counter()
            read += sum(pool.map(_read, block))
            seconds += time.perf_counter() - began
            count += len(block)
            if read > DISK_BYTES or time.perf_counter() > end:
                break
    rate = read / seconds / image_bytes
    if cold == count:
        rates["disk"] = rate
        cache = "cold"
    else:
        cache = f"{count - cold} of {count} pieces from the page cache, which keeps them"
    system = machine.file_system(samples.root)["type"] or "unknown file system"
    text = f"{short(read / 1e6 / seconds)} MB/s, {short(rate)} images/s ({cache}; {system},"
    yield Line("ok", "disk", f"{text} {threads} threads, {read / 1e6:,.0f} MB read)")


Piece = tuple[str, int, int]  # path, offset and bytes


def _pieces(samples: Any) -> tuple[list[Piece], float]:
    """What to read, in random order, and the mean bytes of an image.

    Files of some images; of a store that holds many in one file, megabytes of its largest files.
    """
    dice = np.random.default_rng(0)
    rows = dice.permutation(samples.usable)[:DISK_FILES].tolist()
    paths = [path for path in (samples.path(row) for row in rows) if os.path.isfile(path)]
    if paths:
        pieces = [(path, 0, os.path.getsize(path)) for path in paths]
        return pieces, max(1.0, sum(size for _, _, size in pieces) / len(pieces))
    if not os.path.isdir(samples.root):  # a list of urls, an object store
        return [], 1.0
    with os.scandir(samples.root) as entries:
        files = [(each.path, each.stat().st_size) for each in entries if each.is_file()]
    files = [(path, size) for path, size in files if size >= PIECE]
    pieces = [
        (path, offset, PIECE)
        for path, size in files
        for offset in range(0, size - PIECE + 1, PIECE)
    ]
    dice.shuffle(pieces)
    return pieces[:DISK_FILES], max(1.0, sum(size for _, size in files) / len(samples))


def _drop(piece: Piece) -> bool:
    """Puts it out of the page cache; whether it is out."""
    path, offset, size = piece
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:  # it would have to wait for the disk
            return True
        except OSError:  # a file system that can't tell
            return False
        return False
    finally:
        os.close(file)


def _read(piece: Piece) -> int:
    path, offset, size = piece
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return len(file.read(size))


def _loads(
    made: Loader,
    loading: loader.Options,
    batch: int,
    device: torch.device,
    rates: dict[str, float],
    first: dict[str, Tensor],
) -> Iterator[Line]:
    """The first batch, kept in `first`, and images/s once the batches made ahead are used up."""
    began = time.perf_counter()
    try:
        first.update({name: each.clone() for name, each in next(made).items()})
        _wait(device)
        seconds = time.perf_counter() - began
        for _ in range(loading.prefetch + 1):
            next(made)
        _wait(device)
        after, count = time.perf_counter(), 0
        while time.perf_counter() - after < LOADER_SECONDS:
            next(made)
            count += 1
        _wait(device)
    except DataError as error:
        yield Line("FAIL", "first batch", str(error))
        return
    rates["loader"] = batch * count / (time.perf_counter() - after)
    shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in first.items())
    text = f"{1000 * seconds:,.0f} ms for {batch} images on {device.type}: {shapes}"
    if seconds > SLOW_START + batch / rates["loader"]:
        remedy = "a cold page cache or a busy machine; a second run tells"
        yield Line("note", "first batch", f"{text}: {remedy}")
    else:
        yield Line("ok", "first batch", text)
    for path in made.skipped.values():
        yield Line("note", "images", f"skipped: {path}: remove it or repair it")


def _steps(
    recipe: Recipe,
    samples: Any,
    first: dict[str, Tensor],
    device: torch.device,
    rates: dict[str, float],
) -> Iterator[Line]:
    """Images/s of forward, backward and optimizer on a batch that stays on the device."""
    torch.manual_seed(recipe.train.seed)
    try:
        objective: Any = recipe.objective.module.Objective(
            trained.fresh(recipe.backbone.module, recipe.backbone.options),
            recipe.objective.options,
            images=len(samples),
            classes=recipe.pipeline.options.classes,
            labels=None if samples.labels is None else torch.from_numpy(samples.labels),
            seed=recipe.train.seed,
        )
        objective = objective.to(device=device, memory_format=torch.channels_last).train()
        optimizer = optim.optimizer(recipe.optim, objective)
        kind = _precision(recipe, device)

        def step(images: int) -> float:
            """Seconds of one step."""
            tensors = {name: each[:images] for name, each in first.items()}
            began = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast(device.type, kind) if kind is not None else nullcontext():
                loss, _ = objective(**tensors)
            loss.backward()
            optimizer.step()
            objective.finish_step()
            _wait(device)
            return time.perf_counter() - began

        batch = len(next(iter(first.values())))
        images, seconds, count = batch, 0.0, 0
        if device.type == "cpu":  # a whole batch of a large network can take minutes
            few = min(2, batch)
            once = step(few)
            images = max(few, min(batch, int(few * 2.0 / once)))
            if images == few and once >= STEP_SECONDS:  # its start is little beside it
                seconds, count = once, 1
        if not count:
            step(images)
        while seconds < STEP_SECONDS:
            seconds += step(images)
            count += 1
    except ValueError as error:
        yield Line("FAIL", "step", str(error))
        return
    except torch.OutOfMemoryError as error:
        remedy = "give train.accumulate a larger value, a smaller train.batch or more GPUs"
        yield Line("FAIL", "step", f"{str(error).splitlines()[0]}: {remedy}")
        return
    rates["step"] = images * count / seconds
    precision = "fp32" if kind is None else str(kind).removeprefix("torch.")
    memory = machine.gpu_memory_mb() if device.type == "cuda" else None
    held = "" if memory is None else f", {memory:,.0f} MB of GPU memory with the loader"
    text = f"{short(rates['step'])} images/s, {images} images at a time, {precision}{held}"
    yield Line("ok", "step", text)


def limit(rates: dict[str, float], device: str) -> Line:
    """Which of disk, loader and step binds, with what would move it.

    Args:
        rates: images/s of loader and step, and of the disk if it was read cold.
        device: cpu or cuda: on the CPU loader and step share the cores.
    """
    load, step = rates["loader"], rates["step"]
    both = f"loader {short(load)} images/s, step {short(step)}"
    if device == "cpu":
        both += f", by turns on the same cores about {short(1 / (1 / load + 1 / step))}"
    measure = "`python -m benchmarks stages RECIPE` says which stage"
    if rates.get("disk", load) < min(load, step):
        return Line(
            "note",
            "limit",
            f"the disk, while files are not in the page cache: {short(rates['disk'])} images/s; "
            f"{both}: a local or faster disk, or `python -m fastssl.data pack`; {measure}",
        )
    if load < step:
        return Line(
            "note",
            "limit",
            f"the loader: {both}: {measure}, `python -m benchmarks tune RECIPE` looks for better "
            "settings, `python -m fastssl.data pack --short-side 292` makes decoding cheap",
        )
    return Line("ok", "limit", f"the step: {both}: a faster loader would gain little; {measure}")


def short(rate: float) -> str:
    """Two or more digits, whatever the size."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _precision(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """What training would compute in; None: float32."""
    asked = recipe.train.precision
    if asked == "auto" and device.type == "cuda":
        asked = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(asked)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
