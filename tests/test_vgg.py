"""VGG19: torchvision's convolutions, K19's hidden layers, one size, activations kept or not."""

import math

import pytest
import torch
import torchvision
from torch import nn

from fastssl.backbones import vgg

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
STAGES = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"]


def images(size=32, count=2):
    """uint8 [count, 3, size, size] in the memory layout of the loader."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)


def build(widening=1, image_size=32, **options):
    torch.manual_seed(0)
    return vgg.backbone(vgg.Options(widening=widening, image_size=image_size, **options))


def convolutions(network):
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def with_statistics(network):
    """Norms as after some training: nothing of theirs is 0 or 1 any more."""
    for norm in [each for each in network.modules() if isinstance(each, NORMS)]:
        for each in [*norm.parameters(), *norm.buffers()]:
            if each.is_floating_point():
                nn.init.uniform_(each, 0.5, 1.5)
    return network.eval()


def test_every_depth_is_torchvisions_vgg19_bn_on_the_same_weights():
    ours = with_statistics(build(widening=8, image_size=64))
    with torch.device("meta"):  # the classifier's 124 million weights are not drawn
        theirs = torchvision.models.vgg19_bn().features
    weights = ours.features.state_dict()
    biases = theirs.state_dict().keys() - weights.keys()
    zeros = {key: torch.zeros(weights[key.replace("bias", "weight")].shape[0]) for key in biases}
    theirs.load_state_dict(weights | zeros, assign=True)  # strict: no other key is missing
    layers = [*theirs.eval().children()]
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = []
    with torch.no_grad():
        stages = ours.stages(x)
        for layer in layers:
            if isinstance(layer, nn.MaxPool2d):
                expected.append(x)
            x = layer(x)

    assert len(biases) == 16
    assert len(expected) == 5
    for name, each in zip(STAGES, expected, strict=False):
        torch.testing.assert_close(stages[name], each)


@pytest.mark.parametrize(("widening", "image_size"), [(1, 96), (2, 65)])
def test_hidden_layers_are_the_convolutions_over_the_whole_map_that_k19_write(widening, image_size):
    network = with_statistics(build(widening, image_size))
    side = image_size // 32
    with torch.no_grad():
        stages = network.stages(images(image_size))
        expected = nn.functional.max_pool2d(stages["conv5"], 2)
        for name, kernel in (("fc6", side), ("fc7", 1)):
            weight = network.get_parameter(f"{name}.0.weight").unflatten(1, (-1, kernel, kernel))
            norm = nn.BatchNorm2d(len(weight)).eval()
            norm.load_state_dict(network.get_submodule(f"{name}.1").state_dict())
            expected = norm(nn.functional.conv2d(expected, weight)).relu()

            assert expected.shape == (2, 512 * widening, 1, 1)
            torch.testing.assert_close(
                stages[name], expected.flatten(1), rtol=1e-4, atol=1e-4, msg=name
            )


@pytest.mark.parametrize("widening", [1, 3, 4])
def test_widening_multiplies_every_width(widening):
    with torch.device("meta"):
        network = vgg.backbone(vgg.Options(widening=widening))
    widths = [each.out_channels for each in convolutions(network)]
    of_k = [8] * 2 + [16] * 2 + [32] * 4 + [64] * 8

    assert widths == [each * widening for each in of_k]
    assert network.dim == 512 * widening
    assert network.fc6[0].weight.shape == (512 * widening, 64 * widening * 7 * 7)
    assert network.fc7[0].weight.shape == (512 * widening, 512 * widening)


def test_no_layer_has_a_bias_that_its_norm_would_take_away():
    network = build()
    linear = [each for each in network.modules() if isinstance(each, nn.Conv2d | nn.Linear)]

    assert len(linear) == 18
    assert all(each.bias is None for each in linear)


@pytest.mark.parametrize(
    ("stem", "sizes"), [("standard", [64, 32, 16, 8, 4]), ("small", [64, 64, 64, 32, 16])]
)
def test_stages_come_in_order_with_their_strides_and_channels_last(stem, sizes):
    network, x = build(image_size=64, stem=stem).eval(), images(64)
    with torch.no_grad():
        stages, features = network.stages(x), network(x)

    assert list(stages) == STAGES
    for name, channels, size in zip(STAGES, [8, 16, 32, 64, 64], sizes, strict=False):
        assert stages[name].shape == (2, channels, size, size)
        assert stages[name].is_contiguous(memory_format=torch.channels_last)
    assert stages["fc6"].shape == stages["fc7"].shape == (2, 512)
    assert torch.equal(features, stages["fc7"])


def test_the_small_stem_keeps_the_names_of_the_weights():
    standard, small = build().state_dict(), build(stem="small").state_dict()

    assert standard.keys() == small.keys()
    assert (
        standard["features.49.weight"].shape == small["features.49.weight"].shape == (64, 64, 3, 3)
    )


def test_representation_is_one_more_linear_layer_and_the_last_stage():
    network = build(representation=7).eval()
    last = network.get_submodule("representation")
    with torch.no_grad():
        stages, features = network.stages(images()), network(images())
        expected = nn.functional.linear(stages["fc7"], *last.parameters())

    assert list(stages) == [*STAGES, "representation"]
    assert network.dim == 7
    assert {"representation.weight", "representation.bias"} <= network.state_dict().keys()
    assert torch.equal(features, stages["representation"])
    torch.testing.assert_close(features, expected)


def test_weights_are_drawn_by_fan_out_of_the_convolutions_that_they_are():
    network = build(widening=2, image_size=96)

    for each in convolutions(network):
        expected = math.sqrt(2 / (9 * each.out_channels))
        assert each.weight.std().item() == pytest.approx(expected, rel=0.1)
    for name, side in (("fc6", 3), ("fc7", 1)):
        expected = math.sqrt(2 / (1024 * side**2))
        weight = network.get_parameter(f"{name}.0.weight")
        assert weight.std().item() == pytest.approx(expected, rel=0.02)


def test_bytes_are_normalised_in_float32_also_under_autocast_and_stay_channels_last():
    network, x, seen = build().eval(), images(), []
    mean, std = (torch.tensor(part).reshape(1, 3, 1, 1) for part in network.normalization)
    network.features[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features = network(x)

    torch.testing.assert_close(seen[0], (x / 255 - mean) / std)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert features.dtype == torch.bfloat16


def test_gradient_reaches_every_parameter():
    network = build(representation=5)
    network(images(count=8)).square().sum().backward()

    assert all(each.grad is not None and each.grad.any() for each in network.parameters())


def test_checkpointing_changes_no_gradient_and_no_statistic_by_a_bit():
    after = []
    for activation_checkpointing in (False, True):
        network = build(activation_checkpointing=activation_checkpointing).double()
        x = (images(count=4) / 255).double().requires_grad_()
        network(x).square().sum().backward()
        gradients = {name: each.grad for name, each in network.named_parameters()}
        after.append({"image": x.grad, **gradients, **dict(network.named_buffers())})

    assert len(after[0]) == 1 + 18 * 3 + 18 * 3 + 2  # image, weights and norms, statistics, pixels
    for name, plain in after[0].items():
        assert torch.equal(plain, after[1][name]), name


def test_checkpointing_computes_blocks_twice_in_training_only():
    network, calls = build(activation_checkpointing=True), []
    for each in convolutions(network):
        each.register_forward_hook(lambda *_: calls.append(1))
    counts = {}
    network(images()).sum().backward()
    counts["training"] = len(calls)
    calls.clear()
    with torch.no_grad():
        network(images())
    counts["no gradients"] = len(calls)
    calls.clear()
    network.eval()
    network(images()).sum().backward()
    counts["evaluation"] = len(calls)

    assert counts == {"training": 32, "no gradients": 16, "evaluation": 16}


def test_it_compiles_as_one_graph_to_the_same_features_gradients_and_statistics():
    networks = [build(activation_checkpointing=True) for _ in range(2)]
    networks[1].compile(backend="aot_eager", fullgraph=True)  # all of the compiler but its kernels
    eager, compiled = (network(images(count=4)) for network in networks)
    eager.square().sum().backward()
    compiled.square().sum().backward()
    buffers = [dict(network.named_buffers()) for network in networks]

    torch.testing.assert_close(compiled, eager)
    for name, each in networks[1].named_parameters():
        torch.testing.assert_close(each.grad, networks[0].get_parameter(name).grad)
    for name, each in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], each)


def test_modules_that_replace_its_own_are_those_that_run():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(build()).eval()
    ran = []
    for each in network.modules():
        if isinstance(each, nn.SyncBatchNorm):
            each.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        network(images())

    assert len(ran) == 18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widening": 0}, r"widening \(0\) must be at least 1; K19's are 4, 8, 12 and 16"),
        ({"image_size": 31}, r"image_size \(31\) must be at least 32: .*; stem: small takes 8"),
        ({"image_size": 7, "stem": "small"}, r"image_size \(7\) must be at least 8: [^;]*$"),
        ({"representation": 0}, r"representation \(0\) must be at least 1, or null"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        vgg.Options(**options)


@pytest.mark.parametrize("size", [48, 64])
def test_images_of_another_size_are_refused_with_both_sizes_and_the_option(size):
    expected = rf"images of {size} x {size} pixels for a VGG19 that takes 32 x 32 only.*image_size"
    with pytest.raises(ValueError, match=expected):
        build()(images(size))


@pytest.mark.parametrize(("stem", "least"), [("standard", 32), ("small", 8)])
def test_images_too_small_for_the_pools_are_refused_with_the_least_size(stem, least):
    network = build(image_size=least, stem=stem).eval()
    with torch.no_grad():
        assert network(images(least)).shape == (2, 512)
    remedy = r" \(backbone.stem=small takes 8\)" if stem == "standard" else ""

    with pytest.raises(ValueError, match=rf"too small .* need {least} pixels a side{remedy}$"):
        network(images(least - 1))
