"""Linear accuracy by depth: where in the network a class can be read off by a linear classifier.

PIRL (Misra & van der Maaten 2020, table 7): networks trained to tell a transform are best before
their last stage, those trained to ignore it at the last one.
"""

from typing import TYPE_CHECKING, Any

from fastssl.analysis import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def accuracies(
    lines: list[dict[str, Any]], step: int, *, classes: int, images: int
) -> dict[str, float]:
    """The newest accuracy (0 ... 1) by L-BFGS of each stage in a run's journal, first to last.

    Of one protocol and one data set, as a run may have been probed by several and on several.

    Args:
        lines: of metrics.jsonl.
        step: of the backbone: what was measured earlier in training does not count.
        classes: of the data set.
        images: of its val split; one in a hundred may have been undecodable.
    """
    return {
        line["stage"]: float(line["accuracy"])
        for line in lines
        if line.get("probe") == "linear"
        and line["step"] == step
        and line.get("protocol") == "lbfgs"
        and line.get("classes") == classes
        and 0.99 * images <= line.get("val_images", 0) <= images
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
