"""The main job, whole: what a run leaves, exact resume, signals, several processes, mistakes."""

import errno
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from fastssl import checkpoint, probe, train
from fastssl.representation import represent
from tests.small_run import SMALL, STEPS, assert_same_run, lines, newest, stop_at


@pytest.fixture(scope="module")
def data(tmp_path_factory, demo_images) -> Path:
    """train/ with 40 and val/ with 10 of the built-in images, in 5 classes."""
    root = tmp_path_factory.mktemp("data")
    for split, each in (("train", 8), ("val", 2)):
        for folder in sorted((demo_images / split).iterdir())[:5]:
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:each]:
                shutil.copy(file, root / split / folder.name)
    return root


@pytest.fixture
def command(recipe, data, tmp_path) -> Callable[..., list[str]]:
    """The command line of a small run into tmp_path/run."""

    def line(*overrides: str, out: str = "run") -> list[str]:
        given = [f"data.root={data / 'train'}", *SMALL, f"train.out={tmp_path / out}", *overrides]
        return [str(recipe), *given]

    return line


@pytest.fixture(scope="module")
def whole(recipe, data, tmp_path_factory) -> Path:
    """A run from its first step to its last, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code = train.main([str(recipe), f"data.root={data / 'train'}", *SMALL, f"train.out={out}"])
    assert code == 0
    return out


# ---- What a run leaves behind ------------------------------------------------------------------


def test_a_run_leaves_metrics_probes_weights_and_how_it_was_made(whole):
    training, probes = lines(whole), lines(whole, probes=True)
    environment = json.loads((whole / "environment.json").read_text())[0]
    card = json.loads((whole / "backbone.json").read_text())

    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in training] == [0] * 5 + [1] * 5 + [2] * 5
    wanted = {"loss", "lr", "images_per_second", "patches_per_second", "data_wait"}
    assert all(
        wanted | {"agreement", "std", "accuracy", "chance"} <= line.keys() for line in training
    )
    assert all(line["patches_per_second"] == 9 * line["images_per_second"] for line in training)
    assert all(0 <= line["data_wait"] <= 1 for line in training)
    assert [(line["step"], line["probe"]) for line in probes] == [(0, "knn"), (STEPS, "knn")]
    assert all(0 <= line["accuracy"] <= 1 for line in probes)
    assert torch.__version__.startswith(environment["versions"]["torch"])  # 2.15.0+cu132
    assert card["step"] == STEPS
    assert (whole / "recipe.yaml").exists()
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert kept == ["step-00000012.pt", "step-00000015.pt"]


def test_the_learning_rate_follows_the_cosine_by_step(whole):
    rates = [line["lr"] for line in lines(whole)]

    assert rates[0] == pytest.approx(0.05)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1.2e-4)


def test_the_same_seed_gives_the_same_run_and_another_another(whole, command):
    assert train.main(command()) == 0
    assert train.main(command("train.seed=1", out="other")) == 0
    out = Path(command()[-1].split("=")[1])

    assert_same_run(out, whole)
    assert lines(out.parent / "other")[0]["loss"] != lines(whole)[0]["loss"]


def test_parts_of_a_batch_see_the_images_of_the_whole_and_fill_the_bank_once(
    command, tmp_path, monkeypatch
):
    spy = ["objective.use=tests.spy_objective", "train.epochs=1"]
    seen = {}
    for parts in (1, 4):
        folder = tmp_path / f"spy-{parts}"
        folder.mkdir()
        monkeypatch.setenv("SPY_FOLDER", str(folder))
        assert train.main(command(*spy, f"train.accumulate={parts}", out=f"run-{parts}")) == 0
        rows = [json.loads(line) for line in (folder / "rank-0.jsonl").read_text().splitlines()]
        seen[parts] = [row["images"] for row in rows]

    assert seen[1] == seen[4]


def test_probes_come_every_so_many_epochs(command, tmp_path):
    assert train.main(command("probe.every_epochs=1")) == 0

    assert [line["step"] for line in lines(tmp_path / "run", probes=True)] == [0, 5, 10, 15]


def test_trackers_are_told(command, tmp_path):
    assert train.main(command("train.trackers=[tensorboard]", "train.epochs=1")) == 0

    assert list((tmp_path / "run").glob("**/events.out.tfevents*"))


# ---- Stopping and going on ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "number"),
    [(step, signal.SIGTERM) for step in (1, 4, 5, 7, 10, 14)] + [(3, signal.SIGINT)],
)
def test_a_stopped_run_goes_on_bit_for_bit(whole, command, tmp_path, monkeypatch, step, number):
    stop_at(monkeypatch, step, number)
    assert train.main(command()) == 75
    monkeypatch.undo()
    assert newest(tmp_path / "run").name == f"step-{step:08d}.pt"
    assert train.main(command()) == 0

    assert_same_run(tmp_path / "run", whole)


def test_a_run_stopped_three_times_is_the_same_run(whole, command, tmp_path, monkeypatch):
    for step in (2, 6, 11):
        stop_at(monkeypatch, step)
        assert train.main(command()) == 75
        monkeypatch.undo()
    assert train.main(command()) == 0

    assert_same_run(tmp_path / "run", whole)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [start["resumed"] is None for start in starts] == [True, False, False, False]


def count_batches(monkeypatch, end_in: int, end: Callable[[], None]) -> list[None]:
    """One element a batch of probes of a start, which `end` ends in batch number `end_in`."""
    usual, seen = probe.represent, []

    def ended(*arguments):
        seen.append(None)
        if len(seen) == end_in:
            end()
        return usual(*arguments)

    monkeypatch.setattr(probe, "represent", ended)
    return seen


def test_a_run_stopped_in_its_probes_goes_on_bit_for_bit_and_measures_once(
    whole, command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "MANY", 50)
    often = command("probe.every_epochs=1")
    # A probe has four batches: the third start measures at 10, and stops half-way at the end.
    for step, batch in ((0, 1), (10, 10), (STEPS, 7)):
        seen = count_batches(monkeypatch, batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train.main(often) == 75
        monkeypatch.setattr(probe, "represent", represent)
        assert len(seen) == batch  # not one more
        assert newest(tmp_path / "run").name == f"step-{step:08d}.pt"
        said = capsys.readouterr().out
        assert f"step {step}: measuring on 50 images" in said
        assert f"stopped by SIGTERM at step {step} of {STEPS}" in said
    assert not (tmp_path / "run" / "backbone.json").exists()
    assert train.main(often) == 0

    assert_same_run(tmp_path / "run", whole)
    assert [line["step"] for line in lines(tmp_path / "run", probes=True)] == [0, 5, 10, STEPS]


def test_a_run_killed_in_a_probe_goes_on_from_the_checkpoint_of_its_step(
    command, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def killed():
        raise Killed

    often = command("probe.every_epochs=1", "train.checkpoint_steps=5", "train.epochs=2")
    count_batches(monkeypatch, 6, killed)
    with pytest.raises(Killed):
        train.main(often)
    monkeypatch.undo()
    assert newest(tmp_path / "run").name == "step-00000005.pt"
    assert train.main(often) == 0

    assert [line["step"] for line in lines(tmp_path / "run", probes=True)] == [0, 5, 10]


@pytest.mark.parametrize("step", [3, 7])
def test_lines_of_a_stopped_run_are_means_over_the_same_steps(command, tmp_path, monkeypatch, step):
    often = ["train.log_steps=5", "train.checkpoint_steps=100"]
    assert train.main(command(*often, out="through")) == 0
    stop_at(monkeypatch, step)
    assert train.main(command(*often)) == 75
    monkeypatch.undo()
    assert train.main(command(*often)) == 0

    both = [lines(tmp_path / out) for out in ("run", "through")]
    for name in ("step", "loss", "agreement", "std", "accuracy"):
        assert [line[name] for line in both[0]] == [line[name] for line in both[1]]


def test_a_run_killed_before_its_first_checkpoint_begins_anew_in_its_folder(
    whole, command, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(Killed):
        train.main(command())
    monkeypatch.undo()
    assert train.main(command()) == 0

    assert_same_run(tmp_path / "run", whole)
    assert [line["step"] for line in lines(tmp_path / "run", probes=True)] == [0, STEPS]


def test_a_run_goes_on_in_another_folder_from_a_checkpoint_that_is_named(whole, command, tmp_path):
    start = whole / "checkpoints" / "step-00000012.pt"
    assert train.main(command(f"train.resume={start}")) == 0

    assert [line["step"] for line in lines(tmp_path / "run")] == [13, 14, 15]
    weights = [load_file(run / "backbone.safetensors") for run in (tmp_path / "run", whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def launch(
    checkout: Path, arguments: list[str], environ: dict, cwd: Path, **more
) -> subprocess.Popen:
    script = [sys.executable, "-W", "error::UserWarning", str(checkout / "fastssl" / "train.py")]
    return subprocess.Popen(
        [*script, *arguments],
        env=environ,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not any(line["step"] >= step for line in lines(out)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_run_goes_on_from_its_last_checkpoint(command, tmp_path, checkout, environ):
    # Another folder as working directory, nothing installed, own processes: as users start it. The
    # run to compare with too: one in this process may differ in the last bit (see test_faults.py).
    whole = launch(checkout, command(out="whole"), environ, tmp_path)
    first = launch(checkout, command(), environ, tmp_path)
    wait_for_step(tmp_path / "run", 6, first)
    first.kill()
    first.communicate()
    assert not (tmp_path / "run" / "backbone.json").exists()
    second = launch(checkout, command(), environ, tmp_path)
    for run in (whole, second):
        said = run.communicate()[0]
        assert run.returncode == 0, said

    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_ctrl_c_on_a_terminal_stops_with_75_and_the_bar_shows_rate_and_wait(
    command, tmp_path, checkout, environ
):
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(checkout / "fastssl" / "train.py"), *command("train.epochs=2000")],
        env=environ | {"TERM": "xterm", "COLUMNS": "200"},
        cwd=tmp_path,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    shown = b""
    interrupted = False
    while True:
        try:
            shown += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not interrupted and b"data-wait" in shown:
            os.killpg(process.pid, signal.SIGINT)
            interrupted = True
    os.close(main)

    assert process.wait() == 75
    assert b"images/s" in shown
    assert b"stopped by SIGINT at step" in shown
    assert b"Traceback" not in shown


def test_the_launcher_s_end_ends_the_run_with_a_checkpoint(command, tmp_path, checkout, environ):
    arguments = command("train.epochs=2000", "train.checkpoint_steps=100000")
    flags = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    launcher = Path(sys.executable).with_name("accelerate")
    process = subprocess.Popen(
        [
            launcher,
            "launch",
            *flags,
            "--dynamo_backend",
            "no",
            checkout / "fastssl/train.py",
            *arguments,
        ],
        env=environ,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(tmp_path / "run", 3, process)
    process.terminate()  # reaches the launcher only, which dies of it without passing it on
    process.wait()
    deadline = time.monotonic() + 300
    while checkpoint.latest(tmp_path / "run" / "checkpoints") is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    assert checkpoint.load(newest(tmp_path / "run"))["step"] >= 3


# ---- Two processes -----------------------------------------------------------------------------


def test_two_processes_share_the_images_and_hold_the_same_bank_and_weights(
    command, tmp_path, checkout, environ, monkeypatch
):
    spied = {}
    for world in (1, 2):
        folder = tmp_path / f"spy-{world}"
        folder.mkdir()
        arguments = command(
            "objective.use=tests.spy_objective", "train.epochs=2", out=f"run-{world}"
        )
        if world == 1:
            monkeypatch.setenv("SPY_FOLDER", str(folder))
            assert train.main(arguments) == 0
        else:
            launcher = Path(sys.executable).with_name("accelerate")
            flags = [
                "--cpu",
                "--num_processes",
                "2",
                "--num_machines",
                "1",
                "--mixed_precision",
                "no",
            ]
            script = [*flags, "--dynamo_backend", "no", checkout / "fastssl" / "train.py"]
            done = subprocess.run(
                [launcher, "launch", *script, *arguments],
                env=environ | {"SPY_FOLDER": str(folder)},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert "Warning" not in done.stderr
        files = sorted(folder.iterdir())
        spied[world] = [[json.loads(x) for x in file.read_text().splitlines()] for file in files]
    (alone,), (one, two) = spied[1], spied[2]

    assert len(one) == len(two) == len(alone) == 10
    for epoch in (0, 1):
        steps = range(5 * epoch, 5 * epoch + 5)
        together = [row for s in steps for row in one[s]["images"] + two[s]["images"]]
        assert sorted(together) == list(range(40))
    for a, b, c in zip(one, two, alone, strict=True):
        assert a["images"] + b["images"] == c["images"]
        assert a["bank"] == b["bank"]
        assert a["weights"] == b["weights"]
    metrics = lines(tmp_path / "run-2")
    assert [line["step"] for line in metrics] == list(range(1, 11))  # written once
    assert [line["step"] for line in lines(tmp_path / "run-2", probes=True)] == [0, 10]


# ---- Mistakes, and what goes wrong -------------------------------------------------------------


def fails(arguments: list[str], capsys) -> str:
    """The message of a run that ends with exit code 2, in one or a few lines and no traceback."""
    code = train.main(arguments)
    said = capsys.readouterr()
    assert code == 2, said
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    return said.err


def test_a_folder_that_is_not_there_is_named(command, capsys, tmp_path):
    message = fails(command(f"data.root={tmp_path / 'nowhere'}"), capsys)

    assert str(tmp_path / "nowhere") in message


def test_a_file_in_place_of_a_folder_is_named(command, capsys, recipe):
    assert str(recipe) in fails(command(f"data.root={recipe}"), capsys)


def test_a_folder_without_images_is_named(command, capsys, tmp_path):
    (tmp_path / "empty").mkdir()

    assert "no images" in fails(command(f"data.root={tmp_path / 'empty'}"), capsys)


def test_fewer_images_than_a_batch_says_how_many_there_are(command, capsys):
    message = fails(command("train.batch=64"), capsys)

    assert "40 images are fewer than one batch: give train.batch at most 40 (it is 64)" in message


def test_a_batch_that_does_not_divide_says_by_what(command, capsys, monkeypatch):
    assert "processes (1) x train.accumulate (3)" in fails(command("train.accumulate=3"), capsys)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "train.batch (8) must be a multiple of processes (3)" in fails(command(), capsys)


def test_half_precision_without_a_gpu_says_what_to_write(command, capsys):
    assert "train.precision (fp16) needs a GPU: give" in fails(
        command("train.precision=fp16"), capsys
    )


def test_a_graph_that_does_not_fit_the_objective_names_what_is_missing(
    command, capsys, data, tmp_path
):
    text = Path(command()[0]).read_text()
    start, end = text.index("pipeline:"), text.index("evaluation:")
    other = tmp_path / "other.yaml"
    other.write_text(text[:start] + "pipeline: {use: pipelines.evaluation}\n\n" + text[end:])
    small = [each for each in SMALL if not each.startswith("pipeline.")]
    message = fails([str(other), f"data.root={data / 'train'}", *small], capsys)

    assert "fastssl.objectives.pirl wants" in message
    assert "pipelines.evaluation does not put out" in message


def test_a_misspelt_key_and_an_unknown_network_are_told_before_anything_is_read(checkout, capsys):
    real = str(checkout / "recipes" / "pirl_jigsaw.yaml")
    message = fails([real, "optim.lrr=0.1", "backbone.name=resnet81"], capsys)

    assert "did you mean 'lr'" in message
    assert "resnet18" in message


def test_a_run_folder_that_holds_a_finished_run_is_left_alone(whole, command, capsys, monkeypatch):
    before = sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*"))
    message = fails(command(f"train.out={whole}"), capsys)

    assert "holds a finished run" in message
    assert "train.out=" in message
    assert sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*")) == before


@pytest.fixture
def stopped(command, tmp_path, monkeypatch) -> Path:
    """A run stopped after its third step."""
    stop_at(monkeypatch, 3)
    assert train.main(command()) == 75
    monkeypatch.undo()
    return tmp_path / "run"


def test_another_recipe_another_batch_or_another_file_list_is_refused_by_name(
    stopped, command, capsys, data, tmp_path, recipe
):
    before = sorted((path, path.stat().st_mtime_ns) for path in stopped.rglob("*"))
    assert "optim.lr: 0.05 there, 0.1 here" in fails(command("optim.lr=0.1"), capsys)
    assert "train.batch: 8 there, 4 here" in fails(command("train.batch=4"), capsys)
    some = next((data / "train").glob("*/*.jpg"))
    more = some.with_name("zz.jpg")
    shutil.copy(some, more)
    try:
        message = fails(command(), capsys)
    finally:
        more.unlink()
    assert "file list" in message
    after = sorted((p, p.stat().st_mtime_ns) for p in stopped.rglob("*") if p.name != ".lock")
    assert after == [each for each in before if each[0].name != ".lock"]
    assert train.main(command()) == 0  # nothing was lost


def test_never_resuming_refuses_a_folder_in_use(stopped, command, capsys):
    assert "is not empty" in fails(command("train.resume=never"), capsys)


def test_bad_files_are_skipped_with_a_count_or_refused(command, data, tmp_path, capsys):
    root = tmp_path / "images"
    shutil.copytree(data / "train", root)
    (root / "empty.jpg").touch()
    (root / "page.jpg").write_text("<html><body>404</body></html>")
    (root / "moving.gif").write_bytes(b"GIF89a" + bytes(50))
    whole = next(root.glob("*/*.jpg")).read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    run = [f"data.root={root}", "train.steps=1"]
    assert train.main(command(*run)) == 0
    said = capsys.readouterr().out

    assert "skipping 4 of 44 files" in said
    for name in ("empty.jpg", "page.jpg", "moving.gif", "cut.jpg"):
        assert name in said
    message = fails(command(*run, "data.bad=error", out="other"), capsys)
    assert "empty.jpg" in message
    assert "data.bad=skip" in message


def test_a_probe_folder_that_does_not_fit_is_refused_before_anything_is_written(
    command, capsys, data, tmp_path
):
    flat = tmp_path / "flat"
    for split in ("train", "val"):
        (flat / split).mkdir(parents=True)
        shutil.copy(next((data / "train").glob("*/*.jpg")), flat / split)
    assert "has no class folders" in fails(command(f"probe.root={flat}"), capsys)
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "val" / "stranger").mkdir()
    shutil.copy(next((data / "train").glob("*/*.jpg")), other / "val" / "stranger")
    message = fails(command(f"probe.root={other}"), capsys)

    assert "lacks: stranger" in message
    assert not (tmp_path / "run").exists()


def test_a_val_folder_without_classes_beside_the_images_only_means_no_probe(
    command, capsys, data, tmp_path
):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number, file in enumerate(sorted((data / "train").glob("*/*.jpg"))):
            shutil.copy(file, tmp_path / split / f"{number}.jpg")
    assert train.main(command(f"data.root={tmp_path / 'train'}", "train.steps=1")) == 0

    assert "probe: none beside data.root" in capsys.readouterr().out
    assert lines(tmp_path / "run", probes=True) == []


def test_images_smaller_than_the_crop_are_enlarged_and_that_is_said_once(command, capsys):
    assert train.main(command("pipeline.image_size=192", "train.steps=2")) == 0

    assert capsys.readouterr().out.count("pixels and will be enlarged") == 1


def test_a_loss_that_is_no_number_stops_with_the_step_and_the_images(command, capsys, tmp_path):
    code = train.main(command("optim.lr=1.0e+30", "optim.final_lr=0"))
    said = capsys.readouterr().err

    assert code == 1
    assert "the loss is nan at step" in said
    assert "rows" in said
    assert "last checkpoint" not in said  # there is none
    assert not (tmp_path / "run" / "backbone.json").exists()


def test_a_loss_that_is_no_number_points_to_the_checkpoint_before_it():
    told = str(train.Diverged(7, math.nan, np.array([3]), str, is_saved=True))

    assert "step 8: " in told
    assert "The last checkpoint is from before. The batch: rows 3" in told


def test_a_stop_after_the_loss_broke_saves_nothing(command, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 6)
    broken = ["optim.lr=1.0e+30", "optim.final_lr=0", "train.log_steps=1000"]
    code = train.main(command(*broken, "train.checkpoint_steps=1000"))

    assert code == 1
    assert "the loss is nan at step" in capsys.readouterr().err
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is None


def test_a_full_disk_costs_lines_for_a_while_and_not_the_run(
    whole, command, capsys, monkeypatch, tmp_path
):
    usual, calls = os.write, []

    def full_for_a_while(file, data):
        if b'"loss"' in data:
            calls.append(data)
            if 3 <= len(calls) <= 5:
                raise OSError(errno.ENOSPC, "No space left on device")
        return usual(file, data)

    monkeypatch.setattr(os, "write", full_for_a_while)
    assert train.main(command()) == 0
    monkeypatch.undo()

    assert capsys.readouterr().out.count("metrics.jsonl can't be written: No space left") == 1
    assert_same_run(tmp_path / "run", whole)


def test_a_mistake_in_what_fits_together_can_be_corrected_in_the_same_folder(command, capsys):
    grid = ["pipeline.grid=2", "train.steps=1"]
    message = fails(command(*grid), capsys)

    assert "patches (9) must be as many as the pipeline puts out: 4" in message
    assert train.main(command(*grid, "objective.patches=4")) == 0


def test_batch_norm_over_all_processes_is_refused_without_gpus(command, capsys):
    message = fails(command("train.sync_batchnorm=true"), capsys)

    assert "train.sync_batchnorm (true) needs GPUs: give false" in message


def test_a_tracker_that_is_not_there_is_refused_by_name(command, capsys, tmp_path):
    message = fails(command("train.trackers=[tensorbored]"), capsys)

    assert "train.trackers: tensorbored is not installed or not known" in message
    assert not (tmp_path / "run").exists()


def test_embeddings_that_collapse_are_told_once(command, capsys, monkeypatch):
    monkeypatch.setattr(train, "COLLAPSED", 10.0)
    assert train.main(command("train.steps=3")) == 0

    assert capsys.readouterr().out.count("the embeddings are almost all alike") == 1


def test_a_task_that_stays_at_chance_is_told_once(command, capsys):
    # 150 images all alike to a network that does not learn: the answers are guesses
    idle = ["optim.lr=1.0e-9", "optim.final_lr=0", "train.chance_steps=2", "train.steps=4"]
    assert train.main(command(*idle)) == 0

    assert capsys.readouterr().out.count("warning: after 2 steps the pretext accuracy") == 1


@pytest.mark.parametrize(
    ("accuracy", "answers", "is_chance"),
    [(0.25, 1000, True), (0.28, 1000, True), (0.30, 1000, False), (0.1, 1000, True)],
)
def test_chance_is_told_from_learning_by_three_standard_deviations(accuracy, answers, is_chance):
    assert train._is_chance({"accuracy": accuracy, "chance": 0.25}, answers) is is_chance
    assert not train._is_chance({"loss": 1.0}, answers)  # a task without an accuracy


def test_half_precision_clipping_and_parts_of_a_batch_train_together(command, tmp_path):
    options = ["train.precision=bf16", "train.clip=1.0", "train.accumulate=2", "train.steps=4"]
    AcceleratorState._reset_state(True)  # a process has one precision, as Accelerate sees it
    assert train.main(command(*options)) == 0
    AcceleratorState._reset_state(True)

    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "run"))


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_not_the_run(
    whole, command, capsys, monkeypatch, tmp_path
):
    usual, calls = checkpoint.save, []

    def full_once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise checkpoint.CheckpointError(
                "step-8.pt could not be written: No space left on device"
            )
        return usual(*arguments)

    monkeypatch.setattr(checkpoint, "save", full_once)
    assert train.main(command()) == 0

    assert "No space left on device" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole)
