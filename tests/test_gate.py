"""The gate lets through who does the task, and nobody who does something like it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import contenders, gate, promises
from benchmarks.plain import pil, tuned
from fastssl.loader import Options
from pipelines import colorization
from tests import test_graphs

RECIPES = test_graphs.RECIPES
PIPELINES = {name: test_graphs.loaded(name).pipeline for name in RECIPES}  # at the demos' sizes
# Of recipes with the same graph, one that makes images gray: more can go wrong with it.
OPTIONS: dict[str, Any] = {
    part.use: part.options
    for part in sorted(
        reversed(PIPELINES.values()), key=lambda part: vars(part.options).get("grayscale", 0)
    )
}
GRAPHS = sorted(OPTIONS)
STRENGTHS = ("brightness", "contrast", "saturation", "hue")
MADE: dict[tuple[str, str, int, str], dict[str, Tensor]] = {}
IMAGES = 32  # half of the gate's own: what is sabotaged here is so in half of the cases or more

Batch = dict[str, Tensor]


def frames_of(graph: str) -> tuple[promises.Frames, ...]:
    return promises.of(graph, OPTIONS[graph]).frames


def plain(graph: str) -> Callable[[Any, Any], Batch]:
    """Pil, whose batches are kept: the gate's images are always the same."""
    make = contenders.plain_make(graph, pil)

    def kept(paths, options) -> Batch:
        folder = Path(paths[0]).parent.name  # of images with waves, the output's name
        key = (graph, repr(options), len(paths), "" if folder.startswith("tmp") else folder)
        if key not in MADE:
            MADE[key] = dict(make(paths, options))
        return MADE[key]

    return kept


def test_what_is_checked_of_every_recipe_is_written_down():
    assert "pipelines.pirl_jigsaw" in GRAPHS
    assert all(frames_of(graph) for graph in GRAPHS)


