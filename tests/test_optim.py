"""The optimizer's groups, the learning rate at every step, and what a run prints of them."""

import copy
import math
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from fastssl import optim
from fastssl.backbones import resnet

PIRL: dict[str, Any] = {"lr": 0.12, "final_lr": 1.2e-4}  # Misra & van der Maaten 2020, section 3


def rates(options: optim.Options, *, steps: int, steps_per_epoch: int = 10, batch: int = 1024):
    return [
        optim.learning_rate(
            options, step, steps=steps, steps_per_epoch=steps_per_epoch, batch=batch
        )
        for step in range(steps)
    ]


def test_cosine_starts_at_lr_and_ends_at_final_lr_exactly():
    found = rates(optim.Options(**PIRL), steps=801)

    assert found[0] == 0.12
    assert found[400] == pytest.approx((0.12 + 1.2e-4) / 2)
    assert found[800] == 1.2e-4
    assert all(a > b for a, b in pairwise(found))


def test_cosine_has_its_closed_form_at_every_step():
    found = rates(optim.Options(**PIRL), steps=101)
    wanted = [1.2e-4 + (0.12 - 1.2e-4) * (1 + math.cos(math.pi * s / 100)) / 2 for s in range(101)]

    assert found == pytest.approx(wanted)


def test_cosine_of_a_single_step_is_lr():
    assert rates(optim.Options(lr=0.12), steps=1) == [0.12]


def test_warm_up_climbs_by_step_and_the_cosine_takes_the_rest():
    options = optim.Options(lr=0.4, warmup_epochs=2.0, warmup_lr=0.1)
    found = rates(options, steps=121, steps_per_epoch=10)

    assert found[:3] == pytest.approx([0.1, 0.115, 0.13])
    assert found[20] == 0.4
    assert found[70] == pytest.approx(0.2)
    assert found[120] == 0.0


def test_warm_up_may_be_a_part_of_an_epoch():
    found = rates(optim.Options(lr=0.4, warmup_epochs=0.5, schedule="constant"), steps=8)

    assert found == pytest.approx([0.0, 0.08, 0.16, 0.24, 0.32, 0.4, 0.4, 0.4])


def test_multistep_drops_at_the_first_step_of_each_milestone():
    options = optim.Options(lr=0.1, schedule="multistep", milestones=(1, 2.5), gamma=0.2)
    found = rates(options, steps=30, steps_per_epoch=10)

    assert found == pytest.approx([0.1] * 10 + [0.02] * 15 + [0.004] * 5)


def test_constant_stays_at_lr():
    assert rates(optim.Options(lr=0.03, schedule="constant"), steps=5) == [0.03] * 5


def test_lr_is_taken_as_written_without_lr_batch():
    assert optim.base_lr(optim.Options(lr=0.12), batch=4096) == 0.12


def test_with_lr_batch_every_rate_of_the_run_is_scaled_linearly():
    options = optim.Options(lr=0.1, lr_batch=256, final_lr=1e-4, warmup_epochs=1.0, warmup_lr=0.025)
    found = rates(options, steps=31, batch=1024)

    assert optim.base_lr(options, batch=1024) == 0.4
    assert (found[0], found[10], found[30]) == (0.1, 0.4, 4e-4)


def test_a_step_beyond_the_run_is_a_fault_of_the_loop():
    with pytest.raises(AssertionError, match="step 5 lies outside of a run of 5 steps"):
        optim.learning_rate(optim.Options(lr=0.1), 5, steps=5, steps_per_epoch=5, batch=8)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_sgd_adam_and_adamw_are_those_of_torch(name, kind):
    options = optim.Options(name=name, lr=0.03, weight_decay=0.01)
    made = optim.optimizer(options, nn.Linear(2, 3))

    assert type(made) is kind
    assert [len(group["params"]) for group in made.param_groups] == [2]
    assert made.param_groups[0]["lr"] == 0.03
    assert made.param_groups[0]["weight_decay"] == 0.01


def test_sgd_has_its_momentum_and_nesterov():
    made = optim.optimizer(optim.Options(lr=0.03, momentum=0.8, nesterov=True), nn.Linear(2, 3))

    assert (made.defaults["momentum"], made.defaults["nesterov"]) == (0.8, True)


