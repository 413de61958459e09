"""Pictures of results, as the README shows them: one PNG for each file of stages, tasks or scale.

    python -m benchmarks plot FILE.json ... --out FOLDER

FOLDER/<name of the file>.png is 1600 pixels wide, made to be shown at 800, on white, so that it
reads on a light page and on a dark one. Bars are medians, their whiskers the least and the greatest
repeat. The same file gives the same bytes with the same matplotlib: no date is in them.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import result
from benchmarks.__main__ import run_command
from benchmarks.result import Result, Row
from benchmarks.scale import slope

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELP = "PNGs of results: stages with the decode limit, tasks beside alternatives, scaling"
WIDTH = 8.0  # inches, 800 pixels on a page
DPI = 200
LIMIT = "decode_limit"
STAGES = (
    *("read_cold", "read", "decode", "graph", "loader"),
    *("step", "interference", "end_to_end"),
)
CUT = 3.0  # a bar longer than so many decode limits would make the others a line: it is cut
# Colours that tell apart for all eyes (Okabe and Ito 2008), ours the strongest
INK, FAINT, OURS = "#1f2328", "#d0d7de", "#0072b2"
CONTENDERS = {"fastssl": OURS, "ffcv": "#e69f00", "tuned": "#56b4e9", "pil": "#b8bec5"}
LINES = (OURS, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
LIMITS: dict[str, Any] = {
    "bound": {"color": INK, "linewidth": 1.6, "linestyle": ":"},
    LIMIT: {"color": "#d55e00", "linewidth": 1.6, "linestyle": "--"},
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Results, and a folder."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")


def main(arguments: argparse.Namespace) -> int:
    """Draws each file.

    Raises:
        ValueError: matplotlib is missing, a file is no result or of a command without a picture,
            or two files would give one picture.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is missing: pip install matplotlib")
    if len({path.stem for path in arguments.files}) < len(arguments.files):
        raise ValueError("two of the files have one name, and would give one picture: rename one")
    found = [(path, result.read(path)) for path in arguments.files]
    figures = [(path, draw(path, each)) for path, each in found]
    for path, figure in figures:
        out = arguments.out / f"{path.stem}.png"
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
            # matplotlib would put its version in: the picture is the same without
            figure.savefig(out, dpi=DPI, facecolor="white", metadata={"Software": None})
        except OSError as error:
            raise ValueError(f"{out}: can't be written: {error.strerror}") from error
        print(out)
    return 0


def draw(path: Path, each: Result) -> "Figure":
    """The picture of a result; `path` is for the message.

    Raises:
        ValueError: there is none for its command, or no row to draw.
    """
    if each.benchmark == "stages":
        return stages(path, each.rows)
    if each.benchmark == "tasks":
        return tasks(path, each.rows)
    if each.benchmark == "scale":
        return scale(path, each.rows)
    raise ValueError(
        f"{path}: no picture is drawn of {each.benchmark}, only of stages, tasks, scale"
    )


def stages(path: Path, rows: Sequence[Row]) -> "Figure":
    """A bar for each stage, and the line that no stage behind decoding can pass."""
    groups = _groups(path, [row for row in rows if row.unit == "images/s"])
    heights = [0.34 * len(group) + 0.3 for group in groups.values()]
    figure = _figure(sum(heights) + 0.85)
    for axes, (title, group) in zip(_stacked(figure, heights), groups.items(), strict=True):
        bars = [row for row in group if row.name != LIMIT]
        bars.sort(key=_place)
        limit = next((statistics.median(row.values) for row in group if row.name == LIMIT), None)
        medians = [statistics.median(row.values) for row in bars]
        end = max(medians + ([limit] if limit else []))
        if limit:
            near = [value for value in medians if value <= CUT * limit]
            end = max([limit, *near])
        for place, row in enumerate(bars):
            color = OURS if row.name in ("loader", "end_to_end") else CONTENDERS["tuned"]
            _bar(axes, place, row.values, end, color)
            _number(axes, place, row.values, end)
        _categories(axes, [row.name.replace("_", " ") for row in bars], 1.3 * end, title)
        if limit:
            axes.axvline(limit, **LIMITS[LIMIT])
            axes.text(
                limit,
                -0.62,
                f"decode limit of this machine {limit:,.0f} ",
                color="#b34700",
                ha="right" if limit > 0.5 * end else "left",
                va="bottom",
            )
    _name_last(figure, "images/s")
    return figure


