"""Does a better pretext task make better features? (Kolesnikov, Zhai & Beyer 2019, figure 4).

There the answer is: within one architecture yes, across architectures no. The pretext accuracy is
the mean of the last tenth of the run's own lines, on augmented training images with dropout on, as
no run measures it on held-out images; that of another task has another chance level, so that ranks
are compared within a task.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastssl.analysis import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST = 3  # runs, of which ranks can be correlated: of two it is always 1 or -1


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run: its `pretext` and `downstream` accuracies, 0 ... 1."""

    name: str
    task: str
    pretext: float
    downstream: float


def pretext_accuracy(lines: list[dict[str, Any]]) -> float | None:
    """Mean `accuracy` over the lines of the last tenth of the steps; None without any.

    Args:
        lines: of metrics.jsonl, those of probes among them.
    """
    own = [line for line in lines if "probe" not in line and "accuracy" in line]
    if not own:
        return None
    last = own[-1]["step"]
    return float(np.mean([line["accuracy"] for line in own if line["step"] > 0.9 * last]))


def knn_accuracy(lines: list[dict[str, Any]], step: int) -> tuple[float, int] | None:
    """The accuracy that training itself measured at `step`, with k; None without one.

    Args:
        lines: of metrics.jsonl; those of the command `knn` name a stage, and are passed over: its
            k and data may be any.
        step: of the backbone.
    """
    found = [
        (float(line["accuracy"]), int(line["neighbours"]))
        for line in lines
        if line.get("probe") == "knn" and line["step"] == step and "stage" not in line
    ]
    return found[-1] if found else None


def rank_correlation(points: list[Point]) -> float | None:
    """Spearman's of pretext and downstream accuracy; None for fewer than three, or all alike.

    Raises:
        ValueError: SciPy is missing.
    """
    pretext = [point.pretext for point in points]
    downstream = [point.downstream for point in points]
    if len(points) < FEWEST or min(len(set(pretext)), len(set(downstream))) < 2:
        return None
    try:
        from scipy.stats import spearmanr  # noqa: PLC0415  # an optional package
    except ModuleNotFoundError as error:
        raise ValueError(
            "analyze.what pretext needs SciPy: pip install 'fastssl[evaluate]'"
        ) from error
    found: Any = spearmanr(pretext, downstream)
    return float(found.statistic)


def draw(points: list[Point], downstream: str, caption: str) -> "Figure":
    """A point a run, with its name; a colour and a marker a task, with its rank correlation."""
    tasks = sorted({point.task for point in points})
    figure = drawing.figure(4.2 + 0.12 * len(tasks))
    axes = figure.add_subplot()
    for number, task in enumerate(tasks):
        here = [point for point in points if point.task == task]
        correlation = rank_correlation(here)
        told = "too few to rank" if correlation is None else f"rank correlation {correlation:.2f}"
        axes.scatter(
            [100 * point.pretext for point in here],
            [100 * point.downstream for point in here],
            s=36,
            color=drawing.LINES[number % len(drawing.LINES)],
            marker=drawing.MARKERS[number % len(drawing.MARKERS)],
            label=f"{task}: n {len(here)}, {told}",
        )
    for point in points:
        right = point.pretext > 0.6 * max(each.pretext for each in points)
        axes.annotate(
            point.name,
            (100 * point.pretext, 100 * point.downstream),
            xytext=(-6 if right else 6, 5),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=8,
            color=drawing.INK,
        )
    axes.margins(0.08, 0.12)
    axes.set(xlabel="pretext accuracy, %", ylabel=downstream)
    drawing.clean(axes)
    drawing.legend(figure, axes, columns=2)
    drawing.caption(figure, caption)
    return figure
