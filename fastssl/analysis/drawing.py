"""How the pictures look and where they go: one PNG, and the numbers in it as JSON beside it.

1600 pixels wide, made to be shown at 800, on white, so that they read on a light page and on a dark
one. The same numbers give the same bytes with the same matplotlib: no date is in them.
"""

import importlib.util
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastssl.checkpoint import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches, 800 pixels on a page
DPI = 200
INK, FAINT = "#1f2328", "#d0d7de"
# Colours that tell apart for all eyes (Okabe and Ito 2008); markers and dashes say it once more
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX<>h"
CAPTION = 124  # characters a line


def require() -> None:
    """Refuses to start what can't be drawn.

    Raises:
        ValueError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("analyze needs matplotlib: pip install 'fastssl[evaluate]'")


def figure(height: float) -> "Figure":
    """An empty figure, `height` in inches."""
    # an optional package: what only counts must not need it
    from matplotlib.figure import Figure  # noqa: PLC0415

    return Figure(figsize=(WIDTH, height), layout="constrained")


def clean(axes: "Axes", *, grid: bool = True) -> None:
    """Faint axes on two sides, and a faint grid behind the data."""
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    if grid:
        axes.grid(color=FAINT, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def caption(figure: "Figure", text: str) -> None:
    """What was measured, and on how much, under the picture."""
    lines = textwrap.wrap(text, CAPTION)
    figure.supxlabel("\n".join(lines), fontsize=8, color=INK, x=0.01, ha="left")


def legend(figure: "Figure", axes: "Axes", *, columns: int = 2) -> None:
    """Above all data, where it covers none."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=min(columns, len(labels)),
        frameon=False,
        fontsize=9,
    )


def save(figure: "Figure", folder: Path, name: str, numbers: dict[str, Any]) -> Path:
    """Writes FOLDER/NAME.png and NAME.json; returns the picture's path.

    Raises:
        OSError: the folder can't be written; what was there before is as it was.
    """
    with whole_file(folder / f"{name}.json") as file:
        file.write((json.dumps(numbers, indent=1, allow_nan=False) + "\n").encode())
    path = folder / f"{name}.png"
    with whole_file(path) as file:
        # matplotlib would put its version in: the picture is the same without
        figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return path
