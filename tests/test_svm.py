"""SVMs on a drawn set in VOC's layout and on class folders: as a plain scikit-learn loop has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC

from fastssl import evaluate, support_vectors, voc

CLASSES = ("ball", "box", "stripe")
SMALL = [
    "random:resnet10",
    "backbone.width=8",
    "evaluation.resize=36",
    "evaluation.crop=32",
    "features.batch=16",
    "svm.cost=[0.1,1,10]",
]


def draw(path: Path, shown: tuple[bool, ...], random: np.random.Generator) -> None:
    """Noise, and on it whichever of the classes are shown."""
    noise = random.integers(0, 90, (40, 44, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    pencil = ImageDraw.Draw(image)
    x, y = (int(each) for each in random.integers(2, 20, 2))
    if shown[0]:
        pencil.ellipse((x, y, x + 16, y + 16), fill=(250, 60, 60))
    if shown[1]:
        pencil.rectangle((y, x, y + 14, x + 14), fill=(60, 250, 60))
    if shown[2]:
        pencil.line((0, x, 43, y), fill=(60, 60, 250), width=5)
    image.save(path, quality=95)


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    """VOCdevkit with 31 images to learn from and 23 to test on; some labels are `difficult`."""
    root = tmp_path_factory.mktemp("voc") / "VOCdevkit"
    home = root / "VOC2007"
    main, images = home / "ImageSets" / "Main", home / "JPEGImages"
    main.mkdir(parents=True)
    images.mkdir()
    random = np.random.default_rng(0)
    stems = [f"{number:06}" for number in random.permutation(80)[:54]]  # in no order
    for split, some in (("trainval", stems[:31]), ("test", stems[31:])):
        labels = np.where(random.random((len(some), 3)) < 0.4, 1, -1)
        for stem, row in zip(some, labels, strict=True):
            draw(images / f"{stem}.jpg", tuple(row == 1), random)
        labels[random.random(labels.shape) < 0.1] = 0
        (main / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in some))
        for name, column in zip(CLASSES, labels.T, strict=True):
            lines = [f"{stem} {value:2}\n" for stem, value in zip(some, column, strict=True)]
            (main / f"{name}_{split}.txt").write_text("".join(lines))
    return root


def run(out: Path, *arguments: str) -> list[dict]:
    """The lines that the command adds to metrics.jsonl."""
    code = evaluate.main(["svm", *SMALL, f"evaluate.out={out}", *arguments])
    assert code == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(devkit, tmp_path_factory) -> tuple[list[dict], Path]:
    """Of every stage and of 1 and 4 shots; and the folder of the features."""
    out = tmp_path_factory.mktemp("measured")
    lines = run(
        out,
        f"data.root={devkit}",
        f"features.cache={out / 'features'}",
        "svm.stages=[pool, layer4]",
        "svm.shots=[1,4]",
        "svm.draws=2",
        "svm.workers=1",
    )
    return lines, out / "features"


def features_of(folder: Path, images: int) -> np.ndarray:
    """Of the last stage, [N, D], in the order of the split's list."""
    for about in folder.glob("*/features.json"):
        pool = np.load(about.parent / "pool.npy")
        if len(pool) == images:
            return pool
    raise AssertionError(f"no features of {images} images in {folder}")


def plain_svm(cost: float) -> LinearSVC:
    return LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        dual=True,  # pyright: ignore[reportArgumentType]  # the stubs know the newer "auto" alone
        tol=1e-4,
        max_iter=2000,
        random_state=0,
    )


def test_map_of_a_voc_set_is_that_of_a_plain_loop_over_its_classes(measured, devkit):
    lines, folder = measured
    line = next(each for each in lines if each["probe"] == "svm" and each["stage"] == "pool")
    train, test = features_of(folder, 31), features_of(folder, 23)
    stems, labels, classes = voc.classification(devkit, "2007", "trainval")
    assert len(stems) == len(train)
    _, truth, _ = voc.classification(devkit, "2007", "test")

    areas, plain = [], []
    for number in range(len(classes)):
        svm = plain_svm(line["chosen_costs"][number])
        y = labels[:, number].copy()
        y[y == 0] = -1
        scores = svm.fit(support_vectors.unit(train), y).decision_function(
            support_vectors.unit(test)
        )
        kept = truth[:, number] != 0
        positive = truth[kept, number] == 1
        areas.append(support_vectors.interpolated_precision(positive, scores[kept]))
        plain.append(average_precision_score(positive, scores[kept]))
    assert classes == CLASSES
    assert list(line["by_class"].values()) == pytest.approx(areas, abs=1e-6)
    assert line["map"] == pytest.approx(np.mean(areas))
    assert line["map_not_interpolated"] == pytest.approx(np.mean(plain))
    assert line["map"] > 0.5  # drawn to be told apart: 0.4 would be chance
    assert (line["train_images"], line["test_images"], line["fits"]) == (31, 23, 30)


