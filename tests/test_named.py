"""Networks by torchvision's and timm's names: features, keys, every depth, and clear noes."""

import copy
import functools
import os
import pickle
import sys
import urllib.error
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
from safetensors import SafetensorError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from fastssl import trial_pass
from fastssl.backbones import named

# of many kinds, none a ResNet: (pixels a side, features)
NETWORKS = {
    "torchvision:alexnet": (64, 4096),
    "torchvision:squeezenet1_1": (64, 512),
    "torchvision:densenet121": (64, 1024),
    "torchvision:googlenet": (64, 1024),
    "torchvision:mobilenet_v3_small": (64, 1024),
    "torchvision:mnasnet0_5": (64, 1280),
    "torchvision:regnet_y_400mf": (64, 440),
    "torchvision:convnext_tiny": (64, 768),
    "torchvision:swin_t": (64, 768),
    "torchvision:vit_b_32": (64, 768),
    "timm:convnext_atto": (64, 320),
    "timm:efficientnet_b0": (64, 1280),
    "timm:mobilenetv3_small_050": (64, 1024),
    "timm:vit_tiny_patch16_224": (64, 192),
}
# the least pixels a side, and whether the network itself fails with one less
LEAST = {
    "torchvision:alexnet": (63, True),
    "torchvision:googlenet": (31, False),  # with less, the last stride has one pixel
    "timm:convnext_atto": (32, True),
    "torchvision:resnet18": (17, False),
    "timm:mobilenetv3_small_050": (17, False),
}
# of blocks in lists, in stages, as siblings, with stochastic depth
IN_BLOCKS = (
    "torchvision:efficientnet_b0",
    "torchvision:googlenet",
    "timm:convnext_atto",
    "timm:regnety_002",
    "timm:vit_tiny_patch16_224",
)
# whose blocks are called with more than images (their height and width, rotary embeddings, biases
# of positions) or give more; and what makes networks small
_TINY = {"depth": 4, "embed_dim": 48, "num_heads": 3}
CALLED_WITH_MORE = {
    "timm:beit_base_patch16_224": _TINY,
    "timm:eva02_tiny_patch14_224": {"patch_size": 16, **_TINY},
    "timm:vit_base_patch16_rope_mixed_224": _TINY,
    "timm:xcit_nano_12_p16_224": {**_TINY, "embed_dim": 96},
    "timm:mvitv2_tiny": {},
}
FIXED = ("torchvision:vit_b_32", "timm:vit_tiny_patch16_224", *CALLED_WITH_MORE)


def build(name, **options):
    torch.manual_seed(0)
    if name in FIXED:
        options = {"image_size": 64, **options}
    return named.backbone(named.Options(name=name, **options)).eval()


