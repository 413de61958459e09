"""`evaluate.py analyze` on run folders: real graphs, real files, real checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastssl import backbone_file, checkpoint, config, evaluate, journal, loader
from fastssl.analysis import depth, drawing, invariance, transforms
from fastssl.config import Part
from fastssl.evaluation_task import Task
from fastssl.evaluations import linear
from pipelines import pirl_jigsaw, pirl_rotation
from pipelines.readers import folder

STEP = 7
SMALL = ["pipeline.image_size=24", "pipeline.patches_crop=48", "pipeline.patch=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four images of each of two classes to train on, three to test on."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for number, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = generator.integers(120 * number, 120 * number + 130, (40, 50, 3))
                path = root / split / name / f"{image}.jpg"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def finish(recipe: Path, data: Path, out: Path, arguments: list[str], accuracy: float) -> Path:
    """A finished run folder, without the training."""
    root = f"data.root={data / 'train'}"
    evaluation = ["evaluation.resize=32", "evaluation.crop=32"]
    made = config.load(recipe, [root, *evaluation, f"probe.root={data}", *arguments])
    torch.manual_seed(0)
    backbone = made.backbone.module.backbone(made.backbone.options)
    objective = made.objective.module.Objective(
        backbone,
        made.objective.options,
        images=8,
        classes=made.pipeline.options.classes,
        labels=None,
        seed=0,
    )
    state = {"step": STEP, "objective": objective.state_dict()}
    checkpoint.save(out / "checkpoints", STEP, state, keep=1)
    backbone_file.save_backbone(out, backbone, made, step=STEP)
    knn = {"step": STEP, "probe": "knn", "accuracy": accuracy, "neighbours": 4}
    lines = [{"step": STEP, "accuracy": accuracy}, knn]
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return out


@pytest.fixture(scope="module")
def kept(recipe, data, checkout, tmp_path_factory) -> dict[str, Path]:
    """Runs of PIRL and of jigsaw."""
    home = tmp_path_factory.mktemp("runs")
    jigsaw = home / "jigsaw.yaml"
    text = recipe.read_text()
    start, end = text.index("pipeline:"), text.index("evaluation:")
    text = f"{text[:start]}pipeline:\n  use: pipelines.jigsaw\n\n{text[end:]}"
    start, end = text.index("objective:"), text.index("optim:")
    jigsaw.write_text(f"{text[:start]}objective:\n  use: fastssl.objectives.jigsaw\n\n{text[end:]}")
    cut = ["pipeline.resize=54", "pipeline.crop=48", "pipeline.patch=8", "pipeline.permutations=16"]
    head = ["objective.embedding=4", "objective.hidden=4"]
    return {
        "pirl": finish(recipe, data, home / "pirl", SMALL, 0.25),
        "jigsaw": finish(jigsaw, data, home / "jigsaw", [*cut, *head], 0.5),
    }


@pytest.fixture
def runs(kept, tmp_path) -> dict[str, Path]:
    """Copies, which a test may write to."""
    return {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in kept.items()}


@pytest.fixture
def analyze(data, tmp_path, monkeypatch, capfd):
    """Runs the command: exit code, what it printed, what it complained of."""
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object, root: Path = data) -> tuple[int, str, str]:
        settings = [
            f"data.root={root}",
            "loader.threads=1",
            "analyze.images=5",
            "analyze.pictures=1",
        ]
        code = evaluate.main(["analyze", *map(str, arguments), *settings, "analyze.transforms=2"])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_two_runs_give_every_picture_with_its_numbers_and_journal_lines(runs, analyze):
    code, out, err = analyze(runs["jigsaw"], runs["pirl"])

    assert (code, err) == (0, "")
    shared = {"invariance", "depth", "pretext", "spectrum"}
    assert {path.stem for path in (runs["pirl"] / "evaluations").glob("*.png")} == {
        *shared,
        "attention-pirl",
        "map-pirl",
    }
    for path in (runs["pirl"] / "evaluations").glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[1] == 1600
        assert pixels.std() > 5, path
        json.loads(path.with_suffix(".json").read_text())
    numbers = json.loads((runs["pirl"] / "evaluations" / "invariance.json").read_text())
    assert set(numbers["heads"]) == {"pirl"}
    assert set(numbers["backbone"]) == {"jigsaw", "pirl"}
    assert numbers["heads"]["pirl"]["n"] == 10
    assert sum(numbers["heads"]["pirl"]["same"]) == 10
    lines = journal.read(runs["pirl"])
    assert {line.get("probe") for line in lines} == {
        None,
        "knn",
        "linear",
        "spectrum",
        "invariance",
    }
    assert {line["step"] for line in lines} == {STEP}
    assert "effective rank" in out
    for name, kind in (("jigsaw", "backbone"), ("pirl", "heads")):  # each in its own folder
        (line,) = [x for x in journal.read(runs[name]) if x.get("probe") == "invariance"]
        assert line["functions"] == kind
        assert line["mean"] == numbers[kind][name]["mean"]


def test_a_run_alone_without_training_says_what_is_left_out_and_why(analyze, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    code, out, _ = analyze("random:resnet10", "backbone.width=2", "evaluation.crop=32")

    assert code == 0
    assert "invariance is left out: no run was trained on patches or turned copies" in out
    assert "pretext is left out: a relation needs two runs with a pretext accuracy" in out
    assert (tmp_path / "evaluations" / "random-resnet10" / "depth.png").exists()


def test_depth_is_of_this_very_network_data_and_settings_and_else_probed_anew(
    analyze, kept, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(data, tmp_path / "other")
    (other / "train" / "dark" / "0.jpg").unlink()
    probed: list[float] = []
    shown: list[dict] = []

    def probe(task: Task, options: linear.Options) -> None:
        """The n-th one finds n %: what is shown tells whose it is."""
        train, val, classes = task.splits()
        images = {"train_images": len(train.rows), "val_images": len(val.rows)}
        its = {**linear.settings(task, options), "classes": len(classes), **images}
        probed.append((1 + len(probed)) / 100)
        for stage in ("a", "b"):
            task.log("linear", {"stage": stage, "accuracy": probed[-1], **its})

    monkeypatch.setattr(linear, "evaluate", probe)
    monkeypatch.setattr(depth, "draw", lambda *_: None)
    monkeypatch.setattr(drawing, "save", lambda *arguments: shown.append(arguments[-1]))
    width = "backbone.width=2"
    changes = [
        [width],
        ["backbone.width=3"],
        [width, "evaluate.seed=5"],
        [width, "evaluation.crop=28"],
        [width, "features.size=64"],
        [width, "features.pool=avg"],
        [width, "data.per_class=3"],
        [width, "data.per_class=3", "data.subset_seed=1"],
        [width, "data.max_pixels=9999"],
    ]
    asked = [(change, data) for change in changes] + [([width], other)]
    for change, root in asked * 2:
        given = [f"random:{kept['pirl']}", *change, "analyze.what=[depth]"]
        assert analyze(*given, root=root)[0] == 0

    assert len(probed) == len(asked)  # the second time all are read from the journal
    found = [each["accuracy"]["random:pirl"] for each in shown]
    assert found == [{"a": each, "b": each} for each in probed * 2]


def test_depth_looks_for_what_the_probe_writes_and_each_run_has_its_own_graph(analyze, runs):
    card = json.loads((runs["jigsaw"] / "backbone.json").read_text())
    card["preprocessing"]["options"] |= {"crop": 28}
    (runs["jigsaw"] / "backbone.json").write_text(json.dumps(card))

    said = [analyze(*runs.values(), "analyze.what=[depth]") for _ in range(2)]
    numbers = json.loads((runs["jigsaw"] / "evaluations" / "depth.json").read_text())

    assert [(code, err) for code, _, err in said] == [(0, "")] * 2
    assert [out.count("L-BFGS is run") for _, out, _ in said] == [2, 0]
    assert {*numbers["accuracy"]} == {"jigsaw", "pirl"}
    for name, crop in (("jigsaw", 28), ("pirl", 32)):
        its = [x for x in journal.read(runs[name]) if x.get("probe") == "linear"]
        assert {line["graph_crop"] for line in its} == {crop}


def test_what_was_asked_for_and_cannot_be_done_is_a_mistake(analyze, runs):
    code, _, err = analyze(runs["pirl"], "analyze.what=[pretext]")

    assert code == 2
    assert err.startswith("error: analyze.what (pretext): a relation needs two runs")


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("pretext", "the card of jigsaw, pirl has no recipe, which alone says on which images its"),
        ("invariance", "no run was trained on patches or turned copies of images"),
    ],
)
def test_cards_without_a_recipe_are_told(analyze, runs, what, told):
    for run in runs.values():
        card = json.loads((run / "backbone.json").read_text())
        (run / "backbone.json").write_text(json.dumps({**card, "recipe": None}))

    code, _, err = analyze(runs["jigsaw"], runs["pirl"], f"analyze.what=[{what}]")

    assert code == 2
    assert err.startswith(f"error: analyze.what ({what}): {told}")


def test_pirl_without_a_checkpoint_is_compared_by_its_features_alone(analyze, runs):
    shutil.rmtree(runs["pirl"] / "checkpoints")

    code, out, _ = analyze(runs["pirl"], "analyze.what=[invariance]")

    numbers = json.loads((runs["pirl"] / "evaluations" / "invariance.json").read_text())
    assert code == 0
    assert "has no checkpoint, where alone PIRL's heads are kept" in out
    assert numbers["heads"] == {}
    assert set(numbers["backbone"]) == {"pirl"}


@pytest.mark.parametrize("change", ["step", "key", "bytes"])
def test_heads_that_are_not_the_backbones_are_refused(analyze, runs, change):
    path = checkpoint.latest(runs["pirl"] / "checkpoints")
    assert path is not None
    saved = checkpoint.load(path)
    if change == "step":
        saved["step"] = STEP - 1
    elif change == "key":
        del saved["objective"]["patch_head.joined.bias"]
    checkpoint.save(path.parent, STEP, saved, keep=1)
    if change == "bytes":
        path.write_bytes(path.read_bytes()[:-100])

    code, _, err = analyze(runs["pirl"], "analyze.what=[invariance]")

    told = {"step": "of step 6, the backbone", "key": "patch_head.joined.bias", "bytes": "damaged"}
    assert code == 2
    assert told[change] in err
    assert "Traceback" not in err


def test_an_unfinished_run_is_refused(analyze, runs):
    (runs["pirl"] / "backbone.json").unlink()

    code, _, err = analyze(runs["pirl"], "analyze.what=[spectrum]")

    assert code == 2
    assert "not finished" in err


def test_knn_on_different_data_has_no_order(analyze, runs):
    card = json.loads((runs["jigsaw"] / "backbone.json").read_text())
    card["recipe"]["probe"]["root"] = "/elsewhere"
    (runs["jigsaw"] / "backbone.json").write_text(json.dumps(card))

    code, _, err = analyze(runs["jigsaw"], runs["pirl"], "analyze.what=[pretext]")

    assert code == 2
    assert "which have no order: run `linear` on all of them first" in err


def test_one_image_and_one_class_in_val_are_told(analyze, runs, data, tmp_path):
    root = Path(shutil.copytree(data, tmp_path / "data"))
    shutil.rmtree(root / "val" / "light")
    for name in ("1.jpg", "2.jpg"):
        (root / "val" / "dark" / name).unlink()

    code, out, _ = analyze(runs["pirl"], root=root)
    refused = [
        analyze(runs["pirl"], f"analyze.what=[{what}]", root=root) for what in ("invariance", "map")
    ]

    assert code == 0
    assert "invariance is left out" in out
    assert "map is left out: a map by class needs at least 2 classes" in out
    assert [code for code, _, _ in refused] == [2, 2]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("analyze.what=[invarance]", "did you mean 'invariance'?"),
        ("analyze.images=1", "images (1) must be at least 2"),
        ("analyze.transforms=0", "transforms (0)"),
        ("analyze.classes=1", "classes (1) must be at least 2"),
        ("analyze.points=3", "points (3) must be at least 2 for each"),
        ("analyze.point=3", "did you mean 'points'?"),
    ],
)
def test_wrong_settings_are_refused(kept, data, capfd, setting, told):
    code = evaluate.main(["analyze", str(kept["pirl"]), f"data.root={data}", setting])

    assert code == 2
    assert told in capfd.readouterr().err


# -- transforms, through the real graphs


class Brightest(nn.Module):
    """Knows of an image nothing but its greatest red, green and blue."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.float().amax((2, 3)) * self.scale


