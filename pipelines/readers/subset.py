"""Fewer images: some of every class, or of all; the same ones on every machine.

Which of a class is told by hashes of the seed and the images' names: no random generator whose
numbers may change with a version. A folder and the store packed from it give the same images, and
of one seed a smaller subset lies within every greater one.
"""

import hashlib
from collections.abc import Callable

import numpy as np


def check(
    *, fraction: float | None, per_class: int | None, subset_seed: int, limit: int | None
) -> None:
    """Refuses options that can't be, or not together.

    Raises:
        ValueError: says which.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit ({limit}) must be at least 1, or null for all")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction ({fraction}) must be above 0 and at most 1, or null for all")
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class ({per_class}) must be at least 1, or null for all")
    if not 0 <= subset_seed < 2**31:
        raise ValueError(f"subset_seed ({subset_seed}) must be in 0 ... {2**31 - 1}")
    if subset_seed and fraction is None and per_class is None:
        raise ValueError(f"subset_seed ({subset_seed}) is not read without fraction or per_class")
    given = {"fraction": fraction, "per_class": per_class, "limit": limit}
    both = [name for name, value in given.items() if value is not None]
    if len(both) > 1:
        raise ValueError(f"{' and '.join(both)} each take a subset: give one of them")


def choose(
    usable: np.ndarray,
    labels: np.ndarray | None,
    classes: tuple[str, ...],
    name: Callable[[int], bytes],
    *,
    fraction: float | None,
    per_class: int | None,
    limit: int | None = None,
    seed: int,
    root: str,
) -> np.ndarray | None:
    """The rows to use, ascending, int64; None: all.

    Args:
        usable: int64, the rows that can be used.
        labels: int64 [rows], in `classes`; None: there are no classes.
        classes: their names.
        name: of a row, from the root, the same on every machine.
        fraction: of each class, rounded, and at least one image.
        per_class: images of each class.
        limit: so many images, evenly spaced over the usable ones, whatever their classes.
        seed: another seed, other images.
        root: for messages.

    Raises:
        ValueError: there are no classes, or one has fewer images than `per_class`.
    """
    if limit is not None and limit < len(usable):
        return usable[np.linspace(0, len(usable) - 1, limit).astype(np.int64)]
    if fraction is None and per_class is None:
        return None
    key = "fraction" if per_class is None else "per_class"
    if labels is None or not classes:
        raise ValueError(
            f"data.{key}: {root} has no class folders, so there are no classes to take images of;"
            " give a folder with one for each class (root/<class>/<image>.jpg), or data.limit"
        )
    by_class = usable[np.argsort(labels[usable], kind="stable")]
    ends = np.searchsorted(labels[by_class], np.arange(1, len(classes)))
    chosen = []
    for its_name, rows in zip(classes, np.split(by_class, ends), strict=True):
        if per_class is not None and len(rows) < per_class:
            raise ValueError(
                f"data.per_class ({per_class}): class {its_name} in {root} has {len(rows)} images"
            )
        # halves go up, where round() would go to the even number
        count = per_class or max(1, int((fraction or 0) * len(rows) + 0.5))
        order = sorted(rows.tolist(), key=lambda row: _rank(seed, name(row)))
        chosen.append(np.array(order[:count], np.int64))
    return np.sort(np.concatenate(chosen))


def _rank(seed: int, name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=16, salt=seed.to_bytes(16, "little")).digest()
