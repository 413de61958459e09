"""Activations that are computed again in the backward pass, in place of being kept for it.

A second pass may not do twice what a forward pass does once: batch norm's running statistics are
left as the first pass made them, and random numbers are the same again.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpointed(module: nn.Module, x: Tensor, *others: Any, **named: Any) -> Any:
    """What `module(x)` is; of what is needed for its gradients only `x` is kept (Chen et al. 2016).

    Args:
        module: layers of which each is called once.
        x: input.
        others: what else the module is called with, which is kept too.
        named: the same, by keywords.
    """
    if torch.compiler.is_compiling():  # the compiler's second pass does without side effects
        return checkpoint(module, x, *others, use_reentrant=False, **named)
    return checkpoint(
        module,
        x,
        *others,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), statistics_kept(module)),
        **named,
    )


@contextlib.contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norm in training mode works as before, and its running statistics stay as they are.

    It moves others meanwhile, which nobody reads. Without any it would keep fewer tensors for its
    backward pass than at first, which torch's checkpoint refuses; and writing the old values back
    would count as a change of what another call of the same layers has kept.
    """
    kept: list[tuple[_BatchNorm, Tensor | None, Tensor | None, Tensor | None]] = []
    for each in module.modules():
        if isinstance(each, _BatchNorm) and each.training and each.track_running_stats:
            kept.append((each, each.running_mean, each.running_var, each.num_batches_tracked))
    try:
        for norm, mean, variance, count in kept:
            norm.running_mean = None if mean is None else torch.empty_like(mean)
            norm.running_var = None if variance is None else torch.empty_like(variance)
            norm.num_batches_tracked = None if count is None else count.clone()
        yield
    finally:
        for norm, mean, variance, count in kept:
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, variance, count
