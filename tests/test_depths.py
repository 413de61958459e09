"""Which parameters and modules belong to which stage, found without looking at their names."""

import pytest
import torch
from torch import Tensor, nn

from fastssl.backbones import alexnet, named, nin, resnet, resnet_v2, revnet, vgg
from fastssl.depths import depths, learning


class Odd(nn.Module):
    """Stages that share nothing with their names: dropout, norms without parameters, a branch."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(4))  # in no module of its own; of the second stage
        self.a = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.b = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
        self.unused = nn.Linear(4, 4)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        first = self.norm(self.a(x.mean(dim=(2, 3)).repeat(1, 2)[:, :4]))
        second = self.b(first) * self.token + first
        return {"one": first, "none": second * 0 + first, "two": second, "last": second * 2}


def test_a_resnet_s_parameters_are_in_the_stage_that_they_are_named_after():
    backbone = resnet.backbone(resnet.Options(name="resnet18"))
    found = depths(backbone)

    assert found.stages == ("stem", "layer1", "layer2", "layer3", "layer4")
    assert found.parameters.keys() == dict(backbone.named_parameters()).keys()
    for name, depth in found.parameters.items():
        stage = name.split(".")[0]
        assert found.stages[depth] == ("stem" if stage in ("conv1", "bn1") else stage)
    assert found.modules["layer3"] == found.modules["layer3.0.relu"] == 3
    assert found.modules["maxpool"] == 0
    assert found.modules["avgpool"] == found.modules[""] == 4


def test_a_nin_s_parameters_are_in_their_blocks():
    backbone = nin.backbone(nin.Options())
    found = depths(backbone)

    assert found.stages == ("conv1", "conv2", "conv3", "conv4")
    assert all(depth == int(name.split(".")[1]) for name, depth in found.parameters.items())


@pytest.mark.parametrize("length", [None, 5])
def test_hidden_layers_behind_one_another_are_stages_of_their_own(length):
    made = {"representation": length}
    for backbone in (
        vgg.backbone(vgg.Options(widening=1, image_size=32, **made)),
        alexnet.backbone(alexnet.Options(image_size=63, **made)),
    ):
        found = depths(backbone)
        maps = tuple(f"conv{number}" for number in range(1, 6))
        last = () if length is None else ("representation",)

        assert found.stages == (*maps, "fc6", "fc7", *last)
        for name, depth in found.parameters.items():
            stage = name.split(".")[0]
            assert found.stages[depth] == stage or (stage == "features" and depth < len(maps))
        assert {found.parameters[name] for name in found.parameters if "features" in name} == {
            *range(5)
        }
        assert found.stages[found.modules["fc6.1"]] == "fc6"  # its norm


@pytest.mark.parametrize("length", [None, 5])
@pytest.mark.parametrize("reversible", [True, False])
def test_a_revnet_s_parameters_are_in_its_stages_reversible_or_not(reversible, length):
    options = revnet.Options(
        widening=1, units=(1, 2, 1, 1), reversible=reversible, representation=length
    )
    found = depths(revnet.backbone(options))
    last = () if length is None else ("representation",)

    assert found.stages == ("stem", "layer1", "layer2", "layer3", "layer4", *last)
    for name, depth in found.parameters.items():
        stage = name.split(".")[0]
        assert found.stages[depth] == {"root": "stem", "norm": "layer4"}.get(stage, stage)
    assert found.modules["layer2"] == found.modules["layer2.1.norm3"] == 2


@pytest.mark.parametrize("length", [None, 5])
def test_a_resnet_v2_s_last_norm_is_of_its_last_map_also_before_another_layer(length):
    options = resnet_v2.Options(widening=1, representation=length)
    found = depths(resnet_v2.backbone(options))
    last = () if length is None else ("representation",)

    assert found.stages == ("stem", "layer1", "layer2", "layer3", "layer4", *last)
    for name, depth in found.parameters.items():
        parts = name.removeprefix("network.").split(".")
        stage = f"layer{int(parts[1]) + 1}" if parts[0] == "stages" else parts[0]
        assert found.stages[depth] == {"norm": "layer4"}.get(stage, stage)
    assert found.stages[found.modules["network.norm"]] == "layer4"


def test_it_is_reached_not_named():
    found = depths(Odd())

    assert found.stages == ("one", "none")  # a product with zero depends on its factors, too
    assert found.parameters["a.weight"] == 0
    assert found.parameters["b.0.weight"] == found.parameters["token"] == 1
    assert found.parameters["unused.weight"] == 1  # of no stage: counted as part of the last
    assert found.modules["norm"] == 0
    assert found.modules["b.1"] == 1


def test_the_backbone_is_left_as_it_was():
    backbone = resnet.backbone(resnet.Options(name="resnet10", width=4))
    backbone.bn1.eval()
    backbone.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    depths(backbone)

    assert backbone.training
    assert not backbone.bn1.training
    assert not backbone.conv1.weight.requires_grad
    assert backbone.get_parameter("layer1.0.conv1.weight").requires_grad
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert not any(each._forward_hooks for each in backbone.modules())


def test_frozen_parameters_are_found_too():
    backbone = resnet.backbone(resnet.Options(name="resnet10", width=4)).requires_grad_(False)

    assert set(depths(backbone).parameters.values()) == {0, 1, 2, 3, 4}


class Large(nn.Module):
    """Takes images of one size, as vision transformers do."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side
        self.a = nn.Conv2d(3, 2, 1)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        assert x.shape[-1] == self.side, f"{x.shape[-1]} pixels, not {self.side}"
        return {"last": self.a(x)}


@pytest.mark.parametrize("side", [96, 128, 160, 192, 224, 240, 256, 288, 299, 384])
def test_networks_for_one_size_are_asked_with_theirs(side):
    assert depths(Large(side)).stages == ("last",)


def test_a_named_network_s_own_size_is_asked_for_whatever_it_is():
    options = named.Options(name="timm:vit_tiny_patch16_224", image_size=112)
    found = depths(named.backbone(options))

    assert len(found.stages) == 12
    assert found.parameters["network.norm.weight"] == 11


def test_what_can_t_be_told_apart_is_refused():
    with pytest.raises(ValueError, match=r"takes no image of 64, 96, .*, 384 pixels .*, not 100"):
        depths(Large(100))
    with pytest.raises(ValueError, match="Identity has no parameters"):
        depths(nn.Identity())


@pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("timm:convnext_atto", "network.head.norm.weight"),
        ("torchvision:mobilenet_v3_small", "network.classifier.0.weight"),
        ("torchvision:swin_t", "network.norm.weight"),
    ],
)
def test_what_stands_behind_the_last_map_counts_to_it(name, behind):
    backbone = named.backbone(named.Options(name=name))
    found = depths(backbone)
    last = [each for each, depth in found.parameters.items() if depth == len(found.stages) - 1]

    assert "pool" not in found.stages
    assert behind in last
    assert any(backbone.get_parameter(each).ndim > 1 for each in last if each != behind)


def test_what_learns_is_told_by_stage_and_number():
    objective = nn.Module()
    objective.backbone = backbone = resnet.backbone(resnet.Options(name="resnet10", width=4))
    objective.head = nn.Linear(32, 3)
    whole = sum(each.numel() for each in backbone.parameters())
    assert learning(objective) == (
        f"learning: {whole:,} of the backbone's {whole:,} parameters, 99 of heads"
    )
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name.startswith(("layer3", "layer4")))
    some = sum(each.numel() for each in backbone.parameters() if each.requires_grad)

    assert learning(objective) == (
        f"learning: {some:,} of the backbone's {whole:,} parameters (layer3, layer4), 99 of heads"
    )
