"""The table of tasks: every contender at work, the gate before the figure, ratios that add up."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    bounds,
    contenders,
    decode_limit,
    gate,
    promises,
    result,
    same_files,
    tasks,
)
from benchmarks.__main__ import main
from benchmarks.method import Measured
from benchmarks.plain import ffcv, pil
from fastssl import config, pack
from fastssl.loader import Options
from fastssl.pack_image import Form
from pipelines.readers import folder
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
    assert (rows["pil"].extra["workers"], rows["tuned"].extra["workers"]) == (1, 0)
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


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Critical error in pipeline:\nno memory"), MemoryError()],
)
def test_a_recipe_that_fails_is_told_and_the_others_are_written(
    error, images, tmp_path, capsys, monkeypatch
):
    honest = contenders.fastssl

    def fails_once(task):
        made = honest(task)

        def run() -> int:
            raise error

        return replace(made, run=run) if task.recipe == "jigsaw" else made

    monkeypatch.setattr(contenders, "fastssl", fails_once)
    monkeypatch.setattr(gate, "check", lambda *_: None)
    out = tmp_path / "out.json"
    arguments = ["tasks", "jigsaw", "supervised", "--data", str(images), "data.limit=8", *QUICK]
    code = main([*arguments, "--alternatives", "", "--out", str(out)])
    made = result.read(out)
    reason = " ".join(str(error).split()) or "MemoryError"

    assert code == 1
    assert f"jigsaw is left out: {reason}\n" in capsys.readouterr().out
    assert {row.group for row in made.rows} == {"supervised"}
    assert made.settings["left_out"] == {"jigsaw": reason}


def test_a_recipe_whose_graph_does_not_do_its_task_is_told_and_nothing_else_is_lost(
    images, tmp_path, capsys, monkeypatch
):
    def unfit(who, *_):
        raise gate.UnfitError(f"{who} does another task")

    monkeypatch.setattr(gate, "check", unfit)
    out = tmp_path / "out.json"
    code = main(["tasks", "jigsaw", "--data", str(images), *QUICK, "--out", str(out)])

    assert code == 1
    assert "jigsaw is left out: fastssl does another task\n" in capsys.readouterr().out
    assert result.read(out).rows == []


def test_ffcv_s_version_is_kept_and_its_death_costs_the_recipe_alone(
    images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(ffcv, "find_spec", lambda name: name)
    monkeypatch.setattr(ffcv, "WORKER", Path(__file__).with_name("ffcv_stand_in.py"))
    monkeypatch.setattr(gate, "check", lambda *_: None)
    still = ["pipeline.hue=0", "pipeline.grayscale=0", "data.limit=40"]
    arguments = ["tasks", "supervised", "--data", str(images), *still, *QUICK]
    out = ["--alternatives", "ffcv", "--out", str(tmp_path / "out.json")]

    assert main([*arguments, *out]) == 0
    made = result.read(tmp_path / "out.json")
    rows = {row.name: row for row in made.rows}
    assert rows["ffcv"].extra["version"] == "1.0.2"
    assert made.manifest.machine["versions"]["ffcv"] == "1.0.2"  # pyright: ignore

    assert main([*arguments, *out, "--batch", "17"]) == 1  # of so many the stand-in dies
    assert "supervised is left out: FFCV's process has ended" in capsys.readouterr().out


def test_images_of_a_store_are_nothing_for_who_reads_files(images, tmp_path, capsys):
    listing = folder.Options(root=str(images), limit=8)
    samples = folder.list_samples(listing, cache=None, say=print)
    pack.pack(samples, tmp_path / "store", Form(short_side=64), shard_mb=1, workers=1)
    data = ["--data", str(tmp_path / "store"), "data.use=pipelines.readers.tar"]
    code = main(["tasks", "supervised", *data, *QUICK])
    printed = capsys.readouterr().out

    assert code == 0
    for name in tasks.ALTERNATIVES:
        assert f"supervised {name} is left out: its images lie together in a store" in printed
    assert "| supervised |" in printed


# -- on a GPU, without one ----------------------------------------------------------------------


def test_a_batch_is_waited_for_on_its_own_stream(monkeypatch):
    waited: list[torch.device] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(device))
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("other streams too"))
    contenders._finish(device)
    contenders._finish(torch.device("cpu"))

    assert waited == [device]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plain_batches_are_pinned_and_copied_without_waiting_for_a_gpu_alone(device, monkeypatch):
    asked: list[Any] = []

    class Copied:
        def to(self, device: torch.device, *, non_blocking: bool) -> None:
            asked.append((str(device), non_blocking))

    def loader(dataset, *, batch, workers, pinned) -> Iterator[dict[str, Copied]]:
        asked.append(pinned)
        return iter([{"image": Copied()}])

    monkeypatch.setattr(contenders, "_finish", lambda _: None)
    module: Any = SimpleNamespace(dataset=lambda *_, **__: None, loader=loader)
    task: Any = SimpleNamespace(
        paths=["a"], graph="", options=None, batch=1, device=torch.device(device)
    )
    contender = contenders.plain(task, "pil", module, 0)
    contender.run()

    assert asked == [device == "cuda", (device, device == "cuda")]


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
        (["--data", "/nowhere", "--ffcv-python", "/no/python"], "--ffcv-python: can't run /no/py"),
    ],
)
def test_a_mistake_is_a_line_and_exit_code_2(arguments, message, capsys):
    assert main(["tasks", *arguments, "--quick"]) == 2

    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", test_graphs.RECIPES)
def test_the_bound_of_every_recipe_resizes_what_its_task_shows(name, tmp_path):
    part = test_graphs.loaded(name).pipeline  # at the demo's sizes
    images = 48
    gate._write_images(tmp_path, images)
    samples = folder.list_samples(folder.Options(root=str(tmp_path)), cache=None, say=print)
    files = same_files.Files(folder, samples, np.arange(images), 0, [], False, {})
    resizes = bounds.resizes(part.use)
    pipeline = same_files.pipeline(
        files,
        lambda image, index: [*resizes(image, part.options, "cpu"), index],
        Options(threads=1, prefetch=1),
        batch=images,
        device=torch.device("cpu"),
    )
    *made, index = (np.asarray(each.as_tensor()) for each in pipeline.run())
    order = index.ravel().argsort()
    # frames that are cut or turned of one square are one resize, and the others one each
    promised, expected = promises.of(part.use, part.options), []
    for frames in promised.frames:
        shape = promised.shapes[frames.name]
        is_one = not frames.crop_each or isinstance(frames.crop, promises.Warp)
        expected.append((1 if is_one or len(shape) < 4 else shape[0], frames))

    assert len(made) == len(expected)
    for pixels, (count, frames) in zip(made, expected, strict=True):
        pixels = pixels[order].reshape(images, count, *pixels.shape[-3:]).transpose(0, 1, 4, 2, 3)
        if isinstance(frames.crop, promises.Warp):  # the region that warps read, of the whole image
            side = round(part.options.size * part.options.region / part.options.seed_patch)
            whole = promises.Resized(round(side / part.options.region), side, moves=False)
            frames = replace(frames, crop=whole, side=side)
        elif part.use == "pipelines.rotation" and isinstance(frames.crop, promises.Resized):
            frames = replace(frames, crop=replace(frames.crop, moves=False))  # it moves by padding
        assert pixels.shape[-2:] == (frames.side, frames.side)
        seen = gate._look(pixels, frames)
        gate._check_crop(seen, frames)


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