@pytest.mark.parametrize("name", RECIPES)
def test_the_graph_of_every_recipe_passes(name):
    part = PIPELINES[name]
    task = contenders.Task(
        recipe=name,
        graph=part.use,
        module=part.module,
        options=part.options,
        files=None,  # pyright: ignore[reportArgumentType]  the gate brings its own
        batch=1,
        loading=Options(threads=1),
        device=torch.device("cpu"),
    )
    make = contenders.fastssl_make(task)
    gate.check("fastssl", part.use, part.options, make, images=IMAGES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_plain_version_of_every_recipe_passes(name):
    part = PIPELINES[name]
    gate.check("pil", part.use, part.options, plain(part.use), images=IMAGES)


# -- saboteurs ----------------------------------------------------------------------------------


def refused(
    graph: str,
    match: str,
    change: Callable[[Batch], Batch] = lambda batch: batch,
    options: Any = None,
    images: int = IMAGES,
    **asked: Any,
) -> None:
    """The gate refuses pil with a batch changed afterwards, or with other options than asked."""
    make = plain(graph)

    def saboteur(paths, options):
        return change(dict(make(paths, replace(options, **asked))))

    with pytest.raises(gate.UnfitError, match=match) as caught:
        gate.check("saboteur", graph, options or OPTIONS[graph], saboteur, images=images)
    assert str(caught.value).startswith(f"saboteur does not do the task of {graph}: ")


@pytest.mark.parametrize("graph", GRAPHS)
def test_an_image_that_is_not_that_of_its_index_is_noticed(graph):
    refused(
        graph,
        "rows shows another image than index says",
        lambda batch: batch | {"index": batch["index"].roll(1)},
    )


LABELS = {
    ("pipelines.pirl_jigsaw", "permutation"): "permutation is not the order",
    ("pipelines.pirl_jigsaw_rotation", "permutation"): "permutation is not the order",
    ("pipelines.pirl_jigsaw_rotation", "angle"): "angle is not how patches is turned in 100%",
    ("pipelines.pirl_rotation", "angle"): "angle is not how turned is turned in 100%",
    ("pipelines.rotation", "angle"): "angle is not how turned is turned in 100%",
    ("pipelines.rotation", "label"): "label is not that of angle in 100%",
    ("pipelines.jigsaw", "permutation"): "permutation is not the order of the patches in 100%",
    ("pipelines.jigsaw", "order"): "label is not the order of the patches in 100%",
    ("pipelines.jigsaw", "label"): "label is not the order of the patches in 100%",
    ("pipelines.relative_patch", "label"): "label is not where the patch lies in 100%",
    ("pipelines.relative_patch", "pair"): "label is not where the patch lies in 100%",
}


def test_every_label_has_its_saboteur():
    found = set()
    for graph in GRAPHS:
        pixels = {frames.name for frames in frames_of(graph)}
        outputs = promises.of(graph, OPTIONS[graph]).shapes.keys()
        found |= {(graph, name) for name in outputs - pixels - {"index"}}

    assert found == set(LABELS)


@pytest.mark.parametrize(("graph", "label"), LABELS)
def test_a_wrong_label_is_noticed(graph, label):
    def wrong(batch: Batch) -> Batch:
        if label == "angle":
            return batch | {label: (batch[label] + 90) % 360}
        if label == "label":
            return batch | {label: (batch[label] + 1) % OPTIONS[graph].classes}
        return batch | {label: batch[label].roll(1, dims=-1)}

    refused(graph, LABELS[graph, label], wrong)


@pytest.mark.parametrize("graph", ["pipelines.pirl_jigsaw", "pipelines.pirl_jigsaw_rotation"])
def test_an_order_that_is_always_the_same_is_noticed(graph):
    refused(graph, "permutation is always the same", permutations=1)


def test_orders_of_another_set_are_noticed():
    asked = replace(OPTIONS["pipelines.pirl_jigsaw"], permutations=10)

    refused("pipelines.pirl_jigsaw", "not of the set of orders", options=asked, permutations=None)
    refused("pipelines.jigsaw", "label is not the order", distance="min")


@pytest.mark.parametrize("graph", GRAPHS)
def test_flips_that_are_missing_or_not_asked_for_are_noticed(graph):
    flip = 0.0 if OPTIONS[graph].flip else 0.5

    refused(graph, "is mirrored in .* cases, where flip is", flip=flip)


@pytest.mark.parametrize("graph", ["pipelines.rotation", "pipelines.jigsaw"])
def test_a_frame_that_is_mirrored_beside_others_that_are_not_is_noticed(graph):
    name = frames_of(graph)[0].name

    def mirrored(batch: Batch) -> Batch:
        frames = batch[name].clone()
        frames[7, 0] = frames[7, 0].flip(-1)
        return batch | {name: frames}

    refused(graph, f"some {name} of an image are mirrored and some are not", mirrored)


@pytest.mark.parametrize("graph", [g for g in GRAPHS if g != "pipelines.colorization"])
def test_gray_that_is_missing_or_not_asked_for_is_noticed(graph):
    grayscale = 0.0 if OPTIONS[graph].grayscale else 0.5
    color_blind = replace(OPTIONS[graph], grayscale=0.5 - grayscale)

    refused(graph, "is gray in .* cases, where gray", options=color_blind, grayscale=grayscale)


@pytest.mark.parametrize("graph", [g for g in GRAPHS if "brightness" in vars(OPTIONS[g])])
def test_colours_that_do_not_change_or_should_not_are_noticed(graph):
    still: dict[str, Any] = dict.fromkeys(STRENGTHS, 0.0)
    strong: dict[str, Any] = {**still, "brightness": 0.5, "saturation": 0.5}
    if graph == "pipelines.exemplar":
        still |= {"powers": (1.0, 1.0), "factors": (1.0, 1.0), "components": (1.0, 1.0)}
        strong, still = strong | {"offsets": 0.0}, still | {"offsets": 0.0}
    # colours are first looked at with all of them off: so the saboteur forgets, or adds his own
    refused(
        graph, "colours of .* do not change", options=replace(OPTIONS[graph], **strong), **still
    )
    quiet = replace(OPTIONS[graph], **still, grayscale=0.0)
    refused(graph, "another image|the colours of .* change", options=quiet, **strong)


CROPS = [
    ("single_view", "npid_plus", {"image_area": (0.65, 0.65)}),
    ("single_view", "npid_plus", {"image_area": (0.02, 1.0)}),
    ("single_view", "npid_plus", {"image_area": (0.9, 1.0)}),
    ("single_view", "npid_plus", {"image_aspect": (0.4, 2.5)}),
    ("two_views", "moco_v2", {"image_area": (0.65, 0.65)}),
    ("pirl_rotation", "pirl_rotation", {"image_area": (0.65, 0.65)}),
    ("pirl_jigsaw", "pirl_jigsaw", {"image_area": (0.65, 0.65)}),
    ("pirl_jigsaw", "pirl_jigsaw", {"patches_area": (0.3, 0.5)}),
    ("pirl_jigsaw_rotation", "pirl_jigsaw_rotation", {"patches_area": (0.65, 0.65)}),
    ("rotation", "rotation", {"image_area": (0.65, 0.65)}),
    ("exemplar", "exemplar", {"area": (0.65, 0.65)}),
]


@pytest.mark.parametrize(("graph", "name", "asked"), CROPS)
def test_crops_of_another_range_are_noticed(graph, name, asked):
    options = PIPELINES[name].options
    images = (
        gate.IMAGES if asked.get("image_area") == (0.02, 1.0) else IMAGES
    )  # a rare one shows it
    refused(f"pipelines.{graph}", "shows", options=options, images=images, **asked)


@pytest.mark.parametrize(
    ("graph", "asked", "match"),
    [
        ("pipelines.jigsaw", {"resize": 120}, "patches shows up to .* more or less of an image"),
        ("pipelines.jigsaw", {"keep_aspect": True}, "patches shows up to .* more or less"),
        ("pipelines.relative_patch", {"resize": 120}, "patches shows up to .* more or less"),
    ],
)
def test_squares_of_another_size_are_noticed(graph, asked, match):
    refused(graph, match, **asked)


def test_a_crop_of_another_kind_is_noticed():
    whole = colorization.Options(image_size=32, resize=48)

    refused("pipelines.colorization", "image shows up to", options=whole, crop="inception")


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"scale": (1.0, 1.0)}, "scale of views is .* not -0.36 ... 0.34"),
        ({"rotation": 0.0}, "rotation of views is"),
        ({"rotation": 60.0}, "rotation of views is"),
        ({"translation": 0.0}, "translation of views is"),
    ],
)
def test_warps_of_another_range_are_noticed(asked, match):
    refused("pipelines.exemplar", match, options=PIPELINES["exemplar_classes"].options, **asked)


