"""A backbone in the form another library reads: written, reloaded there, compared, then kept.

What is written appears under its name once the other side, which has read it back strictly, gives
the features that ours gives for a batch of real pixels. On any failure nothing is left.
"""

import contextlib
import functools
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, list_models
from torchvision.transforms.v2 import functional

from fastssl import backbone_file, classifier, demo, loader, model_card, patch_network
from fastssl.backbones import named, resnet_v2
from fastssl.config import Part, RecipeError
from fastssl.patch_network import Standardization
from fastssl.trained import NAMED, RESNET, Trained

FORMATS = ("torchvision", "timm", "safetensors", "onnx", "torchscript")
TOLERANCE = 1e-4  # greatest difference, as a part of the greatest feature
IMAGES = 8  # of the built-in ones, compared
SUMS = "SHA256SUMS"  # as sha256sum writes it; marks a folder as an export
RESNET_V2 = resnet_v2.__name__

Features = Callable[[Tensor], Tensor]  # uint8 [B, 3, H, W] -> [B, dim]


class Mismatch(RuntimeError):
    """The other side gives other features: the message is all that the user sees."""


@dataclass(frozen=True)
class Written:
    """What a format put into its folder, and the way back from there."""

    features: Features  # of what was read back
    code: str  # for the card: how a user loads it
    any_size: bool  # it is meant for images of other sizes too
    notes: tuple[str, ...] = ()  # for the card and the user


def export_to(trained: Trained, to: str, out: Path | None, *, say: Callable[[str], None]) -> Path:
    """Writes the folder of one format; returns its path.

    Args:
        trained: what is exported.
        to: one of FORMATS.
        out: the folder; None: exports/NAME-FORMAT, in the run folder if there is one. An earlier
            export there is replaced if it holds nothing else, anything else is not.
        say: told what was written and compared.

    Raises:
        RecipeError: the format cannot hold this network, a package is missing, `out` is taken or
            can't be written, or the run's classifier is damaged.
        Mismatch: what was read back gives other features.
    """
    out = _free_folder(trained, to, out)
    use, _ = trained.preprocessing
    graph = _graph(trained)
    # With the defaults, which a RUN without a card leaves out: what is written should say them.
    trained = replace(trained, preprocessing=(use, asdict(graph.options)))
    write = {
        "torchvision": _to_torchvision,
        "timm": _to_timm,
        "safetensors": _to_safetensors,
        "onnx": _to_onnx,
        "torchscript": _to_torchscript,
    }[to]
    check_fits = {"torchvision": _other_side, "timm": _other_side}.get(to)
    if check_fits is not None:
        check_fits(trained, to)  # before images are made and read
    classes = () if trained.folder is None else classifier.classes_of(trained.folder)
    pixels, standardize = _probe_batch(trained, graph, say)
    ours = _Pixels(trained.backbone, standardize).eval()
    with _folder_that_appears(out) as folder, torch.no_grad():
        written = write(trained, ours, pixels, folder)
        if classes and to != "safetensors":
            left = (
                f"the head of {len(classes)} classes is not in it: --to safetensors takes it along"
            )
            written = replace(written, notes=(*written.notes, left))
        if trained.otherwise:
            published = f"its publisher prepares images otherwise: {trained.otherwise}"
            written = replace(written, notes=(*written.notes, published))
        compared = _compare(written, ours, pixels, to, trained.name)
        files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        card = model_card.text(
            trained, to, files=files, compared=compared, code=written.code, notes=written.notes
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        files["README.md"] = _sha256(folder / "README.md")
        sums = "".join(f"{digest}  {name}\n" for name, digest in files.items())
        (folder / SUMS).write_text(sums)
    for note in written.notes:
        say(f"note: {note}")
    say(f"{to}: reloaded strictly; {compared}")
    for name, digest in files.items():
        say(f"  {digest}  {out / name}")
    return out


def crop_pct(crop: int, resize: int) -> float:
    """What timm makes `resize` of again: it resizes the short side to floor(crop / crop_pct)."""
    part = crop / resize
    while math.floor(crop / part) < resize:  # 64 / (64 / 93) is 92.99...
        part = math.nextafter(part, 0)
    return part


class _Pixels(nn.Module):
    """The backbone as it is called outside: bytes in, all preparation of values inside."""

    def __init__(self, backbone: nn.Module, how: Standardization):
        super().__init__()
        self.backbone = backbone
        self.how: Standardization = how

    def forward(self, image: Tensor) -> Tensor:
        """Features [B, dim] of `image` [B, 3, H, W], uint8 in 0 ... 255."""
        return self.backbone(patch_network.standardize(image, self.how))


def _graph(trained: Trained) -> Part:
    """The evaluation graph, by which the run's images are prepared."""
    use, options = trained.preprocessing
    module = _module(use)
    # JSON has no tuples.
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        return Part(use, module, module.Options(**arguments))
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{trained.name}: its preprocessing {use} can't be made again: {error}"
        ) from error


