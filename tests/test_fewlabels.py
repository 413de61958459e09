"""Few labels by the command line: linear and fine-tuned, on images drawn of each class."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sklearn.linear_model import LogisticRegression

from fastssl import evaluate, features, journal, loader, train
from fastssl.config import Part
from fastssl.evaluation_task import Task
from fastssl.evaluations import fewlabels
from pipelines import evaluation
from pipelines.readers import folder, tar
from tests import few_images

CLASSES, TRAIN, VAL = 6, 12, 4  # images of each class


@pytest.fixture(scope="module")
def data(tmp_path_factory, demo_images) -> Path:
    root = tmp_path_factory.mktemp("data")
    for source in sorted((demo_images / "train").iterdir())[:CLASSES]:
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
        split = "train" if len(values) == CLASSES * TRAIN else "val"
        found[split] = values
    accuracies, in_five = [], []
    for seed in (3, 4):
        options = folder.Options(root=str(data / "train"), per_class=5, subset_seed=seed)
        few_samples = folder.list_samples(options, cache=None, say=print)
        chosen = {few_samples.path(row) for row in range(len(few_samples))}
        rows = [row for row in range(CLASSES * TRAIN) if whole["train"].path(row) in chosen]
        assert len(rows) == 30
        labels = whole["train"].labels
        assert labels is not None
        model = LogisticRegression(C=1 / (0.1 * len(rows)), tol=1e-8, max_iter=5000)
        model.fit(found["train"][rows].astype(np.float64), labels[rows])
        scores = model.decision_function(found["val"].astype(np.float64))
        best = np.argsort(-scores, axis=1)
        of_val = whole["val"].labels
        assert of_val is not None
        truth = of_val[:, None]
        accuracies.append((best[:, :1] == truth).mean())
        in_five.append((best[:, :5] == truth).any(axis=1).mean())

    assert line["accuracies"] == pytest.approx(accuracies)
    assert line["accuracy"] == pytest.approx(np.mean(accuracies))
    assert line["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert line["top5"] == pytest.approx(np.mean(in_five))
    assert line["top5"] < 1
    assert line["images"] == 30
    assert (line["labels"], line["per_class"]) == ("5 of each class", 5)
    assert f"{100 * np.mean(accuracies):.1f} +- {100 * np.std(accuracies, ddof=1):.1f}" in printed


@pytest.fixture
def _fresh_accelerator():
    """Accelerate keeps the precision of the process's first Accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def stop_when(there, asked: list[int]) -> threading.Thread:
    """Sends this process a SIGTERM once `there` has a file, which is a little older than the child
    that writes it, and a new child is there; `asked` gets the new children's ids."""
    # joblib keeps its workers for later tests
    before = {child.pid for child in psutil.Process().children()}

    def watch():
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            new = {child.pid for child in psutil.Process().children()} - before
            if new and there():
                asked.extend(new)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


# Every option of fine-tuning, none as by default: key of the child's recipe -> value there.
ASKED = {
    "epochs": 2,
    "lr": 0.02,
    "head_lr": 10.0,
    "milestones": [1.0],
    "batch": 16,
    "steps": 3,
    "train_stages": 1,
    "image_area": [0.3, 0.9],
    "layer_decay": 0.75,
    "mixup": 0.2,
}
PLACES = {
    "objective": ("train_stages", "mixup"),
    "pipeline": ("image_area",),
    "optim": ("lr", "head_lr", "milestones", "layer_decay"),
    "train": ("epochs", "batch"),
}


