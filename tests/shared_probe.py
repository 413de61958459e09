"""Probes whose result must not depend on the number of processes; run by torchrun, it prints it."""

import json
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fastssl import distributed
from fastssl.linear import logistic, logistic_sgd
from fastssl.linear.head import Head
from fastssl.linear.protocols import Sgd

CPU = torch.device("cpu")
CLASSES = 4
SGD = Sgd(epochs=5, batch=20, lr=1.0, milestones=(), augment="none")


def problem(count: int = 203, length: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 [N, D] of classes that overlap, and labels."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, count)
    centres = np.random.default_rng(99).normal(size=(CLASSES, length))
    return centres[labels] + draw.normal(size=(count, length)) * 1.5, labels.astype(np.int64)


def rows(features, labels, *, block=1000, memory=0.0) -> logistic.Rows:
    return logistic.Rows(features, labels, stage="pool", block=block, device=CPU, memory=memory)


def fit(features, labels, *, l2=0.02, tolerance=1e-9, updates=800, **blocks: Any) -> logistic.Fit:
    part = rows(features, labels, **blocks)
    return logistic.fit(part, classes=CLASSES, l2=l2, updates=updates, tolerance=tolerance)


def head_for(sgd: Sgd, length: int = 7, seed: int = 0) -> Head:
    return Head(
        length,
        CLASSES,
        batchnorm=sgd.batchnorm,
        hidden=sgd.hidden,
        dropout=sgd.dropout,
        seed=seed,
        dtype=torch.float64,
    )


def train_by_sgd(features, labels, sgd: Sgd, *, memory: float = 1e9) -> tuple[Head, list[float]]:
    head, losses = head_for(sgd), []
    logistic_sgd.train(
        head,
        features,
        labels,
        sgd,
        seed=0,
        device=CPU,
        memory=memory,
        told=lambda epoch, loss: losses.append(loss),
    )
    return head, losses


def work() -> dict[str, list]:
    """203 rows don't divide by two."""
    features, labels = problem()
    found = fit(features, labels, block=30)
    standard = logistic.standard_of(rows(features, labels, block=30))
    sgd = Sgd(
        epochs=4,
        batch=20,
        lr=1.0,
        milestones=(2.0,),
        augment="none",
        batchnorm=True,
        hidden=5,
        weight_decay=0.01,
        decay_bias=True,
    )
    head, losses = train_by_sgd(features, labels, sgd)
    windows, _ = train_by_sgd(features, labels, sgd, memory=60 * 7 * 8.0)
    predicted = logistic.predict(rows(features, labels), logistic.scores_of(found, None))
    x = torch.from_numpy(features)
    return {
        "weight": found.weight.tolist(),
        "objective": [found.objective],
        "std": standard.std.tolist(),
        "predicted": predicted.classes.tolist(),
        "in_five": predicted.in_five.tolist(),
        "losses": losses,
        "scores": head(x).tolist(),
        "windows": windows(x).tolist(),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    values = work()
    if distributed.rank() == 0:
        print(json.dumps(values))
    dist.destroy_process_group()
