"""What every graph promises, set as in every recipe: at the paper's sizes and at the demo's."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from fastssl import config

CHECKOUT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (CHECKOUT / "recipes").glob("*.yaml"))
GRAPHS = sorted(
    path.stem
    for path in (CHECKOUT / "pipelines").glob("*.py")
    if "\ndef graph(" in path.read_text()
)
IMAGES = 6


@pytest.fixture(scope="module")
def encoded(demo_images) -> list[bytes]:
    """JPEGs of several sizes and aspects."""
    files = sorted((demo_images / "train").glob("*/00001.jpg"))[:IMAGES]
    return [path.read_bytes() for path in files]


def settings(name: str, demo: bool):
    """The module and options of a recipe's graph."""
    path = CHECKOUT / "recipes" / f"{name}.yaml"
    recipe = config.load(path, () if demo else ("data.root=/somewhere",))
    return recipe.pipeline.module, recipe.pipeline.options


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_there_are_recipes_and_graphs():
    assert "pirl_jigsaw" in RECIPES
    assert "pirl_jigsaw" in GRAPHS


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_is_used_by_a_recipe(name):
    used = {load.pipeline.use for load in map(loaded, RECIPES)} | {"pipelines.evaluation"}

    assert f"pipelines.{name}" in used


def loaded(name: str) -> config.Recipe:
    return config.load(CHECKOUT / "recipes" / f"{name}.yaml")


@pytest.mark.parametrize("name", GRAPHS)
def test_options_tell_the_greatest_size_and_the_number_of_labels(name):
    options = importlib.import_module(f"pipelines.{name}").Options()

    assert options.largest_crop > 0
    assert options.classes >= 0


@pytest.mark.parametrize("demo", [True, False], ids=["demo", "paper"])
@pytest.mark.parametrize("name", RECIPES)
def test_outputs_are_bytes_and_labels_within_their_range(name, demo, run_graph, encoded):
    module, options = settings(name, demo)
    outputs = run_graph(module, options, encoded)

    np.testing.assert_array_equal(outputs["index"], np.arange(IMAGES)[:, None])
    assert {each.dtype for each in outputs.values()} == {np.dtype(np.uint8), np.dtype(np.int64)}
    for each in outputs.values():
        if each.dtype == np.uint8:
            assert each.ndim in (4, 5)  # one image, or F of one size
            assert each.shape[-1] == 3
            assert each.std() > 5  # a picture
    assert ("label" in outputs) == (options.classes > 0)
    if options.classes:
        assert outputs["label"].min() >= 0
        assert outputs["label"].max() < options.classes


@pytest.mark.parametrize("name", RECIPES)
def test_a_seed_repeats_whatever_the_threads_and_another_differs(name, run_graph, encoded):
    module, options = settings(name, True)
    outputs = run_graph(module, options, encoded, runs=2, seed=5, threads=1, prefetch=1)

    assert same(outputs, run_graph(module, options, encoded, runs=2, seed=5, threads=2))
    # ranks have seeds of their own, so this is that ranks differ, too
    assert not same(outputs, run_graph(module, options, encoded, runs=2, seed=6, threads=2))
    first, second = ({k: v[part] for k, v in outputs.items()} for part in (np.s_[:6], np.s_[6:]))
    assert not same(first, second)
