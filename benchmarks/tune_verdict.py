"""What `tune` concludes from its final: which settings to take, how sure it is, and their YAML."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from benchmarks import method
from fastssl import loader
from fastssl.recipe_text import in_yaml

# Of the final. One of two equals wins all of them by luck in 1 of 32 times; the best of three that
# are no faster than the present settings, which all three are held against, in up to 3 of 32.
ROUNDS = 5
WORTH = 1.02  # a smaller gain is called noise


@dataclass(frozen=True)
class Verdict:
    """What came out of the final."""

    winner: loader.Options
    recommended: loader.Options  # the present settings unless the winner is beyond noise
    share: float  # of the rounds, in which the winner beat the present settings
    ratio: tuple[float, float, float]  # winner to present: median, least, greatest over the rounds
    sentence: str


def judge(
    present: loader.Options,
    measured: Mapping[loader.Options, method.Measured],
    names: Mapping[loader.Options, str],
) -> Verdict:
    """Compares the fastest with the present settings, round by round.

    Args:
        present: one of the measured.
        measured: the final.
        names: of all measured.
    """
    winner = max(measured, key=lambda options: statistics.median(measured[options].rates))
    ratio = method.ratio(measured[winner], measured[present])
    if winner == present:
        sentence = f"The present settings ({names[present]}) are the fastest of the final: keep"
        return Verdict(present, present, 0.0, ratio, f"{sentence} them.")
    each = zip(measured[winner].rates, measured[present].rates, strict=True)
    won, rounds = sum(new > old for new, old in each), len(measured[present].rates)
    sentence = (
        f"{names[winner]} beat the present settings ({names[present]}) in {won} of {rounds} rounds,"
        f" with {ratio[0]:.3f} ({ratio[1]:.3f} - {ratio[2]:.3f}) times their images/s:"
    )
    if won == rounds >= ROUNDS and ratio[0] >= WORTH:
        luck = f"luck alone does that in up to {len(measured) - 1} of {2**rounds} finals"
        return Verdict(winner, winner, 1.0, ratio, f"{sentence} take it ({luck}).")
    asked = f"less than all of {ROUNDS} rounds, or than {WORTH - 1:.0%}, is within noise"
    sentence = f"{sentence} {asked}: keep the present settings."
    return Verdict(winner, present, won / rounds, ratio, sentence)


def block(options: loader.Options, comments: Sequence[str] = ()) -> str:
    """The section `loader` of a recipe, in YAML."""
    keys = [f"  {name}: {in_yaml(value)}\n" for name, value in asdict(options).items()]
    lines = [line for comment in comments for line in textwrap.wrap(comment, 98)]
    return "".join([*(f"# {line}\n" for line in lines), "loader:\n", *keys])


def overrides(options: loader.Options) -> list[str]:
    """The same for the command line."""
    return [f"loader.{name}={in_yaml(value)}" for name, value in asdict(options).items()]
