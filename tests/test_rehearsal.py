"""What does not fit together is told before anything is written or a device is touched."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from fastssl import config, demo, train
from fastssl.rehearsal import rehearse

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("jigsaw", ["objective.patches=4"], "objective.patches (4) must be as many as"),
        ("pirl_jigsaw", ["pipeline.grid=2"], "objective.patches (9) must be as many as"),
        ("exemplar", ["pipeline.views=1"], "pipeline.views (1) must be at least 2"),
        ("exemplar", ["train.batch=4", "train.accumulate=4"], "one image has no negatives"),
        (
            "relative_patch",
            ["pipeline.pairs=one", "train.batch=4", "train.accumulate=4"],
            "pipelines.relative_patch puts out, 1 images at a time (train.batch / (processes x",
        ),
    ],
)
def test_a_graph_and_an_objective_that_do_not_fit_are_refused(
    name, overrides, message, demo_images, tmp_path, capsys
):
    recipe = str(CHECKOUT / "recipes" / f"{name}.yaml")
    code = train.main([recipe, f"train.out={tmp_path / 'run'}", *overrides])
    error = capsys.readouterr().err

    assert code == 2
    assert message in error
    assert error.startswith(f"error: fastssl.objectives.{name.split('_')[0]}")
    assert not (tmp_path / "run").exists()


def test_an_image_among_the_class_folders_means_that_there_are_no_classes(
    demo_images, tmp_path, capsys
):
    for name in ("cat", "dog"):
        shutil.copytree(demo_images / "val" / "fish", tmp_path / "data" / name)
    shutil.copy(demo_images / "val" / "fish" / "00000.jpg", tmp_path / "data" / "stray.jpg")
    recipe = str(CHECKOUT / "recipes" / "supervised.yaml")
    given = [f"data.root={tmp_path / 'data'}", "train.batch=8", f"train.out={tmp_path / 'run'}"]

    assert train.main([recipe, *given]) == 2
    assert "a folder for each class (root/<class>/<image>.jpg), and no image beside them" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


class Asserts(nn.Module):
    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def forward(self, **_):
        raise AssertionError(*[self.text] * bool(self.text))


@pytest.mark.parametrize("text", ["height (25) must be divisible by window (8)", ""])
def test_an_assertion_of_a_network_is_one_line(text, demo_images):
    recipe = config.load(CHECKOUT / "recipes" / "rotation.yaml")
    samples = recipe.data.module.list_samples(recipe.data.options, cache=demo.cache(), say=print)
    said = text or "an assertion of the network does not hold"
    with pytest.raises(config.RecipeError) as error:
        rehearse(recipe.data, samples, recipe.pipeline, Asserts(text), name="mine", images=4)

    assert str(error.value).startswith("mine can't be trained on what pipelines.rotation puts out,")
    assert str(error.value).endswith(f": {said}")


def test_a_rehearsal_leaves_the_objective_and_the_random_state_as_they_were(demo_images):
    recipe = config.load(CHECKOUT / "recipes" / "pirl_jigsaw.yaml")
    samples = recipe.data.module.list_samples(recipe.data.options, cache=demo.cache(), say=print)
    objective = recipe.objective.module.Objective(
        recipe.backbone.module.backbone(recipe.backbone.options),
        recipe.objective.options,
        images=len(samples),
        classes=0,
        labels=None,
        seed=0,
    )
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    random = torch.get_rng_state()
    rehearse(recipe.data, samples, recipe.pipeline, objective, name="pirl", images=4)

    assert all(torch.equal(before[name], value) for name, value in objective.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert objective.memory.seen == []
    assert all(parameter.grad is None for parameter in objective.parameters())
