"""Whether the loader can run for days: memory, open files and images/s over 200,000 batches.

    python -m benchmarks.soak FOLDER [--batches 200000] [--batch 4] [--out FILE]

Batches are as small as the graph allows, so that what is done once a batch, and can leak, is done
often. At 200 places `state()` is taken, and at 19 of them the loader is set back to what it just
gave, as after a crash: it must then give the same batch again, and the old pipeline must be gone.
Exits with 1 when memory grows, the number of open files changes or a batch comes back different.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.pirl_loader import RECIPE, manifest
from fastssl import config, order
from fastssl.loader import Loader, threads_per_process

SMALL = ("pipeline.image_size=16", "pipeline.patches_crop=24", "pipeline.patch=6")
WINDOWS = 40
STATES = 200
RESUMES = 20
# What 10,000 batches may add over the second half: 3 MB a day on a GPU that takes 3 batches a
# second of 1024 images, and well above the jitter of a memory allocator.
GROWTH_MB = 1.0
SHORTEST = 10_000  # batches: in fewer, starting up is all that memory shows


def main() -> None:
    """Soaks, prints the table and the verdict, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=4, help="images each")
    parser.add_argument("--images", type=int, default=500, help="of the folder, evenly spaced")
    parser.add_argument("--threads", type=int, default=threads_per_process(1))
    parser.add_argument("--note", help="goes into the JSON, such as what else the machine does")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.batches < WINDOWS:
        parser.error(f"--batches ({arguments.batches}) must be at least {WINDOWS}")
    data = (f"data.root={arguments.folder}", f"data.limit={arguments.images}")
    try:
        recipe = config.load(str(RECIPE), [*data, *SMALL])
        result = soak(recipe, arguments.batches, arguments.batch, arguments.threads)
    except ValueError as error:
        parser.error(str(error))
    result["note"] = arguments.note
    print(table(result["windows"]))
    print("\n".join(verdict(result)))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(not result["passed"])


def soak(recipe: config.Recipe, batches: int, batch: int, threads: int) -> dict:
    """Takes `batches` batches from one loader; returns what was seen, judged, with its manifest.

    Raises:
        ValueError: the folder can't be used.
    """
    samples = recipe.data.module.list_samples(recipe.data.options, cache=None, say=print)
    usable = samples.usable
    per_epoch = order.steps_per_epoch(len(usable), 1, batch)

    def rows(step: int) -> np.ndarray:
        epoch, step = divmod(step, per_epoch)
        return usable[order.shuffled(len(usable), 0, epoch, 0, 1, batch)[step]]

    loader = Loader(
        recipe.data.module,
        samples,
        recipe.pipeline.module,
        recipe.pipeline.options,
        rows,
        batch=batch,
        seed=0,
        device=torch.device("cpu"),
        threads=threads,
    )
    windows: list[dict] = []
    states = resumes = exact = 0
    start = time.perf_counter()
    began, cpu = start, time.process_time()
    while loader.step < batches:
        if loader.step and loader.step % (batches // RESUMES) == 0:
            resumes += 1
            exact += _repeats(loader)
        else:
            next(loader)
        if loader.step % max(1, batches // STATES) == 0:
            loader.state()
            states += 1
        last = windows[-1]["batches"] if windows else 0
        if loader.step >= batches * (len(windows) + 1) // WINDOWS:
            images = (loader.step - last) * batch
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
            windows.append(
                {
                    "batches": loader.step,
                    "images_per_second": images / seconds,
                    "cpu_ms_per_image": 1000 * cpu_seconds / images,
                    **_held(),
                    "load": os.getloadavg()[0],  # of the whole machine, over the last minute
                }
            )
            began, cpu = time.perf_counter(), time.process_time()
    return {
        "benchmark": "soak",
        "windows": windows,
        **judge(windows),
        "states": states,
        "resumes": resumes,
        "resumes_exact": exact,
        "skipped": len(loader.skipped),
        "seconds": time.perf_counter() - start,
        "options": recipe.values["pipeline"],
        "batch": batch,
        "images": len(usable),
        "threads": threads,
        "manifest": manifest(),
    }