def test_adamw_has_its_betas():
    made = optim.optimizer(optim.Options(name="adamw", lr=1e-3, betas=(0.9, 0.95)), nn.Linear(2, 3))

    assert made.defaults["betas"] == (0.9, 0.95)


def test_heads_may_have_a_weight_decay_of_their_own():
    network = nn.ModuleDict({"backbone": nn.Linear(2, 3), "head": nn.Linear(3, 4)})
    options = optim.Options(lr=0.1, weight_decay=1e-4, head_weight_decay=5e-4)
    body, head = optim.optimizer(options, network).param_groups

    assert (body["weight_decay"], head["weight_decay"]) == (1e-4, 5e-4)
    assert [each.shape for each in body["params"]] == [(3, 2), (3,)]
    assert [each.shape for each in head["params"]] == [(4, 3), (4,)]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars"])
def test_norms_and_biases_are_not_decayed_when_the_recipe_says_so(name):
    network = resnet18()
    options = optim.Options(name=name, lr=0.1, weight_decay=0.01, decay_norm_and_bias=False)
    decayed, undecayed = optim.optimizer(options, network).param_groups
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    wanted = {id(p) for norm in norms for p in norm.parameters()} | {id(network.fc.bias)}

    assert {id(parameter) for parameter in undecayed["params"]} == wanted
    assert len(decayed["params"]) + len(wanted) == len(list(network.parameters()))
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.01, 0.0)


def test_a_network_of_norms_alone_has_no_empty_group():
    options = optim.Options(lr=0.1, decay_norm_and_bias=False)

    assert len(optim.optimizer(options, nn.BatchNorm2d(3)).param_groups) == 1


def test_frozen_parameters_are_left_out():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    network[0].requires_grad_(False)
    (group,) = optim.optimizer(optim.Options(lr=0.1), network).param_groups

    assert group["params"] == list(network[1].parameters())


def test_nothing_to_train_is_named():
    with pytest.raises(ValueError, match="Linear has no parameter that requires a gradient"):
        optim.optimizer(optim.Options(lr=0.1), nn.Linear(2, 3).requires_grad_(False))


def lars_step(*, weight_decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step of lars takes off a weight of norm 2, and off a bias, at gradients of ones."""
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight, 0.5)
    nn.init.zeros_(layer.bias)
    options = optim.Options(
        name="lars", lr=0.1, weight_decay=weight_decay, decay_norm_and_bias=False
    )
    made = optim.optimizer(options, layer)
    (layer.weight.sum() + layer.bias.sum()).backward()
    made.step()
    return 0.5 - layer.weight.detach(), -layer.bias.detach()


def test_lars_is_timms_and_steps_by_its_closed_form():
    # You et al. 2017, equation 6: lr * eta * |w| / (|g| + decay * |w|) * (g + decay * w).
    weight, bias = lars_step(weight_decay=0.5)

    assert optim.optimizer(
        optim.Options(name="lars", lr=0.1), nn.Linear(2, 3)
    ).__module__.startswith("timm.")
    assert weight.flatten().tolist() == pytest.approx(
        [0.1 * 0.001 * 2 / (4 + 0.5 * 2) * 1.25] * 16, rel=1e-3
    )
    assert bias.tolist() == pytest.approx([0.1] * 4)


def test_lars_adapts_without_weight_decay_too():
    weight, bias = lars_step(weight_decay=0.0)

    assert weight.flatten().tolist() == pytest.approx([0.1 * 0.001 * 2 / 4] * 16, rel=1e-3)
    assert bias.tolist() == pytest.approx([0.1] * 4)


class NoTimm:
    """Python's search for modules on a machine where timm is not installed."""

    def find_spec(self, name, path, target=None):
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")


def test_lars_without_timm_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoTimm(), *sys.meta_path])

    with pytest.raises(ValueError, match=r"'lars' needs timm: pip install 'fastssl\[timm\]'"):
        optim.optimizer(optim.Options(name="lars", lr=0.1), nn.Linear(2, 3))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars"])
