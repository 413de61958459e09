"""RotNet's Network in Network: its layers, its size, its weights as the authors' code has them."""

import math

import pytest
import torch
from torch import nn

from fastssl.backbones import nin


def images(size=32, count=2):
    """uint8 [count, 3, size, size] in the memory layout of the loader."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)


def build(**options):
    torch.manual_seed(0)
    return nin.backbone(nin.Options(**options)).eval()


def convolutions(network):
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(("blocks", "millions"), [(3, 1.00), (4, 1.41), (5, 1.81)])
def test_weights_of_the_convolutions_are_as_many_as_the_papers(blocks, millions):
    network = build(blocks=blocks)
    weights = sum(each.weight.numel() for each in convolutions(network))
    everything = sum(each.numel() for each in network.parameters())

    assert round(weights / 1e6, 2) == millions
    assert everything - weights == 2 * (192 + 160 + 96 + 3 * 192 * (blocks - 1))  # batch norms
    assert all(each.bias is None for each in convolutions(network))


def test_layers_are_those_of_the_authors_code():
    layers = [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convolutions(build())]

    assert layers == [
        (3, 192, 5), (192, 160, 1), (160, 96, 1),
        (96, 192, 5), (192, 192, 1), (192, 192, 1),
        (192, 192, 3), (192, 192, 1), (192, 192, 1),
        (192, 192, 3), (192, 192, 1), (192, 192, 1),
    ]  # fmt: skip


def test_four_blocks_multiply_251_million_times_for_an_image_of_cifar():
    counts = []

    def count(layer, _, output):
        counts.append(layer.weight.numel() * output.shape[2] * output.shape[3])

    network = build()
    for each in convolutions(network):
        each.register_forward_hook(count)
    with torch.no_grad():
        network(images(count=1))

    assert round(sum(counts) / 1e6) == 251


@pytest.mark.parametrize("blocks", [3, 4, 5])
def test_stages_are_the_maps_that_rotnet_probes(blocks):
    network = build(blocks=blocks)
    with torch.no_grad():
        stages = network.stages(images())

    assert list(stages) == [*(f"conv{k}" for k in range(1, blocks + 1)), "pool"]
    shapes = [tuple(each.shape[1:]) for each in stages.values()]
    assert shapes == [(96, 16, 16), *[(192, 8, 8)] * (blocks - 1), (192,)]
    torch.testing.assert_close(stages["pool"], stages[f"conv{blocks}"].mean((2, 3)))
    assert network.dim == 192


def test_the_first_block_ends_in_the_maximum_and_the_second_in_the_mean():
    network, seen = build(), []
    for block in network.blocks:
        assert isinstance(block, nn.Sequential)
        last_relu = block[8]  # which works in place, on what the pooling then reads
        last_relu.register_forward_hook(lambda _, inputs, output: seen.append(output.clone()))
    with torch.no_grad():
        stages = network.stages(images())
    pad = nn.functional.pad

    # every second pixel with its eight neighbours; what is read beyond the border is 0
    of_three = [pad(seen[k], (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2) for k in (0, 1)]
    torch.testing.assert_close(stages["conv1"], of_three[0].amax((-1, -2)))  # after a ReLU
    torch.testing.assert_close(stages["conv2"], of_three[1].mean((-1, -2)))


def test_weights_are_drawn_as_rotnet_draws_them():
    for each in convolutions(build()):
        expected = math.sqrt(2 / (each.kernel_size[0] ** 2 * each.out_channels))
        assert each.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_bytes_are_normalised_with_cifars_statistics_in_float32_and_stay_channels_last():
    network, x, seen = build(), images(), []
    mean = torch.tensor([125.3, 123.0, 113.9]).reshape(1, 3, 1, 1)
    std = torch.tensor([63.0, 62.1, 66.7]).reshape(1, 3, 1, 1)
    first = convolutions(network)[0]
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        network(x)

    assert seen[0].dtype == torch.float32
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(seen[0], (x - mean) / std)
    torch.testing.assert_close(
        torch.tensor(network.normalization) * 255, torch.stack([mean.flatten(), std.flatten()])
    )


def test_gradient_reaches_every_parameter():
    network = build(width=12).train()
    network(images(8)).square().sum().backward()

    assert all(each.grad is not None and each.grad.any() for each in network.parameters())


def test_a_narrower_network_keeps_the_proportions():
    layers = [c.out_channels for c in convolutions(build(blocks=3, width=48))]

    assert layers == [48, 40, 24, 48, 48, 48, 48, 48, 48]
    assert build(width=48).dim == 48


@pytest.mark.parametrize("size", [3, 8, 33, 96])
def test_any_size_will_do_that_leaves_two_pixels_for_both_poolings(size):
    network = build(width=12)
    with torch.no_grad():
        assert network(images(size)).shape == (2, 12)

        assert network.stages(images(3))["conv1"].shape[2:] == (2, 2)
        with pytest.raises(ValueError, match=r"images of 2 x 2 pixels are too small .* need 3 pix"):
            network(images(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 2}, r"blocks \(2\) must be 3, 4 or 5"),
        ({"blocks": 6}, r"blocks \(6\) must be 3, 4 or 5"),
        ({"width": 64}, r"width \(64\) must be a multiple of 6: 160 of 192 is 5/6"),
        ({"width": 0}, r"width \(0\) must be a multiple of 6"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        nin.Options(**options)