def _probe_batch(
    trained: Trained, graph: Part, say: Callable[[str], None]
) -> tuple[Tensor, Standardization]:
    """Real pixels [B, 3, S, S], uint8: built-in images through the run's own evaluation graph.

    Patches [B, F, 3, p, p] come as [B * F, 3, p, p], with what the objective did to them.
    """
    reader = _module("pipelines.readers.folder")
    images = demo.render(say=say) / "val"
    samples = reader.list_samples(
        reader.Options(root=str(images)), cache=demo.cache(), say=lambda _: None
    )
    rows = samples.usable[np.linspace(0, len(samples.usable) - 1, IMAGES).astype(np.int64)]
    batches = loader.Loader(
        reader,
        samples,
        graph.module,
        graph.options,
        lambda _: rows,
        batch=IMAGES,
        seed=0,
        device=torch.device("cpu"),
        loading=loader.Options(threads=1, prefetch=1),
        say=say,
    )
    tensors = next(batches)
    if "patches" in tensors:  # beside which the graph may put out the image they are of
        return tensors["patches"].flatten(0, 1).clone(), trained.standardize
    if "image" in tensors:
        return tensors["image"].clone(), "global"
    raise RecipeError(
        f"{trained.name}: {graph.use} puts out {sorted(tensors)}: image or patches are needed"
    )


def _module(dotted: str) -> Any:
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{dotted}.".startswith(f"{error.name}."):
            raise
        raise RecipeError(
            f"there is no module {dotted}, by which images are prepared: run in the checkout"
        ) from error


# -- comparison ---------------------------------------------------------------------------------


def _compare(
    written: Written, ours: _Pixels, pixels: Tensor, to: str, name: str
) -> model_card.Compared:
    """Of the probe batch, of one of another size, and of images of another size."""
    batches = [pixels, pixels[:3]]
    if written.any_size:
        batches.append(_other_size(pixels[:2]))
    difference = largest = 0.0
    for batch in batches:
        mine, theirs = ours(batch), written.features(batch)
        if mine.shape != theirs.shape:
            raise Mismatch(f"{name}: {to} gives features {[*theirs.shape]}, not {[*mine.shape]}")
        here = (mine - theirs).abs().max().item()
        scale = mine.abs().max().item()
        # not `>`, which is false of NaN
        if not here <= TOLERANCE * scale:
            raise Mismatch(
                f"{name}: read back by {to} it gives other features for {[*batch.shape]}: they "
                f"differ by up to {here:.3g}, tolerated is {TOLERANCE:g} of {scale:.3g}; nothing "
                "was written"
            )
        difference, largest = max(difference, here), max(largest, scale)
    if ours(pixels).std(dim=0).max().item() == 0:
        raise Mismatch(
            f"{name}: the backbone gives every image the same features: nothing to compare by"
        )
    return model_card.Compared(
        images=len(pixels),
        shapes=tuple(tuple(batch.shape) for batch in batches),
        difference=difference,
        largest=largest,
        tolerance=TOLERANCE,
    )


