"""Linear accuracy by depth: where in the network a class can be read off by a linear classifier.

PIRL (Misra & van der Maaten 2020, table 7): networks trained to tell a transform are best before
their last stage, those trained to ignore it at the last one.
"""

import json
from typing import TYPE_CHECKING, Any

from fastssl.analysis import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# What a line has only where it is not as by default begins so.
_SELDOM = ("data_", "l2_given")


def accuracies(
    lines: list[dict[str, Any]], settings: dict[str, Any], *, train_images: int, val_images: int
) -> dict[str, float]:
    """The newest accuracy (0 ... 1) of each stage in a run's journal, first to last.

    A run may have been probed in several ways and on several data sets: lines of others are left
    out.

    Args:
        lines: of metrics.jsonl.
        settings: what a line must say, all of it: the step of the backbone, on what was measured
            (`Task.conditions`), and how (`linear.settings`).
        train_images: of the data set; one in a hundred may have been undecodable.
        val_images: likewise.
    """
    wanted = {"probe": "linear", **json.loads(json.dumps(settings))}  # no tuples: as it is read
    counts = {"train_images": train_images, "val_images": val_images}
    return {
        line["stage"]: float(line["accuracy"])
        for line in lines
        if {k: v for k, v in line.items() if k in wanted or k.startswith(_SELDOM)} == wanted
        and all(0.99 * most <= line.get(key, 0) <= most for key, most in counts.items())
    }


def draw(runs: dict[str, dict[str, float]], chance: float, caption: str) -> "Figure":
    """A line for each run; networks of other stages have their stages further right."""
    stages = list(dict.fromkeys(stage for run in runs.values() for stage in run))
    figure = drawing.figure(3.6 + 0.12 * len(runs))
    axes = figure.add_subplot()
    for number, (name, run) in enumerate(runs.items()):
        axes.plot(
            [stages.index(stage) for stage in run],
            [100 * accuracy for accuracy in run.values()],
            color=drawing.LINES[number % len(drawing.LINES)],
            marker=drawing.MARKERS[number % len(drawing.MARKERS)],
            markersize=5,
            label=name,
        )
    axes.axhline(100 * chance, color=drawing.INK, linewidth=1, linestyle=":", label="chance")
    axes.set_xticks(range(len(stages)), stages)
    axes.set(xlabel="stage of the backbone", ylabel="linear accuracy, %")
    axes.set_ylim(bottom=0)
    drawing.clean(axes)
    drawing.legend(figure, axes, columns=4)
    drawing.caption(figure, caption)
    return figure
