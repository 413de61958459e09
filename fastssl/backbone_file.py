"""The backbone as a run leaves it: backbone.safetensors, and backbone.json to build it again.

    backbone = fastssl.backbone_file.load_backbone("runs/pirl_jigsaw")
    features = backbone(images)  # uint8 [B, 3, H, W] -> [B, backbone.dim]

Neither file holds code. backbone.json names a module by dotted path, which must be installed and is
imported: read its `use` before you load a backbone from someone else. The
weights are read by safetensors, and torchvision's network of the same name takes them too.
"""

import hashlib
import importlib
import json
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

import fastssl
from fastssl.checkpoint import whole_file
from fastssl.config import Recipe, RecipeError

_WEIGHTS, _CARD = "backbone.safetensors", "backbone.json"


def save_backbone(folder: Path, backbone: nn.Module, recipe: Recipe, *, step: int) -> None:
    """Write backbone.safetensors, then backbone.json, whose presence marks a finished run.

    Args:
        folder: the run folder.
        backbone: as its module's `backbone(options)` made it: neither compiled nor wrapped for DDP.
        recipe: the recipe as run.
        step: optimizer steps done.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    evaluation = (recipe.evaluation.use, asdict(recipe.evaluation.options))
    use, options = recipe.backbone.use, asdict(recipe.backbone.options)
    weights, card = files_of(backbone, use, options, evaluation, recipe.values, step=step)
    with whole_file(folder / _WEIGHTS) as file:
        file.write(weights)
    with whole_file(folder / _CARD) as file:
        file.write(card)


def files_of(
    backbone: nn.Module,
    use: str,
    options: dict[str, Any],
    evaluation: tuple[str, dict[str, Any]],
    recipe: dict[str, Any] | None,
    *,
    step: int,
) -> tuple[bytes, bytes]:
    """What backbone.safetensors and backbone.json hold.

    Args:
        backbone: see `save_backbone`.
        use: its module.
        options: its Options.
        evaluation: module and options of the graph that prepares an image.
        recipe: the recipe's values; None where there was none.
        step: optimizer steps done.
    """
    weights = safetensors.torch.save(tensors_of(backbone))
    mean, std = backbone.normalization  # pyright: ignore[reportGeneralTypeIssues]  # by contract
    if "pretrained" in options:  # the weights are these, not those that it began with
        options = {**options, "pretrained": False}
    card = {
        "backbone": {"use": use, "options": options},
        "dim": backbone.dim,
        "normalization": {"mean": mean, "std": std},
        "preprocessing": {
            "use": evaluation[0],
            "options": evaluation[1],
            "interpolation": evaluation[1].get("interpolation", "bilinear"),
            "antialias": True,
        },
        "weights": _WEIGHTS,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "step": step,
        "fastssl": fastssl.__version__,
        "recipe": recipe,
    }
    return weights, json.dumps(card, indent=1, allow_nan=False).encode()


def tensors_of(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as safetensors takes it: on the CPU, contiguous, floats in float32."""
    # Copies: safetensors refuses tensors that share memory or are not contiguous.
    return {
        name: tensor.detach()
        .to(device="cpu", dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype)
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in backbone.state_dict().items()
    }


def load_backbone(path: Path | str) -> nn.Module:
    """The backbone that a run exported, on the CPU, in eval mode.

    Args:
        path: the run folder, or its backbone.json. The weights lie beside it.

    Raises:
        RecipeError: a file is missing or damaged, or the module named there makes another network.
    """
    path = Path(path)
    path = path / _CARD if path.is_dir() else path
    card = read_card(path)
    weights = path.parent / _WEIGHTS
    try:
        data = weights.read_bytes()
    except OSError as error:
        raise RecipeError(f"{weights} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != card["sha256"]:
        raise RecipeError(
            f"{weights} is damaged, cut short or another run's: its SHA-256 is not that in"
            f" {path.name}; copy both files anew"
        )
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise RecipeError(f"{weights} is no safetensors file: {error}") from error
    backbone = build(path, **card["backbone"])
    refuse_others(path, weights, tensors, backbone)
    backbone.load_state_dict(tensors)
    return backbone.eval()


def read_card(path: Path) -> dict[str, Any]:
    """What a backbone.json says.

    Raises:
        RecipeError: it can't be read, or is none.
    """
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}; it is written at the end of a run"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{path} is no JSON: {error}") from error
    backbone = card.get("backbone") if isinstance(card, dict) else None
    if (
        not isinstance(backbone, dict)
        or set(backbone) != {"use", "options"}
        or "sha256" not in card
    ):
        raise RecipeError(
            f"{path} is not one of fastssl: it lacks backbone.use, .options or sha256"
        )
    return card


