"""Every backbone file keeps the contract; and fastssl.backbones.resnet in particular."""

import copy
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fastssl.backbones import resnet

FILES = sorted((Path(__file__).parents[1] / "fastssl/backbones").glob("[!_]*.py"))
NAMES = [file.stem for file in FILES]
EXAMPLES = {  # a small network of each file
    "resnet": {"name": "resnet10", "widening": 1, "stem": "small"},
    "revnet": {"widening": 1},
    "vgg": {"widening": 1, "image_size": 32},
    "alexnet": {"image_size": 32, "stem": "small"},
    "nin": {"blocks": 3, "width": 12},
    "named": {"name": "timm:convnext_atto"},
    "resnet_v2": {"widening": 1},
}
STAGES = ["stem", "layer1", "layer2", "layer3", "layer4", "pool"]
DOUBLED = re.compile(r"^(\d+)(?:, (\d+))?")  # channels, with which torch describes a layer


def images(size=32, count=2):
    """uint8 [count, 3, size, size] in the memory layout of the loader."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)


def build(**options):
    torch.manual_seed(0)
    return resnet.backbone(resnet.Options(**options)).eval()


def example(name, **options):
    """The small network of a file, always with the same weights."""
    module = importlib.import_module(f"fastssl.backbones.{name}")
    torch.manual_seed(0)
    return module.backbone(module.Options(**{**EXAMPLES[name], **options}))


def has_option(name, option):
    options = importlib.import_module(f"fastssl.backbones.{name}").Options
    return option in [field.name for field in dataclasses.fields(options)]


def layers(network):
    return network.state_dict()


def double(match):
    """Twice the channels, but for the image's."""
    return ", ".join("3" if part == "3" else str(2 * int(part)) for part in match.groups() if part)


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


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("named",)])
def test_backbone_file_says_the_least_size_and_takes_it(name):
    least = example(name).pixels.least
    fixed = {"image_size": least} if "image_size" in EXAMPLES[name] else {}
    network = example(name, **fixed).eval()
    halved = []  # the least side that a stride above 1 is given

    def note(module, given):
        if module.stride not in (1, (1, 1)):
            halved.append(min(given[0].shape[2:]))

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.MaxPool2d | torch.nn.AvgPool2d):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        network.stages(images(least))

        assert not halved or min(halved) >= 2
        expected = rf"images of {least - 1} x {least - 1} pixels are too small .* need {least} pix"
        with pytest.raises(ValueError, match=expected):
            network(images(least - 1))


@pytest.mark.parametrize("name", NAMES)
def test_backbone_file_keeps_channels_last_memory_and_works_under_autocast(name):
    network = example(name).eval().to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        stages = network.stages(images())
    maps = [each for each in stages.values() if each.ndim == 4 and min(each.shape[1:]) > 1]

    assert maps
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in maps)
    assert all(each.isfinite().all() for each in stages.values())


@pytest.mark.parametrize("name", [name for name in NAMES if has_option(name, "representation")])
def test_a_representation_of_another_size_is_one_linear_layer_on_top(name):
    plain, more = (example(name, **given).eval() for given in ({}, {"representation": 7}))
    with torch.no_grad():
        features, stages = plain(images()), more.stages(images())
    kept = {key: each for key, each in more.state_dict().items() if "representation." not in key}
    weight, bias = (more.state_dict()[f"representation.{part}"] for part in ("weight", "bias"))

    assert more.dim == 7
    assert list(stages) == [*plain.stages(images()), "representation"]
    assert weight.shape == (7, plain.dim)
    assert kept.keys() == plain.state_dict().keys()
    assert all(torch.equal(kept[key], each) for key, each in plain.state_dict().items())
    torch.testing.assert_close(stages["representation"], features @ weight.T + bias)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if has_option(name, "activation_checkpointing")]
)
def test_checkpointed_activations_change_nothing_but_the_memory(name):
    x = images(count=3).double() / 255
    results: list[tuple[Tensor, list[Tensor | None], dict[str, Tensor], int]] = []
    for given in ({}, {"activation_checkpointing": True}):
        network = example(name, **given).double().train()
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = network(x)
        features.square().sum().backward()
        gradients = [each.grad for each in network.parameters()]
        results.append((features.detach(), gradients, network.state_dict(), sum(sizes)))
    (features, gradients, state, kept), (again, recomputed, other_state, less) = results

    assert torch.equal(features, again)
    assert all(
        each is not None and other is not None and torch.equal(each, other)
        for each, other in zip(gradients, recomputed, strict=True)
    )
    assert state.keys() == other_state.keys()
    assert all(torch.equal(each, other_state[key]) for key, each in state.items())
    assert less < kept


# fastssl.backbones.resnet.


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


def test_resnet50_of_the_usual_width_is_torchvisions():
    network = build(name="resnet50", widening=4)
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50().eval()
    theirs.set_submodule("fc", nn.Identity())
    seen = {}
    for stage in STAGES[1:5]:
        hook = theirs.get_submodule(stage)
        hook.register_forward_hook(lambda *given, stage=stage: seen.update({stage: given[2]}))
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stages, features = network.stages(x), theirs(x)

    assert all(torch.equal(each, network.state_dict()[key]) for key, each in layers(theirs).items())
    assert all(torch.equal(stages[stage], seen[stage]) for stage in STAGES[1:5])
    assert torch.equal(stages["pool"], features)


