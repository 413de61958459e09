"""A grid: every run checked before the first trains, measured once, and put beside K19's table."""

import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from scipy import stats

from fastssl import config, grid, grid_table, k19_table, measuring
from fastssl.grid_table import About, Run
from fastssl.k19_table import Cell
from fastssl.sweeping import Runner

REVISITING = "recipes/revisiting"
TASKS = {
    "rotation": "Rotation",
    "exemplar": "Exemplar",
    "relative_patch": "RelPatchLoc",
    "jigsaw": "Jigsaw",
}
NETWORKS = {
    "resnet50v1": "RN50 v1",
    "resnet50v2": "RN50 v2",
    "revnet50": "RevNet50",
    "vgg19": "VGG19-BN",
}
# As published: rows as in NETWORKS' order of the table, columns task by task, the narrow first.
TABLE_1 = """
RevNet50     47.3 50.4 53.1 53.7 42.4 45.6 46.4 40.6 45.0 40.1 43.7
RN50 v2      43.8 47.5 47.2 47.6 43.0 45.7 46.6 42.2 46.7 38.4 41.3
RN50 v1      41.7 43.4 43.3 43.2 42.8 46.9 47.7 46.8 50.5 42.2 45.4
RevNet50(-)  45.2 51.0 52.8 53.7 38.0 42.6 44.3 33.8 43.5 36.1 41.5
RN50 v2(-)   38.6 44.5 47.3 48.2 33.7 36.7 38.2 38.6 43.4 32.5 34.4
VGG19-BN     16.8 14.6 16.6 22.7 26.4 28.3 29.0 28.5 29.4 19.8 21.1
"""
COLUMNS = [
    *[("Rotation", k) for k in (4, 8, 12, 16)],
    *[("Exemplar", k) for k in (4, 8, 12)],
    *[("RelPatchLoc", k) for k in (4, 8)],
    *[("Jigsaw", k) for k in (4, 8)],
]


@pytest.fixture(autouse=True)
def _in_checkout(checkout, monkeypatch):
    monkeypatch.chdir(checkout)


# K19's table.


def test_every_number_of_table_1_is_in_its_cell():
    lines = [line.rsplit(maxsplit=len(COLUMNS)) for line in TABLE_1.strip().splitlines()]

    assert [line[0].strip() for line in lines] == list(k19_table.NETWORKS)
    for network, *row in lines:
        for (task, k), written in zip(COLUMNS, row, strict=True):
            assert k19_table.published(Cell(network.strip(), task, k)) == float(written)


def test_a_cell_that_the_table_lacks_has_no_number_and_a_nearest_width():
    assert k19_table.published(Cell("RevNet50", "Jigsaw", 12)) is None
    assert k19_table.published(Cell("RevNet50", "Rotation", 1)) is None
    assert k19_table.published(Cell("convnext", "Rotation", 4)) is None
    assert k19_table.published(Cell("RevNet50", "pirl", 4)) is None
    assert [k19_table.nearest("Exemplar", k) for k in (1, 4, 11, 16)] == [4, 4, 12, 12]
    assert k19_table.nearest("pirl", 4) is None
    assert k19_table.nearest("Jigsaw", None) is None


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_is_of_the_cell_that_its_sections_say_whatever_its_name(task, network, tmp_path):
    copy = tmp_path / "odd_name.yaml"
    shutil.copy(f"{REVISITING}/{task}_{network}.yaml", copy)
    values = config.load(copy, ["data.root=/data/train"]).values

    assert k19_table.cell(values) == Cell(NETWORKS[network], TASKS[task], 4)
    wide = config.load(copy, ["data.root=/data/train", "backbone.widening=12"]).values
    assert k19_table.cell(wide).widening == 12


