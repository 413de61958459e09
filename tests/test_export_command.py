"""The export's command line: exit codes, one line for a mistake, one process at work."""

import runpy
import sys

import pytest
import safetensors.torch
import torch

from fastssl import backbone_file, export, export_formats, trained
from fastssl.backbones import resnet
from tests.finished_run import a_run


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> trained.Trained:
    options = resnet.Options(name="resnet10", width=8)
    return a_run(tmp_path_factory.mktemp("runs") / "small", resnet, options)


def test_the_command_exports_a_run_also_as_a_script(small, tmp_path, checkout, monkeypatch, capsys):
    out = tmp_path / "out"
    script = checkout / "fastssl" / "export.py"
    given = [str(small.folder), "--to", "safetensors", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(script), *given])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path[1:]])
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr()

    assert (ended.value.code, said.err) == (0, "")
    assert sys.path[0] == str(checkout)  # a script's own folder is no place for imports
    assert "safetensors: reloaded strictly; features of" in said.out
    assert f"{out}/backbone.safetensors" in said.out
    assert backbone_file.load_backbone(out).dim == 64


def test_a_lone_file_of_torchvisions_weights_is_exported_when_its_network_is_named(
    tmp_path, capsys
):
    file = tmp_path / "weights.safetensors"
    weights = resnet.backbone(resnet.Options(name="resnet10", width=8)).state_dict()
    head = {"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}
    safetensors.torch.save_file({**weights, **head}, file)
    network = ["backbone.name=resnet10", "backbone.width=8"]
    out = ["--to", "torchscript", "--out", str(tmp_path / "out")]
    refused = export.main([str(file), *network, *out])
    told = capsys.readouterr().err
    done = export.main([str(file), *out, *network, "weights.ignore=[fc.weight,fc.bias]"])

    assert (refused, done) == (2, 0)
    assert "fc.bias, fc.weight" in told
    assert (tmp_path / "out" / "model.pt").exists()


@pytest.mark.parametrize(
    ("network", "texts", "options"),
    [
        ("random:vgg", ["image_size=32", "widening=1"], {"image_size": 32, "widening": 1}),
        ("random:revnet", ["last_relu=false", "widening=1"], {"last_relu": False, "widening": 1}),
        ("random:nin", ["use=fastssl.backbones.nin", "blocks=3"], {"blocks": 3}),
    ],
)
def test_options_of_a_fresh_network_are_those_of_its_own_file(
    network, texts, options, monkeypatch, capsys
):
    exported = []
    monkeypatch.setattr(export_formats, "export_to", lambda run, *_, **__: exported.append(run))
    code = export.main([network, "--to", "onnx", *(f"backbone.{each}" for each in texts)])

    assert (code, capsys.readouterr().err) == (0, "")
    assert exported[0].use == f"fastssl.backbones.{network.partition(':')[2]}"
    assert options.items() <= exported[0].options.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--to", "onnx"], "nowhere"),
        (["nowhere.safetensors", "--to", "onnx", "backbone.nam=resnet18"], "did you mean 'name'"),
        (["nowhere", "--to", "onnx", "weights.ignore=fc"], r"weights.ignore: expected a list of s"),
        (["random:nin", "--to", "onnx", "backbone.stem=small"], "backbone.stem: unknown key"),
        (["nowhere", "--to", "onnx", "train.lr=1"], "unknown section 'train'"),
    ],
)
def test_a_mistake_is_a_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = export.main(arguments)
    error = capsys.readouterr().err

    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_mismatch_is_exit_code_1(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_formats, "TOLERANCE", -1.0)
    code = export.main([str(small.folder), "--to", "safetensors", "--out", str(tmp_path / "out")])

    assert code == 1
    assert "other features" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_name_that_the_disk_does_not_take_is_a_line(small, tmp_path, capsys):
    out = tmp_path / ("x" * 300)
    code = export.main([str(small.folder), "--to", "safetensors", "--out", str(out)])
    error = capsys.readouterr().err

    assert code in (1, 2)  # found in looking at the folder, or in making it: by version of Python
    assert error.startswith("error: ")
    assert "File name too long" in error
    assert error.count("\n") == 1


def test_of_several_processes_one_exports(small, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    out = tmp_path / "out"

    assert export.main([str(small.folder), "--to", "safetensors", "--out", str(out)]) == 0
    assert not out.exists()


def test_help_says_what_run_may_be(capsys):
    with pytest.raises(SystemExit) as ended:
        export.main(["--help"])

    assert ended.value.code == 0
    assert "RUN is a run folder" in capsys.readouterr().out
