"""An export is read back by the other side, compared, and complete; or nothing is written."""

import hashlib
import json
import sys
import warnings
from dataclasses import asdict, replace
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from timm.data.config import resolve_data_config, resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn
from torchvision.transforms import v2

from fastssl import backbone_file, classifier, export_formats, patch_network, trained
from fastssl.backbones import alexnet, named, nin, resnet, resnet_v2, revnet, vgg
from fastssl.config import RecipeError
from pipelines import evaluation_patches
from tests.finished_run import a_run


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> trained.Trained:
    options = resnet.Options(name="resnet10", width=8)
    return a_run(tmp_path_factory.mktemp("runs") / "small", resnet, options)


@pytest.fixture(scope="module")
def images(demo_images) -> torch.Tensor:
    """Real pixels [5, 3, 64, 64], uint8."""
    files = sorted((demo_images / "val").glob("*/*.jpg"))[:5]
    cut = v2.Compose([v2.Resize(72), v2.CenterCrop(64), v2.PILToTensor()])
    return torch.stack([cut(Image.open(file)) for file in files])


def quietly(_: str) -> None:
    pass


NEW = [
    (resnet_v2, resnet_v2.Options(widening=1, last_relu=False, representation=24)),
    (revnet, revnet.Options(widening=1, units=(1, 1, 1, 1))),
    (vgg, vgg.Options(widening=1, image_size=64)),
    (alexnet, alexnet.Options(image_size=64, representation=24)),
]


def features(network, x) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(x)


def normalised(x: torch.Tensor) -> torch.Tensor:
    return v2.Normalize(resnet.MEAN, resnet.STD)(x / 255)


def test_a_random_resnet50_gives_equal_features_in_torchvision_and_timm(tmp_path, images):
    ours = a_run(tmp_path / "run", resnet, resnet.Options(name="resnet50"))
    said: list[str] = []
    to_torchvision = export_formats.export_to(ours, "torchvision", None, say=said.append)
    to_timm = export_formats.export_to(ours, "timm", None, say=said.append)
    theirs = torchvision.models.resnet50()
    theirs.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    theirs.load_state_dict(safetensors.torch.load_file(to_torchvision / "model.safetensors"))
    of_timm = timm.create_model("resnet50", num_classes=0)
    of_timm.load_state_dict(safetensors.torch.load_file(to_timm / "model.safetensors"))
    by_folder = timm.create_model(f"local-dir:{to_timm}", pretrained=True)
    wanted = features(ours.backbone, images)

    assert wanted.shape == (5, 2048)
    for network in (theirs, of_timm, by_folder):
        found = features(network, normalised(images))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    told = resolve_model_data_config(by_folder)
    assert (tuple(told["mean"]), tuple(told["std"])) == (resnet.MEAN, resnet.STD)
    assert (*told["input_size"], told["interpolation"]) == (3, 64, 64, "bilinear")
    assert told["crop_pct"] == pytest.approx(64 / 72)
    assert [line.split(";")[0] for line in said if "reloaded" in line] == [
        "torchvision: reloaded strictly",
        "timm: reloaded strictly",
    ]


@pytest.mark.parametrize("to", ["safetensors", "torchscript"])
def test_a_format_holds_the_network_its_sums_and_a_card(small, images, tmp_path, to):
    said: list[str] = []
    folder = export_formats.export_to(small, to, tmp_path / "out", say=said.append)
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    files = {path.name for path in folder.iterdir()}
    if to == "safetensors":
        found = features(backbone_file.load_backbone(folder), images)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit", FutureWarning)  # 2.15 deprecates it
            found = features(torch.jit.load(folder / "model.pt"), images)
    wanted = features(small.backbone, images)

    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    assert files == {*sums, "SHA256SUMS"}
    assert {"README.md"} < files
    assert all(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        for name, digest in sums.items()
    )
    assert any("differ by at most" in line and "tolerated 0.0001" in line for line in said)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_resnet_v2_is_timm_s_of_its_width(tmp_path, images):
    sizes = {"resize": 72, "crop": 64, "interpolation": "bicubic"}
    ours = a_run(tmp_path / "run", resnet_v2, resnet_v2.Options(widening=1), **sizes)
    ours = replace(ours, otherwise="it squashes")
    folder = export_formats.export_to(ours, "timm", None, say=quietly)
    wanted = features(ours.backbone, images)
    theirs = timm.create_model("resnetv2_50", num_classes=0, width_factor=0.25)
    theirs.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True)
    usual = unloaded(resnet_v2, resnet_v2.Options())

    for network in (theirs, by_folder):
        found = features(network, normalised(images))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    card = (folder / "README.md").read_text()
    assert "num_classes=0, width_factor=0.25)" in card
    assert resolve_model_data_config(by_folder)["interpolation"] == "bicubic"
    assert "v2.Resize(72, v2.InterpolationMode.BICUBIC, antialias=True)" in card
    assert "72 pixels (bicubic with antialiasing" in card
    assert "\n- its publisher prepares images otherwise: it squashes\n" in card
    assert export_formats._other_side(usual, "timm")[1].endswith("'resnetv2_50', num_classes=0)")