def test_widening_multiplies_every_channel_and_changes_nothing_else():
    with torch.device("meta"):
        wide, usual = build(name="resnet50", widening=8), torchvision.models.resnet50()
    for path, ours in wide.named_modules():
        if not isinstance(ours, nn.Conv2d | nn.BatchNorm2d | nn.MaxPool2d):
            continue
        there = usual.get_submodule(path)
        assert ours.extra_repr() == DOUBLED.sub(double, there.extra_repr()), path
    assert layers(wide).keys() == layers(usual).keys() - {"fc.weight", "fc.bias"}
    assert wide.dim == 4096


def test_torchvisions_wide_resnet_widens_the_inside_of_blocks_only():
    with torch.device("meta"):
        networks = build(name="resnet50", widening=8), build(name="wide_resnet50_2")
    ours, theirs = (
        {key: tuple(each.shape) for key, each in layers(network).items()} for network in networks
    )

    assert [network.dim for network in networks] == [4096, 2048]
    assert (ours["conv1.weight"], theirs["conv1.weight"]) == ((128, 3, 7, 7), (64, 3, 7, 7))
    for block in range(4):
        inside, out = (f"layer2.{block}.{part}.weight" for part in ("conv2", "conv3"))
        assert ours[inside] == theirs[inside] == (256, 256, 3, 3)
        assert (ours[out], theirs[out]) == ((1024, 256, 1, 1), (512, 256, 1, 1))


@pytest.mark.parametrize("name", ["resnet10", "resnet50", "resnext50_32x4d"])
@pytest.mark.parametrize("widening", [1, 3])
def test_every_network_can_be_widened(name, widening):
    network = build(name=name, widening=widening, zero_init_residual=True)
    with torch.no_grad():
        stages = network.stages(images(17))
    outside = 16 * widening * (1 if name == "resnet10" else 4)
    last = network.layer4.get_submodule(str(len(network.layer4) - 1))

    channels = [stages[stage].shape[1] for stage in STAGES]
    assert channels == [16 * widening, outside, 2 * outside, 4 * outside, 8 * outside, network.dim]
    assert not last.get_parameter("bn2.weight" if name == "resnet10" else "bn3.weight").any()


def test_widening_is_a_width():
    thin, same = build(name="resnet10", widening=2), build(name="resnet10", width=32)

    assert all(torch.equal(each, layers(same)[key]) for key, each in layers(thin).items())
    assert layers(thin).keys() == layers(same).keys()


def test_patch_mode_divides_by_8_with_the_same_weights():
    usual, patches = (build(name="resnet10", widening=1, patch_mode=mode) for mode in (False, True))
    with torch.no_grad():
        stages = patches.stages(images(64))

    assert [stages[stage].shape[2] for stage in STAGES[:-1]] == [32, 32, 16, 8, 8]
    assert all(torch.equal(each, layers(patches)[key]) for key, each in layers(usual).items())


def test_patch_mode_leaves_out_strides_and_nothing_else():
    usual, patches = (build(name="resnet50", widening=1, patch_mode=mode) for mode in (False, True))
    x = torch.randn(2, 256, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stages, strided = patches.stages(images()), usual.stages(images())
        every, second = (each.layer4.get_submodule("0")(x) for each in (patches, usual))

    torch.testing.assert_close(every[:, :, ::2, ::2], second)  # no pixel sees its neighbours later
    assert stages["stem"].shape[2] == 2 * strided["stem"].shape[2] == 16


@pytest.mark.parametrize(
    ("options", "least"),
    [({}, 17), ({"stem": "small"}, 5), ({"patch_mode": True}, 5)],
    ids=["standard", "small", "patches"],
)
def test_the_least_size_leaves_two_pixels_for_every_stride(options, least):
    network = build(name="resnet10", widening=1, **options)
    entering: list[int] = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d) and layer.stride in (2, (2, 2)):
            layer.register_forward_pre_hook(lambda _, given: entering.append(given[0].shape[2]))
    with torch.no_grad():
        network(images(least))

    assert min(entering) == 2
    message = rf"{least} x {least - 1} pixels .* need {least} pixels a side"
    with pytest.raises(ValueError, match=message) as error:
        network(images(least)[..., : least - 1])
    assert ("backbone.stem=small" in str(error.value)) == (least == 17)


def test_it_is_one_graph_for_the_compiler():
    network = build(name="resnet10", widening=1)
    compiled = copy.deepcopy(network)
    compiled.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(images()), network(images()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widening": 0}, r"widening \(0\) must be at least 1; K19's are 4, 8, 12 and 16"),
        ({"widening": -4}, r"widening \(-4\) must be at least 1"),
        (
            {"widening": 4, "width": 32},
            r"widening \(4\) is a width of 64, and width \(32\) another",
        ),
        ({"representation": 0}, r"representation \(0\) must be at least 1, or null"),
        ({"patch_mode": True, "stem": "small"}, r"patch_mode \(true\) is for the standard stem"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        resnet.Options(name="resnet10", **options)
