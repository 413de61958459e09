"""Far-apart sets of patch orders, the classes of a jigsaw (Noroozi & Favaro 2016, section 3.3).

Greedy: from the identity on, the next order is the one farthest from those chosen, by the mean or
by the least Hamming distance to them; of equals, and there are thousands, the first in a shuffled
list. (In lexicographic order equals are neighbours: nearly all of the 100 orders of greatest mean
distance had a twin that differs in two cells only.) The list is shuffled the same way always, so
that a set is the beginning of every longer one, in every run and on every machine.
"""

import contextlib
import math
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

Distance = Literal["mean", "min"]

MOST_CELLS = 9  # 3 x 3; the orders of 4 x 4 cells cannot be listed
QUICK = 10**8  # comparisons that take 0.1 s: a smaller set is not worth a file


def permutation_set(
    cells: int, count: int, distance: Distance = "mean", cache: Path | None = None
) -> np.ndarray:
    """`count` orders of `cells` cells: int32 [count, cells], each row a permutation.

    Takes 0.5 ms an order for 9 cells; sets of more than some hundreds are kept in a file.

    Args:
        cells: 2 ... 9.
        count: 1 ... cells!.
        distance: what is greatest at each choice: mean or min of the distances to those chosen.
        cache: folder for the longest set computed so far; None: `cache_folder()`. One that cannot
            be read or written only costs time.

    Raises:
        ValueError: there are not that many, or too many cells.
    """
    if not 2 <= cells <= MOST_CELLS:
        raise ValueError(f"cells ({cells}) must be in 2 ... {MOST_CELLS}")
    orders = math.factorial(cells)
    if not 1 <= count <= orders:
        raise ValueError(f"permutations ({count}) must be in 1 ... {orders}")
    if is_quick(cells, count):
        return _chosen(cells, count, distance).copy()
    folder = cache_folder() if cache is None else cache
    kept = _read(folder, cells, distance)
    if kept is None or len(kept) < count:
        kept = _chosen(cells, count, distance)
        _write(folder, kept, distance)
    return kept[:count].astype(np.int32)


def is_quick(cells: int, count: int) -> bool:
    """Whether a set is found so fast that it is not kept on file."""
    return count * math.factorial(cells) < QUICK


def file_of(cells: int, distance: Distance, cache: Path | None = None) -> Path | None:
    """The file of the longest set computed so far; None where there is no cache folder."""
    folder = cache_folder() if cache is None else cache
    # change the number when the sets change
    return None if folder is None else folder / "permutations-v1" / f"{cells}-{distance}.npy"


def cache_folder() -> Path | None:
    """FASTSSL_CACHE or the user's cache folder, as fastssl.demo.cache(); None without a home."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("FASTSSL_CACHE") or f"{users}/fastssl").expanduser()
    return None


def distances(orders: np.ndarray) -> tuple[float, int]:
    """Mean and least Hamming distance of any two of `orders`, int [at least 2, cells]."""
    count, cells = orders.shape
    # two orders agree in a column as often as pairs of equal entries are in it
    equal = sum(int((n * (n - 1)).sum()) for n in (np.bincount(column) for column in orders.T))
    columns = np.ascontiguousarray(orders.T.astype(np.uint8))
    least = cells
    for row in range(count - 1):
        agreement = _agreement(columns[:, row + 1 :], orders[row])
        least = min(least, cells - int(agreement.max()))
    return cells - equal / (count * (count - 1)), least


@lru_cache(maxsize=4)  # a run builds its graph three times: for names, rehearsal and loader
def _chosen(cells: int, count: int, distance: Distance) -> np.ndarray:
    """The greedy choice: int32 [count, cells]."""
    columns = _shuffled(_all_orders(cells))
    chosen = np.zeros(count, np.int64)  # column numbers; the first is the identity
    # Of each candidate with those chosen: the sum, or the greatest, of the agreements, where
    # distance = cells - agreement. Small integers in one pass each: 10 times faster than [N, cells]
    # comparisons in int64.
    narrow = np.uint16 if count * cells < 2**16 else np.uint32
    crowding = np.zeros(columns.shape[1], narrow if distance == "mean" else np.uint8)
    scratch = np.empty(columns.shape[1], np.uint8), np.empty(columns.shape[1], np.bool_)
    for number in range(1, count):
        agreement = _agreement(columns, columns[:, chosen[number - 1]], *scratch)
        if distance == "mean":
            crowding += agreement
            crowding[chosen[:number]] = np.iinfo(crowding.dtype).max  # none is chosen twice
        else:
            np.maximum(crowding, agreement, out=crowding)  # a chosen one agrees with itself: most
        chosen[number] = crowding.argmin()  # of equals the first
    return columns[:, chosen].T.astype(np.int32)


def _shuffled(columns: np.ndarray) -> np.ndarray:
    """The orders in a fixed random order, the identity first."""
    # raw numbers of a bit generator are the same in every release of numpy; shuffle() may not be
    keys = np.random.Philox(0).random_raw(columns.shape[1])
    keys[0] = 0
    return np.ascontiguousarray(columns[:, keys.argsort(kind="stable")])


def _agreement(
    columns: np.ndarray,
    order: np.ndarray,
    total: np.ndarray | None = None,
    equal: np.ndarray | None = None,
) -> np.ndarray:
    """In how many places each order agrees with `order`: uint8 [N] of `columns` [cells, N]."""
    total = np.empty(columns.shape[1], np.uint8) if total is None else total
    equal = np.empty(columns.shape[1], np.bool_) if equal is None else equal
    total[:] = 0
    for column, cell in zip(columns, order, strict=True):
        np.equal(column, np.uint8(cell), out=equal)
        np.add(total, equal.view(np.uint8), out=total)
    return total


def _all_orders(cells: int) -> np.ndarray:
    """All orders in lexicographic order, one a column: uint8 [cells, cells!]."""
    if cells == 1:
        return np.zeros((1, 1), np.uint8)
    rest = _all_orders(cells - 1)
    # what follows first cell f is an order of the others, which are counted past f
    blocks = [
        np.concatenate([np.full((1, rest.shape[1]), first, np.uint8), rest + (rest >= first)])
        for first in range(cells)
    ]
    return np.concatenate(blocks, axis=1)


def _read(folder: Path | None, cells: int, distance: Distance) -> np.ndarray | None:
    """The set on file; None if there is none or it is damaged."""
    path = file_of(cells, distance, folder)
    if path is None:
        return None
    try:
        kept = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    right = kept.dtype == np.uint8 and kept.ndim == 2 and kept.shape[1] == cells
    if not right or (np.sort(kept, axis=1) != np.arange(cells)).any():
        return None
    return kept if len(np.unique(kept, axis=0)) == len(kept) else None


def _write(folder: Path | None, orders: np.ndarray, distance: Distance) -> None:
    """Puts the set on file in one piece, whatever other processes do at the same time."""
    path = file_of(orders.shape[1], distance, folder)
    if path is None:
        return
    with contextlib.suppress(OSError):  # no room, or not ours: it is computed again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
            try:
                np.save(part, orders.astype(np.uint8))
                part.close()
                os.replace(part.name, path)
            except BaseException:
                os.unlink(part.name)
                raise