@pytest.mark.parametrize("graph", [pirl_jigsaw, pirl_rotation])
def test_a_network_that_ignores_the_transform_is_exactly_invariant(tmp_path, graph):
    for number in range(5):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        color = (50 * number + 5, 200 - 40 * number, 90)
        Image.new("RGB", (64, 64), color).save(path)
    samples = folder.list_samples(
        folder.Options(root=str(tmp_path / "images")), cache=tmp_path, say=print
    )
    still = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0}
    size = {"patches_crop": 48, "patch": 8} if graph is pirl_jigsaw else {}
    options = graph.Options(image_size=24, **size, **still)

    found = invariance.measure(
        invariance.of_backbone(Brightest(), "global"),
        transforms.passes(
            folder,
            samples,
            [Part(graph.__name__, graph, options)],
            samples.usable,
            times=3,
            seed=0,
            device=torch.device("cpu"),
            loading=loader.Options(threads=1),
            say=print,
        ),
        seed=0,
    )

    assert found.same.tolist() == [0.0] * 15
    assert found.other.min() > 0.1


def test_passes_see_every_image_once_transformed_anew_and_repeat_with_the_seed(data):
    samples = folder.list_samples(folder.Options(root=str(data / "train")), cache=None, say=print)
    options = pirl_jigsaw.Options(image_size=24, patches_crop=48, patch=8)

    def pixels(rows: np.ndarray, seed: int) -> list[dict[str, Tensor]]:
        found = transforms.passes(
            folder,
            samples,
            [Part("pipelines.pirl_jigsaw", pirl_jigsaw, options)],
            rows,
            times=2,
            seed=seed,
            device=torch.device("cpu"),
            loading=loader.Options(threads=1),
            say=print,
        )
        return [{k: v.clone() for k, v in batch.items()} for each in found for batch in each]

    rows = transforms.evenly(samples.usable, 7)
    first, second = pixels(rows, 0)
    again, _ = pixels(rows, 0)
    other, _ = pixels(rows, 1)

    assert first["index"].tolist() == second["index"].tolist() == rows.tolist()
    assert torch.equal(first["patches"], again["patches"])
    assert not torch.equal(first["patches"], second["patches"])
    assert not torch.equal(first["patches"], other["patches"])
