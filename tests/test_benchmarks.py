"""The benchmarks do not rot: each runs for seconds, and the plain contender does the same task."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import demos, pirl_loader, soak
from fastssl import journal
from pipelines import pirl_jigsaw

MANIFEST = {
    *("cpu", "cores_allowed", "python", "torch", "torchvision", "dali", "pillow"),
    *("command", "commit"),
}


def run(module: str, folder: Path, out: Path, environ, checkout, *arguments: str):
    """As users start it, in a process of its own: the printed text and the JSON."""
    command = [sys.executable, "-m", module, str(folder), *arguments, "--out", str(out)]
    done = subprocess.run(command, env=environ, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["manifest"].keys() == MANIFEST
    assert module in result["manifest"]["command"]
    assert module == f"benchmarks.{result['benchmark']}"
    return done.stdout, result


def test_the_loader_benchmark_measures_each_contender(demo_images, tmp_path, environ, checkout):
    options = ["data.limit=12", *soak.SMALL, "--rounds=1", "--seconds=0.2", "--batch=4"]
    printed, result = run(
        "benchmarks.pirl_loader",
        demo_images / "val",
        tmp_path / "out.json",
        environ,
        checkout,
        *options,
    )

    assert result["unit"] == "images/s"
    assert list(result["rates"]) == ["decode", "graph", "fastssl", "pil"]
    assert all(len(each) == 1 and each[0] > 0 for each in result["rates"].values())
    assert all(each[0] > 0 for each in result["cpu_ms_per_image"].values())
    assert (result["batch"], result["images"]) == (4, 12)
    assert result["options"]["image_size"] == 16
    assert 96**2 <= result["mean_pixels"] <= 160**2
    assert result["mean_bytes"] > 1000
    assert pirl_loader.table(result) in printed


def test_the_table_of_ratios_compares_within_a_round():
    rates = {"decode": [200.0, 100.0, 400.0], "pil": [50.0, 50.0, 50.0], "graph": [100.0] * 3}
    lines = pirl_loader.table({"rates": rates}).splitlines()

    assert lines[2] == (
        "| decode | 200 (100 - 400) | 4.00 (2.00 - 8.00) | 1.00 (1.00 - 1.00) "
        "| 2.00 (1.00 - 4.00) |"
    )
    assert {line.count("|") for line in lines} == {6}


def test_a_demo_s_numbers_are_those_of_its_run(demo_images, tmp_path, environ, checkout):
    recipe = checkout / "recipes" / "pirl_jigsaw.yaml"
    quick = ["train.steps=3", "train.log_steps=1", "probe.images=64", f"--runs={tmp_path}"]
    printed, result = run(
        "benchmarks.demos", recipe, tmp_path / "out.json", environ, checkout, *quick
    )
    lines = journal.read(tmp_path / "pirl_jigsaw")
    (demo,) = result["demos"]

    assert (demo["exit_code"], demo["steps"]) == (0, 3)
    assert demo["chance"] == pytest.approx(1 / 250)
    assert demo["accuracy"] == [line["accuracy"] for line in lines if "loss" in line][-1]
    before, after = [line["accuracy"] for line in lines if "probe" in line]
    assert (demo["knn_before"], demo["knn_after"]) == (before, after)
    assert demos.row(demo) in printed


def test_a_demo_that_fails_is_told_and_counts(checkout, environ):
    command = [sys.executable, "-m", "benchmarks.demos", "recipes/pirl_jigsaw.yaml"]
    done = subprocess.run(
        [*command, "optim.lr=-1.0"], env=environ, cwd=checkout, capture_output=True, text=True
    )

    assert done.returncode == 1
    assert "| pirl_jigsaw | failed (1) |" in done.stdout
    assert "optim: lr (-1.0) must be above 0" in done.stderr


def test_a_soak_of_seconds_ends_with_a_verdict(demo_images, tmp_path, environ, checkout):
    options = ["--batches", "60", "--images", "12", "--threads", "1", "--note", "a test"]
    printed, result = run(
        "benchmarks.soak", demo_images / "val", tmp_path / "out.json", environ, checkout, *options
    )

    assert result["unit"] == "images/s"
    assert len(result["windows"]) == soak.WINDOWS
    names = ["batches", "images_per_second", "cpu_ms_per_image", "memory_mb", "files", "threads"]
    assert all(list(window) == [*names, "load"] for window in result["windows"])
    assert all(min(window[name] for name in names) > 0 for window in result["windows"])
    assert result["windows"][-1]["batches"] == 60
    assert (result["states"], result["resumes"], result["resumes_exact"]) == (60, 19, 19)
    assert len(result["old_to_new"]) == soak.ROUNDS
    assert (result["batch"], result["images"], result["skipped"]) == (4, 12, 0)
    assert result["note"] == "a test"
    assert result["passed"]
    assert soak.TABLE in printed
    assert soak.verdict(result) in printed
    assert "not judged in fewer than 10,000 batches" in printed


def windows(memory: list[float], *, batches: int = 200_000, **last: float) -> list[dict]:
    """A soak's windows with the given memory; the last one with other values."""
    same = {"images_per_second": 100.0, "cpu_ms_per_image": 2.0, "files": 6, "threads": 8}
    ends = [batches * (number + 1) // len(memory) for number in range(len(memory))]
    made = [{"batches": end, "memory_mb": m, **same} for end, m in zip(ends, memory, strict=True)]
    made[-1] |= last
    return made


GROWING = [800 + 2.0 * number for number in range(20)]  # a window is 10,000 batches
STARTING = [800 + 2.0 * min(number, 9) for number in range(20)]


@pytest.mark.parametrize(
    ("memory", "growth"), [(GROWING, 2.0), (STARTING, 0.0), (GROWING[::-1], -2.0)]
)
def test_a_soak_judges_memory_by_its_second_half(memory, growth):
    judged = soak.judge(windows(memory))

    assert judged["memory_mb_per_10000_batches"] == pytest.approx(growth, abs=1e-6)
    assert judged["memory_flat"] == (growth <= soak.GROWTH)


def test_a_soak_notices_a_file_that_stays_open_and_a_loader_that_tires():
    seen = windows(STARTING, files=7)
    for window in seen[-5:]:
        window["images_per_second"] = 80.0
    judged = soak.judge(seen)

    assert not judged["files_constant"]
    assert judged["threads_constant"]
    assert judged["drift"] == pytest.approx(0.8)
    assert judged["cpu_drift"] == 1


def test_a_verdict_says_what_failed():
    seen = windows(GROWING, files=7)
    rest = {"old_to_new": [0.9, 1.0, 1.1], "resumes": 19, "resumes_exact": 18, "batch": 4}
    text = soak.verdict(
        {"windows": seen, **soak.judge(seen), **rest, "seconds": 90.0, "passed": False}
    )

    assert "+2.00 MB per 10,000 batches over the second half: GROWS, more than 1.0 MB" in text
    assert "beside a new loader's: 1.00 (0.90 - 1.10)" in text
    assert "open files: [6, 7]: NOT CONSTANT; threads: [8]" in text
    assert "18 of 19 times" in text
    assert "FAILED: 200,000 batches of 4 in 1.5 minutes" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/at/all"], "data.root: there is no folder /nowhere/at/all"),
        (["/nowhere", "--batches", "39"], "--batches (39) must be at least 40"),
    ],
)
def test_a_soak_that_cannot_start_says_why(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak", *arguments])
    with pytest.raises(SystemExit) as exited:
        soak.main()

    assert exited.value.code == 2
    assert message in capsys.readouterr().err


# Red counts columns and green rows, so that a patch tells the cell that it was cut from.
SIDE = 96
SIZED = pirl_jigsaw.Options(image_size=32, patches_crop=72, patch=20)
COLORLESS = replace(SIZED, brightness=0, contrast=0, saturation=0, hue=0, grayscale=0)


@pytest.fixture
def ramp(tmp_path: Path) -> Path:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    pixels = np.stack([columns * 2, rows * 2, np.full_like(rows, 7)], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "ramp.png")
    return tmp_path / "ramp.png"


def test_the_plain_task_gives_what_the_graph_gives(ramp, run_graph):
    graph = run_graph(pirl_jigsaw, SIZED, [ramp.read_bytes()])
    task = pirl_loader.PilPirl([str(ramp)], SIZED)
    image, patches, permutation, row = task[0]

    assert len(task) == 1
    assert image.permute(1, 2, 0).shape == graph["image"].shape[1:]
    assert patches.permute(0, 2, 3, 1).shape == graph["patches"].shape[1:]
    assert permutation.shape == graph["permutation"].shape[1:]
    assert row == graph["index"].item() == 0
    assert image.dtype == patches.dtype == torch.uint8
    assert permutation.dtype == torch.int64
    assert (graph["image"].dtype, graph["permutation"].dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_plain_task_shuffles_as_its_permutation_says(ramp, flip):
    task = pirl_loader.PilPirl([str(ramp)], replace(COLORLESS, flip=flip))
    random.seed(0)
    torch.manual_seed(0)
    orders = set()
    for _ in range(20):
        _, patches, permutation, _ = task[0]
        red, green, _ = patches.float().mean(dim=(2, 3)).T
        # Whatever the crop, the three least red patches are its first column.
        column, row = (value.argsort().argsort() // 3 for value in (red, green))
        column = 2 - column if flip else column
        assert (row * 3 + column).tolist() == permutation.tolist()
        orders.add(tuple(permutation.tolist()))

    assert len(orders) == 20
