"""Line charts as inline SVG: several runs in one, thinned honestly, every drawn value beside it.

A chart's values lie in it as JSON too, where the page's script finds them when the pointer hovers.
Colours are classes (c0 ... c7) that the page's style sheet gives, for light and for dark.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastssl.reporting.markup import Markup, element, folded, join

WIDTH, HEIGHT = 440, 250  # units of the drawing; shown about as large as that in pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40  # margins around the plot
COLORS = 8
MOST_POINTS = 1200  # of one chart, over all its series
FEW = 40  # points of a series, up to which each gets a dot

Unit = Literal["", "%", "images/s"]


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    run: int  # decides the colour
    points: list[tuple[float, float]]  # (x, value), by x; values may be NaN or infinite
    chance: bool = False  # drawn thin and dashed: what guessing would reach


@dataclass(frozen=True)
class Bin:
    """What is drawn at one place: one value, or the mean of several and their range."""

    first: float  # x
    last: float  # x; that of `first` for a single value
    low: float
    mean: float
    high: float
    count: int  # finite values


def thin(points: Sequence[tuple[float, float]], most: int) -> list[Bin | None]:
    """At most `most` bins of equally many points; None where none of a bin's values is finite.

    Up to `most` points each is a bin of its own, unchanged.
    """
    share = max(1, math.ceil(len(points) / most))
    bins: list[Bin | None] = []
    for start in range(0, len(points), share):
        part = points[start : start + share]
        values = [value for _, value in part if math.isfinite(value)]
        if not values:
            bins.append(None)
            continue
        low, high = min(values), max(values)
        mean = low if low == high else math.fsum(values) / len(values)
        bins.append(Bin(part[0][0], part[-1][0], low, mean, high, len(values)))
    return bins


def chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: Unit = "",
    x_title: str = "optimizer step",
    labels: Sequence[str] = (),
    from_zero: bool = False,
    note: str = "",
) -> Markup:
    """A figure with axes, lines and the values as JSON.

    Args:
        title: what is drawn.
        series: at least one, with at least one point.
        unit: "%": the values are parts of 1.
        x_title: what x counts.
        labels: of x = 0, 1, 2, ..., where x is no number but a place in a row.
        from_zero: whether the axis of values begins at 0.
        note: under the title.
    """
    most = max(40, MOST_POINTS // max(1, len([each for each in series if not each.chance])))
    thinned = [thin(each.points, most) for each in series]
    bins = [each for found in thinned for each in found if each is not None]
    notes = [note] if note else []
    binned = [
        (len(each.points), len(found), each.name)
        for each, found in zip(series, thinned, strict=True)
        if len(found) < len(each.points) and not each.chance
    ]
    notes += [
        f"{name}: {lines:,} lines in {count:,} bins of up to {math.ceil(lines / most):,};"
        " the line is their mean, the band their least and greatest."
        for lines, count, name in binned
    ]
    lost = sum(not math.isfinite(value) for each in series for _, value in each.points)
    if lost:
        notes.append(f"{lost:,} value{'s are' if lost > 1 else ' is'} not finite: a gap.")
    heading = element(
        "figcaption", {}, element("b", {}, title), *[element("small", {}, each) for each in notes]
    )
    if not bins:
        return element("figure", {"class": "chart"}, heading)
    y_ticks = ticks(
        0.0 if from_zero else min(each.low for each in bins),
        max(each.high for each in bins),
    )
    if labels:
        x_ticks: list[float] = [float(place) for place in range(len(labels))]
        x_low, x_high = -0.3, len(labels) - 0.7
    else:
        x_low, x_high = (f([f(each.first, each.last) for each in bins]) for f in (min, max))
        x_low = 0.0 if x_low < 0.2 * x_high else x_low
        x_high = x_high if x_high > x_low else x_low + 1
        x_ticks = [tick for tick in ticks(x_low, x_high, 5) if x_low <= tick <= x_high]
    x_of = _scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    axes = _axes(x_ticks, y_ticks, x_of, y_of, labels, unit, x_title)
    drawn = [
        _line(each, found, x_of, y_of)
        for each, found in sorted(zip(series, thinned, strict=True), key=lambda e: not e[0].chance)
    ]
    data = {
        "x": [x_low, x_high, LEFT, WIDTH - RIGHT],
        "y": [y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP],
        "unit": unit,
        "labels": list(labels),
        "series": [
            {"name": each.name, "class": _color(each.run), "points": _told(found)}
            for each, found in zip(series, thinned, strict=True)
        ],
    }
    words = [_words(each, labels, unit) for each in series if not each.chance]
    picture = element(
        "svg",
        {
            "viewBox": f"0 0 {WIDTH} {HEIGHT}",
            "role": "img",
            "tabindex": "0",
            "aria-label": f"{title}. {' '.join(words)}",
        },
        axes,
        *drawn,
        element("line", {"class": "cursor", "y1": str(TOP), "y2": str(HEIGHT - BOTTOM)}),
    )
    return element(
        "figure",
        {"class": "chart"},
        heading,
        picture,
        element("script", {"type": "application/json"}, as_json(data)),
    )


def as_json(data: object) -> Markup:
    """JSON that may stand in a <script>: nothing in it ends the element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def legend(names: Sequence[str], extra: Sequence[tuple[str, str]] = ()) -> Markup:
    """What each colour is; `extra`: (class, words) of lines that are not a run's."""
    items = [(f"key {_color(number)}", name) for number, name in enumerate(names)]
    return element(
        "ul",
        {"class": "legend"},
        *[
            element("li", {}, swatch(kind), element("span", {}, name))
            for kind, name in [*items, *extra]
        ],
    )