@pytest.mark.usefixtures("_fresh_accelerator")
def test_finetuning_is_a_run_of_its_own_that_goes_on_and_is_not_repeated(command, copy, capsys):
    assert {*ASKED} == {*fewlabels._OF_METHOD["finetune"]}
    given = ["fewlabels.method=[finetune]", "fewlabels.fractions=[0.25]", "fewlabels.seeds=[1]"]
    given += [f"fewlabels.{key}={value}" for key, value in ASKED.items()]
    line = command(copy, *given, "evaluate.precision=bf16")
    of_child: list[int] = []
    folders = copy / "evaluations" / "fewlabels"
    thread = stop_when(lambda: [*folders.glob("fraction-0.25-seed-1-*.log")], of_child)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(line)
    thread.join()
    assert stopped.value.code == 75
    assert "the same command goes on" in capsys.readouterr().out
    assert of_child
    assert not any(map(psutil.pid_exists, of_child))
    assert not lines(copy)

    assert evaluate.main(line) == 0
    assert "fine-tuning on 18 images" in capsys.readouterr().out
    (out,) = (each.parent for each in copy.glob("evaluations/fewlabels/fraction-*/backbone.json"))
    assert {f"{out.name}.yaml", f"{out.name}.log"} < {each.name for each in folders.iterdir()}
    card = json.loads((out / "backbone.json").read_text())
    assert evaluate.main([*line, "loader.threads=1", "loader.prefetch=1"]) == 0  # no other run
    again = capsys.readouterr().out
    first, second = lines(copy)
    head = [line for line in journal.read(out) if line.get("probe") == "val"][-1]

    assert "fine-tuning on" not in again
    assert first == second
    assert (first["accuracy"], first["top5"]) == (head["accuracy"], head["top5"])
    assert (first["fraction"], first["labels"]) == (0.25, "25 %")
    assert not {"std", "top5_std"} & {*first}  # of one seed
    recipe = card["recipe"]
    for section, keys in PLACES.items():
        assert {key: recipe[section][key] for key in keys} == {key: ASKED[key] for key in keys}
    assert card["step"] == 4  # 2 epochs of 18 images, 16 a batch
    assert recipe["data"]["fraction"] == 0.25
    assert recipe["data"]["subset_seed"] == recipe["train"]["seed"] == 1
    assert recipe["train"]["precision"] == "bf16"
    assert recipe["pipeline"]["image_size"] == 32
    assert (recipe["optim"]["weight_decay"], recipe["optim"]["nesterov"]) == (0.0, True)
    assert (recipe["optim"]["momentum"], recipe["optim"]["lr_batch"]) == (0.9, None)


@pytest.fixture
def _untrained(monkeypatch):
    """Fine-tuning ends at once."""

    def end(task: Task, path: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "backbone.json").write_text("{}")
        line = {"step": 4, "probe": "val", "accuracy": 0.5, "top5": 1.0}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(fewlabels, "_run", end)


@pytest.mark.usefixtures("_untrained")
@pytest.mark.parametrize("change", ["nothing", "train", "val", "mtime"])
def test_a_finished_finetuning_is_of_these_very_files(
    command, copy, data, tmp_path, capsys, change
):
    images = shutil.copytree(data, tmp_path / "images")
    given = ["fewlabels.method=[finetune]", "fewlabels.fractions=[0.25]", "fewlabels.seeds=[1]"]
    asked = command(copy, f"data.root={images}", *given)
    asked.remove(f"data.root={data}")
    assert evaluate.main(asked) == 0
    capsys.readouterr()
    if change == "mtime":  # written to anew
        os.utime(sorted((images / "val").rglob("*.jpg"))[0], (1e9, 1e9))
    elif change != "nothing":
        first, second = sorted((images / change).iterdir())[:2]
        first.rename(images / "aside")
        second.rename(first)
        (images / "aside").rename(second)
    assert evaluate.main(asked) == 0
    again = capsys.readouterr().out
    folders = [each.parent for each in copy.glob("evaluations/fewlabels/fraction-*/backbone.json")]
    recipe = yaml.safe_load(Path(f"{folders[0]}.yaml").read_text())

    if change == "nothing":
        assert f"fewlabels: already fine-tuned: {folders[0]}" in again
        assert len(folders) == 1
    else:
        assert "fewlabels: fine-tuning on 18 images" in again
        assert "already" not in again
        assert len(folders) == 2
    assert recipe["data"]["root"] == str(images / "train")
    assert recipe["probe"]["root"] == str(images)


def test_the_recipe_of_an_object_store_is_tested_in_that_store(tmp_path):
    url = "s3://bucket/sets"
    task = Task(
        trained=few_images.tiny(),
        accelerator=Accelerator(cpu=True),
        reader=Part(tar.__name__, tar, tar.Options(root=url)),
        demo=False,
        graph=Part(
            evaluation.__name__,
            evaluation,
            evaluation.Options(resize=36, crop=32, interpolation="bicubic"),
        ),
        loading=loader.Options(),
        features=features.Options(),
        cache=tmp_path,
        out=tmp_path,
        seed=0,
        say=print,
    )
    few = tar.Options(root=f"{url}/train", per_class=2)
    subset = fewlabels._Subset(few, np.arange(4), "per_class", 2, 0)
    recipe = fewlabels._recipe(task, fewlabels.Options(), subset, tmp_path)

    assert recipe["data"]["root"] == f"{url}/train"
    assert recipe["probe"]["root"] == url
    sizes = {"resize": 36, "crop": 32, "interpolation": "bicubic"}
    assert recipe["evaluation"] == {"use": "pipelines.evaluation", **sizes}


