import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from benchmarks.activations import KINDS, activations, of_revnet
from fastssl.backbones import revnet

SMALL = {"widening": 1, "units": (2, 2, 3, 1), "stem": "small"}


def build(**options):
    torch.manual_seed(0)
    return revnet.backbone(revnet.Options(**{**SMALL, **options}))


def both(**options):
    """Reversible and with plain back-propagation, in float64, weights alike."""
    return build(**options).double(), build(**options, reversible=False).double()


def images(seed=0, side=16, count=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator, dtype=torch.double)


def gradients(network, *batches):
    """Of the parameters and the images, when the batches go through before one backward pass."""
    batches = [each.clone().requires_grad_() for each in batches]
    torch.manual_seed(1)
    sum((network(each) - 0.1).pow(2).sum() for each in batches).backward()
    return [each.grad for each in (*network.parameters(), *batches)]


def assert_same(one, other, rtol=1e-8):
    """Each tensor as near as `rtol` of its own greatest entry."""
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.abs().max()) + 1e-12)


# -- the network --------------------------------------------------------------------------------


def slow_and_obvious(network, x):
    """K19's wiring, on joined halves: models/resnet.py of google/revisiting-self-supervised."""
    x = network.maxpool(network.root(x))
    for number, stage in enumerate(
        (network.layer1, network.layer2, network.layer3, network.layer4)
    ):
        batch, channels, height, width = x.shape
        if number > 0:
            if not (number == 3 and network.options.patch_mode):
                pooled = torch.zeros(batch, channels, -(-height // 2), -(-width // 2)).to(x)
                for row in range(pooled.shape[2]):
                    for column in range(pooled.shape[3]):
                        window = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                        pooled[:, :, row, column] = window.mean((2, 3))
                x = pooled
            zeros = torch.zeros_like(x[:, : channels // 2])
            x = torch.cat([zeros, x, zeros], dim=1)
        for unit in stage:
            x1, x2 = x.split(x.shape[1] // 2, dim=1)
            y = x2
            for norm, convolution in (
                (unit.norm1, unit.conv1),
                (unit.norm2, unit.conv2),
                (unit.norm3, unit.conv3),
            ):
                y = convolution(F.relu(norm(y)))
            x = torch.cat([x2, x1 + y], dim=1)
    x = network.norm(x)
    return (F.relu(x) if network.options.last_relu else x).mean((2, 3))


@pytest.mark.parametrize(
    ("side", "options"),
    [
        (23, {}),
        (23, {"last_relu": False}),
        (37, {"stem": "standard"}),
        (23, {"stem": "standard", "patch_mode": True}),
    ],
)
def test_network_is_wired_as_the_published_code_is(side, options):
    network = build(**options).double()
    x = images(side=side)

    torch.testing.assert_close(network(x), slow_and_obvious(network, x))


@pytest.mark.parametrize(
    ("options", "sides"),
    [
        ({"stem": "standard"}, [16, 16, 8, 4, 2]),
        ({"stem": "standard", "patch_mode": True}, [32, 32, 16, 8, 8]),
        ({"stem": "small"}, [64, 64, 32, 16, 8]),
    ],
)
def test_stages_come_in_order_with_their_strides(options, sides):
    network = build(**options, representation=7)
    with torch.no_grad():
        stages = network.stages(images(side=64, count=1).float())
    channels = [64, 64, 128, 256, 512]

    assert list(stages) == [
        *("stem", "layer1", "layer2", "layer3", "layer4", "pool"),
        "representation",
    ]
    for stage, width, side in zip(stages.values(), channels, sides, strict=False):
        assert stage.shape == (1, width, side, side)
    assert stages["pool"].shape == (1, 512)
    assert stages["representation"].shape == (1, network.dim) == (1, 7)
    assert "representation.weight" in network.state_dict()


def test_a_network_without_the_last_relu_differs_by_it_only():
    x = images()
    with_it, without = build(), build(last_relu=False)
    with torch.no_grad():
        stages = [network.double().stages(x) for network in (with_it, without)]

    for name in ("stem", "layer1", "layer2", "layer3"):
        assert torch.equal(stages[0][name], stages[1][name])
    assert stages[1]["layer4"].min() < 0
    assert torch.equal(stages[0]["layer4"], stages[1]["layer4"].relu())


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"stem": "standard"}, 17),
        ({"stem": "small"}, 5),
        ({"stem": "standard", "patch_mode": True}, 5),
    ],
)
def test_least_size_is_the_smallest_at_which_every_stride_has_two_pixels(options, least):
    network = build(**options).eval()
    with torch.no_grad():
        stages = network.stages(torch.zeros(1, 3, least, least))
    sides = [stage.shape[2] for stage in stages.values() if stage.ndim == 4]

    assert sides[-1] == 1
    assert len({*sides[1:]}) == (3 if options.get("patch_mode") else 4)
    with pytest.raises(ValueError, match=rf"{least - 1} x 40 pixels are too small .* {least} "):
        network(torch.zeros(1, 3, least - 1, 40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widening": 0}, r"widening \(0\) must be at least 1; K19's are 4, 8, 12 and 16"),
        ({"units": (3, 4, 0, 3)}, r"units \(\[3, 4, 0, 3\]\) must be at least 1"),
        ({"patch_mode": True}, r"patch_mode \(true\) .* 'small' .* give one of the two"),
        ({"representation": 0}, r"representation \(0\) must be at least 1, or null"),
    ],
)
def test_option_that_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        revnet.Options(**{**SMALL, **options})


# -- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"last_relu": False},
        {"stem": "standard", "patch_mode": True},
        {"representation": 5},
        {"units": (3, 4, 6, 3)},
    ],
)
def test_gradients_of_all_weights_and_of_the_images_are_those_of_plain_back_propagation(options):
    reversible, plain = both(**options)

    assert_same(gradients(reversible, images()), gradients(plain, images()))


