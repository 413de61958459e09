"""Whether B is slower, larger or costlier than A: two results of one command, row by row.

    python -m benchmarks compare A.json B.json [--threshold 5]

Judged are the rows of this project: `fastssl` of tasks and stores, the stages but those of the
machine's limit and of what slows a step down (which gets worse when the loader gets faster), every
row of the other commands. The rest is printed as what the machine, or somebody else's code, did
meanwhile. Exits with 1 when a judged row of B is worse, or is missing (tune tries what the time
allows: there nothing is missed), with 0 when none is, and with 2 when the files can't be compared.

A row is worse when all of these hold:
  - B/A, the median over all pairs of values (Hodges and Lehmann 1963, here of the ratio: the
    repeats of two files did not take turns), is beyond the threshold;
  - the interval of pairs that the rank test of Mann and Whitney does not refuse at 5 % a side is on
    one side of 1. With 3 repeats each that is the whole range: B's best value is worse than A's
    worst. Fewer repeats than that support no verdict;
  - Welch's test of the logarithms, one-sided, refuses it to be noise where the chance of calling
    any judged row of the file worse is held at 5 % (Holm 1979). It supposes that logarithms of
    repeats are normal; ranks alone could say nothing of more than one row with 3 repeats each.
Where both files were measured on a CPU and have a decode limit in the group (tasks, stages), each
value is divided by the limit of its repeat before (CPU time by the CPU time of the limit): a faster
machine cancels. Elsewhere what moved between the runs (another tenant, a hotter machine) is in no
repeat's spread: let the threshold be above what two runs of the same code show.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import result
from benchmarks.__main__ import run_command
from benchmarks.result import Result, Row

HELP = "two results of one command: ratios with noise; exit code 1 where B is worse"
RISK = 0.05  # of calling noise a change, a side: in the interval a row, in the verdict all rows
OURS = {  # rows that are judged; of other commands all
    "tasks": ("fastssl",),
    "stores": ("fastssl",),
    "stages": (
        *("listing", "first_batch", "read", "decode", "graph", "loader", "step", "end_to_end"),
        "gpu_memory",
    ),
}
BY_CHANCE = ("tune",)  # which rows these have depends on the time
LIMIT = "decode_limit"
LOWER_IS_BETTER = ("s", "ms", "MB", "GB", "CPU ms/image")  # a unit that ends in /s: higher is
# Settings that may differ without a word: how long was measured, and what was seen on the way
NOT_THE_WORK = ("out", "note", "repeats", "seconds")
SEEN = ("_seconds", "_mb")  # the ends of their names

Verdict = Literal[
    "worse", "better", "same", "too few repeats", "no direction", "no ratio", "not judged"
]
Key = tuple[str, str, str]  # group, name, and the size of what grows where there is one


@dataclass(frozen=True)
class Ratio:
    """B/A; `least` to `most` is the noise."""

    middle: float
    least: float
    most: float
    enough: bool  # repeats, for any verdict
    chance_below: float  # of so much less than 1, or so much more, where nothing has changed
    chance_above: float


@dataclass(frozen=True)
class Change:
    """B beside A in one quantity."""

    key: Key
    unit: str
    a: list[float]
    b: list[float]
    ratio: Ratio | None  # None: of values that are not above 0 there is none
    to_limit: Ratio | None  # the same of values divided by the machine's limit, where it is known
    verdict: Verdict


def arguments(parser: argparse.ArgumentParser) -> None:
    """Two files and a bound."""
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument(
        "--threshold",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="changes up to this are no matter (default %(default)s)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Prints the changes as a Markdown table.

    Raises:
        ValueError: a file is no result, they are of different commands, or share no row.
    """
    if not 0 <= arguments.threshold < 100:
        raise ValueError(f"--threshold ({arguments.threshold}) must be from 0 to below 100 percent")
    a, b = result.read(arguments.a), result.read(arguments.b)
    if a.benchmark != b.benchmark:
        raise ValueError(
            f"{arguments.a} is of {a.benchmark}, {arguments.b} of {b.benchmark}: "
            "compare two of one command"
        )
    changes = compare(a, b, arguments.threshold / 100)
    if not changes:
        raise ValueError(f"{arguments.a} and {arguments.b} have no row in common")
    for letter, path, each in (("A", arguments.a, a), ("B", arguments.b, b)):
        print(f"{letter}: {path}, {_origin(each)}")
    missed = missing(a, b)
    for line in (*differences(a, b), *unmatched(a.rows, b.rows)):
        print(line)
    judged = [change for change in changes if change.verdict != "not judged"]
    for change in changes:
        if change.verdict == "not judged":
            print(_of_the_machine(change))
    print(table(judged))
    worse = [change for change in judged if change.verdict == "worse"]
    bound = f"{arguments.threshold:g} % and by more than noise"
    print(f"{len(worse)} of {len(judged)} quantities are worse by more than {bound}")
    if missed:
        print(f"B lacks {', '.join(missed)}")
    return int(bool(worse or missed))


