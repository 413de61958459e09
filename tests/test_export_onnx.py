"""An ONNX file gives our features for any number of images, of any size where it says so."""

import sys

import onnxruntime
import pytest
import torch

from fastssl import export_formats
from fastssl.backbones import named, resnet, revnet
from fastssl.config import RecipeError
from tests.finished_run import a_run


def pixels(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_onnx_takes_any_number_of_images_of_any_size_and_normalises_inside(tmp_path):
    ours = a_run(tmp_path / "run", resnet, resnet.Options(name="resnet10", width=8))
    said: list[str] = []
    folder = export_formats.export_to(ours, "onnx", tmp_path / "out", say=said.append)
    session = onnxruntime.InferenceSession(folder / "model.onnx")

    assert session.get_inputs()[0].type == "tensor(uint8)"
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "README.md", "SHA256SUMS"}
    assert any("any height and width; any B; normalised inside" in line for line in said)
    for shape in ((1, 3, 64, 64), (5, 3, 64, 64), (3, 3, 97, 80)):
        x = pixels(*shape)
        found = torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
        with torch.no_grad():
            wanted = ours.backbone(x)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_onnx_of_a_network_of_one_size_says_which(tmp_path):
    options = named.Options(name="timm:test_vit", image_size=64)
    ours = a_run(tmp_path / "run", named, options)
    said: list[str] = []
    folder = export_formats.export_to(ours, "onnx", tmp_path / "out", say=said.append)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    x = pixels(5, 3, 64, 64)
    found = torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
    with torch.no_grad():
        wanted = ours.backbone(x)

    assert session.get_inputs()[0].shape == ["batch", 3, 64, 64]
    assert any("64 x 64 pixels; any B" in line for line in said)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_onnx_of_a_reversible_network_needs_none_of_its_own_gradients(tmp_path):
    options = revnet.Options(widening=1, units=(1, 1, 1, 1))
    ours = a_run(tmp_path / "run", revnet, options)
    said: list[str] = []
    folder = export_formats.export_to(ours, "onnx", tmp_path / "out", say=said.append)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    x = pixels(3, 3, 97, 80)
    found = torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
    with torch.no_grad():
        wanted = ours.backbone(x)

    assert any("any height and width; any B" in line for line in said)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package):
    ours = a_run(tmp_path / "run", resnet, resnet.Options(name="resnet10", width=8))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RecipeError, match=rf"needs {package}: pip install 'fastssl\[export\]'"):
        export_formats.export_to(ours, "onnx", tmp_path / "out", say=lambda _: None)

    assert [path.name for path in tmp_path.iterdir()] == ["run"]
