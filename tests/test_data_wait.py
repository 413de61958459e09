"""A run tells how fast it is and how long it waits for images, and what to do about the latter."""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastssl import config, journal, train

SMALL = [
    "pipeline.image_size=32",
    "pipeline.patches_crop=48",
    "pipeline.patch=12",
    "objective.negatives=8",
    "train.batch=4",
    "train.epochs=3",
    "train.log_steps=5",
]
ADVICE = "waiting for images"


@pytest.fixture(scope="module")
def images(tmp_path_factory, demo_images) -> Path:
    """Twenty-four of the built-in images: six steps an epoch; nothing to probe beside them."""
    root = tmp_path_factory.mktemp("images") / "some of them"
    for folder in sorted((demo_images / "train").iterdir())[:4]:
        (root / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:6]:
            shutil.copy(file, root / folder.name)
    return root


@pytest.fixture
def arguments(recipe, images, tmp_path) -> list[str]:
    """The command line of a small run into tmp_path/run."""
    return [str(recipe), f"data.root={images}", *SMALL, f"train.out={tmp_path / 'run'}"]


def waits(folder: Path) -> list[float]:
    lines = journal.read(folder)
    assert all(line["images_per_second"] > 0 for line in lines)
    return [line["data_wait"] for line in lines]


def test_a_run_whose_images_come_too_late_names_the_command_once(arguments, tmp_path, capsys):
    code = train.main([*arguments, "data.use=tests.slow_reader"])
    shown = capsys.readouterr().out
    warned = shown.index(ADVICE)
    command = next(line for line in shown[warned:].splitlines() if line.startswith("python"))

    assert code == 0
    assert min(waits(tmp_path / "run")[2:]) > journal.WAITING
    assert shown.count(ADVICE) == 1
    assert warned > shown.index("step 10/18")  # not for the first batches, which no run has yet
    assert "images/s" in shown
    assert "data-wait" in shown
    assert command.startswith("python -m benchmarks stages ")
    assert "data.use=tests.slow_reader" in command


def test_a_run_whose_step_binds_is_left_alone(arguments, tmp_path, capsys, monkeypatch):
    usual = journal.Journal.step

    def slow(self, step: int) -> None:
        usual(self, step)
        time.sleep(0.25)  # a step in which the next batches are made

    monkeypatch.setattr(journal.Journal, "step", slow)
    code = train.main(arguments)
    shown = capsys.readouterr().out

    assert code == 0
    assert max(waits(tmp_path / "run")[2:]) <= journal.WAITING
    assert ADVICE not in shown
    assert shown.count("data-wait") == len(waits(tmp_path / "run")) == 4


def test_of_several_processes_the_one_that_waits_most_is_told_of(
    arguments, tmp_path, checkout, environ
):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [
            *launcher,
            str(checkout / "fastssl" / "train.py"),
            *arguments,
            "data.use=tests.slow_reader",
        ],
        env=environ | {"SLOW_RANK": "1"},  # rank 0, which writes, has its images in time
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert min(waits(tmp_path / "run")[2:]) > journal.WAITING
    assert done.stdout.count(ADVICE) == 1


def test_lines_of_the_warm_up_are_not_judged_and_one_sentence_is_enough(arguments):
    advice = journal.WaitAdvice(config.load(arguments[0], arguments[1:]))
    told = [advice.after(steps, wait) for steps, wait in ((6, 0.9), (6, 0.9), (6, 0.2))]

    assert told == [None, None, None]
    warned = advice.after(6, 0.21)
    assert warned is not None
    assert warned.startswith("warning: 21% of the time")
    assert advice.after(6, 0.9) is None


def test_lines_of_single_steps_are_judged_after_ten(arguments):
    advice = journal.WaitAdvice(config.load(arguments[0], arguments[1:]))

    assert [advice.after(1, 1.0) is None for _ in range(11)] == [True] * 10 + [False]


def test_the_command_stands_for_the_same_recipe(arguments):
    overrides = [
        *arguments[1:],
        "optim.weight_decay=1.0e-5",
        "data.limit=null",
        "pipeline.patches_area=[0.5, 1.0]",
        "probe.every_epochs=0",
    ]
    recipe = config.load(arguments[0], overrides)
    python, flag, module, command, path, *given = shlex.split(journal.stages_command(recipe))

    assert (python, flag, module, command) == ("python", "-m", "benchmarks", "stages")
    assert config.load(path, given).values == recipe.values
    assert len(given) == len(overrides)
