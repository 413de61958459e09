"""A sweep: every point checked before the first trains, resumed after a signal, failures named."""

import csv
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from torch.distributed import run

from fastssl import backbone_file, config, evaluate, journal, launcher, measuring, sweeping
from fastssl.config import RecipeError
from fastssl.evaluations import sweep
from fastssl.sweeping import Outcome, Runner

# Two steps on a few of the built-in images, a backbone of 1,500 weights.
SMALL = [
    "data.limit=16",
    "pipeline.image_size=24",
    "pipeline.patches_crop=36",
    "pipeline.patch=8",
    "evaluation.resize=24",
    "evaluation.crop=24",
    "objective.negatives=8",
    "optim.lr_batch=8",
    "train.batch=8",
    "train.epochs=1",
    "train.log_steps=1",
    "probe.images=100",
]
LINEAR = ["sweep.key=optim.lr", "sweep.values=[0.1]", "sweep.probe=linear"]
GRID = ["sweep.key=train.precision", "sweep.values=[fp32, fp16]", "sweep.seeds=[3]"]


@pytest.fixture(scope="module")
def swept(recipe, demo_images, tmp_path_factory):
    """Folder, exit codes and output of a sweep that is stopped in its second run, and goes on."""
    del demo_images  # rendered
    out = tmp_path_factory.mktemp("swept") / "sweep"
    line = [str(recipe), *SMALL, *GRID, f"sweep.out={out}"]

    def stop_in_second_run():
        deadline = time.monotonic() + 300
        while not (out / "sweep.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "ACCELERATE_USE_CPU", "True"
        )  # where fp16 is a mistake that only train.py sees
        threading.Thread(target=stop_in_second_run).start()
        stopped, _ = sweep.command(line)
        first = (out / "precision=fp32,seed=3" / "metrics.jsonl").read_bytes()
        code, table = sweep.command(line)
    return out, (stopped, code), first, table


def test_a_signal_stops_the_sweep_with_75_and_the_same_command_goes_on(swept):
    out, (stopped, code), first, _ = swept

    assert stopped == 75
    assert code == 1  # the second point can't be trained
    assert (out / "precision=fp32,seed=3" / "metrics.jsonl").read_bytes() == first
    assert json.loads(first.splitlines()[-1])["step"] == 2


def test_a_failed_point_is_named_in_the_table_and_does_not_end_the_sweep(swept):
    out, _, _, table = swept

    assert table.columns[0] == "train.precision"
    assert [row[0] for row in table.rows] == ["fp32", "fp16"]
    assert [row[-1] for row in table.rows] == ["finished", "failed: 1"]
    with (out / "sweep.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert [run["state"] for run in runs] == ["finished", "failed"]
    assert "fp16" in runs[1]["reason"]
    assert "ended with 2" in runs[1]["reason"]
    assert "| fp16 | 0 | - |" in (out / "sweep.md").read_text()


def test_the_accuracy_is_what_the_run_measured_and_random_what_it_began_with(swept):
    out, _, _, table = swept
    folder = out / "precision=fp32,seed=3"
    probes = [line["accuracy"] for line in journal.read(folder) if line.get("probe") == "knn"]

    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["random"], row["knn"]) == (probes[0], probes[-1])
    (run, _) = json.loads((out / "sweep.json").read_text())["runs"]
    assert (run["seed"], run["accuracy"], run["run"]) == (3, probes[-1], str(folder))
    with Image.open(out / "sweep.png") as plot:
        assert plot.size == (1050, 675)


def test_a_finished_run_of_another_recipe_is_not_taken_for_the_point(swept, recipe):
    out, *_ = swept
    line = [str(recipe), *SMALL, *GRID, f"sweep.out={out}"]

    with pytest.raises(RecipeError, match=r"another recipe \(optim.lr: 0.12 there, 0.5 here"):
        sweep.command([*line, "optim.lr=0.5"])


def plan(recipe, tmp_path, keys, seeds=(), overrides=()):
    return sweeping.plan(str(recipe), [*SMALL, *overrides], keys, seeds, tmp_path)


