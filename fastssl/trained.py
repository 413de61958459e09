"""A backbone with weights, by the one word that names it on a command line: RUN.

runs/rotation              a finished run folder, or its backbone.json
weights.safetensors        with a backbone.json beside it, or backbone.use and backbone.name=...
random:resnet50            fresh weights: of a network of fastssl.backbones.resnet, of another file
                           there (random:revnet), of a library's network (random:timm:vit_tiny_...),
                           of a recipe's (random:recipes/x.yaml), of a run's (random:runs/x)
torchvision:resnet50, timm:convnext_tiny, resnet50
                           a published network with its published weights
"""

import hashlib
import importlib
import json
import math
import pkgutil
from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from fastssl import backbone_file, backbones, config, failures, representation
from fastssl.config import RecipeError
from fastssl.patch_network import Standardization
from fastssl.recipe_check import check, schema_of_part
from fastssl.recipe_text import Entry, did_you_mean, value

RESNET, NAMED = "fastssl.backbones.resnet", "fastssl.backbones.named"
GRAPH = "pipelines.evaluation"  # where nothing says how images were prepared
_CARD = "backbone.json"


@dataclass(frozen=True)
class Trained:
    """A backbone, and what a user or a cache must know of it."""

    name: str  # for tables: the run folder's, "random:resnet10", "timm:convnext_tiny", ...
    backbone: nn.Module  # eval mode, on the CPU as loaded
    folder: Path | None  # the run folder, whose metrics.jsonl gets lines
    card: dict[str, Any] | None  # backbone.json, the recipe in it
    step: int  # optimizer steps done; 0 where unknown
    weights: str  # SHA-256 of the state dict
    use: str  # the backbone's module
    options: dict[str, Any]  # its Options
    preprocessing: tuple[str, dict[str, Any]]  # the evaluation graph: use, options
    standardize: Standardization  # what the run's objective did to patches
    otherwise: str = ""  # what its publisher does to images and `preprocessing` can't; in words


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The section `weights`: what of a lone .safetensors file is not to be loaded."""

    ignore: tuple[str, ...] = ()  # keys that the backbone does not have, such as [fc.weight]


def load(
    run: str,
    *,
    seed: int = 0,
    backbone: dict[str, Any] | None = None,
    ignore: tuple[str, ...] = (),
    data_root: str | None = None,
) -> Trained:
    """The backbone that `run` names: see the head of this file.

    Args:
        run: what was written on the command line.
        seed: of fresh weights.
        backbone: `use` and options of the backbone of a lone .safetensors; options of random:NAME.
        ignore: keys of a .safetensors that are left out; all others must fit, both ways.
        data_root: where images are; without it a recipe's demo section holds.

    Raises:
        RecipeError: nothing of that name, an unfinished run, or weights that are damaged, not
            finite, or not exactly the backbone's (the keys are named).
    """
    given = dict(backbone or {})
    kind, colon, name = run.partition(":")
    path = Path(run).expanduser()
    if colon and kind == "random":
        trained = _random(run, name, seed, given, data_root)
        given = {}
    elif colon and kind in ("torchvision", "timm"):
        trained = _named(run)
    elif path.suffix == ".safetensors":
        trained = _lone(path, given, ignore)
        given, ignore = {}, ()
    elif path.is_dir() or path.name == _CARD:
        trained = _run_folder(path)
    elif path.exists():
        raise RecipeError(f"{run} is no RUN: give {WAYS}")
    else:
        trained = _published(run)
    if given:
        raise RecipeError(
            f"backbone.{next(iter(given))}: {run} says itself which network it is; backbone.* is "
            "for a lone .safetensors and for random:NAME"
        )
    if ignore:
        raise RecipeError(f"weights.ignore: {run} is no .safetensors file: leave it out")
    return trained


def read_backbone(
    run: str, entries: dict[str, Entry], errors: list[str], *, data_root: str | None = None
) -> dict[str, Any]:
    """What backbone.* of a command line says, checked against the Options of the network of `run`.

    Args:
        run: as `load` takes it.
        entries: key by key as they were written.
        errors: mistakes found are added.
        data_root: as `load` takes it.

    Returns:
        What `load` takes for `backbone`.
    """
    kind, colon, name = run.partition(":")
    is_random = bool(colon) and kind == "random"
    if not is_random and Path(run).suffix != ".safetensors":
        return {key: value(entry.node) for key, entry in entries.items()}  # for load to refuse
    if not entries:
        return {}
    use = entries.get("use")
    try:
        if use is None:
            dotted = _origin(run, name, entries, None, data_root).use if is_random else RESNET
            node = yaml.ScalarNode("tag:yaml.org,2002:str", dotted, style="'")
            use = Entry(node, "backbone.use", "command line")
    except ValueError as error:  # of RUN
        errors.append(str(error))
        return {}
    try:
        schema = schema_of_part("backbone", use, *config.PARTS["backbone"])
    except ValueError as error:
        errors.append(f"{use.place}: {error}")
        return {}
    given = {"use": schema.name} if "use" in entries else {}
    return {**given, **check(entries, schema, errors)}


def fresh(module: ModuleType, options: Any) -> nn.Module:
    """A backbone with random weights, on the CPU.

    Args:
        module: a file of fastssl.backbones, or the like.
        options: its Options.

    Raises:
        RecipeError: it is too large for the memory of this machine.
        ValueError: the module refuses the options.
    """
    try:
        return module.backbone(options)
    except (RuntimeError, TypeError, MemoryError) as error:  # torch has no class for the CPU's
        if not failures.is_of_memory(error):
            raise
        usual = {each.name: each.default for each in fields(options)}
        changed = ", ".join(
            f"{key} {each}" for key, each in asdict(options).items() if each != usual[key]
        )
        raise RecipeError(
            f"backbone: the network ({changed or module.__name__}) does not fit the memory of this "
            "machine: make it smaller"
        ) from error


WAYS = (
    "a run folder, its backbone.json, a .safetensors, random:NAME, random:RECIPE.yaml, "
    "torchvision:NAME or timm:NAME"
)


def _run_folder(path: Path) -> Trained:
    folder = path if path.is_dir() else path.parent
    card_path = folder / _CARD
    if not card_path.exists():
        if (folder / "recipe.yaml").exists() or (folder / "checkpoints").is_dir():
            raise RecipeError(
                f"{folder} is a run that is not finished (it has no {_CARD} yet): the command that "
                "started it goes on from its last checkpoint"
            )
        raise RecipeError(f"{folder} is no run folder: it has no {_CARD}; give {WAYS}")
    backbone = backbone_file.load_backbone(card_path)
    return _of_card(folder.resolve().name, backbone, folder, card_path)


def _of_card(name: str, backbone: nn.Module, folder: Path | None, card_path: Path) -> Trained:
    card = backbone_file.read_card(card_path)
    _check_finite(backbone.state_dict(), str(card_path.parent))
    preprocessing = card.get("preprocessing", {})
    return Trained(
        name=name,
        backbone=backbone,
        folder=folder,
        card=card,
        step=card.get("step", 0),
        weights=fingerprint(backbone),
        use=card["backbone"]["use"],
        options=card["backbone"]["options"],
        preprocessing=(preprocessing.get("use", GRAPH), preprocessing.get("options", {})),
        standardize=representation.standardization(card.get("recipe")),
    )


def _without_card(
    name: str,
    backbone: nn.Module,
    use: str,
    options: dict[str, Any],
    preprocessing: tuple[str, dict[str, Any]] = (GRAPH, {}),
    standardize: Standardization = "global",
    otherwise: str = "",
) -> Trained:
    """A network of which no run tells: there is no folder to log to."""
    return Trained(
        name=name,
        backbone=backbone.eval(),
        folder=None,
        card=None,
        step=0,
        weights=fingerprint(backbone),
        use=use,
        options=options,
        preprocessing=preprocessing,
        standardize=standardize,
        otherwise=otherwise,
    )


def _lone(path: Path, given: dict[str, Any], ignore: tuple[str, ...]) -> Trained:
    """A .safetensors file, strictly: its keys are the backbone's, less those to ignore."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise RecipeError(
            f"{path} is cut short, damaged or no safetensors file: {error}"
        ) from error
    for key in ignore:
        if key not in tensors:
            raise RecipeError(
                f"weights.ignore: {path} has no {key!r}{did_you_mean(key, list(tensors))}"
            )
    tensors = {key: tensor for key, tensor in tensors.items() if key not in ignore}
    card_path = path.with_name(_CARD)
    if given:
        use = given.pop("use", RESNET)
        backbone, options = _build(use, given)
        described = f"{use}" + (f" ({given['name']})" if "name" in given else "")
        card = None
    elif card_path.exists():
        card = backbone_file.read_card(card_path)
        use, options = card["backbone"]["use"], card["backbone"]["options"]
        backbone = backbone_file.build(card_path, **card["backbone"])
        described = str(card_path)
        if not ignore and card.get("weights") == path.name:
            backbone = backbone_file.load_backbone(card_path)  # by its checksum, too
    else:
        raise RecipeError(
            f"{path}: no {_CARD} lies beside it: say which network it is of, as "
            "backbone.name=resnet50 (backbone.use=fastssl.backbones.resnet)"
        )
    _fit(path, tensors, backbone, described, use, options)
    _check_finite(tensors, str(path))
    backbone.load_state_dict(tensors)
    # Every run folder's file is called so.
    name = path.resolve().parent.name if path.name == "backbone.safetensors" else path.stem
    if card is not None:
        return _of_card(name, backbone.eval(), None, card_path)
    return _without_card(name, backbone, use, options)


