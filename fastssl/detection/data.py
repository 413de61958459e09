"""The images of a VOC folder with what they show: listed once, then batches of both splits."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl import order
from fastssl.detection import boxes as detection_boxes
from fastssl.detection.boxes import Truth
from fastssl.loader import Loader
from fastssl.loader import Options as Loading


@dataclass(frozen=True)
class Data:
    """Both splits; a row is the listing's."""

    reader: ModuleType
    samples: Any
    classes: tuple[str, ...]  # of the training images' objects, in the order of the alphabet
    train: np.ndarray  # int64, rows of images with an object to learn from
    test: np.ndarray  # int64, rows
    truths: dict[int, Truth]  # of every row in either


def read(
    reader: ModuleType,
    options: Any,
    *,
    train: tuple[str, ...],
    test: str,
    difficult: bool,
    cache: Path | None,
    say: Callable[[str], None],
) -> Data:
    """Reads every annotation, and lists the images.

    Args:
        reader: pipelines/readers/*.
        options: its own; `root` is VOCdevkit, the folder above or VOC<year>.
        train: splits to train on: ("2007/trainval", "2012/trainval").
        test: the split to test on.
        difficult: objects that are marked so are learnt from.
        cache: where the reader keeps listings.
        say: told what the user should know.

    Raises:
        ValueError: a file is missing or wrong, the splits share an image, a box lies outside of its
            image, the test split has objects of other classes or none to find, or the reader is
            to take a part of the images.
    """
    for key in ("limit", "fraction", "per_class"):
        if vars(options)[key] is not None:
            raise ValueError(
                f"data.{key} ({vars(options)[key]}) can't be used here: splits name the images; "
                "give some of your own, detect.train=[2007/NAME] for ImageSets/Main/NAME.txt"
            )
    root = Path(options.root)
    to_train, to_test = (detection_boxes.read(root, splits) for splits in (train, (test,)))
    shared = sorted(to_train.keys() & to_test.keys())
    if shared:
        raise ValueError(
            f"{len(shared)} images are in {test} and in {', '.join(train)} ({shared[0]} ...): "
            "images to test on must not be trained on"
        )
    classes = tuple(sorted({each.name for found in to_train.values() for each in found}))
    if not classes:
        raise ValueError(f"the images of {', '.join(train)} have no objects: nothing to learn")
    everything = to_train | to_test
    folder = os.path.commonpath([path.parent for path in everything])
    samples = reader.list_samples(replace(options, root=folder), cache=cache, say=say)
    row_of = {samples.path(row): row for row in samples.usable.tolist()}
    path_of = {path: os.path.abspath(path) for path in everything}  # as readers have them
    gone = [path for path in everything if path_of[path] not in row_of and not path.exists()]
    if gone:
        raise ValueError(f"{len(gone)} images are annotated and not there: {gone[0]} ...")
    rows = {path: row_of[name] for path, name in path_of.items() if name in row_of}
    truths = {
        row: detection_boxes.truth(
            everything[path],
            classes,
            image=path,
            height=int(samples.height[row]),
            width=int(samples.width[row]),
        )
        for path, row in rows.items()
    }
    for path, row in rows.items():
        if path in to_train and not difficult:
            kept = ~truths[row].difficult
            each = truths[row]
            truths[row] = Truth(each.boxes[kept], each.labels[kept], each.difficult[kept])
    learnt = [rows[path] for path in to_train if path in rows and len(truths[rows[path]].boxes)]
    tested = [rows[path] for path in to_test if path in rows]
    if not tested:
        raise ValueError(
            f"none of the {len(to_test)} images of {test} can be decoded: nothing to test on"
        )
    if all(truths[row].difficult.all() for row in tested):
        raise ValueError(
            f"the {len(tested)} images of {test} have no object that is not marked difficult: "
            "nothing to find, give another split (detect.test=2007/test) or its annotations"
        )
    return Data(
        reader,
        samples,
        classes,
        np.array(learnt, np.int64),
        np.array(tested, np.int64),
        truths,
    )


def fingerprint(data: Data) -> str:
    """SHA-256 of what is learnt: the training images' rows and objects, and the classes."""
    state = hashlib.sha256(json.dumps(data.classes).encode())
    for row in data.train.tolist():
        each = data.truths[row]
        state.update(f" {row} {len(each.labels)} ".encode())
        for part in (each.boxes, each.labels, each.difficult):
            state.update(part.tobytes())
    return state.hexdigest()


def to_train(
    data: Data,
    graph: ModuleType,
    options: Any,
    *,
    batch: int,
    seed: int,
    rank: int,
    world: int,
    device: torch.device,
    loading: Loading,
    say: Callable[[str], None],
) -> Loader:
    """Endless batches of `batch` images of this process, in an order that `seed` gives."""
    steps = order.steps_per_epoch(len(data.train), world, batch)

    def rows(step: int) -> np.ndarray:
        epoch, step = divmod(step, steps)
        places = order.shuffled(len(data.train), seed, epoch, rank, world, batch)
        return data.train[places[step]]

    stream = int(np.random.SeedSequence((seed, rank)).generate_state(1)[0] >> 1)  # DALI's 31 bits
    return Loader(
        data.reader,
        data.samples,
        graph,
        options,
        rows,
        batch=batch,
        seed=stream,  # differs between processes, or all would draw the same sizes
        device=device,
        loading=loading,
        say=say,
    )


def to_test(
    data: Data,
    graph: ModuleType,
    options: Any,
    *,
    batch: int,
    rank: int,
    world: int,
    device: torch.device,
    loading: Loading,
    say: Callable[[str], None],
) -> tuple[Loader, np.ndarray]:
    """This process's share of the test images.

    Returns:
        The batches, and the rows [steps, batch] that count; -1 where the last step is filled up.
    """
    count = len(data.test)
    places = order.in_order(count, rank, world, batch)
    position = np.arange(len(places))[:, None] * world * batch + rank * batch + np.arange(batch)
    loader = Loader(
        data.reader,
        data.samples,
        graph,
        options,
        lambda step: data.test[places[step % len(places)]],
        batch=batch,
        seed=0,
        device=device,
        loading=loading,
        say=say,
    )
    return loader, np.where(position < count, data.test[places], -1)


def targets(data: Data, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What the detector is to find in a batch, where the graph has moved it."""
    device = tensors["image"].device
    # Copies wait for the device, which boxes do at every step anyway (non-maximum suppression).
    here = [tensors[name].cpu() for name in ("index", "original", "size", "flip")]
    found = []
    for row, original, size, flip in zip(*here, strict=True):
        truth = data.truths[int(row)]
        boxes = detection_boxes.moved(torch.from_numpy(truth.boxes), original, size, bool(flip))
        labels = torch.from_numpy(truth.labels) + 1  # 0 is the background
        found.append({"boxes": boxes.to(device), "labels": labels.to(device)})
    return found
