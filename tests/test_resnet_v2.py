"""ResNet-50 v2 is timm's where timm has it, and differs by what its options say elsewhere."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import nn

from fastssl.backbones import resnet_v2

LAYERS = ["layer1", "layer2", "layer3", "layer4"]


def build(**options) -> resnet_v2.Backbone:
    torch.manual_seed(0)
    return resnet_v2.backbone(resnet_v2.Options(**{"widening": 1, **options}))


def of_timm(ours: resnet_v2.Backbone, widening: int = 1) -> Any:
    """timm's network of that width with the same weights."""
    theirs = timm.create_model("resnetv2_50", num_classes=0, width_factor=widening / 4)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def floats(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def pixels(size: int, count: int = 2) -> torch.Tensor:
    """uint8 [count, 3, size, size] in the memory layout of the loader."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return made.permute(0, 3, 1, 2)


def learn(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a step in training mode leaves behind: gradients and running statistics."""
    network.train().zero_grad()
    network(x).square().mean().backward()
    left = {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
    return left | dict(network.named_buffers())


def test_with_widening_4_it_is_the_resnetv2_50_of_timm_on_the_same_weights():
    ours = build(widening=4).eval()
    theirs = of_timm(ours, 4).eval()
    x = floats(64, 1)
    with torch.no_grad():
        stages = ours.stages(x)
        final, maps = theirs.forward_intermediates(x)
        stem = theirs.stem(x)

        assert torch.equal(ours(x), theirs(x))
    assert list(stages) == ["stem", *LAYERS, "pool"]
    assert torch.equal(stages["stem"], stem)
    for name, theirs_of_it in zip(LAYERS, maps[1:], strict=True):
        assert torch.equal(stages[name], theirs_of_it)
    torch.testing.assert_close(stages["pool"], final.mean((2, 3)))


def test_it_learns_as_timm_s_does():
    ours = build().double()
    theirs = of_timm(ours).double()
    found, wanted = learn(ours, floats(32).double()), learn(theirs, floats(32).double())

    assert len(wanted) == len([*theirs.parameters(), *theirs.buffers()])
    for name in wanted:
        torch.testing.assert_close(found[f"network.{name}"], wanted[name])


@pytest.mark.parametrize("widening", [3, 16])
def test_each_widening_has_the_keys_and_shapes_of_timm_s(widening):
    with torch.device("meta"):
        ours = build(widening=widening)
        theirs = timm.create_model("resnetv2_50", num_classes=0, width_factor=widening / 4)

    assert ours.dim == 512 * widening
    shapes = [{key: each.shape for key, each in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_without_the_last_relu_nothing_else_changes():
    with_it, without = build().eval(), build(last_relu=False).eval()
    theirs = of_timm(without).eval()
    theirs.norm.act = nn.Identity()
    x = floats(64)
    with torch.no_grad():
        active, plain = with_it.stages(x), without.stages(x)
        normed = without.network.norm(plain["layer4"])

        torch.testing.assert_close(without(x), theirs(x))
    for name in ["stem", *LAYERS]:
        assert torch.equal(active[name], plain[name])
    torch.testing.assert_close(plain["pool"], normed.mean((2, 3)))
    torch.testing.assert_close(active["pool"], normed.relu().mean((2, 3)))
    assert (plain["pool"] < 0).any()


def test_patch_mode_is_the_same_network_with_other_strides():
    ours = build(patch_mode=True).eval()
    theirs = of_timm(ours).eval()
    theirs.stem.conv.stride = (1, 1)
    last = theirs.stages[3].blocks[0]
    last.conv2.stride = last.downsample.conv.stride = (1, 1)
    x = floats(64)
    with torch.no_grad():
        stages = ours.stages(x)

        torch.testing.assert_close(ours(x), theirs(x))
    assert [stages[name].shape[-1] for name in ["stem", *LAYERS]] == [32, 32, 16, 8, 8]


def test_the_small_stem_keeps_height_and_width_and_has_no_pool():
    ours = build(stem="small").eval()
    theirs = of_timm(build()).eval()
    theirs.stem = nn.Sequential()
    theirs.stem.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x = floats(32)
    with torch.no_grad():
        stages = ours.stages(x)

        torch.testing.assert_close(ours(x), theirs(x))
    assert [stages[name].shape[-1] for name in ["stem", *LAYERS]] == [32, 32, 16, 8, 4]


def test_a_representation_is_one_more_linear_layer_and_the_last_stage():
    network = build(representation=7).eval()
    with torch.no_grad():
        stages = network.stages(pixels(32))
        features = network(pixels(32))
    weights = network.state_dict()
    wanted = stages["pool"] @ weights["representation.weight"].T + weights["representation.bias"]

    assert network.dim == 7
    assert list(stages)[-2:] == ["pool", "representation"]
    assert torch.equal(features, stages["representation"])
    torch.testing.assert_close(features, wanted)


@pytest.mark.parametrize("options", [{}, {"last_relu": False, "representation": 5}])
def test_recomputed_activations_change_memory_and_nothing_else(options):
    plain = build(**options).double()
    recomputed = build(activation_checkpointing=True, **options).double()
    x = floats(32, 4).double()
    held = [kept_by(network, x) for network in (plain, recomputed)]
    wanted, found = learn(plain, x), learn(recomputed, x)

    assert held[1] < held[0] / 2
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_in_evaluation_nothing_is_recomputed():
    plain, recomputed = build().eval(), build(activation_checkpointing=True).eval()
    x = floats(32)

    assert kept_by(recomputed, x) == kept_by(plain, x)
    assert torch.equal(recomputed(x), plain(x))


def kept_by(network: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, without weights."""
    network = copy.deepcopy(network)  # whose running statistics move
    weights = {each.untyped_storage().data_ptr() for each in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(x)
    return sum(each.nbytes() for each in kept.values())


def test_maps_stay_channels_last_and_bytes_give_what_floats_give_also_under_autocast():
    network = build().train().to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(part).reshape(1, 3, 1, 1) for part in network.normalization)
    x = pixels(64)
    plain = network.stages(x)
    from_floats = network.stages((x / 255 - mean) / std)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network.stages(x)
    half["pool"].float().square().mean().backward()

    for name, each in plain.items():
        torch.testing.assert_close(each, from_floats[name], rtol=1e-3, atol=1e-4)
        assert half[name].dtype == torch.bfloat16
        if each.ndim == 4:
            assert each.is_contiguous(memory_format=torch.channels_last)
            assert half[name].is_contiguous(memory_format=torch.channels_last)
    error = (half["layer1"].float() - plain["layer1"]).norm() / plain["layer1"].norm()
    assert error < 0.02
    gradients = [each.grad for each in network.parameters()]
    assert all(each is not None and each.isfinite().all() for each in gradients)


def test_it_is_one_graph_for_the_compiler():
    network = build()
    compiled = copy.deepcopy(network)
    compiled.compile(backend="eager", fullgraph=True)

    assert torch.equal(compiled(pixels(32)), network(pixels(32)))


def test_weights_travel_from_within_another_module_and_through_copies():
    network = build(representation=3)
    whole = nn.ModuleDict({"backbone": network})
    other = resnet_v2.backbone(resnet_v2.Options(widening=1, representation=3))
    nn.ModuleDict({"backbone": other}).load_state_dict(whole.state_dict())
    copied = pickle.loads(pickle.dumps(network))

    assert "backbone.stages.3.blocks.2.conv3.weight" in whole.state_dict()
    assert "backbone.representation.bias" in whole.state_dict()
    for each in (other, copied, copy.deepcopy(network)):
        found, wanted = each.state_dict(), network.state_dict()
        assert [*found] == [*wanted]
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_weights_are_drawn_as_torchvision_draws_a_resnet_s():
    weights = build().state_dict()
    wanted = (2 / (16 * 9)) ** 0.5  # He et al. 2015, by fan-out
    deviation = torch.stack(
        [
            each.std()
            for key, each in weights.items()
            if key.startswith("stages.0") and "conv2" in key
        ]
    )

    torch.testing.assert_close(deviation.mean().item(), wanted, rtol=0.05, atol=0)
    assert torch.equal(weights["stages.0.blocks.0.norm3.weight"], torch.ones(16))


@pytest.mark.parametrize(
    ("options", "least", "before_the_last_stride", "remedy"),
    [
        ({}, 17, "layer3", r" \(backbone.stem=small takes 5, and"),
        ({"stem": "small"}, 5, "layer3", "$"),
        ({"patch_mode": True}, 5, "layer2", "$"),
    ],
)
def test_images_too_small_for_the_strides_are_refused_with_the_least_size(
    options, least, before_the_last_stride, remedy
):
    network = build(**options).train()
    message = rf"images of {least - 1} x 40 pixels are too small .* need {least} pixels a side"
    with pytest.raises(ValueError, match=message + remedy):
        network(pixels(40)[:, :, : least - 1])
    stages = network.stages(pixels(least))

    assert stages[before_the_last_stride].shape[-2:] == (2, 2)
    assert stages["layer4"].shape[-2:] == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widening": 0}, r"widening \(0\) must be at least 1; K19's are 4, 8, 12 and 16"),
        (
            {"patch_mode": True, "stem": "small"},
            r"patch_mode \(true\) .*: give stem=standard, or p",
        ),
        ({"representation": 0}, r"representation \(0\) must be at least 1, or null"),
    ],
)
def test_options_that_cannot_be_say_what_can(options, message):
    with pytest.raises(ValueError, match=message):
        resnet_v2.Options(**options)