def _random(
    run: str, name: str, seed: int, given: dict[str, Any], data_root: str | None
) -> Trained:
    """Fresh weights; `run` is its name in tables."""
    origin = _origin(run, name, given, given.pop("use", None), data_root)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, options = _build(origin.use, {**origin.options, **given})
    return _without_card(
        origin.name, backbone, origin.use, options, origin.preprocessing, origin.standardize
    )


class _Origin(NamedTuple):
    """What random:NAME names."""

    name: str  # in tables
    use: str
    options: dict[str, Any]
    preprocessing: tuple[str, dict[str, Any]] = (GRAPH, {})
    standardize: Standardization = "global"


def _origin(
    run: str, name: str, keys: Collection[str], use: str | None, data_root: str | None
) -> _Origin:
    """The network that `name` of random:NAME stands for.

    Args:
        run: all of it, for messages.
        name: behind the colon.
        keys: that backbone.* gives.
        use: what backbone.use gives.
        data_root: without it a recipe's demo section holds.
    """
    path = Path(name).expanduser()
    if not name:
        raise RecipeError(f"{run} names no network: write for example random:resnet50")
    if path.suffix in (".yaml", ".yml"):
        root = () if data_root is None else (f"data.root={json.dumps(data_root)}",)
        recipe = config.load(path, root)
        found = _Origin(
            f"random:{recipe.name}",
            recipe.backbone.use,
            asdict(recipe.backbone.options),
            (recipe.evaluation.use, asdict(recipe.evaluation.options)),
            representation.standardization(recipe.values),
        )
    elif path.is_dir() or path.name == _CARD:
        folder = path if path.is_dir() else path.parent
        card = backbone_file.read_card(folder / _CARD)
        described = card.get("preprocessing", {})
        found = _Origin(
            f"random:{folder.resolve().name}",
            card["backbone"]["use"],
            card["backbone"]["options"],
            (described.get("use", GRAPH), described.get("options", {})),
            representation.standardization(card.get("recipe")),
        )
    elif "/" in name:
        raise RecipeError(f"{run}: there is no {path}")
    else:
        return _Origin(run, *_by_name(run, name, keys, use))
    if use is not None:
        raise RecipeError(f"backbone.use: {run} says itself which network it is: leave it out")
    return found


