import pytest

from benchmarks import __main__ as suite
from benchmarks import probes, result
from fastssl import evaluate
from fastssl.backbones import resnet
from tests import few_images
from tests.finished_run import a_run

SMALL = ("linear.updates=3", "mlp.epochs=1", "mlp.batch=16", "fewlabels.fractions=[0.3]")


def in_this_process(command):
    """In place of a process each: what it takes to import torch is not what is tested."""
    assert evaluate.main(command) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = resnet.Options(name="resnet10", width=16)
    for name in ("thing-0", "thing-1", "other"):
        a_run(folder / name, resnet, options, resize=32, crop=32)
    return folder


def test_every_probe_of_every_run_is_in_one_table_with_seeds_side_by_side(
    runs, demo_images, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(probes, "evaluate", in_this_process)
    data = few_images.copy(demo_images, tmp_path)
    out = tmp_path / "probes.json"
    given = [*(str(runs / name) for name in ("thing-0", "thing-1", "other")), f"data.root={data}"]
    code = suite.main(["probes", *given, *SMALL, "--random", "2", "--out", str(out)])
    rows = {(row.group, row.name): row.values for row in result.read(out).rows}
    stages = ["stem", "layer1", "layer2", "layer3", "layer4", "pool"]
    columns = ["knn", *[f"linear {stage}" for stage in stages], "mlp", "30 % of labels"]

    assert code == 0
    assert set(rows) == {(n, c) for n in ("random", "thing", "other") for c in columns}
    assert {name: len(rows[name, "knn"]) for name in ("random", "thing", "other")} == {
        "random": 2,
        "thing": 2,
        "other": 1,
    }
    assert rows["thing", "knn"][0] == rows["thing", "knn"][1]  # the same weights twice
    assert "| network | linear stem | linear layer1 |" in capsys.readouterr().out


def test_a_run_that_is_not_finished_and_a_key_of_no_probe_are_refused(runs, tmp_path, capsys):
    assert suite.main(["probes", str(tmp_path)]) == 2
    assert suite.main(["probes", str(runs / "other"), "optim.lr=1"]) == 2

    message = capsys.readouterr().err
    assert "no backbone.json" in message
    assert "no probe has a section 'optim'" in message


def test_means_and_deviations_are_of_the_seeds():
    table = probes.table({"a": {"knn": [0.5, 0.7]}, "b": {"knn": [0.25], "mlp": [1.0]}})

    assert "| a | 60.0 +- 14.1 | - |" in table
    assert "| b | 25.0 | 100.0 |" in table