def pixels(size, count=2):
    """uint8 [count, 3, size, size] in the memory layout of the loader."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_gives_features_maps_at_every_depth_and_the_same_after_a_strict_reload(name):
    size, dim = NETWORKS[name]
    network, x = build(name), pixels(size)
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.01)
    other.load_state_dict(dict(network.state_dict()))  # as safetensors gives it: no metadata
    with torch.no_grad():
        features, stages = network(x), network.stages(x)
        again = other(x)

    assert network.dim == dim
    assert features.shape == (2, dim)
    assert torch.equal(again, features)
    *maps, (last, pooled) = stages.items()
    assert (last, len(maps) >= 4) == ("pool", True)
    assert torch.equal(pooled, features)
    sides = [value.shape[2:] for _, value in maps]
    assert all(value.ndim == 4 and value.shape[2] == value.shape[3] for _, value in maps)
    assert sides == sorted(sides, reverse=True)


def test_weights_of_torchvision_go_in_and_out_under_their_own_keys():
    theirs = torchvision.models.mobilenet_v3_small().eval()
    weights = theirs.state_dict()
    ours = build("torchvision:mobilenet_v3_small")
    ours.load_state_dict({key: weights[key] for key in ours.state_dict()})
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, features = theirs(x), ours(x)
        from_ours = theirs.classifier[3](features)

    assert weights.keys() - ours.state_dict().keys() == {"classifier.3.weight", "classifier.3.bias"}
    assert not ours.state_dict().keys() - weights.keys()
    assert torch.equal(from_ours, logits)


def test_weights_of_timm_go_in_and_out_under_their_own_keys():
    theirs = timm.create_model("convnext_atto").eval()
    assert isinstance(theirs, timm.models.ConvNeXt)
    bare = timm.create_model("convnext_atto", num_classes=0)
    ours = build("timm:convnext_atto")
    weights = theirs.state_dict()
    ours.load_state_dict({key: weights[key] for key in ours.state_dict()})
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    assert list(ours.state_dict()) == list(bare.state_dict())
    with torch.no_grad():
        wanted = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        assert torch.equal(ours(x), wanted)


def test_keys_that_do_not_fit_are_refused_also_within_another_module():
    ours = build("timm:convnext_atto")
    whole = nn.Sequential(nn.Linear(2, 2), ours)
    weights = whole.state_dict()
    spare = {**weights, "1.stem.9.weight": torch.zeros(1)}
    lacking = {key: value for key, value in weights.items() if key != "1.stem.0.bias"}

    assert all(key.startswith(("0.", "1.stem", "1.stages", "1.head")) for key in weights)
    whole.load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*stem\.9\.weight"):
        whole.load_state_dict(spare)
    with pytest.raises(RuntimeError, match=r"Missing key.*stem\.0\.bias"):
        whole.load_state_dict(lacking)


def test_a_copy_keeps_its_own_weights_under_the_same_keys():
    ours = build("timm:convnext_atto")
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    weights = ours.state_dict()
    twin.load_state_dict(weights)

    assert list(twin.state_dict()) == list(weights)
    assert all(torch.equal(twin.state_dict()[key], weights[key]) for key in weights)
    assert any(weights[key].any() for key in weights)


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        # a convolution stands for the norm, activation and pooling behind it
        ("vgg11_bn", {"features.0": "features.3", "features.8": "features.10"}),
        ("squeezenet1_1", {"features.0": "features.2", "features.4": "features.5"}),
        ("regnet_y_400mf", {"stem": "stem", "trunk_output.block3": "trunk_output.block3"}),
        ("mobilenet_v3_small", {"features.0": "features.0", "features.12": "features.12"}),
        ("resnet18", {"conv1": "maxpool", "layer1": "layer1", "layer4": "layer4"}),
    ],
)
def test_stages_are_the_maps_that_torchvisions_own_feature_extractor_gives(name, nodes):
    network, x = build(f"torchvision:{name}"), pixels(64)
    mean, std = (torch.tensor(part).reshape(1, 3, 1, 1) for part in network.normalization)
    extractor = create_feature_extractor(network.network, return_nodes=[*nodes.values()])
    with torch.no_grad():
        stages = network.stages(x)
        wanted = extractor((x / 255 - mean) / std)

    for stage, node in nodes.items():
        torch.testing.assert_close(stages[stage], wanted[node], rtol=1e-3, atol=1e-5)


def test_maps_of_a_vision_transformer_are_its_patch_tokens_row_by_row():
    network, x = build("torchvision:vit_b_32"), pixels(64)
    inner, tokens = network.network, []
    layer = inner.get_submodule("encoder.layers.encoder_layer_0")
    handle = layer.register_forward_hook(lambda _, __, output: tokens.append(output))
    with torch.no_grad():
        stages = network.stages(x)
    handle.remove()

    first = stages["encoder.layers.encoder_layer_0"]
    assert first.shape == (2, 768, 2, 2)
    assert torch.equal(first[:, :, 1, 0], tokens[0][:, 3])  # class token, then 4 patches


def test_maps_of_a_swin_transformer_have_channels_first_for_any_shape_of_image():
    network = build("torchvision:swin_t")
    with torch.no_grad():
        stages = network.stages(pixels(64)[:, :, :32])

    shapes = [tuple(value.shape[1:]) for value in stages.values()]
    assert shapes[0] == (96, 8, 16)
    assert shapes[-2] == (768, 1, 2)


def test_bytes_are_normalised_in_float32_with_the_statistics_that_the_weights_were_made_with():
    convnext, vit = build("torchvision:convnext_tiny"), build("timm:vit_tiny_patch16_224")
    x, seen = pixels(64), []
    first = next(each for each in vit.modules() if isinstance(each, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        vit(x)

    assert convnext.normalization == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert vit.normalization == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], (x / 255 - 0.5) / 0.5)


def test_gradient_reaches_every_parameter():
    network = build("timm:convnext_atto").train()
    network(pixels(64, 4)).square().sum().backward()

    assert all(each.grad is not None and each.grad.any() for each in network.parameters())


def test_a_network_of_one_size_says_so_before_anything_runs():
    network = build("timm:vit_tiny_patch16_224")

    with pytest.raises(ValueError, match="64 x 32 pixels for a network that takes 64 x 64 only: g"):
        network(pixels(64)[:, :, :, :32])


@pytest.mark.parametrize("name", LEAST)
def test_images_that_are_too_small_are_one_line_with_the_least_size(name):
    least, fails = LEAST[name]
    network = build(name)
    small = pixels(least)[:, :, : least - 1]
    with torch.no_grad():
        features = network(pixels(least))
        with pytest.raises(ValueError, match=rf"too small .* need {least} pixels a side") as error:
            network(small)
        with pytest.raises(ValueError, match=rf"need {least} pixels a side"):
            network.stages(small)

    assert features.shape == (2, network.dim)
    assert "\n" not in str(error.value)
    if fails:
        with pytest.raises(RuntimeError, match="size"):
            network.network(small.float())


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:regnetx_002"])
def test_a_network_computes_nothing_but_what_it_is_asked_for(name):
    with FlopCounterMode(display=False) as built:
        network = build(name)
    x = pixels(32)
    with FlopCounterMode(display=False) as bare:
        network.network(x.float())
    with FlopCounterMode(display=False) as first:
        network(x)

    assert built.get_total_flops() == 0
    assert first.get_total_flops() == bare.get_total_flops() > 0


def test_a_failure_for_another_reason_is_not_called_too_small():
    network = build("torchvision:resnet18").train()  # batch norm over one value
    x = pixels(32, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        network(x)


def test_a_network_in_float64_finds_its_least_size_in_training_under_autocast():
    for network in (build("torchvision:resnet18").double(), build("torchvision:resnet18")):
        x = torch.zeros(4, 3, 16, 40, dtype=next(network.parameters()).dtype)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32),
            pytest.raises(ValueError, match=r"16 x 40 pixels are too small .* need 17 pixels a si"),
        ):
            network.train()(x)


def test_finding_the_least_size_leaves_no_trace():
    torch.manual_seed(0)
    network = named.backbone(named.Options(name="torchvision:resnet18"))
    random = torch.get_rng_state()
    twin = copy.deepcopy(network).requires_grad_(False)
    assert trial_pass.least_side(network.network, 224) == 17
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(twin.state_dict()[k], v) for k, v in network.state_dict().items())
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    modules = list(network.modules())

    assert all(each.training for each in modules)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in modules)
    wanted = theirs.state_dict()
    assert all(torch.equal(wanted[key], value) for key, value in network.state_dict().items())


def trained_once(name, *, recompute):
    """The network after a forward and a backward pass in float64, its features, the gradients of
    images and parameters, what was kept between the passes in bytes, and the next random number."""
    network = build(name, activation_checkpointing=recompute).train().double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64, requires_grad=True)
    own = {each.data_ptr() for each in network.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = network(x)
    after = torch.rand(1)
    gradients = torch.autograd.grad(features.square().sum(), [x, *network.parameters()])
    return network, features, gradients, sum(kept.values()), after


def assert_the_same_in_less_memory(name):
    plain, features, gradients, kept, random = trained_once(name, recompute=False)
    again, features_too, gradients_too, kept_too, random_too = trained_once(name, recompute=True)

    assert torch.equal(features, features_too)
    assert torch.equal(random, random_too)
    for one, two in zip(gradients, gradients_too, strict=True):
        assert torch.equal(one, two)
    state, state_too = plain.state_dict(), again.state_dict()
    assert list(state) == list(state_too)
    assert all(torch.equal(state[key], state_too[key]) for key in state)  # running statistics too
    assert kept_too < 0.6 * kept  # googlenet 0.52: its stem is no block


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_blocks_computed_again_keep_less_and_give_the_very_same_gradients(name):
    assert_the_same_in_less_memory(name)


@pytest.mark.parametrize("name", CALLED_WITH_MORE)
def test_blocks_that_are_called_with_more_than_images_can_be_computed_again(name, monkeypatch):
    small = functools.partial(timm.create_model, **CALLED_WITH_MORE[name])
    monkeypatch.setattr(timm, "create_model", small)
    assert_the_same_in_less_memory(name)
    plain, again = build(name), build(name, activation_checkpointing=True)
    x = pixels(64)
    with torch.no_grad():
        wanted, found = plain.stages(x), again.stages(x)

    assert list(wanted) == list(found)
    assert all(torch.equal(wanted[stage], found[stage]) for stage in wanted)


@pytest.mark.parametrize("name", ["torchvision:efficientnet_b0", "timm:regnety_002"])
def test_blocks_computed_again_keep_the_keys_and_the_stages_of_the_network(name):
    plain, again = build(name), build(name, activation_checkpointing=True)
    twin = copy.deepcopy(again)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    whole = nn.Sequential(twin)
    whole.load_state_dict({f"0.{key}": value for key, value in plain.state_dict().items()})
    x = pixels(64)
    with torch.no_grad():
        wanted, found, of_twin = plain.stages(x), again.stages(x), twin.stages(x)

    assert list(wanted) == list(found) == list(of_twin)
    assert all(torch.equal(wanted[stage], found[stage]) for stage in wanted)
    assert all(torch.equal(wanted[stage], of_twin[stage]) for stage in wanted)


def test_a_network_without_blocks_cannot_compute_them_again():
    with pytest.raises(
        ValueError, match=r"activation_checkpointing \(true\): alexnet has 0 blocks"
    ):
        build("torchvision:alexnet", activation_checkpointing=True)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("timm:convnext_atto", True),
        ("timm:vit_tiny_patch16_224", False),
    ],
)
def test_a_compiled_network_gives_the_same_features_and_gradients(name, recompute):
    results = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        network = build(name, activation_checkpointing=recompute)  # eval mode: no dropout
        network.train(recompute)
        if is_compiled:
            network.compile(backend="aot_eager")
        features = network(pixels(64))
        features.square().mean().backward()
        results.append([features, *(each.grad for each in network.parameters())])

    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:mobilenetv3_small_050"])
def test_convolutions_stay_channels_last_under_autocast(name):
    network = build(name).to(memory_format=torch.channels_last)
    seen = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        network(pixels(64))

    assert len(seen) > 20
    assert all(each.dtype == torch.bfloat16 for each in seen)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in seen)


@pytest.mark.parametrize(
    ("name", "size"), [("crossvit_tiny_240", 64), ("levit_128s", 100), ("botnet26t_256", 100)]
)
def test_a_size_with_which_the_network_is_made_but_does_not_run_is_refused_at_once(name, size):
    with pytest.raises(ValueError, match=rf"^image_size \({size}\): {name} does not take imag"):
        build(f"timm:{name}", image_size=size)


def test_a_size_that_the_network_does_not_take_is_not_called_too_small_and_others_go_on():
    network = build("timm:hrnet_w18_small")
    with torch.no_grad():
        for side in (48, 250):
            near = {48: "32, 64, 224", 250: "224, 256"}[side]
            with pytest.raises(
                ValueError,
                match=rf"^hrnet_w18_small does not take images of {side} x {side} pixels; it takes "
                rf"for example {near} pixels a side$",
            ):
                network(pixels(side, 1))
        features = network(pixels(32, 1))

    assert features.shape == (1, network.dim)
    assert network.pixels.least == 1


class TakesMultiples(nn.Module):
    """A network of images of `step`, 2 x `step`, ... pixels a side, of `least` or more."""

    def __init__(self, step: int, least: int = 1):
        super().__init__()
        self.layer, self.step, self.least = nn.Linear(1, 1), step, least

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] >= self.least
        return x.unflatten(2, (-1, self.step))


@pytest.mark.parametrize(
    ("step", "least", "usual", "found"),
    [(1, 1, 224, 1), (1, 37, 224, 37), (1, 90, 224, 90), (42, 1, 504, None), (32, 1, 224, None)],
)
def test_there_is_a_least_size_only_where_all_below_are_too_small_and_none_above(
    step, least, usual, found
):
    assert trial_pass.least_side(TakesMultiples(step, least), usual) == found


def test_sizes_nearby_are_those_that_the_network_takes():
    sides = {
        side: trial_pass.sides_near(TakesMultiples(64), side) for side in (20, 64, 100, 128, 140)
    }

    assert sides == {20: [], 64: [], 100: [128], 128: [], 140: [128]}


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_a_size_for_a_network_of_any_size_is_refused(name):
    with pytest.raises(ValueError, match=r"image_size \(64\): resnet18 has no option for it"):
        build(name, image_size=64)


def test_a_size_that_does_not_suit_the_network_is_refused():
    with pytest.raises(ValueError, match=r"image_size \(50\): vit_b_32: .*divisible by patch size"):
        build("torchvision:vit_b_32", image_size=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet50"}, r"'resnet50'\) must be torchvision:NAME or timm:NAME"),
        ({"name": "timm:"}, r"must be torchvision:NAME or timm:NAME"),
        (
            {"name": "torchvision:convnext_tinny"},
            r"of torchvision; did you mean 'torchvision:convnext_tiny'",
        ),
        ({"name": "timm:vit_tiny_patch16_225"}, r"did you mean .*'timm:vit_tiny_patch16_224'"),
        ({"name": "torchvision:qqqq"}, r"of torchvision; it has \d+, among them alexnet"),
        ({"name": "timm:resnet18.a9"}, r"no weights 'a9' for resnet18; known: .*a1_in1k"),
        ({"name": "torchvision:resnet50.V9"}, r"known: IMAGENET1K_V1, IMAGENET1K_V2"),
        ({"name": "timm:resnet10", "pretrained": False}, r"no network of timm; did you mean"),
        ({"image_size": 0}, r"image_size \(0\) must be at least 1"),
    ],
)
def test_what_no_library_offers_is_refused_with_what_is_near(options, message):
    with pytest.raises(ValueError, match=message):
        named.Options(**options)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)

    with pytest.raises(ValueError, match=r"needs timm: pip install 'fastssl\[timm\]'"):
        named.Options(name="timm:convnext_atto")


def test_torchvisions_weights_without_network_are_one_line_with_the_cache_and_the_file(
    monkeypatch, tmp_path
):
    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="Name or service not known") as error:
        build("torchvision:resnet18", pretrained=True)

    said = str(error.value)
    assert str(tmp_path / "hub" / "checkpoints") in said
    assert "put https://download.pytorch.org/models/resnet18-f37072fd.pth there" in said
    assert "\n" not in said


def test_timms_weights_without_network_are_one_line_with_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"pretrained \(true\): the weights of resnet18") as error:
        build("timm:resnet18", pretrained=True)

    assert str(tmp_path) in str(error.value)
    assert "HF_HUB_OFFLINE=1" in str(error.value)
    assert "\n" not in str(error.value)


def test_published_weights_from_the_cache_are_the_ones_that_are_used(monkeypatch, tmp_path):
    theirs = torchvision.models.squeezenet1_1()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(theirs.state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    ours = build("torchvision:squeezenet1_1.IMAGENET1K_V1", pretrained=True)

    assert all(
        torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items()
    )


class Trap:
    """An object that runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("before", [None, "0"])
