"""The table of a grid: what its runs reached beside K19's table 1, and whether networks rank alike.

It is made from the run folders themselves, of whichever command they were: grid.json in each keeps
what was measured on it, and recipe.yaml says where in the table it belongs.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from fastssl import checkpoint, k19_table, measuring, starting, sweeping
from fastssl.config import RecipeError
from fastssl.k19_table import Cell

_FILE = "grid.json"
_FEWEST = 3  # networks, of which a ranking is told


@dataclass(frozen=True)
class Run:
    """A finished run that was measured."""

    folder: str
    cell: Cell
    seed: int
    accuracy: float  # 0 ... 1, of the last stage
    values: dict[str, dict[str, Any]]  # of its recipe


@dataclass(frozen=True)
class About:
    """What the whole table is of."""

    probe: str  # linear or knn
    arguments: tuple[str, ...]  # of its command
    images: str  # on which it was measured
    chance: float


def known(
    folder: Path, names: Sequence[str], *, say: Callable[[str], None] = starting.silent
) -> float | None:
    """The accuracy that was measured on the weights which the run folder holds now.

    Args:
        folder: of a finished run.
        names: the measurement's, `measuring.fingerprint` of all that it depends on; the first that
            is there is taken.
        say: told of a file that can't be read, which counts as not measured.
    """
    if not (folder / "backbone.json").exists():
        return None
    found = _kept(folder)
    entry = next((found[name] for name in names if name in found), None) if found else None
    if found is None or (entry is not None and not _is_whole(entry)):
        say(f"grid: warning: {folder / _FILE} can't be read: not measured, as far as is known")
        return None
    if entry is None or entry["weights"] != measuring.weights(folder):
        return None
    return entry["accuracy"]


def otherwise(out: Path, names: Sequence[str]) -> list[str]:
    """The folders in `out` whose weights were measured, but under none of these names."""
    folders = [path.parent for path in sorted(out.glob(f"*/{_FILE}"))]
    return [each.name for each in folders if _has_any(each) and known(each, names) is None]


def keep(folder: Path, name: str, accuracy: float, about: About) -> None:
    """Adds a measurement to the run folder's."""
    before = _kept(folder) or {}
    before[name] = {
        "accuracy": accuracy,
        "probe": about.probe,
        "arguments": about.arguments,
        "weights": measuring.weights(folder),
    }
    with checkpoint.whole_file(folder / _FILE) as file:
        file.write(json.dumps(before, indent=1).encode())


def read(
    out: Path, names: Sequence[str], *, say: Callable[[str], None] = starting.silent
) -> list[Run]:
    """All runs in the folder `out` that were measured under one of the `names`.

    `say` is told which are left out, for want of a file that can be read.
    """
    runs = []
    for path in sorted(out.glob(f"*/{_FILE}")):
        folder = path.parent
        accuracy = known(folder, names, say=say)
        if accuracy is None:
            continue
        try:
            values = sweeping.recipe_of(folder)
        except RecipeError as error:
            say(f"grid: warning: {error}: left out of the table")
            continue
        cell, seed = k19_table.cell(values), values["train"]["seed"]
        runs.append(Run(folder.name, cell, seed, accuracy, values))
    return runs