@pytest.mark.parametrize(
    ("graph", "one", "other"),
    [("pipelines.two_views", "query", "key"), ("pipelines.pirl_rotation", "image", "turned")],
)
def test_two_views_that_are_one_are_noticed(graph, one, other):
    def same(batch: Batch) -> Batch:
        return (
            batch
            | {other: batch[one]}
            | ({"angle": 0 * batch["angle"]} if other == "turned" else {})
        )

    refused(graph, "are of the same part of an image|takes 1 values only", same)


BLURRED = replace(OPTIONS["pipelines.two_views"], blur=0.5, blur_sigma=(0.1, 2.0))


@pytest.mark.parametrize("size", [48, 224])
def test_a_graph_that_blurs_passes(size):
    options = replace(BLURRED, image_size=size)
    part = PIPELINES["moco_v2"]
    task = contenders.Task(
        recipe="moco_v2",
        graph=part.use,
        module=part.module,
        options=options,
        files=None,  # pyright: ignore[reportArgumentType]  the gate brings its own
        batch=1,
        loading=Options(threads=1),
        device=torch.device("cpu"),
    )
    for make in (
        contenders.fastssl_make(task),
        contenders.plain_make(part.use, pil),
        contenders.plain_make(part.use, tuned),
    ):
        gate.check("honest", part.use, options, make, images=IMAGES)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"blur": 0.0}, "query is blurred by 0.5 pixels or more in 0 of 32 cases, where blur"),
        ({"blur": 1.0}, "query is blurred by 0.5 pixels or more in .* of 64 cases, where blur"),
        ({"blur_sigma": (0.1, 0.4)}, "query is blurred by .* in 0 of 32 cases"),
        ({"blur_sigma": (3.0, 3.5)}, "query is blurred by up to .* pixels, not 0.1 ... 2"),
        ({"blur": 0.4, "blur_sigma": (1.0, 1.0)}, "is always blurred by about 1.0 pixels"),
    ],
)
def test_blur_that_is_missing_or_of_other_widths_is_noticed(asked, match):
    images = (
        gate.IMAGES if asked.get("blur") == 1 else IMAGES
    )  # one in two is hard to tell from all
    refused("pipelines.two_views", match, options=BLURRED, images=images, **asked)


def test_blur_that_was_not_asked_for_is_noticed():
    sharp = replace(BLURRED, blur=0.0)

    refused("pipelines.two_views", "query is blurred", options=sharp, blur=0.5)


@pytest.mark.parametrize("graph", GRAPHS)
def test_outputs_of_another_name_type_or_shape_are_noticed(graph):
    name = frames_of(graph)[0].name

    refused(graph, "it puts out", lambda batch: batch | {"extra": batch["index"]})
    refused(graph, f"{name} is torch.float32", lambda batch: batch | {name: batch[name].float()})
    refused(
        graph,
        rf"{name} is torch.uint8 \[.*\], not torch.uint8 \[",
        lambda batch: batch | {name: batch[name][..., :-1]},
    )


def test_a_graph_that_nobody_described_is_refused():
    with pytest.raises(ValueError, match=r"tests.odd_task: nobody has written down what can be"):
        gate.check("pil", "tests.odd_task", OPTIONS[GRAPHS[0]], plain("tests.odd_task"))
