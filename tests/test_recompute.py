import copy

import pytest
import torch
from torch import nn

from fastssl import recompute


def layers(dropout=0.0, momentum: float | None = 0.1):
    """Two blocks; the rectifiers work in place, as torchvision's do."""
    torch.manual_seed(0)
    blocks = []
    for inputs in (3, 8):
        blocks.append(
            nn.Sequential(
                nn.Conv2d(inputs, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8, momentum=momentum),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
            )
        )
    return nn.Sequential(*blocks).double()


class Checkpointed(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        for block in self.blocks:
            x = recompute.checkpointed(block, x)
        return x


def images(seed=0):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


def gradients(network, *batches):
    """Of the parameters and the images, when the batches go through before one backward pass."""
    batches = [each.requires_grad_() for each in batches]
    torch.manual_seed(1)
    sum(network(each).square().sum() for each in batches).backward()
    return [each.grad for each in (*network.parameters(), *batches)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"momentum": None}])
def test_gradients_and_running_statistics_are_those_of_plain_layers_bit_for_bit(options):
    plain = layers(**options)
    kept = Checkpointed(copy.deepcopy(plain))
    expected, found = gradients(plain, images(0), images(1)), gradients(kept, images(0), images(1))

    assert same(found, expected)
    assert same(kept.buffers(), plain.buffers())
    assert plain.state_dict()["0.1.num_batches_tracked"] == 2


def test_random_numbers_go_on_as_after_plain_layers():
    plain = layers(dropout=0.5)
    gradients(plain, images())
    expected = torch.rand(3)
    gradients(Checkpointed(layers(dropout=0.5)), images())

    assert torch.equal(torch.rand(3), expected)


def test_frozen_batch_norm_stays_frozen_in_both_passes():
    plain = layers().train()
    gradients(plain, images(2))  # statistics that are not those of the start
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    plain.zero_grad()
    kept = Checkpointed(copy.deepcopy(plain))
    before = copy.deepcopy(list(plain.buffers()))

    assert same(gradients(kept, images()), gradients(plain, images()))
    assert same(kept.buffers(), before)


def test_the_same_layers_may_also_be_called_plainly_in_the_same_step():
    both, plain = layers(), layers()
    kept = Checkpointed(both)
    (kept(images(0)).square().sum() + both(images(1)).square().sum()).backward()
    gradients(plain, images(0), images(1))

    assert same(
        [each.grad for each in both.parameters()], [each.grad for each in plain.parameters()]
    )


def test_autocast_is_in_the_second_pass_what_it_was_in_the_first():
    found = []
    for wrap in (Checkpointed, nn.Sequential):
        network = wrap(layers().float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = network(images().float())
        y.float().square().sum().backward()  # outside
        found.append([each.grad for each in network.parameters()])

    assert same(*found)


def test_under_a_compiler_gradients_and_running_statistics_are_the_same():
    torch.compiler.reset()
    plain = layers()
    kept = Checkpointed(copy.deepcopy(plain))
    # all of Inductor but its kernels
    kept.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    expected, found = gradients(plain, images(0), images(1)), gradients(kept, images(0), images(1))
    torch.compiler.reset()

    for one, other in zip([*found, *kept.buffers()], [*expected, *plain.buffers()], strict=True):
        torch.testing.assert_close(one, other)


def test_only_the_inputs_of_blocks_are_kept():
    kept = []
    network = Checkpointed(layers())

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(images())
    few = list(kept)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.blocks(images())

    assert sum(few) <= images().numel() + 4 * 8 * 8 * 8
    assert sum(kept) - sum(few) > 4 * sum(few)


def test_running_statistics_come_back_also_after_an_error():
    network = layers()
    before = [*network.buffers()]

    with pytest.raises(RuntimeError, match="channels"), recompute.statistics_kept(network):
        network(torch.cat([images(), network[0](images())], dim=1))

    assert all(one is other for one, other in zip(network.buffers(), before, strict=True))
    assert float(before[0].abs().sum()) == 0