def write(out: Path, runs: Sequence[Run], about: About, failed: Mapping[str, str]) -> str:
    """Writes table.md and table.json into `out`.

    Args:
        out: the grid's folder.
        runs: that were measured.
        about: of what.
        failed: name of a run of this command -> why it is not in the table.

    Returns:
        The text of table.md.
    """
    cells = _means(runs)
    title = f"{about.probe} accuracy in %, features of the last stage: {about.images}"
    lines = [
        f"{title}; chance {100 * about.chance:.1f}",
        "",
        *_markdown(cells),
        "",
        "K19: Kolesnikov et al. 2019, table 1, on ImageNet; beside a width that it does not have, "
        "its nearest. +-: standard deviation over seeds (n of them).",
    ]
    agreement = against_k19(cells) + between_tasks(cells)
    if agreement:
        lines += ["", "Rank agreement of networks (Spearman: 1 the same order, 0 none):", ""]
        lines += [f"- {_told(each)}" for each in agreement]
    if failed:
        lines += ["", "Failed in the last command:", ""]
        lines += [f"- {name}: {why}" for name, why in failed.items()]
    text = "\n".join(lines) + "\n"
    whole = {
        **asdict(about),
        "cells": [_as_json(cell, cells[cell]) for cell in cells],
        "rank_agreement": agreement,
        "runs": [_run_as_json(run) for run in runs],
        "failed": dict(failed),
    }
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / "table.json", json.dumps(whole, indent=1))
    _replace(out / "table.md", text)
    return text


def against_k19(cells: Mapping[Cell, Sequence[float]]) -> list[dict[str, Any]]:
    """Column by column: do networks rank as in K19's table, at this width or the nearest?"""
    found = []
    for task, widening in _columns(cells):
        ours, theirs = _column(cells, task, widening), _published(task, widening)
        both = [name for name in theirs if name in ours]
        if len(both) >= _FEWEST:
            found.append(
                {
                    "of": _head(task, widening),
                    "and": f"K19's {_head(task, k19_table.nearest(task, widening))}",
                    "networks": both,
                    "spearman": spearman([ours[n] for n in both], [theirs[n] for n in both]),
                }
            )
    return found


def between_tasks(cells: Mapping[Cell, Sequence[float]]) -> list[dict[str, Any]]:
    """For any two tasks at one width: do networks rank alike? With K19's own answer beside it."""
    found = []
    for (first, k), (second, other) in combinations(_columns(cells), 2):
        if k != other:
            continue
        one, two = _column(cells, first, k), _column(cells, second, k)
        both = [name for name in one if name in two]
        if len(both) < _FEWEST:
            continue
        line = {
            "of": _head(first, k),
            "and": _head(second, k),
            "networks": both,
            "spearman": spearman([one[n] for n in both], [two[n] for n in both]),
        }
        theirs, others = _published(first, k), _published(second, k)
        if all(name in theirs and name in others for name in both):
            line["k19"] = spearman([theirs[n] for n in both], [others[n] for n in both])
        found.append(line)
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The correlation of ranks, ties sharing theirs; None where one side has no order at all."""
    x, y = _ranks(first), _ranks(second)
    x, y = [a - fmean(x) for a in x], [b - fmean(y) for b in y]
    scale = (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5
    return sum(a * b for a, b in zip(x, y, strict=True)) / scale if scale else None


def _kept(folder: Path) -> dict[str, Any] | None:
    """Name -> measurement, of the run folder; None: its file can't be read."""
    path = folder / _FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # torn, or not UTF-8
        return None
    return found if isinstance(found, dict) else None


def _has_any(folder: Path) -> bool:
    """Whether the weights that the run folder holds now were measured, under whatever name."""
    if not (folder / "backbone.json").exists():
        return False
    now = measuring.weights(folder)
    every = (_kept(folder) or {}).values()
    return any(_is_whole(entry) and entry["weights"] == now for entry in every)


def _is_whole(entry: Any) -> bool:
    """Whether it is a measurement; NaN is none."""
    if not isinstance(entry, dict) or not isinstance(entry.get("weights"), str):
        return False
    accuracy = entry.get("accuracy")
    return isinstance(accuracy, int | float) and 0 <= accuracy <= 1


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(each) + (order.count(each) - 1) / 2 for each in values]


def _means(runs: Sequence[Run]) -> dict[Cell, list[float]]:
    """The accuracies of each cell's seeds, 0 ... 1."""
    cells: dict[Cell, list[float]] = {}
    for run in runs:
        cells.setdefault(run.cell, []).append(run.accuracy)
    return cells