def test_each_stage_and_number_of_shots_has_a_line_of_its_own(measured):
    lines, _ = measured

    assert [(each["stage"], each["probe"], each.get("shots")) for each in lines] == [
        *[("layer4", "svm", None), ("layer4", "svm_low_shot", 1), ("layer4", "svm_low_shot", 4)],
        *[("pool", "svm", None), ("pool", "svm_low_shot", 1), ("pool", "svm_low_shot", 4)],
    ]
    few = [each for each in lines if each["probe"] == "svm_low_shot"]
    assert [each["negatives"] for each in few] == [2, 8, 2, 8]  # of 3 classes; VOC's 20: 19 k
    assert all(0 < each["map"] <= 1 and each["std"] >= 0 for each in few)
    assert {each["cost_chosen_on"] for each in few} == {"test"}


def test_two_processes_give_what_one_gives(measured, devkit, tmp_path, environ, checkout):
    lines, _ = measured
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [*SMALL, f"data.root={devkit}", f"evaluate.out={tmp_path}", "svm.workers=1"]
    arguments += [f"features.cache={tmp_path / 'features'}", "svm.stages=[pool]"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "fastssl/evaluate.py", "svm", *arguments],
        cwd=checkout,
        env=environ | {"ACCELERATE_USE_CPU": "True"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    (both,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    alone = next(each for each in lines if each["probe"] == "svm" and each["stage"] == "pool")
    assert both["by_class"] == pytest.approx(alone["by_class"])
    assert done.stdout.count("mean average precision") == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """train/ and val/ with one folder a class."""
    root = tmp_path_factory.mktemp("folders")
    random = np.random.default_rng(1)
    for split, count in (("train", 9), ("val", 5)):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for each in range(count):
                shown = tuple(number == other for other in range(3))
                draw(root / split / name / f"{each}.jpg", shown, random)
    return root


def test_class_folders_give_accuracy_too_one_against_the_rest(folders, tmp_path, capsys):
    (line,) = run(tmp_path, f"data.root={folders}", "features.keep=false", "svm.workers=2")

    assert line["accuracy"] > 0.6
    assert line["map"] > 0.6
    assert (line["layout"], line["data"]) == ("class folders", str(folders))
    assert "accuracy" in capsys.readouterr().out


def test_images_may_be_mistaken_for_a_class_that_val_lacks(folders, tmp_path, capsys):
    """Box and stripe are the same images here, and val has none of box."""
    root = tmp_path / "few"
    for split, name, source in (
        *(("train", "ball", "ball"), ("train", "box", "box"), ("train", "stripe", "box")),
        *(("val", "ball", "ball"), ("val", "stripe", "box")),
    ):
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / split / name).symlink_to(folders / split / source)
    cache = tmp_path / "features"
    (line,) = run(
        tmp_path, f"data.root={root}", f"features.cache={cache}", "svm.cost=[1]", "svm.workers=1"
    )
    train, test = features_of(cache, 27), features_of(cache, 10)
    x, z = support_vectors.unit(train), support_vectors.unit(test)
    scores = []
    for number in range(3):
        y = np.where(np.arange(27) // 9 == number, 1, -1)
        scores.append(plain_svm(1).fit(x, y).decision_function(z))
    right = np.argmax(scores, axis=0) == 2 * (np.arange(10) // 5)

    assert line["accuracy"] == pytest.approx(right.mean())
    assert right[5:].mean() < 1
    assert list(line["by_class"]) == ["ball", "stripe"]
    said = capsys.readouterr().out
    assert "the mean is over 2 classes, without box: no positive image to test on" in said
    assert "SVM, 2 classes" in said


def test_only_the_stages_asked_for_are_extracted(folders, tmp_path):
    cache = tmp_path / "features"
    given = [f"data.root={folders}", f"features.cache={cache}", "svm.workers=1", "svm.cost=[1]"]
    assert [line["stage"] for line in run(tmp_path, *given)] == ["pool"]

    assert {each.name for each in cache.rglob("*.npy")} == {"pool.npy", "positions.npy"}


def test_shots_beyond_a_class_are_left_out_with_words(folders, tmp_path, capsys):
    (folders / "train" / "ball" / "9.jpg").write_bytes(
        (folders / "train" / "ball" / "0.jpg").read_bytes()
    )
    shots = ["svm.shots=[10, 50]", "svm.draws=1", "svm.shots_cost=1.0", "svm.workers=1"]
    lines = run(tmp_path, f"data.root={folders}", *shots)
    os.remove(folders / "train" / "ball" / "9.jpg")
    said = capsys.readouterr().out

    assert [(each.get("shots"), each.get("classes_counted")) for each in lines] == [
        (None, None),
        (10, 1),
    ]
    assert lines[1]["cost_chosen_on"] == "given"
    assert "std" not in lines[1]  # of one draw
    assert "10 shots: left out, for they have fewer positive images: box (9), stripe (9)" in said
    assert "10 shots: 18 negatives, not 20" in said
    assert "no class has 50 images" in said


def refused(capsys, *arguments: str) -> str:
    assert evaluate.main(["svm", *SMALL, *arguments]) == 2
    return capsys.readouterr().err


def test_classes_with_too_few_images_are_left_out_or_refused(folders, tmp_path, capsys):
    (line,) = run(tmp_path / "a", f"data.root={folders}", "svm.folds=9", "svm.workers=1")
    assert line["folds"] == 9

    said = refused(capsys, f"data.root={folders}", "svm.folds=10", f"evaluate.out={tmp_path}")
    assert "no class can be learnt in 10 folds" in said
    assert "ball: 9 positive" in said


def test_images_that_a_list_names_and_the_folder_lacks_are_named(devkit, tmp_path, capsys):
    main = devkit / "VOC2007" / "ImageSets" / "Main"
    for name in CLASSES:
        (main / f"{name}_val.txt").write_text("nothing 1\n")
    (main / "val.txt").write_text("nothing\n")

    said = refused(capsys, f"data.root={devkit}", "svm.test=val", f"evaluate.out={tmp_path}")
    assert "1 of 1 images of val are not in" in said
    assert "nothing.jpg" in said


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("svm.folds=1", "folds (1) must be at least 2"),
        ("svm.stages=[all, pool]", "stand alone"),
        ("svm.cost=[0.0]", "above 0"),
        ("svm.shots=[0]", "at least 1"),
        ("svm.costs=visl", "did you mean 'vissl'"),
        ("svm.year=2012", "VOC2012"),
        ("svm.test=nothere", "no split nothere"),
        ("svm.draws=3", "draws (3) is for low-shot"),
        ("svm.shots_cost=1.0", "shots_cost (1.0) is for low-shot"),
        ("svm.costs=mm", "costs (mm) is not read beside cost ([0.1, 1.0, 10.0])"),
        ("data.limit=9", "data.limit (9) is for class folders"),
        ("features.stages=[layer4]", "give svm.stages=[layer4]"),
    ],
)
def test_a_mistake_is_one_line(devkit, capsys, argument, said):
    assert said in refused(capsys, f"data.root={devkit}", argument)


@pytest.mark.parametrize("argument", ["svm.year=2012", "svm.train=train", "svm.test=val"])
def test_keys_of_voc_are_refused_of_class_folders(folders, capsys, argument):
    said = refused(capsys, f"data.root={folders}", argument)

    assert f"{argument.partition('=')[0]} ({argument.partition('=')[2]}) is for VOC" in said
    assert "leave it out" in said


def test_neither_voc_nor_class_folders_says_what_was_looked_for(tmp_path, capsys):
    said = refused(capsys, f"data.root={tmp_path}")

    assert "train" in said
    assert "VOC2007" in said


def test_without_scikit_learn_it_says_what_to_install(devkit, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)

    assert "pip install 'fastssl[evaluate]'" in refused(capsys, f"data.root={devkit}")