def _other_size(pixels: Tensor) -> Tensor:
    """The same images, larger and not square."""
    _, _, height, width = pixels.shape
    return torch.cat([pixels, pixels[:, :, :, : width // 2]], dim=3)[:, :, : height // 4 * 4]


# -- torchvision and timm -----------------------------------------------------------------------


def _to_torchvision(trained: Trained, ours: _Pixels, pixels: Tensor, folder: Path) -> Written:
    del pixels
    file = folder / "model.safetensors"
    file.write_bytes(safetensors.torch.save(backbone_file.tensors_of(trained.backbone)))
    network, build = _other_side(trained, "torchvision")
    network.load_state_dict(safetensors.torch.load_file(file))
    code = (
        "import torchvision\nfrom safetensors.torch import load_file\nfrom torch import nn\n\n"
        f"{build}\nnetwork.load_state_dict(load_file('model.safetensors'))  # strict\n"
        "network.eval()\n"
    )
    return Written(
        _normalised(network, trained, ours),
        code,
        any_size=_is_any_size(trained),
        notes=("torchvision's classifier is no part of it: the identity stands in its place",),
    )


def _to_timm(trained: Trained, ours: _Pixels, pixels: Tensor, folder: Path) -> Written:
    file = folder / "model.safetensors"
    file.write_bytes(safetensors.torch.save(backbone_file.tensors_of(trained.backbone)))
    (folder / "config.json").write_text(json.dumps(_timm_config(trained, pixels), indent=1))
    network, build = _other_side(trained, "timm")
    network.load_state_dict(safetensors.torch.load_file(file))
    code = (
        "import timm\nfrom safetensors.torch import load_file\n\n"
        f"{build}\nnetwork.load_state_dict(load_file('model.safetensors'))  # strict\n"
        "network.eval()\n"
        "# or, with the preprocessing of config.json for timm.data.resolve_model_data_config:\n"
        "# network = timm.create_model('local-dir:THIS_FOLDER', pretrained=True)\n"
    )
    return Written(_normalised(network, trained, ours), code, any_size=_is_any_size(trained))


def _normalised(network: nn.Module, trained: Trained, ours: _Pixels) -> Features:
    """As a user of the other library calls it: values prepared by torchvision's own functions."""
    network.eval()
    mean, std = model_card.normalization(trained)

    def features(pixels: Tensor) -> Tensor:
        if ours.how == "global":
            return network(functional.normalize(pixels / 255, mean, std))
        return network(patch_network.standardize(pixels, ours.how))

    return features


def _other_side(trained: Trained, library: str) -> tuple[nn.Module, str]:
    """That library's network of the same name without its classifier, and the code that makes it.

    Raises:
        RecipeError: there is none, or it is another network.
    """
    name, tag, size = _name_in_libraries(trained, library)
    differences = _differences(trained)
    if differences:  # of which weights alone need not tell: strides and ReLUs have none
        raise RecipeError(
            f"{trained.name}: {library}'s {name} is another network: this one has "
            f"{', '.join(differences)}; {_ELSEWHERE}"
        )
    if library == "timm":
        build, network = _timm_network(trained, name, tag, size)
    else:
        build, network = _torchvision_network(trained, name, size)
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in trained.backbone.state_dict().items()}
    unlike = [
        f"{key} {_shape(found.get(key))} for {_shape(wanted.get(key))}"
        for key in [*wanted, *(key for key in found if key not in wanted)]
        if wanted.get(key) != found.get(key)
    ]
    if unlike:
        more = f" and {len(unlike) - 3} more" if len(unlike) > 3 else ""
        raise RecipeError(
            f"{trained.name}: {library}'s {name} is another network: "
            f"{', '.join(unlike[:3])}{more}; {_ELSEWHERE}"
        )
    return network, build


_ELSEWHERE = "use --to safetensors, onnx or torchscript, which take any network"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(shape)


def _differences(trained: Trained) -> list[str]:
    """What options of our ResNets say that the libraries' have not, in words."""
    options, said = trained.options, []
    if trained.use == RESNET and options.get("width", 64) != 64:
        said.append(f"width {options['width']}, not 64")
    if trained.use == RESNET and options.get("widening") not in (None, 4):
        said.append(f"widening {options['widening']}, not 4")
    if trained.use in (RESNET, RESNET_V2):
        if options.get("stem", "standard") != "standard":
            said.append("the small stem (3x3, no pool)")
        if options.get("patch_mode"):
            said.append("the strides of patch mode")
        if options.get("representation") is not None:
            said.append(f"a linear layer of {options['representation']} behind its pooling")
    if trained.use == RESNET_V2 and not options.get("last_relu", True):
        said.append("no last ReLU")
    return said


def _name_in_libraries(trained: Trained, library: str) -> tuple[str, str, int | None]:
    """Architecture, set of weights and image size, as `library` may call them."""
    if (trained.use, library) == (RESNET_V2, "timm"):
        return "resnetv2_50", "", None
    name = str(trained.options.get("name", ""))
    origin, _, rest = name.partition(":") if trained.use == NAMED else ("torchvision", "", name)
    architecture, _, tag = rest.partition(".")
    if trained.use not in (RESNET, NAMED):
        raise RecipeError(f"{trained.name}: {trained.use} is no network of {library}; {_ELSEWHERE}")
    if architecture == "mnasnet" or (library == "torchvision" and "mnasnet" in architecture):
        raise RecipeError(
            f"{trained.name}: torchvision's MNASNets take no weights without PyTorch's metadata, "
            f"which safetensors has no place for; {_ELSEWHERE}"
        )
    known = list_models(torchvision.models) if library == "torchvision" else _timm().list_models()
    if architecture not in known:
        other = " (its resnet10t has another stem and other shortcuts)"
        raise RecipeError(
            f"{trained.name}: {library} has no {architecture}"
            f"{other if (library, architecture) == ('timm', 'resnet10') else ''}; {_ELSEWHERE}"
        )
    return architecture, tag if origin == library else "", trained.options.get("image_size")


def _torchvision_network(trained: Trained, name: str, size: int | None) -> tuple[str, nn.Module]:
    arguments: dict[str, Any] = {}
    kind = named.SIZE_ARGUMENTS.get(name.partition("_")[0])
    fixed = size or _fixed_size(trained)
    if kind is not None and fixed is not None:
        arguments[kind] = (fixed, fixed) if kind == "input_size" else fixed
    if name in ("googlenet", "inception_v3"):
        arguments |= {"transform_input": True, "init_weights": False, "aux_logits": False}
    with torch.random.fork_rng(devices=[]):
        network = get_model(name, **arguments)
    path, _ = named.cut_classifier(network)
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    code = (
        f"network = torchvision.models.get_model('{name}'{given})\n"
        f"network.set_submodule('{path}', nn.Identity())  # no classifier: features come out"
    )
    return code, network


def _timm_network(trained: Trained, name: str, tag: str, size: int | None) -> tuple[str, nn.Module]:
    whole = f"{name}.{tag}" if tag else name
    arguments = _timm_arguments(trained, size)
    with torch.random.fork_rng(devices=[]):
        network = _timm().create_model(whole, num_classes=0, **arguments)
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f"network = timm.create_model('{whole}', num_classes=0{given})", network


def _timm_arguments(trained: Trained, size: int | None) -> dict[str, Any]:
    """What timm must be told beside the name."""
    if trained.use == RESNET_V2:
        widening = trained.options.get("widening", 4)
        return {} if widening == 4 else {"width_factor": widening / 4}
    return {} if size is None or trained.use != NAMED else {"img_size": size}


def _timm_config(trained: Trained, pixels: Tensor) -> dict[str, Any]:
    """The config.json that timm reads, which holds the preprocessing too."""
    name, tag, size = _name_in_libraries(trained, "timm")
    mean, std = model_card.normalization(trained)
    _, options = trained.preprocessing
    side = pixels.shape[-1]
    one_crop = "resize" in options and options.get("crop") == side  # else no such preparation
    part = crop_pct(side, options["resize"]) if one_crop else 1.0
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": trained.backbone.dim,
        "pretrained_cfg": {
            "tag": tag or "fastssl",
            "num_classes": 0,
            "input_size": [3, side, side],
            "fixed_input_size": _fixed_size(trained) is not None,
            "interpolation": options.get("interpolation", "bilinear"),
            "crop_pct": part,
            "crop_mode": "center",
            "mean": mean,
            "std": std,
        },
    }
    arguments = _timm_arguments(trained, size)
    return {**config, "model_args": arguments} if arguments else config


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise RecipeError("--to timm needs timm: pip install 'fastssl[timm]'") from None


@runtime_checkable
class _OfOneSize(Protocol):
    """A backbone that may take images of one size only."""

    image_size: int | None  # pixels a side; None: any


def _fixed_size(trained: Trained) -> int | None:
    backbone = trained.backbone
    return backbone.image_size if isinstance(backbone, _OfOneSize) else None


def _is_any_size(trained: Trained) -> bool:
    return _fixed_size(trained) is None


# -- safetensors --------------------------------------------------------------------------------


def _to_safetensors(trained: Trained, ours: _Pixels, pixels: Tensor, folder: Path) -> Written:
    del pixels
    recipe = trained.card.get("recipe") if trained.card is not None else None
    weights, card = backbone_file.files_of(
        trained.backbone,
        trained.use,
        trained.options,
        trained.preprocessing,
        model_card.without_paths(recipe),
        step=trained.step,
    )
    (folder / "backbone.safetensors").write_bytes(weights)
    (folder / "backbone.json").write_bytes(card)
    back = _Pixels(backbone_file.load_backbone(folder), ours.how)
    code = (
        "from fastssl.backbone_file import load_backbone\n\n"
        "network = load_backbone('THIS_FOLDER')  # takes uint8 too: its normalisation is inside\n"
    )
    notes: tuple[str, ...] = ()
    head = None if trained.folder is None else trained.folder / classifier.HEAD
    if head is not None and head.exists():
        (folder / classifier.HEAD).write_bytes(head.read_bytes())
        classes = classifier.load(folder).classes  # strict
        code += (
            "\n# or, with its head: scores of the classes\n"
            "from fastssl import classifier\n\n"
            "network = classifier.load('THIS_FOLDER')  # names: network.classes\n"
        )
        notes = (f"{classifier.HEAD} is the head of {len(classes)} classes",)
    return Written(back, code, any_size=_is_any_size(trained), notes=notes)


# -- graphs: the network as a program, its normalisation inside ---------------------------------


def _to_onnx(trained: Trained, ours: _Pixels, pixels: Tensor, folder: Path) -> Written:
    file = folder / "model.onnx"
    runtime = _onnx_packages()
    any_size = _is_any_size(trained) and _write_onnx(ours, pixels, file, any_size=True)
    if any_size:
        # A graph that holds for one size only says nothing about it: it is wrong for others.
        any_size = _is_right_for(
            _onnx_features(runtime, file), ours, _other_size(pixels[:2]), runtime
        )
    if not any_size:
        for stale in folder.iterdir():
            stale.unlink()
        _write_onnx(ours, pixels, file, any_size=False)
    size = "any height and width" if any_size else f"{pixels.shape[2]} x {pixels.shape[3]} pixels"
    code = (
        "import onnxruntime\n\n"
        "session = onnxruntime.InferenceSession('model.onnx')\n"
        "(features,) = session.run(None, {'image': images})  # numpy uint8 [B, 3, H, W], RGB\n"
    )
    note = f"input `image`: uint8 [B, 3, H, W], RGB in 0 ... 255, {size}; any B; normalised inside"
    return Written(_onnx_features(runtime, file), code, any_size=any_size, notes=(note,))


def _is_right_for(theirs: Features, ours: _Pixels, pixels: Tensor, runtime: Any) -> bool:
    state = runtime.capi.onnxruntime_pybind11_state
    try:
        found = theirs(pixels)
    except (state.Fail, state.InvalidArgument, state.RuntimeException):
        return False
    wanted = ours(pixels)
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def _write_onnx(ours: _Pixels, pixels: Tensor, file: Path, *, any_size: bool) -> bool:
    """Whether it could be written with height and width left open, if they should be."""
    axes: dict[int, str] = {0: "batch"} | ({2: "height", 3: "width"} if any_size else {})
    size = sum(each.nbytes for each in ours.state_dict().values())
    try:
        torch.onnx.export(
            ours,
            (pixels,),
            file,
            dynamo=True,
            input_names=["image"],
            output_names=["features"],
            dynamic_shapes=(axes,),
            external_data=size > 2e9,  # protobuf holds no more in one file
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        if any_size:
            return False
        reason = str(error).strip().splitlines()[-1]
        raise RecipeError(f"PyTorch cannot write this network as ONNX: {reason}") from error
    return True


def _onnx_features(runtime: Any, file: Path) -> Features:
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def features(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"image": pixels.contiguous().numpy()})[0])

    return features