def _columns(cells: Mapping[Cell, Sequence[float]]) -> list[tuple[str, float | None]]:
    """Task and widening of each: K19's tasks first, the narrow ones first."""
    tasks = [*k19_table.TASKS, *sorted({each.task for each in cells} - {*k19_table.TASKS})]
    return [
        (task, k)
        for task in tasks
        for k in sorted({c.widening for c in cells if c.task == task}, key=lambda k: k or 0)
    ]


def _column(
    cells: Mapping[Cell, Sequence[float]], task: str, widening: float | None
) -> dict[str, float]:
    """Network -> mean accuracy."""
    of = {cell: fmean(its) for cell, its in cells.items()}
    return {c.network: mean for c, mean in of.items() if (c.task, c.widening) == (task, widening)}


def _published(task: str, widening: float | None) -> dict[str, float]:
    """Network -> K19's accuracy at this width, or at its nearest."""
    k = k19_table.nearest(task, widening)
    found = {name: k19_table.published(Cell(name, task, k)) for name in k19_table.NETWORKS}
    return {name: each for name, each in found.items() if each is not None}


def _markdown(cells: Mapping[Cell, Sequence[float]]) -> list[str]:
    """Rows of networks; a pair of columns for each task and width, ours and K19's."""
    others = sorted({cell.network for cell in cells} - {*k19_table.NETWORKS})
    rows: list[list[str]] = [["", *k19_table.NETWORKS, *others]]
    for task, widening in _columns(cells):
        ours = [_shown(cells.get(Cell(name, task, widening), [])) for name in rows[0][1:]]
        rows.append([_head(task, widening), *ours])
        theirs = _published(task, widening)
        if theirs:
            head = f"K19 {_times(k19_table.nearest(task, widening))}"
            shown = [f"{theirs[name]:.1f}" if name in theirs else "" for name in rows[0][1:]]
            rows.append([head, *shown])
    widths = [max(3, *map(len, column)) for column in rows]
    lines = []
    for number, line in enumerate(zip(*rows, strict=True)):
        padded = [each.ljust(width) for each, width in zip(line, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
        if number == 0:
            lines.append(f"| {' | '.join('-' * width for width in widths)} |")
    return lines


def _shown(accuracies: Sequence[float]) -> str:
    mean, spread = sweeping.mean_and_spread(accuracies)
    if mean is None:
        return ""
    if spread is None:
        return f"{100 * mean:.1f}"
    return f"{100 * mean:.1f} +- {100 * spread:.1f} ({len(accuracies)})"


def _as_json(cell: Cell, accuracies: Sequence[float]) -> dict[str, Any]:
    """In per cent, as the table has them."""
    mean, spread = sweeping.mean_and_spread([100 * each for each in accuracies])
    return {
        **asdict(cell),
        "accuracy": mean,
        "spread": spread,
        "runs": len(accuracies),
        "k19": k19_table.published(cell),
        "k19_nearest": _published(cell.task, cell.widening).get(cell.network),
        "k19_nearest_widening": k19_table.nearest(cell.task, cell.widening),
    }


def _run_as_json(run: Run) -> dict[str, Any]:
    return {
        "folder": run.folder,
        "cell": asdict(run.cell),
        "seed": run.seed,
        "accuracy": run.accuracy,
        "epochs": run.values["train"]["epochs"],
        "backbone": run.values["backbone"],
    }


def _told(line: Mapping[str, Any]) -> str:
    """A line of the agreement, in words."""
    text = f"{line['of']} and {line['and']}: {_signed(line['spearman'])}"
    text += f" ({len(line['networks'])} networks)"
    return f"{text}; K19's own: {_signed(line['k19'])}" if "k19" in line else text


def _signed(correlation: float | None) -> str:
    return "no order on one side" if correlation is None else f"{correlation:+.2f}"


def _head(task: str, widening: float | None) -> str:
    return f"{task} {_times(widening)}".strip()


def _times(widening: float | None) -> str:
    return "" if widening is None else f"{widening:g}x"


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, also where two commands write into one folder."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
