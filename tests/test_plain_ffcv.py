"""What can be promised of FFCV's side without FFCV: who is refused, and how its process is asked.

A stand-in answers in place of the worker, which imports FFCV; the worker itself is only run where
FFCV is, by `benchmarks tasks` and `benchmarks stores`, which put it through the same gate.
"""

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from benchmarks import gate
from benchmarks.plain import ffcv
from pipelines import jigsaw, rotation, single_view

STILL = single_view.Options(
    image_size=64, image_area=(0.2, 1), brightness=0, contrast=0, saturation=0, hue=0, grayscale=0
)
TURNED = rotation.Options(image_size=64, image_area=(0.2, 1))


@pytest.fixture
def stand_in(monkeypatch):
    """As if FFCV were installed."""
    monkeypatch.setattr(ffcv, "find_spec", lambda name: name)
    monkeypatch.setattr(ffcv, "WORKER", Path(__file__).with_name("ffcv_stand_in.py"))


@pytest.fixture
def paths(tmp_path) -> list[str]:
    made = []
    for number in range(6):
        pixels = np.full((48, 64, 3), 40 * number, np.uint8)
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(pixels).save(path)
        made.append(str(path))
    return made


def start(
    paths,
    folder,
    options: Any = STILL,
    graph="pipelines.single_view",
    *,
    batch=4,
    python=None,
) -> ffcv.Worker:
    return ffcv.start(
        paths,
        graph=graph,
        options=options,
        form="jpeg",
        batch=batch,
        threads=1,
        folder=folder,
        python=python,
    )


@pytest.mark.parametrize(
    ("graph", "options"), [("pipelines.single_view", STILL), ("pipelines.rotation", TURNED)]
)
def test_a_batch_has_the_names_and_shapes_of_the_graph_s_and_passes_the_gate(
    graph, options, stand_in, tmp_path
):
    def make(paths, options):
        worker = start(paths, tmp_path, options, graph, batch=len(paths))
        try:
            return worker.sample_batch()
        finally:
            worker.close()

    gate.check("stand-in", graph, options, make)


def test_it_is_asked_for_one_batch_at_a_time_and_leaves_nothing_behind(stand_in, paths, tmp_path):
    worker = start(paths, tmp_path)
    counts = [worker.run() for _ in range(3)]
    batch = worker.sample_batch()
    (beton,) = tmp_path.glob("*.beton")
    worker.close()
    worker.close()

    assert counts == [4, 4, 4]
    assert batch["image"].shape == (4, 3, 64, 64)
    assert batch["index"].dtype == torch.int64
    assert (worker.version, worker.size, worker.queue) == ("1.0.2", 1000, 4)
    assert not beton.exists()
    assert not psutil.pid_exists(worker.process.pid)


def test_a_process_that_does_not_start_says_its_last_words(stand_in, paths, tmp_path):
    with pytest.raises(ffcv.Unavailable, match=r"does not start: ImportError: libopencv_core\.so"):
        start(paths, tmp_path, batch=13)

    assert not list(tmp_path.glob("*.beton"))


def test_a_process_that_dies_later_is_noticed(stand_in, paths, tmp_path):
    worker = start(paths, tmp_path, batch=17)
    with pytest.raises(RuntimeError, match="FFCV's process has ended: it wrote nothing"):
        worker.run()
    worker.close()


@pytest.mark.parametrize(
    ("options", "graph", "message"),
    [
        (replace(STILL, hue=0.1), "pipelines.single_view", r"hue \(0\.1\): it must be 0\.0"),
        (replace(STILL, grayscale=0.2), "pipelines.single_view", r"grayscale \(0\.2\)"),
        (replace(TURNED, crop="pad"), "pipelines.rotation", r"crop \('pad'\): it must be 'incep"),
        (replace(TURNED, copies="one"), "pipelines.rotation", r"copies \('one'\)"),
        (replace(TURNED, turns=(0, 180)), "pipelines.rotation", r"turns \(\(0, 180\)\)"),
    ],
)
def test_options_that_ffcv_has_no_operator_for_are_refused(options, graph, message, tmp_path):
    with pytest.raises(ValueError, match=f"FFCV has no operator for {message}"):
        start([], tmp_path, options, graph)


def test_tasks_that_ffcv_has_no_operators_for_are_unavailable(tmp_path):
    with pytest.raises(ffcv.Unavailable, match=r"no operators for pipelines\.jigsaw"):
        start([], tmp_path, jigsaw.Options(), "pipelines.jigsaw")


def test_without_ffcv_one_line_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(ffcv, "find_spec", lambda name: None)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    for python in (None, str(tmp_path / "bare" / "bin" / "python")):
        with pytest.raises(ffcv.Unavailable, match="how to build it") as raised:
            start([], tmp_path, python=python)

        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false", "/etc/passwd"])
def test_what_is_no_interpreter_is_a_user_s_mistake(python, tmp_path):
    with pytest.raises(ValueError, match=f"^--ffcv-python: .*{python}"):
        start([], tmp_path, python=python)


def test_the_worker_needs_nothing_of_ours():
    tree = ast.parse(ffcv.WORKER.read_text(encoding="utf-8"))
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    roots = {name.partition(".")[0] for name in imported}

    assert roots - sys.stdlib_module_names == {"ffcv", "numpy", "PIL"}
