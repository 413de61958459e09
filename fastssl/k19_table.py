"""Table 1 of Kolesnikov, Zhai & Beyer 2019 (K19): its numbers, and the cell that a recipe is of.

"Revisiting Self-Supervised Visual Representation Learning", arXiv:1901.09005: networks by tasks and
widening factors, trained on ImageNet; accuracy of a linear classifier on the frozen features before
the task's head, by L-BFGS, on their own validation part of ImageNet's training images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any

# (-): without the ReLU before the last pooling.
NETWORKS = ("RevNet50", "RN50 v2", "RN50 v1", "RevNet50(-)", "RN50 v2(-)", "VGG19-BN")
# Task -> its widening factors; network -> accuracies in %, for one after the other.
_WIDENINGS = {
    "Rotation": (4, 8, 12, 16),
    "Exemplar": (4, 8, 12),
    "RelPatchLoc": (4, 8),
    "Jigsaw": (4, 8),
}
_ACCURACIES = {
    "Rotation": {
        "RevNet50": (47.3, 50.4, 53.1, 53.7),
        "RN50 v2": (43.8, 47.5, 47.2, 47.6),
        "RN50 v1": (41.7, 43.4, 43.3, 43.2),
        "RevNet50(-)": (45.2, 51.0, 52.8, 53.7),
        "RN50 v2(-)": (38.6, 44.5, 47.3, 48.2),
        "VGG19-BN": (16.8, 14.6, 16.6, 22.7),
    },
    "Exemplar": {
        "RevNet50": (42.4, 45.6, 46.4),
        "RN50 v2": (43.0, 45.7, 46.6),
        "RN50 v1": (42.8, 46.9, 47.7),
        "RevNet50(-)": (38.0, 42.6, 44.3),
        "RN50 v2(-)": (33.7, 36.7, 38.2),
        "VGG19-BN": (26.4, 28.3, 29.0),
    },
    "RelPatchLoc": {
        "RevNet50": (40.6, 45.0),
        "RN50 v2": (42.2, 46.7),
        "RN50 v1": (46.8, 50.5),
        "RevNet50(-)": (33.8, 43.5),
        "RN50 v2(-)": (38.6, 43.4),
        "VGG19-BN": (28.5, 29.4),
    },
    "Jigsaw": {
        "RevNet50": (40.1, 43.7),
        "RN50 v2": (38.4, 41.3),
        "RN50 v1": (42.2, 45.4),
        "RevNet50(-)": (36.1, 41.5),
        "RN50 v2(-)": (32.5, 34.4),
        "VGG19-BN": (19.8, 21.1),
    },
}
TASKS = tuple(_WIDENINGS)
_BACKBONES = {
    "fastssl.backbones.revnet": "RevNet50",
    "fastssl.backbones.resnet_v2": "RN50 v2",
    "fastssl.backbones.vgg": "VGG19-BN",
}
_UNITS = [3, 4, 6, 3]  # of RevNet50
_OBJECTIVES = {
    "fastssl.objectives.rotation": "Rotation",
    "fastssl.objectives.exemplar": "Exemplar",
    "fastssl.objectives.relative_patch": "RelPatchLoc",
    "fastssl.objectives.jigsaw": "Jigsaw",
}


@dataclass(frozen=True)
class Cell:
    """A place in the table, or in what continues it: further rows and columns."""

    network: str  # of NETWORKS, or what another is called
    task: str  # of TASKS, or what another is called
    widening: float | None  # K19's k; None: the network has none


def cell(values: Mapping[str, Mapping[str, Any]]) -> Cell:
    """Where a recipe belongs, from `values` as config.Recipe has them, whatever its file is called.

    Options that are not the table's (stem, patch_mode: that of a task) do not change the place;
    `representation`, another output than K19's, makes a row of its own.
    """
    backbone, objective = values["backbone"], values["objective"]["use"]
    return Cell(_network(backbone), _task(objective, values["pipeline"]["use"]), widening(backbone))


def widening(backbone: Mapping[str, Any]) -> float | None:
    """K19's k of a section `backbone`; a ResNet's that has none is its width / 16."""
    k = backbone.get("widening")
    if k is None and backbone["use"] == "fastssl.backbones.resnet":
        return backbone["width"] / 16
    return k


def published(of: Cell) -> float | None:
    """K19's accuracy in %; None where the table has no such cell."""
    row = _ACCURACIES.get(of.task, {}).get(of.network, ())
    by_widening: dict[float | None, float] = dict(
        zip(_WIDENINGS.get(of.task, ()), row, strict=False)  # no row: another network
    )
    return by_widening.get(of.widening)


def nearest(task: str, widening: float | None) -> int | None:
    """The task's widening factor in K19's table that is next to this one, by ratio."""
    if task not in _WIDENINGS or not widening:
        return None
    ratios = {abs(log(k / widening)): k for k in _WIDENINGS[task]}
    return ratios[min(ratios)]


def _network(backbone: Mapping[str, Any]) -> str:
    use, name = backbone["use"], backbone.get("name")
    if use == "fastssl.backbones.resnet":
        network = "RN50 v1" if name == "resnet50" else str(name)
    else:
        network = _BACKBONES.get(use) or str(name or use.rpartition(".")[2])
    if list(backbone.get("units", _UNITS)) != _UNITS:
        network = f"RevNet {'-'.join(map(str, backbone['units']))}"
    if backbone.get("last_relu") is False:
        network += "(-)"
    if backbone.get("representation") is not None:
        network += f", representation {backbone['representation']}"
    return network


def _task(objective: str, pipeline: str) -> str:
    if objective in _OBJECTIVES:
        return _OBJECTIVES[objective]
    loss, graph = objective.rpartition(".")[2], pipeline.rpartition(".")[2]
    return loss if loss == graph else f"{loss} ({graph})"
