"""A task like none of the built-in ones, graph and objective in one file: for tests of previews."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType
from torch import Tensor, nn

from pipelines import ops
from pipelines.images import Device, Image


@dataclass(frozen=True, kw_only=True)
class Options:
    size: int = 24
    classes: int = 0
    largest_crop: int = 24


def graph(encoded: Image, index: DataNode, options: Options, device: Device) -> dict[str, DataNode]:
    pixels = ops.decode(encoded, device)
    small = ops.center_crop(pixels, options.size, options.size)
    strip = fn.stack(*[small] * 5, axis=0, axis_name="F")
    weight = fn.cast(index, dtype=DALIDataType.FLOAT) * 0.5
    gray = fn.reductions.mean(small, axes=[2], keep_dims=True)
    return {
        "strip": strip,
        "tilt": ops.table(np.array([7, 21, 35, 49, 63], np.int64)),  # one for each of the strip
        "mask": fn.cast(gray, dtype=DALIDataType.UINT8),
        "weight": weight,
        "boxes": ops.table(np.arange(100, 120).reshape(5, 4)),
        "field": ops.table(np.linspace(-1, 2, 2 * 6 * 6, dtype=np.float32).reshape(2, 6, 6)),
        "index": index,
    }


class Objective(nn.Module):
    def __init__(self, backbone, options, *, images, classes, labels, seed):
        super().__init__()
        self.backbone = backbone
        backbone(torch.zeros(2, 3, 40, 40))  # tried once, which is no input
        self.copy = copy.deepcopy(backbone)  # as a momentum encoder is

    def forward(
        self,
        strip: Tensor,
        tilt: Tensor,
        mask: Tensor,
        weight: Tensor,
        boxes: Tensor,
        field: Tensor,
        index: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.backbone(strip[:, 0])  # as it is
        half = torch.full_like(strip[:, 0], 51).float() / 255  # 51, normalised by hand
        mean, std = (torch.tensor(each).reshape(3, 1, 1) for each in self.backbone.normalization)
        loss = self.backbone.stages((half - mean) / std)["pool"].mean()
        self.copy(strip[:, 1].float() * 100)  # far out of range
        self.backbone(strip[:3, 2])  # of some images only, as it is
        self.backbone(255 - strip[:3, 2])  # and not as it is
        return loss, {"accuracy": loss.detach() * 0 + 0.5, "chance": loss.detach() * 0 + 0.5}

    def finish_step(self) -> None:
        pass
