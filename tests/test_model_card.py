"""The model card: everything that the next user needs, and nothing of the author's disk."""

import io
import json

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastssl import export_formats, model_card
from fastssl.backbones import resnet
from pipelines import evaluation
from tests.finished_run import RECIPE, a_run


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> str:
    run = tmp_path_factory.mktemp("card") / "rotation-3"
    ours = a_run(run, resnet, resnet.Options(name="resnet10", width=8))
    knn = {"probe": "knn", "neighbours": 20}
    lines = [
        {"step": 0, "accuracy": 0.25, **knn},
        {"step": 10, "loss": 1.0, "lr": 0.1},
        {"step": 160, "accuracy": 0.4325, "accuracy_k200": 0.4, **knn},
        {"step": 160, "probe": "linear", "stage": "layer3", "accuracy": 0.5, "epochs": 28},
        {"step": 160, "probe": "linear", "stage": "layer4", "accuracy": 0.6, "epochs": 28},
        {"step": 160, "probe": "linear", "stage": "layer4", "accuracy": 0.61, "epochs": 28},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = [{"commit": "abc123", "diff": "x", "device": "cpu", "processes": 2, "python": "3.11.7",
             "versions": {"torch": "2.15.0"}, "command": ["/home/me/secret/train.py"]}]  # fmt: skip
    (run / "environment.json").write_text(json.dumps(told))
    folder = export_formats.export_to(ours, "safetensors", None, say=lambda _: None)
    assert folder == run / "exports" / "rotation-3-safetensors"
    for path in folder.iterdir():
        assert b"secret" not in path.read_bytes(), path
        assert str(run.parent).encode() not in path.read_bytes(), path
    return (folder / "README.md").read_text()


def test_a_card_tells_task_data_training_and_origin_and_no_private_paths(card):
    for said in (
        "- rotation\n",
        "# license: for the author to fill in",
        "| data | `flowers/train`",
        "| training | 160 steps of 64 images, 4 epochs planned, sgd, learning rate 0.1 (at 256",
        "commit abc123 with changes of its own",
        "2 process(es), Python 3.11.7, torch 2.15.0",
        "differ by at most",
    ):
        assert said in card


def test_a_card_has_the_last_number_of_each_probe_depth_and_settings(card):
    rows = [line for line in card.splitlines() if line.startswith(("| knn", "| linear"))]

    assert rows == [
        "| knn | 160 | accuracy 43.2%, accuracy_k200 40.0% | neighbours 20 |",
        "| linear | 160 | accuracy 50.0% | stage layer3, epochs 28 |",
        "| linear | 160 | accuracy 61.0% | stage layer4, epochs 28 |",
    ]


def test_results_are_no_settings_and_the_last_of_several_measurements_holds(tmp_path):
    ours = a_run(tmp_path / "run", resnet, resnet.Options(name="resnet10", width=8))
    linear = {"step": 5, "probe": "linear", "stage": "pool", "protocol": "lbfgs"}
    lines = [
        linear | {"accuracy": 0.5, "top5": 0.8, "features": {"pool": "max"}},
        {"step": 5, "probe": "detect", "map": 0.8, "network": "c4", "ap": 0.5, "ap50": 0.8,
         "ap75": 0.55, "voc_ap": 0.51, "voc_ap50": 0.81, "folder": "/home/me/x/detect"},
        {"step": 5, "probe": "spectrum", "stage": "pool", "effective_rank": 3.2,
         "participation_ratio": 2.0, "dead_dimensions": 0, "dimensions": 9, "mean_std": 0.1},
        {"step": 5, "probe": "invariance", "functions": "heads", "mean": 1.1, "variance": 0.1,
         "other_mean": 1.4, "mean_over_other_mean": 0.8, "n": 10},
        linear | {"accuracy": 0.6, "top5": 0.9, "features": {"pool": "max"}},
        linear | {"accuracy": 0.7, "top5": 1.0, "features": {"pool": "avg"}},
        {"step": 5, "probe": "val", "accuracy": 0.25, "accuracies": [0.2, 0.3]},
    ]  # fmt: skip
    texts = [json.dumps(line) for line in lines]
    texts[1:1] = ['{"step": 5, "pro', ""]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(texts))
    card = card_of(ours)
    rows = [line for line in card.splitlines() if line.count("|") == 5][2:]

    assert rows == [
        "| linear | 5 | accuracy 60.0%, top5 90.0% | stage pool, protocol lbfgs, "
        "features {'pool': 'max'} |",
        "| linear | 5 | accuracy 70.0%, top5 100.0% | stage pool, protocol lbfgs, "
        "features {'pool': 'avg'} |",
        "| detect | 5 | map 80.0%, ap 50.0%, ap50 80.0%, ap75 55.0%, voc_ap 51.0%, voc_ap50 81.0% "
        "| network c4, folder detect |",
        "| spectrum | 5 | effective_rank 3.2, participation_ratio 2, dead_dimensions 0, "
        "mean_std 0.1 | stage pool, dimensions 9 |",
        "| invariance | 5 | mean 1.1, variance 0.1, other_mean 1.4, mean_over_other_mean 0.8 "
        "| functions heads, n 10 |",
        "| val | 5 | accuracy 25.0%, accuracies [20.0%, 30.0%] |  |",
    ]
    assert "2 of 9 lines of metrics.jsonl were damaged: left out." in card


def card_of(ours) -> str:
    compared = model_card.Compared(8, ((8, 3, 64, 64),), 0.0, 1.0, 1e-4)
    return model_card.text(ours, "safetensors", files={}, compared=compared, code="", notes=())


def test_a_run_without_measurements_says_so(tmp_path):
    ours = a_run(tmp_path / "run", resnet, resnet.Options(name="resnet10", width=8))

    assert "## Measured\n\nNothing was measured.\n" in card_of(ours)


def test_the_cards_code_prepares_an_image_as_our_pipeline_does(
    card, demo_images, run_graph, tmp_path, monkeypatch
):
    code = card.split("```python\n")[1].split("```")[0]
    photo = sorted((demo_images / "val").glob("*/*.jpg"))[11].read_bytes()
    sideways = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # stands on its side
    Image.open(io.BytesIO(photo)).save(sideways, "JPEG", quality=95, exif=exif)

    for encoded in (photo, sideways.getvalue()):
        (tmp_path / "image.jpg").write_bytes(encoded)
        monkeypatch.chdir(tmp_path)
        names: dict = {}
        exec(compile(code, "card", "exec"), names)
        ours = run_graph(evaluation, evaluation.Options(resize=72, crop=64), [encoded])["image"]
        theirs = names["prepare"]("image.jpg").permute(1, 2, 0).numpy()
        assert names["batch"].shape == (1, 3, 64, 64)
        assert abs(ours[0].astype(int) - theirs).mean() < 1.0
        as_floats = names["normalized"](names["prepare"]("image.jpg"))
        wanted = v2.Normalize(resnet.MEAN, resnet.STD)(names["prepare"]("image.jpg") / 255)
        torch.testing.assert_close(as_floats, wanted)


def test_paths_become_the_names_of_their_folders():
    assert model_card.without_paths(RECIPE) == {
        "data": {"use": "pipelines.readers.folder", "root": "flowers/train"},
        "objective": {"use": "fastssl.objectives.rotation"},
        "optim": {"name": "sgd", "lr": 0.1, "lr_batch": 256},
        "train": {"batch": 64, "epochs": 4, "seed": 3, "out": "one"},
        "probe": {"root": "flowers", "neighbours": [20, 200]},
    }
