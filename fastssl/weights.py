"""Weights to begin with: those of a RUN (fastssl/trained.py), into a backbone of the same shape."""

from torch import nn

from fastssl import trained
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
            those that are missing, spare or of another shape.
    """
    source = trained.load(run)
    tensors = source.backbone.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    unlike = {
        "it lacks": [name for name in wanted if name not in found],
        "it has besides": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {list(found[name])} for {list(wanted[name])}"
            for name in wanted
            if name in found and wanted[name] != found[name]
        ],
    }
    told = [
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if names[5:] else "")
        for what, names in unlike.items()
        if names
    ]
    if told:
        options = ", ".join(f"{key}: {value}" for key, value in source.options.items())
        raise RecipeError(
            f"train.weights ({run}) are not those of this recipe's backbone; {'; '.join(told)}. "
            f"They are of {source.use} ({options}): give the backbone section the same, or start "
            "with fastssl/finetune.py, which takes it over"
        )
    backbone.load_state_dict(tensors)
    return source.weights
