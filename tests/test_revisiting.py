"""The recipes of "Revisiting": four tasks by four networks, alike but for what they are named for.

What the tests of graphs, objectives and previews hold recipes/<task>.yaml to holds for these too:
graph and objective are the same, value by value. Training on built-in images is in test_recipes.py.
"""

import functools
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastssl import config, k19_table

CHECKOUT = Path(__file__).resolve().parents[1]
FOLDER = CHECKOUT / "recipes" / "revisiting"
TASKS = ("rotation", "exemplar", "jigsaw", "relative_patch")
NETWORKS = ("resnet50v1", "resnet50v2", "revnet50", "vgg19")
PATCHES = ("jigsaw", "relative_patch")
ALL = [*itertools.product(TASKS, NETWORKS)]
PAPER = "data.root=/somewhere"


def path(task: str, network: str) -> Path:
    return FOLDER / f"{task}_{network}.yaml"


def written(task: str, network: str) -> dict[str, Any]:
    return yaml.safe_load(path(task, network).read_text())


def without_backbone(recipe: dict[str, Any]) -> dict[str, Any]:
    """What is left of a recipe, its demo section included."""
    demo = {key: value for key, value in recipe["demo"].items() if key != "backbone"}
    return {key: value for key, value in recipe.items() if key != "backbone"} | {"demo": demo}


def load(task: str, network: str, *overrides: str) -> config.Recipe:
    return config.load(path(task, network), [PAPER, *overrides])


def head(task: str, network: str, word: str) -> str:
    """A paragraph of a recipe's head as one line, without its word."""
    lines = path(task, network).read_text().split("\n\n")[0].splitlines()
    text = "\n".join(line.removeprefix("#") for line in lines)
    (found,) = re.findall(rf"^   {word} +((?:.+\n)(?:    .*\n)*)", f"{text}\n", re.MULTILINE)
    return " ".join(found.split())


def test_there_is_one_for_each_task_and_network():
    names = {f"{task}_{network}" for task, network in ALL}

    assert {each.stem for each in FOLDER.glob("*.yaml")} == names
    assert len(names) == 16


@pytest.mark.parametrize("task", TASKS)
def test_recipes_of_a_task_differ_in_the_backbone_alone(task):
    first, *others = (without_backbone(written(task, network)) for network in NETWORKS)

    assert all(each == first for each in others)


@pytest.mark.parametrize("network", NETWORKS)
def test_recipes_of_a_network_differ_in_what_patches_ask_for_alone(network):
    images, patches = {"patch_mode": None}, {"patch_mode": True}
    if network == "vgg19":  # has fully connected layers, and no strides to change
        images, patches = {"image_size": 224}, {"image_size": 64}
    rests = []
    for task in TASKS:
        backbone = written(task, network)["backbone"]
        asked = patches if task in PATCHES else images
        assert {key: backbone.pop(key, None) for key in asked} == asked
        rests.append(backbone)

    assert rests[1:] == rests[:1] * 3
    assert rests[0]["widening"] == 4


@pytest.mark.parametrize("task", TASKS)
def test_only_the_network_and_its_weight_decay_are_not_those_of_the_task_s_own_recipe(task):
    own = yaml.safe_load((CHECKOUT / "recipes" / f"{task}.yaml").read_text())
    here = written(task, "resnet50v1")

    assert here["optim"].pop("decay_norm_and_bias") is False  # K19's code decays kernels alone
    assert here["backbone"].pop("widening") == 4
    assert here.keys() == own.keys()
    assert {key: here[key] for key in here if key != "demo"} == {
        key: own[key] for key in own if key != "demo"
    }


@pytest.mark.parametrize(("task", "network"), ALL)
def test_all_are_trained_as_the_paper_has_it(task, network):
    recipe = load(task, network)
    optim = recipe.optim

    assert (optim.name, optim.momentum, optim.nesterov) == ("sgd", 0.9, False)
    assert (optim.lr, optim.lr_batch, optim.weight_decay) == (0.1, 256, 1e-4)
    assert (optim.schedule, optim.milestones, optim.gamma) == ("multistep", (15, 25), 0.1)
    assert (optim.warmup_epochs, optim.warmup_lr) == (5, 0)
    assert recipe.train.epochs == 35
    assert recipe.train.batch == (1024 if task == "jigsaw" else 512)


