"""Any network of torchvision or timm by its name there, with fresh weights or those they publish.

Weights travel both ways: state_dict() has the library's own keys, less the classifier's.
"""

import contextlib
import difflib
import importlib
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.models import (
    GoogLeNet,
    Inception3,
    MNASNet,
    SwinTransformer,
    VisionTransformer,
    get_model,
    get_model_weights,
    list_models,
)
from torchvision.ops import Permute

from fastssl import network_keys, trial_pass
from fastssl.pixels import Pixels
from fastssl.recompute import checkpointed

LIBRARIES = ("torchvision", "timm")
TORCHVISION = tuple(list_models(torchvision.models))
# torchvision's other networks take images of any size that is not too small.
SIZE_ARGUMENTS = {"vit": "image_size", "maxvit": "input_size"}
# Their children are depths worth probing, and not they themselves.
_BODIES = ("features", "layers", "trunk_output", "blocks", "encoder.layers")
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load's
MIN_BLOCKS = 4  # with fewer, what is kept is about what a block needs
_Result = TypeVar("_Result")
_POOLING = (nn.AdaptiveAvgPool2d, nn.Dropout, nn.Flatten)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which network.

    Attributes:
        name: LIBRARY:NAME, as torchvision:convnext_tiny or timm:vit_tiny_patch16_224. A point and
            one of its sets of weights may follow: timm:resnet50.a1_in1k, and
            torchvision:resnet50.IMAGENET1K_V1.
        pretrained: begin with published weights (fetched once, then kept in the library's own
            cache): those named, else the library's default.
        image_size: pixels a side, for networks that take no other (vision transformers); null:
            what theirs were trained on.
        activation_checkpointing: in training, keep of each block its input only, and compute it
            again in the backward pass (Chen et al. 2016, arXiv:1604.06174): less memory, a third
            more work, the same gradients.
    """

    name: str = "torchvision:resnet50"
    pretrained: bool = False
    image_size: int | None = None
    activation_checkpointing: bool = False

    def __post_init__(self):
        library, _, name = self.name.partition(":")
        if library not in LIBRARIES or not name:
            raise ValueError(
                f"name ({self.name!r}) must be torchvision:NAME or timm:NAME, for example "
                "torchvision:resnet50"
            )
        known = _names(library)
        architecture, _, weights = name.partition(".")
        if architecture not in known:
            raise ValueError(
                f"name ({self.name!r}) is no network of {library}{_near(self.name, known)}"
            )
        sets = _weights_of(library, architecture)
        if weights and weights not in sets:
            raise ValueError(
                f"name ({self.name!r}): {library} publishes no weights {weights!r} for "
                f"{architecture}; known: {', '.join(sets) or 'none'}"
            )
        if self.pretrained and not sets:
            raise ValueError(f"pretrained (true): {library} publishes no weights for {name}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size ({self.image_size}) must be at least 1, or null")


def backbone(options: Options) -> "Backbone":
    """The network without its classifier.

    Raises:
        ValueError: it does not take this image_size, its published weights cannot be fetched, or it
            has no blocks to compute again.
    """
    return Backbone(options)


class Backbone(nn.Module):
    """Images to features [B, dim]: what the network's last linear layer would have classified."""

    def __init__(self, options: Options):
        super().__init__()
        library, _, name = options.name.partition(":")
        make = _from_torchvision if library == "torchvision" else _from_timm
        made = make(name, options.pretrained, options.image_size)
        self.library, self._name = library, name
        self.network, self.dim, self.normalization, usual, is_fixed = made
        self.image_size = usual if is_fixed else None  # pixels a side; None: of any size
        self._usual = usual
        self._enough = 0 if is_fixed else usual  # pixels a side that are known not to be too few
        remedy = "or another network: fastssl.backbones.resnet with backbone.stem=small takes 5"
        # The least size is searched for when a smaller image fails: it takes several passes.
        self.pixels = Pixels(*self.normalization, remedy=remedy)
        if options.image_size is not None and _fails(self.network, usual):
            raise ValueError(
                f"image_size ({usual}): {name} does not take images of that size: give another "
                "(many networks take multiples of 32 only), or null for the one it was made for"
            )
        if options.activation_checkpointing:
            takes_any = not is_fixed and trial_pass.takes(self.network, trial_pass.ANY)
            _checkpoint_blocks(self.network, name, trial_pass.ANY if takes_any else usual)
        network_keys.as_of_network(self)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, dim] of `x` [B, 3, H, W]: uint8 in 0 ... 255, or normalised floats.

        Raises:
            ValueError: the network takes images of other sizes only, or larger ones.
        """
        return self._computed(self.network, x)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The output of every depth for `x` as forward takes it, first to last.

        Maps [B, C, H, W], those of vision transformers without their class token, named as the
        library's modules (a convolution stands for the norm, activation and pooling behind it
        too); pool: [B, dim], what forward returns.
        """
        stages = _timm_stages if self.library == "timm" else _torchvision_stages
        return self._computed(lambda x: stages(self.network, x), x)

    def _computed(self, compute: Callable[[Tensor], _Result], x: Tensor) -> _Result:
        """What `compute` makes of the normalised images.

        The first pass of a size smaller than all before is watched: too small is what the network
        fails on, and a stride with less than two pixels to make one of.
        """
        x = self._normalised(x)
        if torch.compiler.is_compiling():
            return compute(x)
        side, starved = min(x.shape[2:]), []
        try:
            if side >= self._enough:
                return compute(x)
            with trial_pass.starved_strides(self.network) as starved:
                result = compute(x)
        except trial_pass.FAILURES:
            self._refuse_if_of_no_size(x)
            raise  # for another reason
        if starved:
            self._refuse_if_of_no_size(x)
        self._enough = side
        return result

    def _refuse_if_of_no_size(self, x: Tensor) -> None:
        # On paper, where memory that does not suffice, or a broken device, is no reason to fail.
        paper, usual = trial_pass.on_paper(self.network), self._usual
        height, width = x.shape[2:]
        if trial_pass.takes(paper, height, width) or not trial_pass.takes(paper, usual):
            return
        side = min(height, width)
        least = trial_pass.least_side(self.network, usual) if side < usual else None
        if least is not None and side < least:
            self.pixels.least = least
            self.pixels(x)
        sides = sorted({*trial_pass.sides_near(self.network, side), usual})
        raise ValueError(
            f"{self._name} does not take images of {height} x {width} pixels; it takes for "
            f"example {', '.join(map(str, sides))} pixels a side"
        )

    def _normalised(self, x: Tensor) -> Tensor:
        size = self.image_size
        if size is not None and x.shape[2:] != (size, size):
            raise ValueError(
                f"images of {x.shape[2]} x {x.shape[3]} pixels for a network that takes {size} x "
                f"{size} only: give it those, or backbone.image_size, or another network "
                "(convolutional ones take any size)"
            )
        return self.pixels(x)


