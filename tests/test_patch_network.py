"""Patches to classes: standardised as defined, joined in the order asked for."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastssl.classification import classification
from fastssl.patch_network import Head, features_of, standardize


def patches(count: int = 6, side: int = 10) -> Tensor:
    """[N, 3, p, p], uint8, in the memory order in which the loader hands them on."""
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 120, (count, 1, 1, 3)), rng.integers(130, 256, (count, 1, 1, 3))
    values = rng.integers(low, high, (count, side, side, 3))
    return torch.from_numpy(values.astype(np.uint8)).movedim(-1, -3)


@pytest.mark.parametrize(("how", "axes"), [("joint", (0, 1, 2)), ("channel", (1, 2))])
def test_a_patch_is_standardised_by_its_own_mean_and_deviation(how, axes):
    given = patches()
    found = standardize(given, how)

    for each, one in zip(given.numpy().astype(float), found, strict=True):
        mean, deviation = each.mean(axis=axes, keepdims=True), each.std(axis=axes, keepdims=True)
        np.testing.assert_allclose(one.numpy(), (each - mean) / deviation, atol=1e-5)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("how", "values"), [("joint", 3 * 8 * 8), ("channel", 8 * 8)])
def test_a_flat_patch_becomes_zero_and_noise_is_not_blown_up(how, values):
    flat = torch.full((2, 3, 64, 64), 77, dtype=torch.uint8)
    assert not standardize(flat, how).any()

    floor = values**-0.5  # of the deviation
    faint = torch.zeros((1, 3, 8, 8), dtype=torch.uint8)
    faint[0, :, 0, 0] = 1
    each = faint.double()
    over = (1, 2, 3) if how == "joint" else (2, 3)
    deviation = each.std(over, correction=0, keepdim=True).clamp(min=floor)
    expected = (each - each.mean(over, keepdim=True)) / deviation
    torch.testing.assert_close(standardize(faint, how).double(), expected, rtol=1e-5, atol=1e-6)


def test_global_leaves_the_bytes_to_the_backbone():
    given = patches()

    assert standardize(given, "global") is given


def test_standardising_leaves_what_was_given_as_it_is():
    given = patches()
    before = given.clone()
    standardize(given, "joint")

    assert torch.equal(given, before)


class Counting(nn.Module):
    """Means of each color, and how often it was called."""

    dim = 3
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.float().mean((2, 3))


def test_all_patches_of_a_batch_go_through_the_backbone_in_one_call():
    backbone = Counting()
    given = patches(6).unflatten(0, (2, 3))  # 2 images, 3 patches
    features = features_of(backbone, given, "global")

    assert backbone.calls == 1
    torch.testing.assert_close(features, given.float().mean((3, 4)))


def slow_head(head: Head, features: Tensor, order: Tensor) -> Tensor:
    """One image, one order and one patch at a time."""
    rows = []
    for image, orders in zip(features, order, strict=True):
        for one in orders:
            joined = [head.each(image[position][None])[0] for position in one.tolist()]
            rows.append(head.classify(torch.cat(joined)[None])[0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"embedding": 7, "hidden": 11},
        {"embedding": None, "hidden": 11},
        {"embedding": 7, "hidden": None, "dropout": 0.0},
        {"embedding": 7, "embedding_norm": True, "hidden": None, "dropout": 0.0},
    ],
    ids=["K19's code", "K19's paper", "linear", "VISSL"],
)
def test_a_head_joins_patches_in_the_order_asked_for(options):
    torch.manual_seed(0)
    head = Head(5, 9, 4, **options).double().eval()
    features = torch.randn(3, 9, 5, dtype=torch.float64)
    order = torch.stack([torch.stack([torch.randperm(9) for _ in range(2)]) for _ in range(3)])
    logits = head(features, order)

    assert logits.shape == (6, 4)
    torch.testing.assert_close(logits, slow_head(head, features, order))


def test_a_pair_may_name_any_of_the_patches_and_one_twice():
    head = Head(5, 2, 8, embedding=7, hidden=11).double().eval()
    features = torch.randn(1, 9, 5, dtype=torch.float64)
    order = torch.tensor([[[0, 4], [8, 4], [4, 4]]])

    torch.testing.assert_close(head(features, order), slow_head(head, features, order))


def test_the_paper_s_head_has_its_layers_and_first_weights():
    torch.manual_seed(0)
    head = Head(64, 9, 100, hidden=512)
    wide, norm, _, dropout, last = head.classify

    assert isinstance(wide, nn.Linear)
    assert (wide.in_features, wide.out_features) == (9 * 1000, 512)
    assert isinstance(last, nn.Linear)
    assert last.out_features == 100
    for layer, bias in ((wide, 0.1), (last, 0.0)):
        assert layer.weight.abs().max() <= 0.01  # two deviations
        # what is left of a normal distribution's deviation when cut off there: 0.8796
        assert layer.weight.std().item() == pytest.approx(0.005 * 0.8796, rel=0.02)
        assert (layer.bias == bias).all()
    assert isinstance(norm, nn.BatchNorm1d)
    assert (norm.momentum, norm.eps) == (0.003, 1e-5)
    assert isinstance(dropout, nn.Dropout)
    assert dropout.p == 0.5


def test_gradient_reaches_each_feature_as_often_as_it_is_joined():
    head = Head(4, 2, 1, embedding=None, hidden=None, dropout=0.0)
    (layer,) = head.classify
    assert isinstance(layer, nn.Linear)
    nn.init.ones_(layer.weight)
    features = torch.zeros(1, 9, 4, requires_grad=True)
    head(features, torch.tensor([[[i, 4] for i in range(9) if i != 4]])).sum().backward()
    assert features.grad is not None

    assert features.grad[0, :, 0].tolist() == [1, 1, 1, 1, 8, 1, 1, 1, 1]


def test_equal_logits_cost_the_logarithm_of_the_number_of_classes():
    loss, metrics = classification(torch.zeros(12, 50), torch.arange(12))

    assert loss.item() == pytest.approx(math.log(50))
    assert metrics["chance"].item() == pytest.approx(1 / 50)


def test_accuracy_is_the_share_of_highest_logits_that_are_right():
    logits = torch.eye(4, requires_grad=True)
    _, metrics = classification(logits, torch.tensor([0, 1, 2, 0]))

    assert metrics["accuracy"].item() == 0.75
    assert not metrics["accuracy"].requires_grad


def test_the_loss_is_in_float32_under_autocast():
    logits = torch.randn(6, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = classification(logits, torch.arange(6) % 5)

    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, nn.functional.cross_entropy(logits.float(), torch.arange(6) % 5)
    )