def test_code_in_a_file_of_torchvision_s_cache_is_not_run(monkeypatch, tmp_path, before):
    folder, sprung = tmp_path / "hub" / "checkpoints", tmp_path / "sprung"
    folder.mkdir(parents=True)
    torch.save({"features.0.weight": Trap(sprung)}, folder / "squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", before)
    with pytest.raises(ValueError, match="holds more than tensors, and no code in it was run"):
        build("torchvision:squeezenet1_1.IMAGENET1K_V1", pretrained=True)

    assert not sprung.exists()
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before
    torch.load(folder / "squeezenet1_1-b8a52dc0.pth", weights_only=False)
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04" + bytes(100)])
def test_a_damaged_file_of_torchvision_s_cache_is_one_line(monkeypatch, tmp_path, content):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "squeezenet1_1-b8a52dc0.pth").write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"the file of squeezenet1_1\.\S+ in \S+ is damaged"
    ) as error:
        build("torchvision:squeezenet1_1.IMAGENET1K_V1", pretrained=True)

    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("weights_only=True blocked loading\nthis checkpoint"),
        pickle.UnpicklingError("no weights"),
        EOFError(),
        SafetensorError("header too large"),
    ],
)
def test_a_damaged_file_of_timm_s_is_one_line_and_none_is_read_as_code(monkeypatch, error):
    seen = []

    def create(name: str, **_: object) -> nn.Module:
        seen.append(os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD"))
        raise error

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    with pytest.raises(ValueError, match=r"the file of resnet18\.\S+ in \S+ is damaged") as told:
        build("timm:resnet18.a1_in1k", pretrained=True)
    with pytest.raises(type(error)):  # of a network without weights it is no file's fault
        build("timm:resnet18")

    assert seen == ["1", "1"]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert "\n" not in str(told.value)
