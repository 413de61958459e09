"""What every graph promises, set as in every recipe: at the paper's sizes and at the demo's."""

import dataclasses
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
def test_every_graph_is_used_by_a_recipe_or_by_an_evaluation(name):
    recipes = [*map(loaded, RECIPES)]
    used = {recipe.pipeline.use for recipe in recipes}
    used |= {recipe.evaluation.use for recipe in recipes}
    used |= {"pipelines.detection", "pipelines.random_crop"}  # evaluations/detect.py and linear.py

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


# -- colours ------------------------------------------------------------------------------------

STRENGTHS = ("brightness", "contrast", "saturation", "hue", "grayscale")
COLOR = (150, 100, 60)


def colored() -> list[str]:
    """Recipes, one for each graph whose options change colours."""
    found = {}
    for name in RECIPES:
        part = loaded(name).pipeline
        if {*STRENGTHS} <= {field.name for field in dataclasses.fields(part.options)}:
            found.setdefault(part.use, name)
    return sorted(found.values())


def still(options, **strengths):
    """The options with no change of colour but the given ones."""
    known = {field.name: field.default for field in dataclasses.fields(options)}
    off = dict.fromkeys(STRENGTHS, 0.0) | {"powers": (1.0, 1.0), "components": (1.0, 1.0)}
    off |= {"factors": (1.0, 1.0), "offsets": 0.0, "jitter": 1.0}
    off = {name: value for name, value in off.items() if name in known}
    return dataclasses.replace(options, **(off | strengths))


def flat(run_graph, png_of, name, **strengths) -> dict[str, np.ndarray]:
    """The mean colour of every output image [..., 3], made from images of one colour."""
    part = loaded(name).pipeline
    png = png_of(np.full((64, 64, 3), COLOR, np.uint8))
    outputs = run_graph(part.module, still(part.options, **strengths), [png] * 32, runs=2)
    images = {key: each for key, each in outputs.items() if each.dtype == np.uint8}
    for each in images.values():
        assert (each == each[..., :1, :1, :]).all()  # still of one colour
    return {key: each[..., 0, 0, :].astype(float) for key, each in images.items()}


def test_there_are_graphs_that_change_colours():
    assert {"pirl_jigsaw", "rotation", "exemplar"} <= set(colored())


@pytest.mark.parametrize("name", colored())
def test_without_strengths_no_colour_changes(name, run_graph, png_of):
    for each in flat(run_graph, png_of, name).values():
        assert abs(each - COLOR).max() <= 1


@pytest.mark.parametrize("name", colored())
def test_brightness_is_a_factor_in_its_range(name, run_graph, png_of):
    for key, each in flat(run_graph, png_of, name, brightness=0.4).items():
        factor = each / COLOR
        assert 0.58 < factor.min() < 0.7 < 1.3 < factor.max() < 1.42, key
        assert np.ptp(factor, axis=-1).max() < 0.03  # the same for the three colours


@pytest.mark.parametrize("name", colored())
def test_contrast_pivots_on_mid_gray(name, run_graph, png_of):
    for key, each in flat(run_graph, png_of, name, contrast=0.4).items():
        factor = (each[..., 2] - 128) / (COLOR[2] - 128)
        assert 0.57 < factor.min() < 0.7 < 1.3 < factor.max() < 1.43, key


@pytest.mark.parametrize("name", colored())
def test_saturation_and_hue_change_colours_and_not_lightness_alone(name, run_graph, png_of):
    luma = np.array([0.299, 0.587, 0.114])
    for strength in ({"saturation": 0.5}, {"hue": 0.3}):
        for key, each in flat(run_graph, png_of, name, **strength).items():
            assert abs(each @ luma - COLOR @ luma).max() < 12, key
            assert (each - each.mean(axis=-1, keepdims=True)).std(axis=tuple(range(each.ndim - 1)))[
                0
            ] > 4, key


@pytest.mark.parametrize("name", colored())
def test_grayscale_has_its_probability_and_leaves_no_colour(name, run_graph, png_of):
    for key, each in flat(run_graph, png_of, name, grayscale=0.5).items():
        gray = np.ptp(each, axis=-1) == 0
        assert 0.25 < gray.mean() < 0.75, key
        assert abs(each[~gray] - COLOR).max() <= 1, key


@pytest.mark.parametrize("name", colored())
def test_patches_and_views_draw_their_own_colours_and_turned_copies_share_them(
    name, run_graph, png_of
):
    shared = {"rotation": {"turned"}}.get(name, set())
    for key, each in flat(run_graph, png_of, name, brightness=0.4).items():
        if each.ndim == 3:  # F frames of an image
            spread = np.ptp(each[..., 0], axis=1)
            assert (spread == 0).all() if key in shared else (spread > 2).mean() > 0.9, key
