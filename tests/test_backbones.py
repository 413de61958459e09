import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import torchvision

from fastssl.backbones import resnet

FILES = sorted((Path(__file__).parents[1] / "fastssl/backbones").glob("[!_]*.py"))
NAMES = [file.stem for file in FILES]
EXAMPLES = {  # a small network of each file
    "resnet": {"name": "resnet18", "stem": "small"},
    "nin": {"blocks": 3, "width": 12},
    "named": {"name": "timm:convnext_atto"},
}
STAGES = ["stem", "layer1", "layer2", "layer3", "layer4", "pool"]


def images(size=32, count=2):
    """uint8 [count, 3, size, size] in the memory layout of the loader."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)


def build(**options):
    torch.manual_seed(0)
    return resnet.backbone(resnet.Options(**options)).eval()


def test_every_backbone_file_has_an_example_here():
    assert NAMES
    assert set(EXAMPLES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_backbone_file_keeps_the_contract(name):
    module = importlib.import_module(f"fastssl.backbones.{name}")
    parameters = module.Options.__dataclass_params__
    torch.manual_seed(0)
    network = module.backbone(module.Options(**EXAMPLES[name])).eval()
    x = images()
    with torch.no_grad():
        features, stages = network(x), network.stages(x)

    assert dataclasses.is_dataclass(module.Options)
    assert parameters.frozen
    assert all(field.kw_only for field in dataclasses.fields(module.Options))
    assert list(inspect.signature(module.backbone).parameters) == ["options"]
    assert [len(part) for part in network.normalization] == [3, 3]
    assert features.shape == (2, network.dim)
    assert torch.equal(features, list(stages.values())[-1])


@pytest.mark.parametrize("name", NAMES)
def test_backbone_file_gives_the_same_weights_from_the_same_seed(name):
    module = importlib.import_module(f"fastssl.backbones.{name}")
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(module.backbone(module.Options(**EXAMPLES[name])).state_dict())
    key = next(key for key in states[0] if key.endswith("weight"))

    assert all(torch.equal(states[0][each], states[1][each]) for each in states[0])
    assert not torch.equal(states[0][key], states[2][key])


@pytest.mark.parametrize(
    ("stem", "sizes"),
    [("standard", [16, 16, 8, 4, 2]), ("small", [64, 64, 32, 16, 8])],
)
def test_stages_come_in_order_with_their_strides(stem, sizes):
    network = build(name="resnet18", stem=stem)
    with torch.no_grad():
        stages = network.stages(images(64, count=1))

    assert list(stages) == STAGES
    for stage, channels, size in zip(STAGES, [64, 64, 128, 256, 512], sizes, strict=False):
        assert stages[stage].shape == (1, channels, size, size)
    assert stages["pool"].shape == (1, 512)


def test_bytes_are_normalised_with_the_statistics_that_the_backbone_states():
    network, x = build(name="resnet18"), images()
    mean, std = (torch.tensor(part).reshape(1, 3, 1, 1) for part in network.normalization)
    with torch.no_grad():
        from_bytes = network.stages(x)
        from_floats = network.stages((x / 255 - mean) / std)

    for stage in STAGES:
        torch.testing.assert_close(from_bytes[stage], from_floats[stage], rtol=1e-4, atol=1e-5)


def test_bytes_become_float32_also_under_autocast_and_stay_channels_last():
    network, seen = build(name="resnet18"), []
    network.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        network(images())

    assert seen[0].dtype == torch.float32
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_weights_travel_to_torchvision_and_back():
    network = build(name="resnet18")
    theirs = torchvision.models.resnet18()
    missing, unexpected = theirs.load_state_dict(network.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    assert missing == ["fc.weight", "fc.bias"]
    assert not unexpected
    with torch.no_grad():
        features = torch.nn.Sequential(*list(theirs.eval().children())[:-1])(x).flatten(1)
        torch.testing.assert_close(features, network(x))
    weights = {key: each for key, each in theirs.state_dict().items() if key[:3] != "fc."}
    network.load_state_dict(weights)


@pytest.mark.parametrize("stem", ["standard", "small"])
def test_weights_are_drawn_as_torchvision_draws_them(stem):
    network = build(name="resnet18", stem=stem)
    weight = network.conv1.weight
    expected = (2 / (64 * weight[0, 0].numel())) ** 0.5  # He et al. 2015, by fan-out

    assert weight.std().item() == pytest.approx(expected, rel=0.05)
    assert torch.equal(network.state_dict()["layer1.0.bn2.weight"], torch.ones(64))


def test_zero_init_residual_begins_with_blocks_that_add_nothing():
    block = build(name="resnet18", zero_init_residual=True).layer1[0]
    x = torch.rand(1, 64, 8, 8)

    with torch.no_grad():
        torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize(
    ("name", "dim"), [("resnet50", 2048), ("resnext50_32x4d", 2048), ("resnet34", 512)]
)
def test_backbone_knows_the_length_of_its_features(name, dim):
    assert build(name=name).dim == dim


def test_every_resnet_of_torchvision_can_be_named():
    for name in ("resnet18", "resnet152", "resnext101_64x4d", "wide_resnet50_2"):
        assert name in resnet.NAMES
    assert all("resne" in name for name in resnet.NAMES)


def test_unknown_name_is_refused_with_the_nearest_ones():
    expected = r"name \('resnet51'\) is no ResNet of torchvision; did you mean .*'resnet50'.*\?"
    with pytest.raises(ValueError, match=expected):
        resnet.Options(name="resnet51")
    with pytest.raises(ValueError, match=r"no ResNet of torchvision; known: .*'wide_resnet101_2'"):
        resnet.Options(name="vgg")


def test_resnet10_has_one_block_a_stage_and_any_width():
    whole = resnet.backbone(resnet.Options(name="resnet10"))
    thin = resnet.backbone(resnet.Options(name="resnet10", width=32))
    stages = thin.stages(torch.zeros(1, 3, 64, 64))

    assert (whole.dim, thin.dim) == (512, 256)
    assert [stages[f"layer{k}"].shape[1] for k in (1, 2, 3, 4)] == [32, 64, 128, 256]
    assert {len(getattr(thin, f"layer{k}")) for k in (1, 2, 3, 4)} == {1}
    assert thin.state_dict().keys() == whole.state_dict().keys()


def test_a_wider_network_of_basic_blocks_is_torchvisions_where_they_meet():
    torch.manual_seed(0)
    ours = resnet.backbone(resnet.Options(name="resnet18", width=63))
    theirs = resnet.backbone(resnet.Options(name="resnet18"))

    assert ours.state_dict().keys() == theirs.state_dict().keys()
    shapes = [[tuple(v.shape) for v in net.state_dict().values()] for net in (ours, theirs)]
    smaller = [tuple(63 * n // 64 if n >= 64 else n for n in shape) for shape in shapes[1]]
    assert shapes[0] == smaller


@pytest.mark.parametrize(("name", "width"), [("resnet50", 32), ("resnet18", 0)])
def test_a_width_that_cannot_be_says_for_which_networks_it_can(name, width):
    with pytest.raises(ValueError, match=rf"width \({width}\) must be 64 for {name}, or the name"):
        resnet.Options(name=name, width=width)