def _onnx_packages() -> Any:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise RecipeError(f"--to onnx needs {name}: pip install 'fastssl[export]'") from None
    return importlib.import_module("onnxruntime")


def _to_torchscript(trained: Trained, ours: _Pixels, pixels: Tensor, folder: Path) -> Written:
    file = folder / "model.pt"
    # PyTorch 2.15 (2026-11) deprecates all of torch.jit by FutureWarnings, and still writes and
    # reads it. Who asks for it has a program that reads nothing else; they are told. Look again
    # when a release takes torch.jit.trace away: then this format goes.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit", FutureWarning)
        # Refusals of sizes, which a trace leaves out. What else might depend on the batch shows
        # when it is compared for others.
        told = "Converting a tensor to a Python boolean"
        warnings.filterwarnings("ignore", told)
        # Through memory: PyTorch's own writer says nothing of why a disk took no more.
        memory = io.BytesIO()
        torch.jit.save(torch.jit.trace(ours, pixels), memory)
        file.write_bytes(memory.getvalue())
        back = torch.jit.load(str(file), map_location="cpu")
    any_size = _is_any_size(trained)
    code = (
        "import torch\n\n"
        "network = torch.jit.load('model.pt')\n"
        "features = network(images)  # uint8 [B, 3, H, W], RGB\n"
    )
    notes = (
        "input: uint8 [B, 3, H, W], RGB in 0 ... 255; normalised inside",
        "PyTorch has deprecated TorchScript (torch.jit) and will drop it: ONNX is written by "
        "--to onnx",
    )
    return Written(back, code, any_size=any_size, notes=notes)