def test_points_are_every_value_with_every_other_for_each_seed(recipe, tmp_path):
    keys = {"objective.patch_weight": (0, 0.5), "pipeline.permutations": (None, 24)}
    points = plan(recipe, tmp_path, keys, (1, 2))

    names = [point.name for point in points]
    assert names[:2] == [
        "patch_weight=0,permutations=null,seed=1",
        "patch_weight=0,permutations=24,seed=1",
    ]
    assert len(set(names)) == 8
    last = points[-1].recipe
    assert last.objective.options.patch_weight == 0.5
    assert last.pipeline.options.permutations == 24
    assert last.train.seed == 2
    assert last.train.out == str(points[-1].folder)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"objective.patch_weigth": (0, 1)}, "did you mean 'patch_weight'"),
        ({"objective.patch_weight": (0, 2.0)}, r"patch_weight \(2.0\) must lie in 0 ... 1"),
        ({"objective.negatives": (8, 0.5)}, "expected int, got 0.5"),
        ({"objectiv.negatives": (8,)}, "unknown section 'objectiv'"),
    ],
)
def test_every_point_is_checked_before_the_first_one_trains(recipe, tmp_path, keys, said):
    with pytest.raises(RecipeError, match=said) as error:
        plan(recipe, tmp_path, keys)

    assert len(str(error.value).splitlines()) == 1  # not once a point
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep.key=optim.lr"], "belong together"),
        (["sweep.values=[1]"], "belong together"),
        ([], "key .* must name a key of the recipe"),
        (["sweep.key=optim.lr", "sweep.values=[0.1, 0.1]"], "a value twice"),
        (["sweep.key=train.out", "sweep.values=[a, b]"], "not for a sweep"),
        (["sweep.key=train.seed", "sweep.values=[1]", "sweep.seeds=[1]"], "give one of them"),
        (["sweep.kee=1"], "did you mean 'key'"),
        (["sweep.key=optim.lr", "sweep.values=0.1"], r"write \[0.1\]"),
        (["sweep.key=optim.lr", "sweep.values=[0.1]", "linear.epochs=2"], "sweep.probe=linear"),
        ([*LINEAR, "linear.epoch=2"], "linear.epoch: unknown key; did you mean 'epochs'"),
        ([*LINEAR, "linear.updates=0"], "must be at least 1"),
        ([*LINEAR, "evaluate.seed=one"], "expected int or null, got 'one'"),
        ([*LINEAR, "evaluate.out=x"], "evaluate.out: unknown key"),
        (["sweep.key=optim.lr", "sweep.values=[0.1]", "train.out=x"], "give sweep.out"),
        (["sweep.key=optim.lr", "sweep.values=[0.1]", "a.yaml"], "expected one recipe, got"),
    ],
)
def test_a_mistake_in_the_grid_is_named(recipe, words, said):
    with pytest.raises(ValueError, match=said):
        sweep.command([str(recipe), *words])


