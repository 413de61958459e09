"""Few labels by the command line: linear and fine-tuned, on images drawn of each class."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from fastssl import evaluate, journal, train
from fastssl.evaluations import fewlabels
from pipelines.readers import folder

TRAIN, VAL = 12, 4  # images of each of four classes


@pytest.fixture(scope="module")
def data(tmp_path_factory, demo_images) -> Path:
    root = tmp_path_factory.mktemp("data")
    for source in sorted((demo_images / "train").iterdir())[:4]:
        for split, each in (("train", TRAIN), ("val", VAL)):
            (root / split / source.name).mkdir(parents=True)
            for file in sorted((demo_images / split / source.name).iterdir())[:each]:
                shutil.copy(file, root / split / source.name)
    return root


@pytest.fixture(scope="module")
def run(checkout, data, tmp_path_factory) -> Path:
    """A finished run of one step."""
    out = tmp_path_factory.mktemp("run") / "supervised"
    text = (checkout / "recipes" / "supervised.yaml").read_text()
    text = text[: text.index("\ndemo:")]
    network = text[text.index("  use: fastssl.backbones") : text.index("\nobjective:")]
    path = out.parent / "small.yaml"
    path.write_text(text.replace(network, "  use: tests.tiny_backbone\n"))
    sizes = ["pipeline.image_size=32", "evaluation.resize=36", "evaluation.crop=32"]
    short = ["train.batch=8", "train.steps=1", "probe.neighbours=[3]"]
    given = [f"data.root={data / 'train'}", *sizes, *short, f"train.out={out}"]
    assert train.main([str(path), *given]) == 0
    return out


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def command(data, tmp_path):
    def line(run: Path, *overrides: str) -> list[str]:
        cache = f"features.cache={tmp_path / 'features'}"
        return ["fewlabels", str(run), f"data.root={data}", cache, *overrides]

    return line


def lines(run: Path) -> list[dict]:
    return [line for line in journal.read(run) if line.get("probe") == "fewlabels"]


def test_linear_is_scikit_learn_s_on_the_images_that_the_reader_takes(
    command, copy, data, tmp_path, capsys
):
    given = ["fewlabels.method=[linear]", "fewlabels.fractions=[]", "fewlabels.per_class=[5]"]
    few = ["fewlabels.seeds=[3,4]", "fewlabels.l2=0.1"]
    assert evaluate.main(command(copy, *given, *few)) == 0
    (line,) = lines(copy)
    printed = capsys.readouterr().out
    # Oracle: the cached features, and the files that the reader lists.
    whole = {
        split: folder.list_samples(folder.Options(root=str(data / split)), cache=None, say=print)
        for split in ("train", "val")
    }
    found = {}
    for about in (tmp_path / "features").rglob("features.json"):
        (values,) = [np.load(each) for each in about.parent.glob("pool*.npy")]
        split = "train" if len(values) == 4 * TRAIN else "val"
        found[split] = values
    accuracies = []
    for seed in (3, 4):
        options = folder.Options(root=str(data / "train"), per_class=5, subset_seed=seed)
        few_samples = folder.list_samples(options, cache=None, say=print)
        chosen = {few_samples.path(row) for row in range(len(few_samples))}
        rows = [row for row in range(4 * TRAIN) if whole["train"].path(row) in chosen]
        assert len(rows) == 20
        labels = whole["train"].labels
        assert labels is not None
        model = LogisticRegression(C=1 / (0.1 * len(rows)), tol=1e-8, max_iter=5000)
        model.fit(found["train"][rows].astype(np.float64), labels[rows])
        accuracies.append(model.score(found["val"].astype(np.float64), whole["val"].labels))

    assert line["accuracies"] == pytest.approx(accuracies)
    assert line["accuracy"] == pytest.approx(np.mean(accuracies))
    assert line["std"] == pytest.approx(np.std(accuracies))
    assert line["images"] == 20
    assert line["labels"] == "5 of each class"
    assert f"{100 * np.mean(accuracies):.1f} +- {100 * np.std(accuracies):.1f}" in printed


def test_finetuning_is_a_run_of_its_own_that_is_not_repeated(command, copy, capsys, data):
    given = ["fewlabels.method=[finetune]", "fewlabels.fractions=[0.25]", "fewlabels.seeds=[1]"]
    short = ["fewlabels.epochs=2", "fewlabels.milestones=[1]"]
    assert evaluate.main(command(copy, *given, *short)) == 0
    assert "fine-tuning on 12 images" in capsys.readouterr().out
    (out,) = (each.parent for each in copy.glob("evaluations/fewlabels/fraction-*/backbone.json"))
    card = json.loads((out / "backbone.json").read_text())
    assert evaluate.main(command(copy, *given, *short)) == 0
    again = capsys.readouterr().out
    first, second = lines(copy)
    heads = [line for line in journal.read(out) if line.get("probe") == "val"]

    assert "fine-tuning on" not in again
    assert first == second
    assert first["accuracy"] == heads[-1]["accuracy"]
    assert first["top5"] == 1.0  # of four classes
    assert card["step"] == 2  # 12 images are less than a batch of 256
    assert card["recipe"]["data"]["fraction"] == 0.25
    assert card["recipe"]["data"]["subset_seed"] == card["recipe"]["train"]["seed"] == 1
    assert card["recipe"]["train"]["batch"] == 12
    assert card["recipe"]["pipeline"]["image_size"] == 32
    assert card["recipe"]["optim"]["weight_decay"] == 0.0


def test_a_class_with_too_few_images_is_named_before_anything_is_extracted(
    command, copy, tmp_path, capsys
):
    assert evaluate.main(command(copy, "fewlabels.fractions=[]", "fewlabels.per_class=[13]")) == 2

    assert "data.per_class (13): class " in capsys.readouterr().err
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fractions": ()}, "fractions and per_class are both empty"),
        ({"fractions": (0.0,)}, r"fractions \(\[0.0\]\) must be above 0, at most 1"),
        ({"per_class": (0,)}, r"per_class \(\[0\]\) must be at least 1"),
        ({"seeds": ()}, r"seeds \(\[\]\) must be one or more"),
        ({"method": ()}, "method is empty: give linear, finetune or both"),
        ({"l2": -1.0}, r"l2 \(-1.0\) must be at least 0, or null"),
        ({"batch": 0}, r"batch \(0\) must be at least 1"),
        ({"steps": -1}, r"steps \(-1\) must be at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        fewlabels.Options(**wrong)


def test_few_images_are_gone_through_more_often_with_milestones_in_proportion(data):
    options = fewlabels.Options(steps=700, batch=4, milestones=(30.0, 60.0))

    # 10 images are 3 steps an epoch, 70 epochs 210 steps: 3 1/3 times as many
    assert fewlabels.schedule(options, images=10) == (4, 233, [100.0, 200.0])
    assert fewlabels.schedule(fewlabels.Options(), images=10) == (10, 70, [30])
    assert fewlabels.schedule(fewlabels.Options(epochs=20), images=1000) == (256, 20, [])
