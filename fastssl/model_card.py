"""The model card of an export: what was trained on what and how well, and how to prepare an image.

README.md with a head in YAML, as the Hugging Face Hub reads it. Nothing in it tells where on the
author's disk things lie: of a path the last folder's name is kept.
"""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastssl
from fastssl import checkpoint, journal
from fastssl.config import RecipeError
from fastssl.reporting import probes
from fastssl.trained import Trained

_IMAGES, _PATCHES = "pipelines.evaluation", "pipelines.evaluation_patches"
_MARK = "- exported by fastssl"  # in every card
_LIBRARIES = {"timm": "timm", "onnx": "onnx", "torchvision": "pytorch", "torchscript": "pytorch"}


@dataclass(frozen=True)
class Compared:
    """How far features of the other side were from ours."""

    images: int
    shapes: tuple[tuple[int, ...], ...]  # of the batches
    difference: float  # the greatest
    largest: float  # feature
    tolerance: float  # as a part of it

    def __str__(self) -> str:
        """One line."""
        batches = ", ".join(" x ".join(map(str, shape)) for shape in self.shapes)
        return (
            f"features of {batches} built-in images differ by at most {self.difference:.3g} "
            f"(largest feature {self.largest:.3g}, tolerated {self.tolerance:g} of it)"
        )


def text(
    trained: Trained,
    to: str,
    *,
    files: Mapping[str, str],
    compared: Compared,
    code: str,
    notes: Sequence[str],
) -> str:
    """The card.

    Args:
        trained: what was exported.
        to: the format.
        files: name -> SHA-256.
        compared: with what was read back.
        code: that loads it.
        notes: what a user must know of the format.
    """
    card = trained.card or {}
    recipe = without_paths(card.get("recipe")) or {}
    task = recipe.get("objective", {}).get("use", "").rpartition(".")[2]
    library = _LIBRARIES.get(to, "fastssl")
    head = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        "- image-feature-extraction",
        *(["- self-supervised", f"- {task}"] if task else []),
        "# license: for the author to fill in",
        "---",
    ]
    parts = [
        "\n".join(head),
        f"# {trained.name} ({to})",
        _what(trained, recipe, task),
        _numbers(trained),
        _preparation(trained, to),
        "## Loading\n\n```python\n" + code + "```\n" + "".join(f"\n- {note}" for note in notes),
        f"## Checked\n\nReloaded strictly when it was exported; {compared}.\n\n"
        + "\n".join(f"- `{name}`: SHA-256 `{digest}`" for name, digest in files.items()),
        _origin(trained),
    ]
    if recipe:
        told = json.dumps(recipe, indent=1)
        parts.append(f"## Recipe as run\n\n```json\n{told}\n```")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def is_one(text: bytes) -> bool:
    """Whether a README.md is a card of ours."""
    return _MARK.encode() in text


def without_paths(recipe: dict[str, Any] | None) -> dict[str, Any] | None:
    """A recipe's values with the last folder's name in place of each path on this machine."""
    if recipe is None:
        return None
    return {
        section: {key: _name_only(value) for key, value in values.items()}
        for section, values in recipe.items()
    }


def normalization(trained: Trained) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of red, green and blue in 0 ... 1."""
    mean, std = trained.backbone.normalization  # pyright: ignore[reportGeneralTypeIssues]
    return [float(each) for each in mean], [float(each) for each in std]


def transforms(trained: Trained) -> str | None:
    """Code of torchvision's transforms that prepares an image as our evaluation graph does.

    None where it takes more than one resize and one crop.
    """
    use, options = trained.preprocessing
    if use != _IMAGES:
        return None
    mean, std = normalization(trained)
    resize, crop = options.get("resize", 256), options.get("crop", 224)
    interpolation = _interpolation(options).upper()
    return f"""\
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

resized = v2.Compose([
    v2.Resize({resize}, v2.InterpolationMode.{interpolation}, antialias=True),  # of the short side
    v2.CenterCrop({crop}),
    v2.PILToTensor(),  # uint8 [3, {crop}, {crop}]
])
normalized = v2.Compose([
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize({mean}, {std}),
])


