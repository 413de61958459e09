"""Every recipe runs as its head says on the built-in images, and goes on where it was stopped."""

import json
import shutil
from pathlib import Path

import pytest

from fastssl import journal, train

CHECKOUT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (CHECKOUT / "recipes").glob("*.yaml"))
REVISITING = sorted(
    f"revisiting/{path.stem}" for path in CHECKOUT.glob("recipes/revisiting/*.yaml")
)


@pytest.fixture(scope="module")
def few(demo_images, tmp_path_factory) -> Path:
    """Two built-in images a class to probe on: a probe of all would cost more than the steps."""
    folder = tmp_path_factory.mktemp("few")
    for split in ("train", "val"):
        for path in sorted((demo_images / split).glob("*/0000[01].jpg")):
            to = folder / split / path.parent.name
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    return folder


def test_there_are_recipes():
    assert "pirl_jigsaw" in RECIPES
    assert "revisiting/rotation_revnet50" in REVISITING


@pytest.mark.parametrize("name", [*RECIPES, *REVISITING])
def test_a_recipe_s_head_has_its_command(name):
    lines = (CHECKOUT / "recipes" / f"{name}.yaml").read_text().splitlines()
    head = [line for line in lines[: lines.index("data:")] if line.startswith("#")]

    assert any(f"accelerate launch fastssl/train.py recipes/{name}.yaml" in line for line in head)


@pytest.mark.parametrize("name", [*RECIPES, *REVISITING])
def test_a_recipe_trains_on_the_built_in_images(name, few, tmp_path):
    path = CHECKOUT / "recipes" / f"{name}.yaml"
    few_steps = ["train.steps=2", "train.log_steps=1", f"probe.root={few}"]
    if name in REVISITING:
        few_steps.append("train.batch=8")  # time: their graphs and losses are those of RECIPES
    code = train.main([str(path), *few_steps, f"train.out={tmp_path / 'run'}"])
    lines = [json.loads(each) for each in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]

    assert code == 0
    assert [line["step"] for line in logged] == [1, 2]
    assert all({"accuracy", "chance"} <= set(line) for line in logged)
    assert [line["step"] for line in lines if line.get("probe") == "knn"] == [0, 2]
    assert (tmp_path / "run/backbone.safetensors").exists()


# Of the others one that is trained by computing backwards, and one of a fixed size.
@pytest.mark.parametrize(
    "name", [*RECIPES, "revisiting/rotation_revnet50", "revisiting/jigsaw_vgg19"]
)
def test_a_recipe_stopped_half_way_goes_on_bit_for_bit(name, few, tmp_path):
    given = [str(CHECKOUT / "recipes" / f"{name}.yaml"), "train.batch=16", "train.log_steps=1"]
    given.append(f"probe.root={few}")
    whole, half, rest = (tmp_path / each for each in ("whole", "half", "rest"))
    assert train.main([*given, "train.steps=4", f"train.out={whole}"]) == 0
    assert train.main([*given, "train.steps=2", f"train.out={half}"]) == 0
    resumed = [f"train.out={rest}", f"train.resume={half}"]
    assert train.main([*given, "train.steps=4", *resumed]) == 0
    losses = {
        folder: {line["step"]: line["loss"] for line in journal.read(folder) if "loss" in line}
        for folder in (whole, rest)
    }

    assert [losses[rest][step] for step in (3, 4)] == [losses[whole][step] for step in (3, 4)]
    weights = [(folder / "backbone.safetensors").read_bytes() for folder in (whole, rest)]
    assert weights[0] == weights[1]
