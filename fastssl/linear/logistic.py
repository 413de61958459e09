"""Multinomial logistic regression on frozen features by L-BFGS, reading them in blocks.

The objective is the mean cross-entropy + l2 / 2 * the sum of the squared weights; biases are not
penalised. Processes share the rows: each computes the sums of its own part, and the sums are added
in float64, so that any number of processes walks the same way up to rounding.
Features stay where they are, in a memory-mapped file: an evaluation of the objective reads all of
them once, `block` rows at a time (1.28 million x 2048 float32: 10.5 GB a pass). Where a process's
part fits in the memory that is allowed, it is read once and kept on the device.

L-BFGS walks around the features' mean, which changes neither the objective nor its minimum: a free
bias takes the mean up. After a ReLU features have a large common part, and without this most of
the updates go into it (built-in images, layer4: objective 0.521 after 40 updates, 0.622 without).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastssl import distributed

HISTORY = 10  # pairs of vectors that L-BFGS keeps; scipy's default too
# Vectors as long as the weights that torch.optim.LBFGS holds besides: parameters, gradients,
# directions, and what its line search brackets.
OTHER_VECTORS = 12

# A change of the objective that is rounding only: there L-BFGS ends. (scipy's default: 2e-9 of it.)
STALLED = {torch.float32: 1e-9, torch.float64: 1e-16}


class Standard(NamedTuple):
    """What standardised features are taken off and divided by, float64 [D] each."""

    mean: Tensor
    std: Tensor  # 1 where a feature never changes


class Rows:
    """This process's rows of the features of one stage, in blocks on the device."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        *,
        stage: str,
        block: int,
        device: torch.device,
        memory: float,
    ) -> None:
        """Nothing is read yet.

        Args:
            features: [N, D], memory-mapped or not: float16 (computed with as float32), float32,
                float64.
            labels: int64 [N], 0 ... classes - 1.
            stage: what to call them in messages.
            block: rows that are worked on at a time.
            device: where.
            memory: bytes: a part of no more than this is kept on the device after its first pass.
        """
        if len(features) != len(labels):
            raise ValueError(f"{stage}: {len(features)} features for {len(labels)} labels")
        if labels.dtype != np.int64:
            raise ValueError(f"{stage}: labels are {labels.dtype}, not int64")
        self.stage, self.count, self.length = stage, len(features), features.shape[1]
        self.device = device
        rank, world = distributed.rank(), distributed.world()
        self.first, self.end = self.count * rank // world, self.count * (rank + 1) // world
        self._features, self._labels, self._block = features, labels, block
        half = features.dtype == np.float16
        self.dtype = torch.float64 if features.dtype == np.float64 else torch.float32
        own = (self.end - self.first) * self.length * (4 if half else features.dtype.itemsize)
        self._keep = own <= memory
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._checked = False

    @property
    def bytes(self) -> int:
        """Of all processes, as stored: what a pass reads."""
        return self._features.nbytes

    @property
    def kept(self) -> bool:
        """Whether this process's part is read once only."""
        return self._keep

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of features [B, D] and labels [B].

        Raises:
            ValueError: a feature is NaN or infinite.
        """
        if self._kept:
            yield from self._kept
            return
        for first in range(self.first, self.end, self._block):
            rows = slice(first, min(first + self._block, self.end))
            block = torch.from_numpy(np.array(self._features[rows])).to(self.device, self.dtype)
            if not self._checked and not block.isfinite().all():
                row = first + int((~block.isfinite().all(dim=1)).nonzero()[0])
                raise ValueError(f"{self.stage}: the features of row {row} are NaN or infinite")
            labels = torch.from_numpy(self._labels[rows].copy()).to(self.device)
            if self._keep:
                self._kept.append((block, labels))
            yield block, labels
        self._checked = True


@dataclass(frozen=True)
class Fit:
    """What L-BFGS found."""

    weight: Tensor  # float64 [C, D]
    bias: Tensor  # float64 [C]
    objective: float
    gradient: float  # the greatest entry of its gradient, by size
    updates: int
    passes: int  # over the features


def bytes_needed(classes: int, length: int, *, block: int, item: int = 4) -> int:
    """The memory that L-BFGS takes on each process besides features that are kept.

    float64 vectors of all weights, and a block with its scores.
    """
    weights = classes * (length + 1)
    working = 2 * item * weights + item * block * (length + 3 * classes)
    return (2 * HISTORY + OTHER_VECTORS) * 8 * weights + working


def fit(
    rows: Rows,
    *,
    classes: int,
    l2: float,
    updates: int,
    tolerance: float,
    standard: Standard | None = None,
) -> Fit:
    """Minimises the objective from zero, with strong Wolfe line search; the same on every process.

    Args:
        rows: of this process.
        classes: C, at least 2.
        l2: of the penalty, above.
        updates: of the weights at most; with the line search about 1.1 passes each.
        tolerance: it ends once no entry of the gradient (around the mean) is greater.
        standard: what the features are standardised by; the weights are those of the standardised.

    Raises:
        ValueError: fewer than two classes, or features that are NaN or infinite.
    """
    if classes < 2:
        raise ValueError(f"{rows.stage}: logistic regression needs at least 2 classes, not 1")
    mean = standard_of(rows).mean
    if standard is not None:
        mean = torch.zeros_like(mean)
    kind = {"dtype": torch.float64, "device": rows.device}
    weight = torch.zeros(classes, rows.length, **kind)
    centred = torch.zeros(classes, **kind)  # bias + weight @ mean
    solver = torch.optim.LBFGS(
        [weight, centred],
        max_iter=updates,
        max_eval=2 * updates,
        tolerance_grad=tolerance,
        tolerance_change=STALLED[rows.dtype],
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    passes = 2  # for the mean
    gradient = float("inf")

    def evaluate() -> float:
        nonlocal passes, gradient
        passes += 1
        bias = centred - weight @ mean
        value, of_weight, of_bias = _objective(rows, weight, bias, l2, standard)
        gradient = max(of_weight.abs().max().item(), of_bias.abs().max().item())
        weight.grad = of_weight - of_bias[:, None] * mean
        centred.grad = of_bias
        return value

    with torch.no_grad(), _exact_products():
        solver.step(evaluate)
        objective = evaluate()  # the line search may have tried another point last
    return Fit(
        weight=weight,
        bias=centred - weight @ mean,
        objective=objective,
        gradient=gradient,
        updates=solver.state[weight]["n_iter"],
        passes=passes,
    )


def standard_of(rows: Rows) -> Standard:
    """The mean and the standard deviation of each feature over all processes: two passes."""
    kind = {"dtype": torch.float64, "device": rows.device}
    total = torch.zeros(rows.length, **kind)
    for block, _ in rows:
        total += block.double().sum(dim=0)
    mean = _summed(total) / rows.count
    total = torch.zeros(rows.length, **kind)
    for block, _ in rows:
        total += (block.double() - mean).square().sum(dim=0)
    std = (_summed(total) / rows.count).sqrt()
    return Standard(mean, torch.where(std > 1e-12 * (1 + mean.abs()), std, torch.ones_like(std)))


class Predictions(NamedTuple):
    """For every image of a split, on every process."""

    classes: np.ndarray  # int64 [N]: the likeliest
    in_five: np.ndarray  # bool [N]: the image's class is among the five likeliest


@torch.no_grad()
def predict(rows: Rows, scores: Callable[[Tensor], Tensor]) -> Predictions:
    """What `scores` ([B, D] -> [B, C]) says of all rows, those of other processes included."""
    kind = {"dtype": torch.int64, "device": rows.device}
    predicted, in_five = torch.zeros(rows.count, **kind), torch.zeros(rows.count, **kind)
    first = rows.first
    for block, labels in rows:
        score = scores(block)
        top = score.topk(min(5, score.shape[1]), dim=1).indices
        here = slice(first, first + len(block))
        predicted[here] = top[:, 0]
        in_five[here] = (top == labels[:, None]).any(dim=1).long()
        first += len(block)
    # Each process filled in its own rows, and zeros elsewhere.
    return Predictions(
        _summed(predicted).cpu().numpy(), _summed(in_five).cpu().numpy().astype(bool)
    )


def scores_of(found: Fit, standard: Standard | None) -> Callable[[Tensor], Tensor]:
    """What `predict` asks, of a fit by L-BFGS."""
    return lambda block: _scores(block, found.weight, found.bias, standard)


def _objective(
    rows: Rows, weight: Tensor, bias: Tensor, l2: float, standard: Standard | None
) -> tuple[float, Tensor, Tensor]:
    """The value, and the gradients of `weight` [C, D] and `bias` [C]."""
    classes, length = weight.shape
    sums = torch.zeros(classes * (length + 1) + 1, dtype=torch.float64, device=rows.device)
    of_weight, of_bias = sums[: classes * length].view(classes, length), sums[-classes - 1 : -1]
    for block, labels in rows:
        block = _standardised(block, standard)
        log_p = torch.addmm(bias.to(block), block, weight.to(block).T).log_softmax(dim=1)
        sums[-1] -= log_p.gather(1, labels[:, None]).double().sum()
        error = log_p.exp_()
        error[torch.arange(len(labels), device=labels.device), labels] -= 1
        of_weight += error.T @ block
        of_bias += error.double().sum(dim=0)
    sums = _summed(sums) / rows.count
    of_weight, of_bias = sums[: classes * length].view(classes, length), sums[-classes - 1 : -1]
    value = sums[-1] + l2 / 2 * weight.square().sum()
    return value.item(), of_weight + l2 * weight, of_bias.clone()


def _scores(block: Tensor, weight: Tensor, bias: Tensor, standard: Standard | None) -> Tensor:
    block = _standardised(block, standard)
    return torch.addmm(bias.to(block), block, weight.to(block).T)


def _standardised(block: Tensor, standard: Standard | None) -> Tensor:
    if standard is None:
        return block
    return (block - standard.mean.to(block)) / standard.std.to(block)


def _summed(tensor: Tensor) -> Tensor:
    if distributed.world() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def _exact_products() -> Iterator[None]:
    """TF32 rounds products to 10 bits, which a line search sees as noise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