def test_running_statistics_move_once_a_step():
    reversible, plain = both()
    for network in (reversible, plain):
        gradients(network, images(0))
        gradients(network, images(1))

    assert reversible.state_dict()["layer1.0.norm1.num_batches_tracked"] == 2
    for one, other in zip(reversible.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


def test_two_batches_may_go_through_before_a_backward_pass():
    reversible, plain = both()
    found, expected = (gradients(each, images(0), images(1)) for each in (reversible, plain))

    assert_same(found, expected)


def test_gradients_of_several_steps_add_up():
    reversible, plain = both()
    for network in (reversible, plain):
        gradients(network, images(0))
    found, expected = gradients(reversible, images(1)), gradients(plain, images(1))

    assert_same(found, expected)


def test_frozen_batch_norm_stays_frozen():
    reversible, plain = both()
    for network in (reversible, plain):
        gradients(network, images(2))  # statistics that are not those of the start
        network.eval()
        network.zero_grad()
    before = copy.deepcopy(list(reversible.buffers()))

    assert_same(gradients(reversible, images()), gradients(plain, images()))
    assert all(torch.equal(*pair) for pair in zip(reversible.buffers(), before, strict=True))


def test_frozen_weights_have_no_gradient_and_those_before_and_behind_have_theirs():
    reversible, plain = both()
    for network in (reversible, plain):
        network.layer2.requires_grad_(False)
        network.layer3[1].conv2.requires_grad_(False)
        gradients(network, images())

    assert reversible.get_parameter("layer3.1.conv2.weight").grad is None
    for one, other in zip(reversible.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            assert_same([one.grad], [other.grad])


@pytest.mark.parametrize("how", ["weight", "mode", "functional", "statistics"])
def test_units_that_are_others_in_the_backward_pass_are_refused_not_wrong(how):
    network, x = build().double(), images()
    if how == "statistics":  # that batch norm reads in eval mode only
        network.eval()
    if how == "functional":
        others = {key: value + 0.1 for key, value in network.named_parameters()}
        loss = torch.func.functional_call(network, others, (x,)).sum()
    else:
        loss = network(x).sum()
    if how == "weight":
        with torch.no_grad():
            dict(network.named_parameters())["layer1.0.conv1.weight"].add_(0.1)
    if how == "statistics":
        dict(network.named_buffers())["layer1.0.norm1.running_mean"].add_(0.1)
    if how == "mode":
        network.eval()

    with pytest.raises(RuntimeError, match=r"units have other parameters|modified by an inplace"):
        loss.backward()


def test_dropout_in_a_unit_drops_the_same_when_computed_again_and_random_numbers_go_on():
    found = []
    for network in both():
        for unit in (*network.layer1, *network.layer3):
            unit.add_module("conv3", nn.Sequential(unit.get_submodule("conv3"), nn.Dropout(0.5)))
        found.append((gradients(network, images()), torch.rand(3)))

    assert_same(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_without_gradients_nothing_is_kept_and_features_are_the_same():
    reversible, plain = both()
    with torch.no_grad():
        features = reversible(images())

    assert features.grad_fn is None
    assert torch.equal(features, plain(images()))


def test_a_gradient_of_a_gradient_is_refused_not_wrong():
    network = build().double()
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_under_autocast_halves_stay_float32_and_gradients_are_those_of_plain_back_propagation():
    x, found = images(count=8).float(), []
    for reversible in (True, False):
        network = build(reversible=reversible)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stages = network.stages(x)
            features = network(x)
        (features.float() - 0.1).pow(2).sum().backward()  # outside
        found.append([each.grad for each in network.parameters()])

        assert {stages[f"layer{number}"].dtype for number in (1, 2, 3)} == {torch.float32}
    assert_same(*found, rtol=1e-2)


@pytest.mark.parametrize("reversible", [True, False])
def test_channels_last_memory_is_kept_by_every_convolution_in_both_passes(reversible):
    network = build(reversible=reversible).to(memory_format=torch.channels_last)
    seen = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    x = images().float().to(memory_format=torch.channels_last)
    network(x).sum().backward()

    units = sum(SMALL["units"])
    assert len(seen) == 2 * (2 + 6 * units * (2 if reversible else 1))
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in seen)


# The compiler looks at .grad of what goes into a part that it leaves out, and hides the warning
# from all but those who make errors of warnings (torch 2.15, _dynamo/variables/builder.py).
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("reversible", [True, False])
def test_a_compiled_backbone_has_the_same_gradients(reversible):
    torch.compiler.reset()
    options = {"units": (1, 2, 1, 1), "reversible": reversible}
    network, compiled = build(**options).double(), build(**options).double()
    # one graph with plain back-propagation; reversible stages are left out of it
    compiled.compile(backend="aot_eager", fullgraph=not reversible)
    expected, found = gradients(network, images(0)), gradients(compiled, images(0))
    torch.compiler.reset()

    assert_same(found, expected)
    for one, other in zip(compiled.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(one, other)


# -- two processes ------------------------------------------------------------------------------


def accumulated(network, model, rank):
    """Gradients of two batches in two parts each, of which the last synchronises."""
    with model.no_sync():
        model(images(rank)).pow(2).sum().backward()
    model(images(2 + rank)).pow(2).sum().backward()
    return [each.grad for each in network.parameters()]


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    for name in ("RANK", "LOCAL_RANK"):  # Accelerate looks there, as a launcher sets them
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = "2"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    network = build().double()
    model = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    found = accumulated(network, model, rank)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    network = build()
    model = accelerator.prepare(network)
    features = model(images(rank).float())
    accelerator.backward(features.pow(2).sum())
    mixed = [each.grad for each in network.parameters()]
    kinds = str(features.dtype), type(model).__name__
    torch.save((found, mixed, kinds), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_mean_of_both_gradients_also_accumulated_and_in_bfloat16(tmp_path):
    start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    parts, mixed = [], []
    for rank in (0, 1):
        network = build(reversible=False).double()
        for seed in (rank, 2 + rank):
            network(images(seed)).pow(2).sum().backward()
        parts.append([each.grad for each in network.parameters()])
        network = build()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = network(images(rank).float())
        features.float().pow(2).sum().backward()
        mixed.append([each.grad for each in network.parameters()])

    assert first[2] == second[2] == ("torch.float32", "DistributedDataParallel")
    for found, expected, rtol in ((0, parts, 1e-8), (1, mixed, 1e-4)):
        assert_same(first[found], second[found], rtol=0)
        assert_same(first[found], [(a + b) / 2 for a, b in zip(*expected, strict=True)], rtol)


# -- memory -------------------------------------------------------------------------------------


def test_memory_stays_with_depth_where_plain_back_propagation_keeps_every_unit():
    x, grown = images(count=4, side=128).float(), {}
    for kind in KINDS:
        shallow, deep = of_revnet(kind, 1, x), of_revnet(kind, 2, x)
        grown[kind] = deep.kept - shallow.kept, deep.peak - shallow.peak
    # bytes of the halves that the units more put out: 32 channels at 32 x 32 in the first stage
    maps = [
        units * 32 * 2**stage * (32 // 2**stage) ** 2 for stage, units in enumerate((3, 4, 6, 3))
    ]
    halves = 4 * 4 * sum(maps)

    assert grown["reversible"][0] == 0
    assert grown["reversible"][1] < 0.25 * halves  # gradients of a stage's weights, until it ends
    assert grown["checkpointed"][0] == pytest.approx(halves, rel=0.05)
    assert min(grown["plain"]) > 2.5 * halves


def test_what_is_counted_as_kept_is_what_autograd_saves():
    network, x = build(reversible=False), images().float()
    own = {each.untyped_storage()._cdata for each in (x, *network.parameters(), *network.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = network(x)
    expected = sum(size for key, size in saved.items() if key not in own)

    assert activations(network, x).kept == expected + features.numel() * 4
