"""Successive halving: the fastest of many candidates in a bounded time, most of it for the best.

All get a short turn in random order, the better half a turn twice as long, until few are left
(Jamieson & Talwalkar 2016, arXiv:1502.07943). One that fails is told and left out.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Candidate = TypeVar("Candidate")  # hashable


class Failed(Exception):
    """A candidate that does not run here."""

    def __init__(self, who: str, reason: str) -> None:
        """The message is `reason`, a line."""
        super().__init__(reason)
        self.who = who


@dataclass(frozen=True)
class Turn:
    """What a candidate did in a turn."""

    rate: float  # images/s
    cpu_ms: float  # an image


@dataclass(frozen=True)
class Search(Generic[Candidate]):
    """What halving found."""

    best: list[Candidate]  # `keep` at most, the fastest first
    rounds: list[dict[Candidate, Turn | str]]  # a line of reason for one that failed


def plan(
    count: int, seconds: float, *, keep: int, overhead: float, least: float
) -> tuple[int, float]:
    """How many of `count` candidates can be tried in `seconds`, and how long the first turns are.

    Each round has half the candidates and turns twice as long: all rounds take equally long.

    Args:
        count: of the candidates.
        seconds: for all rounds together.
        keep: how many are to be left.
        overhead: seconds that a turn takes beside those that are measured.
        least: seconds of the shortest turn that tells anything.
    """
    tried = count
    while True:
        rounds = max(1, math.ceil(math.log2(tried / keep)))
        turn = (seconds - 2 * tried * overhead) / (tried * rounds)  # n + n/2 + n/4 ... turns
        if turn >= least or tried <= keep:
            return tried, max(turn, least)
        tried -= 1


def halve(
    tried: Sequence[Candidate],
    measure: Callable[[Candidate, float], Turn],
    *,
    keep: int,
    seconds: float,
    until: float,
    draw: random.Random,
    clock: Callable[[], float] = time.perf_counter,
) -> Search[Candidate]:
    """Measures all, keeps the better half, doubles the time, until `keep` are left.

    Args:
        tried: the candidates.
        measure: gives one a turn of so many seconds; raises Failed.
        keep: how many are to be left.
        seconds: of a turn in the first round.
        until: no turn begins later, by `clock`, but for the first `keep`: what has taken longer
            than was thought is no reason to compare nothing. Who had none in a round counts by the
            one before.
        draw: for the order, anew in each round.
        clock: seconds.
    """
    left = list(tried)
    rounds: list[dict[Candidate, Turn | str]] = []
    latest: dict[Candidate, float] = {}
    while left and (not rounds or (clock() < until and len(left) > keep)):
        draw.shuffle(left)
        rounds.append({})
        for candidate in left:
            if clock() >= until and (len(rounds) > 1 or len(rounds[0]) >= keep):
                break
            try:
                turn = measure(candidate, seconds)
            except Failed as failure:
                rounds[-1][candidate] = str(failure)
                latest.pop(candidate, None)
            else:
                rounds[-1][candidate] = turn
                latest[candidate] = turn.rate
        left = sorted((each for each in left if each in latest), key=latest.__getitem__)[::-1]
        left = left[: max(keep, -(-len(left) // 2))]
        seconds *= 2
    return Search(left[:keep], rounds)
