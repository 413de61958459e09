"""The networks of Kolesnikov et al. 2019 at every width of theirs: sizes and costs, closed form.

Nothing is computed or drawn: tensors on the meta device have shapes only.
"""

import functools
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastssl.backbones import resnet, resnet_v2, revnet, vgg

WIDENINGS = (4, 8, 12, 16)
# Without a head: millions of parameters, and 10^9 multiplications and additions for 224 x 224
# pixels, at each widening. Counted by hand from the authors' code.
PARAMETERS = {
    "resnet50v1": (23.5, 93.9, 211.2, 375.4),
    "revnet50": (5.4, 21.5, 48.3, 85.8),
    "vgg19": (34.9, 139.6, 314, 558),
}
GMACS = {
    "resnet50v1": (4.09, 16.1, 36.1, 64.0),
    "resnet50v2": (4.09, 16.1, 36.1, 64.0),
    "revnet50": (1.35, 4.4, 9.3, 15.9),
    "vgg19": (4.9, 19.6, 44, 78),
}
PATCH_GMACS = (2.03, 8.03, 18, 32)  # of ResNets for a patch of 64 x 64 with the strides of patches
NAMES = tuple(GMACS)


@functools.cache
def build(name: str, widening: int, *, patch_mode: bool = False, last_relu: bool = True):
    """The network on the meta device."""
    with torch.device("meta"):
        if name == "resnet50v1":
            v1 = resnet.Options(name="resnet50", widening=widening, patch_mode=patch_mode)
            return resnet.backbone(v1).eval()
        if name == "vgg19":
            assert not patch_mode, "K19 leave VGG's strides as they are"
            return vgg.backbone(vgg.Options(widening=widening)).eval()
        module: ModuleType = {"resnet50v2": resnet_v2, "revnet50": revnet}[name]
        options = module.Options(widening=widening, patch_mode=patch_mode, last_relu=last_relu)
        return module.backbone(options).eval()


@functools.cache
def run(name: str, widening: int, side: int, **variant: bool) -> tuple[float, dict[str, Tensor]]:
    """10^9 multiplications and additions for one image, and what each stage puts out."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        image = torch.empty(1, 3, side, side, device="meta")
        stages = build(name, widening, **variant).stages(image)
    return counter.get_total_flops() / 2e9, stages


def as_written(value: float, written: float) -> float:
    """`value` with as many decimals as the table's number has."""
    _, _, decimals = str(written).partition(".")
    return round(value, len(decimals))


def convolutions(network: nn.Module) -> list[tuple[int, ...]]:
    layers = [each for each in network.modules() if isinstance(each, nn.Conv2d)]
    return sorted((*each.weight.shape, each.stride[0]) for each in layers)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("row", range(4), ids=[f"k{k}" for k in WIDENINGS])
def test_parameters_are_as_many_as_in_the_table(name, row):
    written = PARAMETERS[name][row]
    network = build(name, WIDENINGS[row])

    assert as_written(sum(each.numel() for each in network.parameters()) / 1e6, written) == written


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", range(4), ids=[f"k{k}" for k in WIDENINGS])
def test_an_image_costs_as_much_as_in_the_table(name, row):
    written, k = GMACS[name][row], WIDENINGS[row]
    gmacs, stages = run(name, k, 224)
    *_, features = stages.values()

    assert as_written(gmacs, written) == written
    assert build(name, k).dim == features.shape[1] == 512 * k


@pytest.mark.parametrize("name", ["resnet50v1", "resnet50v2", "revnet50"])
@pytest.mark.parametrize("k", WIDENINGS)
def test_stages_have_the_channels_and_strides_of_the_paper(name, k):
    stages = run(name, k, 224)[1]
    root = 64 * k if name == "revnet50" else 16 * k
    channels = (root, 64 * k, 128 * k, 256 * k, 512 * k)

    assert list(stages) == ["stem", "layer1", "layer2", "layer3", "layer4", "pool"]
    for stage, wide, side in zip(stages.values(), channels, (56, 56, 28, 14, 7), strict=False):
        assert stage.shape == (1, wide, side, side)


@pytest.mark.parametrize("k", WIDENINGS)
def test_version_2_has_the_convolutions_of_version_1(k):
    assert convolutions(build("resnet50v2", k)) == convolutions(build("resnet50v1", k))


@pytest.mark.parametrize("name", ["resnet50v1", "resnet50v2"])
@pytest.mark.parametrize("row", range(4), ids=[f"k{k}" for k in WIDENINGS])
def test_a_patch_costs_as_much_as_in_the_table(name, row):
    written = PATCH_GMACS[row]
    gmacs, stages = run(name, WIDENINGS[row], 64, patch_mode=True)

    assert as_written(gmacs, written) == written
    assert stages["layer4"].shape[2:] == (8, 8)


def test_a_patch_without_strides_of_its_own_costs_a_sixth():
    gmacs, stages = run("resnet50v1", 4, 64)

    assert round(gmacs, 2) == 0.33
    assert stages["layer4"].shape[2:] == (2, 2)


@pytest.mark.parametrize("name", ["resnet50v1", "resnet50v2", "revnet50"])
def test_strides_of_patches_change_no_weight(name):
    as_usual, patches = (build(name, 4, patch_mode=mode).state_dict() for mode in (False, True))

    assert {key: each.shape for key, each in as_usual.items()} == {
        key: each.shape for key, each in patches.items()
    }


@pytest.mark.parametrize("name", ["resnet50v2", "revnet50"])
def test_the_networks_without_a_last_relu_have_the_same_weights_and_cost(name):
    with_it, without = (build(name, 4, last_relu=last) for last in (True, False))

    assert {key: each.shape for key, each in with_it.state_dict().items()} == {
        key: each.shape for key, each in without.state_dict().items()
    }
    assert run(name, 4, 224)[0] == run(name, 4, 224, last_relu=False)[0]
