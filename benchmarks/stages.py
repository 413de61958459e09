"""Each stage of a run alone, on the same files, and the loop: which of them binds.

  read          bytes through the recipe's reader, nothing behind it; read_cold: from the disk
  decode        whole images, uint8, where the recipe decodes them; none where pixels are stored
  decode_limit  libjpeg-turbo on all allowed cores, from memory
  graph         the recipe's DALI graph, bare: pipe.run()
  loader        L: the same through fastssl.loader; the consumer does nothing
  step          G: forward, backward and optimizer on a batch that stays where it is
  end_to_end    E: the loop, next(loader) and the step
  interference  G again while the loader runs unconsumed
All but read_cold is measured by turns in one process, on at most 1,000 of the recipe's images that
were read before. A step takes the recipe's batch, or as much of it as a second and the GPU's memory
allow: on a CPU that may be 2 images where a run has 1,024.

Beside them, once: listing and first_batch (seconds), and gpu_memory (MB, by NVML).
"""

import argparse
import gc
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# As in fastssl/train.py: OpenMP's threads must not spin on cores that the loader's need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from nvidia.dali import backend as dali_backend
from nvidia.dali.data_node import DataNode
from torch import Tensor

from benchmarks import binding, decode_limit, method, promises, result, same_files, step
from benchmarks.__main__ import run_command
from benchmarks.method import Contender, Measured
from benchmarks.result import Row, number
from benchmarks.same_files import Files
from fastssl import config, demo
from fastssl.config import Recipe
from fastssl.loader import Loader, Options, output_names, threads_per_process
from fastssl.machine import gpu_memory_mb
from pipelines import ops
from pipelines.images import Image

HELP = "which stage binds a recipe on this machine, and what would move it"

