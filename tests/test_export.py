"""The exported backbone: back strictly with the same features, or an error that names the file."""

import hashlib
import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models import resnet18

import fastssl
from fastssl import backbone_file, checkpoint
from fastssl.backbones import resnet
from fastssl.config import Part, RecipeError
from pipelines import evaluation

TINY = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Options:
    widths: tuple[int, ...]
    bias: bool = True

    def __post_init__(self):
        if not isinstance(self.widths, tuple):
            raise ValueError(f"widths ({self.widths}) must be a tuple")


class Backbone(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, width, 1, bias=options.bias) for width in options.widths)
        )
        self.dim = sum(options.widths)
        self.normalization = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    def forward(self, x):
        return torch.cat([layer(x).mean(dim=(2, 3)) for layer in self.layers], dim=1)


def backbone(options):
    return Backbone(options)
"""


def a_recipe(module: Any, use: str, options: Any) -> Any:
    """As much of a recipe as an export reads."""
    return SimpleNamespace(
        backbone=Part(use, module, options),
        evaluation=Part("pipelines.evaluation", evaluation, evaluation.Options(resize=40, crop=32)),
        values={"train": {"batch": 64}, "optim": {"lr": 0.12}},
    )


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A run folder with the export of a small backbone whose module is in no package."""
    (tmp_path / "tiny_backbone.py").write_text(textwrap.dedent(TINY))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_backbone", raising=False)
    module = __import__("tiny_backbone")
    options = module.Options(widths=(2, 3))
    run = tmp_path / "run"
    recipe = a_recipe(module, "tiny_backbone", options)
    backbone_file.save_backbone(run, module.backbone(options), recipe, step=7)
    return run


def rewrite(run: Path, **changes: Any) -> None:
    """Changes keys of backbone.json."""
    path = run / "backbone.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reweigh(run: Path, data: bytes) -> None:
    """Other weights, with a check sum that fits them."""
    (run / "backbone.safetensors").write_bytes(data)
    rewrite(run, sha256=hashlib.sha256(data).hexdigest())


def a_trained_resnet18() -> tuple[resnet.Options, nn.Module, torch.Tensor]:
    options = resnet.Options(name="resnet18")
    backbone = resnet.backbone(options)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    backbone(images)  # moves the running statistics of the batch norms
    return options, backbone, images


def test_features_are_the_same_bit_for_bit_after_loading(tmp_path):
    options, backbone, images = a_trained_resnet18()
    recipe = a_recipe(resnet, "fastssl.backbones.resnet", options)
    backbone_file.save_backbone(tmp_path, backbone, recipe, step=800)
    backbone.eval()
    with torch.no_grad():
        wanted = backbone(images)
        before = torch.get_rng_state()
        loaded = [
            backbone_file.load_backbone(path) for path in (tmp_path, tmp_path / "backbone.json")
        ]
        after = torch.get_rng_state()
        found = [each(images) for each in loaded]

    assert not any(each.training for each in loaded)
    assert all(torch.equal(each, wanted) for each in found)
    assert torch.equal(before, after)


def test_torchvision_takes_the_weights_and_misses_its_classifier_only(tmp_path):
    options, backbone, _ = a_trained_resnet18()
    recipe = a_recipe(resnet, "fastssl.backbones.resnet", options)
    backbone_file.save_backbone(tmp_path, backbone, recipe, step=800)
    weights = safetensors.torch.load_file(tmp_path / "backbone.safetensors")
    keys = resnet18().load_state_dict(weights, strict=False)

    assert keys.missing_keys == ["fc.weight", "fc.bias"]
    assert keys.unexpected_keys == []


def test_weights_are_plain_float32_whatever_the_training_used(tmp_path):
    options, backbone, _ = a_trained_resnet18()
    backbone = backbone.to(torch.bfloat16)
    for parameter in backbone.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    recipe = a_recipe(resnet, "fastssl.backbones.resnet", options)
    backbone_file.save_backbone(tmp_path, backbone, recipe, step=800)
    weights = safetensors.torch.load_file(tmp_path / "backbone.safetensors")

    assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.int64}
    assert all(
        torch.equal(weights[key].to(value.dtype), value)
        for key, value in backbone.state_dict().items()
    )


def test_the_card_says_how_to_build_the_network_and_prepare_an_image(tiny):
    card = json.loads((tiny / "backbone.json").read_text())
    weights = (tiny / "backbone.safetensors").read_bytes()

    assert card == {
        "backbone": {"use": "tiny_backbone", "options": {"widths": [2, 3], "bias": True}},
        "dim": 5,
        "normalization": {"mean": [0.5] * 3, "std": [0.25] * 3},
        "preprocessing": {
            "use": "pipelines.evaluation",
            "options": {"resize": 40, "crop": 32, "interpolation": "bilinear"},
            "interpolation": "bilinear",
            "antialias": True,
        },
        "weights": "backbone.safetensors",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "step": 7,
        "fastssl": fastssl.__version__,
        "recipe": {"train": {"batch": 64}, "optim": {"lr": 0.12}},
    }


