"""The two labelled splits of a folder: train/<class>/ and val/<class>/ (or test/<class>/)."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Split:
    """The usable images of one split, in the order of the listing."""

    name: str  # "train" or "val", whatever the folder is called
    reader: ModuleType  # pipelines/readers/*
    samples: Any  # the reader's listing
    rows: np.ndarray  # int64 [N], of the listing
    labels: np.ndarray  # int64 [N], numbers in `classes`
    classes: tuple[str, ...]  # those of train, for both splits


def splits(
    reader: ModuleType, data: Any, *, cache: Path | None, say: Callable[[str], None]
) -> tuple[Split, Split, tuple[str, ...]]:
    """Lists both.

    Args:
        reader: pipelines/readers/*.
        data: its options; `root` is the folder around train and val (or test). What else they say
            holds for train; for val only `bad`, `max_pixels` and `limit` do: a subset of the labels
            is one to learn from.
        cache: where the reader keeps listings.
        say: told what the user should know.

    Returns:
        train, val, and the names of train's classes, which labels of both count in.

    Raises:
        ValueError: a split is missing or has no class folders, there is one class only, or val has
            a class that train lacks.
    """
    root = Path(data.root).expanduser()
    train = _listed(reader, replace(data, root=str(root / "train")), cache, say)
    second = "val" if (root / "val").exists() or not (root / "test").exists() else "test"
    val = _listed(reader, whole(data, str(root / second)), cache, say)
    for samples, name in ((train, "train"), (val, second)):
        if samples.labels is None:
            raise ValueError(
                f"{root / name} has no class folders: labels are needed, as "
                f"{name}/<class>/<image>; give the folder around train and {second}"
            )
    if len(train.classes) < 2:
        raise ValueError(
            f"{root / 'train'} has one class only ({train.classes[0]}): there is nothing to tell "
            "apart; give a folder with train/<class>/ for two classes or more"
        )
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise ValueError(
            f"{root / second} has classes that {root / 'train'} lacks: {_few(unknown)}"
        )
    absent = sorted(set(train.classes) - set(val.classes))
    if absent:
        say(
            f"warning: {root / second} has no image of {len(absent)} of {len(train.classes)} "
            f"classes: {_few(absent)}"
        )
    same = np.arange(len(train.classes))
    to_train = np.array([train.classes.index(name) for name in val.classes], np.int64)
    return (
        _split("train", reader, train, same, train.classes),
        _split("val", reader, val, to_train, train.classes),
        train.classes,
    )


def whole(data: Any, root: str) -> Any:
    """A reader's options at `root`, less what takes a subset to train on.

    Kept are `bad`, `max_pixels` and `limit`, where there are such.
    """
    defaults = {
        field.name: field.default
        for field in fields(data)
        if field.default is not MISSING and field.name not in ("bad", "max_pixels", "limit")
    }
    return replace(data, **defaults, root=root)


def _listed(
    reader: ModuleType, options: Any, cache: Path | None, say: Callable[[str], None]
) -> Any:
    root = Path(options.root)
    if not root.exists() and root.parent.is_dir():
        hint = (
            f"; did you mean {root.parent.parent}?" if root.parent.name in ("train", "val") else ""
        )
        raise ValueError(
            f"there is no folder {root}: {root.parent} must hold train/<class>/ and val/<class>/ "
            f"(or test/<class>/){hint}"
        )
    return reader.list_samples(options, cache=cache, say=say)


def _split(
    name: str,
    reader: ModuleType,
    samples: Any,
    numbers: np.ndarray,
    classes: tuple[str, ...],
) -> Split:
    rows = np.asarray(samples.usable, np.int64)
    return Split(name, reader, samples, rows, numbers[samples.labels[rows]], classes)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