def unloaded(module, options) -> trained.Trained:
    """A network without weights: its keys and shapes alone."""
    with torch.device("meta"):
        backbone = module.backbone(options)
    return trained.Trained(
        name="some run",
        backbone=backbone,
        folder=None,
        card=None,
        step=0,
        weights="",
        use=module.__name__,
        options=asdict(options),
        preprocessing=("pipelines.evaluation", {}),
        standardize="global",
    )


@pytest.mark.parametrize(("module", "options"), NEW)
def test_networks_of_revisiting_go_to_safetensors_and_torchscript(
    tmp_path, images, module, options
):
    ours = a_run(tmp_path / "run", module, options)
    wanted = features(ours.backbone, images)
    as_weights = export_formats.export_to(ours, "safetensors", None, say=quietly)
    as_program = export_formats.export_to(ours, "torchscript", None, say=quietly)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit", FutureWarning)  # 2.15 deprecates it
        program = torch.jit.load(as_program / "model.pt")

    for network in (backbone_file.load_backbone(as_weights), program):
        found = features(network, images)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize(("module", "options"), NEW)
@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_what_neither_library_has_is_refused_in_one_line(module, options, to):
    with pytest.raises(RecipeError) as error:
        export_formats._other_side(unloaded(module, options), to)

    assert "; use --to safetensors, onnx or torchscript, which take any" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last_relu": False}, "timm's resnetv2_50 is another network: this one has no last ReLU;"),
        ({"patch_mode": True}, "this one has the strides of patch mode;"),
        ({"stem": "small"}, r"this one has the small stem \(3x3, no pool\);"),
        ({"representation": 9}, "this one has a linear layer of 9 behind its pooling;"),
    ],
)
def test_a_resnet_v2_that_timm_lacks_is_refused_also_where_its_weights_would_fit(options, message):
    with pytest.raises(RecipeError, match=message):
        export_formats._other_side(unloaded(resnet_v2, resnet_v2.Options(**options)), "timm")


@pytest.mark.parametrize(
    ("name", "size", "to"),
    [
        ("torchvision:mobilenet_v3_small", None, "torchvision"),
        ("timm:resnet18", None, "torchvision"),
        ("timm:test_vit", 64, "timm"),
    ],
)
def test_a_network_named_by_library_goes_back_to_it_and_to_one_with_the_same_keys(
    tmp_path, name, size, to
):
    ours = a_run(
        tmp_path / "run", named, named.Options(name=name, image_size=64 if "vit" in name else None)
    )
    folder = export_formats.export_to(ours, to, tmp_path / "out", say=quietly)

    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "to", "message"),
    [
        ({"name": "resnet10"}, "torchvision", "torchvision has no resnet10; use --to safetensors,"),
        ({"name": "resnet10"}, "timm", r"timm has no resnet10 \(its resnet10t has another stem"),
        ({"name": "resnet18", "width": 8}, "timm", "another network: this one has width 8, not 64"),
        ({"name": "resnet18", "stem": "small"}, "torchvision", r"has the small stem \(3x3, no poo"),
        (
            {"name": "resnet18", "widening": 1},
            "timm",
            "another network: this one has widening 1, n",
        ),
        ({"name": "resnet18", "patch_mode": True}, "timm", "has the strides of patch mode; use"),
        ({"name": "resnet18", "representation": 9}, "timm", "a linear layer of 9 behind its pooli"),
    ],
)
def test_a_network_that_the_library_does_not_have_is_refused_with_the_difference(
    tmp_path, options, to, message
):
    ours = a_run(tmp_path / "run", resnet, resnet.Options(**options))
    with pytest.raises(RecipeError, match=message):
        export_formats.export_to(ours, to, tmp_path / "out", say=quietly)

    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_networks_of_other_files_and_of_other_keys_are_refused(tmp_path):
    ours = a_run(tmp_path / "nin", nin, nin.Options(blocks=3, width=12))
    with pytest.raises(RecipeError, match=r"fastssl.backbones.nin is no network of torchvision; u"):
        export_formats.export_to(ours, "torchvision", tmp_path / "out", say=quietly)
    options = named.Options(name="torchvision:mobilenet_v2")
    ours = a_run(tmp_path / "mobilenet", named, options)
    with pytest.raises(RecipeError, match=r"timm has no mobilenet_v2; use --to safetensors"):
        export_formats.export_to(ours, "timm", tmp_path / "out", say=quietly)
    ours = a_run(tmp_path / "vgg", named, named.Options(name="timm:efficientnet_b0"))
    with pytest.raises(RecipeError, match=r"efficientnet_b0 is another network: features.0.0.weig"):
        export_formats.export_to(ours, "torchvision", tmp_path / "out", say=quietly)


