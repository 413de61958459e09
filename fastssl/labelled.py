"""The two labelled splits below a root: train and val (or validation, or test).

Each is what the reader reads: a folder of classes, a store, a dataset, or a list (train.csv).
"""

import importlib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

LISTS = (".txt", ".csv", ".tsv", ".parquet")


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
        data: its options; `root` is the folder, or the s3:// url, around train and val. What else
            they say holds for both, but for subsets and the quarantine, which are train's: a
            quarantine is val's too if it is a folder that holds quarantine-val.jsonl (or
            quarantine-test.jsonl, as the split is called).
        cache: where the reader keeps listings.
        say: told what the user should know.

    Returns:
        train, val, and the names of train's classes, which labels of both count in.

    Raises:
        ValueError: a split is missing or has no class folders, there is one class only, or val has
            a class that train lacks.
    """
    root = data.root if is_url(data.root) else str(Path(data.root).expanduser())
    if not is_url(root) and Path(root).is_file():
        raise ValueError(
            f"{root} is one list: give the folder that holds two, train{Path(root).suffix} and"
            f" val{Path(root).suffix}"
        )
    at_train, at_val = place(root, ("train",)), place(root, second())
    at_train, at_val = at_train or f"{root}/train", at_val or f"{root}/val"
    train = _listed(reader, replace(data, root=at_train), cache, say)
    val = _listed(reader, whole(data, at_val), cache, say)
    for samples, at in ((train, at_train), (val, at_val)):
        if samples.labels is None:
            name = at.rpartition("/")[2]
            raise ValueError(
                f"{at} has no class folders: labels are needed, as {name}/<class>/<image> (a list,"
                " a store or a dataset: a label for each image); give the folder around train and"
                f" {at_val.rpartition('/')[2]}"
            )
    if len(train.classes) < 2:
        raise ValueError(
            f"{at_train} has one class only ({train.classes[0]}): there is nothing to tell "
            "apart; give a folder with train/<class>/ for two classes or more"
        )
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise ValueError(f"{at_val} has classes that {at_train} lacks: {_few(unknown)}")
    absent = sorted(set(train.classes) - set(val.classes))
    if absent:
        say(
            f"warning: {at_val} has no image of {len(absent)} of {len(train.classes)} "
            f"classes: {_few(absent)}"
        )
    same = np.arange(len(train.classes))
    to_train = np.array([train.classes.index(name) for name in val.classes], np.int64)
    return (
        _split("train", reader, train, same, train.classes),
        _split("val", reader, val, to_train, train.classes),
        train.classes,
    )


def second() -> tuple[str, ...]:
    """What the split that is not trained on may be called; the first that is there is taken."""
    return importlib.import_module("pipelines.readers").SECOND  # beside us, not beneath


def place(root: str, names: tuple[str, ...]) -> str | None:
    """Where a split lies: the first of `names` that is a folder in `root`, or a list (LISTS).

    Of a url it is the first name: to ask what is there would take a request.
    """
    if is_url(root):
        return f"{root.rstrip('/')}/{names[0]}"
    folder = Path(root)
    for name in names:
        if (folder / name).exists():
            return str(folder / name)
        for suffix in LISTS:
            if (folder / f"{name}{suffix}").is_file():
                return str(folder / f"{name}{suffix}")
    return None


def is_url(root: str) -> bool:
    """Whether it is none of this machine's folders."""
    return "://" in root


def whole(data: Any, root: str) -> Any:
    """A reader's options at `root`, less what takes a subset to train on, or leaves images out.

    A quarantine of both splits, a folder that `fastssl.data check` wrote, stays.
    """
    subsets = ("limit", "fraction", "per_class", "subset_seed")
    folder = Path(data.quarantine or "").expanduser()
    if not any((folder / f"quarantine-{name}.jsonl").is_file() for name in second()):
        subsets = (*subsets, "quarantine")
    defaults = {
        field.name: field.default
        for field in fields(data)
        if field.default is not MISSING and field.name in subsets
    }
    return replace(data, **defaults, root=root)


def _listed(
    reader: ModuleType, options: Any, cache: Path | None, say: Callable[[str], None]
) -> Any:
    root = Path(options.root)
    if not is_url(options.root) and not root.exists() and root.parent.is_dir():
        hint = (
            f"; did you mean {root.parent.parent}?"
            if root.parent.name in ("train", *second())
            else ""
        )
        raise ValueError(
            f"there is no folder {root}: {root.parent} must hold train/<class>/ and val/<class>/ "
            f"(or test/<class>/), or a list of each, train.csv and val.csv{hint}"
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
