"""Training of heads on frozen features by SGD: one step, and epochs over cached features.

Features that fit in the memory that is allowed are read once and shuffled as a whole. Larger ones
are read in windows: chunks of CHUNK neighbouring rows are shuffled, as many as fit form a window,
and within it all rows are. A listing stands in order of classes, so a window mixes rows of the
whole split. Every process works on its share of each batch, and gradients are added up: two
processes train as one, but for dropout.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import distributed, optim
from fastssl.linear.head import Head
from fastssl.linear.protocols import Sgd

CHUNK = 64  # rows that are read together: half a megabyte of 2048 float32


class Trainer:
    """Heads that see the same images, and their optimizer."""

    def __init__(self, heads: Sequence[Head], sgd: Sgd, *, steps_per_epoch: int) -> None:
        """Heads are on their device already, the same on every process."""
        self._heads, self._sgd = heads, sgd
        self._schedule = sgd.schedule
        self._per_epoch = steps_per_epoch
        self._step = 0
        self._parameters = [each for head in heads for each in head.parameters()]
        self._optimizer = optim.optimizer(self._schedule, nn.ModuleList(heads))
        self._loss = torch.zeros((), device=self._parameters[0].device, dtype=torch.float64)

    def step(self, features: Sequence[Tensor], labels: Tensor) -> None:
        """One update by this process's share of a batch, for each head [B, D]; labels [B]."""
        rate = optim.learning_rate(
            self._schedule,
            self._step,
            steps=self._sgd.epochs * self._per_epoch,
            steps_per_epoch=self._per_epoch,
            batch=self._sgd.batch,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss = sum(
            F.cross_entropy(head(x), labels, reduction="sum")
            for head, x in zip(self._heads, features, strict=True)
        )
        assert isinstance(loss, Tensor)
        loss = loss / self._sgd.batch
        loss.backward()
        self._add_gradients()
        self._optimizer.step()
        self._loss += loss.detach()
        self._step += 1

    def end_epoch(self) -> float:
        """The epoch's mean loss, over heads too; the same on every process.

        Raises:
            ValueError: it is not a number any more.
        """
        if distributed.world() > 1:
            dist.all_reduce(self._loss)
        loss = self._loss.item() / self._per_epoch / len(self._heads)
        self._loss.zero_()
        if not np.isfinite(loss):
            raise ValueError(
                f"the probe's loss is {loss} in epoch {self._step // self._per_epoch}: the "
                "learning rate is too high for these features; give a lower linear.lr or "
                "linear.batchnorm=true"
            )
        return loss

    def _add_gradients(self) -> None:
        if distributed.world() == 1:
            return
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        together = torch.cat([each.flatten() for each in gradients])
        dist.all_reduce(together)
        sizes = [each.numel() for each in gradients]
        for gradient, summed in zip(gradients, together.split(sizes), strict=True):
            gradient.copy_(summed.view_as(gradient))


def train(
    head: Head,
    features: np.ndarray,
    labels: np.ndarray,
    sgd: Sgd,
    *,
    seed: int,
    device: torch.device,
    memory: float,
    told: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Trains a head on cached features, and leaves it in eval mode.

    Args:
        head: on the device, the same on every process.
        features: [N, D], memory-mapped or not.
        labels: int64 [N].
        sgd: how.
        seed: of the order.
        device: where.
        memory: bytes of features that a process may hold.
        told: after each epoch, its number (from 1) and its mean loss.

    Raises:
        ValueError: what `check_batch` says, a feature is NaN or infinite, or training diverges.
    """
    check_batch(sgd.batch, len(features))
    window = max(sgd.batch, int(memory / (features.itemsize * features.shape[1])))
    resident = None
    if len(features) <= window:
        resident = torch.from_numpy(np.array(features))
        _check_finite(resident, np.arange(len(features)))
        resident = resident.to(device)
    labels_N = torch.from_numpy(labels).to(device)
    trainer = Trainer([head], sgd, steps_per_epoch=-(-len(features) // sgd.batch))
    head.train()
    for epoch in range(sgd.epochs):
        for rows, x in _batches(features, resident, sgd.batch, seed, epoch, window):
            rows = rows.to(device)
            trainer.step([x.to(device)], labels_N[rows])
        told(epoch + 1, trainer.end_epoch())
    head.eval()


def check_batch(batch: int, images: int) -> None:
    """Refuses a batch that can't be made.

    Raises:
        ValueError: it has more images than there are, or doesn't divide among the processes.
    """
    if batch > images:
        raise ValueError(
            f"linear.batch ({batch}) is more than the {images} training images: give "
            f"linear.batch={2 ** int(np.log2(max(1, images)))} or less"
        )
    if batch % distributed.world():
        raise ValueError(
            f"linear.batch ({batch}) must be a multiple of the {distributed.world()} processes"
        )


def positions(count: int, *, seed: int, epoch: int, batch: int, window: int) -> np.ndarray:
    """The rows of an epoch's batches, int64 [steps, batch]: each once.

    The last batch is filled up with the epoch's first rows.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    if count <= window:
        order = generator.permutation(count)
    else:
        chunks = generator.permutation(-(-count // CHUNK))
        order = (chunks[:, None] * CHUNK + np.arange(CHUNK)).ravel()
        order = order[order < count]
        for first in range(0, count, window):
            generator.shuffle(order[first : first + window])
    return np.resize(order, (-(-count // batch), batch))


def _batches(
    features: np.ndarray, resident: Tensor | None, batch: int, seed: int, epoch: int, window: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's rows of every batch, and their features."""
    rank, own = distributed.rank(), batch // distributed.world()
    plan = positions(len(features), seed=seed, epoch=epoch, batch=batch, window=window)
    plan = plan[:, rank * own : (rank + 1) * own]
    together = len(plan) if resident is not None else max(1, window // batch)
    for first in range(0, len(plan), together):
        steps = plan[first : first + together]
        if resident is not None:
            own_rows = torch.from_numpy(steps.copy()).to(resident.device)
            yield from ((rows, resident[rows]) for rows in own_rows)
            continue
        sorted_rows, place = np.unique(steps, return_inverse=True)  # read in the file's order
        read = torch.from_numpy(features[sorted_rows])
        if epoch == 0:
            _check_finite(read, sorted_rows)
        for rows, places in zip(steps, place.reshape(steps.shape), strict=True):
            yield torch.from_numpy(rows.copy()), read[torch.from_numpy(places.copy())]


def _check_finite(features: Tensor, rows: np.ndarray) -> None:
    bad = ~features.isfinite().all(dim=1)
    if bad.any():
        raise ValueError(f"the features of row {rows[int(bad.nonzero()[0])]} are NaN or infinite")
