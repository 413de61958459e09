"""AlexNet: torchvision's layers with RotNet's norms, one image size, activations kept or not."""

import math
from typing import Literal

import pytest
import torch
import torchvision
from torch import nn

from fastssl.backbones import alexnet

STAGES = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"]


def images(size=32, count=2):
    """uint8 [count, 3, size, size] in the memory layout of the loader."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)


def build(image_size=15, stem: Literal["standard", "small"] = "small", **options):
    """By default as little of it as there is: its first hidden layer sees one pixel."""
    torch.manual_seed(0)
    return alexnet.backbone(alexnet.Options(image_size=image_size, stem=stem, **options))


def convolutions(network):
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def test_it_is_torchvisions_alexnet_where_the_norms_do_nothing_but_add_its_biases():
    ours = build(image_size=224, stem="standard").eval()
    theirs = torchvision.models.alexnet().eval()  # dropout does nothing now
    tensors = [*theirs.state_dict().values()][:-2]  # less the classifier
    mine = [each for each in ours.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    norms = [each for each in ours.modules() if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        for layer, norm, weight, bias in zip(mine, norms, tensors[::2], tensors[1::2], strict=True):
            layer.weight.copy_(weight)
            norm.weight.fill_(math.sqrt(1 + norm.eps))  # the running variance is 1
            norm.bias.copy_(bias)
        x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        stages, expected = ours.stages(x), []
        for layer in [*theirs.features.children(), nn.Flatten(), *theirs.classifier.children()]:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                expected.append(x)

    assert len(norms) == 7
    assert list(stages) == STAGES
    for name, each in zip(STAGES, expected, strict=True):
        torch.testing.assert_close(stages[name], each)


def test_weights_are_as_many_as_rotnets_less_the_biases_of_its_convolutions():
    with torch.device("meta"):
        network = alexnet.backbone(alexnet.Options())
    biases_of_theirs = 64 + 192 + 384 + 256 + 256
    layers = [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convolutions(network)]
    of_convolutions = sum(before * here * kernel**2 for before, here, kernel in layers)
    of_hidden = 9216 * 4096 + 4096 * 4096

    assert layers == [(3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3)]
    assert sum(each.numel() for each in network.parameters()) == (
        of_convolutions + of_hidden + 2 * (biases_of_theirs + 2 * 4096)
    )
    assert all(each.bias is None for each in convolutions(network))


@pytest.mark.parametrize(
    ("size", "stem", "sizes"),
    [(63, "standard", [15, 7, 3, 3, 3]), (96, "standard", [23, 11, 5, 5, 5]),
     (32, "small", [32, 15, 7, 7, 7])],
)  # fmt: skip
def test_stages_come_in_order_with_their_strides_and_channels_last(size, stem, sizes):
    network, x = build(size, stem).eval(), images(size)
    with torch.no_grad():
        stages, features = network.stages(x), network(x)

    assert list(stages) == STAGES
    for name, channels, side in zip(STAGES, alexnet.CHANNELS, sizes, strict=False):
        assert stages[name].shape == (2, channels, side, side)
        assert stages[name].is_contiguous(memory_format=torch.channels_last)
    assert stages["fc6"].shape == stages["fc7"].shape == (2, 4096)
    assert torch.equal(features, stages["fc7"])
    assert network.dim == 4096


def test_both_stems_have_the_same_names_of_weights():
    small = build().state_dict()
    standard = build(63, "standard").state_dict()

    assert standard.keys() == small.keys()
    differing = [key for key in small if small[key].shape != standard[key].shape]
    assert differing == ["features.0.weight"]


def test_representation_is_one_more_linear_layer_and_the_last_stage():
    network = build(representation=7).eval()
    last = network.get_submodule("representation")
    with torch.no_grad():
        stages, features = network.stages(images(15)), network(images(15))
        expected = nn.functional.linear(stages["fc7"], *last.parameters())

    assert list(stages) == [*STAGES, "representation"]
    assert network.dim == 7
    assert {"representation.weight", "representation.bias"} <= network.state_dict().keys()
    assert torch.equal(features, stages["representation"])
    torch.testing.assert_close(features, expected)


def test_bytes_are_normalised_in_float32_also_under_autocast_and_stay_channels_last():
    network, x, seen = build().eval(), images(15), []
    mean, std = (torch.tensor(part).reshape(1, 3, 1, 1) for part in network.normalization)
    network.features[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features = network(x)

    torch.testing.assert_close(seen[0], (x / 255 - mean) / std)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert features.dtype == torch.bfloat16


def test_gradient_reaches_every_parameter():
    network = build(representation=5)
    network(images(15, count=8)).square().sum().backward()

    assert all(each.grad is not None and each.grad.any() for each in network.parameters())


def test_checkpointing_changes_no_gradient_and_no_statistic_by_a_bit():
    after, calls = [], []
    for activation_checkpointing in (False, True):
        network = build(activation_checkpointing=activation_checkpointing).double()
        for each in convolutions(network):
            each.register_forward_hook(lambda *_: calls.append(1))
        x = (images(15, count=4) / 255).double().requires_grad_()
        network(x).square().sum().backward()
        gradients = {name: each.grad for name, each in network.named_parameters()}
        after.append({"image": x.grad, **gradients, **dict(network.named_buffers())})

    assert len(calls) == 5 + 10  # what is not kept is computed twice
    assert len(after[0]) == 1 + 7 * 3 + 7 * 3 + 2  # image, weights and norms, statistics, pixels
    for name, plain in after[0].items():
        assert torch.equal(plain, after[1][name]), name


def test_checkpointing_computes_nothing_twice_but_for_gradients_in_training():
    network, calls = build(activation_checkpointing=True), []
    for each in convolutions(network):
        each.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        network(images(15))
    without_gradients = len(calls)
    network.eval()
    network(images(15)).sum().backward()

    assert (without_gradients, len(calls)) == (5, 10)


def test_it_compiles_as_one_graph_to_the_same_features_gradients_and_statistics():
    networks = [build() for _ in range(2)]
    networks[1].compile(backend="aot_eager", fullgraph=True)  # all of the compiler but its kernels
    eager, compiled = (network(images(15, count=4)) for network in networks)
    eager.square().sum().backward()
    compiled.square().sum().backward()
    buffers = [dict(network.named_buffers()) for network in networks]

    torch.testing.assert_close(compiled, eager)
    for name, each in networks[1].named_parameters():
        torch.testing.assert_close(each.grad, networks[0].get_parameter(name).grad)
    for name, each in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], each)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 62}, r"image_size \(62\) must be at least 63 .*; stem: small takes 15"),
        ({"image_size": 14, "stem": "small"}, r"image_size \(14\) must be at least 15 [^;]*$"),
        ({"representation": 0}, r"representation \(0\) must be at least 1, or null"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        alexnet.Options(**options)


@pytest.mark.parametrize("size", [20, 32])
def test_images_of_another_size_are_refused_with_both_sizes_and_the_option(size):
    expected = rf"images of {size} x {size} pixels for an AlexNet that takes 15 x 15 .*image_size"
    with pytest.raises(ValueError, match=expected):
        build()(images(size))


@pytest.mark.parametrize(("stem", "least"), [("standard", 63), ("small", 15)])
def test_images_too_small_for_the_strides_are_refused_with_the_least_size(stem, least):
    network = build(least, stem).eval()
    with torch.no_grad():
        assert network(images(least)).shape == (2, 4096)
    remedy = r" \(backbone.stem=small takes 15\)" if stem == "standard" else ""

    with pytest.raises(ValueError, match=rf"too small .* need {least} pixels a side{remedy}$"):
        network(images(least - 1))