def _by_name(
    run: str, name: str, keys: Collection[str], use: str | None
) -> tuple[str, dict[str, Any]]:
    """The module and first option of a network's or a file's name."""
    if use is not None:
        file = use.rpartition(".")[2]
        if name == file:
            return use, {}
        if "name" in {each.name for each in fields(_import(use).Options)}:
            return use, {"name": name}
        raise RecipeError(f"{run}: {use} holds one network only: write random:{file}")
    if name.partition(":")[0] in ("torchvision", "timm"):
        return NAMED, {"name": name}
    files = [each.name for each in pkgutil.iter_modules(backbones.__path__)]
    if name in files:
        module = importlib.import_module(f"{backbones.__name__}.{name}")
        required = [each.name for each in fields(module.Options) if each.default is MISSING]
        if not set(required) <= set(keys):
            raise RecipeError(f"{run}: that file holds many networks: give one, as random:resnet50")
        return module.__name__, {}
    near = did_you_mean(name, [*files, *_import(RESNET).NAMES], "random:")
    if name not in _import(RESNET).NAMES and near:
        raise RecipeError(f"{run} names no network{near}")
    return RESNET, {"name": name}


def _published(run: str) -> Trained:
    """A bare name: torchvision's network, else timm's."""
    from torchvision.models import list_models  # noqa: PLC0415  # slow, and seldom asked

    known = list_models()
    if run in known:
        return _named(f"torchvision:{run}")
    try:
        import timm  # noqa: PLC0415  # an extra
    except ImportError:
        beside = "; timm, which has more, is not installed: pip install 'fastssl[timm]'"
    else:
        if timm.is_model(run):
            return _named(f"timm:{run}")
        known, beside = [*known, *timm.list_models()], ""
    meant = "" if "/" in run else did_you_mean(run, known)
    raise RecipeError(
        f"{run}: no such file, and no network of that name{meant}; give {WAYS}{beside}"
    )


