"""Logits to a loss and its metrics: what all objectives with a label share."""

import torch
from torch import Tensor
from torch.nn import functional


def classification(
    logits: Tensor, label: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of `logits` [M, classes], and the accuracy beside its chance level.

    Args:
        logits: [M, classes], of any floating type.
        label: [M], int64.
        label_smoothing: how much of the target is spread over all classes.
    """
    with torch.autocast(logits.device.type, enabled=False):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = functional.cross_entropy(wide, label, label_smoothing=label_smoothing)
    right = (logits.detach().argmax(1) == label).float().mean()
    chance = torch.full((), 1 / logits.shape[1], device=logits.device)
    return loss, {"accuracy": right, "chance": chance}
