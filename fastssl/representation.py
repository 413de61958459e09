"""What a backbone says of a batch from an evaluation graph: one vector an image, or every depth.

A graph puts out `patches`, over which the outputs are averaged (Kolesnikov, Zhai & Beyer 2019,
arXiv:1901.09005, section 4: the representation of networks trained on patches), or else `image`,
which goes through the backbone as it is.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import patch_network
from fastssl.patch_network import Standardization


def represent(backbone: nn.Module, tensors: Mapping[str, Tensor], how: Standardization) -> Tensor:
    """One vector an image: [B, dim].

    Args:
        backbone: by the contract of fastssl.backbones.
        tensors: `patches` [B, F, 3, p, p] or `image` [B, 3, S, S], uint8.
        how: what the run's objective did to patches; images are left as they are.

    Raises:
        ValueError: the batch holds neither.
    """
    pixels, patches = _pixels(backbone, tensors, how)
    return _mean(backbone(pixels), patches)


def all_stages(
    backbone: Any, tensors: Mapping[str, Tensor], how: Standardization
) -> dict[str, Tensor]:
    """Every depth of the backbone, first to last: [B, C, H, W] or [B, D] each; see `represent`."""
    pixels, patches = _pixels(backbone, tensors, how)
    return {name: _mean(stage, patches) for name, stage in backbone.stages(pixels).items()}


def pooled(stage: Tensor, size: int, pool: Literal["max", "avg"]) -> Tensor:
    """A stage as one vector of about `size` values an image: [B, D].

    Args:
        stage: [B, C, H, W], or [B, D], which is taken as it is.
        size: of a map, the largest s x s with C * s * s <= size remains (K19: 9000); s is at
            least 1, and never more than the map has.
        pool: adaptive max (K19, linear_eval.py) or average (VISSL).

    Raises:
        ValueError: the stage is neither a map nor a vector.
    """
    if stage.ndim == 2:
        return stage
    if stage.ndim != 4:
        raise ValueError(f"[B, C, H, W] or [B, D] can be probed, not {[*stage.shape]}")
    side = max(1, math.isqrt(size // stage.shape[1]))
    target = (min(side, stage.shape[2]), min(side, stage.shape[3]))
    if target != stage.shape[2:]:
        adaptive = F.adaptive_max_pool2d if pool == "max" else F.adaptive_avg_pool2d
        stage = adaptive(stage, target)
    return stage.flatten(1)


def standardization(recipe: Mapping[str, Any] | None) -> Standardization:
    """What the objective of a recipe (its `values`) did to patches; global: nothing."""
    return (recipe or {}).get("objective", {}).get("standardize", "global")


def _pixels(
    backbone: nn.Module, tensors: Mapping[str, Tensor], how: Standardization
) -> tuple[Tensor, int]:
    """What the backbone takes [B * F, 3, h, w], and F; 0 for images."""
    if "patches" not in tensors:
        if "image" not in tensors:
            found = ", ".join(sorted(tensors))
            raise ValueError(f"an evaluation graph puts out image or patches; this one: {found}")
        return tensors["image"], 0
    patches = tensors["patches"]
    pixels = patch_network.standardize(patches.flatten(0, 1), how)
    if pixels.is_floating_point():
        pixels = pixels.to(next(backbone.parameters()).dtype)
    return pixels, patches.shape[1]


def _mean(output: Tensor, patches: int) -> Tensor:
    """Over the patches of an image, in float32 at least."""
    if not patches:
        return output
    wide = output.to(torch.promote_types(output.dtype, torch.float32))
    return wide.unflatten(0, (-1, patches)).mean(dim=1)