def test_an_optimizer_restored_from_its_state_steps_bit_for_bit_alike(name):
    options = optim.Options(name=name, lr=0.05, decay_norm_and_bias=False)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        network(torch.linspace(-1, 1, 24).reshape(4, 6)).square().sum().backward()
        optimizer.step()

    first = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    optimizer = optim.optimizer(options, first)
    for _ in range(3):
        step(first, optimizer)
    second = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    second.load_state_dict(first.state_dict())
    restored = optim.optimizer(options, second)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(first, optimizer)
        step(second, restored)

    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_the_summary_says_every_number_of_a_run():
    options = optim.Options(
        lr=0.03, lr_batch=256, final_lr=3e-5, warmup_epochs=5.0, warmup_lr=0.0075
    )
    text = optim.summary(
        options,
        batch=1024,
        world=8,
        accumulate=4,
        images=1281167,
        steps_per_epoch=1252,
        steps=1001600,
    )

    assert text == (
        "sgd: base lr 0.03, actual lr 0.12 (0.03 at 256 images, scaled to 1024);"
        " warm-up from 0.03 over 5 epochs, then cosine to 0.00012\n"
        "effective batch 1024 = 8 processes x 4 accumulated x 32 images;"
        " 1281167 images and 1252 steps per epoch; 1001600 steps = 800 epochs"
    )


def test_the_summary_names_what_is_not_scaled_and_the_milestones():
    options = optim.Options(lr=0.1, schedule="multistep", milestones=(30, 60.5))
    text = optim.summary(
        options, batch=32, world=1, accumulate=1, images=50, steps_per_epoch=1, steps=1
    )

    assert text == (
        "sgd: base lr 0.1, actual lr 0.1 (not scaled with the batch); x 0.1 at epochs 30, 60.5\n"
        "effective batch 32 = 1 process x 1 accumulated x 32 images;"
        " 50 images and 1 step per epoch; 1 step = 1 epochs"
    )


def test_the_summary_warns_of_a_run_that_is_all_warm_up():
    options = optim.Options(lr=0.1, warmup_epochs=10.0, schedule="constant")
    text = optim.summary(
        options, batch=32, world=1, accumulate=1, images=320, steps_per_epoch=10, steps=40
    )

    assert "then constant (the run ends within its warm-up)" in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0.0}, r"lr \(0.0\) must be above 0"),
        ({"lr_batch": 0}, r"lr_batch \(0\) must be at least 1"),
        ({"momentum": 1.0}, r"momentum \(1.0\) must be at least 0 and below 1"),
        ({"head_weight_decay": -1.0}, r"head_weight_decay \(-1.0\) must be at least 0"),
        ({"name": "adamw", "betas": (0.9, 1.0)}, r"betas \(\(0.9, 1.0\)\) must be at least 0"),
        ({"weight_decay": -1e-4}, r"weight_decay \(-0.0001\) must be at least 0"),
        ({"name": "lars", "trust_coefficient": 0.0}, r"trust_coefficient \(0.0\) must be above"),
        ({"final_lr": 0.2}, r"final_lr \(0.2\) must be from 0 to lr \(0.1\)"),
        ({"warmup_epochs": 1.0, "warmup_lr": 0.2}, r"warmup_lr \(0.2\) must be from 0 to lr"),
        ({"warmup_epochs": -1.0}, r"warmup_epochs \(-1.0\) must be at least 0"),
        ({"gamma": 0.0}, r"gamma \(0.0\) must be above 0"),
        ({"gamma": 1e300}, r"gamma \(1e\+300\) must be above 0 and at most 1"),
        ({"lr": 1e300}, r"lr \(1e\+300\) must be at most 1e\+30"),
        ({"weight_decay": 1e300}, r"weight_decay \(1e\+300\) must be at most 1e\+06"),
        ({"head_weight_decay": 1e7}, r"head_weight_decay \(10000000.0\) must be at most"),
        ({"head_lr": 1e39}, r"head_lr \(1e\+39\) must be at most 1e\+06"),
        ({"name": "lars", "trust_coefficient": 1e39}, r"trust_coefficient \(1e\+39\) must be at"),
        ({"nesterov": True, "momentum": 0.0}, r"momentum \(0.0\) must be above 0 when nesterov"),
        ({"schedule": "multistep"}, "milestones must name the epochs"),
        (
            {"schedule": "multistep", "milestones": (60, 30)},
            r"milestones \(\(60, 30\)\) must ascend",
        ),
        (
            {"schedule": "multistep", "milestones": (5, 30), "warmup_epochs": 5.0},
            r"milestones \(\(5, 30\)\) must come after warmup_epochs \(5.0\)",
        ),
        ({"name": "adamw", "momentum": 0.8}, r"momentum \(0.8\) must be left at 0.9: it is not"),
        ({"name": "lars", "nesterov": True}, r"nesterov \(True\) must be left at False"),
        ({"betas": (0.9, 0.95)}, r"betas \(\(0.9, 0.95\)\) must be left at \(0.9, 0.999\)"),
        ({"trust_coefficient": 0.02}, r"trust_coefficient \(0.02\) must be left at 0.001"),
        ({"schedule": "constant", "final_lr": 0.01}, r"final_lr \(0.01\) must be left at 0.0"),
        ({"milestones": (30,)}, r"milestones \(\(30,\)\) must be left at \(\): it is not read"),
        ({"gamma": 0.2}, r"gamma \(0.2\) must be left at 0.1: .* with name sgd, schedule cosine"),
        ({"warmup_lr": 0.01}, r"warmup_lr \(0.01\) must be left at 0.0: .* warmup_epochs 0.0"),
    ],
)
def test_options_that_cannot_hold_together_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        optim.Options(**{"lr": 0.1, **wrong})