def test_an_image_that_a_list_names_twice_is_as_many_images_as_are_used(
    command, copy, data, tmp_path, monkeypatch
):
    for split in ("train", "val"):
        files = sorted((data / split).rglob("*.jpg"))
        text = [f"{file}\t{file.parent.name}\n" for file in files]
        text += [f"{files[0]}\t{files[-1].parent.name}\n", *text]  # and one in two classes
        (tmp_path / f"{split}.txt").write_text("".join(text))
    found = []

    def linear(task: Task, _, subset, __) -> tuple[float, float]:
        train_split, _, _ = task.splits()
        found.append((subset.rows, train_split.labels[np.isin(train_split.rows, subset.rows)]))
        return 0.5, 1.0

    monkeypatch.setattr(fewlabels, "_linear", linear)
    given = ["fewlabels.method=[linear]", "fewlabels.fractions=[]", "fewlabels.per_class=[3,24]"]
    asked = [each for each in command(copy, *given) if not each.startswith("data.")]
    lists = [f"data.root={tmp_path}", "data.use=pipelines.readers.list"]
    assert evaluate.main([*asked, *lists]) == 0

    assert [line["images"] for line in lines(copy)] == [3 * CLASSES, 24 * CLASSES]
    for rows, labels in found:
        assert len({*rows.tolist()}) == len(rows) == len(labels)
        assert len({*np.bincount(labels).tolist()}) == 1  # as many of each class


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("limit=8", "data.limit (8): fewlabels draws its images itself"),
        ("fraction=0.5", "or give fewlabels.fractions"),
        ("per_class=3", "or give fewlabels.per_class"),
    ],
)
def test_a_subset_that_data_takes_is_refused(command, copy, capsys, key, said):
    assert evaluate.main(command(copy, f"data.{key}")) == 2

    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1


def test_what_the_figures_of_finetuning_cannot_tell_is_said(command, copy, capsys, monkeypatch):
    monkeypatch.setattr(fewlabels, "_finetune", lambda *_: (0.5, 1.0))  # trains for minutes
    patches = ["evaluation.use=pipelines.evaluation_patches", "evaluation.crop=48"]
    patches += ["evaluation.resize=48", "fewlabels.seeds=[0]", "fewlabels.fractions=[1.0]"]
    assert evaluate.main(command(copy, *patches, "fewlabels.updates=2")) == 0
    told = capsys.readouterr().out

    assert "linear is on features of pipelines.evaluation_patches" in told
    assert "tested on whole images (pipelines.evaluation)" in told
    assert "fraction 1: 70 epochs of 72 images are 70 steps" in told
    assert "fewlabels.steps=1000" in told
    assert {line["method"]: line["graph"] for line in lines(copy)} == {
        "linear": "pipelines.evaluation_patches",
        "finetune": "pipelines.evaluation",
    }


def test_enough_steps_are_not_remarked_on(command, copy, capsys, monkeypatch):
    monkeypatch.setattr(fewlabels, "_finetune", lambda *_: (0.5, 1.0))
    method = ["fewlabels.method=[finetune]", "fewlabels.fractions=[1.0]", "fewlabels.steps=501"]
    assert evaluate.main(command(copy, *method)) == 0

    assert "steps" not in capsys.readouterr().out


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
        ({"seeds": (1, 0, 1)}, r"seeds \(\[1, 0, 1\]\) has a seed twice"),
        ({"method": ("linear",), "lr": 0.1}, r"lr \(0.1\) is read by method finetune"),
        ({"method": ("linear",), "mixup": 0.1}, "leave mixup out, or add finetune"),
        ({"method": ("finetune",), "l2": 0.1}, r"l2 \(0.1\) is read by method linear"),
        ({"method": ("finetune",), "stage": "first"}, "leave stage out, or add linear"),
        ({"method": ()}, "method is empty: give linear, finetune or both"),
        ({"l2": -1.0}, r"l2 \(-1.0\) must be at least 0, or null"),
        ({"batch": 0}, r"batch \(0\) must be at least 1"),
        ({"steps": -1}, r"steps \(-1\) must be at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        fewlabels.Options(**wrong)


def test_every_option_is_read_by_both_methods_or_by_one():
    both = {"fractions", "per_class", "seeds", "method"}
    of_one = [name for names in fewlabels._OF_METHOD.values() for name in names]

    assert len(of_one) == len({*of_one})
    assert both | {*of_one} == {field.name for field in fields(fewlabels.Options)}


def test_few_images_are_gone_through_more_often_with_milestones_in_proportion(data):
    options = fewlabels.Options(steps=700, batch=4, milestones=(30.0, 60.0))

    # 10 images are 3 steps an epoch, 70 epochs 210 steps: 3 1/3 times as many
    assert fewlabels.schedule(options, images=10) == (4, 233, [100.0, 200.0])
    assert fewlabels.schedule(fewlabels.Options(), images=10) == (10, 70, [30])
    assert fewlabels.schedule(fewlabels.Options(epochs=20), images=1000) == (256, 20, [])