def swatch(kind: str) -> Markup:
    """A short piece of line: for a legend or a table."""
    return element(
        "svg",
        {"class": "swatch", "viewBox": "0 0 26 10", "aria-hidden": "true"},
        element("path", {"class": kind, "d": "M1 5H25"}),
    )


def run_swatch(number: int) -> Markup:
    """The line of run `number`."""
    return swatch(f"key {_color(number)}")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`: 1, 2 or 5 times a power of ten apart."""
    if not high / 2 - low / 2 > max(1e-9 * max(abs(low), abs(high)), 1e-300):
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread, high + spread
    if not math.isfinite(high - low):  # a float does not hold their difference: nothing is round
        return [low, 0.0, high]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def shown(value: float, unit: Unit = "") -> str:
    """A value with its unit, as people read it."""
    if not math.isfinite(value):
        return str(value)
    if unit == "%":
        return f"{100 * value:.1f} %"
    if unit == "images/s":
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 and value == int(value) else f"{value:.4g}"


def folded_legend(names: Sequence[str], extra: Sequence[tuple[str, str]] = ()) -> Markup:
    """A legend that stays in sight; folded where it would cover the page."""
    drawn = legend(names, extra)
    if len(names) > COLORS:
        return element("div", {"class": "key"}, folded(f"{len(names)} runs", drawn))
    return element("div", {"class": "key"}, drawn)


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    labels: Sequence[str],
    unit: Unit,
    x_title: str,
) -> Markup:
    parts: list[Markup] = []
    step = y_ticks[1] - y_ticks[0]
    for tick in y_ticks:
        y = f"{y_of(tick):.1f}"
        parts.append(
            element(
                "line",
                {"class": "grid", "x1": str(LEFT), "x2": str(WIDTH - RIGHT), "y1": y, "y2": y},
            )
        )
        place = {"x": str(LEFT - 6), "y": y, "dy": "0.35em", "text-anchor": "end"}
        parts.append(element("text", place, _tick(tick, step, unit)))
    wide = len(labels) > 9  # more would run into one another
    for number, tick in enumerate(x_ticks):
        if wide and number % math.ceil(len(labels) / 9):
            continue
        place = {"x": f"{x_of(tick):.1f}", "y": str(HEIGHT - BOTTOM + 16), "text-anchor": "middle"}
        apart = x_ticks[1] - x_ticks[0] if len(x_ticks) > 1 else 1.0
        text = labels[int(tick)][:12] if labels else _tick(tick, apart, "")
        parts.append(element("text", place, text))
    middle = {"x": str((LEFT + WIDTH - RIGHT) / 2), "y": str(HEIGHT - 5), "text-anchor": "middle"}
    parts.append(element("text", middle | {"class": "axis"}, x_title))
    return join(parts)


def _tick(value: float, step: float, unit: Unit) -> str:
    """With as many digits as tell it from its neighbours."""
    value = 0.0 if abs(value) < step / 1000 else value
    if unit == "%":
        digits = max(0, -math.floor(math.log10(100 * step) + 1e-9))
        return f"{100 * value:.{digits}f} %"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= size / 10 and abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    if step >= 1e5 or step < 1e-4:
        return f"{value:.2g}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{digits}f}"


def _line(
    series: Series,
    bins: Sequence[Bin | None],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
) -> Markup:
    """A path with gaps, a band where values were put together, a dot where they are few."""
    parts: list[Markup] = []
    path, band, alone = [], [], []
    pieces: list[list[Bin]] = [[]]
    for each in bins:
        if each is None:
            pieces.append([])
        else:
            pieces[-1].append(each)
    color = _color(series.run)
    for piece in pieces:
        places = [(x_of((each.first + each.last) / 2), y_of(each.mean)) for each in piece]
        if places:
            path.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places))
        if len(places) == 1 and not series.chance:
            alone += places
        if any(each.high > each.low for each in piece):
            top = [f"{x:.1f} {y_of(b.high):.1f}" for (x, _), b in zip(places, piece, strict=True)]
            low = [f"{x:.1f} {y_of(b.low):.1f}" for (x, _), b in zip(places, piece, strict=True)]
            band.append("M" + "L".join([*top, *reversed(low)]) + "Z")
    if band and not series.chance:
        parts.append(element("path", {"class": f"band {color}", "d": "".join(band)}))
    kind = f"chance {color}" if series.chance else f"line {color}"
    parts.append(element("path", {"class": kind, "d": "".join(path)}))
    if not series.chance:
        dots = [(x_of(b.first), y_of(b.mean)) for b in bins if b] if len(bins) <= FEW else alone
        parts += [
            element(
                "circle", {"class": f"dot {color}", "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "2.6"}
            )
            for x, y in dots
        ]
    return join(parts)


def _told(bins: Sequence[Bin | None]) -> list[list[float]]:
    """[x, value] of a single one, [first x, last x, least, mean, greatest] of several."""
    return [
        [each.first, each.mean]
        if each.first == each.last and each.low == each.high
        else [each.first, each.last, each.low, float(f"{each.mean:.6g}"), each.high]
        for each in bins
        if each is not None
    ]


def _words(series: Series, labels: Sequence[str], unit: Unit) -> str:
    """For those who can't see the line."""
    finite = [(x, value) for x, value in series.points if math.isfinite(value)]
    if not finite:
        return f"{series.name}: no finite value."

    def at(x: float) -> str:
        return labels[int(x)] if labels else f"step {x:,.0f}"

    (x, first), (end, last) = finite[0], finite[-1]
    told = f"{series.name}: {shown(first, unit)} at {at(x)}"
    return f"{told}, {shown(last, unit)} at {at(end)}." if len(finite) > 1 else f"{told}."


def _color(run: int) -> str:
    """Beyond eight runs the line is dashed, beyond sixteen dotted; then it begins anew."""
    dash = ("", " dashed", " dotted")[run // COLORS % 3]
    return f"c{run % COLORS}{dash}"


def _scale(low: float, high: float, to_low: float, to_high: float) -> Callable[[float], float]:
    # Halves: the difference of two finite floats may not be one.
    span = high / 2 - low / 2
    return lambda value: to_low + (value / 2 - low / 2) / span * (to_high - to_low)
