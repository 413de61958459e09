"""How many directions features use: standard deviations, singular values, effective rank.

A representation that collapsed to few dimensions has a steep spectrum long before its accuracy
says so. Everything comes from the covariance, summed up in blocks: 1.28 million features of length
2048 are read twice from the disk and take 34 MB for the sums and 134 MB for a block.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastssl.analysis import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK = 8192  # rows read at a time
DEAD = 1e-4  # of the largest standard deviation: a dimension below it says nothing


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Of the features of one run.

    Attributes:
        count: images.
        std: [D], of each dimension, over images.
        singular_values: [min(D, count)], of the centred features, descending.
        effective_rank: exp of the entropy of the singular values over their sum, 1 ... D (Roy &
            Vetterli 2007, definition 1); 0 where all features are equal.
        participation_ratio: (sum of variances)^2 / sum of squared variances along the principal
            directions, 1 ... D; counts small directions less; 0 where all features are equal.
        dead: dimensions with a standard deviation below 1e-4 of the largest one.
    """

    count: int
    std: np.ndarray
    singular_values: np.ndarray
    effective_rank: float
    participation_ratio: float
    dead: int


def spectrum(features: np.ndarray, *, block: int = BLOCK) -> Spectrum:
    """Of `features` [N, D], which may be memory-mapped: `block` rows are read at a time.

    Raises:
        ValueError: fewer than two rows, or one that is not finite.
    """
    count, dimensions = features.shape
    if count < 2:
        raise ValueError(f"a spectrum needs at least 2 images, there is {count}")
    starts = range(0, count, block)
    # Twice through: the variance around a mean that is known loses no digits.
    mean = sum(np.sum(features[at : at + block], 0, dtype=np.float64) for at in starts) / count
    if not np.isfinite(mean).all():
        raise ValueError(f"{np.sum(~np.isfinite(mean))} of {dimensions} features are not finite")
    products = np.zeros((dimensions, dimensions))
    for at in starts:
        centred = features[at : at + block] - mean
        products += centred.T @ centred
    # a hair below zero where there is nothing
    squares = np.linalg.eigvalsh(products)[::-1][: min(dimensions, count)].clip(min=0)
    singular_values = np.sqrt(squares)
    std = np.sqrt(np.diag(products) / count)
    return Spectrum(
        count=count,
        std=std,
        singular_values=singular_values,
        effective_rank=effective_rank(singular_values),
        participation_ratio=participation_ratio(squares),
        dead=int(np.sum(std <= DEAD * std.max())),
    )


def effective_rank(singular_values: np.ndarray) -> float:
    """Exp of the entropy of `singular_values` / their sum; k equal ones give k."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    shares = singular_values[singular_values > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


def participation_ratio(variances: np.ndarray) -> float:
    """(sum)^2 / sum of squares; k equal ones give k."""
    total = variances.sum()
    return float(total**2 / np.sum(variances**2)) if total > 0 else 0.0


def draw(spectra: dict[str, Spectrum], caption: str) -> "Figure":
    """Singular values over their largest, and sorted standard deviations, a line a run."""
    figure = drawing.figure(4.2 + 0.11 * len(spectra))
    left, right = figure.subplots(1, 2)
    for number, (name, each) in enumerate(spectra.items()):
        color = drawing.LINES[number % len(drawing.LINES)]
        dashes = ("-", "--", ":")[number // len(drawing.LINES) % 3]
        values = each.singular_values / (each.singular_values[0] or 1.0)
        shown = np.where(values > 1e-6, values, np.nan)  # what is rounding is no direction
        label = f"{name}: effective rank {each.effective_rank:.1f} of {len(each.std)}"
        left.plot(np.arange(1, len(shown) + 1), shown, dashes, color=color, label=label)
        std = np.sort(each.std)[::-1]
        right.plot(np.arange(1, len(std) + 1), std, dashes, color=color)
    left.set(
        xscale="log", yscale="log", xlabel="direction", ylabel="singular value / the largest one"
    )
    right.set(xlabel="dimension, sorted", ylabel="standard deviation")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        drawing.clean(axes)
    drawing.legend(figure, left)
    drawing.caption(figure, caption)
    return figure
