"""Whether the loader can run for days: memory, open files and images/s over 200,000 batches.

    python -m benchmarks.soak FOLDER [--batches 200000] [--batch 4] [--out FILE]

Images and batches are small, so that what is done once a batch, and might leak, is done often. On
the way `state()` is taken 200 times, and 19 times the loader is set back to what it just gave, as
after a crash: it must give the same batch again, and the pipeline it had must be gone.
Exits with 1 when memory grows, open files become more or fewer, or a batch comes back different.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.pirl_loader import RECIPE, manifest
from fastssl import config, order
from fastssl.loader import Loader, threads_per_process

SMALL = ("pipeline.image_size=16", "pipeline.patches_crop=24", "pipeline.patch=6")
WINDOWS = 40
STATES = 200
RESUMES = 20  # the last one falls together with the end
ROUNDS = 7  # of the old loader's and a new one's turns, as long as from one state to the next
# MB (1e6 bytes) that 10,000 batches may add over the second half. The paper's 800 epochs are a
# million batches: 100 MB.
GROWTH = 1.0
SHORTEST = 10_000  # batches: in fewer, memory shows only how a loader starts

TABLE = """\
| batches | images/s | CPU ms/image | memory, MB | open files | threads | load |
|---|---|---|---|---|---|---|"""


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
    parser.add_argument("--note", help="kept in the JSON: what else the machine is doing")
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
    print(verdict(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if result["passed"] else 1)


def soak(
    recipe: config.Recipe,
    batches: int,
    batch: int,
    threads: int,
    say: Callable[[str], None] = print,
) -> dict:
    """Takes `batches` batches from one loader; returns what was seen, judged, with its manifest.

    Args:
        recipe: its data and pipeline sections count.
        batches: at least `WINDOWS`.
        batch: images each.
        threads: of DALI.
        say: is given the table, line by line as it grows.

    Raises:
        ValueError: the folder can't be used.
    """
    samples = recipe.data.module.list_samples(recipe.data.options, cache=None, say=say)
    usable = samples.usable
    per_epoch = order.steps_per_epoch(len(usable), 1, batch)

    def rows(step: int) -> np.ndarray:
        epoch, step = divmod(step, per_epoch)
        return usable[order.shuffled(len(usable), 0, epoch, 0, 1, batch)[step]]

    def start() -> Loader:
        return Loader(
            recipe.data.module,
            samples,
            recipe.pipeline.module,
            recipe.pipeline.options,
            rows,
            batch=batch,
            seed=0,
            device=torch.device("cpu"),
            threads=threads,
            say=say,
        )

    gc.freeze()  # what importing left, 380,000 objects, needs no look in every window: 0.15 s
    loader = start()
    state_batches = max(1, batches // STATES)
    windows: list[dict[str, float]] = []
    states = resumes = exact = 0
    say(TABLE)
    soak_began = time.perf_counter()
    for number in range(WINDOWS):
        first, end = batches * number // WINDOWS, batches * (number + 1) // WINDOWS
        began, cpu_began = time.perf_counter(), time.process_time()
        while loader.step < end:
            if loader.step and loader.step % (batches // RESUMES) == 0:
                resumes += 1
                exact += _gives_again(loader)
            else:
                next(loader)
            if loader.step % state_batches == 0:
                loader.state()
                states += 1
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        images = (end - first) * batch
        windows.append(
            {
                "batches": end,
                "images_per_second": images / seconds,
                "cpu_ms_per_image": 1000 * cpu / images,
                **_held(windows[-1]["files"] if windows else 0),
                "load": os.getloadavg()[0],  # of the whole machine, over the last minute
            }
        )
        say(_line(windows[-1]))
    gc.unfreeze()
    seconds = time.perf_counter() - soak_began
    judged = judge(windows)
    return {
        "benchmark": "soak",
        "unit": "images/s",
        "windows": windows,
        "states": states,
        "resumes": resumes,
        "resumes_exact": exact,
        **judged,
        "passed": judged["memory_flat"] and judged["files_constant"] and exact == resumes,
        "seconds": seconds,
        "old_to_new": _by_turns(loader, start(), state_batches),
        "options": recipe.values["pipeline"],
        "batch": batch,
        "images": len(usable),
        "skipped": len(loader.skipped),
        "threads": threads,
        "manifest": manifest(),
    }


def judge(windows: list[dict[str, float]]) -> dict:
    """Growth, drift and leaks; the first half of the memory is left out, the allocator's start.

    Drift is the median of the last quarter to that of the second. Other work on the machine moves
    images/s, and by the caches and hardware threads it shares CPU time too.
    """
    half, quarter = len(windows) // 2, len(windows) // 4
    batches = [window["batches"] for window in windows]
    memory = [window["memory_mb"] for window in windows]
    slope = np.polyfit(batches[half:], memory[half:], 1)[0]  # least squares
    growth = float(slope) * 10_000

    def drift(name: str) -> float:
        values = [window[name] for window in windows]
        return statistics.median(values[-quarter:]) / statistics.median(values[quarter:half])

    return {
        "memory_mb_per_10000_batches": growth,
        "memory_bound": GROWTH,
        "memory_flat": batches[-1] < SHORTEST or growth <= GROWTH,
        "drift": drift("images_per_second"),
        "cpu_drift": drift("cpu_ms_per_image"),
        "files_constant": len({window["files"] for window in windows}) == 1,
        "threads_constant": len({window["threads"] for window in windows}) == 1,
    }


def verdict(result: dict) -> str:
    """What came out, in a few lines."""
    windows = result["windows"]
    batches = windows[-1]["batches"]
    growth = f"{result['memory_mb_per_10000_batches']:+.2f} MB per 10,000 batches"
    if batches < SHORTEST:
        memory = f"not judged in fewer than {SHORTEST:,} batches"
    elif result["memory_flat"]:
        memory = "flat"
    else:
        memory = f"GROWS, more than {GROWTH} MB"
    files = sorted({window["files"] for window in windows})
    threads = sorted({window["threads"] for window in windows})
    ratios = sorted(result["old_to_new"])
    repeated = f"{result['resumes_exact']} of {result['resumes']} times"
    return "\n".join(
        (
            f"memory: {growth} over the second half: {memory}",
            f"images/s: {result['drift']:.2f} of the second quarter's in the last; "
            f"CPU time an image: {result['cpu_drift']:.2f}",
            f"images/s beside a new loader's: {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} - {ratios[-1]:.2f})",
            f"open files: {files}: {'constant' if result['files_constant'] else 'NOT CONSTANT'}; "
            f"threads: {threads}",
            f"resumed: the same batch again {repeated}",
            f"{'passed' if result['passed'] else 'FAILED'}: {batches:,} batches of "
            f"{result['batch']} in {result['seconds'] / 60:.1f} minutes",
        )
    )


def _gives_again(loader: Loader) -> bool:
    """Whether the next batch comes once more, bit for bit, after `resume` to the state before."""
    state = loader.state()
    given = {name: tensor.clone() for name, tensor in next(loader).items()}
    loader.resume(state)
    again = next(loader)
    return all(torch.equal(tensor, again[name]) for name, tensor in given.items())


def _by_turns(old: Loader, new: Loader, batches: int) -> list[float]:
    """The speed of the old loader to the new one's, round by round."""
    ratios = []
    for _ in range(1 + ROUNDS):
        seconds = []
        for loader in (old, new):
            began = time.perf_counter()
            for _ in range(batches):
                next(loader)
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[1] / seconds[0])
    return ratios[1:]  # in the first round the new loader starts up


def _held(files_before: float) -> dict[str, float]:
    """Resident memory in MB, open files and threads of this process.

    The Python side of a DALI pipeline is full of reference cycles: of one that was dropped, 0.3 MB
    stay until Python looks for cycles among old objects, which it does after hundreds of them.
    DALI's threads are still reading the batches made ahead: the fewest open files of several looks
    count, until they are as few as before.
    """
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        if files <= files_before:
            break
        time.sleep(0.005)
        files = min(files, len(os.listdir("/proc/self/fd")))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_mb": pages * os.sysconf("SC_PAGESIZE") / 1e6,
        "files": files,
        "threads": len(os.listdir("/proc/self/task")),
    }


def _line(window: dict[str, float]) -> str:
    w = window
    return (
        f"| {w['batches']:,} | {w['images_per_second']:.0f} | {w['cpu_ms_per_image']:.3f} "
        f"| {w['memory_mb']:.1f} | {w['files']} | {w['threads']} | {w['load']:.1f} |"
    )


if __name__ == "__main__":
    main()
