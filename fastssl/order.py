"""Which images each process sees at which step.

Pure functions of numbers, so that order, sharding, exactly-once and resume can be tested without a
loader. A step's images are one run of the epoch's permutation, cut into one piece a rank: two
processes with half the batch see at each step what one process with the whole batch sees. `rank`
and `world` are global: with the local rank every machine would read the same shards.
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
    filled = np.resize(generator.permutation(count), places)
    filled.flags.writeable = False  # it is everybody's
    return filled