def _fails(network: nn.Module, side: int) -> bool:
    """Whether on paper, which is cheap, and then in earnest too."""
    return trial_pass.fails(trial_pass.on_paper(network), side) and trial_pass.fails(network, side)


class Recomputed(nn.Module):
    """A block of which only the input is kept for the backward pass; state_dict() is the block's.

    In training only: elsewhere the block is called as it is.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.network = block
        network_keys.as_of_network(self)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Any:
        """What the block makes of `x`, and of what else its network calls it with."""
        if self.training and torch.is_grad_enabled():
            return checkpointed(self.network, x, *others, **named)
        return self.network(x, *others, **named)


def _checkpoint_blocks(network: nn.Module, name: str, side: int) -> None:
    blocks = trial_pass.blocks(network, side)
    if len(blocks) < MIN_BLOCKS:
        raise ValueError(
            f"activation_checkpointing (true): {name} has {len(blocks)} blocks that could be "
            f"computed again one by one (called once, with a tensor first; at least {MIN_BLOCKS} "
            "are worth it): give false, or another network"
        )
    for path in blocks:
        network.set_submodule(path, Recomputed(network.get_submodule(path)))


# Names.


def _timm() -> ModuleType:
    try:
        # not at the top: seconds, and an extra
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ValueError("name (timm:...) needs timm: pip install 'fastssl[timm]'") from None


def _names(library: str) -> tuple[str, ...]:
    return TORCHVISION if library == "torchvision" else tuple(_timm().list_models())


def _weights_of(library: str, architecture: str) -> list[str]:
    """What its sets of published weights are called."""
    if library == "torchvision":
        return [each.name for each in get_model_weights(architecture)]
    listed = _timm().list_models(f"{architecture}.*", pretrained=True)
    return [each.partition(".")[2] for each in listed]


def _near(full: str, known: tuple[str, ...]) -> str:
    library, _, name = full.partition(":")
    near = [f"{library}:{each}" for each in difflib.get_close_matches(name, known)]
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; it has {len(known)}, among them {', '.join(known[:: len(known) // 8])}"


# torchvision: the last linear layer goes, and its inputs are the features.

# The network, the length of its features, its normalization, the pixels a side that it was made
# for, and whether it takes no others.
_Made = tuple[nn.Module, int, tuple[Any, Any], int, bool]


def _from_torchvision(name: str, pretrained: bool, image_size: int | None) -> _Made:
    architecture, _, tag = name.partition(".")
    weights = get_model_weights(architecture)
    chosen = weights[tag] if tag else weights["DEFAULT"]
    arguments: dict[str, Any] = {}
    size_argument = SIZE_ARGUMENTS.get(architecture.partition("_")[0])
    preset = chosen.transforms()
    size = image_size or preset.crop_size[0]
    if size_argument is not None:
        arguments[size_argument] = (size, size) if size_argument == "input_size" else size
    elif image_size is not None:
        raise ValueError(f"image_size ({image_size}): {name} has no option for it: give null")
    if architecture in ("googlenet", "inception_v3"):
        # With weights torchvision sets both; without, a warning and other features would follow.
        arguments["transform_input"] = True
        if not pretrained:
            arguments |= {"init_weights": True, "aux_logits": False}
    try:
        with _weights_only():
            network = get_model(architecture, weights=chosen if pretrained else None, **arguments)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        if not pretrained:
            raise
        raise ValueError(_not_weights(name, error, *_torch_remedy(chosen.url))) from None
    except OSError as error:
        raise ValueError(_not_fetched(name, error, *_torch_remedy(chosen.url))) from None
    except (ValueError, AssertionError) as error:
        raise ValueError(f"image_size ({image_size}): {name}: {error}") from None
    if isinstance(network, GoogLeNet):  # that published ones bring along, for training with
        network.aux_logits, network.aux1, network.aux2 = False, None, None
    if isinstance(network, Inception3):
        network.aux_logits, network.AuxLogits = False, None
    if isinstance(network, MNASNet):
        # It takes no weights without PyTorch's metadata, for which safetensors has no place.
        parts = [("layers", network.layers), ("avgpool", nn.AdaptiveAvgPool2d(1))]
        parts += [("flatten", nn.Flatten()), ("classifier", network.classifier)]
        network = nn.Sequential(OrderedDict(parts))
    dim = cut_classifier(network)[1]
    normalization = (tuple(preset.mean), tuple(preset.std))
    return network, dim, normalization, size, size_argument is not None


def cut_classifier(network: nn.Module) -> tuple[str, int]:
    """Puts the identity in the last linear layer's place; where that was, and what it took.

    Squeezenet has a convolution there.

    Args:
        network: as torchvision builds it.
    """
    layers = [*network.named_modules()]
    linear = [each for each in layers if isinstance(each[1], nn.Linear)]
    path, last = linear[-1] if linear else [e for e in layers if isinstance(e[1], nn.Conv2d)][-1]
    network.set_submodule(path, nn.Identity())
    assert isinstance(last, nn.Linear | nn.Conv2d)
    return path, last.in_features if isinstance(last, nn.Linear) else last.in_channels


def _torchvision_stages(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    # Hooks for this pass only: forward alone stays free of them, for compilers and exports.
    stages: dict[str, Tensor] = {}
    handles = []
    for name, last in _depths(network).items():

        def keep(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
            stages[name] = _as_map(network, module, output)

        handles.append(last.register_forward_hook(keep))
    try:
        features = network(x)
    finally:
        for handle in handles:
            handle.remove()
    return {**stages, "pool": features}


def _depths(network: nn.Module) -> dict[str, nn.Module]:
    """The name of the module that a depth begins with, and the module whose output it is.

    A depth is a block, or a convolution with what stands behind it, up to the next.
    """
    depths: dict[str, nn.Module] = {}
    name = ""
    for path, module in _steps(network, ""):
        if isinstance(module, _POOLING) or path.startswith(("classifier", "fc", "head")):
            continue
        if not depths or isinstance(module, nn.Conv2d) or any(module.children()):
            name = path
        depths[name] = module
    return depths


def _steps(network: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """Children in order, those of a body in its place."""
    steps: list[tuple[str, nn.Module]] = []
    for name, child in network.named_children():
        path = prefix + name
        if path in _BODIES or (isinstance(network, VisionTransformer) and path == "encoder"):
            steps.extend(_steps(child, f"{path}."))
        else:
            steps.append((path, child))
    return steps


def _as_map(network: nn.Module, module: nn.Module, output: Tensor) -> Tensor:
    """[B, C, H, W], whatever order the network works in."""
    if isinstance(network, SwinTransformer) and not isinstance(module, Permute):
        return output.permute(0, 3, 1, 2)
    if isinstance(network, VisionTransformer) and output.ndim == 3:  # the class token comes first
        side = network.image_size // network.patch_size
        return output[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    return output


# timm: offers all of it.


def _from_timm(name: str, pretrained: bool, image_size: int | None) -> _Made:
    timm = _timm()
    given: dict[str, int] = {} if image_size is None else {"img_size": image_size}
    try:
        with _weights_only():
            network = timm.create_model(name, pretrained=pretrained, num_classes=0, **given)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        if not pretrained:
            raise
        raise ValueError(_not_weights(name, error, *_hub_remedy())) from None
    except OSError as error:
        raise ValueError(_not_fetched(name, error, *_hub_remedy())) from None
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise ValueError(
            f"image_size ({image_size}): {name} has no option for it: give null"
        ) from None
    except AssertionError as error:
        reason = str(error) or "it is not made of images of that size"
        raise ValueError(f"image_size ({image_size}): {name}: {reason}") from None
    card = network.pretrained_cfg
    normalization = (tuple(card["mean"]), tuple(card["std"]))
    size, is_fixed = image_size or card["input_size"][1], card.get("fixed_input_size", False)
    return network, network.head_hidden_size, normalization, size, is_fixed


def _timm_stages(network: Any, x: Tensor) -> dict[str, Tensor]:
    last, maps = network.forward_intermediates(x)
    told = network.feature_info
    names = [each["module"] for each in (told if isinstance(told, list) else told.info)]
    if len(names) != len(maps):
        names = [f"block{k}" for k in range(len(maps))]
    stages = dict(zip(names, maps, strict=True))
    return {**stages, "pool": network.forward_head(last)}


# Weights that should come over the network.


def _not_fetched(name: str, error: OSError, cache: str, remedy: str) -> str:
    reason = " ".join(str(error).split()).split(". ")[0]
    return (
        f"pretrained (true): the weights of {name} are not in {cache} and cannot be fetched "
        f"({reason}); {remedy}, or give pretrained: false"
    )


def _not_weights(name: str, error: Exception, cache: str, remedy: str) -> str:
    return (
        f"pretrained (true): the file of {name} in {cache} is damaged or holds more than tensors,"
        f" and no code in it was run ({type(error).__name__}): delete it, and {remedy}"
    )


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Torchvision reads its files as pickles that may run code, and has no argument against it.

    Nor have releases of timm that are older than its own `weights_only`.
    """
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def _torch_remedy(url: str) -> tuple[str, str]:
    folder = str(Path(torch.hub.get_dir()) / "checkpoints")
    return folder, f"on a machine without network put {url} there"


def _hub_remedy() -> tuple[str, str]:
    constants = importlib.import_module("huggingface_hub.constants")
    return str(constants.HF_HUB_CACHE), (
        "for a machine without network copy that folder from one where they were fetched, and set "
        "HF_HUB_OFFLINE=1"
    )
