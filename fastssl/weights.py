"""Weights to begin with: those of a RUN (fastssl/trained.py), into a backbone of the same shape."""

from pathlib import Path
from typing import Any

from torch import nn

from fastssl import backbone_file, trained
from fastssl.config import RecipeError
from fastssl.trained import Trained


def names_no_network(run: str) -> bool:
    """Whether `run` is a .safetensors without a card: the recipe says which network it is of."""
    path = Path(run).expanduser()
    return path.suffix == ".safetensors" and not path.with_name("backbone.json").exists()


def source(run: str, section: dict[str, Any]) -> Trained:
    """The backbone that train.weights names.

    Args:
        run: what was written for it.
        section: the recipe's `backbone`, plain values: the network of a file that names none.

    Raises:
        RecipeError: see `trained.load`.
    """
    try:
        return trained.load(run, backbone=section if names_no_network(run) else None)
    except RecipeError as error:
        if "/" not in run or Path(run).expanduser().exists():
            raise
        raise RecipeError(
            f"train.weights: {error}. If it was moved: train.weights=PATH gives its new place, and "
            "a run that was begun from it goes on"
        ) from error


def load_into(backbone: nn.Module, run: str, section: dict[str, Any]) -> str:
    """Overwrites all parameters and buffers of `backbone`, or none.

    Args:
        backbone: as the recipe built it.
        run: whose backbone.
        section: the recipe's `backbone`, plain values.

    Returns:
        The SHA-256 of the weights.

    Raises:
        RecipeError: there is no such run, or its weights are not exactly the backbone's: names
            those that are missing, unexpected or of another shape, or both widths.
    """
    found = source(run, section)
    tensors = found.backbone.state_dict()
    told = backbone_file.unlike(tensors, backbone)
    if told:
        here = {key: value for key, value in section.items() if key != "use"}
        width = backbone_file.of_another_width(tensors, backbone, section["use"], here)
        if width:
            raise RecipeError(f"train.weights ({run}) do not fit this recipe's backbone: {width}")
        options = ", ".join(f"{key}: {value}" for key, value in found.options.items())
        raise RecipeError(
            f"train.weights ({run}) are not those of this recipe's backbone; {told}. "
            f"They are of {found.use} ({options}): give the backbone section the same, or start "
            "with fastssl/finetune.py, which takes it over"
        )
    backbone.load_state_dict(tensors)
    return found.weights