def compare(a: Result, b: Result, threshold: float) -> list[Change]:
    """The changes in rows that both have in the same unit, in A's order.

    Args:
        a: a result.
        b: another of the same command.
        threshold: a share; 0.05 forgives 5 %.

    Raises:
        ValueError: one side has two rows of the same name.
    """
    in_a, in_b = _by_key(a.rows), _by_key(b.rows)
    on_cpu = not any(str(each.settings.get("device", "cpu")).startswith("cuda") for each in (a, b))
    changes = []
    for key, row in in_a.items():
        other = in_b.get(key)
        if other is None or other.unit != row.unit:
            continue
        limit = (key[0], LIMIT, "")
        limits = (in_a.get(limit), in_b.get(limit)) if on_cpu else (None, None)
        quantities = [(row.unit, "values")]
        if row.cpu_ms and other.cpu_ms:
            quantities.append(("CPU ms/image", "cpu_ms"))
        for unit, name in quantities:
            both = [vars(each)[name] for each in (row, other)]
            relative = [
                _divided(values, None if each is None else vars(each)[name])
                for values, each in zip(both, limits, strict=True)
            ]
            changes.append(
                Change(
                    key=key,
                    unit=unit,
                    a=both[0],
                    b=both[1],
                    ratio=_ratio(*both),
                    to_limit=_ratio(*relative) if all(relative) else None,
                    verdict="same" if _is_ours(a.benchmark, key[1]) else "not judged",
                )
            )
    return _judged(changes, threshold)


def missing(a: Result, b: Result) -> list[str]:
    """The names of judged rows that B does not have, or not in A's unit."""
    if a.benchmark in BY_CHANCE:
        return []
    in_b = _by_key(b.rows)
    return [
        _title(key)
        for key, row in _by_key(a.rows).items()
        if _is_ours(a.benchmark, key[1]) and (key not in in_b or in_b[key].unit != row.unit)
    ]


def unmatched(a: Sequence[Row], b: Sequence[Row]) -> list[str]:
    """A line for each row that only one side has, or both in different units."""
    in_a, in_b = _by_key(a), _by_key(b)
    lines = [f"missing in B: {_title(key)}" for key in in_a if key not in in_b]
    lines += [f"new in B: {_title(key)}" for key in in_b if key not in in_a]
    lines += [
        f"not compared: {_title(key)} is in {in_a[key].unit} in A, in {in_b[key].unit} in B"
        for key in in_a
        if key in in_b and in_a[key].unit != in_b[key].unit
    ]
    return lines