@pytest.mark.parametrize(
    ("backbone", "network", "k"),
    [
        ({"use": "fastssl.backbones.revnet", "widening": 4, "last_relu": False}, "RevNet50(-)", 4),
        (
            {"use": "fastssl.backbones.resnet_v2", "widening": 8, "representation": 512},
            "RN50 v2, representation 512",
            8,
        ),
        (
            {"use": "fastssl.backbones.revnet", "widening": 4, "units": [1, 1, 1, 1]},
            "RevNet 1-1-1-1",
            4,
        ),
        (
            {"use": "fastssl.backbones.resnet", "name": "resnet50", "width": 64, "widening": None},
            "RN50 v1",
            4,
        ),
        ({"use": "fastssl.backbones.resnet", "name": "resnet10", "width": 32}, "resnet10", 2),
        ({"use": "fastssl.backbones.named", "name": "timm:vit_tiny"}, "timm:vit_tiny", None),
        ({"use": "fastssl.backbones.nin", "blocks": 3}, "nin", None),
    ],
)
def test_variants_and_other_networks_have_rows_of_their_own(backbone, network, k):
    values = {
        "backbone": backbone,
        "objective": {"use": "fastssl.objectives.rotation"},
        "pipeline": {"use": "pipelines.rotation"},
    }

    assert k19_table.cell(values) == Cell(network, "Rotation", k)


@pytest.mark.parametrize(
    ("objective", "pipeline", "task"),
    [
        ("fastssl.objectives.pirl", "pipelines.pirl_jigsaw", "pirl (pirl_jigsaw)"),
        ("fastssl.objectives.colorization", "pipelines.colorization", "colorization"),
        (
            "fastssl.objectives.exemplar_classes",
            "pipelines.exemplar",
            "exemplar_classes (exemplar)",
        ),
    ],
)
def test_other_tasks_have_columns_of_their_own(objective, pipeline, task):
    backbone = {"use": "fastssl.backbones.revnet", "widening": 4}
    values = {"backbone": backbone, "objective": {"use": objective}, "pipeline": {"use": pipeline}}

    assert k19_table.cell(values) == Cell("RevNet50", task, 4)


# What is run.


def plan(recipes, overrides=(), out=Path("no such folder"), **options):
    paths = [f"{REVISITING}/{each}.yaml" for each in recipes]
    return grid.plan(paths, overrides, grid.Options(**options), out)


def test_every_recipe_runs_at_every_width_and_without_its_last_relu_where_it_has_one():
    points = plan(
        ["rotation_revnet50", "jigsaw_resnet50v1"],
        widenings=(1, 2),
        last_relu=(True, False),
        seeds=(3, 4),
    )

    assert [point.name for point in points[:6]] == [
        "rotation_revnet50,widening=1,last_relu=true,seed=3",
        "rotation_revnet50,widening=1,last_relu=false,seed=3",
        "jigsaw_resnet50v1,widening=1,seed=3",
        "rotation_revnet50,widening=2,last_relu=true,seed=3",
        "rotation_revnet50,widening=2,last_relu=false,seed=3",
        "jigsaw_resnet50v1,widening=2,seed=3",
    ]
    assert len(points) == 12
    last = points[-2].recipe
    assert (last.backbone.options.last_relu, last.backbone.options.widening) == (False, 2)
    assert (last.train.seed, last.train.out) == (4, str(points[-2].folder))


def test_a_folder_is_called_alike_whether_recipe_or_command_line_gave_its_width():
    by_recipe = plan(["rotation_revnet50"], ["data.root=/data/train"])
    by_command = plan(
        ["rotation_revnet50"],
        ["data.root=/data/train"],
        widenings=(4,),
        last_relu=(True,),
        seeds=(0,),
    )

    assert [point.name for point in by_recipe] == [point.name for point in by_command]
    assert by_recipe[0].recipe.values == by_command[0].recipe.values


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no recipe"),
        (["rotation_revnet50", "rotation_revnet50"], "given twice"),
        (["rotation_revnet5"], "did you mean 'recipes/revisiting/rotation_revnet50.yaml'"),
        (["rotation_revnet50", "grid.widening=[4]"], "did you mean 'widenings'"),
        (["rotation_revnet50", "grid.widenings=4"], r"write \[4\]"),
        (["rotation_revnet50", "grid.widenings=[0]"], r"\[0\]\) must be at least 1; K19's: 4, 8"),
        (["rotation_revnet50", "grid.widenings=[4,4]"], "has a value twice"),
        (["rotation_revnet50", "grid.probe=svm"], "expected one of 'linear', 'knn'"),
        (["rotation_revnet50", "grid.processes=0"], "must be at least 1"),
        (["rotation_revnet50", "backbone.widening=8"], r"give grid\.widenings"),
        (["rotation_revnet50", "train.out=x"], r"give grid\.out"),
        (["rotation_revnet50", "train.seed=1"], r"give grid\.seeds"),
        (["rotation_revnet50", "optim.lrr=1"], "did you mean 'lr'"),
        (["rotation_revnet50", "knn.neighbours=[5]"], r"is for grid\.probe=knn"),
        (["rotation_revnet50", "linear.l3=1"], "linear.l3: unknown key"),
        (["rotation_vgg19", "grid.last_relu=[false]"], "none of the networks"),
        (["rotation_revnet50", "grid.seeds=[-1]"], r"grid: seeds \(\[-1\]\) must be in 0 ..."),
        (["rotation_revnet50", f"grid.seeds=[0,{2**31}]"], "grid: seeds .* must be in 0 ..."),
        (["rotation_revnet50", "features.stages=[layer4]"], "a grid measures the last stage"),
        (["rotation_revnet50", "features.stages=[lst]"], "a grid measures the last stage"),
        (
            ["rotation_revnet50", "grid.probe=knn", "knn.stages=[layer4]"],
            r"knn\.stages=\[layer4\]: a grid .* fastssl\.evaluate knn RUN",
        ),
    ],
)
def test_a_mistake_is_one_line_and_2_before_anything_is_made(words, said, tmp_path, capsys):
    paths = [word if "=" in word else f"{REVISITING}/{word}.yaml" for word in words]
    code = grid.main([*paths, f"grid.out={tmp_path / 'out'}"])

    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    with pytest.raises(ValueError, match=said):
        raise ValueError(line)
    assert not (tmp_path / "out").exists()