@pytest.mark.parametrize(("task", "network"), ALL)
def test_the_head_has_the_numbers_of_table_1(task, network):
    rows: list[list[float]] = []
    for last_relu in ((), ("backbone.last_relu=false",)):
        if last_relu and network in ("resnet50v1", "vgg19"):
            continue  # these have no such option
        cells = [
            k19_table.cell(load(task, network, f"backbone.widening={k}", *last_relu).values)
            for k in (4, 8, 12, 16)
        ]
        accuracies = [k19_table.published(cell) for cell in cells]
        rows.append([each for each in accuracies if each is not None])
    expected = [f"{each:.1f}" for each in itertools.chain(*rows)]

    assert len(rows[0]) in (2, 3, 4)
    assert re.findall(r"\d+\.\d", head(task, network, "numbers")) == expected


@pytest.mark.parametrize(("task", "network"), ALL)
def test_the_head_s_commands_train_and_evaluate_on_the_same_images(task, network):
    name = f"{task}_{network}"

    assert head(task, network, "command") == (
        f"accelerate launch fastssl/train.py recipes/revisiting/{name}.yaml \\ "
        "data.root=/data/imagenet/train backbone.widening=8 "
        f"python -m fastssl.evaluate linear runs/{name} \\ data.root=/data/imagenet"
    )


@functools.cache
def counted(network: str, size: int) -> list[tuple[float, float]]:
    """GMACs of one frame of size x size, and million parameters, at K19's four widths."""
    task = "jigsaw" if size == 64 else "rotation"
    counts = []
    for k in (4, 8, 12, 16):
        part = load(task, network, f"backbone.widening={k}").backbone
        with torch.device("meta"), torch.no_grad():
            backbone = part.module.backbone(part.options).eval()
            with FlopCounterMode(display=False) as counter:
                backbone(torch.empty(1, 3, size, size))
        parameters = sum(each.numel() for each in backbone.parameters())
        counts.append((counter.get_total_flops() / 2e9, parameters / 1e6))  # a MAC is two
    return counts


@pytest.mark.parametrize(("task", "network"), ALL)
def test_the_head_has_the_work_and_the_parameters_of_every_width(task, network):
    frames = {"rotation": 4, "exemplar": 8}.get(task, 9)
    counts = counted(network, 64 if task in PATCHES else 224)
    work, parameters = (
        "{}, {}, {} and {}".format(*(f"{each:.1f}" if each < 10 else f"{each:.0f}" for each in row))
        for row in ([frames * macs for macs, _ in counts], [number for _, number in counts])
    )
    told = head(task, network, "hardware")

    assert told.startswith(f"{work} GMAC an image ({frames} ")
    assert f"at widening 4, 8, 12 and 16, with {parameters} M parameters." in told


@pytest.fixture(scope="module")
def inputs(run_graph, demo_images):
    """From a task to what its graph makes of two images at the paper's sizes."""
    files = sorted((demo_images / "train").glob("*/00000.jpg"))[:2]
    encoded = [file.read_bytes() for file in files]
    made: dict[str, dict[str, Tensor]] = {}

    def of(task: str) -> dict[str, Tensor]:
        if task not in made:
            part = load(task, "resnet50v1").pipeline
            outputs = run_graph(part.module, part.options, encoded)
            tensors = {key: torch.from_numpy(each) for key, each in outputs.items()}
            made[task] = {
                key: each.movedim(-1, -3) if each.dtype == torch.uint8 else each
                for key, each in tensors.items()
            }
            made[task]["index"] = made[task]["index"][:, 0]
        return made[task]

    return of


# Exemplar's views are of the size of rotation's copies, and the patches are the same in both tasks.
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("task", ["rotation", "jigsaw"])
def test_the_network_fits_what_the_paper_trains_and_evaluates_it_on(task, network, inputs):
    recipe = load(task, network)
    evaluation = recipe.evaluation.options
    size = evaluation.crop // 3 if task in PATCHES else evaluation.crop
    with FakeTensorMode() as mode:  # shapes without values: 35 million parameters cost nothing
        backbone = recipe.backbone.module.backbone(recipe.backbone.options)
        objective = recipe.objective.module.Objective(
            backbone,
            recipe.objective.options,
            images=2,
            classes=recipe.pipeline.options.classes,
            labels=None,
            seed=0,
        )
        loss, _ = objective(**{key: mode.from_tensor(each) for key, each in inputs(task).items()})
        loss.backward()
        features = backbone.eval()(torch.empty(2, 3, size, size, dtype=torch.uint8))

    assert loss.ndim == 0
    assert all(each.grad is not None for each in objective.parameters())
    assert features.shape == (2, 2048)
