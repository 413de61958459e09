"""Generates a set of patch orders for jigsaw, ahead of a run or for a look at it.

    python -m fastssl.permutations COUNT [--cells 9] [--distance mean|min] [--out FILE.npy|FILE.txt]

Prints how far apart the orders are. A set that takes long to find is kept in the cache, where runs
find it. Exit codes: 0 done, 2 a mistake in the arguments or a file that cannot be written.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def main(arguments: Sequence[str]) -> int:
    """Finds the set and tells about it; returns the exit code."""
    description, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m fastssl.permutations",
        description=description,
        epilog=usage.split("\n\n")[1],
    )
    parser.add_argument("count", type=int, help="how many orders")
    parser.add_argument("--cells", type=int, default=9, help="9 for a grid of 3 x 3 (the default)")
    parser.add_argument(
        "--distance",
        choices=("mean", "min"),
        default="mean",
        help="Hamming distance to those chosen that is greatest at each choice (default: mean)",
    )
    parser.add_argument("--out", type=Path, help="FILE.npy (int32) or FILE.txt (one order a line)")
    given = parser.parse_args(arguments)  # exits with 2 itself
    try:
        return generate(given.count, given.cells, given.distance, given.out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def generate(count: int, cells: int, distance: str, out: Path | None) -> int:
    """Finds the set, prints its distances and where it lies, and writes it to `out` if given.

    Raises:
        ValueError: there is no such set, or `out` has another suffix than .npy and .txt.
        OSError: `out` cannot be written.
    """
    if out is not None and out.suffix not in (".npy", ".txt"):
        raise ValueError(f"--out {out}: give a name that ends in .npy or .txt")
    # By name, as a recipe does: fastssl is installed without the graphs, which live in the checkout
    # or wherever a recipe finds them, so that no import line here may lead to them.
    sets: Any = importlib.import_module("pipelines.permutations")
    began = time.perf_counter()
    orders = sets.permutation_set(cells, count, distance)
    seconds = time.perf_counter() - began
    print(f"{count} orders of {cells} cells, greatest {distance} distance, {seconds:.2f} s")
    if count > 1:
        mean, least = sets.distances(orders)
        print(f"Hamming distance of two orders: mean {mean:.4f}, least {least}")
    kept = sets.file_of(cells, distance)
    if kept is not None and kept.exists() and not sets.is_quick(cells, count):
        print(f"cached in {kept}")
    if out is not None:
        _write(out, orders)
        print(f"written to {out}")
    return 0


def _write(out: Path, orders: np.ndarray) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npy":
        np.save(out, orders)
    else:
        np.savetxt(out, orders, fmt="%d")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