def prepare(path):
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    return resized(image)
"""


# The sections.


def _what(trained: Trained, recipe: dict[str, Any], task: str) -> str:
    network = ", ".join(f"{key} {value}" for key, value in trained.options.items())
    rows = [
        ("backbone", f"`{trained.use}` ({network})"),
        ("features", f"{trained.backbone.dim} an image"),
    ]
    if recipe:
        settings = {
            key: value for key, value in recipe.get("objective", {}).items() if key != "use"
        }
        told = ", ".join(f"{key} {value}" for key, value in settings.items())
        rows.append(("task", f"{task} ({told})" if told else task))
        rows.append(("data", _data(trained, recipe)))
        train, optim = recipe.get("train", {}), recipe.get("optim", {})
        rows.append(
            (
                "training",
                f"{trained.step} steps of {train.get('batch')} images, {train.get('epochs')} "
                f"epochs planned, {optim.get('name')}, learning rate {optim.get('lr')} "
                f"(at {optim.get('lr_batch')} images), seed {train.get('seed')}",
            )
        )
    elif trained.name.startswith("random:"):
        rows.append(("task", "none: random weights"))
    else:
        rows.append(("task", "not recorded"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _data(trained: Trained, recipe: dict[str, Any]) -> str:
    name = recipe.get("data", {}).get("root")
    newest = checkpoint.latest(trained.folder / "checkpoints") if trained.folder else None
    if newest is None:
        return f"`{name}`; the number of images is not recorded"
    try:
        told = checkpoint.load(newest)["fingerprint"]
    except (RecipeError, KeyError):
        return f"`{name}`; the number of images is not recorded"
    return (
        f"`{name}`, {told['usable images']:,} images, fingerprint of names and sizes "
        f"`{told['file list']}`"
    )


def _numbers(trained: Trained) -> str:
    """The last line of each probe, depth and settings."""
    lines, damaged = ([], []) if trained.folder is None else journal.read_and_count(trained.folder)
    measured = probes.last_of_each([line for line in lines if "probe" in line])
    parts = ["## Measured"]
    if damaged:
        count = len(lines) + len(damaged)
        parts.append(f"{len(damaged)} of {count} lines of metrics.jsonl were damaged: left out.")
    if not measured:
        return "\n\n".join([*parts, "Nothing was measured."])
    rows = []
    for each in measured:
        results = ", ".join(f"{key} {_number(key, each.results[key])}" for key in each.results)
        told = ", ".join(f"{key} {_name_only(value)}" for key, value in each.settings.items())
        rows.append(f"| {each.probe} | {each.step} | {results} | {told} |")
    parts.append("By `fastssl/train.py` and `fastssl/evaluate.py`, the last of each kind.")
    parts.append("\n".join(["| probe | step | result | settings |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _preparation(trained: Trained, to: str) -> str:
    use, options = trained.preprocessing
    mean, std = normalization(trained)
    inside = to not in ("torchvision", "timm")
    values = (
        "The network takes uint8 RGB in 0 ... 255 and normalises inside"
        if inside
        else "The network takes normalised floats: (RGB / 255 - mean) / std"
    )
    said = f"{values}; mean {_plain(mean)}, std {_plain(std)}."
    code = transforms(trained)
    if code is not None:
        call = "prepare(path)[None]" if inside else "normalized(prepare(path))[None]"
        body = (
            "Short side resized to "
            f"{options.get('resize', 256)} pixels ({_interpolation(options)} with antialiasing; "
            f"the long side rounded down), then the middle {options.get('crop', 224)} x "
            f"{options.get('crop', 224)} pixels. In torchvision's transforms, which differ from "
            "the pipeline that measured the numbers above by about a grey level:\n\n"
            f"```python\n{code}\n\nbatch = {call.replace('path', repr('image.jpg'))}\n```"
        )
    else:
        told = ", ".join(f"{key} {value}" for key, value in options.items())
        body = f"Images are prepared by `{use}` ({told})."
        if use == _PATCHES:
            body = (
                f"The network was trained on patches, and represents an image by the mean of its "
                f"features over patches of it, as `{use}` cuts them ({told}): resize of the short "
                "side (bilinear, antialiased), the middle square, a grid of cells, and the middle "
                "of each."
            )
            body += {
                "joint": " Each patch less its mean, over its standard deviation, of all pixels "
                "and colours together, in place of the normalisation above.",
                "channel": " Each patch less its mean, over its standard deviation, colour by "
                "colour, in place of the normalisation above.",
            }.get(trained.standardize, "")
    return f"## Preparing an image\n\n{said}\n\n{body}"


def _origin(trained: Trained) -> str:
    lines = [f"{_MARK} {fastssl.__version__} with {_versions()}"]
    path = trained.folder / "environment.json" if trained.folder is not None else None
    if path is not None and path.exists():
        last = json.loads(path.read_text(encoding="utf-8"))[-1]
        versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
        lines.append(
            f"- trained on {last['device']}, {last['processes']} process(es), Python "
            f"{last['python']}, {versions}"
        )
        changed = " with changes of its own" if last.get("diff") else ""
        lines.append(f"- commit {last['commit'] or 'unknown'}{changed}")
    return "## Origin\n\n" + "\n".join(lines)


def _versions() -> str:
    return f"torch {torch.__version__}, torchvision {importlib.metadata.version('torchvision')}"


# Words.


def _number(key: str, value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_number(key, each) for each in value)}]"
    if not probes.is_number(value):
        return str(value)
    return f"{value:.1%}" if probes.unit_of(key, [value]) == "%" else f"{value:.4g}"


def _interpolation(options: Mapping[str, Any]) -> str:
    return options.get("interpolation", "bilinear")  # cards of old do not tell


def _plain(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _name_only(value: Any) -> Any:
    """A path on this machine as its last folder's name, with the one before for train or val."""
    if isinstance(value, list | tuple):
        return [_name_only(each) for each in value]
    if isinstance(value, dict):
        return {key: _name_only(each) for key, each in value.items()}
    if not isinstance(value, str) or not (value.startswith(("~", "..")) or "/" in value):
        return value
    path = Path(value)
    if path.name in ("train", "val", "test", "images") and path.parent.name:
        return f"{path.parent.name}/{path.name}"
    return path.name
