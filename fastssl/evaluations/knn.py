"""Accuracy by weighted k nearest neighbours, over a sweep of k and temperature.

Cosine similarity, votes weighted by exp(similarity / temperature) (Wu et al. 2018, section 3.4;
k 200 and temperature 0.07 there). One search finds the neighbours for all of them; the features are
read in blocks, so that memory does not grow with the number of training images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import distributed
from fastssl.evaluation_task import Cell, Table, Task
from fastssl.neighbours import nearest, votes

HELP = "weighted k-nearest-neighbour accuracy, over a sweep of k and temperature"
_BLOCK, _MOST = 1 << 26, 1 << 16  # values and rows of the training features at once: 256 MB
_VAL = 1 << 28  # values of the features to classify at once: 1 GB
_VOTES = 4096  # images whose votes are counted at once


@dataclass(frozen=True, kw_only=True)
class Options:
    """The sweep. The first k and temperature give the accuracy that counts; as in training."""

    neighbours: tuple[int, ...] = (20, 1, 5, 10, 50, 100, 200)
    temperature: tuple[float, ...] = (0.07, 0.02, 0.2, 1.0)
    stages: tuple[str, ...] = ()  # of the backbone; empty: those of features.stages, and where they
    # are not given either, the last, which forward returns

    def __post_init__(self) -> None:
        """Refuses what can't be.

        Raises:
            ValueError: says which value.
        """
        if not self.neighbours or min(self.neighbours) < 1:
            raise ValueError(f"neighbours ({list(self.neighbours)}) must be positive numbers")
        if not self.temperature or min(self.temperature) <= 0:
            raise ValueError(f"temperature ({list(self.temperature)}) must be numbers above 0")


def evaluate(task: Task, options: Options) -> Table:
    """One row a stage: the accuracy for each k at the first temperature, and the best of all.

    The best is chosen by the images that it is measured on: it shows how much the choice matters,
    and only the first k and temperature are a result.
    """
    train, val, classes = task.splits()
    key = "knn.stages" if options.stages else "features.stages"
    chosen = replace(task.features, stages=options.stages or task.features.stages or ("last",))
    known = task.extract(train, chosen, key=key)
    asked = task.extract(val, chosen, key=key)
    most = len(known.labels)
    counts = list(dict.fromkeys(min(k, most) for k in options.neighbours))
    if max(options.neighbours) > most:
        more = [k for k in options.neighbours if k > most]
        task.say(f"knn: k {', '.join(map(str, more))} -> {most}: there are {most} training images")
    columns = ["stage", *[f"k={k}" for k in sorted(counts)], "top-5", "best", "at"]
    rows: list[list[Cell]] = []
    for stage, train_ND in known.stages.items():
        accuracy = sweep(
            train_ND,
            known.labels,
            asked.stages[stage],
            asked.labels,
            neighbours=counts,
            temperatures=options.temperature,
            classes=len(classes),
            device=task.accelerator.device,
        )
        first = options.temperature[0]
        top1, top5 = accuracy[counts[0], first]
        best = max(accuracy, key=lambda each: accuracy[each][0])
        task.log(
            "knn",
            {
                "stage": stage,
                "accuracy": top1,
                "top5": top5,
                "neighbours": counts[0],
                "temperature": first,
                "train_images": len(known.labels),
                "val_images": len(asked.labels),
                # Not plain "sweep": by their names the report tells results from settings.
                "sweep_accuracies": [[k, t, *both] for (k, t), both in accuracy.items()],
            },
        )
        at_first = [accuracy[k, first][0] for k in sorted(counts)]
        rows.append([stage, *at_first, top5, accuracy[best][0], f"k={best[0]}, t={best[1]:g}"])
    title = (
        f"kNN accuracy in %, temperature {options.temperature[0]:g}, top-5 at k={counts[0]} "
        f"({len(known.labels):,} training images, {len(asked.labels):,} to classify)"
    )
    return Table(title, columns, rows)


def sweep(
    train: np.ndarray,
    train_labels: np.ndarray,
    val: np.ndarray,
    val_labels: np.ndarray,
    *,
    neighbours: Sequence[int],
    temperatures: Sequence[float],
    classes: int,
    device: torch.device,
) -> dict[tuple[int, float], tuple[float, float]]:
    """(k, temperature) -> top-1 and top-5 accuracy, 0 ... 1, the same on every process.

    Processes share the images of val, of which each counts once. A class without a vote is not
    among the five.

    Args:
        train: [N, D], read in blocks: may be a memory map.
        train_labels: int64 [N].
        val: [M, D].
        val_labels: int64 [M].
        neighbours: each at most N.
        temperatures: each above 0.
        classes: labels are below.
        device: where it is computed.
    """
    mine = np.array_split(np.arange(len(val)), distributed.world())[distributed.rank()]
    pairs = [(k, temperature) for temperature in temperatures for k in sorted(set(neighbours))]
    right = torch.zeros((len(pairs), 2), dtype=torch.int64, device=device)
    at_once = max(1, _VAL // val.shape[1])
    for begin in range(0, len(mine), at_once):
        rows = mine[begin : begin + at_once]
        similarity, labels = nearest(
            _blocks(train, train_labels, device), _unit(val[rows], device), max(neighbours)
        )
        label_M = torch.from_numpy(val_labels[rows]).to(device)
        for part in torch.arange(len(rows), device=device).split(_VOTES):
            for number, temperature in enumerate(temperatures):
                given = votes(
                    similarity[part],
                    labels[part],
                    neighbours=neighbours,
                    temperature=temperature,
                    classes=classes,
                )
                first = number * len(given)
                for offset, votes_MC in enumerate(given.values()):
                    right[first + offset] += _right(votes_MC, label_M[part])
    total = distributed.gather(right[None]).sum(dim=0).tolist()
    return {pair: (a / len(val), b / len(val)) for pair, (a, b) in zip(pairs, total, strict=True)}


def _right(votes_MC: Tensor, label_M: Tensor) -> Tensor:
    """How many are right, and how many among the five with most votes: int64 [2]."""
    five = votes_MC.topk(min(5, votes_MC.shape[1]), dim=1)
    hit = (five.indices == label_M[:, None]) & (five.values > 0)
    return torch.stack([(votes_MC.argmax(dim=1) == label_M).sum(), hit.any(dim=1).sum()])


def _blocks(
    train: np.ndarray, labels: np.ndarray, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    size = min(_MOST, max(1, _BLOCK // train.shape[1]))
    for begin in range(0, len(train), size):
        part = slice(begin, begin + size)
        yield _unit(train[part], device), torch.from_numpy(labels[part]).to(device)


def _unit(rows: np.ndarray, device: torch.device) -> Tensor:
    """A copy: memory maps are read-only."""
    return F.normalize(torch.from_numpy(np.array(rows)).to(device).float(), dim=1)
