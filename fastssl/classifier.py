"""The classifier of a run with labels: its backbone, its head and the names of the classes.

    classifier = fastssl.classifier.load("runs/finetune")
    scores = classifier(images)  # uint8 [B, 3, H, W] -> [B, classes]
    names = [classifier.classes[each] for each in scores.argmax(1)]

Beside backbone.safetensors such a run leaves head.safetensors, with the classes in its metadata;
an export --to safetensors has both too.
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

HEAD = "head.safetensors"


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
    with whole_file(folder / HEAD) as file:
        file.write(safetensors.torch.save(tensors, {"classes": json.dumps(list(classes))}))


def load(run: Path | str) -> Classifier:
    """The classifier of a finished run, on the CPU, in eval mode.

    Args:
        run: its folder, or an export of it --to safetensors.

    Raises:
        RecipeError: the run has no head, is not finished, or a file is damaged; its card has no
            recipe, or one that can't be made again.
    """
    folder = Path(run)
    backbone = backbone_file.load_backbone(folder)
    card = backbone_file.read_card(folder / "backbone.json")
    recipe = card.get("recipe")
    if not recipe:
        raise RecipeError(
            f"{folder} is no run that learnt classes: backbone.json has no recipe; "
            f"fastssl/finetune.py train.weights={folder} adds a head"
        )
    written = dict(recipe["objective"])
    use = written.pop("use")
    try:
        module = importlib.import_module(use)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{use}.".startswith(f"{error.name}."):
            raise
        raise RecipeError(f"{folder}: there is no module {use}: install what holds it") from error
    if "scores" not in vars(module.Objective):
        raise RecipeError(
            f"{folder} has no {HEAD}: {use} learns no classes; fastssl/finetune.py adds a head"
        )
    path = folder / HEAD
    if not path.exists():
        raise RecipeError(
            f"{folder} has no {HEAD}, and {use} leaves one: copy it from the run folder, beside "
            "backbone.safetensors"
        )
    tensors, classes = _read(path)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in written.items()}
    try:
        # its random numbers are overwritten, and the caller's should not depend on them
        with torch.random.fork_rng(devices=[]):
            objective = module.Objective(
                backbone,
                module.Options(**options),
                images=0,
                classes=0,
                labels=torch.arange(len(classes)),
                seed=0,
            )
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{folder}: objective.use {use} of its recipe can't be made again: {error}"
        ) from error
    try:
        objective.head.load_state_dict(tensors)
    except RuntimeError as error:
        raise RecipeError(f"{path} is not the head of {folder}: {error}") from error
    return Classifier(objective, classes).eval()


def classes_of(folder: Path) -> tuple[str, ...]:
    """The names of the classes of the head in `folder`, by number; none without a head.

    Raises:
        RecipeError: it is damaged.
    """
    return _read(folder / HEAD)[1] if (folder / HEAD).exists() else ()


def _read(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
            return tensors, tuple(json.loads((file.metadata() or {})["classes"]))
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise RecipeError(f"{path} is cut short or damaged ({error}): copy it anew") from error