def tasks(path: Path, rows: Sequence[Row]) -> "Figure":
    """Bars for each task: ours and the alternatives; lines where the machine sets the limit."""
    groups = _groups(path, [row for row in rows if row.unit == "images/s"])
    found = {row.name for group in groups.values() for row in group}
    limits = [name for name in LIMITS if name in found]
    names = [name for name in CONTENDERS if name in found]
    names += sorted(found.difference(names, limits))
    # others than the four known ones get the colours that are left
    spare = dict(zip([n for n in names if n not in CONTENDERS], LINES[1:] * 9, strict=False))
    colors = CONTENDERS | spare
    bars = sum(row.name not in LIMITS for group in groups.values() for row in group)
    figure = _figure(0.22 * (bars + 0.8 * len(groups)) + 1.2)
    axes = figure.add_subplot()
    end = max(statistics.median(row.values) for group in groups.values() for row in group)
    ticks, place = [], 0.0
    for group in groups.values():
        first = place
        for name in names:
            for row in (row for row in group if row.name == name):
                _bar(axes, place, row.values, end, colors[name], height=0.9)
                _number(axes, place, row.values, end)
                place += 1
        ticks.append((first + place - 1) / 2)
        for row in (row for row in group if row.name in limits):
            middle = statistics.median(row.values)
            axes.plot([middle] * 2, [first - 0.6, place - 0.4], **LIMITS[row.name])
        place += 0.8
    _categories(axes, [], 1.12 * end, "")
    axes.set_yticks(ticks, list(groups))
    axes.set_ylim(place - 0.8, -0.8)
    handles = [axes.barh([0], [0], color=colors[name])[0] for name in names]
    handles += [axes.plot([], [], **LIMITS[name])[0] for name in limits]
    figure.legend(
        handles=handles,
        labels=[name.replace("_", " ") for name in [*names, *limits]],
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
    )
    _name_last(figure, "images/s")
    return figure


def scale(path: Path, rows: Sequence[Row]) -> "Figure":
    """Cost against size on two logarithmic axes, units side by side, each line with its slope."""
    groups = _groups(path, [_in_seconds(row) for row in rows if _can_be_drawn(row)])
    heights = [2.3 + 0.16 * len({row.name for row in group}) for group in groups.values()]
    figure = _figure(sum(heights))
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)
    for part, (title, group) in zip(parts[:, 0], groups.items(), strict=True):
        units = list(dict.fromkeys(row.unit for row in group))
        for axes, unit in zip(part.subplots(1, len(units), squeeze=False)[0], units, strict=True):
            of_unit = [row for row in group if row.unit == unit]
            for line, name in enumerate(dict.fromkeys(row.name for row in of_unit)):
                costs = {_size(r): statistics.median(r.values) for r in of_unit if r.name == name}
                fitted = slope(costs)
                axes.plot(
                    sorted(costs),
                    [costs[size] for size in sorted(costs)],
                    color=LINES[line % len(LINES)],
                    marker=MARKERS[line % len(MARKERS)],
                    label=name if fitted is None else f"{name}: slope {fitted[0]:.2f}",
                    markersize=4,
                )
            axes.set(xscale="log", yscale="log", xlabel=title, ylabel=unit)
            _decades(axes, of_unit)
            axes.grid(color=FAINT, linewidth=0.6)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)
            _clean(axes)
    return figure


def _figure(height: float) -> "Figure":
    # an optional package, and `compare` or a result's --help must not wait for it
    from matplotlib.figure import Figure  # noqa: PLC0415

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _stacked(figure: "Figure", heights: Sequence[float]) -> "list[Axes]":
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)
    return list(axes[:, 0])


def _groups(path: Path, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by group, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    if not groups:
        raise ValueError(f"{path}: has no row that could be drawn")
    return groups


def _place(row: Row) -> int:
    return STAGES.index(row.name) if row.name in STAGES else len(STAGES)


def _bar(
    axes: "Axes", place: float, values: Sequence[float], end: float, color: str, height: float = 0.7
) -> None:
    middle = statistics.median(values)
    axes.barh([place], [min(middle, 1.1 * end)], color=color, height=height)
    if len(values) > 1 and middle <= 1.1 * end:
        axes.plot([min(values), max(values)], [place, place], color=INK, linewidth=1.2)


def _number(axes: "Axes", place: float, values: Sequence[float], end: float) -> None:
    """The median, behind the bar's whisker, on white: it may stand on the line of the limit."""
    middle = statistics.median(values)
    cut = middle > 1.1 * end
    axes.annotate(
        f"{result.number(middle)}{' (bar cut)' if cut else ''}",
        (1.1 * end if cut else max(values), place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=INK,
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def _categories(axes: "Axes", names: Sequence[str], end: float, title: str) -> None:
    """Bars from top to bottom, from zero on."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.65)
    axes.set_xlim(0, end)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    _clean(axes)


def _can_be_drawn(row: Row) -> bool:
    """On logarithmic axes."""
    return "size" in row.extra and _size(row) > 0 and statistics.median(row.values) > 0


def _size(row: Row) -> int:
    return int(row.extra["size"] or 0)


def _in_seconds(row: Row) -> Row:
    """Milliseconds share the seconds' axis."""
    if row.unit != "ms":
        return row
    return row.model_copy(update={"unit": "s", "values": [each / 1000 for each in row.values]})


def _decades(axes: "Axes", rows: Sequence[Row]) -> None:
    """Whole decades of cost, so that flat looks flat; few sizes are named one by one."""
    costs = np.log10([statistics.median(row.values) for row in rows])
    low, high = np.floor(costs.min() - 0.1), np.ceil(costs.max() + 0.1)
    axes.set_ylim(10.0**low, 10.0**high)
    axes.tick_params(axis="y", which="minor", labelleft=False)
    sizes = sorted({_size(row) for row in rows})
    if sizes[-1] < 30 * sizes[0]:
        axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        axes.set_xticks([], minor=True)


def _clean(axes: "Axes") -> None:
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def _name_last(figure: "Figure", text: str) -> None:
    """What the axis at the foot counts."""
    last: Any = figure.axes[-1]
    last.set_xlabel(text, color=INK)


if __name__ == "__main__":
    run_command("plot")
