"""Whether B is slower, larger or costlier than A: two results of one command, row by row.

    python -m benchmarks compare A.json B.json [--threshold 5]

Exits with 1 when a row of B is worse by more than the threshold and by more than the noise, with 0
when none is, and with 2 when the files can't be compared.

The repeats of two files did not take turns, so no value of A belongs to one of B: B/A is the
median over all pairs of values (Hodges and Lehmann 1963, here of the ratio), and the noise is the
interval of pairs that the rank test of Mann and Whitney does not refuse at 5 % a side. With 3
repeats on each side that is the whole range: B is worse beyond noise when its best value is worse
than A's worst. Fewer repeats than that support no verdict. What moved between the runs (another
tenant, a hotter machine) is in no repeat's spread: let the threshold be above what two runs of the
same code show.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import result
from benchmarks.result import Result, Row

HELP = "two results of one command: ratios with noise; exit code 1 where B is worse"
RISK = 0.05  # of calling noise a change, a side and row
LOWER_IS_BETTER = ("s", "ms", "MB", "GB", "CPU ms/image")  # a unit that ends in /s: higher is
# Settings that may differ without a word: how long was measured, and what was seen on the way
NOT_THE_WORK = ("out", "note", "repeats", "seconds")
SEEN = ("_seconds", "_mb")  # the ends of their names

Verdict = Literal["worse", "better", "same", "too few repeats", "no direction", "no ratio"]
Key = tuple[str, str, str]  # group, name, and the size of what grows where there is one


@dataclass(frozen=True)
class Change:
    """B beside A in one quantity; `least` to `most` is the noise."""

    key: Key
    unit: str
    a: list[float]
    b: list[float]
    middle: float  # B/A
    least: float
    most: float
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
    changes = compare(a.rows, b.rows, arguments.threshold / 100)
    if not changes:
        raise ValueError(f"{arguments.a} and {arguments.b} have no row in common")
    for letter, path, each in (("A", arguments.a, a), ("B", arguments.b, b)):
        print(f"{letter}: {path}, {_origin(each)}")
    for line in (*differences(a, b), *unmatched(a.rows, b.rows)):
        print(line)
    print(table(changes))
    worse = [change for change in changes if change.verdict == "worse"]
    bound = f"{arguments.threshold:g} % and by more than noise"
    print(f"{len(worse)} of {len(changes)} quantities are worse by more than {bound}")
    return int(bool(worse))


def compare(a: Sequence[Row], b: Sequence[Row], threshold: float) -> list[Change]:
    """The changes in rows that both have in the same unit, in A's order.

    Args:
        a: rows.
        b: rows.
        threshold: a share; 0.05 forgives 5 %.

    Raises:
        ValueError: one side has two rows of the same name.
    """
    in_b = _by_key(b)
    changes = []
    for key, row in _by_key(a).items():
        other = in_b.get(key)
        if other is None or other.unit != row.unit:
            continue
        changes.append(_change(key, row.unit, row.values, other.values, threshold))
        if row.cpu_ms and other.cpu_ms:
            changes.append(_change(key, "CPU ms/image", row.cpu_ms, other.cpu_ms, threshold))
    return changes


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
    lines = ["| row | unit | A | B | B/A (noise) | B is |", "|---|---|---|---|---|---|"]
    for each in changes:
        a, b = result.spread(each.a), result.spread(each.b)
        ratio = f"{each.middle:.3f} ({each.least:.3f} - {each.most:.3f})"
        if each.verdict == "no ratio":
            ratio = ""
        lines.append(f"| {_title(each.key)} | {each.unit} | {a} | {b} | {ratio} | {each.verdict} |")
    return "\n".join(lines)


def interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float, bool]:
    """B/A over all pairs of positive values: median, least and most but for noise.

    The last says whether there are repeats enough for the interval to hold at `RISK` a side.
    """
    pairs = sorted(y / x for x in a for y in b)
    outside = _pairs_outside(len(a), len(b))
    cut = max(0, outside - 1)
    return statistics.median(pairs), pairs[cut], pairs[-1 - cut], outside > 0


def _change(
    key: Key, unit: str, a: Sequence[float], b: Sequence[float], threshold: float
) -> Change:
    if min(*a, *b) <= 0:
        return Change(key, unit, list(a), list(b), math.nan, math.nan, math.nan, "no ratio")
    middle, least, most, enough = interval(a, b)
    verdict: Verdict = "same"
    if not (unit.endswith("/s") or unit in LOWER_IS_BETTER):
        verdict = "no direction"
    elif not enough:
        verdict = "too few repeats"
    else:
        less = middle < 1 - threshold and most < 1
        more = middle > 1 + threshold and least > 1
        if less or more:
            verdict = "better" if more == unit.endswith("/s") else "worse"
    return Change(key, unit, list(a), list(b), middle, least, most, verdict)


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
