"""Which images each process sees at which step.

Pure functions of numbers, so that order, sharding, exactly-once and resume can be tested without a
loader. Where images are read one by one (`shuffled`), a step's are one run of the epoch's
permutation, cut into one piece a rank: two processes with half the batch see at each step what one
process with the whole batch sees. Where images that lie together are read together (`by_chunks`),
each rank has one piece of the epoch to itself, so that no two read the same chunk; what a step sees
then depends on the number of ranks. `rank` and `world` are global: with the local rank every
machine would read the same shards.
"""

from functools import lru_cache

import numpy as np


def steps_per_epoch(count: int, world: int, batch: int) -> int:
    """Steps until each of `count` images was seen, the last one filled up."""
    return -(-count // (world * batch))


def shuffled(count: int, seed: int, epoch: int, rank: int, world: int, batch: int) -> np.ndarray:
    """The positions (0 ... count - 1) that `rank` sees in `epoch`: int64 [steps, batch].

    Each position once over all ranks, then the epoch's first ones again to fill the last step, so
    that every rank has the same number of full batches. Filled-in places are those from `count` on
    when the ranks' pieces are laid side by side: the tail of the last step.
    """
    filled = _permutation(count, seed, epoch, steps_per_epoch(count, world, batch) * world * batch)
    return _piece(filled, rank, world, batch)


def by_chunks(
    chunks: np.ndarray, seed: int, epoch: int, rank: int, world: int, batch: int, window: int
) -> np.ndarray:
    """As `shuffled`, where positions lie together in chunks: int64 [steps, batch].

    The chunks in an order from (seed, epoch), side by side and from their start again to fill all
    ranks' batches, are cut into one run a rank. Within it the positions of `window` chunks at a
    time are shuffled among each other, so that who reads a window's chunks has all its images.
    Filled-in places lie in the last windows of the last ranks.

    Args:
        chunks: int64, ends of runs of positions, ascending from the first run's; the last one is
            the number of positions. Must not change afterwards: orders of it are remembered.
        seed: of the order, as `epoch`.
        epoch: another epoch, another order.
        rank: global.
        world: ranks.
        batch: images a step of one rank.
        window: chunks, at least 1; with at least as many as there are, any image may come anywhere
            in its rank's run.
    """
    return _by_chunks(_Chunks(chunks), seed, epoch, rank, world, batch, window)


def in_order(count: int, rank: int, world: int, batch: int) -> np.ndarray:
    """As `shuffled`, in listing order: for probes. int64 [steps, batch]."""
    places = steps_per_epoch(count, world, batch) * world * batch
    return _piece(np.arange(places, dtype=np.int64) % count, rank, world, batch)


def _piece(filled: np.ndarray, rank: int, world: int, batch: int) -> np.ndarray:
    """A view: at every step one row of it is asked for, of millions."""
    return filled.reshape(-1, world, batch)[:, rank]


# An epoch's order is asked for at every step, the next one's while prefetching.
@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int, places: int) -> np.ndarray:
    """An order of 0 ... count - 1, from its start again until there are `places`."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    drawn = generator.permutation(count)
    filled = np.empty(places, np.int64)  # by hand: np.resize lays twice as many side by side
    for begin in range(0, places, count):
        filled[begin : begin + count] = drawn[: places - begin]
    filled.flags.writeable = False  # it is everybody's
    return filled


class _Chunks:
    """An array that is told from others by what it is, not by what it holds: millions of ends."""

    def __init__(self, ends: np.ndarray) -> None:
        self.ends = ends

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Chunks) and self.ends is other.ends

    def __hash__(self) -> int:
        return id(self.ends)  # which nothing else gets while it is remembered here


@lru_cache(maxsize=2)
def _by_chunks(
    chunks: _Chunks, seed: int, epoch: int, rank: int, world: int, batch: int, window: int
) -> np.ndarray:
    ends = chunks.ends
    count = int(ends[-1])
    steps = steps_per_epoch(count, world, batch)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    order = generator.permutation(len(ends))
    laid_ends = np.cumsum((ends - starts)[order])  # of the chunks, where they lie side by side
    place, stop = rank * steps * batch, (rank + 1) * steps * batch
    piece = np.empty(stop - place, np.int64)
    window_ends: list[int] = []
    filled = in_window = 0
    while filled < len(piece):
        within = (place + filled) % count
        number = int(np.searchsorted(laid_ends, within, side="right"))
        left = min(int(laid_ends[number]) - within, len(piece) - filled)  # of this chunk
        first = int(ends[order[number]]) - (int(laid_ends[number]) - within)
        piece[filled : filled + left] = np.arange(first, first + left)
        filled += left
        in_window += 1
        if in_window == window or filled == len(piece):
            window_ends.append(filled)
            in_window = 0
    # A zero at the end of (seed, epoch, 0) would be no other seed than (seed, epoch).
    own = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, 1 + rank))))
    begin = 0
    for end in window_ends:
        own.shuffle(piece[begin:end])
        begin = end
    piece.flags.writeable = False  # it is everybody's
    return piece.reshape(steps, batch)
