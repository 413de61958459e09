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
    whole = _permutation(count, seed, epoch)
    return _piece(whole, rank, world, batch)


def in_order(count: int, rank: int, world: int, batch: int) -> np.ndarray:
    """As `shuffled`, in listing order: for probes. int64 [steps, batch]."""
    return _piece(np.arange(count, dtype=np.int64), rank, world, batch)


def _piece(whole: np.ndarray, rank: int, world: int, batch: int) -> np.ndarray:
    steps = steps_per_epoch(len(whole), world, batch)
    filled = np.resize(whole, steps * world * batch)  # repeats from the start
    return filled.reshape(steps, world, batch)[:, rank]


@lru_cache(
    maxsize=2
)  # an epoch's order is asked for at every step, the next one's while prefetching
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    return generator.permutation(count)
