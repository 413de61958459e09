"""What a finished run folder still holds of its training: the graph, and PIRL's heads."""

import importlib
from typing import Any

import torch
from torch import nn

from fastssl import checkpoint
from fastssl.config import Part, RecipeError
from fastssl.trained import Trained

PIRL = "fastssl.objectives.pirl"


class NoCheckpoint(ValueError):
    """The heads are nowhere; the message says where they would be."""


def recipe(trained: Trained) -> dict[str, Any]:
    """The values of the run's recipe; empty where none is recorded, as of published weights."""
    return (trained.card or {}).get("recipe") or {}


def part(trained: Trained, section: str) -> Part | None:
    """A section of the run's recipe that names a module; None where there is no run or recipe.

    Raises:
        RecipeError: the module is not there, or does not know the options any more.
    """
    if section not in recipe(trained):
        return None
    options = dict(recipe(trained)[section])
    use = options.pop("use")
    try:
        module = importlib.import_module(use)
        # JSON has no tuples
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return Part(use, module, module.Options(**given))
    except (ModuleNotFoundError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{trained.name}: {section}.use {use} of its recipe can't be made again: {error}"
        ) from error


def pirl_with_heads(trained: Trained) -> nn.Module | None:
    """PIRL's objective as the run left it, on the CPU, in eval mode; None for any other run.

    Raises:
        RecipeError: the last checkpoint is damaged, of another step than the backbone, or does not
            fit the recipe.
        NoCheckpoint: there is none, and the heads are kept nowhere else.
    """
    found = part(trained, "objective")
    if found is None or found.use != PIRL or found.options.patch_weight == 0:
        return None
    if trained.folder is None:
        raise NoCheckpoint(
            f"{trained.name} is weights alone, and PIRL's heads are in its run folder"
        )
    path = checkpoint.latest(trained.folder / "checkpoints")
    if path is None:
        raise NoCheckpoint(
            f"{trained.folder / 'checkpoints'} has no checkpoint, where alone PIRL's heads are kept"
        )
    saved = checkpoint.load(path)
    if saved.get("step") != trained.step:
        raise RecipeError(
            f"{path} is of step {saved.get('step')}, the backbone beside it of step "
            f"{trained.step}: heads and backbone must be of one moment; finish the run"
        )
    backbone = part(trained, "backbone")
    assert backbone is not None, "a recipe has a backbone"
    weights: dict[str, Any] = saved["objective"]
    # its random numbers are overwritten, and the caller's should not depend on them
    with torch.random.fork_rng(devices=[]):
        objective: nn.Module = found.module.Objective(
            backbone.module.backbone(backbone.options),
            found.options,
            images=len(weights.get("memory.rows", (0,))),
            classes=0,
            labels=None,
            seed=0,
        )
    try:
        objective.load_state_dict(weights)  # strict: names what differs
    except RuntimeError as error:
        raise RecipeError(f"{path} does not fit the run's recipe: {error}") from error
    return objective.eval()
