"""RUN names a backbone with weights: every spelling of it, and what is refused by name."""

import hashlib
import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torchvision.models import get_model_weights, list_models

from fastssl import backbone_file, config, evaluate, trained
from fastssl import weights as starting_weights
from fastssl.backbones import resnet
from fastssl.config import RecipeError

RESNET10 = {"use": "fastssl.backbones.resnet", "name": "resnet10", "width": 8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkout) -> Path:
    """A run folder as a jigsaw run of a narrow resnet10 leaves it."""
    overrides = ["backbone.width=8"]
    recipe = config.load(checkout / "recipes" / "jigsaw.yaml", overrides)
    folder = tmp_path_factory.mktemp("runs") / "jigsaw-7"
    folder.mkdir()
    torch.manual_seed(3)
    backbone = recipe.backbone.module.backbone(recipe.backbone.options)
    backbone_file.save_backbone(folder, backbone, recipe, step=400)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """One to damage."""
    return shutil.copytree(finished, tmp_path / "jigsaw-7")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "backbone.safetensors")


def sealed(run: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Puts other weights in the run's, with the checksum that belongs to them."""
    save_file(tensors, run / "backbone.safetensors")
    card = json.loads((run / "backbone.json").read_text())
    card["sha256"] = hashlib.sha256((run / "backbone.safetensors").read_bytes()).hexdigest()
    (run / "backbone.json").write_text(json.dumps(card))


@pytest.mark.parametrize("file", ["", "backbone.json"])
def test_a_run_folder_says_all_by_itself(finished, file):
    found = trained.load(str(finished / file))

    assert (found.name, found.folder, found.step) == ("jigsaw-7", finished, 400)
    assert found.preprocessing[0] == "pipelines.evaluation_patches"
    assert found.preprocessing[1] == {"resize": 84, "crop": 72, "grid": 3}
    assert found.standardize == "joint"
    assert found.use == "fastssl.backbones.resnet"
    assert found.card is not None
    assert found.card["recipe"]["pipeline"]["patch"] == 24
    assert not found.backbone.training
    for key, tensor in weights(finished).items():
        assert torch.equal(found.backbone.state_dict()[key], tensor)


def test_a_card_of_old_keeps_its_own_preprocessing(run):
    card = json.loads((run / "backbone.json").read_text())
    card["preprocessing"] = {"use": "pipelines.evaluation", "options": {"resize": 64, "crop": 64}}
    (run / "backbone.json").write_text(json.dumps(card))

    preprocessing = trained.load(str(run)).preprocessing
    assert preprocessing == ("pipelines.evaluation", {"resize": 64, "crop": 64})


def test_a_lone_file_needs_the_network_s_name(run):
    (run / "backbone.json").unlink()
    path = str(run / "backbone.safetensors")
    with pytest.raises(RecipeError, match=r"say which network it is of, as backbone.name=resnet50"):
        trained.load(path)
    found = trained.load(path, backbone=dict(RESNET10))

    assert found.folder is None
    assert found.preprocessing == ("pipelines.evaluation", {})
    assert torch.equal(found.backbone.state_dict()["conv1.weight"], weights(run)["conv1.weight"])


def test_a_lone_file_with_its_card_beside_it_needs_nothing(finished):
    found = trained.load(str(finished / "backbone.safetensors"))

    assert (found.standardize, found.step) == ("joint", 400)
    assert found.weights == trained.load(str(finished)).weights


def test_spare_keys_are_left_out_only_when_they_are_named(tmp_path, finished):
    path = tmp_path / "more.safetensors"
    tensors = weights(finished)
    save_file({**tensors, "fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)}, path)
    with pytest.raises(
        RecipeError, match=r"unexpected: fc.bias, fc.weight.*weights.ignore=\[fc.bias,fc.weight\]"
    ):
        trained.load(str(path), backbone=dict(RESNET10))
    with pytest.raises(RecipeError, match=r"has no 'fc.wieght'; did you mean 'fc.weight'"):
        trained.load(str(path), backbone=dict(RESNET10), ignore=("fc.wieght",))
    found = trained.load(str(path), backbone=dict(RESNET10), ignore=("fc.weight", "fc.bias"))

    assert torch.equal(found.backbone.state_dict()["bn1.bias"], tensors["bn1.bias"])


def test_missing_keys_are_named(tmp_path, finished):
    path = tmp_path / "fewer.safetensors"
    tensors = weights(finished)
    del tensors["layer2.0.conv1.weight"]
    save_file(tensors, path)
    with pytest.raises(RecipeError, match=r"missing: layer2.0.conv1.weight$"):
        trained.load(str(path), backbone=dict(RESNET10))


def test_another_network_s_weights_are_refused_by_key_and_shape(finished):
    given = {"name": "resnet10", "stem": "small"}
    with pytest.raises(RecipeError, match=r"another shape: bn1.bias \(8,\) for \(64,\)"):
        trained.load(str(finished / "backbone.safetensors"), backbone=given)
    with pytest.raises(RecipeError, match=r"missing: .*resnet18|resnet18.*missing: layer1.1"):
        trained.load(
            str(finished / "backbone.safetensors"), backbone={"name": "resnet18", "width": 8}
        )


REVNET, VGG = "fastssl.backbones.revnet", "fastssl.backbones.vgg"


@pytest.mark.parametrize(
    ("use", "options", "key", "there", "here"),
    [
        (trained.RESNET, {"name": "resnet10"}, "width", 8, 12),
        (trained.RESNET, {"name": "resnet10"}, "width", 8, 64),
        (trained.RESNET, {"name": "resnet18"}, "widening", 2, 1),
        (REVNET, {}, "widening", 1, 2),
        (REVNET, {"representation": 5}, "widening", 2, 1),
        (VGG, {"image_size": 32}, "widening", 2, 1),
    ],
)
def test_weights_for_another_width_say_both_and_the_right_one(
    tmp_path, use, options, key, there, here
):
    path = tmp_path / "weights.safetensors"
    module = importlib.import_module(use)
    made = module.Options(**options, **{key: there})
    save_file(backbone_file.tensors_of(module.backbone(made)), path)
    with pytest.raises(RecipeError) as at:
        trained.load(str(path), backbone={"use": use, **options, key: here})

    assert str(at.value).endswith(
        f": the weights are of {key} {there}, the backbone is of {key} {here}: did you mean "
        f"backbone.{key}={there}?"
    )
    found = trained.load(str(path), backbone={"use": use, **options, key: there})
    assert found.options[key] == there


def test_weights_for_another_width_than_the_usual_name_it(tmp_path):
    path = tmp_path / "weights.safetensors"
    thin = resnet.backbone(resnet.Options(name="resnet50", widening=1))
    save_file(backbone_file.tensors_of(thin), path)
    with pytest.raises(RecipeError, match=r"of widening 1, the backbone is of widening 4: did you"):
        trained.load(str(path), backbone={"name": "resnet50"})


def test_a_width_is_not_blamed_for_what_it_does_not_explain(tmp_path):
    path = tmp_path / "weights.safetensors"
    thin = resnet.backbone(resnet.Options(name="resnet10", widening=1, stem="small"))
    save_file(backbone_file.tensors_of(thin), path)
    with pytest.raises(RecipeError, match=r"another shape: bn1.bias \(16,\) for \(32,\)") as at:
        trained.load(str(path), backbone={"name": "resnet10", "widening": 2})

    assert "did you mean" not in str(at.value)


@pytest.mark.parametrize("lone", [False, True], ids=["run", "file"])
def test_a_truncated_file_is_refused(run, lone):
    path = run / "backbone.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    if lone:
        (run / "backbone.json").unlink()
        with pytest.raises(RecipeError, match="is cut short, damaged or no safetensors file"):
            trained.load(str(path), backbone=dict(RESNET10))
    else:
        with pytest.raises(RecipeError, match="is damaged, cut short"):
            trained.load(str(run))


@pytest.mark.parametrize("lone", [False, True], ids=["run", "file"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_key(run, lone, value):
    tensors = weights(run)
    tensors["layer3.0.bn2.weight"][1] = value
    sealed(run, tensors)
    given = dict(RESNET10) if lone else {}
    with pytest.raises(RecipeError, match=r"layer3.0.bn2.weight holds NaN or infinity"):
        trained.load(str(run / "backbone.safetensors") if lone else str(run), backbone=given)


def test_an_unfinished_run_says_how_it_goes_on(run, tmp_path):
    (run / "backbone.json").unlink()
    (run / "checkpoints").mkdir()
    with pytest.raises(RecipeError, match="is a run that is not finished"):
        trained.load(str(run))
    (tmp_path / "other").mkdir()
    with pytest.raises(RecipeError, match=r"is no run folder: it has no backbone.json"):
        trained.load(str(tmp_path / "other"))


def test_fresh_weights_depend_on_the_seed_alone_and_leave_the_caller_s_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (trained.load("random:resnet10", seed=seed) for seed in (1, 1, 2))

    assert torch.equal(torch.get_rng_state(), state)
    assert one.weights == same.weights != other.weights
    assert (one.name, one.folder, one.card) == ("random:resnet10", None, None)
    assert one.preprocessing == ("pipelines.evaluation", {})
    assert isinstance(one.backbone, resnet.Backbone)


def test_fresh_weights_of_a_network_with_options():
    found = trained.load("random:resnet10", backbone={"width": 8})

    assert found.options["width"] == 8
    with pytest.raises(RecipeError, match=r"backbone.witdh: .* did you mean 'backbone.width'"):
        trained.load("random:resnet10", backbone={"witdh": 8})


@pytest.mark.parametrize(
    ("run", "given", "use"),
    [
        ("random:revnet", {"widening": 1}, REVNET),
        ("random:vgg", {"widening": 1, "image_size": 32}, VGG),
        ("random:nin", {}, "fastssl.backbones.nin"),
        ("random:timm:convnext_atto", {}, trained.NAMED),
        ("random:torchvision:mobilenet_v2", {}, trained.NAMED),
    ],
)
def test_fresh_weights_of_any_file_and_of_a_library_s_network(run, given, use):
    found, again = (trained.load(run, backbone=dict(given)) for _ in range(2))

    assert (found.name, found.use) == (run, use)
    assert found.weights == again.weights
    assert given.items() <= found.options.items()
    assert not found.options.get("pretrained")


@pytest.mark.parametrize(
    ("run", "given", "message"),
    [
        (
            "random:resnet10",
            {"use": VGG},
            r"resnet10: .*vgg holds one network only: .* random:vgg$",
        ),
        ("random:recipes/jigsaw.yaml", {"use": VGG}, r"backbone.use: .* says itself which network"),
    ],
)
def test_another_file_than_the_run_s_is_refused(run, given, message, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    with pytest.raises(RecipeError, match=message):
        trained.load(run, backbone=given)


def test_a_file_of_many_networks_takes_the_name_of_one():
    found = trained.load("random:resnet", backbone={"name": "resnet10", "width": 8})

    assert (found.use, found.options["name"]) == (trained.RESNET, "resnet10")


@pytest.mark.parametrize("widening", [10**8, 10**15, 10**21])
def test_a_network_beyond_the_memory_is_one_line(widening):
    with pytest.raises(RecipeError) as at:
        trained.load("random:revnet", backbone={"widening": widening})

    assert str(at.value) == (
        f"backbone: the network (widening {widening}) does not fit the memory of this machine: "
        "make it smaller"
    )


def test_other_faults_of_a_backbone_are_not_taken_for_too_little_memory():
    def no_backbone(options):
        raise RuntimeError(f"no {options.name}")

    faulty = ModuleType("faulty")
    vars(faulty)["backbone"] = no_backbone
    with pytest.raises(RuntimeError, match="no resnet10"):
        trained.fresh(faulty, resnet.Options(name="resnet10"))


def test_fresh_weights_of_a_run_have_all_of_it_but_the_weights(finished):
    found, run = trained.load(f"random:{finished}"), trained.load(str(finished))

    assert found.name == "random:jigsaw-7"
    assert found.folder is None
    assert (found.use, found.options, found.preprocessing, found.standardize) == (
        run.use,
        run.options,
        run.preprocessing,
        run.standardize,
    )
    assert found.weights != run.weights
    assert found.step == 0


def test_fresh_weights_of_a_recipe_are_of_the_demo_only_without_data(checkout):
    recipe = checkout / "recipes" / "jigsaw.yaml"
    demo = trained.load(f"random:{recipe}")
    real = trained.load(f"random:{recipe}", data_root="/some where")

    assert (demo.options["name"], real.options["name"]) == ("resnet10", "resnet50")
    assert (demo.preprocessing[1]["crop"], real.preprocessing[1]["crop"]) == (72, 192)
    assert demo.name == "random:jigsaw"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("random:resnet11", r"random:resnet11 names no network; did you mean 'random:resnet"),
        ("random:revnt", r"random:revnt names no network; did you mean 'random:revnet'"),
        ("random:resnet", r"random:resnet: that file holds many networks: give one, as random:res"),
        ("random:qqqq", r"'qqqq'.* is no ResNet of torchvision; known: "),
        ("random:timm:vit_tinny_patch16_224", r"no network of timm; did you mean 'timm:vit_tiny_p"),
        ("random:", "names no network"),
        ("random:runs/absent", "there is no runs/absent"),
        ("random:absent.yaml", "absent.yaml: No such file"),
        ("torchvision:resnet51", "resnet51"),
        ("resnet5000", "no network of that name; did you mean"),
        ("runs/absent", "runs/absent: no such file"),
        ("absent.safetensors", "absent.safetensors cannot be read: No such file"),
    ],
)
def test_what_is_not_there_is_named(run, message):
    with pytest.raises(RecipeError, match=message):
        trained.load(run)


def test_a_file_of_another_kind_is_refused(checkout):
    with pytest.raises(RecipeError, match=r"is no RUN: give a run folder, its backbone.json"):
        trained.load(str(checkout / "recipes" / "jigsaw.yaml"))


def test_options_that_change_nothing_are_refused(finished):
    with pytest.raises(RecipeError, match=r"backbone.name: .* says itself which network"):
        trained.load(str(finished), backbone={"name": "resnet18"})
    with pytest.raises(RecipeError, match=r"weights.ignore: .* is no .safetensors"):
        trained.load(str(finished), ignore=("fc.weight",))


def test_integers_are_no_weights_whichever_way_they_are_loaded(run, tmp_path):
    quantised = weights(run) | {"conv1.weight": weights(run)["conv1.weight"].to(torch.int8)}
    told = r"of another type: conv1.weight int8 for float32"
    lone = tmp_path / "lone.safetensors"
    save_file(quantised, lone)
    sealed(run, quantised)

    for load in (
        lambda: backbone_file.load_backbone(run),
        lambda: trained.load(str(run)),
        lambda: trained.load(str(lone), backbone=dict(RESNET10)),
        lambda: starting_weights.source(str(lone), RESNET10),
    ):
        with pytest.raises(RecipeError, match=told):
            load()
    halves = {
        name: each.half() if each.is_floating_point() else each
        for name, each in weights(run).items()
        if name != "conv1.weight"
    }
    save_file(halves | {"conv1.weight": quantised["conv1.weight"].bfloat16()}, lone)

    assert trained.load(str(lone), backbone=dict(RESNET10)).name == "lone"  # floats are floats


def test_published_networks_are_prepared_for_as_their_publishers_do():
    assert "resnet50" in list_models()
    for name in list_models(torchvision.models):
        theirs = get_model_weights(name)["DEFAULT"].transforms()
        wanted = (theirs.resize_size, theirs.crop_size, theirs.interpolation.value)
        options, otherwise = trained.published(f"torchvision:{name}")

        assert ([options["resize"]], [options["crop"]], options["interpolation"]) == wanted
        assert otherwise == ""
    first = trained.published("torchvision:resnet50.IMAGENET1K_V1").options
    assert first == {"resize": 256, "crop": 224, "interpolation": "bilinear"}


@pytest.mark.parametrize(
    "name",
    [
        "resnet50.tv_in1k",
        "vit_base_patch16_224.augreg_in21k_ft_in1k",  # 224 / 0.9 is 248.9
        "resnet50.a1_in1k",  # tested at another size and crop
    ],
)
def test_sizes_and_filter_of_timm_s_networks_are_those_of_its_own_transforms(name):
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    its = resolve_data_config(pretrained_cfg=config.to_dict(), use_test_size=True)
    resized, cropped, *_ = create_transform(**its).transforms  # pyright: ignore
    found = trained.published(f"timm:{name}")

    wanted = {"resize": resized.size, "crop": cropped.size[0]}
    assert found == (wanted | {"interpolation": resized.interpolation.value}, "")


def test_what_a_publisher_does_and_our_graph_can_not_is_said():
    squash = "convnext_base.fb_in22k_ft_in1k_384"
    options, otherwise = trained.published(f"timm:{squash}")

    assert options == {"resize": 384, "crop": 384, "interpolation": "bicubic"}
    assert otherwise == (
        "it makes images 384 x 384 (crop_mode squash), here the short side is resized and the "
        "middle 384 x 384 cut out"
    )
    options, otherwise = trained.published("timm:volo_d4_448.sail_in1k")
    assert (options["resize"], options["crop"]) == (448, 448)  # else the graph refuses them
    assert otherwise == "it resizes to 389 and pads to 448, here resized to 448"
    options, otherwise = trained._as_options(256, (224, 224), "lanczos")
    assert options["interpolation"] == "bilinear"
    assert otherwise == "it resizes by lanczos, here bilinear"


def test_a_published_network_is_loaded_with_its_publisher_s_preparation(monkeypatch):
    name = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    build = trained._build
    monkeypatch.setattr(trained, "_build", lambda use, given: build(use, {"name": given["name"]}))
    said: list[str] = []
    found = trained.load(name)
    as_squashed = replace(found, otherwise="it squashes")
    for run in (found, as_squashed):
        evaluate._say_what_is_assumed(run, evaluate._graph(run, {}), {}, said.append)

    options = {"resize": 248, "crop": 224, "interpolation": "bicubic"}
    assert found.preprocessing == ("pipelines.evaluation", options)
    assert said == [f"{name}: its publisher prepares images otherwise: it squashes"]