def differences(a: Result, b: Result) -> list[str]:
    """A warning for what differs besides the code: machine, versions, data, work."""
    facts_a, facts_b = a.manifest.machine, b.manifest.machine
    versions_a, versions_b = facts_a.get("versions"), facts_b.get("versions")
    machine = [
        *_differing(facts_a, facts_b, ("cpu", "cores_allowed", "cgroup_cpu", "python")),
        *_differing({"gpu": _gpus(facts_a)}, {"gpu": _gpus(facts_b)}, ("gpu",)),
    ]
    if isinstance(versions_a, dict) and isinstance(versions_b, dict):
        machine += _differing(versions_a, versions_b, sorted({*versions_a, *versions_b}))
    data = [
        *_differing({"page cache": a.manifest.page_cache}, {"page cache": b.manifest.page_cache}),
        *_differing(a.manifest.file_system or {}, b.manifest.file_system or {}, ("type",)),
    ]
    named = sorted({*a.settings, *b.settings}.difference(NOT_THE_WORK))
    work = [name for name in named if not name.endswith(SEEN)]
    found = (
        ("machines or versions, not only code, are compared", machine),
        ("the data lay elsewhere", data),
        ("the work was another", _differing(a.settings, b.settings, work)),
    )
    return [f"WARNING: {what}: {'; '.join(each)}" for what, each in found if each]


def table(changes: Sequence[Change]) -> str:
    """The changes in Markdown."""
    titles = ("row", "unit", "A", "B", "B/A (noise)", "by the decode limit (noise)", "B is")
    lines = [titles, ["---"] * len(titles)]
    for each in changes:
        values = (result.spread(each.a), result.spread(each.b))
        ratios = (_shown(each.ratio), _shown(each.to_limit))
        lines.append((_title(each.key), each.unit, *values, *ratios, each.verdict))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def holm(chances: Sequence[float], risk: float = RISK) -> list[bool]:
    """Which of the tests refuse, if the risk that any of them does so by chance is to be `risk`."""
    order = sorted(range(len(chances)), key=chances.__getitem__)
    refused = [False] * len(chances)
    for place, number in enumerate(order):
        if chances[number] > risk / (len(chances) - place):
            break
        refused[number] = True
    return refused


def chance_of_more(a: Sequence[float], b: Sequence[float]) -> float:
    """How likely B's logarithms are so far above A's where none is: Welch's test, one-sided.

    1 where a side has a single value.
    """
    if min(len(a), len(b)) < 2:
        return 1.0
    logs = np.log(a), np.log(b)
    more = float(logs[1].mean() - logs[0].mean())
    errors = [float(each.var(ddof=1)) / len(each) for each in logs]
    if sum(errors) < 1e-24:  # counts and sizes may be the same in every repeat
        return float(more <= 1e-12)
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(each) - 1) for error, each in zip(errors, logs, strict=True)
    )
    # Student's t as the tangent of an angle: the density is a power of the cosine
    angle = math.atan(more / math.sqrt(sum(errors) * freedom))
    steps = np.linspace(angle, math.pi / 2, 4001)
    middles = (steps[1:] + steps[:-1]) / 2
    area = float((np.cos(middles) ** (freedom - 1)).sum()) * float(steps[1] - steps[0])
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    return min(1.0, math.exp(scale) / math.sqrt(math.pi) * area)


def interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float, bool]:
    """B/A over all pairs of positive values: median, least and most but for noise.

    The last says whether there are repeats enough for the interval to hold at `RISK` a side.
    """
    pairs = sorted(y / x for x in a for y in b)
    outside = _pairs_outside(len(a), len(b))
    cut = max(0, outside - 1)
    return statistics.median(pairs), pairs[cut], pairs[-1 - cut], outside > 0


