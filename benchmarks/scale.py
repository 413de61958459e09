"""What grows: images in the list, bank rows, negatives, orders, patches, processes.

Each point is measured in a process of its own (benchmarks/scale_points.py), so that what one left
in memory is not counted for the next (but with --quick, whose memory means nothing). The slope of
cost against size, both as logarithms, is 0 where size costs nothing and 1 where twice as much costs
twice as much. It is fitted to the sizes from a hundredth of the greatest on: below, fixed costs
hide it.

    images        the listing's arrays and the order plan, of made-up file names, and list_samples
                  on real, tiny files
    entries       list_samples on real directory entries, hard links to a few files: 13 million
                  files are more than a disk here holds; first, kept, and by two processes at once
    bank          the memory bank: made, read and written, 128 numbers a row
    negatives     PIRL's loss, forward and backward
    permutations  a far-apart set of orders of 9 cells computed, read and drawn; any of all orders
    patches       cut and coloured by the CPU graph
    processes     loaders beside each other, sharing the cores; images/s of all together
"""

import argparse
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks import method, result, scale_points
from benchmarks.__main__ import run_command
from benchmarks.result import Row
from fastssl import config, demo, machine

HELP = "time and memory as work grows, and the log-log slope"
CHECKOUT = Path(__file__).resolve().parents[1]
RECIPE = CHECKOUT / "recipes" / "pirl_jigsaw.yaml"
ROW_BYTES = 128 * 4
TIMEOUT = 600.0  # seconds of a point, and of what a process does before it is ready
SLOW = {"entries": 7200.0}  # points that may take longer: 13 million names and headers


@dataclass(frozen=True)
class Series:
    """One kind of point at growing sizes."""

    what: str  # as asked for, the group of the rows
    point: str  # in scale_points
    sizes: tuple[int, ...]
    quick: tuple[int, ...]


