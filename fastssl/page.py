"""What a preview shows, as data: a column for every output of the graph, and the backbone's input.

Some outputs have a way of their own to be shown: an angle under its picture, a permutation as a
small table and with the puzzle solved, a pair with the direction in words. All others are shown
as pixels or values under their names, so that a new task needs nothing here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastssl.pictures import Cell, Column, Page

MOST_FRAMES = 16  # shown of one output and image
# Of the eight neighbours of a cell, row by row: what a label of relative_patch means.
NEIGHBOURS = (
    *("above left", "above", "above right"),
    *("left", "right"),
    *("below left", "below", "below right"),
)


@dataclass(frozen=True)
class Batch:
    """B images as they go through a recipe."""

    outputs: dict[str, np.ndarray]  # the graph's: pixels [B, 3, h, w] or [B, F, 3, h, w], labels
    originals: np.ndarray  # uint8 [B, h, w, 3]: as the recipe's evaluation crops them
    classes: list[str] | None  # each image's, where the folder has classes
    inputs: list[np.ndarray]  # what the backbone was given, call by call: uint8 [N, h, w, 3]
    metrics: dict[str, float]  # of the untrained network on this batch, its loss among them
    parts: str  # graph, objective and backbone
    data: str  # where the images are from, and how many


def page(name: str, batch: Batch, overrides: Sequence[str] = ()) -> Page:
    """All that is known about the batch.

    Args:
        name: of the recipe.
        batch: what went through it.
        overrides: what the command line changed.
    """
    frames = {name: _frames(values) for name, values in batch.outputs.items()}
    shown = {name: pixels for name, pixels in frames.items() if pixels is not None}
    labels = {name: values for name, values in batch.outputs.items() if name not in shown}
    as_they_are, others = _compared(batch.inputs, shown)
    received = [f"{' and '.join(as_they_are)}, as shown"] if as_they_are else []
    received += ["what the last columns show"] if others else []
    metrics = ", ".join(
        f"{name} {batch.metrics[name]:.3g}"
        for name in ("loss", "accuracy", "chance")
        if name in batch.metrics
    )
    return Page(
        name,
        (
            *([f"with {' '.join(overrides)}"] if overrides else []),
            batch.parts,
            batch.data,
            f"the backbone is given {' and '.join(received)}; untrained, on this batch: {metrics}",
        ),
        (
            _original(batch),
            *columns(shown, labels),
            *_inputs(others, len(batch.originals)),
        ),
    )


def columns(frames: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> list[Column]:
    """At least one column for every output of a graph but `index`.

    Args:
        frames: pixels, uint8 [B, F, h, w, 3].
        labels: all other outputs, [B, ...].
    """
    left = {name: values for name, values in labels.items() if name != "index"}
    under: dict[str, dict[str, np.ndarray]] = {name: {} for name in frames}
    for label in list(left):
        owner = _owner(label, frames, left)
        if owner is not None:
            under[owner][label] = left.pop(label)
    found = []
    for name, pixels in frames.items():
        count = pixels.shape[1]
        permutation = left.get("permutation")
        if permutation is not None and permutation.shape[1:] == (count,) and _is_square(count):
            found += _jigsaw(name, pixels, left.pop("permutation"), left)
        else:
            found.append(_pictures(name, pixels, under[name]))
        if {"pair", "label"} <= left.keys() and name == "patches":
            found += _neighbours(pixels, left.pop("pair"), left.pop("label"))
    return found + [_values(name, values) for name, values in left.items()]


def _original(batch: Batch) -> Column:
    """The images before the task, with what identifies them."""
    index = batch.outputs["index"]
    cells = []
    for number, pixels in enumerate(batch.originals):
        lines = [f"index {index[number]}"]
        if batch.classes is not None:
            lines.append(f"class {batch.classes[number]}")
        cells.append(Cell(frames=pixels[None], lines=tuple(lines)))
    return Column(
        "index",
        f"the image as probes see it, {_size(batch.originals[:, None])}",
        tuple(cells),
        height=0.65,
    )


def _frames(values: np.ndarray) -> np.ndarray | None:
    """Pixels as uint8 [B, F, h, w, 3]; None for what is none."""
    if values.dtype != np.uint8 or values.ndim < 4 or values.shape[-3] not in (1, 3):
        return None
    pixels = np.moveaxis(values, -3, -1).reshape(
        len(values), -1, *values.shape[-2:], values.shape[-3]
    )
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def _owner(label: str, frames: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> str | None:
    """The frames that `label` has a value for each of; None where there are none, or two such."""
    values = labels[label]
    if label == "permutation" or (label == "label" and labels.keys() & {"order", "pair"}):
        return None
    if values.ndim > 2:
        return None
    count = 1 if values.ndim == 1 else values.shape[1]
    if count == 1:  # next to any single picture; an angle says of which
        owners = ["turned"] if label == "angle" and "turned" in frames else []
    else:
        owners = list(frames)
    owners = [name for name in owners if frames[name].shape[1] == count]
    return owners[0] if len(owners) == 1 else None


def _pictures(name: str, pixels: np.ndarray, labels: dict[str, np.ndarray]) -> Column:
    """Frames, with the values that belong to each under it."""
    count = pixels.shape[1]
    cells = []
    for number, frames in enumerate(pixels[:, :MOST_FRAMES]):
        written = [
            [f"{label} {_value(label, value)}" for value in np.atleast_1d(values[number])]
            for label, values in labels.items()
        ]
        captions = tuple("\n".join(each) for each in zip(*written, strict=True))
        cells.append(
            Cell(frames=frames, captions=captions[:MOST_FRAMES], across=_across(len(frames)))
        )
    some = f"{MOST_FRAMES} of " if count > MOST_FRAMES else ""
    return Column(name, some + _size(pixels), tuple(cells))


def _jigsaw(
    name: str, pixels: np.ndarray, permutation: np.ndarray, others: dict[str, np.ndarray]
) -> list[Column]:
    """Shuffled patches, the cells they were cut from, and the puzzle solved.

    Where the patches are in place and `others` has an `order`, the first order and its label.
    """
    side = math.isqrt(pixels.shape[1])
    in_place = bool((permutation == np.arange(side * side)).all())
    cut = Column(
        name,
        _size(pixels) + (", solved: in the order of their cells" if in_place else ""),
        tuple(Cell(frames=each, across=side) for each in pixels),
    )
    table = Column(
        "permutation",
        "the cell that each patch was cut from",
        tuple(Cell(numbers=each.reshape(side, side)) for each in permutation),
    )
    if not in_place:
        solved = solve(pixels, permutation)
        note = "each patch back in its cell"
        other = Column("solved", note, tuple(Cell(frames=x, across=side) for x in solved))
    elif "order" in others:
        order = others["order"]
        note = (
            f"{name} as the head joins them, the first of {order.shape[1]} orders, and that order: "
            "the cell that each patch comes from"
        )
        cells = [
            Cell(frames=each[first], across=side, numbers=first.reshape(side, side))
            for each, first in zip(pixels, order[:, 0], strict=True)
        ]
        if "label" in others:
            firsts = others["label"].reshape(len(cells), -1)[:, 0]
            cells = [
                replace(cell, lines=(f"label {first}",))
                for cell, first in zip(cells, firsts, strict=True)
            ]
        other = Column("shuffled", note, tuple(cells))
    else:
        return [cut, table]
    return [cut, table, other]


def solve(patches: np.ndarray, permutation: np.ndarray) -> np.ndarray:
    """Patches [B, F, ...] put where they were cut from: patch k into cell permutation[k]."""
    solved = np.empty_like(patches)
    for each, frames, cells in zip(solved, patches, permutation, strict=True):
        each[cells] = frames
    return solved


def _neighbours(patches: np.ndarray, pair: np.ndarray, label: np.ndarray) -> list[Column]:
    """Each pair beside its direction, and all patches laid out around the centre."""
    label = label.reshape(len(pair), -1)
    height, width = patches.shape[2:4]
    pairs, around = [], []
    for frames, positions, directions in zip(patches, pair, label, strict=True):
        tiles = np.full((len(positions), height, 2 * width + 2, 3), 255, np.uint8)
        laid_out = np.full((9, height, width, 3), 225, np.uint8)
        for tile, (patch, centre), direction in zip(tiles, positions, directions, strict=True):
            tile[:, :width], tile[:, -width:] = frames[patch], frames[centre]
            laid_out[4] = frames[centre]
            laid_out[direction + (direction >= 4)] = frames[patch]  # the centre has no rank
        captions = tuple(f"label {number}\n{NEIGHBOURS[number]}" for number in directions)
        pairs.append(Cell(frames=tiles, captions=captions, across=min(4, len(tiles))))
        around.append(Cell(frames=laid_out, across=3))
    return [
        Column("pair", "(patch, centre), and where the patch lies: its label", tuple(pairs)),
        Column("solved", "each patch where its label says", tuple(around)),
    ]


def _inputs(inputs: list[np.ndarray], images: int) -> list[Column]:
    """What the backbone is given and the graph does not put out."""
    result = []
    for number, given in enumerate(inputs, 1):
        name = "backbone input" if len(inputs) == 1 else f"backbone input {number}"
        if len(given) % images:
            text = f"{_size(given)} for {images} images"
            cells = [Cell(lines=(text,)), *[Cell()] * (images - 1)]
            result.append(Column(name, "not the same number for every image", tuple(cells)))
        else:
            shown = _pictures(name, given.reshape(images, -1, *given.shape[1:]), {})
            note = f"{shown.note}, floats denormalised by one mean and std for all three colours"
            result.append(replace(shown, note=note))
    return result


def _values(name: str, values: np.ndarray) -> Column:
    """Any other output, as text."""
    cells = tuple(Cell(lines=tuple(_written(name, each))) for each in values)
    shape = " x ".join(map(str, values.shape[1:]))
    return Column(name, f"{shape} values" if shape else "", cells)


def _written(name: str, values: np.ndarray) -> list[str]:
    """The values, or what fits of them."""
    if values.ndim > 2:
        return [f"{values.min():.4g} ... {values.max():.4g}"]
    lines = []
    rows = np.atleast_2d(values)
    for row in rows[:3]:
        rest = f" ... {len(row) - 10} more" if len(row) > 10 else ""
        lines.append(" ".join(_value(name, value) for value in row[:10]) + rest)
    return lines + ([f"... {len(rows) - 3} more"] if len(rows) > 3 else [])


def _value(name: str, value: Any) -> str:
    if name == "angle":
        return f"{value}\N{DEGREE SIGN}"
    return f"{value:.4g}" if isinstance(value, np.floating) else str(value)


def _size(pixels: np.ndarray) -> str:
    """Of [..., F, h, w, 3]: "9 x 16 x 16 pixels"."""
    count, height, width = pixels.shape[-4:-1]
    return f"{count} x {height} x {width} pixels" if count > 1 else f"{height} x {width} pixels"


def _across(count: int) -> int:
    """Frames in a line: a square block where it can be, a strip of a few."""
    if count <= 5:
        return count
    return 4 if count <= 8 else math.isqrt(count - 1) + 1


def _is_square(count: int) -> bool:
    return math.isqrt(count) ** 2 == count


def _compared(
    inputs: list[np.ndarray], frames: dict[str, np.ndarray]
) -> tuple[list[str], list[np.ndarray]]:
    """Which outputs the backbone is given as they are, and the inputs that are not among them."""
    known = {name: {frame.tobytes() for frame in _flat(pixels)} for name, pixels in frames.items()}
    as_they_are: list[str] = []
    others: list[np.ndarray] = []
    seen: set[bytes] = set()
    for given in inputs:
        each = {frame.tobytes() for frame in given}
        owners = [name for name, pixels in known.items() if each <= pixels]
        if owners:
            as_they_are += owners[:1]
        elif not each <= seen:
            others.append(given)
            seen |= each
    return list(dict.fromkeys(as_they_are)), others


def _flat(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(-1, *pixels.shape[2:])
