"""One-vs-rest linear SVMs on frozen features, as VISSL trains them for VOC07, over all cores.

Torch is not imported here: the worker processes that fit the SVMs import this file and no more.
VISSL: vissl/utils/svm_utils (Goyal et al. 2019, Scaling and Benchmarking Self-Supervised Visual
Representation Learning, section 6.1 and its supplement).
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from fastssl import machine

# C of the SVM, from which cross-validation chooses for every class.
COSTS: dict[str, tuple[float, ...]] = {
    # VISSL's benchmark of VOC07
    "vissl": (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000),
    # fair_self_supervision_benchmark: powers of ten, and of a half (tools/svm/svm_helper.py)
    "fair": (*(10.0**power for power in range(-7, 3)), *(0.5**power for power in range(4, 20))),
    "mm": (1, 10, 100),  # mmselfsup
}
POSITIVE, IGNORED, NEGATIVE = 1, 0, -1  # of an image for a class, as ImageSets/Main has them
_BLOCK = 4096  # images whose float64 features are held at once while scores are taken
# Bytes a feature of the training images takes while it is fitted: as float64, once more what two of
# three folds hold, and liblinear's own copy, a number and its place.
_BYTES = 8 + 6 + 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """VISSL's, but for the seed: theirs draws another order of coordinates in every run."""

    costs: tuple[float, ...]
    folds: int = 3
    shuffle: bool = False  # before the folds are cut; listings of class folders are sorted by class
    max_iter: int = 2000
    tolerance: float = 1e-4
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """What came of one class."""

    cost: float  # the chosen C, the first of the best
    cross_validated: tuple[float, ...]  # mean average precision over the folds, for each cost;
    # empty where there is one cost only
    interpolated: float  # average precision on the test images, as VISSL takes it
    average_precision: float  # the same by scikit-learn, without interpolation; both are NaN of a
    # class without test images
    scores: np.ndarray  # float32 [M], distances to the plane, of all test images
    fits: int
    unfinished: int  # of them that stopped at max_iter


def require() -> None:
    """Refuses where scikit-learn is missing.

    Raises:
        ValueError: says what to install.
    """
    try:
        import sklearn.svm  # noqa: F401, PLC0415  # an extra
    except ImportError:
        raise ValueError("svm needs scikit-learn: pip install 'fastssl[evaluate]'") from None


def interpolated_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """The area under the precision-recall curve made monotonous from the right, 0 ... 1.

    At each recall that is reached, precision counts as the best at this recall or a higher one;
    the area is the sum of (step in recall) x (that precision). This is VISSL's calculate_ap and
    VOC's own since 2010, not the 11 points of VOC2007. Images of the same score come in together,
    where VISSL leaves their order to the sort. NaN without a positive.

    Args:
        positive: bool [M].
        scores: [M], the higher the more likely.
    """
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of the images with one score
    found = np.cumsum(positive[order])[last]
    precision = found / np.flatnonzero(np.append([False], last))
    recall = found / found[-1]
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * best))


def unit(features: np.ndarray) -> np.ndarray:
    """Rows of about unit length, float64: x / (|x| + 1e-5), VISSL's."""
    rows = np.asarray(features, np.float64)
    return rows / (np.linalg.norm(rows, axis=1) + 1e-5)[:, None]


def fit_class(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    settings: Settings,
) -> Fitted:
    """Chooses C for one class by cross-validation, fits on all images, scores the test images.

    Args:
        train: [N, D], not normalised.
        train_labels: [N], 1, 0 or -1; an ignored (difficult) image is a negative here, as in VISSL.
        test: [M, D].
        test_labels: [M]; ignored images don't count.
        settings: for the SVM.
    """
    from sklearn.metrics import average_precision_score  # noqa: PLC0415  # an extra
    from sklearn.model_selection import StratifiedKFold, cross_val_score  # noqa: PLC0415

    rows, targets = unit(train), _targets(train_labels)
    folds = StratifiedKFold(
        settings.folds,
        shuffle=settings.shuffle,
        random_state=settings.seed if settings.shuffle else None,
    )
    unfinished = 0
    averages = []
    for cost in settings.costs if len(settings.costs) > 1 else ():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            each = cross_val_score(
                _svm(cost, settings), rows, targets, cv=folds, scoring="average_precision"
            )
        unfinished += _unfinished(caught)
        averages.append(float(each.mean()))
    best = int(np.argmax(averages)) if averages else 0
    cost = settings.costs[best]
    svm, late = _fit(cost, rows, targets, settings)
    scores = _scores(test, svm.coef_, svm.intercept_)[:, 0]
    counts = test_labels != IGNORED
    positive = test_labels[counts] == POSITIVE
    plain = float("nan")  # of no image to find
    if positive.any():
        plain = float(average_precision_score(positive, scores[counts]))
    return Fitted(
        cost=cost,
        cross_validated=tuple(averages),
        interpolated=interpolated_precision(positive, scores[counts]),
        average_precision=plain,
        scores=scores.astype(np.float32),
        fits=len(averages) * settings.folds + 1,
        unfinished=unfinished + late,
    )