LOADER_BATCH = 64  # images, where a step takes fewer: of small batches DALI's threads idle
STEP_SECONDS = 1.0
SECONDS = 1.0  # of a turn; with the warm-up, three of each stage come to a minute and a half
SLOW_STEP = 1.5  # seconds; a dozen of them beside a loader on the same cores take a minute more
# In the rows of the JSON, beside the rates: medians of benchmarks.binding.derived.
RATIOS = {
    "decode": ("decode_to_limit",),
    "loader": ("loader_to_graph", "loader_to_decode", "loader_to_limit"),
    "end_to_end": ("stall", "overlap", "expected", "loop_to_expected"),
    "interference": ("interference",),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, what differs from it, and the common options."""
    parser.add_argument("recipe", help="a YAML file of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    method.add_common(parser, seconds=SECONDS)


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints the table and what follows from it, writes the JSON.

    Raises:
        ValueError: a mistake in the recipe or its data.
    """
    began = time.perf_counter()
    recipe = config.load(arguments.recipe, arguments.overrides)
    threads = torch.get_num_threads()
    try:
        bench = _prepare(recipe, arguments.threads)
        _say("\n".join(bench.remarks))
        measured = method.alternate(
            _contenders(bench), repeats=arguments.repeats, seconds=arguments.seconds, say=_say
        )
    finally:
        torch.set_num_threads(threads)
    cold = same_files.cold_rates(
        bench.files,
        bench.loading,
        batch=bench.loader_batch,
        repeats=arguments.repeats,
        seconds=arguments.seconds,
    )
    rows = _rows(bench, measured, cold)
    conclusions = _conclusions(bench, measured, cold)
    _say(f"\n{result.table([_without_ratios(row) for row in rows])}\n")
    _say("\n".join(conclusions))
    _say(f"\nmeasured in {time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        settings = {
            "recipe": recipe.path,
            "overrides": arguments.overrides,
            "repeats": arguments.repeats,
            "seconds": arguments.seconds,
            "note": arguments.note,
            **bench.settings,
        }
        root = Path(bench.files.samples.root)
        made = result.make("stages", rows, settings, conclusions, data=root, page_cache="warm")
        result.write(arguments.out, made)
    return 0


# ---- What is measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bench:
    """What the stages are made of."""

    recipe: Recipe
    files: Files
    device: torch.device
    loading: Options
    loader: Loader
    loader_batch: int  # images
    loop_loader: Loader  # of the step's batch; the same one where that is the loader's
    step: step.Step
    resident: dict[str, Tensor]  # the step's batch
    step_batch: int
    step_seconds: float
    loader_keeps_up: bool  # its queue is full at every step, from the first one on
    jpegs: list[bytes]  # for the decode limit
    limit: tuple[str, decode_limit.Decode] | None  # the package that decodes them
    region: bool  # the graph decodes no more of an image than its crop
    views: int  # of an image
    patches: int
    listing_seconds: float
    first_seconds: float  # to the first batch
    first_batch: int  # images
    gpu_memory: dict[str, float]  # MB; none without a GPU
    settings: dict[str, Any]  # for the result
    remarks: list[str]  # for the user


def _prepare(recipe: Recipe, threads: int) -> _Bench:
    """Lists and reads the images, makes loader and step, finds the batch that a step can take.

    Raises:
        ValueError: a mistake in the recipe or its data.
    """
    if recipe.demo:
        _say("data.root is not given: the built-in images and the recipe's demo section are used")
        demo.render(say=_say)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loading = replace(recipe.loader, threads=recipe.loader.threads or threads)
    reader, graph = recipe.data.module, recipe.pipeline
    began = time.perf_counter()
    samples = reader.list_samples(recipe.data.options, cache=demo.cache(), say=_say)
    listing_seconds = time.perf_counter() - began
    names = output_names(reader, samples, graph.module, graph.options)
    config.check_outputs(recipe.objective, names, graph)
    asked = min(recipe.train.batch // recipe.train.accumulate, len(samples.usable))
    loader_batch = min(asked, LOADER_BATCH)

    def loader_of(batch: int, rows: Any) -> Loader:
        return Loader(
            reader,
            samples,
            graph.module,
            graph.options,
            same_files.shuffled(rows, recipe.train.seed, batch),
            batch=batch,
            seed=recipe.train.seed,
            device=device,
            loading=loading,
            say=_say,
        )

    def first_batch() -> float:
        began = time.perf_counter()
        next(loader_of(loader_batch, same_files.spread_evenly(samples.usable)))
        _finish(device)
        return time.perf_counter() - began

    memory = {"start": _gpu_memory(device)}
    first_seconds, first_images = first_batch(), loader_batch
    files = same_files.choose(recipe, samples, loading, _say)
    loader = loader_of(loader_batch, files.rows)
    first = next(loader)
    memory["loader"] = _gpu_memory(device)
    if device.type == "cpu":
        torch.set_num_threads(threads_per_process(1))
    step_once = step.make(recipe, samples)

    def draw(images: int) -> dict[str, Tensor]:
        if images <= loader_batch:
            return {name: value[:images] for name, value in first.items()}
        return next(loader_of(images, files.rows))

    resident, step_seconds = step.fitting(step_once, draw, asked, STEP_SECONDS)
    memory["step"] = _gpu_memory(device)
    step_batch = len(next(iter(resident.values())))
    if step_batch > loader_batch:
        loader, loader_batch = loader_of(step_batch, files.rows), step_batch

    limit = decode_limit.decoder()
    jpegs: list[bytes] = []
    if limit is not None:
        jpegs = decode_limit.decodable(files.contents, limit[1], threads_per_process(1))
    views, patches = _frames(recipe, first)
    settings = {
        "device": str(device),
        "precision": recipe.train.precision,
        "pipeline": recipe.values["pipeline"],
        "backbone": recipe.values["backbone"],
        "objective": recipe.values["objective"],
        "loader": asdict(loading),
        "loader_batch": loader_batch,
        "step_batch": step_batch,
        "recipe_batch": asked,
        "views": views,
        "patches": patches,
        "images": files.facts,
    }
    remarks = [_description(recipe, files, device, loading)]
    if recipe.loader.threads is not None and recipe.loader.threads != threads:
        remarks.append(
            f"the loader has loader.threads={recipe.loader.threads}, as the recipe says: --threads"
            f" ({threads}) counts where it says nothing"
        )
    if step_batch < asked:
        remarks.append(
            f"a step of {asked:,} images {_why_not(device, asked, step_seconds, step_batch)}: step"
            f" and loop take {step_batch} at a time here, the other stages {loader_batch}"
        )
    if step_seconds > SLOW_STEP:
        remarks.append(f"interference is left out: a step takes {step_seconds:.1f} s")
    if files.together:
        remarks.append("read copies the bytes, which the loader does not: the store is mapped")
    if files.pixels_stored:
        remarks.append("decode is left out: pixels are stored, nothing is decoded")
    remarks += _limit_remarks(files, jpegs, limit is not None)
    return _Bench(
        recipe=recipe,
        files=files,
        device=device,
        loading=loading,
        loader=loader,
        loader_batch=loader_batch,
        loop_loader=loader if step_batch == loader_batch else loader_of(step_batch, files.rows),
        step=step_once,
        resident=resident,
        step_batch=step_batch,
        step_seconds=step_seconds,
        loader_keeps_up=step_seconds / step_batch > first_seconds / first_images,
        jpegs=jpegs,
        limit=limit,
        region=same_files.decodes_region(recipe, samples, loading),
        views=views,
        patches=patches,
        listing_seconds=listing_seconds,
        first_seconds=first_seconds,
        first_batch=first_images,
        gpu_memory={stage: held for stage, held in memory.items() if held is not None},
        settings=settings,
        remarks=remarks,
    )


def _contenders(bench: _Bench) -> list[Contender]:
    """The stages, each as something that does a batch."""
    prefetch, files, graph = bench.loading.prefetch, bench.files, bench.recipe.pipeline
    backend = "cpu" if bench.device.type == "cpu" else "gpu"

    def bare(name: str, body: same_files.Body, device: torch.device) -> Contender:
        made = same_files.pipeline(
            files, body, bench.loading, batch=bench.loader_batch, device=device
        )

        def run() -> int:
            if device.type == "cpu":
                made.run()
            else:
                made.run(torch.cuda.current_stream())
                _finish(device)
            return bench.loader_batch

        return Contender(name, run, queue=prefetch)

    def decode(image: Image, index: DataNode) -> list[DataNode]:
        return [ops.decode(image, backend).pixels, index]

    def task(image: Image, index: DataNode) -> list[DataNode]:
        outputs = graph.module.graph(image, index, graph.options, backend).values()
        return [node.gpu() if backend == "gpu" else node for node in outputs]  # as in the Loader

    lock = threading.Lock()  # two stages have one loader, and one of them draws in a thread

    def draw(loader: Loader) -> dict[str, Tensor]:
        with lock:
            loader.data_wait()  # forgets its events
            return next(loader)

    pace = _Pace(bench.device)

    def load() -> int:
        draw(bench.loader)
        _finish(bench.device)
        return bench.loader_batch

    def train() -> int:
        bench.step(bench.resident)
        pace.one_ahead()
        return bench.step_batch

    def loop() -> int:
        bench.step(draw(bench.loop_loader))
        pace.one_ahead()
        return bench.step_batch

    contenders = [
        bare("read", same_files.reading(files), torch.device("cpu")),
        *([] if files.pixels_stored else [bare("decode", decode, bench.device)]),
        bare("graph", task, bench.device),
        Contender("loader", load, queue=prefetch),
        Contender("step", train, queue=0 if bench.device.type == "cpu" else 1),
        Contender("end_to_end", loop, queue=0 if bench.loader_keeps_up else prefetch),
    ]
    if bench.step_seconds <= SLOW_STEP:
        unconsumed = _Unconsumed(load, bench.device)
        contenders.append(
            Contender(
                "interference",
                lambda: unconsumed.beside(train),
                unconsumed.close,
                queue=0 if bench.loader_keeps_up else prefetch,
            )
        )
    if bench.limit is not None and bench.jpegs:
        limit = decode_limit.contender(
            bench.jpegs,
            bench.limit[1],
            batch=bench.loader_batch,
            threads=threads_per_process(1),
        )
        contenders.insert(2, limit)
    return contenders


class _Pace:
    """Lets the host be one step ahead of the GPU: no wait at each step, and no step uncounted."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._ends: deque[torch.cuda.Event] = deque()

    def one_ahead(self) -> None:
        if not self._cuda:
            return
        end = torch.cuda.Event()
        end.record()
        self._ends.append(end)
        if len(self._ends) > 1:
            self._ends.popleft().synchronize()


class _Unconsumed:
    """Draws and drops batches in a thread of its own, beside something else."""

    def __init__(self, draw: Callable[[], int], device: torch.device) -> None:
        self._draw, self._device = draw, device
        self._on, self._ending = threading.Event(), False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def beside(self, run: Callable[[], int]) -> int:
        if self._error is not None:
            raise self._error
        self._on.set()
        try:
            return run()
        finally:
            self._on.clear()

    def close(self) -> None:
        self._ending = True
        self._on.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            if self._device.type == "cpu":
                self._draw_on()
            else:  # a stream of its own: the step's must not wait for these batches
                with torch.cuda.stream(torch.cuda.Stream(self._device)):
                    self._draw_on()
        except Exception as error:  # told by the thread that measures
            self._error = error

    def _draw_on(self) -> None:
        while True:
            self._on.wait()
            if self._ending:
                return
            self._draw()


def _finish(device: torch.device) -> None:
    """Waits for what this thread asked of the GPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _gpu_memory(device: torch.device) -> float | None:
    """MB that are in use; what nobody holds any more is given back first."""
    if device.type != "cuda":
        return None
    gc.collect()  # a loader that is gone: its pipeline is full of cycles
    dali_backend.ReleaseUnusedMemory()  # pyright: ignore[reportAttributeAccessIssue]  no stub
    return gpu_memory_mb(device.index or 0)


def _frames(recipe: Recipe, batch: dict[str, Tensor]) -> tuple[int, int]:
    """How many views and patches of an image are in a batch.

    Which outputs hold patches benchmarks/promises.py knows; of another graph, or with options that
    it has no promise for, the one called patches.
    """
    try:
        promised = promises.of(recipe.pipeline.use, recipe.pipeline.options).frames
        patches = {each.name for each in promised if each.patches}
    except ValueError:
        patches = {"patches"}
    counts = [0, 0]
    for name, value in batch.items():
        if value.ndim >= 4:
            counts[name in patches] += value.shape[1] if value.ndim == 5 else 1
    return counts[0], counts[1]


# ---- What is said -------------------------------------------------------------------------------


def _rows(bench: _Bench, measured: dict[str, Measured], cold: list[float] | str) -> list[Row]:
    """One a stage; what only some stages make (views, megapixels decoded) stands in those rows."""
    of_step = ("step", "end_to_end", "interference")
    ratios = binding.derived(measured, gpu=bench.device.type == "cuda")
    rows = []
    for stage, seen in measured.items():
        rate, extra = statistics.median(seen.rates), {}
        extra["batch"] = bench.step_batch if stage in of_step else bench.loader_batch
        if stage in ("graph", "loader", *of_step):
            extra["views/s"] = rate * bench.views
            extra["patches/s"] = rate * bench.patches
        else:
            extra["MB/s"] = rate * bench.files.facts["bytes"] / 1e6
        megapixels = bench.files.facts["megapixels"]
        if stage in ("decode", "decode_limit") and megapixels is not None:
            extra["megapixels/s"] = rate * megapixels
        kept = {
            name: statistics.median(ratios[name])
            for name in RATIOS.get(stage, ())
            if name in ratios
        }
        rows.append(
            method.row(stage, bench.recipe.name, seen, {**extra, "batches": seen.batches, **kept})
        )
    if isinstance(cold, list):
        rate = statistics.median(cold) * bench.files.facts["bytes"] / 1e6
        extra = {"batch": bench.loader_batch, "MB/s": rate}
        group = bench.recipe.name
        rows.insert(
            1, Row(name="read_cold", group=group, unit="images/s", values=cold, extra=extra)
        )
    return rows + _once(
        bench.recipe.name,
        bench.listing_seconds,
        bench.first_seconds,
        bench.first_batch,
        bench.gpu_memory,
    )


def _once(
    recipe: str, listing: float, first: float, images: int, gpu_memory: dict[str, float]
) -> list[Row]:
    """Rows of what is measured only once.

    Args:
        recipe: its name.
        listing: seconds.
        first: seconds to the first batch.
        images: of that batch.
        gpu_memory: MB, by what was there when it was read.
    """
    return [
        Row(name="listing", group=recipe, unit="s", values=[listing]),
        Row(name="first_batch", group=recipe, unit="s", values=[first], extra={"batch": images}),
        *(  # a group each: for `compare`, group and name tell rows apart
            Row(
                name="gpu_memory",
                group=f"{recipe}, {stage}",
                unit="MB",
                values=[held],
                extra={"stage": stage},
            )
            for stage, held in gpu_memory.items()
        ),
    ]


def _without_ratios(row: Row) -> Row:
    """For the table: the sentences below it tell them."""
    ratios = RATIOS.get(row.name, ())
    extra = {name: value for name, value in row.extra.items() if name not in ratios}
    return row.model_copy(update={"extra": extra})


def _conclusions(
    bench: _Bench, measured: dict[str, Measured], cold: list[float] | str
) -> list[str]:
    setting = binding.Setting(
        gpu=bench.device.type == "cuda",
        threads=bench.loading.threads or 1,
        cores=threads_per_process(1),
        limit=None if bench.limit is None else bench.limit[0],
        pixels=bench.files.pixels_stored,
        together=bench.files.together,
        region=bench.region,
        decoder=bench.loading.decoder,
    )
    said = [
        *binding.conclusions(measured, setting),
        cold if isinstance(cold, str) else binding.cold(cold, measured["loader"].rates),
        f"The first batch ({bench.first_batch} images) was there {bench.first_seconds:.1f} s after"
        f" the listing, which took {bench.listing_seconds:.1f} s.",
    ]
    if bench.gpu_memory:
        listed = ", ".join(f"{number(held)} at {at}" for at, held in bench.gpu_memory.items())
        said.append(f"GPU memory held, in MB: {listed} (of {bench.step_batch} images).")
    return said


def _description(recipe: Recipe, files: Files, device: torch.device, loading: Options) -> str:
    """One line: recipe, device, images."""
    facts = files.facts
    sides = "pixels not known"
    if facts["megapixels"] is not None:
        sides = f"{facts['width']:.0f} x {facts['height']:.0f} pixels"
    kind = "pixels" if files.pixels_stored else f"{facts['jpeg']:.0%} JPEG"
    if facts.get("jpeg"):
        kinds = sorted(facts["subsampling"].items(), key=lambda each: -each[1])
        listed = ", ".join(f"{share:.0%} {name}" for name, share in kinds)
        kind += f" ({facts['progressive']:.0%} progressive; {listed})"
    return (
        f"{recipe.name} on {device} with {loading.threads} loader threads, {facts['images']:,} of"
        f" {facts['of']:,} images: on average {sides}, {facts['bytes'] / 1e3:,.0f} kB, {kind}"
    )


def _limit_remarks(files: Files, jpegs: list[bytes], installed: bool) -> list[str]:
    """Which images the decode limit leaves out, and why.

    Args:
        files: with `contents` as far as they are held in memory.
        jpegs: those that libjpeg-turbo decodes.
        installed: whether there is a package that calls it.
    """
    if not installed:
        return [f"decode_limit is left out: {decode_limit.REMEDY}"]
    if not jpegs:
        return ["decode_limit is left out: none of the images is stored as a JPEG"]
    said, held = [], len(files.contents)
    if held < len(files.rows):
        said.append(
            f"decode_limit takes {held:,} of the {len(files.rows):,} images: no more than"
            f" {same_files.MEMORY / 1e6:,.0f} MB of files are held in memory"
        )
    if len(jpegs) < held:
        said.append(
            f"decode_limit: {held - len(jpegs):,} images that are no RGB JPEGs are left out"
        )
    return said


def _why_not(device: torch.device, asked: int, seconds: float, images: int) -> str:
    """Why a step has fewer images than the recipe's."""
    whole = asked * seconds / images
    if device.type == "cuda" and whole <= STEP_SECONDS:
        return "does not fit the GPU's memory"
    return f"would take about {number(whole)} s"


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_command("stages")
