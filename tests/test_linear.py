"""The command `linear`: every depth, real JPEGs through real graphs, journal, refusals."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from fastssl import evaluate, features, loader, trained
from fastssl.config import Part
from fastssl.evaluation_task import Task
from fastssl.evaluations import linear
from fastssl.linear.protocols import POOLING, PROTOCOLS
from pipelines import evaluation, evaluation_patches
from pipelines.readers import folder

TRAIN, VAL = 60, 23  # images a split: 3 classes of 20, and 12, 11 and 0: nothing divides
STAGES = ["stem", "layer1", "layer2", "layer3", "layer4", "pool"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, demo_images) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, counts in (("train", (20, 20, 20)), ("val", (12, 11, 0))):
        classes = sorted((demo_images / split).iterdir())[:3]
        for images, count in zip(classes, counts, strict=True):
            for file in sorted(images.iterdir())[:count]:
                (root / split / images.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, root / split / images.name)
    return root


@pytest.fixture(scope="module")
def backbone() -> trained.Trained:
    return trained.load("random:resnet10", backbone={"width": 4})


@pytest.fixture
def task(data, backbone, tmp_path_factory, tmp_path) -> Task:
    said: list[str] = []
    graph = Part("pipelines.evaluation", evaluation, evaluation.Options(resize=36, crop=32))
    return Task(
        trained=backbone,
        accelerator=Accelerator(cpu=True),
        reader=Part("pipelines.readers.folder", folder, folder.Options(root=str(data))),
        demo=False,
        graph=graph,
        loading=loader.Options(threads=1),
        features=features.Options(size=256, cache=str(tmp_path_factory.getbasetemp() / "features")),
        cache=data / "cache",
        out=tmp_path / "out",
        seed=0,
        say=said.append,
    )


def lines(task: Task) -> list[dict]:
    text = (task.out / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_every_depth_has_a_column_and_a_line_with_its_settings(task):
    table = linear.evaluate(task, linear.Options(updates=30, standardize=True))
    found = lines(task)

    assert table.columns == [*STAGES, "best"]
    assert [line["stage"] for line in found] == STAGES
    assert table.rows == [[*[line["accuracy"] for line in found], table.rows[0][-1]]]
    best = max(found, key=lambda line: line["accuracy"])
    assert table.rows[0][-1] == best["stage"]
    for line in found:
        assert line["probe"] == "linear"
        assert (line["protocol"], line["solver"]) == ("lbfgs", "lbfgs")
        assert (line["features_pool"], line["features_size"]) == ("max", 256)
        assert (line["train_images"], line["val_images"], line["classes"]) == (TRAIN, VAL, 3)
        assert (VAL * line["accuracy"]) == pytest.approx(round(VAL * line["accuracy"]))
        assert line["top5"] == 1.0  # of three classes
        assert line["updates_done"] <= line["updates"] == 30
    widths = task.extract(task.splits()[1]).stages
    assert [line["l2"] for line in found] == [100 / (3 * widths[name].shape[1]) for name in STAGES]
    assert not any("l2_given" in line for line in found)


def test_training_images_as_val_are_learnt_and_missing_classes_count_for_nothing(task):
    # Without a penalty 60 images are told apart by 256 features; val lacks the third class.
    train, val, classes = task.splits()
    task._splits = (train, replace(train, name="val"), classes)
    options = linear.Options(l2=0.0, updates=300)
    assert linear.evaluate(task, options).rows[0][0] == 1.0

    task._splits = (train, val, classes)
    linear.evaluate(task, options)
    line = lines(task)[-1]
    predicted = round(VAL * line["accuracy"])
    assert (
        line["l2"] == line["l2_given"] == 0.0
    )  # told from a default that is another at each stage
    assert 0 < predicted <= VAL
    assert set(val.labels) == {0, 1}


@pytest.mark.parametrize("protocol", ["goyal", "k19", "pirl", "mlp"])
def test_each_protocol_trains_on_cached_features_with_its_spread_over_seeds(task, protocol):
    task.features = replace(task.features, stages=("layer4", "pool"))
    options = linear.Options(
        protocol=protocol, epochs=3, batch=16, augment="none", seeds=(0, 1), standardize=True
    )
    table = linear.evaluate(task, options)
    found = lines(task)

    assert [line["stage"] for line in found] == ["layer4", "pool"]
    for line, cell in zip(found, table.rows[0], strict=False):
        assert line["accuracy"] == pytest.approx(np.mean(line["accuracies"]))
        assert line["spread"] == pytest.approx(np.std(line["accuracies"], ddof=1))
        assert (line["protocol"], line["solver"], line["epochs"]) == (protocol, "sgd", 3)
        assert line["seeds"] == [0, 1]
        assert cell == f"{100 * line['accuracy']:.1f} +- {100 * line['spread']:.1f}"


@pytest.mark.parametrize(
    ("protocol", "given", "expected"),
    [
        ("lbfgs", {}, ("max", 9000)),
        ("pirl", {}, ("avg", 9216)),
        ("lbfgs", {"pool": "avg"}, ("avg", 9000)),
        ("pirl", {"size": 100}, ("avg", 100)),
    ],
)
def test_maps_are_pooled_as_the_protocol_says_but_for_what_is_given(
    task, tmp_path, protocol, given, expected
):
    cache = str(tmp_path / "features")
    task.features = features.Options(stages=("layer4",), cache=cache, **given)
    sgd: dict[str, Any] = {"updates": 2}
    if protocol == "pirl":
        sgd = {"epochs": 1, "batch": 16, "augment": "none"}
    linear.evaluate(task, linear.Options(protocol=protocol, **sgd))
    (line,) = lines(task)
    extracted = [json.loads(each.read_text()) for each in Path(cache).glob("*/features.json")]

    assert (line["features_pool"], line["features_size"]) == expected
    assert len(extracted) == 2
    assert {(each["about"]["pool"], each["about"]["size"]) for each in extracted} == {expected}


def test_every_protocol_says_how_it_pools():
    k19 = {"lbfgs", "k19", "k19_long", "mlp"}

    assert {name for name, pooling in POOLING.items() if pooling == ("max", 9000)} == k19
    assert POOLING.keys() == PROTOCOLS.keys()
    assert POOLING["goyal"] == POOLING["vissl"] == POOLING["pirl"] == ("avg", 9216)


@pytest.mark.parametrize("protocol", ["goyal", "vissl", "pirl"])
def test_vissl_s_protocols_crop_as_in_training_and_flip_but_leave_colours_alone(task, protocol):
    graph = linear.augmenting(task, PROTOCOLS[protocol])

    assert graph is not None
    assert graph.use == "pipelines.single_view"
    assert graph.options.image_size == 32  # the crop of the evaluation graph
    assert (graph.options.image_area, graph.options.flip) == ((0.08, 1.0), 0.5)
    colours = ("brightness", "contrast", "saturation", "hue", "grayscale")
    assert [vars(graph.options)[each] for each in colours] == [0.0] * 5


@pytest.mark.parametrize("protocol", ["k19", "k19_long"])
def test_k19_crops_at_random_without_a_flip_and_says_where_there_is_no_margin(task, protocol):
    said: list[str] = []
    task.say = said.append
    graph = linear.augmenting(task, PROTOCOLS[protocol])

    assert graph is not None
    assert graph.use == "pipelines.random_crop"
    assert asdict(graph.options) == {"resize": 36, "crop": 32, "flip": 0.0}
    assert said == []
    whole = evaluation.Options(resize=56, crop=56)
    task.graph = Part("pipelines.evaluation", evaluation, whole)
    linear.augmenting(task, PROTOCOLS[protocol])
    assert len(said) == 1
    assert "random_crop has no margin" in said[0]
    assert said[0].endswith("evaluation.resize=64")
    bicubic = evaluation.Options(resize=36, crop=32, interpolation="bicubic")
    task.graph = Part("pipelines.evaluation", evaluation, bicubic)
    linear.augmenting(task, PROTOCOLS[protocol])
    assert "training images bilinear, those tested on are bicubic" in said[-1]
    assert linear.augmenting(task, PROTOCOLS["mlp"]) is None


@pytest.mark.parametrize("augment", ["crop", "random_crop"])
def test_augmented_images_train_heads_at_every_depth_in_one_pass(task, augment):
    # Training images are those to classify too: what was learnt is far above chance, a third.
    train, _, classes = task.splits()
    task._splits = (train, replace(train, name="val"), classes)
    before = {name: value.clone() for name, value in task.trained.backbone.state_dict().items()}
    options = linear.Options(
        protocol="goyal", epochs=4, batch=16, augment=augment, lr=0.5, milestones=()
    )
    said: list[str] = []
    task.say = said.append
    linear.evaluate(task, options)
    losses = [float(line.split("stages ")[1].split(",")[0]) for line in said if "epoch " in line]

    assert [line["stage"] for line in lines(task)] == STAGES
    assert lines(task)[0]["train_images"] == TRAIN
    assert max(line["accuracy"] for line in lines(task)) > 0.6
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert any("4 passes of the backbone over the images" in line for line in said)
    after = task.trained.backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    # The training split's features were never taken from the middle crop.
    assert not [line for line in said if line.startswith("features: train")]


def test_what_cannot_be_is_refused_before_features_are_extracted(task, tmp_path):
    task.features = replace(task.features, cache=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"batch \(256\) is more than the 60 .*linear.batch=32"):
        linear.evaluate(task, linear.Options(protocol="goyal"))
    task.graph = Part(
        "pipelines.evaluation_patches", evaluation_patches, evaluation_patches.Options()
    )
    with pytest.raises(
        ValueError, match=r"evaluated by pipelines.evaluation_patches.*augment=none"
    ):
        linear.evaluate(task, linear.Options(protocol="goyal", batch=16))

    assert not (tmp_path / "nothing").exists()


def test_lbfgs_says_what_it_reads_and_refuses_more_memory_than_it_is_given(task):
    said: list[str] = []
    task.say = said.append
    linear.evaluate(task, linear.Options(updates=2))
    assert any("at most 2 updates a stage" in line for line in said)
    assert any("stem: 60 x 256: 6.14e-05 GB a pass, read once" in line for line in said)
    assert any("stopped by linear.updates after 2 updates" in line for line in said)
    with pytest.raises(ValueError, match=r"stem .*needs 0.0\d+ GB .*linear.memory_gb is 0.001: .*"):
        linear.evaluate(task, linear.Options(memory_gb=0.001))


def test_mistakes_on_the_command_line_are_one_line_and_exit_code_2(data, capsys):
    for argument, message in (
        ("linear.epoch=3", "did you mean 'epochs'"),
        ("linear.epochs=3", "not read with protocol lbfgs"),
        ("linear.protocol=goyl", "goyal"),
    ):
        assert evaluate.main(["linear", "random:resnet10", f"data.root={data}", argument]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert message in told
        assert "Traceback" not in told