def fit_few(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    settings: Settings,
    draws: Sequence[np.ndarray],
) -> tuple[np.ndarray, int]:
    """Interpolated average precision [draws, costs] of one class from few images at a time.

    Also: how many of the fits stopped at max_iter.

    Args:
        train: [N, D], as for `fit_class`.
        train_labels: [N].
        test: [M, D].
        test_labels: [M].
        settings: for the SVM.
        draws: for each fit, the rows of `train` to learn from.
    """
    unfinished = 0
    planes = []
    for draw in draws:
        rows, targets = unit(train[draw]), _targets(train_labels[draw])
        for cost in settings.costs:
            svm, late = _fit(cost, rows, targets, settings)
            unfinished += late
            planes.append((svm.coef_[0], svm.intercept_[0]))
    counts = test_labels != IGNORED
    positive = test_labels[counts] == POSITIVE
    weights = np.stack([weight for weight, _ in planes])
    scores = _scores(test, weights, np.array([bias for _, bias in planes]))[counts]
    areas = [interpolated_precision(positive, column) for column in scores.T]
    return np.array(areas).reshape(len(draws), len(settings.costs)), unfinished


def draw(labels: np.ndarray, *, positives: int, negatives: int, seed: Sequence[int]) -> np.ndarray:
    """Rows of so many positives and negatives of one class, int64, in the order of `labels`.

    Fewer negatives where there are fewer; ignored images are neither.

    Raises:
        ValueError: there are fewer positives.
    """
    there, absent = np.flatnonzero(labels == POSITIVE), np.flatnonzero(labels == NEGATIVE)
    if len(there) < positives:
        raise ValueError(f"{len(there)} positive images, {positives} are wanted")
    random = np.random.default_rng(seed)
    chosen = [
        random.choice(there, positives, replace=False),
        random.choice(absent, min(negatives, len(absent)), replace=False),
    ]
    return np.sort(np.concatenate(chosen))


def over_cores(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    *,
    workers: int,
    done: Callable[[int], None],
) -> list[Any]:
    """The results of `function` for each of `calls`, in their order, from worker processes.

    Processes, not threads: liblinear draws its random numbers from one state for all threads, so
    that threads would give another result in every run. Large arrays travel as files.

    Args:
        function: of a module that imports fast.
        calls: its arguments.
        workers: processes; 1: none but this.
        done: told after each how many are done.
    """
    from joblib import Parallel, delayed  # noqa: PLC0415  # comes with scikit-learn

    tasks = (delayed(function)(*each) for each in calls)
    results = []
    with Parallel(n_jobs=min(workers, max(1, len(calls))), return_as="generator") as parallel:
        found: Iterable[Any] = parallel(tasks)
        for result in found:
            results.append(result)
            done(len(results))
    return results


def workers_for(images: int, features: int, *, asked: int | None, processes_here: int) -> int:
    """How many SVMs to fit at once: `asked`, or the cores, as far as their memory goes.

    Args:
        images: that one SVM learns from.
        features: of an image.
        asked: by the user.
        processes_here: of this run on this machine, which share it.

    Raises:
        ValueError: the memory is not enough for one.
    """
    each = images * features * _BYTES + 150_000_000  # and the process itself
    available = psutil.virtual_memory().available
    limit = machine.cgroup_memory()
    if limit is not None:
        available = min(available, limit - psutil.Process(os.getpid()).memory_info().rss)
    fitting = int(0.8 * available / processes_here / each)
    if fitting < 1:
        raise ValueError(
            f"an SVM on {images:,} images x {features:,} features needs {each / 1e9:.1f} GB of "
            f"memory, {available / 1e9:.1f} GB are free: give a smaller features.size, another "
            "probe (linear) or, of class folders, fewer images (data.limit)"
        )
    if asked is not None:
        return min(asked, fitting)
    return max(1, min(int(machine.cores_allowed()) // processes_here, fitting))


def _svm(cost: float, settings: Settings) -> Any:
    from sklearn.svm import LinearSVC  # noqa: PLC0415  # an extra

    return LinearSVC(
        C=cost,
        class_weight={POSITIVE: 2, NEGATIVE: 1},
        penalty="l2",
        loss="squared_hinge",
        dual=True,  # pyright: ignore[reportArgumentType]  # the stubs know the newer "auto" alone
        tol=settings.tolerance,
        max_iter=settings.max_iter,
        intercept_scaling=1,
        random_state=settings.seed,
    )


def _fit(cost: float, rows: np.ndarray, targets: np.ndarray, settings: Settings) -> tuple[Any, int]:
    """The fitted SVM, and 1 if it stopped at max_iter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svm = _svm(cost, settings).fit(rows, targets)
    return svm, _unfinished(caught)


def _unfinished(caught: list[warnings.WarningMessage]) -> int:
    """How many of the warnings say so; the others are passed on."""
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415  # an extra

    late = [each for each in caught if issubclass(each.category, ConvergenceWarning)]
    for each in caught:
        if each not in late:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return len(late)


def _targets(labels: np.ndarray) -> np.ndarray:
    return np.where(labels == POSITIVE, POSITIVE, NEGATIVE)


def _scores(features: np.ndarray, weights: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Distances [M, planes] of `features` [M, D] to planes given by [planes, D] and [planes]."""
    blocks = [
        unit(features[first : first + _BLOCK]) @ weights.T + biases
        for first in range(0, len(features), _BLOCK)
    ]
    return np.concatenate(blocks)