class Deep(nn.Module):
    """A backbone of three stages with parameters, under a head."""

    def __init__(self):
        super().__init__()
        self.backbone = resnet.backbone(resnet.Options(name="resnet10", width=4))
        self.head = nn.Linear(32, 3)


def test_every_stage_learns_at_its_own_share_of_the_learning_rate():
    module = Deep()
    options = optim.Options(lr=0.1, layer_decay=0.5, head_lr=10.0, decay_norm_and_bias=False)
    optimizer = optim.optimizer(options, module)
    optim.set_lr(optimizer, 0.08)
    names = {parameter: name for name, parameter in module.named_parameters()}
    rates: dict[str, set[float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            stage = names[parameter].split(".")[:2]
            rates.setdefault(stage[-1] if stage[0] == "backbone" else "head", set()).add(
                group["lr"]
            )

    assert rates == {
        "conv1": {0.08 / 32},
        "bn1": {0.08 / 32},
        "layer1": {0.08 / 16},
        "layer2": {0.08 / 8},
        "layer3": {0.08 / 4},
        "layer4": {0.08 / 2},
        "head": {0.8},
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_without_shares_groups_and_state_are_as_ever():
    optimizer = optim.optimizer(optim.Options(lr=0.1), Deep())
    optim.set_lr(optimizer, 0.07)

    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == 0.07
    assert "lr_factor" not in optimizer.param_groups[0]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_shares_are_part_of_what_is_saved(name):
    options = optim.Options(lr=0.1, name=name, layer_decay=0.5)
    module = Deep()
    saved = optim.optimizer(options, module).state_dict()
    restored = optim.optimizer(options, module)
    restored.load_state_dict(saved)
    optim.set_lr(restored, 1.0)

    assert sorted({group["lr"] for group in restored.param_groups}) == [
        *(0.5**depth for depth in (5, 4, 3, 2, 1)),
        1.0,
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layer_decay": 0.0}, r"layer_decay \(0.0\) must be above 0 and at most 1"),
        ({"layer_decay": 1.5}, r"layer_decay \(1.5\) must be above 0 and at most 1"),
        ({"head_lr": 0.0}, r"head_lr \(0.0\) must be above 0"),
    ],
)
def test_shares_out_of_range_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        optim.Options(lr=0.1, **wrong)


def test_the_summary_tells_of_shares():
    options = optim.Options(lr=0.1, schedule="constant", layer_decay=0.75, head_lr=10.0)
    text = optim.summary(
        options, batch=8, world=1, accumulate=1, images=8, steps_per_epoch=1, steps=1
    )

    assert "constant, x 0.75 for each stage down from the head, the head x 10\n" in text
