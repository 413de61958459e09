"""Networks that are no ResNets from a recipe to a table: trained, evaluated, refused in time."""

import json

import pytest

from fastssl import config, demo, evaluate, train
from fastssl.backbones import named
from fastssl.rehearsal import rehearse_probe
from tests import few_images

SMALL = [
    "pipeline.image_size=32",
    "evaluation.resize=36",
    "evaluation.crop=32",
    "train.batch=8",
    "train.steps=1",
    "probe.neighbours=[3]",
    "probe.batch=8",
]
NAMED = "backbone.use=fastssl.backbones.named"


@pytest.fixture(scope="module")
def data(tmp_path_factory, demo_images):
    return few_images.copy(demo_images, tmp_path_factory.mktemp("data"), val=(3, 3, 3))


@pytest.mark.parametrize(
    "network",
    [
        ["backbone.name=timm:mobilenetv3_small_050", "backbone.activation_checkpointing=true"],
        ["backbone.name=timm:vit_tiny_patch16_224", "backbone.image_size=32"],
    ],
)
def test_a_network_by_name_is_trained_and_probed_at_every_depth(network, data, checkout, tmp_path):
    recipe, run = str(checkout / "recipes" / "rotation.yaml"), tmp_path / "run"
    given = [f"data.root={data / 'train'}", f"train.out={run}", NAMED, *network, *SMALL]
    asked = ["knn", str(run), f"data.root={data}", f"out={tmp_path / 'out'}", "knn.neighbours=[3]"]

    assert train.main([recipe, *given]) == 0
    assert evaluate.main([*asked, "knn.stages=[]", f"features.cache={tmp_path / 'cache'}"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("probe") == "knn" for line in lines)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ["backbone.name=timm:convnext_atto", "pipeline.image_size=24"],
            "pipelines.rotation puts out, 8 images at a time",
        ),
        (
            ["backbone.name=timm:convnext_atto", "evaluation.crop=24"],
            "pipelines.evaluation puts out: images of 24 x 24 pixels are too small",
        ),
        (
            ["backbone.name=timm:vit_tiny_patch16_224", "pipeline.image_size=24"],
            "a network that takes 224 x 224 only",
        ),
        (
            ["backbone.name=timm:hrnet_w18_small", "pipeline.image_size=48"],
            "hrnet_w18_small does not take images of 48 x 48 pixels; it takes for example 32, 64, ",
        ),
    ],
)
def test_images_of_a_size_that_the_network_refuses_are_told_before_anything_is_written(
    changed, message, data, checkout, tmp_path, capsys
):
    recipe, run = str(checkout / "recipes" / "rotation.yaml"), tmp_path / "run"
    given = [f"data.root={data / 'train'}", f"train.out={run}", NAMED, *SMALL, *changed]
    code = train.main([recipe, *given])
    said = capsys.readouterr().err
    last = said.splitlines()[-1]

    assert code == 2
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in said
    assert not run.exists()


def test_a_network_beyond_the_memory_is_told_before_anything_is_written(
    data, checkout, tmp_path, capsys
):
    recipe = str(checkout / "recipes" / "revisiting" / "rotation_revnet50.yaml")
    run = tmp_path / "run"
    images = [f"data.root={data / 'train'}", f"train.out={run}", "train.batch=8"]
    code = train.main([recipe, *images, "backbone.widening=100000000"])
    last = capsys.readouterr().err.splitlines()[-1]

    assert code == 2
    assert last.startswith("error: backbone: the network (widening 100000000) does not fit the mem")
    assert not run.exists()


@pytest.mark.parametrize(("crop", "is_right"), [(24, False), (32, True)])
def test_images_of_the_probe_are_rehearsed_too(crop, is_right, data, checkout):
    sizes = [f"evaluation.crop={crop}", f"data.root={data / 'train'}"]
    recipe = config.load(checkout / "recipes" / "rotation.yaml", sizes)
    samples = recipe.data.module.list_samples(recipe.data.options, cache=demo.cache(), say=print)
    network = named.backbone(named.Options(name="timm:convnext_atto"))
    before = {key: value.clone() for key, value in network.state_dict().items()}

    def rehearsed():
        rehearse_probe(recipe.data, samples, recipe.evaluation, network, "global")

    if is_right:
        rehearsed()
    else:
        with pytest.raises(
            config.RecipeError, match=r"pipelines.evaluation puts out: images of 24"
        ):
            rehearsed()
    assert network.training
    assert all((before[key] == value).all() for key, value in network.state_dict().items())