def test_under_several_processes_it_says_what_to_give_instead(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(RecipeError, match=r"sweep\.processes=2"):
        sweep.command([str(recipe), "sweep.key=optim.lr", "sweep.values=[0.1]"])


def test_without_images_to_probe_on_nothing_is_trained(recipe, tmp_path, demo_images):
    (tmp_path / "images").symlink_to(demo_images / "train")
    folders = [f"data.root={tmp_path / 'images'}", f"sweep.out={tmp_path / 'o'}"]
    line = [str(recipe), *SMALL, *folders]

    with pytest.raises(RecipeError, match="give probe"):
        sweep.command([*line, "sweep.key=optim.lr", "sweep.values=[0.1]"])
    assert not (tmp_path / "o").exists()


def test_without_matplotlib_it_says_what_to_install(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ValueError, match=r"pip install 'fastssl\[evaluate\]'.*sweep.plot=false"):
        sweep.command([str(recipe), "sweep.key=optim.lr", "sweep.values=[0.1]"])


def test_seeds_become_a_mean_and_a_spread(recipe, tmp_path):
    points = plan(recipe, tmp_path, {"objective.negatives": (1, 1000)}, (0, 1))
    accuracies = [0.2, 0.4, 0.3, None]
    outcomes = [
        Outcome(point, "broke" if accuracy is None else None, accuracy, 0.1, None)
        for point, accuracy in zip(points, accuracies, strict=True)
    ]
    options = sweep.Options(key="objective.negatives", values=(1, 1000), seeds=(0, 1))
    about = {"keys": ["objective.negatives"], "chance": 0.1, "measured": {"name": 0.3}}
    table = sweep._write(tmp_path, about, outcomes, options)

    spread = 0.05 * 2**0.5  # of 0.2 and 0.3, n - 1
    assert table.rows[0][:5] == ["1", 2, 0.25, pytest.approx(spread), 0.1]
    assert table.rows[1][:5] == ["1000", 1, 0.4, None, 0.1]
    assert sweeping.measured(tmp_path) == {"name": 0.3}


class Here(Runner):
    """Does the work of a process in this one, which costs no start."""

    asked: ClassVar[list[str]] = []  # the RUNs of the last command

    def __init__(self) -> None:
        super().__init__()
        Here.asked.clear()

    def run(self, module, arguments, *, processes, log=None):
        assert (module, processes, log) == ("fastssl.evaluate", 1, None)
        Here.asked.append(arguments[1])
        return evaluate.main(arguments), ""


def finish(point, seed):
    """A finished run of the point, with random weights."""
    torch.manual_seed(seed)
    backbone = point.recipe.backbone.module.backbone(point.recipe.backbone.options)
    backbone_file.save_backbone(point.folder, backbone, point.recipe, step=2)
    (point.folder / "recipe.yaml").write_text(config.dump(point.recipe))


@pytest.fixture
def few(demo_images, tmp_path) -> Path:
    """Four classes of six images, and of three to test on."""
    for source in sorted((demo_images / "train").iterdir())[:4]:
        for split, count in (("train", 6), ("val", 3)):
            (tmp_path / "few" / split / source.name).mkdir(parents=True)
            for file in sorted((demo_images / split / source.name).iterdir())[:count]:
                shutil.copy(file, tmp_path / "few" / split / source.name)
    return tmp_path / "few"


def test_a_linear_probe_is_of_the_weights_that_are_there_and_once_of_each(
    recipe, few, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep, "Runner", Here)
    out, data = tmp_path / "sweep", f"data.root={few / 'train'}"
    keys = {"backbone.width": (2, 3), "optim.lr": (0.1, 0.2)}
    points = plan(recipe, out, keys, overrides=[data])
    for seed, point in enumerate(points):
        finish(point, seed)
    grid = ["sweep.key=backbone.width", "sweep.values=[2,3]"]
    grid += ["sweep.key2=optim.lr", "sweep.values2=[0.1,0.2]", "sweep.plot=false"]
    probed = ["sweep.probe=linear", "linear.updates=3", f"features.cache={tmp_path / 'features'}"]
    line = [str(recipe), *SMALL, data, *grid, *probed, f"sweep.out={out}"]

    code, table = sweep.command(line)
    assert table is not None
    assert code == 0
    folders = [str(point.folder) for point in points]
    # A network of each width, for the two learning rates of each
    first, third = f"random:{folders[0]}", f"random:{folders[2]}"
    assert Here.asked == [folders[0], first, folders[1], folders[2], third, folders[3]]
    told = json.loads((out / "sweep.json").read_text())["runs"]
    randoms = {
        json.loads(each.read_text().splitlines()[-1])["accuracy"]
        for each in out.glob("random-*/metrics.jsonl")
    }
    assert told[0]["random"] == told[1]["random"]
    assert told[2]["random"] == told[3]["random"]
    assert {each["random"] for each in told} == randoms
    assert [row[5] for row in table.rows] == [each["random"] for each in told]

    sweep.command(line)
    assert Here.asked == []

    finish(points[1], 9)  # trained anew
    _, table = sweep.command(line)
    assert table is not None
    assert Here.asked == [folders[1]]
    lines = [each for each in journal.read(points[1].folder) if each["probe"] == "linear"]
    assert len(lines) == 4  # two stages, twice
    assert table.rows[1][3] == lines[-1]["accuracy"]

    known, others = sweeping.measured(out), ["linear.updates=4", probed[-1]]
    assert sweep._linear(points[0], Here(), others, known)[0] is not None
    assert (Here.asked, len(known)) == ([folders[0]], 4 + 2 + 1 + 1)


class Overtaken(Runner):
    """As train.py where another command has just finished the run."""

    def __init__(self, finished):
        super().__init__()
        self._finished = finished

    def run(self, module, arguments, *, processes, log=None):
        assert (module, processes, log) == ("fastssl.train", 2, None)
        finish(self._finished, 0)
        return 2, "error: holds a finished run"


def test_what_another_command_has_finished_meanwhile_is_taken_if_it_is_the_same(recipe, tmp_path):
    keys = {"optim.lr": (0.1,)}
    (point,) = plan(recipe, tmp_path, keys)
    (same,) = plan(recipe, tmp_path, keys, overrides=["loader.threads=1"])
    (other,) = plan(recipe, tmp_path, keys, overrides=["optim.momentum=0.5"])

    assert sweeping.train(point, Overtaken(same), processes=2) == (0, "")
    assert sweeping.train(point, Overtaken(other), processes=2)[0] == 2


def test_a_finished_run_without_its_recipe_is_named(recipe, tmp_path):
    (point,) = plan(recipe, tmp_path, {"optim.lr": (0.1,)})
    finish(point, 0)
    (point.folder / "recipe.yaml").unlink()

    with pytest.raises(RecipeError, match=r"lr=0.1 holds a .* without its recipe.yaml: name an"):
        plan(recipe, tmp_path, {"optim.lr": (0.1,)})


def test_chance_is_of_all_classes_whatever_part_of_the_images_is_trained_on(recipe, few, tmp_path):
    data = [f"data.root={few / 'train'}", "data.limit=2"]
    (point,) = plan(recipe, tmp_path / "out", {"optim.lr": (0.1,)}, overrides=data)

    assert point.recipe.data.options.limit == 2
    assert measuring.classes(point) == 4


def test_an_accuracy_that_is_no_number_is_none(recipe, tmp_path):
    (point,) = plan(recipe, tmp_path, {"optim.lr": (0.1,)})
    lines = [
        {"step": 0, "probe": "knn", "accuracy": 0.5},
        {"step": 2, "loss": float("nan"), "accuracy": float("nan")},
        {"step": 2, "probe": "knn", "accuracy": float("nan")},
    ]
    point.folder.mkdir()
    (point.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    assert sweeping.knn(point) == (None, 0.5)
    assert sweeping.pretext(point) is None


SPEAKS = r"""
import sys, time
from pathlib import Path

print("warning: heard?", file=sys.stderr, flush=True)
for _ in range(30000):
    if Path(sys.argv[1]).exists():
        break
    time.sleep(0.01)
else:
    sys.exit("nobody heard it")
print("error: gr\u00fc\u00dfe", "and more", sep="\n", file=sys.stderr)
sys.exit(3)
"""


class Heard:
    """Standard error that makes a file when it hears of a warning, and then has no terminal."""

    def __init__(self, file):
        self.file, self.text = file, ""

    def write(self, text):
        self.text += text
        if "heard?" in self.text:
            self.file.touch()

    def flush(self):
        if self.file.exists():
            raise BrokenPipeError


@pytest.fixture
def speaks(tmp_path, monkeypatch):
    """A module that says something, waits for the file that it is given, and ends with 3."""
    (tmp_path / "speaks.py").write_text(SPEAKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    return "speaks"


def test_what_a_process_says_is_heard_while_it_runs(speaks, tmp_path, monkeypatch):
    heard = Heard(tmp_path / "heard")
    monkeypatch.setattr(sys, "stderr", heard)
    ended = Runner().run(speaks, [str(heard.file)], processes=1)

    assert ended == (3, "error: gr\u00fc\u00dfe")
    assert heard.text.splitlines() == ["warning: heard?", "error: gr\u00fc\u00dfe", "and more"]


def test_what_a_process_says_to_a_file_is_told_too(speaks, tmp_path):
    (tmp_path / "heard").touch()
    log = tmp_path / "log"
    ended = Runner().run(speaks, [str(tmp_path / "heard")], processes=1, log=log)

    assert ended == (3, "error: gr\u00fc\u00dfe")
    assert log.read_text(encoding="utf-8").splitlines()[-1] == "and more"


def test_processes_of_one_machine_meet_on_loopback_whatever_its_name_leads_to(monkeypatch):
    monkeypatch.delenv("PET_LOCAL_ADDR")  # shell.py's, for the same
    python = launcher.torchrun(2)
    arguments = run.parse_args([*python[2:], "script.py"])
    there, _, _ = run.config_from_args(arguments)

    assert python[:2] == ["-m", "torch.distributed.run"]
    assert (there.local_addr, there.nproc_per_node, there.max_nodes) == ("127.0.0.1", 2, 1)
    assert arguments.standalone


def test_help_lists_what_a_sweep_takes():
    lines = [line.strip() for line in sweep.usage().splitlines()]

    assert 'sweep.key=""' in lines or "sweep.key=''" in lines
    assert {"sweep.processes=1", "linear.protocol=lbfgs", "evaluate.seed=null"} <= {*lines}
    assert not [line for line in lines if line.startswith(("weights.", "backbone."))]


def test_wide_numbers_stand_on_a_log_axis_and_words_in_their_order():
    place, labels, is_log = sweep._axis((64, 4096))
    assert (place(64), labels, is_log) == (64.0, None, True)
    assert sweep._axis((0, 0.5, 1))[1:] == (None, False)
    place, labels, is_log = sweep._axis((24, None, (1, 2)))

    assert ([place(24), place(None), place((1, 2))], is_log) == ([0, 1, 2], False)
    assert labels == ["24", "null", "[1, 2]"]


def test_names_of_folders_are_plain(recipe, tmp_path):
    keys = {"pipeline.image_area": ((0.2, 1.0), (0.08, 1.0))}
    points = plan(recipe, tmp_path, keys)

    assert [point.name for point in points] == ["image_area=0.2-1.0", "image_area=0.08-1.0"]
    assert Path(points[0].folder).parent == tmp_path
