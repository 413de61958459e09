import math

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from fastssl.objectives import supervised


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.dim = 6
        self.layer = nn.Linear(12, 6)

    def forward(self, x):
        return torch.tanh(self.layer(x.flatten(1).to(self.layer.weight.dtype)))


LABELS = torch.tensor([2, 0, -1, 1, 2, 0])  # the third file can't be read


def build(labels=LABELS, **options):
    torch.manual_seed(0)
    options = supervised.Options(**options)
    return supervised.Objective(Tiny(), options, images=6, classes=0, labels=labels, seed=0)


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(4, 3, 2, 2, generator=generator, dtype=torch.float64).to(dtype)
    return {"image": image, "index": torch.tensor([4, 3, 1, 0])}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_with_the_folder_s_class(smoothing):
    objective = build(label_smoothing=smoothing).double()
    inputs = batch(torch.float64)
    loss, metrics = objective(**inputs)
    scores = objective.head(objective.backbone(inputs["image"]))
    target = (1 - smoothing) * one_hot(torch.tensor([2, 1, 0, 2]), 3) + smoothing / 3
    right = scores.argmax(1) == torch.tensor([2, 1, 0, 2])

    torch.testing.assert_close(loss, -(target * scores.softmax(1).log()).sum(1).mean())
    assert metrics["accuracy"].item() == pytest.approx(right.double().mean().item())
    assert metrics["chance"].item() == pytest.approx(1 / 3)


def test_equal_scores_give_the_log_of_the_classes():
    objective = build()
    nn.init.zeros_(objective.head.weight)
    loss, _ = objective(**batch())

    assert loss.item() == pytest.approx(math.log(3))


def test_gradient_reaches_every_parameter():
    objective = build()
    objective(**batch())[0].backward()

    assert all(each.grad is not None and each.grad.any() for each in objective.parameters())


def test_accuracy_is_one_when_every_class_is_known():
    objective = build()
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        objective(**batch())[0].backward()
        optimizer.step()
        objective.finish_step()

    assert objective(**batch())[1]["accuracy"].item() == 1


def test_head_begins_small_and_labels_are_no_part_of_a_checkpoint():
    objective = build(torch.arange(1000))

    assert objective.head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not objective.head.bias.any()
    assert not any("labels" in name for name in objective.state_dict())


def test_bf16_autocast_scores_in_float32():
    objective = build()
    whole, _ = objective(**batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = objective(**batch())

    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(whole.item(), rel=0.01)


@pytest.mark.parametrize(
    ("labels", "found"), [(None, 0), (torch.zeros(6, dtype=torch.int64), 1)], ids=["none", "one"]
)
def test_listing_without_classes_is_refused_with_the_remedy(labels, found):
    message = rf"needs at least 2 classes, and the listing has {found}: .* a folder for each class"
    with pytest.raises(ValueError, match=message):
        build(labels)


def test_smoothing_out_of_range_is_refused_by_name():
    with pytest.raises(ValueError, match=r"label_smoothing \(1.0\) must be at least 0 and below 1"):
        supervised.Options(label_smoothing=1.0)
