"""What every objective promises, on the batches of every recipe's own graph.

The backbone is tiny and the images are the built-in ones; graph and objective are set as in the
recipe's demo section.
"""

import copy
import dataclasses
import importlib
import inspect
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from fastssl import config
from tests import tiny_backbone

CHECKOUT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (CHECKOUT / "recipes").glob("*.yaml"))
OBJECTIVES = sorted(
    path.stem
    for path in (CHECKOUT / "fastssl" / "objectives").glob("*.py")
    if "\nclass Objective(" in path.read_text()
)
IMAGES = 8  # in the listing; a step sees four of them


@pytest.fixture(scope="module")
def inputs(run_graph, demo_images):
    """From a recipe's name to what its graph puts out, as the loader hands it on: IMAGES images."""
    files = sorted(path for path in (demo_images / "train").glob("*/00000.jpg"))[:IMAGES]
    encoded = [path.read_bytes() for path in files]
    made: dict[str, dict[str, Tensor]] = {}

    def of(name: str) -> dict[str, Tensor]:
        if name not in made:
            part = load(name).pipeline
            outputs = run_graph(part.module, part.options, encoded)
            made[name] = {key: as_loaded(torch.from_numpy(each)) for key, each in outputs.items()}
        return made[name]

    return of


def as_loaded(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.uint8:
        return tensor.movedim(-1, -3)
    return tensor.squeeze(1) if tensor.ndim == 2 and tensor.shape[1] == 1 else tensor


def load(name: str) -> config.Recipe:
    return config.load(CHECKOUT / "recipes" / f"{name}.yaml")


def build(name: str) -> Any:  # nn.Module's attributes have no types
    recipe = load(name)
    torch.manual_seed(0)
    return recipe.objective.module.Objective(
        tiny_backbone.backbone(tiny_backbone.Options()),
        recipe.objective.options,
        images=IMAGES,
        classes=recipe.pipeline.options.classes,
        labels=torch.arange(IMAGES) % 3,
        seed=0,
    )


def rows(tensors: dict[str, Tensor], which: list[int] | slice) -> dict[str, Tensor]:
    return {name: tensor[which] for name, tensor in tensors.items()}


def batches(tensors: dict[str, Tensor]) -> itertools.cycle:
    """Four of the images, then the four others, and so on."""
    return itertools.cycle([rows(tensors, slice(4)), rows(tensors, slice(4, 8))])


def trainable(objective: nn.Module) -> list[nn.Parameter]:
    return [each for each in objective.parameters() if each.requires_grad]


def test_there_are_recipes_and_objectives():
    assert "pirl_jigsaw" in RECIPES
    assert "pirl" in OBJECTIVES


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_file_keeps_the_contract(name):
    module = importlib.import_module(f"fastssl.objectives.{name}")
    init = inspect.signature(module.Objective).parameters
    forward = inspect.signature(module.Objective.forward).parameters.values()

    assert module.Options.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(module.Options))
    assert nn.Module in module.Objective.__mro__
    assert list(init) == ["backbone", "options", "images", "classes", "labels", "seed"]
    assert all(init[each].kind == inspect.Parameter.KEYWORD_ONLY for each in list(init)[2:])
    assert all(each.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD for each in forward)
    assert all(each.default in (inspect.Parameter.empty, None) for each in forward)
    assert list(inspect.signature(module.Objective.finish_step).parameters) == ["self"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_recipe(name):
    used = {load(each).objective.use for each in RECIPES}

    assert f"fastssl.objectives.{name}" in used


@pytest.mark.parametrize("name", RECIPES)
def test_the_gradient_reaches_every_parameter_that_asks_for_one(name, inputs):
    objective = build(name)
    stream = batches(inputs(name))
    for _ in range(2):  # what starts at zero hides what lies below it in the first step
        objective.zero_grad()
        loss, _ = objective(**next(stream))
        loss.backward()
        with torch.no_grad():
            for parameter in trainable(objective):
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
        objective.finish_step()
    without = [
        key
        for key, each in objective.named_parameters()
        if each.requires_grad and (each.grad is None or not each.grad.any())
    ]

    assert not without
    assert all(
        each.grad is not None and each.grad.isfinite().all() for each in trainable(objective)
    )


@pytest.mark.parametrize("name", RECIPES)
def test_metrics_hold_the_accuracy_beside_its_chance(name, inputs):
    _, metrics = build(name)(**inputs(name))

    assert {"accuracy", "chance"} <= set(metrics)
    assert all(each.ndim == 0 and not each.requires_grad for each in metrics.values())
    assert 0 < metrics["chance"] <= 1  # 1 while MoCo's queue is empty
    assert 0 <= metrics["accuracy"] <= 1


@pytest.mark.parametrize("name", RECIPES)
def test_bf16_autocast_stays_close_to_float32(name, inputs):
    objective = build(name)
    whole, _ = copy.deepcopy(objective)(**inputs(name))
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = objective(**inputs(name))

    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", RECIPES)
def test_float64_is_float32_with_more_digits(name, inputs):
    objective = build(name)
    single, _ = copy.deepcopy(objective)(**inputs(name))
    double, _ = objective.double()(**inputs(name))

    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_reads_no_value_back_from_the_device(name, inputs):
    # fake tensors have shapes and no values: .item(), nonzero() and masks as indices raise, each of
    # which would wait for a GPU
    objective = build(name)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        objective._apply(mode.from_tensor)
        loss, _ = objective(**{key: mode.from_tensor(each) for key, each in inputs(name).items()})
        loss.backward()
        objective.finish_step()

    assert loss.ndim == 0


def steps(objective: Any, stream: itertools.cycle, count: int) -> list[Tensor]:
    optimizer = torch.optim.SGD(trainable(objective), lr=0.05)
    losses = []
    for _ in range(count):
        loss, _ = objective(**next(stream))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.finish_step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("name", RECIPES)
def test_a_restored_objective_goes_on_with_the_same_losses(name, inputs):
    stream = batches(inputs(name))
    objective = build(name)
    steps(objective, stream, 3)
    file = io.BytesIO()
    torch.save(objective.state_dict(), file)
    generator = torch.get_rng_state()  # dropout's, which a checkpoint holds beside the objective
    unbroken = steps(objective, batches(inputs(name)), 3)
    file.seek(0)
    restored = build(name)
    restored.load_state_dict(torch.load(file, weights_only=True))
    torch.set_rng_state(generator)

    assert steps(restored, batches(inputs(name)), 3) == unbroken
    assert all(loss.isfinite() for loss in unbroken)


# -- two processes ------------------------------------------------------------------------------


def train(objective: Any, model: nn.Module, tensors: dict[str, Tensor], part: slice):
    """Three steps on `part` of every batch of four: losses, and the state at the end.

    The objective comes in float64: in float32 three steps through ReLUs carry the order of a sum
    into the third digit of a small weight, on one machine and not on another. Batch norm uses its
    running statistics and dropout is off: the one sees a process's own images
    (train.sync_batchnorm joins them, on GPUs), the other draws for each process.
    """
    for module in objective.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.SGD(trainable(objective), lr=0.05)
    losses = []
    for batch in itertools.islice(batches(tensors), 3):
        loss, _ = model(**rows(batch, part))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.finish_step()
        losses.append(loss.detach())
    return torch.stack(losses), objective.state_dict()


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for name, tensors in torch.load(f"{folder}/inputs.pt", weights_only=True).items():
        objective = build(name).double()
        model = DistributedDataParallel(objective, broadcast_buffers=False)
        results[name] = train(objective, model, tensors, slice(2 * rank, 2 * rank + 2))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def both(_: int, folder: str) -> None:
    """Imports once, which takes seconds, what two processes need, and forks them."""
    for name in RECIPES:
        load(name)
    importlib.import_module("torch._dynamo")  # of DistributedDataParallel
    start_processes(one_of_two, (folder,), nprocs=2, start_method="fork")


@pytest.fixture(scope="module")
def of_two(inputs, tmp_path_factory) -> list[dict[str, tuple[Tensor, dict[str, Tensor]]]]:
    """For each of two real processes, recipe by recipe, what `train` gave."""
    folder = tmp_path_factory.mktemp("two")
    torch.save({name: inputs(name) for name in RECIPES}, folder / "inputs.pt")
    # Not forked from here: the graphs have left threads.
    start_processes(both, (str(folder),), nprocs=1, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_learn_as_one_with_the_joined_batch(name, inputs, of_two):
    objective = build(name).double()
    loss, state = train(objective, objective, inputs(name), slice(None))
    (loss_0, state_0), (loss_1, state_1) = (each[name] for each in of_two)

    torch.testing.assert_close((loss_0 + loss_1) / 2, loss, rtol=1e-7, atol=1e-9)
    for key, value in state.items():
        torch.testing.assert_close(state_0[key], value, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(state_1[key], value, rtol=1e-7, atol=1e-9)
