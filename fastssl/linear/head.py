"""The classifier that a probe trains by SGD on features: linear, or with one hidden layer."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import distributed
from fastssl.linear.logistic import Standard


class Head(nn.Module):
    """Features [B, D] to scores [B, C].

    Linear: weights start normal with a deviation of 0.01 and biases at 0 (VISSL). With a hidden
    layer (Kolesnikov et al. 2019, linear_eval.py: 1000, ReLU, dropout 0.5): Glorot's uniform, which
    is what TensorFlow does there.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        length: int,
        classes: int,
        *,
        batchnorm: bool,
        hidden: int,
        dropout: float,
        seed: int,
        standard: Standard | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """On the CPU.

        Args:
            length: D.
            classes: C.
            batchnorm: features are normalised by the batch's statistics first, without scale and
                offset: for each feature (Goyal's and VISSL's is for each channel of a map).
            hidden: length of the hidden layer; 0: there is none.
            dropout: part of the hidden layer that is zeroed, 0 ... 1.
            seed: of the first weights; dropout draws from it too, and from the rank.
            standard: features are standardised by it first.
            dtype: of the weights.
        """
        super().__init__()
        self.batchnorm = BatchNorm(length) if batchnorm else None
        self.register_buffer("mean", None if standard is None else standard.mean.to(dtype))
        self.register_buffer("std", None if standard is None else standard.std.to(dtype))
        self.hidden = nn.Linear(length, hidden) if hidden else None
        self.last = nn.Linear(hidden or length, classes)
        self.dropout, self._seed = dropout, seed
        self._generator: torch.Generator | None = None
        draw = torch.Generator().manual_seed(seed)
        layers = [self.last] if self.hidden is None else [self.hidden, self.last]
        for layer in layers:
            nn.init.zeros_(layer.bias)
            if hidden:
                nn.init.xavier_uniform_(layer.weight, generator=draw)
            else:
                nn.init.normal_(layer.weight, std=0.01, generator=draw)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.last.weight.dtype)
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        if self.batchnorm is not None:
            x = self.batchnorm(x)
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
            if self.training and self.dropout:
                x = x * (self._drawn(x) >= self.dropout) / (1 - self.dropout)
        return self.last(x)

    def _drawn(self, like: Tensor) -> Tensor:
        if self._generator is None:  # other masks on each process: they see other images
            self._generator = torch.Generator(like.device)
            self._generator.manual_seed(self._seed * 100_003 + distributed.rank())
        return torch.rand(
            like.shape, generator=self._generator, device=like.device, dtype=like.dtype
        )


class BatchNorm(nn.Module):
    """Batch norm without scale and offset, over the batch of all processes.

    As torch's: momentum 0.1, epsilon 1e-5. What it normalises is frozen, so no gradient passes, and
    the statistics of all processes cost one small sum.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, length: int) -> None:
        """For [B, length]."""
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(length))
        self.register_buffer("running_var", torch.ones(length))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var, count = _moments(x)
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var * (count / max(1, count - 1)), 0.1)
        return (x - mean) * (var + 1e-5).rsqrt()


def _moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each feature, and the images, over all processes."""
    world, wide = distributed.world(), x.double()
    sums = torch.stack([wide.sum(dim=0), wide.square().sum(dim=0)])
    if world > 1:
        dist.all_reduce(sums)
    count = len(x) * world  # as many on each
    mean = sums[0] / count
    var = (sums[1] / count - mean.square()).clamp_(min=0)
    return mean.to(x), var.to(x), count
