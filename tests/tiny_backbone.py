"""A backbone small enough that training it for some steps costs a test nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Options:
    width: int = 8


class Tiny(nn.Module):
    normalization = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    def __init__(self, width: int):
        super().__init__()
        self.dim = 2 * width
        self.first = nn.Conv2d(3, width, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        if x.dtype == torch.uint8:
            x = (x.to(self.first.weight.dtype) / 255 - 0.5) / 0.25
        first = self.norm(self.first(x)).relu()
        return {"first": first, "pool": self.second(first).relu().mean(dim=(2, 3))}

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)["pool"]


def backbone(options: Options) -> nn.Module:
    return Tiny(options.width)