def test_a_backbone_of_any_importable_module_comes_back_with_its_tuples(tiny):
    loaded = backbone_file.load_backbone(tiny)

    assert loaded(torch.zeros(1, 3, 4, 4)).shape == (1, 5)


def test_the_card_comes_last_so_that_it_marks_a_finished_run(tiny):
    recipe = a_recipe(evaluation, "anything", evaluation.Options())
    backbone = backbone_file.load_backbone(tiny)
    folder = tiny.parent / "blocked"
    (folder / "backbone.safetensors").mkdir(parents=True)  # the weights cannot be written

    with pytest.raises(checkpoint.CheckpointError, match="safetensors could not be written"):
        backbone_file.save_backbone(folder, backbone, recipe, step=1)
    assert [path.name for path in folder.iterdir()] == ["backbone.safetensors"]


def test_weights_that_are_damaged_or_cut_short_are_noticed(tiny):
    path = tiny / "backbone.safetensors"
    whole = path.read_bytes()

    for damaged in (whole[:-1], whole[:8], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(RecipeError, match=r"backbone.safetensors is damaged, cut short or ano"):
            backbone_file.load_backbone(tiny)


def test_weights_that_are_no_safetensors_are_named(tiny):
    reweigh(tiny, b"PK\x03\x04 a pickle, perhaps")

    with pytest.raises(RecipeError, match=r"backbone.safetensors is no safetensors file"):
        backbone_file.load_backbone(tiny)


@pytest.mark.parametrize("missing", ["backbone.safetensors", "backbone.json"])
def test_a_missing_file_is_named(tiny, missing):
    (tiny / missing).unlink()

    with pytest.raises(RecipeError, match=f"{missing} cannot be read: No such file or directory"):
        backbone_file.load_backbone(tiny)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ("[]", "is not one of fastssl"), ('{"sha256": ""}', "is not one of")],
)
def test_a_card_that_cannot_be_read_is_named(tiny, text, message):
    (tiny / "backbone.json").write_text(text)

    with pytest.raises(RecipeError, match=f"backbone.json {message}"):
        backbone_file.load_backbone(tiny)


def test_weights_of_another_network_are_refused_by_their_keys(tiny):
    weights = {"layers.0.weight": torch.zeros(2, 9), "layers.7.weight": torch.zeros(1)}
    reweigh(tiny, safetensors.torch.save(weights))

    with pytest.raises(RecipeError, match=r"does not fit the backbone of backbone.json") as error:
        backbone_file.load_backbone(tiny)
    assert str(error.value).split("; ")[1:] == [
        "missing: layers.0.bias, layers.1.bias, layers.1.weight",
        "unexpected: layers.7.weight",
        "of another shape: layers.0.weight (2, 9) for (2, 3, 1, 1)",
    ]


def test_of_many_keys_the_first_few_are_named(tiny):
    reweigh(tiny, safetensors.torch.save({f"x{n}": torch.zeros(1) for n in range(8)}))

    with pytest.raises(RecipeError, match="unexpected: x0, x1, x2, x3, x4 and 3 more"):
        backbone_file.load_backbone(tiny)


@pytest.mark.parametrize("use", ["no_such_backbone", "fastssl.backbones.no_such"])
def test_a_module_that_is_not_installed_is_named(tiny, use):
    rewrite(tiny, backbone={"use": use, "options": {}})

    with pytest.raises(RecipeError, match=f"there is no module {use}: install what holds it"):
        backbone_file.load_backbone(tiny)


def test_an_import_error_within_the_module_is_not_hidden(tiny):
    (tiny.parent / "broken_backbone.py").write_text("import not_installed_anywhere\n")
    rewrite(tiny, backbone={"use": "broken_backbone", "options": {}})

    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        backbone_file.load_backbone(tiny)


@pytest.mark.parametrize(
    ("use", "options", "reason"),
    [
        ("tiny_backbone", {"width": 3}, "unexpected keyword argument 'width'"),
        ("tiny_backbone", {"widths": 3}, r"widths \(3\) must be a tuple"),
        ("json", {}, "has no attribute 'backbone'"),
    ],
)
def test_options_that_the_module_does_not_take_are_named(tiny, use, options, reason):
    rewrite(tiny, backbone={"use": use, "options": options})

    with pytest.raises(RecipeError, match=f"{use} of this version cannot build it .*{reason}"):
        backbone_file.load_backbone(tiny)
