"""Features in two dimensions: the two principal components, and t-SNE (van der Maaten 2008).

t-SNE keeps who is near whom; how far apart its clusters lie, and how large they are, means nothing.
"""

import importlib.util
from typing import TYPE_CHECKING

import numpy as np

from fastssl.analysis import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERPLEXITY = 30.0  # about how many neighbours each image keeps; scikit-learn's default


class TooFew(ValueError):
    """There is nothing to draw; the message says why."""


def subset(labels: np.ndarray, *, most: int, classes: int, seed: int) -> np.ndarray:
    """Ascending positions of at most `most` images, as many of each class as of any other.

    Args:
        labels: int64 [N].
        most: images in all.
        classes: at most so many are shown, evenly spaced among those that occur.
        seed: of the draw within each class.

    Raises:
        TooFew: fewer than two classes occur, or fewer than two images each would be shown.
    """
    present = np.unique(labels)
    if len(present) < 2:
        raise TooFew(f"a map by class needs at least 2 classes, there is {len(present)}")
    shown = present[np.unique(np.linspace(0, len(present) - 1, classes).astype(int))]
    each = most // len(shown)
    if each < 2:
        raise TooFew(f"{most} images of {len(shown)} classes are less than 2 of each")
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(np.flatnonzero(labels == label))[:each] for label in shown]
    return np.sort(np.concatenate(drawn))


def principal(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two principal components [N, 2] of `features` [N, D], and their parts of the variance.

    The sign of a component is that of its largest value, so that a picture doesn't flip by machine.
    """
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    points = (left * values)[:, :2]
    largest = points[np.abs(points).argmax(0), np.arange(points.shape[1])]
    total = float(np.sum(values**2))
    return points * np.where(largest < 0, -1, 1), values[:2] ** 2 / (total or 1.0)


def neighbours(features: np.ndarray, *, seed: int) -> np.ndarray:
    """The t-SNE map [N, 2] of `features` [N, D], begun from the principal components.

    Raises:
        ValueError: scikit-learn is missing.
        TooFew: there are fewer than four images.
    """
    require()
    from sklearn.manifold import TSNE  # noqa: PLC0415  # an optional package

    if len(features) < 4:
        raise TooFew(f"t-SNE needs at least 4 images, there are {len(features)}")
    # fewer images than three times as many have no such neighbourhood
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    how = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed, n_jobs=1)
    return how.fit_transform(features.astype(np.float64))


def require() -> None:
    """Refuses to start what can't be computed.

    Raises:
        ValueError: scikit-learn is missing.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError("analyze.what map needs scikit-learn: pip install 'fastssl[evaluate]'")


def draw(maps: dict[str, np.ndarray], labels: list[str], caption: str) -> "Figure":
    """The maps [N, 2] side by side, by title; a colour and a marker for each of `labels` [N]."""
    names = sorted(set(labels))
    of_image = np.array(labels)
    figure = drawing.figure(4.6 + 0.11 * len(names) / 2)
    for axes, (title, points) in zip(
        figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True
    ):
        for number, name in enumerate(names):
            here = points[of_image == name]
            axes.scatter(
                here[:, 0],
                here[:, 1],
                s=14,
                color=drawing.LINES[number % len(drawing.LINES)],
                marker=drawing.MARKERS[number % len(drawing.MARKERS)],
                edgecolors="white",
                linewidths=0.3,
                label=name,
            )
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=10, color=drawing.INK, loc="left")
        drawing.clean(axes, grid=False)
    drawing.legend(figure, figure.axes[0], columns=5)
    drawing.caption(figure, caption)
    return figure