SERIES = (
    Series("images", "images", (10_000, 100_000, 1_000_000, 1_280_000, 13_000_000), (1000, 4000)),
    Series("images", "files", (1000, 10_000, 100_000), (100, 300)),
    Series("entries", "entries", (100_000, 1_000_000, 13_000_000), (300,)),
    Series("bank", "bank", (10_000, 100_000, 1_000_000, 13_000_000), (1000, 4000)),
    Series("negatives", "negatives", (256, 1024, 4096, 16_384, 65_536), (64, 256)),
    Series("permutations", "sets", (10, 100, 1000, 10_000), (10, 20)),
    Series("permutations", "orders", (24, 362_880), (24,)),  # of 2 x 2 and 3 x 3 cells
    Series("patches", "patches", (1, 4, 9), (1, 4)),
    Series("processes", "process", (1, 2, 4), (1, 2)),
)
WHATS = tuple(dict.fromkeys(series.what for series in SERIES))
# Called linear or the like in a conclusion; between these it is said with its number alone.
SHAPES = ((-0.15, 0.15, "constant"), (0.85, 1.15, "linear"), (1.85, 2.15, "quadratic"))


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(WHATS)}; none: all")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="of processes (default: the built-in images)"
    )
    parser.add_argument(
        "--entries",
        type=Path,
        metavar="FOLDER",
        help="where entries makes its links and finds those of before (default: made and removed)",
    )
    method.add_common(parser, seconds=3.0)


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints table and conclusions, writes the JSON; 1 if a point failed."""
    asked = tuple(dict.fromkeys(arguments.what)) or WHATS
    if strange := [each for each in asked if each not in WHATS]:
        raise ValueError(f"{', '.join(strange)}: not of {', '.join(WHATS)}")
    if arguments.data is not None and not arguments.data.is_dir():
        raise ValueError(f"--data ({arguments.data}): there is no such folder")
    overrides = () if arguments.data is None else (f"data.root={json.dumps(str(arguments.data))}",)
    if "processes" in asked:
        config.load(str(RECIPE), overrides)  # a mistake is told before minutes have passed
        if arguments.data is None:
            demo.render()
    rows: list[Row] = []
    left_out: list[str] = []
    failed = False
    for series in SERIES:
        if series.what not in asked:
            continue
        for device in _devices(series.point):
            for size in series.quick if arguments.quick else series.sizes:
                if reason := _no_room(series.point, size, device):
                    left_out.append(f"{series.what}: {size:,} left out: {reason}.")
                    continue
                given = {
                    "size": size,
                    "repeats": arguments.repeats,
                    "seconds": arguments.seconds,
                    "least": 0.01 if arguments.quick else 0.2,
                    "threads": arguments.threads,
                    "device": device,
                    "entries": str(arguments.entries or ""),
                }
                try:
                    if series.point == "process":
                        found = _processes(given, overrides)
                    elif arguments.quick:  # a new process takes longer than its point
                        found = _here(series.point, given)
                    else:
                        (found,) = _children(series.point, [given])
                except RuntimeError as error:
                    left_out.append(f"{series.what}: {size:,} failed: {error}")
                    failed = True
                    continue
                new = _rows(series.what, size, device, found)
                rows += new
                for row in new:
                    print(
                        f"{row.group} {size:,}: {row.name} {result.spread(row.values)} {row.unit}"
                    )
    if not rows:
        raise ValueError(f"nothing was measured: {' '.join(left_out)}")
    conclusions = [*slopes(rows), *left_out]
    settings = {
        **{"what": asked, "repeats": arguments.repeats, "seconds": arguments.seconds},
        **{"threads": arguments.threads, "quick": arguments.quick, "note": arguments.note},
        **{"data": arguments.data, "recipe": RECIPE.name, "batch": 256, "dimension": 128},
    }
    made = result.make("scale", rows, settings, conclusions, data=arguments.data)
    print(f"\n{result.table(rows)}\n")
    print("\n".join(conclusions))
    if arguments.out is not None:
        result.write(arguments.out, made)
    return 1 if failed else 0


def slopes(rows: Sequence[Row]) -> list[str]:
    """A sentence for each quantity that was measured at two sizes or more."""
    points: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        size = row.extra["size"]
        assert isinstance(size, int), "every row of this command has a size"
        points[row.group, row.name, row.unit][size] = statistics.median(row.values)
    sentences = []
    for (group, name, unit), costs in points.items():
        fitted = slope(costs)
        if fitted is None:
            continue
        value, least, most = fitted
        shape = next((word for low, high, word in SHAPES if low <= value <= high), None)
        if shape is None:
            shape = "less than linear" if value < 1 else "more than linear"
            shape = "falls" if value < SHAPES[0][0] else shape
        at_most = f"{result.number(costs[most])} {unit} at {most:,}"
        sentences.append(
            f"{group}, {name}: slope {value:.2f} ({shape}) from {least:,} to {most:,}; {at_most}."
        )
    return sentences


def slope(costs: dict[int, float]) -> tuple[float, int, int] | None:
    """The log-log slope of cost against size, and the least and greatest size that it is fitted to.

    From a hundredth of the greatest size on, or, where that leaves fewer than two points, all.
    None without two sizes whose cost is above 0: memory too small for the kernel's pages to tell.
    """
    sizes = sorted(size for size, cost in costs.items() if cost > 0)
    if not sizes:
        return None
    upper = [size for size in sizes if size * 100 >= sizes[-1]]
    used = upper if len(upper) >= 2 else sizes
    if len(used) < 2:
        return None
    x, y = np.log(used), np.log([costs[size] for size in used])
    return float(np.polyfit(x, y, 1)[0]), used[0], used[-1]


def _rows(what: str, size: int, device: str, found: Sequence[dict[str, Any]]) -> list[Row]:
    on = "" if device == "cpu" else f", {device}"
    return [
        Row(
            name=f"{each['name']}{on}",
            group=what,
            unit=each["unit"],
            values=each["values"],
            extra={"size": size},
        )
        for each in found
    ]


def _here(point: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """What a point finds in this process, whose memory is not fresh."""
    return [asdict(each) for each in scale_points.POINTS[point](scale_points.Point(**given))]


def _devices(point: str) -> tuple[str, ...]:
    both = point in ("bank", "negatives") and torch.cuda.is_available()
    return ("cpu", "cuda") if both else ("cpu",)


def _no_room(point: str, size: int, device: str) -> str | None:
    """Why a bank is not made: twice its rows are needed while it is, which may be too much."""
    if point != "bank":
        return None
    needed = 2.2 * size * ROW_BYTES
    free = psutil.virtual_memory().available
    limit = machine.cgroup_memory()
    free = free if limit is None else min(free, limit - psutil.Process().memory_info().rss)
    if needed > free:
        return f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
    if device == "cuda" and size * ROW_BYTES * 1.1 > torch.cuda.mem_get_info()[0]:
        return f"{size * ROW_BYTES / 1e9:.1f} GB are not free on the GPU"
    return None


def _processes(given: dict[str, Any], overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Loaders beside each other: the sum of images/s of each repeat, and of memory."""
    count = given["size"]
    share = max(1, given["threads"] // count)
    one = {**given, "threads": share, "recipe": str(RECIPE), "overrides": list(overrides)}
    found = _children("process", [one] * count, rounds=given["repeats"])
    together = []
    for same in zip(*found, strict=True):  # one quantity of all processes
        values = [math.fsum(each) for each in zip(*(q["values"] for q in same), strict=True)]
        together.append({**same[0], "name": f"{same[0]['name']}, all together", "values": values})
    return together


def _children(
    point: str, givens: Sequence[dict[str, Any]], rounds: int = 0
) -> list[list[dict[str, Any]]]:
    """What processes of their own find, at the same time.

    With `rounds`, each says "ready" so many times, and goes on when all have said so.

    Raises:
        RuntimeError: one failed; says how.
    """
    with tempfile.TemporaryDirectory(prefix="fastssl-scale-") as folder:
        # what a child writes, up to 100,000 files, is removed even if it was killed
        here = {"OMP_WAIT_POLICY": "passive", **os.environ, "TMPDIR": folder}
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.scale_points", point, json.dumps(given)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=CHECKOUT,
                env=here,
            )
            for given in givens
        ]
        try:
            for _ in range(rounds):
                for child in children:
                    _wait_until_ready(child)
                for child in children:
                    assert child.stdin is not None, "a pipe was asked for"
                    child.stdin.write("go\n")
                    child.stdin.flush()
            found = []
            for child in children:
                said, how = _end(child, SLOW.get(point, TIMEOUT))
                if child.returncode != 0:
                    raise RuntimeError(how)
                found.append(json.loads(said.splitlines()[-1]))
            return found
        finally:
            for child in children:
                child.kill()
                child.communicate()


def _wait_until_ready(child: subprocess.Popen[str]) -> None:
    """Reads the line that says so: nothing else is in the pipe, since the child waits then.

    Raises:
        RuntimeError: it ended instead, or took too long.
    """
    assert child.stdout is not None, "a pipe was asked for"
    if not select.select([child.stdout], [], [], TIMEOUT)[0]:
        raise RuntimeError(f"not ready after {TIMEOUT:g} s")
    if child.stdout.readline() != "ready\n":
        raise RuntimeError(_end(child, TIMEOUT)[1])


def _end(child: subprocess.Popen[str], timeout: float) -> tuple[str, str]:
    """What a child said, and how it ended."""
    try:
        said, errors = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return "", f"not done after {timeout:g} s"
    last = (errors.strip().splitlines() or ["nothing said"])[-1]
    return said, f"ended with {child.returncode}: {last}"


if __name__ == "__main__":
    run_command("scale")
