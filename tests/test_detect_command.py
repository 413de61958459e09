"""The command `evaluate.py detect`, whole: it learns, stops, goes on, and counts images once."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from fastssl import (
    checkpoint,
    config,
    evaluate,
    evaluation_task,
    features,
    journal,
    loader,
    trained,
)
from fastssl.evaluations import detect
from pipelines import detection as graph
from pipelines.readers import folder
from tests import toy_voc


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    """VOC2007 with 10 images to train on and 7 to test on."""
    root = tmp_path_factory.mktemp("VOCdevkit")
    toy_voc.make(root, "2007", {"trainval": 10, "test": 7}, side=64)
    return root


@pytest.mark.parametrize("network", ["c4", "fpn"])
def test_the_command_trains_measures_and_measures_again_without_training(
    devkit, tmp_path, network, capfd
):
    anchors = "detect.anchors=[8,16,32,64,128]" if network == "fpn" else "detect.anchors=[16,32]"
    command = ["detect", *toy_voc.SMALL, f"detect.network={network}", anchors, "detect.hidden=16"]
    command += ["detect.pyramid=8", f"data.root={devkit}", f"evaluate.out={tmp_path}"]
    assert evaluate.main(command) == 0
    (out,) = tmp_path.glob(f"detect-{network}-*")
    (line,) = journal.read(tmp_path)
    losses = [each["loss"] for each in journal.read(out)]
    written = checkpoint.latest(out / "checkpoints")
    assert written is not None
    first = written.stat().st_mtime_ns
    capfd.readouterr()
    assert evaluate.main([*command, "detect.test_batch=3"]) == 0
    again = journal.read(tmp_path)[1]

    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    assert (line["probe"], line["images"], line["network"]) == ("detect", 7, network)
    assert {"map", "ap", "ap50", "ap75", "voc_ap", "voc_ap50", "voc_ap75"} <= line.keys()
    assert json.loads((out / "result.json").read_text())["images"] == again["images"] == 7
    assert "step 4/4" not in capfd.readouterr().out
    assert written.stat().st_mtime_ns == first


def test_the_losses_of_two_images_seen_again_and_again_fall_by_half(tmp_path):
    toy_voc.make(tmp_path, "2007", {"trainval": 2, "test": 1}, side=64, seed=2)
    command = [
        "detect",
        *toy_voc.SMALL,
        f"data.root={tmp_path}",
        f"evaluate.out={tmp_path / 'out'}",
    ]
    command += ["detect.batch=2", "detect.short_side=[64]", "detect.flip=0.0", "detect.lr=0.02"]
    command += ["detect.norm=trained", "detect.freeze=0", "detect.steps=40"]
    assert evaluate.main(command) == 0
    (out,) = (tmp_path / "out").glob("detect-c4-*")
    losses = [line["loss"] for line in journal.read(out)]

    assert sum(losses[-5:]) < sum(losses[:5]) / 2


def test_other_images_or_objects_to_learn_from_are_another_training(devkit, tmp_path, capfd):
    root = shutil.copytree(devkit, tmp_path / "VOCdevkit")
    out = tmp_path / "out"
    command = [
        "detect",
        *toy_voc.SMALL,
        "detect.steps=1",
        f"data.root={root}",
        f"evaluate.out={out}",
    ]
    split = root / "VOC2007" / "ImageSets" / "Main" / "trainval.txt"
    annotation = root / "VOC2007" / "Annotations" / "000001.xml"
    stems, objects = split.read_text(), annotation.read_text()
    assert evaluate.main(command) == 0
    split.write_text("".join(stems.splitlines(keepends=True)[:5]))
    assert evaluate.main(command) == 0
    split.write_text(stems)
    annotation.write_text(objects.replace("<difficult>0", "<difficult>1"))
    assert evaluate.main(command) == 0
    capfd.readouterr()
    annotation.write_text(objects)
    assert evaluate.main(command) == 0

    assert len([*out.glob("detect-c4-*")]) == 3
    assert "going on from" in capfd.readouterr().out


def run(devkit: Path, out: Path, say) -> None:
    """The command's work, in the process that a signal is sent to."""
    task = evaluation_task.Task(
        trained=trained.load("random:resnet10", backbone={"width": 16}),
        accelerator=Accelerator(cpu=True),
        reader=config.Part("pipelines.readers.folder", folder, folder.Options(root=str(devkit))),
        demo=False,
        graph=config.Part("pipelines.detection", graph, graph.Options()),
        loading=loader.Options(threads=1),
        features=features.Options(),
        cache=out / "cache",
        out=out,
        seed=0,
        say=say,
    )
    options = detect.Options(
        protocol="voc07",
        steps=4,
        batch=4,
        short_side=(48, 64),
        test_short_side=64,
        anchors=(16, 32),
        regions=8,
        proposals=50,
        lr=0.01,
        log_steps=1,
        norm="trained",
    )
    detect.evaluate(task, options)


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(devkit, tmp_path):
    def stop(text: str) -> None:
        if "step 2/4" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    run(devkit, tmp_path / "whole", print)
    with pytest.raises(SystemExit) as stopped:
        run(devkit, tmp_path / "parts", stop)
    steps = [
        line["step"] for file in (tmp_path / "parts").glob("d*") for line in journal.read(file)
    ]
    run(devkit, tmp_path / "parts", print)
    folders = [next((tmp_path / name).glob("detect-c4-*")) for name in ("whole", "parts")]
    losses = [[line["loss"] for line in journal.read(each)] for each in folders]
    weights = [checkpoint.load(each / "checkpoints" / "step-00000004.pt") for each in folders]

    assert stopped.value.code == 75
    assert steps == [1, 2]
    assert losses[0] == losses[1]
    for name, value in weights[0]["detector"].items():
        assert torch.equal(value, weights[1]["detector"][name]), name


def test_two_processes_test_every_image_once(devkit, tmp_path, checkout, environ):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [
        "fastssl/evaluate.py",
        "detect",
        *toy_voc.SMALL,
        "detect.steps=2",
        "detect.batch=2",
        f"data.root={devkit}",
    ]
    command += [f"evaluate.out={tmp_path}"]
    done = subprocess.run(
        command, cwd=checkout, env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = journal.read(tmp_path)
    (out,) = tmp_path.glob("detect-c4-*")

    assert line["images"] == 7
    assert [each["step"] for each in journal.read(out)] == [1, 2]
    assert done.stdout.count("7 to test on") == 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([], "data.root=VOCdevkit"),
        (["detect.batch=50"], "detect.batch (50) is more than the 10 images"),
        (["detect.norm=sync"], "detect.norm=trained"),
        (["detect.pipeline=pipelines.detecting"], "pipelines.detecting"),
        (["data.limit=3"], "data.limit (3)"),
        (["data.fraction=0.1"], "data.fraction (0.1) can't be used here"),
        (["data.per_class=2"], "data.per_class (2) can't be used here"),
        (["detect.test=2012/test"], "VOC2012"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(devkit, given, named, capfd, tmp_path):
    root = [f"data.root={devkit}"] if given else []
    code = evaluate.main(["detect", *toy_voc.SMALL, *root, f"evaluate.out={tmp_path}", *given])
    told = capfd.readouterr().err

    assert code == 2
    assert told.startswith("error: ")
    assert named in told
    assert len(told.splitlines()) == 1