def test_a_width_of_a_network_that_has_none_is_refused(tmp_path, capsys):
    code = grid.main(
        ["recipes/rotation_cifar.yaml", "grid.widenings=[4]", f"grid.out={tmp_path / 'out'}"]
    )

    assert code == 2
    assert "fastssl.backbones.nin has no widening" in capsys.readouterr().err


def test_two_recipes_of_one_cell_are_refused(tmp_path, capsys, demo_images):
    del demo_images  # rendered
    copy = tmp_path / "again.yaml"
    shutil.copy(f"{REVISITING}/rotation_revnet50.yaml", copy)
    line = [f"{REVISITING}/rotation_revnet50.yaml", str(copy), f"grid.out={tmp_path / 'out'}"]

    assert grid.main(line) == 2
    said = capsys.readouterr().err
    assert "of one cell of the table, RevNet50 at Rotation, and have one seed" in said


def test_ctrl_c_before_the_first_run_is_told_in_a_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "plan", interrupted)

    assert grid.main([f"{REVISITING}/rotation_revnet50.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_recipes_of_different_images_are_refused(tmp_path, capsys, demo_images):
    text = Path(f"{REVISITING}/rotation_revnet50.yaml").read_text()
    other = tmp_path / "other.yaml"
    reader = "use: pipelines.readers.folder\n"
    assert reader in text
    other.write_text(text.replace(reader, f"{reader}  root: {demo_images / 'train'}\n"))
    line = [str(other), f"{REVISITING}/jigsaw_revnet50.yaml", f"grid.out={tmp_path / 'out'}"]

    assert grid.main(line) == 2
    assert "give data.root and probe.root for all" in capsys.readouterr().err


def test_under_a_launcher_it_says_what_to_give_instead(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert grid.main([f"{REVISITING}/rotation_revnet50.yaml"]) == 2
    assert "grid.processes=2" in capsys.readouterr().err


def test_help_lists_what_a_grid_takes(capsys):
    assert grid.main(["--help"]) == 0
    lines = {line.strip() for line in capsys.readouterr().out.splitlines()}

    assert {"grid.widenings=[]", "grid.probe=linear", "linear.updates=800"} <= lines
    assert not [line for line in lines if line.startswith(("features.stages", "knn.stages"))]
    assert grid.main([]) == 2


# What is done: by one that stands in for the processes, then once by processes.


class Here(Runner):
    """Makes finished runs, and lines of probes, in no time."""

    asked: ClassVar[list[str]] = []  # what and of which run, since the last command
    broken: ClassVar[set[str]] = set()  # recipes that can't be trained
    overtaken: ClassVar[list[str]] = []  # overrides of the run that another command has finished
    mute: ClassVar[bool] = False  # its probes write no line
    accuracy: ClassVar[dict[str, float]] = {}  # recipe -> of its runs

    def __init__(self) -> None:
        super().__init__()
        Here.asked.clear()

    def run(self, module, arguments, *, processes, log=None):
        assert (processes, log) == (1, None)
        if module == "fastssl.train":
            recipe = config.load(arguments[0], arguments[1:])
            Here.asked.append(f"train {Path(str(recipe.train.out)).name}")
            if recipe.name in Here.broken:
                return 1, "error: it broke"
            if Here.overtaken:
                finish(config.load(arguments[0], [*arguments[1:], *Here.overtaken]))
                return 2, f"error: {recipe.train.out} holds a finished run"
            finish(recipe)
            return 0, ""
        assert module == "fastssl.evaluate"
        what, run, *passed = arguments
        assert passed[:2] == ["features.stages=[last]", f"{what}.{Here.passed}"]
        Here.asked.append(f"{what} {Path(run).name}")
        if Here.mute:
            return 0, ""
        line = {"step": 2, "probe": what, "stage": "pool"}
        line["accuracy"] = Here.accuracy[Path(run).name.partition(",")[0]]
        with (Path(run) / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return 0, ""

    passed: ClassVar[str] = "memory_gb=2"


def finish(recipe, weights="first"):
    """A finished run of the recipe, as far as a grid looks at one."""
    folder = Path(recipe.train.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "backbone.json").write_text(json.dumps({"weights": weights}))
    (folder / "recipe.yaml").write_text(config.dump(recipe))


@pytest.fixture
def here(monkeypatch, demo_images):
    """Runs commands of grid by the stand-in."""
    del demo_images  # rendered
    monkeypatch.setattr(grid, "Runner", Here)
    Here.broken, Here.overtaken, Here.mute = set(), [], False
    Here.passed = "memory_gb=2"
    Here.accuracy = {
        "rotation_revnet50": 0.5,
        "rotation_resnet50v1": 0.3,
        "rotation_resnet50v2": 0.2,
        "jigsaw_revnet50": 0.3,
        "jigsaw_resnet50v1": 0.5,
        "jigsaw_resnet50v2": 0.2,
        "jigsaw_vgg19": 0.1,
    }

    def command(recipes, out, *words):
        paths = [f"{REVISITING}/{each}.yaml" for each in recipes]
        return grid.main([*paths, f"grid.out={out}", f"linear.{Here.passed}", *words])

    return command


ROTATION = ["rotation_revnet50", "rotation_resnet50v1", "rotation_resnet50v2"]
JIGSAW = ["jigsaw_revnet50", "jigsaw_resnet50v1", "jigsaw_resnet50v2"]
SEEDS = ["grid.widenings=[1]", "grid.seeds=[0,1]"]


def table_of(out):
    """Row -> column -> what stands there."""
    lines = (out / "table.md").read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


def test_the_table_has_what_ran_beside_k19_and_nothing_where_nothing_ran(here, tmp_path, capsys):
    assert here([*ROTATION, "jigsaw_vgg19"], tmp_path, *SEEDS) == 0
    table = table_of(tmp_path)

    assert list(table) == list(k19_table.NETWORKS)
    assert list(table["RN50 v1"]) == ["Rotation 1x", "K19 4x", "Jigsaw 1x"]  # and its own K19 4x
    assert table["RN50 v2"]["Rotation 1x"] == "20.0 +- 0.0 (2)"
    assert table["RN50 v2(-)"]["Rotation 1x"] == ""
    assert table["VGG19-BN"]["Jigsaw 1x"] == "10.0 +- 0.0 (2)"
    assert table["VGG19-BN"]["K19 4x"] == "19.8"  # of the last such column, that of Jigsaw
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    told = json.loads((tmp_path / "table.json").read_text())
    (cell,) = [each for each in told["cells"] if each["network"] == "RevNet50"]
    assert (cell["accuracy"], cell["runs"], cell["k19"]) == (50, 2, None)
    assert (cell["k19_nearest"], cell["k19_nearest_widening"]) == (47.3, 4)
    assert len(told["runs"]) == 8
    assert told["images"].startswith("built-in images")


def test_what_is_finished_is_not_run_again_and_what_was_measured_not_measured_again(here, tmp_path):
    here(ROTATION, tmp_path, "grid.widenings=[1]")
    first = list(Here.asked)
    here(ROTATION, tmp_path, "grid.widenings=[1]")

    assert [each.partition(" ")[0] for each in first] == ["train", "linear"] * 3
    assert Here.asked == []
    folder = "rotation_revnet50,widening=1,last_relu=true,seed=0"
    finish(
        config.load(tmp_path / folder / "recipe.yaml", [f"train.out={tmp_path / folder}"]), "others"
    )
    here(ROTATION, tmp_path, "grid.widenings=[1]")
    assert Here.asked == [f"linear {folder}"]  # other weights
    Here.passed = "memory_gb=3"
    here(ROTATION, tmp_path, "grid.widenings=[1]")
    assert [each.partition(" ")[0] for each in Here.asked] == ["linear"] * 3


def test_a_measurement_is_known_however_its_settings_are_written(here, tmp_path, demo_images):
    images = [f"data.root={demo_images / 'train'}", "grid.widenings=[1]"]
    asked = ["linear.l2=0.01", "features.batch=64", f"probe.root={demo_images}"]
    assert here(ONE, tmp_path, *images, *asked) == 0
    assert Here.asked
    Here.passed = "memory_gb=2.0"
    alike = [
        "features.batch=64",
        "linear.updates=800",
        f"probe.root={demo_images}/",
        "linear.l2=1.0e-2",
    ]
    assert here(ONE, tmp_path, *images, *alike) == 0

    assert Here.asked == []
    assert table_of(tmp_path)["RevNet50"]["Rotation 1x"] == "50.0"
    (tmp_path / "root").symlink_to(demo_images)
    assert here(ONE, tmp_path, *images, *asked[:2], f"probe.root={tmp_path / 'root'}") == 0
    assert Here.asked  # for all that is known, other images


def test_runs_that_were_measured_otherwise_are_told_and_not_in_the_table(here, tmp_path, capsys):
    here(ONE, tmp_path, "grid.widenings=[1]")
    assert "otherwise" not in capsys.readouterr().out
    here(ROTATION[1:], tmp_path, "grid.widenings=[1]")
    assert "otherwise" not in capsys.readouterr().out
    Here.passed = "memory_gb=3"
    here(ROTATION[1:], tmp_path, "grid.widenings=[1]")

    (line,) = [each for each in capsys.readouterr().out.splitlines() if "otherwise" in each]
    assert f"of the runs in {tmp_path}, 1 measured otherwise" in line
    assert line.endswith(f"not in this table: {FOLDER}")
    assert table_of(tmp_path)["RevNet50"]["Rotation 1x"] == ""


@pytest.mark.parametrize(
    ("key", "given"), [("data.root", []), ("data.root", ["probe.root=IMAGES"]), ("probe.root", [])]
)
def test_a_folder_that_is_not_there_is_named_by_its_own_key(
    tmp_path, capsys, demo_images, key, given
):
    words = [each.replace("IMAGES", str(demo_images)) for each in given]
    if key == "probe.root":
        words.append(f"data.root={demo_images / 'train'}")
    path = f"{REVISITING}/rotation_revnet50.yaml"
    line = [path, f"{key}={tmp_path / 'imagnet'}", *words, f"grid.out={tmp_path / 'out'}"]

    assert grid.main(line) == 2
    said = capsys.readouterr().err
    assert said == f"error: {path}: {key}: there is no {tmp_path / 'imagnet'}\n"


def test_a_split_that_is_not_there_is_told_of_probe_root(tmp_path, capsys, demo_images):
    (tmp_path / "probed").mkdir()
    path = f"{REVISITING}/rotation_revnet50.yaml"
    roots = [f"data.root={demo_images / 'train'}", f"probe.root={tmp_path / 'probed'}"]

    assert grid.main([path, *roots, f"grid.out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert f"{path}: probe.root ({tmp_path / 'probed'}): there is no folder" in said


def test_commands_with_one_folder_make_one_table(here, tmp_path):
    here(ROTATION, tmp_path, "grid.widenings=[1]")
    here(JIGSAW, tmp_path, "grid.widenings=[1]")
    one = (tmp_path / "table.md").read_text()
    here([*ROTATION, *JIGSAW], tmp_path, "grid.widenings=[1]")

    assert Here.asked == []
    assert (tmp_path / "table.md").read_text() == one
    assert table_of(tmp_path)["RevNet50"]["Rotation 1x"] == "50.0"
    assert table_of(tmp_path)["RevNet50"]["Jigsaw 1x"] == "30.0"


def test_a_failed_run_is_told_and_the_next_begins(here, tmp_path, capsys):
    Here.broken = {"rotation_resnet50v1"}
    code = here(ROTATION, tmp_path, "grid.widenings=[1]")

    assert code == 1
    why = "rotation_resnet50v1,widening=1,seed=0: train.py ended with 1: error: it broke"
    assert f"grid: failed: {why}" in capsys.readouterr().out
    assert f"- {why}" in (tmp_path / "table.md").read_text()
    table = table_of(tmp_path)
    assert (table["RN50 v1"]["Rotation 1x"], table["RN50 v2"]["Rotation 1x"]) == ("", "20.0")
    Here.broken = set()
    assert here(ROTATION, tmp_path, "grid.widenings=[1]") == 0
    assert "Failed" not in (tmp_path / "table.md").read_text()


def test_a_finished_run_of_another_recipe_is_not_taken_for_the_point(here, tmp_path, capsys):
    here(ROTATION[:1], tmp_path, "grid.widenings=[1]")

    assert here(ROTATION[:1], tmp_path, "grid.widenings=[1]", "optim.lr=0.3") == 2
    said = capsys.readouterr().err
    assert "another recipe (optim.lr: 0.05 there, 0.3 here)" in said
    assert "grid.out=..." in said


ONE = ["rotation_revnet50"]
FOLDER = "rotation_revnet50,widening=1,last_relu=true,seed=0"


def test_runs_of_other_settings_are_no_spread_over_seeds(here, tmp_path, capsys):
    here(ONE, tmp_path, "grid.widenings=[1]", "grid.seeds=[0]")
    line = [tmp_path, "grid.widenings=[1]", "grid.seeds=[1]"]

    assert here(ONE, *line, "optim.lr=0.9", "train.epochs=1") == 2
    said = capsys.readouterr().err
    assert f"{FOLDER} and rotation_revnet50,widening=1,last_relu=true,seed=1 are of one" in said
    assert "optim.lr: 0.05 there, 0.9 here" in said
    assert "train.epochs: 8 there, 1 here" in said
    assert [each.name for each in tmp_path.iterdir() if each.is_dir()] == [FOLDER]
    assert here(ONE, *line, "loader.threads=1", "probe.neighbours=[5]") == 0
    assert table_of(tmp_path)["RevNet50"]["Rotation 1x"] == "50.0 +- 0.0 (2)"


def test_recipes_that_differ_in_the_seed_alone_share_a_cell(here, tmp_path, capsys):
    text = Path(f"{REVISITING}/rotation_revnet50.yaml").read_text()
    copy = tmp_path / "again.yaml"
    copy.write_text(text.replace("\ntrain:\n", "\ntrain:\n  seed: 5\n"))
    Here.accuracy["again"] = 0.3

    assert here(ONE, tmp_path / "out", "grid.widenings=[1]", str(copy)) == 0
    assert table_of(tmp_path / "out")["RevNet50"]["Rotation 1x"] == "40.0 +- 14.1 (2)"
    copy.write_text(copy.read_text().replace("gamma: 0.1", "gamma: 0.2"))
    assert here(ONE, tmp_path / "other", "grid.widenings=[1]", str(copy)) == 2
    assert "optim.gamma: 0.2 there, 0.1 here" in capsys.readouterr().err


def test_a_run_whose_folder_was_renamed_is_called_as_it_is_now(here, tmp_path, capsys):
    here(ONE, tmp_path, "grid.widenings=[1]")
    (tmp_path / FOLDER).rename(tmp_path / "best")

    assert here(ONE, tmp_path, "grid.widenings=[1]") == 2
    assert f"best and {FOLDER} are of one cell" in capsys.readouterr().err


def test_what_another_command_has_finished_meanwhile_is_measured(here, tmp_path):
    Here.overtaken = ["loader.threads=1"]

    assert here(ONE, tmp_path, "grid.widenings=[1]") == 0
    assert Here.asked == [f"train {FOLDER}", f"linear {FOLDER}"]


def test_what_another_command_has_finished_otherwise_is_a_failure(here, tmp_path, capsys):
    Here.overtaken = ["optim.lr=0.9"]

    assert here(ONE, tmp_path, "grid.widenings=[1]") == 1
    assert "train.py ended with 2: error:" in capsys.readouterr().out


def test_a_finished_run_without_its_recipe_is_named_where_it_is_asked_for(here, tmp_path, capsys):
    here(ONE, tmp_path, "grid.widenings=[1]")
    (tmp_path / FOLDER / "recipe.yaml").unlink()
    capsys.readouterr()

    assert here(ONE, tmp_path, "grid.widenings=[1]") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{FOLDER} holds a finished run without its recipe.yaml: name another folder" in line


@pytest.mark.parametrize("text", [None, "", "[]", "train: 3", "a: [", "model: {}"])
def test_other_runs_without_a_recipe_are_left_out_of_the_table(here, tmp_path, capsys, text):
    here(ONE, tmp_path, "grid.widenings=[1]")
    recipe = tmp_path / FOLDER / "recipe.yaml"
    recipe.unlink() if text is None else recipe.write_text(text)
    capsys.readouterr()

    assert here(ROTATION[1:], tmp_path, "grid.widenings=[1]") == 0
    assert capsys.readouterr().out.count(": left out of the table") == 1  # not after every run
    assert table_of(tmp_path)["RevNet50"]["Rotation 1x"] == ""


def entry(**changed):
    """A measurement file of the run in `here`, with one thing changed."""

    def change(text):
        ((name, found),) = json.loads(text).items()
        return json.dumps({name: {**found, **changed}})

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "",
        lambda _: "[]",
        lambda text: text[:30],
        lambda text: json.dumps({name: [] for name in json.loads(text)}),
        lambda text: text.replace('"accuracy"', '"acc"'),
        lambda text: text.replace('"weights"', '"weight"'),
        entry(accuracy=float("nan")),
        entry(accuracy=None),
        entry(weights=1),
    ],
)
def test_a_damaged_measurement_is_told_and_made_again(here, tmp_path, capsys, damage):
    here(ONE, tmp_path, "grid.widenings=[1]")
    kept = tmp_path / FOLDER / "grid.json"
    whole = kept.read_text()
    kept.write_text(damage(whole))
    capsys.readouterr()

    assert here(ONE, tmp_path, "grid.widenings=[1]") == 0
    assert capsys.readouterr().out.count(f"{kept} can't be read") == 1
    assert Here.asked == [f"linear {FOLDER}"]
    assert json.loads(kept.read_text()) == json.loads(whole)


@pytest.mark.parametrize("accuracy", [float("nan"), float("inf"), None])
def test_an_accuracy_that_is_no_number_is_a_failure(here, tmp_path, capsys, accuracy):
    Here.accuracy["rotation_revnet50"] = accuracy

    assert here(ONE, tmp_path, "grid.widenings=[1]") == 1
    assert f"evaluate.py linear found an accuracy of {accuracy}" in capsys.readouterr().out
    assert not (tmp_path / FOLDER / "grid.json").exists()
    table = (tmp_path / "table.json").read_text()
    assert json.loads(table, parse_constant=pytest.fail)["runs"] == []


def test_a_probe_that_writes_nothing_is_a_failure_whatever_was_measured_before(
    here, tmp_path, capsys
):
    here(ONE, tmp_path, "grid.widenings=[1]")
    Here.passed, Here.mute = "memory_gb=3", True

    assert here(ONE, tmp_path, "grid.widenings=[1]") == 1
    assert f"wrote no accuracy to {tmp_path / FOLDER}/metrics" in capsys.readouterr().out


def test_the_table_says_whose_failures_it_has(here, tmp_path):
    Here.broken = {"rotation_resnet50v1"}
    here(ROTATION, tmp_path, "grid.widenings=[1]")

    assert "\nFailed in the last command:\n" in (tmp_path / "table.md").read_text()


def test_measurements_of_earlier_versions_are_known(here, tmp_path):
    here(ONE, tmp_path, "grid.widenings=[1]")
    images = "built-in images, settings of the recipes' demo sections"
    arguments = ["features.stages=[last]", "linear.memory_gb=2"]

    kept = tmp_path / FOLDER / "grid.json"
    (found,) = json.loads(kept.read_text()).values()
    kept.write_text(json.dumps({measuring.fingerprint(["linear", arguments, images]): found}))
    here(ONE, tmp_path, "grid.widenings=[1]")
    assert Here.asked == []
    assert table_of(tmp_path)["RevNet50"]["Rotation 1x"] == "50.0"
    told = ["linear", ["features.stages=[last]", "linear.l2=0.001", "linear.updates=60"], images]
    assert measuring.fingerprint(told) == "05eff3392d0bab23"


def test_ranks_are_compared_with_k19_and_between_tasks(here, tmp_path):
    here([*ROTATION, *JIGSAW, "jigsaw_vgg19"], tmp_path, "grid.widenings=[1]")
    (rotation, jigsaw, both) = json.loads((tmp_path / "table.json").read_text())["rank_agreement"]

    # ours: RevNet50, v1, v2; K19's: RevNet50, v2, v1
    assert rotation["and"] == "K19's Rotation 4x"
    assert rotation["spearman"] == pytest.approx(0.5)
    # ours: v1, RevNet50, v2, VGG; K19's alike
    assert (jigsaw["networks"], jigsaw["spearman"]) == (
        ["RevNet50", "RN50 v2", "RN50 v1", "VGG19-BN"],
        pytest.approx(1),
    )
    # ours: RevNet50, v1, v2 and v1, RevNet50, v2; K19's: RevNet50, v2, v1 and v1, RevNet50, v2
    assert both["spearman"] == pytest.approx(0.5)
    assert both["k19"] == pytest.approx(-0.5)
    text = (tmp_path / "table.md").read_text()
    assert "- Rotation 1x and Jigsaw 1x: +0.50 (3 networks); K19's own: -0.50" in text


def test_two_networks_make_no_ranking(here, tmp_path):
    here(ROTATION[:2], tmp_path, "grid.widenings=[1]")

    assert "Rank" not in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_scipys(seed):
    draw = random.Random(seed)
    first, second = ([draw.randrange(5) for _ in range(7)] for _ in range(2))

    assert grid_table.spearman(first, second) == pytest.approx(stats.spearmanr(first, second)[0])


def test_without_an_order_there_is_no_rank_correlation(tmp_path):
    assert grid_table.spearman([1, 1, 1], [1, 2, 3]) is None
    values = {"train": {"epochs": 1}, "backbone": {}}
    runs = [Run(name, Cell(name, "Jigsaw", 4), 0, 0.1, values) for name in k19_table.NETWORKS]
    text = grid_table.write(tmp_path, runs, About("knn", (), "images", 0.1), {})

    assert "Jigsaw 4x and K19's Jigsaw 4x: no order on one side (6 networks)" in text


SMALL = [
    "data.use=tests.slow_reader",
    *("data.limit=16", "pipeline.image_size=24", "pipeline.patches_crop=36", "pipeline.patch=8"),
    *("evaluation.resize=24", "evaluation.crop=24", "objective.negatives=8", "optim.lr_batch=8"),
    *("train.batch=8", "train.epochs=20", "train.log_steps=1", "probe.every_epochs=0"),
]


def test_a_signal_stops_the_grid_with_75_and_the_same_command_goes_on(
    recipe, demo_images, tmp_path, monkeypatch
):
    del demo_images  # rendered
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("SLOW_RANK", "0")  # 40 steps take 6 s: time for a signal
    out = tmp_path / "out"
    log = out / "small,seed=0" / "metrics.jsonl"
    probe = ["linear.updates=3", "features.batch=256", f"features.cache={tmp_path / 'features'}"]
    line = [str(recipe), *SMALL, *probe, f"grid.out={out}"]

    ended = threading.Event()

    def stop_in_training():
        while not (log.exists() and log.stat().st_size):
            if ended.wait(0.02):
                return  # nobody is there to take the signal
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_in_training)
    stopper.start()
    try:
        stopped = grid.main(line)
    finally:
        ended.set()
        stopper.join()
    monkeypatch.setenv("SLOW_RANK", "-1")
    steps = json.loads(log.read_text().splitlines()[-1])["step"]
    code = grid.main(line)

    assert (stopped, code) == (75, 0)
    assert 0 < steps < 40
    starts = json.loads((out / "small,seed=0" / "environment.json").read_text())
    assert len(starts) == 2
    lines = [json.loads(each) for each in log.read_text().splitlines()]
    (probed,) = [each for each in lines if each.get("probe") == "linear"]
    assert probed["stage"] == "pool"
    row = table_of(out)["tiny_backbone"]
    assert row["pirl (pirl_jigsaw)"] == f"{100 * probed['accuracy']:.1f}"