@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_other_features_on_the_other_side_are_an_error_and_nothing_is_left(tmp_path, to):
    ours = a_run(tmp_path / "run", resnet, resnet.Options(name="resnet18"))
    assert isinstance(ours.backbone, resnet.Backbone)
    half = (0.5, 0.5, 0.5)
    ours.backbone.normalization = (half, half)  # not what it computes with
    with pytest.raises(export_formats.Mismatch, match=r"differ by up to .*; nothing was written"):
        export_formats.export_to(ours, to, tmp_path / "out", say=quietly)

    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_backbone_that_says_the_same_of_every_image_proves_nothing(tmp_path):
    ours = a_run(tmp_path / "run", resnet, resnet.Options(name="resnet10", width=8))
    for parameter in ours.backbone.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(export_formats.Mismatch, match="gives every image the same features"):
        export_formats.export_to(ours, "safetensors", tmp_path / "out", say=quietly)


def test_patches_are_standardised_inside_as_the_objective_did(tmp_path, images):
    recipe = {"objective": {"use": "fastssl.objectives.jigsaw", "standardize": "joint"}}
    options = resnet.Options(name="resnet10", width=8)
    sizes = {"resize": 112, "crop": 96}
    ours = a_run(tmp_path / "run", resnet, options, evaluation_patches, recipe, **sizes)
    folder = export_formats.export_to(ours, "torchscript", tmp_path / "out", say=quietly)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit", FutureWarning)  # 2.15 deprecates it
        found = features(torch.jit.load(folder / "model.pt"), images)
    wanted = features(ours.backbone, patch_network.standardize(images, "joint"))

    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    assert (found - features(ours.backbone, images)).abs().max() > 0.01
    card = (folder / "README.md").read_text()
    assert "mean of its features over patches" in card
    assert "Each patch less its mean, over its standard deviation, of all pixels" in card


def test_timm_missing_is_named_with_its_extra(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match=r"needs timm: pip install 'fastssl\[timm\]'"):
        export_formats.export_to(small, "timm", tmp_path / "out", say=quietly)


def test_an_earlier_export_is_replaced_and_nothing_else_is(small, tmp_path):
    folder = export_formats.export_to(small, "safetensors", tmp_path / "a", say=quietly)
    export_formats.export_to(small, "torchscript", folder, say=quietly)
    files = {path.name for path in folder.iterdir()}

    assert files == {"model.pt", "README.md", "SHA256SUMS"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("notes.txt", r"a: holds notes.txt; name a new folder"),
        ("run/", r"a: holds run; name a new folder"),
        ("README.md", r"a: holds README.md, and is no export of fastssl; name a new folder"),
    ],
)
def test_an_export_beside_other_files_is_kept_and_the_first_of_them_named(
    small, tmp_path, added, message
):
    folder = export_formats.export_to(small, "safetensors", tmp_path / "a", say=quietly)
    if added.endswith("/"):
        (folder / added).mkdir()
    else:
        (folder / added).write_text("mine")
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(RecipeError, match=message):
        export_formats.export_to(small, "torchscript", folder, say=quietly)

    assert {path.name for path in folder.iterdir()} == before


