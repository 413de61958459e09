"""Weights to begin with: those of a RUN (fastssl/trained.py), into a backbone of the same shape."""

from torch import nn

from fastssl import backbone_file, trained
from fastssl.config import RecipeError


def load_into(backbone: nn.Module, run: str) -> str:
    """Overwrites all parameters and buffers of `backbone`, or none.

    Args:
        backbone: as the recipe built it.
        run: whose backbone.

    Returns:
        The SHA-256 of the weights.

    Raises:
        RecipeError: there is no such run, or its weights are not exactly the backbone's: names
            those that are missing, unexpected or of another shape.
    """
    source = trained.load(run)
    tensors = source.backbone.state_dict()
    told = backbone_file.unlike(tensors, backbone)
    if told:
        options = ", ".join(f"{key}: {value}" for key, value in source.options.items())
        raise RecipeError(
            f"train.weights ({run}) are not those of this recipe's backbone; {told}. "
            f"They are of {source.use} ({options}): give the backbone section the same, or start "
            "with fastssl/finetune.py, which takes it over"
        )
    backbone.load_state_dict(tensors)
    return source.weights
