"""Whether the loader can run for days: memory, open files and images/s over 200,000 batches.

    python -m benchmarks soak FOLDER [data.use=...] [--batches 200000] [--out FILE.json]

Images and batches are small, so that what is done once a batch, and might leak, is done often. On
the way `state()` is taken 200 times, and 19 times the loader is set back to what it just gave, as
after a crash: it must give the same batch again, and the pipeline it had must be gone.
Exits with 1 when memory grows, open files become more or fewer, threads become more, a batch comes
back different, an image is skipped, or the loader at its end is slower than a new one beside it.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import method, result
from benchmarks.__main__ import run_command
from benchmarks.result import Row
from fastssl import config, order
from fastssl.loader import Loader, Options, threads_per_process

HELP = "memory, open files and images/s of one loader over 200,000 batches"
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "pirl_jigsaw.yaml"
SMALL = ("pipeline.image_size=16", "pipeline.patches_crop=24", "pipeline.patch=6")
WINDOWS = 40
STATES = 200
RESUMES = 20  # the last one falls together with the end
ROUNDS = 7  # of the old loader's and a new one's turns, as long as from one state to the next
# MB (1e6 bytes) that 10,000 batches may add over the second half. The paper's 800 epochs are a
# million batches: 100 MB.
GROWTH = 1.0
SLOWEST = 0.8  # of a new loader's speed: medians of turns on a machine that does other work, too
SHORTEST = 10_000  # batches: in fewer, memory and speed show only how a loader starts

LOADER, MEMORY, FILES, THREADS, LOAD = "loader", "memory", "open files", "threads", "load"
BESIDE_NEW = "old loader beside a new one"
EXACT = "resumed exactly"
WHOLE = "the whole soak"

TABLE = """\
| batches | images/s | CPU ms/image | memory, MB | open files | threads | load |
|---|---|---|---|---|---|---|"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The images, and how many batches of them."""
    parser.add_argument("folder", help="of images, or what another data.use reads")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the recipe")
    parser.add_argument("--batches", type=int, default=200_000, help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images each (default %(default)s)")
    parser.add_argument(
        "--images", type=int, default=500, help="of the folder, evenly spaced (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=threads_per_process(1))
    method.add_output(parser)


def main(arguments: argparse.Namespace) -> int:
    """Soaks, prints the table and the verdict, writes the JSON; 1 where the loader failed."""
    if arguments.batches < WINDOWS:
        raise ValueError(f"--batches ({arguments.batches}) must be at least {WINDOWS}")
    for name in ("batch", "images", "threads"):
        if vars(arguments)[name] < 1:
            raise ValueError(f"--{name} ({vars(arguments)[name]}) must be at least 1")
    data = (f"data.root={arguments.folder}", f"data.limit={arguments.images}")
    recipe = config.load(str(RECIPE), [*data, *SMALL, *arguments.overrides])
    rows = soak(recipe, arguments.batches, arguments.batch, arguments.threads)
    sentences = verdict(rows, arguments.batches, arguments.batch)
    print("\n".join(sentences))
    if arguments.out is not None:
        settings = {
            "batches": arguments.batches,
            "batch": arguments.batch,
            "images": arguments.images,
            "threads": arguments.threads,
            "data": {k: value for k, value in recipe.values["data"].items() if k != "root"},
            "pipeline": recipe.values["pipeline"],
            "note": arguments.note,
        }
        made = result.make(
            "soak",
            rows,
            settings,
            sentences,
            data=Path(arguments.folder) if os.path.exists(arguments.folder) else None,
            page_cache="warm",
        )
        result.write(arguments.out, made)
    return 0 if passed(rows, arguments.batches) else 1


def soak(
    recipe: config.Recipe,
    batches: int,
    batch: int,
    threads: int,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Takes `batches` batches from one loader; returns what was seen, window by window, judged.

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
        if samples.chunks is None:
            return usable[order.shuffled(len(usable), 0, epoch, 0, 1, batch)[step]]
        return usable[order.by_chunks(samples.chunks, 0, epoch, 0, 1, batch, samples.window)[step]]

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
            loading=Options(threads=threads),
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
    ratios = _by_turns(loader, start(), state_batches)
    return [
        *rows_of(windows),
        Row(name=BESIDE_NEW, unit="ratio", values=ratios),
        Row(name=EXACT, unit="resumes", values=[exact], extra={"of": resumes, "states": states}),
        Row(name=WHOLE, unit="s", values=[seconds], extra={"skipped": len(loader.skipped)}),
    ]


def rows_of(windows: list[dict[str, float]]) -> list[Row]:
    """What the windows saw, a value each, with its judgement."""
    judged = judge(windows)

    def row(name: str, unit: str, of: str, extra: list[str], cpu_ms: list[float]) -> Row:
        return Row(
            name=name,
            unit=unit,
            values=[window[of] for window in windows],
            cpu_ms=cpu_ms,
            extra={key: judged[key] for key in extra},
        )

    cpu_ms = [window["cpu_ms_per_image"] for window in windows]
    growth = ["memory_mb_per_10000_batches", "memory_bound", "memory_flat"]
    return [
        row(LOADER, "images/s", "images_per_second", ["drift", "cpu_drift"], cpu_ms),
        row(MEMORY, "MB", "memory_mb", growth, []),
        row(FILES, "files", "files", ["files_constant"], []),
        row(THREADS, "threads", "threads", ["threads_constant"], []),
        row(LOAD, "load", "load", [], []),
    ]


def passed(rows: Sequence[Row], batches: int) -> bool:
    """Memory flat, no file left open, no more threads, every resume exact, as fast as a new one.

    Images/s over the whole soak are told and not judged: other work on the machine moves them. It
    moves an old and a new loader that take turns alike. An image that is skipped fails the soak:
    its folder has to be free of damaged ones, or a fault of the loader would pass for theirs.
    """
    return not _faults(rows, batches)


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


def verdict(rows: Sequence[Row], batches: int, batch: int) -> list[str]:
    """What came out, in a few lines."""
    named = {row.name: row for row in rows}
    loader, memory, files = named[LOADER].extra, named[MEMORY].extra, named[FILES]
    resumed, whole = named[EXACT], named[WHOLE]
    if batches < SHORTEST:
        grows = f"not judged in fewer than {SHORTEST:,} batches"
    elif memory["memory_flat"]:
        grows = "flat"
    else:
        grows = f"GROWS, more than {GROWTH} MB"
    constant = "constant" if files.extra["files_constant"] else "NOT CONSTANT"
    ratios = sorted(named[BESIDE_NEW].values)
    faults = _faults(rows, batches)
    return [
        f"memory: {memory['memory_mb_per_10000_batches']:+.2f} MB per 10,000 batches "
        f"over the second half: {grows}",
        f"images/s: {loader['drift']:.2f} of the second quarter's in the last; "
        f"CPU time an image: {loader['cpu_drift']:.2f}",
        f"images/s beside a new loader's: {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} - {ratios[-1]:.2f})",
        f"open files: {_counts(files)}: {constant}; threads: {_counts(named[THREADS])}; "
        f"images skipped: {whole.extra['skipped']}",
        f"resumed: the same batch again {resumed.values[0]:.0f} of {resumed.extra['of']} times",
        f"{'FAILED' if faults else 'passed'}: {batches:,} batches of {batch} "
        f"in {whole.values[0] / 60:.1f} minutes{''.join(f'; {fault}' for fault in faults)}",
    ]


def _faults(rows: Sequence[Row], batches: int) -> list[str]:
    """What is wrong, a few words each; from what every result since the first one holds."""
    named = {row.name: row for row in rows}
    threads = named[THREADS].values
    half = len(threads) // 2
    speed = statistics.median(named[BESIDE_NEW].values)
    skipped = named[WHOLE].extra["skipped"]
    wrong = {
        "memory grows": not named[MEMORY].extra["memory_flat"],
        "open files change": not named[FILES].extra["files_constant"],
        "threads become more": max(threads[half:]) > max(threads[:half]),
        "a resume gave another batch": named[EXACT].values[0] != named[EXACT].extra["of"],
        f"slower than {SLOWEST:g} of a new loader": batches >= SHORTEST and speed < SLOWEST,
        f"{skipped} images skipped": skipped != 0,
    }
    return [fault for fault, is_so in wrong.items() if is_so]


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


def _counts(row: Row) -> list[int]:
    return sorted({int(value) for value in row.values})


def _line(window: dict[str, float]) -> str:
    w = window
    return (
        f"| {w['batches']:,} | {w['images_per_second']:.0f} | {w['cpu_ms_per_image']:.3f} "
        f"| {w['memory_mb']:.1f} | {w['files']} | {w['threads']} | {w['load']:.1f} |"
    )


if __name__ == "__main__":
    run_command("soak")
