"""The table of tasks: every contender at work, the gate before the figure, ratios that add up."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bounds, contenders, decode_limit, result, same_files, tasks
from benchmarks.__main__ import main
from benchmarks.method import Measured
from benchmarks.plain import pil
from fastssl import config
from fastssl.loader import Options
from tests import test_graphs

QUICK = ("--quick", "--batch", "4", "--threads", "1", "--workers", "0")


@pytest.fixture
def images(demo_images) -> Path:
    return demo_images / "val"


def test_a_run_of_seconds_writes_every_contender(images, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["tasks", "jigsaw", "--data", str(images), "data.limit=12", *QUICK]
    code = main([*arguments, "--out", str(out), "--note", "a test"])
    printed = capsys.readouterr().out
    made = result.read(out)
    names = ["fastssl", "bound", "pil", "tuned"]
    if decode_limit.decoder() is not None:
        names.insert(2, "decode_limit")

    assert code == 0
    assert made.benchmark == "tasks"
    assert {row.group for row in made.rows} == {"jigsaw"}
    rows = {row.name: row for row in made.rows}
    assert list(rows) == names
    assert {row.unit for row in rows.values()} == {"images/s"}
    assert all(row.values[0] > 0 and row.cpu_ms[0] > 0 for row in rows.values())
    ours = rows["fastssl"]
    for name in names[1:]:
        assert rows[name].extra["ratio"] == pytest.approx(ours.values[0] / rows[name].values[0])
    assert (ours.extra["views"], ours.extra["patches"]) == (0, 9)
    assert made.settings["note"] == "a test"
    assert made.settings["recipes"]["jigsaw"]["crop"] == 255  # pyright: ignore
    assert "jigsaw, about" in printed
    assert re.search(r"ffcv is left out: .*FFCV", printed)
    assert tasks.table(made.rows) in printed
    assert all(line in printed for line in made.conclusions)


def test_an_alternative_that_does_another_task_is_left_out_and_told(
    images, tmp_path, capsys, monkeypatch
):
    honest = pil.dataset

    def flips_nothing(graph, paths, options, *, seed=0):
        return honest(graph, paths, replace_flip(options), seed=seed)

    monkeypatch.setattr(pil, "dataset", flips_nothing)
    arguments = ["tasks", "supervised", "--data", str(images), "data.limit=8", *QUICK]
    code = main([*arguments, "--alternatives", "pil"])
    printed = capsys.readouterr().out

    assert code == 1
    assert "pil is left out: pil does not do the task of pipelines.single_view: image is" in printed
    assert "mirrored in 0 of 64 cases, where flip is 0.5" in printed
    assert "| supervised |" in printed
    assert "| - | - | - |" in printed


def replace_flip(options):
    return type(options)(**{**vars(options), "flip": 0.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere"], "data.root: there is no folder /nowhere"),
        (["--data", "/nowhere", "--alternatives", "pli"], "--alternatives: 'pli' is not known"),
        (["--data", "/nowhere", "--workers", "a"], "--workers (a) must be whole numbers"),
        (["--data", "/nowhere", "--workers=-1"], "--workers (-1) must be whole numbers"),
        (["--data", "/nowhere", "--batch", "0"], "--batch (0) must be at least 1"),
        (["nothing.yaml", "--data", "/nowhere"], "nothing.yaml"),
    ],
)
def test_a_mistake_is_a_line_and_exit_code_2(arguments, message, capsys):
    assert main(["tasks", *arguments, "--quick"]) == 2

    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", test_graphs.RECIPES)
def test_the_bound_of_every_recipe_is_of_its_sizes(name, images):
    recipe = config.load(str(tasks.RECIPES / f"{name}.yaml"), [f"data.root={images}"])
    samples = recipe.data.module.list_samples(recipe.data.options, cache=None, say=print)
    loading = Options(threads=1, prefetch=1)
    files = same_files.Files(recipe.data.module, samples, samples.usable[:2], 0, [], False, {})
    options = recipe.pipeline.options
    resizes = bounds.resizes(recipe.pipeline.use)
    pipeline = same_files.pipeline(
        files,
        lambda image, index: [*resizes(image, options, "cpu"), index],
        loading,
        batch=2,
        device=torch.device("cpu"),
    )
    shapes = [np.asarray(each.as_tensor()).shape for each in pipeline.run()[:-1]]
    sizes = {vars(options).get(key) for key in ("image_size", "size", "patches_crop", "crop")}

    assert len(shapes) >= 1
    for shape in shapes:
        assert shape[0] == 2
        assert shape[-1] == 3
        assert shape[-2] == shape[-3]
        assert shape[-2] in sizes or name == "exemplar_classes"  # there all of the region


def test_the_table_has_ratios_within_a_repeat_and_dashes_for_who_is_missing():
    recipe = config.load(str(tasks.RECIPES / "pirl_jigsaw.yaml"), ["data.root=/nowhere"])
    task = contenders.Task(
        recipe="pirl_jigsaw",
        graph=recipe.pipeline.use,
        module=recipe.pipeline.module,
        options=recipe.pipeline.options,
        files=None,  # pyright: ignore[reportArgumentType]  no image is looked at
        batch=32,
        loading=Options(threads=2),
        device=torch.device("cpu"),
    )

    def measured(*rates: float) -> Measured:
        return Measured([*rates], [2.0] * len(rates), {"p50": 1.0}, 10)

    each = {
        "fastssl": measured(200, 220, 180),
        "bound": measured(400, 400, 400),
        "decode_limit": measured(1000, 1100, 900),
        "pil": measured(100, 100, 100),
    }
    lines = tasks.table(tasks.rows_of(task, each)).splitlines()

    assert len(lines) == 3
    assert lines[2] == (
        "| pirl_jigsaw | 200 (180 - 220) | 200 views, 1,800 patches | 2 (2 - 2) "
        "| 0.20 (0.20 - 0.20) | 400 (400 - 400) | 2.00 (1.80 - 2.20) | - | - |"
    )
    assert tasks.conclusion("pirl_jigsaw", each) == (
        "pirl_jigsaw: 200 images/s, 2.00 times pil, 0.50 of decoding and resizing alone, "
        "0.20 of the decode limit"
    )


def test_more_to_do_is_expected_to_take_longer():
    assert 20 < tasks.expected_minutes(14, 3, 3, 3, tasks.SECONDS) < 40
    assert tasks.expected_minutes(1, 3, 3, 3, 2.0) < tasks.expected_minutes(1, 3, 3, 5, 2.0)