# -- folders ------------------------------------------------------------------------------------


def _free_folder(trained: Trained, to: str, out: Path | None) -> Path:
    if out is None:
        name = re.sub(r"[^\w.-]+", "-", trained.name)
        out = (trained.folder or Path()) / "exports" / f"{name}-{to}"
    out = out.expanduser()
    if out.is_symlink():  # where it leads to is replaced, and the link is left
        out = Path(os.path.realpath(out))
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {out}: is a file; name a folder")
    if out.is_dir():
        _refuse_others(out)
    return out


def _refuse_others(out: Path) -> None:
    """Refuses a folder that holds more than an export: it is deleted when the new one is there."""
    inside = sorted(out.iterdir())
    if not inside:
        return
    sums, card = out / SUMS, out / "README.md"
    is_export = card.is_file() and sums.is_file() and model_card.is_one(card.read_bytes())
    text = sums.read_text("utf-8", "replace") if is_export else ""
    listed = re.findall(r"^[0-9a-f]{64}  (.+)$", text, re.MULTILINE)
    for path in inside:
        if path.name != SUMS and (path.name not in listed or not path.is_file()):
            found = path.name if is_export else f"{path.name}, and is no export of fastssl"
            raise RecipeError(f"--out {out}: holds {found}; name a new folder")


@contextlib.contextmanager
def _folder_that_appears(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` when the block ends, and never if the block fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise RecipeError(f"--out {out}: {error.strerror}") from error
    try:
        made.chmod(0o755)  # mkdtemp keeps others out
        try:
            yield made
        except OSError as error:
            if error.errno is None:
                raise
            raise RecipeError(f"--out {out} could not be written: {error.strerror}") from error
        try:
            _put_in_place(made, out)
        except OSError as error:
            raise RecipeError(f"--out {out} could not be replaced: {error.strerror}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _put_in_place(made: Path, out: Path) -> None:
    """What was there, an earlier export or an empty folder, goes when the new one is in place."""
    if not out.exists():
        made.replace(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        out.replace(aside)
        made.replace(out)
    except OSError:
        if out.exists():
            aside.rmdir()  # nothing was moved
        else:
            aside.replace(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        state = hashlib.sha256()
        for block in iter(functools.partial(file.read, 2**20), b""):
            state.update(block)
        return state.hexdigest()
