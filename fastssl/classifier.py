"""The classifier of a run with labels: its backbone, its head and the names of the classes.

    classifier = fastssl.classifier.load("runs/finetune")
    scores = classifier(images)  # uint8 [B, 3, H, W] -> [B, classes]
    names = [classifier.classes[each] for each in scores.argmax(1)]

Beside backbone.safetensors such a run leaves head.safetensors, with the classes in its metadata.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastssl import backbone_file
from fastssl.checkpoint import whole_file
from fastssl.config import RecipeError

_HEAD = "head.safetensors"


class Classifier(nn.Module):
    """Images to scores, as the run's objective does it."""

    def __init__(self, objective: Any, classes: Sequence[str]) -> None:
        """Takes a run's `objective`, with its weights, and its `classes` by number."""
        super().__init__()
        self.objective = objective
        self.classes = tuple(classes)

    def forward(self, image: Tensor) -> Tensor:
        """Scores [B, classes] of `image` [B, 3, H, W]: bytes, or floats normalised already."""
        return self.objective.scores(image)


def save_head(folder: Path, head: nn.Module, classes: Sequence[str]) -> None:
    """Writes head.safetensors.

    Args:
        folder: the run folder.
        head: features [B, D] to scores [B, classes].
        classes: their names, by number.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in head.state_dict().items()
    }
    with whole_file(folder / _HEAD) as file:
        file.write(safetensors.torch.save(tensors, {"classes": json.dumps(list(classes))}))


def load(run: Path | str) -> Classifier:
    """The classifier of a finished run, on the CPU, in eval mode.

    Args:
        run: its folder.

    Raises:
        RecipeError: the run has no head, is not finished, or a file is damaged.
    """
    folder = Path(run)
    backbone = backbone_file.load_backbone(folder)
    card = json.loads((folder / "backbone.json").read_text(encoding="utf-8"))
    path = folder / _HEAD
    if not path.exists():
        use = card["recipe"]["objective"]["use"]
        raise RecipeError(
            f"{folder} has no {_HEAD}: {use} learns no classes; fastssl/finetune.py adds a head"
        )
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
            classes = json.loads((file.metadata() or {})["classes"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise RecipeError(f"{path} is cut short or damaged ({error}): copy it anew") from error
    written = dict(card["recipe"]["objective"])
    module = importlib.import_module(written.pop("use"))
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in written.items()}
    objective = module.Objective(
        backbone,
        module.Options(**options),
        images=0,
        classes=0,
        labels=torch.arange(len(classes)),
        seed=0,
    )
    try:
        objective.head.load_state_dict(tensors)
    except RuntimeError as error:
        raise RecipeError(f"{path} is not the head of {folder}: {error}") from error
    return Classifier(objective, classes).eval()