def test_sums_of_other_files_make_no_export(small, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    digest = hashlib.sha256(b"years of work").hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  thesis.tex\n")
    with pytest.raises(RecipeError, match=r"holds thesis.tex, and is no export of fastssl; name"):
        export_formats.export_to(small, "torchscript", tmp_path, say=quietly)

    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_link_is_followed_and_left(small, tmp_path):
    folder = export_formats.export_to(small, "safetensors", tmp_path / "a", say=quietly)
    (tmp_path / "link").symlink_to(folder)
    found = export_formats.export_to(small, "torchscript", tmp_path / "link", say=quietly)

    assert found == folder
    assert (folder / "model.pt").exists()
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "link"}


def test_an_export_that_cannot_be_replaced_stays(small, small_disk):
    written = export_formats.export_to(small, "safetensors", None, say=quietly)
    for path in written.iterdir():
        (small_disk / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RecipeError, match="disk could not be replaced: Device or resource busy"):
        export_formats.export_to(small, "torchscript", small_disk, say=quietly)  # a mount

    assert {path.name for path in small_disk.iterdir()} == {path.name for path in written.iterdir()}
    assert [path.name for path in small_disk.parent.iterdir()] == [small_disk.name]


@pytest.mark.parametrize("crop", [64, 224])
def test_timm_resizes_to_every_size_that_its_crop_was_taken_of(crop):
    for resize in range(crop, 2 * crop):
        part = json.loads(json.dumps(export_formats.crop_pct(crop, resize)))

        assert sizes({"input_size": (3, crop, crop), "crop_pct": part}) == (resize, (crop, crop))


def test_a_config_for_timm_prepares_images_at_the_sizes_of_the_run(tmp_path):
    assert int(64 / (64 / 93)) == 92  # a plain quotient loses a pixel
    options = resnet.Options(name="resnet18")
    ours = a_run(tmp_path / "run", resnet, options, resize=93, crop=64)
    folder = export_formats.export_to(ours, "timm", tmp_path / "out", say=quietly)

    assert sizes(config_for_timm(folder)) == (93, (64, 64))


def test_the_default_sizes_are_written_where_a_run_leaves_them_out(tmp_path):
    ours = trained.load("random:resnet18")
    folder = export_formats.export_to(ours, "timm", tmp_path / "out", say=quietly)

    assert ours.preprocessing[1] == {}
    assert sizes(config_for_timm(folder)) == (256, (224, 224))
    card = (folder / "README.md").read_text()
    assert "Short side resized to 256 pixels" in card


def config_for_timm(folder) -> dict:
    network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return resolve_data_config({}, model=network)


def sizes(config: dict) -> tuple[int, tuple[int, int]]:
    """To which timm's own transforms resize the short side and cut the middle."""
    made: Any = create_transform(**config)
    steps = {type(step).__name__: step for step in made.transforms}
    return steps["Resize"].size, tuple(steps["CenterCrop"].size)


def test_the_head_goes_along_and_classifies_as_the_runs_does(tmp_path, images):
    recipe = {"objective": {"use": "fastssl.objectives.supervised", "label_smoothing": 0.1}}
    options = resnet.Options(name="resnet10", width=8)
    ours = a_run(tmp_path / "run", resnet, options, recipe=recipe)
    names = ("ant", "bee", "cat")
    classifier.save_head(tmp_path / "run", nn.Linear(64, 3), names)
    folder = export_formats.export_to(ours, "safetensors", tmp_path / "out", say=quietly)
    found, of_run = classifier.load(folder), classifier.load(tmp_path / "run")
    said: list[str] = []
    without = export_formats.export_to(ours, "torchscript", tmp_path / "without", say=said.append)

    assert found.classes == names
    assert torch.equal(features(found, images), features(of_run, images))
    assert "head.safetensors is the head of 3 classes" in (folder / "README.md").read_text()
    assert "head.safetensors" in (folder / "SHA256SUMS").read_text()
    told = "the head of 3 classes is not in it: --to safetensors takes it along"
    assert told in (without / "README.md").read_text()
    assert f"note: {told}" in said


def test_a_full_disk_leaves_nothing(small_disk, tmp_path):
    ours = a_run(tmp_path / "run", resnet, resnet.Options(name="resnet10", width=32))
    for to in ("safetensors", "torchscript"):
        with pytest.raises(RecipeError, match="could not be written: No space left on device"):
            export_formats.export_to(ours, to, small_disk / "out", say=quietly)

    assert not list(small_disk.iterdir())
