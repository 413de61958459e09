"""metrics.jsonl: what is damaged is left out, and nothing else."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator

from fastssl import config, journal

DAMAGED = [b'{"step": 2, "lo', b"\xff\xfe", b"[1]", b'{"loss": 1}', b"", b'{"step": "x"}']


def torn(folder: Path) -> Path:
    """Whole lines of steps 1, 3, 4 and 5, and damaged ones among them."""
    lines = [json.dumps({"step": step}).encode() for step in (1, 3, 4, 5)]
    (folder / "metrics.jsonl").write_bytes(
        b"\n".join([lines[0], *DAMAGED, *lines[1:3], b"{", lines[3], b'{"step": 6, "l'])
    )
    return folder


def test_lines_behind_a_damaged_one_are_read(tmp_path):
    lines, damaged = journal.read_and_count(torn(tmp_path))

    assert lines == journal.read(tmp_path) == [{"step": 1}, {"step": 3}, {"step": 4}, {"step": 5}]
    assert damaged == [2, 3, 4, 5, 6, 7, 10, 12]


def test_a_folder_without_a_log_has_no_lines(tmp_path):
    assert journal.read_and_count(tmp_path) == ([], [])


def test_a_run_that_goes_on_keeps_the_whole_lines_up_to_its_checkpoint(tmp_path):
    recipe: Any = SimpleNamespace(values={}, name="x")
    log = journal.Journal(torn(tmp_path), Accelerator(cpu=True), recipe, steps=9, start=4)
    log.probe(5, "knn", {"accuracy": 0.5})
    log.close()
    texts = (tmp_path / "metrics.jsonl").read_text().splitlines()

    assert [json.loads(text)["step"] for text in texts] == [1, 3, 4, 5]
    assert json.loads(texts[-1])["probe"] == "knn"


@pytest.mark.parametrize("damage", [b"", b"[{", b"{}", b"[1]", b"\xff"])
def test_a_damaged_environment_is_set_aside_and_costs_no_run(tmp_path, capsys, checkout, damage):
    recipe = config.load(str(checkout / "recipes" / "rotation.yaml"), [])
    path = tmp_path / "environment.json"
    path.write_bytes(damage)
    for _ in range(2):
        journal.write_start(tmp_path, recipe, Accelerator(cpu=True), Path("step-00000004.pt"))

    starts = json.loads(path.read_text())
    assert [start["resumed"] for start in starts] == ["step-00000004.pt"] * 2
    assert (tmp_path / "environment.json.damaged").read_bytes() == damage
    assert capsys.readouterr().out.count("is damaged: set aside as environment.json.damaged") == 1