def build(path: Path, *, use: str, options: dict[str, Any]) -> nn.Module:
    """A backbone with fresh weights by the module `use`, which the card at `path` names.

    Raises:
        RecipeError: there is no such module, or it does not take the options.
    """
    try:
        module = importlib.import_module(use)
    except ModuleNotFoundError as error:
        # Not a module that is there and imports one that is not.
        if error.name is None or not (use + ".").startswith(error.name + "."):
            raise
        raise RecipeError(f"{path}: there is no module {use}: install what holds it") from error
    # JSON has no tuples.
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    # The weights are overwritten; the caller's random numbers should not depend on it.
    with torch.random.fork_rng(devices=[]):
        try:
            return module.backbone(module.Options(**arguments))
        except (TypeError, ValueError, AttributeError) as error:
            raise RecipeError(
                f"{path}: {use} of this version cannot build it with {options}: {error}"
            ) from error


def refuse_others(
    path: Path, weights: Path, tensors: dict[str, torch.Tensor], backbone: nn.Module
) -> None:
    """Refuses weights that are not exactly the backbone's.

    Raises:
        RecipeError: names the first few that differ.
    """
    told = unlike(tensors, backbone)
    if told:
        raise RecipeError(f"{weights} does not fit the backbone of {path.name}; {told}")


def unlike(tensors: dict[str, torch.Tensor], backbone: nn.Module) -> str:
    """How `tensors` differ from the backbone's state dict, in words; empty if they fit exactly."""
    state = backbone.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differences = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": sorted(
            f"{name} {found[name]} for {wanted[name]}"
            for name in wanted.keys() & found.keys()
            if wanted[name] != found[name]
        ),
        # Quantised weights say nothing without their scales.
        "of another type": sorted(
            f"{name} {_type(tensors[name])} for {_type(state[name])}"
            for name in wanted.keys() & found.keys()
            if tensors[name].is_floating_point() != state[name].is_floating_point()
        ),
    }
    return "; ".join(
        f"{what}: {', '.join(names[:5])}{_more(names)}"
        for what, names in differences.items()
        if names
    )


def of_another_width(
    tensors: dict[str, torch.Tensor], backbone: nn.Module, use: str, options: dict[str, Any]
) -> str:
    """Says of which width `tensors` are, if that alone keeps them from fitting; else empty.

    Args:
        tensors: a state dict that does not fit.
        backbone: what it should go into.
        use: its module.
        options: its Options, all of them.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    differing = [
        (shapes[name], tensor.shape)
        for name, tensor in backbone.state_dict().items()
        if name in shapes and len(shapes[name]) == tensor.ndim > 0 and shapes[name] != tensor.shape
    ]
    if not differing or 0 in differing[0][1]:
        return ""
    ratio = Fraction(differing[0][0][0], differing[0][1][0])
    # Tried, not assumed: at what is named the weights do fit.
    for key, here in _widths(options).items():
        there = here * ratio
        if there.denominator == 1 and _shapes(use, {**options, key: int(there)}) == shapes:
            return (
                f"the weights are of {key} {there}, the backbone is of {key} {here}: did you mean "
                f"backbone.{key}={there}?"
            )
    return ""


def _widths(options: dict[str, Any]) -> dict[str, Fraction]:
    """Options that multiply all channels, that which is in use first."""
    widening, width = options.get("widening"), options.get("width")
    found = {"widening": widening} if widening is not None else {"width": width}
    if "widening" in options and widening is None and width is not None:
        found["widening"] = Fraction(width, 16)  # as fastssl/backbones/resnet.py has it
    return {key: Fraction(value) for key, value in found.items() if value is not None}


def _shapes(use: str, options: dict[str, Any]) -> dict[str, torch.Size] | None:
    """Of the state dict of another backbone of the module; None if there is no such one."""
    module = importlib.import_module(use)
    # JSON has no tuples.
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        with torch.device("meta"):
            state = module.backbone(module.Options(**arguments)).state_dict()
    except (TypeError, ValueError, RuntimeError):  # refused, or not to be had without numbers
        return None
    return {name: tensor.shape for name, tensor in state.items()}


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 5} more" if len(names) > 5 else ""