def _judged(changes: Sequence[Change], threshold: float) -> list[Change]:
    """The changes with their verdicts: what can be noise depends on how many are judged."""
    tested: list[tuple[int, Ratio, bool]] = []  # place, ratio, whether more is better
    made = list(changes)
    for place, each in enumerate(changes):
        ratio = each.to_limit or each.ratio
        verdict = each.verdict
        if verdict == "not judged":
            continue
        more_is_better = each.unit.endswith("/s")
        if ratio is None:
            verdict = "no ratio"
        elif not (more_is_better or each.unit in LOWER_IS_BETTER):
            verdict = "no direction"
        elif not ratio.enough:
            verdict = "too few repeats"
        else:
            tested.append((place, ratio, more_is_better))
        made[place] = replace(each, verdict=verdict)
    below = holm([ratio.chance_below for _, ratio, _ in tested])
    above = holm([ratio.chance_above for _, ratio, _ in tested])
    for (place, ratio, more_is_better), less, more in zip(tested, below, above, strict=True):
        less = less and ratio.middle < 1 - threshold and ratio.most < 1
        more = more and ratio.middle > 1 + threshold and ratio.least > 1
        if less or more:
            verdict = "better" if more == more_is_better else "worse"
            made[place] = replace(made[place], verdict=verdict)
    return made


def _ratio(a: Sequence[float], b: Sequence[float]) -> Ratio | None:
    if min(*a, *b) <= 0:
        return None
    return Ratio(*interval(a, b), chance_of_more(b, a), chance_of_more(a, b))


def _divided(values: Sequence[float], by: Sequence[float] | None) -> list[float]:
    """Repeat by repeat; [] where that can't be."""
    if by is None or len(by) != len(values) or min(by) <= 0:
        return []
    return [value / limit for value, limit in zip(values, by, strict=True)]


def _is_ours(benchmark: str, name: str) -> bool:
    return benchmark not in OURS or name in OURS[benchmark]


def _of_the_machine(change: Change) -> str:
    """A line about a row that is not judged."""
    ratio = "no ratio" if change.ratio is None else f"x{change.ratio.middle:.2f}"
    return f"not judged: {_title(change.key)} {ratio} in {change.unit}"


def _shown(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio.middle:.3f} ({ratio.least:.3f} - {ratio.most:.3f})"


def _pairs_outside(a: int, b: int) -> int:
    """The largest k for which Mann and Whitney's U is below k by chance with at most `RISK`.

    The coefficients of the Gaussian binomial count the orders of `a` and `b` values by their U.
    """
    counts = [1]
    for factor in range(1, a + 1):
        longer = [*counts, *[0] * (b + factor)]
        for power in range(len(counts)):  # times (1 - q^(b + factor))
            longer[power + b + factor] -= counts[power]
        for power in range(factor, len(longer)):  # divided by (1 - q^factor)
            longer[power] += longer[power - factor]
        counts = longer[: factor * b + 1]
    orders, below = math.comb(a + b, a), 0
    for k, count in enumerate(counts):
        below += count
        if below > RISK * orders:
            return k
    return len(counts)


def _by_key(rows: Sequence[Row]) -> dict[Key, Row]:
    found: dict[Key, Row] = {}
    for row in rows:
        key = (row.group, row.name, str(row.extra.get("size", "")))
        if key in found:
            raise ValueError(f"two rows are called {_title(key)}: which is meant can't be told")
        found[key] = row
    return found


def _title(key: Key) -> str:
    group, name, size = key
    return " ".join(part for part in (f"{group}:" if group else "", name, size) if part)


def _origin(each: Result) -> str:
    commit = (each.manifest.commit or "no commit")[:12]
    changed = ", with changes" if each.manifest.dirty else ""
    return f"commit {commit}{changed}, {each.manifest.measured or 'no date'}"


def _gpus(facts: Mapping[str, Any]) -> list[Any]:
    return [f"{gpu.get('name')} driver {gpu.get('driver')}" for gpu in facts.get("gpu") or []]


def _differing(
    a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str] | None = None
) -> list[str]:
    """`name: A's -> B's` for what differs; what either does not know is no difference."""
    found = []
    for name in names if names is not None else list(a):
        x, y = a.get(name), b.get(name)
        if x is not None and y is not None and x != y:
            found.append(f"{name} {x} -> {y}")
    return found


if __name__ == "__main__":
    run_command("compare")