def _named(run: str) -> Trained:
    """A network of torchvision or timm with its published weights."""
    backbone, options = _build(NAMED, {"name": run, "pretrained": True})
    _check_finite(backbone.state_dict(), run)
    as_published = published(run)
    preprocessing = (GRAPH, as_published.options)
    return _without_card(
        run, backbone, NAMED, options, preprocessing, otherwise=as_published.otherwise
    )


class Published(NamedTuple):
    """How a publisher prepares images."""

    options: dict[str, int | str]  # of pipelines.evaluation; empty where nothing is published
    otherwise: str = ""  # what that graph does not do, and what it does instead


def published(run: str) -> Published:
    """How the publisher of `run`, torchvision:NAME or timm:NAME, prepares images."""
    package, _, name = run.partition(":")
    if package == "torchvision":
        from torchvision.models import get_model_weights  # noqa: PLC0415  # slow, seldom asked

        name, _, weights = name.partition(".")
        every = get_model_weights(name)
        if not list(every):
            return Published({})
        transforms = every[weights or "DEFAULT"].transforms()
        (resize,), (crop,) = transforms.resize_size, transforms.crop_size
        return _as_options(resize, (crop, crop), transforms.interpolation.value)
    import timm  # noqa: PLC0415  # an extra; the backbone was made by it

    found = timm.get_pretrained_cfg(name)
    if found is None:
        return Published({})
    _, height, width = found.test_input_size or found.input_size
    part = found.test_crop_pct or found.crop_pct
    resize = math.floor(height / part)  # as timm.data.transforms_factory has it
    return _as_options(resize, (height, width), found.interpolation, found.crop_mode)


def _as_options(
    resize: int, crop: tuple[int, int], interpolation: str, mode: str = "center"
) -> Published:
    """What is published as options of pipelines.evaluation, and what has no place in them.

    Args:
        resize: of the short side, pixels.
        crop: height and width, pixels.
        interpolation: torchvision's or timm's name for it.
        mode: timm's crop_mode.
    """
    side, otherwise = crop[0], []
    if mode != "center" or crop[1] != side:
        shape = f"{side} x {crop[1]} (crop_mode {mode})"
        ours = f"here the short side is resized and the middle {side} x {side} cut out"
        otherwise.append(f"it makes images {shape}, {ours}")
    if interpolation not in ("bilinear", "bicubic"):
        otherwise.append(f"it resizes by {interpolation}, here bilinear")
        interpolation = "bilinear"
    if resize < side:
        otherwise.append(f"it resizes to {resize} and pads to {side}, here resized to {side}")
        resize = side
    options: dict[str, int | str] = {"resize": resize, "crop": side, "interpolation": interpolation}
    return Published(options, "; ".join(otherwise))


def _build(use: str, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone by module and options, and all its options."""
    module = _import(use)
    known = {field.name for field in fields(module.Options)}
    for key in options:
        if key not in known:
            raise RecipeError(
                f"backbone.{key}: {use} has no such option{did_you_mean(key, known, 'backbone.')}"
            )
    # JSON has no tuples.
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        made = module.Options(**arguments)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{use}: {error}") from error
    return fresh(module, made), asdict(made)


def _import(use: str) -> ModuleType:
    try:
        return importlib.import_module(use)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{use}.".startswith(f"{error.name}."):
            raise
        raise RecipeError(f"backbone.use: there is no module {use}") from error


def _fit(
    path: Path,
    tensors: dict[str, Tensor],
    backbone: nn.Module,
    described: str,
    use: str,
    options: dict[str, Any],
) -> None:
    """Refuse weights that are not exactly the backbone's, naming the keys or both widths."""
    try:
        backbone_file.refuse_others(Path(described), path, tensors, backbone)
    except RecipeError as error:
        width = backbone_file.of_another_width(tensors, backbone, use, options)
        if width:
            raise RecipeError(f"{path} does not fit {described}: {width}") from error
        spare = sorted(tensors.keys() - backbone.state_dict().keys())
        missing = backbone.state_dict().keys() - tensors.keys()
        if not spare or missing:
            raise
        keys = ",".join(spare[:6]) + (",..." if len(spare) > 6 else "")
        raise RecipeError(f"{error}. To load without them: weights.ignore=[{keys}]") from error


def _check_finite(tensors: dict[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RecipeError(f"{where}: {key} holds NaN or infinity: these weights are of no use")


def fingerprint(backbone: nn.Module) -> str:
    """SHA-256 of the state dict: names, types, shapes and bytes."""
    state = hashlib.sha256()
    for key, tensor in backbone.state_dict().items():
        state.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
